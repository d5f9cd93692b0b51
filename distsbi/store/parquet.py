"""Catalogs in Parquet: any range of rows from the row groups that hold it.

A row group is read whole and kept for the next range, unless it is larger than GROUP_BYTES: such a one is decoded in parts, from its start, and goes on
where the range before ended. So a worker, whose ranges lie ever further on, reads it once.
"""

import bisect
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distsbi.store.place import Place, as_place
from distsbi.store.rows import Row, is_list, join_columns, rows_of
from distsbi.store.spec import CHUNK_ROWS, SourceSpec, check_columns, row_numbers

BUFFER_BYTES = 2**20  # of a column that is not read whole
GROUP_BYTES = 256 * 2**20  # the needed columns of a row group, decoded, up to which it is kept for the next range
PART_BYTES = 32 * 2**20  # of a larger one, decoded at a time

log = logging.getLogger("distsbi")


class ParquetSource:
    """One Parquet file or a folder of them. Files may write x in different types; ids are of one kind."""

    def __init__(self, spec: SourceSpec, files: Sequence[Place]):
        self.spec = spec
        self._columns: list[str] = list(dict.fromkeys([*([spec.id_column] if spec.id_column else []), *spec.columns]))
        self._groups: list[tuple[Place, int]] = []
        self._large: dict[int, int] = {}  # groups that are read in parts, with the rows of PART_BYTES
        self._first: list[int] = []
        self.n_rows = 0
        self.id_type: pa.DataType = pa.int64()
        for path in files:
            try:
                with path.open() as opened, pq.ParquetFile(opened) as file:
                    metadata, schema = file.metadata, file.schema_arrow
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is no readable Parquet file ({error}).") from error
            if metadata.num_rows == 0:  # without rows pandas knows no types either
                continue
            check_columns(spec, path, schema.names)
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
                found = metadata.row_group(group)
                if (size := _size(found, self._columns)) > GROUP_BYTES:
                    self._large[len(self._groups)] = max(1, PART_BYTES * found.num_rows // size)
                self._groups.append((path, group))
                self._first.append(self.n_rows)
                self.n_rows += found.num_rows
        if self._large:
            _warn(spec.path, len(self._large), min(self._large.values()))
        self._open: tuple[Place, pq.ParquetFile] | None = None
        self._kept: tuple[int, pa.Table] | None = None
        self._parts: tuple[int, _Parts] | None = None

    def id_chunks(self) -> Iterator[pa.Array]:
        if self.spec.id_column is None:
            yield from row_numbers(self.n_rows)
            return
        for path in dict.fromkeys(path for path, _ in self._groups):
            with (
                path.open() as opened,
                pq.ParquetFile(opened, buffer_size=BUFFER_BYTES) as file,
            ):  # not whole column chunks
                for batch in file.iter_batches(CHUNK_ROWS, columns=[self.spec.id_column]):
                    yield batch.column(0).cast(self.id_type)

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
        if index in self._large:
            begun, self._parts = self._parts, None  # not to go on with after an error
            if begun is None or begun[0] != index or low < begun[1].start:
                self._kept = None
                begun = (index, _Parts(path, group, self._columns, min(self._large[index], CHUNK_ROWS)))
            yield from begun[1].read(low, high)
            self._parts = begun
            return
        if self._kept is None or self._kept[0] != index:
            self._parts = None
            if self._open is None or self._open[0] != path:
                self._open = (path, pq.ParquetFile(path.open(), pre_buffer=not path.local))
            self._kept = (index, self._open[1].read_row_group(group, columns=self._columns))
        yield self._kept[1].slice(low, high - low)


class _Parts:
    """A row group in parts of so many rows, forwards only."""

    def __init__(self, path: Place, group: int, columns: Sequence[str], rows: int):
        buffer = max(1, min(BUFFER_BYTES, PART_BYTES // len(columns)))  # without one whole column chunks are read
        file = pq.ParquetFile(path.open(), buffer_size=buffer, pre_buffer=False)
        self._batches = file.iter_batches(rows, row_groups=[group], columns=list(columns))
        self._part: pa.Table | None = None
        self.start = self._stop = 0  # the rows of the part, in the group

    def read(self, low: int, high: int) -> Iterator[pa.Table]:
        """The rows low, ..., high - 1 of the group, none before `start`."""
        while True:
            if self._part is not None and low < self._stop:
                yield self._part.slice(low - self.start, min(high, self._stop) - low)
            if high <= self._stop:
                return
            batch = next(self._batches)
            self._part = pa.Table.from_batches([batch])
            self.start, self._stop = self._stop, self._stop + len(batch)
            low = max(low, self.start)


def _size(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """Bytes of these columns of a row group, uncompressed; of the whole group where that is no more than GROUP_BYTES."""
    if group.total_byte_size <= GROUP_BYTES:
        return group.total_byte_size
    chunks = (group.column(i) for i in range(group.num_columns))
    heads = tuple(f"{name}." for name in columns)  # a list's numbers are x.list.element
    return sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(heads))


@functools.cache  # once in a process, whose workers may open the catalog again
def _warn(path: str, groups: int, rows: int) -> None:
    log.warning(
        "%s has %s of more than %d MB, too large to be kept in memory: each worker reads through such a group from its start. If that is slow, write the "
        "file again with row_group_size=%d (of pandas' to_parquet and pyarrow's write_table)",
        as_place(path), "a row group" if groups == 1 else f"{groups} row groups", GROUP_BYTES // 2**20, rows,
    )  # fmt: skip


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _check_numeric(name: str, kind: pa.DataType, path: Place) -> None:
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


def _id_type(kind: Any, name: str, path: Place) -> pa.DataType:
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
