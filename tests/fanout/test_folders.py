"""Folders of pairs and of draws: any change of a file is found and named, and what is well is well."""

import errno
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import distsbi
from distsbi.cli import cli
from distsbi.data import write_pairs
from distsbi.data.pairs import UNFINISHED
from distsbi.fanout import simulation
from distsbi.fanout.folders import verify_folder
from distsbi.fanout.simulation_worker import read_failures
from distsbi.fanout.verify import verify
from distsbi.files import TRIES
from distsbi.sampling import Tile
from distsbi.store import layout
from tests.gaussian import gaussian_posterior

PRIOR = {"mass": "Normal(0, 1)", "spin": "Normal(0, 1)"}
NUMBERS = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)


def simulate(out, simulator="plain"):
    distsbi.simulate(f"fake_simulators:{simulator}", PRIOR, 40, out, workers=0, shard_size=6, show_progress=False)
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
        assert what != "draws" or "again" not in found.problems[0]  # the advice says it
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
    assert "failures" in verify_folder(tmp_path / "out").problems[0]


@pytest.mark.parametrize("journal", [True, False])
def test_rows_that_are_neither_pairs_nor_failures(tmp_path, journal):
    """A record of failures that is lost, or another shard's."""
    out = tmp_path / "out"
    files = simulate(out, "picky")
    before, status = distsbi.data.read_pairs(out), simulation.status(out)[0]
    records = [layout.failures_file(file) for file in files]
    there = [record for record in records if record.exists()]
    assert len(there) > 2 and status.counts["failed"] == 40 - len(before.theta)
    assert verify_folder(out).good
    if not journal:
        layout.journal_file(out).unlink()
        assert verify_folder(out).good
    content, rows = there[0].read_bytes(), read_failures(out)
    there[0].unlink()
    found = verify_folder(out)
    assert len(found.problems) == 1
    assert there[0].name in found.problems[0]
    there[0].write_bytes(there[1].read_bytes())
    (problem,) = verify_folder(out).problems
    assert ("its checksum differs" if journal else "tells of 7 of 6 rows") in problem
    there[0].unlink()
    if not journal:
        assert simulation.status(out)[0].damaged == (records.index(there[0]),)
        simulate(out, "picky")
        assert there[0].read_bytes() == content
        assert (read_failures(out), simulation.status(out)[0].counts) == (rows, status.counts)
        np.testing.assert_array_equal(distsbi.data.read_pairs(out).x, before.x)


def test_a_page_that_is_damaged_is_made_again(tmp_path):
    """pyarrow's error of it is an OSError, too."""
    files = simulate(tmp_path / "out")
    content = files[1].read_bytes()
    files[1].write_bytes(flip(content))
    layout.journal_file(tmp_path / "out").unlink()
    simulate(tmp_path / "out")
    assert files[1].read_bytes() == content


@pytest.mark.parametrize("which", [layout.shard_file, lambda *shard: layout.failures_file(layout.shard_file(*shard))])
def test_what_cannot_be_read_now_is_not_removed(tmp_path, away, which):
    """The disk gives an error of its own, which has a number; pyarrow's of a page have none."""
    out = tmp_path / "out"
    simulate(out, "picky")
    layout.journal_file(out).unlink()
    shard = next(i for i in range(7) if layout.failures_file(layout.shard_file(out, i, 7)).exists())
    path = away.path = which(out, shard, 7)
    content = path.read_bytes()
    away.times = TRIES
    with pytest.raises(OSError, match=f"{path.name} cannot be read now .*Stale file handle.*, which is no damage"):
        simulate(out, "picky")
    assert path.read_bytes() == content
    away.times = TRIES
    assert "cannot be read now" in verify_folder(out).problems[0]
    away.times = TRIES - 1
    assert verify_folder(out).good
    assert away.times == 0


@pytest.mark.parametrize("make", [write, draw])
def test_a_file_that_cannot_be_read_now_is_not_said_to_be_damaged(tmp_path, away, make):
    """Nor is it advised to remove it, unless another is damaged."""
    out = tmp_path / "out"
    path = away.path = make(out)[1]
    away.number = errno.EIO
    away.times = TRIES - 1
    assert verify_folder(out).good
    assert away.times == 0
    away.times = TRIES
    found = verify_folder(out)
    (problem,) = found.problems
    assert f"{path} cannot be read now" in problem and "Input/output error" in problem and "is no damage" in problem
    assert (
        found.advice == "what could not be read now is left as it is; verify again when the disk or the store answers"
    )
    other = next(file for file in sorted(out.glob("*.parquet")) if file != path)
    other.write_bytes(flip(other.read_bytes()))
    away.times = TRIES
    found = verify_folder(out)
    assert len(found.problems) == 2
    assert "again" in found.advice and "what could not be read now is left" in found.advice


