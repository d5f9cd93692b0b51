"""Every key derivation, once.

A draw's noise depends on (seed, observation id, draw index) and on nothing else:

    seed key --fold_in(high word)--fold_in(low word)--> observation key --fold_in(draw index)--> draw key

The seed key is always threefry2x32: its bits are the same on every device and in every program, whatever
`jax_default_prng_impl` says and whatever key type came in. An observation id is a 64-bit unsigned integer and is
folded in as two 32-bit words, because `jax.random.fold_in` truncates wider integers silently.

Training folds a tag of its purpose in first, so that no update has the key of an epoch:

    seed key --fold_in(UPDATES)--fold_in(step)--> split: data, augmentation, times, noise, pose
    seed key --fold_in(EPOCHS)--fold_in(epoch)--> shuffle
    key 0 --fold_in(VALIDATION)--fold_in(batch)--> split: times, noise, pose
    key 0 --fold_in(AUGMENTED)--fold_in(purpose)--fold_in(block)--> augmentation of pairs outside the updates

The pairs that `distsbi train` simulates before it trains, those that `distsbi check` does, and the updates of a student, whose seed is its own:

    seed key --fold_in(PAIRS)--> pairs
    seed key --fold_in(CHECKED)--> pairs that a run is checked with
    seed key --fold_in(step)--> split: data, noise, who begins a segment where, times --fold_in(segment)--> times of a segment

Simulations have a key for the theta of each block of rows, and one for the simulator at each row:

    seed key --fold_in(THETAS)--fold_in(high word)--fold_in(low word)--> theta of a block
    seed key --fold_in(SIMULATIONS)--fold_in(high word)--fold_in(low word)--> noise of a row
"""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

IMPL = "threefry2x32"
MAX_DRAWS = 2**32
UPDATES, EPOCHS, VALIDATION = 0x75706461, 0x65706F63, 0x76616C69  # "upda", "epoc", "vali"
AUGMENTED, FOR_SCALES, FOR_VALIDATION = 0x6175676D, 0, 1  # "augm", and its purposes
PAIRS, CHECKED = 2**31, 0x63686563  # "chec"
THETAS, SIMULATIONS = 0x74686574, 0x73696D75  # "thet", "simu"


def as_key(rng: object) -> Key[Array, ""]:
    """One threefry key from a typed key, a legacy `jax.random.PRNGKey` array or an integer seed.

    Keys of another generator (rbg, ...) are mapped to threefry through their own bits, deterministically. The two words of an integer
    seed are the key: that of `jax.random.key`, which without 64-bit numbers drops the high word.

    Raises ValueError if `rng` is none of these, holds more than one key, or is a seed outside 0 to 2**64 - 1.
    """
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return from_words(words_of(int(rng)))
    dtype = getattr(rng, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if rng.shape != ():  # type: ignore[attr-defined]
            raise ValueError(f"expected one key; got an array of keys of shape {rng.shape}. Pass keys[0].")  # type: ignore[attr-defined]
        data = jax.random.key_data(rng)  # type: ignore[arg-type]
        if jax.random.key_impl(rng) == IMPL:  # type: ignore[arg-type]
            return rng  # type: ignore[return-value]
    elif dtype is not None and dtype == np.uint32 and getattr(rng, "ndim", 0) == 1 and rng.shape[0] in (2, 4):  # type: ignore[attr-defined]
        data = jnp.asarray(rng)  # type: ignore[arg-type]
    else:
        given = f"an array of shape {rng.shape} and dtype {dtype}" if dtype is not None else repr(rng)  # type: ignore[attr-defined]
        raise ValueError(f"expected a key such as jax.random.key(0), or an integer seed; got {given}.")
    key = jax.random.wrap_key_data(data[:2], impl=IMPL)
    for word in data[2:]:
        key = jax.random.fold_in(key, word)
    return key


def key_words(key: object) -> tuple[int, int]:
    """The two 32-bit words of a key, plain integers: what a fingerprint or a JSON file keeps of a seed."""
    high, low = np.asarray(jax.random.key_data(as_key(key))).tolist()
    return int(high), int(low)


def from_words(words: Sequence[int]) -> Key[Array, ""]:
    """The key whose `key_words` are `words`."""
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(words, np.uint32)), impl=IMPL)


