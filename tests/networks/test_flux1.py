"""Flux1 against GenSBI's numbers, and the promises of one-way conditioning."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distsbi.networks.flux1 import Flux1
from distsbi.networks.flux1_params import Flux1Params
from distsbi.networks.gensbi import from_gensbi, gensbi_paths, to_gensbi
from tests.weights import shaken

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "gensbi_flux1.npz"
CASES = (
    "absolute",
    "concat",
    "concat_pos1d",
    "pos1d",
    "rope1d",
    "absolute_rope1d",
    "absolute_rope2d",
    "rope2d",
    "pos2d",
)
GRIDS = {"rope2d": {"obs_grid": (3, 1)}}
SMALL = Flux1Params(
    in_channels=1,
    context_in_dim=2,
    dim_obs=3,
    dim_cond=4,
    num_heads=2,
    axes_dim=(4, 2),
    mlp_ratio=2,
    depth=2,
    depth_single_blocks=2,
)
POOLED = dataclasses.replace(SMALL, pooled=True)
BATCH, DRAWS = 2, 5


def _conditioned(how: str) -> Flux1Params:
    return POOLED if how == "pooled" else dataclasses.replace(SMALL, conditioning=how)


def perturbed(params: Flux1Params, seed: int = 0) -> Flux1:
    return shaken(lambda: Flux1(params), seed)


@jax.jit
def predict(network, t, theta_t, x):
    return network(t, theta_t, network.encode(x))


def inputs(seed: int = 1) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (BATCH, DRAWS, 3, 1)), jax.random.normal(keys[1], (BATCH, 4, 2))


def gensbi_case(name: str) -> tuple[dict, dict, dict]:
    with np.load(FIXTURE, allow_pickle=False) as file:
        arrays = {key.split("/", 1)[1]: file[key] for key in file.files if key.startswith(name + "/")}
    tree, start = {}, 0
    for line in arrays["paths"]:
        path, sizes = str(line).split(" ")
        shape = tuple(int(n) for n in sizes.split(","))
        stop = start + int(np.prod(shape))
        key = tuple(int(word) if word.isdigit() else word for word in path.split("/"))
        tree[key] = (arrays["weights"][start:stop] / 256).astype(np.float32).reshape(shape)
        start = stop
    return json.loads(str(arrays["params"])), tree, arrays


@pytest.mark.parametrize("name", CASES)
def test_joint_equals_gensbi(name):
    fields, tree, arrays = gensbi_case(name)
    params = Flux1Params.from_dict(fields | {"conditioning": "joint"} | GRIDS.get(name, {}))
    network = from_gensbi(nnx.eval_shape(lambda: Flux1(params)), tree)
    t, theta, x = (jnp.asarray(arrays[part]) for part in ("t", "theta", "x"))
    with jax.default_matmul_precision("highest"):
        velocity = predict(network, t, theta[:, None], x)[:, 0]
    expected = arrays["velocity"]
    np.testing.assert_allclose(velocity, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    back = to_gensbi(network)
    assert back.keys() == tree.keys()
    assert all(np.array_equal(back[path], tree[path]) for path in tree)


def test_large_attention_is_the_small_one(monkeypatch):
    """The matrix-product form of attention gives what the element-wise form gives."""
    theta_t, x = inputs()
    for conditioning in ("one_way", "joint"):
        network = perturbed(dataclasses.replace(SMALL, conditioning=conditioning))
        elementwise = predict(network, 0.3, theta_t, x)
        with monkeypatch.context() as patch:
            patch.setattr("distsbi.networks.flux1_blocks.ELEMENTWISE_KEYS", 0)
            products = jax.jit(lambda net, t, y, x: net(t, y, net.encode(x)))(network, 0.3, theta_t, x)
        np.testing.assert_allclose(products, elementwise, atol=2e-5)


def test_gensbi_mapping_names_what_is_wrong():
    assert gensbi_paths(Flux1(SMALL), ("double_blocks", "obs_mlp", "out_layer", "kernel"), (2, 3, 3))[1] == (
        "double_blocks",
        "layers",
        1,
        "obs_mlp",
        "layers",
        2,
        "kernel",
    )
    network = perturbed(SMALL)
    tree = to_gensbi(network)
    del tree[("obs_in", "kernel")]
    with pytest.raises(ValueError, match=r"obs_in/kernel.*missing"):
        from_gensbi(network, tree)
    tree = {**to_gensbi(network), ("obs_in", "gain"): np.ones(3)}
    with pytest.raises(ValueError, match=r"obs_in/gain: not a parameter of this network"):
        from_gensbi(network, tree)


def test_both_conditionings_have_the_same_tree():
    one_way, joint = (
        nnx.state(Flux1(dataclasses.replace(SMALL, conditioning=c)), nnx.Param) for c in ("one_way", "joint")
    )
    assert jax.tree.structure(nnx.to_pure_dict(one_way)) == jax.tree.structure(nnx.to_pure_dict(joint))
    jax.tree.map(np.testing.assert_array_equal, one_way, joint)


def test_runs_of_before_there_were_pooled_data_describe_themselves_as_they_did():
    assert "pooled" not in SMALL.to_dict()
    assert POOLED.to_dict() == {**SMALL.to_dict(), "pooled": True}
    for params in (SMALL, POOLED):
        assert Flux1Params.from_dict(params.to_dict()) == params


def test_what_is_pooled():
    """Without its vector the network is the one that has none; the vector is of the tokens that are there."""
    theta_t, x = inputs()
    network, plain = perturbed(POOLED), perturbed(SMALL)
    assert network.encode(x)["pooled"].shape == (BATCH, SMALL.hidden_size)
    full = predict(network, 0.3, theta_t, x)
    jax.tree.map(
        lambda leaf: leaf.set_value(0 * leaf[...]),
        network.pooled_in["out_layer"],
        is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )
    bare = predict(network, 0.3, theta_t, x)
    assert np.abs(full - bare).max() > 1e-2
    nnx.update(plain, nnx.filter_state(nnx.state(network, nnx.Param), lambda path, _: path[0] != "pooled_in"))
    np.testing.assert_allclose(predict(plain, 0.3, theta_t, x), bare, atol=1e-6)

    some = perturbed(dataclasses.replace(POOLED, missing=True))
    mask = jnp.ones((BATCH, SMALL.dim_cond), bool).at[0, 1].set(False)
    one, other = (some.encode(x.at[0, 1].add(shift), mask)["pooled"] for shift in (0.0, 1.0))
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - some.encode(x)["pooled"])[0].max() > 1e-3
    assert np.isfinite(some.encode(x, jnp.zeros_like(mask))["pooled"]).all()


@pytest.mark.parametrize("conditioning", ["one_way", "pooled", "joint"])
@pytest.mark.parametrize("strategy", [("absolute", "absolute"), ("rope1d", "rope1d"), ("pos1d", "rope1d")])
def test_draws_are_independent(conditioning, strategy):
    network = perturbed(dataclasses.replace(_conditioned(conditioning), id_embedding_strategy=strategy))
    theta_t, x = inputs()
    context = jax.eval_shape(network.encode, x)
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(context))
    f = predict(network, 0.3, theta_t, x)
    assert f.shape == theta_t.shape and f.dtype == jnp.float32

    order = np.array([3, 1, 4, 0, 2])
    np.testing.assert_array_equal(predict(network, 0.3, theta_t[:, order], x), f[:, order])
    moved = predict(network, 0.3, theta_t.at[0, 2].add(1.0), x)
    changed = np.any(np.asarray(moved != f), (2, 3))
    assert changed[0, 2] and changed.sum() == 1
    # the observation matters, and only to its own draws
    other = predict(network, 0.3, theta_t, x.at[0].add(1.0))
    assert np.all(np.any(np.asarray(other[0] != f[0]), (1, 2)))
    np.testing.assert_allclose(other[1], f[1], atol=1e-5)
    # one draw of one observation alone gives the same
    alone = predict(network, 0.3, theta_t[1:, 2:3], x[1:])
    np.testing.assert_allclose(alone[0, 0], f[1, 2], atol=1e-5)


@pytest.mark.parametrize("conditioning", ["one_way", "pooled", "joint"])
def test_time_shapes_agree(conditioning):
    network = perturbed(_conditioned(conditioning))
    theta_t, x = inputs()
    scalar = predict(network, 0.7, theta_t, x)
    for shape in ((BATCH,), (BATCH, DRAWS)):
        np.testing.assert_allclose(predict(network, np.full(shape, 0.7, np.float32), theta_t, x), scalar, atol=1e-5)
    times = np.linspace(0, 1, BATCH * DRAWS, dtype=np.float32).reshape(BATCH, DRAWS)
    mixed = predict(network, times, theta_t, x)
    np.testing.assert_allclose(mixed[1, 3], predict(network, float(times[1, 3]), theta_t, x)[1, 3], atol=1e-5)
    assert np.abs(mixed - scalar).max() > 1e-2


@pytest.mark.parametrize("pooled", [False, True])
def test_scalar_time_computes_modulation_once(pooled):
    """No product with a modulation kernel is larger for more draws; of pooled data there is one for each observation."""
    network = perturbed(POOLED if pooled else SMALL)
    theta_t, x = inputs()
    jaxpr = jax.make_jaxpr(lambda t, th: network(t, th, network.encode(x)))(0.5, theta_t)
    kernel = (SMALL.depth, 6 * SMALL.hidden_size, SMALL.hidden_size)
    products = [
        e for e in jaxpr.eqns if e.primitive.name == "dot_general" and any(v.aval.shape == kernel for v in e.invars)
    ]
    sizes = {np.prod(e.outvars[0].aval.shape) // np.prod(kernel[:2]) for e in products}
    assert sizes == ({1, BATCH} if pooled else {1})  # the data's own are those of clean data, for all


@pytest.mark.parametrize("conditioning", ["one_way", "joint"])
def test_gradients_reach_every_parameter(conditioning):
    network = perturbed(dataclasses.replace(SMALL, conditioning=conditioning))
    theta_t, x = inputs()
    graphdef, state = nnx.split(network)

    def loss(state):
        network = nnx.merge(graphdef, state)
        return jnp.mean((network(jnp.linspace(0, 1, BATCH), theta_t, network.encode(x)) - 1.0) ** 2)

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        gradient = np.asarray(gradient[...])
        assert np.isfinite(gradient).all(), path
        blocks = gradient if path[0] in ("double_blocks", "single_blocks") else gradient[None]
        assert all(np.abs(block).max() > 0 for block in blocks), path


def test_starts_at_zero():
    network = Flux1(SMALL)
    theta_t, x = inputs()
    assert not np.any(predict(network, 0.5, theta_t, x))


def test_bfloat16_is_close_to_float32():
    theta_t, x = inputs()
    single, half = (perturbed(dataclasses.replace(SMALL, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    a, b = (predict(network, 0.4, theta_t, x) for network in (single, half))
    assert b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_minus_one_is_the_default_base_of_rope():
    """GenSBI's word for it, in Python as in its files."""
    assert dataclasses.replace(SMALL, theta=-1) == dataclasses.replace(SMALL, theta=None) == SMALL


