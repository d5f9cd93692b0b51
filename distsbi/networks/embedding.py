"""Embedding nets: from an image, a spectrum or several instruments to the tokens that a network conditions on.

    tokens = net(part)  [batch, tokens, features]        for every part of an observation
    context = network.encode(all tokens)                 trained jointly; runs once per observation

`Embedded` joins any such nets, a user's own among them, to any network.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from distsbi.networks.base import Context, Network, NetworkParams, takes_missing
from distsbi.networks.observation import Layout

MOST_TOKENS = 16  # that the default patches cut an observation into
SMALLEST_GRID = 4  # positions along an axis that a CNN stops at


@dataclasses.dataclass(frozen=True)
class PatchEmbeddingParams(NetworkParams):
    """Size of a `PatchEmbedding`.

    Args:
        shape: of the part, with channels last: (length, ch), (rows, columns, ch), ...
        patch: size of a patch along each axis; None: as small as gives at most 16 tokens.
        features: per token.
    """

    shape: tuple[int, ...]
    patch: tuple[int, ...] | None = None
    features: int = 32

    def __post_init__(self) -> None:
        grid = _set_shape(self)
        patch = _default_patch(grid) if self.patch is None else tuple(self.patch)
        object.__setattr__(self, "patch", patch)
        if len(patch) != len(grid) or min(patch) < 1:
            raise ValueError(f"patch must have a size for each axis of {grid}; got {patch}.")


class PatchEmbedding(nnx.Module):
    """Patches of the part, each flattened and embedded alike (Dosovitskiy et al. 2010.11929, eq. 1, with one hidden layer); an edge that does not fill a patch
    is filled with zeros. Where a token lies is for the network's ids to say."""

    def __init__(self, params: PatchEmbeddingParams, rngs: nnx.Rngs | None = None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.params = params
        inputs = math.prod(params.patch or ()) * params.shape[-1]
        self.first = nnx.Linear(inputs, params.features, precision="highest", rngs=rngs)
        self.second = nnx.Linear(params.features, params.features, precision="highest", rngs=rngs)

    def __call__(self, x: Float[Array, "batch *shape"]) -> Float[Array, "batch tokens features"]:
        return self.second(jax.nn.gelu(self.first(self._cut(x))))

    def present(self, there: Bool[Array, "batch *shape"]) -> Bool[Array, "batch tokens"]:
        """Which tokens have any entry."""
        return self._cut(there).any(-1)

    def _cut(self, x: Array) -> Array:
        """[batch, patches, entries]."""
        *grid, channels = self.params.shape
        patch = self.params.patch or ()
        counts = [-(-n // p) for n, p in zip(grid, patch, strict=True)]
        over = [(0, c * p - n) for n, p, c in zip(grid, patch, counts, strict=True)]
        x = jnp.pad(x, [(0, 0), *over, (0, 0)])
        x = x.reshape(len(x), *(n for pair in zip(counts, patch, strict=True) for n in pair), channels)
        k = len(grid)
        x = x.transpose(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2), 2 * k + 1)
        return x.reshape(len(x), math.prod(counts), -1)


@dataclasses.dataclass(frozen=True)
class CNNParams(NetworkParams):
    """Size of a `CNN`.

    Args:
        shape: of the part, with channels last: (length, ch), (rows, columns, ch), ...
        width: channels after the first convolution; they double with every halving, up to `features`.
        features: per token.
    """

    shape: tuple[int, ...]
    width: int = 16
    features: int = 32

    def __post_init__(self) -> None:
        _set_shape(self)
        if min(self.width, self.features) < 1:
            raise ValueError(f"CNNParams needs width and features >= 1; got {self.width} and {self.features}.")


class CNN(nnx.Module):
    """A residual convolutional network (pre-activation, He et al. 1603.05027, with layer norm) that halves every long axis until it has at most 4
    positions; each is a token."""

    def __init__(self, params: CNNParams, rngs: nnx.Rngs | None = None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.params = params
        *grid, channels = params.shape
        three = (3,) * len(grid)

        def conv(
            before: int, after: int, strides: tuple[int, ...] | int = 1, kernel: tuple[int, ...] = three
        ) -> nnx.Conv:
            return nnx.Conv(before, after, kernel, strides, precision="highest", rngs=rngs)

        def norm(width: int) -> nnx.LayerNorm:
            return nnx.LayerNorm(width, rngs=rngs)

        width = min(params.width, params.features)
        self.stem = conv(channels, width)
        stages = []
        while max(grid) > SMALLEST_GRID:
            strides = tuple(2 if n > SMALLEST_GRID else 1 for n in grid)
            grid = [-(-n // s) for n, s in zip(grid, strides, strict=True)]
            wider = min(2 * width, params.features)
            stages.append(
                nnx.Dict(
                    norm=norm(width), first=conv(width, wider, strides), second=conv(wider, wider),
                    skip=conv(width, wider, strides, (1,) * len(grid)),
                )
            )  # fmt: skip
            width = wider
        self.stages = nnx.List(stages)
        self.norm = norm(width)
        self.last = nnx.Linear(width, params.features, precision="highest", rngs=rngs)

    def __call__(self, x: Float[Array, "batch *shape"]) -> Float[Array, "batch tokens features"]:
        h = self.stem(x)
        for stage in self.stages:
            u = jax.nn.gelu(stage["norm"](h))
            h = stage["skip"](h) + stage["second"](jax.nn.gelu(stage["first"](u)))
        h = self.last(jax.nn.gelu(self.norm(h)))
        return h.reshape(len(h), -1, h.shape[-1])


EMBEDDINGS: dict[str, tuple[Any, Any]] = {
    "CNN": (CNNParams, CNN),
    "PatchEmbedding": (PatchEmbeddingParams, PatchEmbedding),
}


@dataclasses.dataclass(frozen=True)
class EmbeddedParams:
    """What rebuilds an `Embedded`: the layout, and the parameters of each part's net (None: a user's own net); no nets: the observation goes in
    as it is."""

    layout: Layout
    nets: tuple[tuple[str, NetworkParams | None], ...] | None
    missing: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        nets = None if self.nets is None else {name: _described(params) for name, params in self.nets}
        return {"layout": self.layout.to_dict(), "nets": nets, "missing": self.missing}


class Embedded(Network):
    """A network that sees an observation through embedding nets.

    Args:
        network: what the tokens condition; its dim_x and ch_x are the number of tokens and their features. Or, with `nets` None, a
            user's own module whose `encode` takes the observation unpacked: an image, or a dict.
        nets: an embedding net for each part of the layout, by name ("" for an observation that is one array), or None.
        layout: what an observation looks like.

    Of an observation with missing entries a net gets zeros there; a net with `present(there)` says which tokens are left, any other
    loses all its tokens where its whole part is missing.

    Raises ValueError for nets of other parts, and for tokens that are not [batch, tokens, features] or do not fit the network.
    """

    def __init__(self, network: Any, nets: Mapping[str, Any] | None, layout: Layout):
        self.network, self.layout = network, layout
        self.nets = None if nets is None else nnx.Dict({key_of(name): net for name, net in nets.items()})
        self.dim_theta, self.ch_theta = network.dim_theta, network.ch_theta
        self.dim_x, self.ch_x = layout.packed
        described = None if nets is None else tuple((name, _params_of(net)) for name, net in sorted(nets.items()))
        self.params = EmbeddedParams(layout, described, takes_missing(network))
        if nets is not None:
            tokens, features = embedded_shape(nets, layout)
            if (tokens, features) != (network.dim_x, network.ch_x):
                raise ValueError(
                    f"the embedding gives {tokens} tokens of {features} features, the network takes {network.dim_x} of {network.ch_x}: "
                    f"leave params out, or make them with dim_cond={tokens} and {features} channels of the data."
                )

    @property
    def cpu_compiler_options(self) -> Mapping[str, str]:  # type: ignore[override]
        """Those of the network."""
        return getattr(self.network, "cpu_compiler_options", {})

    @property
    def exchangeable(self) -> bool:  # type: ignore[override]
        """Whether the observation is a set: one array, and what sees it first says so."""
        first = self.network if self.nets is None else next(iter(self.nets.values()))
        return self.layout.is_plain and getattr(first, "exchangeable", False)

    def encode(self, x: Float[Array, "batch size ch"], mask: Bool[Array, "batch size"] | None = None) -> Context:
        parts = self.layout.unpack(x)
        if self.nets is None:
            return self.network.encode(parts) if mask is None else self.network.encode(parts, self.layout.there(mask))
        by_name = parts if isinstance(parts, dict) else {"": parts}
        tokens = {name: self.nets[key_of(name)](part) for name, part in by_name.items()}
        joined = jnp.concatenate(list(tokens.values()), 1).astype(jnp.float32)
        if mask is None:
            return self.network.encode(joined)
        there = self.layout.there(mask)
        there = there if isinstance(there, dict) else {"": there}
        left = [_present(self.nets[key_of(name)], there[name], tokens[name].shape[1]) for name in tokens]
        return self.network.encode(joined, jnp.concatenate(left, 1))

    def __call__(
        self, t: Float[Array, "..."], theta_t: Float[Array, "batch draws dim_theta ch_theta"], context: Context
    ) -> Float[Array, "batch draws dim_theta ch_theta"]:
        return self.network(t, theta_t, context)


def embedded_shape(nets: Mapping[str, Any], layout: Layout) -> tuple[int, int]:
    """(tokens, features) that the nets make of an observation. Raises ValueError where they do not fit together."""
    if set(nets) != set(layout.names):
        raise ValueError(f"embedding nets are given for {sorted(nets)}, the data have the parts {list(layout.names)}.")
    found = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        where = f"the embedding net of {name!r}" if name else "the embedding net"
        if not isinstance(nets[name], nnx.Module) or not callable(nets[name]):
            raise ValueError(
                f"{where} must be a flax.nnx.Module that is called with an array; got {type(nets[name]).__name__}."
            )
        batch = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        try:
            out = nnx.eval_shape(lambda net, x: net(x), nets[name], batch)
        except Exception as error:
            raise ValueError(
                f"{where} fails on an input of shape (2, {', '.join(map(str, shape))}): {error}"
            ) from error
        if len(getattr(out, "shape", ())) != 3 or out.shape[0] != 2:
            raise ValueError(
                f"{where} must return (batch, tokens, features); for a batch of 2 it returned "
                f"{getattr(out, 'shape', type(out).__name__)}. A single vector is one token: add the axis with y[:, None]."
            )
        found[name] = out.shape[1:]
    features = {name: f for name, (_, f) in found.items()}
    if len(set(features.values())) > 1:
        raise ValueError(f"the embedding nets must give as many features each; got {features}.")
    return sum(n for n, _ in found.values()), next(iter(features.values()))


def default_nets(layout: Layout, kind: str, rngs: nnx.Rngs) -> dict[str, Any]:
    """A net for every part: `kind` "CNN" or "PatchEmbedding"."""
    make_params, make = EMBEDDINGS[kind]
    return {name: make(make_params(shape), rngs) for name, shape in zip(layout.names, layout.shapes, strict=True)}


def rebuild(described: Mapping[str, Any]) -> Any:
    """The net of this module that a dict in `EmbeddedParams.to_dict()["nets"]` stands for."""
    make_params, make = EMBEDDINGS[described["name"]]
    params = {k: tuple(v) if isinstance(v, list) else v for k, v in described["params"].items()}
    return make(make_params.from_dict(params))


def key_of(name: str) -> str:
    """Under which a part's net is kept: a path of the weights has no empty names."""
    return f"net_{name}"


def _params_of(net: Any) -> NetworkParams | None:
    return net.params if any(type(net) is cls for _, cls in EMBEDDINGS.values()) else None


def _described(params: NetworkParams | None) -> dict[str, Any] | None:
    if params is None:
        return None
    name = next(name for name, (make_params, _) in EMBEDDINGS.items() if type(params) is make_params)
    return {"name": name, "params": params.to_dict()}


def _present(net: Any, there: Array, tokens: int) -> Array:
    if hasattr(net, "present"):
        return net.present(there)
    return jnp.broadcast_to(there.reshape(len(there), -1).any(1, keepdims=True), (len(there), tokens))


def _set_shape(params: Any) -> tuple[int, ...]:
    """Checks `params.shape`; returns it without channels."""
    shape = tuple(int(n) for n in params.shape)
    object.__setattr__(params, "shape", shape)
    if len(shape) < 2 or min(shape) < 1 or params.features < 1:
        raise ValueError(
            f"{type(params).__name__} needs a shape with channels last, such as (32, 32, 1), and features >= 1; got {shape}, "
            f"{params.features}."
        )
    return shape[:-1]


def _default_patch(grid: tuple[int, ...]) -> tuple[int, ...]:
    patch = [1] * len(grid)
    while math.prod(-(-n // p) for n, p in zip(grid, patch, strict=True)) > MOST_TOKENS:
        longest = max(range(len(grid)), key=lambda i: -(-grid[i] // patch[i]))
        patch[longest] *= 2
    return tuple(patch)
