import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distsbi.methods import METHODS, FlowMatching
from distsbi.sampling import DistillConfig, flow
from distsbi.solvers import RULES, Adaptive, Field, FixedGrid, make_solver, solver_from_dict
from distsbi.solvers.quadrature import THROUGH, _jumps, weights
from distsbi.solvers.rules import DENSITY_RULES
from distsbi.training import TrainingConfig

METHOD = FlowMatching()
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk3": 3, "rk4": 4, "multistep": 2}


def spiral(t, y, context):
    return jnp.stack([y[..., 1], -y[..., 0]], -1) * (1 + t)


def of_velocity(function):
    """The field whose velocity is function(t, y, context)."""
    return Field(function, FlowMatching(scale_input=False))


SPIRAL = of_velocity(spiral)
DETERMINISTIC = [name for name, rule in RULES.items() if not rule.stochastic]
STOCHASTIC = [name for name, rule in RULES.items() if rule.stochastic]
Y0 = jnp.asarray([[[1.0, 0.5]]])
ANGLE = 1.5
EXACT = np.asarray([np.cos(ANGLE) + 0.5 * np.sin(ANGLE), -np.sin(ANGLE) + 0.5 * np.cos(ANGLE)])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rule", [rule for rule in DETERMINISTIC if rule not in ("rk4", "multistep")])
def test_order_of_convergence_on_every_path(rule, name):
    """At least (midpoint's leading error nearly cancels on some), of a Gaussian, from a quarter of the way on to three quarters, against 200 steps of RK4."""
    method = METHODS[name]()
    field, times = gaussian_field(method), np.linspace(0.25, 0.75, 201)
    y = jnp.asarray(NOISE(0)[:, :50]) * method.sigma(jnp.float32(0.25))
    exact = FixedGrid("rk4", tuple(times)).solve(field, y, None)
    errors = [
        float(jnp.abs(FixedGrid(rule, tuple(times[::every])).solve(field, y, None) - exact).max())
        for every in ((10, 5) if rule == "euler" else (50, 25))
    ]
    assert errors[0] / errors[1] > 0.7 * 2 ** ORDERS[rule]


@pytest.mark.parametrize("rule", DETERMINISTIC)
def test_order_of_convergence(rule):
    """Halving the step divides the error by 2^order, within 30 %."""
    assert set(ORDERS) == set(DETERMINISTIC)
    steps = (4, 8) if rule in ("rk3", "rk4") else (40, 80)
    errors = []
    for n in steps:
        times = tuple(0.9 * i / n for i in range(n + 1))  # away from t = 1, where multistep's coordinates are singular
        angle = 0.9 + 0.9**2 / 2
        exact = [np.cos(angle) + 0.5 * np.sin(angle), -np.sin(angle) + 0.5 * np.cos(angle)]
        errors.append(float(np.abs(np.asarray(FixedGrid(rule, times).solve(SPIRAL, Y0, None)).ravel() - exact).max()))
    assert errors[0] / errors[1] == pytest.approx(2 ** ORDERS[rule], rel=0.3)


def test_multistep_is_exact_for_a_linear_endpoint():
    """dy/dt = (D(t) - y) / (1 - t) with D = 1 + 2 t ends at D(1) = 3, on any grid; only the first, Euler's, step errs and is undone."""
    grid = FixedGrid("multistep", (0.0, 0.3, 0.35, 0.7, 1.0))
    end = grid.solve(of_velocity(lambda t, y, c: (1 + 2 * t - y) / (1 - t)), jnp.asarray(5.0), None)
    assert float(end) == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_evaluations_are_what_is_promised(rule):
    seen = []

    def velocity(t, y, context):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return -y

    grid = FixedGrid(rule, METHOD.grid(5))
    grid.solve(of_velocity(velocity), jnp.ones(()), None, lambda step: jnp.ones(()))
    jax.effects_barrier()
    assert len(seen) == grid.evaluations


