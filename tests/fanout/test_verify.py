"""What changes on a disk is found, named and made again; and how far a catalog is, from its folder alone."""

import dataclasses
import errno
import functools
import importlib.metadata
import inspect
import json
import math
import shlex

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_posterior import RAISE, draws_hash, make_run

from distsbi import fanout, open_catalog
from distsbi.cli import cli
from distsbi.data import Standardizer
from distsbi.data.bijection import Bijection
from distsbi.fanout import sample_catalog, verify
from distsbi.fanout.pool import InProcess
from distsbi.fanout.provenance import call, command
from distsbi.fanout.session import _left
from distsbi.fanout.worker import Worker
from distsbi.files import TRIES, sha256_of
from distsbi.store import layout, schema, status, writer
from distsbi.store.place import Place, as_place

QUICK = {"nsamples": 9, "workers": 0, "rows_per_shard": 6, "show_progress": False}


@pytest.fixture
def out(run, make_catalog, tmp_path):
    """Seven shards of 40 rows; two rows are bad."""
    catalog = make_catalog(rows={3: [1.0, 2.0]}, switches={30: RAISE})
    sample_catalog(run, catalog, tmp_path / "out", **QUICK, steps=3, seed=5)
    return tmp_path / "out"


def change(out, shard, change_bytes):
    path = layout.shard_file(out, shard, 7)
    path.write_bytes(change_bytes(path.read_bytes()))


def test_what_is_well(out, run):
    found = verify.verify(out, fraction=1.0)
    assert found.good
    assert (found.shards, found.left, found.rows, found.same, found.close, found.incomparable) == (7, 0, 40, 40, 0, 0)
    assert found.farthest == 0.0
    assert verify.verify(out, fraction=1e-9).rows == 1  # at least one
    for seed in range(30):  # bad rows alone, too
        assert verify.verify(out, fraction=0.01, seed=seed).good
    moved = run.rename(run.with_name("moved"))
    with pytest.raises((ValueError, OSError), match="run"):
        verify.verify(out)
    assert verify.verify(out, run=str(moved)).good
    assert verify.verify(out, fraction=0).rows == 0


