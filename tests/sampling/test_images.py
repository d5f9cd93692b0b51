"""Images and several instruments from training to catalog; a user's own embedding net."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from flax import nnx

from distsbi import (
    ConditionalPipeline,
    MLPFlowPipeline,
    Prior,
    SimformerFlowPipeline,
    load,
    open_catalog,
    sample_catalog,
)
from distsbi.cli import cli
from distsbi.data import write_pairs
from distsbi.networks import MLP, MLPParams

pytestmark = pytest.mark.optimised

PRIOR = Prior(row=dist.Uniform(0.0, 1.0), column=dist.Uniform(0.0, 1.0))
QUICK = {
    "nsteps": 30,
    "batch_size": 64,
    "val_every": 15,
    "calibrate": False,
    "show_progress": False,
    "optimizer": "adamw",
    "weight_decay": 0.0,
}
SMALL = {"width": 16, "depth": 1, "embed_depth": 0}
KEY = jax.random.key(7)
TWO = {"data": 2}
SIDE = 8


def simulate(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """theta, the image of a spot at theta, and a spectrum that knows its row."""
    draw = np.random.default_rng(seed)
    theta = draw.uniform(size=(n, 2, 1)).astype(np.float32)
    at = np.arange(SIDE) / SIDE
    squares = (at[None, :, None] - theta[:, :1]) ** 2 + (at[None, None, :] - theta[:, 1:]) ** 2
    image = np.exp(-squares / 0.05) + 0.05 * draw.normal(size=(n, SIDE, SIDE))
    spectrum = theta[:, :1] * [[1.0], [2.0], [3.0]] + 0.1 * draw.normal(size=(n, 3, 1))
    return theta, image[..., None].astype(np.float32), spectrum.astype(np.float32)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run on images, its pipeline, and the folder."""
    theta, image, _ = simulate(600)
    folder = tmp_path_factory.mktemp("images")
    pipeline = MLPFlowPipeline(
        (theta, image),
        None,
        2,
        (SIDE, SIDE),
        params=SMALL,
        prior=PRIOR,
        mesh=TWO,
        training_config={**QUICK, "nsteps": 150},
    )
    pipeline.train(nnx.Rngs(0))
    pipeline.save(folder / "run")
    return pipeline, folder


@pytest.fixture(scope="module")
def instruments(tmp_path_factory):
    theta, image, spectrum = simulate(300)
    folder = tmp_path_factory.mktemp("instruments")
    x = {"image": image, "spectrum": spectrum}
    pipeline = MLPFlowPipeline(
        (theta, x),
        None,
        2,
        {"image": (SIDE, SIDE), "spectrum": 3},
        params=SMALL,
        prior=PRIOR,
        mesh=TWO,
        training_config=QUICK,
        missing=True,
    )
    pipeline.train(nnx.Rngs(0))
    pipeline.save(folder / "run")
    return pipeline, folder


@pytest.mark.long
def test_an_image_says_where_the_spot_is(images):
    pipeline, _ = images
    theta, image, _ = simulate(50, seed=1)
    means = pipeline.sample_batched(KEY, image, 64, steps=4).mean(0)
    # the prior's sd is .29; draws of seed 1 that ignored the image would be at .29 and above
    assert np.sqrt(np.mean((means - theta) ** 2)) < 0.15


def test_a_loaded_run_draws_the_same_and_takes_images_with_or_without_a_channel_axis(images):
    pipeline, folder = images
    _, image, _ = simulate(3, seed=2)
    posterior = load(folder / "run", mesh={"data": 2})
    expected = pipeline.sample(KEY, image[:1], 40, steps=4)
    np.testing.assert_array_equal(posterior.sample(KEY, image[:1, ..., 0], 40, steps=4), expected)
    np.testing.assert_array_equal(posterior.sample_batched(KEY, image, 40, steps=4)[:, 0], expected)
    assert np.isfinite(posterior.log_prob(expected[:5], image[:1], steps=4)).all()
    assert posterior.fingerprint == pipeline.posterior.fingerprint


def test_a_catalog_of_images(images):
    pipeline, folder = images
    _, image, _ = simulate(6, seed=3)
    image[2, 0, 0] = np.nan
    np.save(folder / "catalog.npy", image[..., 0])
    result = sample_catalog(
        folder / "run",
        folder / "catalog.npy",
        folder / "out",
        nsamples=20,
        workers=0,
        id_column=None,
        steps=4,
        show_progress=False,
    )
    assert (result.n_ok, result.n_bad) == (5, 1)
    image[2] = 0.0
    expected = pipeline.sample_batched(0, image, 20, steps=4)
    np.testing.assert_array_equal(open_catalog(folder / "out").draws(4), expected[:, 4])


