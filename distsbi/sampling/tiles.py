"""Tiles: the unit of work.

A tile is S slots of D draws. A slot is (observation, block of D consecutive draws); one observation fills all slots with its
blocks, a catalog mixes observations. `shard_map` splits the slots of one dispatch over the mesh, a tile per device, so the
program of a device is the same whatever the mesh, and so are its bits. A draw's noise depends on (seed, observation id, draw
index) alone (keys.py).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Int32, UInt32

from distsbi import keys, mesh as meshes
from distsbi.data.standardise import Standardizer
from distsbi.hints import as_count
from distsbi.methods import Method
from distsbi.networks.base import encode
from distsbi.sampling.flow import (
    EXACT,
    Divergence,
    Encoded,
    Schedule,
    draw_tile,
    draws_and_density,
    log_density,
    make_schedule,
)
from distsbi.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Tile:
    """S slots x D draws: the rows that one device works on at a time."""

    slots: int
    draws: int

    def __post_init__(self) -> None:
        for name in ("slots", "draws"):
            object.__setattr__(self, name, as_count(f"Tile.{name}", getattr(self, name)))

    @property
    def rows(self) -> int:
        return self.slots * self.draws

    def for_draws(self, nsamples: int, most_slots: int | None = None) -> "Tile":
        """A tile with as many rows and fewer draws per slot, where many observations get few draws each; with fewer rows where that
        would be more than `most_slots`. It does not depend on how many observations there are, for bits depend on it."""
        draws = self.draws
        while draws % 4 == 0 and draws // 4 >= nsamples:
            draws //= 4
        slots = self.rows // draws
        while most_slots is not None and slots > max(self.slots, most_slots) and slots % 2 == 0:
            slots //= 2
        return Tile(slots, draws)

    def within(self, rows: float) -> "Tile":
        """A tile of at most so many rows: half the slots, a quarter, ..., then fewer draws."""
        slots, draws = self.slots, self.draws
        while slots * draws > rows and slots * draws > 1:
            slots, draws = (slots // 2, draws) if slots > 1 else (1, draws // 2)
        return Tile(slots, draws)

    @property
    def encoded(self) -> int:
        """Observations that a device encodes at a time: a divisor of `slots`, so that a tile of many slots costs one observation
        no more than this."""
        return max(n for n in range(1, min(self.slots, ENCODED) + 1) if self.slots % n == 0)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What suits a kind of device: its tile, bytes of a dispatch's encoded observations, and bytes of a step's largest arrays."""

    tile: Tile
    context_bytes: int
    step_bytes: int

    def most_rows(self, bytes_per_row: float) -> float:
        """Rows whose largest arrays fit into the share for them."""
        return self.step_bytes / (LIVE * bytes_per_row) if bytes_per_row > 0 else math.inf

    def most_slots(self, bytes_per_context: int) -> int:
        """Slots whose encoded observations fit into the share for them."""
        return max(1, self.context_bytes // max(bytes_per_context, 1))


ENCODED = 64
KINDS = {
    "cpu": Kind(Tile(8, 256), 2**26, 2**30),
    "gpu": Kind(Tile(128, 512), 2**30, 2**32),
    "tpu": Kind(Tile(64, 512), 2**30, 2**32),
}
LIVE = 4  # arrays of the largest size that a step holds at once


def kind_name(mesh: Mesh) -> str:
    """The kind of the devices of a mesh, a name in `KINDS`."""
    platform = mesh.devices.flat[0].platform
    return platform if platform in KINDS else "gpu"  # "cuda", "rocm"


def kind_of(mesh: Mesh) -> Kind:
    """What suits the devices of a mesh."""
    return KINDS[kind_name(mesh)]


def bytes_per_row(network: Any, standardizer: Standardizer) -> float:
    """The most bytes that an array of one prediction grows by with every draw. Nothing is computed."""

    def sizes(draws: int) -> Iterator[int]:
        x = jax.ShapeDtypeStruct((1, network.dim_x, network.ch_x), jnp.float32)
        theta = jax.ShapeDtypeStruct((1, draws, network.dim_theta, network.ch_theta), jnp.float32)
        step = lambda t, theta, x: network(t, theta, encode(network, standardizer, x)[0])  # noqa: E731
        return _sizes(jax.make_jaxpr(step)(jax.ShapeDtypeStruct((), jnp.float32), theta, x).jaxpr)

    few, many = list(sizes(128)), list(sizes(256))
    if len(few) != len(many):  # the program is another for another number of draws
        few, many = [max(few)], [max(many)]
    # array by array, for weights do not grow and may be the largest
    return max(b - a for a, b in zip(few, many, strict=True)) / 128


def _sizes(jaxpr: Any) -> Iterator[int]:
    """Bytes of every array that a program makes, those inside its loops included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            yield math.prod(shape) * getattr(getattr(variable.aval, "dtype", None), "itemsize", 0)
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)


def bytes_per_context(network: Any, standardizer: Standardizer) -> int:
    """Bytes of one encoded observation. Nothing is computed."""
    x = jax.ShapeDtypeStruct((1, network.dim_x, network.ch_x), jnp.float32)
    encoded = jax.eval_shape(lambda x: encode(network, standardizer, x), x)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(encoded))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """What a program takes as an argument, so that another posterior of the same shape does not compile again."""

    params: nnx.State
    standardizer: Standardizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What fills one dispatch: for every slot the row of its observation in the context table, the two words of its
    observation id, and its first draw index. All of length slots x devices."""

    row: Int32[Array, "slots"]
    words: UInt32[Array, "slots 2"]
    start: UInt32[Array, "slots"]


DRAWS, TRAJECTORY, DRAWS_AND_DENSITY, DENSITY = "draws", "trajectory", "draws_and_density", "density"


@functools.lru_cache(maxsize=64)
def encode_program(graphdef: nnx.GraphDef, mesh: Mesh) -> Callable[[Weights, Array], Encoded]:
    """(weights, x [rows x devices, dim_x, ch_x]) -> their contexts, compiled once."""

    def program(weights: Weights, x: Array) -> Encoded:
        return encode(nnx.merge(graphdef, weights.params), weights.standardizer, x)

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(P(), P(meshes.DATA)), out_specs=P(meshes.DATA), check_vma=False
    )
    return jax.jit(mapped, out_shardings=meshes.replicated(mesh))


