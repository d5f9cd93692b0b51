"""Catalogs that come from an object store and go there: an S3 server on this machine, and fsspec's memory."""

import contextlib
import dataclasses
import json
import threading
import time
import traceback
import types
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi.store import SourceSpec, layout, open_source, record, writer
from distsbi.store.place import Place, as_place, shown
from distsbi.store.source import check_ids, fingerprint, glance

X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
IDS = [f"g{i}" for i in range(23)]


@pytest.fixture(params=["s3", "memory", "local"])
def root(request, tmp_path, monkeypatch) -> Place:
    monkeypatch.setattr(writer, "SETTLE_SECONDS", 0.01)
    if request.param == "local":
        return as_place(tmp_path.as_uri())
    if request.param == "memory":
        pytest.importorskip("fsspec")
        return as_place(f"memory://{uuid.uuid4().hex}")
    return as_place(request.getfixturevalue("s3").format(uuid.uuid4().hex))


def test_files_are_whole_and_listed(root):
    assert root.files() == []
    assert not (root / "a").exists()
    with pytest.raises(FileNotFoundError):
        (root / "a").read()
    (root / "a").remove()
    root.make_folder()
    (root / "deep").make_folder()
    for name, size in (("b", 10), ("a", 0), ("deep/c", 3)):
        (root / name).write(bytes(size))
    assert [(file.name, file.size) for file in root.files()] == [("a", 0), ("b", 10)]
    assert [file.name for file in root.files(deep=True)] == ["a", "b", "deep/c"]
    (root / "b").write(b"again")
    again = as_place((root / "b").url)
    assert again.read() == again.open().read() == b"again"
    assert (root / "deep").is_folder()
    assert again.is_file()
    again.remove()
    assert not again.exists()


class LosesTheEnd:
    """A store that keeps half of what it is sent, for so many times, and says nothing."""

    def __init__(self, fs, times):
        self.fs, self.times = fs, times
        self.delete_file = fs.delete_file

    def open_output_stream(self, path):
        file = self.fs.open_output_stream(path)
        self.times -= 1
        if self.times < 0:
            return file
        return contextlib.closing(
            types.SimpleNamespace(write=lambda content: file.write(content[: len(content) // 2]), close=file.close)
        )

    def get_file_info(self, path):
        return self.fs.get_file_info(path)


def test_what_a_store_did_not_keep_is_no_file_that_was_written(bucket):
    file = dataclasses.replace(bucket / "a", fs=LosesTheEnd(bucket.fs, 5))
    with pytest.raises(OSError, match=r"memory://.*/a was sent 1,000 bytes 3 times, and the store kept 500"):
        file.write(bytes(1000))
    assert not (bucket / "a").exists()
    file.write(bytes(1000))
    assert (bucket / "a").info().size == 1000


def test_names_without_secrets():
    place = as_place("s3://key:secret@bucket/out?region=eu&scheme=http") / "b"
    assert place.url == "s3://key:secret@bucket/out/b?region=eu&scheme=http"
    assert place.path == "bucket/out/b"
    assert str(place) == "s3://bucket/out/b"
    assert place.without_secrets == "s3://bucket/out/b?region=eu&scheme=http"
    with pytest.raises(ValueError, match="nowhere://a is no address that can be opened"):
        as_place("nowhere://a")


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("s3://AKIA:abc/def+SECRET@bucket/a@b?region=eu", "s3://b?region=eu"),  # of a URI that nothing opens: rather too much
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("s3://AKIA:SECRET@bucket/a?secret_key=SECRET&scheme=http&X-Amz-Security-Token=SECRET", "s3://bucket/a?scheme=http"),
        ("gs://anonymous@bucket/out", "gs://anonymous@bucket/out"),
        ("abfss://container@account.dfs.core.windows.net/cat", "abfss://container@account.dfs.core.windows.net/cat"),
        ("abfss://:SECRET@account.dfs.core.windows.net/c", "abfss://account.dfs.core.windows.net/c"),
        ("abfs://c@a/x?tenant_id=1&client_secret=SECRET&credential_kind=default", "abfs://c@a/x?tenant_id=1&credential_kind=default"),
        ("sftp://me:p@SECRET@host:22/a", "sftp://me@host:22/a"),
        ("hdfs://namenode:8020/a@b", "hdfs://namenode:8020/a@b"),
        ("dav://[::1]:80/a@b", "dav://[::1]:80/a@b"),
        ("file name @ home", "file name @ home"),
    ],
)  # fmt: skip
def test_secrets_alone_are_left_out(url, written):
    assert shown(url) == written


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:abc/def+SECRET@bucket",
        "s3://AKIA:abc SECRET@bucket",
        "s3://AKIA:SECRET@bucket/a?secret_key=SECRET&nothing=1",
        "nowhere://me:abc%20SECRET@host",
    ],
)
def test_a_refusal_tells_no_secrets(url):
    with pytest.raises(ValueError, match="bucket|host") as refused:
        as_place(url)
    assert "SECRET" not in "".join(traceback.format_exception(refused.value))
    assert "AKIA" not in str(refused.value)


