"""The facade: the user's guide as it is written, runs taken up again, and what a failure after training leaves."""

import dataclasses
import inspect
import pickle
import re
import warnings

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from click.testing import CliRunner
from flax import nnx

import distsbi
from distsbi import (
    ConditionalPipeline,
    Flux1FlowPipeline,
    MLPDiffusionPipeline,
    MLPFlowPipeline,
    MLPParams,
    MLPSMPipeline,
    Prior,
    SimformerFlowPipeline,
    UnconditionalPipeline,
    get_task,
    load,
)
from distsbi.cli import cli
from distsbi.config import read_config
from distsbi.data import Support, read_pairs, write_pairs
from distsbi.data.stream import StreamedPairs
from distsbi.methods import EDM, FlowMatching, ScoreMatchingVE, ScoreMatchingVP
from distsbi.networks import MLP
from distsbi.pipelines import PIPELINES
from distsbi.sampling import Posterior
from distsbi.sampling.calibrate import calibrate
from tests.gaussian import random_mlp_posterior

TASK = get_task("two_moons")
QUICK = {
    "nsteps": 20,
    "val_every": 20,
    "batch_size": 32,
    "calibrate": False,
    "optimizer": "adamw",
    "show_progress": False,
}
SMALL = {"width": 16, "depth": 1, "embed_depth": 0}
X = np.zeros((1, 2, 1), np.float32)


def pairs(n=300, seed=0):
    return tuple(np.asarray(a) for a in TASK.pairs(jax.random.key(seed), n))


def make(data=None, kind=MLPFlowPipeline, params=SMALL, **config):
    return kind(
        pairs() if data is None else data, None, 2, 2, params=params, training_config={**QUICK, **config}, prior=TASK.prior,
        mesh={"data": 2},
    )  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_named_pipelines_say_where_they_are(name):
    """Their classes are made by `type`, and still found by name."""
    made = PIPELINES[name]
    assert f"{made.__module__}.{made.__qualname__}" == f"distsbi.pipelines.{name}Pipeline"
    assert pickle.loads(pickle.dumps(made)) is made


@pytest.mark.long
def test_what_a_script_for_gensbi_asks_of_a_pipeline(tmp_path):
    config = Flux1FlowPipeline.get_default_training_config()
    config |= {"nsteps": 2, "checkpoint_dir": str(tmp_path / "run"), "batch_size": 32, "calibrate": False}
    small = {"num_heads": 2, "axes_dim": (4, 0), "depth": 1, "depth_single_blocks": 1}
    params = dataclasses.replace(Flux1FlowPipeline.get_default_params(2, 2), **small)
    pipeline = Flux1FlowPipeline(pairs(), None, 2, 2, params=params, training_config=config, mesh={"data": 1})
    losses, val_losses = pipeline.train(nnx.Rngs(0), save_model=False)
    assert len(losses) == len(val_losses) == 1
    assert not (tmp_path / "run").exists()


def test_a_pipeline_of_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "strategy: {model: simformer, method: edm, condition_mask: posterior}\nmodel: {depth: 1}\ntraining: {nsteps: 5, multistep: 2}\n"
    )
    config = read_config(tmp_path / "run.yaml")
    made = config.make_pipeline(None, None, 2, 3, prior=TASK.prior, checkpoint_dir="there")
    assert type(made).__name__ == "SimformerDiffusionPipeline"
    assert (made.model.params.depth, made.condition_mask, made.training_config.nsteps) == (1, "posterior", 10)
    assert made.training_config.checkpoint_dir == "there"
    told = dataclasses.replace(config, prior={"a": "Uniform(0, 1)", "b": "Normal(0, 1)"}, mesh={"data": 2})
    made = told.make_pipeline(None, None, 2, 3)
    assert (made.parameter_names, made.mesh.size) == (("a", "b"), 2)


