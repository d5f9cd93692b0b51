"""Simulations into folders of pairs: the same rows however they are made, failures beside them, and what is refused."""

import errno
import functools
import linecache
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_simulators
import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from fake_simulators import PRIOR, marked

import distsbi
from distsbi.cli import cli
from distsbi.data import Prior, open_pairs, read_pairs
from distsbi.data.prior import describe, parse_prior
from distsbi.fanout.agenda import Outcome
from distsbi.fanout.blame import machines_fault
from distsbi.fanout.cluster import connected
from distsbi.fanout.pool import InProcess
from distsbi.fanout.simulation import _look, _shard_size, status
from distsbi.fanout.simulation_worker import Job, SimulationWorker, unlike
from distsbi.fanout.simulator import BLOCK, Simulator, arranged, import_simulator, source_digest
from distsbi.fanout.stopping import Stop, Terminated
from distsbi.files import sha256_of
from distsbi.keys import as_key
from distsbi.store import layout, open_catalog
from distsbi.store.record import read_run
from distsbi.store.writer import one_writer

HERE = {"workers": 0, "shard_size": 6, "show_progress": False}
TWO = {**HERE, "workers": 2}
PLAIN = "fake_simulators:plain"


def simulate(simulator, out, n=40, prior=PRIOR, **options):
    return distsbi.simulate(simulator, prior, n, out, **{**HERE, **options})


def theta_of(n: int, seed: int = 0) -> np.ndarray:
    return Simulator(fake_simulators.plain, parse_prior(PRIOR), as_key(seed)).theta(0, n)


def assert_same(one: Path, other: Path) -> None:
    first, second = read_pairs(one), read_pairs(other)
    np.testing.assert_array_equal(first.theta, second.theta)
    np.testing.assert_array_equal(first.x, second.x)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """The 40 rows of `plain`, undisturbed."""
    out = tmp_path_factory.mktemp("calm") / "out"
    simulate(PLAIN, out)
    return out


class Noisy:
    def __init__(self, noise):
        self.noise = noise

    def __call__(self, theta):
        return self.run(theta)

    def run(self, theta):
        return self.noise * theta


