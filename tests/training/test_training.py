"""Training: learns an exact posterior, the same on any mesh, resumes to the same bits, refuses what it cannot train on."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx

from distsbi import ConditionalPipeline, MLPFlowPipeline, MLPParams, Prior, mesh as meshes
from distsbi.data import write_pairs
from distsbi.data.source import hold_out
from distsbi.networks import MLP, Simformer, SimformerParams
from distsbi.processes import Rank, job
from distsbi.tasks import get_task
from distsbi.training import TrainingConfig, loop, rows, update
from distsbi.training.loop import overfitted
from distsbi.training.update import Learner
from tests.compilations import optimised

SMALL = MLPParams(2, 2, width=16, depth=2)
# AdamW compiles in half the time of Muon, which the tests of accuracy, of meshes and of kills use.
QUICK = {"nsteps": 40, "val_every": 10, "batch_size": 32, "calibrate": False, "optimizer": "adamw"}


def _pairs(n=400, seed=0):
    task = get_task("two_moons")
    return tuple(np.asarray(a) for a in task.pairs(jax.random.key(seed), n))


TWO = {"data": 2}


def _pipeline(data=None, val=None, mesh=TWO, params=SMALL, **config):
    return MLPFlowPipeline(
        _pairs() if data is None else data, val, 2, 2, params=params, mesh=mesh,
        training_config={**QUICK, **config}, prior=get_task("two_moons").prior,
    )  # fmt: skip


def _same(a, b):
    pairs = zip(jax.tree.leaves(nnx.state(a.model)), jax.tree.leaves(nnx.state(b.model)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.long
def test_learns_an_exact_posterior():
    """theta ~ N(0, 1)^2, x = exp(theta / 2) + noise of sd 0.2 exp(theta / 2), so that no linear map gives the answer away.
    Mean and sd against the exact ones, by quadrature. An untrained network misses by 0.3 and more; bounds are on what 1,500
    short updates learn, the sampling error of 20,000 draws being below 0.01."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(20_000, 2, 1)).astype("f4")
    x = np.exp(theta / 2) * (1 + 0.2 * rng.normal(size=theta.shape)).astype("f4")
    pipeline = MLPFlowPipeline(
        (theta, x), None, 2, 2, params=MLPParams(2, 2, width=48, depth=2), mesh={"data": 1},
        training_config={"nsteps": 1_500, "batch_size": 128},
    )  # fmt: skip
    with optimised():
        losses, val_losses = pipeline.train(nnx.Rngs(0))
    assert len(losses) == len(val_losses)
    x_o = np.asarray([[[0.7], [1.9]]], np.float32)
    draws = pipeline.sample(rng=jax.random.PRNGKey(0), x_o=x_o, nsamples=20_000)[..., 0]
    grid = np.linspace(-6, 6, 4001)
    for i in range(2):
        scale = 0.2 * np.exp(grid / 2)
        p = np.exp(-0.5 * grid**2 - 0.5 * ((x_o[0, i, 0] - np.exp(grid / 2)) / scale) ** 2) / scale
        p /= p.sum()
        mean = (p * grid).sum()
        sd = np.sqrt((p * (grid - mean) ** 2).sum())
        np.testing.assert_allclose(draws[:, i].mean(), mean, atol=0.1 * sd)
        np.testing.assert_allclose(draws[:, i].std(), sd, rtol=0.1)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.06
    assert pipeline.posterior.facts["certificate"]["met"]


@pytest.mark.cpus
@pytest.mark.long
def test_mesh_and_fsdp_do_not_change_what_is_learned(monkeypatch):
    """The same updates up to the rounding of a sum over devices; with fsdp the state is really divided."""
    split, inner = [], meshes.state_shardings

    def seen(*given, **options):
        shardings = inner(*given, **options)
        split.append(any(not each.is_fully_replicated for each in jax.tree.leaves(shardings.params)))
        return shardings

    monkeypatch.setattr(meshes, "state_shardings", seen)
    params = MLPParams(2, 2, width=32, depth=2)  # matrices that Muon takes
    base = _pipeline(mesh={"data": 1}, params=params, optimizer="muon")
    base.train(nnx.Rngs(1))
    other = _pipeline(mesh={"data": 8}, params=params, fsdp=True, optimizer="muon")
    other.train(nnx.Rngs(1))
    a, b = (jax.tree.leaves(nnx.state(p.model)) for p in (base, other))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-4)
    assert split == [False, True]


