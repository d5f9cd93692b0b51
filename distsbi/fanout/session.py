"""One call of `sample_catalog` or `simulate`, in its order:

    the folder is held ──► Ray, workers ──► one that is up tells what it makes ──► the folder is claimed for that run ──► the work

SIGTERM stops it at any of these.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from distsbi.fanout import cluster
from distsbi.fanout.agenda import Shards
from distsbi.fanout.loop import Work, work
from distsbi.fanout.metrics import Metrics
from distsbi.fanout.pool import InProcess, Pool
from distsbi.fanout.ray_pool import RayPool
from distsbi.fanout.staff import Staff
from distsbi.fanout.stopping import Stop, says_how_far, told_to_stop
from distsbi.store import layout, record, schema
from distsbi.store.place import Place
from distsbi.store.status import known_bad, manifests
from distsbi.store.writer import Writer, one_writer


@dataclasses.dataclass(frozen=True)
class Crew:
    """Who is to do the work.

    Args:
        of: what the folder is to hold: "catalog" or "simulation".
        worker: the class (see pool.py).
        job: what each is made with.
        workers, address, cpus, gpus, max_failures, time_limit: as for `sample_catalog`.
        most: at most so many have something to do.
        unlike: why two of them, by what they told when they came up, cannot fill one folder.
        check: raises ValueError for what a worker tells that makes another run than the one that was asked for.
    """

    of: str
    worker: type
    job: Any
    workers: int | None
    address: str | None
    cpus: int
    gpus: float
    max_failures: int
    time_limit: float | None
    most: float
    unlike: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
    check: Callable[[Mapping[str, Any]], None] = lambda told: None

    @property
    def each(self) -> dict[str, Any]:
        """For run.json (see `provenance.each_worker`): what each worker gets; nothing where the work is done in this process."""
        if self.workers == 0:
            return {}
        return {
            "each_worker": {
                "cpus_per_worker": self.cpus,
                "num_gpus_per_worker": self.gpus,
                "time_limit": self.time_limit,
            }
        }


@dataclasses.dataclass(frozen=True)
class Done:
    """A call that is done.

    `path`: of the output folder; a URI in an object store. `n_ok`, `n_bad`: good rows and others, of the whole folder; `counts`: by status;
    `shards`: all, `shards_now`: those done in this call, in `seconds` with `rows_now` rows, `ok_now` of them good.
    """

    path: Path | str
    n_rows: int
    n_ok: int
    n_bad: int
    counts: dict[str, int]
    shards: int
    shards_now: int
    rows_now: int
    ok_now: int
    seconds: float

    @classmethod
    def of(cls, folder: Place, shards: Shards, made: Work, seconds: float) -> Self:
        """Of the call that did `made`."""
        n_ok = made.counts[schema.OK]
        return cls(
            path=Path(folder.path) if folder.local else folder.url,
            n_rows=shards.n_rows,
            n_ok=n_ok,
            n_bad=shards.n_rows - n_ok,
            counts=dict(made.counts),
            shards=shards.count,
            shards_now=made.shards_now,
            rows_now=made.rows_now,
            ok_now=made.ok_now,
            seconds=seconds,
        )


@dataclasses.dataclass(frozen=True)
class Session:
    """A folder that is held, and workers of which at least one is up.

    `told`: what that one tells; `there`: what defines the run that is in the folder, nothing where it is new.
    """

    folder: Place
    crew: Crew
    pool: Pool
    writer: Writer
    stop: Stop
    told: dict[str, Any]
    there: dict[str, Any]

    def room(self) -> int:
        """Workers that were asked for, or that the cluster has room for."""
        crew = self.crew
        return crew.workers if crew.workers is not None else cluster.cluster_room(crew.cpus, crew.gpus, empty=True)

    def claim(self, definition: Mapping[str, Any], about: Mapping[str, Any], step: int = 1) -> Shards:
        """The shards of the run that `definition` defines, whose the folder is now. `step`: as for `Shards`.

        Raises ValueError naming what differs, if it is another run's.
        """
        record.begin(self.folder, definition, about, self.crew.each)
        layout.remove_partial(self.folder)
        return Shards(definition["n_rows"], definition["rows_per_shard"], record.fingerprint(definition), step)

    def work(self, shards: Shards, plan: Any, nsamples: int, show_progress: bool, **more: Any) -> Work:
        """Does what is left of `shards`; returns and raises as `loop.work`, which takes `more`. `plan`: what workers are told before;
        `nsamples`: as for `Metrics`."""
        self.pool.begin(plan)
        metrics = Metrics(str(self.folder), nsamples, ray=self.crew.workers != 0, of=self.crew.of)
        return work(
            self.pool, shards, self.folder, self.writer, self.stop, self.crew.max_failures, show_progress, metrics, **more
        )  # fmt: skip


@contextlib.contextmanager
def begun(folder: Place, crew: Crew, asked: Mapping[str, Any]) -> Iterator[Session]:
    """Holds the folder, and has the crew at hand, for the time of the block. `asked`: what is known of the definition before a worker is up.

    Raises ValueError if the folder holds a run of which something of that differs, something of another kind, or shards alone; Terminated after
    SIGTERM, here or in the block.
    """
    with says_how_far(folder), told_to_stop() as stop, contextlib.ExitStack() as stack:
        if record.read_run(folder) is None:
            record.refuse_bare_shards(folder)
        (folder / layout.HIDDEN).make_folder()
        writer = stack.enter_context(one_writer(folder))
        found = record.read_run(folder)
        there = {} if found is None else found["definition"]
        if found is not None:
            record.check_part(folder, asked, found, crew.of)
        crew = dataclasses.replace(crew, most=min(crew.most, _left(folder, {**there, **asked})))
        pool = stack.enter_context(_pool(stack, crew, found, folder))
        yield Session(folder, crew, pool, writer, stop, pool.start(stop), there)


def _left(folder: Place, known: Mapping[str, Any]) -> float:
    """Shards that are not there as they were written, at least one (for others may be found damaged); infinity where their size is not known."""
    if "rows_per_shard" not in known:
        return math.inf
    count = layout.shard_count(known["n_rows"], known["rows_per_shard"])
    lines = layout.read_journal(folder)
    whole = manifests(lines, layout.shard_sizes(folder, count)).keys() - known_bad(lines).keys()
    return max(1, count - len(whole))


def _pool(stack: contextlib.ExitStack, crew: Crew, found: Mapping[str, Any] | None, folder: Place) -> Pool:
    if crew.workers == 0:
        return InProcess(crew.worker(crew.job))

    def check(told: Mapping[str, Any]) -> None:
        crew.check(told)
        if found is not None:
            record.check_part(folder, told["definition"], found, crew.of)

    stack.enter_context(cluster.connected(crew.address, crew.workers, crew.cpus, crew.gpus))
    environment = cluster.worker_environment(crew.cpus, crew.gpus)
    staff = Staff(
        crew.worker, crew.job, crew.workers, environment, crew.cpus, crew.gpus, crew.max_failures, check, crew.unlike, crew.most
    )  # fmt: skip
    return RayPool(staff, crew.time_limit)
