"""Every mesh axis and sharding rule, once.

A mesh has two axes. Batches and tiles are split over "data". Parameters are replicated, or (`fsdp`) split over "data"
along their largest divisible dimension; "model" is reserved for tensor parallelism, has size 1 by default, and nothing is split over it yet.

Of several processes (distsbi/processes), a training has one mesh that spans them all, and each process draws on a mesh of its own devices.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from distsbi import processes
from distsbi.hints import as_count, warn

DATA, MODEL = "data", "model"

MeshLike = Mesh | Mapping[str, int] | str | None


def make_mesh(mesh: MeshLike = None, *, shared: bool = False) -> Mesh:
    """The mesh that `mesh` describes, of this process' devices, or (`shared`) of the devices of all processes, as many from each.

    None or "auto": all of them on the "data" axis. A dict: sizes of the axes "data" and "model" (one may be -1: what is left); fewer devices
    than there are is allowed. Warns of a "model" axis of more than one device, which all do the same work. A `jax.sharding.Mesh` that has a "data" axis is taken as it is, without `shared` this process' part of it.

    Raises ValueError for unknown axes, sizes that are no whole numbers, more devices than there are, and a shared mesh in which a process has no part.
    """
    if isinstance(mesh, Mesh):
        if DATA not in mesh.axis_names:
            raise ValueError(f'the mesh needs an axis named "{DATA}"; this one has {mesh.axis_names}.')
        if is_shared(mesh) and not shared:
            own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
            return _of(own, len(own), 1)
        _check_parts(list(mesh.devices.flat), shared)
        _warn_idle(mesh.size // mesh.shape[DATA])
        return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    devices = jax.devices() if shared else jax.local_devices()
    if mesh is None or mesh == "auto":
        mesh = {DATA: len(devices)}
    if not isinstance(mesh, Mapping):
        raise ValueError(
            f'mesh must be None, "auto", a dict such as {{"data": 8}} or a jax.sharding.Mesh; got {mesh!r}.'
        )
    unknown = set(mesh) - {DATA, MODEL}
    if unknown:
        raise ValueError(f'unknown mesh axes {sorted(unknown)}; the axes are "{DATA}" and "{MODEL}".')
    sizes = {axis: as_count(f'the size of mesh axis "{axis}"', mesh.get(axis, 1), -1) for axis in (DATA, MODEL)}
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
    _warn_idle(sizes[MODEL])
    return _of(_some(devices, count) if shared else devices[:count], sizes[DATA], sizes[MODEL])


def cpu_mesh() -> Mesh | None:
    """A mesh of one CPU device, also where there are GPUs or TPUs; None where JAX_PLATFORMS leaves CPUs out."""
    try:
        return _of(jax.local_devices(backend="cpu")[:1], 1, 1)
    except RuntimeError:
        return None


def _of(devices: list[Any], data: int, model: int) -> Mesh:
    axis_types = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.asarray(devices).reshape(data, model), (DATA, MODEL), axis_types=axis_types)


def _warn_idle(alike: int) -> None:
    """Of so many devices for each part of the data."""
    if alike > 1:
        warn(
            f'{alike} devices of this mesh do the same work: nothing is split over an axis other than "{DATA}" yet; put all devices on it, such as '
            f'mesh={{"{DATA}": -1}}.',
        )


def _some(devices: list[Any], count: int) -> list[Any]:
    """`count` devices, as many of each process."""
    among = max(processes.count(), 1)
    if count % among:
        raise ValueError(
            f"a mesh of {count} devices cannot be divided over {among} processes; give a multiple of {among}."
        )
    taken: dict[int, int] = {}
    chosen = []
    for device in devices:
        taken[device.process_index] = taken.get(device.process_index, 0) + 1
        if taken[device.process_index] <= count // among:
            chosen.append(device)
    if len(chosen) < count:
        raise ValueError(
            f"a mesh of {count} devices takes {count // among} of each of the {among} processes, and one of them has fewer; give a smaller mesh."
        )
    return chosen


def _check_parts(devices: list[Any], shared: bool) -> None:
    without = set(range(processes.count())) - {device.process_index for device in devices} if shared else set()
    if without:
        raise ValueError(
            f'process {min(without)} has no device in the mesh: every process of a training needs one; give mesh="auto" for all of them.'
        )


def is_shared(mesh: Mesh) -> bool:
    """Whether devices of other processes are in the mesh."""
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def put(value: Any, sharding: NamedSharding) -> Any:
    """A pytree of host arrays, the same in all processes, on the mesh: each process gives its own devices what they hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)

    def one(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, value)


def meet(mesh: Mesh) -> None:
    """The first collective of all devices, made when all processes have come here: where devices meet for the first time, gloo (CPUs) waits for
    thirty seconds at most, which one process may spend more of than another compiling a large program."""
    if is_shared(mesh):
        processes.wait_for_all()
        ones = put(np.ones(data_size(mesh), np.float32), batch_sharding(mesh))
        jax.block_until_ready(jax.jit(lambda a: a.sum(), out_shardings=replicated(mesh))(ones))


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