class TestRows:
    def test_the_folder_is_one_of_pairs(self, calm):
        pairs = read_pairs(calm)
        assert (pairs.theta.shape, pairs.x.shape, pairs.names) == ((40, 2, 1), (40, 3, 1), ("mass", "spin"))
        np.testing.assert_array_equal(pairs.theta[..., 0], theta_of(40))
        assert open_pairs(calm).source["prior"] == PRIOR
        assert len(np.unique(pairs.x[:, 0])) == 40

    def test_a_row_depends_on_seed_and_number_alone(self, calm, tmp_path):
        whole = read_pairs(calm)
        for n, size in ((40, 1), (40, 40), (40, None), (17, 5), (200, 33)):
            found = simulate(PLAIN, tmp_path / f"{n}-{size}", n, shard_size=size).read()
            rows = min(n, 40)
            np.testing.assert_array_equal(found.theta[:rows], whole.theta[:rows])
            np.testing.assert_array_equal(found.x[:rows], whole.x[:rows])
        assert not np.array_equal(simulate(PLAIN, tmp_path / "seed", seed=1).read().theta, whole.theta)

    def test_random_numbers_are_fresh_at_every_row(self):
        """Whatever the row before left in the generator, half used words included."""
        made = Simulator(lambda theta, rng: rng.integers(2**31, size=3, dtype=np.int32), parse_prior(PRIOR), as_key(0))
        whole = made.run(0, 50, (3,), {}).x
        for row in (49, 7, 8):
            np.testing.assert_array_equal(made.run(row, row + 1, (3,), {}).x[0], whole[row])
        assert len(np.unique(whole)) == whole.size

    def test_a_simulator_may_return_one_array_again_and_again(self):
        buffer = np.zeros(2)

        def reuses(theta):
            buffer[:] = theta
            theta[:] = 0  # and may change its theta
            return buffer

        made = Simulator(reuses, parse_prior(PRIOR), as_key(0)).run(0, 9, (2,), {})
        np.testing.assert_array_equal(made.x, made.theta)
        np.testing.assert_array_equal(made.theta, theta_of(9))

    def test_theta_follows_the_prior_across_blocks(self):
        prior = Prior(a=dist.Uniform(-1.0, 1.0), b=dist.LogNormal(1.0, 0.5))
        made = Simulator(fake_simulators.silent, prior, as_key(3))
        theta = made.theta(BLOCK - 10, 2 * BLOCK + 10)
        np.testing.assert_array_equal(theta[5:15], made.theta(BLOCK - 5, BLOCK + 5))
        assert len(np.unique(theta[:, 0])) > 0.99 * len(theta)
        assert abs(theta[:, 0].mean()) < 0.03
        assert np.log(theta[:, 1]).mean() == pytest.approx(1.0, abs=0.03)

    def test_arguments_by_name(self, tmp_path):
        theta = np.full(2, 3.0)
        for function, random in ((fake_simulators.silent, None), (fake_simulators.plain, "rng"), (jax.jit(fake_simulators.keyed), "key"), (np.sin, None)):  # fmt: skip
            assert arranged(function)[1] == random
        assert arranged(lambda theta, *, rng: (theta, rng))[0](theta, 5) == (theta, 5)
        assert arranged(lambda rng, theta: (rng, theta))[0](theta, 5) == (5, theta)
        for wrong in (fake_simulators.two_things, lambda: 0, lambda rng: 0, lambda key, theta, rng: 0):
            with pytest.raises(ValueError, match="takes .theta., .theta, rng. or .key, theta."):
                arranged(wrong)
        with pytest.raises(ValueError, match="two_things takes .theta, phi."):
            simulate("fake_simulators:two_things", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["batched", "keyed"])
    def test_batches(self, tmp_path, name):
        """The same bits whatever the shards; the last batch is called whole, so that a longer run begins with the same rows."""
        spec = f"fake_simulators:{name}"
        whole = simulate(spec, tmp_path / "whole", 50, batch_size=8, shard_size=48).read()
        parts = simulate(spec, tmp_path / "parts", 43, batch_size=8, shard_size=8).read()
        assert whole.x.shape == ((50, 2, 1) if name == "batched" else (50, 1, 1))
        np.testing.assert_array_equal(parts.x, whole.x[:43])
        with pytest.raises(ValueError, match="shard_size must be a multiple of batch_size=8; got 6"):
            simulate(spec, tmp_path / "out", batch_size=8)

    def test_a_key_for_each_row(self, tmp_path):
        found = simulate("fake_simulators:keyed", tmp_path / "out").read()
        noise = (found.x[:, 0, 0] - found.theta[:, 0, 0]).round(4)
        assert len(set(noise.tolist())) == 40

    def test_images_and_numbers(self, tmp_path):
        image = simulate(lambda theta: np.full((4, 5, 3), theta[0]), tmp_path / "image").read()
        assert image.x.shape == (40, 4, 5, 3)
        number = simulate(lambda theta: theta[0], tmp_path / "number", prior=Prior(a=dist.Normal(0.0, 1.0))).read()
        np.testing.assert_array_equal(number.x, number.theta)


