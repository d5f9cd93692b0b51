"""A catalog of observations, sampled by many workers into one folder.

    rows -> shards -> workers (worker.py), on Ray or in this process (pool.py) -> shard files (distsbi.store)

Resume is: list the shards that are there, do the rest.
"""

import contextlib
import dataclasses
import datetime
import errno
import math
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import distsbi
from distsbi.fanout import cluster
from distsbi.fanout.pool import InProcess, Pool, RayPool, one_line
from distsbi.fanout.worker import Job, Shards
from distsbi.files import is_disk_full
from distsbi.sampling.run import instruments
from distsbi.store import Catalog, Output, SourceSpec, layout, open_catalog, open_source, record, schema, source

SHARD_BYTES = 128 * 2**20  # at most this much of draws in a worker's memory
SHARD_DRAWS = 32_768  # at least this many draws, that the work outweighs the file
SHARD_COUNT = 1024  # and about this many shards otherwise

LOADER = "distsbi.sampling:load"


@dataclasses.dataclass(frozen=True)
class CatalogResult:
    """A catalog that is done.

    `n_ok`, `n_bad`: rows with draws and without, of the whole catalog; `counts`: by status; `shards`: all,
    `shards_now`: those done in this call, in `seconds` with `rows_now` rows.
    """

    path: Path
    n_rows: int
    n_ok: int
    n_bad: int
    counts: dict[str, int]
    shards: int
    shards_now: int
    rows_now: int
    seconds: float

    def open(self) -> Catalog:
        """The catalog, to read."""
        return open_catalog(self.path)


