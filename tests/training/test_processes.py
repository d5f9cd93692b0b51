"""Training over two processes of two virtual devices each is training in one process of four; one that is killed ends the other, and the training
resumes, on any number of processes.

The collectives of several processes add in another order than those of one: losses agree to 1e-5 of themselves after 120 updates, sums of absolute
weights to 1e-4.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from distsbi import mesh as meshes
from distsbi.data import write_pairs
from distsbi.files import one_holder
from distsbi.processes.meeting import free_port
from distsbi.tasks import get_task
from distsbi.training import rows
from distsbi.training.checkpoints import LOCK

pytestmark = pytest.mark.timeout(600)
LOSSES, WEIGHTS = 1e-5, 1e-4


def start(path, count: int, index: int, address: str, *options: str, devices: int = 2) -> subprocess.Popen:
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")}
    command = [sys.executable, "-m", "tests.training.member", str(path), address, str(count), str(index), *options]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(path, *options: str, other=None, more: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """`other`: the second one's run directory, `more`: its further options."""
    address = f"localhost:{free_port()}"
    return [start(path, 2, 0, address, *options), start(other or path, 2, 1, address, *options, *more)]


def finish(*running: subprocess.Popen) -> dict:
    """What they print, the same for all."""
    found = []
    for process in running:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    for one in found[1:]:
        assert {**one, "rows": 0, "groups": 0} == {**found[0], "rows": 0, "groups": 0}
    return {**found[0], "groups": [one["groups"] for one in found]}


def assert_close(one: dict, other: dict) -> None:
    np.testing.assert_allclose(one["losses"], other["losses"], rtol=LOSSES)
    np.testing.assert_allclose(one["val_losses"], other["val_losses"], rtol=LOSSES)
    np.testing.assert_allclose(one["sums"], other["sums"], rtol=WEIGHTS)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """An undisturbed training of two processes."""
    return finish(*start_two(tmp_path_factory.mktemp("two") / "run"))


@pytest.mark.long
def test_two_processes_are_one(two, tmp_path):
    one = finish(start(tmp_path / "run", 1, 0, "", devices=4))
    assert two["devices"] == one["devices"] == 4
    assert_close(two, one)
    # of 543 rows for theta and for x, 136 on each device
    assert two["rows"] == [272, 272]


def _killed(path, victim: int) -> None:
    """Kills one of two at work when there is a checkpoint, and waits for the other, which ends with a sentence."""
    running = start_two(path)
    deadline = time.monotonic() + 200
    while not any(name.name.isdecimal() for name in (path / "checkpoints").glob("*")):
        assert running[victim].poll() is None, running[victim].communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running[victim].send_signal(signal.SIGKILL)
    _, said = running[1 - victim].communicate(timeout=60)
    running[victim].communicate()
    assert running[1 - victim].returncode != 0
    if victim:  # the end of process 0 is also XLA's to notice, which may abort first
        assert running[0].returncode == 1
        assert "Failed: process 1 on " in said
        assert "died, and this process ends too; start all processes again" in said
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) < 120, "it was killed too late"


@pytest.mark.long
def test_killed_and_started_again(two, tmp_path):
    """To the same bits on two processes, to rounding on one process of one device."""
    path = tmp_path / "run"
    _killed(path, victim=1)
    shutil.copytree(path, tmp_path / "one")
    assert finish(*start_two(path))["digest"] == two["digest"]
    one = finish(start(tmp_path / "one", 1, 0, "", devices=1))
    assert one["devices"] == 1
    assert_close(one, two)
    from distsbi import load

    assert load(path).sample(0, np.zeros((1, 2, 1)), 10).shape == (10, 2, 1)


@pytest.mark.slow
def test_the_first_is_killed(two, tmp_path):
    _killed(tmp_path / "run", victim=0)
    assert finish(*start_two(tmp_path / "run"))["digest"] == two["digest"]


@pytest.mark.slow
def test_begun_by_one_and_ended_by_two(two, tmp_path):
    process = start(tmp_path / "run", 1, 0, "", devices=4)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoints" / "15").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert_close(finish(*start_two(tmp_path / "run")), two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("fsdp=1", "optimizer=muon"), ("batch_size=62",), ("data=task",), ("data=batches",), ("data=folder",)]
)
def test_every_kind_of_data_and_state(options, tmp_path):
    if options == ("data=folder",):
        theta, x = map(np.asarray, get_task("two_moons").pairs(jax.random.key(0), 603))
        write_pairs(tmp_path / "pairs", theta, x)
        options = (*options, f"folder={tmp_path / 'pairs'}")
    two = finish(*start_two(tmp_path / "two", *options))
    assert_close(two, finish(start(tmp_path / "one", 1, 0, "", *options, devices=4)))


@pytest.mark.slow
@pytest.mark.parametrize("each", [100, 400])
def test_a_stream_is_read_in_parts(each, tmp_path):
    """Each process reads row groups of its own; of too few of them both read all, and batches are those of one process."""
    theta, x = map(np.asarray, get_task("two_moons").pairs(jax.random.key(0), 1_200))
    write_pairs(tmp_path / "pairs", theta, x, rows_per_file=each)
    options = ("data=stream", f"folder={tmp_path / 'pairs'}")
    two = finish(*start_two(tmp_path / "two", *options))
    first, second = map(set, two["groups"])
    one = finish(start(tmp_path / "one", 1, 0, "", *options, devices=4))
    if each == 400:
        assert first == second == set(one["groups"][0])
        return assert_close(two, one)
    assert not first & second
    assert first | second == set(one["groups"][0])
    return np.testing.assert_allclose(two["val_losses"][-1], one["val_losses"][-1], rtol=0.2)


def test_processes_that_do_not_fit(tmp_path):
    """Each names all that differs, and both end."""
    for process in start_two(tmp_path / "run", other=tmp_path / "elsewhere", more=("seed=1",)):
        _, said = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "differ in data, run directory, standardizer, validation; give all of them the same command" in said


def test_a_directory_in_use(tmp_path):
    """By another training, which process 0 sees: both say so."""
    (tmp_path / "run").mkdir()
    with one_holder(tmp_path / "run" / LOCK, tmp_path / "run"):
        for process in start_two(tmp_path / "run"):
            _, said = process.communicate(timeout=120)
            assert process.returncode != 0
            assert f"ValueError: {tmp_path / 'run'} is being written by process {os.getpid()} on " in said


def test_divided_rows_are_the_rows():
    mesh = meshes.make_mesh({"data": 8})
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(50, 2, 1)).astype("f4"), rng.normal(size=(50, 3, 2)).astype("f4"))
    data[1][7] = np.nan
    placed = rows.place(data, mesh)
    assert placed[0].addressable_shards[0].data.shape == (7, 2, 1)
    for size in (16, 13):  # a multiple of the devices, and not
        index = rng.permutation(50)[:size].astype(np.int32)
        for found, whole in zip(jax.jit(rows.take(mesh))(None, index, placed), data, strict=True):
            np.testing.assert_array_equal(found, whole[index])