def test_the_inference_guide():
    """shared/inference-guide.txt, line by line: `Flux1FlowPipeline`, `sample`, precision, and a sampler reused."""
    pipeline = make(
        kind=Flux1FlowPipeline, params={"num_heads": 2, "axes_dim": (4, 0), "depth": 1, "depth_single_blocks": 1}
    )
    pipeline.train(nnx.Rngs(0))
    x_observed = X
    key = jax.random.PRNGKey(42)
    samples = pipeline.sample(rng=key, x_o=x_observed, nsamples=10_000)
    assert samples.shape == (10_000, 2, 1)
    assert pipeline.sample(rng=key, x_o=x_observed, nsamples=100, step_size=0.01).shape == (100, 2, 1)
    sampler_fn = pipeline.get_sampler(x_observed)
    samples1 = sampler_fn(jax.random.PRNGKey(1), nsamples=5000)
    samples2 = sampler_fn(jax.random.PRNGKey(2), nsamples=5000)
    assert samples1.shape == samples2.shape == (5000, 2, 1)
    batched = pipeline.log_prob_batched(samples1[:10, None], x_observed, steps=2)
    np.testing.assert_allclose(batched[:, 0], pipeline.log_prob(samples1[:10], x_observed, steps=2), rtol=1e-5)
    assert not np.array_equal(samples1, samples2)
    np.testing.assert_array_equal(sampler_fn(key, nsamples=300), samples[:300])


@pytest.mark.long
def test_a_saved_run_is_taken_up_to_sample_and_to_go_on_with_more_simulations(tmp_path):
    first = make(checkpoint_dir=str(tmp_path / "first"))
    first.train(nnx.Rngs(0))
    again = MLPFlowPipeline(None, None, 2, 2, params=SMALL, prior=TASK.prior, mesh={"data": 1})
    with pytest.raises(ValueError, match=r"pipeline.restore\(run\)"):
        again.sample(rng=0, x_o=X, nsamples=5)
    np.testing.assert_array_equal(
        again.restore(tmp_path / "first").sample(rng=0, x_o=X, nsamples=50), first.sample(rng=0, x_o=X, nsamples=50)
    )
    more = make(pairs(600, seed=1), checkpoint_dir=str(tmp_path / "more")).restore(tmp_path / "first")
    more.train(nnx.Rngs(1), max_lr=1e-4)
    scales = (p.posterior.weights.standardizer for p in (first, more))
    np.testing.assert_array_equal(*(np.asarray(s.theta_mean) for s in scales))
    assert load(tmp_path / "more").fingerprint == more.posterior.fingerprint != first.posterior.fingerprint
    drawn = (p.sample(rng=0, x_o=X, nsamples=200) for p in (first, more))
    assert 0 < np.abs(np.subtract(*drawn)).max() < 0.2  # from those weights, not from new ones
    with pytest.raises(ValueError, match=r"another training .*another checkpoint_dir"):
        make(pairs(600, seed=1), checkpoint_dir=str(tmp_path / "first")).train(nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kind", "params", "says"),
    [
        (MLPFlowPipeline, {**SMALL, "width": 8}, r"another network .*\(width: given 8, found 16\)"),
        (MLPDiffusionPipeline, SMALL, "another method"),
    ],
)
def test_a_run_of_something_else_is_not_taken_up(tmp_path, kind, params, says):
    run = make()
    run.train(nnx.Rngs(0))
    run.save(tmp_path / "run")
    other = kind(None, None, 2, 2, params=params, prior=TASK.prior)
    before = jax.tree.leaves(nnx.state(other.model))
    with pytest.raises(ValueError, match=says):
        other.restore(tmp_path / "run")
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(nnx.state(other.model)), strict=True))


def test_a_run_of_other_parameters_is_not_taken_up(tmp_path):
    """Without a prior too; a run or a pipeline that has no names takes the other's."""
    random_mlp_posterior(names=("spin", "mass")).save(tmp_path / "run")
    random_mlp_posterior().save(tmp_path / "unnamed")
    theta, x = pairs(60)

    def pipeline(*names):
        folder = tmp_path / "-".join(("pairs", *names))
        write_pairs(folder, theta, np.concatenate([x, x[:, :1]], 1), names=names or None)
        return MLPFlowPipeline(folder, None, 2, 3, params={"width": 16, "depth": 2})

    with pytest.raises(ValueError, match="trained with the parameters spin, mass, and this pipeline is of mass, spin"):
        pipeline("mass", "spin").restore(tmp_path / "run")
    named = pipeline("spin", "mass").restore(tmp_path / "unnamed")
    assert named.parameter_names == named.posterior.parameter_names == ("spin", "mass")
    assert pipeline().restore(tmp_path / "run").parameter_names == ("spin", "mass")


