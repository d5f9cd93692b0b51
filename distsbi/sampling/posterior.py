"""A trained posterior p(theta | x) and the ways to draw from it.

Every way to draw streams tiles over the mesh into a host array (fill.py).
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distsbi import keys, mesh as meshes
from distsbi.data.prior import default_names
from distsbi.data.standardise import Standardizer
from distsbi.hints import warn
from distsbi.methods import Method
from distsbi.networks.base import Network, takes_missing
from distsbi.networks.observation import Layout
from distsbi.sampling import tiles
from distsbi.sampling.checks import (
    as_array,
    as_ids,
    check_inside,
    check_nsamples,
    compare,
    draws_asked,
    far_rows,
    far_says,
    one_of,
    sparse_rows,
    warn_far,
)
from distsbi.sampling.dataset import Dataset, write
from distsbi.sampling.density import Densities
from distsbi.sampling.fill import fill
from distsbi.sampling.options import ONE, SampleOptions
from distsbi.sampling.tiles import Tile, Weights
from distsbi.solvers import FixedGrid, Solver, check_complete, make_solver


class Posterior(Densities):
    """p(theta | x) learned from simulations.

    Draws depend on (seed, observation id, draw index) alone: not on the number of devices, the order of observations or what
    else is drawn; see `SampleOptions` for what is excepted. More draws of an observation extend the earlier ones.

    Args:
        network: a trained network.
        method: what it predicts.
        standardizer: fitted scales and bijection.
        names: parameter names, dim_theta of them.
        solver: the solver used where none is asked for; None: midpoint with 16 steps on the method's grid.
        tile: the default tile, or a dict of one for each kind of device ("cpu", "gpu", "tpu"); where none is given for the kind of `mesh`:
            that kind's own, as far as it fits.
        mesh: where to draw; see `distsbi.mesh.make_mesh`.
        facts: JSON-able provenance (versions, seed, data fingerprint, certificate, ...).
        student: whether the network predicts average velocities over the steps of `solver` (see `distsbi.distill`), which it then is bound to.
        unconditional: whether this is a density without conditions, whose x is nothing.

    Raises ValueError for another number of names, or one that comes twice.
    """

    def __init__(
        self,
        network: Network,
        method: Method,
        standardizer: Any,
        *,
        names: tuple[str, ...] | None = None,
        solver: Solver | None = None,
        tile: Tile | Mapping[str, Tile] | None = None,
        mesh: meshes.MeshLike = None,
        facts: dict[str, Any] | None = None,
        student: bool = False,
        unconditional: bool = False,
    ):
        self.is_student, self.is_unconditional = student, unconditional
        self.mesh = meshes.make_mesh(mesh)
        self.method = method
        self.dim_theta, self.ch_theta = network.dim_theta, network.ch_theta
        self.dim_x, self.ch_x = network.dim_x, network.ch_x
        self.layout: Layout = getattr(network, "layout", None) or Layout(("",), ((self.dim_x, self.ch_x),))
        self.parameter_names = self._checked_names(names or default_names(self.dim_theta))
        self.default_solver = check_complete(solver) if solver is not None else make_solver(method)
        self.facts = dict(facts or {})
        self.last_check: dict[str, float] | None = None  # of the last draw or log_prob with `check=`
        # None: not even a network that is trained anew could have it (a joint one is told what is there by `given`)
        knows = hasattr(getattr(network, "params", None), "missing")
        self.missing = takes_missing(network) if knows else None
        self.graphdef, params = nnx.split(network)
        self.weights = jax.device_put(Weights(params, standardizer), meshes.replicated(self.mesh))
        kind = tiles.kind_name(self.mesh)
        self._tiles = dict(tile) if isinstance(tile, Mapping) else {} if tile is None else {kind: tile}
        self.tile = self._tile_of(kind)

    def __repr__(self) -> str:
        x, solver = self.layout.describe(), self.default_solver
        given = "" if self.is_unconditional or not self.dim_x else f" given {', '.join(self.given_names) or f'x {x}'}"
        count = solver.evaluations and solver.evaluations + self.method.denoises
        how = f"{count} evaluations a draw" if count else "adaptive"
        return (
            f"<{type(self).__name__} of {', '.join(self.parameter_names)}{given}: {type(self.method).__name__}, {how}>"
        )

    def _checked_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) != self.dim_theta or len(set(names)) < len(names):
            raise ValueError(f"names must be {self.dim_theta} different ones, one for each parameter; got {names}.")
        return tuple(names)

    @property
    def network(self) -> Network:
        """The network with its weights."""
        return nnx.merge(self.graphdef, self.weights.params)

    @property
    def tile_by_kind(self) -> dict[str, Tile]:
        """The default tile of this kind of device, and those given for others."""
        return {**self._tiles, tiles.kind_name(self.mesh): self.tile}

    @functools.cached_property
    def scales(self) -> Standardizer:
        """The standardizer in numpy arrays, for checks on the host."""
        return jax.tree.map(np.asarray, self.weights.standardizer)

    def tile_on(self, kind: str, nsamples: int) -> Tile:
        """The tile that a kind of device (a name in `tiles.KINDS`) draws `nsamples` of many observations in, if nothing is asked for."""
        tile = self.tile_by_kind.get(kind) or self._tile_of(kind)
        each = tiles.bytes_per_context(self.network, self.weights.standardizer)
        return tile.for_draws(nsamples, tiles.KINDS[kind].most_slots(each))

    def _tile_of(self, kind: str) -> Tile:
        """The one that was given for a kind of device, or that kind's own, as far as it fits."""
        there = tiles.KINDS[kind]
        return self._tiles.get(kind) or there.tile.within(there.most_rows(self._bytes_per_row))

    @functools.cached_property
    def _bytes_per_row(self) -> float:
        return tiles.bytes_per_row(self.network, self.weights.standardizer)

    @property
    def _most_rows(self) -> float:
        """Rows whose largest arrays fit into this kind of device's share for them."""
        return tiles.kind_of(self.mesh).most_rows(self._bytes_per_row)

    @functools.cached_property
    def most_slots(self) -> int:
        """Slots whose encoded observations fit into this kind of device's share for them."""
        return tiles.kind_of(self.mesh).most_slots(tiles.bytes_per_context(self.network, self.weights.standardizer))

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

    @property
    def given_names(self) -> tuple[str, ...]:
        """The names of x, in its order, where it is what a joint model is given; else none."""
        return tuple(self.facts.get("given", ()))

    @property
    def central_x(self) -> Float[np.ndarray, "dim_x ch_x"]:
        """An x, packed, in the middle of those that the posterior was trained on; no observation, but one to compile with."""
        return np.asarray(self.scales.inverse_x(np.zeros((self.dim_x, self.ch_x), np.float32)))  # type: ignore[arg-type]

    # Checks

    def far(self, xs: Float[np.ndarray, "batch dim_x ch_x"]) -> dict[int, str]:
        """Those of xs, by row, that lie far outside the data that the posterior was trained on, and how far, or of which more is missing: of these
        its draws mean nothing."""
        found = far_rows(xs, self.scales, self.facts.get("x_extent"))
        far = {row: far_says(xs[row], *where) for row, where in found.items()}
        return {**sparse_rows(xs, self.facts.get("x_missing")), **far}

    def check_x(self, x: Any) -> Float[np.ndarray, "dim_x ch_x"]:
        """One observation without its batch axis, as `draw` takes it. Raises ValueError unless it is finite and has the right shape, and for a parameter that
        is given outside its prior."""
        if not self.layout.is_plain:
            one = (
                {name: np.asarray(part)[None] for name, part in x.items()}
                if isinstance(x, Mapping)
                else np.asarray(x)[None]
            )
            x = self.layout.pack(one)[0]
        x = as_array(x, (self.dim_x, self.ch_x), "x", missing=self.missing)
        return check_inside(x[None], self.scales, self.given_names)[0]

    def _one(self, x_o: Any) -> Float[np.ndarray, "1 dim_x ch_x"]:
        """An observation with its batch axis, packed and checked."""
        if self.is_unconditional:
            if x_o is not None and np.any(np.asarray(x_o)):
                raise ValueError("this run is a density without conditions: leave x_o out, and give nsamples by name.")
            x_o = np.zeros((1, self.dim_x, self.ch_x), np.float32)
        if x_o is None and not self.dim_x:  # a pattern of a joint model in which nothing is given
            x_o = np.zeros((1, 0, self.ch_x), np.float32)
        if x_o is None:
            raise ValueError(f"x_o is missing: an observation, {self.layout.describe()} with n = 1.")
        if self.layout.is_plain:
            x = as_array(x_o, (1, self.dim_x, self.ch_x), "x_o", missing=self.missing)
        else:
            packed = self.layout.pack(x_o, "x_o")
            if len(packed) != 1:
                raise ValueError(
                    f"x_o must be one observation, {self.layout.describe()} with n = 1; got {len(packed)}. See sample_batched."
                )
            x = as_array(packed, packed.shape, "x_o", missing=self.missing)
        check_inside(x, self.scales, self.given_names)
        return warn_far(x, self.scales, self.facts)

    def check_xs(self, xs: Any) -> Float[np.ndarray, "batch dim_x ch_x"]:
        """Many observations, packed, as `draw` takes them. Raises ValueError as `check_x`, and for parameters that are given outside their prior."""
        if not self.layout.is_plain:
            xs = self.layout.pack(xs, "xs")
        shape = np.shape(xs)
        xs = as_array(
            xs, (shape[0] if len(shape) == 3 else 1, self.dim_x, self.ch_x), "xs", many=(0,), missing=self.missing
        )
        return check_inside(xs, self.scales, self.given_names)

    def _many(self, xs: Any) -> Float[np.ndarray, "batch dim_x ch_x"]:
        """Many observations, packed and checked; warns of those far outside the simulations."""
        return warn_far(self.check_xs(xs), self.scales, self.facts)

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
        `options`: see `SampleOptions`. With `return_trajectory`, or a `time_grid`, the draws have a leading axis of times, from noise to
        data.

        Raises ValueError for a wrong shape, NaN or inf in xs, nsamples <= 0 or an unknown keyword; `SolveError` if a solve
        did not end in finite numbers, when all others are done.
        """
        chosen = SampleOptions.parse(options, ("rng", "key", "xs", "nsamples", "observation_ids"), self.no_given)
        xs = self.check_xs(xs)
        return self._draw(keys.as_key(key), xs, as_ids(observation_ids, len(xs)), check_nsamples(nsamples), chosen)

    def solver_for(self, chosen: SampleOptions) -> Solver:
        """The solver that the options ask for. Raises ValueError for one that this posterior does not draw with."""
        solver = chosen.make_solver(self.method, self.default_solver)
        if chosen.check and solver.stochastic:
            raise ValueError(
                f"check compares a solve with one of twice as many steps, whose noise would be another: leave it out with {chosen.solver!r}."
            )
        if self.is_student and (solver != self.default_solver or chosen.check):
            raise ValueError(
                f"this run is a student, made to draw in {len(self.default_solver.times) - 1} steps of its own; leave out solver, steps, "  # type: ignore[union-attr]
                f"time_grid and check, or use its teacher."
            )
        return solver

    def calibrate(self, xs: Any) -> dict[str, Any]:
        """Chooses the sampling grid by measurement on observations `xs`, as training does on validation data (see `distsbi.sampling.calibrate`): it
        becomes `default_solver`, and its certificate, which is returned, is kept in `facts`; both are saved with the run.

        Warns where no grid is under tolerance. Raises ValueError for a student, for no observations, and as `draw` does.
        """
        from distsbi.sampling.calibrate import calibrate

        if self.is_student:
            raise ValueError("this run is a student, made to draw in steps of its own; calibrate its teacher.")
        xs = self.check_xs(xs)
        if not len(xs):
            raise ValueError("xs holds no observations to calibrate on; give some that were not trained on.")
        solver, certificate = calibrate(self, xs)
        if not certificate["met"]:
            warn(
                f"no sampling grid is under tolerance: 5 % of the draws are off by more than {certificate['chosen']['q95']:.2g} of the "
                f"posterior's local scale (tolerance {certificate['tolerance']['q95']}), in which the measure itself errs by "
                f'{certificate["reference"]["q95"]:.2g}; the velocity may be rough, so train longer, or sample with solver="tsit5".',
            )
        self.default_solver, self.facts["certificate"] = solver, certificate
        return certificate

    def adopt_grids(self, other: "Posterior") -> None:
        """Takes over the sampling grid of another posterior of the same flow, and its certificate."""
        self.default_solver = other.default_solver
        self.facts |= {name: other.facts[name] for name in ("certificate", "patterns") if name in other.facts}

    def rename(self, names: tuple[str, ...]) -> None:
        """Gives the parameters other names. Raises ValueError unless there is one for each."""
        self.parameter_names = self._checked_names(names)

    def _draw(self, key: Array, xs: np.ndarray, ids: np.ndarray, nsamples: int, chosen: SampleOptions) -> np.ndarray:
        solver, tile = self.solver_for(chosen), chosen.make_tile(self.tile)
        shape = (self.dim_theta, self.ch_theta)
        if chosen.check and nsamples < 2:
            raise ValueError(
                "check compares with the sd of the draws, which one draw has not: draw more, or leave it out."
            )
        if chosen.check and not len(xs):
            raise ValueError("check has nothing to compare, for xs holds no observations: give some, or leave it out.")
        if chosen.on_the_way:
            if chosen.check:
                raise ValueError(
                    "check compares draws, not trajectories: leave out check, or return_trajectory and time_grid."
                )
            if not isinstance(solver, FixedGrid):
                raise ValueError("return_trajectory needs a fixed grid: give steps or step_size.")
            asked = chosen.time_grid
            wanted = solver.times if asked is None else FixedGrid(solver.rule, tuple(asked)).times
            at = tuple(solver.times.index(t) for t in wanted)
            out = np.empty((len(xs), nsamples, len(at), *shape), np.float32)
            fill(self, (out,), tiles.TRAJECTORY, key, xs, ids, solver, tile, chosen.show_progress, at=at)
            return np.moveaxis(out, 2, 0)
        out = np.empty((len(xs), nsamples, *shape), np.float32)
        fill(self, (out,), tiles.DRAWS, key, xs, ids, solver, tile, chosen.show_progress)
        if chosen.check:
            few = max(1, math.ceil(chosen.check * nsamples))
            again = np.empty((len(xs), few, *shape), np.float32)
            fill(self, (again,), tiles.DRAWS, key, xs, ids, solver.refined(), tile, chosen.show_progress)
            self.last_check = compare(out[:, :few], again, out.std(1, keepdims=True))
        return out

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
        """Draws for one observation `x_o` of shape (1, dim_x, ch_x); 10,000 by default. `rng` and `key`, `nsamples` and `num_samples` mean the same.

        The same draws as row `observation_id` of a batch or a catalog gets, on any number of devices; adaptive solves of EDM and score matching
        agree there within their tolerances only. Raises as `draw` does.

        Example:
            `posterior.sample(rng=jax.random.key(0), x_o=x_o, nsamples=10_000)`
        """
        chosen = SampleOptions.parse(options, ONE, self.no_given)
        key = one_of(rng=rng, key=key)
        return self._sampler(self._one(x_o), observation_id, chosen)(key, nsamples, num_samples=num_samples)

    def get_sampler(self, x_o: Any = None, *, observation_id: int = 0, **options: Any) -> Callable[..., np.ndarray]:
        """A function `sampler(key, nsamples=10_000)` for one observation, compiled at its first call and reused after; it takes `rng` and `num_samples`
        too."""
        chosen = SampleOptions.parse(options, ("x_o", "observation_id"), self.no_given)
        return self._sampler(self._one(x_o), observation_id, chosen)

    def _sampler(self, x: np.ndarray, observation_id: int, chosen: SampleOptions) -> Callable[..., np.ndarray]:
        self.solver_for(chosen)  # its errors come here, not at the first call
        ids = as_ids([observation_id], len(x))
        keys.split_id(ids)

        def sampler(
            key: Any = None, nsamples: int | None = None, *, rng: Any = None, num_samples: int | None = None
        ) -> np.ndarray:
            """Draws, (nsamples, dim_theta, ch_theta); 10,000 by default."""
            key = keys.as_key(one_of(rng=rng, key=key))
            drawn = self._draw(key, x, ids, draws_asked(nsamples, num_samples, 10_000), chosen)
            return drawn[:, 0] if chosen.on_the_way else drawn[0]

        return sampler

    def traceable(
        self, nsamples: int, **options: Any
    ) -> Callable[..., Float[Array, "batch nsamples dim_theta ch_theta"]]:
        """A pure function `draws(weights, key, xs, words=None)` for your own `jax.jit`, `grad` or `vmap`.

        `weights`: `posterior.weights`, or others of the same network. They lie on all devices of the posterior's mesh, and so does what is made of
        them; for another place give `jax.device_put(posterior.weights, place)`, and for a part of `xs` on each device an `xs` that is sharded.
        `xs`: [batch, dim_x, ch_x], packed (see `check_xs`) and unchecked. `words`: of the observation ids, [batch, 2] (`distsbi.keys.split_id`);
        None: of 0, 1, 2, ... The draws are those of `sample_batched` but for rounding, without the tiles that bound its memory. `options`: those of
        the solver, see `SampleOptions`.

        Raises ValueError as `draw` does, and for options that are not the solver's.
        """
        chosen = SampleOptions.parse(options, ("nsamples",), self.no_given)
        solver, count, plain = self.solver_for(chosen), check_nsamples(nsamples), SampleOptions()
        for name in ("tile", "chunk_size", "return_trajectory", "time_grid", "check", "show_progress"):
            if np.any(getattr(chosen, name) != getattr(plain, name)):
                raise ValueError(f"{name} goes with sample; leave it out of traceable.")
        return tiles.pure_program(self.graphdef, self.method, solver, count, (self.dim_theta, self.ch_theta))

    def sample_dataset(
        self,
        path: str | os.PathLike[str],
        key: Any = None,
        x_o: Any = None,
        nsamples: int | None = None,
        *,
        rng: Any = None,
        num_samples: int | None = None,
        **options: Any,
    ) -> Dataset:
        """`sample` into a Parquet dataset, a folder of parts, 1,000,000 draws by default; of several processes all call this, and each writes its own parts. See
        `distsbi.sampling.dataset.write`."""
        if "given" in options:
            raise ValueError(self.no_given)
        key = keys.as_key(one_of(rng=rng, key=key))
        count = draws_asked(nsamples, num_samples, 1_000_000)
        return write(path, self, key, self._one(x_o), count, **options)

    def sample_batched(
        self,
        key: Any = None,
        xs: Any = None,
        nsamples: int | None = None,
        *,
        rng: Any = None,
        x_o: Any = None,
        condition: Any = None,
        num_samples: int | None = None,
        observation_ids: Any = None,
        **options: Any,
    ) -> Float[np.ndarray, "nsamples batch dim_theta ch_theta"]:
        """Draws for many observations `xs` of shape (batch, dim_x, ch_x) through the same tiles, 10,000 of each by default; `xs`, `x_o` and
        `condition`, `rng` and `key`, `nsamples` and `num_samples` mean the same. Raises as `draw` does."""
        words = ("rng", "key", "xs", "x_o", "condition", "nsamples", "num_samples", "observation_ids")
        chosen = SampleOptions.parse(options, words, self.no_given)
        key = keys.as_key(one_of(rng=rng, key=key))
        if self.is_unconditional:
            raise ValueError(
                "a density without conditions has no observations to draw for; use sample(key, nsamples=...)."
            )
        xs = self._many(one_of(xs=xs, x_o=x_o, condition=condition))
        count = draws_asked(nsamples, num_samples, 10_000)
        drawn = self._draw(key, xs, as_ids(observation_ids, len(xs)), count, chosen)
        return np.moveaxis(drawn, -4, -3)

    def save(self, path: str) -> None:
        """Writes the run directory."""
        from distsbi.sampling.run import save

        save(path, self)
