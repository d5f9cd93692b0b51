"""A row far outside the simulations has draws, and a message that they mean nothing."""

import shutil

import numpy as np
from click.testing import CliRunner

from distsbi import open_catalog, sample_catalog
from distsbi.cli import cli
from distsbi.fanout import catalog as catalog_module
from distsbi.store import layout
from tests.gaussian import random_mlp_posterior


def test_a_far_row_of_a_catalog_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "LOADER", "distsbi.sampling:load")
    random_mlp_posterior(facts={"x_extent": [1.0, 1.5, 1.0]}).save(str(tmp_path / "run"))
    xs = np.zeros((4, 3, 1), np.float32)
    xs[1], xs[2, 1] = np.nan, 900.0
    np.save(tmp_path / "xs.npy", xs)
    sample_catalog(tmp_path / "run", tmp_path / "xs.npy", tmp_path / "out", nsamples=5, workers=0, id_column=None)
    rows = open_catalog(tmp_path / "out").summary().to_pylist()
    assert [row["status"] for row in rows] == ["ok", "invalid", "ok", "ok"]
    assert rows[2]["message"].startswith("x lies far outside the simulations: its entry 1 (900) is ")
    assert rows[0]["message"] is None and rows[3]["message"] is None
    said = CliRunner().invoke(cli, ["status", str(tmp_path / "out")]).output
    assert "far      1 row ok, but x lies far outside the simulations\n" in said
    known = open_catalog(tmp_path / "out").status().reasons
    shutil.rmtree(layout.journal_folder(tmp_path / "out"), ignore_errors=True)
    layout.journal_file(tmp_path / "out").unlink()
    assert open_catalog(tmp_path / "out").status().reasons == known  # from the shards