@pytest.mark.parametrize(
    ("trained", "given", "says"),
    [
        (
            TASK.prior,
            Prior(a=dist.Uniform(-3.0, 3.0), b=dist.Uniform(-3.0, 3.0)),
            r"in \(-1, 1\), and the prior .* \(-3, 3\)",
        ),
        (None, TASK.prior, r"in \(-inf, inf\), and the prior of this pipeline has it in \(-1, 1\)"),
    ],
)
def test_a_run_of_another_prior_is_not_taken_up(tmp_path, trained, given, says):
    """Its scales would cut off what lies outside, or draw there."""
    options = {"params": SMALL, "training_config": {**QUICK, "nsteps": 1, "val_every": 1}, "mesh": {"data": 2}}
    run = MLPFlowPipeline(pairs(), None, 2, 2, prior=trained, **options)
    run.train(nnx.Rngs(params=0))
    run.save(tmp_path / "run")
    with pytest.raises(ValueError, match=says):
        MLPFlowPipeline(None, None, 2, 2, prior=given, **options).restore(tmp_path / "run")
    MLPFlowPipeline(None, None, 2, 2, **options).restore(tmp_path / "run")


@pytest.mark.parametrize("raw", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.long
def test_a_prior_over_decades_is_learned_over_all_of_them(raw, tmp_path):
    """rate in (1e-4, 1e4), x = log(rate) + noise of sd 0.1, or exp of that: at both ends and between the median draw is the rate, within a factor of 1.6."""
    rng = np.random.default_rng(0)
    log_rate = np.log(1e-4) + rng.uniform(size=(4_000, 1)) * np.log(1e8)
    x = log_rate + 0.1 * rng.normal(size=log_rate.shape)
    data = np.exp(log_rate).astype("f4"), (np.exp(x) if raw else x).astype("f4")
    pipeline = MLPFlowPipeline(
        data, None, 1, 1, params={"width": 32, "depth": 1}, prior=Prior(rate=dist.LogUniform(1e-4, 1e4)),
        training_config={**QUICK, "nsteps": 150, "batch_size": 256, "val_every": 150}, mesh={"data": 2},
    )  # fmt: skip
    pipeline.train(nnx.Rngs(0))
    for rate in (1e-3, 1.0, 1e3):
        drawn = pipeline.sample(rng=0, x_o=np.full((1, 1, 1), rate if raw else np.log(rate)), nsamples=500)
        assert abs(np.log(np.median(drawn) / rate)) < np.log(1.6)
        assert 0.03 < np.log(drawn).std() < 1
    pipeline.save(tmp_path / "run")
    told = CliRunner().invoke(cli, ["info", str(tmp_path / "run")]).output
    assert "rate in (0.0001, 10000)" in told
    assert ("(1, 1); positive over decades, and taken by their logarithm: all entries" in told) == raw


class Flat(nnx.Module):
    """Predicts a number for each parameter, without channels or without the draws, as `shape` has it."""

    def __init__(self, shape):
        self.bias, self.shape = nnx.Param(np.zeros(2, np.float32)), shape

    def encode(self, x):
        return x

    def __call__(self, t, theta_t, context):
        return theta_t[self.shape] + 0 * self.bias[0]


@pytest.mark.parametrize(
    ("shape", "gives"), [((..., 0), [2, 3, 2]), ((..., slice(1)), [2, 3, 2, 1]), ((slice(None), 0), [2, 2, 3])]
)
def test_a_network_that_predicts_another_shape_is_refused(shape, gives):
    with pytest.raises(
        ValueError,
        match=re.escape(f"[2, 3, 2, 3] for theta_t of that shape and t of [2, 3] (as in training); it gives {gives}."),
    ):
        ConditionalPipeline(Flat(shape), None, None, 2, 2, ch_obs=3)


def test_a_network_that_takes_the_times_of_training_alone_is_refused():
    class Training(Flat):
        def __call__(self, t, theta_t, context):
            return theta_t + 0 * jax.numpy.concatenate([theta_t[..., 0], t[..., None]], -1)[..., :2, None]

    class Once(Flat):
        def encode(self, x):
            return x, x.mean()

    with pytest.raises(ValueError, match=r"Training fails on .* t of \[\] \(one for all draws, as in sampling\)"):
        ConditionalPipeline(Training(...), None, None, 2, 2)
    with pytest.raises(
        ValueError, match=r"Once.encode must return arrays with a row for each .*; of two it gives one of shape \[\]"
    ):
        ConditionalPipeline(Once(...), None, None, 2, 2)


def test_a_run_and_other_folders_are_not_mixed(tmp_path, monkeypatch):
    data, run = tmp_path / "pairs", tmp_path / "run"
    write_pairs(data, *pairs(40))
    with pytest.raises(
        ValueError, match="pairs holds something else, such as .*parquet; give another folder for the run"
    ):
        make(checkpoint_dir=str(data)).train(nnx.Rngs(0))
    random_mlp_posterior().save(run)
    with pytest.raises(ValueError, match="pairs holds something else"):
        load(run).save(data)
    assert sorted(path.suffix for path in data.iterdir()) == [".parquet"]
    for call in (
        lambda: distsbi.simulate(lambda theta: theta, {"a": "Normal(0, 1)"}, 5, run, workers=0),
        lambda: distsbi.sample_catalog(run, data, run, nsamples=5, workers=0),
    ):
        with pytest.raises(ValueError, match="run is a run directory; give another folder"):
            call()


def test_a_model_of_other_sizes_is_refused_at_once(tmp_path):
    for call in (
        lambda: ConditionalPipeline(MLP(MLPParams(2, 1)), None, None, 2, 3),
        lambda: UnconditionalPipeline(MLP(MLPParams(2, 3)), None, None, 2),
    ):
        with pytest.raises(ValueError, match=r"the model was made for .* and these data need \(2, 1, "):
            call()
    network = MLP(MLPParams(2, 1))
    random_mlp_posterior(dim_x=1, network=network).save(tmp_path / "given")
    with pytest.raises(ValueError, match="given holds a posterior given data"):
        UnconditionalPipeline(None, None, None, 2).restore(tmp_path / "given")
    random_mlp_posterior(dim_x=1, network=network, unconditional=True).save(tmp_path / "density")
    with pytest.raises(ValueError, match="density holds a density without conditions"):
        MLPFlowPipeline(None, None, 2, 1).restore(tmp_path / "density")
    random_mlp_posterior(dim_x=3).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"of other sizes, .* \[2, 1, 3, 1\], than this pipeline, \[2, 1, 1, 1\]"):
        UnconditionalPipeline(None, None, None, 2).restore(tmp_path / "run")


