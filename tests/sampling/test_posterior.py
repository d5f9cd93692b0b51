"""Draws are right (exact Gaussian posteriors), the same everywhere, compiled once, and errors say what to do."""

import dataclasses
import pickle
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.stats import multivariate_normal

from distsbi import keys
from distsbi.data import Standardizer
from distsbi.methods import FlowMatching
from distsbi.networks import MLP, MLPParams
from distsbi.sampling import Posterior, SolveError, Tile, fill as fill_module, tiles
from distsbi.sampling.checks import compare
from distsbi.solvers import make_solver
from tests.compilations import Compilations
from tests.gaussian import GaussianNetwork, gaussian_posterior, random_mlp_posterior

pytestmark = pytest.mark.optimised

X = np.asarray([[[0.4], [-1.2]]], np.float32)
KEY = jax.random.key(3)


def test_exact_posterior():
    """Mean and covariance of 20,000 draws of a Gaussian posterior. Every one of 9 statistics within 4.5 standard errors: a false
    alarm in about 16,000 runs, were the seed not fixed."""
    posterior = gaussian_posterior(mesh={"data": 2})
    n = 20_000
    draws = posterior.sample(KEY, X, n, solver="rk4", steps=32)[..., 0].astype(np.float64)
    mean, covariance = posterior.network.mean(X), posterior.network.covariance()
    sd = np.sqrt(np.diag(covariance))
    assert (np.abs(draws.mean(0) - mean) < 4.5 * sd / np.sqrt(n)).all()
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / n)
    assert (np.abs(np.cov(draws.T) - covariance) < 4.5 * spread).all()


def test_the_map_from_noise_is_exact():
    """For an isotropic Gaussian the flow is theta = m + s z, so every draw is known, whatever the solver."""
    posterior = gaussian_posterior()
    network = GaussianNetwork()
    network.sd[...] = 0.3 * np.ones(3, np.float32)
    posterior = Posterior(network, posterior.method, Standardizer.identity(3, 2))
    tight = posterior.sample(KEY, X, 200, solver="tsit5", rtol=1e-6, atol=1e-6)
    z = keys.draw_noise(KEY, keys.split_id(np.asarray(0)), np.uint32(0), 200, (3, 1))
    np.testing.assert_allclose(tight[..., 0], network.mean(X) + 0.3 * np.asarray(z)[..., 0], atol=5e-5)
    for options in (
        {"solver": "rk4", "steps": 16},
        {"solver": "midpoint", "steps": 48},
        {"solver": "multistep", "steps": 64},
    ):
        np.testing.assert_allclose(posterior.sample(KEY, X, 200, **options), tight, atol=3e-3)


@pytest.mark.parametrize("options", [{}, pytest.param({"solver": "zero_ends", "steps": 6}, marks=pytest.mark.long)])
def test_a_callers_own_program(options):
    """The draws of sample_batched, with their gradient in x and weights of the caller's."""
    posterior = random_mlp_posterior(mesh={"data": 2})
    xs, ids = np.asarray([[[0.4], [-1.2], [1.0]], [[0.0], [0.3], [-1.0]]], np.float32), [7, 2**40]
    draws = jax.jit(posterior.traceable(9, **options))
    expected = posterior.sample_batched(KEY, xs, 9, **options)
    np.testing.assert_allclose(draws(posterior.weights, KEY, xs), np.moveaxis(expected, 1, 0), atol=1e-5)
    named = posterior.sample_batched(KEY, xs, 9, observation_ids=ids, **options)
    words = keys.split_id(np.asarray(ids))
    np.testing.assert_allclose(draws(posterior.weights, KEY, xs, words), np.moveaxis(named, 1, 0), atol=1e-5)
    slope = jax.grad(lambda x: draws(posterior.weights, KEY, x).sum())(xs)
    assert (np.abs(slope) > 0).all()
    assert np.isfinite(slope).all()
    zero = jax.tree.map(lambda a: 0 * a, posterior.weights.params)
    assert (
        np.abs(draws(dataclasses.replace(posterior.weights, params=zero), KEY, xs) - np.moveaxis(expected, 1, 0)).max()
        > 0.01
    )
    for other in ({"check": 0.1}, {"chunk_size": 3}, {"show_progress": True}, {"time_grid": [0.0, 1.0]}):
        with pytest.raises(ValueError, match="goes with sample; leave it out of traceable"):
            posterior.traceable(9, **other)


