"""Catalogs that come in: every form gives the same rows, in any ranges, and says what is wrong with it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi.store import SourceSpec, open_source, source
from distsbi.store.source import check_ids, fingerprint

N = 23
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
IDS = [f"g{i}" for i in range(N)]


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
    monkeypatch.setattr(source, "GROUP_BYTES", kept)
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


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_numpy(tmp_path, suffix):
    path = tmp_path / f"catalog.{suffix}"
    if suffix == "npy":
        np.save(path, X)
        with pytest.raises(ValueError, match="no id column 'id'.*id_column=None"):
            open_source(SourceSpec(str(path)))
        spec = SourceSpec(str(path), id_column=None)
    else:
        np.savez(path, x=X, id=np.arange(N) + 100)
        spec = SourceSpec(str(path))
    opened = open_source(spec)
    ids, rows = opened.read(4, 9)
    assert ids.to_pylist() == list(range(4, 9) if suffix == "npy" else range(104, 109))
    np.testing.assert_array_equal(rows, X[4:9])


def test_rows_without_x_say_why(tmp_path):
    x = pa.array([[1.0, 2.0], None, [1.0, None], []], pa.list_(pa.float64()))
    deep = pa.array([[[1.0], [2.0]], None, [[1.0], [2.0, 3.0]], [[None], [1.0]]])
    path = tmp_path / "holes.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "x": x, "deep": deep, "u": [1.0, None, 3.0, 4.0]}), path)
    rows = open_source(SourceSpec(str(path))).read(0, 4)[1]
    assert rows[1:3] == ["x is null", "x has 1 null values"]
    assert rows[3].shape == (0,)
    deep_rows = open_source(SourceSpec(str(path), x_column="deep")).read(0, 4)[1]
    assert deep_rows[0].shape == (2, 1)
    assert deep_rows[1:] == ["x is null", "x is ragged: inner lists of lengths [1, 2]", "x has 1 null values"]
    assert open_source(SourceSpec(str(path), x_columns=("u",))).read(0, 4)[1][1] == "u is null"


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
    assert opened.ids().type == opened.id_type


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