def test_priors_by_name():
    made = MLPFlowPipeline(
        None, None, 2, 2, params=SMALL, prior={"mass": "LogNormal(0, 0.5)", "spin": "Uniform(-1, 1)"}
    )
    assert (made.parameter_names, [s.kind for s in made._supports]) == (("mass", "spin"), ["above", "interval"])
    with pytest.raises(
        ValueError, match=r"'mass' is a text, .* write dist.LogNormal\(0, 0.5\) .* or give texts by name"
    ):
        Prior(mass="LogNormal(0, 0.5)")


def test_one_word_for_what_is_learned():
    with pytest.raises(ValueError, match="sde_type and method both say"):
        MLPSMPipeline(None, None, 2, 2, sde_type="VE", method=ScoreMatchingVP())
    with pytest.raises(ValueError, match='sde_type is "VP" or "VE", .* got 3'):
        MLPSMPipeline(None, None, 2, 2, sde_type=3)
    for method, says in (
        ("ebm", "unknown method 'ebm'; known are edm, flow, ve, vp"), (EDM, r"got <class .*EDM'>\. Give EDM\(\)\."), (3, "or a name, one of edm"),
        (EDM(), "MLPFlowPipeline learns FlowMatching; got method=EDM"), ("vp", "MLPFlowPipeline learns FlowMatching"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            MLPFlowPipeline(None, None, 2, 2, method=method)
    assert MLPFlowPipeline(None, None, 2, 2, method="flow").method == FlowMatching()
    assert MLPSMPipeline(None, None, 2, 2, method="ve").method == ScoreMatchingVE()
    with pytest.raises(ValueError, match=r"rngs holds no random numbers; give nnx.Rngs\(0\)"):
        make().train(nnx.Rngs(dropout=0))


def test_a_method_of_a_large_power_gets_the_grids_that_float32_has(monkeypatch):
    monkeypatch.setattr("distsbi.sampling.calibrate.CANDIDATES", (("multistep", 32), ("rk4", 2)))
    monkeypatch.setattr("distsbi.sampling.calibrate.REFERENCE_STEPS", 4)
    posterior = random_mlp_posterior(dim_x=3)
    posterior.method = FlowMatching(power=7.0)
    _, certificate = calibrate(posterior, np.zeros((2, 3, 1), np.float32))
    assert [row["solver"] for row in certificate["candidates"]] == ["rk4"]


def test_what_was_learned_outlives_a_failure_to_choose_a_grid(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("distsbi.sampling.calibrate.calibrate", fail)
    pipeline = make(calibrate=True, checkpoint_dir=str(tmp_path / "run"))
    with pytest.raises(MemoryError):
        pipeline.train(nnx.Rngs(0))
    np.testing.assert_array_equal(
        pipeline.sample(rng=0, x_o=X, nsamples=20), load(tmp_path / "run").sample(rng=0, x_o=X, nsamples=20)
    )


def test_a_grid_that_misses_its_tolerance_is_told(monkeypatch):
    monkeypatch.setattr("distsbi.sampling.calibrate.TOLERANCE_Q95", 0.0)
    monkeypatch.setattr("distsbi.sampling.calibrate.CANDIDATES", (("euler", 2), ("midpoint", 2)))
    monkeypatch.setattr("distsbi.sampling.calibrate.REFERENCE_STEPS", 4)
    pipeline = make(calibrate=True)
    with pytest.warns(UserWarning, match="no sampling grid is under tolerance"):
        pipeline.train(nnx.Rngs(0))
    certificate = pipeline.posterior.facts["certificate"]
    assert not certificate["met"]
    assert certificate["chosen"] in certificate["candidates"]


def test_the_grid_is_that_of_both_weights_and_chosen_again(tmp_path, monkeypatch):
    for name, value in (("TOLERANCE", 1e9), ("TOLERANCE_Q95", 1e9), ("REFERENCE_STEPS", 4)):
        monkeypatch.setattr(f"distsbi.sampling.calibrate.{name}", value)
    monkeypatch.setattr("distsbi.sampling.calibrate.CANDIDATES", (("multistep", 3),))
    pipeline = make(calibrate=True)
    pipeline.train(nnx.Rngs(0))
    for use_ema in (True, False):
        drawn, same = (
            pipeline.sample(rng=0, x_o=X, nsamples=20, use_ema=use_ema, **grid)
            for grid in ({}, {"solver": "multistep", "steps": 3})
        )
        np.testing.assert_array_equal(drawn, same)
    pipeline.save(tmp_path / "run")
    monkeypatch.setattr("distsbi.sampling.calibrate.CANDIDATES", (("euler", 2),))
    again = make().restore(tmp_path / "run")
    certificate = again.calibrate()
    again.save(tmp_path / "run")
    found = load(tmp_path / "run")
    assert found.facts["certificate"] == certificate != pipeline.posterior.facts["certificate"]
    assert (found.default_solver.rule, found.default_solver.evaluations) == ("euler", 2)
    again.posterior.is_student = True
    with pytest.raises(ValueError, match="calibrate its teacher"):
        again.calibrate()
    unfit = MLPFlowPipeline(None, None, 2, 2, params=SMALL, prior=TASK.prior).restore(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no observations; make it with its training set"):
        unfit.calibrate()


def test_every_call_is_handed_to_the_weights_that_are_asked_for():
    class Recorder:
        """Says what was asked of it, by name."""

        def __init__(self, weights):
            self.weights = weights

        def __getattr__(self, name):
            method = inspect.signature(getattr(Posterior, name))

            def call(*arguments, **options):
                bound = method.bind(self, *arguments, **options)  # as the posterior takes it
                return self.weights, name, bound.arguments.get("nsamples")

            return call

    pipeline = make()
    alone = UnconditionalPipeline(MLP(MLPParams(2, 1, **SMALL)), None, None, 2, mesh={"data": 1})
    for made in (pipeline, alone):
        made._posterior, made._last = Recorder("averaged"), Recorder("last")
    x = {pipeline: (X,), alone: ()}
    for made in (pipeline, alone):
        for options, weights in (({}, "averaged"), ({"use_ema": True}, "averaged"), ({"use_ema": False}, "last")):
            assert made.sample(0, *x[made], 7, **options) == (weights, "sample", 7)
            assert made.get_sampler(*x[made], **options) == (weights, "get_sampler", None)
            assert made.log_prob(X, *x[made], **options) == (weights, "log_prob", None)
            assert made.sample_and_log_prob(0, *x[made], 7, **options) == (weights, "sample_and_log_prob", 7)
            assert made.map(*x[made], nsamples=7, **options) == (weights, "map", 7)
            assert made.sample_dataset("draws", 0, *x[made], 7, **options) == (weights, "sample_dataset", 7)
            assert made.sample_dataset("draws", rng=0, nsamples=7, **options) == (weights, "sample_dataset", 7)
    for use_ema, weights in ((True, "averaged"), (False, "last")):
        assert pipeline.log_prob_batched(X, X, use_ema=use_ema) == (weights, "log_prob_batched", None)
        assert pipeline.sample_batched(0, X, 7, use_ema=use_ema) == (weights, "sample_batched", 7)
        assert pipeline.sample_batched(rng=0, x_o=X, nsamples=7, use_ema=use_ema) == (weights, "sample_batched", 7)


def test_a_prior_of_other_names_than_the_pairs_is_refused(tmp_path):
    theta, x = pairs(60)
    write_pairs(tmp_path / "pairs", np.abs(theta), x, names=["tau", "drive"])
    for prior in (
        Prior(drive=dist.HalfNormal(1.0), tau=dist.HalfNormal(1.0)),
        Prior(a=dist.HalfNormal(1.0), b=dist.HalfNormal(1.0)),
    ):
        with pytest.raises(ValueError, match="are of tau, drive, in this order; the prior is of"):
            MLPFlowPipeline(tmp_path / "pairs", None, 2, 2, params=SMALL, prior=prior)
    good = Prior(tau=dist.HalfNormal(1.0), drive=dist.HalfNormal(1.0))
    assert MLPFlowPipeline(tmp_path / "pairs", None, 2, 2, params=SMALL, prior=good).parameter_names == ("tau", "drive")


def test_a_folder_of_simulations_brings_its_prior(tmp_path):
    """No draw leaves a prior that the folder knows, though none is given; one that is given is taken."""
    theta, x = pairs(60)
    for folder, source in (
        ("own", {"prior": {"a": "Uniform(-2, 2)", "b": "Normal(0, 3)"}}),
        ("task", {"task": TASK.name}),
        ("none", {}),
    ):
        write_pairs(tmp_path / folder, theta, x, names=["a", "b"] if folder == "own" else None, source=source)
    found = lambda folder, **options: MLPFlowPipeline(tmp_path / folder, None, 2, 2, params=SMALL, **options)._supports  # noqa: E731
    assert found("own") == [Support(-2.0, 2.0), Support()]
    assert found("task") == [Support(-1.0, 1.0)] * 2
    assert found("none") == [Support()] * 2
    assert found("own", prior={"a": "Uniform(-3, 3)", "b": "Uniform(-3, 3)"}) == [Support(-3.0, 3.0)] * 2
    write_pairs(
        tmp_path / "swapped", theta, x, names=["a", "b"], source={"prior": {"b": "Normal(0, 3)", "a": "Uniform(-2, 2)"}}
    )
    with pytest.raises(ValueError, match="are of a, b, in this order; the prior is of b, a"):
        found("swapped")
    streamed = MLPFlowPipeline(StreamedPairs(tmp_path / "own"), pairs(9), 2, 2, params=SMALL)
    assert streamed._supports == [Support(-2.0, 2.0), Support()]


def test_a_density_takes_prior_and_names_from_a_folder(tmp_path):
    theta = np.random.default_rng(0).uniform(1, 2, (60, 2))
    write_pairs(
        tmp_path / "known",
        theta,
        theta,
        names=["a", "b"],
        source={"prior": {"a": "Uniform(1, 2)", "b": "Uniform(0, 2)"}},
    )
    write_pairs(tmp_path / "named", theta, theta, names=["a", "b"])

    def density(name, **options):
        return UnconditionalPipeline(
            MLP(MLPParams(2, 1, **SMALL)), tmp_path / name, None, 2, mesh={"data": 2}, **options
        )

    found = density("known")
    assert found.parameter_names == ("a", "b") and found._supports == [Support(1.0, 2.0), Support(0.0, 2.0)]
    assert density("named").parameter_names == ("a", "b")
    given = density("known", prior={"a": "Uniform(0, 3)", "b": "Normal(0, 1)"})
    assert given._supports == [Support(0.0, 3.0), Support()]
    with pytest.raises(ValueError, match="the prior is of b, a"):
        density("known", prior={"b": "Uniform(0, 3)", "a": "Normal(0, 1)"})


@pytest.mark.parametrize("kind", [MLPFlowPipeline, Flux1FlowPipeline, SimformerFlowPipeline])
def test_the_seed_of_the_weights_is_among_the_parameters(kind):
    """As an ensemble is made."""
    made = [kind(None, None, 2, 2, params={"rngs": nnx.Rngs(seed)}, mesh={"data": 1}).model for seed in (1, 1, 2)]
    first, again, other = ([np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))] for model in made)
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))
    assert "rngs" not in made[0].params.to_dict() and made[0].params == made[2].params


