"""The command line: `distsbi simulate | train | sample | catalog | info | demo`.

Thin: each command reads its options, calls the function of the same name in the library and says what it did. JAX is
imported inside the commands, so that `--help` is quick and `--devices` can still say how many virtual devices JAX has.

Exit codes: 0 done; 1 failed; 2 the user's to mend (options, files, values); 130 interrupted.
"""

import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distsbi import __version__

if TYPE_CHECKING:
    import numpy as np

    from distsbi.config import RunConfig


RESUMES = {"simulate", "train", "catalog"}  # commands that go on where they stopped


class Axes(click.ParamType):
    """`data=2` or `data=4,model=2` as a dict."""

    name = "axis=size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        if not re.fullmatch(r"\w+=-?\d+(,\w+=-?\d+)*", value):
            self.fail(f"{value!r} is no mesh; write axis sizes such as data=2.", param, ctx)
        return {axis: int(size) for axis, size in (part.split("=") for part in value.split(","))}


RUN = click.argument("run", type=click.Path(path_type=Path))
SEED = click.option("--seed", default=0, show_default=True, help="Seed of the random numbers.")
DEVICES = click.option(
    "--devices", type=click.IntRange(min=1), help="Use this many devices; on CPUs they are virtual. Default: all."
)
NETWORK = click.option("--network", help="For a run of your own module: package.module:function that makes it.")
MESH = click.option("--mesh", type=Axes(), help="Sizes of the mesh axes, e.g. data=2. Default: all devices on data.")