@pytest.mark.parametrize("how", ["a byte of a draw", "a byte of the footer", "cut off", "empty"])
def test_a_changed_file_is_found_and_made_again(out, how):
    before = draws_hash(out)

    def changed(content):
        at = {"a byte of a draw": len(content) // 2, "a byte of the footer": len(content) - 300}.get(how)
        if at is not None:
            return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        return content[:-10] if how == "cut off" else b""

    change(out, 2, changed)
    found = verify.verify(out, fraction=0)
    assert [problem.shard for problem in found.problems] == [2]
    assert "shard-00000002-of-00000007.parquet is not the file that was written: " in found.problems[0].what
    assert layout.shard_file(out, 2, 7).exists()
    found = verify.verify(out, repair=True, workers=0)
    assert (found.removed, found.made, found.left, found.reason, found.repaired) == ((2,), (2,), 0, "", True)
    assert draws_hash(out) == before
    assert verify.verify(out, fraction=0.2).good


def test_workers_for_all_that_is_to_be_made_again(out):
    """Cut off, known as bad, or not there."""
    known = {"n_rows": 40, "rows_per_shard": 6}
    assert _left(as_place(out), known) == 1
    change(out, 2, lambda content: content[:-10])
    layout.shard_file(out, 5, 7).unlink()
    assert _left(as_place(out), known) == 2
    layout.Journal(out).add({"event": "bad", "shard": 4, "reason": "other checksums"}, now=True)
    assert _left(as_place(out), known) == 3
    assert _left(as_place(out), {}) == math.inf


@pytest.mark.parametrize(
    ("catalog", "arguments"),
    [
        ("x.npy", {"rng": jax.random.key(2**40), "draws": False}),
        ("x.npz", {"id_column": "name", "x_columns": ["v", "u"], "thin": 4, "quantiles": [0.1]}),
    ],
)
def test_a_repair_is_the_call_that_began_the_folder(run, tmp_path, catalog, arguments):
    """Each of its arguments: with any other the folder is refused. Shards that were not done are made, too."""
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", name=np.arange(20) + 5, u=x[:, :1], v=x[:, 1:])
    arguments = {**arguments, **QUICK, "rtol": 1e-4, "solver": "tsit5"}
    out = tmp_path / "out"
    sample_catalog(run, tmp_path / catalog, out, **arguments)
    before = open_catalog(out).summary()
    layout.shard_file(out, 0, 4).write_bytes(b"")
    layout.shard_file(out, 3, 4).unlink()
    moved = run.rename(run.with_name("moved"))
    found = verify.verify(out, fraction=0, repair=True, workers=0)
    assert (found.removed, found.made, found.left, found.repaired) == ((), (), 2, False)
    assert found.reason.startswith(f"there is no run directory at {run};")
    assert layout.shard_file(out, 0, 4).exists()  # nothing is removed that cannot be made again
    assert (open_catalog(out).status().damaged, open_catalog(out).status().left) == ((0,), 8)
    found = verify.verify(out, fraction=0, repair=True, workers=0, run=str(moved))
    assert (found.removed, found.made, found.left, found.repaired) == ((0,), (0, 3), 0, True)
    assert open_catalog(out).summary() == before


def test_a_bad_shard_that_was_put_right_is_left_alone(out, run, tmp_path):
    path, moved = layout.shard_file(out, 2, 7), run.with_name("moved")
    whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    run.rename(moved)
    assert verify.verify(out, fraction=0, repair=True, workers=0).left == 1
    assert open_catalog(out).status().damaged == (2,)  # though its footer is well
    path.write_bytes(whole)
    found = verify.verify(out, fraction=0, repair=True, workers=0)
    assert (found.good, found.left, found.removed, found.repaired) == (True, 0, (), True)
    moved.rename(run)
    before = path.stat().st_ino
    assert sample_catalog(run, tmp_path / "catalog.parquet", out, **QUICK, steps=3, seed=5).shards_now == 0
    assert path.stat().st_ino == before


def damage(out):
    """A byte of a draw in shard 2, which its size and its footer do not tell."""
    change(out, 2, lambda content: bytes([*content[:2000], content[2000] ^ 1, *content[2001:]]))


def refuses(monkeypatch, error):
    """Files of shards are not removed."""
    plain = Place.remove

    def remove(place):
        if place.name.startswith("shard-"):
            raise error
        plain(place)

    monkeypatch.setattr(Place, "remove", remove)


def test_a_bad_shard_that_cannot_be_removed_stays_known_as_bad(out, monkeypatch, capsys):
    before = draws_hash(out)
    damage(out)
    with monkeypatch.context() as patch:
        refuses(patch, OSError(errno.EIO, "Input/output error"))
        found = verify.verify(out, fraction=0, repair=True, workers=0)
        assert (found.removed, found.made, found.left, found.repaired) == ((), (), 1, False)
        assert "Input/output error" in found.reason
        assert open_catalog(out).status().damaged == (2,)
        with pytest.raises(SystemExit) as exit:
            cli.main(["verify", str(out), "--fraction", "0", "--repair", "--workers", "0"])
        assert exit.value.code == 1
        assert "1 shard could not be made: [Errno 5] Input/output error\n" in capsys.readouterr().err
    found = verify.verify(out, fraction=0, repair=True, workers=0)
    assert (found.removed, found.made, found.repaired) == ((2,), (2,), True)
    assert draws_hash(out) == before


@pytest.mark.parametrize("when", ["before its file is removed", "before its line"])
def test_a_kill_while_a_bad_shard_is_removed(out, run, tmp_path, monkeypatch, when):
    before, add = draws_hash(out), layout.Journal.add
    damage(out)

    def killed(journal, line, **how):
        if line["event"] == "removed":
            raise KeyboardInterrupt
        add(journal, line, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if when == "before its line":
            patch.setattr(layout.Journal, "add", killed)
        else:
            refuses(patch, KeyboardInterrupt)
        verify.verify(out, fraction=0, repair=True, workers=0)
    again = sample_catalog(run, tmp_path / "catalog.parquet", out, **QUICK, steps=3, seed=5)
    assert again.shards_now == 1
    assert draws_hash(out) == before
    assert verify.verify(out, fraction=0).good


def test_a_repair_that_makes_all_and_then_fails_is_no_success(out, monkeypatch, capsys):
    damage(out)
    plain = fanout.sample_catalog

    def fails_late(*arguments, **options):
        plain(*arguments, **options)
        raise OSError("the journal cannot be written")

    monkeypatch.setattr(verify.catalogs, "sample_catalog", fails_late)
    with pytest.raises(SystemExit) as exit:
        cli.main(["verify", str(out), "--fraction", "0", "--repair", "--workers", "0"])
    assert exit.value.code == 1
    assert (
        "all shards are there, but the repair did not end well: the journal cannot be written"
        in capsys.readouterr().err
    )
    assert verify.verify(out, fraction=0).good


@pytest.fixture
def flaky(monkeypatch):
    """Reads of the file of this name raise `error` so many times."""
    monkeypatch.setattr("distsbi.files.PAUSE_SECONDS", 0.0)

    class Flaky:
        name, times, error = "", 0, OSError(errno.EIO, "Input/output error")

    def before(plain):
        def read(place):
            if place.name == Flaky.name and Flaky.times:
                Flaky.times -= 1
                raise Flaky.error
            return plain(place)

        return read

    monkeypatch.setattr(Place, "read", before(Place.read))
    monkeypatch.setattr(Place, "open", before(Place.open))
    return Flaky


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), OSError("503: slow down"), RuntimeError("no answer")]
)
def test_a_shard_that_cannot_be_read_now_is_not_bad(out, run, flaky, error):
    path = layout.shard_file(out, 2, 7)
    content, flaky.name, flaky.error = path.read_bytes(), path.name, error
    flaky.times = TRIES - 1
    assert verify.verify(out, fraction=0).good
    flaky.times = TRIES
    found = verify.verify(out, fraction=0, repair=True, workers=0)
    assert [(problem.shard, problem.unread) for problem in found.problems] == [(2, True)]
    assert f"{path.name} cannot be read now ({error}), which is no damage" in found.problems[0].what
    assert (found.removed, found.made, found.left, found.good, found.repaired) == ((), (), 0, False, False)
    assert path.read_bytes() == content


