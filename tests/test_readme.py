"""README is run as it stands: its Python in one process, top to bottom, then its commands in another; on one device, with a smaller default network and
two grids to choose from."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from distsbi.config import parse_config

pytestmark = [pytest.mark.timeout(600), pytest.mark.optimised]  # it computes for as long as it compiles


SMALLER = """
from distsbi.networks import MLPParams
from distsbi.sampling import calibrate

MLPParams.default = classmethod(lambda cls, dim_obs, dim_cond, *channels: cls(dim_obs, dim_cond, *channels, width=48, depth=2))
calibrate.CANDIDATES, calibrate.REFERENCE_STEPS = (("multistep", 12), ("multistep", 24)), 24
"""
COMMANDS = """
from distsbi.cli import main

if __name__ == "__main__":
    for words in {}:
        try:
            main(words)
        except SystemExit as end:
            assert not end.code, (words, end.code)
"""


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _run(command: list[str], cwd, repo) -> None:
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"), "PYTHONPATH": str(repo)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, repo):
    """The folder in which README's Python has run."""
    folder = tmp_path_factory.mktemp("readme")
    blocks = _blocks((repo / "README.md").read_text(), "python")
    assert len(blocks) >= 4
    body = "\n".join(blocks) + (
        "\nassert samples.shape == (10_000, 2, 1) and (samples[:, 0] > 0).all() and abs(samples[:, 1]).max() <= 1"
        "\nassert samples1.shape == (5_000, 2, 1) and many.shape == (100, 20, 2, 1) and logq.shape == (100,)"
        "\nassert abs(samples.mean(0).ravel() - [1.2, 0.5]).max() < 0.15"
        "\nassert flights.n_ok + len(flights.failures()) == 2_000 and flights.counts['failed'] == flights.n_bad > 0"
        "\nassert result.n_ok == 40 and catalog.draws('galaxy-7').shape[0] == 200"
        "\nassert (held_out.theta[:, 0] > 0).all() and calibration.ranks.shape == (len(held_out.theta), 2)"
        "\nassert np.allclose(alone, catalog['galaxy-7'], atol=1e-4)\n"
    )
    script = (
        "def main():\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "if __name__ == '__main__':\n    main()\n"
    )
    (folder / "readme.py").write_text(SMALLER + script)
    _run([sys.executable, "readme.py"], folder, repo)
    return folder


@pytest.mark.long
def test_python_of_the_readme(place):
    assert (place / "my-pairs").is_dir()
    assert (place / "out" / "_distsbi" / "run.json").exists()


@pytest.mark.long
def test_commands_of_the_readme(repo, place):
    lines = [line for block in _blocks((repo / "README.md").read_text(), "bash") for line in block.splitlines() if line]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) >= 4
    assert {words[0] for words in commands} == {"distsbi"}
    (place / "commands.py").write_text(SMALLER + COMMANDS.format([words[1:] for words in commands]))
    _run([sys.executable, "commands.py"], place, repo)
    assert (place / "draws.npy").exists()


def test_the_file_of_the_readme_is_a_configuration(repo):
    (text,) = _blocks((repo / "README.md").read_text(), "yaml")
    config = parse_config(yaml.safe_load(text))
    assert config.pipeline == "Flux1Flow" and list(config.prior) == ["mass", "spin"]


def test_make_targets_of_the_readme_exist(repo):
    targets = set(re.findall(r"^([a-z-]+):", (repo / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", (repo / "README.md").read_text()))
    assert named
    assert named <= targets


def test_files_of_the_readme_exist(repo):
    text = (repo / "README.md").read_text()
    chart = next(block for block in _blocks(text, "text") if "──►" in block)
    named = re.findall(r"\w+\.py", chart)
    assert len(named) >= 8
    here = {path.name for path in (repo / "distsbi").rglob("*.py")}
    assert set(named) <= here
    for path in re.findall(r"`((?:tests|cluster|benchmarks)/[\w/.]+)`", text):
        assert (repo / path).exists(), path
