"""`distsbi info | demo`: what a run holds, and all of distsbi at once."""

import contextlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from distsbi.cli.group import cli
from distsbi.cli.log import told
from distsbi.cli.options import DEVICES, RUN, make_mesh


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
    dim_theta, ch_theta = spec["sizes"][:2]
    rows = [
        ("network", spec["network"]["name"] or "a user's own module"),
        *([("embedding", json.dumps(spec["network"]["embedded"]["nets"]))] if "embedded" in spec["network"] else []),
        ("method", spec["method"]["name"]),
        *([("kind", "a student, bound to the steps of its solver")] if "student" in spec.get("kind", ()) else []),
        *_training(spec["facts"].get("training")),
        ("parameters", f"({dim_theta}, {ch_theta}): {_parameters(spec)}"),
        ("data", _data(spec)),
        ("solver", json.dumps(spec["solver"])),
        ("certificate", _certificate(spec["facts"].get("certificate"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in spec["versions"].items())),
        ("fingerprint", spec["fingerprint"][:16]),
    ]
    for name, value in rows:
        click.echo(f"{name:<12} {value}")


def _training(facts: dict[str, Any] | None) -> list[tuple[str, str]]:
    """How it was trained; nothing of a run that does not say, such as one that was imported."""
    if not facts or "steps" not in facts:
        return []
    config, loss = facts.get("config", {}), facts.get("best_val_loss")
    best = "" if loss is None else f", best validation loss {loss:.4f}"
    return [("training", f"{facts['steps']} updates of {config.get('batch_size')} pairs{best}")]


def _parameters(spec: dict[str, Any]) -> str:
    """Names, with the interval of each that has bounds."""
    scales = spec["standardizer"]
    inside = "({low:g}, {high:g})"
    ends = {"interval": inside, "decades": inside, "above": "({low:g}, inf)", "below": "(-inf, {high:g})"}
    said = []
    for name, kind, (low,), (high,) in zip(
        spec["parameter_names"], scales["kinds"], scales["low"], scales["high"], strict=False
    ):
        said.append(f"{name} in {ends[kind].format(low=low, high=high)}" if kind in ends else name)
    return ", ".join(said)


def _data(spec: dict[str, Any]) -> str:
    """The shape of x, and of which entries the logarithm is taken."""
    dim_x, ch_x = spec["sizes"][2:]
    if "unconditional" in spec.get("kind", ()) or not dim_x:
        return "none: a density without conditions"
    logs = [i for i, kind in enumerate(spec["standardizer"].get("x_kinds", ())) if kind == "positive"]
    which = (
        "all entries"
        if len(logs) == dim_x
        else f"entries {', '.join(map(str, logs[:8]))}{', ...' if len(logs) > 8 else ''}"
    )
    missing = (
        "; entries may be missing (NaN)"
        if spec["network"]["params"] and spec["network"]["params"].get("missing")
        else ""
    )
    names = spec["facts"].get("given", ())
    which_given = f": {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}, given" if names else ""
    return f"({dim_x}, {ch_x}){which_given}{missing}" + (
        f"; positive over decades, and taken by their logarithm: {which}" if logs else ""
    )


def _certificate(found: dict[str, Any] | None) -> str:
    """What the choice of the grid says of its error."""
    if not found or "chosen" not in found:
        return f"none: {(found or {}).get('says', 'the grid was not chosen by measurement')}"
    verdict, q95 = "under tolerance" if found["met"] else "NOT under tolerance", found["chosen"]["q95"]
    if q95 is None:
        return f"{verdict}: more than 5 % of draws are not finite"
    return f"{verdict}: 95 % of draws within {q95:.2g} of the posterior's local scale of a tight solve (of the solver's error alone)"


@cli.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder for all it writes."
)
@click.option("--quick", is_flag=True, help="A tenth of the work, for a first look; the posterior is rougher.")
@DEVICES
def demo(out: Path, quick: bool, devices: int | None) -> None:
    """Simulate, train, draw a million samples, run a catalog on Ray, and compare with the exact posterior."""
    mesh = make_mesh(devices, None)
    if devices is None:
        make_mesh(2, None)  # two virtual devices where there are no others; a GPU or TPU machine uses all that it has
    from distsbi.demo import run_demo

    watched = sys.stderr.isatty()  # by bars; else by lines
    with contextlib.nullcontext() if watched else told(logging.INFO):
        run_demo(out, quick=quick, mesh=mesh, program=_program())


def _program() -> str:
    """What to type for this command: where its folder is on no path, its file."""
    file = Path(sys.argv[0])
    if file.name != "distsbi" or shutil.which("distsbi"):
        return "distsbi"
    near = os.path.relpath(file)
    return str(file) if near.startswith("..") else near
