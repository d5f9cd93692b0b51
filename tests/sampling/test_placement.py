"""Placement invariance: bit for bit the same draws from separate processes that differ in all that must not matter."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.optimised

PLACEMENTS = {
    "one device, one thread": ("1", "1", "whole"),
    "two devices, two threads": ("2", "2", "whole"),
    "three devices, shards of four": ("3", "2", "shards"),
    "eight devices, reversed order, shards": ("8", "1", "reversed shards"),
}


def _hash(devices: str, threads: str, case: str) -> str:
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PJRT_NPROC": threads}
    command = [sys.executable, "-m", "tests.sampling.placement", case]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.cpus
@pytest.mark.parametrize(
    ("network", "placements"),
    [
        ("mlp", {"one": ("1", "1", "whole"), "all else": ("3", "2", "reversed shards")}),
        *(pytest.param(network, PLACEMENTS, marks=pytest.mark.slow) for network in ("mlp", "flux")),
    ],
)
def test_bits_do_not_depend_on_placement(network, placements):
    hashes = {
        name: _hash(devices, threads, f"{network} {case}") for name, (devices, threads, case) in placements.items()
    }
    assert len(set(hashes.values())) == 1, hashes
