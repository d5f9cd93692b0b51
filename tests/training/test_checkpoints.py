"""Checkpoints: names that tell all leaves apart, and damaged or foreign directories that are refused with a sentence."""

import os
import shutil
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distsbi.training.checkpoints import Checkpoints, flatten

STATE = {
    "dense": [{"kernel": jnp.zeros(2)}, {"kernel": jnp.ones(2)}],
    "dense_1": {"kernel": 2 * jnp.ones(2)},
    "a/b.c%": jnp.arange(3),
}


def test_every_leaf_has_a_name_and_comes_back(run_dir):
    assert len(flatten(STATE)) == 4
    with Checkpoints(run_dir, {}) as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.manager.wait_until_finished()
        found = checkpoints.restore(jax.tree.map(jnp.zeros_like, STATE))
    jax.tree.map(np.testing.assert_array_equal, found, STATE)


def test_two_leaves_of_one_name_are_refused():
    @jax.tree_util.register_pytree_with_keys_class
    class Twins:
        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("twin"), i) for i in (1.0, 2.0)], None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls()

    with pytest.raises(ValueError, match=r"two weights of the network have one name, \.twin"):
        flatten(Twins())


def test_a_damaged_checkpoint_is_a_sentence(run_dir):
    with Checkpoints(run_dir, {}) as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.manager.wait_until_finished()
        for file in (run_dir / "checkpoints" / "1" / "default").glob("**/d/*"):
            file.write_bytes(b"12345")
        with pytest.raises(ValueError, match="checkpoint 1 in .* is damaged .*remove its folder"):
            checkpoints.restore(STATE)
        (run_dir / "checkpoints" / "1" / "default" / "sha256.json").unlink()
        with (
            pytest.warns(UserWarning, match="checkpoint 1 in .* has no checksums"),
            pytest.raises(ValueError, match="checkpoint 1 in .* cannot be read .*remove its folder") as raised,
        ):
            checkpoints.restore(STATE)
    assert len(str(raised.value)) < 1_000
    assert "\n" not in str(raised.value)


def _flip(file):
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-2])  # the last one may be a line feed


def _remove(file):
    file.unlink()


@pytest.mark.parametrize("alter", [_flip, _truncate, _remove])
def test_an_altered_file_is_named(run_dir, alter):
    """Every file that the state is restored from, and the checksums themselves; the step before is restored when the folder is removed."""
    state = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=10_000), jnp.float32)}
    with Checkpoints(run_dir, {}) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, {"kernel": state["kernel"] + 1})
    folder = run_dir / "checkpoints" / "2" / "default"
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "commit_success.txt"]
    assert max(file.stat().st_size for file in files) > 10_000  # the numbers are among them
    with Checkpoints(run_dir, {}) as checkpoints:
        for file in files:
            if file.name == "sha256.json" and alter is _remove:
                continue  # as a step of an older version
            content = file.read_bytes()
            alter(file)
            with pytest.raises(ValueError, match=rf"checkpoint 2 in .* is damaged \({file.relative_to(folder)} "):
                checkpoints.restore(state)
            file.write_bytes(content)
        np.testing.assert_array_equal(checkpoints.restore(state)["kernel"], state["kernel"] + 1)
    shutil.rmtree(folder.parent)
    with Checkpoints(run_dir, {}) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(state)["kernel"], state["kernel"])


def test_whatever_orbax_raises_is_a_sentence(run_dir, monkeypatch):
    with Checkpoints(run_dir, {}) as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.manager.wait_until_finished()

        def restore(*args, **options):
            raise Exception("no such driver\n" + "page\n" * 1_000)

        monkeypatch.setattr(checkpoints.manager, "restore", restore)
        with pytest.raises(ValueError, match=r"cannot be read \(no such driver\); remove its folder"):
            checkpoints.restore(STATE)


LINE = b'{"step": 10, "loss": 1.0, "val_loss": 2.0}\n'


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 20, "lo', b"\xff\xfe\x00\n", b'{"loss": 1.0}\n', b"3\n", b'{"step": null, "loss": 1, "val_loss": 1}\n'],
)
def test_damaged_metrics_are_cut_off(run_dir, tail):
    with Checkpoints(run_dir, {}) as checkpoints:
        (run_dir / "metrics.jsonl").write_bytes(LINE + tail)
        assert [line["step"] for line in checkpoints.history(100)] == [10]
    assert (run_dir / "metrics.jsonl").read_bytes() == LINE


def test_a_finished_run_is_not_trained_over(run_dir):
    run_dir.mkdir()
    (run_dir / "spec.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a finished run .* give another checkpoint_dir, or remove it"):
        Checkpoints(run_dir, {})
    assert [file.name for file in run_dir.iterdir()] == ["spec.json"]


def test_one_training_at_a_time(run_dir):
    """A second one, of the same command, leaves alone what the first is writing, and goes on when that has ended."""
    with Checkpoints(run_dir, {}) as first:
        first.save(1, STATE)
        with pytest.raises(ValueError, match=rf"{run_dir} is being written by process {os.getpid()} on .*; wait, or"):
            Checkpoints(run_dir, {})
    with Checkpoints(run_dir, {}) as second:
        jax.tree.map(np.testing.assert_array_equal, second.restore(STATE), STATE)


def test_a_refused_directory_is_let_go(run_dir, monkeypatch):
    """An error after the lock was taken."""
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no such driver"):
        patched.setattr("orbax.checkpoint.CheckpointManager", fail := Mock(side_effect=OSError("no such driver")))
        Checkpoints(run_dir, {})
    assert fail.called
    with Checkpoints(run_dir, {}):
        pass


def test_another_training_says_how_to_go_on(run_dir):
    told = {
        "seed": [0, 1],
        "data": 40 * "a",
        "config": {"nsteps": 400, "batch_size": 8},
        "network": ["MLP", {"width": 8}],
    }
    with Checkpoints(run_dir, told):
        pass
    other = {
        **told,
        "seed": [0, 2],
        "data": 40 * "b",
        "config": {"nsteps": 500, "batch_size": 8},
        "network": ["Flux1", {"depth": 1}],
    }
    differing = "nsteps: given 500, found 400, data, network: given Flux1, found MLP, seed"
    with pytest.raises(ValueError, match=rf"differs in {differing}\); choose another checkpoint_dir, also to go on"):
        Checkpoints(run_dir, other)
