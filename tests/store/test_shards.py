"""Shards: there if and only if whole, and readable by anything that reads Parquet."""

import errno
import importlib
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from distsbi import files, open_catalog
from distsbi.store import Format, Output, layout, record
from distsbi.store.catalog import NoDraws
from distsbi.store.status import OTHER, count_reasons, most_frequent

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


def test_a_shard_without_a_good_row(out):
    form = Format(pa.string(), ("a", "b"), 1, 7, Output(), record.fingerprint(DEFINITION))
    rows = np.arange(6, 12)
    table = form.table(pa.array(list("uvwxyz")), rows, rows, ["failed"] * 6, ["no"] * 6, DRAWS[:0])
    layout.shard_file(out, 1, 2).write_bytes(form.encode(table))
    catalog = open_catalog(out)
    assert catalog.verify() == []
    assert catalog.status().counts == {"ok": 5, "invalid": 1, "failed": 6, "quarantined": 0}
    assert catalog.status().reasons == {"failed: no": 6, "invalid: x is null": 1}
    assert catalog.table(["draws"])["draws"].null_count == 7


def test_open(out):
    catalog = open_catalog(out)
    status = catalog.status()
    assert (status.shards, status.shards_done, status.rows, status.left) == (2, 2, 12, 0)
    assert status.counts == {"ok": 10, "invalid": 2, "failed": 0, "quarantined": 0}
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


def test_observations_by_id(out, monkeypatch):
    catalog = open_catalog(out)
    good = [f"g{i}" for i in range(12) if i % 6 != 1]
    assert list(catalog) == good
    assert len(catalog) == 10
    assert "g8" in catalog
    assert not {"g7", "g99", 8} & set(catalog) and "g7" not in catalog and 8 not in catalog
    items = dict(catalog.items())
    assert list(items) == good
    for id, draws in items.items():
        np.testing.assert_array_equal(draws, catalog[id])
    np.testing.assert_array_equal(catalog.draws_of(["g9", "g0", "g9"]), DRAWS[[2, 0, 2]])
    with pytest.raises(KeyError):
        catalog["g99"]
    with pytest.raises(ValueError, match="id 'g7' has no draws: invalid, x is null"):
        catalog.draws_of(["g0", "g7"])


def test_many_ids_are_looked_up_at_once(out, monkeypatch):
    catalog = open_catalog(out)
    calls = []

    class Counted:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(pc, name)

    monkeypatch.setattr(importlib.import_module("distsbi.store.catalog"), "pc", Counted())
    catalog.draws_of(["g9"])
    of_one = len(calls)
    np.testing.assert_array_equal(catalog.draws_of(["g9", "g0", "g11", "g2"]), DRAWS[[2, 0, 4, 1]])
    assert len(calls) == 2 * of_one > 0
    assert catalog.draws_of([]).shape == (0, 7, 2, 1)
    for ids, said in (
        (["g0", "g99", "g98"], "there is no id 'g99'"),
        (["g0", 8, "g99"], "ids of .* are string; got 8"),
        (["g0", None], "there is no id None"),
    ):
        with pytest.raises(NoDraws, match=said):
            catalog.draws_of(ids)
    layout.shard_file(out, 1, 2).unlink()
    with pytest.raises(NoDraws, match="there is no id 'g9' in .* among the finished shards"):
        open_catalog(out).draws_of(["g0", "g9"])


