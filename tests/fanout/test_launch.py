"""A training over the hosts of a Ray cluster: what each worker takes, and real ones on this machine's CPUs."""

import errno
import os
import pickle
import subprocess
import sys
import warnings

import pytest
from jax.errors import JaxRuntimeError

from distsbi import files
from distsbi.fanout import cluster, launch as launching
from distsbi.fanout.launch import STORAGE, Hosts, hosts_for, launch
from distsbi.files import Unreadable

pytestmark = pytest.mark.timeout(600)


def node(alive: bool = True, labels: dict | None = None, **resources: float) -> dict:
    return {"Alive": alive, "Labels": labels or {}, "Resources": resources}


TPU = {"labels": {"ray.io/tpu-topology": "4x4"}, "CPU": 24.0, "TPU": 4.0, "accelerator_type:TPU-V6E": 1.0}


@pytest.mark.parametrize(
    ("workers", "nodes", "hosts"),
    [
        (2, [node(CPU=0), node(CPU=4), node(CPU=4)], Hosts("cpu", 2, 4)),
        (2, [node(CPU=8), node(CPU=2)], Hosts("cpu", 2, 4)),  # both on the larger host
        (2, [node(CPU=2)], Hosts("cpu", 2, 1)),
        (2, [node(CPU=0), node(CPU=8, GPU=4), node(CPU=6, GPU=8), node(CPU=64)], Hosts("gpu", 2, 6, 4)),
        (4, [node(CPU=0), *(node(**TPU) for _ in range(4))], Hosts("tpu", 4, 24, 4, "4x4", "TPU-V6E")),
        (1, [node(CPU=8, TPU=8)], Hosts("tpu", 1, 8, 8)),
    ],
)
def test_what_workers_take(workers, nodes, hosts):
    assert hosts_for(workers, nodes) == hosts


@pytest.mark.parametrize(
    ("workers", "nodes", "says"),
    [
        (
            2,
            [node(CPU=8, GPU=8), node(CPU=8, GPU=8, alive=False)],
            "need as many hosts with GPUs; Ray has 1: give --ray-workers 1",
        ),
        (3, [node(CPU=2)], "need a CPU each; Ray has 2"),
        (2, [node(CPU=8, TPU=4), node(CPU=8, TPU=4)], "topology of the TPU slice"),
        (0, [], "at least 1"),
    ],
)
def test_too_few_hosts(workers, nodes, says):
    with pytest.raises(ValueError, match=says):
        hosts_for(workers, nodes)


def test_apart():
    """On a cluster, where more hosts may come."""
    assert hosts_for(2, [node(CPU=0), node(CPU=8), node(CPU=4)], apart=True) == Hosts("cpu", 2, 4, apart=True)
    with pytest.raises(ValueError, match="need as many hosts; Ray has 1 with CPUs"):
        hosts_for(2, [node(CPU=0), node(CPU=8)], apart=True)


def test_what_is_said_of_the_wait_for_hosts(fake_ray, monkeypatch):
    monkeypatch.setattr(launching, "HOSTS_SECONDS", 0.0)
    with pytest.raises(ValueError, match="at least 1; got 0.$"):
        launching._wait_for_hosts(0)
    with pytest.raises(ValueError, match=r"need as many hosts with GPUs; Ray has 1.* .waited 0 s.$"):
        launching._wait_for_hosts(2)


@pytest.mark.parametrize(
    "hosts",
    [
        Hosts("cpu", 2, 4),
        Hosts("cpu", 2, 4, apart=True),
        Hosts("gpu", 2, 6, 4),
        Hosts("tpu", 4, 24, 4, "4x4", "TPU-V6E"),
    ],
)
def test_ray_takes_the_scaling(hosts):
    from ray.train import ScalingConfig

    made = ScalingConfig(num_workers=hosts.workers, **hosts.scaling())
    assert made.total_resources["CPU"] == hosts.workers * hosts.cpus
    assert (made.placement_strategy == "STRICT_SPREAD") == (hosts.apart or hosts.kind == "gpu")


