import jax
import numpy as np
import pytest

from distsbi import keys


def test_key_types_agree():
    typed = keys.as_key(jax.random.key(7))
    for other in (jax.random.PRNGKey(7), 7, np.int64(7), np.asarray(jax.random.PRNGKey(7))):
        assert keys.key_words(other) == keys.key_words(typed)
    assert jax.random.key_impl(keys.as_key(jax.random.key(7, impl="rbg"))) == keys.IMPL
    assert keys.key_words(jax.random.key(1, impl="rbg")) != keys.key_words(jax.random.key(2, impl="rbg"))
    assert keys.key_words(keys.from_words((3, 4))) == (3, 4)


@pytest.mark.parametrize("bad", [None, "0", 1.5, np.zeros(3), jax.random.split(jax.random.key(0)), True])
def test_bad_keys(bad):
    with pytest.raises(ValueError, match="expected"):
        keys.as_key(bad)


def test_seeds_past_32_bits_differ():
    seeds = (5, 2**31 + 5, 2**32 + 5, 2**33 + 5, 2**63 + 5, 2**64 - 1)
    assert len({keys.key_words(seed) for seed in seeds}) == len(seeds)
    assert [keys.seed_of(keys.key_words(seed)) for seed in seeds] == list(seeds)
    assert keys.key_words(2**32 - 1) == (0, 2**32 - 1)  # small seeds keep their keys
    assert keys.key_words(np.uint64(2**63 + 5)) == keys.key_words(2**63 + 5)


@pytest.mark.parametrize("bad", [-1, np.int64(-1), 2**64])
def test_seeds_out_of_range(bad):
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*64 - 1; got"):
        keys.as_key(bad)


def test_every_purpose_has_a_key_of_its_own():
    """Also apart from what a user's `augment` makes of its own key."""
    key, steps = keys.as_key(0), (0, 1, 0x5EED)
    updates = [k for step in steps for k in keys.training_keys(key, step)]
    augments = [k for step in steps for k in jax.random.split(keys.training_keys(key, step)[1], 5)]
    epochs = [keys.epoch_key(key, epoch) for epoch in range(5)]
    validation = [k for batch in (0, 1) for k in keys.validation_keys(batch)]
    augmented = [keys.augmentation_key(*where) for where in ((0, 0), (0, 1), (1, 0), (1, 1))]
    students = [k for step in steps for k in keys.student_keys(key, step)]
    students += [keys.segment_key(keys.student_keys(key, step)[3], k) for step in steps for k in (0, 1)]
    users = [key, *jax.random.split(key, 5)]
    every = (*updates, *augments, *epochs, *validation, *augmented, *students, keys.pairs_key(key), *users)
    found = [keys.key_words(k) for k in every]
    assert len(set(found)) == len(found)


def test_keys_of_pairs_and_students_are_pinned():
    """Runs of before were made with them; the default generator does not matter."""
    with jax.default_prng_impl("rbg"):
        key = keys.as_key(7)
        found = [keys.pairs_key(key), keys.student_keys(key, 3)[2], keys.segment_key(key, 1)]
        found = [keys.key_words(k) for k in found]
    key = jax.random.key(7)
    then = [
        jax.random.fold_in(key, 2**31),
        jax.random.split(jax.random.fold_in(key, 3), 4)[2],
        jax.random.fold_in(key, 1),
    ]
    assert found == [keys.key_words(k) for k in then]


def test_ids_past_32_bits_differ():
    low, high = keys.split_id(np.asarray([5, 5 + 2**32], np.uint64))
    assert low.tolist() == [0, 5]
    assert high.tolist() == [1, 5]
    key = jax.random.key(0)
    a, b = (np.asarray(keys.draw_noise(key, words, np.uint32(0), 4, (2,))) for words in (low, high))
    assert np.abs(a - b).min() > 0
    assert keys.split_id([2**64 - 1]).tolist() == [[2**32 - 1, 2**32 - 1]]


@pytest.mark.parametrize("bad", [[-1], [1.5], [2**64], ["a"]])
def test_bad_ids(bad):
    with pytest.raises(ValueError, match="observation ids"):
        keys.split_id(bad)


def test_noise_is_pinned_and_extends():
    """The numbers of a seed are a promise between versions."""
    words = keys.split_id(np.asarray(3))
    noise = np.asarray(keys.draw_noise(jax.random.key(0), words, np.uint32(0), 3, (2,)))
    longer = np.asarray(keys.draw_noise(jax.random.key(0), words, np.uint32(1), 4, (2,)))
    np.testing.assert_array_equal(noise[1:], longer[:2])
    np.testing.assert_allclose(noise.ravel(), PINNED, atol=1e-6)


def test_hash_id_is_stable():
    assert keys.hash_id("obs-1") == keys.hash_id("obs-1") != keys.hash_id("obs-2")
    assert keys.hash_id(7) == keys.hash_id(np.int64(7)) != keys.hash_id("7")
    assert 0 <= keys.hash_id(b"x") < 2**64
    with pytest.raises(ValueError, match="catalog id"):
        keys.hash_id(1.5)  # type: ignore[arg-type]


PINNED = [-0.15306504, -0.43513745, 0.29017648, -0.42220005, -0.57108516, -0.76929545]
