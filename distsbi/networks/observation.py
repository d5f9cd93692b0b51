"""What an observation looks like to a user, and the one array that it is everywhere inside.

    spectrum       dim 100                                   [100, ch]
    image          dim (32, 32)                              [32, 32, ch]
    instruments    dim {"image": (32, 32), "spectrum": 100}  a dict of such arrays

Anything but the first is packed into one column, [size, 1], the parts of a dict one after the other in the order of their names. So data
sets, scales, tiles and catalogs hold one array per observation, and only the network that encodes it unpacks it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Dims = int | tuple[int, ...] | Mapping[str, int | tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of an observation: names, and shapes with channels. One part of name "" is an observation that is one array."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, dim: Dims, channels: int | Mapping[str, int] = 1) -> Self:
        """From numbers of data and of channels, for each part of its own where they are dicts.

        Raises ValueError for sizes that are not positive, an empty dict, or channels of other parts.
        """
        if not isinstance(dim, Mapping):
            if isinstance(channels, Mapping):
                raise ValueError(f"channels {dict(channels)} name parts, but the data {dim!r} are one array.")
            return cls(("",), (_shape("x", dim, channels),))
        names = tuple(sorted(map(str, dim)))
        if not names or "" in names:
            raise ValueError(
                "data in several parts need a name for each, such as {'image': (32, 32), 'spectrum': 100}."
            )
        per = dict(channels) if isinstance(channels, Mapping) else dict.fromkeys(names, channels)
        if set(per) != set(names):
            raise ValueError(f"channels are given for {sorted(per)}, the data have the parts {list(names)}.")
        return cls(names, tuple(_shape(name, dim[name], per[name]) for name in names))

    @property
    def is_plain(self) -> bool:
        """Whether an observation is [dim, channels], as it stands."""
        return self.names == ("",) and len(self.shapes[0]) == 2

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def packed(self) -> tuple[int, int]:
        """Shape of one observation inside."""
        return (self.shapes[0][0], self.shapes[0][1]) if self.is_plain else (self.size, 1)

    def describe(self) -> str:
        """The shape of a batch, for messages."""
        if self.names == ("",):
            return f"(n, {', '.join(map(str, self.shapes[0]))})"
        return "a dict of " + ", ".join(f"{n!r} (n, {', '.join(map(str, s))})" for n, s in self._parts())

    def pack(self, x: Any, name: str = "x") -> np.ndarray:
        """A batch as one float32 array, (n, *packed). What is packed already, and a last channel axis of 1 left out, are taken too.

        Raises ValueError for other shapes, missing or unknown parts, or what is not numbers.
        """
        if self.names == ("",) and isinstance(x, Mapping):
            raise ValueError(f"{name} must have shape {self.describe()}; got a dict of {sorted(map(str, x))}.")
        if self.names != ("",) and isinstance(x, Mapping):
            if set(x) != set(self.names):
                raise ValueError(f"{name} must be {self.describe()}; got {sorted(map(str, x))}.")
            parts = [_numbers(x[n], s, f"{name}[{n!r}]") for n, s in self._parts()]
            if len(set(map(len, parts))) > 1:
                raise ValueError(f"the parts of {name} have {[len(p) for p in parts]} rows; they need as many each.")
            return np.concatenate([p.reshape(len(p), -1, 1) for p in parts], 1)
        array = np.asarray(x)
        if array.shape[1:] == self.packed:
            return _numbers(array, self.packed, name)
        if self.names != ("",):
            raise ValueError(f"{name} must be {self.describe()}; got {_says(array)}.")
        return _numbers(array, self.shapes[0], name).reshape(-1, *self.packed)

    def unpack(self, x: Float[Array, "batch size ch"]) -> Any:
        """What `pack` was given."""
        if self.is_plain:
            return x
        parts, start = {}, 0
        for name, shape in self._parts():
            size = math.prod(shape)
            parts[name] = x[:, start : start + size].reshape(-1, *shape)
            start += size
        return parts[""] if self.names == ("",) else parts

    def join(self, x: Any) -> Float[Array, "batch size ch"]:
        """`unpack` undone, traceable."""
        if self.is_plain:
            return x
        parts = [x] if self.names == ("",) else [x[name] for name in self.names]
        return jnp.concatenate([jnp.reshape(part, (len(part), -1, 1)) for part in parts], 1)

    def there(self, mask: Bool[Array, "batch size"]) -> Any:
        """A mask of entries unpacked: [batch, *shape] of each part, channels being there together where x is plain."""
        if self.is_plain:
            return jnp.broadcast_to(mask[..., None], (*mask.shape, self.shapes[0][1]))
        return self.unpack(mask[..., None])

    def pooled(self, count: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of the packed entries [size, 1], of `count` rows each, made equal over the positions of an image: pixels have
        no scale of their own. One that is constant (deviation 0: a border, a dead pixel) or always missing has no part in it, and a constant keeps
        its mean, so that the network sees 0 there."""
        mean, std, start = mean.copy(), std.copy(), 0
        for shape in self.shapes:
            size = math.prod(shape)
            if len(shape) > 2:
                rows, m, s = (a[start : start + size].reshape(-1, shape[-1]) for a in (count, mean, std))
                weight = np.where(s > 0, rows, 0.0)
                total = np.maximum(weight.sum(0), 1.0)
                centre = (weight * m).sum(0) / total
                spread = np.sqrt((weight * (s**2 + (m - centre) ** 2)).sum(0) / total)
                alone = (s == 0) & (rows > 0)
                mean[start : start + size] = np.where(alone, m, centre).reshape(size, 1)
                std[start : start + size] = np.broadcast_to(spread, s.shape).reshape(size, 1)
            start += size
        return mean, std

    def to_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "shapes": [list(s) for s in self.shapes]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(tuple(fields["names"]), tuple(tuple(s) for s in fields["shapes"]))

    def _parts(self) -> zip:
        return zip(self.names, self.shapes, strict=True)


def _shape(name: str, dim: int | tuple[int, ...], channels: int) -> tuple[int, ...]:
    shape = (*(dim if isinstance(dim, (tuple, list)) else (dim,)), channels)
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in shape):
        raise ValueError(
            f"the sizes of {name} must be positive integers, such as 100 or (32, 32); got {dim!r}, {channels!r} channels."
        )
    return tuple(int(n) for n in shape)


def _numbers(x: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = np.asarray(x)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} must hold real numbers; got dtype {array.dtype}.")
    if array.shape[1:] == shape[:-1] and shape[-1] == 1:
        array = array[..., None]
    if array.shape[1:] != shape:
        hint = f" Add the axis with {name}[None]." if array.shape in (shape, shape[:-1]) else ""
        raise ValueError(f"{name} must have shape (n, {', '.join(map(str, shape))}); got {array.shape}.{hint}")
    with np.errstate(over="ignore"):  # beyond float32 becomes inf, which the checks report
        return array.astype(np.float32, copy=False)


def _says(array: np.ndarray) -> str:
    return f"an array of shape {array.shape}" if array.dtype != object else "something else"
