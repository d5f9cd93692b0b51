"""Every mesh axis and sharding rule, once.

A mesh has two axes. Batches and tiles are split over "data". Parameters are replicated, or (`fsdp`) split over "data"
along their largest divisible dimension; "model" is reserved for tensor parallelism and has size 1 by default.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

DATA, MODEL = "data", "model"

MeshLike = Mesh | Mapping[str, int] | str | None


def make_mesh(mesh: MeshLike = None) -> Mesh:
    """The mesh that `mesh` describes.

    None: all local devices on the "data" axis; "auto": those of all processes. A dict: sizes of the axes "data" and "model" (one may be -1: what is
    left); fewer devices than there are is allowed. A `jax.sharding.Mesh` that has a "data" axis is taken as it is.

    Raises ValueError for unknown axes or more devices than there are.
    """
    if isinstance(mesh, Mesh):
        if DATA not in mesh.axis_names:
            raise ValueError(f'the mesh needs an axis named "{DATA}"; this one has {mesh.axis_names}.')
        return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    devices = jax.local_devices() if mesh is None else jax.devices()
    if mesh is None or mesh == "auto":
        mesh = {DATA: len(devices)}
    if not isinstance(mesh, Mapping):
        raise ValueError(
            f'mesh must be None, "auto", a dict such as {{"data": 8}} or a jax.sharding.Mesh; got {mesh!r}.'
        )
    unknown = set(mesh) - {DATA, MODEL}
    if unknown:
        raise ValueError(f'unknown mesh axes {sorted(unknown)}; the axes are "{DATA}" and "{MODEL}".')
    sizes = {DATA: int(mesh.get(DATA, 1)), MODEL: int(mesh.get(MODEL, 1))}
    if list(sizes.values()).count(-1) == 1:
        free = DATA if sizes[DATA] == -1 else MODEL
        other = MODEL if free == DATA else DATA
        sizes[free] = len(devices) // sizes[other] if sizes[other] > 0 else 0
    if min(sizes.values()) < 1:
        raise ValueError(f"mesh axis sizes must be positive (one of them may be -1); got {dict(mesh)}.")
    count = sizes[DATA] * sizes[MODEL]
    if count > len(devices):
        raise ValueError(
            f"mesh {dict(mesh)} needs {count} devices; there are {len(devices)}. On CPUs, virtual devices come from "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}, set before JAX starts."
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.asarray(devices[:count]).reshape(sizes[DATA], sizes[MODEL]), (DATA, MODEL), axis_types=axis_types)


def compiler_options(mesh: Mesh, on_cpu: Mapping[str, str]) -> dict[str, str] | None:
    """What `jax.jit` takes as `compiler_options` on this mesh: `on_cpu` on CPUs, as far as this XLA knows them."""
    if mesh.devices.flat[0].platform != "cpu" or not on_cpu:
        return None
    return {name: value for name, value in on_cpu.items() if _xla_knows(name, value)} or None


@functools.cache
def _xla_knows(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except Exception:  # the type differs between versions of jax; an unknown option is no error of the user's
        return False
    return True


def data_size(mesh: Mesh) -> int:
    """Devices along the "data" axis: how many ways a batch or a dispatch of tiles is split."""
    return mesh.shape[DATA]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Axis `axis` split over "data"."""
    return NamedSharding(mesh, P(*([None] * axis), DATA))


def state_shardings(mesh: Mesh, state: Any, *, fsdp: bool = False) -> Any:
    """A sharding for every leaf of a training state (arrays or ShapeDtypeStructs).

    Replicated; with `fsdp`, every leaf of two or more axes is split over "data" along its largest axis that the device
    count divides (parameters, their averages and the optimiser's moments alike, since all have the same shapes).
    """
    size = data_size(mesh)

    def rule(leaf: Any) -> NamedSharding:
        if not fsdp or size == 1 or len(leaf.shape) < 2 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return replicated(mesh)
        axes = [a for a in np.argsort([-s for s in leaf.shape], kind="stable") if leaf.shape[a] % size == 0]
        return batch_sharding(mesh, int(axes[0])) if axes else replicated(mesh)

    return jax.tree.map(rule, state)
