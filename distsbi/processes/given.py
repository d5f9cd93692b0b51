"""The rank of this process among the others: as it was told, or as its launcher's environment variables say.

    told        --coordinator host:port --num-processes 2 --process-id 0
    JAX's own   JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    Open MPI    mpirun, also one inside a SLURM step of a single task
    SLURM       a step of several tasks (srun)
    TPU pod     of GKE: TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, one process for each host

Nothing here touches JAX.
"""

import dataclasses
import ipaddress
import os
import re
import zlib
from collections.abc import Mapping

PORTS = range(61_440, 65_536)  # where a job's number, not a person, chooses the port
TPU_PORT = 8_476


@dataclasses.dataclass(frozen=True)
class Rank:
    """Process `index` of `count`, which meet at `coordinator`, an address "host:port" of process 0's machine.

    local: this process among those on its machine, where the launcher says it: it takes that one of the machine's GPUs. None: all of them.
    job: what the launcher calls these processes; those of another job are turned away, and not told this one's. Not compared, nor shown.

    Raises ValueError for a number out of range and an address that is none.
    """

    coordinator: str
    count: int
    index: int
    local: int | None = None
    job: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"the number of processes must be at least 1; got {self.count}.")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"process id {self.index} is out of range: the {self.count} processes are numbered from 0 to {self.count - 1}; give each "
                f"its own number."
            )
        port = self.coordinator.rpartition(":")[2]
        if not self.host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise ValueError(
                f"the coordinator's address must be host:port of the machine of process 0, such as node1:1234; got {self.coordinator!r}."
            )

    @property
    def host(self) -> str:
        """Without the port, and without the brackets of an IPv6 address."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def loopback(self) -> bool:
        """Whether the address is on the loopback interface: then nobody but this machine is to reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def find_rank(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    detect: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Rank | None:
    """The rank that is given, or with `detect` the one that the environment says; None: this process is alone.

    Raises ValueError if only a part is given, and as `Rank` does.
    """
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    if any(value is not None for value in given.values()):
        missing = [name for name, value in given.items() if value is None]
        if coordinator is None or count is None or index is None:
            raise ValueError(
                f"{' and '.join(missing)} missing: several processes need an address, their number and this process' own number, all three."
            )
        return Rank(coordinator, count, index)
    if not detect:
        return None
    environment = os.environ if environment is None else environment
    try:
        ranks = (read(environment) for read in (_jax, _open_mpi, _slurm, _tpu_pod))
        return next((rank for rank in ranks if rank is not None and rank.count > 1), None)
    except KeyError as error:
        raise ValueError(
            f"the environment says that there are several processes but not {error}; give --coordinator, --num-processes and --process-id, "
            f"or --distributed off."
        ) from error


def _jax(env: Mapping[str, str]) -> Rank | None:
    if "JAX_COORDINATOR_ADDRESS" not in env or "JAX_NUM_PROCESSES" not in env:
        return None
    return Rank(env["JAX_COORDINATOR_ADDRESS"], _number(env, "JAX_NUM_PROCESSES"), _number(env, "JAX_PROCESS_ID"))


def _slurm(env: Mapping[str, str]) -> Rank | None:
    """Inside a step: the batch script itself has no SLURM_STEP_NODELIST of several tasks."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return None
    count = _number(env, "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID") if "SLURM_STEP_ID" in env else 0
    port = PORTS[(job + 521 * step) % len(PORTS)]  # a job's steps, and jobs in succession, apart
    return Rank(
        f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        count,
        _number(env, "SLURM_PROCID"),
        _local(env, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        f"SLURM step {job}.{step}",
    )


def _open_mpi(env: Mapping[str, str]) -> Rank | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    mpirun = env.get("OMPI_MCA_orte_hnp_uri", "")
    uri = mpirun or env.get("PMIX_SERVER_URI2") or env.get("PMIX_SERVER_URI21") or ""
    count, found = (
        _number(env, "OMPI_COMM_WORLD_SIZE"),
        re.search(r"tcp[46]?://(?:\[([^\],]+)[^\]]*\]|([^\s,:]+))", uri),
    )
    if count == 1:
        return None
    several = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", str(count)) != str(count)
    host = found and (found[2] or found[1])
    if host is None or (several and (not mpirun or host == "::1" or host.startswith("127."))):
        raise ValueError(  # Open MPI 5 tells each host's own server, which listens on the loopback interface
            "Open MPI does not say where mpirun runs (OMPI_MCA_orte_hnp_uri); export JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID instead."
        )
    job = uri.partition(";")[0]
    port = PORTS[zlib.crc32(job.encode()) % len(PORTS)]  # Open MPI 4 numbers jobs in steps of 65,536
    local = _local(env, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    address = f"[{host}]" if ":" in host else host
    return Rank(f"{address}:{port}", count, _number(env, "OMPI_COMM_WORLD_RANK"), local, f"Open MPI job {job}")


def _tpu_pod(env: Mapping[str, str]) -> Rank | None:
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if "TPU_WORKER_ID" in env and env.get("MEGASCALE_NUM_SLICES") and _number(env, "MEGASCALE_NUM_SLICES") > 1:
        raise ValueError(
            f"this is one of {env['MEGASCALE_NUM_SLICES']} TPU slices (MEGASCALE_NUM_SLICES), and distsbi joins the hosts of one; give "
            f"--coordinator, --num-processes and --process-id over all slices, or --distributed off."
        )
    return Rank(f"{hosts[0]}:{TPU_PORT}", len(hosts), _number(env, "TPU_WORKER_ID")) if len(hosts) > 1 else None


def _local(env: Mapping[str, str], name: str, among: str) -> int | None:
    """The number `env[name]` of this process among those of its machine, where there are several that see the same GPUs."""
    alone = re.fullmatch(r"1(\(x\d+\))?", env.get(among, "")) is not None
    own_gpu = re.fullmatch(r"[^,]+", env.get("CUDA_VISIBLE_DEVICES", "")) is not None  # the launcher has divided them
    return None if alone or own_gpu or name not in env else _number(env, name)


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ValueError(
            f"the environment variable {name} must be a whole number; got {env[name]!r}: mend it, or give --coordinator, --num-processes and "
            f"--process-id, or --distributed off."
        ) from None


def first_host(nodes: str) -> str:
    """The first host of SLURM's list.

    >>> first_host("node[007-015,20],login"), first_host("a1,b[1-2]"), first_host("10.0.0.1,10.0.0.2")
    ('node007', 'a1', '10.0.0.1')
    >>> first_host("rack[2-3]node[03-04],a1")
    'rack2node03'
    """
    found = re.match(r"([^,\[]|\[\d[^\]]*\])+", nodes)
    if found is None:
        raise ValueError(
            f"SLURM's list of nodes {nodes!r} cannot be read; give --coordinator, --num-processes and --process-id."
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])
