"""The pool on a Ray that is made up: who fails to come up, who is late and who is blamed, one event at a time.

What Ray itself does is in test_ray.py and test_nodes.py.
"""

import itertools
from collections import Counter

import pytest

from distsbi.fanout import patience, ray_pool as pools, staff as staffs
from distsbi.fanout.agenda import Agenda, Shards, Task
from distsbi.fanout.ray_pool import RayPool
from distsbi.fanout.staff import Staff
from distsbi.fanout.stopping import Stop, Terminated

pytest.importorskip("ray")
DIED = object()


class FakeRay:
    """Machines by name with their free cores; actors take the first that they may be put on. `results`: by reference."""

    def __init__(self, free):
        import ray

        self.exceptions = ray.exceptions
        self.free, self.results, self.actors, self.seconds, self.draining = free, {}, [], 0.0, set()
        self.later, self.dead = [], set()  # (seconds, what happens then)

    def place(self):
        for actor in self.actors:
            for machine in self.free:
                if actor.alive and not actor.machine and machine not in actor.avoids and self.free[machine]:
                    actor.machine = machine
                    self.free[machine] -= 1

    def sleep(self, seconds):
        self.seconds += seconds

    def wait(self, refs, num_returns=1, timeout=0.0):
        ready = [ref for ref in refs if ref in self.results]
        if not ready:
            self.seconds += timeout
            for event in [event for event in self.later if event[0] <= self.seconds]:
                self.later.remove(event)
                event[1]()
        return ready[:num_returns], [ref for ref in refs if ref not in ready[:num_returns]]

    def get(self, ref, timeout=None):
        if ref not in self.results:
            raise self.exceptions.GetTimeoutError("not there")
        result = self.results[ref]
        if result is DIED:
            raise self.exceptions.ActorDiedError()
        if isinstance(result, self.exceptions.RayError):
            raise result
        if isinstance(result, Exception):
            raise self.exceptions.RayTaskError("ready", "traceback", result)
        return result

    def kill(self, actor):
        if actor.alive and actor.machine:
            self.free[actor.machine] += 1
        actor.alive = False
        self.place()

    def nodes(self):
        return [{"NodeID": machine, "Alive": machine not in self.dead} for machine in self.free]

    def available_resources(self):
        return {}

    cluster_resources = available_resources


class FakeActor:
    def __init__(self, ray, avoids):
        self.alive, self.machine, self.avoids = True, "", avoids
        self._count = itertools.count()
        self.ready, self.begin, self.do = Method(self, "ready"), Method(self, "begin"), Method(self, "do")
        ray.actors.append(self)
        ray.place()


class Method:
    def __init__(self, actor, name):
        self._actor, self._name = actor, name

    def remote(self, *args, **more):
        if self._name == "ready":
            return self._actor, "ready"
        return self._actor, self._name, next(self._actor._count)