def test_more_draws_extend_fewer_and_rows_equal_single_observations():
    posterior = random_mlp_posterior(mesh={"data": 4}, tile=Tile(4, 16))
    xs = np.random.default_rng(2).normal(size=(21, 3, 1)).astype("f4")
    many = posterior.sample(KEY, xs[:1], 300)
    np.testing.assert_array_equal(many[:70], posterior.sample(KEY, xs[:1], 70))
    batch = posterior.draw(KEY, xs, 70)
    assert batch.shape == (21, 70, 2, 1)
    for row in (0, 9, 20):
        np.testing.assert_array_equal(batch[row], posterior.sample(KEY, xs[row : row + 1], 70, observation_id=row))
    np.testing.assert_array_equal(posterior.sample_batched(KEY, xs, 70), np.moveaxis(batch, 1, 0))
    ids = np.arange(21, dtype=np.uint64)[::-1] + 2**40
    shuffled = posterior.draw(KEY, xs[::-1], 70, observation_ids=ids)
    np.testing.assert_array_equal(shuffled[::-1], posterior.draw(KEY, xs, 70, observation_ids=ids[::-1]))
    assert np.abs(shuffled[::-1] - batch).max() > 0.1  # other ids, other noise


@pytest.mark.cpus
@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 8])
def test_device_count_does_not_matter(devices):
    xs = np.random.default_rng(2).normal(size=(5, 3, 1)).astype("f4")
    one, many = (random_mlp_posterior(mesh={"data": n}, tile=Tile(4, 16)) for n in (2, devices))
    for options in ({}, {"solver": "tsit5"}):
        np.testing.assert_array_equal(one.draw(KEY, xs, 50, **options), many.draw(KEY, xs, 50, **options))


def test_other_tiles_agree_within_1e_4_posterior_sd():
    posterior = gaussian_posterior()
    sd = np.sqrt(np.diag(posterior.network.covariance()))[:, None]
    base = posterior.sample(KEY, X, 300)
    for options in ({"tile": Tile(1, 8)}, {"tile": Tile(64, 64)}, {"chunk_size": 100}):
        assert (np.abs(posterior.sample(KEY, X, 300, **options) - base) < 1e-4 * sd).all()


def test_one_executable():
    """New observations, keys and numbers of draws do not compile again; another solver does, once."""
    posterior = random_mlp_posterior(mesh={"data": 2}, tile=Tile(4, 16))
    for key in (jax.random.PRNGKey(0), 0):  # small programs of jax's own take these keys apart and together
        posterior.sample(key, np.ones((1, 3, 1)), 10)
    posterior.sample(KEY, np.ones((1, 3, 1)), 10)
    count = Compilations()
    with count:
        for seed in range(3):
            posterior.sample(jax.random.key(seed), np.full((1, 3, 1), seed), 10 + 100 * seed)
            posterior.get_sampler(np.full((1, 3, 1), seed))(jax.random.PRNGKey(seed), nsamples=33)
            posterior.draw(seed, np.full((3 + seed, 3, 1), seed), 64)
    assert count.programs == 0
    with count:
        posterior.sample(KEY, np.ones((1, 3, 1)), 10, step_size=0.5)
    first = count.programs
    with count:
        posterior.sample(KEY, np.zeros((1, 3, 1)), 99, step_size=0.5)
    assert 0 < first == count.programs


def test_no_draw_leaves_the_prior():
    posterior = random_mlp_posterior()
    draws = posterior.sample(KEY, np.full((1, 3, 1), 30.0), 5_000)  # far outside the training data
    assert np.abs(draws).max() <= 1


