"""Every test, and every process a test starts, runs on CPUs: eight virtual devices, compiled programs kept."""

import gc
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("PYTHONPATH", str(ROOT))  # for processes that tests start
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a finished file are let go: thousands of them cost gigabytes and slow every garbage collection."""
    yield
    import sys

    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A path for a run directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests keep to one process, where its fixtures and programs are made once; groups named by a mark stay."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))