def test_a_shard_that_cannot_be_read_when_a_call_goes_on_stays(out, run, tmp_path, flaky):
    """Its line is lost, so that it must be read: also where it is the second read, that of the reasons, which fails."""
    layout.journal_file(out).unlink()
    path = layout.shard_file(out, 5, 7)
    content, flaky.name, flaky.error = path.read_bytes(), path.name, OSError(errno.ESTALE, "Stale file handle")
    again = functools.partial(sample_catalog, run, tmp_path / "catalog.parquet", out, **QUICK, steps=3, seed=5)
    flaky.times = 1 + TRIES
    with pytest.raises(OSError, match=f"{path.name} cannot be read now .*Stale file handle.*, which is no damage"):
        again()
    assert path.read_bytes() == content
    flaky.times = 1 + TRIES
    assert open_catalog(out).status().damaged == (5,)
    flaky.times = 2
    assert again().shards_now == 0


def test_ids_that_come_twice_are_not_repaired(out):
    """Shards that are good each, of which one has the id of another: no shard of theirs is known to be the wrong one."""
    path = layout.shard_file(out, 2, 7)
    table = pq.read_table(path)
    ids = table["id"].to_pylist()
    at = table.schema.get_field_index("id")
    table = table.set_column(at, table.schema.field(at), pa.array(["g0", *ids[1:]]))
    footer = {b"distsbi.sha256": schema.digest(table).encode()}
    with pq.ParquetWriter(path, table.schema, use_dictionary=False) as file:
        file.write_table(table)
        file.add_key_value_metadata(footer)
    layout.journal_file(out).unlink()
    found = verify.verify(out, fraction=0, repair=True, workers=0)
    assert [problem.shard for problem in found.problems] == [None]
    assert (found.removed, found.left, found.repaired) == ((), 0, False)


