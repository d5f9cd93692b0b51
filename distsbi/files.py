"""Files written whole or not at all, and what to say when the disk is full."""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the disk or the quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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
