"""What lies in an output folder, every file name once, and its journal.

    out/  shard-00000007-of-00000120.parquet     rows with their results; there if and only if complete
          .shard-00000007-of-00000120.parquet.*  being written (local disks, as in the folders below); readers ignore it, the next start
                                                 removes it
          _distsbi/  run.json                    what defines the draws (or pairs), and where they come from
                     failures/shard-*.parquet    simulations: rows of that shard that are no pairs, and why; written before it
                     journal.jsonl               local disks: one line per event (a shard done, failed, searched, found bad, ...)
                     journal/*.jsonl             object stores, where nothing can be appended: the same lines in batches
                     lock, lease.json            held by the one process that fills the folder (writer.py)

Names that begin with a dot or an underscore are no data to pyarrow and Ray Data, so that both read the folder as it is;
polars and duckdb take "out/*.parquet".
"""

import contextlib
import json
import logging
import os
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from distsbi.files import is_disk_full, patiently, sync_folder
from distsbi.store.place import Place, as_place

HIDDEN = "_distsbi"
BATCH_SECONDS, BATCH_LINES = 10.0, 1_000  # of the journal in an object store: between writes, and in one object
RETRY_SECONDS = 5.0  # after a write of it that failed
READERS = 16  # objects of the journal read at a time
_SHARD = re.compile(r"^shard-(\d{8})-of-(\d{8})\.parquet$")
_PARTIAL = re.compile(r"^\.shard-\d{8}-of-\d{8}\.parquet\.[0-9a-f]+$")
_OWN_PARTIAL = re.compile(r"^\..+\.[0-9a-f]{32}$")  # in our own folders, of any file (distsbi.files.write_whole)

log = logging.getLogger("distsbi")

Folder = TypeVar("Folder", Path, Place)
Where = str | os.PathLike[str] | Place


def run_file(out: Folder) -> Folder:
    return out / HIDDEN / "run.json"


def journal_file(out: Folder) -> Folder:
    """On local disks."""
    return out / HIDDEN / "journal.jsonl"


def journal_folder(out: Folder) -> Folder:
    """In object stores."""
    return out / HIDDEN / "journal"


def shard_file(out: Folder, shard: int, shards: int) -> Folder:
    return out / f"shard-{shard:08d}-of-{shards:08d}.parquet"


def failures_file(shard: Path) -> Path:
    """Beside a shard of simulations, on local disks."""
    return shard.parent / HIDDEN / "failures" / shard.name


def shard_sizes(out: Where, shards: int) -> dict[int, int]:
    """The shards that are there, ascending, with their bytes.

    Raises ValueError if the folder has shards of another division.
    """
    found = {}
    for file in as_place(out).files():
        match = _SHARD.match(file.name)
        if match and int(match[2]) != shards:
            raise ValueError(
                f"{out} has a file {file.name} of another division (this run has {shards} shards); use another folder."
            )
        if match:
            found[int(match[1])] = file.size
    return dict(sorted(found.items()))


def strays(folder: Path, shards: int) -> list[Path]:
    """The Parquet files in a folder on local disks that are none of so many shards, but would be read with them."""
    names = ((file, _SHARD.match(file.name)) for file in folder.glob("*.parquet") if file.name[0] not in "._")
    return sorted(file for file, its in names if not its or int(its[2]) != shards or int(its[1]) >= shards)


def shards_done(out: Where, shards: int) -> list[int]:
    """The numbers of the shards that are there, ascending. Raises as `shard_sizes`."""
    return list(shard_sizes(out, shards))


