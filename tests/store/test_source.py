"""Catalogs that come in: every form gives the same rows, in any ranges, and says what is wrong with it."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi.store import SourceSpec, open_source, parquet, source
from distsbi.store.place import Place
from distsbi.store.rows import rows_of
from distsbi.store.source import check_ids, fingerprint, glance

N = 23
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
IDS = [f"g{i}" for i in range(N)]


def all_ids(opened):
    return [value for chunk in opened.id_chunks() for value in chunk.to_pylist()]


def tensor(x):
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(x))


def nested(x):
    return pa.array([row[:, None].tolist() for row in x], pa.list_(pa.list_(pa.float32())))


COLUMNS = {
    "list": {"x": pa.array(X.tolist(), pa.list_(pa.float64()))},
    "large_list": {"x": pa.array(X.tolist(), pa.large_list(pa.float32()))},
    "fixed_list": {"x": pa.array(X.tolist(), pa.list_(pa.float32(), 3))},
    "tensor": {"x": tensor(X[:, :, None])},
    "nested": {"x": nested(X)},
    "scalars": {"u": X[:, 0], "v": X[:, 1], "w": X[:, 2]},
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kept", [0, 2**28])
def test_parquet(tmp_path, monkeypatch, kind, folder, kept):
    monkeypatch.setattr(parquet, "GROUP_BYTES", kept)
    table = pa.table({"id": IDS, **COLUMNS[kind]})
    path = tmp_path / ("catalog" if folder else "catalog.parquet")
    if folder:
        path.mkdir()
        (path / "_SUCCESS").touch()
        for i, (a, b) in enumerate([(0, 5), (5, 5), (5, N)]):
            pq.write_table(table.slice(a, b - a), path / f"part-{i}.parquet", row_group_size=4)
    else:
        pq.write_table(table, path, row_group_size=4)
    spec = SourceSpec(str(path), x_columns=("u", "v", "w") if kind == "scalars" else None)
    opened = open_source(spec)
    assert opened.n_rows == N
    check_ids(opened, spec)
    for start, stop in ((0, N), (3, 4), (3, 17), (22, 23)):
        ids, rows = opened.read(start, stop)
        assert ids.to_pylist() == IDS[start:stop]
        np.testing.assert_array_equal([row.ravel() for row in rows], X[start:stop])
        assert {row.shape for row in rows} == {(3, 1) if kind in ("tensor", "nested") else (3,)}


class Counted(io.FileIO):
    """A file that counts the bytes that are read."""

    def readinto(self, buffer):
        count = super().readinto(buffer)
        COUNTS.append(count)
        return count

    def read(self, size=-1):
        content = super().read(size)
        COUNTS.append(len(content))
        return content


COUNTS = []


@pytest.fixture
def one_group(tmp_path, monkeypatch):
    """A row group of 2 MB in pages of 8 kB, which is to be read in parts of 64 kB, and the bytes of its two columns, x and the other."""
    monkeypatch.setattr(parquet, "GROUP_BYTES", 2**18)
    monkeypatch.setattr(parquet, "PART_BYTES", 2**16)
    monkeypatch.setattr(parquet, "BUFFER_BYTES", 2**13)
    monkeypatch.setattr(Place, "open", lambda self: pa.PythonFile(Counted(self.path), mode="r"))
    parquet._warn.cache_clear()
    x = np.random.default_rng(1).normal(size=(10_000, 25)).astype(np.float32)
    table = pa.table({"id": np.arange(10_000), "x": list(x), "more": list(x)})
    path = tmp_path / "one.parquet"
    pq.write_table(table, path, data_page_size=2**13, use_dictionary=False, compression="none")
    assert pq.read_metadata(path).num_row_groups == 1
    return str(path), x


def test_a_large_row_group_is_read_once_by_ranges_that_lie_further_on(one_group, caplog):
    path, x = one_group
    opened = open_source(SourceSpec(path))
    COUNTS.clear()

    def read(start, stop):
        ids, rows = opened.read(start, stop)
        np.testing.assert_array_equal(ids.to_numpy(), np.arange(start, stop))
        np.testing.assert_array_equal(rows, x[start:stop])
        return sum(COUNTS) / (x.nbytes + 8 * len(x))  # of what all rows take

    assert read(0, 500) < 0.3
    for start in range(1_000, 10_000, 1_000):  # of every second shard, as one of two workers takes them
        read(start, start + 500)
    assert 0.9 < read(9_900, 10_000) < 1.2
    assert 0.9 < read(9_870, 10_000) < 1.2  # in the part that is at hand
    read(300, 700)  # a shard that is tried again
    read(650, 660)
    opened = open_source(SourceSpec(path))
    (warning,) = caplog.messages
    assert "one.parquet has a row group of more than" in warning
    assert "write the file again with row_group_size=580 " in warning


def test_after_an_error_a_large_row_group_is_begun_again(one_group, monkeypatch):
    path, x = one_group
    opened = open_source(SourceSpec(path))
    opened.read(0, 500)
    plain = Counted.read
    monkeypatch.setattr(Counted, "read", lambda self, size=-1: plain(self, size)[:0])
    with pytest.raises(OSError):
        opened.read(500, 5_000)
    monkeypatch.setattr(Counted, "read", plain)
    np.testing.assert_array_equal(opened.read(500, 5_000)[1], x[500:5_000])


def test_a_row_group_is_as_large_as_the_columns_that_are_read(one_group, monkeypatch, caplog):
    path, x = one_group
    monkeypatch.setattr(parquet, "GROUP_BYTES", x.nbytes * 3 // 2)
    opened = open_source(SourceSpec(path))
    opened.read(0, 500)
    COUNTS.clear()
    np.testing.assert_array_equal(opened.read(9_000, 9_100)[1], x[9_000:9_100])
    assert not COUNTS  # it is kept
    assert not caplog.messages


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_numpy(tmp_path, suffix):
    path = tmp_path / f"catalog.{suffix}"
    if suffix == "npy":
        np.save(path, X)
        with pytest.raises(ValueError, match="no id column 'name'.*id_column=None"):
            open_source(SourceSpec(str(path), id_column="name"))
    else:
        np.savez(path, x=X, id=np.arange(N) + 100)
        with pytest.raises(ValueError, match="no id column 'name'.*id_column=None"):
            open_source(SourceSpec(str(path), id_column="name"))
    opened = open_source(SourceSpec(str(path)))
    ids, rows = opened.read(4, 9)
    assert ids.to_pylist() == list(range(4, 9) if suffix == "npy" else range(104, 109))
    np.testing.assert_array_equal(rows, X[4:9])


@pytest.mark.parametrize(
    "ids",
    [
        np.asarray([2**63 + 1, 1, 2**64 - 1], np.uint64),
        np.asarray([-5, 1, 7], np.int16),
        np.asarray([5, 1, 7], ">i4"),
        np.asarray(["b", "", "aa"]),
        np.asarray([b"b", b"c", b"aa"]),
    ],
)
def test_numpy_ids_of_any_kind(tmp_path, ids):
    path = tmp_path / "c.npz"
    np.savez(path, x=np.zeros((3, 2)), id=ids)
    opened = open_source(SourceSpec(str(path)))
    assert opened.read(0, 3)[0].to_pylist() == all_ids(opened) == ids.tolist()
    assert {chunk.type for chunk in opened.id_chunks()} == {opened.id_type}


def test_numpy_that_cannot_be_used(tmp_path):
    path = tmp_path / "c.npz"
    for ids, found in (
        (np.asarray(7), "int64 of shape ()"),
        (np.zeros((3, 1), int), "shape (3, 1)"),
        (X[:, 0], "float32"),
    ):
        np.savez(path, x=np.zeros((3, 2)), id=ids)
        with pytest.raises(ValueError, match=f"^ids must be integers or strings, one per row; .*{re.escape(found)}"):
            open_source(SourceSpec(str(path)))
    np.savez_compressed(path, x=X, id=np.arange(N))
    whole = path.read_bytes()
    for broken in (whole[:-40], whole[:60], whole.replace(whole[120:140], bytes(20))):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"c.npz is no readable .npz file"):
            open_source(SourceSpec(str(path)))


def test_a_null_inside_x_is_nan_and_a_null_x_is_a_reason(tmp_path):
    x = pa.array([[1.0, 2.0], None, [1.0, None], []], pa.list_(pa.float64()))
    deep = pa.array([[[1.0], [2.0]], None, [[1.0], [2.0, 3.0]], [[None], [1.0]]])
    holes = pa.array([[[1.0], None], [], [[1.0], [2.0]], [[3.0], [4.0]]])
    storage = pa.array([[1, 2], None, [None, 4], [5, 6]], pa.list_(pa.float32(), 2))
    cube = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (2, 1)), storage)
    columns = {"x": x, "deep": deep, "holes": holes, "cube": cube, "fixed": storage}
    columns |= {"u": [1.0, None, 3.0, None], "v": pa.array([1, 2, None, None], pa.int32())}
    path = tmp_path / "holes.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3, 4], **columns}), path)

    def rows(x_column="x", **spec):
        return open_source(SourceSpec(str(path), x_column=x_column, **spec)).read(0, 4)[1]

    nan = float("nan")
    assert rows()[1] == rows("deep")[1] == rows("cube")[1] == rows("fixed")[1] == rows("u")[1] == "x is null"
    np.testing.assert_array_equal(rows()[2], [1.0, nan])
    assert rows()[3].shape == rows("holes")[1].shape == (0,)
    np.testing.assert_array_equal(rows("deep")[3], [[nan], [1.0]])
    assert rows("deep")[2] == "x is ragged: inner lists of lengths [1, 2]"
    assert rows("holes")[0] == "an inner list of x is null"
    np.testing.assert_array_equal(rows("cube")[2], [[nan], [4.0]])
    np.testing.assert_array_equal(rows("fixed")[2], [nan, 4.0])
    scalars = rows(x_columns=("u", "v"))
    assert scalars[3] == "x is null"
    np.testing.assert_array_equal(scalars[:3], [[1, 1], [nan, 2], [3, nan]])
    mixed = rows(x_columns=("u", "x", "cube"))
    assert mixed[1] == "x is null"
    np.testing.assert_array_equal(mixed[2], [3, 1, nan, nan, 4])
    np.testing.assert_array_equal(mixed[3], [nan, 5, 6])


@pytest.mark.parametrize("permutation", [[0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 1, 0], [2, 0, 1], [1, 2, 0]])
def test_permuted_tensors(permutation):
    """Arrow: "the i-th dimension of the logical view corresponds to the dimension with number permutations[i] of the
    physical tensor"."""
    physical = np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(physical.ravel()), 24)
    tensors = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), (2, 3, 4), permutation=permutation), storage
    )
    rows = np.stack(rows_of(tensors))
    own = tensors.to_numpy_ndarray()
    assert rows.shape == own.shape
    if permutation == np.argsort(permutation).tolist():  # pyarrow 26 repeats elements where it is not its own inverse
        np.testing.assert_array_equal(rows, own)
    for at in np.ndindex(2, 3, 4):
        assert (rows[(0, *(at[axis] for axis in permutation))]) == physical[(0, *at)]


