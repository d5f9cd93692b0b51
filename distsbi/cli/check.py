"""`distsbi check`: is a posterior calibrated."""

import json
from pathlib import Path
from typing import Any

import click

from distsbi.cli.group import cli
from distsbi.cli.options import DEVICES, MESH, NETWORK, RUN, SEED, counted, make_mesh, solver_options
from distsbi.cli.sample import table


@cli.command()
@RUN
@click.option("--data", type=click.Path(path_type=Path), help="Pairs that RUN was not trained on, in a Parquet folder.")
@click.option("--task", help="Instead of --data: new pairs of two_moons, gaussian_linear or slcp.")
@click.option("-n", "--n", type=click.IntRange(min=20), default=1_000, show_default=True, help="Pairs, at most.")
@click.option("--nsamples", type=click.IntRange(min=20), default=500, show_default=True, help="Draws for each pair.")
@SEED
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="A P-P plot: .png, .pdf or .svg.")
@solver_options
@NETWORK
@DEVICES
@MESH
def check(
    run: Path,
    data: Path | None,
    task: str | None,
    n: int,
    nsamples: int,
    seed: int,
    as_json: bool,
    plot: Path | None,
    network: str | None,
    devices: int | None,
    mesh: dict[str, int] | None,
    **solver: Any,
) -> None:
    """Say whether RUN is calibrated, by SBC, coverage and TARP on pairs that it was not trained on.

    The columns: p, of a chance as small as what is seen; bias, in standard errors, positive where draws are too low; spread, how many times as far the truths
    lie as the draws say, above 1 where these are too narrow; the share of the truths in each central interval; contraction, the part of the prior's variance that the data take away. That a calibrated run is as narrow as it can be is not said: of two,
    the one that contracts more is the better.

    Make them with another --seed: distsbi simulate ... --seed 1 --n 1000 --out held-out
    """
    if (data is None) == (task is None):
        raise click.UsageError("give either --data, pairs that the run was not trained on, or --task.")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise click.UsageError(f"--plot {plot}: there is no folder {plot.parent}.")
    axes = make_mesh(devices, mesh)
    from distsbi.diagnostics.calibration import LEVELS, check_calibration
    from distsbi.sampling import load
    from distsbi.training.loop import overfitted

    posterior = load(run, mesh=axes, network=network)
    theta, x = _of_folder(data, posterior, n) if data is not None else _of_task(task or "", posterior, seed, n)
    solver = {name: value for name, value in solver.items() if value is not None}
    found = check_calibration(posterior, theta, x, nsamples=nsamples, seed=seed, **solver)
    if plot is not None:
        _plot(found, plot)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
        return
    bias, coverage, blank = found.bias, found.coverage(LEVELS), [""] * (len(LEVELS) + 1)
    rows = [
        (
            name,
            f"{p:.3g}",
            f"{bias[name]:+.1f}" if name in bias else "",
            *(
                [f"{found.spread[name]:.2f}", *(f"{share:.3f}" for share in coverage[name])]
                if name in coverage
                else blank
            ),
            f"{found.contraction[name]:.3f}" if name in found.contraction else "",
        )
        for name, p in found.p_values.items()
    ]
    table(("parameter", "p", "bias", "spread", *(f"{level:.0%}" for level in LEVELS), "contraction"), rows)
    pairs = f"{counted(len(theta), 'pair')} of {counted(nsamples, 'draw')}, seed {seed}"
    if not found.suspect:
        click.echo(f"no sign that it is not calibrated ({pairs})")
        return
    says = ", ".join(f"{name} ({why})" if why else name for name, why in found.wrong.items())
    advice = "train longer or on more simulations"
    if overfitted(posterior.facts.get("training", {})):
        advice = "its validation loss rose after its best: more simulations help, or the mean of several runs, not a longer training"
    click.echo(f"not calibrated: {says} ({pairs}); {advice}")


def _of_folder(path: Path, posterior: Any, n: int) -> tuple[Any, Any]:
    """The first n pairs (theta, x) of a folder."""
    import numpy as np

    from distsbi.data.pairs import open_pairs
    from distsbi.data.parquet import read_file

    folder = open_pairs(path)
    _same_parameters(f"the pairs in {path} are", folder.names, posterior)
    parts, rows = [], 0
    for file in folder.files:
        parts.append(read_file(file, folder.theta_shape, folder.x_shape))
        rows += len(parts[-1][0])
        if rows >= n:
            break
    theta, x = (np.concatenate(part)[:n] for part in zip(*parts, strict=True))
    return theta, x


def _of_task(name: str, posterior: Any, seed: int, n: int) -> tuple[Any, Any]:
    """n new pairs of a task, which no training has seen."""
    import jax

    from distsbi import keys
    from distsbi.tasks import get_task

    task = get_task(name)
    _same_parameters(f"the task {name} is", task.parameter_names, posterior)
    return jax.device_get(task.pairs(keys.checked_key(keys.as_key(seed)), n))


def _same_parameters(what: str, names: tuple[str, ...], posterior: Any) -> None:
    """Raises ValueError if pairs are of other parameters than a run, unless one of them has no names."""
    from distsbi.data.prior import same_parameters

    ours = posterior.parameter_names
    if not same_parameters(names, ours):
        raise ValueError(f"{what} of {', '.join(names)}, and this run is of {', '.join(ours)}.")


def _plot(found: Any, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib; install it with `pip install 'distsbi[report]'`.") from error
    page = Figure(figsize=(6, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(page)
    found.plot(page.subplots())
    page.savefig(path)