@pytest.mark.parametrize("name", ["tsit5", "dopri5", "dopri8"])
def test_adaptive(name):
    y0 = jnp.broadcast_to(Y0, (3, 4, 2))[..., None]
    field = lambda t, y, c: jnp.stack([y[..., 1, :], -y[..., 0, :]], -2) * (1 + t)  # noqa: E731
    end = Adaptive(name, rtol=1e-6, atol=1e-6).solve(of_velocity(field), y0, jnp.zeros(3))
    np.testing.assert_allclose(end[..., 0], np.broadcast_to(EXACT, (3, 4, 2)), atol=2e-5)
    together = Adaptive(name, rtol=1e-6, atol=1e-6, coupled=True)
    np.testing.assert_allclose(together.solve(of_velocity(field), y0, jnp.zeros(3)), end, atol=2e-5)
    back = together.solve(of_velocity(field), end, jnp.zeros(3), reverse=True)
    np.testing.assert_allclose(back, y0, atol=2e-5)


SD = jnp.asarray([0.05, 0.3, 2.0])[:, None]
MEAN = jnp.asarray([0.5, -0.2, 0.1])[:, None]


def time_of(method, c_time):
    """The time that the network is told of as `c_time`."""
    return method._time(jnp.exp(4 * c_time)) if type(method).__name__ == "EDM" else c_time


def gaussian_field(method, mean=MEAN, sd=SD) -> Field:
    """The exact field of data N(mean, sd^2), elementwise, as a network that predicts the method's target would give it."""

    def predict(c_time, y, context):
        t = time_of(method, c_time)
        y = y / method.c_in(t)
        alpha, sigma = method.alpha(t), method.sigma(t)
        variance = alpha**2 * sd**2 + sigma**2
        residual = (y - alpha * mean) / variance
        a, b = method.target(t)
        return a * (mean + alpha * sd**2 * residual) + b * sigma * residual

    return Field(predict, method)


@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_draws_a_gaussian_with_every_method(rule, method):
    """Mean within five standard errors of 4,000 draws (a false alarm in 40,000 for all cases), sd within 12 %: the sampling error of an sd is
    1.1 %, and first-order rules have an error of their own on 200 steps (800 of Euler's). A rule at the wrong end, scale or time misses by a factor."""
    field = gaussian_field(method)
    key = jax.random.key(3)
    noise = lambda step: jax.random.normal(jax.random.fold_in(key, step), (1, 4_000, 3, 1))  # noqa: E731
    grid = FixedGrid(rule, method.grid(800 if rule == "euler" else 200))
    y = grid.solve(field, method.initial(noise(10_000)), None, noise)
    if method.denoises:
        y = field.parts(method.moment(jnp.ones(())), y, None)[0]
    draws = np.asarray(y)[0, ..., 0]
    assert (np.abs(draws.mean(0) - MEAN[:, 0]) < (5 / np.sqrt(4_000) + 0.02) * SD[:, 0]).all()
    np.testing.assert_allclose(draws.std(0), SD[:, 0], rtol=0.12)


@pytest.mark.long
@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda m: type(m).__name__)
def test_default_steps_are_enough(method):
    """As many as a rule takes by itself leave the sd within 5 % (of Euler's 10 %); of noise whose own mean and sd are exact, but for what the steps add to it:
    1.1 % of 4,000 draws, so four standard errors more there (a false alarm in 1,000 for all cases). What is drawn with if nothing is asked for: within 2 %."""
    field, key = gaussian_field(method), jax.random.key(5)
    z = np.asarray(NOISE(10_000))
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)

    def sds(grid):
        noise = lambda step: jax.random.normal(jax.random.fold_in(key, step), z.shape)  # noqa: E731
        y = jax.jit(lambda z: grid.solve(field, method.initial(z), None, noise))(z)
        y = field.parts(method.moment(jnp.ones(())), y, None)[0] if method.denoises else y
        return np.std(y, axis=1)[0, :, 0] / SD[:, 0]

    np.testing.assert_allclose(sds(make_solver(method)), 1, atol=0.02)
    for rule in RULES:
        grid = make_solver(method, solver=rule)
        assert len(grid.times) == RULES[rule].steps + 1  # type: ignore[union-attr]
        bound = 0.1 if rule == "euler" else 0.05 + 0.045 * RULES[rule].stochastic
        np.testing.assert_allclose(sds(grid), 1, atol=bound, err_msg=rule)