@pytest.mark.parametrize("kind", [MLPFlowPipeline, Flux1FlowPipeline])
def test_it_is_that_of_the_embedding_too(kind):
    made = [kind(None, None, 2, (8, 8), params={"rngs": nnx.Rngs(seed)}, mesh={"data": 1}).model for seed in (1, 1, 2)]
    first, again, other = ([np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model.nets))] for model in made)
    same = [np.array_equal(a, b) for a, b in zip(first, other, strict=True)]
    assert all(map(np.array_equal, first, again)) and not all(same[i] for i, leaf in enumerate(first) if leaf.std() > 0)


def test_a_folder_says_whether_entries_may_be_missing(tmp_path):
    theta, x = np.random.default_rng(0).normal(size=(2, 60, 2))
    x[::3, 0] = np.nan
    write_pairs(tmp_path / "holes", theta, x, missing=True)
    made = MLPFlowPipeline(tmp_path / "holes", None, 2, 2, params=SMALL, mesh={"data": 1})
    assert made.model.params.missing
    assert np.isnan(read_pairs(tmp_path / "holes").x).any()
    assert not MLPFlowPipeline(None, None, 2, 2, params=SMALL, mesh={"data": 1}).model.params.missing
    for refused in (
        lambda: MLPFlowPipeline(tmp_path / "holes", None, 2, 2, params=SMALL, missing=False, mesh={"data": 1}),
        lambda: SimformerFlowPipeline(tmp_path / "holes", None, 2, 2, mesh={"data": 1}), lambda: read_pairs(tmp_path / "holes", missing=False),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="x has NaN or inf"):
            refused()


