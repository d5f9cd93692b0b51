import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distsbi.methods import FlowMatching
from distsbi.solvers import RULES, Adaptive, FixedGrid, make_solver, solver_from_dict

METHOD = FlowMatching()
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "multistep": 2}


def spiral(t, y, context):
    return jnp.stack([y[..., 1], -y[..., 0]], -1) * (1 + t)


Y0 = jnp.asarray([[[1.0, 0.5]]])
ANGLE = 1.5
EXACT = np.asarray([np.cos(ANGLE) + 0.5 * np.sin(ANGLE), -np.sin(ANGLE) + 0.5 * np.cos(ANGLE)])


@pytest.mark.parametrize("rule", RULES)
def test_order_of_convergence(rule):
    """Halving the step divides the error by 2^order, within 30 %."""
    assert set(ORDERS) == set(RULES)
    steps = (4, 8) if rule == "rk4" else (40, 80)
    errors = []
    for n in steps:
        times = tuple(0.9 * i / n for i in range(n + 1))  # away from t = 1, where multistep's coordinates are singular
        angle = 0.9 + 0.9**2 / 2
        exact = [np.cos(angle) + 0.5 * np.sin(angle), -np.sin(angle) + 0.5 * np.cos(angle)]
        errors.append(float(np.abs(np.asarray(FixedGrid(rule, times).solve(spiral, Y0, None)).ravel() - exact).max()))
    assert errors[0] / errors[1] == pytest.approx(2 ** ORDERS[rule], rel=0.3)


def test_multistep_is_exact_for_a_linear_endpoint():
    """dy/dt = (D(t) - y) / (1 - t) with D = 1 + 2 t ends at D(1) = 3, on any grid; only the first, Euler's, step errs and is undone."""
    grid = FixedGrid("multistep", (0.0, 0.3, 0.35, 0.7, 1.0))
    end = grid.solve(lambda t, y, c: (1 + 2 * t - y) / (1 - t), jnp.asarray(5.0), None)
    assert float(end) == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_evaluations_are_what_is_promised(rule):
    seen = []

    def velocity(t, y, context):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return -y

    grid = FixedGrid(rule, METHOD.grid(5))
    grid.solve(velocity, jnp.ones(()), None)
    jax.effects_barrier()
    assert len(seen) == grid.evaluations


@pytest.mark.parametrize("name", ["tsit5", "dopri5", "dopri8"])
def test_adaptive(name):
    y0 = jnp.broadcast_to(Y0, (3, 4, 2))[..., None]
    field = lambda t, y, c: jnp.stack([y[..., 1, :], -y[..., 0, :]], -2) * (1 + t)  # noqa: E731
    end = Adaptive(name, rtol=1e-6, atol=1e-6).solve(field, y0, jnp.zeros(3))
    np.testing.assert_allclose(end[..., 0], np.broadcast_to(EXACT, (3, 4, 2)), atol=2e-5)


def test_options():
    assert make_solver(METHOD, step_size=0.01) == FixedGrid("euler", tuple(i / 100 for i in range(101)))
    assert make_solver(METHOD, steps=4) == FixedGrid("midpoint", METHOD.grid(4))
    assert make_solver(METHOD, solver="Heun", steps=4).rule == "heun"  # type: ignore[union-attr]
    assert make_solver(METHOD, solver="dopri5", rtol=1e-3) == Adaptive("dopri5", rtol=1e-3)
    assert make_solver(METHOD, atol=1e-3) == Adaptive("tsit5", atol=1e-3)
    assert make_solver(METHOD, time_grid=[0, 0.5, 1]).times == (0, 0.5, 1)  # type: ignore[union-attr]
    default = FixedGrid("rk4", (0, 1))
    assert make_solver(METHOD, default=default) is default
    assert make_solver(METHOD, solver=default) is default
    for solver in (default, Adaptive("dopri8", rtol=1e-3)):
        assert solver_from_dict(solver.to_dict()) == solver


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "runge"}, "unknown solver 'runge'; fixed ones are euler"),
        ({"steps": 0}, "positive integer"), ({"steps": 2.5}, "positive integer"),
        ({"step_size": 0}, "step_size must be in"), ({"step_size": 2.0}, "step_size must be in"),
        ({"steps": 3, "step_size": 0.1}, "give one of"),
        ({"solver": "tsit5", "steps": 3}, "chooses its own steps"),
        ({"steps": 3, "rtol": 0.1}, "needs an adaptive solver"),
        ({"rtol": -1.0}, "must be positive"),
        ({"time_grid": [0, 0.5, 0.4, 1]}, "increasing times"),
        ({"time_grid": [0, 0.5]}, "must run from 0"), ({"time_grid": [0.1, 1.0]}, "must run from 0"),
    ],
)  # fmt: skip
def test_errors(options, says):
    with pytest.raises(ValueError, match=says):
        make_solver(METHOD, **options)
