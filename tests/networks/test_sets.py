"""Data that are a set: draws do not depend on the order of the data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distsbi import ConditionalPipeline, Flux1FlowPipeline, Flux1Params, load
from distsbi.data import Standardizer, Support
from distsbi.networks import Flux1, Layout
from distsbi.networks.embedding import Embedded
from tests.weights import shaken

SUM = Flux1Params(
    in_channels=1, context_in_dim=2, dim_obs=2, dim_cond=5, num_heads=2, axes_dim=(4, 2), depth=1, depth_single_blocks=1, mlp_ratio=2,
    id_embedding_strategy=("absolute", "none"),
)  # fmt: skip
KINDS = {
    "one way": SUM,
    "joint": dataclasses.replace(SUM, conditioning="joint"),
    "pooled": dataclasses.replace(SUM, pooled=True),
    "beside RoPE": dataclasses.replace(SUM, id_embedding_strategy=("rope1d", "none")),
    "concat": dataclasses.replace(SUM, id_merge_mode="concat", val_emb_dim=4, id_emb_dim=2, axes_dim=None),
}
ORDER = [3, 0, 4, 1, 2]
QUICK = {
    "nsteps": 10,
    "batch_size": 32,
    "val_every": 10,
    "calibrate": False,
    "show_progress": False,
    "optimizer": "adamw",
}


def pairs(n=400):
    """theta ~ N(0, I); five data of two channels, theta_0 + noise and exp(theta_1 + noise), each missing with probability 0.2."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(n, 2, 1)).astype("f4")
    x = theta[:, None, :, 0] + rng.normal(size=(n, 5, 2))
    x[..., 1] = np.exp(x[..., 1])
    return theta, np.where(rng.uniform(size=(n, 5, 1)) < 0.2, np.nan, x).astype("f4")


@pytest.mark.parametrize("kind", KINDS)
def test_the_network(kind):
    network = shaken(lambda: Flux1(KINDS[kind], nnx.Rngs(0)))
    x, theta = jax.random.normal(jax.random.key(2), (3, 5, 2)), jax.random.normal(jax.random.key(3), (3, 4, 2, 1))
    call = nnx.jit(lambda n, x: n(0.4, theta, n.encode(x)))
    first = call(network, x)
    np.testing.assert_allclose(call(network, x[:, jnp.asarray(ORDER)]), first, atol=2e-5)
    assert np.abs(first - call(network, x[:, [0, 0, 2, 3, 4]])).max() > 1e-3
    assert np.abs(first - call(network, x)[:, :, ::-1]).max() > 1e-3  # parameters are told apart


def test_the_scales():
    """One for all entries; least squares is that on their mean, those that are missing being at theirs."""
    theta, x = pairs(3_000)
    scales = Standardizer.fit(theta, x, [Support()] * 2, exchangeable=True)
    np.testing.assert_allclose(scales.centre(x[:9, ORDER]), scales.centre(x[:9]), atol=1e-5)
    z = np.asarray(scales.forward_x(x))
    np.testing.assert_allclose([np.nanmean(z, (0, 1)), np.nanstd(z, (0, 1))], [[0, 0], [1, 1]], atol=1e-3)
    u = np.asarray((theta - scales.theta_mean) / scales.theta_std)[..., 0]
    expected = np.linalg.lstsq(np.nan_to_num(z).mean(1), u, rcond=None)[0]
    np.testing.assert_allclose(scales.slope, np.tile(expected / 5, (5, 1)), atol=1e-3)
    assert Standardizer.from_dict(scales.to_dict()).x_mean.shape == (5, 2)


@pytest.mark.long
def test_a_pipeline(tmp_path):
    theta, x = pairs()
    params = {
        name: value
        for name, value in SUM.to_dict().items()
        if name in ("num_heads", "axes_dim", "depth", "depth_single_blocks")
    }
    pipeline = Flux1FlowPipeline(
        (theta, x), None, 2, 5, ch_cond=2, params={**params, "id_embedding_strategy": ("absolute", "none")}, missing=True,
        training_config=QUICK, mesh={"data": 2},
    )  # fmt: skip
    pipeline.train(nnx.Rngs(0))
    pipeline.save(tmp_path / "run")
    assert len(pipeline.posterior.facts["x_extent"]) == 1
    draws = pipeline.sample(rng=0, x_o=x[:1], nsamples=64)
    again = load(tmp_path / "run", mesh={"data": 1}).sample(0, x[:1, ORDER], 64)
    np.testing.assert_allclose(again, draws, atol=1e-4)


def test_a_users_own_embedding():
    """A sum over the data says of itself that they are a set."""

    class Total(nnx.Module):
        exchangeable = True

        def __init__(self):
            self.each = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return jnp.tanh(self.each(x)).mean(1, keepdims=True)

    theta, x = pairs()
    model = Flux1(
        dataclasses.replace(SUM, dim_cond=1, context_in_dim=3, id_embedding_strategy=("absolute", "absolute"))
    )
    assert not Embedded(model, {"": nnx.clone(Total())}, Layout.of((5,), 2)).network.exchangeable
    pipeline = ConditionalPipeline(
        model,
        (theta, np.nan_to_num(x)),
        None,
        2,
        5,
        ch_cond=2,
        embedding=Total(),
        training_config=QUICK,
        mesh={"data": 1},
    )
    scales, x_o = pipeline._fit(*pipeline._fit_pairs()), np.nan_to_num(x[:1])
    posterior = pipeline._make_posterior(nnx.state(pipeline.model, nnx.Param), scales, None, {})
    draws = posterior.sample(0, x_o, 32)
    np.testing.assert_allclose(posterior.sample(0, x_o[:, ORDER], 32), draws, atol=1e-4)


def test_parameters_have_ids():
    with pytest.raises(ValueError, match='"none" is for data alone'):
        dataclasses.replace(SUM, id_embedding_strategy=("none", "none"))
