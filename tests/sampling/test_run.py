"""The run directory: what is saved is what is loaded, on any mesh; damage is named."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest

from distsbi.sampling import Tile, load, tiles
from tests.gaussian import GaussianNetwork, gaussian_posterior, random_mlp_posterior

X = np.ones((1, 3, 1), np.float32)


@pytest.fixture
def saved(run_dir):
    posterior = random_mlp_posterior(tile=Tile(4, 16), names=("mass", "spin"), facts={"seed": 1})
    posterior.save(run_dir)
    return posterior, run_dir


def test_round_trip_onto_another_mesh(saved):
    posterior, path = saved
    again = load(path, mesh={"data": 3})
    np.testing.assert_array_equal(again.sample(0, X, 77), posterior.sample(0, X, 77))
    assert again.fingerprint == posterior.fingerprint
    assert again.parameter_names == ("mass", "spin")
    assert again.facts == {"seed": 1}
    assert again.tile == Tile(4, 16)
    assert again.default_solver == posterior.default_solver
    posterior.save(path)  # over itself
    assert load(path).spec == posterior.spec


@pytest.mark.cpus
def test_each_kind_of_device_has_its_tile(saved, monkeypatch):
    """A run loaded on another kind than it was made on gets that kind's default, and keeps both; its identity is the same."""
    posterior, path = saved
    assert json.loads((path / "spec.json").read_text())["tile"] == {"cpu": {"slots": 4, "draws": 16}}
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "kind_name", lambda mesh: "gpu")
        there = load(path)
        assert there.tile == tiles.KINDS["gpu"].tile
        assert there.fingerprint == posterior.fingerprint
        there.tile = Tile(2, 32)  # a choice of this run's, for this kind
        there.save(path)
        assert load(path).tile == Tile(2, 32)
    both = {"cpu": Tile(4, 16), "gpu": Tile(2, 32)}
    again = load(path)
    assert (again.tile, again.tile_by_kind, again.fingerprint) == (Tile(4, 16), both, posterior.fingerprint)
    np.testing.assert_array_equal(again.sample(0, X, 77), posterior.sample(0, X, 77))
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "bytes_per_row", lambda *_: tiles.KINDS["tpu"].step_bytes / tiles.LIVE / 1_024)
        patch.setattr(tiles, "kind_name", lambda mesh: "tpu")
        assert load(path).tile == Tile(2, 512)  # as far as it fits
        assert set(load(path).spec["tile"]) == {"cpu", "gpu", "tpu"}


def test_the_spec_is_json_whatever_the_facts_are(run_dir):
    """A certificate of grids that all fail holds infinite errors."""
    facts = {
        "certificate": {"q95": np.inf, "candidates": [{"median": -np.inf, "steps": 8}]},
        "loss": np.nan,
        "steps": 3,
    }
    random_mlp_posterior(facts=facts).save(run_dir)

    def no_json(name):
        raise AssertionError(name)

    json.loads((run_dir / "spec.json").read_text(), parse_constant=no_json)
    again = load(run_dir).facts
    assert again["certificate"] == {"q95": None, "candidates": [{"median": None, "steps": 8}]}
    assert (again["loss"], again["steps"]) == (None, 3)


def test_nothing_is_pickled(saved):
    _, path = saved
    for file in path.rglob("*"):
        assert file.suffix not in (".pkl", ".pickle")
        assert not file.is_file() or not file.read_bytes().startswith(b"\x80\x04")


def test_a_users_own_network(run_dir):
    posterior = gaussian_posterior()
    posterior.save(run_dir)
    with pytest.raises(ValueError, match=r"load\(path, network="):
        load(run_dir)
    with pytest.raises(ValueError, match="cannot be imported"):
        load(run_dir, network="tests.gaussian:Nothing")
    assert load(run_dir, network="tests.gaussian:GaussianNetwork").fingerprint == posterior.fingerprint
    again = load(run_dir, network=lambda: GaussianNetwork(seed=5))
    x = np.ones((1, 2, 1))
    np.testing.assert_array_equal(again.sample(0, x, 10), posterior.sample(0, x, 10))


