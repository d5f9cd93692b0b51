"""Who does the shards: this process, or actors on Ray. Both take shard numbers and give outcomes.

Ray gives placement and transport. Retries are counted here, where it is known which shard a dead worker was at:
actors are made with max_restarts=0 and max_task_retries=0, and a dead one is replaced by a new one.
"""

import dataclasses
import logging
import time
from collections import deque
from typing import Any, Protocol, Self

from distsbi.fanout.worker import Job, Shards, Worker

IN_FLIGHT = 2  # shards per worker: one at work, one waiting
PATIENCE = 60.0  # seconds without a worker before saying so

log = logging.getLogger("distsbi")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a shard: a manifest row, or an error. `blamed`: it was at work then, not waiting behind
    another."""

    shard: int
    manifest: dict[str, Any] | None = None
    error: BaseException | None = None
    blamed: bool = True


class Pool(Protocol):
    """Workers. A context manager: at the end all are stopped."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def start(self) -> dict[str, Any]:
        """What the first worker that is up tells of the run."""
        ...

    def begin(self, shards: Shards) -> None: ...
    def room(self) -> bool:
        """Whether `submit` takes another shard now."""
        ...

    def submit(self, shard: int) -> None: ...
    def wait(self) -> list[Outcome]:
        """Outcomes since the last call; waits up to about a second for one."""
        ...


class InProcess:
    """One worker, here. A shard that kills or hangs it takes this process along."""

    def __init__(self, job: Job):
        self._worker = Worker(job)
        self._shard: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def start(self) -> dict[str, Any]:
        return self._worker.ready()

    def begin(self, shards: Shards) -> None:
        self._worker.begin(shards)

    def room(self) -> bool:
        return self._shard is None

    def submit(self, shard: int) -> None:
        self._shard = shard

    def wait(self) -> list[Outcome]:
        shard, self._shard = self._shard, None
        if shard is None:
            return []
        try:
            return [Outcome(shard, self._worker.shard(shard))]
        except Exception as error:
            return [Outcome(shard, error=error)]


@dataclasses.dataclass(eq=False)
class _Member:
    """An actor, what it is starting with, and its shards in the order it takes them."""

    actor: Any
    starting: Any
    queue: deque[tuple[int, Any]] = dataclasses.field(default_factory=deque)
    since: float = 0.0  # when the first of `queue` began


