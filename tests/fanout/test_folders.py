"""Folders of pairs and of draws: any change of a file is found and named, and what is well is well."""

import numpy as np
import pytest

import distsbi
from distsbi.data import write_pairs
from distsbi.data.pairs import UNFINISHED
from distsbi.fanout.folders import verify_folder
from distsbi.sampling import Tile
from distsbi.store import layout
from tests.gaussian import gaussian_posterior

PRIOR = {"mass": "Normal(0, 1)", "spin": "Normal(0, 1)"}
NUMBERS = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)


def simulate(out):
    distsbi.simulate("fake_simulators:plain", PRIOR, 40, out, workers=0, shard_size=6, show_progress=False)
    return sorted(out.glob("*.parquet"))


def write(out):
    write_pairs(out, NUMBERS, NUMBERS, rows_per_file=30)
    return sorted(out.glob("*.parquet"))


def draw(out):
    exact = gaussian_posterior({"data": 1}, tile=Tile(2, 64))
    exact.sample_dataset(out, 5, np.zeros((1, 2, 1)), 300, rows_per_part=128)
    return sorted(out.glob("*.parquet"))


def flip(content: bytes) -> bytes:
    """A bit of the first page's numbers, or of the levels beside them."""
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


@pytest.mark.parametrize(
    ("make", "what", "count", "advice"),
    [(simulate, "pairs", 7, "distsbi simulate --simulator"), (write, "pairs", 4, "again"), (draw, "draws", 3, "anew")],
)
def test_what_is_well_and_what_is_changed(tmp_path, make, what, count, advice):
    out = tmp_path / "out"
    files = make(out)
    found = verify_folder(out)
    assert (found.what, found.files, found.complete, found.problems) == (what, count, True, ())
    assert found.good
    for change in (flip, lambda content: content[:-9], lambda content: b""):
        content = files[1].read_bytes()
        files[1].write_bytes(change(content))
        found = verify_folder(out)
        assert not found.good
        assert len(found.problems) == 1
        assert str(files[1]) in found.problems[0]
        assert advice in found.advice
        files[1].write_bytes(content)
    assert verify_folder(out).good


def test_of_simulations_the_footer_and_what_is_missing_too(tmp_path):
    files = simulate(tmp_path / "out")
    content = files[2].read_bytes()
    at = content.index(b"mass")
    files[2].write_bytes(content[:at] + b"maSS" + content[at + 4 :])
    files[5].unlink()
    found = verify_folder(tmp_path / "out")
    assert found.problems == (
        f"{files[2]} is not the file that was written: its checksum differs.",
        f"{files[5]} is missing.",
    )
    (tmp_path / "out" / UNFINISHED).write_text("40\n")
    found = verify_folder(tmp_path / "out")
    assert (found.complete, found.files, len(found.problems)) == (False, 6, 1)
    layout.failures_file(files[0]).parent.mkdir()
    layout.failures_file(files[0]).write_bytes(b"no Parquet")
    assert "failures" in verify_folder(tmp_path / "out").problems[-1]


def test_draws_that_are_not_all_there(tmp_path):
    draw(tmp_path / "out")[0].unlink()
    assert "part-00000.parquet is missing" in verify_folder(tmp_path / "out").problems[0]


def test_what_is_neither(tmp_path):
    with pytest.raises(ValueError, match="holds neither pairs nor draws"):
        verify_folder(tmp_path)
    (tmp_path / "_distsbi.json").write_text("{")
    with pytest.raises(ValueError, match=r"_distsbi.json is damaged"):
        verify_folder(tmp_path)
