"""Densities: exact where they are known, the same by every solver, batched and sharded; and the maximum."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import multivariate_normal, norm

from distsbi.data.bijection import ABOVE, INTERVAL, REAL, Bijection
from distsbi.data.standardise import Standardizer
from distsbi.methods import METHODS
from distsbi.networks import MLP, MLPParams
from distsbi.sampling import Posterior, tiles
from distsbi.sampling.checks import unsolved
from distsbi.sampling.density import most_above
from distsbi.sampling.flow import Divergence, log_density
from distsbi.solvers import FixedGrid
from tests.gaussian import FLOW, GaussianNetwork, gaussian_posterior, random_mlp_posterior
from tests.solvers.test_solvers import MEAN, SD, gaussian_field, time_of

X = np.asarray([[[0.4], [-1.0]]], np.float32)


def exact(posterior, theta, x):
    residual = theta[..., 0].astype(np.float64) - posterior.network.mean(x)
    covariance = posterior.network.covariance()
    quadratic = np.einsum("ni,ij,nj->n", residual, np.linalg.inv(covariance), residual)
    return -0.5 * quadratic - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]


@pytest.mark.parametrize(
    ("options", "atol"),
    [
        ({}, 0.02), ({"solver": "midpoint", "steps": 64}, 0.03), ({"solver": "heun", "steps": 64}, 0.03),
        ({"solver": "euler", "steps": 2_000}, 0.05), ({"solver": "tsit5", "rtol": 1e-6, "atol": 1e-6}, 0.005),
        ({"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6, "coupled": True}, 0.005),
    ],
)  # fmt: skip
def test_every_deterministic_solver_gives_the_exact_density(options, atol):
    posterior = gaussian_posterior()
    theta = posterior.sample(0, X, 40)
    np.testing.assert_allclose(posterior.log_prob(theta, X, **options), exact(posterior, theta, X), atol=atol)


class Exact(nnx.Module):
    """The network of N(MEAN, SD^2), whatever x is."""

    def __init__(self, method):
        self.predict = gaussian_field(method).predict
        self.method = method
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = 3, 1, 1, 1

    def encode(self, x):
        return x

    def __call__(self, t, theta_t, context):
        return self.predict(t, theta_t, context)


def bounded_standardizer():
    """Of parameters in (-1, 3), above 2 and on the real line, mixed, scaled and shifted by x."""
    root = np.asarray([[0.8, 0.3, -0.1], [0.3, 0.7, 0.2], [-0.1, 0.2, 0.5]], np.float32)
    low, high = np.float32([[-1.0], [2.0], [0.0]]), np.float32([[3.0], [0.0], [0.0]])
    return Standardizer(
        Bijection((INTERVAL, ABOVE, REAL), low, high), theta_mean=np.float32([[0.3], [-0.5], [4.0]]), theta_std=np.float32([[0.7], [0.4], [3.0]]),
        x_mean=np.float32([[2.0]]), x_std=np.float32([[0.5]]), slope=np.float32([[0.4, -0.6, 0.9]]), root=root, inverse_root=np.linalg.inv(root),
    )  # type: ignore[arg-type]  # fmt: skip


def exact_within_bounds(theta, x):
    """log p of u, whose law is the standardizer's affine map of N(MEAN, SD^2), and log|du/dtheta|, in float64."""
    s, theta = bounded_standardizer(), theta[..., 0].astype(np.float64)
    u = np.stack([norm.ppf((theta[:, 0] + 1) / 4), np.log(theta[:, 1] - 2), theta[:, 2]], 1)
    jacobian = -norm.logpdf(u[:, 0]) - np.log(4) - np.log(theta[:, 1] - 2)
    centre = (x.ravel() - s.x_mean.ravel()) / s.x_std.ravel() @ s.slope
    mean = s.theta_mean[:, 0] + s.theta_std[:, 0] * (s.root @ np.asarray(MEAN)[:, 0] + centre)
    scale = np.asarray(s.theta_std * s.root * np.asarray(SD)[:, 0], np.float64)
    return multivariate_normal(mean, scale @ scale.T).logpdf(u) + jacobian


