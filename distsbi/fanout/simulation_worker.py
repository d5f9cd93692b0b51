"""One worker of a simulation: imports the simulator once, turns shard numbers into files of pairs.

A shard is a file of pairs (`distsbi.data.parquet`) with the rows that went well, in order. Rows that did not are in a file of the same name in
_distsbi/failures, which is written before it: row, status ("failed", "invalid" or "quarantined"), message and theta.
"""

import dataclasses
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distsbi.data import parquet
from distsbi.environment import device_name
from distsbi.fanout import simulator
from distsbi.fanout.agenda import Shards, Task
from distsbi.fanout.worker import own_jax, who
from distsbi.files import patiently, sha256_of, write_whole
from distsbi.store import layout
from distsbi.store.place import Place
from distsbi.store.schema import OK, STATUSES
from distsbi.store.status import count_reasons


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    Args:
        simulator: "module:function", or the function itself, which Ray carries over.
        prior: texts by name, for `parse_prior`, or a prior.
        seed: the words of the seed key.
        out: the output folder.
        batch: rows of one call; None: single ones.
        missing: NaN in x is an entry that is missing, not a failure.
        source: `source_digest` of a function that is carried over, whose file the machines of workers need not have. Of one that is named each
            worker reads its own: they must have the same.
    """

    simulator: str | Callable[..., Any]
    prior: Any
    seed: tuple[int, int]
    out: str
    batch: int | None = None
    missing: bool = False
    source: str | None = None


@dataclasses.dataclass(frozen=True)
class Look:
    """A first look at what the simulator gives, and how long it takes, at this row (or the batch that begins there)."""

    row: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is told when the folder is known to be this run's: the division, the shape of one x, and the note in every file."""

    shards: Shards
    shape: tuple[int, ...]
    names: tuple[str, ...]
    source: dict[str, Any]


class SimulationWorker:
    """Runs in the driver or as a Ray actor."""

    def __init__(self, job: Job):
        self.job = job

    def ready(self, own_process: bool = False) -> dict[str, Any]:
        """Imports, and tells what defines the pairs: the same on every worker, or it is not the same simulation.

        Raises ValueError for a simulator that cannot be imported or called here, a prior that is none, and a folder that this machine
        does not see.
        """
        if own_process:
            own_jax()
        import jax

        from distsbi import keys
        from distsbi.data.prior import describe, parameter_names, parse_prior, supports

        job = self.job
        if not (Path(job.out) / layout.HIDDEN).is_dir():
            raise ValueError(
                f"on {socket.gethostname()} there is no folder {job.out}; give one that all machines share."
            )
        if isinstance(job.simulator, str):
            function = simulator.import_simulator(job.simulator)
            source = simulator.source_digest(function)
        else:
            function, source = job.simulator, job.source
        prior = parse_prior(job.prior) if isinstance(job.prior, Mapping) else job.prior
        dim = len(supports(prior))
        self._simulator = simulator.Simulator(function, prior, keys.from_words(job.seed), job.batch, job.missing)
        first = self._simulator.theta(0, 1)[0]
        self._device = device_name(jax.local_devices()[0])
        parquet.get_ready()
        return {
            "definition": {
                "simulator": {"name": simulator.name_of(job.simulator), "source": source},
                "prior": describe(prior),
                "seed": list(job.seed),
                "first theta": [f"{value:.3g}" for value in first.tolist()],
                "batch": job.batch,
                "missing": job.missing,
            },
            "parameter_names": list(parameter_names(prior, dim)),
            "worker": who(own_process, self._device),
        }

    def begin(self, plan: Plan) -> None:
        """Comes before the first shard."""
        self._plan = plan

    def do(self, task: Task | Look) -> dict[str, Any]:
        """Simulates the rows of a shard, writes its files and returns its manifest row; or simulates the rows of a probe and forgets
        them: whether that kills or hangs this process is the answer.

        Raises OSError if a file cannot be written, MachinesFault for what is the machine's (blame.py), unless the task says to blame the rows.
        """
        if isinstance(task, Look):
            return self._look(task)
        plan, skip, began = self._plan, dict(task.skip), time.monotonic()
        if task.rows is not None:
            self._simulator.run(*task.rows, plan.shape, skip, blame_rows=task.blame_rows)
            return {}
        rows = plan.shards.rows(task.shard)
        made = self._simulator.run(rows.start, rows.stop, plan.shape, skip, blame_rows=task.blame_rows)
        file = layout.shard_file(Path(self.job.out), task.shard, plan.shards.count)
        failures = _failures(made, rows.start)
        write_failures(layout.failures_file(file), failures)
        theta = made.theta[made.good] if made.bad else made.theta
        x = made.x.reshape(len(made.x), *with_channels(plan.shape))
        parquet.write_file(file, theta[..., None], x, plan.names, plan.source)
        counts = Counter(status for status, _ in made.bad.values())
        counts[OK] = len(made.x)
        return {
            "shard": task.shard,
            "rows": len(rows),
            **{name: counts[name] for name in STATUSES},
            "reasons": count_reasons(failures),
            "bytes": file.stat().st_size,
            **checksums(file),
            "seconds": round(time.monotonic() - began, 4),
            **{name: value for name, value in who(False, self._device).items() if name != "node"},
        }

    def _look(self, look: Look) -> dict[str, Any]:
        """The shape of one x and the seconds of a row, or why there is none."""
        try:
            shape, seconds = self._simulator.look(look.row)
        except (Exception, SystemExit) as error:
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        return {"shape": shape, "seconds": seconds}


