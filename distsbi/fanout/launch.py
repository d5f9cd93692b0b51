"""One training over the machines of a Ray cluster, by Ray Train: a worker process on each host, which all of its devices belong to.

Ray places the workers, joins them in JAX (GPUs and TPUs; on CPUs, where Ray Train's JAX backend does nothing, they join by themselves) and starts
them again where a machine is lost, or a device, the network or the disk fails under a worker. Nothing of the training passes through Ray: the run
directory is on a file system that all hosts share, and a training that is started again resumes from its last checkpoint.
"""

import dataclasses
import errno
import importlib
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from distsbi.compile_cache import use_compile_cache
from distsbi.fanout.cluster import cluster_address, connected, own_cpus, worker_environment
from distsbi.files import Unreadable
from distsbi.processes import Rank
from distsbi.processes.meeting import free_port

RESTARTS = 3  # of all workers, after one or its machine was lost
# Errors of a disk that stay until the user gives another place or makes room.
USERS = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
ENOUGH = (
    "RESOURCE_EXHAUSTED",
    "INVALID_ARGUMENT",
    "UNIMPLEMENTED",
)  # what jax says of a batch that does not fit, and the like
STAYING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
STORAGE = "ray-train"  # Ray Train's own files, in the run directory until the training is done
CONTROLLER_FAILURES = 3  # of Ray Train's own process: without a number it tries for ever
HOSTS_SECONDS = 300.0  # for the hosts of a cluster to come

log = logging.getLogger("distsbi")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """What each worker takes of its host: `kind` is "cpu", "gpu" or "tpu", `topology` and `accelerator` are a TPU slice's. `apart`: each has a
    host of its own, on CPUs too."""

    kind: str
    workers: int
    cpus: int
    accelerators: int = 0
    topology: str | None = None
    accelerator: str | None = None
    apart: bool = False

    def scaling(self) -> dict[str, Any]:
        """Keywords of Ray Train's `ScalingConfig`. On GPUs one worker on each host: Ray Train shows several workers of a host the same GPUs."""
        resources: dict[str, float] = {"CPU": self.cpus}
        if self.kind == "tpu":
            slice_ = {"topology": self.topology, "accelerator_type": self.accelerator} if self.workers > 1 else {}
            return {"use_tpu": True, "resources_per_worker": {**resources, "TPU": self.accelerators}, **slice_}
        if self.kind == "gpu":
            gpu = {"resources_per_worker": {**resources, "GPU": self.accelerators}, "use_gpu": True}
            return {**gpu, "placement_strategy": "STRICT_SPREAD"}
        return {"resources_per_worker": resources, "placement_strategy": "STRICT_SPREAD" if self.apart else "SPREAD"}


