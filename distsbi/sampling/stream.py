"""From many observations to a stream of finished draws, with bounded memory.

Work is the list of (observation, block of draws), observation by observation. Every dispatch takes the next slots of it; those
span at most two consecutive batches of encoded observations, so two context tables are alive at a time. While the host copies
one dispatch, the next is in flight. The last dispatch is filled up with the draws that would come next, and trimmed.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from distsbi import keys, mesh as meshes
from distsbi.sampling.flow import Schedule
from distsbi.sampling.tiles import Slots, Tile, Weights

IN_FLIGHT = 2


def stream(
    encode: Callable[[Weights, Array], Any],
    join: Callable[..., Any],
    program: Callable[..., Array],
    weights: Weights,
    schedule: Schedule,
    key: Array,
    xs: Float[np.ndarray, "batch dim_x ch_x"],
    ids: np.ndarray,
    nsamples: int,
    tile: Tile,
    mesh: jax.sharding.Mesh,
    payload: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    first_draw: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """Yields (observation [slots], first draw [slots], what the program made [slots, D, ...]) per dispatch.

    Draws are those from number `first_draw` on. `payload(observation, first draw)`: more input for the program, [slots, D, ...]. Slots past the end repeat the last observation's next draws; the caller drops draws at or past `first_draw + nsamples` and
    observations at or past `len(xs)`.
    """
    width = tile.slots * meshes.data_size(mesh)
    blocks = math.ceil(nsamples / tile.draws)
    total = len(xs) * blocks
    words = keys.split_id(ids)
    split = meshes.batch_sharding(mesh)
    whole = meshes.replicated(mesh)
    key, schedule = jax.device_put((key, schedule), whole)
    tables: dict[int, Any] = {}

    chunk = tile.encoded * meshes.data_size(mesh)

    def encoded(first: int) -> Any:
        rows = xs[first : first + chunk]
        rows = np.concatenate([rows, np.repeat(rows[-1:], chunk - len(rows), axis=0)])
        return encode(weights, jax.device_put(rows, split))

    def table(batch: int) -> Any:
        """The contexts of `width` observations; past the last one they repeat, which costs no encoding."""
        if batch not in tables:
            start, stop = batch * width, min((batch + 1) * width, len(xs))
            parts = [encoded(first) for first in range(start, stop, chunk)]
            parts += parts[-1:] * (width // chunk - len(parts))
            tables[batch] = parts[0] if len(parts) == 1 else join(*parts)
            for old in [b for b in tables if b < batch - 1]:
                del tables[old]
        return tables[batch]

    pending: deque[tuple[np.ndarray, np.ndarray, Any]] = deque()
    for first in range(0, total, width):
        index = first + np.arange(width)
        observation = np.minimum(index // blocks, len(xs) - 1)
        start = (index - observation * blocks) * tile.draws + first_draw
        low = int(observation[0]) // width
        high = min(low + 1, (len(xs) - 1) // width)
        needs_next = int(observation[-1]) // width > low
        slots = Slots(
            row=(observation - low * width).astype(np.int32),  # type: ignore[arg-type]
            words=words[observation],  # type: ignore[arg-type]
            start=start.astype(np.uint32),  # type: ignore[arg-type]
        )
        here = table(low)
        more = None if payload is None else jax.device_put(payload(observation, start), split)
        draws = program(
            weights, schedule, key, here, table(high) if needs_next else here, jax.device_put(slots, split), more
        )
        pending.append((observation, start, draws))
        if len(pending) >= IN_FLIGHT:
            yield _fetch(*pending.popleft())
    while pending:
        yield _fetch(*pending.popleft())


def _fetch(observation: np.ndarray, start: np.ndarray, made: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    return observation, start, jax.device_get(made)
