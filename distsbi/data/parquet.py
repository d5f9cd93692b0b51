"""One Parquet file of training pairs: two columns of `arrow.fixed_shape_tensor` float32, `theta` [dim_theta, ch_theta]
and `x` [dim_x, ch_x], or an image [rows, columns, ch_x].

The schema carries the parameter names and where the pairs came from. A file exists if and only if it is complete: it is
written under a hidden temporary name, synced and renamed. Its pages have checksums, which reading checks. Plain fixed-size
lists, as other writers make them, are read as one channel.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from distsbi.data.float32 import Columns
from distsbi.data.prior import check_names, default_names
from distsbi.files import Damaged, is_disks, patiently, write_whole

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

FORMAT = 1
_METADATA = b"distsbi.pairs"
_ROW_GROUP_BYTES = 16 << 20

T = TypeVar("T")


class Footer(NamedTuple):
    """What a file says of itself: shapes are of one row, [dim, channels], and of an x that is an image [rows, columns, channels]."""

    rows: int
    names: tuple[str, ...]
    theta_shape: tuple[int, int]
    x_shape: tuple[int, ...]
    source: dict[str, Any]


def write_file(path: Path, theta: np.ndarray, x: np.ndarray, names: Sequence[str], source: dict[str, Any]) -> None:
    """Write one complete file, or none; it may have no rows. Raises OSError that says what to do."""
    columns = [_column(np.ascontiguousarray(a)) for a in (theta, x)]
    note = json.dumps({"format": FORMAT, "names": names, "source": source})
    table = pa.table(columns, names=["theta", "x"]).replace_schema_metadata({_METADATA: note})
    row_bytes = 4 * (math.prod(theta.shape[1:]) + math.prod(x.shape[1:]))
    rows = max(1, _ROW_GROUP_BYTES // row_bytes)
    try:
        write_whole(
            path,
            lambda file: pq.write_table(
                table, file, use_dictionary=False, row_group_size=rows, write_page_checksum=True
            ),
        )
    except OSError as error:
        reason = error.strerror or error
        message = (
            f"{path} could not be written ({reason}); files written before are complete. Free space and run again."
        )
        raise OSError(error.errno, message) from error


def _column(array: np.ndarray) -> pa.Array:
    """Rows as tensors of one shape; pyarrow (26.0) makes none of no rows."""
    if len(array):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.array([], kind.storage_type))


def get_ready() -> None:
    """Loads what pyarrow (26.0) loads at its first tensor, pandas among it: a tenth of a second that is then not the first file's."""
    _column(np.zeros((1, 1, 1), np.float32))


def read_footer(path: Path) -> Footer:
    """What a file says of itself. Raises ValueError if it is damaged, newer than this code, or no file of pairs; OSError if it cannot be read now."""
    rows, schema, first = _read(path, _head)
    note = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))
    if note.get("format", FORMAT) > FORMAT:
        raise ValueError(
            f"{path} has pairs format {note['format']}, this distsbi reads up to {FORMAT}; install a newer distsbi."
        )
    theta_shape, x_shape = (_row_shape(path, schema, name, first.get(name)) for name in ("theta", "x"))
    names = tuple(note.get("names") or default_names(theta_shape[0]))
    return Footer(rows, check_names(names, theta_shape[0]), theta_shape, x_shape, note.get("source", {}))


def _head(file: pq.ParquetFile) -> tuple[int, pa.Schema, dict[str, int]]:
    """(rows, schema, the length of the first row of each column of plain lists)."""
    rows, schema = file.metadata.num_rows, file.schema_arrow
    lists = [name for name in ("theta", "x") if name in schema.names and _is_plain_list(schema.field(name).type)]
    head = next(file.iter_batches(1, columns=lists)) if lists and rows else {}
    return rows, schema, {name: len(head[name][0].as_py() or ()) for name in lists if rows}


def _is_plain_list(kind: Any) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_number(kind.value_type)