def test_fsdp_really_splits():
    pipeline = _pipeline(mesh={"data": 8}, fsdp=True)
    params = nnx.state(pipeline.model)
    shardings = meshes.state_shardings(pipeline.mesh, params, fsdp=True)
    placed = jax.device_put(params, shardings)["w1"][...]
    assert placed.addressable_shards[0].data.size * 8 == placed.size


def test_the_update_compiles_once(caplog):
    jax.config.update("jax_log_compiles", True)
    try:
        _pipeline(nsteps=30).train(nnx.Rngs(0))
    finally:
        jax.config.update("jax_log_compiles", False)
    assert sum("Compiling jit(advance)" in record.getMessage() for record in caplog.records) == 1


class _Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(run_dir, tmp_path, monkeypatch, at):
    from distsbi.training.checkpoints import Checkpoints

    whole = _pipeline(save_every=20, checkpoint_dir=str(tmp_path / "whole"))
    whole_losses = whole.train(nnx.Rngs(0))
    log, calls = Checkpoints.log, []

    def stopping(self, line):
        log(self, line)
        calls.append(line)
        if len(calls) == at:
            raise _Stop

    monkeypatch.setattr(Checkpoints, "log", stopping)
    with pytest.raises(_Stop):
        _pipeline(save_every=20, checkpoint_dir=str(run_dir)).train(nnx.Rngs(0))
    monkeypatch.setattr(Checkpoints, "log", log)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')  # a line cut short by the kill
    resumed = _pipeline(save_every=20, checkpoint_dir=str(run_dir))
    assert resumed.train(nnx.Rngs(0)) == whole_losses
    assert _same(resumed, whole)
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]
    with pytest.raises(ValueError, match="another training"):
        _pipeline(save_every=20, checkpoint_dir=str(run_dir), max_lr=1e-4).train(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"differs in initial weights\); choose another checkpoint_dir, also to go on"):
        resumed.train(nnx.Rngs(0))


def _batches(data, size=32):
    return [(data[0][i : i + size], data[1][i : i + size]) for i in range(0, len(data[0]), size)]


@pytest.mark.long
def test_every_form_of_data(tmp_path):
    data = _pairs()
    write_pairs(tmp_path / "pairs", *data)
    arrays = _pipeline(data, _pairs(100, seed=1))
    arrays.train(nnx.Rngs(0))
    folder = _pipeline(str(tmp_path / "pairs"), _pairs(100, seed=1))
    folder.train(nnx.Rngs(0))
    assert _same(arrays, folder)
    for source in (_batches(data), get_task("two_moons")):
        pipeline = _pipeline(source, _pairs(100, seed=1))
        losses, _ = pipeline.train(nnx.Rngs(0))
        assert np.isfinite(losses).all()
        assert pipeline.sample(rng=0, x_o=np.zeros((1, 2, 1)), nsamples=5).shape == (5, 2, 1)
    assert pipeline.parameter_names == get_task("two_moons").parameter_names


def test_an_iterator_that_ends_ends_the_training(run_dir):
    """After 12 updates of 40, with their weights, validated and saved; a second attempt finds them."""

    def pipeline(batches):
        return _pipeline(iter(batches), _pairs(100, seed=1), checkpoint_dir=str(run_dir))

    batches = _batches(_pairs(), 16)
    first = pipeline(batches)
    with pytest.warns(UserWarning, match="ended at update 12 of 40, and the training with it"):
        _, val_losses = first.train(nnx.Rngs(0))
    assert len(val_losses) == 2
    assert first.posterior.facts["training"]["steps"] == 12
    again = pipeline(batches)
    with pytest.warns(UserWarning, match="ended at update 12 of 40"):
        assert again.train(nnx.Rngs(0))[1] == val_losses
    assert _same(first, again)


@pytest.mark.parametrize(("bytes_", "expected"), [(2**28, 10), (4 * 32 * 4 * 4, 4), (1, 1)])
def test_batches_on_the_devices_are_bounded_in_bytes(monkeypatch, bytes_, expected):
    """A dispatch of a stream holds as many batches as there is room for, of the 10 between validations."""
    from distsbi.training import loop

    def counting(stream, count, mesh, parted):
        assert count == expected
        raise _Stop

    monkeypatch.setattr(loop, "_stacked", counting)
    monkeypatch.setattr(loop, "DISPATCH_BYTES", bytes_)
    with pytest.raises(_Stop):
        _pipeline(_batches(_pairs()), _pairs(100, seed=1)).train(nnx.Rngs(0))


def test_a_batch_that_the_mesh_does_not_divide_warns(monkeypatch):
    monkeypatch.setattr(loop, "Learner", stop)  # nothing is compiled
    with (
        pytest.warns(UserWarning, match="batch_size=31 is no multiple of the 2 devices, .* give batch_size=32"),
        pytest.raises(_Stop),
    ):
        _pipeline(batch_size=31).train(nnx.Rngs(0))


