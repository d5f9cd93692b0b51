"""Missing entries of x: the posterior given what is there, of one network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distsbi import Flux1Params, MLPFlowPipeline, MLPParams, SimformerFlowPipeline, load
from distsbi.networks import MLP, Flux1
from tests.weights import shaken

QUICK = {"nsteps": 20, "batch_size": 32, "val_every": 10, "calibrate": False, "show_progress": False}
FLUX = Flux1Params(
    in_channels=1, context_in_dim=1, dim_obs=2, dim_cond=4, num_heads=2, axes_dim=(4, 0), depth=1, depth_single_blocks=2, missing=True
)  # fmt: skip
NETWORKS = {
    "MLP": lambda: MLP(MLPParams(2, 4, width=16, depth=2, missing=True), nnx.Rngs(0)),
    "Flux1 one_way": lambda: Flux1(FLUX, nnx.Rngs(0)),
    "Flux1 joint": lambda: Flux1(dataclasses.replace(FLUX, conditioning="joint"), nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_missing_does_not_matter_and_what_is_there_does(name):
    graphdef, state = nnx.split(shaken(NETWORKS[name]))

    @jax.jit
    def network(theta, x, mask):
        module = nnx.merge(graphdef, state)
        return module(0.4, theta, module.encode(x, mask))

    x = jax.random.normal(jax.random.key(2), (3, 4, 1))
    theta = jax.random.normal(jax.random.key(3), (3, 5, 2, 1))
    mask = jnp.asarray([[True, False, True, True]] * 3)
    first = network(theta, jnp.where(mask[..., None], x, 0.0), mask)
    whole = network(theta, x, jnp.ones((3, 4), bool))
    assert float(jnp.abs(first - whole).max()) > 1e-3
    none = network(theta, jnp.zeros((3, 4, 1)), jnp.zeros((3, 4), bool))
    assert np.isfinite(none).all()
    if name != "MLP":  # no token attends to what is missing, whatever stands there
        other = network(theta, jnp.where(mask[..., None], x, 9.0), mask)
        np.testing.assert_allclose(other, first, atol=1e-5)
    single = network(theta[:, :1], jnp.where(mask[..., None], x, 0.0), mask)
    np.testing.assert_allclose(single, first[:, :1], atol=2e-5)


def test_more_is_missing_than_of_any_simulation():
    """Is told, of one observation, of many and in a catalog's messages."""
    theta, x = gaussian_pairs(200)
    x[:, 0] = 0.0
    config = {**QUICK, "nsteps": 2, "val_every": 2}
    posterior = MLPFlowPipeline((theta, x), None, 1, 4, missing=True, training_config=config, mesh={"data": 1})
    posterior.train(nnx.Rngs(0))
    assert posterior.posterior.facts["x_missing"] == 3
    says = "has 4 of 4 entries missing, and no simulation had more than 3: .* Simulate data with as much missing"
    xs = np.full((2, 4, 1), np.nan, np.float32)
    xs[1, 0] = 0.0
    with pytest.warns(UserWarning, match=rf"x\[0\] {says}"):
        posterior.sample(rng=0, x_o=xs[:1], nsamples=3)
    with pytest.warns(UserWarning, match=rf"x\[1\] {says}"):
        posterior.sample_batched(0, xs[::-1], 3)
    assert list(posterior.posterior.far(xs)) == [0]


def gaussian_pairs(n):
    """theta ~ N(0, 1); x_i = theta + noise of sd 1, four times, each missing with probability 0.4."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(n, 1, 1))
    x = theta + rng.normal(size=(n, 4, 1))
    return theta.astype("f4"), np.where(rng.uniform(size=x.shape) < 0.4, np.nan, x).astype("f4")


@pytest.mark.long
def test_posteriors_of_what_is_there(tmp_path):
    """With k data theta ~ N(sum / (k + 1), 1 / (k + 1)). Bounds are on what 700 short updates learn: ignoring what is missing would leave an
    sd of 0.45 for all k; the sampling error of 4,000 draws is 0.016."""
    pipeline = MLPFlowPipeline(
        gaussian_pairs(20_000), None, 1, 4, params=MLPParams(1, 4, width=32, depth=2), missing=True, mesh={"data": 2},
        training_config={**QUICK, "nsteps": 700, "batch_size": 128, "val_every": 700},
    )  # fmt: skip
    pipeline.train(nnx.Rngs(0))
    for values in ([1.0, np.nan, np.nan, np.nan], [1.0, np.nan, -0.4, 1.4], [np.nan] * 4):
        x_o = np.asarray(values, "f4").reshape(1, 4, 1)
        there = x_o[np.isfinite(x_o)]
        draws = pipeline.sample(rng=0, x_o=x_o, nsamples=4_000).ravel()
        precision = 1 + len(there)
        np.testing.assert_allclose(draws.mean(), there.sum() / precision, atol=0.12)
        np.testing.assert_allclose(draws.std(), precision**-0.5, rtol=0.12)
    pipeline.save(tmp_path / "run")
    np.testing.assert_array_equal(load(tmp_path / "run").sample(0, x_o, 5), pipeline.sample(rng=0, x_o=x_o, nsamples=5))


def test_errors():
    with pytest.raises(ValueError, match="missing=True"):
        MLPFlowPipeline(gaussian_pairs(100), None, 1, 4)
    pipeline = MLPFlowPipeline(gaussian_pairs(100), None, 1, 4, missing=True, training_config=QUICK)
    assert pipeline.model.params.missing
    theta, x = gaussian_pairs(100)
    theta[3] = np.nan
    with pytest.raises(ValueError, match="theta has NaN"):
        MLPFlowPipeline((theta, x), None, 1, 4, missing=True)
    x[5] = np.inf
    with pytest.raises(ValueError, match="x has NaN or inf"):
        MLPFlowPipeline((gaussian_pairs(100)[0], x), None, 1, 4, missing=True)
    with pytest.raises(ValueError, match="takes no missing data"):
        SimformerFlowPipeline(None, None, 1, 4, missing=True)
