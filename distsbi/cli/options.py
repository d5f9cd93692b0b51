"""Options that several commands share, and what is made of them."""

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import click


class Axes(click.ParamType):
    """`data=2` or `data=4,model=2` as a dict."""

    name = "axis=size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        if not re.fullmatch(r"\w+=-?\d+(,\w+=-?\d+)*", value):
            self.fail(f"{value!r} is no mesh; write axis sizes such as data=2.", param, ctx)
        return {axis: int(size) for axis, size in (part.split("=") for part in value.split(","))}


class Numbers(click.ParamType):
    """`0.05,0.5` as a tuple."""

    name = "a,b,c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(",") if part)
        except ValueError:
            self.fail(f"{value!r} are no numbers; write them as 0.05,0.5,0.95.", param, ctx)


RUN = click.argument("run", type=click.Path(path_type=Path))
SEED = click.option("--seed", default=0, show_default=True, help="Seed of the random numbers.")
DEVICES = click.option(
    "--devices",
    type=click.IntRange(min=1),
    help="Use this many devices (in each process); on CPUs they are virtual. Default: all.",
)
NETWORK = click.option("--network", help="For a run of your own module: package.module:function that makes it.")
MESH = click.option("--mesh", type=Axes(), help="Sizes of the mesh axes, e.g. data=2. Default: all devices on data.")


def several_processes(command: Any) -> Any:
    """This process as one of several that run the same command."""
    for option in (
        click.option(
            "--distributed",
            type=click.Choice(["auto", "off"]),
            default="auto",
            show_default=True,
            help="auto: join the other processes of a SLURM step, of mpirun or of a TPU pod of GKE.",
        ),
        click.option("--process-id", type=int, help="Number of this process, from 0 on."),
        click.option("--num-processes", type=int, help="How many processes run this command."),
        click.option(
            "--coordinator", metavar="HOST:PORT", help="Where they meet: a free port of the machine of process 0."
        ),
    ):
        command = option(command)
    return command


def worker_options(command: Any, *, kept: bool = False) -> Any:
    """Who draws a catalog. `kept`: what each worker gets is by default what the folder says."""
    then = " Default: as when it was drawn." if kept else ""
    for option in reversed(
        (
            click.option(
                "--workers",
                type=int,
                help="Worker processes; 0: none, without Ray. Default: as many as there is room for.",
            ),
            click.option(
                "--address", help="Address of a Ray cluster, or auto. Default: $RAY_ADDRESS, else this machine."
            ),
            click.option(
                "--cpus-per-worker",
                type=int,
                default=None if kept else 1,
                show_default=True,
                help=f"Cores for each worker.{then}",
            ),
            click.option(
                "--gpus-per-worker",
                "num_gpus_per_worker",
                type=float,
                default=None if kept else 0,
                show_default=True,
                help=f"GPUs for each worker.{then}",
            ),
            click.option(
                "--time-limit",
                type=float,
                help=f"Seconds for one shard before its worker is replaced.{then or ' Default: none.'}",
            ),
            click.option(
                "--max-failures",
                type=click.IntRange(min=1),
                default=3,
                show_default=True,
                help="Attempts at a shard, and then at each row of it, before the row is put in quarantine.",
            ),
        )
    ):
        command = option(command)
    return command


def _numbers_by_name(ctx: click.Context, param: click.Parameter, parts: tuple[str, ...]) -> dict[str, float] | None:
    """NAME=NUMBER of every --solver-option; None where there is none."""
    found: dict[str, float] = {}
    for name, _, number in (part.partition("=") for part in parts):
        if name in found:
            raise click.BadParameter(f"{name} is given twice; keep one.", ctx, param)
        try:
            found[name] = float(number)
        except ValueError:
            raise click.BadParameter(
                f"write a number by name, such as churn=10; got {name}={number}.", ctx, param
            ) from None
    return found or None


def solver_options(command: Any) -> Any:
    """How to solve; without any of these the grid that was calibrated after training is used."""
    for option in (
        click.option(
            "--solver-option",
            "solver_options",
            multiple=True,
            metavar="NAME=NUMBER",
            callback=_numbers_by_name,
            help="Of a stochastic solver, such as churn=10; once for each.",
        ),
        click.option("--atol", type=float, help="Absolute tolerance of an adaptive solver."),
        click.option("--rtol", type=float, help="Relative tolerance of an adaptive solver."),
        click.option("--step-size", type=float, help="Equal steps of this size, e.g. 0.01."),
        click.option("--steps", type=int, help="Steps, on the method's own grid."),
        click.option(
            "--solver",
            help="euler, midpoint, heun, rk3, rk4, multistep, ...; adaptive: tsit5. Default: the calibrated grid.",
        ),
    ):
        command = option(command)
    return command


def make_mesh(devices: int | None, axes: dict[str, int] | None, processes: int = 1) -> dict[str, int] | None:
    """Mesh axes for the options; makes that many virtual CPU devices where JAX has not started yet. `devices` are those of each of the
    processes, the axes those of all."""
    if devices is not None and axes is None:
        axes = {"data": devices * processes}
    if axes is None or min(axes.values()) < 1:
        return axes
    count = devices or max(1, math.prod(axes.values()) // processes)
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    return axes


def prior_texts(priors: tuple[str, ...]) -> dict[str, str]:
    """NAME=DISTRIBUTION of every --prior. Raises click.UsageError for a name that comes twice, or one that is missing."""
    parts = [(name.strip(), text) for name, _, text in (part.partition("=") for part in priors)]
    twice = [name for name, count in Counter(name for name, _ in parts).items() if count > 1]
    if twice:
        raise click.UsageError(f"--prior {twice[0]} is given twice; keep one.")
    if wrong := [part for part in priors if "(" in part.partition("=")[0] or "=" not in part]:
        raise click.UsageError(
            f"--prior {wrong[0]!r} has no = after a name; write it as NAME=DISTRIBUTION, such as 'mass=LogNormal(0, 0.5)'."
        )
    return dict(parts)


def counted(count: int, noun: str) -> str:
    """A number and its noun, such as 1 row or 2,000 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