class RayPool:
    """Actors on the Ray that this process is connected to.

    Args:
        job: for every worker.
        workers: how many.
        environment: of their processes.
        cpus, gpus: that Ray sets aside for each.
        time_limit: seconds for one shard, after which its worker is killed; None: no limit.
        max_failures: workers in a row that may fail to start.
    """

    def __init__(
        self,
        job: Job,
        workers: int,
        environment: dict[str, str],
        cpus: int,
        gpus: float,
        time_limit: float | None,
        max_failures: int,
    ):
        import ray
        import ray.exceptions

        self._ray: Any = ray
        self._make = ray.remote(Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment}
        )
        self._job, self._count, self._time_limit, self._max_failures = job, workers, time_limit, max_failures
        self._members: list[_Member] = []
        self._shards: Shards | None = None
        self._told: dict[str, Any] | None = None
        self._deaths = 0

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self._add()
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._members:
            self._ray.kill(member.actor)

    def start(self) -> dict[str, Any]:
        began = said = time.monotonic()
        while self._told is None:
            self._greet(timeout=1.0)
            if time.monotonic() - said > PATIENCE and self._told is None:
                said = time.monotonic()
                log.warning(
                    "no worker is up after %.0f s (each starts Python, loads the run and compiles); Ray has %g of %g CPUs free",
                    time.monotonic() - began,
                    self._ray.available_resources().get("CPU", 0),
                    self._ray.cluster_resources().get("CPU", 0),
                )
        return self._told

    def begin(self, shards: Shards) -> None:
        self._shards = shards
        for member in self._members:
            if member.starting is None:
                member.actor.begin.remote(shards)

    def room(self) -> bool:
        return any(m.starting is None and len(m.queue) < IN_FLIGHT for m in self._members)

    def submit(self, shard: int) -> None:
        member = min((m for m in self._members if m.starting is None), key=lambda m: len(m.queue))
        if not member.queue:
            member.since = time.monotonic()
        member.queue.append((shard, member.actor.shard.remote(shard)))

    def wait(self) -> list[Outcome]:
        self._greet(timeout=0)
        owners = {ref: m for m in self._members for _, ref in m.queue}
        refs = [*owners, *(m.starting for m in self._members if m.starting is not None)]
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=1.0)
        outcomes: list[Outcome] = []
        for member in {id(owners[ref]): owners[ref] for ref in ready if ref in owners}.values():
            outcomes += self._collect(member)
        if self._time_limit is not None:
            for member in [m for m in self._members if m.queue and time.monotonic() - m.since > self._time_limit]:
                self._ray.kill(member.actor)
                outcomes += self._bury(
                    member, TimeoutError(f"it took longer than the time limit of {self._time_limit:g} s")
                )
        return outcomes

    def _collect(self, member: _Member) -> list[Outcome]:
        """What `member` has finished, in its order."""
        outcomes = []
        while member.queue:
            shard, ref = member.queue[0]
            if not self._ray.wait([ref], timeout=0)[0]:
                break
            try:
                outcomes.append(Outcome(shard, self._ray.get(ref)))
            except self._ray.exceptions.RayTaskError as error:
                outcomes.append(Outcome(shard, error=error.cause))
            except self._ray.exceptions.RayError as error:
                return outcomes + self._bury(member, error)
            member.queue.popleft()
            member.since = time.monotonic()
        return outcomes

    def _bury(self, member: _Member, reason: BaseException) -> list[Outcome]:
        """Replaces a worker that is gone. Its first unfinished shard is blamed, those that waited behind it are not."""
        self._ray.kill(member.actor)
        self._members.remove(member)
        self._add()
        outcomes = []
        for shard, ref in member.queue:
            try:
                outcomes.append(Outcome(shard, self._ray.get(ref, timeout=30)))
            except self._ray.exceptions.RayError:
                blamed = all(o.error is None for o in outcomes)
                outcomes.append(Outcome(shard, error=reason, blamed=blamed))
        return outcomes

    def _add(self) -> None:
        actor = self._make.remote(self._job)
        self._members.append(_Member(actor, actor.ready.remote(own_process=True)))

    def _greet(self, timeout: float) -> None:
        """Takes in workers that have come up, and replaces those that did not.

        Raises what a worker raised in starting, if none was up before or `max_failures` in a row failed: with one up the
        arguments are known to be good, and the others' trouble (a disk that is away, a full GPU) may pass; RuntimeError
        if as many died; ValueError if one loaded another run.
        """
        starting = {m.starting: m for m in self._members if m.starting is not None}
        for ref in self._ray.wait(list(starting), num_returns=1, timeout=timeout)[0] if starting else []:
            member = starting[ref]
            try:
                told = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                raised = isinstance(error, self._ray.exceptions.RayTaskError)
                self._deaths += 1
                if raised and (self._told is None or self._deaths >= self._max_failures):
                    raise error.cause from None
                if self._deaths >= self._max_failures:
                    raise RuntimeError(
                        f"{self._deaths} workers in a row died while starting: {one_line(error)}"
                    ) from error
                log.warning("a worker did not start: %s", one_line(error.cause if raised else error))
                self._bury(member, error)
                continue
            self._deaths = 0
            first = self._told = self._told or told
            if told["definition"] != first["definition"]:
                raise ValueError(
                    f"the worker on {told['worker']['host']} found another posterior at {self._job.run} than the one "
                    f"on {first['worker']['host']}; give a run directory that all machines share, or the same "
                    "copy everywhere."
                )
            member.starting = None
            if self._shards is not None:
                member.actor.begin.remote(self._shards)


def one_line(error: BaseException | None) -> str:
    """An error in a sentence: Ray's are pages long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