def test_log_prob_of_a_gaussian():
    posterior = gaussian_posterior(mesh={"data": 2})
    theta = posterior.sample(KEY, X, 50)
    residual = theta[..., 0].astype(np.float64) - posterior.network.mean(X)
    covariance = posterior.network.covariance()
    exact = -0.5 * np.einsum("ni,ij,nj->n", residual, np.linalg.inv(covariance), residual)
    exact -= 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    np.testing.assert_allclose(posterior.log_prob(theta, X, steps=64), exact, atol=0.02)


def test_a_step_size_of_a_density_is_of_rk3():
    """As `steps` are; Euler's of 0.05 are off by more than a nat."""
    posterior = gaussian_posterior({"data": 1})
    theta = posterior.sample(KEY, X, 50)
    exact = multivariate_normal(posterior.network.mean(X), posterior.network.covariance()).logpdf(theta[..., 0])
    np.testing.assert_allclose(posterior.log_prob(theta, X, step_size=0.05), exact, atol=1e-2)
    assert np.abs(posterior.log_prob(theta, X, step_size=0.05, solver="euler") - exact).max() > 1.0
    assert np.abs(posterior.sample_and_log_prob(KEY, X, 50, step_size=0.05)[1] - exact).max() < 0.1


@pytest.mark.long
def test_log_prob_on_a_bounded_prior_integrates_to_one():
    posterior = random_mlp_posterior()
    axis = np.linspace(-1, 1, 121)[:-1] + 1 / 120
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2, 1)
    x = np.full((1, 3, 1), 0.3)
    assert np.exp(posterior.log_prob(grid, x, steps=128)).sum() * (2 / 120) ** 2 == pytest.approx(1, abs=0.01)
    assert posterior.log_prob(np.full((1, 2, 1), 1.5), x)[0] == -np.inf


def test_key_words_and_aliases():
    posterior = random_mlp_posterior(tile=Tile(4, 16))
    x = np.ones((1, 3, 1))
    base = posterior.sample(rng=jax.random.PRNGKey(1), x_o=x, nsamples=20)
    assert base.shape == (20, 2, 1)
    assert base.dtype == np.float32
    same = posterior.sample(key=jax.random.key(1), x_o=x, num_samples=20, show_progress_bars=False)
    np.testing.assert_array_equal(base, same)
    np.testing.assert_array_equal(posterior.get_sampler(x)(rng=1, nsamples=20), base)
    assert posterior.sample(1, x, method="Euler", steps=2).shape == (10_000, 2, 1)
    many = np.arange(6.0).reshape(2, 3, 1)
    batch = posterior.sample_batched(1, many, 5)
    np.testing.assert_array_equal(posterior.sample_batched(1, x_o=many, nsamples=5), batch)
    np.testing.assert_array_equal(posterior.sample_batched(key=1, condition=many, num_samples=5), batch)