@pytest.mark.long
def test_the_average_moves_with_the_optimiser():
    """Of eight updates, two steps: between steps the weights stand still, and are not averaged in again."""
    options = {"multistep": 4, "decay_transition": 1.0, "warmup_steps": 0, "val_every": 8}
    first, second = _pipeline(nsteps=4, **options), _pipeline(nsteps=8, **options)
    start = jax.tree.leaves(nnx.state(first.model))
    for pipeline in (first, second):
        pipeline.train(nnx.Rngs(0))
    once, twice = (jax.tree.leaves(p._last.weights.params) for p in (first, second))
    for found, p0, p1, p2 in zip(jax.tree.leaves(second.posterior.weights.params), start, once, twice, strict=True):
        after_one = p0 + 0.9 * (p1 - p0)  # decays 1 / 10 and 2 / 11
        np.testing.assert_allclose(found, after_one + 9 / 11 * (p2 - after_one), atol=1e-6)


def test_whole_floats_are_integers():
    options = {
        "nsteps": 3.0,
        "batch_size": np.float32(32),
        "val_every": 10.0,
        "warmup_steps": 0.0,
        "save_every": np.int64(20),
    }
    config = TrainingConfig.from_dict(options)
    for name in options:
        assert type(getattr(config, name)) is int


def test_fewer_steps_than_to_a_validation():
    config = TrainingConfig(val_every=100, save_every=200, nsteps=30).resolve(1_000)
    assert (config.val_every, config.save_every) == (30, 30)
    assert TrainingConfig(save_every=30, nsteps=30).resolve(1_000).val_every == 30


@pytest.mark.parametrize(
    ("save_every", "val_every"), [(250, 250), (300, 150), (101, 101), (1000, 200), (997, 997), (998, 499), (30, 30)]
)
def test_validations_fit_the_checkpoints_that_are_asked_for(save_every, val_every):
    assert TrainingConfig(save_every=save_every).resolve(30_000).val_every == val_every


@pytest.mark.parametrize(
    ("n", "fraction", "held"),
    [
        (200, 0.05, 10),
        (400, 0.5, 200),
        (1_000, 0.02, 20),
        (30_000, 0.5, 15_000),
        (200, None, 20),
        (30_000, None, 1_500),
        (200_000, None, 5_000),
    ],
)
def test_the_fraction_that_is_held_out(n, fraction, held):
    rest, out = hold_out((np.zeros((n, 1, 1), np.float32), np.zeros((n, 1, 1), np.float32)), fraction)
    assert (len(out[0]), len(rest[0])) == (held, n - held)


def test_validations_that_no_dispatch_divides(monkeypatch):
    """Two programs, as long as can be, not one update at a time."""
    counts, inner = [], Learner.advance
    monkeypatch.setattr("distsbi.training.loop.DISPATCH", 4)
    monkeypatch.setattr(Learner, "advance", lambda *given: (counts.append(given[-1]), inner(*given))[1])
    _pipeline(nsteps=14, val_every=7, save_every=7).train(nnx.Rngs(0))
    assert counts == [4, 3]


