"""Catalogs in arrays: .npy, .npz and Zarr groups. Whatever can be sliced by rows serves as an array."""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distsbi.store.place import Place
from distsbi.store.rows import Row, joined
from distsbi.store.spec import CHUNK_ROWS, SourceSpec, check_columns, row_numbers


class ArraySource:
    """Arrays with a row per observation.

    Args:
        spec: which count.
        place: where they are, for messages.
        arrays: by name; each has `shape`, `dtype` and slices of rows.
    """

    def __init__(self, spec: SourceSpec, place: Place, arrays: Mapping[str, Any]):
        self.spec = spec
        check_columns(spec, place, list(arrays))
        self._x = [arrays[name] for name in spec.columns]
        for name, x in zip(spec.columns, self._x, strict=True):
            if len(x.shape) == 0 or x.dtype.kind not in "fiub":
                raise ValueError(
                    f"{name!r} of {place} must hold numbers, one row per observation; got {x.dtype} of shape {x.shape}."
                )
        self.n_rows: int = self._x[0].shape[0]
        self._ids = None if spec.id_column is None else arrays[spec.id_column]
        self.id_type = pa.int64() if self._ids is None else _id_type(self._ids, str(spec.id_column), place)
        named = (*spec.columns, *([spec.id_column] if spec.id_column else []))
        lengths = {name: arrays[name].shape[0] for name in named}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the arrays of {place} must have as many rows each; got {lengths}.")

    def id_chunks(self) -> Iterator[pa.Array]:
        if self._ids is None:
            yield from row_numbers(self.n_rows)
            return
        for start in range(0, self.n_rows, CHUNK_ROWS):
            yield self._some_ids(start, min(start + CHUNK_ROWS, self.n_rows))

    def read(self, start: int, stop: int) -> tuple[pa.Array, list[Row]]:
        count = stop - start
        ids = pa.array(np.arange(start, stop)) if self._ids is None else self._some_ids(start, stop)
        x = [np.asarray(part[start:stop]) for part in self._x]
        with np.errstate(over="ignore"):
            block = joined([a.reshape(count, -1) for a in x], 1) if self.spec.x_columns else x[0]
            block = block.astype(np.float32)
        return ids, list(block.reshape(count, 1) if block.ndim == 1 else block)

    def _some_ids(self, start: int, stop: int) -> pa.Array:
        values = np.asarray(self._ids[start:stop])  # type: ignore[index]
        if pa.types.is_integer(self.id_type):
            return pa.array(values.astype(np.uint64 if pa.types.is_unsigned_integer(self.id_type) else np.int64))
        return pa.array(values.tolist(), self.id_type)


def open_arrays(place: Place) -> Mapping[str, Any]:
    """The arrays of a .npy (one, named ""), .npz or Zarr group. Raises ValueError if it cannot be read."""
    if place.suffix == ".npy":
        return {"": _open_npy(place)}
    return _open_npz(place) if place.suffix == ".npz" else _open_zarr(place)


def _open_npy(place: Place) -> Any:
    """Mapped where it is local; else read by ranges of rows."""
    try:
        if place.local:
            return np.load(place.path, mmap_mode="r", allow_pickle=False)
        return RangedArray(place)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{place} is no readable .npy file ({error}).") from error


def _open_npz(place: Place) -> Mapping[str, Any]:
    """Arrays of a local .npz that is not compressed are mapped; others are read whole, those that are asked for."""
    try:
        file = place.path if place.local else pa.PythonFile(place.open(), mode="r")
        archive = zipfile.ZipFile(file)  # type: ignore[arg-type]
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{place} is no readable .npz file ({error}).") from error
    return _Members(place, archive, members)