class Failure(Exception):
    """As Ray Train tells of workers."""

    def __init__(self, *failures: Exception):
        self.worker_failures = dict(enumerate(failures))


@pytest.fixture
def fake_ray(monkeypatch):
    """What is given to `ray.init` and how each attempt of Ray Train goes, on one node of 8 CPUs and 2 GPUs."""
    ray = pytest.importorskip("ray")
    given, attempts = [], []

    def init(**options):
        warnings.warn("os.fork() was called. os.fork() is incompatible with JAX", RuntimeWarning, stacklevel=2)
        given.append(options)

    class Trainer:
        def __init__(self, hosts):
            given.append(hosts)

        def fit(self):
            raise attempts.pop(0)

    for name, value in {
        "is_initialized": lambda: False,
        "init": init,
        "shutdown": lambda: None,
        "cluster_resources": lambda: {"CPU": 8.0, "GPU": 2.0},
        "nodes": lambda: [node(CPU=8.0, GPU=2.0)],
    }.items():
        monkeypatch.setattr(ray, name, value)
    monkeypatch.setattr(launching, "_trainer", lambda target, arguments, out, hosts: Trainer(hosts))
    monkeypatch.setattr("ray.train.v2.api.exceptions.TrainingFailedError", Failure)
    monkeypatch.setattr(cluster, "own_cpus", lambda: 8)
    monkeypatch.setattr(launching, "own_cpus", lambda: 8)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return given, attempts


@pytest.mark.parametrize(("platform", "gpus"), [(None, None), ("cpu", 0)])
def test_a_local_ray_has_all_of_the_machine(fake_ray, tmp_path, monkeypatch, platform, gpus):
    given, attempts = fake_ray
    monkeypatch.setenv("JAX_PLATFORMS", platform) if platform else monkeypatch.delenv("JAX_PLATFORMS")
    attempts.append(Failure(ValueError("enough")))
    filters = list(warnings.filters)
    with pytest.raises(ValueError, match="enough"):
        launch("a:b", {}, tmp_path, 1)
    options, hosts = given
    assert (options["num_cpus"], options["num_gpus"]) == (8, gpus)  # None: as many as Ray finds
    assert hosts == Hosts("gpu", 1, 8, 2)
    assert warnings.filters == filters


def test_what_becomes_of_failures(fake_ray, tmp_path):
    """What a worker raised ends it, although the others are gone too; what Ray says of workers that are gone is tried again, a few times."""
    from ray.exceptions import WorkerCrashedError

    _, attempts = fake_ray
    gone = Failure(WorkerCrashedError())
    attempts += [gone, Failure(WorkerCrashedError(), PermissionError("the disk is away"))]
    with pytest.raises(RuntimeError, match="a worker failed: the disk is away"):
        launch("a:b", {}, tmp_path, 1)
    attempts += [gone, Failure(OSError("x"), ValueError("the data are bad"))]
    with pytest.raises(ValueError, match="^the data are bad$"):
        launch("a:b", {}, tmp_path, 1)
    attempts += [gone] * (launching.RESTARTS + 1)
    with pytest.raises(RuntimeError, match="a worker failed: "):
        launch("a:b", {}, tmp_path, 1)
    assert not attempts


def unreadable(error: OSError) -> Unreadable:
    """What a reader makes of it, as it comes from a worker."""

    def read() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Unreadable) as raised:
        patch.setattr(files, "PAUSE_SECONDS", 0.0)
        files.patiently(read, "pairs-00000.parquet")
    return pickle.loads(pickle.dumps(raised.value))


TENSORSTORE = "DATA_LOSS: Error writing local file \"/runs/x/d/0\": {} [os_error_code='{}']"
DEVICE = JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited")


