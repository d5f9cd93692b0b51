"""`distsbi catalog | status | verify | plan`: many observations."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from distsbi.cli.group import cli
from distsbi.cli.options import NETWORK, RUN, SEED, Numbers, counted, solver_options, worker_options


@cli.command()
@RUN
@click.argument("catalog")
@click.argument("out")
@click.option("-n", "--nsamples", type=int, default=1_000, show_default=True, help="Draws for each observation.")
@SEED
@worker_options
@click.option(
    "--id-column", default="id", show_default=True, help="Column of unique ids; '' for row numbers, as a .npy has them."
)
@click.option("--x-column", default="x", show_default=True, help="Column with a list or tensor of data in each row.")
@click.option(
    "--x-columns",
    help="Columns that make up the data instead, as a,b,c: scalars, or one for each channel or instrument.",
)
@click.option("--rows-per-shard", type=int, help="Rows in each output file. Default: by size.")
@click.option("--draws/--no-draws", default=True, show_default=True, help="Write draws, or summaries only.")
@click.option("--thin", type=int, default=1, show_default=True, help="Write every so many-th draw.")
@click.option(
    "--quantiles", type=Numbers(), default="0.05,0.5,0.95", show_default=True, help="Of the summaries; '' for none."
)
@solver_options
@NETWORK
def catalog(run: Path, catalog: str, out: str, **options: Any) -> None:
    """Draw for every row of CATALOG (Parquet, .npy, .npz or Zarr) into the folder OUT; the same command again resumes.

    CATALOG and OUT are paths, or URIs such as s3://bucket/out.
    """
    from distsbi.fanout import sample_catalog
    from distsbi.store.place import shown
    from distsbi.store.status import most_frequent

    options["id_column"] = options["id_column"] or None
    options["x_columns"] = options["x_columns"].split(",") if options["x_columns"] else None
    done = sample_catalog(run, catalog, out, **options)
    rate = (
        f"{done.ok_now * options['nsamples'] / done.seconds:,.0f} draws/s with start-up" if done.rows_now else "nothing"
    )
    click.echo(f"{counted(done.n_rows, 'row')} in {shown(out)}: {done.n_ok:,} with draws, {done.n_bad:,} without")
    click.echo(f"now: {done.shards_now} of {done.shards} shards in {done.seconds:.1f} s, {rate}")
    if reasons := most_frequent(done.open().status().reasons, 9):
        for reason, count in reasons.items():
            click.echo(f"{counted(count, 'row')} {reason}", err=True)
        click.echo("each row's reason is in the column `message`", err=True)
    if not done.n_ok:  # nothing to go on with for whoever waits for this command
        raise click.exceptions.Exit(1)
    click.echo(f'next: python -c "import distsbi; print(distsbi.open_catalog({shown(out)!r}).summary())"')


@cli.command()
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def status(out: str, as_json: bool) -> None:
    """Say how far the catalog or the simulation in the folder (or URI) OUT is. Only reads, also while it is being written.

    The command to go on with takes as many workers as there is room for, each with the cores, GPUs and time limit of the last call, unless you add --workers
    and the like; files and rows stay divided as they are.
    """
    import dataclasses

    from distsbi.fanout import provenance, simulation
    from distsbi.store import open_catalog, record
    from distsbi.store.place import shown
    from distsbi.store.status import FAR, most_frequent

    run = record.read_run(out)
    if run is None:
        _refuse_others(out)
    if run is not None and "simulator" in run["definition"]:
        found, go_on = simulation.status(out)
    else:
        opened = open_catalog(out)
        run, found = opened.run, opened.status()
        go_on = provenance.command(run, out)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(found), "about": run["about"]}, indent=1))
        return
    share = f"{1 - found.left / found.rows:.1%}"
    draws = run["definition"].get("nsamples")
    rate = "not known yet" if found.rate is None else f"{found.rate:,.3g} rows/s"
    rate += f", {found.rate * draws:,.3g} draws/s" if found.rate is not None and draws else ""
    rows = [
        ("done", f"{found.shards_done:,} of {found.shards:,} shards, {found.rows - found.left:,} of {found.rows:,} rows ({share})"),
        ("rows", ", ".join(f"{count:,} {name}" for name, count in found.counts.items() if count or name == "ok")),
        ("left", counted(found.left, "row")),
        ("failed", f"{counted(found.failures, 'attempt')} at shards" + _shards(", given up", found.given_up) + _shards(", searched", found.searched)),
        *([("reason", found.last_failure)] if found.last_failure else []),
        *([] if found.complete and found.rate is None else [("rate", rate)]),
        ("to go", "nothing" if found.complete else "not known yet" if found.to_go is None else duration(found.to_go)),
        ("writer", found.writer or "none"),
        *([("last", f"a shard {duration(found.age)} ago")] if found.age is not None and found.writer else []),
    ]  # fmt: skip
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
    if found.damaged:
        count = len(found.damaged)
        told = f"damaged  {counted(count, 'shard')} ({_listed(found.damaged)})"
        click.echo(
            f"{told}: the same command makes {'them' if count > 1 else 'it'} again; distsbi verify {shown(out)} names what is wrong"
        )
    for reason, count in most_frequent(found.reasons, 9).items():
        click.echo(f"{'far' if reason.startswith(FAR) else 'bad':<8} {counted(count, 'row')} {reason}")
    if not found.complete and not found.writer:
        click.echo(f"go on with: {go_on or 'the same call of distsbi.simulate'}")


@cli.command()
@click.argument("out")
@click.option("--fraction", type=float, default=0.001, show_default=True, help="Of the rows, drawn again; 0: none.")
@click.option("--seed", type=int, help="Seed of the choice of these rows. Default: another one every time.")
@click.option("--repair", is_flag=True, help="Make bad shards of a catalog, and those not done yet, again.")
@click.option("--run", help="Where the run directory is now. Default: where it was.")
@click.option("--catalog", help="Where the catalog is now. Default: where it was.")
@NETWORK
@partial(worker_options, kept=True)
def verify(out: str, repair: bool, **options: Any) -> None:
    """Check the checksums of every file in OUT, a catalog, pairs or draws; of a catalog also draw some rows again to compare. Exit code 0: it is complete, and
    nothing is wrong. The options of workers are for --repair; on a machine with a single GPU, which this process takes, give --workers 0."""
    from distsbi.fanout.verify import TOLERANCE, verify
    from distsbi.store import layout, record

    definition = (record.read_run(out) or {"definition": {"simulator": None}})["definition"]
    if "simulator" in definition:
        _verify_folder(out, repair)
        return
    found = verify(out, repair=repair, **options)
    shards = layout.shard_count(definition["n_rows"], definition["rows_per_shard"])
    click.echo(
        f"{found.shards:,} of {shards:,} shards checked" + (f", {found.left:,} not done yet" if found.left else "")
    )
    if found.rows:
        apart = f", {found.close:,} within {TOLERANCE:g} standard deviations" if found.close else ""
        click.echo(f"{counted(found.rows, 'row')} drawn again: {found.same:,} with the same bits{apart}")
    if found.incomparable:
        click.echo(
            f"{counted(found.incomparable, 'row')} cannot be compared: other versions made them; verify with those to compare",
            err=True,
        )
    for where in found.elsewhere:
        click.echo(f"bits may differ there: made on {where}")
    for problem in found.problems:
        said = problem.what
        if problem.shard in found.made:
            said = f"shard {problem.shard} was bad, and has been made again (found: {said})"
        click.echo(f"{said}.", err=True)
    if found.made:
        click.echo(f"made {counted(len(found.made), 'shard')} again")
    if repair and found.left:
        click.echo(f"{counted(found.left, 'shard')} could not be made: {found.reason}", err=True)
        click.echo(f"make them with: {found.command}")
    elif found.reason:
        click.echo(f"all shards are there, but the repair did not end well: {found.reason}; verify again", err=True)
    elif any(problem.unread for problem in found.problems):
        click.echo(
            "what could not be read now is left as it is; verify again when the disk or the store answers", err=True
        )
    elif repair and not found.repaired:
        click.echo("ids that occur more than once are not repaired; sample the catalog into another folder", err=True)
    elif not repair and not found.good:
        click.echo("give --repair to make the bad shards again", err=True)
    elif found.left:
        click.echo(f"not complete; go on with: {found.command}", err=True)
    if repair and found.repaired:
        click.echo(f"{shards:,} of {shards:,} shards are good")
    if not (found.repaired if repair else found.good and not found.left):
        click.get_current_context().exit(1)


def _verify_folder(out: str, repair: bool) -> None:
    from distsbi.fanout.folders import verify_folder

    if repair:
        raise click.UsageError(
            "--repair is for catalogs; verify without it says how bad pairs and draws are made again."
        )
    found = verify_folder(out)
    click.echo(
        f"{counted(found.files, 'file')} of {found.what} checked"
        + ("" if found.complete else "; not complete, the same command goes on")
    )
    for problem in found.problems:
        click.echo(f"{problem}", err=True)
    if not found.good:
        click.echo(found.advice, err=True)
    if not (found.good and found.complete):
        click.get_current_context().exit(1)


def _refuse_others(out: str) -> None:
    """Raises ValueError for a folder without a run of which there is more to say than that."""
    from distsbi.store import layout, record
    from distsbi.store.place import as_place

    place = as_place(out)
    record.refuse_bare_shards(place)
    folder = Path(place.path) if place.local else Path("no folder")
    if (folder / "spec.json").is_file() or (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{out} is a run directory: distsbi info {out} says what it holds, {folder / 'metrics.jsonl'} how its training goes."
        )
    began, files = (folder / layout.HIDDEN).is_dir(), any(folder.glob("*.parquet"))
    if began and not files:
        raise ValueError(
            f"nothing is done in {out} yet: the call that began there is still starting, or ended before its first shard; then the same call begins again."
        )
    if files and not began:
        raise ValueError(
            f"{out} holds files, but no catalog and no simulations; distsbi verify {out} checks pairs and draws of one observation."
        )


def _shards(what: str, numbers: "tuple[int, ...]") -> str:
    return f"{what}: shards {_listed(numbers)}" if numbers else ""


def _listed(numbers: "tuple[int, ...]") -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@cli.command()
@RUN
@click.option("--observations", type=float, required=True, help="Rows of the catalog, such as 1e7.")
@click.option("-n", "--nsamples", type=float, default=1_000, show_default=True, help="Draws for each observation.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Workers of the run. Default: as many as this machine has room for; with --device or --rate one.",
)
@click.option(
    "--device",
    help="Estimate another kind of GPU (h100, h200, a100, l4, ...). Default: rehearse on this machine.",
)
@click.option("--rate", type=float, help="Draws/s of one worker, where it is known; nothing is rehearsed then.")
@click.option("--rows-per-shard", type=click.IntRange(min=1), help="Rows in each output file. Default: by size.")
@click.option("--draws/--no-draws", default=True, show_default=True, help="Write draws, or summaries only.")
@click.option("--thin", type=click.IntRange(min=1), default=1, show_default=True, help="Write every so many-th draw.")
@click.option("--cpus-per-worker", type=int, default=1, show_default=True, help="Cores for each worker.")
@click.option(
    "--gpus-per-worker", "num_gpus_per_worker", type=float, default=0, show_default=True, help="GPUs for each worker."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@solver_options
@NETWORK
def plan(run: Path, as_json: bool, **options: Any) -> None:
    """Say how long a catalog of RUN will take, what it stores, and how to divide it. It rehearses for about a minute."""
    from distsbi.fanout import plan as planning

    given = {name: options.pop(name) for name in ("solver", "steps", "step_size", "rtol", "atol", "solver_options")}
    made = planning.plan(run, **options, **{name: value for name, value in given.items() if value is not None})
    click.echo(planning.to_json(made) if as_json else planning.report(made))
