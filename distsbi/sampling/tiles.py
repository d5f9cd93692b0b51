"""Tiles: the unit of work.

A tile is S slots of D draws. A slot is (observation, block of D consecutive draws); one observation fills all slots with its
blocks, a catalog mixes observations. `shard_map` splits the slots of one dispatch over the mesh, a tile per device, so the
program of a device is the same whatever the mesh, and so are its bits. A draw's noise depends on (seed, observation id, draw
index) alone (keys.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Int32, UInt32

from distsbi import keys, mesh as meshes
from distsbi.data.standardise import Standardizer
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
)
from distsbi.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Tile:
    """S slots x D draws: the rows that one device works on at a time."""

    slots: int
    draws: int

    def __post_init__(self) -> None:
        if self.slots < 1 or self.draws < 1:
            raise ValueError(f"a tile needs positive slots and draws; got {self.slots} x {self.draws}.")

    @property
    def rows(self) -> int:
        return self.slots * self.draws

    def for_draws(self, nsamples: int) -> "Tile":
        """A tile with as many rows and fewer draws per slot, where many observations get few draws each."""
        draws = self.draws
        while draws % 4 == 0 and draws // 4 >= nsamples:
            draws //= 4
        return Tile(self.rows // draws, draws)


DEFAULT_TILES = {"cpu": Tile(8, 256), "gpu": Tile(128, 512), "tpu": Tile(64, 512)}


def default_tile(platform: str) -> Tile:
    """The default tile of a kind of device."""
    return DEFAULT_TILES.get({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), DEFAULT_TILES["gpu"])


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
    """(weights, x [slots x devices, dim_x, ch_x]) -> context table, compiled once."""

    def program(weights: Weights, x: Array) -> Encoded:
        return encode(nnx.merge(graphdef, weights.params), weights.standardizer, x)

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(P(), P(meshes.DATA)), out_specs=P(meshes.DATA), check_vma=False
    )
    return jax.jit(mapped, out_shardings=meshes.replicated(mesh))


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
) -> Callable[..., Any]:
    """(weights, schedule, key, context table, next context table, slots, payload) -> what `make` names, compiled once per network, solver, tile
    and mesh.

    DRAWS: theta [slots, draws, dim_theta, ch_theta]; TRAJECTORY: with an axis of times after the draws; DRAWS_AND_DENSITY: theta
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
        return jnp.moveaxis(draws, 0, 2) if make == TRAJECTORY else draws

    # check_vma=False: diffrax's while loops are refused by the check (diffrax#735).
    specs = (P(), P(), P(), P(), P(), P(meshes.DATA), P(meshes.DATA))
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=P(meshes.DATA), check_vma=False))


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
