"""Pairs: what is accepted, round trips, the stream's order and its resumption, kill and resume of a simulation, bad
files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi.data import pairs, parquet
from distsbi.data.pairs import as_pairs, open_pairs, read_pairs, simulate_pairs, write_pairs
from distsbi.data.stream import iter_pairs
from distsbi.tasks import get_task

RNG = np.random.default_rng(0)
THETA = RNG.normal(size=(103, 2)).astype(np.float32)
X = RNG.normal(size=(103, 3, 2)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path / "pairs", THETA, X, names=["a", "b"], rows_per_file=20, source={"note": "test"})
    return tmp_path / "pairs"


class TestArrays:
    def test_channel_axis_and_dtype(self):
        pairs = as_pairs(THETA.astype(np.float64), (10 * X).astype(np.int64))
        assert pairs.theta.shape == (103, 2, 1)
        assert pairs.x.shape == (103, 3, 2)
        assert pairs.theta.dtype == pairs.x.dtype == np.float32
        assert pairs.names == ("theta_0", "theta_1")

    @pytest.mark.parametrize(
        ("theta", "x", "message"),
        [
            (THETA[:100], X, "theta has 100 rows and x has 103"),
            (THETA[:, 0], X, r"got \[103\]. Add the axis with theta\[:, None\]"),
            (THETA[None, ..., None], X, r"theta must have shape \[n, dim\] or \[n, dim, channels\]; got \[1, 103, "),
            (THETA[:0], X[:0], "no rows"),
            (THETA[:, :0], X, r"got \[103, 0\]"),
            (THETA.astype(str), X, "theta must hold real numbers"),
            (THETA.astype(complex), X, "theta must hold real numbers"),
            (np.where(np.isin(np.arange(103), (4, 17))[:, None], np.nan, THETA), X, r"2 of 103 rows \(first: 4, 17\)"),
            (
                THETA,
                np.where(np.arange(103)[:, None, None] > 95, np.inf, X),
                r"7 of 103 rows \(first: 96, 97, 98, 99, 100\)",
            ),
            (THETA.astype(np.float64) * 1e300, X, r"theta has NaN or inf \(as float32\)"),
        ],
    )
    def test_errors(self, theta, x, message):
        with pytest.raises(ValueError, match=message):
            as_pairs(theta, x)

    def test_names_must_fit(self):
        with pytest.raises(ValueError, match="1 parameter names given for 2"):
            as_pairs(THETA, X, ["a"])


class TestFolder:
    def test_round_trip(self, folder):
        pairs = read_pairs(folder)
        np.testing.assert_array_equal(pairs.theta[..., 0], THETA)
        np.testing.assert_array_equal(pairs.x, X)
        assert pairs.names == ("a", "b")
        found = open_pairs(folder)
        assert found.rows == (20,) * 5 + (3,)
        assert len(found) == 103
        assert found.source == {"note": "test"}

    def test_readable_without_distsbi(self, folder):
        table = pq.read_table(folder)
        assert table["x"].type == pa.fixed_shape_tensor(pa.float32(), (3, 2))
        np.testing.assert_array_equal(table["x"].combine_chunks().to_numpy_ndarray(), X)

    def test_files_of_other_writers(self, tmp_path):
        lists = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(a.ravel().astype(np.float64)), a.shape[1])
            for name, a in (("theta", THETA), ("x", X[..., 0]))
        }
        pq.write_table(pa.table(lists), tmp_path / "mine.parquet")
        pairs = read_pairs(tmp_path)
        np.testing.assert_array_equal(pairs.x, X[..., :1])
        assert pairs.names == ("theta_0", "theta_1")

    def test_will_not_overwrite(self, folder):
        with pytest.raises(ValueError, match="holds pairs already"):
            write_pairs(folder, THETA, X)

    @pytest.mark.parametrize("keep", [0, 100, -10])
    def test_damaged_file_is_named(self, folder, keep):
        file = folder / "pairs-00002.parquet"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"pairs-00002.parquet cannot be read .* may be damaged"):
            read_pairs(folder)

    def test_damaged_data_pages_are_named(self, folder):
        file = folder / "pairs-00002.parquet"
        content = bytearray(file.read_bytes())
        content[4:200] = b"\xff" * 196
        file.write_bytes(content)
        with pytest.raises(ValueError, match="pairs-00002.parquet"):
            read_pairs(folder)

    @pytest.mark.parametrize("values", [THETA, X], ids=["theta", "x"])
    def test_one_bit_of_a_number_is_enough(self, folder, values):
        """A reader that does not look at the checksums takes it for another number."""
        file = folder / "pairs-00002.parquet"
        content = bytearray(file.read_bytes())
        content[content.index(values[40:60].tobytes()[:16]) + 10] ^= 1
        file.write_bytes(content)
        pq.read_table(file)
        said = r"pairs-00002.parquet cannot be read .* may be damaged .*checksum"
        with pytest.raises(ValueError, match=said):
            read_pairs(folder)
        with pytest.raises(ValueError, match=said):
            list(iter_pairs(folder, 10, seed=0))

    def test_missing_empty_and_foreign(self, tmp_path):
        with pytest.raises(ValueError, match="not a folder of pairs"):
            read_pairs(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="holds no Parquet file"):
            read_pairs(tmp_path)
        pq.write_table(pa.table({"theta": [1.0, 2.0], "y": [1.0, 2.0]}), tmp_path / "foreign.parquet")
        with pytest.raises(ValueError, match="foreign.parquet must have columns theta and x .* theta of type double"):
            read_pairs(tmp_path)

    def test_nulls(self, tmp_path):
        column = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
        pq.write_table(pa.table({"theta": column, "x": column}), tmp_path / "nulls.parquet")
        with pytest.raises(ValueError, match="nulls.parquet has nulls in column theta"):
            read_pairs(tmp_path)

    def test_files_that_disagree(self, folder):
        write_pairs(folder.parent / "other", THETA, X, names=["a", "c"])
        (folder.parent / "other" / "pairs-00000.parquet").rename(folder / "pairs-00009.parquet")
        with pytest.raises(ValueError, match="pairs-00009.parquet does not belong with"):
            open_pairs(folder)

    def test_newer_format(self, folder, monkeypatch):
        monkeypatch.setattr(parquet, "FORMAT", 0)
        with pytest.raises(ValueError, match="has pairs format 1, this distsbi reads up to 0"):
            open_pairs(folder)

    def test_full_disk_leaves_what_was_written(self, tmp_path, monkeypatch):
        calls = []

        def fsync(_):
            calls.append(1)
            if len(calls) == 5:  # two a file: the file and its folder
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(
            OSError, match=r"pairs-00002.parquet could not be written \(No space left on device\)"
        ) as raised:
            write_pairs(tmp_path / "pairs", THETA, X, rows_per_file=20)
        assert raised.value.errno == errno.ENOSPC
        left = sorted(p.name for p in (tmp_path / "pairs").iterdir())
        assert left == ["_unfinished", "pairs-00000.parquet", "pairs-00001.parquet"]

    def test_a_cut_off_write_is_finished_by_the_same_call(self, tmp_path, monkeypatch):
        path, write = tmp_path / "pairs", parquet.write_file

        def failing(file, *args):
            if file.name == "pairs-00002.parquet":
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, *args)

        monkeypatch.setattr("distsbi.data.pairs.write_file", failing)
        with pytest.raises(OSError, match="No space left"):
            write_pairs(path, THETA, X, rows_per_file=20, source={"note": ("a", 1)})
        monkeypatch.setattr("distsbi.data.pairs.write_file", write)
        with pytest.raises(ValueError, match="was cut off before its 103 pairs; give the same command again"):
            open_pairs(path)
        kept = (path / "pairs-00001.parquet").stat().st_mtime_ns
        same = {"rows_per_file": 20, "source": {"note": ("a", 1)}}
        for theta, options in (
            (THETA, {**same, "rows_per_file": 10}),
            (THETA, {**same, "source": {}}),
            (THETA + 1, same),
        ):
            with pytest.raises(ValueError, match="was cut off while other pairs were written"):
                write_pairs(path, theta, X, **options)
        with pytest.raises(ValueError, match="was cut off while other pairs were written"):
            write_pairs(path, THETA[:60], X[:60], **same)
        assert len(write_pairs(path, THETA, X, **same)) == 103
        np.testing.assert_array_equal(read_pairs(path).x, X)
        assert (path / "pairs-00001.parquet").stat().st_mtime_ns == kept
        with pytest.raises(ValueError, match="holds pairs already"):
            write_pairs(path, THETA, X, **same)

    def test_permuted_tensors_of_other_writers(self, tmp_path):
        """An array whose axes are not C-ordered is written with a permutation."""
        image = RNG.normal(size=(5, 4, 3, 2)).astype(np.float32)
        theta = pa.FixedShapeTensorArray.from_numpy_ndarray(THETA[:5])
        for x, order in ((X[:5], (0, 2, 1)), (image, (0, 3, 2, 1)), (image, (0, 3, 1, 2))):
            stored = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(stored)
            assert column.type.permutation != sorted(column.type.permutation)
            pq.write_table(pa.table({"theta": theta, "x": column}), tmp_path / "mine.parquet")
            if order == (0, 3, 1, 2):  # a cycle, which pyarrow itself does not read back
                with pytest.raises(ValueError, match=r"mine.parquet has x .* write it from np.ascontiguousarray\(x\)"):
                    open_pairs(tmp_path)
            else:
                assert open_pairs(tmp_path).x_shape == x.shape[1:]
                np.testing.assert_array_equal(read_pairs(tmp_path).x, x)

    def test_a_column_of_strings_is_named(self, tmp_path):
        theta = pa.FixedShapeTensorArray.from_numpy_ndarray(THETA[:2])
        column = pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2))
        pq.write_table(pa.table({"theta": theta, "x": column}), tmp_path / "words.parquet")
        with pytest.raises(ValueError, match=r"words.parquet must have columns .* x of type fixed_size_list.*string"):
            read_pairs(tmp_path)


def simulate(folder, n=100, seed=3, **options):
    return simulate_pairs(
        get_task("two_moons"),
        jax.random.key(seed),
        n,
        folder,
        **{"batch": 16, "rows_per_file": 32, "progress": False, **options},
    )


class TestSimulate:
    def test_pairs_and_source(self, tmp_path):
        found = simulate(tmp_path / "s")
        assert found.rows == (32, 32, 32, 4)
        assert found.source["task"] == "two_moons"
        pairs = read_pairs(found)
        assert len(np.unique(pairs.theta[:, 0, 0])) == 100
        assert pairs.names == get_task("two_moons").parameter_names

    def test_resume_and_extension_equal_one_go(self, tmp_path):
        simulate(tmp_path / "parts", n=70)
        kept = (tmp_path / "parts" / "pairs-00000.parquet").stat().st_mtime_ns
        (tmp_path / "parts" / "pairs-00001.parquet").unlink()
        parts, whole = read_pairs(simulate(tmp_path / "parts")), read_pairs(simulate(tmp_path / "whole"))
        np.testing.assert_array_equal(parts.theta, whole.theta)
        np.testing.assert_array_equal(parts.x, whole.x)
        assert (tmp_path / "parts" / "pairs-00000.parquet").stat().st_mtime_ns == kept

    def test_a_bar_is_for_terminals(self, tmp_path, capsys):
        simulate_pairs(get_task("two_moons"), jax.random.key(3), 100, tmp_path / "s", batch=16, rows_per_file=32)
        assert capsys.readouterr().err == ""
        simulate(tmp_path / "s", progress=True)
        assert "simulating two_moons" in capsys.readouterr().err

    def test_another_simulation_is_refused(self, tmp_path):
        simulate(tmp_path / "s")
        for options in ({"seed": 4}, {"batch": 32}):
            with pytest.raises(ValueError, match="was not made by this simulation"):
                simulate(tmp_path / "s", **options)
        with pytest.raises(ValueError, match="holds 100 pairs, more than the 50 asked for"):
            simulate(tmp_path / "s", n=50)
        assert len(open_pairs(tmp_path / "s")) == 100

    def test_a_second_call_at_the_same_time_is_refused_and_writes_nothing(self, tmp_path, monkeypatch):
        """Begun before the first has a file, which would tell that they differ."""
        plain, found = pairs.write_file, []

        def write(path, *content):
            if not found:
                before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
                found.append(sorted(before))
                for options in ({"seed": 4}, {"n": 50}, {}):
                    with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on .*; wait, or"):
                        simulate(path.parent, **options)
                    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
            plain(path, *content)

        monkeypatch.setattr(pairs, "write_file", write)
        both = read_pairs(simulate(tmp_path / "s"))
        assert found == [["_lock", "_unfinished"]]
        np.testing.assert_array_equal(both.theta, read_pairs(simulate(tmp_path / "alone")).theta)
        assert len(simulate(tmp_path / "s", n=110)) == 110  # who comes after may go on

    def test_old_temporaries_are_removed_young_ones_left(self, tmp_path):
        (tmp_path / "s").mkdir()
        old, young = tmp_path / "s" / ".pairs-00000.parquet.a", tmp_path / "s" / ".pairs-00000.parquet.b"
        old.touch()
        young.touch()
        os.utime(old, (time.time() - 7200,) * 2)
        simulate(tmp_path / "s")
        assert young.exists()
        assert not old.exists()

    def test_killed_simulation_goes_on(self, tmp_path):
        """SIGKILL once the third file is there: every file is readable, and the resumed folder is that of one go."""
        code = (
            "import jax; from distsbi.data.pairs import simulate_pairs; from distsbi.tasks import get_task; import sys;"
            "simulate_pairs(get_task('two_moons'), jax.random.key(3), 100_000, sys.argv[1], batch=16, rows_per_file=32)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s")], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (tmp_path / "s" / "pairs-00002.parquet").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(ValueError, match="was cut off before its 100000 pairs; give the same command again"):
            open_pairs(tmp_path / "s")
        done = [parquet.read_footer(file).rows for file in (tmp_path / "s").glob("pairs-*.parquet")]
        assert set(done) == {32}
        n = sum(done) + 40
        resumed, whole = read_pairs(simulate(tmp_path / "s", n=n)), read_pairs(simulate(tmp_path / "whole", n=n))
        np.testing.assert_array_equal(resumed.theta, whole.theta)
        np.testing.assert_array_equal(resumed.x, whole.x)


def test_schema_note_is_plain_json(folder):
    note = json.loads(pq.read_schema(folder / "pairs-00000.parquet").metadata[b"distsbi.pairs"])
    assert note == {"format": 1, "names": ["a", "b"], "source": {"note": "test"}}


def test_plain_lists_of_one_length_are_pairs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    theta, x = np.arange(6.0).reshape(3, 2), np.arange(9.0).reshape(3, 3)
    (tmp_path / "lists").mkdir()
    pq.write_table(pa.table({"theta": theta.tolist(), "x": x.tolist()}), tmp_path / "lists" / "a.parquet")
    found = read_pairs(tmp_path / "lists")
    np.testing.assert_array_equal(found.theta[..., 0], theta)
    np.testing.assert_array_equal(found.x[..., 0], x)
    pq.write_table(
        pa.table({"theta": theta.tolist(), "x": [[1.0], [1.0, 2.0], [3.0]]}), tmp_path / "lists" / "a.parquet"
    )
    with pytest.raises(ValueError, match="lists of .1, 2. numbers in column x; all must have 1"):
        read_pairs(tmp_path / "lists")


def test_missing_entries_are_written_where_that_is_said(tmp_path):
    x = np.where(RNG.uniform(size=X.shape) < 0.2, np.nan, X)
    with pytest.raises(ValueError, match="entries of x that are missing may be NaN with missing=True"):
        write_pairs(tmp_path / "pairs", THETA, x)
    write_pairs(tmp_path / "pairs", THETA, x, missing=True)
    with pytest.raises(ValueError, match="NaN"):
        read_pairs(tmp_path / "pairs", missing=False)
    for missing in (None, True):
        np.testing.assert_array_equal(read_pairs(tmp_path / "pairs", missing=missing).x, x)
    assert open_pairs(tmp_path / "pairs").missing
