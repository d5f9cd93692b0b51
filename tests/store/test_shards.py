"""Shards: there if and only if whole, and readable by anything that reads Parquet."""

import errno
import importlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from distsbi import files, open_catalog
from distsbi.store import Format, Output, layout, record

DRAWS = np.random.default_rng(0).normal(size=(5, 7, 2, 1)).astype(np.float32)
DEFINITION = {"n_rows": 12, "rows_per_shard": 6, "posterior": "f00d", "catalog": {"content": "beef"}}


@pytest.fixture
def out(tmp_path):
    """A folder with two shards of six rows; row 1 of each has no draws."""
    path = tmp_path / "out"
    (path / layout.HIDDEN).mkdir(parents=True)
    record.begin(path, DEFINITION, {})
    form = Format(pa.string(), ("a", "b"), 1, 7, Output(), record.fingerprint(DEFINITION))
    for shard in range(2):
        rows = np.arange(6 * shard, 6 * shard + 6)
        status = ["ok", "invalid", *["ok"] * 4]
        table = form.table(
            pa.array([f"g{i}" for i in rows]),
            rows,
            rows.astype(np.uint64),
            status,
            [None, "x is null", *[None] * 4],
            DRAWS,
        )
        files.write_whole(layout.shard_file(path, shard, 2), lambda file, table=table: form.write(table, file))
    return path


def test_plain_pyarrow_reads_it(out):
    table = pq.read_table(out)
    assert table.num_rows == 12
    tensor = table.schema.field("draws").type
    assert isinstance(tensor, pa.FixedShapeTensorType)
    assert (tensor.shape, tensor.value_type) == ([7, 2, 1], pa.float32())
    assert table["draws"].null_count == table["mean"].null_count == 2
    good = table["draws"].combine_chunks().storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, 7, 2, 1)
    np.testing.assert_array_equal(good, np.concatenate([DRAWS, DRAWS]))
    np.testing.assert_allclose(table["mean"][2].as_py(), DRAWS[1, :, :, 0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["sd"][2].as_py(), DRAWS[1, :, :, 0].std(0, ddof=1), rtol=1e-6)
    about = json.loads(table.schema.metadata[b"distsbi"])
    assert (about["parameter_names"], about["draws_shape"]) == (["a", "b"], [7, 2, 1])
    assert ds.dataset(out).count_rows(filter=ds.field("status") == "ok") == 10
    column = pq.read_metadata(layout.shard_file(out, 0, 2)).row_group(0)
    encodings = {column.column(i).path_in_schema: column.column(i).encodings for i in range(column.num_columns)}
    assert not any("DICTIONARY" in e for e in encodings["draws.list.element"])


@pytest.mark.parametrize("reader", ["polars", "duckdb"])
def test_other_readers_read_it(out, reader):
    module = importlib.import_module(reader)
    glob = str(out / "*.parquet")
    rows = (
        module.read_parquet(glob).height
        if reader == "polars"
        else module.sql(f"select count(*) from '{glob}'").fetchall()[0][0]
    )
    assert rows == 12


def test_rows_come_in_groups_of_bytes(out, monkeypatch):
    monkeypatch.setattr("distsbi.store.schema.ROW_GROUP_BYTES", 400)
    form = Format(pa.string(), ("a", "b"), 1, 7, Output(), "f")
    table = pq.read_table(layout.shard_file(out, 0, 2)).replace_schema_metadata(form.schema().metadata)
    files.write_whole(out / "small.parquet", lambda file: form.write(table, file))
    assert pq.read_metadata(out / "small.parquet").num_row_groups == 3


def test_open(out):
    catalog = open_catalog(out)
    status = catalog.status()
    assert (status.shards, status.shards_done, status.rows, status.left) == (2, 2, 12, 0)
    assert status.counts == {"ok": 10, "invalid": 2, "failed": 0}
    assert status.complete
    np.testing.assert_array_equal(catalog.draws("g8"), DRAWS[1])
    assert catalog.summary().column_names == ["id", "status", "message"] + [
        f"{p}_{s}" for p in "ab" for s in ("mean", "sd", "q05", "q50", "q95")
    ]
    with pytest.raises(ValueError, match="there is no id 'g99'"):
        catalog.draws("g99")
    with pytest.raises(ValueError, match="ids of .* are string; got 8"):
        catalog.draws(8)
    with pytest.raises(ValueError, match="no column 'theta'; the columns are id, row"):
        catalog.table(["theta"])


def test_an_unfinished_catalog_shows_what_is_there(out):
    layout.shard_file(out, 0, 2).unlink()
    catalog = open_catalog(out)
    assert catalog.status().left == 6
    assert catalog.table(["row"])["row"].to_pylist() == list(range(6, 12))
    with pytest.raises(ValueError, match="among the finished shards"):
        catalog.draws("g0")
    assert catalog.verify() == []


def test_verify_names_what_is_wrong(out):
    assert open_catalog(out).verify() == []
    path = layout.shard_file(out, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in open_catalog(out).verify()[0]
    at = whole.index(DRAWS[3].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "cannot be read" in open_catalog(out).verify()[0]
    path.write_bytes(layout.shard_file(out, 0, 2).read_bytes())
    problems = open_catalog(out).verify()
    assert "must hold rows 6 to 11" in problems[0]
    assert "6 rows have an id that occurs before" in problems[1]


def test_status_names_a_damaged_shard(out):
    path = layout.shard_file(out, 1, 2)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{path.name} cannot be read .*; delete it and sample again"):
            open_catalog(out).status()
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        open_catalog(out).status()


def test_writing_is_whole_or_nothing(tmp_path):
    path = layout.shard_file(tmp_path, 3, 10)
    assert path.name == "shard-00000003-of-00000010.parquet"

    def breaks(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, breaks)
    assert list(tmp_path.iterdir()) == []
    files.write_whole(path, lambda file: file.write(b"first"))
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, breaks)
    assert path.read_bytes() == b"first"
    assert layout.shards_done(tmp_path, 10) == [3]
    with pytest.raises(ValueError, match="another division"):
        layout.shards_done(tmp_path, 11)


def test_what_is_no_catalog_is_refused(out, tmp_path):
    with pytest.raises(ValueError, match="no output folder of sample_catalog"):
        open_catalog(tmp_path)
    text = layout.run_file(out).read_text()
    layout.run_file(out).write_text(text[:40])
    with pytest.raises(ValueError, match="is damaged"):
        open_catalog(out)
    layout.run_file(out).write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99; this distsbi reads up to 1"):
        open_catalog(out)
    layout.run_file(out).unlink()
    with pytest.raises(ValueError, match="has shards but no run.json"):
        record.begin(out, DEFINITION, {})


def test_a_torn_journal_line_is_left_out(out):
    layout.append_journal(out, {"event": "done", "shard": 0})
    with open(layout.journal_file(out), "a") as file:
        file.write('{"event": "do')
    assert [line["shard"] for line in layout.read_journal(out)] == [0]
