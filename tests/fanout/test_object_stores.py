"""A catalog that lies in an object store and is written there: the same draws as on a disk."""

import uuid

import numpy as np
import pytest
from fake_posterior import draws_hash

from distsbi import open_catalog
from distsbi.fanout import sample_catalog, verify
from distsbi.fanout.pool import InProcess
from distsbi.store import layout, writer
from distsbi.store.place import as_place

QUICK = {"nsamples": 9, "workers": 0, "rows_per_shard": 6, "show_progress": False}


def as_on_disk(out, folder):
    """A copy of the shards on a disk, as long as the store says they are."""
    folder.mkdir()
    for file in as_place(out).files():
        (folder / file.name).write_bytes((as_place(out) / file.name).read())
    assert {file.name: file.size for file in as_place(folder).files()} == {
        f.name: f.size for f in as_place(out).files()
    }
    return folder


def put(url, path):
    place = as_place(url)
    place.write(path.read_bytes())
    return place.url


@pytest.mark.parametrize("store", ["s3", "memory"])
def test_a_catalog_goes_on_in_an_object_store(request, run, make_catalog, tmp_path, monkeypatch, store):
    monkeypatch.setattr(writer, "SETTLE_SECONDS", 0.01)
    sample_catalog(run, make_catalog(rows={4: [1.0, 2.0]}), tmp_path / "calm", **QUICK)
    name = uuid.uuid4().hex
    base = request.getfixturevalue("s3").format(name + "/{}") if store == "s3" else f"memory://{name}/{{}}"
    catalog, out = put(base.format("c.parquet"), tmp_path / "catalog.parquet"), base.format("out")
    wait, calls = InProcess.wait, []

    def interrupted(pool):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return wait(pool)

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "wait", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match="3 of 7 shards are finished in (s3|memory)://[^?]*/out; the same call"
        ):
            sample_catalog(run, catalog, out, **QUICK)
    status = open_catalog(out).status()
    assert (status.shards_done, status.left, status.writer) == (3, 22, None)
    result = sample_catalog(run, catalog, out, **QUICK)
    assert (result.shards_now, result.n_ok) == (4, 39)
    assert draws_hash(as_on_disk(out, tmp_path / "copy")) == draws_hash(tmp_path / "calm")
    assert (
        open_catalog(out).run["fingerprint"] == open_catalog(tmp_path / "calm").fingerprint
    )  # wherever the catalog lies
    opened = result.open()
    np.testing.assert_array_equal(opened["g7"], open_catalog(tmp_path / "calm")["g7"])
    assert opened.summary().num_rows == 40
    assert opened.status().complete
    assert verify.verify(out, fraction=0.3).good
    shard = layout.shard_file(as_place(out), 2, 7)
    shard.write(shard.read()[:-1])
    found = verify.verify(out, repair=True, workers=0)
    assert (found.removed, found.made, found.repaired) == ((2,), (2,), True)
    with pytest.raises(ValueError, match="holds another run.*nsamples: given 8, found 9"):
        sample_catalog(run, catalog, out, **{**QUICK, "nsamples": 8})
    with pytest.raises(ValueError, match="lies in the catalog's folder"):
        sample_catalog(run, base.format(""), out, **QUICK)


def test_a_shard_is_no_object_before_it_is_whole(s3, monkeypatch):
    """An upload that fails, or a process that dies in it, leaves nothing under the key."""
    place = as_place(s3.format(f"{uuid.uuid4().hex}/shard"))
    with place.fs.open_output_stream(place.path) as file:
        file.write(bytes(12 * 2**20))  # two parts are up
        assert not place.exists()
    assert place.info().size == 12 * 2**20


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_workers_write_to_an_object_store(s3, run, make_catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SETTLE_SECONDS", 0.01)
    sample_catalog(run, make_catalog(), tmp_path / "calm", **QUICK)
    base = s3.format(uuid.uuid4().hex + "/{}")
    catalog = put(base.format("c.parquet"), tmp_path / "catalog.parquet")
    sample_catalog(run, catalog, base.format("out"), **{**QUICK, "workers": 2})
    assert draws_hash(as_on_disk(base.format("out"), tmp_path / "copy")) == draws_hash(tmp_path / "calm")
