"""A trained posterior p(theta | x) and the ways to draw from it.

Every way to draw is one call of `Posterior.draw`: it streams tiles (stream.py) over the mesh into a host array.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from distsbi import keys, mesh as meshes
from distsbi.methods import Method
from distsbi.networks.base import Network
from distsbi.sampling import tiles
from distsbi.sampling.density import density_program
from distsbi.sampling.options import SampleOptions
from distsbi.sampling.stream import stream
from distsbi.sampling.tiles import Tile, Weights
from distsbi.solvers import FixedGrid, Solver, make_solver


class Posterior:
    """p(theta | x) learned from simulations.

    Draws depend on (seed, observation id, draw index) alone: not on the number of devices, the order of observations or what
    else is drawn. More draws of an observation extend the earlier ones.

    Args:
        network: a trained network.
        method: what it predicts.
        standardizer: fitted scales and bijection.
        names: parameter names.
        solver: the solver used where none is asked for; None: midpoint with 8 steps on the method's grid.
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
        self.parameter_names = names or tuple(f"theta_{i}" for i in range(self.dim_theta))
        self.default_solver = solver if solver is not None else make_solver(method)
        self.tile = tile or tiles.default_tile(self.mesh.devices.flat[0].platform)
        self.facts = dict(facts or {})
        self.graphdef, params = nnx.split(network)
        self.weights = jax.device_put(Weights(params, standardizer), meshes.replicated(self.mesh))

    @property
    def network(self) -> Network:
        """The network with its weights."""
        return nnx.merge(self.graphdef, self.weights.params)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that defines p(theta | x): network, method, standardisation, weights. Hexadecimal."""
        from distsbi.sampling.run import model_spec, weights_digest

        text = json.dumps({**model_spec(self), "weights_sha256": weights_digest(self.weights.params)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def spec(self) -> dict[str, Any]:
        """What `save` writes to spec.json."""
        from distsbi.sampling.run import make_spec

        return make_spec(self)

    # Checks

    def check_x(self, x: Float[Array, "dim_x ch_x"]) -> None:
        """Raises ValueError unless `x` is one finite observation of shape (dim_x, ch_x)."""
        self._check_array(x, (self.dim_x, self.ch_x), "x")

    def _check_array(self, x: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
        try:
            array = np.asarray(x, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be an array of numbers of shape {shape}; got {type(x).__name__}.") from error
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} for this posterior; got {array.shape}.{_reshape_hint(array.shape, shape)}"
            )
        bad = ~np.isfinite(array)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{name} has {int(bad.sum())} values that are NaN or infinite, the first at {where}; remove or impute them."
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
        `options`: see `SampleOptions`.

        Raises ValueError for a wrong shape, NaN or inf in xs, nsamples <= 0 or an unknown keyword; RuntimeError if a solve
        did not end in finite numbers.
        """
        chosen = SampleOptions.parse(options)
        nsamples = _check_nsamples(nsamples)
        solver = chosen.make_solver(self.method, self.default_solver)
        tile = chosen.make_tile(self.tile).for_draws(nsamples)
        shape = np.shape(xs)
        xs = self._check_array(xs, (shape[0] if len(shape) == 3 else 1, self.dim_x, self.ch_x), "xs")
        ids = np.arange(len(xs)) if observation_ids is None else np.asarray(observation_ids)
        if ids.shape != (len(xs),):
            raise ValueError(f"observation_ids must have shape ({len(xs)},), one per observation; got {ids.shape}.")
        return self._draw(keys.as_key(key), xs, ids, nsamples, solver, tile, chosen.show_progress)

    def _draw(
        self, key: Array, xs: np.ndarray, ids: np.ndarray, nsamples: int, solver: Solver, tile: Tile, show: bool | None
    ) -> np.ndarray:
        out = np.empty((len(xs), nsamples, self.dim_theta, self.ch_theta), np.float32)
        encode = tiles.encode_program(self.graphdef, self.mesh)
        program = tiles.tile_program(
            self.graphdef, self.method, solver, tile, (self.dim_theta, self.ch_theta), self.mesh
        )
        with _progress(len(xs) * nsamples, "draws", show) as bar:
            for observation, start, draws in stream(
                encode, program, self.weights, key, xs, ids, nsamples, tile, self.mesh
            ):
                for o, s, d in zip(observation.tolist(), start.tolist(), draws, strict=True):
                    wanted = min(tile.draws, nsamples - s)
                    if wanted <= 0:
                        continue
                    if not np.isfinite(d[:wanted]).all():
                        bad = int((~np.isfinite(d[:wanted])).any(axis=(1, 2)).sum())
                        raise RuntimeError(
                            f"{bad} draws of observation {o} (id {ids[o]}) are not finite: the solver did not converge there. "
                            f"The observation may lie far outside the training data; or loosen rtol and atol, or use more steps."
                        )
                    out[o, s : s + wanted] = d[:wanted]
                    bar.update(wanted)
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
        """Draws for one observation `x_o` of shape (1, dim_x, ch_x); 10,000 by default. `rng` and `key` mean the same.

        The same draws as row `observation_id` of a batch or a catalog gets. Raises as `draw` does.

        Example:
            `posterior.sample(rng=jax.random.key(0), x_o=x_o, nsamples=10_000)`
        """
        key = one_of("rng", rng, "key", key)
        if x_o is None:
            raise ValueError(f"x_o is missing: an observation of shape (1, {self.dim_x}, {self.ch_x}).")
        count = (
            10_000
            if nsamples is None and num_samples is None
            else one_of("nsamples", nsamples, "num_samples", num_samples)
        )
        return self.get_sampler(x_o, observation_id=observation_id, **options)(key, nsamples=count)

    def get_sampler(self, x_o: Any, *, observation_id: int = 0, **options: Any) -> Callable[..., np.ndarray]:
        """A function `sampler(key, nsamples=10_000)` for one observation, compiled at its first call and reused after."""
        chosen = SampleOptions.parse(options)
        solver = chosen.make_solver(self.method, self.default_solver)
        tile = chosen.make_tile(self.tile)
        x = self._check_array(x_o, (1, self.dim_x, self.ch_x), "x_o")
        ids = np.asarray([observation_id])
        keys.split_id(ids)

        def sampler(key: Any = None, nsamples: int = 10_000, *, rng: Any = None) -> np.ndarray:
            """Draws, (nsamples, dim_theta, ch_theta)."""
            key = keys.as_key(one_of("rng", rng, "key", key))
            return self._draw(key, x, ids, _check_nsamples(nsamples), solver, tile, chosen.show_progress)[0]

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
        return np.moveaxis(self.draw(key, xs, nsamples, observation_ids=observation_ids, **options), 1, 0)

    # Density

    def log_prob(self, theta: Any, x_o: Any, *, steps: int = 32) -> Float[np.ndarray, "n"]:
        """log p(theta | x_o): Runge-Kutta of order four from data to noise with the exact divergence.

        -inf outside the prior's support. Raises ValueError for wrong shapes or non-finite values.
        """
        shape = np.shape(theta)
        theta = self._check_array(theta, (shape[0] if len(shape) == 3 else 1, self.dim_theta, self.ch_theta), "theta")
        x = self._check_array(x_o, (1, self.dim_x, self.ch_x), "x_o")
        if isinstance(steps, bool) or int(steps) != steps or steps < 1:
            raise ValueError(f"steps must be a positive integer; got {steps!r}.")
        grid = FixedGrid("rk4", self.method.grid(int(steps)))
        program = density_program(self.graphdef, self.method, grid, self.mesh)
        width = self.tile.rows * meshes.data_size(self.mesh)
        parts = []
        for first in range(0, len(theta), width):
            rows = theta[first : first + width]
            full = np.concatenate([rows, np.repeat(rows[-1:], width - len(rows), axis=0)])
            parts.append(np.asarray(program(self.weights, full, x))[: len(rows)])
        return np.concatenate(parts) if parts else np.zeros((0,), np.float32)

    def save(self, path: str) -> None:
        """Writes the run directory."""
        from distsbi.sampling.run import save

        save(path, self)


def one_of(first: str, a: Any, second: str, b: Any) -> Any:
    """The one of two synonymous arguments that was given. Raises ValueError for both or none."""
    if (a is None) == (b is None):
        raise ValueError(f"give {first} or {second}, {'not both' if a is not None else 'one of them is needed'}.")
    return a if a is not None else b


def _check_nsamples(nsamples: Any) -> int:
    if isinstance(nsamples, bool) or not isinstance(nsamples, (int, np.integer)) or not 0 < nsamples <= keys.MAX_DRAWS:
        raise ValueError(f"nsamples must be a positive integer (at most 2**32); got {nsamples!r}.")
    return int(nsamples)


def _reshape_hint(given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    for index in ("[None, :, None]", "[None]", "[..., None]", "[:, None]", "[:, :, None]", "[None, None]"):
        probe = np.empty(given, np.bool_)
        try:
            shape = _indexed_shape(probe, index)
        except IndexError:
            continue
        if shape == wanted or (len(wanted) == 3 and len(shape) == 3 and shape[1:] == wanted[1:]):
            return f" Add the axes with x{index}."
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
