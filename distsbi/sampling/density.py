"""The density of a posterior: log p(theta | x) at any theta, beside draws, and at its highest point.

flow.py has the equation, and tiles carry it as they carry draws. Chosen here: the solver, the divergence, and a tile that has room for the
tangents.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from distsbi import keys
from distsbi.hints import as_count, warn
from distsbi.methods import Method
from distsbi.sampling import tiles
from distsbi.sampling.checks import as_array, as_ids, compare_densities, draws_asked, one_of
from distsbi.sampling.fill import fill
from distsbi.sampling.flow import BASIS_AT_ONCE, EXACT, Divergence
from distsbi.sampling.options import NO_GIVEN, ONE, SampleOptions
from distsbi.sampling.tiles import Tile, Weights
from distsbi.solvers import SOLVERS, FixedGrid, Solver
from distsbi.solvers.rules import DENSITY_RULES, RULES

DENSITY_RULE = "rk3"  # where none is asked for


class Densities:
    """What `Posterior` inherits: `log_prob`, `log_prob_batched`, `sample_and_log_prob` and `map`.

    It needs of that class what is declared first: the network and its sizes, where to draw, the default tile and what fits (`most_slots`,
    `_most_rows`), and the checks of observations (`_many`, `_one`).
    """

    graphdef: nnx.GraphDef[Any]
    weights: Weights
    method: Method
    dim_theta: int
    ch_theta: int
    mesh: Mesh
    tile: Tile
    most_slots: int
    is_student: bool
    last_check: dict[str, float] | None
    no_given: str = NO_GIVEN  # what is said to a call that has no given=
    _most_rows: float
    _one: Callable[[Any], np.ndarray]
    _many: Callable[[Any], np.ndarray]

    def log_prob(
        self,
        theta: Float[Array, "n dim_theta ch_theta"],
        x_o: Float[Array, "1 dim_x ch_x"] | None = None,
        *,
        divergence: str = "exact",
        probes: int = 8,
        key: Any = 0,
        **options: Any,
    ) -> Float[np.ndarray, "n"]:
        """log p(theta | x_o), -inf outside the prior's support. EDM and score matching leave a little noise at t = 1, which `sample` takes
        out: their density is that of theta with this noise (0.001 to 0.002 standardised units by default).

        By Runge-Kutta of order three on the method's grid (`steps=24` for flow matching, 73 evaluations; 48 for EDM and VE, 56 for VP; of another rule that is named so many too, or its own
        default where that is more) or in the equal steps of
        a `step_size`, with the divergence, in one pass with the velocity, where a step starts and at the end; or by any solver that `options` name
        ("euler", "midpoint", "heun", "rk3", "rk4", and the adaptive ones). `divergence="hutchinson"`: an unbiased estimate of the divergence with so many `probes` drawn from `key`, for many
        parameters. `check=0.1`: of a tenth of the points the density is computed again with every step halved; what that changes, in nat, is in
        `last_check`.

        Raises ValueError for wrong shapes, non-finite values, or a solver that has no density.
        """
        chosen = self._density_options(options, ("theta", "x_o", "divergence", "probes", "key"))
        x = self._one(x_o)
        shape = np.shape(theta)
        n = shape[0] if len(shape) == 3 else 1
        points = as_array(theta, (n, self.dim_theta, self.ch_theta), "theta", many=(0,))
        return self._log_prob(points[None], x, divergence, probes, key, chosen)[0]

    def log_prob_batched(
        self,
        theta: Float[Array, "n batch dim_theta ch_theta"],
        xs: Float[Array, "batch dim_x ch_x"],
        *,
        divergence: str = "exact",
        probes: int = 8,
        key: Any = 0,
        **options: Any,
    ) -> Float[np.ndarray, "n batch"]:
        """log p(theta[:, i] | xs[i]) for many observations, shaped as `sample_batched` gives its draws. See `log_prob`."""
        chosen = self._density_options(options, ("theta", "xs", "divergence", "probes", "key"))
        data = self._many(xs)
        shape = np.shape(theta)
        n = shape[0] if len(shape) == 4 else 1
        points = as_array(theta, (n, len(data), self.dim_theta, self.ch_theta), "theta", many=(0,))
        return self._log_prob(np.moveaxis(points, 1, 0), data, divergence, probes, key, chosen).T

    def _log_prob(
        self,
        theta: np.ndarray,
        xs: np.ndarray,
        divergence: str,
        probes: int,
        key: Any,
        chosen: SampleOptions,
    ) -> np.ndarray:
        solver = self._density_solver(chosen)
        asked, tile = _divergence(divergence, probes, solver), self._density_tile(chosen)
        ids, show = np.arange(len(xs)), chosen.show_progress

        def density(theta: np.ndarray, solver: Solver) -> np.ndarray:
            out = np.empty(theta.shape[:2], np.float32)
            if out.size:
                fill(self, (out,), tiles.DENSITY, keys.as_key(key), xs, ids, solver, tile, show, asked, theta)
            return out

        found = density(theta, solver)
        if chosen.check:
            few = math.ceil(chosen.check * theta.shape[1])
            self.last_check = compare_densities(found[:, :few], density(theta[:, :few], solver.refined()))
        return found

    def _density_options(self, options: dict[str, Any], words: Sequence[str]) -> SampleOptions:
        chosen = SampleOptions.parse(options, words, self.no_given)
        if chosen.on_the_way:
            raise ValueError(
                "return_trajectory and time_grid go with sample; leave them out where a log_prob is asked for."
            )
        return chosen

    def _density_solver(self, chosen: SampleOptions) -> Solver:
        if self.is_student:
            raise ValueError("this run is a student, whose steps are no flow, so it has no log_prob; use its teacher.")
        rule, tolerances = chosen.solver, chosen.rtol is not None or chosen.atol is not None
        if rule is None and not tolerances:
            rule = DENSITY_RULE
        if isinstance(rule, str) and rule.lower() in DENSITY_RULES and not tolerances:
            steps = chosen.steps
            if steps is None and chosen.step_size is None:  # a density needs more than draws do
                steps = max(RULES[rule.lower()].steps, self.method.density_steps)
            chosen = dataclasses.replace(chosen, solver=rule, steps=steps)
        solver = chosen.make_solver(self.method)
        if not solver.gives_density:
            able = [*DENSITY_RULES, *SOLVERS]
            raise ValueError(f"solver {solver.rule!r} gives no log_prob; {', '.join(able)} do.")  # type: ignore[union-attr]
        return solver

    def _density_tile(self, chosen: SampleOptions) -> Tile:
        """Fewer rows than for draws, unless a tile was asked for: every row has its tangents beside it."""
        tile = chosen.make_tile(self.tile)
        if chosen.tile is not None:
            return tile
        each = 1 + min(self.dim_theta * self.ch_theta, BASIS_AT_ONCE)
        return tile.within(min(self._most_rows, tile.rows) / each)

    def sample_and_log_prob(
        self,
        key: Any = None,
        x_o: Any = None,
        nsamples: int | None = None,
        *,
        rng: Any = None,
        num_samples: int | None = None,
        observation_id: int = 0,
        divergence: str = "exact",
        probes: int = 8,
        **options: Any,
    ) -> tuple[Float[np.ndarray, "nsamples dim_theta ch_theta"], Float[np.ndarray, "nsamples"]]:
        """Draws, 10,000 by default, and their log p(theta | x_o), in one solve; the solver is that of `log_prob`, so the draws differ from those of
        `sample` within its certificate, and by the noise that EDM and score matching leave at t = 1, which is kept here: it is in the
        density too (see `log_prob`)."""
        key = keys.as_key(one_of(rng=rng, key=key))
        x = self._one(x_o)
        chosen = self._density_options(options, (*ONE, "divergence", "probes"))
        n = draws_asked(nsamples, num_samples, 10_000)
        if chosen.check:
            raise ValueError("check goes with sample and with log_prob; leave it out where both are asked for at once.")
        draws, density = np.empty((1, n, self.dim_theta, self.ch_theta), np.float32), np.empty((1, n), np.float32)
        ids = as_ids([observation_id], len(x))
        solver = self._density_solver(chosen)
        asked, tile = _divergence(divergence, probes, solver), self._density_tile(chosen)
        show = chosen.show_progress
        fill(self, (draws, density), tiles.DRAWS_AND_DENSITY, key, x, ids, solver, tile, show, asked)
        return draws[0], density[0]

    def map(
        self,
        x_o: Any = None,
        *,
        rng: Any = None,
        key: Any = None,
        nsamples: int | None = None,
        num_samples: int | None = None,
        starts: int = 8,
        climb: int = 100,
        **options: Any,
    ) -> tuple[Float[np.ndarray, "dim_theta ch_theta"], float]:
        """(theta, log p) at the maximum a posteriori: the likeliest `starts` of `nsamples` draws (1,000), climbed by Adam for `climb` steps.

        It maximises p(theta | x_o), as `log_prob` gives it, in the prior's own parameters; on a bounded prior the maximum may lie at the edge of what the
        bijection reaches. Warns where it lies so far above all draws, in standardised parameters, that it may be a spike of the network. `rng` or `key`: of the draws, seed 0 by default. `options`: the solver, a fixed grid, and others of
        `SampleOptions`.
        """
        starts, climb = as_count("starts", starts), as_count("climb", climb)
        key = 0 if rng is None and key is None else one_of(rng=rng, key=key)
        x, n = self._one(x_o), draws_asked(nsamples, num_samples, 1_000)
        chosen = self._density_options(options, ("rng", "key", "x_o", "nsamples", "num_samples", "starts", "climb"))
        solver = self._density_solver(chosen)
        if not isinstance(solver, FixedGrid):
            raise ValueError("map climbs on a fixed grid; leave out rtol, atol and an adaptive solver.")
        draws, density = self.sample_and_log_prob(key, x, n, **options)
        best = np.argsort(-density)[:starts]
        program = tiles.climb_program(self.graphdef, self.method, solver, climb)
        theta, height = jax.device_get(program(self.weights, jax.numpy.asarray(draws[best]), jax.numpy.asarray(x)))
        top = int(np.argmax(np.where(np.isfinite(height), height, -np.inf)))
        if height[top] < density[best[0]]:
            return draws[best[0]], float(density[best[0]])
        # in the parameters that the network knows, where no bound is near, and a long tail is none
        grown = tiles.volume_program(self.graphdef)(
            self.weights, jax.numpy.concatenate([draws, theta[top][None]]), jax.numpy.asarray(x)
        )
        heights = np.append(density, height[top]) - np.asarray(grown)
        above, usual = float(heights[-1] - heights[:-1].max()), most_above(n, self.dim_theta * self.ch_theta)
        if above > usual:
            warn(
                f"the maximum lies {above:,.1f} nat above the likeliest of {n:,} draws, in standardised parameters (more than {usual:,.1f} is unusual): so "
                f"little of the posterior is near it that it may be a spike that the network made up. Train longer, or give more nsamples."
            )
        return theta[top], float(height[top])


def most_above(n: int, size: int) -> float:
    """How far, in nat, a maximum may lie above the likeliest of n draws of so many parameters before that is odd: a nat more than in 999 of 1,000
    cases where each parameter is exponentially distributed; a normal one's is half as far from its draws."""
    from scipy.stats import gamma

    return 1.0 + float(gamma.ppf(-math.expm1(math.log(1e-3) / n), size))


def _divergence(name: str, probes: int, solver: Solver) -> Divergence:
    if name == "exact":
        return EXACT
    if name == "hutchinson" and not isinstance(solver, FixedGrid):
        raise ValueError(
            f'divergence="hutchinson" needs a fixed grid ({", ".join(DENSITY_RULES)}); got {solver.name!r}.'
        )
    if name != "hutchinson":
        raise ValueError(f'divergence must be "exact" or "hutchinson"; got {name!r}.')
    return Divergence(as_count('divergence="hutchinson" takes probes >= 1, which', probes))