def test_default_sizes_of_images_and_instruments():
    for kind in (MLPFlowPipeline, Flux1FlowPipeline):
        for dims in ((8, 8), {"image": (8, 8), "spectrum": 3}):
            params = kind.get_default_params(2, dims)
            made = kind(None, None, 2, dims, params=dataclasses.replace(params, depth=1), mesh={"data": 1})
            assert made.model.params is not None


def test_an_observation_far_outside_the_simulations_is_warned_of():
    pipeline = make()
    pipeline.train(nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.sample(rng=0, x_o=pipeline.example, nsamples=5)
        pipeline.sample_batched(0, pairs(20, seed=3)[1], 5)
    with pytest.warns(UserWarning, match=r"x\[0\] lies far outside the simulations: its entry 1 .1000.") as one:
        pipeline.sample(rng=0, x_o=np.asarray([[[0.0], [1000.0]]]), nsamples=5)
    with pytest.warns(UserWarning, match=r"x\[2\] lies far outside") as many:
        pipeline.sample_batched(0, np.asarray([[[0.0], [0.0]], [[0.0], [0.0]], [[-90.0], [0.0]]]), 5)
    assert one[0].filename == many[0].filename == __file__  # the user's line


def test_misspelt_keywords_name_the_nearest():
    pipeline = make()
    pipeline.train(nnx.Rngs(0))
    for options, says in (
        ({"x": X}, "unknown keyword 'x'. Did you mean x_o?"), ({"n_samples": 5}, "'n_samples'. Did you mean nsamples?"),
        ({"given": {}}, "given= is for joint networks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            pipeline.sample(rng=0, **options)
    with pytest.raises(ValueError, match="MLPFlowPipeline has no keyword 'piror'. Did you mean prior?"):
        MLPFlowPipeline(None, None, 2, 2, piror=TASK.prior)
    assert "trained" in repr(pipeline) and "theta_0, theta_1" in repr(pipeline.posterior)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"wdth": 3}, "MLPParams has no field 'wdth'; Did you mean width?"), ({"width": "a"}, "wrong type"),
        ({"width": 0}, "must be at least 1"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(params, says):
    with pytest.raises(ValueError, match=says):
        MLPFlowPipeline(None, None, 2, 2, params=params)
    with pytest.raises(ValueError, match="SimformerParams has no field"):
        SimformerFlowPipeline(None, None, 2, 2, params={"wdth": 3})