def test_num_samples_is_nsamples_in_every_way_to_draw(tmp_path):
    posterior, x = random_mlp_posterior({"data": 1}, tile=Tile(4, 16)), np.ones((1, 3, 1))
    base = posterior.sample(1, x, 5)
    np.testing.assert_array_equal(posterior.get_sampler(x)(1, num_samples=5), base)
    both = zip(posterior.sample_and_log_prob(1, x, num_samples=5), posterior.sample_and_log_prob(1, x, 5), strict=True)
    for found, expected in both:
        np.testing.assert_array_equal(found, expected)
    written = posterior.sample_dataset(tmp_path / "draws", 1, x, num_samples=5).read()
    np.testing.assert_array_equal(np.stack(written.columns, 1), base[..., 0])
    for draw in (
        posterior.get_sampler(x), partial(posterior.sample_and_log_prob, x_o=x),
        partial(posterior.sample_dataset, tmp_path / "other", x_o=x), partial(posterior.sample_batched, xs=x),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="give nsamples or num_samples, only one"):
            draw(key=1, nsamples=5, num_samples=5)
        with pytest.raises(ValueError, match="positive integer .*; got 0"):
            draw(key=1, num_samples=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"x_o": np.ones(3)}, r"x_o must have shape \(1, 3, 1\) for this posterior; got \(3,\). Add the axes with x_o\[None, :, None\]"),
        ({"x_o": np.ones((1, 3))}, r"Add the axes with x_o\[..., None\]"),
        ({"x_o": np.ones((2, 3, 1))}, "must have shape"),
        ({"x_o": np.ones((1, 1, 1, 3))}, r"got \(1, 1, 1, 3\). If its 3 numbers are in that order: x_o.reshape\(1, 3, 1\)"),
        ({"x_o": None}, "x_o is missing"),
        ({"x_o": "abc"}, "array of real numbers"), ({"x_o": 1j * np.ones((1, 3, 1))}, "array of real numbers"),
        ({"x_o": np.full((1, 3, 1), np.nan)}, "3 values that are NaN or infinite, the first at"),
        ({"x_o": np.full((1, 3, 1), np.inf)}, "NaN or infinite"),
        ({"nsamples": 0}, "nsamples must be a positive integer"), ({"nsamples": -5}, "positive integer"),
        ({"nsamples": 2.5}, "positive integer"), ({"nsamples": True}, "positive integer"),
        ({"stepsize": 0.1}, "unknown keyword 'stepsize'. Did you mean step_size?"),
        ({"rng": 1}, "rng or key, only one"), ({"num_samples": 4}, "nsamples or num_samples, only one"), ({"key": None}, "one of them is needed"),
        ({"observation_id": -1}, "observation ids"), ({"chunk_size": 0}, "chunk_size must be a positive integer"), ({"chunk_size": 2.5}, "positive integer; got 2.5"),
        ({"observation_id": None}, "observation ids"), ({"tile": (4, 16)}, "tile must be"), ({"solver": 3}, "solver must be a name"),
        ({"step_size": "a"}, "step_size must be a number"), ({"time_grid": 3}, "time_grid must be a list"),
        ({"solver": make_solver(FlowMatching()), "coupled": True}, "coupled given beside a complete solver"),
        ({"solver": "euler_maruyama", "check": 0.1}, "leave it out with"),
        ({"method": "euler", "solver": "euler"}, "mean the same"),
    ],
)  # fmt: skip
def test_user_errors(arguments, says):
    posterior = random_mlp_posterior()
    with pytest.raises(ValueError, match=says):
        posterior.sample(**{"key": 0, "x_o": np.ones((1, 3, 1)), "nsamples": 10, **arguments})


def test_batch_errors_and_failed_solves():
    posterior = random_mlp_posterior()
    many = np.ones((2, 3, 1))
    for arguments, says in (
        ({}, "give xs, x_o or condition, one of them is needed"),
        ({"xs": many, "x_o": many}, "only one"),
        ({"xs": many, "condition": many}, "only one"),
        ({"xs": many, "num_samples": 5}, "nsamples or num_samples, only one"),
        ({"xs": many, "model_extras": {}}, "unknown keyword 'model_extras'"),
        ({"x": many}, r"'x'. Did you mean x_o\?"),
    ):
        with pytest.raises(ValueError, match=says):
            posterior.sample_batched(0, nsamples=5, **arguments)
    with pytest.raises(ValueError, match=r"'observation_id'. Did you mean observation_ids\?"):
        posterior.sample_batched(0, np.ones((2, 3, 1)), 5, observation_id=1)
    with pytest.raises(ValueError, match="given= is for joint networks"):
        posterior.sample_batched(0, np.ones((2, 3, 1)), 5, given={})
    with pytest.raises(ValueError, match=r"observation_ids must have shape \(2,\)"):
        posterior.draw(0, np.ones((2, 3, 1)), 5, observation_ids=[1])
    with pytest.raises(
        ValueError,
        match=r"xs must have shape \(n, 3, 1\) for this posterior; got \(3, 1\). Add the axes with xs\[None\]",
    ):
        posterior.draw(0, np.ones((3, 1)), 5)
    with pytest.raises(ValueError, match=r"theta must have shape \(n, 2, 1\) .*Add the axes with theta\[..., None\]"):
        posterior.log_prob(np.ones((5, 2)), np.ones((1, 3, 1)))
    with pytest.raises(ValueError, match="see sample_batched and log_prob_batched"):
        posterior.log_prob(np.ones((5, 2, 1)), np.ones((5, 3, 1)))
    posterior.weights.params["bias2"][...] = np.float32(np.nan)
    broken = Posterior(posterior.network, posterior.method, posterior.weights.standardizer)
    with pytest.raises(RuntimeError, match="did not converge"):
        broken.sample(0, np.ones((1, 3, 1)), 5)


