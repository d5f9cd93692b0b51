"""What a catalog that comes in is: where it lies and which columns count. Shared by its readers."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from distsbi.store.place import Place
from distsbi.store.rows import Row

CHUNK_ROWS = 2**14  # ids are gone through in pieces of so many


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """Where the rows are. Plain values: it travels to the workers.

    Args:
        path: a Parquet file, a folder of them, .npy, .npz or a Zarr group; a local path or a URI.
        id_column: the column (array of the .npz or the group) with the ids, integers or strings; None: the row number is the id. A .npy can hold no
            ids, so with the default this becomes None there.
        x_column: the column with x, a list or a tensor per row.
        x_columns: instead, columns that make up x, in this order: scalars, or lists and tensors, which are flattened and joined, or stacked
            where all have as many values, more than one.

    Raises ValueError if both are given.
    """

    path: str
    id_column: str | None = "id"
    x_column: str = "x"
    x_columns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.path.partition("?")[0].endswith(".npy") and self.id_column == SourceSpec.id_column:
            object.__setattr__(self, "id_column", None)
        if self.x_columns and self.x_column != SourceSpec.x_column:
            raise ValueError(
                f"give x_column or x_columns; got both, {self.x_column!r} and {', '.join(self.x_columns)}."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return self.x_columns or (self.x_column,)


class Source(Protocol):
    """A catalog that is open."""

    n_rows: int
    id_type: pa.DataType

    def id_chunks(self) -> Iterator[pa.Array]:
        """All ids, int64, uint64, string or binary, in pieces."""
        ...

    def read(self, start: int, stop: int) -> tuple[pa.Array, list[Row]]:
        """Ids and x of the rows start, ..., stop - 1."""
        ...


def check_columns(spec: SourceSpec, path: Place, names: Sequence[str]) -> None:
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
            "column>, or x_columns=<names> for scalar columns."
        )


def row_numbers(n_rows: int) -> Iterator[pa.Array]:
    """0, 1, 2, ... in pieces."""
    for start in range(0, n_rows, CHUNK_ROWS):
        yield pa.array(np.arange(start, min(start + CHUNK_ROWS, n_rows)))
