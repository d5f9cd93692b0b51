"""Catalogs in Parquet: any range of rows from the row groups that hold it."""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distsbi.store.place import Place
from distsbi.store.rows import Row, is_list, join_columns, rows_of
from distsbi.store.spec import CHUNK_ROWS, SourceSpec, check_columns, row_numbers

BUFFER_BYTES = 2**20  # of a column, when ids are gone through
GROUP_BYTES = 256 * 2**20  # a decoded row group up to this size is kept for the next range


class ParquetSource:
    """One Parquet file or a folder of them. Files may write x in different types; ids are of one kind."""

    def __init__(self, spec: SourceSpec, files: Sequence[Place]):
        self.spec = spec
        self._groups: list[tuple[Place, int]] = []
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
                self._groups.append((path, group))
                self._first.append(self.n_rows)
                self.n_rows += metadata.row_group(group).num_rows
        self._columns = list(dict.fromkeys([*([spec.id_column] if spec.id_column else []), *spec.columns]))
        self._open: tuple[Place, pq.ParquetFile] | None = None
        self._kept: tuple[int, pa.Table] | None = None

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
        if self._kept is None or self._kept[0] != index:
            if self._open is None or self._open[0] != path:
                self._open = (path, pq.ParquetFile(path.open(), pre_buffer=not path.local))
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