def with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one x in a file of pairs: [dim_x, channels], or an image [rows, columns, channels]."""
    return (*shape, *(1,) * (2 - len(shape)))


def unlike(first: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """Why two workers, by what they told when they came up, cannot fill one folder."""
    one, other = first["definition"], told["definition"]
    what = ", ".join(f"{name} ({other.get(name)}, not {one[name]})" for name in one if one[name] != other.get(name))
    return (
        f"the worker on {told['worker']['host']} has another {what} than the one on {first['worker']['host']}; install the same version "
        "of the simulator and of its libraries on every machine."
    )


def _failures(made: simulator.Made, start: int) -> pa.Table:
    bad = sorted(made.bad)
    theta = pa.FixedSizeListArray.from_arrays(pa.array(made.theta[bad].ravel()), made.theta.shape[1])
    status, message = ([made.bad[i][part] for i in bad] for part in (0, 1))
    rows = pa.array([start + i for i in bad], pa.int64())
    columns = [rows, pa.array(status, pa.string()), pa.array(message, pa.string()), theta]
    return pa.table(columns, names=["row", "status", "message", "theta"])


def write_failures(file: Path, table: pa.Table) -> None:
    """Writes the file, or removes that of an earlier attempt where nothing failed."""
    if not table.num_rows:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda sink: pq.write_table(table, sink, write_page_checksum=True))


def read_failures(out: Path) -> pa.Table:
    """All rows of a folder that are no pairs: row, status, message, theta. Raises ValueError for a damaged file, OSError for one that cannot be read now."""
    files = sorted((out / layout.HIDDEN / "failures").glob("shard-*.parquet"))
    names = {"row": pa.int64(), "status": pa.string(), "message": pa.string(), "theta": pa.list_(pa.float32())}
    return pa.concat_tables([_read(file) for file in files]) if files else pa.schema(names).empty_table()


def read_manifest(shard: Place) -> dict[str, Any]:
    """Rows by status and reasons of a shard, and the checksums of its files. Raises as `read_counts`."""
    file = Path(shard.path)
    return {**read_counts(file), **checksums(file)}


def read_counts(file: Path) -> dict[str, Any]:
    """Rows by status and reasons of a shard, from its files, all of which are read.

    Raises ValueError naming one that is damaged, OSError if one cannot be read now. One that is lost is told by the number of rows
    (`status.of_all_rows`).
    """
    beside = layout.failures_file(file)
    good = parquet.check_file(file).rows
    bad = _read(beside) if beside.exists() else None
    counts: Counter[str] = Counter(bad["status"].to_pylist() if bad is not None else [])
    counts[OK] = good
    reasons = {} if bad is None else count_reasons(bad)
    return {**{name: counts[name] for name in STATUSES}, "reasons": reasons}


def checksums(shard: Path) -> dict[str, str | None]:
    """SHA-256 of a shard and of its record of failures; None: it has none."""
    beside = layout.failures_file(shard)
    return {
        "sha256": patiently(lambda: sha256_of(shard), shard),
        "failures_sha256": patiently(lambda: sha256_of(beside), beside) if beside.exists() else None,
    }


def _read(file: Path) -> pa.Table:
    """Raises ValueError if it is damaged, OSError if it cannot be read now."""
    says = "{path} cannot be read ({error}); remove its shard and simulate again."
    return parquet.read_checked(file, lambda opened: opened.read(), says)
