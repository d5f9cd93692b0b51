"""The demo's own parts, and (slow) the demo."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distsbi import demo


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = demo._fresh(tmp_path / "a" / "demo")
    (out / "run").mkdir()
    (out / "run" / "spec.json").write_text("{}")
    (out / "posterior.png").write_bytes(b"")
    assert [path.name for path in demo._fresh(out).iterdir()] == [demo.MARK]
    (out / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="thesis.tex, not only an earlier demo"):
        demo._fresh(out)
    assert (out / "thesis.tex").exists()


def test_inside_counts_by_id() -> None:
    table = pa.table({"id": ["obs-0001", "obs-0000"], "q05": [[0.0, 0.0], [5.0, 5.0]], "q95": [[1.0, 1.0], [6.0, 6.0]]})
    assert demo._inside(table, np.array([[5.5, 5.5], [0.5, 2.0]])) == 0.75


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    demo.figure(rng.normal(size=(500, 2)), rng.normal(size=(500, 2)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_program_is_called_as_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distsbi.cli.info import _program

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / ".venv" / "bin" / "distsbi"), "demo"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _program() == ".venv/bin/distsbi"
    (tmp_path / "distsbi").touch(mode=0o755)
    assert _program() == "distsbi"
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert _program() == "distsbi"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    lines: list[str] = []
    facts = demo.run_demo(tmp_path / "demo", quick=True, mesh={"data": 2}, say=lines.append)
    assert {path.name for path in (tmp_path / "demo").iterdir()} == set(demo.PARTS)
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == facts
    assert 0.5 < facts["c2st"] < 0.9
    assert 0.8 < facts["catalog_inside_90"] <= 1
    assert "distsbi sample" in lines[-1]