def _row_shape(path: Path, schema: pa.Schema, name: str, first: int | None) -> Any:
    """[dim, channels] of a column, more axes for images: a fixed-shape tensor, or lists of one length (one channel), which is that of the
    `first`."""
    index = schema.get_field_index(name)
    kind: Any = schema.field(index).type if index >= 0 else None
    if first and _is_plain_list(kind):
        return (first, 1)
    if isinstance(kind, (pa.FixedShapeTensorType, pa.FixedSizeListType)) and _is_number(kind.value_type):
        if isinstance(kind, pa.FixedSizeListType):
            return (kind.list_size, 1)
        if len(kind.shape) in (1, 2) or name == "x":
            axes = _axes(kind)
            if axes != np.argsort(axes).tolist():
                # The format says logical[i] = stored[permutation[i]], pyarrow writes the inverse and reads neither (26.0).
                raise ValueError(
                    f"{path} has {name} of type {kind}, whose permutation of three or more axes is read differently by different programs; "
                    f"write it from np.ascontiguousarray({name})."
                )
            shape = tuple(kind.shape[axis] for axis in axes)
            return shape if len(shape) > 1 else (*shape, 1)
    found = f"{name} of type {kind}" if kind is not None else f"only {', '.join(schema.names)}"
    raise ValueError(
        f"{path} must have columns theta and x of a fixed shape per row (lists of numbers of one length, or arrow.fixed_shape_tensor); "
        f"it has {found}. Write it with distsbi.data.write_pairs."
    )


def _is_number(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean))


def _axes(kind: Any) -> list[int]:
    """The stored axes of a tensor in the order of the logical ones."""
    return list(kind.permutation or range(len(kind.shape)))


def row_groups(path: Path) -> tuple[int, ...]:
    """Rows of every row group of a file. Raises ValueError if it is damaged, OSError if it cannot be read now."""
    found = _read(path, lambda file: file.metadata)
    return tuple(found.row_group(i).num_rows for i in range(found.num_row_groups))


def read_file(
    path: Path,
    theta_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    *,
    group: int | None = None,
    columns: dict[str, Columns] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """theta and x of one file, or of one of its row groups, float32; `columns` are told of the numbers as they are written.

    Raises ValueError if it is damaged or holds nulls, OSError if it cannot be
    read now."""
    names = ["theta", "x"]
    table = _read(path, lambda file: file.read(names) if group is None else file.read_row_group(group, names))
    arrays = []
    for name, shape in (("theta", theta_shape), ("x", x_shape)):
        column = table[name].combine_chunks()
        storage = column.storage if isinstance(column, pa.ExtensionArray) else column
        values = storage.flatten()
        if storage.null_count or values.null_count:
            raise ValueError(f"{path} has nulls in column {name}; drop those rows.")
        rows = np.asarray(values)
        if _is_plain_list(column.type):
            lengths = set(pc.unique(pc.list_value_length(column)).to_pylist())
            if lengths - {shape[0]}:
                raise ValueError(
                    f"{path} has lists of {sorted(lengths)} numbers in column {name}; all must have {shape[0]}."
                )
        if isinstance(column.type, pa.FixedShapeTensorType):
            rows = rows.reshape(-1, *column.type.shape).transpose(0, *(1 + axis for axis in _axes(column.type)))
        rows = rows.reshape(-1, *shape)
        if columns is not None:
            columns[name].add(rows)
        with np.errstate(over="ignore"):
            arrays.append(rows.astype(np.float32, copy=False))
    return arrays[0], arrays[1]


def check_file(path: Path) -> Footer:
    """Reads all of a file, a row group at a time. Raises ValueError if it is damaged or holds nulls, OSError if it cannot be read now."""
    footer = read_footer(path)
    for group in range(len(row_groups(path))):
        read_file(path, footer.theta_shape, footer.x_shape, group=group)
    return footer


def read_checked(
    path: Path, read: Callable[[pq.ParquetFile], T], damaged: str, *, damage: tuple[type[OSError], ...] = ()
) -> T:
    """What `read` makes of a file, whose pages are compared with their checksums. `damaged`: what is said of one that is, with {path} and {error};
    `damage`: errors of the disk that are taken for that.

    Raises ValueError if it is damaged, OSError if it cannot be read now.
    """

    def attempt() -> T:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                return read(file)
        except MemoryError:  # Arrow's is one of its own exceptions too
            raise
        except (pa.ArrowException, OSError) as error:
            if is_disks(error) and not isinstance(error, damage):
                raise
            raise Damaged(damaged.format(path=path, error=error)) from error

    return patiently(attempt, path)


def _read(path: Path, read: Callable[[pq.ParquetFile], T]) -> T:
    return read_checked(
        path,
        read,
        "{path} cannot be read as Parquet and may be damaged ({error}). Remove it and make the pairs again; distsbi verify names all that are.",
    )