@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda m: type(m).__name__)
def test_every_method_gives_the_exact_density(method):
    """Of draws and of given theta, through bounds and scales. Noise of 0.002 that a method leaves is 4 % of the smallest sd here, and widens it
    by 0.1 %."""
    posterior = Posterior(Exact(method), method, bounded_standardizer(), mesh={"data": 2})  # type: ignore[arg-type]
    x, solver = np.full((1, 1, 1), 2.7), {"solver": "tsit5", "rtol": 1e-5, "atol": 1e-5}
    theta, density = posterior.sample_and_log_prob(0, x, 60, **solver)
    known = exact_within_bounds(theta, x)
    np.testing.assert_allclose(density, known, atol=0.05)
    np.testing.assert_allclose(posterior.log_prob(theta, x, **solver), known, atol=0.05)


MODE = np.float32([[1.0], [0.0]])


class _TwoModes(nnx.Module):
    """The network of an even mixture of N(-MODE, 0.02^2) and N(MODE, 0.02^2), whatever x is."""

    def __init__(self, method):
        self.left, self.right = (gaussian_field(method, mode, np.float32(0.02)).predict for mode in (-MODE, MODE))
        self.method = method
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = 2, 1, 1, 1

    def encode(self, x):
        return x

    def __call__(self, t, theta_t, context):
        time = time_of(self.method, t)
        alpha, sigma = self.method.alpha(time), self.method.sigma(time)
        y = theta_t / self.method.c_in(time)
        share = jax.nn.sigmoid(2 * alpha * jnp.sum(MODE * y, -2, keepdims=True) / ((0.02 * alpha) ** 2 + sigma**2))
        return share * self.right(t, theta_t, context) + (1 - share) * self.left(t, theta_t, context)


@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda m: type(m).__name__)
def test_the_default_density_of_every_method_parts_two_modes(method):
    """Of theta with the noise that the method leaves at t = 1."""
    posterior = Posterior(_TwoModes(method), method, Standardizer.identity(2, 1), mesh={"data": 2})  # type: ignore[arg-type]
    x, rng = np.zeros((1, 1, 1)), np.random.default_rng(0)
    sd = float(np.hypot(0.02, method.sigma(jnp.ones(()))))

    def known(theta):
        halves = [-0.5 * ((theta - mode) ** 2).sum((1, 2)) / sd**2 for mode in (-MODE, MODE)]
        return np.logaddexp(*halves) - np.log(4 * np.pi * sd**2)

    theta = rng.choice([-1.0, 1.0], (4_000, 1, 1)) * MODE + sd * rng.normal(size=(4_000, 2, 1))
    error = np.abs(posterior.log_prob(theta, x) - known(theta))
    assert np.quantile(error, 0.95) < 0.012
    draws, density = posterior.sample_and_log_prob(0, x, 4_000)
    assert np.quantile(np.abs(density - known(draws)), 0.95) < 0.012


def test_one_solve_gives_draws_and_the_density_of_both_ways():
    posterior = random_mlp_posterior()
    x = np.full((1, 3, 1), 0.3)
    theta, density = posterior.sample_and_log_prob(0, x, 700, steps=32)
    inner = (
        np.abs(theta).max(axis=(1, 2)) < 0.99
    )  # at the edge of a prior the rounding of theta is much of its distance from it
    assert inner.mean() > 0.5
    error = np.abs(posterior.log_prob(theta, x, steps=32) - density)[inner]
    assert (
        np.quantile(error, 0.98) < 5e-3
    )  # a few draws lie where this network is steep, and 32 steps one way are not those of the other
    np.testing.assert_allclose(theta, posterior.sample(0, x, 700, solver="rk3", steps=32), atol=1e-4)


def test_batches_meshes_and_tiles_do_not_matter():
    posterior = random_mlp_posterior()
    xs = np.random.default_rng(0).normal(size=(3, 3, 1)).astype("f4")
    theta = posterior.sample_batched(0, xs, 11)
    together = posterior.log_prob_batched(theta, xs)
    assert together.shape == (11, 3)
    for i in range(3):
        np.testing.assert_allclose(posterior.log_prob(theta[:, i], xs[i : i + 1]), together[:, i], atol=1e-4)
    np.testing.assert_array_equal(random_mlp_posterior(mesh={"data": 8}).log_prob_batched(theta, xs), together)
    assert posterior.log_prob_batched(theta[:0], xs).shape == (0, 3)


