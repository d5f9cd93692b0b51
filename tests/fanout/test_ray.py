"""A catalog on Ray: the same draws, and worker deaths that cost nothing but time. Faults are real signals."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_posterior import ABORT, DEVICE, KILL_ONCE, RAISE, SLEEP, SLEEP_ONCE, draws_hash, make_run

import distsbi
from distsbi.fanout import catalog as catalog_module, cluster, sample_catalog, session
from distsbi.fanout.cluster import connected, worker_environment
from distsbi.store import layout

ON_RAY = {"nsamples": 9, "workers": 2, "rows_per_shard": 3, "show_progress": False}
ONE = {**ON_RAY, "workers": 1}


@pytest.fixture
def calm_hash(tmp_path, make_catalog):
    """Hash of the undisturbed draws of a catalog of ordinary rows, made without Ray."""

    def make(catalog: Path, name: str = "calm") -> str:
        out = tmp_path / name
        sample_catalog(make_run(tmp_path / f"{name}-run"), catalog, out, nsamples=9, workers=0)
        return draws_hash(out)

    return make


@pytest.mark.usefixtures("local_ray")
def test_workers_do_not_change_draws(run, make_catalog, tmp_path, calm_hash):
    catalog = make_catalog()
    expected = calm_hash(catalog)
    result = sample_catalog(run, catalog, tmp_path / "two", **ON_RAY)
    assert (result.n_ok, result.shards_now) == (40, 14)
    assert draws_hash(tmp_path / "two") == expected
    layout.shard_file(tmp_path / "two", 5, 14).unlink()
    assert sample_catalog(run, catalog, tmp_path / "two", **ONE).shards_now == 1
    assert draws_hash(tmp_path / "two") == expected
    lines = [line for line in layout.read_journal(tmp_path / "two") if line["event"] == "done"]
    assert len(lines) == 15
    assert os.getpid() not in {line["pid"] for line in lines}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("when", ["sampling", "renaming"])
def test_a_killed_worker_is_replaced(make_catalog, tmp_path, when):
    """Also one that dies between writing a shard and giving it its name: it leaves a hidden file, which the next call removes."""
    run = make_run(tmp_path / "run", kill_at_rename=when == "renaming")
    catalog = make_catalog(12, switches={4: KILL_ONCE if when == "sampling" else 0.0, 8: RAISE})
    result = sample_catalog(run, catalog, tmp_path / "out", **ON_RAY)
    assert (run / "killed").exists()
    assert result.counts == {"ok": 11, "invalid": 0, "failed": 1, "quarantined": 0}
    assert result.open().verify() == []
    failed = [line for line in layout.read_journal(tmp_path / "out") if line["event"] == "failed"]
    assert [line["attempt"] for line in failed] == [1]
    assert len(list((tmp_path / "out").glob(".shard-*"))) == (when == "renaming")
    sample_catalog(run, catalog, tmp_path / "calm", nsamples=9, workers=0)
    assert draws_hash(tmp_path / "out") == draws_hash(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_replacement_that_does_not_start_is_tried_again(make_catalog, tmp_path):
    catalog = make_catalog(switches={10: KILL_ONCE})
    two = {**ONE, "max_failures": 2}
    once = make_run(tmp_path / "once", bad_starts=1)
    assert sample_catalog(once, catalog, tmp_path / "once-out", **two).n_ok == 40
    assert (once / "start-0").exists()
    always = make_run(tmp_path / "always", bad_starts=9)
    with pytest.raises(OSError, match="the disk is away"):
        sample_catalog(always, catalog, tmp_path / "always-out", **two)
    assert len(list(always.glob("start-*"))) == 2


@pytest.mark.usefixtures("local_ray")
def test_a_local_ray_listens_on_the_loopback_interface_alone():
    import psutil

    me, listening = psutil.Process(), set()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker of the test before, on its way out
            connections = process.net_connections(kind="tcp")
            listening |= {(process.name(), c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN}
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert {address.removeprefix("::ffff:") for _, address in listening} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("seconds", [None, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_row_that_kills_or_hangs_is_quarantined_alone(run, make_catalog, tmp_path, caplog, seconds):
    switches = {5: ABORT if seconds is None else SLEEP}
    catalog = make_catalog(20, switches=switches)
    caplog.set_level("INFO", "distsbi")
    few = {**ON_RAY, "rows_per_shard": 4, "max_failures": 1}
    result = sample_catalog(run, catalog, tmp_path / "out", **few, time_limit=seconds)
    assert result.counts == {"ok": 20 - len(switches), "invalid": 0, "failed": 0, "quarantined": len(switches)}
    bad = [row for row in result.open().table(["row", "status", "message"]).to_pylist() if row["status"] != "ok"]
    assert [row["row"] for row in bad] == list(switches)
    assert ("time limit of 2 s" if seconds else "its worker (process ") in bad[0]["message"]
    lines = layout.read_journal(tmp_path / "out")
    assert {line["row"] for line in lines if line["event"] == "quarantined"} == set(switches)
    assert any(re.match(r"shard \d of 5: 4 rows in .* s on .* \(process \d+, cpu: ", text) for text in caplog.messages)
    with pytest.raises(ValueError, match="quarantined, "):
        result.open().draws("g5")
    make_catalog(20)
    calm = sample_catalog(run, catalog, tmp_path / "calm", nsamples=9, workers=0).open()
    for i in set(range(20)) - set(switches):
        np.testing.assert_array_equal(result.open().draws(f"g{i}"), calm.draws(f"g{i}"))


@pytest.mark.usefixtures("local_ray")
def test_a_shard_whose_device_always_fails_is_given_up_at_the_end(run, make_catalog, tmp_path):
    catalog = make_catalog(switches={4: DEVICE})
    with pytest.raises(
        RuntimeError, match=r"1 of 14 shards failed 2 times each .* shard 1 \(rows 3 to 5\).*All others are finished"
    ):
        sample_catalog(run, catalog, tmp_path / "out", **ONE, max_failures=2)
    status = distsbi.open_catalog(tmp_path / "out").status()
    assert (status.shards_done, status.left, status.counts["ok"]) == (13, 3, 37)


@pytest.mark.usefixtures("local_ray")
def test_another_ray_than_the_one_that_is_up_is_refused():
    import ray

    for same in (None, "auto", "local", ray.get_runtime_context().gcs_address):
        with cluster.connected(same, 1, 1, 0):
            pass
    with pytest.raises(
        ValueError, match=r"'10\.0\.0\.1:6379' is not the Ray at .* up in this process; call ray.shutdown"
    ):
        cluster.connected("10.0.0.1:6379", 1, 1, 0).__enter__()
    assert ray.is_initialized()


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_no_more_workers_are_started_than_shards_are_left(run, make_catalog, tmp_path, monkeypatch):
    most = []

    class Seen(session.Staff):
        def __init__(self, *given):
            most.append(given[-1])
            super().__init__(*given)

    monkeypatch.setattr(session, "Staff", Seen)
    catalog, out = make_catalog(), tmp_path / "out"
    assert sample_catalog(run, catalog, out, **ONE).n_ok == 40
    for shard in (3, 9):
        layout.shard_file(out, shard, 14).unlink()
    assert sample_catalog(run, catalog, out, **ONE).shards_now == 2
    assert most == [14, 2]


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_a_hanging_shard_is_killed_after_its_time(run, make_catalog, tmp_path):
    catalog = make_catalog(switches={7: SLEEP_ONCE})
    result = sample_catalog(run, catalog, tmp_path / "out", **ONE, time_limit=3.0)
    assert result.n_ok == 40
    failed = [line for line in layout.read_journal(tmp_path / "out") if line["event"] == "failed"]
    assert [line["shard"] for line in failed] == [2]
    assert "time limit of 3 s" in failed[0]["error"]


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_errors_of_workers_are_the_users_errors(run, make_catalog, tmp_path, small_disk):
    with pytest.raises(ValueError, match="leap"):
        sample_catalog(run, make_catalog(), tmp_path / "out", **ONE, solver="leap")
    with pytest.raises(OSError, match="is full, .* shards are finished"):
        sample_catalog(run, make_catalog(), small_disk.path / "out", **{**ONE, "nsamples": 3000})
    small_disk.grow()
    assert sample_catalog(run, make_catalog(), small_disk.path / "out", **{**ONE, "nsamples": 3000}).n_ok == 40


@pytest.mark.usefixtures("local_ray")
def test_whether_a_cluster_grows(monkeypatch):
    """An autoscaler cannot be had here: what this Ray tells, and what autoscalers make of it."""
    import ray
    from ray.experimental import internal_kv

    (node,) = ray.nodes()
    assert node["Labels"]["ray.io/node-id"] == node["NodeID"]
    assert not cluster.grows()
    for kinds, grows in (({f"node_{node['NodeID']}": 1}, False), ({"ray.head.default": 1}, True)):
        report = json.dumps({"autoscaler_report": {"active_nodes": kinds}}).encode()
        with monkeypatch.context() as patch:
            patch.setattr(internal_kv, "_internal_kv_get", lambda key, report=report: report)
            assert cluster.grows() is grows
    labelled = {**node, "Labels": {**node["Labels"], "ray.io/node-group": "workers"}}
    monkeypatch.setattr(ray, "nodes", lambda: [labelled])
    assert cluster.grows()


def test_room_is_by_machine(monkeypatch):
    """Two machines of three cores, of which one runs a worker of two: what fits now, and what would if nothing ran."""
    import ray
    from ray._private.state import state

    has = {"CPU": 3.0, "GPU": 1.0}
    nodes = [{"NodeID": name, "Alive": name != "gone", "Resources": has} for name in ("a", "b", "gone")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(
        state, "available_resources_per_node", lambda: {"a": {"CPU": 1.0, "GPU": 0.5}, "b": has, "gone": has}
    )
    assert (cluster.cluster_room(2, 0), cluster.cluster_room(2, 0, empty=True)) == (1, 2)
    assert cluster.cluster_room(1, 0.5) == 1 + 2
    assert cluster.cluster_room(1, 0, leaving=["b"]) == 1
    assert cluster.machines_that_fit(3, 1)
    assert not cluster.machines_that_fit(4, 0)
    assert not cluster.machines_that_fit(1, 2)


def test_environment_of_a_worker(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
    cpu = worker_environment(2, 0)
    assert (cpu["JAX_PLATFORMS"], cpu["PJRT_NPROC"], cpu["XLA_FLAGS"]) == ("cpu", "2", "--xla_a=1")
    gpu = worker_environment(1, 0.5)
    assert gpu["XLA_CLIENT_MEM_FRACTION"] == "0.450"
    assert "JAX_PLATFORMS" not in gpu
    assert str(Path(distsbi.__file__).parents[1]) in cpu["PYTHONPATH"].split(os.pathsep)
    assert cpu["PYTHONPATH"].endswith(os.pathsep + "${PYTHONPATH}")  # the machine's own, which Ray fills in


@pytest.mark.long
def test_an_own_ray_with_a_real_posterior_leaves_no_trace(tmp_path, make_catalog, monkeypatch):
    """Here sample_catalog starts Ray itself. The draws are those of `Posterior.sample`, and of this process with
    eight devices."""
    from flax import nnx

    from distsbi.data import Standardizer, Support
    from distsbi.methods import make_method
    from distsbi.networks import make_network
    from distsbi.sampling import Posterior, save

    ray = pytest.importorskip("ray")
    monkeypatch.setattr(catalog_module, "LOADER", "distsbi.sampling:load")
    pairs = np.random.default_rng(0).normal(size=(2, 50, 3, 1)).astype(np.float32)
    scales = Standardizer.fit(pairs[0, :, :2], pairs[1], [Support(), Support(-9, 9)])
    sizes = {"dim_theta": 2, "dim_x": 3, "width": 16, "depth": 1, "embed_depth": 1}
    save(
        tmp_path / "run",
        Posterior(make_network("MLP", sizes, nnx.Rngs(0)), make_method("flow"), scales, names=("a", "b")),
    )
    catalog = make_catalog(12, rows={5: [1.0, 2.0], 7: [1.0, None, 2.0]})
    before = dict(os.environ)
    if ray.is_initialized():
        ray.shutdown()
    options = {"nsamples": 150, "steps": 4, "show_progress": False}
    sample_catalog(tmp_path / "run", catalog, tmp_path / "out", **options, workers=1, rows_per_shard=4)
    assert not ray.is_initialized()
    assert dict(os.environ) == before
    out = distsbi.open_catalog(tmp_path / "out")
    assert out.status().counts == {"ok": 10, "invalid": 2, "failed": 0, "quarantined": 0}
    assert "1 values that are NaN (or null) or infinite" in out.table(["message"])["message"][7].as_py()
    x = np.asarray(pq.read_table(catalog)["x"][9].as_py(), np.float32).reshape(1, 3, 1)
    observation_id = out.table(["observation_id"])["observation_id"][9].as_py()
    same = distsbi.load(tmp_path / "run").sample(jax.random.key(0), x, 150, observation_id=observation_id, steps=4)
    np.testing.assert_allclose(out.draws("g9"), same, atol=1e-4)
    sample_catalog(tmp_path / "run", catalog, tmp_path / "here", **options, workers=0)
    assert draws_hash(tmp_path / "here") == draws_hash(tmp_path / "out")


@pytest.fixture
def no_ray():
    """Ray is not up in this process."""
    ray = pytest.importorskip("ray")
    ray.shutdown()


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no.such.host.invalid:6379", "127.0.0.1:99999"]
)
def test_an_address_where_nothing_listens_is_named(monkeypatch, address):
    monkeypatch.setattr(cluster, "PROBE_SECONDS", 0.1)
    with pytest.raises(ValueError, match=f"no Ray cluster answers at '{address}'"), connected(address, 1, 1, 0):
        pass


def test_a_token_that_is_not_there_is_told(tmp_path):
    """In a process of its own, for Ray reads its settings once. Without a token it does not even ask."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code = f"from distsbi.fanout.cluster import connected\nwith connected({address!r}, 1, 1, 0): pass"
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**env, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
    assert done.stderr.strip().splitlines()[-1] == (
        f"ValueError: the Ray cluster at {address!r} asks for a token, and this call has none; set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
    )


@pytest.mark.usefixtures("no_ray")
def test_a_worker_that_this_machine_has_no_room_for_is_refused(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cpus = cluster.own_cpus()
    with (
        pytest.raises(ValueError, match=f"asks for {cpus + 1} CPUs and this machine has {cpus}; lower cpus_per_worker"),
        connected(None, 1, cpus + 1, 0),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match=r"asks for 99 GPUs and Ray finds \d+ on this machine; lower num_gpus_per_worker"
        ),
        connected(None, 1, 1, 99),
    ):
        pass
    assert not ray.is_initialized()