class _Members(Mapping[str, Any]):
    """Arrays of an .npz, opened when they are asked for."""

    def __init__(self, place: Place, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]):
        self._place, self._archive, self._members = place, archive, members
        self._opened: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._opened:
            try:
                self._opened[name] = self._open(self._members[name])
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
                raise ValueError(f"{self._place} is no readable .npz file ({error}).") from error
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def _open(self, member: zipfile.ZipInfo) -> np.ndarray:
        if member.compress_type != zipfile.ZIP_STORED or not self._place.local:
            with self._archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        with open(self._place.path, "rb") as file:
            file.seek(member.header_offset + 26)  # lengths of name and extra field, in the member's own header
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
            shape, fortran, dtype = _read_header(file)
            start = file.tell()
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            if start + size > Path(self._place.path).stat().st_size:
                raise ValueError("it is cut off")
            if size == 0:
                return np.empty(shape, dtype)
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(shape, dtype, whole, start, order="F" if fortran else None)  # type: ignore[call-overload]


class RangedArray:
    """A .npy in an object store: slices of rows are read when they are taken."""

    def __init__(self, place: Place):
        self._file = place.open()
        self.shape, fortran, self.dtype = _read_header(self._file)
        self._start = self._file.tell()
        if self.dtype.hasobject or (fortran and len(self.shape) > 1):
            raise ValueError("it is in Fortran's order, or holds Python objects; write it with numpy.ascontiguousarray")
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        content = self._file.read_at((stop - start) * self._row_bytes, self._start + start * self._row_bytes)
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of a .npy, read to where its numbers begin."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def is_zarr(place: Place) -> bool:
    """Whether this is a Zarr group, of version 2 or 3."""
    return (place / "zarr.json").exists() or (place / ".zgroup").exists()


def _open_zarr(place: Place) -> Mapping[str, Any]:
    try:
        import zarr
        import zarr.storage
    except ImportError as error:
        raise ValueError(f"{place} is a Zarr group, and zarr is not installed: pip install 'distsbi[zarr]'.") from error
    store: Any = place.path if place.local else zarr.storage.MemoryStore(_Objects(place), read_only=True)
    try:
        arrays = dict(zarr.open_group(store, mode="r").arrays())
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{place} is no readable Zarr group ({error}).") from error
    for name, array in arrays.items():
        if any(getattr(codec, "codec_id", "") == "pickle" for codec in (*array.filters, *array.compressors)):
            raise ValueError(
                f"the array {name!r} of {place} is pickled, and reading that may run any program; write it anew as numbers or fixed-length text."
            )
    return arrays


class _Objects(MutableMapping[str, Any]):
    """The objects under a place as zarr's buffers, by name."""

    def __init__(self, place: Place):
        self._place = place

    def __getitem__(self, name: str) -> Any:
        from zarr.core.buffer import default_buffer_prototype

        try:
            return default_buffer_prototype().buffer.from_bytes((self._place / name).read())
        except FileNotFoundError:
            raise KeyError(name) from None

    def __contains__(self, name: object) -> bool:
        return (self._place / str(name)).is_file()

    def __iter__(self) -> Iterator[str]:
        return (file.name for file in self._place.files(deep=True))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __setitem__(self, name: str, value: Any) -> None:
        raise ValueError("a catalog is only read")

    __delitem__ = None  # type: ignore[assignment]


def _id_type(ids: Any, name: str, place: Place) -> pa.DataType:
    """int64, uint64, string or binary. Raises ValueError for anything else."""
    kind = ids.dtype.kind
    if kind == "O" and len(ids.shape) == 1:  # strings of Zarr version 2
        kind = "U" if all(isinstance(value, str) for value in np.asarray(ids[:1]).tolist()) else "O"
    if len(ids.shape) != 1 or kind not in "iuUTS":
        raise ValueError(
            f"ids must be integers or strings, one per row; {name!r} of {place} is {ids.dtype} of shape {ids.shape}. "
            "Convert it, or pass id_column=None to use row numbers."
        )
    if kind in ("U", "T"):
        return pa.string()
    return pa.binary() if kind == "S" else pa.uint64() if ids.dtype == np.uint64 else pa.int64()
