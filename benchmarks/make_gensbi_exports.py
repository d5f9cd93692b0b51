"""Writes GenSBI's own velocities for small random networks, and the safetensors file that its `export_safetensors` writes of each. Run by
`gensbi_numbers.py`, with GenSBI 0.5.1 installed (Python 3.12):

    python benchmarks/make_gensbi_exports.py gensbi_exports.npz 0

Weights are multiples of 1/256, so that the file is small and exact.
"""

import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gensbi.models.flux1.model import Flux1, Flux1Params
from gensbi.models.flux1joint.model import Flux1Joint, Flux1JointParams
from gensbi.models.simformer.model import Simformer, SimformerParams
from gensbi.recipes.utils import _resolve_embedding_ids
from gensbi.utils.serialization import save_safetensors

TOKENS, GIVEN = 5, (2, 3, 4)
FLUX1 = dict(
    in_channels=1, vec_in_dim=None, context_in_dim=1, mlp_ratio=2.0, num_heads=2, depth=1, depth_single_blocks=1, qkv_bias=True, dim_obs=2,
    dim_cond=3, axes_dim=(4, 0),
)  # fmt: skip
CASES = {
    "flux1": (Flux1, Flux1Params, FLUX1),
    "flux1_pos1d": (Flux1, Flux1Params, {**FLUX1, "id_embedding_strategy": ("absolute", "pos1d")}),
    "flux1joint_sum": (Flux1Joint, Flux1JointParams, dict(
        in_channels=1, vec_in_dim=None, mlp_ratio=2.0, num_heads=2, depth_single_blocks=2, val_emb_dim=4, cond_emb_dim=0,
        id_emb_dim=0, qkv_bias=True, dim_joint=TOKENS)),
    "flux1joint_concat": (Flux1Joint, Flux1JointParams, dict(
        in_channels=1, vec_in_dim=None, mlp_ratio=2.0, num_heads=2, depth_single_blocks=2, val_emb_dim=2, cond_emb_dim=1,
        id_emb_dim=2, qkv_bias=True, dim_joint=TOKENS, id_merge_mode="concat")),
    "simformer": (Simformer, SimformerParams, dict(
        in_channels=1, val_emb_dim=4, id_emb_dim=3, cond_emb_dim=2, dim_joint=TOKENS, num_heads=2, depth=2,
        num_hidden_layers=2, fourier_features=8, mlp_ratio=2, qkv_features=6)),
}  # fmt: skip


def case(seed: int, make: type, make_params: type, fields: dict) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    graphdef, state = nnx.split(make(make_params(rngs=nnx.Rngs(seed), dtype=jnp.float32, **fields)))
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        flat[path] = variable
        if issubclass(variable.type, nnx.Param):
            value = np.asarray(variable[...])
            integers = np.round((value + 0.15 * draw.normal(size=value.shape)) * 256)
            flat[path] = variable.replace(jnp.asarray(integers / 256, jnp.float32))
    network = nnx.merge(graphdef, nnx.from_flat_state(flat))
    t, values = np.abs(draw.normal(size=3)).astype(np.float32) % 1, draw.normal(size=(3, TOKENS, 1)).astype(np.float32)
    velocity = network(**_inputs(make, fields, jnp.asarray(values)), t=jnp.asarray(t))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.safetensors"
        # all that is in it, as `export_safetensors` has it; that of a Simformer fails on its random key, which is left out
        save_safetensors(network, file, wrt=nnx.Param if make is Simformer else None)
        weights = np.frombuffer(file.read_bytes(), np.uint8)
    params = np.array(json.dumps({"class": make.__name__, **fields}))
    return dict(params=params, safetensors=weights, t=t, values=values, velocity=np.asarray(velocity))


def _inputs(make: type, fields: dict, values: jax.Array) -> dict[str, jax.Array]:
    """The last three of five tokens are given."""
    if make is Flux1:
        sides = zip((2, 3), fields.get("id_embedding_strategy", ("absolute", "absolute")), strict=True)
        ids = [_resolve_embedding_ids(n, strategy, side, 1)[0] for side, (n, strategy) in enumerate(sides)]
        return {"obs": values[:, :2], "obs_ids": ids[0], "cond": values[:, 2:], "cond_ids": ids[1]}
    ids = jnp.arange(TOKENS)[None]
    mask = jnp.asarray(np.isin(np.arange(TOKENS), GIVEN))
    return {
        "obs": values,
        "node_ids": ids[..., None] if make is Flux1Joint else ids,
        "condition_mask": mask[None, :, None],
    }


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        made = {name: case(i + int(sys.argv[2]), *parts) for i, (name, parts) in enumerate(CASES.items())}
    np.savez_compressed(
        sys.argv[1], **{f"{name}/{key}": value for name, arrays in made.items() for key, value in arrays.items()}
    )
