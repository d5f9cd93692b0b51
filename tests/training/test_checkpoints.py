"""Checkpoints: names that tell all leaves apart, and damaged or foreign directories that are refused with a sentence."""

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
        with pytest.raises(ValueError, match="checkpoint 1 in .* cannot be read .*remove its folder") as raised:
            checkpoints.restore(STATE)
    assert len(str(raised.value)) < 1_000
    assert "\n" not in str(raised.value)


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


def test_another_training_says_how_to_go_on(run_dir):
    with Checkpoints(run_dir, {"seed": 1, "data": 2}):
        pass
    with pytest.raises(ValueError, match=r"differs in seed\); choose another checkpoint_dir, also to go on training"):
        Checkpoints(run_dir, {"seed": 3, "data": 2})
