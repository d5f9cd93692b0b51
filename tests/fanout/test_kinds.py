"""Catalogs of every kind of run: channels, instruments, emulators; their draws are those of `sample_batched`."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from flax import nnx

from distsbi import open_catalog, sample_catalog
from distsbi.cli import cli
from distsbi.data import Standardizer
from distsbi.data.standardise import Support
from distsbi.fanout import catalog as catalog_module
from distsbi.methods import FlowMatching
from distsbi.networks import MLP, Flux1Joint, Flux1JointParams, MLPParams
from distsbi.networks.embedding import Embedded, default_nets, embedded_shape
from distsbi.networks.observation import Layout
from distsbi.sampling import Posterior, load
from distsbi.sampling.joint import JointPosterior
from tests.gaussian import random_mlp_posterior
from tests.weights import shaken

ONE = {"data": 1}
ROWS = 6
DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_loader(monkeypatch):
    monkeypatch.setattr(catalog_module, "LOADER", "tests.fanout.fake_posterior:load_on_one_device")


def mlp(layout: Layout) -> Posterior:
    """An untrained network of two parameters, whose draws depend on x."""
    dim_x, ch_x = layout.packed
    nets = None if layout.is_plain else default_nets(layout, "CNN", nnx.Rngs(1))
    tokens, features = (dim_x, ch_x) if nets is None else embedded_shape(nets, layout)
    network = shaken(lambda: MLP(MLPParams(2, tokens, ch_x=features, width=16, depth=2), nnx.Rngs(0)))
    theta, x = DRAW.normal(size=(50, 2, 1)), DRAW.normal(size=(50, dim_x, ch_x))
    scales = Standardizer.fit(theta.astype("f4"), x.astype("f4"), [Support()] * 2)
    return Posterior(network if nets is None else Embedded(network, nets, layout), FlowMatching(), scales, mesh=ONE)


def drawn(tmp_path, columns: dict, **options) -> tuple[Posterior, list[dict], dict[int, np.ndarray]]:
    """(the run as it is loaded, the rows of its catalog, the draws of the good ones)."""
    pq.write_table(pa.table({"id": np.arange(ROWS), **columns}), tmp_path / "in.parquet")
    sample_catalog(
        tmp_path / "run", tmp_path / "in.parquet", tmp_path / "out", nsamples=5, workers=0, id_column=None, show_progress=False, **options
    )  # fmt: skip
    found = open_catalog(tmp_path / "out")
    return load(tmp_path / "run", mesh=ONE), found.summary().to_pylist(), dict(found.items())


def same(run: Posterior, xs, draws: dict[int, np.ndarray]) -> None:
    expected = run.sample_batched(0, xs, 5, show_progress=False)
    assert len(draws) == ROWS
    np.testing.assert_array_equal(np.stack([draws[i] for i in range(ROWS)], 1), expected)


def test_a_column_for_each_channel(tmp_path):
    mlp(Layout.of(3, 2)).save(tmp_path / "run")
    flux, error = DRAW.normal(size=(2, ROWS, 3)).astype("f4")
    xs = np.stack([flux, error], 2)
    run, _, draws = drawn(tmp_path, {"flux": list(flux), "error": list(error)}, x_columns=["flux", "error"])
    same(run, xs, draws)


def test_channels_in_a_tensor_and_in_lists_of_lists(tmp_path):
    mlp(Layout.of(3, 2)).save(tmp_path / "run")
    xs = DRAW.normal(size=(ROWS, 3, 2)).astype("f4")
    for name, column in (("tensor", pa.FixedShapeTensorArray.from_numpy_ndarray(xs)), ("lists", xs.tolist())):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run").symlink_to(tmp_path / "run")
        run, _, draws = drawn(folder, {"x": column})
        same(run, xs, draws)


def test_values_on_one_axis_have_all_channels_of_an_entry_together(tmp_path):
    """A flat list, or a column for each entry."""
    mlp(Layout.of(3, 2)).save(tmp_path / "run")
    xs = DRAW.normal(size=(ROWS, 3, 2)).astype("f4")
    names = [f"{entry}{channel}" for entry in "abc" for channel in "01"]
    for name, columns, x_columns in (
        ("flat", {"x": list(xs.reshape(ROWS, 6))}, None),
        ("entries", {entry: list(xs[:, i]) for i, entry in enumerate("abc")}, ["a", "b", "c"]),
        ("scalars", dict(zip(names, xs.reshape(ROWS, 6).T, strict=True)), names),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run").symlink_to(tmp_path / "run")
        run, _, draws = drawn(folder, columns, x_columns=x_columns)
        same(run, xs, draws)


def test_columns_of_channels_are_as_long(tmp_path):
    mlp(Layout.of(3, 2)).save(tmp_path / "run")
    flux, error = DRAW.normal(size=(2, ROWS, 3)).tolist()
    flux[1].append(error[1].pop())  # six values still
    _, rows, draws = drawn(tmp_path, {"flux": flux, "error": error}, x_columns=["flux", "error"])
    assert sorted(draws) == [0, 2, 3, 4, 5]
    assert (rows[1]["status"], rows[1]["message"]) == (
        "invalid",
        "flux, error are one for each channel, so that each needs 3 values",
    )
    assert (
        open_catalog(tmp_path / "out").run["definition"]["channels"] == "a column each"
    )  # no folder of before goes on so


def test_as_many_channels_as_entries_are_not_guessed(tmp_path):
    mlp(Layout.of(2, 2)).save(tmp_path / "run")
    with pytest.raises(
        ValueError,
        match=r"a, b may be one for each channel or one for each entry, 2 of both; store x as one column of tensors \[2, 2\]",
    ):
        drawn(tmp_path, {"a": [[0.0, 1.0]] * ROWS, "b": [[0.0, 1.0]] * ROWS}, x_columns=["a", "b"])


def test_an_image_with_a_column_for_each_channel(tmp_path):
    mlp(Layout.of((8, 8), 2)).save(tmp_path / "run")
    xs = DRAW.normal(size=(ROWS, 8, 8, 2)).astype("f4")
    red, green = (pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(xs[..., i])) for i in (0, 1))
    run, _, draws = drawn(tmp_path, {"red": red, "green": green}, x_columns=["red", "green"])
    same(run, xs, draws)
    np.savez(tmp_path / "in.npz", id=np.arange(ROWS), red=xs[..., 0], green=xs[..., 1])
    sample_catalog(
        tmp_path / "run", tmp_path / "in.npz", tmp_path / "arrays", nsamples=5, workers=0, id_column=None, x_columns=["red", "green"], show_progress=False
    )  # fmt: skip
    same(run, xs, dict(open_catalog(tmp_path / "arrays").items()))


def test_instruments_in_any_order(tmp_path):
    mlp(Layout.of({"a": 2, "b": 3})).save(tmp_path / "run")
    a, b = DRAW.normal(size=(ROWS, 2)).astype("f4"), DRAW.normal(size=(ROWS, 3)).astype("f4")
    run, _, draws = drawn(tmp_path, {"a": list(a), "b": list(b)}, x_columns=["b", "a"])
    same(run, {"a": a, "b": b}, draws)


def test_a_driver_that_cannot_see_the_run_is_told_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "instruments", lambda run: None)
    mlp(Layout.of({"a": 2, "b": 3})).save(tmp_path / "run")
    with pytest.raises(ValueError, match="x_columns must be in the order of the instruments, a, b; got b, a"):
        drawn(tmp_path, {"a": [[0.0, 1.0]] * ROWS, "b": [[0.0, 1.0, 2.0]] * ROWS}, x_columns=["b", "a"])


def test_an_emulator_whose_prior_excludes_0(tmp_path):
    """theta of every row to x: one outside its prior is invalid, and said by its name."""
    params = Flux1JointParams(in_channels=1, dim_joint=4, num_heads=2, depth_single_blocks=1, val_emb_dim=8)
    network = shaken(lambda: Flux1Joint(params, nnx.Rngs(0)))
    bounds = [Support(1.0, 2.0), Support(1.0, 1e3)]
    theta = np.exp(DRAW.uniform(0, np.log([2.0, 1e3]), (50, 2)))
    tokens = np.concatenate([theta, DRAW.normal(size=(50, 2))], 1)[..., None].astype("f4")
    scales = Standardizer.fit(tokens, np.zeros((50, 0, 1), "f4"), [*bounds, Support(), Support()], linear=False)
    joint = JointPosterior(network, FlowMatching(), scales, 2, names=("mass", "flux"), mesh=ONE)
    emulator = joint.pattern(["theta"])
    emulator.save(tmp_path / "run")
    given = np.stack([np.linspace(1.1, 1.9, ROWS), np.geomspace(2, 900, ROWS)], 1)
    run, _, draws = drawn(tmp_path, {"x": list(given)})
    same(run, given[..., None], draws)
    assert run.given_names == emulator.given_names == ("mass", "flux")
    said = CliRunner().invoke(cli, ["info", str(tmp_path / "run")]).output
    assert "(2, 1): mass, flux, given" in said
    (tmp_path / "beyond").mkdir()
    (tmp_path / "beyond" / "run").symlink_to(tmp_path / "run")
    given[2, 0] = 3.0
    _, rows, draws = drawn(tmp_path / "beyond", {"x": list(given)})
    assert sorted(draws) == [0, 1, 3, 4, 5]
    assert (rows[2]["status"], rows[2]["message"]) == (
        "invalid",
        "mass is given as 3, outside its prior (1, 2); give a value inside.",
    )


def test_a_density_without_conditions_has_no_catalog(tmp_path):
    random_mlp_posterior(mesh=ONE, dim_x=1, unconditional=True).save(tmp_path / "run")
    for x in (np.zeros(ROWS), [[0.0, 1.0, 2.0]] * ROWS):
        with pytest.raises(ValueError, match="is a density without conditions, which no observation changes"):
            drawn(tmp_path, {"x": x})
