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
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Int32, Key, UInt32

from distsbi import keys, mesh as meshes
from distsbi.data.standardise import Standardizer
from distsbi.methods import Method
from distsbi.networks.base import Context
from distsbi.solvers import Solver

Encoded = tuple[Context, Float[Array, "batch dim_theta ch_theta"]]  # the network's context, the standardizer's centre


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


def velocity(network: Any, method: Method) -> Callable[[Array, Array, Context], Array]:
    """v(t, y, context) of the probability-flow ODE, in standardised parameters."""

    def field(t: Array, y: Array, context: Context) -> Array:
        return method.velocity(t, y, network(method.c_time(t), method.c_in(t) * y, context))

    return field


def encode(network: Any, standardizer: Standardizer, x: Float[Array, "batch dim_x ch_x"]) -> Encoded:
    """All that is computed once per observation."""
    return network.encode(standardizer.forward_x(x)), standardizer.centre(x)


def draw_tile(
    network: Any, method: Method, solver: Solver, standardizer: Standardizer, encoded: Encoded, z: Array
) -> Array:
    """theta from noise: the pure function under every way to sample. `z`: [slots, draws, dim_theta, ch_theta]."""
    context, centre = encoded
    y = solver.solve(velocity(network, method), method.initial(z), context)
    if method.t_end < 1:
        t = jnp.asarray(method.t_end, jnp.float32)
        y = method.final(t, y, network(method.c_time(t), method.c_in(t) * y, context))
    return standardizer.inverse(y, centre[:, None])


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
    graphdef: nnx.GraphDef, method: Method, solver: Solver, tile: Tile, shape: tuple[int, int], mesh: Mesh
) -> Callable[[Weights, Key[Array, ""], Encoded, Encoded, Slots], Float[Array, "slots draws dim_theta ch_theta"]]:
    """(weights, key, context table, next context table, slots) -> draws, compiled once per network, solver, tile and mesh.

    Rows of `slots` index the two tables one after the other.
    """

    def program(weights: Weights, key: Array, first: Encoded, second: Encoded, slots: Slots) -> Array:
        table = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
        encoded = jax.tree.map(lambda leaf: leaf[slots.row], table)
        noise = functools.partial(keys.draw_noise, key, draws=tile.draws, shape=shape)
        z = jax.vmap(noise)(slots.words, slots.start)
        return draw_tile(nnx.merge(graphdef, weights.params), method, solver, weights.standardizer, encoded, z)

    # check_vma=False: diffrax's while loops are refused by the check (diffrax#735).
    specs = (P(), P(), P(), P(), P(meshes.DATA))
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=P(meshes.DATA), check_vma=False))
