"""Workers that are actors on Ray.

Ray gives placement and transport. Retries are counted in agenda.py, and here it is known which task a dead worker was at:
actors are made with max_restarts=0 and max_task_retries=0, and a dead one is replaced by a new one.

Machines come and go. A number of workers that was asked for is kept up (those without room yet wait at Ray, which an
autoscaler sees); without a number, workers are added wherever room appears. A worker on a machine that Ray is draining
finishes the task it is at, and its next one goes to others. A task that was at work when its machine died is not blamed.
A machine on which workers do not start is left alone for a while (patience.py), and the others go on; only where nobody is
left does that end the run.
"""

import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Self

from distsbi.fanout.agenda import Outcome, one_line
from distsbi.fanout.cluster import cluster_room, draining_nodes, fits_a_machine, grows, machine_of, not_on
from distsbi.fanout.patience import Backoff, Clock

IN_FLIGHT = 2  # tasks per worker: one at work, one waiting
PATIENCE = 60.0  # seconds without a worker before saying so, and without a machine for one before giving up
START_SECONDS = 900.0  # for a worker that has its machine to come up; up to twice that
LOOK_SECONDS = 2.0  # between looks at what machines there are
EXCUSED = 10  # times a task may be at work on a machine that dies before it is blamed

log = logging.getLogger("distsbi")


@dataclasses.dataclass(eq=False)
class _Member:
    """An actor, what it is starting with, and its tasks in the order it takes them.

    `since`: when it was made, then when the first of `queue` began; `avoids`: machines that it is not put on; `node`: Ray's name of its
    machine, once that is known; `leaving`: it gets no more.
    """

    actor: Any
    starting: Any
    since: float
    avoids: frozenset[str] = frozenset()
    queue: deque[tuple[Any, Any]] = dataclasses.field(default_factory=deque)
    node: str = ""
    leaving: bool = False


