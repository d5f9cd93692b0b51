"""Decoding what may be away for a moment (`distsbi.files.patiently`).

pyarrow raises the same errors for a page whose checksum differs as for a store that fails; so what cannot be decoded is read whole, and decoded
from memory: what fails then is the file's.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa

from distsbi.files import Damaged, patiently
from distsbi.store.place import Place

T = TypeVar("T")


def decoded(place: Place, decode: Callable[[Any], T]) -> T:
    """What `decode` makes of a file that it may read anywhere in. Raises Damaged naming the file, or OSError as `patiently`."""
    try:
        with place.open() as file:
            return decode(file)
    except MemoryError:  # Arrow's is one of its own exceptions too
        raise
    except Exception:  # damage, or a disk that does not answer
        content = patiently(place.read, place)
    try:
        return decode(pa.BufferReader(content))
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{place} cannot be read as Parquet ({error}); delete it and sample again.") from error
