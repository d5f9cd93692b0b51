"""Every test, and every process a test starts, runs on CPUs: eight virtual devices, compiled programs kept.

With DISTSBI_TEST_PLATFORMS=cuda,cpu (or tpu,cpu) they run on the GPUs that there are, and meshes get no larger; those marked `cpus` are left out.
"""

import errno
import gc
import logging
import math
import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before JAX is imported anywhere.
PLATFORMS = os.environ.get("DISTSBI_TEST_PLATFORMS", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORMS
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes of a test run share a GPU
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if version("jaxlib").startswith("0.10.") and "DISTSBI_TEST_OPTIMISED" not in os.environ:
    # XLA's older emitters compile in two thirds of the time, of which LLVM's second level of optimisation is a quarter; tests of bits across
    # processes set flags of their own.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1"
# `_programs` below says it file by file; what a wider fixture starts before that (a Ray for a folder) is told here.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int("DISTSBI_TEST_OPTIMISED" not in os.environ))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("PYTHONPATH", str(ROOT))  # for processes that tests start
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # frames of pytest in every operation of every program

import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _programs(request: pytest.FixtureRequest):
    """Tests compile more than they compute: XLA skips most of its optimisations, in processes that a test starts too, but in files marked
    `optimised` and where DISTSBI_TEST_OPTIMISED is set. What was compiled is let go after a file: thousands of programs cost gigabytes and slow
    every garbage collection."""
    import jax

    lightly = not (request.node.get_closest_marker("optimised") or "DISTSBI_TEST_OPTIMISED" in os.environ)
    jax.config.update("jax_disable_most_optimizations", lightly)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(lightly)))
        yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _meshes() -> Iterator[None]:
    """Off CPUs devices are not virtual: a mesh of more than there are is one of all that there are."""
    if PLATFORMS == "cpu":
        yield
        return
    import jax

    from distsbi import mesh as meshes

    make = meshes.make_mesh

    def smaller(mesh: meshes.MeshLike = None, **options: bool) -> jax.sharding.Mesh:
        if isinstance(mesh, dict) and math.prod(mesh.values()) > len(jax.devices()):
            mesh = {"data": -1}
        return make(mesh, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", smaller)
        yield


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


class Away:
    """A Parquet file whose disk does not answer: opening it raises an error of the disk `times` times."""

    path: Path | None = None
    times = 0
    number = errno.ESTALE


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    import pyarrow.parquet as pq

    made, plain = Away(), pq.ParquetFile

    def opened(source: object, *args: object, **kwargs: object) -> pq.ParquetFile:
        if made.times and source == made.path:
            made.times -= 1
            raise OSError(made.number, os.strerror(made.number))
        return plain(source, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("distsbi.files.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(pq, "ParquetFile", opened)
    return made


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 server on this machine: a URI with a gap for a path of the test's own."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    from distsbi.store.place import as_place

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("EC2_METADATA_DISABLED", "true")):
            patch.setenv(f"AWS_{name}", value)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server.start()
        options = f"?scheme=http&endpoint_override=127.0.0.1:{server.get_host_and_port()[1]}&region=us-east-1"
        as_place(f"s3://bucket{options}&allow_bucket_creation=true").fs.create_dir("bucket")
        yield "s3://bucket/{}" + options
        server.stop()


LONGEST = (
    "readme",
    "processes",
    "training",
    "joint",
    "pipelines",
    "matrix",
    "dataset",
    "kill",
    "distill",
    "images",
    "density",
)


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not go through it again, nor after every few hundred objects of a trace."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no process is left with one of them at the end."""
    if PLATFORMS != "cpu":
        for item in items:
            if item.get_closest_marker("cpus"):
                item.add_marker(pytest.mark.skip(f"needs CPU devices; the tests run on {PLATFORMS}"))
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))
