"""A catalog in this process: what is written, what is refused, and how it goes on."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fake_posterior import DEVICE, RAISE, draws_hash, load, make_run

from distsbi import open_catalog, simulate
from distsbi.fanout import catalog as catalog_module, provenance, sample_catalog
from distsbi.fanout.catalog import choose_rows_per_shard
from distsbi.fanout.pool import InProcess
from distsbi.fanout.worker import Job, Worker, unlike
from distsbi.keys import hash_id
from distsbi.sampling import SolveError
from distsbi.store import Output, SourceSpec, layout, schema
from distsbi.store.source import glance
from distsbi.store.writer import one_writer

QUICK = {"nsamples": 9, "workers": 0, "rows_per_shard": 6, "show_progress": False}


def test_every_row_gets_its_draws(run, make_catalog, tmp_path):
    result = sample_catalog(run, make_catalog(), tmp_path / "out", **QUICK)
    assert (result.n_rows, result.n_ok, result.n_bad, result.shards, result.shards_now) == (40, 40, 0, 7, 7)
    out = result.open()
    assert out.verify() == []
    table = out.table(["id", "row", "observation_id", "status"])
    assert table["id"].to_pylist() == [f"g{i}" for i in range(40)]
    assert table["observation_id"].to_pylist() == [hash_id(f"g{i}") for i in range(40)]
    x = np.asarray(pq.read_table(tmp_path / "catalog.parquet")["x"][11].as_py(), np.float32).reshape(1, 3, 1)
    expected = load(str(run)).draw(jax.random.key(0), x, 9, observation_ids=np.asarray([hash_id("g11")], np.uint64))[0]
    np.testing.assert_array_equal(out.draws("g11"), expected)
    row = out.summary().slice(11, 1).to_pylist()[0]
    assert row["a_mean"] == pytest.approx(expected[:, 0, 0].mean(), rel=1e-5)
    assert row["b_q95"] == pytest.approx(np.quantile(expected[:, 1, 0], 0.95), rel=1e-5)


def test_shards_do_not_change_draws(run, make_catalog, tmp_path):
    catalog = make_catalog()
    hashes = set()
    for rows in (1, 6, 40, 1000, None):
        sample_catalog(run, catalog, tmp_path / str(rows), **{**QUICK, "rows_per_shard": rows})
        hashes.add(draws_hash(tmp_path / str(rows)))
    assert len(hashes) == 1
    sample_catalog(run, catalog, tmp_path / "seed", **QUICK, seed=1)
    assert draws_hash(tmp_path / "seed") not in hashes
    sample_catalog(run, catalog, tmp_path / "rng", **QUICK, rng=jax.random.PRNGKey(1))
    assert draws_hash(tmp_path / "rng") == draws_hash(tmp_path / "seed")


def test_row_numbers_as_ids_equal_a_batch(run, make_catalog, tmp_path):
    sample_catalog(run, make_catalog(), tmp_path / "out", **QUICK, id_column=None)
    out = open_catalog(tmp_path / "out")
    assert out.table(["observation_id"])["observation_id"].to_pylist() == list(range(40))
    assert out.draws(39).shape == (9, 2, 1)


def test_bad_rows_get_a_reason_and_the_others_go_on(run, make_catalog, tmp_path):
    bad = {3: [1.0, float("nan"), 2.0], 4: [1.0, float("inf"), 2.0], 9: [1.0, 2.0], 13: None, 20: [1.0, None, 2.0]}
    catalog = make_catalog(rows=bad, switches={30: RAISE})
    result = sample_catalog(run, catalog, tmp_path / "out", **QUICK)
    assert result.counts == {"ok": 34, "invalid": 5, "failed": 1, "quarantined": 0}
    out = result.open()
    rows = {row["id"]: row for row in out.table().to_pylist()}
    assert "NaN" in rows["g3"]["message"]
    assert "infinite" in rows["g4"]["message"]
    assert "2 values; this posterior takes 3" in rows["g9"]["message"]
    assert rows["g13"]["message"] == "x is null"
    assert rows["g20"]["message"] == "x has values that are NaN (or null) or infinite"
    assert rows["g30"]["status"] == "failed"
    assert "did not converge" in rows["g30"]["message"]
    assert all(rows[f"g{i}"]["mean"] is None for i in (*bad, 30))
    with pytest.raises(ValueError, match="invalid, x is null"):
        out.draws("g13")
    clean = tmp_path / "clean"
    clean.mkdir()
    sample_catalog(run, make_catalog(), clean / "out", **QUICK)
    whole = open_catalog(clean / "out")
    for name in ("g2", "g5", "g31"):
        np.testing.assert_array_equal(out.draws(name), whole.draws(name))


@pytest.fixture
def worker(run, make_catalog, tmp_path):
    """A worker that is ready."""
    spec = SourceSpec(str(make_catalog()))
    made = Worker(
        Job(str(run), spec, glance(spec), str(tmp_path / "out"), 2, 0, {}, Output(), loader="fake_posterior:load")
    )
    made.ready()
    made.posterior.calls.clear()
    return made


def rows_with(n, switches):
    """Arguments of `_draw_rows` for n good rows."""
    xs = [np.full((3, 1), i, np.float32) for i in range(n)]
    for i, value in switches.items():
        xs[i][0] = value
    return xs, np.arange(n).astype(np.uint64), [schema.OK] * n, [None] * n


def test_a_row_that_raises_is_found_by_halving(worker):
    calm = worker._draw_rows(*rows_with(500, {}))
    assert worker.posterior.calls == [500]
    worker.posterior.calls.clear()
    xs, ids, status, message = rows_with(500, {3: RAISE, 321: RAISE})
    status[7] = schema.INVALID
    draws = worker._draw_rows(xs, ids, status, message)
    assert len(worker.posterior.calls) < 45
    assert [i for i, s in enumerate(status) if s == schema.FAILED] == [3, 321]
    assert "did not converge" in message[321]
    np.testing.assert_array_equal(draws, np.delete(calm, [3, 7, 321], axis=0))
    assert worker._draw_rows(*rows_with(3, dict.fromkeys(range(3), RAISE))).shape == (0, 2, 2, 1)
    xs, ids, status, message = rows_with(20, {11: DEVICE})
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED: out of memory on .*, the machine's fault"):
        worker._draw_rows(xs, ids, status, message)
    assert status == [schema.OK] * 20


def test_a_worker_refuses_another_copy_of_the_catalog(worker, make_catalog):
    make_catalog(switches={1: 0.5})
    with pytest.raises(ValueError, match="^on .* .*catalog.parquet is not the catalog that was checked: another copy"):
        worker.ready()


def test_a_worker_refuses_other_versions_than_the_driver_has(worker, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "jax" else version(name))
    with pytest.raises(ValueError, match="has distsbi .*, jax 0.0.1, .* made with .* Install the same everywhere"):
        worker.ready()


def test_a_worker_whose_device_is_full_does_not_come_up(worker, monkeypatch):
    """One whose solver does not converge on the zeros that it compiles with does."""

    def fails(error):
        def draw(*given, **more):
            raise error

        monkeypatch.setattr(type(worker.posterior), "draw", draw)

    fails(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        worker.ready()
    fails(SolveError({0: 1}, np.zeros(1, np.uint64), "draws", np.full((1, 1), np.nan)))
    assert worker.ready()["sizes"] == [2, 1]


def test_why_workers_do_not_go_together(worker):
    first, told = worker.ready(), worker.ready()
    told["definition"]["tile"], told["worker"]["device"] = [128, 512], "gpu: H100"
    assert "(gpu: H100) draws in tiles of [128, 512]" in unlike(first, told, "runs/a")
    told["definition"]["posterior"] = "another"
    assert "found another posterior at runs/a" in unlike(first, told, "runs/a")


def test_goes_on_where_it_stopped(run, make_catalog, tmp_path):
    catalog, out = make_catalog(), tmp_path / "out"
    sample_catalog(run, catalog, out, **QUICK)
    before = draws_hash(out)
    kept = layout.shard_file(out, 0, 7).stat().st_mtime_ns
    layout.shard_file(out, 2, 7).unlink()
    left = out / f".{layout.shard_file(out, 2, 7).name}.{'ab' * 16}"
    left.write_bytes(b"half a shard")
    result = sample_catalog(run, catalog, out, **QUICK)
    assert (result.shards_now, result.rows_now, result.n_ok) == (1, 6, 40)
    assert draws_hash(out) == before
    assert layout.shard_file(out, 0, 7).stat().st_mtime_ns == kept
    assert not left.exists()


def test_another_run_is_refused_by_name(run, make_catalog, tmp_path):
    catalog, out = make_catalog(), tmp_path / "out"
    sample_catalog(run, catalog, out, **QUICK)
    before = draws_hash(out)
    for change, named in (
        ({"nsamples": 10}, "nsamples: given 10, found 9"),
        ({"seed": 5}, "seed: given 5, found 0"),
        ({"steps": 3}, "solver.times"),
        ({"rows_per_shard": 5}, "rows_per_shard: given 5, found 6"),
        ({"thin": 2}, "output.thin: given 2, found 1"),
    ):
        with pytest.raises(ValueError, match=f"holds another run.*{named}.*Use another folder"):
            sample_catalog(run, catalog, out, **{**QUICK, **change})
    other = make_run(tmp_path / "other", fingerprint="beef")
    with pytest.raises(ValueError, match='posterior: given "beef", found "f00d"'):
        sample_catalog(other, catalog, out, **QUICK)
    with pytest.raises(ValueError, match="the rows of the catalog are others"):
        sample_catalog(run, make_catalog(switches={1: 0.5}), out, **QUICK)
    make_catalog()
    moved = shutil.copy(catalog, tmp_path / "moved.parquet")
    sample_catalog(shutil.copytree(run, tmp_path / "copy"), moved, out, **{**QUICK, "rows_per_shard": None})
    assert draws_hash(out) == before


def test_options_of_a_solver_are_of_the_run(run, make_catalog, tmp_path):
    """They are in what identifies it, and in the command that goes on with it."""
    catalog, out = make_catalog(), tmp_path / "out"
    asked = {**QUICK, "solver": "stochastic_heun", "steps": 4}
    sample_catalog(run, catalog, out, **asked, solver_options={"churn": np.float32(2.0)})
    kept = open_catalog(out).run
    assert kept["definition"]["solver"]["options"]["churn"] == 2.0
    assert "--solver-option churn=2.0" in provenance.command(kept, str(out))
    assert provenance.call(kept, out)["solver_options"] == {"churn": 2.0}
    assert sample_catalog(run, catalog, out, **asked, solver_options={"churn": 2}).shards_now == 0
    for options in ({"churn": 3}, None):
        with pytest.raises(ValueError, match=r"holds another run.*solver.options.churn: given \S+, found 2.0"):
            sample_catalog(run, catalog, out, **asked, solver_options=options)
    with pytest.raises(ValueError, match="solver_options must be a dict of numbers by name"):
        sample_catalog(run, catalog, tmp_path / "other", **asked, solver_options=["churn"])


def test_a_shard_that_is_damaged_is_made_again(run, make_catalog, tmp_path, caplog):
    catalog, out = make_catalog(), tmp_path / "out"
    sample_catalog(run, catalog, out, **QUICK)
    before, path = draws_hash(out), layout.shard_file(out, 2, 7)
    path.write_bytes(path.read_bytes()[:-100])
    result = sample_catalog(run, catalog, out, **QUICK)
    assert (result.shards_now, result.n_ok) == (1, 40)
    assert f"shard 2 is made again: {path} has" in caplog.text
    layout.journal_file(out).unlink()  # what the journal does not know is read
    path.write_bytes(path.read_bytes()[:-100])
    assert sample_catalog(run, catalog, out, **QUICK).shards_now == 1
    assert f"shard 2 is made again: {path} cannot be read" in caplog.text
    assert draws_hash(out) == before
    lines = layout.read_journal(out)
    assert {line["shard"] for line in lines if line["event"] == "found"} == {0, 1, 3, 4, 5, 6}
    assert result.open().status().counts["ok"] == 40


def test_a_folder_has_one_writer(run, make_catalog, tmp_path):
    out = tmp_path / "out"
    (out / layout.HIDDEN).mkdir(parents=True)
    with one_writer(out), pytest.raises(ValueError, match=f"being written by process {os.getpid()}"):
        sample_catalog(run, make_catalog(), out, **QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nsamples": 0}, "nsamples must be a positive integer; got 0"),
        ({"nsamples": 2.5}, "nsamples must be a positive integer; got 2.5"),
        ({"rows_per_shard": 0}, "rows_per_shard must be a positive integer"),
        ({"workers": -1}, "workers must be None, 0"),
        ({"thin": 0}, "thin must be a positive integer"),
        ({"quantiles": (0.5, 0.1)}, "quantiles must be between 0 and 1 and ascending"),
        ({"solver": "leap"}, "leap"),
        ({"id_column": "name"}, "no id column 'name' .it has 'id', 'x'.; pass id_column=<its name>, or id_column=None"),
        ({"x_column": "data"}, "no column 'data' for x"),
        ({"seed": 3, "rng": jax.random.key(1)}, "seed or rng, not both"),
        ({"time_limit": 5.0}, "time_limit needs workers"),
        ({"num_gpus_per_worker": 1.0}, "num_gpus_per_worker needs workers"),
        ({"x_column": "y", "x_columns": ["u"]}, "give x_column or x_columns"),
    ],
)
def test_bad_arguments_say_what_to_do(run, make_catalog, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        sample_catalog(run, make_catalog(), tmp_path / "out", **{**QUICK, **change})


def test_out_must_be_a_folder_outside_the_catalog(run, make_catalog, tmp_path):
    file = make_catalog()
    for out in (file, file / "out"):
        with pytest.raises(ValueError, match=r"out must be a folder; .*catalog.parquet is a file"):
            sample_catalog(run, file, out, **QUICK)
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / file.name)
    for out in (folder, folder / "deep" / "out", tmp_path / "elsewhere" / ".." / "folder"):
        with pytest.raises(ValueError, match=r"lies in the catalog's folder .*; give a folder outside"):
            sample_catalog(run, folder, out, **QUICK)
    assert list(folder.iterdir()) == [folder / file.name]
    assert sample_catalog(run, folder, tmp_path / "folder-out", **QUICK).n_ok == 40


def test_numbers_of_numpy_are_numbers(run, make_catalog, tmp_path):
    catalog = make_catalog()
    given = {name: np.int64(value) for name, value in QUICK.items() if type(value) is int}
    more = {"thin": np.int32(2), "seed": np.int64(0), "steps": np.int64(3), "quantiles": np.asarray([0.25, 0.5])}
    sample_catalog(run, catalog, tmp_path / "out", **given, **more, show_progress=False)
    plain = {**QUICK, "thin": 2, "steps": 3, "quantiles": (0.25, 0.5)}
    assert sample_catalog(run, catalog, tmp_path / "out", **plain).shards_now == 0
    with pytest.raises(ValueError, match="nsamples must be a positive integer"):
        sample_catalog(run, catalog, tmp_path / "out", **{**QUICK, "nsamples": np.float64(9)})


def test_a_npy_has_row_numbers(run, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3), np.float32))
    out = sample_catalog(run, tmp_path / "x.npy", tmp_path / "out", **QUICK).open()
    assert out.table(["id"])["id"].to_pylist() == out.table(["observation_id"])["observation_id"].to_pylist()
    assert sample_catalog(run, tmp_path / "x.npy", tmp_path / "out", **QUICK, id_column=None).shards_now == 0
    with pytest.raises(ValueError, match="no id column 'name'"):
        sample_catalog(run, tmp_path / "x.npy", tmp_path / "out", **QUICK, id_column="name")


def test_shards_are_enough_for_a_large_cluster():
    assert -(-(10**7) // choose_rows_per_shard(10**7, 1000, 2)) >= 1024
    assert -(-(10**6) // choose_rows_per_shard(10**6, 100, 2)) >= 1000
    assert choose_rows_per_shard(40, 9, 2) == 40
    assert choose_rows_per_shard(200, 200, 3, workers=2) == 100  # not 164 and 36


def test_without_a_number_of_workers_shards_are_for_the_room_there_is(run, make_catalog, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("distsbi.fanout.session._pool", lambda stack, crew, *_: InProcess(crew.worker(crew.job)))
    monkeypatch.setattr(
        "distsbi.fanout.cluster.cluster_room", lambda *given, **how: asked.append((given, how)) or 5
    )  # as Ray would say
    for name, value in {"SHARD_DRAWS": 1, "SHARD_COUNT": 2, "SHARDS_EACH": 2}.items():
        monkeypatch.setattr(catalog_module, name, value)
    given = {"nsamples": 9, "cpus_per_worker": 3, "show_progress": False}
    assert sample_catalog(run, make_catalog(), tmp_path / "out", **given).shards == 10
    assert asked == [((3, 0), {"empty": True})]
    assert sample_catalog(run, make_catalog(), tmp_path / "two", **given, workers=2).shards == 4
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("given", "environment", "here"),
    [
        ({"workers": 0}, "10.0.0.1:6379", True),
        ({"workers": 0, "address": "auto"}, None, True),
        ({"workers": 1}, None, True),
        ({"workers": 1, "address": "local"}, "10.0.0.1:6379", True),
        ({"workers": 1}, "local", True),
        ({"workers": 1}, "10.0.0.1:6379", False),  # a run that only workers see
        ({"workers": 1, "address": "10.0.0.1:6379"}, None, False),
    ],
)
def test_a_missing_run_is_named(make_catalog, tmp_path, monkeypatch, given, environment, here):
    monkeypatch.setattr("distsbi.fanout.cluster.connected", joined)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    message = "there is no run directory at .*/nowhere" if here else "^joined$"
    with pytest.raises(ValueError, match=message):
        sample_catalog(tmp_path / "nowhere", make_catalog(), tmp_path / "out", **{**QUICK, **given})
    message = "'no_such_module:run' cannot be imported" if here else "^joined$"
    with pytest.raises(ValueError, match=message):
        simulate("no_such_module:run", {"a": "Normal(0, 1)"}, 4, tmp_path / "pairs", show_progress=False, **given)


def joined(*_):
    raise ValueError("joined")


def test_repeated_ids_are_named(run, tmp_path):
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.table({"id": [1, 2, 2, 3, 3, 3], "x": [[0.0, 1.0, 2.0]] * 6}), path)
    with pytest.raises(ValueError, match=r"2 ids .* more than once: 2 \(2 times\), 3 \(3 times\); .*id_column=None"):
        sample_catalog(run, path, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_finished(run, make_catalog, tmp_path, monkeypatch):
    catalog, out = make_catalog(), tmp_path / "out"
    wait, calls = InProcess.wait, []

    def interrupted(pool):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return wait(pool)

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt, match="2 of 7 shards are finished"):
            sample_catalog(run, catalog, out, **QUICK)
    assert sample_catalog(run, catalog, out, **QUICK).shards_now == 5


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_signal_to_the_driver_loses_nothing(make_catalog, tmp_path, name):
    catalog, out = make_catalog(), tmp_path / "out"
    slow = make_run(tmp_path / "slow", seconds_per_row=0.05)
    call = f"sample_catalog({str(slow)!r}, {str(catalog)!r}, {str(out)!r}, nsamples=9, workers=0, rows_per_shard=3)"
    code = f"import distsbi.fanout.catalog as c; c.LOADER = 'fake_posterior:load'; c.{call}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(list(out.glob("shard-*"))) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        err = process.communicate(timeout=60)[1]
    there = layout.shards_done(out, 14)
    assert 4 <= len(there) < 14
    if name == "SIGTERM":
        assert f"stopped by SIGTERM, {len(there)} of 14 shards are finished in {out}; the same call goes on" in err
        assert not list(out.glob(".shard*"))
    result = sample_catalog(slow, catalog, out, **{**QUICK, "rows_per_shard": 3})
    assert result.shards_now == 14 - len(there)
    sample_catalog(make_run(tmp_path / "run"), catalog, tmp_path / "calm", **QUICK)
    assert draws_hash(out) == draws_hash(tmp_path / "calm")


def test_full_disk_is_one_sentence_and_goes_on(run, make_catalog, small_disk):
    catalog, out = make_catalog(), small_disk.path / "out"
    many = {**QUICK, "nsamples": 3000}  # 24 kB a row
    with pytest.raises(
        OSError, match="is full, [1-5] of 7 shards are finished in .*; free some space, and the same call goes on"
    ):
        sample_catalog(run, catalog, out, **many)
    assert not list(out.glob(".shard*"))
    assert ds.dataset(out).count_rows() >= 6
    small_disk.grow()
    result = sample_catalog(run, catalog, out, **many)
    assert result.n_ok == 40
    assert result.shards_now < 7
    assert result.open().verify() == []


def test_ray_is_not_imported_without_workers(run, make_catalog, tmp_path):
    code = (
        "import sys, distsbi.fanout.catalog as c; c.LOADER = 'fake_posterior:load'\n"
        f"c.sample_catalog({str(run)!r}, {str(make_catalog())!r}, {str(tmp_path / 'out')!r}, nsamples=2, workers=0)\n"
        "sys.exit('ray' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_summaries_only_and_thinned(run, make_catalog, tmp_path):
    catalog = make_catalog()
    sample_catalog(run, catalog, tmp_path / "all", **QUICK)
    sample_catalog(run, catalog, tmp_path / "none", **QUICK, draws=False, quantiles=(0.025, 0.5))
    sample_catalog(run, catalog, tmp_path / "thin", **QUICK, thin=4)
    whole, bare, thin = (open_catalog(tmp_path / name) for name in ("all", "none", "thin"))
    with pytest.raises(ValueError, match="draws=False"):
        bare.draws("g1")
    assert "b_q2.5" in bare.summary().column_names
    np.testing.assert_array_equal(thin.draws("g5"), whole.draws("g5")[::4])
    assert thin.table(["mean"]) == whole.table(["mean"]) == bare.table(["mean"])


def test_a_catalog_of_which_no_row_fits_is_refused_before_anything_is_drawn(run, tmp_path):
    """A wrong column, which would else make a folder of nothing but invalid rows."""
    table = pa.table({"id": [f"g{i}" for i in range(40)], "mag": np.arange(40.0), "x": list(np.zeros((40, 3)))})
    pq.write_table(table, tmp_path / "catalog.parquet")
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"none of the first 40 rows .* the first has 1 values in mag, and 3 are needed"
    ):
        sample_catalog(run, tmp_path / "catalog.parquet", out, **QUICK, x_column="mag")
    assert sample_catalog(run, tmp_path / "catalog.parquet", out, **QUICK).n_ok == 40  # nothing was begun there
    with pytest.raises(ValueError, match=r"is missing, fill it up with NaN"):
        sample_catalog(
            make_run(tmp_path / "sets", missing=True),
            tmp_path / "catalog.parquet",
            tmp_path / "other",
            **QUICK,
            x_column="mag",
        )