def shard_count(n_rows: int, rows_per_shard: int) -> int:
    """How many shards so many rows make.

    >>> shard_count(7, 3)
    3
    """
    return -(-n_rows // rows_per_shard)


def shard_rows(shard: int, n_rows: int, rows_per_shard: int) -> range:
    """The rows of a shard."""
    return range(shard * rows_per_shard, min((shard + 1) * rows_per_shard, n_rows))


def is_shard(name: str) -> bool:
    return _SHARD.match(name) is not None


def remove_partial(out: Where) -> int:
    """Removes what interrupted attempts left. Returns how many. Only for who holds the lock.

    In an object store nothing is seen of them; uploads that were cut off are cleared by a rule of the bucket for
    incomplete multipart uploads.
    """
    place = as_place(out)
    if not place.local:
        return 0
    own = place / HIDDEN
    folders = ((place, _PARTIAL), (own, _OWN_PARTIAL), (own / "failures", _OWN_PARTIAL))
    left = [folder / file.name for folder, names in folders for file in folder.files() if names.match(file.name)]
    for file in left:
        file.remove()
    return len(left)


class Journal:
    """What happened, a line each, written by the one process that holds the folder.

    On local disks a line is appended at once. In an object store lines are kept for up to BATCH_SECONDS and written as one object,
    which grows up to BATCH_LINES: what a kill loses of it are lines, never shards, which are there by themselves. A disk or a store that does
    not take them gets them later; if it still does not at the end of a block that ended well, this raises OSError. A full disk raises it at once.
    """

    def __init__(self, out: Where):
        self._out = as_place(out)
        self._lines: list[str] = []
        self._fresh = self._sync = False
        self._due = time.monotonic() + BATCH_SECONDS
        self._failing = False
        self._object = self._name()
        self._size: int | None = None  # of a local file, up to which its lines are whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:  # what ends the block is what must be seen
            with contextlib.suppress(OSError):
                self._try_flush()
            return
        try:
            self.flush()
        except Exception as error:
            if is_disk_full(error):
                raise
            raise OSError(
                f"the journal of {self._out} cannot be written ({error}); its shards are whole, so give the same call again "
                "when the disk or the store takes files."
            ) from error

    def add(self, line: dict[str, Any], *, now: bool = False) -> None:
        """Adds a line, with the time (seconds since 1970). `now`: it outlives a crash of the machine as soon as this returns, unless the disk
        or the store does not take it now. Other lines outlive that of the process, on local disks.

        Raises OSError if a disk is full.
        """
        self._lines.append(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
        self._fresh, self._sync = True, self._sync or now
        if (now or self._out.local) and not self._failing:
            self._due = 0.0
        self.tick()

    def tick(self) -> None:
        """Writes what is due; what cannot be written is kept, and due again in RETRY_SECONDS. Raises OSError if a disk is full."""
        if self._fresh and time.monotonic() >= self._due:
            self._try_flush()

    def flush(self) -> None:
        """Writes what is not written yet. Raises OSError, or what fsspec's stores raise, if it is not taken; it is kept."""
        if not self._fresh:
            return
        content = "".join(self._lines).encode()
        if self._out.local:
            self._append(journal_file(Path(self._out.path)), content)
        else:
            (journal_folder(self._out) / self._object).write(content)
        self._fresh = self._failing = self._sync = False
        self._due = time.monotonic() + BATCH_SECONDS
        if self._out.local or len(self._lines) >= BATCH_LINES:
            self._lines, self._object = [], self._name()

    def _try_flush(self) -> None:
        try:
            self.flush()
        except Exception as error:
            if is_disk_full(error):
                raise
            if not self._failing:
                log.warning(
                    "the journal of %s cannot be written now, and is kept and tried again: %s", self._out, error
                )
            self._failing, self._due = True, time.monotonic() + RETRY_SECONDS

    def _append(self, path: Path, content: bytes) -> None:
        new = not path.exists()
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if self._size is None:
                self._size = end
            elif self._failing and end > self._size:  # what the attempt before left
                end = file.truncate(self._size)
            if end and (file.seek(end - 1), file.read(1))[1] != b"\n":  # what a crash tore stays a line of its own
                content = b"\n" + content
            file.write(content)
            file.flush()
            if self._sync:
                os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
        if new:
            sync_folder(path.parent)
        self._size = size

    def _name(self) -> str:
        """Names sort by time, and no two writers ever have the same."""
        return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"


def read_journal(out: Where) -> list[dict[str, Any]]:
    """All whole lines, oldest first; a line torn by a crash, or that is no event, is left out. Raises OSError if it cannot be read now."""
    place = as_place(out)
    if place.local:
        texts = [_read(journal_file(place))]
    else:
        folder = journal_folder(place)
        with ThreadPoolExecutor(READERS) as readers:
            texts = list(readers.map(lambda file: _read(folder / file.name), folder.files()))
    lines = []
    for text in texts:
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                found = json.loads(line)
                if isinstance(found, dict) and "event" in found:
                    lines.append(found)
    return lines


def _read(file: Place) -> bytes:
    """Nothing if it is not there."""

    def read() -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return file.read()
        return b""

    return patiently(read, file)