class TestFailures:
    def test_rows_that_fail_are_recorded_and_the_others_go_on(self, calm, tmp_path):
        what = {
            0: "raise",
            3: "nan",
            4: "inf",
            9: "shape",
            13: "words",
            20: "exit",
            **dict.fromkeys(range(24, 30), "raise"),
        }
        result = simulate(marked(theta_of(40), what), tmp_path / "out")
        assert result.counts == {"ok": 28, "invalid": 4, "failed": 8, "quarantined": 0}
        assert (result.n_ok, result.n_bad) == (28, 12)
        bad = {row["row"]: row for row in result.failures().to_pylist()}
        assert list(bad) == sorted(what)
        assert bad[0]["message"] == "ValueError: it did not converge"
        assert bad[3]["message"] == "x has 3 values that are NaN or infinite as float32, the first at entry 0"
        assert bad[9]["message"] == "x has shape [2], not [3]"
        assert "no array of real numbers" in bad[13]["message"]
        assert bad[20]["message"] == "SystemExit: 3"
        np.testing.assert_array_equal(np.stack([row["theta"] for row in bad.values()]), theta_of(40)[sorted(what)])
        keep = [i for i in range(40) if i not in what]
        whole, found = read_pairs(calm), result.read()  # shard 4 has no rows at all
        np.testing.assert_array_equal(found.x, whole.x[keep])
        np.testing.assert_array_equal(found.theta, whole.theta[keep])

    def test_counts_without_a_journal(self, tmp_path):
        """They are in the files themselves."""
        simulator = marked(theta_of(40), {3: "nan", 20: "raise"})
        simulate(simulator, tmp_path / "out")
        layout.journal_file(tmp_path / "out").unlink()
        result = simulate(simulator, tmp_path / "out")
        assert result.shards_now == 0
        assert result.counts == {"ok": 38, "invalid": 1, "failed": 1, "quarantined": 0}

    def test_a_batch_that_raises_fails_as_one(self, tmp_path):
        result = simulate(marked(theta_of(40), {9: "raise", 20: "nan"}), tmp_path / "out", batch_size=4, shard_size=8)
        bad = {row["row"]: row["message"] for row in result.failures().to_pylist()}
        assert list(bad) == [8, 9, 10, 11, 20]
        assert bad[8] == "its batch raised (return NaN for a bad row): ValueError: it did not converge"

    def test_missing_entries_are_no_failures(self, tmp_path):
        def gaps(theta):
            return np.where([theta[0] > 0.5, True, True], np.nan, 1.0) if theta[0] < 0.9 else np.full(3, np.nan)

        with pytest.raises(ValueError, match="the simulator fails at the first rows .0 to 31., the last with .* NaN"):
            simulate(gaps, tmp_path / "no")
        result = simulate(lambda theta: np.append(gaps(theta)[:2], 0.0), tmp_path / "yes", missing=True)
        assert result.n_ok == 40
        assert np.isnan(read_pairs(tmp_path / "yes", missing=True).x).any()

    @pytest.mark.parametrize(
        ("batch", "last", "called"),
        [
            (None, 31, r"\(2,\), one row of \(mass, spin\); many rows at a time need batch_size"),
            (4, 39, r"\(4, 2\), 4 rows of \(mass, spin\)"),
        ],
    )
    def test_a_simulator_that_always_fails_is_named(self, tmp_path, batch, last, called):
        with pytest.raises(
            ValueError,
            match=f"fails at the first rows .0 to {last}., the last with ZeroDivisionError: no such universe; mend it. "
            rf"It is called with theta of shape {called}\.$",
        ):
            simulate("fake_simulators:broken", tmp_path / "out", batch_size=batch, shard_size=8)
        assert not list((tmp_path / "out").glob("*.parquet"))

    @pytest.mark.parametrize(
        "error", [MemoryError("no room"), OSError(errno.ENOSPC, "No space left on device", "/scratch")]
    )
    @pytest.mark.parametrize("size", [None, 2])
    def test_what_a_machine_lacks_is_no_failure_of_a_row(self, tmp_path, error, size):
        """Neither is the output folder's disk full. Once there is room, every row is a pair."""
        sick, tried, theta = tmp_path / "sick", tmp_path / "tried", theta_of(40)

        def simulator(rows):
            if sick.exists() and theta[8, 0] in np.atleast_2d(rows).astype(np.float32)[:, 0]:
                with tried.open("a") as file:
                    file.write("x")
                raise error
            return rows

        sick.touch()
        with pytest.raises(
            RuntimeError,
            match=r"1 of 7 shards failed 2 times each and were given up, .* row 8: \w+: .* on .*, the machine's fault and not the row's: make "
            r"room there; if another call ends so too, the row is recorded as failed. All others are finished",
        ):
            simulate(simulator, tmp_path / "out", max_failures=2, batch_size=size)
        assert tried.read_text() == "xx"
        sick.unlink()
        result = simulate(simulator, tmp_path / "out", max_failures=2, batch_size=size)
        assert (result.n_ok, result.shards_now) == (40, 1)

    def test_a_row_for_which_no_machine_has_room_keeps_back_no_other(self, tmp_path):
        guilty = theta_of(40)[[8, 10], 0]

        def simulator(theta):
            if np.float32(theta[0]) in guilty:
                raise MemoryError(f"no room for {theta[0]:.1f}")
            return theta

        with pytest.raises(RuntimeError, match="1 of 7 shards failed 3 times"):
            simulate(simulator, tmp_path / "out")
        result = simulate(simulator, tmp_path / "out")
        assert result.counts == {"ok": 38, "invalid": 0, "failed": 2, "quarantined": 0}
        bad = result.failures().to_pylist()
        assert [row["row"] for row in bad] == [8, 10]
        assert bad[0]["message"].startswith("MemoryError: no room for")

    def test_whose_fault_an_error_is(self):
        def in_jax(raises):
            return jax.jit(lambda x: jax.pure_callback(raises, jax.ShapeDtypeStruct((), np.float32), x))(1.0)

        def diverges(x):
            raise ValueError("it does not converge")

        with pytest.raises(jax.errors.JaxRuntimeError) as raised:
            np.asarray(in_jax(diverges))
        rows = [raised.value, ValueError("no"), OSError("no such universe"), FileNotFoundError(2, "no"), SystemExit(3)]
        device = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes")
        machines = [device, MemoryError(), OSError(errno.EDQUOT, "quota"), OSError(errno.ENOMEM, "no fork")]
        assert [machines_fault(error) for error in rows] == [None] * len(rows)
        assert None not in map(machines_fault, machines)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n": 0}, "n must be a positive integer; got 0"),
            ({"shard_size": 0}, "shard_size must be a positive integer; got 0"),
            ({"batch_size": 0}, "batch_size must be a positive integer; got 0"),
            ({"workers": -1}, "workers must be None, 0"),
            ({"time_limit": 5.0}, "time_limit needs workers"),
            ({"seed": -1}, "seed"),
            ({"simulator": "fake_simulators"}, "must be named as module:function"),
            (
                {"simulator": "no_such_module:run"},
                "cannot be imported on .* .ModuleNotFoundError: .*; give module:function",
            ),
            ({"simulator": "fake_simulators.py:run"}, "leave out .py: fake_simulators:run"),
            ({"simulator": "fake_simulators:run"}, "fake_simulators .* has no 'run'; give module:function"),
            ({"simulator": "fake_simulators:PRIOR"}, "is no function; it is dict"),
            ({"simulator": 5}, "simulator must be a function or 'module:function'; got int"),
            ({"prior": {"a": "Uniform(0, x)"}}, "the prior of 'a' must read like Uniform"),
            ({"prior": {"a": "Unicorn(0, 1)"}}, "numpyro has no distribution 'Unicorn'"),
            ({"prior": {}}, "a prior needs at least one parameter"),
            ({"prior": None}, "a prior is needed"),
            ({"prior": dist.Uniform(0.0, 1.0)}, "must be over one vector"),
            ({"prior": 5}, "the prior must have sample"),
            ({"out": "s3://bucket/out"}, "out must be a folder on disks"),
        ],
    )
    def test_bad_arguments_say_what_to_do(self, tmp_path, change, message):
        given = {"simulator": PLAIN, "prior": PRIOR, "n": 40, "out": tmp_path / "out", **HERE, **change}
        with pytest.raises(ValueError, match=message):
            distsbi.simulate(**given)
        assert not (tmp_path / "out").exists()

    def test_another_simulation_is_refused_by_name(self, calm, tmp_path):
        before = read_pairs(calm)
        for change, named in (
            ({"seed": 5}, ": seed: given 5, found 0"),
            ({"simulator": "fake_simulators:other"}, 'simulator.name: given "fake_simulators:other"'),
            ({"prior": {**PRIOR, "spin": "Normal(0, 3)"}}, r'prior.spin: given "Normal\(loc=0, scale=3\)", found'),
            ({"n": 41}, "n_rows: given 41, found 40"),
            ({"shard_size": 5}, "rows_per_shard: given 5, found 6"),
            ({"batch_size": 2}, "batch: given 2"),
        ):
            with pytest.raises(ValueError, match=f"holds another run.*{named}.*Use another folder"):
                distsbi.simulate(**{"simulator": PLAIN, "prior": PRIOR, "n": 40, "out": calm, **HERE, **change})
        after = read_pairs(calm)
        np.testing.assert_array_equal(after.x, before.x)

    def test_the_command_gives_workers_what_the_last_ones_had(self, tmp_path, monkeypatch):
        """A row that hangs would else be waited for."""
        monkeypatch.setattr("distsbi.fanout.session._pool", lambda stack, crew, *_: InProcess(crew.worker(crew.job)))
        out = tmp_path / "out"
        simulate(PLAIN, out, workers=2, cpus_per_worker=2, time_limit=0.5)
        go_on = status(out)[1]
        assert go_on.endswith(" --cpus-per-worker 2 --time-limit 0.5")
        told = []
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr("distsbi.fanout.simulate", lambda *_, **options: told.append(options) or 1 / 0)
            cli.main(shlex.split(go_on)[1:], standalone_mode=False)
        assert told == [{"seed": 0, "cpus_per_worker": 2, "time_limit": 0.5}]
        simulate(PLAIN, out, workers=2)
        assert "--time-limit" not in status(out)[1]

    def test_a_function_that_was_changed_is_another(self, tmp_path):
        simulate(marked(theta_of(40), {}), tmp_path / "out")
        with pytest.raises(ValueError, match="the code of the simulator is another, or has changed"):
            simulate(marked(theta_of(40), {3: "nan"}), tmp_path / "out")

    def test_what_a_function_was_made_with_belongs_to_it(self, tmp_path):
        def closure(noise):
            return lambda theta: noise * theta

        def default(value):
            def simulator(theta, noise=value):
                return noise * theta

            return simulator

        def keyword(value):
            return lambda theta, *, noise=value: noise * theta

        def decorated(noise):
            @functools.wraps(fake_simulators.silent)
            def simulator(theta):
                return noise * fake_simulators.silent(theta)

            return simulator

        makers = [closure, default, keyword, decorated, Noisy, lambda noise: Noisy(noise).run, lambda noise: jax.jit(closure(noise)), lambda noise: functools.partial(closure(noise))]  # fmt: skip
        for make in makers:
            digests = [source_digest(make(noise)) for noise in (0.1, 0.1, 100.0, (1, "low"), [2, "low"])]
            assert digests[0] == digests[1]
            assert None not in digests and len(set(digests)) == 4
        assert source_digest(closure(np.ones(3))) == source_digest(closure(np.zeros(3)))  # it may be a buffer
        simulate(closure(0.01), tmp_path / "out")
        layout.shard_file(tmp_path / "out", 3, 7).unlink()
        with pytest.raises(ValueError, match="the code of the simulator is another, or has changed"):
            simulate(closure(100.0), tmp_path / "out")

    def test_globals_that_a_function_of_a_script_uses_belong_to_it(self, tmp_path):
        script, digests = tmp_path / "script.py", []
        script.write_text(
            "scale = 1.0\nlabel = 'a'\ndef run(theta):\n    return scale * theta\nclass Own:\n    def __call__(self, theta):\n        return theta\n"
        )
        for given in ({}, {"label": "b"}, {"scale": 2.0}):
            made = runpy.run_path(str(script), run_name="__main__")
            made["run"].__globals__.update(made, **given)
            digests.append(source_digest(made["run"]))
        assert digests[0] == digests[1] != digests[2]

    def test_a_function_of_a_script_is_known_where_its_file_is_not(self, tmp_path, monkeypatch):
        """As on another machine of a cluster: its digest is that of the driver, and the folder goes on."""
        script, ready = tmp_path / "script.py", SimulationWorker.ready
        script.write_text("def own(theta):\n    return theta\n")
        function = runpy.run_path(str(script), run_name="__main__")["own"]
        digest = source_digest(function)

        def elsewhere(worker, own_process=False):
            script.unlink()
            linecache.clearcache()
            return ready(worker, own_process)

        with monkeypatch.context() as patch:
            patch.setattr(SimulationWorker, "ready", elsewhere)
            simulate(function, tmp_path / "out")
        assert digest is not None
        assert (read_run(tmp_path / "out") or {})["definition"]["simulator"] == {
            "name": "__main__:own",
            "source": digest,
        }

    def test_what_the_function_calls_in_its_file_belongs_to_it(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        said = []
        for number in (1, 2):
            (tmp_path / f"lv{number}.py").write_text(
                f"def series(t):\n    return {number} * t\n\n\ndef run(theta):\n    return series(theta)\n"
            )
            said.append(source_digest(import_simulator(f"lv{number}:run")))
        assert None not in said and len(set(said)) == 2

    def test_other_files_other_writers_and_catalogs(self, calm, tmp_path):
        out = tmp_path / "out"
        (out / layout.HIDDEN).mkdir(parents=True)
        with one_writer(out), pytest.raises(ValueError, match=f"being written by process {os.getpid()}"):
            simulate(PLAIN, out)
        (out / "pairs-00000.parquet").touch()
        with pytest.raises(ValueError, match=r"holds other files, such as pairs-00000.parquet"):
            simulate(PLAIN, out)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"out must be a folder; .*file is a file"):
            simulate(PLAIN, tmp_path / "file" / "out")
        with pytest.raises(ValueError, match="is a folder of simulations"):
            open_catalog(calm)

    def test_workers_that_do_not_go_together(self, tmp_path):
        (tmp_path / layout.HIDDEN).mkdir()
        worker = SimulationWorker(Job(PLAIN, PRIOR, (0, 0), str(tmp_path)))
        first, told = worker.ready(), worker.ready()
        told["definition"]["simulator"] = {"name": PLAIN, "source": "another"}
        assert "has another simulator ({'name': 'fake_simulators:plain', 'source': 'another'}, not " in unlike(
            first, told
        )
        with pytest.raises(ValueError, match="on .* there is no folder /nowhere; give one that all machines share"):
            SimulationWorker(Job(PLAIN, PRIOR, (0, 0), "/nowhere")).ready()

    def test_what_cannot_be_carried_to_workers_is_named(self, tmp_path):
        lock = threading.Lock()

        def locked(theta):
            with lock:
                return theta

        class Locked(dist.Uniform):
            def __init__(self):
                super().__init__(0.0, 1.0)
                self.lock = lock

        with pytest.raises(
            ValueError, match="^the simulator cannot be carried to .*'_thread.lock'.*; give 'module:function'"
        ):
            simulate(locked, tmp_path / "out", workers=2)
        with pytest.raises(ValueError, match="^the prior cannot be carried to workers .*; give texts by name"):
            simulate(PLAIN, tmp_path / "out", prior=Prior(a=Locked()), workers=2)
        assert not (tmp_path / "out").exists()
        assert simulate(locked, tmp_path / "out").n_ok == 40

    @pytest.mark.parametrize("room", [True, False])
    def test_sigterm_ends_a_first_look(self, room):
        class Silent:
            def room(self):
                return room

            def submit(self, look):
                pass

            def wait(self):
                stop.told = True
                return []

        stop = Stop()
        with pytest.raises(Terminated):
            _look(Silent(), 40, None, (), 3, stop)

    def test_a_first_look_that_takes_too_much_memory_does_not_blame_the_simulator(self):
        class Starving:
            busy, room = [], lambda self: True

            def submit(self, look):
                self.busy.append(look)

            def wait(self):
                return [
                    Outcome(self.busy.pop(), error=MemoryError("Ray killed its worker: give fewer workers"), died=True)
                ]

        with pytest.raises(
            RuntimeError, match="^no row could be simulated, the last for MemoryError: .* fewer workers$"
        ):
            _look(Starving(), 40, None, (), 3, Stop())