@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda m: type(m).__name__)
def test_a_volume_is_integrated_on_the_way(method):
    """Of a Gaussian, within 0.005 nat, both ways, where the solve goes over other units (the frame of the path)."""
    grid = FixedGrid("rk4", method.grid(64))
    field, z = gaussian_field(method), np.asarray(NOISE(10_000))[:, :200]
    both = flow._with_divergence(field, (3, 1), flow.EXACT, None)
    start = method.initial(jnp.asarray(z))
    y, change = grid.solve_with_volume(field, both, start, None)
    np.testing.assert_allclose(y, grid.solve(field, start, None), atol=1e-5)

    def log_p(t, y):
        alpha, variance = method.alpha(t), (method.alpha(t) * SD) ** 2 + method.sigma(t) ** 2
        return jnp.sum(-0.5 * (y - alpha * MEAN) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance), axis=(-2, -1))

    first, last = jnp.float32(0), jnp.float32(1)
    np.testing.assert_allclose(log_p(first, start) - change, log_p(last, y), atol=0.005)
    back, change = grid.solve_with_volume(field, both, y, None, reverse=True)
    np.testing.assert_allclose(log_p(first, back) + change, log_p(last, y), atol=0.005)


def test_weights_of_a_volume_integrate_what_they_should():
    """Constants and the identity on any times, cubic polynomials on equal ones, and what is smooth ever better."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 4, 5, 40):
        times = np.sort(rng.uniform(size=n))
        found = weights(times)
        np.testing.assert_allclose(found.sum(), times[-1] - times[0], rtol=1e-9)
        np.testing.assert_allclose(found @ times, (times[-1] ** 2 - times[0] ** 2) / 2, rtol=1e-9)
        np.testing.assert_allclose(weights(times[::-1])[::-1], -found, atol=1e-9)
    equal = np.linspace(0.5, 2.0, 9)
    np.testing.assert_allclose(weights(equal) @ equal**3, (2.0**4 - 0.5**4) / 4, rtol=1e-10)
    for grid in (lambda n: np.linspace(0, 1, n + 1), lambda n: 1 - (1 - np.arange(n + 1) / n) ** 2):  # of order four
        errors = [abs(weights(grid(n)) @ np.exp(3 * grid(n)) - (np.exp(3) - 1) / 3) for n in (40, 80)]
        assert errors[0] < 5e-6 and errors[1] < errors[0] / 12


@pytest.mark.parametrize(
    "lengths",
    [[9.0] * 10 + [1.0] * 10, [1.0] * 15 + [4.0] * 5, [1.0, 8.0] * 20, [1.0] * 10 + [1e-9] + [1.0] * 10],
    ids=["fine end", "fine start", "by turns", "a step of no length"],
)
def test_weights_where_step_lengths_jump(lengths):
    times = np.cumsum([0.0, *lengths]) / sum(lengths)
    assert abs(weights(times) @ np.exp(3 * times) - (np.exp(3) - 1) / 3) < 2e-3
    trapezoid = np.trapezoid(np.exp(3 * times), times) - (np.exp(3) - 1) / 3
    assert abs(weights(times) @ np.exp(3 * times) - (np.exp(3) - 1) / 3) < 0.1 * abs(trapezoid)


@pytest.mark.parametrize("name", METHODS)
def test_grids_of_the_methods_do_not_jump(name):
    """There cubics in the number of the time are the better ones."""
    method = METHODS[name]()
    m = method.moment(jnp.asarray(method.grid(method.density_steps)))
    along = np.asarray(m.t if method.straight else -m.sigma / m.scale, np.float64)
    jumps = [_jumps(along[i : i + THROUGH]) for i in range(len(along) - THROUGH + 1)]
    assert not any(jumps)


@pytest.mark.parametrize("rule", DENSITY_RULES)
def test_the_divergence_is_asked_for_once_a_step_and_at_the_end(rule):
    """Counted when a solve runs, not when it is traced."""
    asked = {"velocity": 0, "divergence": 0}

    def count(name):
        jax.debug.callback(lambda: asked.__setitem__(name, asked[name] + 1))

    def velocity(t, y, context):
        count("velocity")
        return -y

    def both(m, y, context):
        count("divergence")
        return -y, -jnp.ones(y.shape[:2])

    grid = FixedGrid(rule, METHOD.grid(5))
    jax.block_until_ready(grid.solve_with_volume(of_velocity(velocity), both, jnp.ones((1, 1, 1, 1)), None))
    jax.effects_barrier()
    assert asked == {"velocity": 5 * (RULES[rule].evaluations - 1), "divergence": 6}


@pytest.mark.parametrize("rule", DENSITY_RULES)
def test_a_volume_has_the_order_of_its_rule(rule):
    """dy/dt = (1 + t) sin y, which grows a length at y0 by sin y1 / sin y0 until tan(y1 / 2) = exp(1.5) tan(y0 / 2); there and back."""
    field = of_velocity(lambda t, y, context: (1 + t) * jnp.sin(y))
    both = flow._with_divergence(field, (1, 1), flow.EXACT, None)
    y0 = jnp.linspace(0.3, 2.0, 20)[None, :, None, None]
    y1 = 2 * jnp.arctan(jnp.exp(1.5) * jnp.tan(y0 / 2))
    known = jnp.log(jnp.sin(y1) / jnp.sin(y0))[..., 0, 0]
    steps = (10, 20) if rule in ("rk3", "rk4") else (40, 80)
    for start, reverse, volume in ((y0, False, known), (y1, True, -known)):
        errors = [
            float(
                jnp.abs(
                    FixedGrid(rule, tuple(np.linspace(0, 1, n + 1))).solve_with_volume(
                        field, both, start, None, reverse=reverse
                    )[1]
                    - volume
                ).max()
            )
            for n in steps
        ]
        assert errors[1] < 0.05 and errors[0] / errors[1] > 0.7 * 2 ** ORDERS[rule], errors


SUMMED = (0.0, *np.cumsum(np.full(100, 0.01, np.float32)).tolist())  # ends at 0.9999993


@pytest.mark.parametrize("times", [tuple(i / 100 for i in range(101)), SUMMED], ids=["exact", "summed"])
@pytest.mark.parametrize("rule", ["euler", "euler_maruyama", "zero_ends", "non_singular"])
def test_the_last_step_leaves_no_noise_behind(rule, times):
    """Data of sd 1e-3, seen on 100 equal steps from noise of 1e-2 before the last: to E[x], which is narrower, not to what noise is left; also where
    the last time is 1 but for the rounding of a sum."""
    noise = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (1, 1_000, 1, 1))  # noqa: E731
    grid = FixedGrid(rule, times)
    draws = grid.solve(gaussian_field(METHOD, 0.0, 1e-3), noise(1_000), None, noise)
    assert float(jnp.std(draws)) < 1.1e-3


@pytest.mark.parametrize("rule", sorted({*RULES} - {*DENSITY_RULES}))
def test_what_runs_one_way_alone(rule):
    with pytest.raises(ValueError, match=f"solver '{rule}' runs from noise to data alone; euler, midpoint"):
        FixedGrid(rule, (0.0, 0.5, 1.0)).solve(
            gaussian_field(METHOD), jnp.zeros((1, 2, 3, 1)), None, NOISE, reverse=True
        )


def test_numbers_of_numpy_are_json_able():
    number = np.float32(1e-3)
    assert json.dumps(FlowMatching(tilt=4).to_dict()) != json.dumps(
        FlowMatching(tilt=4.0).to_dict()
    )  # in the fingerprint of runs as it was given
    for made in (
        Adaptive(rtol=number, max_steps=np.int64(9)),
        FlowMatching(tilt=number),
        DistillConfig(max_lr=number),
        TrainingConfig(max_lr=number),
    ):
        again = json.loads(json.dumps(made.to_dict() if hasattr(made, "to_dict") else dataclasses.asdict(made)))
        assert float(number) in again.values()


NOISE = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(4), step), (1, 4_000, 3, 1))  # noqa: E731


def drawn_by(rule, method, times, **options):
    grid = FixedGrid(rule, times, tuple(options.items()))
    return grid.solve(gaussian_field(method), method.initial(NOISE(10_000)), None, NOISE)


@pytest.mark.parametrize(
    ("rule", "options", "plain"),
    [
        ("zero_ends", {"strength": 0.0}, "euler"), ("non_singular", {"strength": 0.0}, "euler"), ("stochastic_heun", {"churn": 0.0}, "heun"),
        ("stochastic_heun", {"churn": 40.0, "s_min": 1e6, "s_max": 1e9}, "heun"), ("stochastic_heun", {"churn": 40.0, "s_max": 0.0}, "heun"),
    ],
)  # fmt: skip
def test_without_noise_a_stochastic_rule_is_the_plain_one(rule, options, plain):
    """Of the straight path, before its end; with its own options it is not."""
    times = tuple(0.9 * i / 30 for i in range(31))
    ends = [drawn_by(name, METHOD, times, **given) for name, given in ((rule, options), (plain, {}), (rule, {}))]
    np.testing.assert_allclose(ends[0], ends[1], atol=2e-5)
    assert float(jnp.abs(ends[2] - ends[1]).mean()) > 0.02


@pytest.mark.parametrize(
    ("rule", "options"),
    [("zero_ends", {"strength": 2.0}), ("non_singular", {"strength": 2.0}), ("stochastic_heun", {"churn": 60.0})],
)
def test_more_noise_leaves_the_draws_what_they_are(rule, options):
    """Bounds as above."""
    draws = np.asarray(drawn_by(rule, METHOD, METHOD.grid(400), **options))[0, ..., 0]
    assert (np.abs(draws.mean(0) - MEAN[:, 0]) < (5 / np.sqrt(4_000) + 0.02) * SD[:, 0]).all()
    np.testing.assert_allclose(draws.std(0), SD[:, 0], rtol=0.12)


def test_inflated_noise_widens_the_draws():
    """s_noise is Karras' S_noise: 1.3 of it leaves more than 10 % more sd of the narrowest parameter."""
    method = METHODS["edm"]()
    sds = [
        np.std(drawn_by("stochastic_heun", method, method.grid(60), churn=40.0, s_noise=s), axis=1)[0, 0, 0]
        for s in (1.0, 1.3)
    ]
    assert sds[1] > 1.1 * sds[0]


