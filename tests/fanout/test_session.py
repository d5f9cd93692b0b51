"""One call: which workers are of the run that was asked for, and SIGTERM before the first shard."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fake_simulators import PRIOR

from distsbi.fanout import Terminated, catalog as catalogs, cluster, session as sessions, worker as workers
from distsbi.fanout.session import Crew, begun
from distsbi.fanout.stopping import says_how_far, told_to_stop
from distsbi.sampling import run as runs
from distsbi.store import layout, record
from distsbi.store.place import as_place


class FakeStaff:
    """Tells nothing but how it is to tell workers apart."""

    def __init__(self, worker, job, workers, environment, cpus, gpus, max_failures, check, *more):
        self.check, self.members, self.ray, self.clock = check, [], None, None

    def look(self):
        pass

    def start(self, stop):
        return {}


@pytest.fixture
def staff_of(monkeypatch, tmp_path):
    """The staff of a call on the folder `out`. `check`: as of a Crew."""
    monkeypatch.setattr(sessions, "Staff", FakeStaff)
    monkeypatch.setattr(sessions.cluster, "connected", lambda *_: contextlib.nullcontext())

    def staff_of(check=lambda told: None, of="catalog"):
        crew = Crew(of, object, "job", 2, None, 1, 0, 3, None, 9, lambda first, told: "", check)
        with begun(as_place(tmp_path / "out"), crew, {}) as session:
            return session.pool._staff

    return staff_of


def told(**definition):
    return {"definition": definition, "worker": {"host": "b"}}


def test_a_worker_of_another_run_than_the_folders_is_told_apart(staff_of, tmp_path):
    staff_of().check(told(posterior="beef", tile=[2, 4]))  # the folder is new
    record.begin(tmp_path / "out", {"posterior": "f00d", "tile": [2, 4], "n_rows": 8}, {})
    staff_of().check(told(posterior="f00d", tile=[2, 4]))
    with pytest.raises(
        ValueError, match='out holds another run, .*: posterior: given "beef", found "f00d". Use another'
    ):
        staff_of().check(told(posterior="beef", tile=[2, 4]))


def test_workers_on_other_devices_are_told_what_to_give(staff_of, tmp_path):
    """Nothing is deleted for it: the draws are those of the same posterior."""
    staff_of()
    definition = {"posterior": "f00d", "tile": [128, 512], "n_rows": 8}
    record.begin(tmp_path / "out", definition, {"devices": ["cuda: H1"]})
    for tile in ([8, 256], [8, 128]):
        with pytest.raises(ValueError, match=r"for it was drawn on cuda: H1 .give the same --gpus-per-worker") as error:
            staff_of().check(told(posterior="f00d", tile=tile))
        assert f"tile: given {tile}, found [128, 512]" in str(error.value)
        assert "delete" not in str(error.value)
    with pytest.raises(ValueError, match="or delete .*out.$"):
        staff_of().check(told(posterior="beef", tile=[8, 256]))
    record.note_device(tmp_path / "out", "rocm: M1")
    with pytest.raises(ValueError, match=r"for it was drawn on cuda: H1 and rocm: M1 .give the same --gpus"):
        staff_of().check(told(posterior="f00d", tile=[8, 256]))


def test_workers_on_gpus_are_told_what_goes_on_with_draws_of_cpus(staff_of, tmp_path):
    staff_of()
    record.begin(tmp_path / "out", {"posterior": "f00d", "tile": [8, 256], "n_rows": 8}, {"devices": ["cpu: Epyc"]})
    with pytest.raises(
        ValueError, match=r"drawn on cpu: Epyc .give no --gpus-per-worker; with workers=0 set JAX_PLATF"
    ):
        staff_of().check(told(posterior="f00d", tile=[128, 512]))


@pytest.mark.parametrize(
    ("of", "definition", "says"),
    [
        ("catalog", {"simulator": {"name": "m:f"}, "n_rows": 8}, "out holds simulations; give another folder for a catalog.$"),
        ("simulation", {"posterior": "f00d", "n_rows": 8}, "out holds a catalog; give another folder for simulations.$"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_refused_before_ray_starts(staff_of, tmp_path, monkeypatch, of, definition, says):
    staff_of()
    record.begin(tmp_path / "out", definition, {})
    monkeypatch.setattr(sessions.cluster, "connected", lambda *_: pytest.fail("Ray starts"))
    with pytest.raises(ValueError, match=says):
        staff_of(of=of)


def test_shards_alone_are_refused_before_ray_starts_and_nothing_is_written(staff_of, tmp_path, monkeypatch):
    shard = layout.shard_file(tmp_path / "out", 0, 3)
    shard.parent.mkdir()
    shard.write_bytes(b"a copy")
    monkeypatch.setattr(sessions.cluster, "connected", lambda *_: pytest.fail("Ray starts"))
    with pytest.raises(ValueError, match="but no _distsbi/run.json"):
        staff_of()
    assert [path.name for path in shard.parent.iterdir()] == [shard.name]


@pytest.mark.parametrize(("gpus", "seen"), [(1, None), (0, "cpu"), (None, "cpu")])
def test_a_local_ray_of_gpus_does_not_hand_on_what_keeps_the_driver_off_them(monkeypatch, gpus, seen):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with cluster._gpus_for_workers(gpus):
        assert os.environ.get("JAX_PLATFORMS") == seen
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_a_worker_with_another_copy_of_the_run_is_told_apart(staff_of, tmp_path):
    run = tmp_path / "run"
    staff_of(catalogs._check_posterior(str(run))).check(told(posterior="beef"))  # this machine has none
    run.mkdir()
    (run / "spec.json").write_text(
        json.dumps({**dict.fromkeys(runs.REQUIRED), "format": runs.FORMAT, "fingerprint": "f00d"})
    )
    staff = staff_of(catalogs._check_posterior(str(run)))
    staff.check(told(posterior="f00d"))
    with pytest.raises(
        ValueError, match="the worker on b found another posterior at .*/run than there is on .*; give a run dir"
    ):
        staff.check(told(posterior="beef"))


def test_a_worker_that_was_given_a_gpu_which_jax_does_not_find_is_told(monkeypatch):
    monkeypatch.setattr(workers, "_gpus", lambda: ["0"])
    workers.check_gpus()  # JAX_PLATFORMS=cpu
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    with pytest.raises(ValueError, match="was given a GPU, but jax finds none there: install jax with its extra"):
        workers.check_gpus()
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    workers.check_gpus()


def test_a_second_sigterm_interrupts_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), told_to_stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.told
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_interrupts_says_how_far(tmp_path):
    place = as_place(tmp_path)
    nothing = "^stopped before anything was made; the same call begins again.$"
    with pytest.raises(KeyboardInterrupt, match=nothing), says_how_far(place):
        raise KeyboardInterrupt
    (place / layout.HIDDEN).make_folder()
    record.begin(place, {"n_rows": 12, "rows_per_shard": 4}, {})
    some = "^stopped by SIGTERM, 0 of 3 shards are finished in .*; the same call goes on from there.$"
    with pytest.raises(Terminated, match=some), says_how_far(place):
        raise Terminated


@pytest.mark.slow
@pytest.mark.parametrize("when", ["Ray starts", "a worker takes its first look"])
def test_sigterm_before_the_first_shard(tmp_path, when):
    out, at_work = tmp_path / "out", tmp_path / "at work"
    sign = out / "_distsbi" / "lock" if when == "Ray starts" else at_work
    code = f"import sys; from distsbi.cli import main; main({['simulate', '--simulator', 'fake_simulators:hangs', *_prior(), '--out', str(out), '--workers', '2']!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "AT_WORK": str(at_work)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not sign.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 143, err
    assert (
        err.strip().splitlines()[-1]
        == "Interrupted: stopped by SIGTERM before anything was made; the same call begins again."
    )


def _prior():
    return [word for name, text in PRIOR.items() for word in ("--prior", f"{name}={text}")]
