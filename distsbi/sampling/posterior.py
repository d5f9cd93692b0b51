"""A trained posterior p(theta | x) and the ways to draw from it.

Every way to draw is one call of `Posterior.draw`: it streams tiles (stream.py) over the mesh into a host array.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from distsbi import keys, mesh as meshes
from distsbi.methods import Method
from distsbi.networks.base import Network, takes_missing
from distsbi.networks.observation import Layout
from distsbi.sampling import tiles
from distsbi.sampling.flow import BASIS_AT_ONCE, EXACT, Divergence, make_schedule
from distsbi.sampling.options import SampleOptions
from distsbi.sampling.stream import stream
from distsbi.sampling.tiles import Tile, Weights
from distsbi.solvers import SOLVERS, FixedGrid, Solver, make_solver
from distsbi.solvers.fixed import RULES

DENSITY_STEPS = 16  # of Runge-Kutta of order four
FAR = 2.0  # times the training set's most extreme value: what is warned of
CHECK_WARNS = 0.1  # posterior sd, 95 % quantile: what `check=` warns of


class Posterior:
    """p(theta | x) learned from simulations.

    Draws depend on (seed, observation id, draw index) alone: not on the number of devices, the order of observations or what
    else is drawn. More draws of an observation extend the earlier ones.

    Args:
        network: a trained network.
        method: what it predicts.
        standardizer: fitted scales and bijection.
        names: parameter names.
        solver: the solver used where none is asked for; None: midpoint with 16 steps on the method's grid.
        tile: the default tile; None: that of the device kind.
        mesh: where to draw; see `distsbi.mesh.make_mesh`.
        facts: JSON-able provenance (versions, seed, data fingerprint, certificate, ...).
    """

    def __init__(
        self,
        network: Network,
        method: Method,
        standardizer: Any,
        *,
        names: tuple[str, ...] | None = None,
        solver: Solver | None = None,
        tile: Tile | None = None,
        mesh: meshes.MeshLike = None,
        facts: dict[str, Any] | None = None,
    ):
        self.mesh = meshes.make_mesh(mesh)
        self.method = method
        self.dim_theta, self.ch_theta = network.dim_theta, network.ch_theta
        self.dim_x, self.ch_x = network.dim_x, network.ch_x
        self.layout: Layout = getattr(network, "layout", None) or Layout(("",), ((self.dim_x, self.ch_x),))
        self.parameter_names = names or tuple(f"theta_{i}" for i in range(self.dim_theta))
        self.default_solver = solver if solver is not None else make_solver(method)
        self.facts = dict(facts or {})
        self.last_check: dict[str, float] | None = None  # of the last draw with `check=`
        self.missing = takes_missing(network)
        self.graphdef, params = nnx.split(network)
        self.weights = jax.device_put(Weights(params, standardizer), meshes.replicated(self.mesh))
        self.tile = tile or tiles.kind_of(self.mesh).tile.within(self._most_rows)

    def __repr__(self) -> str:
        x, solver = self.layout.describe(), self.default_solver
        how = f"{solver.evaluations} evaluations a draw" if solver.evaluations else "adaptive"
        return f"<{type(self).__name__} of {', '.join(self.parameter_names)} given x {x}: {type(self.method).__name__}, {how}>"

    @property
    def network(self) -> Network:
        """The network with its weights."""
        return nnx.merge(self.graphdef, self.weights.params)

    @functools.cached_property
    def _most_rows(self) -> float:
        """Rows whose largest arrays fit into this kind of device's share for them."""
        each = tiles.LIVE * tiles.bytes_per_row(self.network, self.weights.standardizer)
        return tiles.kind_of(self.mesh).step_bytes / each if each > 0 else math.inf

    @functools.cached_property
    def most_slots(self) -> int:
        """Slots whose encoded observations fit into this kind of device's share for them."""
        each = tiles.bytes_per_context(self.network, self.weights.standardizer)
        return max(1, tiles.kind_of(self.mesh).context_bytes // max(each, 1))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that defines p(theta | x): network, method, standardisation, weights. Hexadecimal."""
        from distsbi.sampling.run import fingerprint, model_spec, weights_digest

        return fingerprint(model_spec(self), weights_digest(self.weights.params))

    @property
    def spec(self) -> dict[str, Any]:
        """What `save` writes to spec.json."""
        from distsbi.sampling.run import make_spec

        return make_spec(self)

    # Checks

    def check_x(self, x: Any) -> Float[np.ndarray, "dim_x ch_x"]:
        """One observation without its batch axis, as `draw` takes it. Raises ValueError unless it is finite and has the right shape."""
        if not self.layout.is_plain:
            one = (
                {name: np.asarray(part)[None] for name, part in x.items()}
                if isinstance(x, Mapping)
                else np.asarray(x)[None]
            )
            x = self.layout.pack(one)[0]
        return self._check_array(x, (self.dim_x, self.ch_x), "x")

    def _one(self, x_o: Any) -> Float[np.ndarray, "1 dim_x ch_x"]:
        """An observation with its batch axis, packed and checked."""
        if self.layout.is_plain:
            return self._warn_far(self._check_array(x_o, (1, self.dim_x, self.ch_x), "x_o"))
        packed = self.layout.pack(x_o, "x_o")
        if len(packed) != 1:
            raise ValueError(
                f"x_o must be one observation, {self.layout.describe()} with n = 1; got {len(packed)}. See sample_batched."
            )
        return self._warn_far(self._check_array(packed, packed.shape, "x_o"))

    def _warn_far(self, xs: np.ndarray) -> np.ndarray:
        """xs. Warns of observations far outside the data that the posterior was trained on, where it can say nothing."""
        extent = self.facts.get("x_extent")
        if extent:
            z = np.abs(np.asarray(self.weights.standardizer.forward_x(xs))).reshape(len(xs), -1)
            z = np.where(np.isnan(z), 0.0, z) / np.maximum(np.asarray(extent), 1.0)
            row, entry = (int(i) for i in np.unravel_index(z.argmax(), z.shape)) if z.size else (0, 0)
            if z.size and z[row, entry] > FAR:
                warnings.warn(
                    f"x[{row}] lies far outside the simulations: its entry {entry}, {xs[row].ravel()[entry]:g}, is {z[row, entry]:.3g} times as far from "
                    f"their mean as any of theirs. Such draws mean nothing: check its units, or simulate from a wider prior.",
                    stacklevel=4,
                )
        return xs

    def _check_array(self, x: Any, shape: tuple[int, ...], name: str, *, many: tuple[int, ...] = ()) -> np.ndarray:
        """`many`: axes of `shape` whose length is free."""
        says = (
            f"({', '.join('n' if i in many else str(n) for i, n in enumerate(shape))}{',' if len(shape) == 1 else ''})"
        )
        try:
            array = np.asarray(x)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be an array of numbers of shape {says}; got {type(x).__name__}.") from error
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise ValueError(
                f"{name} must be an array of real numbers of shape {shape}; got {type(x).__name__} of dtype {array.dtype}."
            )
        with np.errstate(over="ignore"):  # beyond float32 becomes inf, which is refused below
            array = array.astype(np.float32, copy=False)
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {says} for this posterior; got {array.shape}.{_reshape_hint(array.shape, shape, name)}"
            )
        bad = ~(np.isfinite(array) | (np.isnan(array) if self.missing and name != "theta" else False))
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{name} has {int(bad.sum())} values that are NaN or infinite, the first at {where}; remove or impute them"
                f"{'' if self.missing or name == 'theta' else ', or train with missing=True'}."
            )
        return array

    # Draws

    def draw(
        self,
        key: Any,
        xs: Any,
        nsamples: int,
        *,
        observation_ids: Any = None,
        **options: Any,
    ) -> Float[np.ndarray, "batch nsamples dim_theta ch_theta"]:
        """`nsamples` draws for each of many observations.

        `observation_ids`: 64-bit unsigned integers that name the observations for the random numbers; default 0, 1, 2, ...
        `options`: see `SampleOptions`. With `return_trajectory` the draws have a leading axis of times, from noise to data.

        Raises ValueError for a wrong shape, NaN or inf in xs, nsamples <= 0 or an unknown keyword; `SolveError` if a solve
        did not end in finite numbers, when all others are done.
        """
        chosen = SampleOptions.parse(options)
        xs = self._check_batch(xs)
        return self._draw(keys.as_key(key), xs, self._ids(xs, observation_ids), _check_nsamples(nsamples), chosen)

    def _solver(self, chosen: SampleOptions) -> Solver:
        solver = chosen.make_solver(self.method, self.default_solver)
        if chosen.check and solver.stochastic:
            raise ValueError(
                f"check compares a solve with one of half the steps, whose noise would be another: leave it out with {chosen.solver!r}."
            )
        if self.is_student and (solver != self.default_solver or chosen.check):
            raise ValueError(
                f"this run is a student, made to draw in {len(self.default_solver.times) - 1} steps of its own; leave out solver, steps and "  # type: ignore[union-attr]
                f"check, or use its teacher."
            )
        return solver

    @property
    def is_student(self) -> bool:
        """Whether this posterior was made by `distill`: it has its own steps and no log_prob."""
        return "student" in self.facts

    def _check_batch(self, xs: Any) -> np.ndarray:
        if not self.layout.is_plain:
            xs = self.layout.pack(xs, "xs")
        shape = np.shape(xs)
        return self._check_array(xs, (shape[0] if len(shape) == 3 else 1, self.dim_x, self.ch_x), "xs", many=(0,))

    def _ids(self, xs: np.ndarray, observation_ids: Any) -> np.ndarray:
        ids = np.arange(len(xs)) if observation_ids is None else observation_ids
        ids = ids if hasattr(ids, "dtype") else np.asarray(ids, object)  # numpy would make floats of ids beyond int64
        if ids.shape != (len(xs),):
            raise ValueError(f"observation_ids must have shape ({len(xs)},), one per observation; got {ids.shape}.")
        return ids

    def _draw(self, key: Array, xs: np.ndarray, ids: np.ndarray, nsamples: int, chosen: SampleOptions) -> np.ndarray:
        solver = self._solver(chosen)
        shape = (self.dim_theta, self.ch_theta)
        if chosen.return_trajectory:
            if not isinstance(solver, FixedGrid):
                raise ValueError("return_trajectory needs a fixed grid: give steps, step_size or time_grid.")
            out = np.empty((len(xs), nsamples, len(solver.times), *shape), np.float32)
            self._fill((out,), tiles.TRAJECTORY, key, xs, ids, solver, chosen)
            return np.moveaxis(out, 2, 0)
        out = np.empty((len(xs), nsamples, *shape), np.float32)
        self._fill((out,), tiles.DRAWS, key, xs, ids, solver, chosen)
        if chosen.check:
            few = max(1, math.ceil(chosen.check * nsamples))
            again = np.empty((len(xs), few, *shape), np.float32)
            self._fill((again,), tiles.DRAWS, key, xs, ids, solver.refined(), chosen)
            self.last_check = _compare(out[:, :few], again, out.std(1, keepdims=True))
        return out

    def _fill(
        self,
        out: tuple[np.ndarray, ...],
        make: str,
        key: Array,
        xs: np.ndarray,
        ids: np.ndarray,
        solver: Solver,
        chosen: SampleOptions,
        divergence: Divergence = EXACT,
        theta: np.ndarray | None = None,
    ) -> None:
        """Streams tiles into arrays [batch, nsamples, ...]; `theta` [batch, nsamples, ...] is what a density is asked of."""
        nsamples = out[0].shape[1]
        tile = chosen.make_tile(self.tile)
        if chosen.tile is None and make in (tiles.DENSITY, tiles.DRAWS_AND_DENSITY):  # tangents beside the state
            tile = tile.within(self._most_rows / (1 + min(self.dim_theta * self.ch_theta, BASIS_AT_ONCE)))
        tile = tile.for_draws(nsamples, self.most_slots)
        encode = tiles.encode_program(self.graphdef, self.mesh)
        program = tiles.tile_program(
            self.graphdef, self.method, solver, tile, (self.dim_theta, self.ch_theta), self.mesh, make, divergence
        )

        schedule = make_schedule(solver, self.method, make == tiles.DENSITY)

        def payload(observation: np.ndarray, start: np.ndarray) -> np.ndarray:
            assert theta is not None
            rows = np.minimum(start[:, None] + np.arange(tile.draws), nsamples - 1)
            return theta[observation[:, None], rows]

        unit = "points" if make == tiles.DENSITY else "draws"
        failed: dict[int, int] = {}
        with _progress(len(xs) * nsamples, unit, chosen.show_progress) as bar:
            for observation, start, made in stream(
                encode,
                tiles.join_program(self.mesh),
                program,
                self.weights,
                schedule,
                key,
                xs,
                ids,
                nsamples,
                tile,
                self.mesh,
                payload if theta is not None else None,
            ):
                made = made if isinstance(made, tuple) else (made,)
                for slot, (o, s) in enumerate(zip(observation.tolist(), start.tolist(), strict=True)):
                    wanted = min(tile.draws, nsamples - s)
                    if wanted <= 0:
                        continue
                    for array, part in zip(out, made, strict=True):
                        array[o, s : s + wanted] = part[slot][:wanted]
                        bad = _unsolved(part[slot][:wanted], make)
                        if bad:
                            failed[o] = failed.get(o, 0) + bad
                    bar.update(wanted)
        if failed:
            raise SolveError(failed, ids, unit, out[0])

    def sample(
        self,
        key: Any = None,
        x_o: Any = None,
        nsamples: int | None = None,
        *,
        rng: Any = None,
        observation_id: int = 0,
        num_samples: int | None = None,
        **options: Any,
    ) -> Float[np.ndarray, "nsamples dim_theta ch_theta"]:
        """Draws for one observation `x_o` of shape (1, dim_x, ch_x); 10,000 by default. `rng` and `key` mean the same.

        The same draws as row `observation_id` of a batch or a catalog gets. Raises as `draw` does.

        Example:
            `posterior.sample(rng=jax.random.key(0), x_o=x_o, nsamples=10_000)`
        """
        SampleOptions.parse(options)
        key = one_of("rng", rng, "key", key)
        if x_o is None:
            raise ValueError(f"x_o is missing: an observation, {self.layout.describe()} with n = 1.")
        count = (
            10_000
            if nsamples is None and num_samples is None
            else one_of("nsamples", nsamples, "num_samples", num_samples)
        )
        return self.get_sampler(x_o, observation_id=observation_id, **options)(key, nsamples=count)

    def get_sampler(self, x_o: Any, *, observation_id: int = 0, **options: Any) -> Callable[..., np.ndarray]:
        """A function `sampler(key, nsamples=10_000)` for one observation, compiled at its first call and reused after."""
        chosen = SampleOptions.parse(options)
        self._solver(chosen)  # its errors come here, not at the first call
        x = self._one(x_o)
        ids = self._ids(x, [observation_id])
        keys.split_id(ids)

        def sampler(key: Any = None, nsamples: int = 10_000, *, rng: Any = None) -> np.ndarray:
            """Draws, (nsamples, dim_theta, ch_theta)."""
            key = keys.as_key(one_of("rng", rng, "key", key))
            drawn = self._draw(key, x, ids, _check_nsamples(nsamples), chosen)
            return drawn[:, 0] if chosen.return_trajectory else drawn[0]

        return sampler

    def sample_batched(
        self,
        key: Any = None,
        xs: Any = None,
        nsamples: int = 10_000,
        *,
        rng: Any = None,
        observation_ids: Any = None,
        **options: Any,
    ) -> Float[np.ndarray, "nsamples batch dim_theta ch_theta"]:
        """Draws for many observations `xs` of shape (batch, dim_x, ch_x) through the same tiles. Raises as `draw` does."""
        key = one_of("rng", rng, "key", key)
        xs = self._warn_far(self._check_batch(xs))
        return np.moveaxis(self.draw(key, xs, nsamples, observation_ids=observation_ids, **options), -4, -3)

    # Density

    def log_prob(
        self,
        theta: Float[Array, "n dim_theta ch_theta"],
        x_o: Float[Array, "1 dim_x ch_x"],
        *,
        divergence: str = "exact",
        probes: int = 8,
        key: Any = 0,
        **options: Any,
    ) -> Float[np.ndarray, "n"]:
        """log p(theta | x_o), -inf outside the prior's support.

        Velocity and divergence in one pass, by Runge-Kutta of order four on the method's grid (`steps=16`), or any solver that
        `options` name ("euler", "midpoint", "heun", "rk4", and the adaptive ones). `divergence="hutchinson"`: an unbiased estimate
        of the divergence with so many `probes` drawn from `key`, for many parameters.

        Raises ValueError for wrong shapes, non-finite values, or a solver that has no density.
        """
        x = self._one(x_o)
        shape = np.shape(theta)
        n = shape[0] if len(shape) == 3 else 1
        points = self._check_array(theta, (n, self.dim_theta, self.ch_theta), "theta", many=(0,))
        return self._log_prob(points[None], x, divergence, probes, key, options)[0]

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
        data = self._check_batch(xs)
        shape = np.shape(theta)
        n = shape[0] if len(shape) == 4 else 1
        points = self._check_array(theta, (n, len(data), self.dim_theta, self.ch_theta), "theta", many=(0,))
        return self._log_prob(np.moveaxis(points, 1, 0), data, divergence, probes, key, options).T

    def _log_prob(
        self, theta: np.ndarray, xs: np.ndarray, divergence: str, probes: int, key: Any, options: dict[str, Any]
    ) -> np.ndarray:
        chosen = SampleOptions.parse(options)
        out = np.empty(theta.shape[:2], np.float32)
        if out.size:
            solver = self._density_solver(chosen)
            asked = _divergence(divergence, probes, solver)
            self._fill((out,), tiles.DENSITY, keys.as_key(key), xs, np.arange(len(xs)), solver, chosen, asked, theta)
        return out

    def _density_solver(self, chosen: SampleOptions) -> Solver:
        if self.is_student:
            raise ValueError("this run is a student, whose steps are no flow, so it has no log_prob; use its teacher.")
        default = FixedGrid("rk4", self.method.grid(DENSITY_STEPS))
        if chosen.solver is None and chosen.steps is not None:
            chosen = dataclasses.replace(chosen, solver="rk4")
        solver = chosen.make_solver(self.method, default)
        if not solver.gives_density:
            able = [name for name, rule in RULES.items() if rule.of_velocity] + list(SOLVERS)
            raise ValueError(f"solver {solver.rule!r} gives no log_prob; {', '.join(able)} do.")  # type: ignore[union-attr]
        return solver

    def sample_and_log_prob(
        self,
        key: Any = None,
        x_o: Any = None,
        nsamples: int = 10_000,
        *,
        rng: Any = None,
        observation_id: int = 0,
        divergence: str = "exact",
        probes: int = 8,
        **options: Any,
    ) -> tuple[Float[np.ndarray, "nsamples dim_theta ch_theta"], Float[np.ndarray, "nsamples"]]:
        """Draws and their log p(theta | x_o), in one solve; the solver is that of `log_prob`, so the draws differ from those of
        `sample` within its certificate."""
        key = keys.as_key(one_of("rng", rng, "key", key))
        x = self._one(x_o)
        chosen, n = SampleOptions.parse(options), _check_nsamples(nsamples)
        draws, density = np.empty((1, n, self.dim_theta, self.ch_theta), np.float32), np.empty((1, n), np.float32)
        ids = self._ids(x, [observation_id])
        solver = self._density_solver(chosen)
        asked = _divergence(divergence, probes, solver)
        self._fill((draws, density), tiles.DRAWS_AND_DENSITY, key, x, ids, solver, chosen, asked)
        return draws[0], density[0]

    def map(
        self, x_o: Any, *, key: Any = 0, nsamples: int = 1_000, starts: int = 8, steps: int = 100
    ) -> tuple[Float[np.ndarray, "dim_theta ch_theta"], float]:
        """(theta, log p) at the maximum a posteriori: the likeliest `starts` of `nsamples` draws, climbed by Adam for `steps` steps.

        It maximises p(theta | x_o) in the prior's own parameters; on a bounded prior the maximum may lie at the edge of what the
        bijection reaches.
        """
        for name, value in {"starts": starts, "steps": steps}.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}.")
        x = self._one(x_o)
        draws, density = self.sample_and_log_prob(key, x, nsamples)
        best = np.argsort(-density)[:starts]
        climb = tiles.climb_program(self.graphdef, self.method, self._density_solver(SampleOptions()), steps)
        theta, height = jax.device_get(climb(self.weights, jax.numpy.asarray(draws[best]), jax.numpy.asarray(x)))
        top = int(np.argmax(np.where(np.isfinite(height), height, -np.inf)))
        if height[top] < density[best[0]]:
            return draws[best[0]], float(density[best[0]])
        return theta[top], float(height[top])

    def save(self, path: str) -> None:
        """Writes the run directory."""
        from distsbi.sampling.run import save

        save(path, self)


