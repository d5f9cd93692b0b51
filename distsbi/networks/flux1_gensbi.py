"""Weights of Flux1 in GenSBI's parameter tree, and back.

GenSBI holds one module per block, here identical blocks are stacked along a leading axis, so

    double_blocks/obs_mlp/in_layer/kernel  [depth, in, out]  <->  double_blocks/layers/i/obs_mlp/layers/0/kernel  [in, out], i < depth

and all other paths are the same but for the few words in `_WORDS`. Trees are flat dictionaries from tuples (as
`nnx.to_flat_state` orders them, block numbers as integers) to arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from distsbi.networks.flux1 import Flux1

Path = tuple[Any, ...]  # of strings and block numbers

_STACKED = ("double_blocks", "single_blocks")
_WORDS: dict[Path, Path] = {  # ours -> GenSBI's
    ("obs_mlp", "in_layer"): ("obs_mlp", "layers", 0),
    ("obs_mlp", "out_layer"): ("obs_mlp", "layers", 2),
    ("cond_mlp", "in_layer"): ("cond_mlp", "layers", 0),
    ("cond_mlp", "out_layer"): ("cond_mlp", "layers", 2),
    ("adaLN_modulation",): ("adaLN_modulation", "layers", 1),
    ("obs_ids_embedder",): ("obs_ids_embedder", "embedder", "embed"),
    ("cond_ids_embedder",): ("cond_ids_embedder", "embedder", "embed"),
}


def gensbi_paths(path: Path, blocks: int) -> tuple[Path, ...]:
    """GenSBI's paths of the parameter at `path`: one, or for stacked blocks one per block, in the order of the leading axis."""
    renamed = path
    for ours, theirs in _WORDS.items():
        for start in range(len(path) - len(ours) + 1):
            if path[start : start + len(ours)] == ours:
                renamed = path[:start] + theirs + path[start + len(ours) :]
    if renamed[0] not in _STACKED:
        return (renamed,)
    return tuple((renamed[0], "layers", i, *renamed[1:]) for i in range(blocks))


def to_gensbi(network: Flux1) -> dict[Path, np.ndarray]:
    """All parameters under GenSBI's paths."""
    tree: dict[Path, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        value = np.asarray(variable.get_value())
        paths = gensbi_paths(path, value.shape[0])
        tree.update(zip(paths, value if path[0] in _STACKED else [value], strict=True))
    return tree


def from_gensbi(network: Flux1, tree: Mapping[Path, Any]) -> Flux1:
    """`network` with the parameters of a GenSBI tree; entries that are no parameters (sinusoidal tables) are ignored.

    Only the shapes of `network` are read, so `nnx.eval_shape(lambda: Flux1(params))` serves as well.

    Raises ValueError naming the parameters that are missing or of another shape.
    """
    values: dict[Path, np.ndarray] = {}
    wrong = []
    graphdef, state = nnx.split(network)
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        paths = gensbi_paths(path, value.shape[0])
        shape = value.shape[1:] if path[0] in _STACKED else value.shape
        for p in paths:
            if p not in tree or np.shape(tree[p]) != shape:
                wrong.append(f"{'/'.join(map(str, p))} {shape}: {np.shape(tree[p]) if p in tree else 'missing'}")
        if not wrong:
            arrays = [np.asarray(tree[p], value.dtype) for p in paths]
            values[path] = np.stack(arrays) if path[0] in _STACKED else arrays[0]
    if wrong:
        raise ValueError(
            f"these weights do not belong to {network.params}; expected and found shapes: {'; '.join(wrong)}."
        )
    flat = {path: variable.replace(jnp.asarray(values[path])) for path, variable in nnx.to_flat_state(state)}  # type: ignore[index]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
