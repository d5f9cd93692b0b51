"""A catalog of observations, sampled by many workers into one folder.

    rows -> shards -> workers (worker.py), on Ray or in this process (session.py) -> shard files (distsbi.store)

Resume is: list the shards that are there, do the rest.
"""

import dataclasses
import functools
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distsbi.fanout import provenance
from distsbi.fanout.arguments import check_folder, check_resources, check_whole, plain
from distsbi.fanout.cluster import cluster_address
from distsbi.fanout.session import Crew, Done, begun
from distsbi.fanout.worker import Job, Worker, unlike
from distsbi.keys import words_of
from distsbi.sampling.run import SPEC, instruments, read_spec
from distsbi.store import Catalog, Output, SourceSpec, open_catalog, open_source, source
from distsbi.store.place import Place, as_place

SHARD_BYTES = 128 * 2**20  # at most this much of draws in a worker's memory
SHARD_DRAWS = 32_768  # at least this many draws, that the work outweighs the file
SHARD_COUNT = 1024  # and about this many shards otherwise,
SHARDS_EACH = 32  # or for each worker: in the last round some have nothing to do, and who dies loses little (benchmarks/large_run.py)

LOADER = "distsbi.sampling:load"


@dataclasses.dataclass(frozen=True)
class CatalogResult(Done):
    """A catalog that is done. Good rows are those with draws."""

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
    solver_options: Mapping[str, float] | None = None,
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
    sampling raises "failed", a row that kills its worker or exceeds `time_limit` "quarantined"; the others go on.

    SIGTERM ends it after the shards that are at work (at most loop.GRACE_SECONDS; without Ray, the one at work).

    Args:
        run: the run directory; with a cluster, one that all its machines see.
        catalog: a Parquet file or folder, .npy, .npz or a Zarr group (see `distsbi.store.source`); a path, or a URI such as
            s3://bucket/catalog. It must stay as it is meanwhile.
        out: the output folder, a path or a URI; made if missing. Not inside the catalog's. A shard is there if and only if it is
            complete: on local disks by a temporary name, fsync and rename, in an object store by one upload of its key. One call at a
            time writes in a folder (see `distsbi.store.writer` for what is guaranteed where).
        nsamples: draws per row.
        seed, rng: an integer seed, or instead a jax key.
        workers: processes, replaced when they die and put on machines as these join; None: as many as the cluster or this machine has
            room for, more when machines join; 0: this process, without Ray, which a row that kills its process takes along.
        address: of a Ray cluster; None: the one in $RAY_ADDRESS, else this machine.
        rows_per_shard: None: by size and number.
        id_column: integers or strings, unique; None: row numbers, and the draws of `sample_batched` over the rows. A .npy can hold no
            ids: with the default it has row numbers.
        x_column, x_columns: one list or tensor column, or several columns that are joined; of data with channels one for each channel. Of a run of
            several instruments one for each: by default those of their names, in any order; others in the alphabetical order of these names.
        solver, steps, step_size, rtol, atol, solver_options: as for `Posterior.sample`.
        draws, thin, quantiles: what is written: draws at all, every thin-th, which quantiles.
        network: for a run of a user's own module, "package.module:function" that makes it, importable on the workers.
        num_gpus_per_worker, cpus_per_worker: what each worker gets.
        max_failures: attempts at a shard. If the last killed its worker or took too long, it is halved until the guilty row is found,
            which is quarantined after as many attempts of its own; if it raised, the shard is given up.
        time_limit: seconds for one shard before its worker is killed, which counts as a failure. Without it a row that hangs is waited for.
        show_progress: a progress bar, on a terminal.

    Raises:
        ValueError: arguments or input that cannot be used, or an output folder of another run; says what to do.
        RuntimeError: at the end, if shards were given up. All others are finished.
        OSError: the disk is full. What is finished stays.
        KeyboardInterrupt: says how far it came; after SIGTERM its subclass `distsbi.fanout.Terminated`.
    """
    began = time.monotonic()
    for name, value in (("run", run), ("catalog", catalog), ("out", out)):
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(
                f"{name} must be a path, for workers are other processes; got {type(value).__name__}. Save a posterior with save(path), and data in a file "
                f"(np.save), or draw here with sample_batched."
            )
    nsamples, workers, rows_per_shard, steps, thin = map(plain, (nsamples, workers, rows_per_shard, steps, thin))
    cpus_per_worker, num_gpus_per_worker, max_failures, time_limit = map(
        plain, (cpus_per_worker, num_gpus_per_worker, max_failures, time_limit)
    )
    check_whole("nsamples", nsamples)
    check_whole("rows_per_shard", rows_per_shard, optional=True)
    check_resources(workers, cpus_per_worker, num_gpus_per_worker, max_failures, time_limit)
    if (workers == 0 or cluster_address(address) is None) and not Path(run).is_dir():
        raise ValueError(f"there is no run directory at {run}; give the path that the pipeline was saved to.")
    where, folder = as_place(catalog), as_place(out)
    _check_out(where, folder)
    parts, columns = instruments(run), None if x_columns is None else tuple(x_columns)
    if parts is not None and (columns is None or set(columns) == set(parts)):
        columns = parts  # in the order that x is packed in
    spec = SourceSpec(where.url, id_column, x_column, columns)
    given = {"solver": solver, "steps": steps, "step_size": step_size, "rtol": rtol, "atol": atol,
             "solver_options": solver_options}  # fmt: skip
    opened = open_source(spec)
    job = Job(
        run=str(Path(run).absolute()),
        source=spec,
        glance=source.glance(spec),
        out=folder.url,
        nsamples=nsamples,
        seed=_seed(seed, rng),
        options={name: plain(value) for name, value in given.items() if value is not None},
        output=Output(draws, thin, tuple(map(plain, quantiles))),
        loader=LOADER,
        network=network,
    )
    source.check_ids(opened, spec)
    n_rows, digest = opened.n_rows, source.fingerprint(spec)
    del opened
    crew = Crew(
        "catalog", Worker, job, workers, address, cpus_per_worker, num_gpus_per_worker, max_failures, time_limit,
        most=n_rows, unlike=functools.partial(unlike, run=job.run), check=_check_posterior(job.run),
    )  # fmt: skip
    asked = {
        "nsamples": nsamples,
        "n_rows": n_rows,
        "catalog": {"content": digest, "id_column": spec.id_column, "x": list(spec.columns)},
        "output": {"draws": draws, "thin": thin if draws else 1, "quantiles": list(job.output.quantiles)},
    }
    words = words_of(job.seed) if isinstance(job.seed, int) else job.seed
    known = {**asked, "seed": list(words), **({} if rows_per_shard is None else {"rows_per_shard": rows_per_shard})}
    with begun(folder, crew, known) as session:
        told = session.told
        if rows_per_shard is None:
            rows_per_shard = session.there.get("rows_per_shard")
        if rows_per_shard is None:
            rows_per_shard = choose_rows_per_shard(n_rows, nsamples, math.prod(told["sizes"]), session.room())
        definition = {
            **told["definition"],
            **asked,
            "rows_per_shard": rows_per_shard,
        }
        shards = session.claim(definition, provenance.about(job, told))
        made = session.work(shards, shards, nsamples, show_progress)
        return CatalogResult.of(folder, shards, made, time.monotonic() - began)


def choose_rows_per_shard(n_rows: int, nsamples: int, size: int, workers: int = 0) -> int:
    """Rows of a shard where none is given, and the folder has no run yet; later calls, with other workers, keep what it has."""
    fewest = math.ceil(SHARD_DRAWS / nsamples)
    most = max(1, SHARD_BYTES // (4 * nsamples * size))
    rows = min(max(math.ceil(n_rows / max(SHARD_COUNT, SHARDS_EACH * workers)), fewest), most, n_rows)
    return math.ceil(n_rows / math.ceil(n_rows / rows))  # as many shards, of one size


def _check_posterior(run: str) -> Callable[[Mapping[str, Any]], None]:
    """Raises ValueError, given what a worker tells, if its run is not the one that is here; of a run that only workers see it knows nothing."""
    here = read_spec(run)["fingerprint"] if (Path(run) / SPEC).is_file() else None

    def check(told: Mapping[str, Any]) -> None:
        if here not in (None, told["definition"]["posterior"]):
            raise ValueError(
                f"the worker on {told['worker']['host']} found another posterior at {run} than there is on {socket.gethostname()}; give a "
                "run directory that all machines share, or the same copy everywhere."
            )

    return check


def _seed(seed: int, rng: Any) -> int | tuple[int, int]:
    if rng is not None and seed != 0:
        raise ValueError("give seed or rng, not both.")
    value = seed if rng is None else rng
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    from distsbi.keys import key_words

    return key_words(value)


def _check_out(catalog: Place, out: Place) -> None:
    """Raises ValueError if `out` is no folder, or one that is read as part of the catalog."""
    if out.local:
        folder = check_folder(Path(out.path).resolve())
    if catalog.local and out.local:
        inside = Path(catalog.path).is_dir() and folder.is_relative_to(Path(catalog.path).resolve())
    else:
        inside = catalog.fs == out.fs and f"{out.path}/".startswith(f"{catalog.path.rstrip('/')}/")
    if inside:
        raise ValueError(
            f"out {out} lies in the catalog's folder {catalog}, whose files are all read; give a folder outside the catalog's."
        )
