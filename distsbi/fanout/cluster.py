"""Ray, started or joined, and the environment that a worker process gets. Ray is imported at first use."""

import contextlib
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

CHANGED = ("RAY_", "PYTHONBREAKPOINT")  # what ray.init sets in the environment starts with one of these
OBJECT_STORE_BYTES = 100 * 2**20  # manifests only: samples never enter it
PROBE_SECONDS = 5.0  # for something to listen at an address


def cluster_address(address: str | None) -> str | None:
    """Of the cluster that is meant: `address`, or without one $RAY_ADDRESS. None: this machine ("local", or neither is given)."""
    meant = address or os.environ.get("RAY_ADDRESS") or "local"
    return None if meant == "local" else meant


@contextlib.contextmanager
def connected(address: str | None, workers: int | None, cpus: int, gpus: float | None) -> Iterator[None]:
    """Ray for the time of the block, for `workers` (None: as many as there is room for) of `cpus` and `gpus` (None: what Ray finds) each.

    A Ray that is up in this process is used and left up. Else the cluster that is meant (`cluster_address`) is joined,
    or without one a local Ray is started, which listens on the loopback interface alone and, as Ray does unless
    RAY_AUTH_MODE=disabled, asks who connects for a token; it is shut down at the end, and the environment variables
    which `ray.init` leaves behind (RAY_AUTH_MODE, PYTHONBREAKPOINT, ...) are put back.

    Raises ValueError if no cluster answers at the address or it refuses the token, if another Ray is up in this process, or if a worker asks for
    more than this machine has; RuntimeError if a local Ray does not start.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith(CHANGED)}
    import ray

    if ray.is_initialized():
        _check_up(address)
        yield
        return
    joined = cluster_address(address)
    try:
        with _sigterm_as_it_is():
            if joined is not None:
                _join(joined)
            else:
                _start(workers, cpus, gpus)
        yield
    finally:
        ray.shutdown()
        for name in [name for name in os.environ if name.startswith(CHANGED) and name not in before]:
            del os.environ[name]
        os.environ.update(before)


def _check_up(address: str | None) -> None:
    """Raises ValueError if another Ray is asked for than the one that is up in this process."""
    import ray
    from ray._private import services

    up = ray.get_runtime_context().gcs_address
    if address is None or address == "auto" or "://" in address:
        return
    if address == "local":
        same = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} <= {socket.gethostname()}
    else:
        same = up in (address, services.canonicalize_bootstrap_address(address))
    if not same:
        raise ValueError(
            f"address={address!r} is not the Ray at {up} that is up in this process; call ray.shutdown() first, or leave "
            "address out to use that one."
        )


@contextlib.contextmanager
def _sigterm_as_it_is() -> Iterator[None]:
    """A handler of SIGTERM that is there, if any, is there after the block too, for ray.init puts others in its place that end the process
    amid whatever it does: Ray's own, first, which are kept away, and at last that of its C++, which is replaced again."""
    from ray._private import utils

    handler, setter = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = setter
        signal.signal(signal.SIGTERM, handler)


def _join(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError, RpcError

    try:
        _probe(address)
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except AuthenticationError as error:
        raise ValueError(_refused(address)) from error
    except (ConnectionError, TimeoutError, RpcError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({error}); check the address with `ray status --address "
            f"{address}`, or leave address out to use this machine."
        ) from error


def _knock(address: str) -> None:
    """Asks once whether the cluster lets this process in, with the token that ray.init would show: ray.init asks thirteen times,
    warns each time, and then tells a refusal as a wrong address.

    Raises Ray's AuthenticationError without a token or with another than the cluster's; its RpcError if no Ray answers.
    """
    from ray._private import services
    from ray._private.authentication import authentication_token_setup as tokens
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

    given = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    if "://" in given:  # Ray's client, which asks by itself
        return
    services.find_gcs_addresses.cache_clear()
    where = services.canonicalize_bootstrap_address(given)
    if where is None:
        return
    if address == "auto":
        _probe(where)
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    tokens.ensure_token_if_auth_enabled(create_token_if_missing=False)  # a GcsClient without one ends the process
    GcsClient(address=where)


def _refused(address: str) -> str:
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]

    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        shown = "shows none"
    elif AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        shown = "shows another"
    else:
        shown = "has none"
    return (
        f"the Ray cluster at {address!r} asks for a token, and this call {shown}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH to the cluster's."
    )


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