@pytest.mark.parametrize(
    "name",
    ["shard-copy.parquet", "copy.parquet", "shard-00000000-of-00000009.parquet", "shard-00000007-of-00000007.parquet"],
)
def test_files_that_are_no_shards_of_the_simulations(tmp_path, name):
    """They would be read with them, and rows come twice; what readers leave out is left alone."""
    out = tmp_path / "out"
    files = simulate(out)
    for hidden in (".shard-00000000-of-00000007.parquet.0a", ".copy.parquet", "_copy.parquet", "notes.txt"):
        shutil.copy(files[0], out / hidden)
    assert verify_folder(out).good
    assert len(distsbi.data.read_pairs(out).theta) == 40
    shutil.copy(files[0], out / name)
    found = verify_folder(out)
    assert found.problems == (f"{out / name} is no shard of these simulations, but would be read with them.",)
    assert found.advice.startswith("move files that are no shards of these simulations elsewhere")
    with pytest.raises(ValueError, match=f"none of its 7 shards, such as {name}, .* move them elsewhere"):
        simulate(out)
    if name != "shard-00000007-of-00000007.parquet":  # training looks at names alone
        with pytest.raises(ValueError, match=f"no shards of its simulations, such as {name}, .* move them elsewhere"):
            distsbi.data.read_pairs(out)
    (out / name).unlink()
    files[3].unlink()
    simulate(out)
    assert verify_folder(out).good
    assert len(distsbi.data.read_pairs(out).theta) == 40


def test_other_files_in_a_folder_that_is_to_be_simulations(tmp_path):
    shutil.copy(write(tmp_path / "pairs")[0], tmp_path / "shard-copy.parquet")
    with pytest.raises(ValueError, match="holds other files, such as shard-copy.parquet, .* give a new folder"):
        simulate(tmp_path)


def test_draws_that_are_not_all_there(tmp_path):
    draw(tmp_path / "out")[0].unlink()
    assert "part-00000.parquet is missing" in verify_folder(tmp_path / "out").problems[0]


def said(command, folder):
    """By a command that refuses the folder, in one line."""
    found = CliRunner().invoke(cli, [command, str(folder)])
    assert isinstance(found.exception, ValueError)
    return str(found.exception)


def copy(out, to, name="{}"):
    """The Parquet files alone."""
    to.mkdir()
    for file in out.glob("*.parquet"):
        shutil.copy(file, to / name.format(file.name))
    return to


def test_shards_without_their_record(tmp_path, run, make_catalog):
    catalog, pairs = tmp_path / "catalog", tmp_path / "pairs"
    distsbi.sample_catalog(run, make_catalog(), catalog, nsamples=5, workers=0, rows_per_shard=20)
    simulate(pairs)
    for what, out, name in (
        ("a catalog", catalog, "{}"),
        ("a catalog", catalog, "renamed-{}"),
        ("simulations", pairs, "{}"),
    ):
        bare = copy(out, tmp_path / f"{out.name} {name}", name)
        (bare / "_distsbi").mkdir()  # and nothing in it
        for _ in range(2):
            told = f"{bare} holds shards of {what}, but no _distsbi/run.json"
            for text in (said("verify", bare), said("status", bare)):
                assert told in text
                assert "Copy the folder _distsbi too" in text
            for call in (verify_folder, verify, distsbi.open_catalog):
                with pytest.raises(ValueError, match=re.escape(told)):
                    call(bare)
            shutil.rmtree(bare / "_distsbi", ignore_errors=True)
        shutil.copytree(out / "_distsbi", bare / "_distsbi")
        if name == "{}":
            assert CliRunner().invoke(cli, ["verify", str(bare), "--fraction", "0"]).exit_code == 0
    cut = copy(catalog, tmp_path / "cut")
    sorted(cut.iterdir())[0].write_bytes(b"PAR1")
    assert "holds shards of a catalog or of simulations, but" in said("verify", cut)


def test_files_that_are_no_shards_are_not_said_to_be(tmp_path):
    for make in (write, draw):
        make(tmp_path / make.__name__)
        assert "holds files, but no catalog and no simulations" in said("status", tmp_path / make.__name__)
        assert verify_folder(tmp_path / make.__name__).good
    bare = copy(tmp_path / "draw", tmp_path / "bare")
    assert "holds shards of" not in said("status", bare)
    assert f"{bare} holds parts of draws, but no _distsbi.json" in said("verify", bare)


def test_what_is_neither(tmp_path):
    with pytest.raises(ValueError, match="holds neither pairs nor draws"):
        verify_folder(tmp_path)
    (tmp_path / "_distsbi.json").write_text("{")
    with pytest.raises(ValueError, match=r"_distsbi.json is damaged"):
        verify_folder(tmp_path)