@pytest.mark.parametrize("name", [n if n == "edm" else pytest.param(n, marks=pytest.mark.long) for n in METHODS])
def test_meshes_do_not_matter_to_draws_with_their_density(name):
    """To the last bit, with every method."""
    made = [random_mlp_posterior({"data": n}, method=METHODS[name]()) for n in (1, 8)]
    (draws, density), (same_draws, same_density) = (
        p.sample_and_log_prob(0, np.full((1, 3, 1), 0.3), 600, steps=6) for p in made
    )
    np.testing.assert_array_equal(draws, same_draws)
    np.testing.assert_array_equal(density, same_density)


def test_a_rule_that_is_named_has_the_steps_of_a_density():
    posterior = gaussian_posterior()
    theta = posterior.sample(0, X, 10)
    steps = posterior.method.density_steps
    for solver, n in (("rk4", steps), ("RK4", steps), ("euler", 128)):
        np.testing.assert_array_equal(
            posterior.log_prob(theta, X, solver=solver), posterior.log_prob(theta, X, solver=solver, steps=n)
        )
    with pytest.raises(ValueError, match="Did you mean x_o"):
        posterior.log_prob(theta, x=X)


def test_irregular_times_and_few_steps():
    """Against the exact density; one and two steps are far off, but finite."""
    posterior = gaussian_posterior()
    theta = posterior.sample(0, X, 40)
    for times in ((0.9, 1.0), (0.5, 1.0)):
        cut, end = times
        grid = FixedGrid("rk4", (*np.linspace(0, cut, 11), *np.linspace(cut, end, 16)[1:]))
        np.testing.assert_allclose(posterior.log_prob(theta, X, solver=grid), exact(posterior, theta, X), atol=0.02)
    for steps, atol in ((1, 5.0), (2, 4.0), (3, 2.0), (8, 0.1)):
        np.testing.assert_allclose(posterior.log_prob(theta, X, steps=steps), exact(posterior, theta, X), atol=atol)


@pytest.mark.long
def test_hutchinson_is_unbiased():
    """The mean over 100 single-probe estimates, with its own standard error: within four of them of the exact one (a false alarm in
    16,000 for each of 5 points)."""
    posterior = random_mlp_posterior(dim_theta=3)
    x = np.full((1, 3, 1), 0.3)
    theta = posterior.sample(0, x, 5)
    sure = posterior.log_prob(theta, x, steps=4)
    repeated = np.repeat(theta, 100, 0)
    estimates = posterior.log_prob(repeated, x, divergence="hutchinson", probes=1, key=7, steps=4).reshape(5, 100)
    error = estimates.std(1) / np.sqrt(100)
    assert (error > 0).all()
    assert (np.abs(estimates.mean(1) - sure) < 4 * error + 1e-4).all()
    many = posterior.log_prob(theta, x, divergence="hutchinson", probes=64, key=7, steps=4)
    assert np.abs(many - sure).max() < np.abs(estimates[:, 0] - sure).max() + 0.05


def test_no_tangent_enters_the_condition_stream():
    """Operations of a density beyond those of the encoding are the same for 10 and for 1,000 data, of which the encoding alone costs 32,000
    more."""
    posterior = random_mlp_posterior()

    def operations(dim_x):
        network = MLP(MLPParams(2, dim_x, width=16, depth=2), nnx.Rngs(0))

        def encoded(x):
            return network.encode(x), jnp.zeros((1, 2, 1))

        def density(x):
            return log_density(
                network, METHODS["flow"](), posterior.default_solver, Standardizer.identity(2, dim_x), encoded(x),
                jnp.zeros((1, 4, 2, 1)), Divergence(),
            )  # fmt: skip

        x = jnp.zeros((1, dim_x, 1))
        whole, part = (jax.jit(f).lower(x).compile().cost_analysis()["flops"] for f in (density, encoded))
        return whole - part, part

    (few, encoding_few), (many, encoding_many) = operations(10), operations(1_000)
    assert encoding_many - encoding_few > 30_000
    assert many == pytest.approx(few, abs=1_000)