class TestResume:
    def test_goes_on_where_it_stopped(self, calm, tmp_path, monkeypatch):
        out, wait, calls = tmp_path / "out", InProcess.wait, []

        def interrupted(pool):
            calls.append(1)
            if len(calls) == 4:  # a first look, and two shards
                raise KeyboardInterrupt
            return wait(pool)

        with monkeypatch.context() as patch:
            patch.setattr(InProcess, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt, match="2 of 7 shards are finished"):
                simulate(PLAIN, out)
        with pytest.raises(ValueError, match="was cut off before its 40 pairs; give the same command again"):
            read_pairs(out)
        kept = layout.shard_file(out, 0, 7).stat().st_mtime_ns
        assert simulate(PLAIN, out, shard_size=None).shards_now == 5
        assert layout.shard_file(out, 0, 7).stat().st_mtime_ns == kept
        assert_same(out, calm)
        file = layout.shard_file(out, 3, 7)
        file.write_bytes(file.read_bytes()[:-50])
        assert simulate(PLAIN, out).shards_now == 1
        assert_same(out, calm)

    def test_an_altered_shard_is_named_and_made_again(self, calm, tmp_path):
        """The journal has the checksum of each file, and reading checks that of each page."""
        out = tmp_path / "out"
        simulate(PLAIN, out)
        files = [layout.shard_file(out, shard, 7) for shard in range(7)]
        told = {line["shard"]: line["sha256"] for line in layout.read_journal(out) if line["event"] == "done"}
        assert told == {shard: sha256_of(file) for shard, file in enumerate(files)}
        content = bytearray(files[3].read_bytes())
        content[content.index(read_pairs(calm).x[18:24].tobytes()[:16]) + 10] ^= 1
        files[3].write_bytes(content)
        with pytest.raises(ValueError, match=f"{files[3].name} cannot be read .* Remove it and make the pairs again"):
            read_pairs(out)
        layout.journal_file(out).unlink()  # what it does not know is read
        assert simulate(PLAIN, out).shards_now == 1
        assert_same(out, calm)
        found = {
            line["shard"]: line["sha256"] for line in layout.read_journal(out) if line["event"] in ("found", "done")
        }
        assert found == told

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
    def test_a_signal_to_the_driver_loses_nothing(self, calm, tmp_path, name):
        out = tmp_path / "out"
        code = f"import distsbi; distsbi.simulate('fake_simulators:slow', {PRIOR!r}, 40, {str(out)!r}, workers=0, shard_size=2)"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 120
            while len(list(out.glob("shard-*"))) < 4:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(getattr(signal, name))
            err = process.communicate(timeout=60)[1]
        there = layout.shards_done(out, 20)
        assert 4 <= len(there) < 20
        if name == "SIGTERM":
            assert f"stopped by SIGTERM, {len(there)} of 20 shards are finished in {out}; the same call goes on" in err
        result = simulate("fake_simulators:slow", out, shard_size=2)
        assert result.shards_now == 20 - len(there)
        assert_same(out, calm)

    def test_a_full_disk_is_one_sentence_and_goes_on(self, small_disk):
        def wide(theta, rng):
            return rng.normal(size=5_000)

        with pytest.raises(
            OSError, match="is full, [1-5] of 7 shards are finished in .*; free some space, and the same"
        ):
            simulate(wide, small_disk.path / "out")
        small_disk.grow()
        result = simulate(wide, small_disk.path / "out")
        assert result.shards_now < 7
        assert result.read().x.shape == (40, 5_000, 1)


