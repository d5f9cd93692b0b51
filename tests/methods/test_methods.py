"""Every method obeys the one mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distsbi.methods import EDM, METHODS, FlowMatching, Method, ScoreMatchingVE, ScoreMatchingVP, as_method, make_method

TIMES = jnp.linspace(0.05, 0.95, 7)
METHOD_CASES = [cls() for cls in METHODS.values()] + [
    FlowMatching(times="uniform", power=1.0),
    FlowMatching(times="logit_normal"),
]


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_split_inverts_path_and_target(method):
    x, z = jax.random.normal(jax.random.key(0), (2, 7))
    m, x_t, f = method.moment(TIMES), method.perturb(TIMES, x, z), method.goal(TIMES, x, z)
    back_x, back_z = m.x_y * x_t + m.x_f * f, m.z_y * x_t + m.z_f * f
    # float32 leaves a rounding of x_t: in units of the data it grows with sigma / alpha, of the noise with alpha / sigma
    scale = jnp.maximum(1.0, method.sigma(TIMES) / method.alpha(TIMES))
    np.testing.assert_allclose((back_x - x) / scale, 0.0, atol=1e-4)
    scale = jnp.maximum(1.0, method.alpha(TIMES) / method.sigma(TIMES))
    np.testing.assert_allclose((back_z - z) / scale, 0.0, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_derivatives_and_velocity(method):
    """The velocity at x_t with the true target is d/dt of alpha x + sigma z."""
    x, z = jax.random.normal(jax.random.key(1), (2, 7))
    np.testing.assert_allclose(jax.vmap(jax.grad(method.alpha))(TIMES), method.d_alpha(TIMES), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(jax.grad(method.sigma))(TIMES), method.d_sigma(TIMES), atol=1e-5, rtol=1e-4)
    x_t, f = method.perturb(TIMES, x, z), method.goal(TIMES, x, z)
    m = method.moment(TIMES)
    scale = jnp.maximum(1.0, jnp.abs(m.v_y * x_t))
    expected = method.d_alpha(TIMES) * x + method.d_sigma(TIMES) * z
    np.testing.assert_allclose((m.v_y * x_t + m.v_f * f - expected) / scale, 0.0, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_ends_and_the_straight_frame(method):
    """The noise at t = 0 is that of the initial state, little is left at t = 1, and `time_at` undoes alpha / (alpha + sigma)."""
    zero, one = jnp.zeros(()), jnp.ones(())
    assert float(method.initial(one)) == float(method.sigma(zero))
    assert float(method.alpha(zero) / method.sigma(zero)) < 0.03
    assert float(method.alpha(one)) == pytest.approx(1.0, abs=1e-5)
    assert float(method.sigma(one)) <= 0.002 + 1e-6
    assert method.denoises == (float(method.sigma(one)) > 0)
    np.testing.assert_allclose(method.time_at(method.alpha(TIMES) / method.moment(TIMES).scale), TIMES, atol=2e-3)


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_diffusion_of_the_forward_process(method):
    """g^2 = d(sigma^2)/ds - 2 sigma^2 d log(alpha) / ds for s = 1 - t, by differences."""
    t, d = 0.6, 1e-3
    late, early = (float(method.sigma(jnp.float32(t + s)) / method.alpha(jnp.float32(t + s))) for s in (d, -d))
    expected = float(method.alpha(jnp.float32(t))) ** 2 * (early**2 - late**2) / (2 * d)
    assert float(method.diffusion2(jnp.float32(t))) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_grid_times_and_round_trip(method):
    for steps in (1, 7):
        grid = method.grid(steps)
        assert len(grid) == steps + 1
        assert grid[0] == 0
        assert grid[-1] == 1
        assert (np.diff(grid) > 0).all()
    t = method.draw_times(jax.random.key(0), (1000,))
    assert float(t.min()) >= 0
    assert float(t.max()) <= 1
    assert type(method).from_dict(method.to_dict()) == method
    assert hash(method) == hash(type(method).from_dict(method.to_dict()))


def test_tilt_is_the_stated_density():
    """E t = s / 2 + (1 - s) (1 + a) / (2 + a) with a share s uniform; four standard errors of 200,000 draws, so a false
    alarm in 16,000."""
    for tilt, share in ((0.0, 0.0), (4.0, 0.0), (4.0, 0.25), (4.0, 1.0)):
        t = np.asarray(FlowMatching(tilt=tilt, uniform=share).draw_times(jax.random.key(0), (200_000,)))
        expected = share / 2 + (1 - share) * (1 + tilt) / (2 + tilt)
        assert abs(t.mean() - expected) < 4 * t.std() / np.sqrt(t.size)


def test_a_method_without_all_its_coefficients_is_none():
    class Half(FlowMatching):
        time_at = Method.time_at

    for cls in (Method, Half):
        with pytest.raises(TypeError, match="abstract method"):
            cls()


def test_errors():
    with pytest.raises(ValueError, match="known are"):
        make_method("flwo")
    with pytest.raises(ValueError, match="no options"):
        make_method("flow", sigma=1)
    with pytest.raises(ValueError, match="tilt >= 0"):
        FlowMatching(tilt=-1)
    with pytest.raises(ValueError, match="tilted, uniform, logit_normal"):
        FlowMatching(times="tiltd")
    for cls, options in (
        (EDM, {"sigma_min": 0.0}),
        (ScoreMatchingVP, {"beta_max": 0.01}),
        (ScoreMatchingVE, {"sigma_max": 0.0}),
    ):
        with pytest.raises(ValueError, match=f"{cls.__name__} needs"):
            cls(**options)
    for cls, options, says in (
        (EDM, {"sigma_max": np.inf}, "EDM.sigma_max must be finite"), (EDM, {"p_mean": np.nan}, "EDM.p_mean must be a number"),
        (FlowMatching, {"tilt": "4"}, "FlowMatching.tilt must be a number; got '4'"), (FlowMatching, {"power": 0.9}, "power >= 1;"),
        (FlowMatching, {"logit_mean": np.inf}, "finite"), (FlowMatching, {"scale_input": "no"}, "True or False; got 'no'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            cls(**options)
    with pytest.raises(ValueError, match="so near the data that some are one number: give it a smaller power"):
        as_method(FlowMatching(power=9.0))
    assert as_method(FlowMatching(power=7.0)) == FlowMatching(power=7.0)


def test_training_noise_of_edm_is_log_normal():
    """Mean and sd of ln sigma; four standard errors of 200,000 draws, a false alarm in 16,000."""
    method = EDM()
    log_sigma = np.log(np.asarray(method.sigma(method.draw_times(jax.random.key(0), (200_000,)))))
    assert abs(log_sigma.mean() + 1.2) < 4 * 1.2 / np.sqrt(200_000)
    assert abs(log_sigma.std() - 1.2) < 4 * 1.2 / np.sqrt(400_000)
