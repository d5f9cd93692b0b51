"""Tasks: contracts over the table, and distributions against exact answers and numbers recorded from sbibm."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from distsbi.tasks import TASKS, Task, get_task
from distsbi.tasks.gaussian_linear import posterior_moments

KEY = jax.random.key(7)


@pytest.mark.parametrize("name", TASKS)
class TestContract:
    def test_shapes_and_dtypes(self, name):
        task = get_task(name)
        theta, x = task.pairs(KEY, 6)
        assert theta.shape == (6, task.dim_theta, 1)
        assert x.shape == (6, task.dim_x, 1)
        assert theta.dtype == x.dtype == jnp.float32
        assert task.name == name
        assert len(set(task.parameter_names)) == task.dim_theta

    def test_theta_in_prior(self, name):
        task = get_task(name)
        theta, x = task.pairs(KEY, 1000)
        assert bool(task.prior.support(theta[..., 0]).all())
        assert bool(jnp.isfinite(task.prior.log_prob(theta[..., 0])).all())
        assert bool(jnp.isfinite(x).all())

    def test_jittable_and_a_function_of_the_key(self, name):
        task = get_task(name)
        theta = task.prior.sample(KEY, (50,))
        eager = task.simulate(KEY, theta)
        np.testing.assert_allclose(jax.jit(task.simulate)(KEY, theta), eager, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(task.simulate(KEY, theta), eager)
        assert not np.array_equal(task.simulate(jax.random.key(8), theta), eager)

    def test_rows_are_independent(self, name):
        task = get_task(name)
        x = np.asarray(task.simulate(KEY, jnp.tile(task.prior.sample(KEY, (1,)), (100, 1))))
        assert len(np.unique(x, axis=0)) == 100

    def test_pairs_trace_once(self, name):
        task, traces = get_task(name), []

        @jax.jit
        def pairs(key):
            traces.append(1)
            return task.pairs(key, 8)

        pairs(jax.random.key(0))
        pairs(jax.random.key(1))
        assert len(traces) == 1


# Moments of x at one theta from sbibm-jax 0.1.5's own simulators, 2,000,000 draws each, keys 0 to 19: the mean, two
# entries of the
# covariance, and the third and fourth central moments of the first entry of x.
SBIBM = {
    "two_moons": ([0.3, -0.7], [0.03083, -0.707196], (0.0009955, 0.0050495), -1.131e-05, 1.96e-06),
    "gaussian_linear": (
        [0.1 * i - 0.4 for i in range(10)],
        [-0.399828, -0.300117, -0.199793, -0.100022, -0.000278, 0.100142, 0.200017, 0.300039, 0.399974, 0.499929],
        (0.1000786, 0.1000611),
        8.999e-05,
        0.03001547,
    ),
    "slcp": (
        [0.7, -1.2, -0.9, 1.3, 0.8],
        [0.698944, -1.201495, 0.699093, -1.20002, 0.699404, -1.202335, 0.700359, -1.199281],
        (0.6567978, 2.8554783),
        0.00162994,
        1.29033453,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_moments_are_those_of_sbibm(name):
    """Each bound is six standard errors of the difference of two Monte Carlo means: under 1e-7 of false alarms in
    all."""
    theta, mean, variances, third, fourth = SBIBM[name]
    n, n_sbibm = 200_000, 2_000_000
    x = np.asarray(get_task(name).simulate(KEY, jnp.tile(jnp.asarray([theta]), (n, 1))), np.float64)
    centred = x - x.mean(0)

    def close(values, expected):
        error = values.std(0) * np.sqrt(1 / n + 1 / n_sbibm)
        np.testing.assert_array_less(np.abs(values.mean(0) - expected), 6 * error)

    close(x, mean)
    close(centred[:, :2] ** 2, variances)
    close(centred[:, 0] ** 3, third)
    close(centred[:, 0] ** 4, fourth)


def test_slcp_correlation():
    """The two numbers of one draw correlate with tanh(theta_4); those of different draws do not. Six standard
    errors."""
    theta = jnp.asarray([[0.0, 0.0, 1.5, 0.5, 0.8]])
    x = np.asarray(get_task("slcp").simulate(KEY, jnp.tile(theta, (100_000, 1))))
    correlation = np.corrcoef(x.T)
    expected = np.kron(np.eye(4), [[1, np.tanh(0.8)], [np.tanh(0.8), 1]])
    np.testing.assert_allclose(correlation, expected, atol=6 / np.sqrt(100_000))


# Exact posteriors


def two_moons_density(theta, x):
    """p(theta | x) up to a constant, from the definition: p = x - m(theta) in polar coordinates about (0.25, 0)."""
    z_0, z_1 = theta.sum(-1) / np.sqrt(2), (theta[..., 1] - theta[..., 0]) / np.sqrt(2)
    u, v = x[0] + np.abs(z_0) - 0.25, x[1] - z_1
    r = np.hypot(u, v)
    inside = (u > 0) & (np.abs(theta) <= 1).all(-1)
    return np.where(inside, np.exp(-0.5 * ((r - 0.1) / 0.01) ** 2) / np.maximum(r, 1e-3), 0.0)


@pytest.mark.parametrize(
    "x_o",
    [
        pytest.param([0.0, 0.0], id="two whole crescents"),
        pytest.param([-0.6397, 0.1623], id="an observation of sbibm"),
        pytest.param([0.31, 0.2], id="joined crescents: p_0 < x_0 is impossible"),
        pytest.param([-0.75, 0.5], id="one crescent cut by the edge of the prior"),
    ],
)
def test_two_moons_posterior_is_the_grid_posterior(x_o):
    """Chi-square over the bins that hold mass; fails by chance once in 10,000 runs of each case."""
    n, bins, fine = 20_000, 64, 32
    edges = np.linspace(-1, 1, bins + 1)
    centres = (np.arange(bins * fine) + 0.5) / (bins * fine) * 2 - 1
    mass = np.zeros((bins, bins))
    for i in range(bins):  # a strip of theta_0 at a time
        grid = np.stack(np.meshgrid(centres[i * fine : (i + 1) * fine], centres, indexing="ij"), axis=-1)
        mass[i] = two_moons_density(grid, x_o).reshape(fine, bins, fine).sum((0, 2))
    theta = get_task("two_moons").exact(KEY, np.asarray(x_o), n)
    counts = np.histogram2d(theta[:, 0], theta[:, 1], bins=(edges, edges))[0]
    assert counts.sum() == n
    expected = n * mass / mass.sum()
    full = expected >= 5
    rest = np.array([counts[~full].sum(), expected[~full].sum()])
    statistic = ((counts[full] - expected[full]) ** 2 / expected[full]).sum() + (rest[0] - rest[1]) ** 2 / max(
        rest[1], 1
    )
    assert stats.chi2.sf(statistic, full.sum()) > 1e-4


def test_two_moons_posterior_is_a_function_of_the_key():
    exact = get_task("two_moons").exact
    np.testing.assert_array_equal(exact(KEY, np.zeros((1, 2, 1)), 100), exact(KEY, [0.0, 0.0], 100))
    assert not np.array_equal(exact(jax.random.key(8), [0.0, 0.0], 100), exact(KEY, [0.0, 0.0], 100))


def test_gaussian_linear_posterior():
    """Mean and covariance of 50,000 draws; each bound is six standard errors, under 1e-6 of false alarms in all."""
    x_o, n = np.linspace(-1, 1, 10), 50_000
    mean, covariance = posterior_moments(x_o)
    np.testing.assert_allclose(mean, x_o / 2, rtol=1e-6)
    np.testing.assert_allclose(covariance, 0.05 * np.eye(10), rtol=1e-6)
    theta = get_task("gaussian_linear").exact(KEY, x_o, n).astype(np.float64)
    assert theta.shape == (n, 10)
    np.testing.assert_allclose(theta.mean(0), mean, atol=6 * np.sqrt(0.05 / n))
    np.testing.assert_allclose(np.cov(theta.T), covariance, atol=6 * 0.05 * np.sqrt(2 / n))


def test_gaussian_linear_posterior_is_bayes_rule():
    """The regression of theta on x over joint draws is the posterior mean, its residual variance the posterior
    variance."""
    n = 100_000
    theta, x = (np.asarray(a[..., 0], np.float64) for a in get_task("gaussian_linear").pairs(KEY, n))
    slope = (theta * x).mean(0) / (x**2).mean(0)
    np.testing.assert_allclose(slope, 0.5, atol=6 * np.sqrt(0.05 / 0.2 / n))
    np.testing.assert_allclose((theta - 0.5 * x).var(0), 0.05, rtol=6 * np.sqrt(2 / n))


@pytest.mark.parametrize("name", ["two_moons", "gaussian_linear"])
@pytest.mark.parametrize(
    ("change", "message"), [(lambda x: x[:-1], "one observation of"), (lambda x: x * np.nan, "x_o must be finite")]
)
def test_exact_refuses_bad_observations(name, change, message):
    task = get_task(name)
    with pytest.raises(ValueError, match=message):
        task.exact(KEY, change(np.zeros(task.dim_x)), 10)


def test_two_moons_impossible_observation():
    with pytest.raises(ValueError, match="hardly possible under two_moons: 0 of"):
        get_task("two_moons").exact(KEY, [5.0, 5.0], 10)


# Table


def test_unknown_task_lists_the_known():
    with pytest.raises(ValueError, match="no task named 'moons'; the known tasks are gaussian_linear, slcp, two_moons"):
        get_task("moons")


def test_same_task_each_time():
    assert get_task("slcp") is get_task("slcp")


def test_wrong_number_of_names():
    prior = get_task("slcp").prior
    with pytest.raises(ValueError, match="dim_theta=5 but 1 parameter names"):
        Task("t", prior, get_task("slcp").simulate, dim_theta=5, dim_x=8, parameter_names=("a",))


def test_import_touches_no_device():
    code = "import distsbi.tasks; from jax._src import xla_bridge; assert not xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
