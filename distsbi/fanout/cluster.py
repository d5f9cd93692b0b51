"""Ray, started or joined, and the environment that a worker process gets. Ray is imported at first use."""

import contextlib
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterator

OBJECT_STORE_BYTES = 100 * 2**20  # manifests only: samples never enter it


@contextlib.contextmanager
def connected(address: str | None, cpus: int | None, gpus: float) -> Iterator[None]:
    """Ray for the time of the block.

    A Ray that is up in this process is used and left up. Else the cluster at `address` (or $RAY_ADDRESS) is joined,
    or without one a local Ray of `cpus` is started on the loopback interface; that is shut down at the end, and the
    environment variables which `ray.init` leaves behind (RAY_AUTH_MODE, ...) are put back.

    Raises ValueError if no cluster answers at the address; RuntimeError if a local Ray does not start.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address and address != "local":
            _join(address)
        else:
            _start(cpus, gpus)
        yield
    finally:
        ray.shutdown()
        for name in [name for name in os.environ if name.startswith("RAY_") and name not in before]:
            del os.environ[name]
        os.environ.update(before)


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({error}); check the address with `ray status --address "
            f"{address}`, or leave address out to use this machine."
        ) from error


def _start(cpus: int | None, gpus: float) -> None:
    """A local Ray; a second attempt where the first does not come up, as happens on a machine that is very busy."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it Ray warns that it will stop hiding GPUs; worker_environment does that.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for attempt in (1, 2):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=None if gpus else 0,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if attempt == 2:
                raise RuntimeError(
                    f"Ray does not start on this machine ({error}); it may be too busy or out of space in /tmp: try "
                    "again, or give workers=0 to do without Ray."
                ) from error


def own_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cluster_workers(cpus_per_worker: int, gpus_per_worker: float) -> int:
    """As many workers as the cluster that is joined has room for now; at least one."""
    import ray

    total = ray.cluster_resources()
    room = total.get("GPU", 0) / gpus_per_worker if gpus_per_worker else total.get("CPU", 0) / cpus_per_worker
    return max(1, int(room))


def worker_environment(cpus: int, gpus: float) -> dict[str, str]:
    """Environment variables of a worker process with `cpus` cores and `gpus` GPUs.

    PJRT_NPROC is what bounds XLA's thread pool. A worker without a GPU must be told JAX_PLATFORMS=cpu, or jax takes
    one that Ray gave to somebody else. Virtual CPU devices of the driver are not passed on.
    """
    env = {"PYTHONPATH": os.pathsep.join(_import_path())}
    if gpus:
        env["XLA_CLIENT_MEM_FRACTION"] = f"{0.9 * min(gpus, 1):.3f}"
    else:
        env |= {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(cpus)}
        env |= {name: str(cpus) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    if "XLA_FLAGS" in os.environ:
        env["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]).strip()
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        env["JAX_NUM_CPU_DEVICES"] = "1"
    return env


def _import_path() -> list[str]:
    """What this process imports from besides its Python installation, so that a distsbi or a module on PYTHONPATH or
    added to sys.path is found by workers on this machine. On other machines it must be installed."""
    installed = tuple(os.path.realpath(path) for path in sysconfig.get_paths().values())
    own = [os.path.abspath(path) for path in sys.path]
    return [
        path for path in dict.fromkeys(own) if os.path.isdir(path) and not os.path.realpath(path).startswith(installed)
    ]
