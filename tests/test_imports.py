"""`import distsbi` is quick and touches nothing; each layer imports only from those below it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import distsbi


def in_new_process(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    heavy = "jax,flax,ray,diffrax,matplotlib,sklearn,orbax,numpyro,pyarrow,pydantic"
    loaded = in_new_process(f"import distsbi, sys; print([m for m in {heavy.split(',')} if m in sys.modules])")
    assert loaded == "[]"


def test_import_time() -> None:
    """The best of three, against a bare interpreter's: the machine may be busy."""
    code = "import time; s = time.perf_counter(); import distsbi; print(time.perf_counter() - s)"
    assert min(float(in_new_process(code)) for _ in range(3)) < 0.1


def test_public_modules_touch_no_device() -> None:
    code = """
import distsbi
for name in distsbi.__all__:
    getattr(distsbi, name)
import jax._src.xla_bridge as bridge, sys
print(bridge.backends_are_initialized(), [m for m in ("ray", "matplotlib", "sklearn") if m in sys.modules])
"""
    assert in_new_process(code) == "False []"


def test_public_names() -> None:
    assert set(distsbi.__all__) == set(distsbi._HOMES) | {"__version__"}
    assert dir(distsbi) == sorted(distsbi.__all__)
    for name in distsbi.__all__:
        assert getattr(distsbi, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'distsbi' has no attribute 'Flux2'"):
        distsbi.Flux2  # noqa: B018


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="needs import-linter")
def test_layers(repo: Path, tmp_path: Path) -> None:
    command = "from importlinter.cli import lint_imports_command as c; c()"
    result = subprocess.run(
        [sys.executable, "-c", command, "--cache-dir", str(tmp_path)],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