@pytest.mark.parametrize("method", [*(cls() for cls in METHODS.values()), METHODS["edm"](sigma_max=15.0)], ids=str)
def test_churn_stays_on_the_path(method):
    """The noise of the state and that of the time which the network is told are one, also where the path has no more."""
    p = FixedGrid("stochastic_heun", method.grid(8), (("churn", 1e9), ("s_min", 0.0), ("s_max", 1e9))).schedule(method)
    told = p["raised"].sigma / p["raised"].scale
    ends = (p["end"].sigma / p["end"].scale)[: len(told)]
    np.testing.assert_allclose(p["h"] + ends, told, rtol=2e-3, atol=1e-6)


def test_reverse_and_trajectory():
    grid = FixedGrid("rk4", METHOD.grid(12))
    path = grid.solve(SPIRAL, Y0, None, trajectory=True)
    assert path.shape == (13, *Y0.shape)
    np.testing.assert_array_equal(path[0], Y0)
    np.testing.assert_array_equal(path[-1], grid.solve(SPIRAL, Y0, None))
    np.testing.assert_allclose(grid.solve(SPIRAL, path[-1], None, reverse=True), Y0, atol=1e-4)
    assert len(grid.refined().times) == 25
    with pytest.raises(ValueError, match="chooses its own times"):
        Adaptive().solve(SPIRAL, Y0, None, trajectory=True)