def test_maximum_a_posteriori():
    """Climbed to, from draws that are not there."""
    posterior = gaussian_posterior()
    mode, sd = posterior.network.mean(X), np.sqrt(np.diag(posterior.network.covariance()))
    draws, density = posterior.sample_and_log_prob(0, X, 20)
    assert (np.abs(draws[np.argmax(density), :, 0] - mode) > 0.05 * sd).all()
    theta, height = posterior.map(X, nsamples=20)
    assert (np.abs(theta[:, 0] - mode) < 0.01 * sd).all()
    assert height == pytest.approx(exact(posterior, mode[None, :, None], X)[0], abs=5e-3)
    other, _ = posterior.map(X, rng=1, num_samples=20, climb=3, solver="midpoint", steps=4)
    assert (other != theta).all()


def test_a_maximum_that_no_draw_is_near(monkeypatch):
    """Of an exact posterior none is; where draws' densities are said to be lower by 9 nat, it is told."""
    posterior = gaussian_posterior()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.map(X, nsamples=20, climb=3)
    draws, density = posterior.sample_and_log_prob(0, X, 20)
    monkeypatch.setattr(posterior, "sample_and_log_prob", lambda *_: (draws, density - 9))
    with pytest.warns(
        UserWarning, match=r"nat above the likeliest of 20 draws, in .* Train longer, or give more nsamples"
    ):
        posterior.map(X, nsamples=20, climb=3)


@pytest.mark.parametrize(("kind", "sd"), [(INTERVAL, 1.4), (ABOVE, 2.5)])
def test_a_maximum_at_a_bound_is_no_spike(kind, sd):
    """Of a posterior that is highest at its bounds, or has a long tail: far above the densities of draws in theta, not in standardised parameters."""
    bounds = Bijection((kind,) * 3, np.zeros((3, 1), np.float32), np.ones((3, 1), np.float32))  # type: ignore[arg-type]
    wide: Any = np.full((3, 1), sd, np.float32)
    network, x = GaussianNetwork(), np.zeros((1, 2, 1), np.float32)
    network.sd[...] = jnp.ones(3)
    scales = dataclasses.replace(Standardizer.identity(3, 2), bijection=bounds, theta_std=wide)
    posterior = Posterior(network, FLOW, scales, mesh={"data": 1})
    _, density = posterior.sample_and_log_prob(0, x, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, height = posterior.map(x, nsamples=20)
    assert height - density.max() > most_above(20, 3)


@pytest.mark.parametrize(("size", "n"), [(1, 20), (5, 1_000), (50, 1_000)])
def test_what_is_unusual_for_a_maximum(size, n):
    """Of a thousand sets of n draws, normal or exponential in every parameter, all are nearer; but not by far more than the nat that is added."""
    rng = np.random.default_rng(size)
    exponential, normal = (
        rng.gamma(size, size=(1_000, n)).min(1).max(),
        rng.gamma(size / 2, size=(1_000, n)).min(1).max(),
    )
    assert max(exponential, normal) < most_above(n, size) < exponential + 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "tsit5"}, "map climbs on a fixed grid; leave out rtol"), ({"rtol": 1e-3}, "leave out rtol, atol"), ({"climbs": 3}, "unknown keyword 'climbs'. Did you mean climb"),
        ({"climb": 0}, "climb must be a positive integer"), ({"rng": 1, "key": 2}, "give rng or key, only one"), ({"check": 0.1}, "check goes with"),
    ],
)  # fmt: skip
def test_what_map_does_not_take(options, says):
    with pytest.raises(ValueError, match=says):
        gaussian_posterior().map(X, nsamples=20, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "multistep"}, "solver 'multistep' gives no log_prob; euler, midpoint, heun, rk3, rk4, tsit5"),
        ({"solver": "zero_ends"}, "gives no log_prob"), ({"divergence": "trace"}, '"exact" or "hutchinson"'),
        ({"divergence": "hutchinson", "probes": 0}, "probes >= 1"), ({"steps": 0}, "positive integer"),
        ({"check": 2.0}, "share of the draws"), ({"return_trajectory": True}, "go with sample"), ({"time_grid": [0, 1]}, "go with sample"),
        ({"observation_id": 3}, "The keywords are theta, x_o, divergence"),
    ],
)  # fmt: skip
def test_errors(options, says):
    posterior = gaussian_posterior()
    with pytest.raises(ValueError, match=says):
        posterior.log_prob(np.zeros((2, 3, 1)), X, **options)


