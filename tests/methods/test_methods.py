"""Every method obeys the one mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distsbi.methods import METHODS, FlowMatching, Method, make_method

TIMES = jnp.linspace(0.05, 0.95, 7)
METHOD_CASES = [cls() for cls in METHODS.values()] + [FlowMatching(tilt=0.0, power=1.0)]


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_split_inverts_path_and_target(method):
    x, z = jax.random.normal(jax.random.key(0), (2, 7))
    back_x, back_z = method.split(TIMES, method.perturb(TIMES, x, z), method.goal(TIMES, x, z))
    np.testing.assert_allclose(back_x, x, atol=1e-4)
    np.testing.assert_allclose(back_z, z, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_derivatives_velocity_and_score(method):
    x, z = jax.random.normal(jax.random.key(1), (2, 7))
    np.testing.assert_allclose(jax.vmap(jax.grad(method.alpha))(TIMES), method.d_alpha(TIMES), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.grad(method.sigma))(TIMES), method.d_sigma(TIMES), atol=1e-5)
    x_t, f = method.perturb(TIMES, x, z), method.goal(TIMES, x, z)
    np.testing.assert_allclose(method.velocity(TIMES, x_t, f), Method.velocity(method, TIMES, x_t, f), atol=1e-4)
    np.testing.assert_allclose(method.score(TIMES, x_t, f) * method.sigma(TIMES), -z, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_grid_times_and_round_trip(method):
    for steps in (1, 7):
        grid = method.grid(steps)
        assert len(grid) == steps + 1
        assert grid[0] == 0
        assert grid[-1] == pytest.approx(method.t_end)
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


def test_errors():
    with pytest.raises(ValueError, match="known are"):
        make_method("flwo")
    with pytest.raises(ValueError, match="no options"):
        make_method("flow", sigma=1)
    with pytest.raises(ValueError, match="tilt >= 0"):
        FlowMatching(tilt=-1)
