"""The catalog that comes in: rows of (id, x), read a few at a time.

    catalog.parquet, or a folder of Parquet files    id column + one list or tensor column x, or named columns
    catalog.npy                                      x alone, (rows, dim_x) or (rows, dim_x, ch_x); row numbers are the ids
    catalog.npz                                      arrays named like the columns

Rows are numbered 0, 1, 2, ... through the files in name order. A reader takes any range of rows and touches only what
holds them: the row groups of a Parquet file, the pages of a mapped .npy. A row that holds no usable x comes back as
the reason (rows.py).
"""

import bisect
import dataclasses
import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from distsbi.store.rows import Row, is_list, join_columns, rows_of

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

GROUP_BYTES = 256 * 2**20  # a decoded row group up to this size is kept for the next range
GLANCE_BYTES = 2**20  # what `glance` reads at either end of a file


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """Where the rows are. Plain values: it travels to the workers.

    Args:
        path: a Parquet file, a folder of them, .npy or .npz.
        id_column: the column (array of the .npz) with the ids, integers or strings; None: the row number is the id. A .npy can hold no
            ids, so with the default this becomes None there.
        x_column: the column with x, a list or a tensor per row.
        x_columns: instead, columns that make up x, in this order: scalars, or lists and tensors, which are flattened and joined.
    """

    path: str
    id_column: str | None = "id"
    x_column: str = "x"
    x_columns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if Path(self.path).suffix == ".npy" and self.id_column == SourceSpec.id_column:
            object.__setattr__(self, "id_column", None)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.x_columns or (self.x_column,)


class Source(Protocol):
    """A catalog that is open."""

    n_rows: int
    id_type: pa.DataType

    def ids(self) -> pa.ChunkedArray:
        """All ids, int64, uint64, string or binary."""
        ...

    def read(self, start: int, stop: int) -> tuple[pa.Array, list[Row]]:
        """Ids and x of the rows start, ..., stop - 1."""
        ...


def open_source(spec: SourceSpec) -> Source:
    """Raises ValueError for a missing or unreadable catalog, and for a missing column or one of the wrong kind."""
    path = Path(spec.path)
    if not path.exists():
        raise ValueError(
            f"there is no catalog at {path}; give a Parquet file, a folder of them, a .npy or a .npz file."
        )
    if path.suffix in (".npy", ".npz"):
        return NumpySource(spec)
    if path.is_dir() or path.suffix in (".parquet", ".pq"):
        return ParquetSource(spec)
    raise ValueError(
        f"{path} is no catalog that can be read; give a Parquet file, a folder of them, a .npy or a .npz file."
    )


def check_ids(source: Source, spec: SourceSpec) -> None:
    """Raises ValueError, naming some, for missing or repeated ids, and for a catalog without rows."""
    if source.n_rows == 0:
        raise ValueError(f"the catalog {spec.path} has no rows.")
    if spec.id_column is None:
        return
    ids = source.ids()
    if ids.null_count:
        first = pc.index(ids.is_null(), True).as_py()
        raise ValueError(
            f"{ids.null_count} rows of {spec.path} have no {spec.id_column!r} (the first is row {first}); give every "
            "row its own id, or pass id_column=None to number the rows."
        )
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        some = ", ".join(f"{row['values']!r} ({row['counts']} times)" for row in repeated.slice(0, 5).to_pylist())
        more = ", ..." if len(repeated) > 5 else ""
        raise ValueError(
            f"{len(repeated)} ids of {spec.path} occur more than once: {some}{more}; the id names an observation's "
            "random numbers and result, so make them unique, or pass id_column=None to number the rows."
        )


def fingerprint(spec: SourceSpec) -> str:
    """blake2b of the bytes of the catalog's files, in row order. Hexadecimal. A moved catalog keeps it, a changed one
    does not."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _files(Path(spec.path)):
        digest.update(path.stat().st_size.to_bytes(8, "big"))
        with open(path, "rb") as file:
            while block := file.read(8 * 2**20):
                digest.update(block)
    return digest.hexdigest()


def glance(spec: SourceSpec) -> str:
    """blake2b of the size, the first and the last MiB of each of the catalog's files, in row order. Hexadecimal.

    Cheap enough for every worker. It tells another catalog, other files, and a Parquet file that was written anew (its
    footer comes last); not numbers changed in place in the middle of a large file: those `fingerprint` tells.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in _files(Path(spec.path)):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with open(path, "rb") as file:
            digest.update(file.read(GLANCE_BYTES))
            file.seek(max(size - GLANCE_BYTES, 0))
            digest.update(file.read(GLANCE_BYTES))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*.parquet") if not any(part[0] in "._" for part in p.relative_to(path).parts))
    if not found:
        raise ValueError(f"the folder {path} has no .parquet files; give the catalog's own folder.")
    return found


