"""How a catalog or a simulation stops before its end: SIGTERM is noted, whoever is at work looks at the note, and what ends it says how far it is."""

import contextlib
import dataclasses
import errno
import signal
import threading
from collections.abc import Iterator

from distsbi.files import is_disk_full
from distsbi.store import layout, record
from distsbi.store.place import Place


class Terminated(KeyboardInterrupt):
    """SIGTERM came, and the shards at work are finished. The message says how far it is."""

    exit_code = 128 + signal.SIGTERM


@dataclasses.dataclass
class Stop:
    """`told`: whether SIGTERM has come."""

    told: bool = False

    def check(self) -> None:
        """Raises Terminated if it has. For where no shard is at work."""
        if self.told:
            raise Terminated


@contextlib.contextmanager
def told_to_stop() -> Iterator[Stop]:
    """What the first SIGTERM is noted in; a second one interrupts. Outside the main thread, which alone may ask for signals, none is."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def take_note(*_: object) -> None:
        stop.check()
        stop.told = True

    before = signal.signal(signal.SIGTERM, take_note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def says_how_far(folder: Place) -> Iterator[None]:
    """What interrupts the block, or a full disk, says how far the folder is and that the same call goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        by = " by SIGTERM" if isinstance(stop, Terminated) else ""
        far = _so_far(folder)
        how = (
            " before anything was made; the same call begins again"
            if far is None
            else f"{far}; the same call goes on from there"
        )
        raise type(stop)(f"stopped{by}{how}.") from None
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk that holds {folder} is full{_so_far(folder) or ''}; free some space, and the same call goes on "
            "from there",
        ) from error


def _so_far(folder: Place) -> str | None:
    """ ", 12 of 100 shards are finished in out"; None before a run began; nothing where the folder does not tell now: what interrupts the
    block is not to be lost for that."""
    with contextlib.suppress(Exception):
        found = record.read_run(folder)
        if found is None:
            return None
        count = layout.shard_count(found["definition"]["n_rows"], found["definition"]["rows_per_shard"])
        return f", {len(layout.shards_done(folder, count))} of {count} shards are finished in {folder}"
    return ""