def test_the_same_call_again_leaves_a_finished_run_as_it_is(run_dir):
    """Its seconds, its certificate, the versions that trained it; what was chosen for other patterns too."""
    first = _pipeline(calibrate=True, save_every=20, checkpoint_dir=str(run_dir))
    first.train(nnx.Rngs(0))
    first.posterior.facts["note"] = "of a later call"
    first.save(str(run_dir))
    spec, lines = (run_dir / "spec.json").read_bytes(), (run_dir / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert first.posterior.facts["training"]["seconds"] >= seconds[-1] > 0
    again = _pipeline(calibrate=True, save_every=20, checkpoint_dir=str(run_dir))
    again.train(nnx.Rngs(0))
    assert (run_dir / "spec.json").read_bytes() == spec
    assert again.posterior.facts == json.loads(json.dumps(first.posterior.facts))
    assert again.posterior.default_solver == first.posterior.default_solver
    options = {"rng": 0, "x_o": np.zeros((1, 2, 1)), "nsamples": 9, "use_ema": False}
    np.testing.assert_array_equal(again.sample(**options), first.sample(**options))


def test_a_folder_larger_than_memory_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr("distsbi.data.source.IN_MEMORY_BYTES", 100)
    write_pairs(tmp_path / "pairs", *_pairs(), rows_per_file=150)
    runs = [_pipeline(str(tmp_path / "pairs"), _pairs(100, seed=1)) for _ in range(2)]
    for run in runs:
        run.train(nnx.Rngs(0))
    assert _same(*runs)


def test_held_out_rows_are_not_trained_on(tmp_path, monkeypatch):
    """Of every kind of source: no row of the validation set turns up in two passes over the rest."""
    from distsbi.data.source import Shapes, make_source

    theta, x = _pairs(600)
    write_pairs(tmp_path / "pairs", theta, x, rows_per_file=100)
    shapes = Shapes((2, 1), (2, 1))
    arrays = make_source((theta, x), shapes)
    monkeypatch.setattr("distsbi.data.source.IN_MEMORY_BYTES", 100)
    streams = [make_source(data, shapes) for data in (str(tmp_path / "pairs"), _batches((theta, x), 50))]
    for source in [arrays, *streams]:
        rest, (held, _) = source.hold_out(0.1)
        if rest.arrays is not None:
            seen = rest.arrays[0]
        else:
            stream = rest.batches(0, 50)
            seen = np.concatenate([next(stream)[0] for _ in range(22)])
        rows = {row.tobytes() for row in seen}
        assert len(held) >= 50
        assert len(rows) >= 500
        assert not rows & {row.tobytes() for row in held}


def test_augment_runs_inside_the_step():
    """In every one of the 40, with a key of its own."""
    seen = set()

    def augment(key, theta, x):
        jax.debug.callback(lambda words: seen.add(tuple(np.ravel(words).tolist())), jax.random.key_data(key))
        return theta, x

    pipeline = _pipeline(mesh={"data": 1})
    pipeline.augment = augment
    pipeline.train(nnx.Rngs(0))
    jax.effects_barrier()
    assert len(seen) >= 40


def test_scales_and_validation_see_what_augment_adds():
    """Noise-free x with noise added on the fly: a scale fitted on clean pairs would be the floor, 1e-3."""
    theta = np.random.default_rng(0).normal(size=(400, 2, 1)).astype("f4")
    pipeline = MLPFlowPipeline((theta, theta), None, 2, 2, params=SMALL, training_config=QUICK, mesh=TWO,
                               augment=lambda key, theta, x: (theta, x + jax.random.normal(key, x.shape)))  # fmt: skip
    pipeline.train(nnx.Rngs(0))
    root = np.asarray(pipeline.posterior.weights.standardizer.root)
    np.testing.assert_allclose(np.diag(root), np.sqrt(0.5), rtol=0.15)


def test_pairs_are_augmented_in_blocks_and_some_for_scales(monkeypatch):
    monkeypatch.setattr("distsbi.pipelines.base.AUGMENT_BYTES", 100 * 16)
    monkeypatch.setattr("distsbi.pipelines.base.FIT_PAIRS", 250)
    traced = []

    def augment(key, theta, x):
        traced.append(len(x))
        return theta, x + jax.random.normal(key, x.shape)

    zeros = np.zeros((400, 2, 1), np.float32)
    pipeline = MLPFlowPipeline(
        (zeros, zeros), None, 2, 2, params=SMALL, training_config=QUICK, mesh=TWO, augment=augment
    )
    theta, x = pipeline._fit_pairs()
    assert len(theta) == 250 and traced == [100, 50]
    assert len(np.unique(x)) == x.size  # every block has noise of its own
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(pipeline._fit_pairs()[1], x)


@pytest.mark.parametrize(("n", "devices", "used"), [(1_000, 2, 1_000), (513, 2, 512), (600, 8, 592), (3, 8, 8)])
def test_hardly_a_validation_pair_is_dropped(n, devices, used):
    pairs = np.arange(n, dtype=np.float32)[:, None, None], np.zeros((n, 1, 1), np.float32)
    theta, _ = loop._stack(pairs, meshes.make_mesh({"data": devices}))
    assert theta.shape[1] % devices == 0 and theta.shape[1] <= loop.VALIDATION_ROWS
    assert theta[..., 0, 0].size == used and len(np.unique(theta)) == min(n, used)


def test_a_set_that_is_large_for_a_device_is_divided(monkeypatch):
    """360 pairs of 16 bytes, of which two devices have room for all, for half, and for less."""
    whole, half = _pipeline(), _pipeline()
    whole.train(nnx.Rngs(0))
    monkeypatch.setattr(rows, "_room", lambda mesh: 3_000)
    half.train(nnx.Rngs(0))
    for a, b in zip(*(jax.tree.leaves(nnx.state(p.model)) for p in (whole, half)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    monkeypatch.setattr(rows, "_room", lambda mesh: 2_000)
    with pytest.raises(ValueError, match=r"train on distsbi.data.StreamedPairs\(folder\), or on more devices"):
        _pipeline().train(nnx.Rngs(0))


def stop(*args, **options):
    raise _Stop


def test_a_stream_that_cannot_be_held_out_says_so(monkeypatch):
    theta, x = _pairs(200)
    rng = np.random.default_rng(0)

    class Shuffling:
        def __iter__(self):
            order = rng.permutation(200)
            return iter([(theta[order[i : i + 32]], x[order[i : i + 32]]) for i in range(0, 200, 32)])

    with pytest.raises(ValueError, match="changes its order between passes"):
        _pipeline(Shuffling()).train(nnx.Rngs(0))
    monkeypatch.setattr(loop, "Learner", stop)
    with pytest.raises(_Stop):  # past the data
        _pipeline(Shuffling(), _pairs(100, seed=1)).train(nnx.Rngs(0))


def test_training_goes_on_and_use_ema():
    pipeline = _pipeline()
    with pytest.raises(ValueError, match="not trained yet"):
        pipeline.sample(rng=0, x_o=np.zeros((1, 2, 1)), nsamples=5)
    _, first = pipeline.train(nnx.Rngs(0), nsteps=120)
    _, second = pipeline.train(nnx.Rngs(1), nsteps=40, max_lr=1e-4)
    assert abs(second[0] - first[-1]) < abs(second[0] - first[0]) / 2  # from there, not anew
    x = np.zeros((1, 2, 1))
    assert np.abs(pipeline.sample(0, x, 50) - pipeline.sample(0, x, 50, use_ema=False)).max() > 0


def test_early_stopping_keeps_the_best():
    pipeline = _pipeline(_pairs(60), nsteps=4_000, val_every=10, patience=5, max_lr=1e-2, ema_decay=0.9)
    _, val_losses = pipeline.train(nnx.Rngs(0))
    assert len(val_losses) < 400
    facts = pipeline.posterior.facts["training"]
    assert facts["best_val_loss"] == pytest.approx(min(val_losses))


@pytest.mark.parametrize(
    ("ratio", "stale"), [(None, [0, 1, 2, 0, 1, 2]), (1.3, [0, 0, 1, 0, 1, 0]), (1.0, [0, 1, 2, 0, 1, 0])]
)
def test_what_patience_counts(monkeypatch, ratio, stale):
    """With `val_error_ratio` only what is above so many times the lowest so far; the best weights are those of the lowest either way."""
    monkeypatch.setattr(update.Learner, "loss", lambda self, params, *_: params)  # weights that are their loss
    config = TrainingConfig(val_error_ratio=ratio)
    learner = update.Learner(None, None, None, None, config, None, None, epoch=0)  # type: ignore[arg-type]
    one = jnp.zeros(1)
    state = learner.init(jnp.float32(jnp.inf), jnp.zeros(2, jnp.uint32), 0)
    counted = []
    for loss in (1.0, 1.2, 1.4, 0.9, 1.2, 0.9):
        state, found = learner.validate(dataclasses.replace(state, ema=jnp.float32(loss)), (one, one))
        assert found == np.float32(loss)
        counted.append(int(state.stale))
    assert counted == stale
    assert state.best == state.best_loss == np.float32(0.9)


class _Named(nnx.Module):
    """Modules named as weights of other kinds are, and those weights."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embedding, self.scale_net = (nnx.Linear(48, 48, rngs=rngs) for _ in range(2))
        self.bias_net, self.small = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(48, 8, rngs=rngs)
        self.ids, self.norm = nnx.Embed(48, 48, rngs=rngs), nnx.LayerNorm(48, rngs=rngs)
        self.pos_embedding, self.stacked_bias1 = nnx.Param(jnp.ones((48, 48))), nnx.Param(jnp.ones((48, 48)))


LARGE, SMALLER = {"embedding.kernel", "scale_net.kernel", "bias_net.kernel"}, {"small.kernel"}


def _moves(gradients, **options):
    """What weights are moved by, after each of these gradients in turn."""
    tool = update.make_optimizer(TrainingConfig(weight_decay=0.0, **options))
    weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), gradients)
    step = lambda state, gradient: tool.update(gradient, state, weights)[::-1]  # noqa: E731
    return jax.jit(lambda g: jax.lax.scan(step, tool.init(weights), g)[1])(gradients)


@pytest.mark.parametrize(("optimizer", "multistep"), [("muon", 1), ("adamw", 1), ("adamw", 4)])
def test_the_learning_rate(optimizer, multistep):
    """In 40 updates up to the maximum, there until half of 200, and down by a cosine: the same gradient all along moves weights by so much more or less
    than at a constant rate, by which Adam moves them in the end. Where gradients are averaged, only the last of them moves any."""
    same = {"bias": jnp.full((204, 1), 0.1), "matrix": jnp.tile(0.1 * jnp.eye(32), (204, 1, 1))}

    def moves(**options):
        found = _moves(same, optimizer=optimizer, multistep=multistep, nsteps=200, max_lr=1e-2, **options)
        return np.stack([found["bias"][:, 0], found["matrix"][:, 0, 0]], 1).reshape(-1, multistep, 2)

    scheduled = moves(min_lr=1e-4, warmup_steps=40, decay_transition=0.5)
    constant = moves(min_lr=1e-2, warmup_steps=0)
    assert not scheduled[:, :-1].any()
    assert constant[-1, -1, 0] == pytest.approx(-1e-2, rel=1e-3)
    late = 1e-4 + 9.9e-3 * (1 + np.cos(0.48 * np.pi)) / 2
    rates = {0: 1e-5, 20: 5.005e-3, 40: 1e-2, 72: 1e-2, 100: 1e-2, 148: late, 200: 1e-4}
    for update_number, rate in rates.items():
        at = update_number // multistep
        np.testing.assert_allclose(1e-2 * scheduled[at, -1] / constant[at, -1], rate, rtol=1e-3)


@pytest.mark.parametrize("clip_norm", [1.0, 3.0])
def test_large_gradients_are_clipped(clip_norm):
    """One of norm 10, to the norm of all weights together; one of norm 0.5 before it is not. What Adam moves weights by has both."""
    given = {"a": jnp.asarray([0.3, 6.0]), "b": jnp.asarray([-0.4, 8.0])}
    options = {"optimizer": "adamw", "nsteps": 9, "warmup_steps": 0, "decay_transition": 1.0, "max_lr": 1e-3}
    moves = _moves(given, clip_norm=clip_norm, **options)
    for name, (first, second) in given.items():
        second = second * clip_norm / 10
        mean, square = (0.9 * first + second) / 1.9, (0.999 * first**2 + second**2) / 1.999
        np.testing.assert_allclose(moves[name][1], -1e-3 * mean / np.sqrt(square), rtol=1e-4)


@pytest.mark.parametrize(("optimizer", "decayed"), [("muon", LARGE), ("adamw", LARGE | SMALLER)])
def test_which_weights_decay(optimizer, decayed):
    """A step without a gradient moves what decays alone."""
    params = nnx.state(_Named(), nnx.Param)
    tool = update.make_optimizer(TrainingConfig(nsteps=10, optimizer=optimizer, weight_decay=1.0))
    step, _ = tool.update(jax.tree.map(jnp.zeros_like, params), tool.init(params), params)
    moved = {".".join(map(str, path)) for path, leaf in nnx.to_flat_state(step) if np.any(leaf[...])}
    assert moved == decayed


def test_no_matrices_of_the_simformer():
    """Tables of ids, and what it makes of values and times, wide ones too: the figures were measured so."""
    sizes = {"val_emb_dim": 40, "id_emb_dim": 40, "cond_emb_dim": 40, "num_heads": 2, "depth": 2}
    state = nnx.state(Simformer(SimformerParams(in_channels=1, dim_joint=40, **sizes)), nnx.Param)
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [
        jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        for path, leaf in flat
        if leaf.ndim > 1 and not update._is_matrix(path, leaf)
    ]
    value = [f"embedding_net_value.{name}" for name in ("in_layer.kernel", "out_layer.kernel", "p_skip")]
    others = [name for name in names if not name.endswith(("bias", "scale"))]
    assert sorted(others) == ["condition_embedding", "embedding_net_id.embedding", *value, "embedding_time.B"]


def test_named_parameters_travel():
    prior = Prior(mass=dist.LogNormal(0.0, 1.0), spin=dist.Uniform(-1.0, 1.0))
    theta = np.asarray(prior.sample(jax.random.key(0), (200,)))[..., None]
    x = theta + 0.1
    pipeline = MLPFlowPipeline((theta, x), None, 2, 2, params=SMALL, training_config=QUICK, prior=prior, mesh=TWO)
    pipeline.train(nnx.Rngs(0))
    assert pipeline.posterior.parameter_names == ("mass", "spin")
    draws = pipeline.sample(rng=0, x_o=np.full((1, 2, 1), 50.0), nsamples=500)
    assert draws[:, 0].min() > 0
    assert np.abs(draws[:, 1]).max() <= 1


class _Own(nnx.Module):
    def __init__(self, kept=jnp.float32):
        self.linear = nnx.Linear(5, 2, dtype=jnp.float32, param_dtype=kept, rngs=nnx.Rngs(0))

    def encode(self, x):
        return x[..., 0]

    def __call__(self, t, theta_t, context):
        batch, draws = theta_t.shape[:2]
        shared = jnp.broadcast_to(context[:, None], (batch, draws, 2))
        t = jnp.broadcast_to(jnp.reshape(t, jnp.shape(t) + (1,) * (3 - jnp.ndim(t))), (batch, draws, 1))
        return self.linear(jnp.concatenate([theta_t[..., 0], shared, t], -1))[..., None]


def test_a_users_own_module(tmp_path):
    own = _Own()
    own.network = MLP(SMALL, rngs=nnx.Rngs(0))  # an attribute of a name that this library uses too
    pipeline = ConditionalPipeline(own, _pairs(), None, 2, 2, training_config=QUICK, mesh=TWO)  # type: ignore[arg-type]
    pipeline.train(nnx.Rngs(0))
    draws = pipeline.sample(rng=0, x_o=np.zeros((1, 2, 1)), nsamples=5)
    assert draws.shape == (5, 2, 1)
    pipeline.save(str(tmp_path / "run"))
    nnx.update(pipeline.model, jax.tree.map(jnp.zeros_like, nnx.state(pipeline.model)))
    np.testing.assert_array_equal(
        pipeline.restore(tmp_path / "run").sample(rng=0, x_o=np.zeros((1, 2, 1)), nsamples=5), draws
    )
    with pytest.raises(ValueError, match="this run holds a user's own network"):
        _pipeline().restore(tmp_path / "run")
    with pytest.raises(ValueError, match=r"flax.nnx.Module with encode"):
        ConditionalPipeline(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), _pairs(), None, 2, 2)  # type: ignore[arg-type]
    own = _Own()
    own.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="_Own keeps state beside its weights"):
        ConditionalPipeline(own, _pairs(), None, 2, 2)  # type: ignore[arg-type]


def test_bfloat16_weights_are_trained_in_float32():
    """As the same weights kept in float32 are, and rounded once, at the end."""
    half, single = (
        ConditionalPipeline(_Own(kept), _pairs(), None, 2, 2, training_config=QUICK, mesh=TWO)
        for kept in (jnp.bfloat16, jnp.float32)
    )
    nnx.update(single.model, jax.tree.map(lambda a: a.astype("f4"), nnx.state(half.model)))
    assert half.train(nnx.Rngs(0)) == single.train(nnx.Rngs(0))
    for a, b in zip(*(jax.tree.leaves(nnx.state(p.model)) for p in (half, single)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def _with_row(index, value):
    theta, x = (a.copy() for a in _pairs())
    (theta, x)[index][7] = value
    return theta, x


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ((_pairs()[0], _pairs()[1][:-1]), "row i of x must be simulated"),
        (_with_row(1, np.nan), "first: 7"),
        (_with_row(0, 3.0), "outside the prior"),
        ((np.zeros((50, 3, 1), "f4"), np.zeros((50, 2, 1), "f4")), r"theta must have shape \(n, 2, 1\)"),
        (tuple(a[:5] for a in _pairs()), "too few"),
        (7, "a dataset must be"), ("no/such/folder", "not a folder"), ([], "is empty"), ([1], r"pair \(theta, x\)"),
        (get_task("gaussian_linear"), "has theta"), ([_with_row(0, 3.0)] * 2, "outside the prior"),
    ],
)  # fmt: skip
def test_bad_data(data, says):
    with pytest.raises(ValueError, match=says):
        _pipeline(data).train(nnx.Rngs(0))


def test_arrays_that_are_swapped():
    """Said before anything of the NaN in them; of three axes as of two."""
    theta, x = np.zeros((9, 2, 1), np.float32), np.full((9, 3, 1), np.nan, np.float32)
    for swapped in ((x, theta), (x[..., 0], theta[..., 0])):
        with pytest.raises(ValueError, match=r"theta has 3 columns and x 2, .* the other way round, \(theta, x\)"):
            MLPFlowPipeline(swapped, None, 2, 3, missing=True).train(nnx.Rngs(0))


def test_bad_options():
    for options, says in (
        ({"nsetps": 3}, "unknown training option 'nsetps'; Did you mean nsteps?"),
        ({"learning_rate": 1e-3}, "unknown training option 'learning_rate'; Did you mean max_lr?"),
        ({"nsteps": 0}, "positive integer"), ({"ema_decay": 1.0}, "fractions"), ({"max_lr": -1}, "positive"),
        ({"nsteps": float("inf")}, "positive integer; got inf"), ({"patience": float("nan")}, "must be a number; got nan"),
        ({"batch_size": 32.5}, "positive integer; got 32.5"), ({"warmup_steps": float("inf")}, "0 or more; got inf"),
        ({"min_lr": 1.0}, "min_lr"), ({"max_lr": "fast"}, "max_lr must be a number; got 'fast'"), ({"warmup_steps": -1}, "0 or more"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            TrainingConfig.from_dict(options)
    with pytest.raises(ValueError, match="multiple of val_every"):
        _pipeline(save_every=7).train(nnx.Rngs(0))
    with pytest.raises(ValueError, match="inference"):
        MLPFlowPipeline(None, None, 2, 2).train(nnx.Rngs(0))
    with pytest.raises(ValueError, match="params must be MLPParams"):
        MLPFlowPipeline(None, None, 2, 2, params=3)
    with pytest.raises(ValueError, match="ended before one batch of 512 pairs"):
        _pipeline(iter(_batches(_pairs())), _pairs(100), batch_size=None).train(nnx.Rngs(0))


@pytest.mark.parametrize(("which", "kept"), [("training", 20), ("validation", 10)])
def test_what_is_kept_of_a_training_that_diverges(which, kept, tmp_path, monkeypatch):
    """The last checkpoint whose losses are finite."""
    run, method = tmp_path / "run", {"training": "advance", "validation": "validate"}[which]
    inner = getattr(Learner, method)

    def diverging(*given):
        state, loss = inner(*given)
        return state, jnp.where(state.step > kept, jnp.nan, loss)

    monkeypatch.setattr(Learner, method, diverging)
    says = rf"the {which} loss became nan by update {kept + 10}: .* another run directory: {run} is this training's, and keeps the state of update {kept}\."
    with pytest.raises(RuntimeError, match=says):
        _pipeline(nsteps=40, save_every=10, checkpoint_dir=str(run)).train(nnx.Rngs(0))
    assert max(int(name.name) for name in (run / "checkpoints").iterdir()) == kept
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(10, kept + 1, 10))
    assert np.all(np.isfinite([line["val_loss"] for line in logged]))


def test_all_processes_train_in_step(monkeypatch):
    """So that one that leaves ends those that wait for its devices."""

    class Alone:
        rank = Rank("localhost:1", 1, 0)
        gather = staticmethod(lambda value: [value])
        now = False

        @contextlib.contextmanager
        def in_step(self):
            self.now = True
            yield

    def meet(mesh):
        raise InterruptedError("in step" if alone.now else "alone")

    monkeypatch.setattr(job, "_meeting", alone := Alone())
    monkeypatch.setattr(loop.meshes, "meet", meet)
    with pytest.raises(InterruptedError, match="in step"):
        _pipeline().train(nnx.Rngs(0))


def test_a_loss_that_diverges_is_an_error(tmp_path):
    """And says nothing of a state that is kept, where there is none."""
    with pytest.raises(
        RuntimeError, match=rf"lower max_lr .* in another run directory: {tmp_path} is this training's\.$"
    ):
        pipeline = _pipeline(nsteps=10, checkpoint_dir=str(tmp_path))
        pipeline.augment = lambda key, theta, x: (theta, x * jnp.inf)
        pipeline.train(nnx.Rngs(0))


def test_a_validation_loss_that_rises_is_told(monkeypatch):
    """Of a training in earnest: what is learned of the training pairs is wrong of those that are held out."""
    monkeypatch.setattr("distsbi.training.loop.OVERFITTED_STEPS", 200)
    x = np.random.default_rng(0).normal(size=(200, 2))
    pipeline = MLPFlowPipeline(
        (x**2, x), (-(x**2), x), 2, 2, params={"width": 16, "depth": 1, "embed_depth": 0}, mesh={"data": 1},
        training_config={**QUICK, "nsteps": 200, "max_lr": 1e-2, "ema_decay": 0.5},
    )  # fmt: skip
    with pytest.warns(
        UserWarning, match="the validation loss is .* at the end and was .* at its best, whose weights are kept"
    ):
        _, val_losses = pipeline.train(nnx.Rngs(0))
    facts = pipeline.posterior.facts["training"]
    assert facts["last_val_loss"] == val_losses[-1] and facts["best_val_loss"] == pytest.approx(min(val_losses))
    assert overfitted(facts) and not overfitted({})
    assert not overfitted({**facts, "last_val_loss": 1.04 * facts["best_val_loss"]})