def test_contents_have_a_checksum_of_their_own(out):
    """Where the journal is lost, and a writer that knows nothing of it changed a number."""
    layout.journal_file(out).unlink()
    path = layout.shard_file(out, 2, 7)
    table, footer = pq.read_table(path), pq.read_metadata(path).metadata
    with pq.ParquetWriter(
        path, table.schema, compression="SNAPPY", use_dictionary=False
    ) as file:  # other bytes, same numbers
        file.write_table(table)
        file.add_key_value_metadata({b"distsbi.sha256": footer[b"distsbi.sha256"]})
    assert verify.verify(out).good
    means = np.array(table["mean"].combine_chunks().flatten())
    means[3] += 1e-6
    changed = table["mean"].combine_chunks().from_arrays(means, 2)
    at = table.schema.get_field_index("mean")
    with pq.ParquetWriter(path, table.schema, use_dictionary=False) as file:
        file.write_table(table.set_column(at, table.schema.field(at), changed))
        file.add_key_value_metadata({b"distsbi.sha256": footer[b"distsbi.sha256"]})
    assert "does not hold the numbers that were written" in verify.verify(out, fraction=0).problems[0].what


def alter(out, name, by):
    """The last number of a column of shard 2, with both checksums of the altered shard."""
    path = layout.shard_file(out, 2, 7)
    table = pq.read_table(path)
    column = table[name].combine_chunks()
    storage = column.storage if name == "draws" else column
    values = storage.flatten().to_numpy(zero_copy_only=False).copy()
    values[-1] += by
    altered = pa.FixedSizeListArray.from_arrays(pa.array(values), storage.type.list_size)
    if name == "draws":
        altered = pa.ExtensionArray.from_storage(column.type, altered)
    at = table.schema.get_field_index(name)
    table = table.set_column(at, table.schema.field(at), altered)
    with pq.ParquetWriter(path, table.schema, use_dictionary=False) as file:
        file.write_table(table)
        file.add_key_value_metadata({schema.DIGEST: schema.digest(table)})
    line = {"event": "done", "shard": 2, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    layout.Journal(out).add({**status.last_lines(layout.read_journal(out))[2], **line})


def made_elsewhere(out):
    """As the journal tells it."""
    lines = [json.loads(line) for line in layout.journal_file(out).read_text().splitlines()]
    layout.journal_file(out).write_text(
        "".join(
            json.dumps({**line, **({"device": "cuda: H1"} if line["event"] == "done" else {})}) + "\n" for line in lines
        )
    )


@pytest.mark.parametrize("name", ["draws", "q95"])
def test_a_single_number_that_its_run_does_not_make_is_found(out, name):
    alter(out, name, 1e-6)
    assert verify.verify(out, fraction=0).good
    found = verify.verify(out, fraction=1.0)
    assert [problem.shard for problem in found.problems] == [2]
    assert "shard 2 holds other draws than its run makes, e.g. row 17: " in found.problems[0].what
    assert (found.rows, found.same) == (40, 39)


def test_draws_of_another_run_with_good_checksums_are_found(out, monkeypatch):
    """Rows are drawn again: here the worker adds to them what rounding on other hardware might."""
    plain = Worker._draw

    def shifted(by):
        monkeypatch.setattr(Worker, "_draw", lambda *args: plain(*args) + np.float32(by))

    shifted(1e-5)
    found = verify.verify(out, fraction=1.0)
    assert "holds other draws than its run makes, e.g. row 0: " in found.problems[0].what
    assert "on the same kind of hardware" in found.problems[0].what
    assert len(found.problems) == 7
    made_elsewhere(out)
    found = verify.verify(out, fraction=1.0)
    assert found.good
    assert (found.rows, found.same, found.close, found.elsewhere) == (40, 2, 38, ("cuda: H1",))
    assert 0 < found.farthest < 1e-4
    shifted(1e-3)
    assert len(verify.verify(out, fraction=1.0).problems) == 7


@pytest.mark.parametrize(
    ("nsamples", "rounded"),
    [
        (1, lambda draws: np.nextafter(draws, np.float32(np.inf))),  # the last bit
        (2, lambda draws: draws + np.float32(1e-5)),
    ],
)
def test_few_draws_are_no_measure_of_their_rounding(run, make_catalog, tmp_path, monkeypatch, nsamples, rounded):
    """Elsewhere: rounding is no alarm, though the sd of one draw is 0 and that of two may be small; an altered number is."""
    out, plain = tmp_path / "out", Worker._draw
    sample_catalog(run, make_catalog(), out, **{**QUICK, "nsamples": nsamples})
    made_elsewhere(out)
    monkeypatch.setattr(Worker, "_draw", lambda *args: rounded(plain(*args)))
    found = verify.verify(out, fraction=1.0)
    assert found.good
    assert (found.rows, found.close) == (40, 40)
    assert 0 < found.farthest < 1e-4
    interval = Bijection(("interval",) * 2, np.full((2, 1), -9.0), np.full((2, 1), 1.0))  # type: ignore[arg-type]
    bounded = dataclasses.replace(Standardizer.identity(2, 3), bijection=interval)
    with monkeypatch.context() as patch:  # on a bound theta hardly moves, but float32 is no finer there
        patch.setattr(Standardizer, "identity", lambda *_: bounded)
        assert verify.verify(out, fraction=1.0).good
    alter(out, "draws", 1e-3)
    assert [problem.shard for problem in verify.verify(out, fraction=1.0).problems] == [2]


def test_shards_of_another_jax_are_compared_but_not_called_bad(run, make_catalog, tmp_path, monkeypatch):
    """Begun and verified with the jax that is here, and gone on with under another one, whose draws are others."""
    catalog, out = make_catalog(switches={3: RAISE, 30: RAISE}), tmp_path / "out"
    wait, plain, version = InProcess.wait, Worker._draw, importlib.metadata.version
    calls = iter(range(4))

    def interrupted(pool):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return wait(pool)

    def shifted(patch, by):
        patch.setattr(Worker, "_draw", lambda *args: plain(*args) + np.float32(by))

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt, match="3 of 7 shards"):
            sample_catalog(run, catalog, out, **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "jax" else version(name))
        shifted(patch, 0.5)
        assert sample_catalog(run, catalog, out, **QUICK).shards_now == 4
        assert [problem.shard for problem in verify.verify(out, fraction=1.0).problems] == []
    before = draws_hash(out)
    found = verify.verify(out, fraction=1.0, repair=True, workers=0)
    assert (found.good, found.removed, found.elsewhere) == (True, (), ("jax 0.0.1",))
    assert (found.rows, found.same, found.close, found.incomparable, found.farthest) == (40, 19, 0, 21, 0.0)
    with monkeypatch.context() as patch:
        shifted(patch, 0.5 + 1e-5)
        found = verify.verify(out, fraction=1.0)
        assert [problem.shard for problem in found.problems] == [0, 1, 2]
        assert (found.same, found.close, found.incomparable) == (2, 21, 0)
        patch.setattr(Worker, "_draw", lambda *args: np.full_like(plain(*args), np.nan))
        patch.setattr(Worker, "_check", lambda *_: "another version takes no such x")
        found = verify.verify(out, fraction=1.0)
        assert [problem.shard for problem in found.problems] == [0, 1, 2]
        assert found.incomparable == 22
    layout.journal_file(out).unlink()  # then nothing tells
    found = verify.verify(out, fraction=1.0, repair=True, workers=0)
    assert (found.good, found.incomparable) == (True, 21)
    assert draws_hash(out) == before


