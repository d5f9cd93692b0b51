"""Standardisation: a bijection onto the support, its exact log-density, and a linear-Gaussian posterior made standard normal."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from distsbi.data import Standardizer, Support
from distsbi.data.bijection import Bijection
from tests.compilations import Compilations

SUPPORTS = [Support(-1.0, 3.0), Support(low=2.0), Support(high=5.0), Support()]


def _pairs(n=2_000, seed=0):
    """Parameters of every kind of support, and data that depend on them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 4))
    theta = np.stack([-1 + 4 / (1 + np.exp(-z[:, 0])), 2 + np.exp(z[:, 1]), 5 - np.exp(z[:, 2]), 7 + 3 * z[:, 3]], 1)
    x = z[:, :3] + 0.5 * rng.normal(size=(n, 3)) + 0.3 * z[:, 3:]
    return theta[..., None].astype("f4"), (10 + 4 * x)[..., None].astype("f4")


def test_there_and_back():
    theta, x = _pairs()
    scales = Standardizer.fit(theta, x, SUPPORTS)
    centre = scales.centre(x)
    y = scales.forward(theta, centre)
    np.testing.assert_allclose(scales.inverse(y, centre), theta, atol=2e-4, rtol=2e-4)
    flat = np.asarray(y)[..., 0]
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(flat.T), np.eye(4), atol=5e-3)