def hosts_for(workers: int, nodes: list[dict[str, Any]], *, apart: bool = False) -> Hosts:
    """What `workers` workers take of these nodes (`ray.nodes()`): TPUs where there are some, else GPUs, else CPUs. `apart`: on CPUs too each has a
    host of its own.

    Raises ValueError if there are too few hosts, or no CPU for each worker.
    """
    if workers < 1:
        raise ValueError(f"the number of workers must be at least 1; got {workers}.")
    alive = [(node.get("Resources", {}), node.get("Labels", {})) for node in nodes if node.get("Alive", True)]
    for kind in ("TPU", "GPU"):
        found = sorted((have for have in alive if have[0].get(kind, 0) >= 1), key=lambda have: -have[0][kind])
        if not found:
            continue
        if len(found) < workers:
            raise ValueError(
                f"{workers} workers, one for each host, need as many hosts with {kind}s; Ray has {len(found)}: give --ray-workers {len(found)}, which "
                f"take all devices of their hosts, or wait for more."
            )
        chosen = found[:workers]
        each, cpus = (int(min(have.get(name, 0) for have, _ in chosen)) for name in (kind, "CPU"))
        labels = chosen[0][1]
        name = next((n.split(":", 1)[1] for n in chosen[0][0] if n.startswith("accelerator_type:TPU")), None)
        slice_ = {"topology": labels.get("ray.io/tpu-topology"), "accelerator": name} if kind == "TPU" else {}
        if kind == "TPU" and workers > 1 and None in slice_.values():
            raise ValueError(
                "Ray does not know the topology of the TPU slice (the node label ray.io/tpu-topology); see cluster/README.md."
            )
        return Hosts(kind.lower(), workers, cpus, each, **slice_)
    cpus = sorted((int(have.get("CPU", 0)) for have, _ in alive if have.get("CPU", 0) >= 1), reverse=True)
    if apart and len(cpus) < workers:
        raise ValueError(
            f"{workers} workers, one for each host, need as many hosts; Ray has {len(cpus)} with CPUs: give fewer --ray-workers, or wait for more."
        )
    if apart:
        return Hosts("cpu", workers, cpus[workers - 1], apart=True)
    if sum(cpus) < workers:
        raise ValueError(
            f"{workers} workers need a CPU each; Ray has {sum(cpus)}: give fewer --ray-workers, or wait for more."
        )
    return Hosts(
        "cpu", workers, next(each for each in range(cpus[0], 0, -1) if sum(n // each for n in cpus) >= workers)
    )


def _wait_for_hosts(workers: int) -> Hosts:
    """Hosts of the cluster that is joined: those of a new one may still be starting."""
    import ray

    deadline, told = time.monotonic() + HOSTS_SECONDS, False
    while True:
        try:
            return hosts_for(workers, ray.nodes(), apart=True)
        except ValueError as error:
            if workers < 1:
                raise
            if time.monotonic() > deadline:
                raise ValueError(f"{error} (waited {HOSTS_SECONDS:.0f} s)") from error
            if not told:
                log.warning("waiting up to %.0f s for hosts: %s", HOSTS_SECONDS, error)
                told = True
            time.sleep(1.0)


def launch(target: str, arguments: dict[str, Any], out: Path, workers: int, address: str | None = None) -> Any:
    """Calls `target`, "module:function", as `function(rank, join_jax=..., **arguments)` in `workers` processes of a Ray cluster, and returns what the first
    returns; workers are started again, all together, where some are lost or what they raised may pass.

    Args:
        arguments: plain values.
        out: a folder that all hosts share.
        address: of the cluster; None: $RAY_ADDRESS, else this machine, all of it: its GPUs too, unless JAX_PLATFORMS is cpu.

    Raises ValueError for too few hosts, and where the function raises one; RuntimeError if it fails otherwise, or workers are lost or fail again and
    again.
    """
    gpus = 0 if os.environ.get("JAX_PLATFORMS") == "cpu" else None
    with connected(address, max(workers, own_cpus()), 1, gpus):
        import ray
        from ray.train.v2.api.exceptions import TrainingFailedError

        joined = cluster_address(address) is not None
        out.mkdir(parents=True, exist_ok=True)
        for left in reversed(range(RESTARTS + 1)):
            # a lost one may be replaced
            hosts = _wait_for_hosts(workers) if joined else hosts_for(workers, ray.nodes())
            log.info(
                "training on %d %s workers, each with %d CPUs and %d accelerators",
                workers,
                hosts.kind,
                hosts.cpus,
                hosts.accelerators,
            )
            try:
                returned = _trainer(target, arguments, out, hosts).fit().return_value
                break
            except TrainingFailedError as error:
                told, passing = _told(error)
                if not (passing and left):
                    raise told from error
                log.warning("all workers are started again, for %s", told)
        shutil.rmtree(out / STORAGE, ignore_errors=True)
        return returned


def _trainer(target: str, arguments: dict[str, Any], out: Path, hosts: Hosts) -> Any:
    """Ray Train's, for one attempt."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    environment = {"RAY_TRAIN_V2_ENABLED": "1", **worker_environment(hosts.cpus, hosts.accelerators)}
    environment.pop("XLA_CLIENT_MEM_FRACTION", None)  # of catalogs' workers
    return JaxTrainer(
        _member,
        train_loop_config={"target": target, "arguments": arguments, "join_jax": hosts.kind == "cpu"},
        scaling_config=ScalingConfig(num_workers=hosts.workers, **hosts.scaling()),
        run_config=RunConfig(
            name="run",
            storage_path=str(out.absolute() / STORAGE),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=CONTROLLER_FAILURES),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _told(error: Exception) -> tuple[ValueError | RuntimeError, bool]:
    """What to raise for a failure of Ray Train, a worker's ValueError or a RuntimeError with its words; and whether another attempt may go well: none
    where a worker raised what will not pass, although the others, which it ended, are gone too."""
    failures = getattr(error, "worker_failures", {}).values()
    raised = [getattr(failure, "_base_exc", failure) for failure in failures]
    own = [e for e in raised if not type(e).__module__.startswith("ray.")]
    lasting = [e for e in own if not _may_pass(e)]
    reasons = lasting or own or [error]
    wrong = next((e for e in reasons if isinstance(e, ValueError)), None)
    return ValueError(str(wrong)) if wrong else RuntimeError(f"a worker failed: {reasons[0]}"), not lasting


def _may_pass(error: Exception) -> bool:
    """Whether what a worker raised may not come again: it may come of a process that is lost, which a survivor sees as a failure of its device or its
    network before anyone knows, or of a disk that does not answer for a while. A full disk, and what the user has to mend, stays."""
    from jax.errors import JaxRuntimeError

    if number := re.search(r"os_error_code='(\d+)'", str(error)):  # of TensorStore, which raises ValueError
        error = OSError(int(number[1]), "")
    if isinstance(error, Unreadable) and error.number:
        error = OSError(error.number, "")  # of the class that goes with it
    if isinstance(error, OSError):
        return not isinstance(error, USERS) and error.errno not in STAYING
    return isinstance(error, JaxRuntimeError) and not str(error).startswith(ENOUGH)


def _member(given: dict[str, Any]) -> Any:
    """What each worker runs."""
    use_compile_cache()
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    index, count = context.get_world_rank(), context.get_world_size()
    own = f"{ray.util.get_node_ip_address()}:{free_port()}"
    # a name that nobody guesses, for the port is open to the network
    address, job = broadcast_from_rank_zero((own, f"Ray Train {secrets.token_hex(16)}"))
    rank = Rank(address, count, index, job=job)
    module, _, function = given["target"].partition(":")
    return getattr(importlib.import_module(module), function)(rank, join_jax=given["join_jax"], **given["arguments"])