def sample_catalog(
    run: str | os.PathLike[str],
    catalog: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    nsamples: int,
    seed: int = 0,
    rng: Any = None,
    workers: int | None = None,
    address: str | None = None,
    rows_per_shard: int | None = None,
    id_column: str | None = "id",
    x_column: str = "x",
    x_columns: Sequence[str] | None = None,
    solver: str | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    draws: bool = True,
    thin: int = 1,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    network: str | None = None,
    num_gpus_per_worker: float = 0,
    cpus_per_worker: int = 1,
    max_failures: int = 3,
    time_limit: float | None = None,
    show_progress: bool = True,
) -> CatalogResult:
    """Draws from the posterior of every row of a catalog, into a folder of Parquet shards for `distsbi.open_catalog`.

    Called again with the same arguments it goes on where it stopped. The draws depend on the run, the seed and a
    row's id alone, not on workers, shards, order or failures: `posterior.sample(key, x, observation_id=...)` with the
    row's `observation_id` repeats them. A row with unusable x gets status "invalid" and a message, a row whose
    sampling raises "failed"; the others go on.

    Args:
        run: the run directory; with a cluster, one that all its machines see.
        catalog: a Parquet file or folder, .npy or .npz (see `distsbi.store.source`). It must stay as it is meanwhile.
        out: the output folder; made if missing. Not inside the catalog's.
        nsamples: draws per row.
        seed, rng: an integer seed, or instead a jax key.
        workers: processes; None: as many as the cluster or this machine has room for; 0: this process, without Ray.
        address: of a Ray cluster; None: the one in $RAY_ADDRESS, else this machine.
        rows_per_shard: None: by size and number.
        id_column: integers or strings, unique; None: row numbers, and the draws of `sample_batched` over the rows. A .npy can hold no
            ids: with the default it has row numbers.
        x_column, x_columns: one list or tensor column, or several columns that are joined. Default for a run of several instruments: a
            column of the name of each.
        solver, steps, step_size, rtol, atol: as for `Posterior.sample`.
        draws, thin, quantiles: what is written: draws at all, every thin-th, which quantiles.
        network: for a run of a user's own module, "package.module:function" that makes it, importable on the workers.
        num_gpus_per_worker, cpus_per_worker: what each worker gets.
        max_failures: attempts at a shard before it is given up.
        time_limit: seconds for one shard before its worker is killed, which counts as a failure.
        show_progress: a progress bar, on a terminal.

    Raises:
        ValueError: arguments or input that cannot be used, or an output folder of another run; says what to do.
        RuntimeError: at the end, if shards were given up. All others are finished.
        OSError: the disk is full. What is finished stays.
        KeyboardInterrupt: says how far it came.
    """
    began = time.monotonic()
    nsamples, workers, rows_per_shard, steps, thin, cpus_per_worker, max_failures = map(
        _plain, (nsamples, workers, rows_per_shard, steps, thin, cpus_per_worker, max_failures)
    )
    _check_arguments(nsamples, workers, rows_per_shard, cpus_per_worker, num_gpus_per_worker, max_failures, time_limit)
    if not address and not Path(run).is_dir():
        raise ValueError(f"there is no run directory at {run}; give the path that the pipeline was saved to.")
    _check_out(Path(catalog).resolve(), Path(out).resolve())
    columns = tuple(x_columns) if x_columns is not None else instruments(run)
    spec = SourceSpec(str(Path(catalog).absolute()), id_column, x_column, columns)
    given = {"solver": solver, "steps": steps, "step_size": step_size, "rtol": rtol, "atol": atol}
    opened = open_source(spec)
    job = Job(
        run=str(Path(run).absolute()),
        source=spec,
        glance=source.glance(spec),
        out=str(Path(out).absolute()),
        nsamples=nsamples,
        seed=_seed(seed, rng),
        options={name: _plain(value) for name, value in given.items() if value is not None},
        output=Output(draws, thin, tuple(map(_plain, quantiles))),
        loader=LOADER,
        network=network,
    )
    source.check_ids(opened, spec)
    n_rows, digest = opened.n_rows, source.fingerprint(spec)
    del opened
    folder = Path(job.out)
    with contextlib.ExitStack() as stack:
        try:
            (folder / layout.HIDDEN).mkdir(parents=True, exist_ok=True)
            stack.enter_context(layout.one_writer(folder))
            if workers == 0:
                pool: Pool = InProcess(job)
            else:
                cpus, gpus = cpus_per_worker, num_gpus_per_worker
                stack.enter_context(cluster.connected(address, workers, cpus, gpus))
                count = min(workers or cluster.cluster_workers(cpus, gpus), n_rows)
                environment = cluster.worker_environment(cpus, gpus)
                pool = RayPool(job, count, environment, cpus, gpus, time_limit, max_failures)
            stack.enter_context(pool)
            told = pool.start()
            found = record.read_run(folder)
            if rows_per_shard is None and found is not None:
                rows_per_shard = found["definition"].get("rows_per_shard")
            rows_per_shard = rows_per_shard or _rows_per_shard(n_rows, nsamples, math.prod(told["sizes"]))
            definition = {
                **told["definition"],
                "nsamples": nsamples,
                "n_rows": n_rows,
                "rows_per_shard": rows_per_shard,
                "catalog": {"content": digest, "id_column": spec.id_column, "x": list(spec.columns)},
                "output": {"draws": draws, "thin": thin if draws else 1, "quantiles": list(job.output.quantiles)},
            }
            record.begin(folder, definition, _about(job, told))
            layout.remove_partial(folder)
            shards = Shards(n_rows, rows_per_shard, record.fingerprint(definition))
            pool.begin(shards)
            return _work(pool, shards, folder, max_failures, show_progress, began)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped{_so_far(folder)}; the same call goes on from there.") from None
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk that holds {folder} is full{_so_far(folder)}; free some space, and the same call goes on "
                "from there",
            ) from error