class ParquetSource:
    """One Parquet file or a folder of them. Files may write x in different types; ids are of one kind."""

    def __init__(self, spec: SourceSpec):
        self.spec = spec
        self._groups: list[tuple[Path, int]] = []
        self._first: list[int] = []
        self.n_rows = 0
        self.id_type: pa.DataType = pa.int64()
        for path in _files(Path(spec.path)):
            try:
                with pq.ParquetFile(path) as file:
                    metadata, schema = file.metadata, file.schema_arrow
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is no readable Parquet file ({error}).") from error
            if metadata.num_rows == 0:  # without rows pandas knows no types either
                continue
            _check_columns(spec, path, schema.names)
            for name in spec.columns:
                _check_numeric(name, schema.field(name).type, path)
            if spec.id_column is not None:
                kind = _id_type(schema.field(spec.id_column).type, spec.id_column, path)
                if self._groups and kind != self.id_type:
                    raise ValueError(
                        f"ids must be of one kind in all files; {spec.id_column!r} is {self.id_type} in "
                        f"{self._groups[0][0]} and {kind} in {path}. Convert it, or pass id_column=None to use row "
                        "numbers."
                    )
                self.id_type = kind
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                self._first.append(self.n_rows)
                self.n_rows += metadata.row_group(group).num_rows
        self._columns = list(dict.fromkeys([*([spec.id_column] if spec.id_column else []), *spec.columns]))
        self._open: tuple[Path, pq.ParquetFile] | None = None
        self._kept: tuple[int, pa.Table] | None = None

    def ids(self) -> pa.ChunkedArray:
        if self.spec.id_column is None:
            return pa.chunked_array([pa.array(np.arange(self.n_rows))])
        paths = dict.fromkeys(path for path, _ in self._groups)
        parts = [pq.ParquetFile(p).read(columns=[self.spec.id_column]).column(0).cast(self.id_type) for p in paths]
        return pa.chunked_array([c for part in parts for c in part.chunks], self.id_type)

    def read(self, start: int, stop: int) -> tuple[pa.Array, list[Row]]:
        ids: list[pa.Array] = []
        rows: list[Row] = []
        for table in self._tables(start, stop):  # each apart: their types of x may differ
            if self.spec.id_column is not None:
                ids.append(_one(table[self.spec.id_column]).cast(self.id_type))
            columns = [_one(table[name]) for name in self.spec.columns]
            rows += join_columns(columns, self.spec.columns) if self.spec.x_columns else rows_of(columns[0])
        return pa.array(np.arange(start, stop)) if self.spec.id_column is None else pa.concat_arrays(ids), rows

    def _tables(self, start: int, stop: int) -> Iterator[pa.Table]:
        index = bisect.bisect_right(self._first, start) - 1
        while index < len(self._groups) and self._first[index] < stop:
            first = self._first[index]
            size = (self._first[index + 1] if index + 1 < len(self._first) else self.n_rows) - first
            low, high = max(start - first, 0), min(stop - first, size)
            if high > low:
                yield from self._slice(index, low, high)
            index += 1

    def _slice(self, index: int, low: int, high: int) -> Iterator[pa.Table]:
        path, group = self._groups[index]
        if self._kept is None or self._kept[0] != index:
            if self._open is None or self._open[0] != path:
                self._open = (path, pq.ParquetFile(path))
            file = self._open[1]
            if file.metadata.row_group(group).total_byte_size > GROUP_BYTES:
                done = 0
                for batch in file.iter_batches(row_groups=[group], columns=self._columns):
                    here = slice(max(low - done, 0), min(high - done, len(batch)))
                    if here.stop > here.start:
                        yield pa.Table.from_batches([batch.slice(here.start, here.stop - here.start)])
                    done += len(batch)
                    if done >= high:
                        return
                return
            self._kept = (index, file.read_row_group(group, columns=self._columns))
        yield self._kept[1].slice(low, high - low)


