"""A training killed with SIGKILL, at random moments and while a checkpoint is being written, ends with the bits of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

QUICK, FULL = (1, 400), (20, 1_500)  # kills, updates


def _start(path, nsteps) -> subprocess.Popen:
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}
    command = [sys.executable, "-m", "tests.training.victim", str(path), str(nsteps)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-3000:]
    return out.strip()


def _steps(path) -> int:
    """Steps logged so far."""
    try:
        return max((json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return -1


def _writing(path) -> bool:
    """Whether a checkpoint is being written: orbax's temporary folders are there."""
    folder = path / "checkpoints"
    return folder.is_dir() and any(".orbax-checkpoint-tmp" in name.name for name in folder.iterdir())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kills", "nsteps"), [QUICK, pytest.param(*FULL, marks=pytest.mark.slow)])
@pytest.mark.long
def test_killed_at_random_moments(tmp_path, kills, nsteps):
    undisturbed = _finish(_start(tmp_path / "whole", nsteps))
    path, rng = tmp_path / "killed", random.Random(kills)
    killed, during_write = 0, 0
    while killed < kills:
        process = _start(path, nsteps)
        before = _steps(path)
        progress = rng.choice((0, 0, 50, 100, 150))
        while process.poll() is None and _steps(path) < max(before, 0) + progress:
            time.sleep(0.005)
        if killed % 2 == 0:  # wait for a write to be under way, and kill inside it
            deadline = time.monotonic() + 60
            while process.poll() is None and not _writing(path) and time.monotonic() < deadline:
                time.sleep(0.0005)
            during_write += _writing(path)
        else:
            time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break  # it ended before the blow: the run is complete
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed == kills, "the run was too short to be killed so often"
    assert during_write >= 1
    assert _finish(_start(path, nsteps)) == undisturbed
    assert _steps(path) == nsteps
    print(f"{killed} kills, {during_write} while a checkpoint was being written")
