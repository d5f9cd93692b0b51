"""Every test, and every process a test starts, runs on CPUs: eight virtual devices, compiled programs kept."""

import gc
import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if version("jaxlib").startswith("0.10.") and "DISTSBI_TEST_OPTIMISED" not in os.environ:
    # Tests compile more than they compute, and XLA's older emitters compile in two thirds of the time; tests of bits across processes set
    # flags of their own.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("PYTHONPATH", str(ROOT))  # for processes that tests start
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _programs(request: pytest.FixtureRequest):
    """Programs of a file marked `lightly_compiled` skip most of XLA's optimisations, unless DISTSBI_TEST_OPTIMISED is set. What was compiled
    is let go after a file: thousands of programs cost gigabytes and slow every garbage collection."""
    import jax

    lightly = request.node.get_closest_marker("lightly_compiled") and "DISTSBI_TEST_OPTIMISED" not in os.environ
    jax.config.update("jax_disable_most_optimizations", bool(lightly))
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A path for a run directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return ROOT


class SmallDisk:
    """A file system of half a megabyte."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        self._mount("size=512k")

    def grow(self) -> None:
        self._mount("remount,size=16m")

    def _mount(self, options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], check=True, capture_output=True
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        disk = SmallDisk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a full disk needs a small file system, and mounting one is not permitted here ({error})")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)


LONGEST = ("test_readme.py", "test_training.py", "test_joint.py", "test_matrix.py", "test_kill.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
