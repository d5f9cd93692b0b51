"""The commands that cluster/ gives: known to distsbi's command line, and run, as they stand in the manifests, on a Ray of two nodes that
asks for a token."""

import re
import secrets
import shlex
import subprocess
import tempfile
from pathlib import Path

import click
import numpy as np
import pytest

from distsbi.cli import cli
from tests.cluster.conftest import read
from tests.cluster.manifests import CLUSTER, KUBERNETES, cluster_spec, commands, documents, entrypoint, ray_start
from tests.cluster.nodes import end, environment, free_port, wait_for_port

JOBS = {path.stem: path for path in KUBERNETES if any(doc["kind"] == "RayJob" for doc in documents(path))}
SLOW = {"catalog-gpu", "train-gpu"}  # to run; the first differs from the other catalog's by the options for GPUs
HEAD, WORKERS = "127.0.0.2", ("127.0.0.3", "127.0.0.4")  # Ray changes 127.0.0.1 into the machine's outer address


def _parse(words: list[str]) -> click.Context:
    """The command as distsbi reads it."""
    return cli.commands[words[1]].make_context(words[1], list(words[2:]))


def _all() -> list:
    found = [pytest.param(shlex.split(entrypoint(path)), id=name) for name, path in JOBS.items()]
    readme = commands((CLUSTER / "README.md").read_text())
    return found + [pytest.param(words, id=f"README-{n}") for n, words in enumerate(readme)]


def test_commands_of_the_readme_are_found():
    assert len(_all()) - len(JOBS) == 13


@pytest.mark.parametrize("words", _all())
def test_the_command_line_knows_the_command(words):
    _parse(words)


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("catalog")])
def test_as_many_workers_as_the_pods_have_room_for(name):
    given = _parse(shlex.split(entrypoint(JOBS[name]))).params
    (group,) = cluster_spec(JOBS[name])["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus, gpus = int(limits["cpu"]) // given["cpus_per_worker"], limits.get("nvidia.com/gpu", 0)
    assert given["workers"] == group["replicas"] * (gpus / given["num_gpus_per_worker"] if gpus else cpus)
    assert gpus == 0 or cpus * given["num_gpus_per_worker"] >= gpus


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("train")])
def test_a_training_has_a_worker_on_each_host(name):
    (group,) = cluster_spec(JOBS[name])["workerGroupSpecs"]
    (workers,) = re.findall(r"--ray-workers (\d+)", entrypoint(JOBS[name]))
    assert int(workers) == group["replicas"] * group.get("numOfHosts", 1)


class Nodes:
    """The head and one worker of a manifest, or more, as nodes of a Ray on this machine."""

    def __init__(self, path: Path, folder: Path, workers: int = 1):
        self.token = secrets.token_hex(16)  # KubeRay takes it from the Secret
        self.port = free_port(HEAD)
        self.address = f"{HEAD}:{self.port}"
        self.processes: list[subprocess.Popen] = []
        (worker,) = [group["groupName"] for group in cluster_spec(path)["workerGroupSpecs"]]
        # What is other than in a pod: addresses, ports, folders (short ones, for sockets; each its own, or nodes that start at once take each
        # other's), and no dashboard, which needs ray[default].
        self.temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        head = ["--head", f"--port={self.port}", f"--node-ip-address={HEAD}", f"--temp-dir={self.temporary.name}/0"]
        head += ["--include-dashboard=false", "--disable-usage-stats"]
        try:
            self._start(path, "head", head, folder)
            wait_for_port(HEAD, self.port, self.processes[0])
            for i, address in enumerate(WORKERS[:workers], 1):
                where = [
                    f"--address={self.address}",
                    f"--node-ip-address={address}",
                    f"--temp-dir={self.temporary.name}/{i}",
                ]
                self._start(path, worker, where, folder)
        except BaseException:
            self.end()
            raise

    def _start(self, path: Path, which: str, more: list[str], folder: Path) -> None:
        options, env = ray_start(path, which)
        del env["JAX_COMPILATION_CACHE_DIR"]  # the tests' own
        with open(folder / f"{which}.log", "wb") as log:
            self.processes.append(
                subprocess.Popen(
                    ["ray", "start", "--block", *options, *more],
                    env=environment(**self.secret(), **{**env, "JAX_PLATFORMS": "cpu"}),  # there is no GPU here
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def secret(self) -> dict[str, str]:
        """What KubeRay sets in every container of Ray by `authOptions`."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess:
        """As the job's driver on the head, where KubeRay says what RAY_ADDRESS is."""
        env = environment(**{"RAY_ADDRESS": self.address, "JAX_PLATFORMS": "cpu", **self.secret(), **more})
        return subprocess.run(
            ["bash", "-c", command], env=env, capture_output=True, text=True, timeout=540, check=False
        )

    def end(self) -> None:
        for process in reversed(self.processes):
            end(process)
        self.temporary.cleanup()


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """The draws of the first catalog that was done."""
    return {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in JOBS])
@pytest.mark.long
def test_the_entrypoint_runs(name, data, drawn, tmp_path):
    """The manifest's own command, with other paths and nothing else changed."""
    path, command = JOBS[name], entrypoint(JOBS[name])
    words = shlex.split(command)
    _parse(words)
    (worker,) = [group["groupName"] for group in cluster_spec(path)["workerGroupSpecs"]]
    if worker == "tpu":
        pytest.skip("there is no TPU, and Ray does not make one up")
    paths = {"/data/out": tmp_path / "out", "/data/runs/main": data / "runs" / "main", "/data": data}
    if words[1] == "train":
        paths["/data/runs/main"] = tmp_path / "run"
    for said, here in paths.items():
        command = re.sub(rf"(?<!\S){said}(?![\w-])", str(here), command)
    nodes = Nodes(path, tmp_path, int(words[words.index("--ray-workers") + 1]) if words[1] == "train" else 1)
    try:
        done = nodes.run(command)
        assert done.returncode == 0, done.stderr + (tmp_path / "head.log").read_text()[-2000:]
        if words[1] == "train":
            assert (tmp_path / "run" / "spec.json").exists()
            return
        assert "1 of 1 shards" in done.stdout
        found = read(tmp_path / "out")
        for name, draws in (drawn or found).items():
            np.testing.assert_array_equal(found[name], draws)
        if not drawn:
            drawn.update(found)
            # With the check that KubeRay's own waiting container makes.
            health = f"ray health-check --address {nodes.address}"
            assert nodes.run(health).returncode == 0
            assert nodes.run(health, RAY_AUTH_TOKEN="wrong").returncode != 0
    finally:
        nodes.end()


@pytest.mark.slow
def test_a_cluster_that_refuses_the_token_is_told_from_a_wrong_address(data, tmp_path):
    nodes = Nodes(JOBS["catalog-cpu"], tmp_path, 0)
    command = f"distsbi catalog {data}/runs/main {data}/catalog.parquet {tmp_path}/out --address {nodes.address}"
    try:
        for secret, shown in (({"RAY_AUTH_TOKEN": "wrong"}, "another"), ({"RAY_AUTH_MODE": "disabled"}, "none")):
            done = nodes.run(command, **secret)
            assert done.returncode == 2
            assert (
                f"Error: the Ray cluster at '{nodes.address}' asks for a token, and this call shows {shown}; set"
                in done.stderr
            )
    finally:
        nodes.end()
