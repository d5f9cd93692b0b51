"""Who is there: workers that are actors on Ray, and the machines on which they come up.

Machines come and go. A number of workers that was asked for is kept up (those without room yet wait at Ray, which an
autoscaler sees); without a number, workers are added wherever room appears. A worker on a machine that Ray is draining
finishes the task it is at, and its next one goes to others. A machine on which workers do not start, tell of another run, or come up
and only raise, is left alone for a while (patience.py), and the others go on, from the very start: only where nobody is left does that
end the run. Where all who are up raise and nobody does a task in between, what they share may be away for a minute (a mount, a store): they
rest for a while, up to two minutes in all, before the tasks are blamed.
"""

import dataclasses
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from distsbi.fanout.agenda import one_line
from distsbi.fanout.cluster import cluster_room, draining_nodes, grows, machine_of, machines_that_fit, not_on
from distsbi.fanout.patience import Backoff, Clock
from distsbi.fanout.stopping import Stop

PATIENCE = 60.0  # seconds without a worker before saying so, and without a machine for one before giving up
SICK = 3  # tasks in a row at which a worker raises before it gets no more while others do better, and workers that raise at one before they rest
LONGEST_REST = 64.0  # seconds; rests double up to it, two minutes in all
START_SECONDS = 900.0  # for a worker that has its machine to come up; up to twice that
LOOK_SECONDS = 2.0  # between looks at what machines there are

log = logging.getLogger("distsbi")


@dataclasses.dataclass(eq=False)
class Member:
    """An actor, what it is starting with, and its tasks in the order it takes them.

    `since`: when it was made, then when the first of `queue` began; `avoids`: machines that it is not put on; `node`: Ray's name of its
    machine, once that is known; `leaving`: it gets no more; `raised`: what it raised since it last did a task; `outdone`: another
    worker did one since the first of these; `useful`: it has done one.
    """

    actor: Any
    starting: Any
    since: float
    avoids: frozenset[str] = frozenset()
    queue: deque[tuple[Any, Any]] = dataclasses.field(default_factory=deque)
    node: str = ""
    leaving: bool = False
    raised: list[BaseException] = dataclasses.field(default_factory=list)
    outdone: bool = False
    useful: bool = False

    @property
    def doubtful(self) -> bool:
        """Whether it may be sick; or its last tasks were at fault."""
        return len(self.raised) >= SICK


def cause(error: Any) -> BaseException:
    """What a worker raised; of what this process cannot make again (it lacks the class, or that does not unpickle) its last line."""
    return getattr(error, "cause", None) or RuntimeError(str(error).strip().splitlines()[-1])