def _solver_options(command: Any) -> Any:
    """How to solve; without any of these the grid that was calibrated after training is used."""
    for option in (
        click.option("--atol", type=float, help="Absolute tolerance of an adaptive solver."),
        click.option("--rtol", type=float, help="Relative tolerance of an adaptive solver."),
        click.option("--step-size", type=float, help="Equal steps of this size, e.g. 0.01."),
        click.option("--steps", type=int, help="Steps, on the method's own grid."),
        click.option(
            "--solver",
            help="euler, midpoint, heun, rk4, multistep, ...; adaptive: tsit5. Default: the calibrated grid.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="distsbi")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Amortised posteriors from simulations: train on a mesh, draw at scale."""


@cli.command()
@click.argument("task")
@click.option("-n", "--n", type=click.IntRange(min=1), default=30_000, show_default=True, help="Pairs to simulate.")
@SEED
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the Parquet files.")
def simulate(task: str, n: int, seed: int, out: Path) -> None:
    """Simulate pairs (theta, x) of TASK into a Parquet folder."""
    from distsbi.data.pairs import simulate_pairs
    from distsbi.tasks import get_task

    start = time.perf_counter()
    simulate_pairs(get_task(task), seed, n, out)
    click.echo(f"{n:,} pairs of {task} in {out} ({time.perf_counter() - start:.1f} s)")
    click.echo(f"next: distsbi train --data {out} --out runs/{task}")


@cli.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="YAML file; the options override it.")
@click.option("--task", help="Train on this task: two_moons, gaussian_linear, slcp.")
@click.option("--data", type=click.Path(path_type=Path), help="Train on the pairs in this Parquet folder.")
@click.option(
    "--prior",
    multiple=True,
    metavar="NAME=DISTRIBUTION",
    help="Prior of each parameter of --data in order, e.g. --prior 'mass=LogNormal(0, 0.5)': names it, and keeps draws inside.",
)
@click.option("-n", "--n", type=click.IntRange(min=1), help="Pairs to simulate. Default: new ones at every step.")
@click.option("--network", help="mlp, flux1, flux1joint or simformer. Default: mlp.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory.")
@click.option("--method", help="flow, diffusion (EDM) or score_matching. Default: flow.")
@click.option("--seed", type=int, help="Seed of order and noise. Default: 0.")
@click.option("--nsteps", type=click.IntRange(min=1), help="Updates. Default: scaled to the data.")
@DEVICES
@MESH
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run in --out.")
def train(config_path: Path | None, out: Path, devices: int | None, resume: bool, **flags: Any) -> None:
    """Train a posterior and write its run directory. Give the same command again to resume an interrupted training."""
    from distsbi.config import RunConfig, read_config

    config = _override(read_config(config_path) if config_path else RunConfig(), **flags)
    if out.exists() and not out.is_dir():
        raise click.UsageError(f"--out {out} is a file; give a folder for the run.")
    if (config.data.task is None) == (config.data.path is None):
        raise click.UsageError("give either --task or --data (or section 'data' of the configuration).")
    if not resume and out.exists() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty; leave out --no-resume to go on with it, or give another --out.")
    axes = _mesh(devices, dict(config.mesh) if config.mesh else None)
    start = time.perf_counter()
    pipeline, val_losses = _train(config, out, axes)
    seconds = time.perf_counter() - start
    best = f", best validation loss {min(val_losses):.4f}" if len(val_losses) else ""
    click.echo(f"trained {type(pipeline).__name__} in {seconds:.0f} s{best}; run directory {out}")
    held_out = pipeline.example
    example = (
        ",".join(f"{v:.4g}" for v in held_out.ravel()) if held_out.size <= 10 and pipeline.ch_cond == 1 else "x.npy"
    )
    click.echo(f"next: distsbi sample {out} --x {example} --nsamples 100000 --out draws.npy")


@cli.command()
@RUN
@click.option("--x", "x_o", required=True, help="The observation: a .npy file, or its numbers as 0.1,0.2.")
@click.option("-n", "--nsamples", type=int, default=10_000, show_default=True, help="Draws.")
@SEED
@click.option(
    "--out", type=click.Path(path_type=Path), default="draws.npy", show_default=True, help=".npy or .parquet."
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@_solver_options
@NETWORK
@DEVICES
@MESH
def sample(
    run: Path,
    x_o: str,
    nsamples: int,
    seed: int,
    out: Path,
    overwrite: bool,
    network: str | None,
    devices: int | None,
    mesh: dict[str, int] | None,
    **solver: Any,
) -> None:
    """Draw from the posterior of RUN for one observation."""
    if out.suffix not in (".npy", ".parquet"):
        raise click.UsageError(f"--out must end in .npy or .parquet; got {out}.")
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"--out {out}: there is no folder {out.parent}.")
    axes = _mesh(devices, mesh)
    from distsbi.sampling import load

    posterior = load(run, mesh=axes, network=network)
    x = _observation(x_o, posterior)
    if out.exists() and not overwrite:
        raise click.UsageError(f"{out} exists; give --overwrite or another --out.")
    start = time.perf_counter()
    draws = posterior.sample(seed, x, nsamples, **{name: value for name, value in solver.items() if value is not None})
    seconds = time.perf_counter() - start
    _write_draws(out, draws, posterior.parameter_names)
    click.echo(f"{len(draws):,} draws in {out} ({seconds:.1f} s with compilation, {len(draws) / seconds:,.0f} draws/s)")
    _table(("parameter", "mean", "sd", "5 %", "95 %"), _summaries(draws, posterior.parameter_names))


@cli.command()
@RUN
@click.argument("catalog", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "--nsamples", type=int, default=1_000, show_default=True, help="Draws for each observation.")
@SEED
@click.option(
    "--workers", type=int, help="Worker processes; 0: none, without Ray. Default: as many as there is room for."
)
@click.option("--address", help="Address of a Ray cluster, or auto. Default: $RAY_ADDRESS, else this machine.")
@click.option(
    "--id-column", default="id", show_default=True, help="Column of unique ids; '' for row numbers, as a .npy has them."
)
@click.option("--x-column", default="x", show_default=True, help="Column with a list or tensor of data in each row.")
@click.option("--x-columns", help="Scalar columns that make up the data instead, as a,b,c.")
@click.option("--rows-per-shard", type=int, help="Rows in each output file. Default: by size.")
@click.option("--draws/--no-draws", default=True, show_default=True, help="Write draws, or summaries only.")
@click.option("--thin", type=int, default=1, show_default=True, help="Write every so many-th draw.")
@click.option("--cpus-per-worker", type=int, default=1, show_default=True, help="Cores for each worker.")
@click.option("--gpus-per-worker", type=float, default=0, show_default=True, help="GPUs for each worker.")
@click.option("--time-limit", type=float, help="Seconds for one shard before its worker is replaced. Default: none.")
@_solver_options
@NETWORK
def catalog(run: Path, catalog: Path, out: Path, **options: Any) -> None:
    """Draw for every row of CATALOG (Parquet, .npy or .npz) into the folder OUT; the same command again resumes."""
    from distsbi.fanout import sample_catalog

    options["id_column"] = options["id_column"] or None
    options["x_columns"] = options["x_columns"].split(",") if options["x_columns"] else None
    options["num_gpus_per_worker"] = options.pop("gpus_per_worker")
    done = sample_catalog(run, catalog, out, **options)
    rate = (
        f"{done.rows_now * options['nsamples'] / done.seconds:,.0f} draws/s with start-up"
        if done.rows_now
        else "nothing"
    )
    click.echo(f"{done.n_rows:,} rows in {out}: {done.n_ok:,} with draws, {done.n_bad:,} without")
    click.echo(f"now: {done.shards_now} of {done.shards} shards in {done.seconds:.1f} s, {rate}")
    if done.n_bad:
        click.echo("the reasons are in the column `message`", err=True)
    click.echo(f'next: python -c "import distsbi; print(distsbi.open_catalog({str(out)!r}).summary())"')


@cli.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="All of spec.json.")
def info(run: Path, as_json: bool) -> None:
    """Say what RUN holds."""
    from distsbi.sampling.run import read_spec

    spec = read_spec(run)
    if as_json:
        click.echo(json.dumps(spec, indent=1))
        return
    dim_theta, ch_theta, dim_x, ch_x = spec["sizes"]
    rows = [
        ("network", spec["network"]["name"] or "a user's own module"),
        *([("embedding", json.dumps(spec["network"]["embedded"]["nets"]))] if "embedded" in spec["network"] else []),
        ("method", spec["method"]["name"]),
        ("parameters", f"({dim_theta}, {ch_theta}): {_parameters(spec)}"),
        ("data", f"({dim_x}, {ch_x})"),
        ("solver", json.dumps(spec["solver"])),
        ("certificate", _certificate(spec["facts"].get("certificate"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in spec["versions"].items())),
        ("fingerprint", spec["fingerprint"][:16]),
    ]
    for name, value in rows:
        click.echo(f"{name:<12} {value}")


def _parameters(spec: dict[str, Any]) -> str:
    """Names, with the interval of each that has bounds."""
    scales = spec["standardizer"]
    ends = {"interval": "({low:g}, {high:g})", "above": "({low:g}, inf)", "below": "(-inf, {high:g})"}
    said = []
    for name, kind, (low,), (high,) in zip(
        spec["parameter_names"], scales["kinds"], scales["low"], scales["high"], strict=False
    ):
        said.append(f"{name} in {ends[kind].format(low=low, high=high)}" if kind in ends else name)
    return ", ".join(said)


def _certificate(found: dict[str, Any] | None) -> str:
    """What the choice of the grid says of its error."""
    if not found or "chosen" not in found:
        return f"none: {(found or {}).get('says', 'the grid was not chosen by measurement')}"
    verdict = "under tolerance" if found["met"] else "NOT under tolerance"
    return (
        f"{verdict}: 95 % of draws within {found['chosen']['q95']:.2g} of the posterior's local scale of a tight solve"
    )


@cli.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder for all it writes."
)
@click.option("--quick", is_flag=True, help="A tenth of the work, for a first look; the posterior is rougher.")
@DEVICES
def demo(out: Path, quick: bool, devices: int | None) -> None:
    """Simulate, train, draw a million samples, run a catalog on Ray, and compare with the exact posterior."""
    mesh = _mesh(devices, None)
    if devices is None:
        _mesh(2, None)  # two virtual devices where there are no others; a GPU or TPU machine uses all that it has
    from distsbi.demo import run_demo

    run_demo(out, quick=quick, mesh=mesh)


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        # threads of orbax tell the errors that are told below, with pages of traceback, until the process ends
        for name in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        threading.excepthook = sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        code = cli.main(arguments, prog_name="distsbi", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt) as error:
        so_far = str(error.__cause__ or error)  # click's Abort has its reason behind it
        if not so_far and RESUMES & set(arguments):
            so_far = "what is finished is kept; give the same command again to go on."
        click.echo(f"\nInterrupted{f': {so_far}' if so_far else '.'}", err=True)
        code = 130
    except ValueError as error:
        _complain(f"Error: {error}", debug)
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        hint = "" if debug else " (--debug shows the traceback)"
        _complain(f"Failed: {type(error).__name__}: {error}{hint}", debug)
        code = 1
    sys.exit(code)


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(message, err=True)


