"""Weights of our networks in GenSBI's parameter trees, and back; and models written to GenSBI's call signature.

GenSBI holds one module per block, here identical blocks are stacked along a leading axis, so

    double_blocks/obs_mlp/in_layer/kernel  [depth, in, out]  <->  double_blocks/layers/i/obs_mlp/layers/0/kernel  [in, out], i < depth

and so on. Trees are flat dictionaries from tuples (as `nnx.to_flat_state` orders them, block numbers as integers) to arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distsbi.networks.base import Context, Network, broadcast_time
from distsbi.networks.simformer import Simformer

Path = tuple[Any, ...]  # of strings and block numbers

_STACKED = ("double_blocks", "single_blocks", "blocks")
_WORDS: dict[Path, Path] = {  # ours -> GenSBI's, for Flux1 and Flux1Joint
    ("obs_mlp", "in_layer"): ("obs_mlp", "layers", 0),
    ("obs_mlp", "out_layer"): ("obs_mlp", "layers", 2),
    ("cond_mlp", "in_layer"): ("cond_mlp", "layers", 0),
    ("cond_mlp", "out_layer"): ("cond_mlp", "layers", 2),
    ("adaLN_modulation",): ("adaLN_modulation", "layers", 1),
    ("obs_ids_embedder",): ("obs_ids_embedder", "embedder", "embed"),
    ("cond_ids_embedder",): ("cond_ids_embedder", "embedder", "embed"),
    ("ids_embedder",): ("ids_embedder", "embedder", "embed"),
}
_TABLES = ("pe", "pe_h", "pe_w", "B")  # sinusoidal ones; B is a parameter where it is asked for


def _is_parameter(path: Path) -> bool:
    """Whether it is one for GenSBI, and no table and no random number."""
    return path[-1] not in _TABLES and not ("rngs" in path and path[-1] in ("count", "key"))


def gensbi_paths(network: nnx.Module, path: Path, shape: tuple[int, ...]) -> list[Path]:
    """GenSBI's paths of the parameter at `path` of that shape: one, or for stacked blocks one per block, in the order of the leading
    axes."""
    if isinstance(network, Simformer):
        return _of_simformer(network, path, shape)
    renamed = path
    for ours, theirs in _WORDS.items():
        for start in range(len(path) - len(ours) + 1):
            if path[start : start + len(ours)] == ours:
                renamed = path[:start] + theirs + path[start + len(ours) :]
    if renamed[0] not in _STACKED:
        return [renamed]
    return [(renamed[0], "layers", i, *renamed[1:]) for i in range(shape[0])]


def _of_simformer(network: Simformer, path: Path, shape: tuple[int, ...]) -> list[Path]:
    if path[0] == "layer_norm":
        return [("transformer", *path)]
    if path[0] != "blocks":
        return [path]
    _, kind, part, *rest = path
    blocks = range(shape[0])
    if kind == "attention":
        inner = (part,) if part == "layer_norm" else ("attn", part)
        return [("transformer", "attention_blocks", i, *inner, *rest) for i in blocks]
    last = network.params.num_hidden_layers
    hidden = {"first": [0], "last": [last], "middle": range(1, last)}
    if part in hidden:
        return [("transformer", "dense_blocks", i, "hidden_blocks", j, *rest) for i in blocks for j in hidden[part]]
    return [("transformer", "dense_blocks", i, part, *rest) for i in blocks]


def to_gensbi(network: nnx.Module) -> dict[Path, np.ndarray]:
    """All parameters under GenSBI's paths."""
    tree: dict[Path, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        value = np.asarray(variable.get_value())
        paths = gensbi_paths(network, path, value.shape)
        tree.update(zip(paths, value.reshape(len(paths), *_own_shape(path, value.shape)), strict=True))
    return tree


def _own_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one block's part of a stacked parameter."""
    if path[0] not in _STACKED:
        return shape
    return shape[2:] if "middle" in path else shape[1:]


def from_gensbi(network: Any, tree: Mapping[Path, Any]) -> Any:
    """`network` with the parameters of a GenSBI tree; entries that are no parameters (sinusoidal tables, random numbers) are ignored.

    Only the shapes of `network` are read, so `nnx.eval_shape(lambda: Flux1(params))` serves as well.

    Raises ValueError naming the parameters that are missing, of another size, or left over.
    """
    values: dict[Path, np.ndarray] = {}
    wrong: list[str] = []
    left = {path for path, value in tree.items() if np.size(value) and _is_parameter(path)}
    graphdef, state = nnx.split(network)
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        paths = gensbi_paths(network, path, value.shape)
        shape = _own_shape(path, value.shape)
        for p in paths:
            left.discard(p)
            # heads are an axis of their own there
            if p not in tree or np.size(tree[p]) != int(np.prod(shape)) or not _same_ends(np.shape(tree[p]), shape):
                wrong.append(f"{'/'.join(map(str, p))} {shape}: {np.shape(tree[p]) if p in tree else 'missing'}")
        if not wrong:
            arrays = [np.asarray(tree[p], value.dtype).reshape(shape) for p in paths]
            values[path] = np.stack(arrays).reshape(value.shape)
    wrong += [f"{'/'.join(map(str, path))}: not a parameter of this network" for path in sorted(left, key=str)]
    if wrong:
        raise ValueError(
            f"these weights do not belong to {network.params}; expected and found shapes: {'; '.join(wrong)}."
        )
    flat = {path: variable.replace(jnp.asarray(values[path])) for path, variable in nnx.to_flat_state(state)}  # type: ignore[index]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _same_ends(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes agree but for heads split from the first or the last axis."""
    if len(found) == 2 and len(wanted) == 1:
        return True
    return found == wanted or (len(found) == len(wanted) + 1 and (found[0] == wanted[0] or found[-1] == wanted[-1]))


def read_safetensors(path: Any) -> dict[Path, np.ndarray]:
    """The arrays of a safetensors file under their paths, block numbers as integers.

    Raises ValueError if the file is missing or damaged; ImportError without safetensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "reading GenSBI's weights needs safetensors; install it with `pip install 'distsbi[gensbi]'`."
        ) from error
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {
                tuple(int(part) if part.isdigit() else part for part in name.split(".")): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118  (no mapping)
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); export it again with export_safetensors."
        ) from error


class GenSBIModel(Network):
    """A model written to GenSBI's signature, `model(t=, obs=, obs_ids=, cond=, cond_ids=)`, as a `Network`.

    It sees the data at every step, so nothing is encoded ahead. Ids [1, tokens, 2] are those of GenSBI's `ConditionalPipeline`: the index of the
    token, and 0 for parameters or 1 for data. For conditional models; joint ones (`node_ids`, `condition_mask`) are not taken.

    Args:
        model: the module; obs are the parameters [batch, dim_obs, ch_obs], cond the data [batch, dim_cond, ch_cond].
        dim_obs, dim_cond, ch_obs, ch_cond: their sizes.
    """

    def __init__(self, model: nnx.Module, dim_obs: int, dim_cond: int, ch_obs: int = 1, ch_cond: int = 1):
        self.model, self.params = model, None
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = dim_obs, ch_obs, dim_cond, ch_cond

    def encode(self, x: Float[Array, "batch dim_x ch_x"]) -> Context:
        return x

    def __call__(
        self, t: Float[Array, "..."], theta_t: Float[Array, "batch draws dim_theta ch_theta"], context: Context
    ) -> Float[Array, "batch draws dim_theta ch_theta"]:
        shape = theta_t.shape
        rows = lambda a: jnp.broadcast_to(a, (*shape[:2], *a.shape[2:])).reshape(-1, *a.shape[2:])  # noqa: E731
        sides = enumerate((self.dim_theta, self.dim_x))
        ids = [np.stack([np.arange(n), np.full(n, side)], -1)[None].astype(np.int32) for side, n in sides]
        out = self.model(  # type: ignore[operator]
            t=rows(broadcast_time(t)), obs=rows(theta_t), obs_ids=ids[0], cond=rows(context[:, None]), cond_ids=ids[1]
        )
        return out.reshape(shape)