class Staff:
    """Actors on the Ray that this process is connected to.

    Args:
        worker: the class.
        job: what each is made with.
        workers: how many; None: as many as there is room for, also on machines that join later.
        environment: of their processes.
        cpus, gpus: that Ray sets aside for each.
        max_failures: workers in a row that may fail to start while none is up, or may be dismissed as sick while nobody does better.
        check: raises ValueError for what a worker tells that is not of this run.
        unlike: what is said of a worker that tells of another definition than the first: of what the first told, and what it told.
        most: at most so many workers.
    """

    def __init__(
        self,
        worker: type,
        job: Any,
        workers: int | None,
        environment: dict[str, str],
        cpus: int,
        gpus: float,
        max_failures: int,
        check: Callable[[Mapping[str, Any]], None],
        unlike: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
        most: float,
    ):
        import ray
        import ray.exceptions

        self.ray: Any = ray
        self._make: Any = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment}
        )(worker)
        self._job, self._workers, self._most, self._check, self._unlike = job, workers, most, check, unlike
        self._cpus, self._gpus, self._max_failures = cpus, gpus, max_failures
        self.members: list[Member] = []
        self._plan: Any = None
        self._told: dict[str, Any] | None = None
        self._deaths = 0  # of workers that were starting while none was up,
        self._reason: BaseException | None = None  # and what the first of them raised
        self._dismissed = 0  # workers that were dismissed as sick since any did a task, and nobody did better
        self._raised = 0  # tasks in a row at which anybody raised,
        # and at which of them who did, of those who had done others
        self._raised_at: defaultdict[Hashable, set[Member]] = defaultdict(set)
        self._rest = self._rest_until = 0.0  # the last rest of all, since any did a task
        self._backoff, self.clock = Backoff(), Clock()
        self._looked = -LOOK_SECONDS
        self._held = False
        self._said = 0.0

    @property
    def own_errors(self) -> tuple[type[BaseException], ...]:
        """What Ray raises for what a worker raised itself: it lives. See `cause`."""
        return self.ray.exceptions.RayTaskError, self.ray.exceptions.UnserializableException

    @property
    def takers(self) -> list[Member]:
        """Those who may be given tasks: the doubtful only where all are."""
        up = [m for m in self.members if m.starting is None and not m.leaving and not self._held]
        return [m for m in up if not m.doubtful] or up

    @property
    def resting(self) -> bool:
        """Whether nobody is given a task for now, because all raise."""
        return self.clock.now < self._rest_until

    def start(self, stop: Stop) -> dict[str, Any]:
        """Waits for a worker that is up and of this run, and returns what it tells.

        Raises ValueError if no machine is large enough for one, and none is to join; Terminated if `stop` is told; and as `_let_go`.
        """
        began, small = self.clock.now, not machines_that_fit(self._cpus, self._gpus)
        lacking = f"no machine of the cluster has {self._cpus} CPUs and {self._gpus:g} GPUs for a worker"
        if small:
            log.warning("%s: waiting for one that has", lacking)
        while self._told is None:
            stop.check()
            self.clock.tick()
            self.look()
            self._greet(timeout=1.0)
            if small and self.clock.now - began > PATIENCE:
                small = not grows() and not machines_that_fit(self._cpus, self._gpus)
                if small:
                    raise ValueError(
                        f"{lacking}, none joined in {PATIENCE:.0f} s, and there is no autoscaler to add one; lower cpus_per_worker or "
                        "num_gpus_per_worker, or start a machine that has as many."
                    )
            self._mind_if_nobody_is_up()
        return self._told

    def begin(self, plan: Any) -> None:
        """Tells all the plan, also those who come later."""
        self._plan = plan
        for member in self.members:
            if member.starting is None:
                member.actor.begin.remote(plan)

    def attend(self) -> None:
        """Looks after who comes and goes. To be called often."""
        self.clock.tick()
        self.look()
        self._greet(timeout=0)
        self._mind_if_nobody_is_up()

    def hold(self) -> None:
        """From now on nobody comes, and who has no task goes."""
        self._held = True
        for member in [m for m in self.members if not m.queue]:
            self.dismiss(member)

    def stays(self, member: Member) -> bool:
        """Whether it is to have more tasks after the one that it has done."""
        return not (member.leaving or self._held)

    def did(self, member: Member) -> None:
        """Notes that it has done a task."""
        if not member.useful:
            # what it does later says nothing of others on its machine, such as of one whose GPU is full
            self._backoff.well(member.node)
        member.useful, member.outdone, self._dismissed = True, False, 0
        self._raised = 0
        self._raised_at.clear()
        self._rest = self._rest_until = 0.0
        member.raised.clear()
        for other in self.members:
            other.outdone = other.outdone or bool(other.raised)

    def raised(self, member: Member, task: Hashable, error: BaseException) -> bool:
        """Notes that it raised at a task. Returns whether that is held against the task: if tasks were done up to now, by this worker too, or
        if all have rested and there is nobody who may do better: all are doubtful, or SICK workers who have done others raised at this one.

        Tasks at which everybody raises come to an end by that: what is not held against them are a few raises at each, or a few of each worker
        until all that are up are doubtful, and those between the rests. Workers that come in the place of others are as few: see `sick`.
        """
        sound = member.useful and not self._raised
        member.raised.append(error)
        self._raised += 1
        if member.useful:
            self._raised_at[task].add(member)
        by_many = len(self._raised_at[task]) >= SICK
        rested = self._rest >= LONGEST_REST and not self.resting
        held = sound or (rested and (by_many or not any(m is not member and not m.doubtful for m in self.takers)))
        if not held:
            log.info(
                "a worker on machine %s raised; another tries what it was at: %s", member.node[:8], one_line(error)
            )
        all_raise = self._raised >= SICK and all(m.raised for m in self.takers)
        # where another comes in the place of one nobody rests: see `sick`
        tired = by_many or (all_raise and not self._hope(self._dismissed))
        if tired and not self.resting and not rested:
            self._rest = max(2.0, 2 * self._rest)
            self._rest_until = self.clock.now + self._rest
            log.warning(
                "%s raise, and rest for %.0f s: %s",
                "all workers" if all_raise else "workers",
                self._rest,
                one_line(error),
            )
        return held

    def sick(self) -> list[Member]:
        """Those to be dismissed because they only raise: others have done tasks meanwhile or, where all who are up only raise, a
        machine where none failed may do better. Their machines are left alone for a while.

        Where everybody raises, everywhere, the tasks are to blame, and the rest is kept, which gives them up: between two tasks that are
        done each member is outdone once at most, and `max_failures` are dismissed without that, beside those in whose place another is
        just starting on a machine where none failed, of which each is one only once.
        """
        found = []
        for member in [m for m in self.members if m.doubtful and not self._held]:
            if not member.outdone:
                if any(not m.doubtful for m in self.takers) or not self._hope(self._dismissed):
                    continue
                self._dismissed += 1
            seconds = self._backoff.failed(member.node, self.clock.now)
            self._say_left_alone(
                f"a worker raised {len(member.raised)} times in a row", member, seconds, member.raised[-1]
            )
            found.append(member)
        return found

    def dismiss(self, member: Member) -> None:
        self.ray.kill(member.actor)
        self.members.remove(member)
        self._looked = -LOOK_SECONDS  # for another in its place

    def machine_died(self, member: Member, error: BaseException | None) -> bool:
        """Whether a worker is gone because its machine is, or cannot be reached."""
        if not isinstance(error, self.ray.exceptions.RayError):
            return False
        gone = (self.ray.exceptions.NodeDiedError, self.ray.exceptions.ActorUnavailableError)
        if isinstance(error, gone) or getattr(error, "preempted", False) or "node has died" in str(error):
            return True
        return member.node in {node["NodeID"] for node in self.ray.nodes() if not node["Alive"]}

    def look(self) -> None:
        """Adds workers that are missing or have room, and lets those on leaving machines take no more."""
        if self._held or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        leaving = draining_nodes()
        for member in list(self.members):
            if member.node in leaving and not member.leaving:
                member.leaving = True
                log.info("a worker on the leaving machine %s finishes its task", member.node[:8])
                if not member.queue:
                    self.dismiss(member)
        avoid = self._backoff.avoided(self.clock.now)
        for member in [m for m in self.members if m.starting is not None and m.avoids - avoid]:
            if not machine_of(member.actor):  # it waits, and there may be room where it was not to go
                self.dismiss(member)
        if "" in avoid:  # which machine it was is not known, so none is tried
            return
        staying = sum(not m.leaving for m in self.members)
        if self._workers is not None:
            wanted = self._workers - staying
        else:
            starting = sum(m.starting is not None for m in self.members)  # Ray may not have placed them yet
            wanted = cluster_room(self._cpus, self._gpus, leaving | avoid) - starting
            wanted = max(wanted, 1) if not self.members else wanted
        for _ in range(int(min(wanted, self._most - staying))):
            actor = self._make.options(label_selector=not_on(avoid)).remote(self._job)
            self.members.append(Member(actor, actor.ready.remote(own_process=True), self.clock.now, avoid))

    def _greet(self, timeout: float) -> None:
        """Takes in workers that have come up, and lets those go that did not. Raises as `_let_go`."""
        starting = {m.starting: m for m in self.members if m.starting is not None}
        if not starting:
            return
        self.ray.wait(list(starting), num_returns=1, timeout=timeout)
        for ref in self.ray.wait(list(starting), num_returns=len(starting), timeout=0)[0]:
            member = starting.pop(ref)
            try:
                told = self.ray.get(ref)
            except self.own_errors as error:
                self._let_go(member, cause(error))
                continue
            except self.ray.exceptions.RayError as error:
                self._let_go(member, error)
                continue
            try:
                self._compare(told)
            except ValueError as error:
                self._let_go(member, error, lasting=True)
                continue
            self._deaths, self._reason = 0, None
            member.starting, member.node = None, told["worker"]["node"]
            if self._plan is not None:
                member.actor.begin.remote(self._plan)
        for member in starting.values():
            if self.clock.now - member.since < START_SECONDS:
                continue
            if member.node:
                self._let_go(member, TimeoutError(f"a worker hung for {START_SECONDS:.0f} s while it loaded"))
            else:  # it may have got its machine only now
                member.node, member.since = machine_of(member.actor), self.clock.now

    def _compare(self, told: dict[str, Any]) -> None:
        """Raises ValueError for what is not of this run, or not what the first worker that was told."""
        if self._told is None:
            self._check(told)
            self._told = told
        elif told["definition"] != self._told["definition"]:
            raise ValueError(self._unlike(self._told, told))

    def _let_go(self, member: Member, error: BaseException, *, lasting: bool = False) -> None:
        """Ends a worker that did not come up; its machine is left alone for a while. `lasting`: another would not come up there, either.

        While a worker is up, or one may come up where none failed, this raises nothing: the trouble of a machine (a disk that is away, a
        full GPU, another copy of the run) is no reason to end the others' work. Else it raises what the first of those raised that
        failed since one was up: at once if none ever was, or if it lasts, else after `max_failures` in a row; RuntimeError if they died.
        """
        ours = not isinstance(error, self.ray.exceptions.RayError)
        member.node = member.node or machine_of(member.actor)
        lost = self.machine_died(member, error)
        self.dismiss(member)
        if lost:
            log.warning("a worker did not start, its machine is gone: %s", one_line(error))
            return
        seconds = self._backoff.failed(member.node, self.clock.now, lasting=lasting)
        if not any(m.starting is None for m in self.members):
            self._deaths += 1
            self._reason = self._reason or (error if ours else None)
            final = lasting or self._deaths >= self._max_failures or (ours and self._told is None)
            if final and not self._hope(self._deaths):
                if self._reason is not None:
                    raise self._reason from None
                raise RuntimeError(f"{self._deaths} workers in a row died while starting: {one_line(error)}") from error
        self._say_left_alone("a worker did not start", member, seconds, error)

    def _say_left_alone(self, what: str, member: Member, seconds: float, error: BaseException) -> None:
        log.log(
            logging.WARNING if self._backoff.failures(member.node) == 1 else logging.INFO,
            "%s on %s, which is left alone for %.0f s: %s",
            *(what, f"machine {member.node[:8]}" if member.node else "a machine", seconds, one_line(error)),
        )

    def _hope(self, failed_in_a_row: int) -> bool:
        """Whether a worker is starting on a machine where none failed or, before `max_failures` in a row, whether there is such a machine."""
        starting = {machine_of(m.actor) for m in self.members if m.starting is not None} - {""}
        if any(not self._backoff.failures(machine) for machine in starting):
            return True
        fit = machines_that_fit(self._cpus, self._gpus)
        failed = sum(self._backoff.failures(machine) > 0 for machine in {*fit, ""})
        return failed_in_a_row < self._max_failures and failed < len(fit)

    def _mind_if_nobody_is_up(self) -> None:
        """Says so, from time to time. Raises RuntimeError where no machine is alive on which one could be."""
        if any(m.starting is None for m in self.members):
            self._said = self.clock.now
        elif self.clock.now - self._said > PATIENCE:
            self._said = self.clock.now
            if not any(node["Alive"] for node in self.ray.nodes()):
                raise RuntimeError(
                    f"none of Ray's machines has been alive for {PATIENCE:.0f} s: a process of Ray's on this one was killed, or memory ran out. What is "
                    "finished is kept; give the same call again to go on."
                )
            log.warning(
                "no worker is up (each starts Python, loads the run and compiles); Ray has %g of %g CPUs free",
                self.ray.available_resources().get("CPU", 0),
                self.ray.cluster_resources().get("CPU", 0),
            )