def _override(config: "RunConfig", **flags: Any) -> "RunConfig":
    """The configuration with the options that were given put over it, checked as a file is."""
    from distsbi.config import parse_config

    content = config.to_dict()
    data = content.setdefault("data", {})
    if flags["task"] is not None or flags["data"] is not None:
        data.pop("task", None)
        data.pop("path", None)
        data.pop("n", None)
    given = {
        ("data", "task"): flags["task"],
        ("data", "path"): str(flags["data"]) if flags["data"] is not None else None,
        ("data", "n"): flags["n"],
        ("strategy", "model"): flags["network"],
        ("strategy", "method"): flags["method"],
        ("training", "nsteps"): flags["nsteps"],
    }
    for (section, key), value in given.items():
        if value is not None:
            content.setdefault(section, {})[key] = value
    for name in ("mesh", "seed"):
        if flags[name] is not None:
            content[name] = flags[name]
    if flags["prior"]:
        parts = [part.partition("=") for part in flags["prior"]]
        content["prior"] = {name.strip(): text for name, _, text in parts}
    return parse_config(content)


def _mesh(devices: int | None, axes: dict[str, int] | None) -> dict[str, int] | None:
    """Mesh axes for the options; makes that many virtual CPU devices where JAX has not started yet."""
    if devices is not None and axes is None:
        axes = {"data": devices}
    if axes is None or min(axes.values()) < 1:
        return axes
    count = devices or 1
    for size in axes.values() if devices is None else ():
        count *= size
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    return axes


