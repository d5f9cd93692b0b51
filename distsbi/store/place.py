"""Where files lie: on local disks or in an object store, with the few operations that catalogs need of either.

    /data/out, out/, file:///data/out    local disks, and file systems that are mounted
    s3://bucket/out, gs://bucket/out     object stores, by pyarrow (options in the URI's query: ?region=...&endpoint_override=...)
    memory://out, any other scheme       by fsspec, if it is installed

A file that is written appears whole or not at all: locally by a temporary name, fsync and rename; in an object store
because an object appears when its upload is complete.
"""

import contextlib
import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as filesystems

from distsbi.files import write_whole

SENDS = 3  # of a file that a store does not keep whole
NATIVE = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?")
_SECRET = re.compile(
    r"secret|passw|token|signature|credentials?$|(^|[-_])(pass|pwd|sig|key)$|(access|api)key", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Found:
    """A file in a folder: its name relative to that, bytes, and when it was written (nanoseconds since 1970; 0: unknown)."""

    name: str
    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Place:
    """A file or a folder. Made by `as_place`; `place / "name"` is one in it.

    `url`: what makes it again elsewhere; `str(place)` is for people: without secrets and options.
    """

    url: str
    fs: filesystems.FileSystem = dataclasses.field(compare=False, repr=False)
    path: str = dataclasses.field(compare=False, repr=False)
    local: bool = dataclasses.field(compare=False, repr=False)

    def __truediv__(self, name: str) -> "Place":
        base, mark, query = self.url.partition("?") if not self.local else (self.url, "", "")
        return Place(f"{base.rstrip('/')}/{name}{mark}{query}", self.fs, f"{self.path.rstrip('/')}/{name}", self.local)

    def __str__(self) -> str:
        return self.url if self.local else self.without_secrets.partition("?")[0]

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def without_secrets(self) -> str:
        """The URL without what opens the store: what may be shown and written down. With credentials from the environment it leads to the
        same place."""
        return self.url if self.local else _parted(self.url)[0]

    def info(self) -> Any:
        """pyarrow's FileInfo."""
        return self.fs.get_file_info(self.path)

    def exists(self) -> bool:
        return self.info().type != filesystems.FileType.NotFound

    def is_folder(self) -> bool:
        return self.info().type == filesystems.FileType.Directory

    def is_file(self) -> bool:
        return self.info().type == filesystems.FileType.File

    def files(self, *, deep: bool = False) -> list[Found]:
        """The files in this folder, by name; `deep`: in its folders too. None if it is not there, or is a file."""
        try:
            found = self.fs.get_file_info(filesystems.FileSelector(self.path, recursive=deep, allow_not_found=True))
        except NotADirectoryError:
            return []
        start = len(self.path.rstrip("/")) + 1
        files = [
            Found(info.path[start:], info.size or 0, info.mtime_ns or 0)
            for info in found
            if info.type == filesystems.FileType.File
        ]
        return sorted((file for file in files if file.name), key=lambda file: file.name.split("/"))

    def open(self) -> pa.NativeFile:
        """To read from anywhere in it. Raises FileNotFoundError."""
        return self.fs.open_input_file(self.path)

    def read(self) -> bytes:
        """Raises FileNotFoundError, also where a part of the path is a file."""
        try:
            with self.fs.open_input_stream(self.path) as file:
                return file.read()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(*error.args) from error

    def write(self, content: Any, *, alone: bool = True) -> None:
        """Writes the file whole or not at all. `content`: bytes, or a pyarrow Buffer.

        `alone`: nobody else writes this file now, so a store is asked afterwards how long it is; of a file that it did not keep whole nothing is
        left.

        Raises OSError, or what fsspec's stores raise; OSError too if the store did not keep it whole SENDS times.
        """
        if self.local:
            write_whole(Path(self.path), lambda file: file.write(content))
            return
        for _ in range(SENDS):
            with self.fs.open_output_stream(self.path) as file:
                file.write(content)  # at once: closing a stream that was cut off would complete the object
            if not alone or (kept := self.info().size) == (sent := memoryview(content).nbytes):
                return
        self.remove()
        raise OSError(f"{self} was sent {sent:,} bytes {SENDS} times, and the store kept {kept or 0:,}")

    def remove(self) -> None:
        """Removes the file; nothing happens if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path)

    def make_folder(self) -> None:
        """Object stores have no folders to make."""
        if self.local:
            os.makedirs(self.path, exist_ok=True)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this names an object store (or another machine), not a local path."""
    match = _SCHEME.match(os.fspath(path))
    return bool(match) and match[1].lower() != "file"  # type: ignore[index]


def as_place(path: "str | os.PathLike[str] | Place") -> Place:
    """The place of a path or URI.

    Raises ValueError for a scheme that nothing here understands, and for a URI that pyarrow or fsspec refuses.
    """
    if isinstance(path, Place):
        return path
    text = os.fspath(path)
    if is_url(text):
        return _remote(text)
    if text.lower().startswith("file://"):
        text = filesystems.FileSystem.from_uri(text)[1]
    return Place(os.path.abspath(text), _LOCAL, os.path.abspath(text), True)


def shown(path: str | os.PathLike[str]) -> str:
    """A path or URI as it may be shown: as it is, without secrets."""
    text = os.fspath(path)
    return _parted(text)[0] if is_url(text) else text


def _parted(url: str) -> tuple[str, list[str]]:
    """(the URI without secrets, which these are): the password, also one with a character that belongs encoded, options named like one, and the
    user of S3, who is a key. Of other stores the user is a part of the address, as in abfss://container@account.dfs.core.windows.net/.

    >>> _parted("ftp://me:pw@host/a?token=t&region=eu")
    ('ftp://me@host/a?region=eu', ['me:pw', 'pw', 't'])
    """
    scheme, _, rest = url.partition("://")
    authority = re.match(r"[^/?#]*", rest)[0]  # type: ignore[index]
    s3 = scheme.lower() in ("s3", "s3a", "s3n")
    end, secrets = authority.rfind("@"), []
    if end < 0 and ((s3 and ":" in authority) or not _HOST.fullmatch(authority)):
        end = rest.rfind("@")
    if end >= 0:
        given, rest = rest[:end], rest[end + 1 :]
        user, _, password = given.partition(":")
        if s3 or password:
            secrets += [given, password]
        if user and not s3:
            rest = f"{user}@{rest}"
    base, _, query = rest.partition("?")
    kept = []
    for option in filter(None, query.split("&")):
        name, _, value = option.partition("=")
        if _SECRET.search(unquote(name)):
            secrets.append(value)
        else:
            kept.append(option)
    return f"{scheme}://{base}{'?' if kept else ''}{'&'.join(kept)}", [secret for secret in secrets if secret]


def _without(text: str, url: str) -> str:
    """What pyarrow or fsspec says of a URI, which it may repeat, without its secrets."""
    public, secrets = _parted(url)
    text = text.replace(url, public)
    for secret in secrets:
        text = text.replace(secret, "...").replace(unquote(secret), "...")
    return text


_LOCAL = filesystems.LocalFileSystem()


@functools.lru_cache(maxsize=64)
def _remote(url: str) -> Place:
    scheme = url.partition(":")[0].lower()
    try:
        fs, path = filesystems.FileSystem.from_uri(url if scheme in NATIVE else f"fsspec+{url}")
    except ImportError as error:
        raise ValueError(f"{scheme}:// needs a package that is not installed ({_without(str(error), url)}).") from None
    except (ValueError, pa.ArrowException, OSError) as error:  # in a traceback it would tell the secrets
        raise ValueError(
            f"{shown(url)} is no address that can be opened ({_without(str(error), url)}); give a local path, s3://bucket/..., "
            "gs://bucket/... or another that pyarrow or fsspec knows."
        ) from None
    return Place(url, fs, path, False)
