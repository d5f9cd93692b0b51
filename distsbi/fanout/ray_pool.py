"""What workers on Ray are at: tasks that are given, done, late or lost, and who is to blame.

Ray gives placement and transport. Retries are counted in agenda.py, and here it is known which task a dead worker was at:
actors are made with max_restarts=0 and max_task_retries=0, and a dead one is replaced by a new one (staff.py). A task that was at
work when its machine died is not blamed, nor one at which a worker raised that may be sick: such a one goes, and does not use up the
attempts at what others can do.
"""

import time
from collections import Counter
from collections.abc import Hashable
from typing import Any, Self

from distsbi.fanout.agenda import Outcome, Task
from distsbi.fanout.staff import Member, Staff, cause
from distsbi.fanout.stopping import Stop

IN_FLIGHT = 2  # tasks per worker: one at work, one waiting
EXCUSED = 10  # times a task may be at work on a machine that dies before it is blamed


class RayPool:
    """Tasks of the workers in `staff`. `time_limit`: seconds for one, after which its worker is killed; None: no limit."""

    def __init__(self, staff: Staff, time_limit: float | None):
        self._staff, self._time_limit = staff, time_limit
        self._ray, self._clock = staff.ray, staff.clock
        self._excused: Counter[Hashable] = Counter()

    @property
    def busy(self) -> int:
        return sum(len(m.queue) for m in self._staff.members)

    def __enter__(self) -> Self:
        self._staff.look()
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._staff.members:
            self._ray.kill(member.actor)

    def start(self, stop: Stop) -> dict[str, Any]:
        return self._staff.start(stop)

    def begin(self, plan: Any) -> None:
        self._staff.begin(plan)

    def room(self) -> bool:
        return not self._staff.resting and any(len(m.queue) < IN_FLIGHT for m in self._staff.takers)

    def submit(self, task: Hashable, *given: Any) -> None:
        free = [m for m in self._staff.takers if len(m.queue) < IN_FLIGHT]
        member = min(free, key=lambda m: (len(m.raised), len(m.queue)))  # what failed, by another
        if not member.queue:
            member.since = self._clock.tick()
        member.queue.append((task, member.actor.do.remote(task, *given)))

    def wait(self) -> list[Outcome]:
        self._staff.attend()
        owners = {ref: m for m in self._staff.members for _, ref in m.queue}
        refs = [*owners, *(m.starting for m in self._staff.members if m.starting is not None)]
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
            for member in [m for m in self._staff.members if m.queue and self._clock.now - m.since > self._time_limit]:
                outcomes += self._bury(member, self._late(member.queue[0][0]))
        for member in self._staff.sick():
            outcomes += self._bury(member, None)
        return outcomes

    def hold(self) -> None:
        for member in self._staff.members:
            while len(member.queue) > 1:
                member.queue.pop()
        self._staff.hold()

    def _collect(self, member: Member) -> list[Outcome]:
        """What `member` has finished, in its order."""
        outcomes = []
        while member.queue:
            task, ref = member.queue[0]
            if not self._ray.wait([ref], timeout=0)[0]:
                break
            try:
                outcomes.append(Outcome(task, self._ray.get(ref)))
                self._staff.did(member)
            except self._staff.own_errors as error:
                blamed = self._staff.raised(member, task, cause(error))
                outcomes.append(Outcome(task, error=cause(error), blamed=blamed))
            except self._ray.exceptions.RayError as error:
                return outcomes + self._bury(member, error)
            member.queue.popleft()
            member.since = self._clock.tick()
            if not self._staff.stays(member):
                return outcomes + self._bury(member, None)
        return outcomes

    def _late(self, task: Hashable) -> TimeoutError:
        whole = isinstance(task, Task) and task.rows is None
        advice = ", which is for a whole shard: if no row hangs, raise it or make smaller shards" if whole else ""
        return TimeoutError(f"it took longer than the time limit of {self._time_limit:g} s{advice}")

    def _bury(self, member: Member, reason: BaseException | None) -> list[Outcome]:
        """Ends a worker that is gone or is to go. Its first unfinished task is blamed for `reason`, those that waited
        behind it are not; none is if there is no reason, if its machine died, or if the one that was late is done now."""
        self._staff.dismiss(member)
        outcomes: list[Outcome] = []
        lost = self._staff.machine_died(member, reason)
        if isinstance(reason, self._ray.exceptions.OutOfMemoryError):  # it names each process of the machine
            reason = MemoryError(
                f"Ray killed its worker because the memory of machine {member.node[:8]} gave out: give fewer workers, or more memory"
            )
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