class RayPool:
    """Actors on the Ray that this process is connected to.

    Args:
        worker: the class.
        job: what each is made with.
        workers: how many; None: as many as there is room for, also on machines that join later.
        environment: of their processes.
        cpus, gpus: that Ray sets aside for each.
        time_limit: seconds for one task, after which its worker is killed; None: no limit.
        max_failures: workers in a row that may fail to start while none is up.
        unlike: what is said of a worker that tells of another definition than the first: of what the first told, and what it told.
        most: at most so many workers; None: no limit.
    """

    def __init__(
        self,
        worker: type,
        job: Any,
        workers: int | None,
        environment: dict[str, str],
        cpus: int,
        gpus: float,
        time_limit: float | None,
        max_failures: int,
        unlike: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
        most: int | None = None,
    ):
        import ray
        import ray.exceptions

        self._ray: Any = ray
        self._make: Any = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment}
        )(worker)
        self._job, self._workers, self._most, self._unlike = job, workers, most, unlike
        self._cpus, self._gpus = cpus, gpus
        self._time_limit, self._max_failures = time_limit, max_failures
        self._members: list[_Member] = []
        self._plan: Any = None
        self._told: dict[str, Any] | None = None
        self._deaths = 0  # of workers that were starting while none was up
        self._backoff, self._clock = Backoff(), Clock()
        self._excused: Counter[Hashable] = Counter()
        self._looked = -LOOK_SECONDS
        self._held = False
        self._said = 0.0

    @property
    def busy(self) -> int:
        return sum(len(m.queue) for m in self._members)

    def __enter__(self) -> Self:
        self._look()
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._members:
            self._ray.kill(member.actor)

    def start(self) -> dict[str, Any]:
        began, small = self._clock.now, not fits_a_machine(self._cpus, self._gpus)
        lacking = f"no machine of the cluster has {self._cpus} CPUs and {self._gpus:g} GPUs for a worker"
        if small:
            log.warning("%s: waiting for one that has", lacking)
        while self._told is None:
            self._clock.tick()
            self._look()
            self._greet(timeout=1.0)
            if small and self._clock.now - began > PATIENCE:
                small = not grows() and not fits_a_machine(self._cpus, self._gpus)
                if small:
                    raise ValueError(
                        f"{lacking}, none joined in {PATIENCE:.0f} s, and there is no autoscaler to add one; lower cpus_per_worker or "
                        "num_gpus_per_worker, or start a machine that has as many."
                    )
            self._say_if_nobody_is_up()
        return self._told

    def begin(self, plan: Any) -> None:
        self._plan = plan
        for member in self._members:
            if member.starting is None:
                member.actor.begin.remote(plan)

    def room(self) -> bool:
        return any(len(m.queue) < IN_FLIGHT for m in self._takers())

    def submit(self, task: Hashable, *given: Any) -> None:
        member = min(self._takers(), key=lambda m: len(m.queue))
        if not member.queue:
            member.since = self._clock.tick()
        member.queue.append((task, member.actor.do.remote(task, *given)))

    def wait(self) -> list[Outcome]:
        self._clock.tick()
        self._look()
        self._greet(timeout=0)
        self._say_if_nobody_is_up()
        owners = {ref: m for m in self._members for _, ref in m.queue}
        refs = [*owners, *(m.starting for m in self._members if m.starting is not None)]
        if not refs:
            time.sleep(0.1)
            return []
        self._ray.wait(refs, num_returns=1, timeout=1.0)
        self._clock.tick()
        # of all, before anyone is late: who waits behind a task that is done, but not collected, has only just begun
        ready = self._ray.wait(list(owners), num_returns=len(owners), timeout=0)[0] if owners else []
        outcomes: list[Outcome] = []
        for member in {id(owners[ref]): owners[ref] for ref in ready}.values():
            outcomes += self._collect(member)
        if self._time_limit is not None:
            for member in [m for m in self._members if m.queue and self._clock.now - m.since > self._time_limit]:
                late = TimeoutError(f"it took longer than the time limit of {self._time_limit:g} s")
                outcomes += self._bury(member, late)
        return outcomes

    def hold(self) -> None:
        self._held = True
        for member in list(self._members):
            while len(member.queue) > 1:
                member.queue.pop()
            if not member.queue:
                self._dismiss(member)

    def _takers(self) -> list[_Member]:
        return [m for m in self._members if m.starting is None and not m.leaving and not self._held]

    def _collect(self, member: _Member) -> list[Outcome]:
        """What `member` has finished, in its order."""
        outcomes = []
        while member.queue:
            task, ref = member.queue[0]
            if not self._ray.wait([ref], timeout=0)[0]:
                break
            try:
                outcomes.append(Outcome(task, self._ray.get(ref)))
            except self._ray.exceptions.RayTaskError as error:
                outcomes.append(Outcome(task, error=error.cause))
            except self._ray.exceptions.RayError as error:
                return outcomes + self._bury(member, error)
            member.queue.popleft()
            member.since = self._clock.tick()
            if member.leaving or self._held:
                return outcomes + self._bury(member, None)
        return outcomes

    def _bury(self, member: _Member, reason: BaseException | None) -> list[Outcome]:
        """Ends a worker that is gone or is to go. Its first unfinished task is blamed for `reason`, those that waited
        behind it are not; none is if there is no reason, if its machine died, or if the one that was late is done now."""
        self._dismiss(member)
        outcomes: list[Outcome] = []
        lost = self._machine_died(member, reason)
        late = isinstance(reason, TimeoutError)
        for task, ref in member.queue:
            try:
                outcomes.append(Outcome(task, self._ray.get(ref, timeout=30)))
            except self._ray.exceptions.RayError:
                blamed = reason is not None and all(o.error is None for o in outcomes) and not (late and outcomes)
                if blamed and lost:
                    self._excused[task] += 1
                    blamed = self._excused[task] > EXCUSED
                outcomes.append(Outcome(task, error=reason, blamed=blamed, died=True))
        return outcomes

    def _dismiss(self, member: _Member) -> None:
        self._ray.kill(member.actor)
        self._members.remove(member)
        self._looked = -LOOK_SECONDS  # for another in its place

    def _machine_died(self, member: _Member, error: BaseException | None) -> bool:
        """Whether a worker is gone because its machine is, or cannot be reached."""
        if not isinstance(error, self._ray.exceptions.RayError):
            return False
        gone = (self._ray.exceptions.NodeDiedError, self._ray.exceptions.ActorUnavailableError)
        if isinstance(error, gone) or getattr(error, "preempted", False) or "node has died" in str(error):
            return True
        return member.node in {node["NodeID"] for node in self._ray.nodes() if not node["Alive"]}

    def _look(self) -> None:
        """Adds workers that are missing or have room, and lets those on leaving machines take no more."""
        if self._held or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        leaving = draining_nodes()
        for member in list(self._members):
            if member.node in leaving and not member.leaving:
                member.leaving = True
                log.info("a worker on the leaving machine %s finishes its task", member.node[:8])
                if not member.queue:
                    self._dismiss(member)
        avoid = self._backoff.avoided(self._clock.now)
        for member in [m for m in self._members if m.starting is not None and m.avoids - avoid]:
            if not machine_of(member.actor):  # it waits, and there may be room where it was not to go
                self._dismiss(member)
        if "" in avoid:  # which machine it was is not known, so none is tried
            return
        staying = sum(not m.leaving for m in self._members)
        if self._workers is not None:
            wanted = self._workers - staying
        else:
            starting = sum(m.starting is not None for m in self._members)  # Ray may not have placed them yet
            wanted = cluster_room(self._cpus, self._gpus, leaving | avoid) - starting
            wanted = max(wanted, 1) if not self._members else wanted
        for _ in range(wanted if self._most is None else min(wanted, self._most - staying)):
            actor = self._make.options(label_selector=not_on(avoid)).remote(self._job)
            self._members.append(_Member(actor, actor.ready.remote(own_process=True), self._clock.now, avoid))

    def _greet(self, timeout: float) -> None:
        """Takes in workers that have come up, and lets those go that did not. Raises as `_let_go`."""
        starting = {m.starting: m for m in self._members if m.starting is not None}
        if not starting:
            return
        self._ray.wait(list(starting), num_returns=1, timeout=timeout)
        for ref in self._ray.wait(list(starting), num_returns=len(starting), timeout=0)[0]:
            member = starting.pop(ref)
            try:
                told = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:
                self._let_go(member, error.cause)
                continue
            except self._ray.exceptions.RayError as error:
                self._let_go(member, error)
                continue
            first = self._told = self._told or told
            if told["definition"] != first["definition"]:
                self._let_go(member, ValueError(self._unlike(first, told)), lasting=True)
                continue
            self._deaths = 0
            member.starting, member.node = None, told["worker"]["node"]
            self._backoff.started(member.node)
            if self._plan is not None:
                member.actor.begin.remote(self._plan)
        for member in starting.values():
            if self._clock.now - member.since < START_SECONDS:
                continue
            if member.node:
                self._let_go(member, TimeoutError(f"a worker hung for {START_SECONDS:.0f} s while it loaded"))
            else:  # it may have got its machine only now
                member.node, member.since = machine_of(member.actor), self._clock.now

    def _let_go(self, member: _Member, error: BaseException, *, lasting: bool = False) -> None:
        """Ends a worker that did not come up; its machine is left alone for a while. `lasting`: another would not come up there, either.

        While a worker is up, or one is starting where none failed, this raises nothing: the arguments are known to be good, and the
        trouble of a machine (a disk that is away, a full GPU, another copy of the run) is no reason to end the others' work. Else it
        raises what the first worker raised, what lasts, and the last of `max_failures` in a row: RuntimeError if that one died.
        """
        ours = not isinstance(error, self._ray.exceptions.RayError)
        if ours and self._told is None:
            raise error from None
        member.node = member.node or machine_of(member.actor)
        lost = self._machine_died(member, error)
        self._dismiss(member)
        if lost:
            log.warning("a worker did not start, its machine is gone: %s", one_line(error))
            return
        seconds = self._backoff.failed(member.node, self._clock.now, lasting=lasting)
        up = any(m.starting is None for m in self._members)
        self._deaths = 0 if up else self._deaths + 1
        if (lasting or self._deaths >= self._max_failures) and not up and not self._hope():
            if ours:
                raise error from None
            raise RuntimeError(f"{self._deaths} workers in a row died while starting: {one_line(error)}") from error
        log.log(
            logging.WARNING if self._backoff.failures(member.node) == 1 else logging.INFO,
            "a worker did not start%s, which is left alone for %.0f s: %s",
            *(f" on machine {member.node[:8]}" if member.node else " on a machine", seconds, one_line(error)),
        )

    def _hope(self) -> bool:
        """Whether a worker is starting on a machine where none failed."""
        machines = {machine_of(m.actor) for m in self._members if m.starting is not None} - {""}
        return any(not self._backoff.failures(machine) for machine in machines)

    def _say_if_nobody_is_up(self) -> None:
        if any(m.starting is None for m in self._members):
            self._said = self._clock.now
        elif self._clock.now - self._said > PATIENCE:
            self._said = self._clock.now
            log.warning(
                "no worker is up (each starts Python, loads the run and compiles); Ray has %g of %g CPUs free",
                self._ray.available_resources().get("CPU", 0),
                self._ray.cluster_resources().get("CPU", 0),
            )