@functools.lru_cache(maxsize=64)
def join_program(mesh: Mesh) -> Callable[..., Encoded]:
    """(contexts, contexts, ...) -> one context table."""
    join = lambda *parts: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)  # noqa: E731
    return jax.jit(join, out_shardings=meshes.replicated(mesh))


@functools.lru_cache(maxsize=64)
def tile_program(
    graphdef: nnx.GraphDef,
    method: Method,
    solver: Solver,
    tile: Tile,
    shape: tuple[int, int],
    mesh: Mesh,
    make: str = DRAWS,
    divergence: Divergence = EXACT,
    at: tuple[int, ...] | None = None,
) -> Callable[..., Any]:
    """(weights, schedule, key, context table, next context table, slots, payload) -> what `make` names, compiled once per network, solver, tile
    and mesh.

    DRAWS: theta [slots, draws, dim_theta, ch_theta]; TRAJECTORY: with an axis of times after the draws, those that
    `at` numbers; DRAWS_AND_DENSITY: theta
    and log p [slots, draws]; DENSITY: log p of the payload, theta [slots, draws, dim_theta, ch_theta]. Rows of `slots` index the two
    tables one after the other.
    """

    def program(
        weights: Weights,
        schedule: Schedule,
        key: Array,
        first: Encoded,
        second: Encoded,
        slots: Slots,
        payload: Array | None,
    ) -> Any:
        table = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
        encoded = jax.tree.map(lambda leaf: leaf[slots.row], table)
        network, standardizer = nnx.merge(graphdef, weights.params), weights.standardizer
        numbers = {"draws": tile.draws, "shape": shape}

        def fresh(step: Array) -> Array:
            return jax.vmap(functools.partial(keys.step_noise, key, step=step, **numbers))(slots.words, slots.start)

        if make == DENSITY:
            assert payload is not None
            return log_density(network, method, solver, standardizer, encoded, payload, divergence, fresh, schedule)
        z = jax.vmap(functools.partial(keys.draw_noise, key, **numbers))(slots.words, slots.start)
        if make == DRAWS_AND_DENSITY:
            return draws_and_density(network, method, solver, standardizer, encoded, z, divergence, fresh, schedule)
        draws = draw_tile(
            network, method, solver, standardizer, encoded, z, fresh if solver.stochastic else None, schedule,
            trajectory=make == TRAJECTORY,
        )  # fmt: skip
        return jnp.moveaxis(draws[jnp.asarray(at)], 0, 2) if make == TRAJECTORY else draws

    # check_vma=False: diffrax's while loops are refused by the check (diffrax#735).
    specs = (P(), P(), P(), P(), P(), P(meshes.DATA), P(meshes.DATA))
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=P(meshes.DATA), check_vma=False))