def test_the_check_of_a_density():
    """Of the first points, against the grid whose steps are halves; what is outside the prior has none."""
    posterior = random_mlp_posterior({"data": 1})
    x = np.full((1, 3, 1), 0.3, np.float32)
    theta = posterior.sample(0, x, 40)
    theta[3] = 5.0
    grid = FixedGrid("euler", posterior.method.grid(8))
    density = posterior.log_prob(theta, x, solver=grid, check=0.5)
    change = np.abs(density - posterior.log_prob(theta, x, solver=grid.refined()))[:20]
    change = change[np.isfinite(change)]
    assert posterior.last_check == {
        "points": 19, "mean": pytest.approx(change.mean(), rel=1e-3), "q95": pytest.approx(np.quantile(change, 0.95), rel=1e-3),
    }  # fmt: skip
    with pytest.warns(UserWarning, match="moves 5 % of the densities by more than"):
        gaussian_posterior().log_prob(np.zeros((2, 3, 1)), X, solver="euler", steps=2, check=1.0)
    with pytest.raises(ValueError, match="check goes with sample and with log_prob"):
        posterior.sample_and_log_prob(0, x, 5, check=0.5)


def test_trajectories_and_the_check_at_run_time():
    posterior = random_mlp_posterior()
    xs = np.random.default_rng(0).normal(size=(2, 3, 1)).astype("f4")
    path = posterior.sample(0, xs[:1], 300, steps=5, return_trajectory=True)
    assert path.shape == (6, 300, 2, 1)
    np.testing.assert_allclose(path[-1], posterior.sample(0, xs[:1], 300, steps=5), atol=1e-5)  # two programs
    assert posterior.sample_batched(0, xs, 7, steps=5, return_trajectory=True).shape == (6, 7, 2, 2, 1)
    some = posterior.sample(
        0, xs[:1], 300, steps=5, time_grid=[0, 0.5, 1]
    )  # GenSBI's word: what theta is at these times
    assert some.shape == (3, 300, 2, 1)
    np.testing.assert_allclose(some[0], path[0], atol=1e-5)
    np.testing.assert_allclose(some[2], path[-1], atol=0.1)
    with pytest.raises(ValueError, match="fixed grid"):
        posterior.sample(0, xs[:1], 5, solver="tsit5", return_trajectory=True)
    with pytest.raises(ValueError, match="check compares draws, not trajectories"):
        posterior.sample(0, xs[:1], 64, steps=5, return_trajectory=True, check=0.5)
    draws = posterior.sample(0, xs[:1], 300, steps=32, check=0.1)
    np.testing.assert_array_equal(draws, posterior.sample(0, xs[:1], 300, steps=32))
    assert posterior.last_check is not None
    assert posterior.last_check["draws"] == 30
    assert posterior.last_check["q95"] < 0.01
    with pytest.warns(UserWarning, match="use more steps"):
        gaussian_posterior().sample(0, X, 200, solver="euler", steps=2, check=1.0)
    with pytest.raises(ValueError, match="one draw has not"):
        posterior.sample(0, xs[:1], 1, steps=4, check=1.0)
    with pytest.raises(ValueError, match="share of the draws"):
        posterior.sample(0, xs[:1], 5, check=2.0)


@pytest.mark.cpus
def test_stochastic_draws_are_placement_invariant_too():
    x = np.full((1, 3, 1), 0.3)
    first = random_mlp_posterior(mesh={"data": 1}).sample(5, x, 300, solver="euler_maruyama", steps=8)
    other = random_mlp_posterior(mesh={"data": 8}).sample(5, x, 700, solver="euler_maruyama", steps=8)
    np.testing.assert_array_equal(other[:300], first)
    assert not np.array_equal(first, random_mlp_posterior().sample(5, x, 300, solver="euler", steps=8))


def test_a_draw_counts_once_as_unsolved():
    """Infinite draws and undefined densities, not a density of -inf."""
    draws = np.zeros((5, 2, 1), np.float32)
    draws[0, 0], draws[1, 1] = np.inf, np.nan
    density = np.asarray([0.0, np.nan, -np.inf, np.nan, 0.0], np.float32)
    assert unsolved([draws, density], tiles.DRAWS_AND_DENSITY).sum() == 3
    assert unsolved([draws], tiles.DRAWS).sum() == 2
    assert unsolved([density], tiles.DENSITY).sum() == 2
