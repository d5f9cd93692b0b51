"""Ray, started or joined, and the environment that a worker process gets. Ray is imported at first use."""

import contextlib
import logging
import os
import re
import socket
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator

OBJECT_STORE_BYTES = 100 * 2**20  # manifests only: samples never enter it
PROBE_SECONDS = 5.0  # for something to listen at an address


@contextlib.contextmanager
def connected(address: str | None, workers: int | None, cpus: int, gpus: float) -> Iterator[None]:
    """Ray for the time of the block, for `workers` (None: as many as there is room for) of `cpus` and `gpus` each.

    A Ray that is up in this process is used and left up. Else the cluster at `address` (or $RAY_ADDRESS) is joined,
    or without one a local Ray is started, which listens on the loopback interface alone and, as Ray does unless
    RAY_AUTH_MODE=disabled, asks who connects for a token; it is shut down at the end, and the environment variables
    which `ray.init` leaves behind (RAY_AUTH_MODE, ...) are put back.

    Raises ValueError if no cluster answers at the address, or if a worker asks for more than this machine has;
    RuntimeError if a local Ray does not start.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    # Ray starts its processes with fork and exec, which JAX, if it runs here, warns of; they exec at once, so nothing can lock.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address and address != "local":
            _join(address)
        else:
            _start(workers, cpus, gpus)
        yield
    finally:
        ray.shutdown()
        for name in [name for name in os.environ if name.startswith("RAY_") and name not in before]:
            del os.environ[name]
        os.environ.update(before)


def _join(address: str) -> None:
    import ray

    try:
        _probe(address)
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({error}); check the address with `ray status --address "
            f"{address}`, or leave address out to use this machine."
        ) from error


def _probe(address: str) -> None:
    """Raises ConnectionError if nothing listens at host:port or ray://host:port: ray.init waits there for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto", or an address that ray.init understands or refuses itself
        return
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
            return
        except (OSError, OverflowError) as error:  # the latter for a port past 65535
            if time.monotonic() > deadline:
                raise ConnectionError(str(error)) from error
            time.sleep(0.2)


def _start(workers: int | None, cpus: int, gpus: float) -> None:
    """A local Ray; a second attempt where the first does not come up, as happens on a machine that is very busy."""
    import ray

    if cpus > own_cpus():
        raise ValueError(
            f"each worker asks for {cpus} CPUs and this machine has {own_cpus()}; lower cpus_per_worker, or give the "
            "address of a cluster that has them."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it Ray warns that it will stop hiding GPUs; worker_environment does that.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for attempt in (1, 2):
        try:
            with _loopback():
                ray.init(
                    address="local",
                    num_cpus=(workers or own_cpus() // cpus) * cpus,
                    num_gpus=None if gpus else 0,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            break
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if attempt == 2:
                raise RuntimeError(
                    f"Ray does not start on this machine ({error}); it may be too busy or out of space in /tmp: try "
                    "again, or give workers=0 to do without Ray."
                ) from error
    found = ray.cluster_resources().get("GPU", 0)
    if gpus > found:
        raise ValueError(
            f"each worker asks for {gpus:g} GPUs and Ray finds {found:g} on this machine; lower num_gpus_per_worker (0: "
            "CPUs), or give the address of a cluster that has them."
        )


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that is started in this block has the address 127.0.0.1, and so all its servers listen there alone.

    ray.init turns a `_node_ip_address` of 127.0.0.1 into the outer address (services.resolve_ip_for_localhost), unless
    this machine is said to be in no cluster: the default on macOS and Windows (ray-project/ray#18730), by an environment
    variable that Linux honours too. Ray reads it when it is imported, hence the constant for this process.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


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