def _start(workers: int | None, cpus: int, gpus: float | None) -> None:
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
            with _loopback(), _gpus_for_workers(gpus), warnings.catch_warnings():
                # Ray starts its processes with fork and exec, which JAX, if it runs here, warns of; they exec at once, so nothing can lock.
                warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
                ray.init(
                    address="local",
                    num_cpus=(workers or own_cpus() // cpus) * cpus,
                    num_gpus=0 if gpus == 0 else None,
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
    if gpus is not None and gpus > found:
        raise ValueError(
            f"each worker asks for {gpus:g} GPUs and Ray finds {found:g} on this machine; lower num_gpus_per_worker (0: "
            "CPUs), or give the address of a cluster that has them."
        )


@contextlib.contextmanager
def _gpus_for_workers(gpus: float | None) -> Iterator[None]:
    """A Ray that is started in this block for workers with GPUs does not hand them this process's JAX_PLATFORMS=cpu, which keeps the driver off
    the GPUs."""
    own = os.environ.get("JAX_PLATFORMS")
    if gpus and own == "cpu":
        del os.environ["JAX_PLATFORMS"]
    try:
        yield
    finally:
        if own is not None:
            os.environ["JAX_PLATFORMS"] = own


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


def own_gpus() -> int:
    """GPUs of this machine that this process may use, as Ray would find them; no GPU is touched."""
    from ray._private.accelerators import get_accelerator_manager_for_resource  # Ray has no public name for it

    manager = get_accelerator_manager_for_resource("GPU")
    assert manager is not None  # of "GPU" there is one
    visible = manager.get_current_process_visible_accelerator_ids()
    return manager.get_current_node_num_accelerators() if visible is None else len(visible)


def cluster_room(cpus: int, gpus: float, leaving: Collection[str] = (), *, empty: bool = False) -> int:
    """How many more workers of `cpus` and `gpus` fit now on machines that live, those in `leaving` aside. `empty`: if nothing ran there."""
    import ray.util.client
    from ray._private.state import state

    alive = {
        node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving
    }
    if empty:
        rooms = list(alive.values())
    elif ray.util.client.ray.is_connected():  # ray://: no more than the sum is told
        rooms = [ray.available_resources()]
    else:
        rooms = [free for node, free in state.available_resources_per_node().items() if node in alive]
    return sum(_fitting(room, cpus, gpus) for room in rooms)


def machines_that_fit(cpus: int, gpus: float) -> set[str]:
    """Ray's names of the machines that are there and could hold such a worker, if they were free."""
    import ray

    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {node for node, has in alive.items() if _fitting(has, cpus, gpus)}


def _fitting(resources: Mapping[str, float], cpus: int, gpus: float) -> int:
    """How many workers of `cpus` and `gpus` the resources of a machine are enough for."""
    fits = lambda name, each: resources.get(name, 0) / each if each else math.inf  # noqa: E731
    return int(min(fits("CPU", cpus), fits("GPU", gpus)))


def grows() -> bool:
    """Whether machines may be added by an autoscaler, or by whoever else names the kinds of its machines.

    Ray does not say so itself. Its autoscaler v2, KubeRay and Spark label what they start with a group; autoscaler v1 reports machines by
    kind, and where there is none (its provider is "readonly") by "node_" and their own name.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    if any("ray.io/node-group" in node.get("Labels", {}) for node in ray.nodes() if node["Alive"]):
        return True
    told = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    kinds = told.get("autoscaler_report", {}).get("active_nodes", {})
    return not all(re.fullmatch("node_[0-9a-f]+", kind) for kind in kinds)


def machine_of(actor: Any) -> str:
    """Ray's name of the machine that an actor is on, or was; "" while it waits for room or its process, and over ray://, where it is not
    told."""
    import ray.util.client
    from ray._private.state import state

    if ray.util.client.ray.is_connected():
        return ""
    found = state.actor_table(actor._actor_id.hex())  # noqa: SLF001 Ray has no public name for it
    # of one that waits it is the machine at which it waits
    return found["Address"]["NodeID"] if found.get("State") in ("ALIVE", "DEAD") else ""


def not_on(machines: Collection[str]) -> dict[str, str]:
    """The label selector of an actor that is to be put on none of `machines`."""
    return {"ray.io/node-id": f"!in({','.join(sorted(machines))})"} if machines else {}


def draining_nodes() -> set[str]:
    """Ray's names of the machines that are about to leave (a preemption notice, an autoscaler that shrinks)."""
    import ray.util.client
    from ray._private.state import state

    return set() if ray.util.client.ray.is_connected() else set(state.get_draining_nodes())


def worker_environment(cpus: int, gpus: float) -> dict[str, str]:
    """Environment variables of a worker process with `cpus` cores and `gpus` GPUs.

    PJRT_NPROC is what bounds XLA's thread pool. A worker without a GPU must be told JAX_PLATFORMS=cpu, or jax takes
    one that Ray gave to somebody else. Virtual CPU devices of the driver are not passed on.
    """
    # Ray puts the variable of the machine in the place of ${...}, or nothing where it has none
    env = {"PYTHONPATH": os.pathsep.join([*_import_path(), "${PYTHONPATH}"])}
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