@pytest.mark.parametrize("rule", STOCHASTIC)
def test_stochastic_rules_need_noise_and_gives_no_density(rule):
    grid = FixedGrid(rule, METHOD.grid(4))
    assert not grid.gives_density
    with pytest.raises(ValueError, match="needs noise"):
        grid.solve(SPIRAL, Y0, None)


def test_options():
    assert make_solver(METHOD, step_size=0.01) == FixedGrid("euler", tuple(i / 100 for i in range(101)))
    assert make_solver(METHOD, steps=4) == FixedGrid("midpoint", METHOD.grid(4))
    assert make_solver(METHOD, solver="Heun", steps=4).rule == "heun"  # type: ignore[union-attr]
    assert make_solver(METHOD, solver="dopri5", rtol=1e-3) == Adaptive("dopri5", rtol=1e-3)
    assert make_solver(METHOD, atol=1e-3) == Adaptive("tsit5", atol=1e-3)
    through = make_solver(METHOD, time_grid=[0, 0.3, 1], step_size=0.25)
    assert through == FixedGrid("euler", (0, 0.25, 0.3, 0.5, 0.75, 1))
    assert make_solver(METHOD, time_grid=[0, 1], solver=through) == through
    near = FixedGrid("multistep", (0, 0.25, 0.5, 1)).through([0, 0.26, 0.7, 1])  # without a step of 0.01
    assert near.times == (0, 0.26, 0.5, 0.7, 1)
    default = FixedGrid("rk4", (0, 1))
    assert make_solver(METHOD, default=default) is default
    assert make_solver(METHOD, solver=default) is default
    churned = make_solver(METHOD, solver="stochastic_heun", steps=4, solver_options={"churn": 20})
    assert dict(churned.options)["churn"] == 20  # type: ignore[union-attr]
    for solver in (default, Adaptive("dopri8", rtol=1e-3, coupled=True, max_steps=99), churned):
        assert solver_from_dict(solver.to_dict()) == solver
    assert "max_steps" not in Adaptive().to_dict()  # as runs of before have it


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "runge"}, "unknown solver 'runge'; fixed ones are euler"),
        ({"steps": np.inf}, "positive integer"), ({"steps": np.nan}, "positive integer"), ({"steps": "ten"}, "positive integer"),
        ({"time_grid": [i / 50 for i in range(50)]}, r"from 0 .* got \(0, 0.02, 0.04, ..., 0.94, 0.96, 0.98\)"),
        ({"steps": 0}, "positive integer"), ({"steps": 2.5}, "positive integer"),
        ({"step_size": 0}, "step_size must be in"), ({"step_size": 2.0}, "step_size must be in"),
        ({"steps": 3, "step_size": 0.1}, "give one of"),
        ({"solver": "tsit5", "steps": 3}, "chooses its own steps"),
        ({"steps": 3, "rtol": 0.1}, "needs an adaptive solver"),
        ({"rtol": -1.0}, "must be positive"),
        ({"time_grid": [0, 0.5, 0.4, 1]}, "increasing times"), ({"time_grid": [0, np.nan, 1]}, "increasing times"),
        ({"time_grid": [0, 0.5, 1], "solver": "tsit5"}, "tsit5 chooses its own times"), ({"rtol": np.inf}, "positive and finite"),
        ({"solver": "zero_ends", "solver_options": {"strength": np.inf}}, "must be finite"),
        ({"solver": "multistep", "steps": 1_100}, "1100 steps of 'multistep' is too fine for float32 near t = 1; give fewer steps"),
        ({"solver": "heun", "solver_options": {"churn": 1}}, "has no option 'churn'; it has none. stochastic_heun has 'churn'"),
        ({"solver": "stochastic_heun", "solver_options": {"chrun": 1}}, "it has churn, s_min"),
        ({"solver": "zero_ends", "solver_options": {"strength": "a"}}, "must be a number"),
        ({"solver_options": {"churn": 1}}, "need the name"), ({"steps": 3, "coupled": True}, "coupled=True needs"),
        ({"solver": FixedGrid("midpoint", (0.0, 0.25, 0.5))}, "the times of a solver must run from 0"),
        ({"time_grid": [0, 0.5]}, "must run from 0"), ({"time_grid": [0.1, 1.0]}, "must run from 0"),
    ],
)  # fmt: skip
def test_errors(options, says):
    with pytest.raises(ValueError, match=says):
        make_solver(METHOD, **options)