@pytest.mark.parametrize(
    "error",
    [
        DEVICE,
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EIO, "Input/output error"),
        TimeoutError("no answer"),
        ValueError(TENSORSTORE.format("Stale file handle", errno.ESTALE)),
        unreadable(OSError(errno.ESTALE, "Stale file handle")),
        unreadable(RuntimeError("no answer from the store")),
    ],
    ids=repr,
)
def test_what_a_survivor_raises_first(fake_ray, tmp_path, error):
    """It is tried again, with or without word of the lost one; at the last attempt it is what is told."""
    from ray.exceptions import ActorDiedError

    _, attempts = fake_ray
    passing = [Failure(error), Failure(error, ActorDiedError())]
    attempts += [*passing, Failure(DEVICE, RuntimeError("the training loss became nan"))]
    with pytest.raises(RuntimeError, match="a worker failed: the training loss became nan"):
        launch("a:b", {}, tmp_path, 1)
    attempts += (passing * launching.RESTARTS)[: launching.RESTARTS + 1]
    with pytest.raises((ValueError, RuntimeError)) as raised:
        launch("a:b", {}, tmp_path, 1)
    assert str(error) in str(raised.value)
    assert isinstance(raised.value, ValueError) == isinstance(error, ValueError)
    assert not attempts


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the data are bad"),
        RuntimeError("the training loss became nan"),
        KeyError("x"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "pairs"),
        PermissionError(errno.EACCES, "Permission denied", "runs"),
        OSError(errno.ENOSPC, "the disk that holds runs is full"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        ValueError(TENSORSTORE.format("Permission denied", errno.EACCES)),
        unreadable(PermissionError(errno.EACCES, "Permission denied")),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9000000000 bytes."),
    ],
    ids=repr,
)
def test_what_would_come_again(fake_ray, tmp_path, error):
    """It is told at once; the other ended because of it."""
    from ray.exceptions import ActorDiedError

    _, attempts = fake_ray
    attempts += [Failure(ActorDiedError(), DEVICE, error)]
    with pytest.raises((ValueError, RuntimeError)) as raised:
        launch("a:b", {}, tmp_path, 1)
    assert str(error) in str(raised.value)


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", pytest.param("disk", marks=pytest.mark.slow)])
def test_two_workers_one_of_which_is_lost(local_ray, tmp_path, how):
    """Both are started again."""
    told = launch("tests.fanout.launched:add", {"out": str(tmp_path), "how": how}, tmp_path, 2)
    assert (tmp_path / "killed").exists()
    assert told == {"total": 1.0, "processes": 2, "platform": "cpu"}  # one device in each
    assert not (tmp_path / STORAGE).exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "raised"),
    [("ValueError", ValueError), pytest.param("PermissionError", RuntimeError, marks=pytest.mark.slow)],
)
def test_an_error_of_a_worker_is_told(local_ray, tmp_path, kind, raised):
    """At once: the same error would come again."""
    with pytest.raises(raised, match="the data are bad; mend them"):
        launch("tests.fanout.launched:fail", {"which": 1, "kind": kind}, tmp_path, 2)


def test_each_attempt_has_a_name_of_its_own(monkeypatch):
    """Which only Ray tells the others: who finds the port cannot say it."""
    ray = pytest.importorskip("ray")
    from ray.train import collective

    class Context:
        def get_world_rank(self):
            return 0

        def get_world_size(self):
            return 2

    sent = []
    monkeypatch.setattr("ray.train.get_context", Context)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(collective, "broadcast_from_rank_zero", lambda own: sent.append(own) or own)
    given = {"target": "tests.fanout.launched:who", "arguments": {}, "join_jax": False}
    ranks = [launching._member(given) for _ in range(2)]
    assert [(rank.coordinator, rank.job) for rank in ranks] == sent
    assert ranks[0].job != ranks[1].job
    assert min(len(rank.job) for rank in ranks) > 32
    assert ranks[0].job not in repr(ranks[0])


@pytest.mark.slow
def test_the_command(tmp_path):
    words = [
        "train",
        "--task",
        "two_moons",
        "--n",
        "500",
        "--nsteps",
        "30",
        "--out",
        str(tmp_path / "run"),
        "--ray-workers",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "distsbi.cli", *words],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained MLPFlowPipeline" in done.stdout
    assert (tmp_path / "run" / "spec.json").exists()