def test_a_users_module_without_sizes(run_dir):
    """Sizes that training gave it come from the run."""
    posterior = gaussian_posterior()
    posterior.save(run_dir)

    def bare():
        network = GaussianNetwork(seed=5)
        for size in ("dim_theta", "ch_theta", "dim_x", "ch_x"):
            delattr(network, size)
        return network

    x = np.ones((1, 2, 1))
    np.testing.assert_array_equal(load(run_dir, network=bare).sample(0, x, 10), posterior.sample(0, x, 10))


def _edit(path, change):
    spec = json.loads((path / "spec.json").read_text())
    change(spec)
    (path / "spec.json").write_text(json.dumps(spec))


DAMAGE = {
    "no such folder": (lambda p: shutil.rmtree(p), "no such folder"),
    "no spec": (lambda p: (p / "spec.json").unlink(), "no spec.json"),
    "unfinished": (lambda p: ((p / "spec.json").unlink(), (p / "checkpoints").mkdir()), "has not finished"),
    "cut short": (lambda p: (p / "spec.json").write_text((p / "spec.json").read_text()[:100]), "is damaged"),
    "missing key": (lambda p: _edit(p, lambda s: s.pop("method")), "is damaged"),
    "older": (lambda p: _edit(p, lambda s: s.update(format=4)), "run format 4 of an earlier distsbi.*Train again"),
    "older student": (
        lambda p: _edit(p, lambda s: s.update(format=5, facts={"student": {}})),
        "run format 5 of an earlier distsbi",
    ),
    "two names": (lambda p: _edit(p, lambda s: s.update(parameter_names=["a"])), "spec.json is damaged"),
    "newer": (lambda p: _edit(p, lambda s: s.update(format=99)), "Update distsbi"),
    "no weights": (lambda p: shutil.rmtree(p / "weights"), "missing or damaged"),
    "other weights": (lambda p: _edit(p, lambda s: s.update(weights_sha256="0")), "does not hold the weights"),
    "other scales": (lambda p: _edit(p, lambda s: s["standardizer"].update(x_mean=[[5.0]] * 3)), "was changed since"),
    "no kinds": (lambda p: _edit(p, lambda s: s["standardizer"].update(kinds=[])), "was changed since"),
    "no scales": (lambda p: _edit(p, lambda s: s.update(standardizer=[1, 2])), "is damaged"),
    "no times": (lambda p: _edit(p, lambda s: s["solver"].update(times=[])), "spec.json is damaged"),
    "one tile": (lambda p: _edit(p, lambda s: s.update(tile={"slots": 4, "draws": 16})), "spec.json is damaged"),
    "no tile": (lambda p: _edit(p, lambda s: s["tile"].update(gpu={"slots": 0, "draws": 16})), "spec.json is damaged"),
    "unknown network": (lambda p: _edit(p, lambda s: s["network"].update(name="Transformer9")), "does not have"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(saved, case):
    _, path = saved
    harm, says = DAMAGE[case]
    harm(path)
    with pytest.raises(ValueError, match=says):
        load(path)


def test_weights_changed_on_disk_are_noticed(saved):
    _, path = saved
    other = random_mlp_posterior(tile=Tile(4, 16))
    other.weights.params["bias2"][...] = other.weights.params["bias2"][...] + jax.numpy.float32(0.5)
    other.save(path.with_name("other"))
    mine, theirs = (next((p / "weights").iterdir()) for p in (path, path.with_name("other")))
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    with pytest.raises(ValueError, match="does not hold the weights"):
        load(path)


@pytest.mark.parametrize("moment", ["weights", "spec"])
def test_a_full_disk_keeps_what_was_there(saved, monkeypatch, moment):
    """The new weights are on the disk before the old ones go; a disk that is full says what to do."""
    posterior, path = saved

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if moment == "weights":
            patch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
        else:
            patch.setattr("distsbi.sampling.run.write_json", full)
        with pytest.raises(OSError, match="is full; free some space and save again"):
            posterior.save(path)
    assert load(path).fingerprint == posterior.fingerprint
    posterior.save(path)
    assert load(path).fingerprint == posterior.fingerprint
    assert len(list((path / "weights").iterdir())) == 1