def put(root: Place, kind: str) -> SourceSpec:
    """A catalog of some kind; .npy has no ids."""
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"id": IDS, "x": list(X)}), sink, row_group_size=7)
        (root / "c.parquet").write(sink.getvalue())
        return SourceSpec((root / "c.parquet").url)
    if kind == "folder":
        (root / "c").make_folder()
        for part in range(2):
            sink = pa.BufferOutputStream()
            rows = slice(15 * part, 15 * part + 15)
            pq.write_table(pa.table({"id": IDS[rows], "x": list(X[rows])}), sink)
            (root / f"c/part-{part}.parquet").write(sink.getvalue())
        return SourceSpec((root / "c").url)
    if kind in ("npy", "npz", "npz_compressed"):
        import io

        file = io.BytesIO()
        {
            "npy": lambda: np.save(file, X),
            "npz": lambda: np.savez(file, x=X, id=np.asarray(IDS)),
            "npz_compressed": lambda: np.savez_compressed(file, x=X, id=np.asarray(IDS)),
        }[kind]()
        (root / f"c.{kind[:3]}").write(file.getvalue())
        return SourceSpec((root / f"c.{kind[:3]}").url)
    zarr = pytest.importorskip("zarr")
    version = int(kind[-1])
    group = zarr.open_group(store := zarr.storage.MemoryStore(), mode="w", zarr_format=version)
    group.create_array("x", data=X, chunks=(5, 3))
    group.create_array("id", shape=(23,), dtype=str, chunks=(6,))[:] = np.asarray(IDS)
    for name, buffer in store._store_dict.items():
        folder = root / f"c.zarr/{name}"
        if root.local:
            as_place(folder.path.rpartition("/")[0]).make_folder()
        folder.write(buffer.to_bytes())
    return SourceSpec((root / "c.zarr").url)