def one_of(first: str, a: Any, second: str, b: Any) -> Any:
    """The one of two synonymous arguments that was given. Raises ValueError for both or none."""
    if (a is None) == (b is None):
        raise ValueError(f"give {first} or {second}, {'not both' if a is not None else 'one of them is needed'}.")
    return a if a is not None else b


class SolveError(RuntimeError):
    """The solver did not end in finite numbers for some observations. All others are done.

    `made`: what was asked for, [batch, nsamples, ...], not finite where it failed; `failed`: rows of the batch that did.
    """

    def __init__(self, failed: dict[int, int], ids: np.ndarray, unit: str, made: np.ndarray):
        self.failed, self.made = sorted(failed), made
        row = self.failed[0]
        more = f", and of {len(failed) - 1} more of {len(made)} observations" if len(failed) > 1 else ""
        done = " What was made is in this error's `made`." if len(made) > len(failed) else ""
        super().__init__(
            f"{failed[row]} {unit} of observation {row} (id {ids[row]}){more} are not finite: the solver did not converge there. "
            f"The observation may lie far outside the training data; or loosen rtol and atol, or use more steps.{done}"
        )


def _unsolved(part: np.ndarray, make: str) -> int:
    """How many are NaN, or infinite draws (a log p may be -inf)."""
    bad = np.isnan(part) if make in (tiles.DENSITY, tiles.DRAWS_AND_DENSITY) else ~np.isfinite(part)
    return int(bad.reshape(len(bad), -1).any(axis=1).sum()) if bad.any() else 0


