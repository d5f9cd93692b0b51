"""Whether ids are all different, in bounded memory: eight bytes each, and no more than PASS_IDS of them at a time.

Ids are compared by a 64-bit hash; those whose hash occurs more than once are then compared themselves.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

PASS_IDS = 2**23  # 64 MB of hashes
BLOCK = 2**16  # hashes compared at a time


def repeated(chunks: Callable[[], Iterable[pa.Array]], n_rows: int) -> list[tuple[object, int]]:
    """Ids that occur more than once, each with how often, in order of first occurrence.

    `chunks`: all ids, from the beginning at every call: it is called once for every PASS_IDS rows, and once more if some repeat.
    """
    passes = max(1, -(-n_rows // PASS_IDS))
    suspects = np.empty(0, np.uint64)
    for number in range(passes):
        # of the passes each takes the ids with its own remainder: about as many each
        kept, size = np.empty(n_rows if passes == 1 else PASS_IDS + PASS_IDS // 8, np.uint64), 0
        for chunk in chunks():
            hashes = _hashes(chunk)
            hashes = hashes if passes == 1 else hashes[hashes % np.uint64(passes) == number]
            if size + len(hashes) > len(kept):
                kept = np.concatenate([kept[:size], np.empty(size + len(hashes), np.uint64)])
            kept[size : size + len(hashes)] = hashes
            size += len(hashes)
        kept = kept[:size]
        kept.sort()
        twice = [
            kept[i + 1 : i + BLOCK + 1][kept[i + 1 : i + BLOCK + 1] == kept[i : i + BLOCK][: size - i - 1]]
            for i in range(0, size - 1, BLOCK)
        ]
        suspects = np.union1d(suspects, np.concatenate(twice)) if twice else suspects
    counts: dict[object, int] = {}
    for chunk in chunks() if len(suspects) else ():
        for value in chunk.filter(pa.array(np.isin(_hashes(chunk), suspects))).to_pylist():
            counts[value] = counts.get(value, 0) + 1
    return [(value, count) for value, count in counts.items() if count > 1]


def _hashes(ids: pa.Array) -> np.ndarray:
    """uint64, the same for equal ids within this process."""
    if pa.types.is_integer(ids.type):
        values = ids.to_numpy(zero_copy_only=False).astype(np.uint64)
        return (values ^ (values >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)  # one to one
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids)).view(np.uint64)