def words_of(seed: int) -> tuple[int, int]:
    """The words of an integer seed's key, without jax. Raises ValueError outside 0 to 2**64 - 1."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"an integer seed is expected to lie from 0 to 2**64 - 1; got {seed}.")
    return seed >> 32, seed & 0xFFFFFFFF


def seed_of(words: Sequence[int]) -> int:
    """The integer whose key has these words: `key_words(as_key(seed_of(words)))` are `words`."""
    high, low = words
    return (int(high) << 32) | int(low)


def split_id(ids: object) -> np.ndarray:
    """64-bit observation ids as (high, low) 32-bit words, shape `ids.shape + (2,)`.

    Raises ValueError for negative or non-integer ids.
    """
    array = np.asarray(ids)
    if array.dtype == object:  # Python integers past int64
        array = np.asarray([_checked_id(i) for i in array.ravel()], np.uint64).reshape(array.shape)
    if array.dtype.kind not in "iu" or (array.dtype.kind == "i" and array.size and array.min() < 0):
        raise ValueError(
            f"observation ids must be integers from 0 to 2**64 - 1 (of another id, distsbi.keys.hash_id of it); got {ids!r}."
        )
    wide = array.astype(np.uint64)
    return np.stack([wide >> np.uint64(32), wide & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def _checked_id(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**64:
        raise ValueError(
            f"observation ids must be integers from 0 to 2**64 - 1 (of another id, distsbi.keys.hash_id of it); got {value}."
        )
    return value


def hash_id(value: int | str | bytes) -> int:
    """The 64-bit observation id of a catalog's id, stable across machines and Python versions (blake2b).

    Integers and strings hash apart: 7 and "7" are different observations.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, str, bytes)):
        raise ValueError(f"a catalog id must be an integer or a string; got {value!r} ({type(value).__name__}).")
    tagged = b"b" + value if isinstance(value, bytes) else f"{'s' if isinstance(value, str) else 'i'}{value}".encode()
    return int.from_bytes(hashlib.blake2b(tagged, digest_size=8).digest(), "big")


def observation_key(key: Key[Array, ""], words: UInt32[Array, "2"]) -> Key[Array, ""]:
    """The key of one observation."""
    return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])


def draw_key(observation: Key[Array, ""], index: UInt32[Array, ""]) -> Key[Array, ""]:
    """The key of one draw of an observation."""
    return jax.random.fold_in(observation, index)


def draw_noise(
    key: Key[Array, ""], words: UInt32[Array, "2"], start: UInt32[Array, ""], draws: int, shape: tuple[int, ...]
) -> Float[Array, "draws ..."]:
    """Standard normal noise of the draws `start, ..., start + draws - 1` of one observation, float32."""
    observation = observation_key(key, words)
    indices = start + jnp.arange(draws, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.normal(draw_key(observation, i), shape, jnp.float32))(indices)


def step_noise(
    key: Key[Array, ""],
    words: UInt32[Array, "2"],
    start: UInt32[Array, ""],
    draws: int,
    shape: tuple[int, ...],
    step: UInt32[Array, ""],
) -> Float[Array, "draws ..."]:
    """What a stochastic solver adds to those draws in its step number `step`: one more fold of each draw's key, float32."""
    observation = observation_key(key, words)
    indices = start + jnp.arange(draws, dtype=jnp.uint32)
    fold = lambda i: jax.random.fold_in(draw_key(observation, i), step)  # noqa: E731
    return jax.vmap(lambda i: jax.random.normal(fold(i), shape, jnp.float32))(indices)


def training_keys(key: Key[Array, ""], step: Array) -> Key[Array, "5"]:
    """The five keys of a training update: data, augmentation, times, noise, pose."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, UPDATES), step), 5)


def epoch_key(key: Key[Array, ""], epoch: Array) -> Key[Array, ""]:
    """The key of an epoch's shuffle."""
    return jax.random.fold_in(jax.random.fold_in(key, EPOCHS), epoch)


def validation_keys(batch: Array) -> Key[Array, "3"]:
    """The three keys of a validation batch, the same in every validation of every run: times, noise, pose."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(as_key(0), VALIDATION), batch), 3)


def augmentation_key(purpose: int, block: int) -> Key[Array, ""]:
    """The key of the augmentation of a block of pairs outside the updates, the same in every run; `purpose`: FOR_SCALES or FOR_VALIDATION."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(as_key(0), AUGMENTED), purpose), block)


def pairs_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of pairs that are simulated for a training with this key."""
    return jax.random.fold_in(key, PAIRS)


def checked_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """Of the pairs that a run is checked with: no run was trained on them."""
    return jax.random.fold_in(key, CHECKED)


def student_keys(key: Key[Array, ""], step: Array) -> Key[Array, "4"]:
    """The four keys of a student's update: data, noise, which rows begin a segment where the student arrives, times."""
    return jax.random.split(jax.random.fold_in(key, step), 4)


def segment_key(times: Key[Array, ""], segment: int) -> Key[Array, ""]:
    """The key of one segment's times."""
    return jax.random.fold_in(times, segment)


def theta_key(key: Key[Array, ""], block: int) -> Key[Array, ""]:
    """The key of the theta of a block of simulations."""
    return observation_key(jax.random.fold_in(key, THETAS), jnp.asarray(split_id(block)))


def simulation_keys(key: Key[Array, ""], rows: object) -> Key[Array, "rows"]:
    """The simulator's key at each of these rows (integers)."""
    return _simulation_keys(key, split_id(rows))


@jax.jit
def _simulation_keys(key: Key[Array, ""], words: UInt32[Array, "rows 2"]) -> Key[Array, "rows"]:
    return jax.vmap(observation_key, (None, 0))(jax.random.fold_in(key, SIMULATIONS), words)