def test_xarray(out, monkeypatch):
    pytest.importorskip("xarray")
    catalog = open_catalog(out)
    every = catalog.to_xarray()
    assert every.dims == ("observation", "draw", "parameter")
    assert every.shape == (10, 7, 2)
    np.testing.assert_array_equal(every.sel(observation="g8", parameter="b"), DRAWS[1, :, 1, 0])
    for one in ("g9", ["g9"]):
        assert catalog.to_xarray(one).observation.values.tolist() == ["g9"]
    monkeypatch.setattr("distsbi.store.export.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="all 10 rows take 0 GB; give ids"):
        catalog.to_xarray()


def test_xarray_of_an_id_of_bytes(out):
    pytest.importorskip("xarray")
    for shard in range(2):
        table = pq.read_table(layout.shard_file(out, shard, 2))
        table = table.set_column(0, "id", table["id"].cast(pa.binary()))
        pq.write_table(table, layout.shard_file(out, shard, 2))
    found = open_catalog(out).to_xarray(b"g9")
    assert found.observation.values.tolist() == [b"g9"]
    np.testing.assert_array_equal(found[0], DRAWS[2, :, :, 0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_arviz(out):
    arviz = pytest.importorskip("arviz")
    data = open_catalog(out).to_inference_data("g8")
    assert set(data["posterior"].data_vars) == {"a", "b"}
    np.testing.assert_array_equal(data["posterior"]["a"], DRAWS[1, :, 0, 0][None])
    assert arviz.summary(data, kind="stats").shape[0] == 2


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
    assert len(problems) == 1


def test_damage_is_told_when_it_is_read(out):
    """One shard is cut off, then one number of its draws is another: what reads it says which and what to do; the other's rows come."""
    file = layout.shard_file(out, 1, 2)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for read in (lambda c: c["g0"], lambda c: c.summary(), len):
        with pytest.raises(ValueError, match=r"cannot be read .*shard-00000001-of-00000002.*--repair"):
            read(open_catalog(out))
    with pytest.raises(ValueError, match=f"^{file} cannot be read"):
        list(open_catalog(out).items())
    at = whole.index(DRAWS[2].tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    catalog = open_catalog(out)
    assert len(catalog) == 10
    np.testing.assert_array_equal(catalog["g3"], DRAWS[2])
    with pytest.raises(ValueError, match=f"^{file} cannot be read .*--repair"):
        catalog["g9"]


def test_status_names_a_damaged_shard(out):
    path = layout.shard_file(out, 1, 2)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b""):
        path.write_bytes(broken)
        found = open_catalog(out).status()
        assert (found.damaged, found.shards_done, found.left, found.complete) == ((1,), 1, 6, False)
    pq.write_table(pa.table({"id": [1]}), path)
    assert open_catalog(out).status().damaged == (1,)


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
    with pytest.raises(ValueError, match="no output folder of sample_catalog or simulate"):
        open_catalog(tmp_path)
    text = layout.run_file(out).read_text()
    layout.run_file(out).write_text(text[:40])
    with pytest.raises(ValueError, match="is damaged"):
        open_catalog(out)
    layout.run_file(out).write_text(text.replace('"format": 2', '"format": 99'))
    with pytest.raises(ValueError, match="format 99; this distsbi reads up to 2"):
        open_catalog(out)
    layout.run_file(out).unlink()
    with pytest.raises(ValueError, match="holds shards of a catalog, but no _distsbi/run.json"):
        record.begin(out, DEFINITION, {})


def test_a_torn_journal_line_is_left_out(out):
    layout.Journal(out).add({"event": "done", "shard": 0})
    with open(layout.journal_file(out), "a") as file:
        file.write('{"event": "do')
    assert [line["shard"] for line in layout.read_journal(out)] == [0]
    layout.Journal(out).add({"event": "done", "shard": 1})
    assert [line["shard"] for line in layout.read_journal(out)] == [0, 1]


@pytest.mark.parametrize("line", ["{}", "[]", "7", '"event"', "null", "\xff"])
def test_a_journal_line_that_is_no_event_is_left_out(out, line):
    layout.Journal(out).add({"event": "began", "shards": 2})
    with open(layout.journal_file(out), "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    assert [found["event"] for found in layout.read_journal(out)] == ["began"]
    assert open_catalog(out).status().complete


def test_what_interrupted_attempts_left_is_removed(out):
    """Also beside run.json and the records of failures; what is not ours, or is whole, stays."""
    failures, part = out / layout.HIDDEN / "failures", "0123456789abcdef" * 2
    failures.mkdir()
    shard = layout.shard_file(out, 1, 3).name
    left = [
        out / f".{shard}.{part}",
        failures / f".{shard}.{part}",
        layout.run_file(out).with_name(f".run.json.{part}"),
    ]
    stays = [failures / shard, layout.run_file(out), out / ".DS_Store", out / f".mine.{part}", failures / ".nfs0001"]
    for file in [*left, *stays]:
        file.touch()
    assert layout.remove_partial(out) == len(left)
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in stays)
    assert layout.remove_partial(out) == 0


def test_a_line_that_must_not_be_lost_is_on_the_disk(out, monkeypatch):
    fsync, synced = os.fsync, {}

    def noting(handle):
        found = os.fstat(handle)
        synced[found.st_ino] = found.st_size
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    journal, file = layout.Journal(out), layout.journal_file(out)
    file.unlink(missing_ok=True)
    journal.add({"event": "done", "shard": 0})
    assert file.parent.stat().st_ino in synced
    assert file.stat().st_ino not in synced
    journal.add({"event": "quarantined", "shard": 0, "row": 1}, now=True)
    assert synced[file.stat().st_ino] == file.stat().st_size


def test_rows_that_fail_alike_count_together():
    """Numbers in what a user's code raised do not tell reasons apart; those in what is said of a row's data do."""
    status = ["ok", *["failed"] * 30, "invalid", "invalid"]
    message = [
        None,
        *(f"Explosion: {i} events at t={i / 7:.3e}" for i in range(30)),
        "x has 2 values",
        "x has 3 values",
    ]
    table = pa.table({"status": status, "message": message})
    assert count_reasons(table) == {
        "failed: Explosion: # events at t=#": 30, "invalid: x has 2 values": 1, "invalid: x has 3 values": 1
    }  # fmt: skip
    assert most_frequent({"a": 3, OTHER: 4, "b": 1}, 1) == {"a": 3, OTHER: 5}
    alike = {f"2 values that are no float32, the first at entry {i} of x_0": 1 for i in range(3)}
    assert most_frequent(alike, 1) == {"# values that are no float32, the first at entry # of x_0": 3}
