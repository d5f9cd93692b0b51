"""Programs that commands and workers compile are found again by the next process, in a folder of the user's own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from distsbi import compile_cache

PROBE = """
from distsbi.cli.group import cli

@cli.command()
def probe():
    import jax
    jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4)))

cli(["probe"])
"""


def test_a_command_keeps_its_programs(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != compile_cache.FOLDER}
    env |= {"XDG_CACHE_HOME": str(tmp_path), compile_cache.LEAST: "0"}
    subprocess.run([sys.executable, "-c", PROBE], env=env, timeout=200, check=True)
    (folder,) = (tmp_path / "distsbi").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("jit__lambda*"))


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user who has said nothing about a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (compile_cache.FOLDER, compile_cache.LEAST, compile_cache.CHOSEN):
        monkeypatch.setenv(name, "")  # so that what is set in the test is undone
        monkeypatch.delenv(name)
    before = {
        name: jax.config.values[name]
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("undecided")
def test_where_jax_is_imported_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compile_cache.FOLDER, "")  # none, says the user
    compile_cache.use_compile_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.delenv(compile_cache.FOLDER)
    compile_cache.use_compile_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == os.environ[compile_cache.FOLDER]
    assert Path(os.environ[compile_cache.FOLDER]).parent == tmp_path / "distsbi"
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == compile_cache.LEAST_SECONDS


@pytest.mark.usefixtures("undecided")
def test_a_worker_of_a_command_has_a_folder_of_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it finds the driver's in its environment."""
    monkeypatch.setenv("PJRT_NPROC", "2")
    compile_cache.use_compile_cache()
    drivers = os.environ[compile_cache.FOLDER]
    compile_cache.use_compile_cache()
    assert os.environ[compile_cache.FOLDER] == drivers
    monkeypatch.setenv("PJRT_NPROC", "1")
    compile_cache.use_compile_cache()
    assert os.environ[compile_cache.FOLDER] == jax.config.values["jax_compilation_cache_dir"] != drivers


@pytest.mark.usefixtures("undecided")
def test_a_home_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_cache.use_compile_cache()
    assert compile_cache.FOLDER not in os.environ
    assert jax.config.values["jax_compilation_cache_dir"] is None
