"""`distsbi simulate`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from distsbi.cli.group import cli
from distsbi.cli.options import SEED, counted, prior_texts


@cli.command()
@click.argument("task", required=False)
@click.option("--simulator", metavar="MODULE:FUNCTION", help="Your own: (theta), (theta, rng) or (key, theta) to x.")
@click.option(
    "--prior",
    multiple=True,
    metavar="NAME=DISTRIBUTION",
    help="Of each of its parameters, e.g. --prior 'mass=LogNormal(0, 0.5)'.",
)
@click.option("-n", "--n", type=click.IntRange(min=1), default=30_000, show_default=True, help="Pairs to simulate.")
@SEED
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the Parquet files.")
@click.option(
    "--workers", type=int, help="Worker processes; 0: none, without Ray. Default: as many as there is room for."
)
@click.option("--address", help="Address of a Ray cluster, or auto. Default: $RAY_ADDRESS, else this machine.")
@click.option("--shard-size", type=click.IntRange(min=1), help="Rows in each file. Default: by time and size.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="The simulator takes so many rows at a time; if it raises, all of them fail: return NaN for a bad row. Default: one.",
)
@click.option("--missing", is_flag=True, help="NaN in x is an entry that is missing, not a failure.")
@click.option("--cpus-per-worker", type=int, help="Cores for each worker. Default: 1.")
@click.option("--gpus-per-worker", type=float, help="GPUs for each worker. Default: 0.")
@click.option("--time-limit", type=float, help="Seconds for one shard before its worker is replaced. Default: none.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=1),
    help="Attempts at a shard, and then at each row of it, before the row is put in quarantine. Default: 3.",
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with what is in --out.")
def simulate(
    task: str | None, simulator: str | None, n: int, seed: int, out: Path, resume: bool, **options: Any
) -> None:
    """Simulate pairs (theta, x) of TASK, or of your own --simulator on Ray, into a Parquet folder. The same command again resumes.

    A row whose simulator raises, gives NaN, kills its process or exceeds the time limit is recorded beside the pairs, and the others go on.
    With --batch-size that is all of its batch; NaN alone marks single rows.
    """
    if (task is None) == (simulator is None):
        raise click.UsageError("give either TASK or --simulator.")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty; leave out --no-resume to go on with it, or give another --out.")
    given = {name: value for name, value in options.items() if not (value is None or value is False or value == ())}
    if simulator is not None:
        _simulate_own(simulator, n, seed, out, **given)
        return
    if given:
        raise click.UsageError(
            f"--{next(iter(given)).replace('_', '-')} is for --simulator; a task is simulated in this process."
        )
    from distsbi.data.pairs import simulate_pairs
    from distsbi.tasks import get_task

    start = time.perf_counter()
    simulate_pairs(get_task(task or ""), seed, n, out)
    click.echo(f"{n:,} pairs of {task} in {out} ({time.perf_counter() - start:.1f} s)")
    click.echo(f"next: distsbi train --data {out} --out runs/{task}")


def _simulate_own(simulator: str, n: int, seed: int, out: Path, prior: tuple[str, ...] = (), **options: Any) -> None:
    """Simulations of a user's function, and what was said of those that failed."""
    from distsbi.fanout import simulate as simulate_own

    if not prior:
        raise click.UsageError("--simulator needs --prior NAME=DISTRIBUTION for each of its parameters, in order.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module in this folder, as with python -m
    if "gpus_per_worker" in options:
        options["num_gpus_per_worker"] = options.pop("gpus_per_worker")
    done = simulate_own(simulator, prior_texts(prior), n, out, seed=seed, **options)
    rate = f", {done.rows_now / done.seconds:,.0f} rows/s with start-up" if done.rows_now else ""
    click.echo(f"{counted(done.n_ok, 'pair')} of {simulator} in {out}, {counted(done.n_bad, 'row')} failed")
    click.echo(f"now: {done.shards_now} of {done.shards} shards in {done.seconds:.1f} s{rate}")
    if done.n_bad:
        from distsbi.store.status import count_reasons, most_frequent

        reasons = most_frequent(count_reasons(done.failures()), 5)
        for reason, count in reasons.items():
            click.echo(f"bad      {counted(count, 'row')} {reason}", err=True)
        if done.n_bad > done.n_ok:
            click.echo("most rows failed: look at the reasons before you train on the others", err=True)
        if "missing" not in options and any("NaN or infinite" in reason for reason in reasons):
            click.echo(
                "if NaN is an entry that was not observed, simulate into another folder with --missing", err=True
            )
        click.echo(
            f"their theta are in {out}/_distsbi/failures; a posterior from the others is that given that a simulation succeeds",
            err=True,
        )
    click.echo(f"next: distsbi train --data {out} --out runs/{out.absolute().name}")