def test_another_run_or_catalog_is_refused(out, make_catalog, tmp_path):
    other = make_run(tmp_path / "other", fingerprint="beef")
    with pytest.raises(ValueError, match="is not the run that was sampled: another posterior"):
        verify.verify(out, run=str(other))
    make_catalog(switches={1: 0.5})
    with pytest.raises(ValueError, match="is not the catalog that was sampled: it has changed since"):
        verify.verify(out)
    with pytest.raises(ValueError, match="fraction must be from 0 to 1; got 2"):
        verify.verify(out, fraction=2)
    for repair in (False, True):
        with pytest.raises(ValueError, match="nothing is no output folder of sample_catalog"):
            verify.verify(tmp_path / "nothing", repair=repair)
    assert not (tmp_path / "nothing").exists()


def test_run_json_says_where_the_draws_come_from(out, run):
    there = open_catalog(out).run
    assert there["about"]["versions"].keys() >= {"distsbi", "jax", "ray", "pyarrow", "python"}
    assert there["about"]["devices"] == [there["about"]["first_worker"]["device"]]
    assert there["definition"]["seed"] == [0, 5]
    assert "times" in there["definition"]["solver"]
    words = shlex.split(command(there, str(out)))
    assert words[:3] == ["distsbi", "catalog", str(run)]
    assert words[5:] == ["--nsamples", "9", "--seed", "5", "--steps", "3"]
    assert shlex.split(command(there, "s3://key:SECRET@bucket/out"))[4] == "s3://bucket/out"