@pytest.mark.parametrize("kind", ["parquet", "folder", "npy", "npz", "npz_compressed", "zarr2", "zarr3"])
def test_every_source_gives_the_same_rows(root, kind):
    spec = put(root, kind)
    opened = open_source(spec)
    check_ids(opened, spec)
    assert opened.n_rows == 23
    for start, stop in ((0, 23), (3, 4), (3, 17)):
        ids, rows = opened.read(start, stop)
        assert ids.to_pylist() == (list(range(start, stop)) if kind == "npy" else IDS[start:stop])
        np.testing.assert_array_equal(rows, X[start:stop])
    first, glimpse = fingerprint(spec), glance(spec)
    assert (fingerprint(spec), glance(spec)) == (first, glimpse)
    X[20, 1] += 1
    try:
        put(root, kind)
        assert fingerprint(spec) != first
        assert root.local or glance(spec) != glimpse or spec.path.startswith("s3")  # whose times are whole seconds
    finally:
        X[20, 1] -= 1
    if kind != "parquet":
        return
    with pytest.raises(ValueError, match="there is no catalog at .*none.parquet"):
        open_source(SourceSpec((root / "none.parquet").url))
    (root / "c.csv").write(b"1,2")
    with pytest.raises(ValueError, match="give a Parquet file, a folder of them"):
        open_source(SourceSpec((root / "c.csv").url))


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_by_columns(tmp_path, version):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "c.zarr", mode="w", zarr_format=version)
    group.create_array("u", data=X[:, 0].astype(np.float64))
    group.create_array("image", data=X[:, 1:, None])
    group.create_array("name", data=np.arange(23, dtype=np.uint64) + 2**63)
    spec = SourceSpec(str(tmp_path / "c.zarr"), "name", x_columns=("u", "image"))
    opened = open_source(spec)
    ids, rows = opened.read(4, 9)
    assert ids.to_pylist() == [2**63 + i for i in range(4, 9)]
    np.testing.assert_array_equal(rows, X[4:9])
    with pytest.raises(ValueError, match=r"has no column 'x' for x \(it has "):
        open_source(SourceSpec(str(tmp_path / "c.zarr"), "name"))


def test_a_pickled_zarr_array_is_refused(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "c.zarr", mode="w", zarr_format=2)
    group.create_array("x", data=X)
    group.create_array("name", data=X[:, 0])
    about = json.loads((tmp_path / "c.zarr/name/.zarray").read_text())
    about |= {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}]}
    (tmp_path / "c.zarr/name/.zarray").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="the array 'name' of .* is pickled"):
        open_source(SourceSpec(str(tmp_path / "c.zarr"), "name"))


