"""What lies in an output folder, every file name once, and how a file comes to be whole.

    out/  shard-00000007-of-00000120.parquet     rows with their results; there if and only if complete
          .shard-00000007-of-00000120.parquet.*  being written; readers ignore it, the next start removes it
          _distsbi/  run.json                    what defines the draws
                     journal.jsonl               one line per shard done or failed
                     lock                        held by the one process that fills the folder

Names that begin with a dot or an underscore are no data to pyarrow and Ray Data, so that both read the folder as it is;
polars and duckdb take "out/*.parquet".
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN = "_distsbi"
_SHARD = re.compile(r"^shard-(\d{8})-of-(\d{8})\.parquet$")
_PARTIAL = re.compile(r"^\.shard-\d{8}-of-\d{8}\.parquet\.[0-9a-f]+$")


def run_file(out: str | Path) -> Path:
    return Path(out) / HIDDEN / "run.json"


def journal_file(out: str | Path) -> Path:
    return Path(out) / HIDDEN / "journal.jsonl"


def shard_file(out: str | Path, shard: int, shards: int) -> Path:
    return Path(out) / f"shard-{shard:08d}-of-{shards:08d}.parquet"


def shards_done(out: str | Path, shards: int) -> list[int]:
    """The numbers of the shards that are there, ascending.

    Raises ValueError if the folder has shards of another division.
    """
    found = []
    for entry in os.scandir(out):
        match = _SHARD.match(entry.name)
        if match and int(match[2]) != shards:
            raise ValueError(
                f"{out} has a file {entry.name} of another division (this run has {shards} shards); use another folder."
            )
        if match:
            found.append(int(match[1]))
    return sorted(found)


def has_shards(out: str | Path) -> bool:
    return any(_SHARD.match(entry.name) for entry in os.scandir(out))


def remove_partial(out: str | Path) -> int:
    """Removes what interrupted attempts left. Returns how many. Only for who holds the lock."""
    left = [entry.path for entry in os.scandir(out) if _PARTIAL.match(entry.name)]
    for path in left:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    return len(left)


def append_journal(out: str | Path, line: dict[str, Any]) -> None:
    """Adds one line, with the time (seconds since 1970)."""
    with open(journal_file(out), "a") as file:
        file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")


def read_journal(out: str | Path) -> list[dict[str, Any]]:
    """All whole lines, oldest first; a line torn by a crash is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(journal_file(out)) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def one_writer(out: str | Path) -> Iterator[None]:
    """Holds the folder's lock. The system releases it when the process ends, however it ends.

    Where the file system has no locks (some network ones), two writers are not told apart; their shards are the same
    bytes.

    Raises ValueError naming the writer that holds it.
    """
    with open(Path(out) / HIDDEN / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                raise ValueError(
                    f"{out} is being written by {file.read().strip() or 'another process'}; wait, or use another "
                    "folder."
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
