"""Columns to rows: x of each observation from numbers, lists, lists of lists or tensors.

A null inside x is NaN: pandas writes NaN as null, and to a run trained with missing=True both mean "not measured". Where
x is null as a whole, or ragged, the row is the reason.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

Row = np.ndarray | str  # x of one observation, or why there is none


def rows_of(column: pa.Array, name: str = "x") -> list[Row]:
    """x of every row, float32; a reason, beginning with `name`, where it is null or ragged."""
    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        # As Arrow's specification says. pyarrow 26's own to_numpy_ndarray gives other strides, where some elements come
        # twice, unless the permutation is its own inverse.
        rows = rows_of(column.storage, name)
        order = kind.permutation or range(len(kind.shape))
        return [row if isinstance(row, str) else row.reshape(kind.shape).transpose(order) for row in rows]
    if isinstance(kind, pa.DictionaryType):
        return rows_of(column.dictionary_decode(), name)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if not is_list(kind):
        values = _floats(column)
        return [values[i : i + 1] if ok else f"{name} is null" for i, ok in enumerate(valid)]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    stops = np.cumsum(lengths)
    spans = [slice(b - n, b) for b, n in zip(stops.tolist(), lengths.tolist(), strict=True)]
    inner = column.flatten()
    if is_list(inner.type):
        lists = rows_of(inner, f"an inner list of {name}")
        rows = [_join(lists[span], name) for span in spans]
    else:
        values = _floats(inner)
        rows = [values[span] for span in spans]
    return [row if ok else f"{name} is null" for row, ok in zip(rows, valid, strict=True)]


def join_columns(columns: Sequence[pa.Array], names: Sequence[str]) -> list[Row]:
    """The columns of each row, flattened and joined; where several have as many values each, more than one, [columns, values]. The first reason where one
    has none.

    A null number is NaN, unless all are null; a null list, whose length nobody knows, is a reason.
    """
    scalar = [not is_list(c.type) and not isinstance(c.type, pa.FixedShapeTensorType) for c in columns]
    if all(scalar):
        table = np.stack([_floats(column) for column in columns], axis=1)
        null = np.stack([column.is_null().to_numpy(zero_copy_only=False) for column in columns], axis=1)
        return ["x is null" if gap.all() else row for row, gap in zip(table, null, strict=True)]

    def join(parts: tuple[Row, ...]) -> Row:
        reason = next((part for part in parts if isinstance(part, str)), None)
        return joined([np.ravel(part) for part in parts]) if reason is None else reason

    values = [
        list(_floats(column)[:, None]) if single else rows_of(column, name)
        for column, name, single in zip(columns, names, scalar, strict=True)
    ]
    return [join(parts) for parts in zip(*values, strict=True)]


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _join(parts: Sequence[Row], name: str) -> Row:
    """Inner rows as one array."""
    for part in parts:
        if isinstance(part, str):
            return part
    if not parts:
        return np.empty(0, np.float32)
    if len({part.shape for part in parts}) > 1:  # type: ignore[union-attr]
        return f"{name} is ragged: inner lists of lengths {sorted({part.size for part in parts})}"  # type: ignore[union-attr]
    return np.stack(parts)  # type: ignore[arg-type]


def _floats(values: pa.Array) -> np.ndarray:
    """float32, NaN where null."""
    with np.errstate(over="ignore"):  # past float32 becomes inf, which the posterior's check refuses
        return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float32)


def joined(parts: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
    """Parts that are flat from `axis` on: stacked where several have as many values each, more than one; else one after another."""
    sizes = [part.shape[axis] for part in parts]
    alike = len(parts) > 1 and len(set(sizes)) == 1 and sizes[0] > 1
    return np.stack(parts, axis) if alike else np.concatenate(parts, axis)
