"""Joint models: every conditional by name, through the same tiles; a run directory like any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from scipy.stats import multivariate_normal

from distsbi import Flux1JointFlowPipeline, JointPipeline, MLPFlowPipeline, UnconditionalPipeline, load
from distsbi.cli import cli
from distsbi.data import Prior, Standardizer, write_pairs
from distsbi.data.standardise import Support
from distsbi.methods import FlowMatching
from distsbi.networks import NETWORKS, Conditional, Flux1Joint, Flux1JointParams, Simformer, SimformerParams
from distsbi.sampling import Tile
from distsbi.sampling.joint import JointPosterior
from distsbi.training import ConditionMasks, Trained
from distsbi.training.update import MASK_SHARES
from tests.compilations import optimised
from tests.weights import shaken

JOINT = {
    "Flux1Joint": Flux1JointParams(in_channels=1, dim_joint=5, num_heads=2, depth_single_blocks=2, val_emb_dim=8),
    "Flux1Joint concat": Flux1JointParams(
        in_channels=1, dim_joint=5, num_heads=2, depth_single_blocks=2, val_emb_dim=4, cond_emb_dim=2, id_emb_dim=4,
        id_merge_mode="concat",
    ),
    "Simformer": SimformerParams(
        in_channels=1, dim_joint=5, val_emb_dim=8, id_emb_dim=4, cond_emb_dim=4, num_heads=2, depth=2, num_hidden_layers=2
    ),
}  # fmt: skip


def make_network(params, conditioning):
    """A network of the class that `params` belongs to, with weights that all matter."""
    params = dataclasses.replace(params, conditioning=conditioning)
    make = next(make for cls, make in NETWORKS.values() if cls is type(params))
    return shaken(lambda: make(params, nnx.Rngs(0)))


@pytest.mark.parametrize("conditioning", ["one_way", "joint"])
@pytest.mark.parametrize("name", JOINT)
def test_masks_and_fixed_patterns_agree(name, conditioning):
    """What is trained under a mask is what is sampled on the tokens that take part; values under noise do not matter."""
    network = make_network(JOINT[name], conditioning)
    values, v_t = jax.random.normal(jax.random.key(2), (4, 5, 1)), jax.random.normal(jax.random.key(3), (4, 3, 5, 1))
    graphdef, state = nnx.split(network)
    masked = jax.jit(lambda s, t, v, values, mask: (lambda n: n(t, v, n.encode(values, mask)))(nnx.merge(graphdef, s)))
    for free, given in (((2, 4, 0), (1, 3)), ((0, 1, 2, 3, 4), ())):
        mask = jnp.broadcast_to(jnp.isin(jnp.arange(5), jnp.asarray(given, int)), (4, 5))
        full = masked(state, 0.4, v_t, values, mask)[:, :, list(free)]
        view, weights = nnx.split(Conditional(network, free, given))
        restricted = jax.jit(lambda w, v, x, view=view: (lambda n: n(0.4, v, n.encode(x)))(nnx.merge(view, w)))
        part = restricted(weights, v_t[:, :, list(free)], values[:, list(given)])
        np.testing.assert_allclose(part, full, atol=2e-5)
        other = jnp.where(mask[..., None], values, 7.0)
        np.testing.assert_array_equal(masked(state, 0.4, v_t, other, mask)[:, :, list(free)], full)
    single = masked(state, jnp.full(4, 0.4), v_t[:, :1], values, mask)
    np.testing.assert_allclose(single[:, :, list(free)], full[:, :1], atol=2e-5)


@pytest.mark.parametrize("name", ["Flux1Joint", "Simformer"])
def test_one_way_encoding_does_not_see_the_noise_and_joint_does(name):
    """One-way: what is given is encoded once, whatever the draws and the time are."""
    network = make_network(JOINT[name], "one_way")
    context = network.encode(jnp.ones((1, 3, 1)), None, (2, 3, 4))
    shapes = {leaf.shape[:3] for leaf in jax.tree.leaves(context)}
    assert shapes == {(1, 2, 3)}  # batch, layers, tokens
    assert set(make_network(JOINT[name], "joint").encode(jnp.ones((1, 3, 1)), None, (2, 3, 4))) == {"tokens"}


@pytest.mark.parametrize("kind", ["structured", "bernoulli", "posterior"])
def test_condition_masks(kind):
    """All 32 masks of five tokens come as often as they should, within five standard errors of 20,000: a false alarm in 50,000. Where all tokens would
    be given none is."""
    masks = np.indices((2,) * 5).reshape(5, -1).T.astype(bool)
    shares = dict(zip(("x", "none", "theta", "low", "high"), MASK_SHARES[kind], strict=True))
    fixed = {"x": [0, 0, 1, 1, 1], "none": [0] * 5, "theta": [1, 1, 0, 0, 0]}
    expected = sum(shares[name] * (masks == np.asarray(mask, bool)).all(1) for name, mask in fixed.items())
    for name, rate in (("low", 0.3), ("high", 0.7)):
        expected = expected + shares[name] * np.where(masks, rate, 1 - rate).prod(1)
    expected[0] += expected[-1]
    expected[-1] = 0.0
    given = np.asarray(ConditionMasks(kind).draw(jax.random.key(0), 20_000, 2, 3))
    found = np.bincount(given @ (2 ** np.arange(5)[::-1]), minlength=32) / 20_000
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9).all()


@pytest.mark.parametrize("conditioning", ["one_way", "joint"])
def test_posterior_alone_is_learned_as_a_fixed_pattern(conditioning):
    """The same function as under a mask that gives all data, without noised data."""
    theta, x = (a[:4] for a in gaussian_pairs())
    network, theta, x = (
        make_network(JOINT["Simformer"], conditioning),
        jnp.asarray(theta),
        jnp.asarray(np.tile(x, (1, 2, 1))[:, :3]),
    )
    nothing = np.zeros((4, 0, 1), np.float32)
    standardizer = Standardizer.fit(np.concatenate([theta, x], 1), nothing, [Support()] * 5, linear=False)
    fixed, y, context, keep = ConditionMasks("posterior")(network, standardizer, theta, x, jax.random.key(0))
    assert keep is None and y.shape == (4, 2, 1)
    v_t = jax.random.normal(jax.random.key(1), (4, 2, 5, 1))
    v = standardizer.forward(jnp.concatenate([theta, x], 1), jnp.zeros_like(standardizer.theta_mean))
    mask = jnp.broadcast_to(jnp.arange(5) >= 2, (4, 5))
    np.testing.assert_array_equal(y, v[:, :2])
    np.testing.assert_allclose(
        fixed(0.4, v_t[:, :, :2], context), network(0.4, v_t, network.encode(v, mask))[:, :, :2], rtol=2e-5, atol=2e-6
    )


QUICK = {"nsteps": 30, "batch_size": 32, "val_every": 15, "calibrate": False, "show_progress": False}


def gaussian_pairs(n=2_000):
    """theta_0 ~ N(0, 1), theta_1 ~ U(0, 1), x = (theta_0 + noise of sd 0.5, theta_1): conditionals are known."""
    rng = np.random.default_rng(0)
    theta = np.stack([rng.normal(size=n), rng.uniform(size=n)], 1)
    x = np.stack([theta[:, 0] + 0.5 * rng.normal(size=n), theta[:, 1]], 1)
    return theta.astype("f4")[..., None], x.astype("f4")[..., None]


def prior():
    import numpyro.distributions as dist

    return Prior(a=dist.Normal(0.0, 1.0), b=dist.Uniform(0.0, 1.0))


def make_pipeline(n, **config):
    params = Flux1JointParams(in_channels=1, dim_joint=4, num_heads=2, depth_single_blocks=2, val_emb_dim=16)
    return Flux1JointFlowPipeline(
        gaussian_pairs(n),
        None,
        2,
        2,
        params=params,
        prior=prior(),
        mesh={"data": 1},
        training_config={**QUICK, **config},
    )


@pytest.fixture(scope="module")
def trained():
    pipeline = make_pipeline(20_000, nsteps=700, batch_size=128, val_every=700)
    with optimised():
        pipeline.train(nnx.Rngs(0))
    pipeline.posterior.tile = Tile(4, 64)
    return pipeline


@pytest.fixture(scope="module")
def untrained():
    """A pipeline as after a training, with weights that all matter."""
    pipeline = make_pipeline(400)
    params = nnx.state(shaken(lambda: Flux1Joint(pipeline.model.params)), nnx.Param)
    pipeline._take(Trained(params, params, [], [], {}), pipeline._fit(*pipeline._fit_pairs()))
    pipeline.posterior.tile = Tile(4, 64)
    return pipeline


@pytest.mark.long
def test_every_conditional_of_a_gaussian(trained):
    """Means and sds of posterior, likelihood and mixed conditionals against the exact ones; bounds are on what 700 short updates
    learn (an untrained model misses by 0.5 and more), the sampling error of 1,000 draws being 0.032."""
    x_o = np.asarray([[[1.0], [0.4]]])
    draws = trained.sample(rng=0, x_o=x_o, nsamples=1_000)
    assert draws.shape == (1_000, 2, 1)
    np.testing.assert_allclose([draws[:, 0].mean(), draws[:, 0].std()], [0.8, np.sqrt(0.2)], atol=0.12)
    assert abs(draws[:, 1].mean() - 0.4) < 0.05 and draws[:, 1].std() < 0.1
    assert ((draws[:, 1] >= 0) & (draws[:, 1] <= 1)).all()
    with pytest.warns(UserWarning, match="far outside the simulations"):
        trained.sample(rng=0, x_o=np.asarray([[[100.0], [0.4]]]), nsamples=5)
    trained.sample(rng=0, given={"b": 0.4}, nsamples=5)  # another number of values given
    x = trained.sample(rng=0, given={"theta": [[-1.0], [0.7]]}, nsamples=1_000)
    np.testing.assert_allclose([x[:, 0].mean(), x[:, 0].std()], [-1.0, 0.5], atol=0.15)
    assert abs(x[:, 1].mean() - 0.7) < 0.06
    mixed = trained.sample(rng=0, given={"x_0": 1.0, "b": 0.2}, of=["x_1", "a"], nsamples=1_000)
    assert mixed.shape == (1_000, 2, 1)
    assert abs(mixed[:, 0].mean() - 0.2) < 0.06
    np.testing.assert_allclose([mixed[:, 1].mean(), mixed[:, 1].std()], [0.8, np.sqrt(0.2)], atol=0.15)


def test_a_pattern_says_what_is_given(untrained):
    assert "of x_0, x_1 given a, b: " in repr(untrained.posterior.pattern(["theta"]))
    assert "of a, b given x (n, 2, 1): " in repr(untrained.posterior)


@pytest.mark.parametrize("mask", [np.zeros(4, bool), "postrior", ""])
def test_a_condition_mask_is_a_name(mask):
    with pytest.raises(
        ValueError, match="condition_mask must be one of structured, bernoulli, posterior, how masks are drawn"
    ):
        Flux1JointFlowPipeline(None, None, 2, 2, condition_mask=mask)


def test_what_is_wanted_does_not_change_what_is_given(untrained):
    with pytest.raises(ValueError, match="x_o is missing"):
        untrained.sample(rng=0, of=["a"], nsamples=3)
    assert untrained.sample(rng=0, given={}, of=["a"], nsamples=3).shape == (3, 1, 1)


def test_one_conditional_is_not_taken_up_as_all(untrained, tmp_path):
    """Nor a student, which is one, too."""
    untrained.posterior.pattern(["theta"]).save(tmp_path / "run")
    assert load(tmp_path / "run").dim_theta == 2
    with pytest.raises(ValueError, match="holds one conditional of a joint model, or its student; distsbi.load it"):
        untrained.restore(tmp_path / "run")


def test_a_pattern_of_many_tokens_gets_a_tile_that_fits():
    """And the same one in every process: it follows from sizes."""
    pipeline = Flux1JointFlowPipeline(None, None, 3, 300, params={"depth_single_blocks": 1}, mesh={"data": 1})
    posterior = pipeline._make_posterior(nnx.state(pipeline.model, nnx.Param), Standardizer.identity(303, 0), None, {})
    emulator = posterior.pattern(["theta"])
    assert posterior.tile.rows > emulator._most_rows >= emulator.tile.rows
    assert posterior.pattern(["x"]) is posterior


def test_patterns_save_and_load(untrained, tmp_path):
    """A loaded run draws the same, to rounding on other devices where XLA skips its optimisations; each number that is given moves the draws."""
    untrained.save(tmp_path / "run")
    again = load(tmp_path / "run", mesh={"data": 2})
    drawn = untrained.sample(rng=0, given={"theta": [[-1.0], [0.7]]}, nsamples=50)
    np.testing.assert_allclose(again.sample(0, given={"a": -1.0, "b": 0.7}, nsamples=50), drawn, rtol=0, atol=1e-6)
    for other in ({"a": 0.5, "b": 0.7}, {"a": -1.0, "b": 0.2}):
        assert (np.abs(again.sample(0, given=other, nsamples=50) - drawn).mean(0) > 1e-3).all()
    assert again.pattern(["x_0"]).facts["certificate"] == {"met": None, "of": "another pattern"}
    assert again.fingerprint == untrained.posterior.fingerprint
    assert again.condition({"a": 0.3})[0].parameter_names == ("b", "x_0", "x_1")


@pytest.mark.slow
def test_certificates_and_densities_of_patterns(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("distsbi.sampling.calibrate.CANDIDATES", (("multistep", 16), ("midpoint", 16)))
    certificate = trained.calibrate(["theta"])
    assert certificate["observations"] == 16
    trained.save(tmp_path / "run")
    again = load(tmp_path / "run", mesh={"data": 1})
    assert again.pattern(["theta"]).facts["certificate"] == certificate
    posterior, x = again.condition({"a": 0.3})
    draws, density = posterior.sample_and_log_prob(
        0, x, 20, solver="rk4"
    )  # a network so rough that rk3 differs by .05 on the way back
    np.testing.assert_allclose(posterior.log_prob(draws, x, solver="rk4"), density, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"given": {"mass": 1.0}}, "there is no 'mass'; There are a, b, x_0, x_1"),
        ({"given": {"x_00": 1.0}}, "there is no 'x_00'; Did you mean x_0"),
        ({"given": {"b": 0.5}, "of": []}, "of names nothing to draw"),
        ({"given": {"x": [1.0]}}, r"given\['x'\] must have shape \(2, 1\); got \(1,\)"),
        ({"given": {"x": [1.0, 2.0], "x_0": 1.0}}, "x_0 is named twice"),
        ({"given": {"x": [1.0, np.nan]}}, "NaN"),
        ({"given": {"a": 3.0, "b": 1.5}}, r"b is given as 1.5, outside its prior \(0, 1\)"),
        ({"given": {"x": [1.0, 2.0], "theta": [0.0, 0.5]}}, "all tokens are given"),
        ({"given": {"a": 1.0}, "of": ["a"]}, "'a' is given"),
    ],
)
def test_errors_of_given(untrained, options, says):
    with pytest.raises(ValueError, match=says):
        untrained.sample(rng=0, nsamples=5, **options)


def test_a_run_of_the_posterior_alone_draws_nothing_else(tmp_path):
    """Other conditionals were never learned; their draws would be noise."""
    params = dataclasses.replace(JOINT["Flux1Joint"], dim_joint=4)
    pipeline = Flux1JointFlowPipeline(
        None, None, 2, 2, params=params, prior=prior(), condition_mask_kind="posterior", mesh={"data": 1}
    )
    made = pipeline._make_posterior(nnx.state(pipeline.model, nnx.Param), Standardizer.identity(4, 0), None, {})
    made.save(tmp_path / "run")
    for posterior in (made, load(tmp_path / "run", mesh={"data": 1})):
        assert posterior.sample(0, np.zeros((1, 2, 1)), 3).shape == (3, 2, 1)
        with pytest.raises(ValueError, match=r"this run learned p\(theta \| x\) alone"):
            posterior.sample(0, given={"a": 0.3}, nsamples=3)
    with pytest.raises(ValueError, match="mean the same"):
        Flux1JointFlowPipeline(None, None, 2, 2, condition_mask="posterior", condition_mask_kind="posterior")


@pytest.mark.parametrize("names", [("x", "y"), ("x_1", "y"), ("theta", "y")])
def test_a_parameter_is_not_named_as_data(names):
    import numpyro.distributions as dist

    with pytest.raises(ValueError, match=f"a parameter cannot be called '{names[0]}'"):
        Flux1JointFlowPipeline(None, None, 2, 2, prior=Prior(**dict.fromkeys(names, dist.Normal(0.0, 1.0))))


def test_a_run_whose_parameter_is_named_as_data_draws_all_the_same(untrained):
    """Made before such names were refused; only in given= it is not known what is meant."""
    posterior = untrained.posterior
    named = JointPosterior(
        posterior.joint, posterior.method, posterior.joint_standardizer, 2, names=("x_0", "b"), mesh={"data": 1}
    )
    assert named.sample(rng=0, x_o=np.zeros((1, 2, 1)), nsamples=3).shape == (3, 2, 1)
    with pytest.raises(ValueError, match="a parameter cannot be called 'x_0'"):
        named.sample(rng=0, given={"x_0": 1.0}, nsamples=3)


def test_a_joint_run_is_taken_up_with_its_names_by_a_joint_pipeline(untrained, tmp_path):
    import numpyro.distributions as dist

    untrained.save(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a joint model; restore it in the pipeline that it was trained with"):
        MLPFlowPipeline(None, None, 2, 2, prior=prior()).restore(tmp_path / "run")
    swapped = Prior(b=dist.Normal(0.0, 1.0), a=dist.Uniform(0.0, 1.0))
    with pytest.raises(ValueError, match="was trained with the parameters a, b, and this pipeline is of b, a"):
        Flux1JointFlowPipeline(None, None, 2, 2, params=untrained.model.params, prior=swapped).restore(tmp_path / "run")


def test_what_is_given_far_outside_is_warned_of(untrained, tmp_path):
    untrained.save(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"lies far outside the simulations: its entry 1 .50"):
        load(tmp_path / "run", mesh={"data": 1}).sample(rng=0, given={"b": 0.4, "x_0": 50.0}, nsamples=3)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c"), ("a", "a")])
def test_names_are_as_many_as_parameters(untrained, names):
    """Else x_0 would be another token than the first of the data."""
    posterior = untrained.posterior
    with pytest.raises(ValueError, match="names must be 2 different ones"):
        JointPosterior(
            posterior.joint, posterior.method, posterior.joint_standardizer, 2, names=names, mesh={"data": 1}
        )
    with pytest.raises(ValueError, match="names must be 2 different ones"):
        posterior.rename(names)


def test_x_is_not_given_twice(untrained):
    with pytest.raises(ValueError, match="x is given twice"):
        untrained.sample(rng=0, x_o=np.zeros((1, 2, 1)), given={"x": [1.0, 0.5]}, nsamples=3)


def test_the_check_of_a_pattern_is_reported(untrained):
    untrained.sample(rng=0, given={"b": 0.4}, nsamples=10, check=0.5)
    found = untrained.posterior.last_check
    assert found["draws"] == 5
    assert untrained.last_check is found
    untrained.sample(rng=0, given={"b": 0.4}, nsamples=10)
    assert untrained.posterior.last_check is found


def test_channels_of_given_are_not_guessed():
    network = Flux1Joint(
        Flux1JointParams(in_channels=2, dim_joint=4, num_heads=2, depth_single_blocks=1, val_emb_dim=8)
    )
    posterior = JointPosterior(network, FlowMatching(), Standardizer.identity(4, 0, ch_theta=2), 2, mesh={"data": 1})
    x = np.arange(4.0).reshape(2, 2)
    for value in (x, x[None]):
        np.testing.assert_array_equal(posterior.condition({"x": value})[1][0], x)
    np.testing.assert_array_equal(posterior.condition({"x_0": [3.0, 4.0]})[1][0], [[3.0, 4.0]])
    with pytest.raises(ValueError, match=r"given= goes with sample alone: posterior.pattern\(\["):
        posterior.sample_batched(0, x[None], 5, given={"x": x})
    for value in (x.ravel(), x.reshape(2, 1, 2)):
        with pytest.raises(ValueError, match=r"must have shape \(2, 2\)"):
            posterior.condition({"x": value})


def test_a_users_own_joint_module_sees_no_answers():
    """In training as when it draws: of tokens that are to be predicted what is drawn alone, of those that are given their values without noise."""

    class Own(nnx.Module):
        num_tokens, ch_theta = 4, 1

        def encode(self, values, mask):
            return values, mask

        def __call__(self, t, v_t, context):
            return v_t

    key = jax.random.key(0)
    theta, x = jnp.arange(1.0, 129.0).reshape(2, 32, 2, 1)
    network, y, (_, _, (values, mask)), keep = ConditionMasks()(Own(), Standardizer.identity(4, 0), theta, x, key)
    assert 0.2 < keep.mean() < 0.8
    np.testing.assert_array_equal(mask, ~keep)
    np.testing.assert_array_equal(values, jnp.where(keep[..., None], 0.0, y))
    noisy = -jnp.ones((32, 3, 4, 1))
    context = network.encode(y, mask)
    np.testing.assert_array_equal(network(0.5, noisy, context), jnp.where(keep[:, None, :, None], noisy, y[:, None]))
    fixed = Conditional(Own(), (0, 2), (1, 3))
    np.testing.assert_array_equal(fixed(0.5, noisy[:, :, :2], fixed.encode(y[:, [1, 3]])), noisy[:, :, :2])
    np.testing.assert_array_equal(fixed.encode(y[:, [1, 3]])[2][0], y * jnp.asarray([0.0, 1.0, 0.0, 1.0])[:, None])


@pytest.mark.long
def test_a_users_own_joint_module(tmp_path, monkeypatch):
    class Own(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(13, 4, rngs=nnx.Rngs(0))

        def encode(self, values, mask):
            return jnp.concatenate([jnp.where(mask[..., None], values, 0.0)[..., 0], mask.astype(float)], -1)

        def __call__(self, t, v_t, context):
            shape = v_t.shape[:2]
            t = jnp.broadcast_to(jnp.reshape(t, jnp.shape(t) + (1,) * (3 - jnp.ndim(t))), (*shape, 1))
            shared = jnp.broadcast_to(context[:, None], (*shape, 8))
            return self.linear(jnp.concatenate([v_t[..., 0], shared, t], -1))[..., None]

    pipeline = JointPipeline(
        Own(), gaussian_pairs(400), None, 2, 2, prior=prior(), training_config=QUICK, mesh={"data": 2}
    )
    pipeline.train(nnx.Rngs(0))
    x_o = np.zeros((1, 2, 1))
    draws = pipeline.sample(rng=0, x_o=x_o, nsamples=9)
    assert pipeline.sample(rng=0, given={"b": 0.5, "x_1": 0.1}, nsamples=9).shape == (9, 2, 1)
    pipeline.save(tmp_path / "run")
    np.testing.assert_array_equal(load(tmp_path / "run", network=Own).sample(0, x_o, 9), draws)
    monkeypatch.setattr("distsbi.sampling.calibrate.CANDIDATES", (("multistep", 3),))
    pipeline.calibrate(["b"])
    for use_ema in (True, False):
        drawn, same = (
            pipeline.sample(rng=0, given={"b": 0.5}, nsamples=9, use_ema=use_ema, **grid)
            for grid in ({}, {"solver": "multistep", "steps": 3})
        )
        np.testing.assert_array_equal(drawn, same)
    certificate = pipeline.calibrate()  # of the pattern that the posterior itself is
    pipeline.save(tmp_path / "run")
    for posterior in (pipeline.posterior, load(tmp_path / "run", network=Own)):
        assert posterior.default_solver.evaluations == 3
        assert posterior.facts["certificate"] == certificate
    unfit = JointPipeline(Own(), None, None, 2, 2, mesh={"data": 2}).restore(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no observations; make it with its training set"):
        unfit.calibrate(["x"])


@pytest.mark.parametrize("kind", [pytest.param("joint", marks=pytest.mark.slow), "mlp"])
@pytest.mark.long
def test_density_estimation_without_conditions(kind, tmp_path):
    from distsbi.networks import MLP, MLPParams

    rng = np.random.default_rng(0)
    theta = (rng.normal(size=(4_000, 2)) @ np.asarray([[1.0, 0.5], [0.0, 0.3]]) + [3.0, -1.0]).astype("f4")
    model = (
        Simformer(SimformerParams(in_channels=1, dim_joint=2, val_emb_dim=16, id_emb_dim=8, cond_emb_dim=0, num_heads=2, depth=2))
        if kind == "joint"
        else MLP(MLPParams(2, 1, width=32, depth=2))
    )  # fmt: skip
    config = {**QUICK, "nsteps": 200, "batch_size": 128, "val_every": 200}
    pipeline = UnconditionalPipeline(model, theta, None, 2, training_config=config, mesh={"data": 2})
    pipeline.train(nnx.Rngs(0))
    draws = pipeline.sample(rng=0, nsamples=4_000)[..., 0]
    np.testing.assert_allclose(draws.mean(0), [3.0, -1.0], atol=0.15)
    np.testing.assert_allclose(np.cov(draws.T), np.cov(theta.T), atol=0.2)
    density = pipeline.log_prob(draws[:5, :, None])
    assert density.shape == (5,) and np.isfinite(density).all()
    exact = multivariate_normal(theta.mean(0), np.cov(theta.T))
    assert np.abs(density - exact.logpdf(draws[:5])).max() < 0.5  # of a short training
    top, height = pipeline.map(nsamples=50, starts=2, climb=5)
    assert top.shape == (2, 1) and abs(height - exact.logpdf(exact.mean)) < 0.5
    pipeline.save(tmp_path / "run")
    loaded, expected = load(tmp_path / "run", mesh={"data": 2}), pipeline.sample(rng=0, nsamples=7)
    for given in ({}, {"x_o": np.zeros((1, 1, 1))}):
        np.testing.assert_array_equal(loaded.sample(0, nsamples=7, **given), expected)
    np.testing.assert_array_equal(loaded.get_sampler()(0, 7), expected)
    np.testing.assert_array_equal(loaded.log_prob(draws[:5, :, None]), density)
    with pytest.raises(ValueError, match="this run is a density without conditions: leave x_o out"):
        loaded.sample(0, np.ones((1, 1, 1)), 7)
    words = ["sample", str(tmp_path / "run"), "-n", "7", "--mesh", "data=2", "--out", str(tmp_path / "draws.npy")]
    out = CliRunner().invoke(cli, words)
    assert out.exit_code == 0, out.output
    np.testing.assert_array_equal(np.load(tmp_path / "draws.npy"), expected)


def test_a_density_without_conditions_takes_no_observations():
    from distsbi.networks import MLP, MLPParams

    pipeline = UnconditionalPipeline(MLP(MLPParams(2, 1, width=8, depth=1)), None, None, 2, mesh={"data": 1})
    with pytest.raises(ValueError, match=r"no observations to draw for; use sample\(key, nsamples\)"):
        pipeline.sample_batched(0, nsamples=5)
    with pytest.raises(ValueError, match=r"no observations; use log_prob\(theta\)"):
        pipeline.log_prob_batched(np.zeros((5, 2, 1)))
    with pytest.raises(ValueError, match="is of theta alone: give one array"):
        UnconditionalPipeline(None, (np.zeros((9, 2)), np.zeros((9, 1))), None, 2)


def test_a_density_of_a_folder_of_pairs(tmp_path):
    theta = np.random.default_rng(0).normal(size=(40, 2, 1)).astype("f4")
    write_pairs(tmp_path / "pairs", theta, theta)
    pipeline = UnconditionalPipeline(
        None, str(tmp_path / "pairs"), None, 2, training_config={**QUICK, "val_fraction": 0.2}
    )
    assert set(pipeline._source.fit()[0].ravel()) < set(theta.ravel())
    assert pipeline.model.dim_theta == 2


def test_sizes_that_do_not_fit():
    for options, says in (
        ({"num_heads": 0}, "num_heads must be at least 1"), ({"id_merge_mode": "concat"}, "id_emb_dim >= 1"),
        ({"conditioning": "both"}, "'one_way' or 'joint'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Flux1JointParams(
                **{
                    "in_channels": 1,
                    "dim_joint": 3,
                    "num_heads": 2,
                    "depth_single_blocks": 1,
                    "val_emb_dim": 4,
                    **options,
                }
            )
    with pytest.raises(ValueError, match="a multiple of num_heads"):
        SimformerParams(in_channels=1, dim_joint=3, val_emb_dim=4, id_emb_dim=4, cond_emb_dim=1, num_heads=2, depth=1)
    with pytest.raises(ValueError, match="the same channels"):
        Flux1JointFlowPipeline(None, None, 2, 2, ch_obs=1, ch_cond=2)
    with pytest.raises(ValueError, match="condition_mask must be one of structured"):
        Flux1JointFlowPipeline(None, None, 2, 2, condition_mask="some")
    network = Flux1Joint(JOINT["Flux1Joint"])
    with pytest.raises(ValueError, match="must be different tokens"):
        Conditional(network, (0, 1), (1, 2))
