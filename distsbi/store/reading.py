"""Reading what may be away for a moment. A disk or a store that does not answer is no damage, and nothing is removed for it.

pyarrow raises the same errors for a page whose checksum differs as for a store that fails; so what cannot be decoded is read whole, and decoded
from memory: what fails then is the file's.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa

from distsbi.store.place import Place

TRIES, PAUSE_SECONDS = 3, 0.5

T = TypeVar("T")


class Damaged(ValueError):
    """A file holds something else than was written."""


def patiently(read: Callable[[], T], what: object) -> T:
    """What `read` returns, tried TRIES times; Damaged passes at once.

    Raises OSError that names `what` if it cannot be read.
    """
    tries = 0
    while True:
        try:
            return read()
        except Damaged:
            raise
        except Exception as error:  # fsspec's stores raise errors of their own
            tries += 1
            if tries == TRIES:
                raise OSError(
                    f"{what} cannot be read now ({error}), which is no damage; try again when the disk or the store answers"
                ) from error
        time.sleep(PAUSE_SECONDS)


def decoded(place: Place, decode: Callable[[Any], T]) -> T:
    """What `decode` makes of a file that it may read anywhere in. Raises Damaged naming the file, or OSError as `patiently`."""
    try:
        with place.open() as file:
            return decode(file)
    except Exception:  # damage, or a disk that does not answer
        content = patiently(place.read, place)
    try:
        return decode(pa.BufferReader(content))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{place} cannot be read as Parquet ({error}); delete it and sample again.") from error