def _work(
    pool: Pool, shards: Shards, folder: Path, max_failures: int, show_progress: bool, began: float
) -> CatalogResult:
    """The loop: keeps the pool filled, notes outcomes, tries failed shards again."""
    before = layout.shards_done(folder, shards.count)
    present = set(before)
    todo = deque(n for n in range(shards.count) if n not in present)
    counts = Counter(dict.fromkeys(schema.STATUSES, 0))
    for shard in before:
        counts.update(schema.read_counts(layout.shard_file(folder, shard, shards.count)))
    failures: Counter[int] = Counter()
    given_up: dict[int, str] = {}
    in_flight = rows_now = 0
    shards_now = len(todo)
    with tqdm(
        total=shards.n_rows,
        initial=counts.total(),
        unit="rows",
        desc="catalog",
        disable=None if show_progress else True,
    ) as bar:
        while todo or in_flight:
            while todo and pool.room():
                pool.submit(todo.popleft())
                in_flight += 1
            for outcome in pool.wait():
                in_flight -= 1
                shard = outcome.shard
                if outcome.manifest is not None:
                    layout.append_journal(folder, {"event": "done", **outcome.manifest})
                    counts.update({name: outcome.manifest[name] for name in schema.STATUSES})
                    rows_now += outcome.manifest["rows"]
                    bar.update(outcome.manifest["rows"])
                    bar.set_postfix(bad=counts.total() - counts[schema.OK])
                    continue
                if is_disk_full(outcome.error):
                    raise outcome.error  # type: ignore[misc]
                failures[shard] += outcome.blamed
                if outcome.blamed:
                    reason = one_line(outcome.error)
                    layout.append_journal(
                        folder, {"event": "failed", "shard": shard, "attempt": failures[shard], "error": reason}
                    )
                if failures[shard] < max_failures:
                    todo.append(shard)
                else:
                    given_up[shard] = reason
    if given_up:
        shard, reason = next(iter(given_up.items()))
        rows = shards.rows(shard)
        raise RuntimeError(
            f"{len(given_up)} of {shards.count} shards failed {max_failures} times each and were given up, e.g. shard "
            f"{shard} (rows {rows.start} to {rows.stop - 1}): {reason}. All others are finished in {folder}; the same "
            "call tries these again."
        )
    bad = counts.total() - counts[schema.OK]
    return CatalogResult(
        folder,
        shards.n_rows,
        counts[schema.OK],
        bad,
        dict(counts),
        shards.count,
        shards_now,
        rows_now,
        time.monotonic() - began,
    )


def _rows_per_shard(n_rows: int, nsamples: int, size: int) -> int:
    """Rows of a shard, from what defines the run alone: workers may come and go."""
    fewest = math.ceil(SHARD_DRAWS / nsamples)
    most = max(1, SHARD_BYTES // (4 * nsamples * size))
    return min(max(math.ceil(n_rows / SHARD_COUNT), fewest), most, n_rows)


def _seed(seed: int, rng: Any) -> int | tuple[int, int]:
    if rng is not None and seed != 0:
        raise ValueError("give seed or rng, not both.")
    value = seed if rng is None else rng
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    from distsbi.keys import key_words

    return key_words(value)


def _about(job: Job, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": job.run,
        "catalog": job.source.path,
        "parameter_names": told["parameter_names"],
        "observation_ids": "row number" if job.source.id_column is None else "blake2b of id",
        "first_worker": told["worker"],
        "distsbi": distsbi.__version__,
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _so_far(folder: Path) -> str:
    """ ", 12 of 100 shards are finished in out", or nothing before a run began."""
    found = record.read_run(folder)
    if found is None:
        return ""
    count = -(-found["definition"]["n_rows"] // found["definition"]["rows_per_shard"])
    return f", {len(layout.shards_done(folder, count))} of {count} shards are finished in {folder}"


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's: they are counted, compared and written as JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _check_out(catalog: Path, out: Path) -> None:
    """Raises ValueError if `out` is no folder, or one that is read as part of the catalog."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out must be a folder; {there} is a file. Give another path.")
    if catalog.is_dir() and out.is_relative_to(catalog):
        raise ValueError(
            f"out {out} lies in the catalog's folder {catalog}, whose Parquet files are all read; give a folder "
            "outside the catalog's."
        )


def _check_arguments(
    nsamples: Any, workers: Any, rows_per_shard: Any, cpus: Any, gpus: Any, max_failures: Any, time_limit: Any
) -> None:
    """Raises ValueError naming the first that is out of range."""
    for name, value, least in (
        ("nsamples", nsamples, 1),
        ("workers", workers, 0),
        ("rows_per_shard", rows_per_shard, 1),
        ("cpus_per_worker", cpus, 1),
        ("max_failures", max_failures, 1),
    ):
        optional = name in ("workers", "rows_per_shard")
        if not (optional and value is None) and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            wanted = "a positive integer" if least else "None, 0 (no Ray) or a positive integer"
            raise ValueError(f"{name} must be {wanted}; got {value!r}.")
    if gpus < 0:
        raise ValueError(f"num_gpus_per_worker must not be negative; got {gpus!r}.")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds or None; got {time_limit!r}.")
    if time_limit is not None and workers == 0:
        raise ValueError("time_limit needs workers of their own to kill; give workers >= 1.")