class Called(Exception):
    pass


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"quantiles": [0.1, 0.9], "draws": False},
        {"quantiles": ()},
        {"id_column": None, "thin": 4, "seed": 2**40 + 1, "solver": "tsit5", "rtol": 1e-3, "atol": 1e-06},
        {"x_columns": ["u", "v"], "id_column": "name", "steps": 5},
        {"x_column": "u v"},
    ],
)
def test_the_command_is_the_call(run, tmp_path, monkeypatch, given):
    """What the command line makes of the words that "go on with:" prints are the arguments of the call that began the folder."""
    x = np.random.default_rng(0).normal(size=(4, 3))
    columns = {
        "id": np.arange(4),
        "name": np.arange(4),
        "x": list(x),
        "u v": list(x),
        "u": list(x[:, :2]),
        "v": x[:, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    began = {"nsamples": 9, "workers": 0, "show_progress": False, **given}
    sample_catalog(run, tmp_path / "c.parquet", tmp_path / "out", **began)
    kept = open_catalog(tmp_path / "out").run

    def called(*arguments, **options):
        raise Called(arguments, options)

    signature = inspect.signature(sample_catalog)
    monkeypatch.setattr(fanout, "sample_catalog", called)
    with pytest.raises(Called) as told:
        cli.main(shlex.split(command(kept, str(tmp_path / "out")))[1:], standalone_mode=False)

    def bound(*arguments, **options):
        found = signature.bind(*arguments, **options)
        found.apply_defaults()
        return json.loads(json.dumps({**found.arguments, "rows_per_shard": None}, default=str))  # the folder has one

    arguments, options = told.value.args
    assert bound(*arguments, **options) == bound(**call(kept, tmp_path / "out"))


EACH = {"cpus_per_worker": 2, "num_gpus_per_worker": 0.5, "time_limit": 60.0}


@pytest.fixture
def no_ray(monkeypatch):
    """Calls that ask for workers of their own draw in this process."""
    monkeypatch.setattr("distsbi.fanout.session._pool", lambda stack, crew, *_: InProcess(crew.worker(crew.job)))


@pytest.mark.usefixtures("no_ray")
def test_the_command_gives_workers_what_the_last_ones_had(run, make_catalog, tmp_path, monkeypatch):
    catalog, out = make_catalog(), tmp_path / "out"
    path = layout.run_file(out)

    def draw(**given):
        sample_catalog(run, catalog, out, **{**QUICK, **given})
        return open_catalog(out).run

    def words(kept):
        return shlex.split(command(kept, str(out)))[7:]

    first = draw(workers=None, **{**EACH, "num_gpus_per_worker": np.float32(0.5)})
    each = ["--cpus-per-worker", "2", "--gpus-per-worker", "0.5", "--time-limit", "60"]
    assert words(first) == each
    assert draw() == first  # without workers of its own there is nothing new to keep
    with monkeypatch.context() as patch:
        told = []
        patch.setattr(fanout, "sample_catalog", lambda *arguments, **options: told.append(options) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(shlex.split(command(first, str(out)))[1:], standalone_mode=False)
    assert {name: told[0][name] for name in EACH} == EACH
    last = draw(workers=2, num_gpus_per_worker=1)
    assert words(last) == ["--gpus-per-worker", "1"]
    assert last["fingerprint"] == first["fingerprint"]
    with pytest.raises(ValueError, match="holds another run"):
        draw(workers=2, nsamples=8)
    assert open_catalog(out).run == last
    del last["about"]["each_worker"]  # as of before it was kept
    assert words(last) == []
    last["about"]["devices"] = ["cuda: H1"]
    assert words(last) == ["--gpus-per-worker", "1"]
    path.write_text(json.dumps(last))
    assert words(draw(workers=2)) == []


@pytest.mark.usefixtures("no_ray")
def test_a_repair_gives_workers_what_the_last_ones_had(run, make_catalog, tmp_path, monkeypatch):
    out, plain, told = tmp_path / "out", verify.catalogs.sample_catalog, []
    sample_catalog(run, make_catalog(), out, **{**QUICK, "workers": 2}, **EACH)
    monkeypatch.setattr(verify.catalogs, "sample_catalog", lambda **given: told.append(given) or plain(**given))
    for words, expected in (
        ([], EACH),
        (["--workers", "2", "--gpus-per-worker", "0"], {**EACH, "num_gpus_per_worker": 0}),
        (["--workers", "0"], {}),
    ):
        layout.shard_file(out, 3, 7).unlink()
        cli.main(["verify", str(out), "--fraction", "0", "--repair", *words], standalone_mode=False)
        assert {name: told[-1][name] for name in EACH if name in told[-1]} == expected
    assert len(told) == 3


def test_status_while_it_is_written_and_after(run, make_catalog, tmp_path, monkeypatch):
    catalog, out = make_catalog(rows={3: [1.0, 2.0], 4: [1.0, 2.0]}, switches={5: RAISE}), tmp_path / "out"
    wait, seen = InProcess.wait, []

    def look(pool):
        found = wait(pool)
        if (out / "_distsbi" / "run.json").exists():
            seen.append(open_catalog(out).status())
        if len(seen) == 5:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "wait", look)
        with pytest.raises(KeyboardInterrupt, match="5 of 7 shards are finished"):
            sample_catalog(run, catalog, out, **QUICK)
    assert [status.shards_done for status in seen] == [1, 2, 3, 4, 5]
    assert seen[4].left == 10
    assert seen[4].writer.startswith("process ")
    assert seen[4].rate > 0
    assert seen[4].to_go == pytest.approx(10 / seen[4].rate)
    reasons = {
        "invalid: x has 2 values; this posterior takes 3 (dim_x 3, ch_x 1)": 2,
        "failed: RuntimeError: the solver did not converge": 1,
    }
    assert seen[4].reasons == reasons
    after = open_catalog(out).status()
    assert (after.shards_done, after.writer, after.to_go) == (5, None, None)
    assert sample_catalog(run, catalog, out, **QUICK).shards_now == 2
    layout.journal_file(out).unlink()  # then the shards themselves tell
    done = open_catalog(out).status()
    assert (done.complete, done.left, done.reasons) == (True, 0, reasons)
    assert json.dumps(dataclasses.asdict(done))


def test_a_writer_that_was_killed_is_no_writer(out):
    layout.run_file(out).with_name("lock").write_text("process 4000000 on " + writer.socket.gethostname())
    assert open_catalog(out).status().writer is None
    layout.run_file(out).with_name("lock").write_text("process 1 on elsewhere")
    assert open_catalog(out).status().writer == "process 1 on elsewhere"
