"""A training set whose rows are divided over the devices: none holds more than its part.

A batch is the same rows in the same order as in one process. Each device contributes those of them that it holds and zeros for the others; the sum
over the devices is the batch, split over them. A sum of one number and zeros is exact.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Int32

from distsbi import mesh as meshes

SHARE = 0.5  # of a device's memory: most that it holds of a training set


def is_divided(arrays: tuple[np.ndarray, np.ndarray], mesh: Mesh) -> bool:
    """Whether the rows are divided, where each device could hold all: over several processes, and where all take more than SHARE of a device.

    Raises ValueError where a device's part takes more than that.
    """
    size, room = sum(array.nbytes for array in arrays), _room(mesh)
    divided = meshes.is_shared(mesh) or size > room
    each = size / meshes.data_size(mesh) if divided else size
    if each > room:
        raise ValueError(
            f"the training set takes {each / 2**30:.3g} GiB of each device, more than {SHARE:.0%} of its memory, {room / 2**30:.3g} GiB. Write it "
            f"as a Parquet folder (distsbi.data.write_pairs) and train on distsbi.data.StreamedPairs(folder), or on more devices."
        )
    return divided


def _room(mesh: Mesh) -> float:
    """Bytes that every device of this process has for a training set; infinite where devices do not say, as CPUs."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return SHARE * min((device.memory_stats() or {}).get("bytes_limit", math.inf) for device in own)


def place(arrays: tuple[np.ndarray, np.ndarray], mesh: Mesh) -> tuple[Array, Array]:
    """Host arrays [n, ...] on the mesh, device d holding rows d m, ..., (d + 1) m - 1 of n rounded up to a multiple of the devices."""
    size = meshes.data_size(mesh)
    each = -(-len(arrays[0]) // size)

    def one(array: np.ndarray) -> Array:
        def part(index: Any) -> np.ndarray:
            rows = np.arange(*index[0].indices(each * size))
            return array[np.minimum(rows, len(array) - 1)]  # the last row again, which no batch asks for

        return jax.make_array_from_callback((each * size, *array.shape[1:]), meshes.batch_sharding(mesh), part)

    return one(arrays[0]), one(arrays[1])


def take(mesh: Mesh) -> Callable[[Array, Int32[Array, "batch"], Any], tuple[Array, Array]]:
    """`draw(key, index, data)`: rows `index` of arrays that `place` has placed; as `distsbi.data.source.take` does where every device has all."""
    size = meshes.data_size(mesh)
    # gloo's reduce-scatter gives up where another process comes half a minute later; its sum does not
    scatters = mesh.devices.flat[0].platform != "cpu"

    def draw(key: Array, index: Int32[Array, "batch"], data: Any) -> tuple[Array, Array]:
        even = index.shape[0] % size == 0

        def own(index: Array, part: Array) -> Array:
            row = index - jax.lax.axis_index(meshes.DATA) * part.shape[0]
            here = (row >= 0) & (row < part.shape[0])
            found = part[jnp.where(here, row, 0)]
            found = jnp.where(here.reshape(-1, *(1,) * (part.ndim - 1)), found, jnp.zeros((), part.dtype))
            if even and scatters:
                return jax.lax.psum_scatter(found, meshes.DATA, tiled=True)
            whole = jax.lax.psum(found, meshes.DATA)
            each = whole.shape[0] // size
            return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(meshes.DATA) * each, each) if even else whole

        gather = jax.shard_map(
            own, mesh=mesh, in_specs=(P(), P(meshes.DATA)), out_specs=P(meshes.DATA) if even else P(), check_vma=False
        )
        return gather(index, data[0]), gather(index, data[1])

    return draw