def _divergence(name: str, probes: int, solver: Solver) -> Divergence:
    if name == "exact":
        return EXACT
    if name == "hutchinson" and not isinstance(solver, FixedGrid):
        able = [rule_name for rule_name, rule in RULES.items() if rule.of_velocity]
        raise ValueError(f'divergence="hutchinson" needs a fixed grid ({", ".join(able)}); got {solver.name!r}.')
    if name != "hutchinson" or isinstance(probes, bool) or int(probes) != probes or probes < 1:
        raise ValueError(f'divergence must be "exact" or "hutchinson" with probes >= 1; got {name!r} with {probes!r}.')
    return Divergence(int(probes))


def _compare(draws: np.ndarray, refined: np.ndarray, sd: np.ndarray) -> dict[str, float]:
    """What halving the steps changes, in standard deviations of each posterior: largest over parameters, median and 95 % quantile over
    draws."""
    error = (np.abs(draws - refined) / np.maximum(sd, np.finfo(np.float32).tiny)).max(axis=(-2, -1))
    q95 = float(np.quantile(error, 0.95))
    if q95 > CHECK_WARNS:
        warnings.warn(
            f"halving the solver's steps moves 5 % of the draws by more than {q95:.2g} posterior sd; use more steps.",
            stacklevel=4,
        )
    return {"draws": int(error.size), "median": float(np.median(error)), "q95": q95}