def test_files_of_a_folder_may_write_x_in_different_types(tmp_path):
    forms = ["list", "fixed_list", "tensor", "large_list"]
    tables = [pa.table({"id": IDS, **COLUMNS[form]}).slice(5 * i, 5) for i, form in enumerate(forms)]
    nothing = pa.table({"id": pa.array(["n"]), "x": pa.nulls(1)})  # what pandas makes of x that is null in every row
    for i, table in enumerate([pa.table({"id": pa.nulls(0)}), *tables, nothing]):
        pq.write_table(table, tmp_path / f"part-{i}.parquet", row_group_size=2)
    spec = SourceSpec(str(tmp_path))
    opened = open_source(spec)
    check_ids(opened, spec)
    ids, rows = opened.read(3, 21)
    assert ids.to_pylist() == [*IDS[3:20], "n"]
    np.testing.assert_array_equal([row.ravel() for row in rows[:-1]], X[3:20])
    assert rows[-1] == "x is null"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"id": ["a"], "y": [[1.0]]}, "part-1.parquet has no column 'x' for x"),
        ({"name": [1], "x": [[1.0]]}, "part-1.parquet has no id column 'id'"),
        ({"id": [1], "x": ["text"]}, "column 'x' of .*part-1.parquet must hold numbers"),
        ({"id": [1.5], "x": [[1.0]]}, "'id' of .*part-1.parquet has type double"),
        ({"id": ["a"], "x": [[1.0]]}, "'id' is int64 in .*part-0.parquet and string in .*part-1.parquet. Convert it"),
    ],
)
def test_every_file_of_a_folder_is_checked(tmp_path, second, message):
    pq.write_table(pa.table({"id": pa.array([1], pa.int32()), "x": [[1.0]]}), tmp_path / "part-0.parquet")
    pq.write_table(pa.table(second), tmp_path / "part-1.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(SourceSpec(str(tmp_path)))
    pq.write_table(pa.table({"id": pa.array([2], pa.int64()), "x": [[1]]}), tmp_path / "part-1.parquet")
    assert all_ids(open_source(SourceSpec(str(tmp_path)))) == [1, 2]


def test_ids_that_cannot_be_used(tmp_path):
    path = tmp_path / "c.parquet"
    for ids, message in (
        (pa.array([1, None, 3]), "1 rows of .* have no 'id' .the first is row 1"),
        (pa.array(["a", "b", "a"]), r"'a' \(2 times\).*id_column=None"),
        (pa.array([1.0, 2.0, 3.0]), "ids must be integers or strings; 'id' of .* has type double"),
        (pa.array([], pa.int64()), "has no rows"),
    ):
        pq.write_table(pa.table({"id": ids, "x": pa.array([[1.0]] * len(ids), pa.list_(pa.float64()))}), path)
        spec = SourceSpec(str(path))
        with pytest.raises(ValueError, match=message):
            check_ids(open_source(spec), spec)


@pytest.mark.parametrize(
    "kind", [pa.uint64(), pa.int16(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.binary()]
)
def test_ids_of_any_kind(tmp_path, kind):
    path = tmp_path / "c.parquet"
    values = [2, 1, 3] if pa.types.is_integer(kind) else [b"b", b"a", b"c"] if kind == pa.binary() else ["b", "a", "c"]
    pq.write_table(pa.table({"id": pa.array(values).cast(kind), "x": [[1.0]] * 3}), path)
    opened = open_source(SourceSpec(str(path)))
    assert opened.read(1, 3)[0].to_pylist() == values[1:]
    assert {chunk.type for chunk in opened.id_chunks()} == {opened.id_type}


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the kind")
    (tmp_path / "bad.npy").write_bytes(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").touch()
    np.savez(tmp_path / "uneven.npz", id=np.arange(3), x=np.zeros((4, 2)))
    pq.write_table(pa.table({"id": [1], "x": ["text"]}), tmp_path / "text.parquet")
    for name, message in (
        ("none.parquet", "there is no catalog at"),
        ("bad.parquet", "no readable Parquet file"),
        ("bad.npy", "no readable .npy file"),
        ("empty", "has no .parquet files"),
        ("table.csv", "give a Parquet file, a folder of them"),
        ("uneven.npz", "as many rows each; got {'x': 4, 'id': 3}"),
        ("text.parquet", "column 'x' of .* must hold numbers.*type string"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(SourceSpec(str(tmp_path / name)))


def test_fingerprint_is_of_the_content(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X)
    first = fingerprint(SourceSpec(str(tmp_path / "a.npy")))
    assert first == fingerprint(SourceSpec(str(tmp_path / "b.npy")))
    changed = X.copy()
    changed[20, 2] += 1e-6
    np.save(tmp_path / "b.npy", changed)
    assert first != fingerprint(SourceSpec(str(tmp_path / "b.npy")))


def test_a_glance_tells_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "GLANCE_BYTES", 64)
    spec = SourceSpec(str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", X)
    whole = (tmp_path / "a.npy").read_bytes()
    first = glance(spec)
    for changed in (whole[:-1] + b"\x01", b"\x01" + whole[1:], whole + b"\x01", whole[:-4]):
        (tmp_path / "a.npy").write_bytes(changed)
        assert glance(spec) != first
    (tmp_path / "a.npy").write_bytes(whole)
    assert glance(spec) == first
    (tmp_path / "folder").mkdir()
    for part in range(2):
        pq.write_table(pa.table({"x": [[part]]}), tmp_path / "folder" / f"{part}.parquet")
    both = glance(SourceSpec(str(tmp_path / "folder")))
    (tmp_path / "folder" / "1.parquet").unlink()
    assert glance(SourceSpec(str(tmp_path / "folder"))) != both