def test_params_round_trip():
    params = dataclasses.replace(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(3), axes_dim=[4, 2])
    assert params.dtype == "bfloat16" and params.theta == 70 and params.hidden_size == 12
    again = Flux1Params.from_dict(json.loads(json.dumps(params.to_dict())))
    assert again == params and hash(again) == hash(params) and again.rngs is None
    kernels = [
        np.asarray(Flux1(p, rngs=r).obs_in["kernel"][...])
        for p, r in ((params, None), (SMALL, nnx.Rngs(3)), (SMALL, None))
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.any(kernels[0] != kernels[2])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(depth=0), "depth must be at least 1; got 0"),
        (dict(conditioning="both"), "'one_way', 'joint'; got 'both'"),
        (dict(id_embedding_strategy=("absolute", "rope3d")), "'rope2d', 'none'; got 'rope3d'"),
        (dict(id_embedding_strategy=("absolute", "rope2d")), "3 even axes_dim, .side, row, column"),
        (
            dict(id_embedding_strategy=("absolute", "pos2d"), cond_grid=(3, 2)),
            "cond_grid must be .rows, columns. of 4 tokens",
        ),
        (dict(id_embedding_strategy=("rope1d", "rope2d"), obs_grid=(3, 1)), "use one of them on both sides"),
        (dict(id_embedding_strategy=("absolute",)), "is a pair"),
        (dict(axes_dim=None), "needs axes_dim"),
        (dict(axes_dim=(6,), id_embedding_strategy=("rope1d", "absolute")), "2 even axes_dim"),
        (dict(id_merge_mode="concat"), "needs val_emb_dim and id_emb_dim"),
        (
            dict(id_merge_mode="concat", val_emb_dim=2, id_emb_dim=2, id_embedding_strategy=("rope1d", "absolute")),
            'use it, or "absolute"',
        ),
        (dict(theta=0), "theta must be positive, or None for 10 .dim_obs . dim_cond.; got 0"),
        (dict(theta=-2), "positive.*got -2"),
        (dict(theta="a"), "theta must be a number"),
        (dict(guidance_embed=True), "set guidance_embed=False"),
        (dict(pooled=True, conditioning="joint"), 'pooled goes with conditioning="one_way"'),
        (dict(dtype="float16"), "'float32', 'bfloat16'; got 'float16'"),
        (dict(num_heads=1, axes_dim=(3, 0), id_embedding_strategy=("pos1d", "absolute")), "even width"),
    ],
)
def test_params_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_wrong_shapes_are_refused():
    network = perturbed(SMALL)
    theta_t, x = inputs()
    with pytest.raises(ValueError, match=r"\(batch, 4, 2\); got \(2, 4\)"):
        network.encode(x[..., 0])
    with pytest.raises(ValueError, match=r"\(batch, draws, 3, 1\)"):
        predict(network, 0.5, theta_t[:, 0], x)