def _check_nsamples(nsamples: Any) -> int:
    if isinstance(nsamples, bool) or not isinstance(nsamples, (int, np.integer)) or not 0 < nsamples <= keys.MAX_DRAWS:
        raise ValueError(f"nsamples must be a positive integer (at most 2**32); got {nsamples!r}.")
    return int(nsamples)


def _reshape_hint(given: tuple[int, ...], wanted: tuple[int, ...], name: str) -> str:
    if len(given) == len(wanted) == 3 and given[1:] == wanted[1:] and name == "x_o":
        return " For many observations see sample_batched and log_prob_batched."
    for index in ("[None, :, None]", "[None]", "[..., None]", "[:, None]", "[:, :, None]", "[None, None]"):
        probe = np.empty(given, np.bool_)
        try:
            shape = _indexed_shape(probe, index)
        except IndexError:
            continue
        if shape == wanted or (len(wanted) == 3 and len(shape) == 3 and shape[1:] == wanted[1:]):
            return f" Add the axes with {name}{index}."
    return ""


def _indexed_shape(array: np.ndarray, index: str) -> tuple[int, ...]:
    """Shape of `array[index]` for an index written as in Python source, of None, : and ... only."""
    parts = {"None": None, ":": slice(None), "...": Ellipsis}
    return array[tuple(parts[p.strip()] for p in index[1:-1].split(","))].shape


def _progress(total: int, unit: str, show: bool | None) -> tqdm:
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        disable=None if show is None else not show,
        delay=3 if show is None else 0,
    )