class NumpySource:
    """.npy (mapped), or .npz (read whole: a zip cannot be mapped)."""

    def __init__(self, spec: SourceSpec):
        self.spec = spec
        try:
            found = np.load(spec.path, mmap_mode="r", allow_pickle=False)
            if isinstance(found, np.ndarray):
                arrays = {spec.x_column: found}
            else:
                wanted = {spec.id_column, *spec.columns}
                with found:
                    arrays = {name: found[name] if name in wanted else np.empty(0) for name in found.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{spec.path} is no readable {Path(spec.path).suffix} file ({error}).") from error
        _check_columns(spec, Path(spec.path), list(arrays))
        self._x = [arrays[name] for name in spec.columns]
        for name, x in zip(spec.columns, self._x, strict=True):
            if x.ndim == 0 or x.dtype.kind not in "fiub":
                raise ValueError(
                    f"{name!r} of {spec.path} must hold numbers, one row per observation; got {x.dtype} of shape "
                    f"{x.shape}."
                )
        self.n_rows = len(self._x[0])
        self._ids = None if spec.id_column is None else _id_array(arrays[spec.id_column], spec.id_column, spec.path)
        self.id_type = pa.int64() if self._ids is None else self._ids.type
        lengths = {name: len(arrays[name]) for name in (*spec.columns, *([spec.id_column] if spec.id_column else []))}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the arrays of {spec.path} must have as many rows each; got {lengths}.")

    def ids(self) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array(np.arange(self.n_rows)) if self._ids is None else self._ids])

    def read(self, start: int, stop: int) -> tuple[pa.Array, list[Row]]:
        rows = range(start, stop)
        ids = pa.array(np.asarray(rows)) if self._ids is None else self._ids.slice(start, len(rows))
        x = [np.asarray(part[start:stop]) for part in self._x]
        with np.errstate(over="ignore"):
            block = np.concatenate([a.reshape(len(rows), -1) for a in x], 1) if self.spec.x_columns else x[0]
            block = block.astype(np.float32)
        return ids, list(block.reshape(len(rows), 1) if block.ndim == 1 else block)


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _check_columns(spec: SourceSpec, path: Path, names: Sequence[str]) -> None:
    listed = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
    if spec.id_column is not None and spec.id_column not in names:
        raise ValueError(
            f"the catalog {path} has no id column {spec.id_column!r} (it has {listed}); pass id_column=<its "
            "name>, or id_column=None to use row numbers as ids."
        )
    missing = [name for name in spec.columns if name not in names]
    if missing:
        raise ValueError(
            f"the catalog {path} has no column {missing[0]!r} for x (it has {listed}); pass x_column=<a list "
            "column>, or x_columns=[...] for scalar columns."
        )


def _check_numeric(name: str, kind: pa.DataType, path: Path) -> None:
    value = kind.value_type if isinstance(kind, (pa.FixedShapeTensorType, pa.DictionaryType)) else kind
    while is_list(value):
        value = value.value_type
    numeric = (
        pa.types.is_integer(value)
        or pa.types.is_floating(value)
        or pa.types.is_decimal(value)
        or pa.types.is_boolean(value)
        or pa.types.is_null(value)  # a file in which every x is null
    )
    if not numeric or math.prod(getattr(kind, "shape", [1])) == 0:
        raise ValueError(
            f"column {name!r} of {path} must hold numbers, lists of numbers or tensors; it has type {kind}."
        )


def _id_type(kind: Any, name: str, path: str | Path) -> pa.DataType:
    value = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    if pa.types.is_uint64(value):
        return pa.uint64()
    if pa.types.is_integer(value):
        return pa.int64()
    if pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value):
        return pa.string()
    if pa.types.is_binary(value) or pa.types.is_large_binary(value) or pa.types.is_fixed_size_binary(value):
        return pa.binary()
    raise ValueError(
        f"ids must be integers or strings; {name!r} of {path} has type {kind}. Convert it, or pass "
        "id_column=None to use row numbers."
    )


def _id_array(ids: np.ndarray, name: str, path: str) -> pa.Array:
    """int64, uint64, string or binary. Raises ValueError for anything else."""
    if ids.ndim != 1 or ids.dtype.kind not in "iuUS":
        raise ValueError(
            f"ids must be integers or strings, one per row; {name!r} of {path} is {ids.dtype} of shape {ids.shape}. "
            "Convert it, or pass id_column=None to use row numbers."
        )
    if ids.dtype.kind in "US":
        return pa.array(ids.tolist(), pa.string() if ids.dtype.kind == "U" else pa.binary())
    return pa.array(ids.astype(np.uint64 if ids.dtype == np.uint64 else np.int64))