@pytest.mark.parametrize("probes", [None, "8", 1.5, True, float("inf")])
def test_probes_are_counted(probes):
    with pytest.raises(ValueError, match="takes probes >= 1, which must be a positive integer; got"):
        gaussian_posterior().log_prob(np.zeros((2, 3, 1)), X, divergence="hutchinson", probes=probes)


def test_no_observations_are_refused_where_something_is_measured_on_them():
    posterior, nothing = random_mlp_posterior({"data": 1}), np.zeros((0, 3, 1))
    assert posterior.sample_batched(0, nothing, 5).shape == (5, 0, 2, 1)
    with pytest.raises(ValueError, match="xs holds no observations: give some, or leave it out"):
        posterior.sample_batched(0, nothing, 5, check=0.5)
    with pytest.raises(ValueError, match="xs holds no observations to calibrate on; give some"):
        posterior.calibrate(nothing)


def test_a_parameter_that_does_not_vary_is_not_checked_by_its_rounding():
    """The other one still is, in its own sd."""
    rng = np.random.default_rng(0)
    draws = np.stack([np.full((1, 50), 3.0), rng.normal(size=(1, 50))], -1)[..., None].astype(np.float32)
    refined = np.stack([np.nextafter(draws[:, :, 0], np.float32(4)), draws[:, :, 1] + np.float32(0.05)], 2)
    found = compare(draws, refined, draws.std(1, keepdims=True))
    assert found["q95"] == pytest.approx(0.05 / draws[0, :, 1].std(), rel=1e-4)
    still = compare(draws[:, :, :1], refined[:, :, :1], draws[:, :, :1].std(1, keepdims=True))
    assert 0 < still["q95"] < 0.1
    moved = draws + np.float32(0.3)
    with pytest.warns(UserWarning, match="moves 5 % of the draws by more than"):
        compare(draws, moved, draws.std(1, keepdims=True))


def test_an_observation_that_fails_does_not_cost_the_others():
    posterior = random_mlp_posterior()
    xs = np.ones((5, 3, 1), np.float32)
    xs[3] = 3e38  # the network overflows
    with pytest.raises(
        SolveError, match=r"5 draws of observation 3 \(id 3\) are not finite.*in this error's `made`"
    ) as caught:
        posterior.draw(0, xs, 5)
    good = [0, 1, 2, 4]
    assert caught.value.failed == [3]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.failed) == (str(caught.value), [3])
    np.testing.assert_array_equal(copy.made, caught.value.made)
    np.testing.assert_array_equal(caught.value.made[good], posterior.draw(0, xs[good], 5, observation_ids=good))


def test_ids_up_to_64_bits():
    posterior, xs = random_mlp_posterior(), np.ones((2, 3, 1))
    mixed = posterior.draw(0, xs, 5, observation_ids=[2**63 + 1, 5])
    np.testing.assert_array_equal(
        mixed, posterior.draw(0, xs, 5, observation_ids=np.asarray([2**63 + 1, 5], np.uint64))
    )
    np.testing.assert_array_equal(mixed[1], posterior.sample(0, xs[:1], 5, observation_id=5))


@pytest.mark.cpus
def test_few_draws_do_not_encode_one_observation_a_thousand_times(monkeypatch):
    """With one draw a tile has 256 slots; a device encodes 64 observations at a time, once for one observation, and the draws are
    those of a batch."""
    posterior, rows = random_mlp_posterior(mesh={"data": 2}, tile=Tile(4, 64)), []
    make = tiles.encode_program
    counted = lambda *a: lambda weights, x: (rows.append(len(x)), make(*a)(weights, x))[1]  # noqa: E731
    monkeypatch.setattr(tiles, "encode_program", counted)
    xs = np.random.default_rng(0).normal(size=(700, 3, 1)).astype("f4")
    one = posterior.sample(0, xs[:1], 1)
    assert rows == [128]
    np.testing.assert_array_equal(posterior.draw(0, xs, 1)[0], one)
    assert rows == [128] * 7