def pure_program(
    graphdef: nnx.GraphDef, method: Method, solver: Solver, nsamples: int, shape: tuple[int, int]
) -> Callable[..., Float[Array, "batch nsamples dim_theta ch_theta"]]:
    """(weights, key, xs [batch, dim_x, ch_x], words of the observation ids [batch, 2] or None: of 0, 1, 2, ...) -> `nsamples` draws of each, not
    compiled."""
    schedule = make_schedule(solver, method)
    numbers: dict[str, Any] = {"start": np.uint32(0), "draws": nsamples, "shape": shape}

    def program(weights: Weights, key: Any, xs: Array, words: Array | None = None) -> Array:
        """Draws, [batch, nsamples, dim_theta, ch_theta]."""
        key, network = keys.as_key(key), nnx.merge(graphdef, weights.params)
        ids = keys.split_id(np.arange(len(xs))) if words is None else words
        z = jax.vmap(functools.partial(keys.draw_noise, key, **numbers))(ids)
        noise = lambda step: jax.vmap(functools.partial(keys.step_noise, key, step=step, **numbers))(ids)  # noqa: E731
        encoded = encode(network, weights.standardizer, xs)
        return draw_tile(network, method, solver, weights.standardizer, encoded, z, noise, schedule)

    return program


@functools.lru_cache(maxsize=64)
def volume_program(graphdef: nnx.GraphDef) -> Callable[[Weights, Array, Array], Array]:
    """(weights, theta [n, dim_theta, ch_theta], x [1, dim_x, ch_x]) -> the logarithm of the volume in standardised parameters over that around each theta [n]."""

    def program(weights: Weights, theta: Array, x: Array) -> Array:
        standardizer = weights.standardizer
        centre = encode(nnx.merge(graphdef, weights.params), standardizer, x)[1][:, None]
        return standardizer.log_det(standardizer.forward(theta[None], centre), centre)[0]

    return jax.jit(program)


@functools.lru_cache(maxsize=16)
def climb_program(
    graphdef: nnx.GraphDef, method: Method, solver: Solver, steps: int, learning_rate: float = 0.03
) -> Callable[[Weights, Array, Array], tuple[Array, Array]]:
    """(weights, theta [n, dim_theta, ch_theta], x [1, dim_x, ch_x]) -> the highest points met while climbing log p(theta | x) from each
    theta, and their heights [n]. Adam, in standardised parameters."""

    def program(weights: Weights, theta: Array, x: Array) -> tuple[Array, Array]:
        network, standardizer = nnx.merge(graphdef, weights.params), weights.standardizer
        encoded = encode(network, standardizer, x)
        centre = encoded[1][:, None]
        optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

        def height(y: Array) -> tuple[Array, Array]:
            theta = standardizer.inverse(y, centre)
            log_p = log_density(network, method, solver, standardizer, encoded, theta)
            return log_p.sum(), log_p[0]

        def step(carry: Any, _: None) -> tuple[Any, None]:
            y, state, best, top = carry
            (_, log_p), gradient = jax.value_and_grad(height, has_aux=True)(y)
            better = log_p > top
            best = jnp.where(better[None, :, None, None], y, best)
            update, state = optimizer.update(-jnp.nan_to_num(gradient), state)
            return (y + update, state, best, jnp.where(better, log_p, top)), None

        y = standardizer.forward(theta[None], centre)
        start = (y, optimizer.init(y), y, jnp.full(len(theta), -jnp.inf))
        (_, _, best, top), _ = jax.lax.scan(step, start, None, length=steps)
        return standardizer.inverse(best, centre)[0], top

    return jax.jit(program)
