"""Makes gensbi_joint.npz: GenSBI's own velocities for small random joint networks, and a safetensors file of each. Run with GenSBI
0.5.1 installed (Python 3.12):

    python benchmarks/make_gensbi_joint.py

Weights are multiples of 1/256, so that the file is small and exact.
"""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gensbi.models.flux1joint.model import Flux1Joint, Flux1JointParams
from gensbi.models.simformer.model import Simformer, SimformerParams
from gensbi.utils.serialization import save_safetensors

TOKENS, GIVEN = 5, (2, 3, 4)
CASES = {
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
    mask = np.isin(np.arange(TOKENS), GIVEN)
    velocity = network(
        t=jnp.asarray(t), obs=jnp.asarray(values), node_ids=jnp.arange(TOKENS)[None, :, None] if make is Flux1Joint else jnp.arange(TOKENS)[None],
        condition_mask=jnp.asarray(mask)[None, :, None],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.safetensors"
        save_safetensors(network, file, wrt=nnx.Param)
        weights = np.frombuffer(file.read_bytes(), np.uint8)
    params = np.array(json.dumps({"class": make.__name__, **fields}))
    return dict(params=params, safetensors=weights, t=t, values=values, velocity=np.asarray(velocity))


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        made = {name: case(i, *parts) for i, (name, parts) in enumerate(CASES.items())}
    file = pathlib.Path(__file__).resolve().parent.parent / "tests/networks/fixtures/gensbi_joint.npz"
    np.savez_compressed(
        file, **{f"{name}/{key}": value for name, arrays in made.items() for key, value in arrays.items()}
    )
