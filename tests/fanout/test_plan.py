"""A plan is a rehearsal and a sum."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from distsbi.data import Standardizer, Support
from distsbi.environment import device_name
from distsbi.fanout import catalog as catalog_module, cluster, plan as planning
from distsbi.methods import FlowMatching
from distsbi.networks import (
    MLP,
    Embedded,
    Flux1,
    Flux1Params,
    Layout,
    MLPParams,
    PatchEmbedding,
    PatchEmbeddingParams,
)
from distsbi.networks.base import compute_dtype
from distsbi.sampling import Posterior, load, tiles

WIDTH, DEPTH = 32, 3


@pytest.fixture(autouse=True)
def true_loader(monkeypatch):
    monkeypatch.setattr(catalog_module, "LOADER", "distsbi.sampling:load")


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    network = MLP(MLPParams(2, 3, width=WIDTH, depth=DEPTH), nnx.Rngs(0))
    path = tmp_path_factory.mktemp("plan") / "run"
    Posterior(network, FlowMatching(), Standardizer.identity(2, 3), mesh={"data": 1}).save(str(path))
    return path


def test_the_sum():
    """12 shards of 10 rows on 5 workers are three rounds."""
    total = planning._total(n_rows=115, n=100, rows=10, workers=5, rate=500.0, overhead=0.5, start_up=7.0)
    assert total == pytest.approx(7 + 3 * (0.5 + 10 * 100 / 500))


def test_the_pace_is_that_of_all_workers_together():
    """Two workers of 2 s a shard, which took 1 s while the second was not up."""
    ends = {("a", 1): [1, 2, 3, 4, 6, 8, 10], ("b", 1): [5, 7, 9, 11]}
    done = [{"host": host, "pid": pid, "time": time} for (host, pid), times in ends.items() for time in times]
    assert planning._between(done) == pytest.approx(2.0)
    assert sorted(planning.first_shards(done)) == [1, 5]
    assert planning._between([line for line in done if line["time"] <= 5]) == 0.0  # never together


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_a_rehearsal_on_this_machine(real_run):
    made = planning.plan(real_run, observations=1e4, nsamples=2_000, workers=2, seconds=1, steps=4)
    assert made.rate > 100
    assert 0 <= made.overhead < 10
    assert made.how == "rehearsed here with 2 workers at once"
    assert (made.device, made.tile) == (device_name(jax.devices()[0]), (8, 256))  # the workers'
    assert made.shards == -(-10_000 // made.rows_per_shard)
    assert made.stored_bytes > 1e4 * 2_000 * 2 * 4
    assert json.loads(planning.to_json(made))["observations"] == 10_000
    assert "2 workers" in planning.report(made)
    assert f"must take {planning._bytes(made.stored_bytes / made.seconds)}/s" in planning.report(made)


def test_a_rehearsal_stays_on_this_machine(real_run, monkeypatch):
    """Also in the job of a cluster, whose other machines do not see the made-up catalog."""

    class Joined(Exception):
        pass

    def connected(address, *_):
        raise Joined(address)

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(cluster, "connected", connected)
    with pytest.raises(Joined, match="^local$"):
        planning.plan(real_run, observations=1e4, nsamples=2_000, workers=1)


def test_another_device_is_estimated_from_the_arithmetic(real_run, monkeypatch):
    posterior = load(real_run, mesh={"data": 1})
    by_hand = 4 * 2 * (2 * WIDTH + DEPTH * 2 * WIDTH**2 + WIDTH * 2)  # four evaluations of the matrices
    flops, evaluations = planning.flops_per_draw(posterior, solver="euler", steps=4)
    assert by_hand < flops < 1.2 * by_hand
    assert evaluations == 4
    made = planning.plan(real_run, observations=1e7, nsamples=1e4, workers=64, device="h100")
    assert made.how.startswith("estimated")
    assert made.seconds > 1e11 / 64 / made.rate
    assert made.rate < planning.WRITE_BYTES / (4 * 2)  # two parameters: the network alone would be faster
    assert made.tile == (128, 512)
    monkeypatch.setattr(planning, "LAUNCH_SECONDS", 1.0)
    slow = planning.plan(real_run, observations=1e7, nsamples=1e4, device="h100", solver="euler", steps=4)
    assert slow.rate == pytest.approx(128 * 512 / 4, rel=0.01)
    known = planning.plan(real_run, observations=1e7, nsamples=1e4, workers=64, rate=1e6, draws=False)
    assert known.seconds == pytest.approx(1e11 / 64 / 1e6, rel=0.1)
    assert known.stored_bytes < made.stored_bytes / 100


def test_the_estimate_is_what_was_measured_on_an_h200(tmp_path):
    """1.43e6 draws/s of one worker, 2.19e6 of two to a GPU (benchmarks/results/catalog_scaling.jsonl), by the same network."""
    network = MLP(MLPParams.default(2, 2), nnx.Rngs(0))
    Posterior(network, FlowMatching(), Standardizer.identity(2, 2), mesh={"data": 1}).save(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="num_gpus_per_worker must not be negative; got -1"):
        planning.plan(tmp_path / "run", observations=1, nsamples=1, num_gpus_per_worker=-1)
    catalog = {"observations": 4_000, "nsamples": 1_000, "rows_per_shard": 100, "device": "h200"}
    for workers, measured in ((1, 1.43e6), (2, 2.19e6)):
        made = planning.plan(tmp_path / "run", workers=workers, num_gpus_per_worker=1 / workers, **catalog)
        assert 4e6 / (made.seconds - made.start_up) == pytest.approx(measured, rel=0.05)


def test_the_tile_is_that_of_the_workers_kind(tmp_path):
    """Of a wide network a GPU takes fewer rows at a time, and more slots where few draws are asked for."""
    network = Flux1(Flux1Params.default(10, 100), nnx.Rngs(0))
    posterior = Posterior(network, FlowMatching(), Standardizer.identity(10, 100), mesh={"data": 1})
    posterior.save(str(tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "kind_name", lambda mesh: "gpu")
        there = load(tmp_path / "run", mesh={"data": 1})
        expected = {n: there.tile.for_draws(n, there.most_slots) for n in (10, 1_000)}
    assert expected[1_000] != tiles.KINDS["gpu"].tile
    for n, tile in expected.items():
        made = planning.plan(tmp_path / "run", observations=100, nsamples=n, workers=1, device="h100")
        assert made.tile == (tile.slots, tile.draws)
    other = Embedded(
        MLP(MLPParams(2, 2, ch_x=4, dtype="bfloat16"), nnx.Rngs(0)),
        {"": PatchEmbedding(PatchEmbeddingParams((3, 1), (2,), 4), nnx.Rngs(0))},
        Layout.of(3),
    )
    assert [compute_dtype(one) for one in (network, other)] == ["float32", "bfloat16"]


@pytest.mark.parametrize(("cpus", "gpus", "room"), [(4, 0, 4), (4, 1, 1), (4, 0.5, 2), (16, 0.5, 1), (32, 0, 1)])
def test_no_more_workers_are_rehearsed_than_the_machine_has_room_for(cpus, gpus, room, monkeypatch):
    monkeypatch.setattr(cluster, "own_cpus", lambda: 16)
    monkeypatch.setattr(cluster, "own_gpus", lambda: 1)
    assert planning._room(cpus, gpus) == room


MEMORY = """
import sys
import distsbi.fanout.catalog as c
c.LOADER = "fake_posterior:load"
run, catalog, out, nsamples = *sys.argv[1:4], int(sys.argv[4])
for name, n, thin in (("small", 9, 1), ("thin", nsamples, 10), ("whole", nsamples, 1)):
    c.sample_catalog(run, catalog, out + name, nsamples=n, thin=thin, workers=0, rows_per_shard=40, show_progress=False)
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # kB
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process without that of its parent")
def test_the_memory_of_a_shard(run, make_catalog, tmp_path):
    """What a process takes more for a shard of 64 MB than for a small one is no more than what is planned, and not much less."""
    catalog, n = make_catalog(rows={3: [1.0, 2.0]}), 200_000
    arguments = [str(path) for path in (run, catalog, tmp_path / "out", n)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    said = subprocess.check_output([sys.executable, "-c", MEMORY, *arguments], env=env, text=True)
    small, *larger = (1024 * int(peak) for peak in said.split())
    for taken, kept in zip(larger, (n // 10, n), strict=True):
        planned = planning.shard_bytes(40, n, kept, 2)
        assert 0.6 * planned < taken - small < planned
        assert taken < planning.PROCESS_BYTES + planned


def test_made_up_observations_are_like_the_training_set(real_run):
    posterior = load(real_run, mesh={"data": 1})
    scales = posterior.weights.standardizer
    x = planning.made_up(posterior, 500)["x"]
    z = np.asarray(scales.forward_x(x))
    assert x.shape == (500, 3, 1)
    assert abs(z.mean()) < 0.1
    assert abs(z.std() - 1) < 0.1


def test_made_up_observations_span_the_decades_of_the_training_set():
    rng = np.random.default_rng(0)
    theta, x = rng.uniform(-1, 1, (500, 2, 1)), 10 ** rng.uniform(-4, 3, (500, 3, 1))
    scales = Standardizer.fit(theta.astype("f4"), x.astype("f4"), [Support(-1.0, 1.0)] * 2)
    assert scales.x_bijection is not None
    posterior = Posterior(MLP(MLPParams(2, 3, width=8, depth=1), nnx.Rngs(0)), FlowMatching(), scales, mesh={"data": 1})
    made = planning.made_up(posterior, 500)["x"]
    assert made.min() > 0
    z = np.asarray(scales.forward_x(made))
    assert abs(z.mean()) < 0.1
    assert abs(z.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "abacus"}, "device must be one of a100, .*; got 'abacus'"),
        (
            {"device": "tpu-v5e", "workers": 64},
            "not on TPUs; got device 'tpu-v5e'. .* by sample_dataset .* processes; for",
        ),
        ({"device": "TPU", "rate": 1e6}, "Ray workers draw catalogs on CPUs and GPUs, not on TPUs"),
        ({"observations": 0.5}, "observations must be a positive whole number"),
        ({"workers": 0}, "workers must be a positive whole number"),
        ({"rate": -1.0}, "rate must be draws per second"),
        ({"rate": 1.0, "thin": 0}, "thin must be a positive integer; got 0"),
    ],
)
def test_errors(real_run, options, says):
    with pytest.raises(ValueError, match=says):
        planning.plan(real_run, **{"observations": 100, "nsamples": 10, **options})
