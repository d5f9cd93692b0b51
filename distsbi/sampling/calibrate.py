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
from distsbi.methods import FINEST
from distsbi.networks.base import encode
from distsbi.solvers import Field, FixedGrid, Solver

CANDIDATES = (*(("multistep", steps) for steps in (8, 10, 12, 14, 16, 20, 24, 32)),
              ("midpoint", 16), ("midpoint", 24), ("rk4", 16), ("rk4", 32))  # fmt: skip
# Median and 95 % quantile, over draws, of the length of z' - z. A scale that is wrong by d moves a C2ST by about d / 4: this
# is below what 10,000 draws can show.
TOLERANCE, TOLERANCE_Q95 = 0.025, 0.08
OBSERVATIONS, DRAWS = 16, 32
# Of RK4, for all candidates; for the one that is chosen, and to tell the reference's own error, twice as many.
REFERENCE_STEPS = FINEST // 2


def calibrate(posterior: Any, xs: Float[np.ndarray, "n dim_x ch_x"]) -> tuple[Solver, dict[str, Any]]:
    """(the chosen grid, the certificate), from up to 16 of the observations `xs` with 32 draws each.

    Where no candidate is under tolerance the best is taken, and the certificate says so; its "reference" tells the error of the tight solution, on half
    as many steps as measured the chosen grid.
    """
    method = posterior.method
    xs = np.asarray(xs)[np.linspace(0, len(xs) - 1, min(OBSERVATIONS, len(xs))).round().astype(int)]
    shape = (posterior.dim_theta, posterior.ch_theta)
    words = keys.split_id(np.arange(len(xs)))
    tight, finer = (FixedGrid("rk4", method.grid(steps)) for steps in (REFERENCE_STEPS, 2 * REFERENCE_STEPS))

    @jax.jit
    def prepare(weights: Any, xs: Array) -> tuple[Any, Array]:
        context, _ = encode(nnx.merge(posterior.graphdef, weights.params), weights.standardizer, xs)
        noise = lambda w: keys.draw_noise(keys.as_key(0), w, jnp.uint32(0), DRAWS, shape)  # noqa: E731
        return context, jax.vmap(noise)(jnp.asarray(words))

    @functools.partial(jax.jit, static_argnames="rule")
    def solve(weights: Any, y: Array, context: Any, schedule: Any, steps: Array, rule: str) -> Array:
        """Compiled once for each rule, for grids of any length, forwards and back."""
        field = Field(nnx.merge(posterior.graphdef, weights.params), method)
        return FixedGrid(rule, (0.0, 1.0)).solve(field, y, context, schedule=schedule, steps=steps)

    longest = max(2 * REFERENCE_STEPS, *(steps for _, steps in CANDIDATES))

    def solved(solver: FixedGrid, y: Array, *, reverse: bool = False) -> Array:
        steps = len(solver.times) - 1
        ends = lambda a: np.pad(a, [(0, longest - steps), *[(0, 0)] * (a.ndim - 1)], mode="edge")  # noqa: E731
        schedule = jax.tree.map(ends, solver.schedule(method, reverse=reverse))
        return solve(posterior.weights, y, context, schedule, jnp.int32(steps), solver.rule)

    context, z = prepare(posterior.weights, xs)
    noise = method.initial(z)
    scale = method.sigma(jnp.zeros((), jnp.float32))

    def returned(drawn: Array, reference: FixedGrid) -> np.ndarray:
        """The noise that the reference takes the draws to, as it begins a solve."""
        return np.asarray(solved(reference, drawn, reverse=True) / scale)

    def length(difference: np.ndarray) -> dict[str, float]:
        """Its median and 95 % quantile."""
        each = np.sqrt(np.sum(difference**2, axis=(-2, -1)))
        each = np.where(np.isfinite(each), each, np.inf)  # between inf and inf is nan
        return {"median": float(np.median(each)), "q95": float(np.quantile(each, 0.95, method="higher"))}

    def there_and_back(solver: FixedGrid) -> tuple[Array, np.ndarray]:
        """Its draws, and the noise that the reference takes them to."""
        drawn = solved(solver, noise)
        return drawn, returned(drawn, tight)

    def finely(drawn: Array, back: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        """The error of the draws against the reference of twice as many steps, and that of the other reference, which took them `back`. (A solve forth
        and back by one rule would not show it: their errors cancel.)"""
        fine = returned(drawn, finer)
        return length(fine - started), length(fine - back)

    started = np.asarray(noise / scale)
    rows: list[dict[str, Any]] = []
    found: dict[str, float] | None = None  # of the last of them
    for rule, steps in CANDIDATES:
        try:
            solver = FixedGrid(rule, method.grid(steps))
        except ValueError:  # times that are one in float32, of a method with a large power
            continue
        drawn, back = there_and_back(solver)
        error, found = length(back - started), None
        if _under(error):
            error, found = finely(drawn, back)
        rows.append({"solver": rule, "steps": steps, "evaluations": solver.evaluations, **error})
        if _under(error):
            break
    best = rows[-1] if _under(rows[-1]) else min(rows, key=lambda row: row["q95"])
    chosen = FixedGrid(best["solver"], method.grid(best["steps"]))
    if found is None or best is not rows[-1]:
        error, found = finely(*there_and_back(chosen))
        best |= error
    certificate = {
        "met": _under(best) and _under(found), "tolerance": {"median": TOLERANCE, "q95": TOLERANCE_Q95},
        "reference": {"solver": "rk4", "steps": 2 * REFERENCE_STEPS, **found},
        "observations": len(xs), "draws": DRAWS, "candidates": rows, "chosen": best,
    }  # fmt: skip
    return chosen, certificate


def _under(error: dict[str, Any]) -> bool:
    return error["median"] <= TOLERANCE and error["q95"] <= TOLERANCE_Q95