def test_shards_by_time_and_size():
    assert _shard_size(10**6, 1, 5e-6, 8, 2) == 38_462  # quick: a fifth of a second each, as many for each worker
    assert _shard_size(10**6, 1, 0.1, 8, 100) == 100  # slow: ten seconds each, as far as there are not too many files
    assert _shard_size(40, 1, 600.0, 8, 2) == 1
    assert _shard_size(10**6, 1, 5e-6, 2**20, 2) == 64
    assert _shard_size(10**6, 1000, 1e-3, 8, 2) == 10_000
    assert _shard_size(10**6, 1, 0.01, 8, 2, time_limit=2.0) == 100  # not too many files
    assert _shard_size(10**5, 1, 0.01, 8, 2, time_limit=2.0) == 50
    assert _shard_size(10**6, 1, 1.0, 8, 2, time_limit=60.0) == 30  # but within the limit


def test_the_first_call_is_not_the_time_of_a_row():
    def slow_first(theta, calls=[]):  # noqa: B006
        calls.append(theta)
        if len(calls) == 1:
            time.sleep(1.0)
        return theta

    _, seconds = Simulator(slow_first, parse_prior(PRIOR), jax.random.key(0)).look(0)
    assert seconds < 0.5


def test_priors_are_described():
    assert describe(parse_prior(PRIOR)) == {"mass": "Uniform(low=0, high=1)", "spin": "Normal(loc=0, scale=2)"}
    assert describe(parse_prior({"a": "LogNormal(0, 0.5)"})) == {"a": "LogNormal(loc=0, scale=0.5)"}
    narrow, wide = (describe(parse_prior({"a": f"TruncatedNormal(0, {scale}, low=0)"})) for scale in (1, 2))
    assert narrow != wide
    assert describe(dist.Uniform(-np.ones(2), np.ones(2)).to_event(1)).startswith("Independent(")


