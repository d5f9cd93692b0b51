"""Files written whole or not at all, their checksums, and what to say when the disk is full.

And reading what may be away for a moment: a disk or a store that does not answer is no damage, and nothing is removed for it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

TRIES, PAUSE_SECONDS = 3, 0.5  # of reading

T = TypeVar("T")


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file whole or not at all: a hidden name of its own for this attempt, fsync, rename, fsync of the folder.

    Raises whatever `write` or the disk raises; nothing is left then.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlive a crash of the machine."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def sha256_of(path: Path) -> str:
    """Of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Damaged(ValueError):
    """A file holds something else than was written."""


class Unreadable(OSError):
    """A file cannot be read now; `number` is the disk's for it, or None."""

    number: int | None = None


def patiently(read: Callable[[], T], what: object) -> T:
    """What `read` returns, tried TRIES times; Damaged and MemoryError pass at once.

    Raises Unreadable that names `what` if it cannot be read.
    """
    tries = 0
    while True:
        try:
            return read()
        except (Damaged, MemoryError):
            raise
        except Exception as error:  # fsspec's stores raise errors of their own
            tries += 1
            if tries == TRIES:
                then = (
                    "mend its permissions"
                    if isinstance(error, PermissionError)
                    else "try again when the disk or the store answers"
                )
                unreadable = Unreadable(f"{what} cannot be read now ({error}), which is no damage; {then}")
                unreadable.number = getattr(error, "errno", None)
                raise unreadable from error
        time.sleep(PAUSE_SECONDS)


def is_disks(error: BaseException) -> bool:
    """Whether an error is the disk's, which has a number. That of pyarrow for a page whose checksum differs is an OSError too, but has none."""
    return isinstance(error, OSError) and bool(error.errno)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the disk or the quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def one_holder(lock: Path, of: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock file for the time of the block; the system releases it when the process ends, however it ends. Nothing where the file
    system has no locks.

    Raises ValueError naming who holds it, if another process does.
    """
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                who = file.read().strip() or "another process"
                raise ValueError(f"{of} is being written by {who}; wait, or use another folder.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def full_disk_says(path: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """A full disk inside becomes an OSError that names `path` and says what to do; every other error passes."""
    try:
        yield
    except Exception as error:
        # libraries wrap the error, or give its text alone
        if not is_disk_full(error) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, f"the disk that holds {path} is full; {advice}") from error
