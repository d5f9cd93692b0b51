"""The batch scripts, run as SLURM runs them, on two machines that are namespaces of this one: each has its own processes and its own network, so
that `ray symmetric-run` finds and ends no other Ray. `srun` and `scontrol` are stand-ins."""

import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import read
from tests.cluster.manifests import CLUSTER
from tests.cluster.nodes import environment

# Runs the command on every machine at once, with SLURM's words for which one it is. --wait ends the others after the first has ended.
SRUN = """\
#!{python}
import os, psutil, subprocess, sys, time
words = sys.argv[1:]
options = [words.pop(0) for _ in range(len(words)) if words[0].startswith("-")]
wait = next((float(o.split("=")[1]) for o in options if o.startswith("--wait=")), 1e9)
machines = os.environ["MACHINES"].split()
running = []
for n, machine in enumerate(machines):
    env = dict(os.environ, SLURM_PROCID=str(n), SLURM_LOCALID="0", SLURM_NTASKS=str(len(machines)))
    if n:  # so soon after the first machine's end the others end; by themselves after a minute
        env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "3"
    enter = ["nsenter", f"--target={{machine}}", "--net", "--pid", "--mount", f"--wdns={{os.getcwd()}}"]
    running.append(subprocess.Popen([*enter, *words], env=env))
first = None
while any(p.poll() is None for p in running):
    if first is None and any(p.poll() is not None for p in running):
        first = time.monotonic()
    if first is not None and time.monotonic() - first > wait:
        for p in psutil.Process().children(recursive=True):
            p.kill()
    time.sleep(0.1)
sys.exit(max((p.returncode for p in running), key=abs) and 1)
"""
SCONTROL = "#!/bin/bash\nprintf '10.77.0.1\\n10.77.0.2\\n'\n"
# Waits, and lets orphans go when they end, as the first process of a machine must.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.pause()"
ADDRESSES = ("10.77.0.1/24", "10.77.0.2/24")


def _in(machine: int, *command: str) -> None:
    subprocess.run(["nsenter", f"--target={machine}", "--net", "--mount", *command], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines():
    """Two first processes of machines, with a cable between them; all that runs on a machine ends with its first process."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"machines are made with {', '.join(missing)}, which is not here")
    first = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-c",
        INIT,
    ]
    started = [subprocess.Popen(first, stderr=subprocess.PIPE) for _ in ADDRESSES]
    try:
        time.sleep(0.5)
        if any(process.poll() is not None for process in started):
            pytest.skip(f"namespaces are not permitted here: {started[0].stderr.read().decode().strip()}")  # type: ignore[union-attr]
        inside = [psutil.Process(process.pid).children()[0].pid for process in started]
        cable = ["ip", "link", "add", "name", "eth0", "netns", str(inside[0]), "type", "veth", "peer", "name", "eth0"]
        subprocess.run([*cable, "netns", str(inside[1])], check=True, capture_output=True)
        for machine, address in zip(inside, ADDRESSES, strict=True):
            _in(machine, "ip", "addr", "add", address, "dev", "eth0")
            for device in ("eth0", "lo"):
                _in(machine, "ip", "link", "set", device, "up")
        yield inside
    finally:
        for process in started:
            process.kill()  # unshare ignores the polite signal
            process.wait()


@pytest.fixture
def sbatch(machines, tmp_path):
    """Runs a script of cluster/slurm with arguments, as the first of the job's machines does."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(name: str, *arguments: object, **more: str) -> subprocess.CompletedProcess:
        env = environment(
            MACHINES=" ".join(map(str, machines)),
            SLURM_JOB_ID=str(secrets.randbelow(10**6)),
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_JOB_NUM_NODES="2",
            SLURM_STEP_NODELIST="10.77.0.1,10.77.0.2",
            SLURM_STEP_NUM_NODES="2",
            SLURM_CPUS_ON_NODE="1",
            SLURM_CPUS_PER_TASK="1",
            JAX_PLATFORMS="cpu",
            TMPDIR=str(tmp_path),
        )
        env |= {"PATH": f"{programs}:{env['PATH']}", **more}
        command = ["bash", str(CLUSTER / "slurm" / name), *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_catalog_on_two_machines(sbatch, data, tmp_path):
    out = tmp_path / "out"
    done = sbatch("catalog.sbatch", data / "runs" / "main", data / "catalog.parquet", out, "--nsamples", "1000")
    assert done.returncode == 0, "\n".join(line[:200] for line in (done.stdout + done.stderr).splitlines())
    assert "1 of 1 shards" in done.stdout
    assert len(read(out)) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".done")] == []


def _program(folder: Path, name: str, text: str) -> None:
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def test_a_ray_that_does_not_start_fails_the_job(sbatch, tmp_path):
    """symmetric-run exits with 0 then; an output that is there from before changes nothing."""
    _program(tmp_path, "ray", "echo Failed to start Ray")
    (tmp_path / "out").mkdir()
    done = sbatch("catalog.sbatch", "run", "catalog.parquet", "out")
    assert done.returncode == 1
    assert "is not done" in done.stderr


def test_a_catalog_that_fails_fails_the_job(sbatch, tmp_path):
    _program(tmp_path, "ray", 'until [[ $1 == -- ]]; do shift; done; shift; exec "$@"')
    _program(tmp_path, "distsbi", 'echo "$@"; exit 1')
    done = sbatch("catalog.sbatch", "run", "catalog.parquet", "out/", "--nsamples", "7")
    assert done.returncode != 0
    assert "catalog run catalog.parquet out --address auto --nsamples 7" in done.stdout


def test_a_training_starts_on_every_machine(sbatch, tmp_path):
    """With SLURM's variables, by which jax finds the others."""
    _program(tmp_path, "distsbi", 'echo "$1 $SLURM_PROCID of $SLURM_NTASKS ${*:2}"')
    done = sbatch("train.sbatch", "train.yaml", "run", "--nsteps", "5")
    assert done.returncode == 0, done.stderr
    lines = {line for line in done.stdout.splitlines() if line.startswith("train")}
    assert lines == {f"train {n} of 2 --config train.yaml --out run --nsteps 5" for n in (0, 1)}
    assert "info" in done.stdout
    _program(tmp_path, "distsbi", "exit $(($SLURM_PROCID == 1))")
    assert sbatch("train.sbatch", "train.yaml", "run").returncode != 0


@pytest.mark.parametrize("name", ["catalog.sbatch", "train.sbatch"])
def test_too_few_arguments_say_the_usage(sbatch, name):
    done = sbatch(name, "only-one")
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