def test_a_folder_of_flat_rows_is_that_of_the_instruments(tmp_path):
    """What a simulator gives, which returns one array: the parts in alphabetical order."""
    theta, image, spectrum = simulate(40)
    write_pairs(tmp_path / "pairs", theta, np.concatenate([image.reshape(40, -1), spectrum[..., 0]], 1))
    options = {"params": SMALL, "prior": PRIOR, "mesh": TWO}
    sizes = {"spectrum": 3, "image": (SIDE, SIDE)}
    folder = MLPFlowPipeline(tmp_path / "pairs", None, 2, sizes, **options)
    arrays = MLPFlowPipeline((theta, {"image": image, "spectrum": spectrum}), None, 2, sizes, **options)
    for a, b in zip(folder._source.fit(), arrays._source.fit(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_instruments_and_one_that_is_missing(instruments):
    pipeline, folder = instruments
    _, image, spectrum = simulate(2, seed=4)
    posterior = load(folder / "run")
    x = {"spectrum": spectrum[:1], "image": image[:1]}
    expected = pipeline.sample(KEY, x, 30, steps=4)
    np.testing.assert_array_equal(posterior.sample(KEY, x, 30, steps=4), expected)
    blind = posterior.sample(KEY, {**x, "spectrum": spectrum[:1] * np.nan}, 30, steps=4)
    assert np.isfinite(blind).all()
    assert np.abs(blind - expected).max() > 0


def test_a_catalog_of_instruments_has_a_column_for_each(instruments):
    pipeline, folder = instruments
    _, image, spectrum = simulate(4, seed=5)
    columns = [
        pa.array(["a", "b", "c", "d"]),
        pa.FixedShapeTensorArray.from_numpy_ndarray(image),
        pa.array(list(spectrum[..., 0])),
    ]
    pq.write_table(pa.table(columns, names=["id", "image", "spectrum"]), folder / "catalog.parquet")
    result = sample_catalog(
        folder / "run", folder / "catalog.parquet", folder / "out", nsamples=20, workers=0, steps=4, show_progress=False
    )
    assert result.n_ok == 4
    catalog = open_catalog(folder / "out")
    rows = catalog.table(["id", "observation_id"]).to_pylist()
    observation_id = next(row["observation_id"] for row in rows if row["id"] == "c")
    x = {"image": image[2:3], "spectrum": spectrum[2:3]}
    expected = pipeline.sample(0, x, 20, observation_id=observation_id, steps=4)
    np.testing.assert_array_equal(catalog.draws("c"), expected)


class Summary(nnx.Module):
    """A user's own embedding net: one token."""

    def __init__(self):
        self.linear = nnx.Linear(2 * SIDE, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(jnp.concatenate([x[..., 0].mean(1), x[..., 0].mean(2)], -1))[:, None]


@pytest.mark.long
def test_a_users_own_embedding_net_is_trained_and_needed_to_load(tmp_path):
    theta, image, _ = simulate(200)
    pipeline = MLPFlowPipeline(
        (theta, image), None, 2, (SIDE, SIDE), params=SMALL, prior=PRIOR, mesh=TWO, training_config=QUICK,
        embedding=Summary(),
    )  # fmt: skip
    before = np.asarray(Summary().linear.kernel[...])
    pipeline.train(nnx.Rngs(0))
    assert np.abs(np.asarray(pipeline.model.nets["net_"].linear.kernel[...]) - before).max() > 1e-4
    pipeline.save(tmp_path / "run")
    with pytest.raises(ValueError, match="user's own embedding net; load it with load.path, network="):
        load(tmp_path / "run")
    expected = pipeline.sample(KEY, image[:1], 10, steps=2)
    for network in (Summary(), Summary, f"{__name__}:Summary"):
        np.testing.assert_array_equal(
            load(tmp_path / "run", network=network).sample(KEY, image[:1], 10, steps=2), expected
        )
    other = MLPFlowPipeline(None, None, 2, (SIDE, SIDE), params=SMALL, prior=PRIOR, mesh=TWO, embedding=Summary())
    np.testing.assert_array_equal(other.restore(tmp_path / "run").sample(KEY, image[:1], 10, steps=2), expected)


class OwnNetwork(nnx.Module):
    """Takes a dict of instruments as it is."""

    def __init__(self):
        self.of_x = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def encode(self, x):
        return self.of_x(x["spectrum"][..., 0])

    def __call__(self, t, theta_t, context):
        return theta_t * 0.1 + context[:, None, :, None]


def test_a_users_own_network_sees_the_instruments(tmp_path):
    theta, image, spectrum = simulate(200)
    pipeline = ConditionalPipeline(
        OwnNetwork(), (theta, {"image": image, "spectrum": spectrum}), None, 2, {"image": (SIDE, SIDE), "spectrum": 3},
        prior=PRIOR, mesh=TWO, training_config=QUICK,
    )  # fmt: skip
    pipeline.train(nnx.Rngs(0))
    pipeline.save(tmp_path / "run")
    x = {"image": image[:1], "spectrum": spectrum[:1]}
    expected = pipeline.sample(KEY, x, 10, steps=2)
    np.testing.assert_array_equal(load(tmp_path / "run", network=OwnNetwork).sample(KEY, x, 10, steps=2), expected)


@pytest.mark.long
def test_augment_sees_images_and_parquet_folders_hold_them(tmp_path):
    theta, image, _ = simulate(200)
    folder = write_pairs(tmp_path / "pairs", theta, image, rows_per_file=100)
    assert folder.x_shape == (SIDE, SIDE, 1)
    seen = []

    def augment(key, theta, x):
        seen.append(x.shape[1:])
        return theta, x + 0.1 * jax.random.normal(key, x.shape)

    pipeline = MLPFlowPipeline(
        tmp_path / "pairs", None, 2, (SIDE, SIDE), params=SMALL, prior=PRIOR, mesh=TWO, training_config=QUICK,
        augment=augment,
    )  # fmt: skip
    _, val_losses = pipeline.train(nnx.Rngs(0))
    assert np.isfinite(val_losses).all()
    assert set(seen) == {(SIDE, SIDE, 1)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t, x: MLPFlowPipeline((t, x), None, 2, (SIDE, 5)),
            r"x must have shape \(n, 8, 5, 1\); got \(40, 8, 8, 1\)",
        ),
        (lambda t, x: SimformerFlowPipeline((t, x), None, 2, (SIDE, SIDE)), "joint model"),
        (
            lambda t, x: MLPFlowPipeline((t, x), None, 2, (SIDE, SIDE), params=MLPParams(2, 3)),
            "the network takes 3 of 1",
        ),
        (lambda t, x: ConditionalPipeline(MLP(MLPParams(2, 3)), (t, x), None, 2, (SIDE, SIDE)), "give embedding="),
        (
            lambda t, x: MLPFlowPipeline((t, x), None, 2, (SIDE, SIDE), embedding={"a": Summary()}),
            r"a net for each of \[''\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    theta, image, _ = simulate(40)
    with pytest.raises(ValueError, match=message):
        make(theta, image)


def test_the_command_line_takes_what_sample_takes(images, instruments):
    """An observation as .npy or .npz, with the axis of one observation or without it."""
    _, image, spectrum = simulate(1, seed=8)

    def drawn(folder, name, save, x):
        save(folder / name, x) if save is np.save else save(folder / name, **x)
        words = [
            "sample",
            folder / "run",
            "--x",
            folder / name,
            "-n",
            9,
            "--steps",
            2,
            "--out",
            folder / "d.npy",
            "--overwrite",
        ]
        told = CliRunner().invoke(cli, [*map(str, words), "--mesh", "data=2"])
        assert told.exit_code == 0, told.output
        return np.load(folder / "d.npy")

    (of_images, folder), (of_both, other) = images, instruments
    for x in (image, image[0], image[..., 0], image[0, ..., 0]):
        np.testing.assert_array_equal(drawn(folder, "x.npy", np.save, x), of_images.sample(0, image, 9, steps=2))
    both = {"image": image, "spectrum": spectrum}
    for x in (both, {name: part[0] for name, part in both.items()}):
        np.testing.assert_array_equal(drawn(other, "x.npz", np.savez, x), of_both.sample(0, both, 9, steps=2))
    np.save(folder / "two.npy", np.concatenate([image, image]))
    told = CliRunner().invoke(
        cli, ["sample", str(folder / "run"), "--x", str(folder / "two.npy"), "--out", str(folder / "e.npy")]
    )
    assert "holds 2 observations and must hold one; for many use distsbi catalog" in str(told.exception) + told.output
    np.save(folder / "two.npy", np.zeros((1, 9, 9, 1)))
    told = CliRunner().invoke(
        cli, ["sample", str(folder / "run"), "--x", str(folder / "two.npy"), "--out", str(folder / "e.npy")]
    )
    assert "must have shape (n, 8, 8, 1); got (1, 9, 9, 1)" in str(told.exception) + told.output


def test_an_observation_of_another_shape_is_refused(images, instruments):
    _, image, _ = simulate(2)
    with pytest.raises(
        ValueError, match=r"x_o must have shape \(n, 8, 8, 1\); got \(8, 8, 1\). Add the axis with x_o\[None\]"
    ):
        images[0].sample(KEY, image[0], 10)
    with pytest.raises(ValueError, match="one observation"):
        images[0].sample(KEY, image, 10)
    with pytest.raises(ValueError, match=r"xs must be a dict of 'image'"):
        instruments[0].sample_batched(KEY, image, 10)
    with pytest.raises(ValueError, match="NaN or infinite"):
        images[0].sample(KEY, image[:1] * np.nan, 10)
