"""Images and instruments: packing, embedding nets, and what reaches the network."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st

from distsbi.data import Standardizer, Support
from distsbi.networks import CNN, MLP, CNNParams, Embedded, Layout, MLPParams, PatchEmbedding, PatchEmbeddingParams
from distsbi.networks.embedding import embedded_shape

INSTRUMENTS = Layout.of({"spectrum": 5, "image": (4, 6)}, {"spectrum": 2, "image": 3})


def batch(layout: Layout, n: int, seed: int = 0):
    draw = np.random.default_rng(seed)
    parts = {
        name: draw.normal(size=(n, *s)).astype(np.float32) for name, s in zip(layout.names, layout.shapes, strict=True)
    }
    return parts[""] if layout.names == ("",) else parts


@given(
    dims=st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        min_size=1,
        max_size=3,
    ),
    channels=st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_unpacking_undoes_packing(dims, channels):
    layout = Layout.of(dims, channels)
    x = batch(layout, 2)
    packed = layout.pack(x)
    assert packed.shape == (2, layout.size, 1)
    assert layout.size == sum(math.prod(d) * channels for d in dims.values())
    back = layout.unpack(packed)
    for name in dims:
        np.testing.assert_array_equal(back[name], x[name])
    np.testing.assert_array_equal(layout.join(back), packed)
    np.testing.assert_array_equal(layout.pack(packed), packed)
    assert Layout.from_dict(layout.to_dict()) == layout


def test_plain_observations_are_left_alone():
    layout = Layout.of(7, 2)
    x = np.zeros((3, 7, 2), np.float32)
    assert layout.is_plain and layout.packed == (7, 2)
    assert layout.pack(x) is x


@pytest.mark.parametrize(
    ("layout", "x", "message"),
    [
        (
            Layout.of((4, 4)),
            np.zeros((4, 4)),
            r"x must have shape \(n, 4, 4, 1\); got \(4, 4\). Add the axis with x\[None\]",
        ),
        (Layout.of((4, 4), 3), np.zeros((2, 4, 4)), r"\(n, 4, 4, 3\); got \(2, 4, 4\)"),
        (Layout.of((4, 4)), {"a": 1}, "got a dict of"),
        (INSTRUMENTS, np.zeros((2, 5, 2)), r"a dict of 'image' \(n, 4, 6, 3\), 'spectrum' \(n, 5, 2\)"),
        (INSTRUMENTS, {"image": np.zeros((2, 4, 6, 3))}, r"got \['image'\]"),
        (INSTRUMENTS, {"image": np.zeros((2, 4, 6, 3)), "spectrum": np.zeros((3, 5, 2))}, r"have \[2, 3\] rows"),
        (INSTRUMENTS, {"image": np.full((2, 4, 6, 3), "a"), "spectrum": 0}, "must hold real numbers"),
    ],
)
def test_other_observations_are_refused(layout, x, message):
    with pytest.raises(ValueError, match=message):
        layout.pack(x)


@pytest.mark.parametrize(
    ("dim", "channels", "message"),
    [
        ((4, 0), 1, "positive integers"),
        ({}, 1, "need a name"),
        ({"a": 3}, {"b": 1}, r"given for \['b'\]"),
        (3, {"a": 1}, "are one array"),
    ],
)
def test_other_layouts_are_refused(dim, channels, message):
    with pytest.raises(ValueError, match=message):
        Layout.of(dim, channels)


def test_scales_of_an_image_are_those_of_all_its_pixels():
    x = batch(INSTRUMENTS, 500)
    x["image"] = x["image"] * [1.0, 2.0, 3.0] + np.arange(6)[None, None, :, None]
    scales = Standardizer.fit(
        np.zeros((500, 1, 1)), INSTRUMENTS.pack(x), [Support()], decades=False, pool=INSTRUMENTS.pooled
    )
    parts = [INSTRUMENTS.unpack(a[None]) for a in (scales.x_mean, scales.x_std)]
    for part, of in zip(parts, (np.mean, np.std), strict=True):
        expected = np.broadcast_to(of(x["image"], axis=(0, 1, 2)), (4, 6, 3))
        np.testing.assert_allclose(part["image"][0], expected, rtol=1e-4)
        np.testing.assert_allclose(part["spectrum"][0], of(x["spectrum"], axis=0), rtol=1e-4)


def test_pixels_that_say_nothing_have_no_part_in_the_scales():
    """A border, a dead pixel and one that is always missing: of the others 1000 +- 10, whatever those are; the network sees 0 there."""
    layout = Layout.of((8, 8), 1)
    x = 1000 + 10 * np.random.default_rng(0).normal(size=(400, 8, 8, 1))
    inner = np.zeros((8, 8), bool)
    inner[2:6, 2:6] = True
    inner[3, 3] = inner[4, 4] = False
    x[:, ~inner] = 0.0
    x[:, 3, 3], x[:, 4, 4] = 5.0, np.nan
    x[::2, 5, 5] = np.nan  # missing now and then
    packed = layout.pack(x)
    scales = Standardizer.fit(np.zeros((400, 1, 1)), packed, [Support()], decades=False, pool=layout.pooled)
    np.testing.assert_allclose(scales.x_std, 10.0, rtol=0.03)
    np.testing.assert_allclose(scales.x_mean.reshape(8, 8)[inner], 1000.0, atol=1.0)
    seen = np.asarray(scales.forward_x(packed)).reshape(400, 8, 8)
    np.testing.assert_array_equal(np.nan_to_num(seen[:, ~inner]), 0)
    dark = Standardizer.fit(
        np.zeros((400, 1, 1)), 0 * np.nan_to_num(packed), [Support()], decades=False, pool=layout.pooled
    )
    np.testing.assert_array_equal(dark.x_std, 1)


@pytest.mark.parametrize(
    ("shape", "patch", "tokens"),
    [((6, 8, 3), (2, 4), 6), ((7, 3, 1), (4, 4), 2), ((9, 2), (4,), 3), ((16, 16, 1), None, 16)],
)
def test_a_patch_is_all_that_its_token_sees(shape, patch, tokens):
    net = PatchEmbedding(PatchEmbeddingParams(shape, patch, 8), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, *shape))
    out = net(x)
    assert out.shape == (2, tokens, 8)
    changed = net(x.at[0, ..., 0].set(x[0, ..., 0] + jnp.zeros(shape[:-1]).at[(0,) * (len(shape) - 1)].set(1.0)))
    moved = np.abs(np.asarray(changed - out)).max(-1) > 1e-6
    assert moved[0, 0]
    assert moved.sum() == 1
    there = jnp.ones((2, *shape), bool).at[1].set(False)
    np.testing.assert_array_equal(net.present(there), [[True] * tokens, [False] * tokens])


@pytest.mark.parametrize(("shape", "tokens"), [((16, 12, 2), 12), ((3, 1), 3), ((33, 1), 3), ((5, 4, 9, 1), 36)])
def test_a_cnn_ends_at_a_few_positions(shape, tokens):
    net = nnx.eval_shape(lambda: CNN(CNNParams(shape, 4, 8), nnx.Rngs(0)))
    assert nnx.eval_shape(lambda net, x: net(x), net, jax.ShapeDtypeStruct((2, *shape), jnp.float32)).shape == (
        2,
        tokens,
        8,
    )


class Mean(nnx.Module):
    def __init__(self, features: int = 8, axes: int = 1):
        self.linear = nnx.Linear(3, features, rngs=nnx.Rngs(0))
        self.axes = axes

    def __call__(self, x):
        out = self.linear(x.mean((1, 2)))
        return out[:, None] if self.axes else out


def nets(**changed):
    return {"image": Mean(), "spectrum": PatchEmbedding(PatchEmbeddingParams((5, 2), (2,), 8), nnx.Rngs(0))} | changed


def test_nets_of_several_instruments_make_one_sequence():
    network = Embedded(MLP(MLPParams(2, 4, ch_x=8, width=8, depth=1)), nets(), INSTRUMENTS)
    packed = jnp.asarray(INSTRUMENTS.pack(batch(INSTRUMENTS, 3)))
    parts = INSTRUMENTS.unpack(packed)
    tokens = jnp.concatenate([network.nets[f"net_{n}"](parts[n]) for n in ("image", "spectrum")], 1)
    assert tokens.shape == (3, 4, 8)
    np.testing.assert_allclose(network.encode(packed), network.network.encode(tokens), atol=1e-5)
    assert hash(nnx.graphdef(network)) == hash(nnx.graphdef(network))


def test_a_missing_part_loses_its_tokens():
    network = Embedded(MLP(MLPParams(2, 4, ch_x=8, width=8, depth=1, missing=True)), nets(), INSTRUMENTS)
    packed = jnp.asarray(INSTRUMENTS.pack(batch(INSTRUMENTS, 2)))
    mask = (
        INSTRUMENTS.join({"image": jnp.zeros((2, 4, 6, 3)), "spectrum": jnp.ones((2, 5, 2)).at[:, 2:4].set(0.0)})[
            ..., 0
        ]
        > 0
    )
    seen = []
    network.network.encode = lambda tokens, there: seen.append(there)  # type: ignore[method-assign]
    network.encode(packed, mask)
    np.testing.assert_array_equal(seen[0], [[False, True, False, True]] * 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": Mean()}, r"given for \['image'\], the data have the parts \['image', 'spectrum'\]"),
        (
            nets(image=Mean(axes=0)),
            r"must return \(batch, tokens, features\); for a batch of 2 it returned \(2, 8\).*y\[:, None\]",
        ),
        (nets(image=Mean(features=4)), r"as many features each; got \{'image': 4, 'spectrum': 8\}"),
        (nets(image=lambda x: x), "must be a flax.nnx.Module"),
        (nets(image=CNN(CNNParams((4, 6, 1)), nnx.Rngs(0))), r"'image' fails on an input of shape \(2, 4, 6, 3\)"),
    ],
)
def test_nets_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        embedded_shape(given, INSTRUMENTS)


def test_a_network_that_does_not_fit_its_embedding_is_refused():
    with pytest.raises(ValueError, match="4 tokens of 8 features, the network takes 5 of 1"):
        Embedded(MLP(MLPParams(2, 5, width=8, depth=1)), nets(), INSTRUMENTS)