def _train(config: "RunConfig", out: Path, axes: dict[str, int] | None) -> tuple[Any, list[float]]:
    """The pipeline that the configuration names, trained, and its validation losses."""
    from flax import nnx

    from distsbi.data.pairs import open_pairs
    from distsbi.data.prior import parse_prior
    from distsbi.pipelines import PIPELINES
    from distsbi.tasks import TASKS, get_task

    if config.data.path is not None:
        folder = open_pairs(config.data.path)
        (dim_theta, ch_theta), (*grid, ch_x) = folder.theta_shape, folder.x_shape
        dim_x: Any = tuple(grid) if len(grid) > 1 else grid[0]
        dataset: Any = config.data.path
        source = folder.source.get("task")
        prior = get_task(source).prior if source in TASKS else None
        prior = parse_prior(config.prior) if config.prior else prior
    else:
        task = get_task(config.data.task or "")
        dim_theta, ch_theta, dim_x, ch_x = task.dim_theta, 1, task.dim_x, 1
        prior = task.prior
        dataset = task if config.data.n is None else task.pairs(_data_key(config.seed), config.data.n)
    pipeline = PIPELINES[config.pipeline](
        dataset,
        None,
        dim_theta,
        dim_x,
        ch_obs=ch_theta,
        ch_cond=ch_x,
        params=dict(config.model),
        training_config={**config.training_config, "checkpoint_dir": str(out)},
        mesh=axes,
        prior=prior,
        method=config.method,
    )
    _, val_losses = pipeline.train(nnx.Rngs(config.seed))
    return pipeline, val_losses


def _data_key(seed: int) -> Any:
    """The key of simulations made for a training with this seed: none that the training itself uses."""
    import jax

    return jax.random.fold_in(jax.random.key(seed), 2**31)


def _observation(text: str, posterior: Any) -> "np.ndarray":
    """One observation [1, dim_x, ch_x] from a .npy file, an .npz file (an array for each instrument) or from numbers; axes of size one are
    added."""
    import numpy as np

    dim_x, ch_x = posterior.dim_x, posterior.ch_x
    if text.endswith((".npy", ".npz")):
        try:
            x = np.load(text, allow_pickle=False)
            x = x if isinstance(x, np.ndarray) else dict(x)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"--x {text} cannot be read as arrays: {error}.") from error
        if not posterior.layout.is_plain:
            return posterior.check_x(x)[None]
        if isinstance(x, dict):
            raise ValueError(f"--x {text} holds {sorted(x)}; this run takes one array, as .npy.")
    else:
        try:
            x = np.array([float(number) for number in re.split(r"[,\s]+", text.strip())])
        except ValueError as error:
            raise ValueError(f"--x must be a .npy file or numbers such as 0.1,0.2; got {text!r}.") from error
    if ch_x == 1 and x.shape in ((dim_x,), (1, dim_x)):
        x = x.reshape(1, dim_x, 1)
    elif x.shape == (dim_x, ch_x):
        x = x[None]
    if x.shape != (1, dim_x, ch_x):
        raise ValueError(
            f"--x must be one observation of shape ({dim_x}, {ch_x}); got {x.shape}. "
            f"For many observations use distsbi catalog."
        )
    return x


def _write_draws(out: Path, draws: "np.ndarray", names: tuple[str, ...]) -> None:
    """Draws [n, dim_theta, ch_theta] as .npy, or as .parquet with a column for each parameter; whole or not at all."""
    import numpy as np

    from distsbi.files import write_whole

    def write(file: Any) -> None:
        if out.suffix == ".npy":  # not np.save, whose error on a full disk says nothing
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(draws))
            file.write(np.ascontiguousarray(draws).data)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table(_columns(draws, names)), file)

    try:
        write_whole(out, write)
    except OSError as error:
        raise OSError(
            error.errno, f"{out} could not be written ({error.strerror or error}); free space or give another --out"
        ) from error


def _columns(draws: "np.ndarray", names: tuple[str, ...]) -> dict[str, "np.ndarray"]:
    if draws.shape[2] == 1:
        return {name: draws[:, i, 0] for i, name in enumerate(names)}
    return {f"{name}[{c}]": draws[:, i, c] for i, name in enumerate(names) for c in range(draws.shape[2])}


def _summaries(draws: "np.ndarray", names: tuple[str, ...]) -> list[tuple[str, ...]]:
    import numpy as np

    rows = []
    for name, column in _columns(draws, names).items():
        low, high = np.quantile(column, (0.05, 0.95))
        rows.append((name, *(f"{value:.4g}" for value in (column.mean(), column.std(), low, high))))
    return rows


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
