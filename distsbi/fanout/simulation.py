"""Simulations of a user's own simulator, by many workers into one folder of pairs that `train` reads.

    prior, seed -> theta of every row (simulator.py) -> workers (simulation_worker.py), on Ray or in this process (session.py) -> shards of pairs

Resume is: list the shards that are there, do the rest.
"""

import dataclasses
import datetime
import math
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

import distsbi
from distsbi import keys
from distsbi.data.pairs import Pairs, mark_finished, mark_unfinished, read_pairs
from distsbi.environment import versions
from distsbi.fanout import provenance, simulator as simulators
from distsbi.fanout.agenda import one_line
from distsbi.fanout.arguments import check_folder, check_resources, check_whole, plain
from distsbi.fanout.cluster import cluster_address
from distsbi.fanout.pool import Pool
from distsbi.fanout.session import Crew, Done, begun
from distsbi.fanout.simulation_worker import (
    Job,
    Look,
    Plan,
    SimulationWorker,
    read_failures,
    read_manifest,
    unlike,
)
from distsbi.fanout.stopping import Stop
from distsbi.store import layout, record
from distsbi.store.place import Place, as_place, is_url, shown
from distsbi.store.status import Status, read_status

SHARD_SECONDS = 10.0  # of work in a shard: little is lost with a worker, and the file costs nothing beside it,
SHARD_BYTES = 64 * 2**20  # but at most this much of x in a worker's memory,
SHARDS_EACH = 16  # at least so many shards for each worker: in the last round some have nothing to do,
LEAST_SECONDS = 0.2  # of at least so much work,
SHARD_COUNT = 10_000  # and not many more files than this
LOOKS = 32  # rows that may fail in succession before the simulator is taken for broken


@dataclasses.dataclass(frozen=True)
class SimulationResult(Done):
    """A folder of pairs that is done. Good rows are those that are pairs."""

    path: Path

    def read(self) -> Pairs:
        """The pairs, in memory. Raises ValueError if every row failed."""
        return read_pairs(self.path)

    def failures(self) -> pa.Table:
        """The rows that are no pairs: row, status, message, theta."""
        return read_failures(self.path)