@pytest.mark.usefixtures("local_ray")
class TestRay:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_do_not_change_rows(self, calm, tmp_path, workers):
        result = simulate(PLAIN, tmp_path / "out", workers=workers)
        assert (result.n_ok, result.shards_now) == (40, 7)
        assert_same(tmp_path / "out", calm)
        lines = [line for line in layout.read_journal(tmp_path / "out") if line["event"] == "done"]
        assert os.getpid() not in {line["pid"] for line in lines}
        assert simulate(PLAIN, tmp_path / "out").shards_now == 0

    def test_functions_of_a_script_and_priors_as_objects(self, tmp_path):
        prior = Prior(a=dist.Uniform(0.0, 1.0), b=dist.TruncatedNormal(0.0, 1.0, low=0.0))
        scale = 3.0
        function = lambda theta: scale * theta  # noqa: E731
        simulate(function, tmp_path / "two", prior=prior, workers=2)
        simulate(function, tmp_path / "here", prior=prior)
        assert_same(tmp_path / "two", tmp_path / "here")
        assert set(open_pairs(tmp_path / "two").source["prior"]) == {"a", "b"}

    @pytest.mark.parametrize(
        "what", [pytest.param("abort", marks=pytest.mark.long), pytest.param("hang", marks=pytest.mark.slow)]
    )
    def test_a_row_that_kills_or_hangs_is_quarantined_alone(self, calm, tmp_path, what):
        limit = 2.0 if what == "hang" else None
        simulator = marked(theta_of(40), {0: "raise", 15: what})
        result = simulate(simulator, tmp_path / "out", workers=2, max_failures=1, time_limit=limit)
        assert result.counts == {"ok": 38, "invalid": 0, "failed": 1, "quarantined": 1}
        bad = result.failures().to_pylist()
        assert [row["row"] for row in bad] == [0, 15]
        assert ("time limit of 2 s" if limit else "its worker (process ") in bad[1]["message"]
        keep = [i for i in range(40) if i not in (0, 15)]
        np.testing.assert_array_equal(result.read().x, read_pairs(calm).x[keep])
        assert simulate(simulator, tmp_path / "out", workers=2).shards_now == 0

    @pytest.mark.slow
    def test_a_batch_that_kills_is_quarantined_as_one(self, tmp_path):
        simulator = marked(theta_of(40), {17: "abort"})
        result = simulate(simulator, tmp_path / "out", workers=1, max_failures=1, batch_size=4, shard_size=20)
        bad = result.failures().to_pylist()
        assert [(row["row"], row["status"]) for row in bad] == [(row, "quarantined") for row in range(16, 20)]

    def test_a_killed_worker_is_replaced(self, calm, tmp_path):
        result = simulate(marked(theta_of(40), {9: "once"}, tmp_path), tmp_path / "out", workers=2)
        assert (tmp_path / "killed").exists()
        assert result.n_ok == 40
        assert_same(tmp_path / "out", calm)

    def test_a_simulator_that_kills_at_once_is_named(self, tmp_path):
        simulator = marked(theta_of(40), dict.fromkeys(range(40), "abort"))
        with pytest.raises(
            ValueError, match="kills or hangs its worker at the first rows .0 to 1., the last with its worker .process"
        ):
            simulate(simulator, tmp_path / "out", workers=1, max_failures=2)

    def test_a_cluster_whose_machines_are_too_small_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("distsbi.fanout.staff.PATIENCE", 1.0)
        with (
            connected("local", 1, 1, 0),
            pytest.raises(
                ValueError, match="no machine of the cluster has 99 CPUs and 0 GPUs for a worker, none joined"
            ),
        ):
            simulate(PLAIN, tmp_path / "out", workers=1, cpus_per_worker=99)

    def test_a_module_that_only_workers_lack_is_named(self, tmp_path, monkeypatch):
        """The driver imports it from a folder that workers are not told of."""
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "only_here.py").write_text("def run(theta):\n    return theta\n")
        monkeypatch.syspath_prepend(tmp_path / "mine")
        monkeypatch.setattr("distsbi.fanout.cluster._import_path", lambda: [p for p in sys.path if "mine" not in p])
        with pytest.raises(
            ValueError, match="'only_here:run' cannot be imported on .* .*No module named 'only_here'.*every machine"
        ):
            simulate("only_here:run", tmp_path / "out", workers=1)


def test_an_own_ray_and_an_address_where_nothing_listens(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    ray.shutdown()
    monkeypatch.setattr("distsbi.fanout.cluster.PROBE_SECONDS", 0.1)
    with pytest.raises(ValueError, match="no Ray cluster answers at '127.0.0.1:1'"):
        simulate(PLAIN, tmp_path / "out", workers=2, address="127.0.0.1:1")


def test_ray_is_not_imported_without_workers(tmp_path):
    code = f"import distsbi, sys; distsbi.simulate({PLAIN!r}, {PRIOR!r}, 4, {str(tmp_path / 'out')!r}, workers=0); sys.exit('ray' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
