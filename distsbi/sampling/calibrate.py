"""The production grid, chosen by measurement after training.

A coarse grid takes noise z to theta'. The tight solution takes theta' back to the noise z' that it should have come from. The
length of z' - z is the error in units of the posterior's LOCAL scale, whatever its shape: a thin crescent turns a small error in
theta into a large one in z. The cheapest candidate whose error is under tolerance on held-out observations is the run's grid; the errors of
all candidates are its certificate.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distsbi import keys
from distsbi.networks.base import encode
from distsbi.sampling.flow import make_field
from distsbi.solvers import FixedGrid, Solver

CANDIDATES = (*(("multistep", steps) for steps in (8, 10, 12, 14, 16, 20, 24, 32)),
              ("midpoint", 24), ("rk4", 16), ("rk4", 32))  # fmt: skip
# Median and 95 % quantile, over draws, of the length of z' - z. A scale that is wrong by d moves a C2ST by about d / 4: this
# is below what 10,000 draws can show.
TOLERANCE, TOLERANCE_Q95 = 0.025, 0.08
OBSERVATIONS, DRAWS = 16, 32
REFERENCE_STEPS = 48  # of RK4, each way


def calibrate(posterior: Any, xs: Float[np.ndarray, "n dim_x ch_x"]) -> tuple[Solver, dict[str, Any]]:
    """(the chosen grid, the certificate), from up to 16 of the observations `xs` with 32 draws each.

    Where no candidate is under tolerance the best is taken, and the certificate says so.
    """
    method = posterior.method
    xs = np.asarray(xs)[np.linspace(0, len(xs) - 1, min(OBSERVATIONS, len(xs))).round().astype(int)]
    shape = (posterior.dim_theta, posterior.ch_theta)
    words = keys.split_id(np.arange(len(xs)))
    tight = FixedGrid("rk4", method.grid(REFERENCE_STEPS))

    @jax.jit
    def prepare(weights: Any, xs: Array) -> tuple[Any, Array]:
        context, _ = encode(nnx.merge(posterior.graphdef, weights.params), weights.standardizer, xs)
        noise = lambda w: keys.draw_noise(keys.as_key(0), w, jnp.uint32(0), DRAWS, shape)  # noqa: E731
        return context, jax.vmap(noise)(jnp.asarray(words))

    @functools.partial(jax.jit, static_argnames="rule")
    def solve(weights: Any, y: Array, context: Any, schedule: Any, steps: Array, rule: str) -> Array:
        """Compiled once for each rule, for grids of any length, forwards and back."""
        field = make_field(nnx.merge(posterior.graphdef, weights.params), method)
        return FixedGrid(rule, (0.0, 1.0)).solve(field, y, context, schedule=schedule, steps=steps)

    longest = max(REFERENCE_STEPS, *(steps for _, steps in CANDIDATES))

    def solved(solver: FixedGrid, y: Array, *, reverse: bool = False) -> Array:
        steps = len(solver.times) - 1
        ends = lambda a: np.pad(a, [(0, longest - steps), *[(0, 0)] * (a.ndim - 1)], mode="edge")  # noqa: E731
        schedule = jax.tree.map(ends, solver.schedule(method, reverse=reverse))
        return solve(posterior.weights, y, context, schedule, jnp.int32(steps), solver.rule)

    context, z = prepare(posterior.weights, xs)
    noise = method.initial(z)
    scale = method.sigma(jnp.zeros((), jnp.float32))

    def errors(solver: FixedGrid) -> tuple[float, float]:
        """(median, 95 % quantile) of what is between the noise and that which the tight solution takes the solver's draws to."""
        returned = solved(tight, solved(solver, noise), reverse=True)
        error = np.asarray(jnp.sqrt(jnp.sum(((returned - noise) / scale) ** 2, axis=(-2, -1))))
        error = np.where(np.isfinite(error), error, np.inf)
        return float(np.median(error)), float(np.quantile(error, 0.95, method="higher"))  # between inf and inf is nan

    rows = []
    floor = errors(tight)
    for rule, steps in CANDIDATES:
        try:
            solver = FixedGrid(rule, method.grid(steps))
        except ValueError:  # times that are one in float32, of a method with a large power
            continue
        median, q95 = errors(solver)
        rows.append({"solver": rule, "steps": steps, "evaluations": solver.evaluations, "median": median, "q95": q95})
        if median <= TOLERANCE and q95 <= TOLERANCE_Q95:
            break
    good = [row for row in rows if row["median"] <= TOLERANCE and row["q95"] <= TOLERANCE_Q95]
    best = good[-1] if good else min(rows, key=lambda row: row["q95"])
    certificate = {
        "met": bool(good), "tolerance": {"median": TOLERANCE, "q95": TOLERANCE_Q95},
        "reference": {"solver": "rk4", "steps": REFERENCE_STEPS, "median": floor[0], "q95": floor[1]},
        "observations": len(xs), "draws": DRAWS, "candidates": rows, "chosen": best,
    }  # fmt: skip
    return FixedGrid(best["solver"], method.grid(best["steps"])), certificate