def simulate(
    simulator: str | Callable[..., Any],
    prior: Any,
    n: int,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    workers: int | None = None,
    address: str | None = None,
    shard_size: int | None = None,
    batch_size: int | None = None,
    missing: bool = False,
    num_gpus_per_worker: float = 0,
    cpus_per_worker: int = 1,
    max_failures: int = 3,
    time_limit: float | None = None,
    show_progress: bool = True,
) -> SimulationResult:
    """Simulates n rows (theta, x) into a folder of Parquet files for training, theta from the prior.

    Called again with the same arguments it goes on where it stopped. Row i depends on the simulator, the prior, the seed and i alone (and
    `batch_size`), not on workers, shards, order or failures. A row whose simulator raises gets status "failed", one with NaN, inf or another shape "invalid", one that
    kills its worker or exceeds `time_limit` "quarantined": these are no pairs, are recorded with their theta (`result.failures()`), and the others go on.
    Memory, a disk or a device that gives out is the machine's fault (`fanout/blame.py`): the shard is tried again up to `max_failures` times, then given up.
    The same call, best when there is room again, tries it once more, and only where `max_failures` attempts end so again the row is recorded as "failed".

    SIGTERM ends it after the shards that are at work (at most loop.GRACE_SECONDS; without Ray, the one at work).

    Args:
        simulator: "module:function", importable on every worker, or a function. Its arguments are (theta), (theta, rng) or (key, theta); see
            `distsbi.fanout.simulator`. A function that cannot be imported (a lambda, one of the script itself) is carried over by Ray. Numbers and
            words that it was made with (closure, defaults, partial, attributes, globals of a script; lists too) are part of it: keep counters elsewhere.
        prior: a numpyro distribution, `distsbi.Prior`, any object with `sample(key, shape)`, `log_prob` and `support`, or texts by name as {"mass":
            "LogNormal(0, 0.5)"}. Texts, and a `Prior` that has such (scalar parts), go into the folder, and training takes them from there. Names of its parameters go into the files.
        n: rows. Those that fail are not made up for.
        out: the output folder, made if missing; with a cluster, one that all its machines share. A shard is there if and only if it is complete. One call at a time
            writes in a folder.
        seed: integer seed.
        workers: processes, replaced when they die and put on machines as these join; None: as many as the cluster or this machine has room
            for, more when machines join; 0: this process, without Ray, which a row that kills its process takes along.
        address: of a Ray cluster; None: the one in $RAY_ADDRESS, else this machine.
        shard_size: rows of each file; None: by time and size, from a first look.
        batch_size: the simulator takes so many rows at a time: theta is [batch_size, dim_theta], with one `rng` or `key`. If it raises, all of them
            fail; NaN marks single ones.
        missing: NaN in x is an entry that is missing, not a failure; training knows it from the folder, and takes such x with networks that take missing data.
        num_gpus_per_worker, cpus_per_worker: what each worker gets.
        max_failures: attempts at a shard. If the last killed its worker or took too long, it is halved until the guilty row is found,
            which is quarantined after as many attempts of its own; if it raised (memory, a full disk of a worker's, ...), the shard is given up.
        time_limit: seconds for one shard before its worker is killed, which counts as a failure. Without it a row that hangs is waited for.
        show_progress: a progress bar, on a terminal.

    Raises:
        ValueError: arguments that cannot be used, a simulator that cannot be imported or fails at each of its first rows, or an output folder of
            another run, or with files that training would read and that are no shards of this one; says what to do.
        RuntimeError: at the end, if shards were given up. All others are finished; the same call tries these again.
        OSError: the disk is full. What is finished stays.
        KeyboardInterrupt: says how far it came; after SIGTERM its subclass `distsbi.fanout.Terminated`.
    """
    began = time.monotonic()
    n, seed, workers, shard_size, batch_size = map(plain, (n, seed, workers, shard_size, batch_size))
    cpus_per_worker, num_gpus_per_worker, max_failures, time_limit = map(
        plain, (cpus_per_worker, num_gpus_per_worker, max_failures, time_limit)
    )
    check_whole("n", n)
    check_whole("shard_size", shard_size, optional=True)
    check_whole("batch_size", batch_size, optional=True)
    check_resources(workers, cpus_per_worker, num_gpus_per_worker, max_failures, time_limit)
    step = batch_size or 1
    if shard_size is not None and shard_size % step:
        raise ValueError(f"shard_size must be a multiple of batch_size={step}; got {shard_size}.")
    folder = _folder(out)
    named = simulators.by_name(simulator)
    digest = None if isinstance(named, str) else simulators.source_digest(named)
    job = Job(named, _checked(prior), keys.key_words(seed), folder.path, batch_size, missing, digest)
    if not isinstance(named, str):
        simulators.arranged(named)
    elif workers == 0 or cluster_address(address) is None:  # else this machine may lack what the simulator needs
        simulators.arranged(simulators.import_simulator(named))
    if workers != 0:
        _check_travels(simulator=job.simulator, prior=job.prior)
    crew = Crew(
        "simulation", SimulationWorker, job, workers, address, cpus_per_worker, num_gpus_per_worker, max_failures, time_limit,
        most=-(-n // step), unlike=unlike,
    )  # fmt: skip
    known = {"n_rows": n, "seed": list(job.seed), **({} if shard_size is None else {"rows_per_shard": shard_size})}
    with begun(folder, crew, known) as session:
        told, there = session.told, session.there
        shape, seconds = tuple(there.get("x", ())), 0.0
        if "x" not in there or "rows_per_shard" not in there:
            shape, seconds = _look(session.pool, n, batch_size, told["parameter_names"], max_failures, session.stop)
        size = shard_size or there.get("rows_per_shard")
        size = size or _shard_size(n, step, seconds, 4 * math.prod(shape), max(session.room(), 1), time_limit)
        definition = {**told["definition"], "n_rows": n, "rows_per_shard": size, "x": list(shape)}
        shards = session.claim(definition, _about(job, told), step)
        texts = dict(job.prior) if isinstance(job.prior, Mapping) else _texts(job.prior)
        source = {"simulator": definition["simulator"]["name"], "prior": texts, "fingerprint": shards.fingerprint}
        source |= {"missing": True} if missing else {}
        plan = Plan(shards, shape, tuple(told["parameter_names"]), source)
        mark_unfinished(Path(folder.path), n)
        made = session.work(shards, plan, 1, show_progress, what="simulations", read_manifest=read_manifest)
        mark_finished(Path(folder.path))
        return SimulationResult.of(folder, shards, made, time.monotonic() - began)


def status(out: str | os.PathLike[str]) -> tuple[Status, str | None]:
    """(how far a folder of simulations is, the command that goes on with it; None where only the same call does).

    Raises ValueError if it is none, or is damaged.
    """
    place = as_place(out)
    found = record.read_run(place)
    if found is None or "simulator" not in found["definition"]:
        raise ValueError(f"{shown(out)} is no folder of simulations (no {layout.run_file(place)} of one).")
    definition = found["definition"]
    return read_status(place, definition["n_rows"], definition["rows_per_shard"], read_manifest), command(
        found, str(out)
    )


def command(run: dict[str, Any], out: str) -> str | None:
    """The command that goes on with a folder, from its run.json; None where only the same call does."""
    definition, prior = run["definition"], run["about"]["prior"]
    if prior is None or "<" in definition["simulator"]["name"]:
        return None
    seed = keys.seed_of(definition["seed"])
    words = ["distsbi", "simulate", "--simulator", definition["simulator"]["name"]]
    words += [word for name, text in prior.items() for word in ("--prior", f"{name}={text}")]
    words += ["--n", str(definition["n_rows"]), "--out", out]
    words += ["--seed", str(seed)] if seed else []
    words += ["--batch-size", str(definition["batch"])] if definition["batch"] else []
    words += ["--missing"] if definition["missing"] else []
    return shlex.join([*words, *provenance.worker_words(run)])


def _look(
    pool: Pool, n: int, batch: int | None, names: Sequence[str], max_failures: int, stop: Stop
) -> tuple[tuple[int, ...], float]:
    """The shape of one x and the seconds of a row, from the first row (or batch) that can be simulated.

    Raises ValueError if the first LOOKS cannot, or if `max_failures` of them kill or hang their worker; RuntimeError if the memory of its machine
    gave out so often; Terminated if `stop` is told.
    """
    step, reason, deaths, looked = batch or 1, "", 0, 0
    for row in range(0, min(n, LOOKS * step), step):
        manifest: dict[str, Any] = {}
        while not manifest:
            while not pool.room():
                stop.check()
                pool.wait()
            pool.submit(Look(row))
            outcomes: list[Any] = []
            while not outcomes:
                stop.check()
                outcomes = pool.wait()
            outcome = outcomes[0]
            if outcome.manifest is None and not outcome.blamed:
                continue
            deaths += outcome.died
            manifest = outcome.manifest or {"error": one_line(outcome.error)}
        if "shape" in manifest:
            return tuple(manifest["shape"]), manifest["seconds"]
        reason, looked = manifest["error"], row + step
        if deaths >= max_failures and isinstance(outcome.error, MemoryError):
            raise RuntimeError(f"no row could be simulated, the last for {one_line(outcome.error)}")
        if deaths >= max_failures:
            break
    what = "kills or hangs its worker" if deaths >= max_failures else "fails"
    advice = f"mend it. {_called(names, batch)}"
    if "NaN" in reason:
        advice = "mend it, or give missing=True if NaN is an entry that was not observed."
    raise ValueError(
        f"the simulator {what} at the first rows (0 to {min(n, looked) - 1}), the last with {reason}; {advice}"
    )


def _called(names: Sequence[str], batch: int | None) -> str:
    """What the simulator is given, for one that was written for something else."""
    row = f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
    if batch is None:
        return (
            f"It is called with theta of shape ({len(names)},), one row of {row}; many rows at a time need batch_size."
        )
    return f"It is called with theta of shape ({batch}, {len(names)}), {batch} rows of {row}."


def _shard_size(
    n: int, step: int, seconds: float, row_bytes: int, workers: int, time_limit: float | None = None
) -> int:
    """Rows of a shard where none is given and the folder has no run yet: a multiple of `step`. `seconds`: of a row."""
    each = max(seconds, 1e-9)
    size = min(SHARD_SECONDS / each, max(n / (SHARDS_EACH * workers), LEAST_SECONDS / each))
    floor = n / SHARD_COUNT
    if time_limit is not None:  # a quarter of it; where that makes too many files, up to half
        size, floor = min(size, time_limit / each / 4), min(floor, time_limit / each / 2)
    size = min(max(size, floor), max(1, SHARD_BYTES // max(1, row_bytes)), n)
    shards = math.ceil(n / math.ceil(size))
    if workers < shards < SHARDS_EACH * workers:  # few of them: as many for each worker
        size = n / min(workers * math.ceil(shards / workers), n)
    return max(1, math.ceil(size / step)) * step


def _folder(out: str | os.PathLike[str]) -> Place:
    """Raises ValueError if `out` is no folder on disks, or holds files that training would read and that are no shards of the run that is there."""
    if is_url(out):
        raise ValueError(
            f"out must be a folder on disks that the workers share, for training reads it there; got {shown(out)}."
        )
    place = as_place(out)
    folder = check_folder(Path(place.path))
    run = record.read_run(place)
    if run is None:
        record.refuse_bare_shards(place)
        if other := layout.strays(folder, 0):
            raise ValueError(
                f"{out} holds other files, such as {other[0].name}, which training would read too; give a new folder."
            )
    elif "simulator" in run["definition"]:
        definition = run["definition"]
        shards = layout.shard_count(definition["n_rows"], definition["rows_per_shard"])
        if other := layout.strays(folder, shards):
            raise ValueError(
                f"{out} holds files that are none of its {shards} shards, such as {other[0].name}, which training would read too; move "
                f"them elsewhere (distsbi verify {out} names all), and give the same call again."
            )
    return place


def _texts(prior: Any) -> dict[str, str] | None:
    from distsbi.data.prior import as_texts

    return as_texts(prior)


def _checked(prior: Any) -> Any:
    """The prior. Raises ValueError for one that is none, or cannot be read."""
    from distsbi.data.prior import parse_prior, supports

    if isinstance(prior, Mapping):
        if not prior:
            raise ValueError("a prior needs at least one parameter, such as {'mass': 'LogNormal(0, 0.5)'}.")
        parse_prior(prior)
        return {str(name): str(text) for name, text in prior.items()}
    if prior is None:
        raise ValueError(
            "a prior is needed to draw theta from; give one, such as Prior(mass=dist.LogNormal(0.0, 0.5))."
        )
    supports(prior)
    return prior


def _check_travels(**parts: Any) -> None:
    """Raises ValueError naming the part that cannot be carried to workers."""
    from ray import cloudpickle

    for name, part in parts.items():
        try:
            cloudpickle.dumps(part)
        except Exception as error:  # of whatever it holds
            instead = {
                "simulator": "give 'module:function' of a module that they can import, and make there what cannot be carried",
                "prior": "give texts by name, such as {'mass': 'LogNormal(0, 0.5)'}",
            }
            raise ValueError(
                f"the {name} cannot be carried to workers ({one_line(error)}); {instead[name]}, or give workers=0 to stay in this process."
            ) from error


def _about(job: Job, told: dict[str, Any]) -> dict[str, Any]:
    """For run.json: where the pairs come from."""
    return {
        "simulator": simulators.name_of(job.simulator),
        "prior": dict(job.prior) if isinstance(job.prior, Mapping) else None,
        "parameter_names": told["parameter_names"],
        "first_worker": told["worker"],
        "devices": [told["worker"]["device"]],
        "distsbi": distsbi.__version__,
        "versions": versions(),
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