def test_checks_on_the_host_ask_no_device():
    """Numbers in numpy, over every kind of support and data, are those of the device but for rounding; nothing is compiled."""
    theta, x = _pairs()
    wide = np.exp(np.random.default_rng(1).uniform(0, 8, (len(theta), 1, 1))).astype("f4")
    tokens = np.concatenate([theta, wide, wide], 1)
    supports = [*SUPPORTS, Support(1.0, 3_000.0), Support()]
    parameters = Bijection.of_parameters(tokens, supports)
    assert set(parameters.kinds) == {"interval", "above", "below", "real", "decades"}
    scales = jax.tree.map(np.asarray, Standardizer.fit(theta, np.concatenate([x, wide], 1), SUPPORTS))
    assert "positive" in scales.x_bijection.kinds
    beyond = tokens.copy()
    beyond[:9] = np.asarray([-1.0, 0.0, 9.0, np.nan, 0.0, np.inf])[:, None]
    with Compilations() as found, np.errstate(all="raise"):
        own = parameters.forward(tokens, np), scales.forward_x(np.concatenate([x, wide], 1), np)
    assert found.programs == 0
    for ours, theirs in zip(
        own, (parameters.forward(tokens), scales.forward_x(np.concatenate([x, wide], 1))), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_allclose(parameters.forward(beyond, np), parameters.forward(beyond), rtol=1e-5, atol=1e-5)


def test_an_x_in_the_middle():
    theta, x = _pairs()
    wide = np.exp(np.random.default_rng(1).uniform(0, 8, (len(theta), 1, 1))).astype("f4")
    scales = Standardizer.fit(theta, np.concatenate([x, wide], 1), SUPPORTS)
    middle = scales.inverse_x(np.zeros((4, 1), "f4"))
    np.testing.assert_allclose(middle[:3], x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(scales.forward_x(middle), 0, atol=1e-5)


def test_no_draw_leaves_the_support():
    scales = Standardizer.fit(*_pairs(), SUPPORTS)
    wild = 30 * jax.random.normal(jax.random.key(0), (1_000, 4, 1))
    theta = scales.inverse(wild, jnp.zeros((4, 1)))
    assert np.isfinite(theta).all()
    assert scales.bijection.contains(theta).all()


def test_log_det_is_that_of_the_jacobian():
    theta, x = _pairs(n=500)
    scales = Standardizer.fit(theta, x, SUPPORTS)

    def exact(theta, x):
        jacobian = jax.jacfwd(lambda t: scales.forward(t[:, None], scales.centre(x))[:, 0])(theta[:, 0])
        return jnp.linalg.slogdet(jacobian)[1]

    centre = scales.centre(x[:50])
    found = scales.log_det(scales.forward(theta[:50], centre), centre)
    np.testing.assert_allclose(found, jax.vmap(exact)(theta[:50], x[:50]), atol=2e-3)


def test_a_linear_gaussian_posterior_becomes_standard_normal():
    """theta ~ N(0, I), x = B theta + noise. Given any x, the standardised posterior is N(0, I): its exact mean and covariance,
    mapped through `forward`, are 0 and I up to the error of least squares, about sqrt(3 / 100,000) = 0.005; bounds are 5 times."""
    rng = np.random.default_rng(1)
    n, b = 100_000, np.array([[1.0, 0.5], [-0.3, 2.0], [0.2, 0.1]])
    theta = rng.normal(size=(n, 2))
    x = theta @ b.T + 0.1 * rng.normal(size=(n, 3))
    scales = Standardizer.fit(theta[..., None].astype("f4"), x[..., None].astype("f4"), [Support()] * 2)
    covariance = np.linalg.inv(np.eye(2) + b.T @ b / 0.01)
    root = np.linalg.cholesky(covariance)
    for row in (x[0], x[1], np.array([3.0, -2.0, 0.0])):
        mean = covariance @ b.T @ row / 0.01
        centre = scales.centre(jnp.asarray(row, jnp.float32)[:, None])
        points = np.concatenate([mean[None], mean + root.T])  # the mean, and one sd along each axis of the root
        y = np.asarray(scales.forward(jnp.asarray(points, jnp.float32)[..., None], centre))[..., 0]
        moved = y[1:] - y[0]
        np.testing.assert_allclose(y[0], 0, atol=0.03 * max(1, np.abs(row).max()))
        np.testing.assert_allclose(moved.T @ moved, np.eye(2), atol=0.03)


def test_the_spread_is_that_of_a_linear_gaussian_posterior():
    """theta = 100 + 3 z, x = z + noise of sd 1/2: theta given any x has sd 3 / sqrt(5)."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 1, 1))
    theta, x = (100 + 3 * z).astype("f4"), (z + 0.5 * rng.normal(size=z.shape)).astype("f4")
    spread = Standardizer.fit(theta, x, [Support()]).spread(theta)
    np.testing.assert_allclose(spread, 3 / np.sqrt(5), rtol=0.02)


def test_the_spread_follows_the_support():
    """What least squares leaves of exp(z) is a part of exp(z) itself; on a bound, too, it is more than nothing."""
    theta, x = _pairs()
    scales = Standardizer.fit(theta, x, SUPPORTS)
    assert scales.spread(theta).shape == theta.shape
    near = np.asarray([[[-1.0], [2.0 + 1e-3], [5.0 - 1e-3], [7.0]], [[3.0], [4.0], [3.0], [7.0]]], "f4")
    spread = np.asarray(scales.spread(near))[..., 0]
    assert (spread > 0).all()
    np.testing.assert_allclose(spread[1, 1:3] / spread[0, 1:3], 2e3, rtol=0.02)
    np.testing.assert_allclose(spread[:, 3], spread[0, 3], rtol=1e-4)


def test_degenerate_columns_stay_finite():
    theta, x = _pairs(n=300)
    theta[:, 3], x[:, 1], x[:, 2] = 7.0, 1.0, x[:, 0]  # constant, constant, twice the same
    scales = Standardizer.fit(theta, x, SUPPORTS)
    centre = scales.centre(x)
    y = scales.forward(theta, centre)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(scales.inverse(y, centre), theta, atol=1e-3)


def test_few_rows_get_no_slope():
    theta, x = _pairs(n=20)
    assert not np.any(Standardizer.fit(theta, x, SUPPORTS).slope)


def test_tiny_units_are_no_constants():
    theta, x = _pairs(n=300)
    scales = Standardizer.fit(theta, x * np.float32(1e-21), SUPPORTS)
    np.testing.assert_allclose(np.asarray(scales.forward_x(x * np.float32(1e-21))).std(0), 1, rtol=1e-3)


OPEN = {
    "log-normal": (dist.LogNormal(0.0, 1.0), Support(low=0.0)), "beta": (dist.Beta(2.0, 2.0), Support(0.0, 1.0)),
    "pareto": (dist.Pareto(1.5, 2.0), Support(low=1.5)), "uniform": (dist.Uniform(-3.0, 1e-3), Support(-3.0, 1e-3)),
    "truncated": (dist.TruncatedNormal(high=0.0), Support(high=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", OPEN)
def test_no_draw_lies_on_a_bound(case):
    """float32 rounds the draws of the tails to the bounds, which an open interval has not."""
    prior, support = OPEN[case]
    theta = np.asarray(prior.sample(jax.random.key(0), (500,)))[:, None, None]
    scales = Standardizer.fit(theta, theta, [support])
    y = jnp.linspace(-1e4, 1e4, 2_001)[:, None, None]
    draws = jax.jit(lambda y: scales.inverse(y, jnp.zeros((1, 1))))(y)
    assert bool(prior.support(draws).all())
    assert support.low < draws.min()
    assert draws.max() < support.high


OVER_DECADES = {
    "log-uniform": (dist.LogUniform(1e-4, 1e4), (1e-4, 1e4)),
    "log-uniform, few": (dist.LogUniform(0.1, 10.0), (0.1, 10.0)),
    "beta": (dist.Beta(0.05, 0.05), (0.0, 1.0)),
    "beta, one side": (dist.Beta(0.05, 2.0), (0.0, 3.0)),
}


@pytest.mark.parametrize("case", OVER_DECADES)
def test_an_interval_that_is_filled_over_decades(case):
    """Every theta that float32 tells apart is told apart, comes back, and has the density of the Jacobian."""
    prior, bounds = OVER_DECADES[case]
    theta = np.asarray(prior.sample(jax.random.key(1), (4_000,)))[:, None, None] * (bounds[1] if bounds[0] == 0 else 1)
    scales = Standardizer.fit(theta, np.zeros_like(theta), [Support(*bounds)])
    centre = jnp.zeros((1, 1))
    y = np.asarray(scales.forward(theta, centre))
    inside = (theta > 1e-30) & (theta < bounds[1] * (1 - 1e-6))  # the rest of this Beta is beyond float32
    assert np.mean(inside) > 0.7 if "beta" in case else np.mean(inside) > 0.999
    some = theta[inside]
    assert len(np.unique(y[inside])) > 0.98 * len(np.unique(some))
    np.testing.assert_allclose(np.asarray(scales.inverse(y, centre))[inside], some, rtol=2e-3)
    exact = np.log(np.abs(jax.vmap(jax.grad(lambda t: scales.forward(t[None, None], centre)[0, 0]))(jnp.asarray(some))))
    np.testing.assert_allclose(np.asarray(scales.log_det(y, centre))[inside[:, 0, 0]], exact, atol=2e-2)
    if "log" in case:
        assert scales.bijection.kinds == ("decades",)
        np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-3)
        middle = np.sort(y.ravel())[[1_000, 2_000, 3_000]]  # quartiles of a standard normal, +- 4 standard errors
        np.testing.assert_allclose(middle, [-0.674, 0, 0.674], atol=0.08)


def test_data_that_are_positive_over_decades_are_taken_by_their_logarithm():
    """Entry by entry; what is not positive later is far away and finite, what is missing stays missing."""
    rng = np.random.default_rng(0)
    flux, normal = np.exp(rng.uniform(-7, 7, (3_000, 2))), rng.normal(5, 1, (3_000, 1))
    dips = np.where(rng.uniform(size=(3_000, 1)) < 0.1, 1e-4, 1.0)  # nearly all at the top: no decades
    x = np.concatenate([flux, normal, dips], 1)[..., None].astype("f4")
    x[::50, 1] = np.nan
    scales = Standardizer.fit(x[:, 2:3], x, [Support()])
    assert scales.x_bijection.kinds == ("positive", "positive", "real", "real")
    z = np.asarray(scales.forward_x(x))
    assert np.isnan(z[::50, 1]).all()
    np.testing.assert_allclose(
        np.nanquantile(z[:, :2, 0], (0.25, 0.5, 0.75), 0).T, [[-np.sqrt(3) / 2, 0, np.sqrt(3) / 2]] * 2, atol=0.1
    )
    np.testing.assert_allclose(np.nanstd(z, 0), 1, atol=1e-3)
    wild = np.asarray([0.0, -1.0, np.inf], "f4")
    far = np.asarray(scales.forward_x(np.broadcast_to(wild[:, None, None], (3, 4, 1))))[:, 0, 0]
    assert np.isfinite(far[:2]).all() and (far[:2] < -3).all()
    again = Standardizer.from_dict(json.loads(json.dumps(scales.to_dict())))
    np.testing.assert_array_equal(again.forward_x(x), scales.forward_x(x))
    assert Standardizer.fit(x[:, 2:3], x[:, 2:], [Support()]).x_bijection is None


def test_an_interval_of_decades_that_is_filled_evenly_is_none_of_decades():
    theta = np.random.default_rng(0).uniform(1e-3, 1e3, (2_000, 1, 1)).astype("f4")
    scales = Standardizer.fit(theta, theta, [Support(1e-3, 1e3)])
    assert scales.bijection.kinds == ("interval",)
    np.testing.assert_array_equal(scales.bijection.edges, np.float32(1e-6))


def test_supports_are_those_it_was_fitted_with():
    theta = np.exp(np.random.default_rng(0).uniform(-5, 5, (500, 5, 1))).astype("f4")
    bounds = [Support(1e-3, 1e3), Support(-1.0, 1e3), Support(low=0.0), Support(high=1e3), Support()]
    scales = Standardizer.fit(theta, theta, bounds)
    assert scales.bijection.kinds == ("decades", "interval", "above", "below", "real")
    assert [(s.low, s.high) for s in scales.bijection.supports] == [
        (np.float32(s.low), np.float32(s.high)) for s in bounds
    ]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_theta_on_a_bound_does_not_set_the_scale(sign):
    rng = np.random.default_rng(0)
    theta = sign * np.exp(rng.normal(size=(2_000, 1, 1))).astype("f4")
    support = [Support(low=0.0) if sign > 0 else Support(high=0.0)]
    clean, touched = (
        Standardizer.fit(t, theta, support) for t in (theta, np.where(np.arange(2_000)[:, None, None] < 4, 0, theta))
    )
    np.testing.assert_allclose(touched.theta_std, clean.theta_std, rtol=0.25)  # log of the smallest float gives 4
    wide = np.exp(5 * rng.normal(size=(2_000, 1, 1))).astype("f4")  # a distribution that really comes so close
    scales = Standardizer.fit(sign * wide, theta, support)
    np.testing.assert_allclose(scales.theta_std, np.log(wide).std(0), rtol=1e-4)
    assert np.asarray(scales.unbound(jnp.zeros((1, 1)))) * sign > -87


def test_blocks_of_rows_give_the_same_scales(monkeypatch):
    """Also where x is missing here and there."""
    theta, x = _pairs(n=500)
    x[::7, 1] = np.nan
    whole = Standardizer.fit(theta, x, SUPPORTS)
    monkeypatch.setattr("distsbi.data.standardise._BLOCK_BYTES", 8 * 7 * 150)  # three blocks and a rest
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(Standardizer.fit(theta, x, SUPPORTS)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_fitting_copies_blocks_alone():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 600, 1)).astype("f4")  # 48 MB
    theta = x[:, :2] + 1
    tracemalloc.start()
    Standardizer.fit(theta, x, [Support()] * 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * x.nbytes


def test_scales_of_before_there_were_floors():
    scales = Standardizer.fit(*_pairs(n=300), SUPPORTS)
    fields = scales.to_dict()
    del fields["floor"], fields["edges"]
    theta = jnp.asarray(_pairs(n=300)[0])
    np.testing.assert_array_equal(Standardizer.from_dict(fields).unbound(theta), scales.unbound(theta))


def test_derivatives_are_finite_beside_rows_of_every_kind():
    """What one kind's formula makes of another's rows stays out of their derivative."""
    supports = [Support(-10.0, 10.0), Support(low=-10.0), Support(high=10.0), Support(), Support(1e-2, 1e2)]
    theta = np.exp(np.random.default_rng(0).uniform(-4, 4, (500, 5, 1))).astype("f4")
    theta[:, 0], theta[:, 2] = theta[:, 0] / 6, 10 - theta[:, 2]
    bijection = Standardizer.fit(theta, theta, supports).bijection
    assert set(bijection.kinds) == {"interval", "above", "below", "real", "decades"}
    slopes = jax.vmap(jax.grad(lambda t: bijection.forward(t).sum()))(jnp.asarray(theta))
    np.testing.assert_allclose(np.log(slopes), bijection.log_det(bijection.forward(jnp.asarray(theta))), atol=2e-2)


def test_scales_of_a_conditional_with_nothing_given():
    """They describe themselves as in runs of before: empty lists, no kinds."""
    joint = Standardizer.fit(_pairs(n=300)[0], np.zeros((300, 0, 1), "f4"), SUPPORTS, linear=False)
    fields = json.loads(json.dumps(joint.restrict(range(4), ()).to_dict()))
    assert "x_kinds" not in fields
    assert fields["x_low"] == fields["x_high"] == fields["x_floor"] == fields["x_edges"] == []
    assert Standardizer.from_dict(fields).to_dict() == fields


def test_given_parameters_keep_their_floors():
    joint = Standardizer.fit(_pairs(n=300)[0], np.zeros((300, 0, 1), "f4"), SUPPORTS, linear=False)
    part = joint.restrict([0, 2], [1, 3])
    np.testing.assert_array_equal(part.bijection.floor, np.asarray(joint.bijection.floor)[[0, 2]])
    np.testing.assert_array_equal(part.x_bijection.edges, np.asarray(joint.bijection.edges)[[1, 3]])
    on_bound = jnp.asarray([[2.0], [7.0]])
    np.testing.assert_array_equal(
        part.forward_x(on_bound)[0], joint.forward(jnp.full((4, 1), 2.0), jnp.zeros((4, 1)))[1]
    )


def test_dict_and_back():
    scales = Standardizer.fit(*_pairs(n=300), SUPPORTS)
    again = Standardizer.from_dict(json.loads(json.dumps(scales.to_dict())))
    assert again.bijection.kinds == scales.bijection.kinds
    for a, b in zip(jax.tree.leaves(scales), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_as_many_supports_as_parameters():
    with pytest.raises(ValueError, match="the prior has 3 parameters, theta has 4"):
        Standardizer.fit(*_pairs(n=30), SUPPORTS[:3])