@pytest.fixture
def make(monkeypatch):
    """A pool on machines with so many cores each. Time passes where the pool waits, and where a test lets it."""

    def make(workers, time_limit=None, check=lambda told: None, **free):
        ray = FakeRay(free)
        monkeypatch.setattr(staffs, "machine_of", lambda actor: actor.machine)
        monkeypatch.setattr(staffs, "not_on", lambda machines: machines)
        monkeypatch.setattr(staffs, "draining_nodes", lambda: ray.draining)
        monkeypatch.setattr(staffs, "machines_that_fit", lambda cpus, gpus: set(ray.free))
        monkeypatch.setattr(staffs, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(pools.time, "sleep", ray.sleep)
        unlike = lambda first, told: f"{told['definition']} is another run"  # noqa: E731
        staff = Staff(object, "job", workers, {}, 1, 0, 3, check, unlike, 99)
        staff.ray, staff.clock = ray, patience.Clock(lambda: ray.seconds)
        options = lambda label_selector: type("", (), {"remote": lambda job: FakeActor(ray, label_selector)})  # noqa: E731
        staff._make = type("", (), {"options": staticmethod(options)})
        return RayPool(staff, time_limit), ray

    return make


def come_up(ray, which=None, definition="run"):
    """Actors that have a machine come up."""
    for actor in ray.actors:
        if actor.alive and actor.machine and (actor, "ready") not in ray.results and which in (None, actor.machine):
            ray.results[actor, "ready"] = {"definition": definition, "worker": {"node": actor.machine}}


def fail(ray, machine, result):
    """Actors that are starting on `machine` fail. Returns how many."""
    refs = [(a, "ready") for a in ray.actors if a.alive and a.machine == machine and (a, "ready") not in ray.results]
    ray.results.update(dict.fromkeys(refs, result))
    return len(refs)


def starting(ray):
    return [a.machine for a in ray.actors if a.alive and (a, "ready") not in ray.results]


def kill(ray, machine):
    """The worker that is up on `machine` is killed."""
    (actor,) = (a for a in ray.actors if a.alive and a.machine == machine)
    for count in range(10):
        ray.results.setdefault((actor, "do", count), DIED)


def soon(ray, *events):
    """What happens in the next seconds, one event in each."""
    ray.later += [(ray.seconds + second, event) for second, event in enumerate(events, 1)]


def work(pool, ray, *tasks):
    """Workers come up and are given these tasks."""
    come_up(ray)
    pool.start(Stop())
    for task in tasks:
        pool.submit(task)


def work_and_kill(pool, ray, machine):
    """Two workers come up and are given a task each; then that of this machine dies."""
    work(pool, ray, "task 1", "task 2")
    kill(ray, machine)


@pytest.mark.parametrize("result", [OSError("the disk is away"), DIED, "another"])
def test_a_bad_machine_does_not_end_what_others_do(make, caplog, result):
    """The worker on one of two machines is killed, and every other that is started there fails."""
    caplog.set_level("WARNING", "distsbi")
    pool, ray = make(2, a=1, b=1)
    with pool:
        work_and_kill(pool, ray, "b")
        (outcome,) = pool.wait()
        assert outcome.died
        failed = 0
        while ray.seconds < 3000:
            pool.wait()
            if result == "another":
                failed += "b" in starting(ray)
                come_up(ray, definition="another")
            else:
                failed += fail(ray, "b", result)
            ray.seconds += 1
        assert 5 < failed < 25
        warned = [r.message for r in caplog.records]
        assert len(warned) == 1
        assert warned[0].startswith("a worker did not start on machine b, which is left alone for ")
        (a,) = (a for a in ray.actors if a.alive and a.machine == "a")
        ray.results[a, "do", 0] = "done"  # the one on the good machine was at work all the time
        assert [outcome.manifest for outcome in pool.wait()] == ["done"]


def test_another_machine_is_tried_at_once(make):
    pool, ray = make(2, a=1, b=1)
    with pool:
        work_and_kill(pool, ray, "b")
        pool.wait()
        pool.wait()
        assert fail(ray, "b", OSError("the disk is away")) == 1
        pool.wait()
        pool.wait()
        assert starting(ray) == [""]  # it waits for another machine
        ray.free["c"] = 1
        ray.place()
        assert starting(ray) == ["c"]
        come_up(ray)
        pool.wait()
        assert sorted(m.node for m in pool._staff.members if m.starting is None) == ["a", "c"]


def test_a_machine_that_has_recovered_is_used_again(make):
    pool, ray = make(2, a=1, b=1)
    with pool:
        come_up(ray, "a")
        pool.start(Stop())
        fail(ray, "b", OSError("the disk is away"))
        pool.wait()
        began = ray.seconds
        while starting(ray) != ["b"]:
            pool.wait()
            assert ray.seconds < began + 10 * patience.FIRST_SECONDS
            ray.seconds += 0.5
        assert ray.seconds - began >= patience.FIRST_SECONDS
        come_up(ray)
        pool.wait()
        assert all(m.starting is None for m in pool._staff.members)


@pytest.mark.parametrize(
    "result, error, says",
    [
        (OSError("the disk is away"), OSError, "the disk is away"),
        (DIED, RuntimeError, "3 workers in a row died while starting"),
    ],
)
def test_it_ends_where_nobody_is_left(make, result, error, says):
    pool, ray = make(1, a=1)
    failed = 0
    with pool, pytest.raises(error, match=says):
        work(pool, ray, "task")
        kill(ray, "a")
        pool.wait()
        while ray.seconds < 3000:
            failed += fail(ray, "a", result)
            pool.wait()
            ray.seconds += 1
    assert failed == 3


def test_nobody_is_left_only_when_the_good_machine_has_failed_too(make):
    """Both workers die; that on the good machine takes its time to come up again."""
    pool, ray = make(2, a=1, b=1)
    with pool:
        work(pool, ray, "task 1", "task 2")
        kill(ray, "a"), kill(ray, "b")
        failed = 0
        while ray.seconds < 600:
            pool.wait()
            failed += fail(ray, "b", OSError("the disk is away"))
            ray.seconds += 1
        assert failed > 3
        come_up(ray, "a")
        pool.wait()
        assert pool.room()


def test_errors_of_all_machines_are_raised_at_once(make):
    """On one machine those of the first worker, on several when each has failed: what the first worker raised."""
    pool, ray = make(2, a=2)
    soon(ray, lambda: ray.results.update({(ray.actors[0], "ready"): ValueError("no such solver")}))
    with pool, pytest.raises(ValueError, match="no such solver"):
        pool.start(Stop())
    assert ray.seconds < 3
    pool, ray = make(2, a=1, b=1)
    soon(ray, *(lambda m=m: fail(ray, m, ValueError(f"no such solver on {m}")) for m in "ba"))
    with pool, pytest.raises(ValueError, match="no such solver on b"):
        pool.start(Stop())
    assert ray.seconds < 4


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("result", [OSError("the disk is away"), DIED])
def test_one_sick_machine_does_not_end_the_start(make, caplog, result, workers):
    """It fails fastest; where that was the only worker, the next is tried on another machine."""
    pool, ray = make(workers, b=1, a=1, c=1)
    soon(ray, lambda: fail(ray, "b", result), *[lambda: None] * 5, lambda: come_up(ray, "a"), lambda: come_up(ray, "c"))
    with pool:
        assert pool.start(Stop())["worker"]["node"] == "a"
        assert pool._staff._reason is None  # it is not what a later end is put down to
    (warned,) = {r.message for r in caplog.records}
    assert warned.startswith("a worker did not start on machine b, which is left alone for 2 s")


def test_it_does_not_hope_for_room_for_ever(make):
    """The good machine is busy with others' work, and the sick one fails again and again."""
    pool, ray = make(2, b=1, a=0)
    with pool, pytest.raises(OSError, match="the disk is away"):
        soon(ray, *[lambda: fail(ray, "b", OSError("the disk is away"))] * 100)
        pool.start(Stop())
    assert ray.seconds < 30


def other_than(definition):
    def check(told):
        if told["definition"] == definition:
            raise ValueError(f"{definition} is another run than was asked for")

    return check


def test_the_first_to_answer_does_not_say_what_the_run_is(make):
    pool, ray = make(3, a=1, b=1, c=1, check=other_than("stale"))
    soon(ray, lambda: come_up(ray, "a", "stale"), lambda: come_up(ray, "b"), lambda: come_up(ray, "c"))
    with pool:
        assert pool.start(Stop())["definition"] == "run"
        pool.wait(), pool.wait()
        assert sorted(m.node for m in pool._staff.takers) == ["b", "c"]
    pool, ray = make(2, a=1, b=1, check=other_than("stale"))
    soon(ray, lambda: come_up(ray, "a", "stale"), lambda: come_up(ray, "b", "stale"))
    with pool, pytest.raises(ValueError, match="stale is another run than was asked for"):
        pool.start(Stop())


def test_sigterm_ends_the_wait_for_the_first_worker(make):
    pool, ray = make(2, a=1)
    stop = Stop()
    soon(ray, *[lambda: None] * 4, lambda: setattr(stop, "told", True))
    with pool, pytest.raises(Terminated):
        pool.start(stop)
    assert ray.seconds < 7
    assert not any(actor.alive for actor in ray.actors)


@pytest.mark.parametrize("what", ["nothing", "an autoscaler", "a machine"])
def test_a_cluster_whose_machines_are_too_small_is_refused_unless_it_grows(make, monkeypatch, what):
    pool, ray = make(1, a=0)
    joined = lambda: ray.seconds > 0.9 * staffs.PATIENCE and what == "a machine"  # noqa: E731
    monkeypatch.setattr(staffs, "machines_that_fit", lambda cpus, gpus: {"b"} if joined() else set())
    monkeypatch.setattr(staffs, "grows", lambda: what == "an autoscaler")
    look = pool._staff.look

    def up_at_last():
        look()
        if ray.seconds > 3 * staffs.PATIENCE:
            ray.free["b"] = 1
            ray.place()
            come_up(ray)

    monkeypatch.setattr(pool._staff, "look", up_at_last)
    with pool:
        if what == "nothing":
            with pytest.raises(
                ValueError, match="has 1 CPUs and 0 GPUs for a worker, .* lower cpus_per_worker or num_gpus"
            ):
                pool.start(Stop())
            assert staffs.PATIENCE < ray.seconds < 1.1 * staffs.PATIENCE
        else:
            assert pool.start(Stop())["definition"] == "run"


def test_where_no_machine_is_alive_nobody_waits(make):
    """Ray's own process on a machine is killed, and with it the workers: that of a call's own Ray never comes back."""
    pool, ray = make(1, a=1)
    with pool:
        work(pool, ray, "task")
        kill(ray, "a")
        ray.free = {"a": -1}  # the core that the dead worker leaves is none
        ray.dead.add("a")
        with pytest.raises(RuntimeError, match="none of Ray's machines has been alive .* the same call again"):
            while ray.seconds < 10 * staffs.PATIENCE:
                pool.wait()
        assert staffs.PATIENCE < ray.seconds < 2 * staffs.PATIENCE


def test_a_worker_that_hangs_while_it_starts_is_replaced(make, caplog):
    pool, ray = make(2, a=1, b=1)
    with pool:
        come_up(ray, "a")
        pool.start(Stop())
        (hanging,) = (actor for actor in ray.actors if actor.machine == "b")
        while hanging.alive:
            pool.wait()
            assert ray.seconds < 3 * staffs.START_SECONDS
            ray.seconds += 1
        assert ray.seconds > staffs.START_SECONDS
        assert "hung for 900 s while it loaded" in caplog.text
        while starting(ray) != ["b"]:
            pool.wait()
            ray.seconds += 1


def test_a_worker_that_waits_for_its_machine_may_wait_for_ever(make):
    pool, ray = make(2, a=1)
    with pool:
        come_up(ray)
        pool.start(Stop())
        (waiting,) = (actor for actor in ray.actors if not actor.machine)
        while ray.seconds < 5 * staffs.START_SECONDS:
            pool.wait()
        assert waiting.alive
        ray.free["b"] = 1
        ray.place()
        began = ray.seconds
        while ray.seconds < began + 0.9 * staffs.START_SECONDS:  # and then has its full time
            pool.wait()
        assert waiting.alive
        assert waiting.machine == "b"


@pytest.fixture
def two(make):
    """A pool of two workers that are up, each with a task at work and one that waits; tasks may take 6 s."""
    pool, ray = make(2, time_limit=6.0, a=1, b=1)
    with pool:
        come_up(ray)
        pool.start(Stop())
        for task in ("a0", "b0", "a1", "b1"):
            pool.submit(task)
        yield pool, ray, {a.machine: a for a in ray.actors if a.alive}


def until(pool, ray, seconds):
    outcomes = []
    while ray.seconds < seconds:
        outcomes += pool.wait()
    return outcomes


def test_a_task_that_takes_too_long_is_blamed_and_the_one_behind_it_is_not(two):
    pool, ray, actors = two
    began = ray.seconds
    assert until(pool, ray, began + 3) == []
    ray.results[actors["a"], "do", 0] = {}
    assert [o.task for o in pool.wait()] == ["a0"]
    outcomes = until(pool, ray, began + 6)
    assert outcomes == []
    outcomes = until(pool, ray, began + 8)
    assert [(o.task, o.blamed, o.died) for o in outcomes] == [("b0", True, True), ("b1", False, True)]
    assert "time limit of 6 s" in str(outcomes[0].error)
    outcomes = until(pool, ray, began + 12)
    assert [(o.task, o.blamed) for o in outcomes] == [("a1", True)]


def test_what_a_time_limit_is_for_is_said_of_whole_shards_alone(make):
    pool, ray = make(2, time_limit=6.0, a=1, b=1)
    with pool:
        work(pool, ray, Task(0), Task(1, (4, 5)))
        shard, probe = sorted(until(pool, ray, ray.seconds + 8), key=lambda o: o.task.shard)
    assert str(shard.error).endswith(
        "of 6 s, which is for a whole shard: if no row hangs, raise it or make smaller shards"
    )
    assert str(probe.error) == "it took longer than the time limit of 6 s"


def test_nobody_is_blamed_for_the_time_in_which_the_driver_stood_still(two):
    """Both workers finish their first task meanwhile, and have begun the second."""
    pool, ray, actors = two
    assert until(pool, ray, ray.seconds + 5) == []
    ray.seconds += 7
    ray.results[actors["a"], "do", 0] = ray.results[actors["b"], "do", 0] = {}
    began, outcomes = ray.seconds, pool.wait()
    assert [(o.task, o.error) for o in outcomes] == [("a0", None), ("b0", None)]
    assert until(pool, ray, began + 2) == []
    ray.seconds += 3600
    assert pool.wait() == []  # they may have been done long since, had it looked
    assert {o.task for o in until(pool, ray, ray.seconds + 7) if o.blamed} == {"a1", "b1"}


def test_the_time_of_a_task_begins_when_it_is_given(make):
    """Not when the driver last looked, which was busy with something else since."""
    pool, ray = make(1, time_limit=6.0, a=1)
    with pool:
        come_up(ray)
        pool.start(Stop())
        ray.seconds += 1.9
        pool.submit("task")
        assert until(pool, ray, ray.seconds + 6) == []
        assert [o.task for o in until(pool, ray, ray.seconds + 2)] == ["task"]


def test_a_task_that_ends_as_its_worker_is_killed_for_it_blames_nobody(two, monkeypatch):
    pool, ray, _actors = two
    kill = ray.kill

    def end_and_kill(actor):
        ray.results[actor, "do", 0] = {}
        kill(actor)

    monkeypatch.setattr(ray, "kill", end_and_kill)
    outcomes = until(pool, ray, ray.seconds + 8)
    assert [(o.task, o.error is None, o.blamed) for o in outcomes[:2]] == [("a0", True, True), ("a1", False, False)]
    assert [(o.task, o.error is None, o.blamed) for o in outcomes[2:]] == [("b0", True, True), ("b1", False, False)]


def test_a_worker_that_is_killed_for_want_of_memory_is_said_to_be(two):
    pool, ray, actors = two
    killed = ray.exceptions.OutOfMemoryError("Memory on the node was 15GB / 16GB:\n and 80 lines of processes")
    ray.results |= {(actors["a"], "do", 0): killed, (actors["a"], "do", 1): killed}
    first, second = pool.wait()
    assert (first.task, first.blamed, first.died, second.task, second.blamed) == ("a0", True, True, "a1", False)
    assert isinstance(first.error, MemoryError)
    assert str(first.error) == (
        "Ray killed its worker because the memory of machine a gave out: give fewer workers, or more memory"
    )


def test_a_worker_that_raises_what_does_not_unpickle_here_lives(two):
    pool, ray, actors = two
    trace = "Traceback (most recent call last):\n  File ...\nstores.StoreError: the store is away\n"
    ray.results[actors["a"], "do", 0] = ray.exceptions.UnserializableException(trace)
    (outcome,) = pool.wait()
    assert (outcome.task, outcome.died, type(outcome.error)) == ("a0", False, RuntimeError)
    assert str(outcome.error) == "stores.StoreError: the store is away"
    assert actors["a"].alive


def test_a_worker_on_a_leaving_machine_finishes_its_task_and_goes(two):
    pool, ray, actors = two
    ray.draining, ray.free["c"] = {"a"}, 1
    assert pool.wait() == []
    come_up(ray, "c")
    assert pool.wait() == []
    pool.submit("c0"), pool.submit("c1")
    assert not pool.room()  # on the leaving machine, either
    assert actors["a"].alive
    ray.results[actors["a"], "do", 0] = {}
    ended = pool.wait()
    assert [(o.task, o.error, o.blamed) for o in ended] == [("a0", None, True), ("a1", None, False)]
    assert not actors["a"].alive


def test_a_worker_without_a_task_goes_at_once_from_a_leaving_machine(make):
    pool, ray = make(2, a=1, b=1)
    with pool:
        come_up(ray)
        pool.start(Stop())
        ray.draining = {"b"}
        pool.wait()
        assert [a.machine for a in ray.actors if a.alive and (a, "ready") in ray.results] == ["a"]


def test_a_leaving_machine_gets_no_tasks(make):
    pool, ray = make(1, a=1)
    with pool:
        work(pool, ray, "task")
        assert pool.room()
        ray.draining = {"a"}
        pool.wait()
        assert (pool.busy, pool.room()) == (1, False)


def test_who_has_no_task_is_held_no_longer(make):
    """One has a task, one has none, one is starting."""
    pool, ray = make(3, a=1, b=1, c=1)
    with pool:
        come_up(ray, "a"), come_up(ray, "b")
        pool.start(Stop())
        pool.submit("task")
        pool.hold()
        assert [a.machine for a in ray.actors if a.alive] == ["a"]


def test_hold_finishes_what_is_at_work_and_nothing_else(two):
    pool, ray, actors = two
    pool.hold()
    assert (pool.busy, pool.room()) == (2, False)
    assert pool.wait() == []
    ray.results[actors["b"], "do", 0] = {}
    assert [o.task for o in pool.wait()] == ["b0"]
    assert (actors["a"].alive, actors["b"].alive) == (True, False)
    ray.results[actors["a"], "do", 0] = {}
    assert [o.task for o in pool.wait()] == ["a0"]
    assert (pool.busy, pool.wait()) == (0, [])
    assert not any(actor.alive for actor in ray.actors)  # and nobody comes in their place


def test_a_task_is_excused_for_machines_that_die_so_many_times(make, monkeypatch):
    pool, ray = make(1, a=1)
    monkeypatch.setattr(pool._staff, "machine_died", lambda member, error: error is not None)
    monkeypatch.setattr(pools, "EXCUSED", 3)
    blamed = []
    with pool:
        come_up(ray)
        pool.start(Stop())
        while len(blamed) < 4:
            come_up(ray)
            if not pool.room():
                pool.wait()
                continue
            pool.submit("task")
            kill(ray, "a")
            blamed += [outcome.blamed for outcome in pool.wait()]
    assert blamed == [False] * 3 + [True]


def play(pool, ray, agenda, raises, starts=1, until=20_000):
    """Runs an agenda to its end. A worker is up after `starts` seconds, a task takes 10 s, or none where `raises(machine, task)`.

    Returns the events, and how many workers were made.
    """
    events, made = [], {}
    with pool:
        while agenda.left and ray.seconds < until:
            for actor in ray.actors:
                if actor.alive and actor.machine and ray.seconds - made.setdefault(actor, ray.seconds) >= starts:
                    ray.results.setdefault((actor, "ready"), {"definition": "run", "worker": {"node": actor.machine}})
            pool._staff._greet(0)
            task = agenda.next() if pool.room() else None
            while task:
                pool.submit(task)
                task = agenda.next() if pool.room() else None
            for member in [m for m in pool._staff.members if m.queue]:
                task, ref = member.queue[0]
                if raises(member.actor.machine, task.shard):
                    ray.results[ref] = OSError(f"{member.actor.machine} is sick")
                elif pool._staff.clock.now - member.since >= 10:
                    ray.results[ref] = {"shard": task.shard}
            for outcome in pool.wait():
                new = agenda.take(outcome)
                agenda.left -= sum(event["event"] in ("done", "given_up") for event in new)
                events += new
    assert agenda.left == 0
    return events, len(ray.actors)


def count(events, kind, shard=None):
    return sum(event["event"] == kind and shard in (None, event["shard"]) for event in events)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("starts", [1, 40])
@pytest.mark.parametrize("shards", [4, 200])
def test_a_sick_machine_costs_no_shard(make, caplog, workers, starts, shards):
    """Its workers are up first, and raise at once at whatever they get, also those that come later."""
    pool, ray = make(workers, sick=2, a=2, b=2, c=2)
    agenda = Agenda(Shards(shards, 1, "f"), [], 3)
    events, made = play(pool, ray, agenda, lambda machine, shard: machine == "sick", starts)
    assert (count(events, "done"), agenda.given_up) == (shards, {})
    assert count(events, "failed") <= 4  # of the one that is alone, before anyone does better
    assert made <= workers + 25  # it is left alone for longer each time
    said = [record.message for record in caplog.records]
    assert len(said) == 1 or (shards == 4 and not said)  # few shards may be done before it is known
    assert all(
        text.startswith("a worker raised ") and "on machine sick, which is left alone for 2 s" in text for text in said
    )


def test_a_machine_that_was_sick_does_its_share_again(make):
    pool, ray = make(2, a=1, b=1)
    sick = lambda machine, shard: machine == "b" and ray.seconds < 200  # noqa: E731
    play(pool, ray, Agenda(Shards(100, 1, "f"), [], 3), sick)
    assert ray.seconds < 800  # alone, a needs 1000


@pytest.mark.parametrize("most", [1, 3, 10])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_raises_everywhere_is_given_up(make, workers, most):
    """One shard does, so do three of a row at the end, or all: nobody is sick, and it ends."""
    for bad in ({7}, {17, 18, 19}, set(range(20))):
        pool, ray = make(workers, a=1, b=1, c=1, d=1)
        agenda = Agenda(Shards(20, 1, "f"), [], most)
        events, made = play(pool, ray, agenda, lambda machine, shard, bad=bad: shard in bad)
        assert set(agenda.given_up) == bad
        assert count(events, "failed") == most * len(bad)
        assert count(events, "done") == 20 - len(bad)
        assert made <= workers + 10
        assert ray.seconds < 300 + 2 * staffs.LONGEST_REST


@pytest.mark.parametrize("workers", [1, 2, 8, 32])
@pytest.mark.parametrize("bad", [{0}, {150}, {199}, {10, 100, 190}])
def test_few_attempts_are_made_at_what_raises_whatever_the_number_of_workers(make, workers, bad):
    """At the end nothing else is left, whose success would tell that the shards are at fault; a mount may be away just then."""
    pool, ray = make(workers, a=16, b=16)
    tries, submit = Counter(), pool.submit
    pool.submit = lambda task: (tries.update([task.shard]), submit(task))
    events, _ = play(pool, ray, Agenda(Shards(200, 1, "f"), [], 3), lambda machine, shard: shard in bad)
    assert {event["shard"] for event in events if event["event"] == "given_up"} == bad
    assert max(tries.values()) <= 20


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 16, 100])
@pytest.mark.parametrize("seconds", [3, 20, 60])
@pytest.mark.parametrize("begins", [5, 15])
def test_an_outage_of_what_all_share_costs_no_shard(make, caplog, workers, shards, seconds, begins):
    """A mount is away for so long: whatever is tried meanwhile raises at once. Also where that is at the end, when few shards are left."""
    pool, ray = make(workers, a=4, b=4)
    agenda = Agenda(Shards(shards, 1, "f"), [], 3)
    away = lambda machine, shard: begins < ray.seconds < begins + seconds  # noqa: E731
    events, _ = play(pool, ray, agenda, away)
    assert (count(events, "done"), agenda.given_up) == (shards, {})
    assert count(events, "failed") < 20
    if seconds == 60 and shards > 2 * workers:
        assert "all workers raise, and rest for 32 s" in caplog.text