def test_a_journal_of_an_object_store_is_written_in_batches(root, monkeypatch):
    (root / layout.HIDDEN).make_folder()
    monkeypatch.setattr(layout, "BATCH_LINES", 3)
    with layout.Journal(root) as journal:
        for i in range(7):
            journal.add({"event": "done", "shard": i}, now=i % 2 == 1)
            seen = [line["shard"] for line in layout.read_journal(root)]
            assert seen == list(range(i + 1 if root.local else (i + 1) // 2 * 2))
    with layout.Journal(root) as second:
        second.add({"event": "done", "shard": 7})
    assert [line["shard"] for line in layout.read_journal(root)] == list(range(8))


def test_one_writer(root, monkeypatch):
    (root / layout.HIDDEN).make_folder()
    assert writer.last_sign(root) is None
    with writer.one_writer(root):
        assert writer.last_sign(root)[1].startswith("process ")
        with (
            pytest.raises(ValueError, match="is being written by process .*; wait, or use another folder"),
            writer.one_writer(root),
        ):
            pass
    assert writer.last_sign(root) is None
    with writer.one_writer(root):
        pass


def test_a_lease_runs_out_and_is_not_shared(root, monkeypatch):
    if root.local:
        pytest.skip("local folders have locks")
    monkeypatch.setattr(writer, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(writer.socket, "gethostname", lambda: "far away")
    writer._put_lease(root, "somebody's")
    monkeypatch.undo()
    monkeypatch.setattr(writer, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(writer, "BEAT_SECONDS", 0.05)
    with pytest.raises(ValueError, match="far away .last sign of life 0 s ago"), writer.one_writer(root):
        pass
    monkeypatch.setattr(writer, "STALE_SECONDS", 0.2)
    time.sleep(0.3)
    with writer.one_writer(root) as held:
        held.check()
        writer._put_lease(root, "somebody's")  # who thought that we were gone
        deadline = time.monotonic() + 10
        with pytest.raises(RuntimeError, match="was taken over by process"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.02)
    assert writer.read_lease(root)["token"] == "somebody's"
    lock = root / layout.HIDDEN / "lease.json"
    lock.write(b"no lease")
    with writer.one_writer(root):
        pass


class FakeClock:
    """Stands still. `meanwhile`: what happens while somebody sleeps."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self._meanwhile = 1000.0, meanwhile

    def date(self):
        return self.now

    passed = date

    def sleep(self, seconds):
        self._meanwhile()


@pytest.fixture
def bucket(monkeypatch) -> Place:
    """In memory, where two threads that read one file at a time share their place in it."""
    pytest.importorskip("fsspec")
    monkeypatch.setattr(writer, "BEAT_SECONDS", 0.005)
    one = threading.Lock()

    def alone(call):
        def called(*given, **options):
            with one:
                return call(*given, **options)

        return called

    for name in ("read", "write"):
        monkeypatch.setattr(Place, name, alone(getattr(Place, name)))
    return as_place(f"memory://{uuid.uuid4().hex}")


def until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lease_is_renewed(bucket):
    clock = FakeClock()
    with writer.one_writer(bucket, clock=clock) as held:
        for _ in range(3):
            clock.now += writer.STALE_SECONDS - 1
            until(lambda: writer.read_lease(bucket)["time"] == clock.now)
            held.check()


def test_of_two_that_take_a_lease_the_last_has_it(bucket):
    clock = FakeClock(meanwhile=lambda: writer._put_lease(bucket, "somebody's"))
    with pytest.raises(ValueError, match="is being written by process"), writer.one_writer(bucket, clock=clock):
        pass
    assert writer.read_lease(bucket)["token"] == "somebody's"


@pytest.mark.parametrize("error", [OSError("503: slow down"), RuntimeError("an error of its own")])
def test_a_lease_that_cannot_be_renewed_runs_out(bucket, monkeypatch, error):
    clock, write, calls = FakeClock(), Place.write, []

    def fails(place, content, **options):
        calls.append(place)
        raise error

    with writer.one_writer(bucket, clock=clock) as held:
        monkeypatch.setattr(Place, "write", fails)
        until(lambda: len(calls) > 1)
        clock.now += writer.STALE_SECONDS - 1
        held.check()
        monkeypatch.setattr(Place, "write", write)  # it answers again
        until(lambda: writer.read_lease(bucket)["time"] == clock.now)
        monkeypatch.setattr(Place, "write", fails)
        clock.now += writer.STALE_SECONDS + 1
        with pytest.raises(RuntimeError, match="nobody that is known"):
            held.check()
        monkeypatch.setattr(Place, "write", write)
        with pytest.raises(RuntimeError, match="nobody that is known"):
            held.check()


def test_a_keeper_that_died_is_no_keeper(bucket, monkeypatch):
    """Then a check renews the lease that ran out, or finds who took it."""
    monkeypatch.setattr(writer.Writer, "_keep", lambda self: None)
    clock = FakeClock()
    with writer.one_writer(bucket, clock=clock) as held:
        clock.now += writer.STALE_SECONDS + 1
        held.check()
        assert writer.read_lease(bucket)["time"] == clock.now
        clock.now += writer.STALE_SECONDS + 1
        writer._put_lease(bucket, "somebody's", clock)
        with pytest.raises(RuntimeError, match="was taken over by process"):
            held.check()


@pytest.mark.parametrize("content", [b"no lease", b"[]", b'{"time": 0}', b'{"token": "a", "time": null}'])
def test_what_is_no_lease_is_another_programs(bucket, content):
    lease = bucket / layout.HIDDEN / "lease.json"
    lease.write(content)
    with writer.one_writer(bucket, clock=FakeClock()) as held:
        lease.write(content)
        with pytest.raises(RuntimeError, match="was taken over by another program"):
            until(held.check)


def test_run_json(root):
    (root / layout.HIDDEN).make_folder()
    assert record.read_run(root) is None
    definition = {"n_rows": 3, "seed": [0, 1]}
    record.begin(root, definition, {"devices": ["a"]})
    record.begin(root, definition, {"devices": ["b"]})
    record.note_device(root, "b")
    record.note_device(root, "a")
    assert record.read_run(root)["about"]["devices"] == ["a", "b"]
    with pytest.raises(ValueError, match="holds another run, .*n_rows: given 4, found 3"):
        record.begin(root, {**definition, "n_rows": 4}, {})
