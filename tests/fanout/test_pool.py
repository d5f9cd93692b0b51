"""The pool on a Ray that is made up: who fails to come up, who is late and who is blamed, one event at a time.

What Ray itself does is in test_ray.py and test_nodes.py.
"""

import itertools

import pytest

from distsbi.fanout import patience, ray_pool as pools
from distsbi.fanout.ray_pool import RayPool

pytest.importorskip("ray")
DIED = object()


class FakeRay:
    """Machines by name with their free cores; actors take the first that they may be put on. `results`: by reference."""

    def __init__(self, free):
        import ray

        self.exceptions = ray.exceptions
        self.free, self.results, self.actors, self.seconds = free, {}, [], 0.0

    def place(self):
        for actor in self.actors:
            for machine in self.free:
                if actor.alive and not actor.machine and machine not in actor.avoids and self.free[machine]:
                    actor.machine = machine
                    self.free[machine] -= 1

    def wait(self, refs, num_returns=1, timeout=0.0):
        ready = [ref for ref in refs if ref in self.results]
        if not ready:
            self.seconds += timeout
        return ready[:num_returns], [ref for ref in refs if ref not in ready[:num_returns]]

    def get(self, ref, timeout=None):
        if ref not in self.results:
            raise self.exceptions.GetTimeoutError("not there")
        result = self.results[ref]
        if result is DIED:
            raise self.exceptions.ActorDiedError()
        if isinstance(result, Exception):
            raise self.exceptions.RayTaskError("ready", "traceback", result)
        return result

    def kill(self, actor):
        if actor.alive and actor.machine:
            self.free[actor.machine] += 1
        actor.alive = False
        self.place()

    def nodes(self):
        return [{"NodeID": machine, "Alive": True} for machine in self.free]

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

    def make(workers, time_limit=None, **free):
        ray = FakeRay(free)
        monkeypatch.setattr(pools, "machine_of", lambda actor: actor.machine)
        monkeypatch.setattr(pools, "not_on", lambda machines: machines)
        monkeypatch.setattr(pools, "draining_nodes", set)
        monkeypatch.setattr(pools, "fits_a_machine", lambda cpus, gpus: True)
        monkeypatch.setattr(pools, "LOOK_SECONDS", 0.0)
        made = RayPool(
            object, "job", workers, {}, 1, 0, time_limit, 3, lambda first, told: f"{told['definition']} is another run"
        )
        made._ray, made._clock = ray, patience.Clock(lambda: ray.seconds)
        options = lambda label_selector: type("", (), {"remote": lambda job: FakeActor(ray, label_selector)})  # noqa: E731
        made._make = type("", (), {"options": staticmethod(options)})
        return made, ray

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


def work_and_kill(pool, ray, machine):
    """Two workers come up and are given a task each; then that of this machine dies."""
    come_up(ray)
    pool.start()
    pool.submit("task 1"), pool.submit("task 2")
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
        assert sorted(m.node for m in pool._members if m.starting is None) == ["a", "c"]


def test_a_machine_that_has_recovered_is_used_again(make):
    pool, ray = make(2, a=1, b=1)
    with pool:
        come_up(ray, "a")
        pool.start()
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
        assert all(m.starting is None for m in pool._members)


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
        come_up(ray)
        pool.start()
        pool.submit("task")
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
        come_up(ray)
        pool.start()
        pool.submit("task 1"), pool.submit("task 2")
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


def test_errors_of_the_first_worker_are_raised_at_once(make):
    pool, ray = make(2, a=1, b=1)
    with pool, pytest.raises(ValueError, match="no such solver"):
        fail(ray, "a", ValueError("no such solver"))
        pool.start()


@pytest.mark.parametrize("what", ["nothing", "an autoscaler", "a machine"])
def test_a_cluster_whose_machines_are_too_small_is_refused_unless_it_grows(make, monkeypatch, what):
    pool, ray = make(1, a=0)
    joined = lambda: ray.seconds > 0.9 * pools.PATIENCE and what == "a machine"  # noqa: E731
    monkeypatch.setattr(pools, "fits_a_machine", lambda cpus, gpus: joined())
    monkeypatch.setattr(pools, "grows", lambda: what == "an autoscaler")
    look = pool._look

    def up_at_last():
        look()
        if ray.seconds > 3 * pools.PATIENCE:
            ray.free["b"] = 1
            ray.place()
            come_up(ray)

    monkeypatch.setattr(pool, "_look", up_at_last)
    with pool:
        if what == "nothing":
            with pytest.raises(
                ValueError, match="has 1 CPUs and 0 GPUs for a worker, .* lower cpus_per_worker or num_gpus"
            ):
                pool.start()
            assert pools.PATIENCE < ray.seconds < 1.1 * pools.PATIENCE
        else:
            assert pool.start()["definition"] == "run"


def test_a_worker_that_hangs_while_it_starts_is_replaced(make, caplog):
    pool, ray = make(2, a=1, b=1)
    with pool:
        come_up(ray, "a")
        pool.start()
        (hanging,) = (actor for actor in ray.actors if actor.machine == "b")
        while hanging.alive:
            pool.wait()
            assert ray.seconds < 3 * pools.START_SECONDS
            ray.seconds += 1
        assert ray.seconds > pools.START_SECONDS
        assert "hung for 900 s while it loaded" in caplog.text
        while starting(ray) != ["b"]:
            pool.wait()
            ray.seconds += 1


def test_a_worker_that_waits_for_its_machine_may_wait_for_ever(make):
    pool, ray = make(2, a=1)
    with pool:
        come_up(ray)
        pool.start()
        (waiting,) = (actor for actor in ray.actors if not actor.machine)
        while ray.seconds < 5 * pools.START_SECONDS:
            pool.wait()
        assert waiting.alive
        ray.free["b"] = 1
        ray.place()
        began = ray.seconds
        while ray.seconds < began + 0.9 * pools.START_SECONDS:  # and then has its full time
            pool.wait()
        assert waiting.alive
        assert waiting.machine == "b"


@pytest.fixture
def two(make):
    """A pool of two workers that are up, each with a task at work and one that waits; tasks may take 6 s."""
    pool, ray = make(2, time_limit=6.0, a=1, b=1)
    with pool:
        come_up(ray)
        pool.start()
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
        pool.start()
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