@pytest.mark.cpus
def test_a_dispatch_is_taken_at_once(monkeypatch):
    """13 observations of three blocks, the last of them not whole, in dispatches of eight: 39 blocks of 4, 4 and 2 draws."""
    taken, look = [], fill_module.unsolved
    monkeypatch.setattr(
        fill_module, "unsolved", lambda parts, make: (taken.append(len(parts[0])), look(parts, make))[1]
    )
    posterior = random_mlp_posterior(tile=Tile(4, 4))
    monkeypatch.setattr(Tile, "for_draws", lambda tile, *_: tile)
    xs = np.random.default_rng(0).normal(size=(13, 3, 1)).astype("f4")
    drawn = posterior.draw(0, xs, 10)
    assert len(taken) == 5 and sum(taken) == 130
    np.testing.assert_array_equal(drawn[7], posterior.sample(0, xs[7:8], 10, observation_id=7))


def test_far_observations_are_found_on_the_host_in_blocks(monkeypatch):
    posterior, seen = gaussian_posterior(facts={"x_extent": [1.0, 1.5]}), []
    forward = Standardizer.forward_x
    monkeypatch.setattr(Standardizer, "forward_x", lambda s, x, xp: (seen.append(forward(s, x, xp)), seen[-1])[1])
    monkeypatch.setattr(posterior, "_draw", lambda key, xs, ids, nsamples, _: np.zeros((len(xs), nsamples, 3, 1)))
    xs = np.zeros((9_000, 2, 1), np.float32)
    xs[100, 1], xs[8_500, 1] = 4.0, 9.0
    with pytest.warns(UserWarning, match=r"x\[8500\] lies far .* its entry 1 .9. is 6 times"):
        posterior.sample_batched(0, xs, 1)
    assert [len(z) for z in seen] == [4_096, 4_096, 808]
    assert all(type(z) is np.ndarray for z in seen)


@pytest.mark.parametrize("size", [0, "8", 2.5, True])
def test_sizes_of_a_tile(size):
    with pytest.raises(ValueError, match="Tile.slots must be a positive integer"):
        Tile(size, 256)
    assert Tile(8.0, np.int64(256)) == Tile(8, 256)  # type: ignore[arg-type]


def test_tiles_fit_what_they_hold():
    assert Tile(8, 256).for_draws(1) == Tile(2048, 1)
    assert Tile(8, 256).for_draws(1, most_slots=200) == Tile(128, 1)
    assert Tile(8, 256).for_draws(300, most_slots=1) == Tile(8, 256)
    assert Tile(128, 512).within(20_000) == Tile(32, 512)
    assert Tile(2, 512).within(100) == Tile(1, 64)
    assert Tile(12, 8).encoded == 12
    assert Tile(96, 8).encoded == 48


def test_bytes_of_a_row_and_of_a_context():
    """The widest array of an MLP of width 16 holds 32 numbers a draw (scale and shift are shared): its sizes are known."""
    posterior = random_mlp_posterior()
    width, depth = posterior.network.params.width, posterior.network.params.depth
    assert tiles.bytes_per_row(posterior.network, posterior.weights.standardizer) == 4 * width
    assert tiles.bytes_per_context(posterior.network, posterior.weights.standardizer) == 4 * (width * depth + 2)


def test_bytes_of_a_row_where_weights_are_larger():
    """Weights are cast to bfloat16: a copy of 1024 x 1024 of them is larger than what 256 draws of that width take."""
    network = MLP(MLPParams(2, 3, width=1_024, depth=1, dtype="bfloat16"), rngs=nnx.Rngs(0))
    posterior = random_mlp_posterior(network=network)
    assert tiles.bytes_per_row(posterior.network, posterior.weights.standardizer) == 4 * 1_024
