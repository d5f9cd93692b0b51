"""The rows that go out: one per observation.

    id             the catalog's id
    row            row number in the catalog
    observation_id names the observation's random numbers: `posterior.sample(..., observation_id=...)` repeats them
    status         "ok", "invalid" (x is unusable), "failed" (sampling it raised) or "quarantined" (it kills or hangs its process)
    message        why, where not ok; of an "ok" row, that its x lies far outside the simulations; else null
    mean, sd, q05, q50, q95 (any quantiles)    float32 [parameters], over all draws
    draws          arrow.fixed_shape_tensor float32 [draws, dim_theta, ch_theta]; every `thin`-th draw; may be left out

Where status is not "ok" the numbers are null, never NaN. Shapes, parameter names and the run's fingerprint are also
in the schema's metadata, as JSON under "distsbi"; rows by status and a SHA-256 of the decoded contents in the file's.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from jaxtyping import Float

from distsbi.store.place import Place, as_place
from distsbi.store.reading import decoded

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

OK, INVALID, FAILED, QUARANTINED = "ok", "invalid", "failed", "quarantined"
STATUSES: tuple[str, ...] = (OK, INVALID, FAILED, QUARANTINED)
KEY, COUNTS, DIGEST = b"distsbi", b"distsbi.counts", b"distsbi.sha256"
ROW_GROUP_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Output:
    """What is kept of the draws.

    Args:
        draws: whether draws are written, or summaries only.
        thin: every `thin`-th draw is written; summaries use all.
        quantiles: in (0, 1), ascending.
    """

    draws: bool = True
    thin: int = 1
    quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)

    def __post_init__(self) -> None:
        if isinstance(self.thin, bool) or not isinstance(self.thin, int) or self.thin < 1:
            raise ValueError(f"thin must be a positive integer; got {self.thin!r}.")
        if any(not 0 < q < 1 for q in self.quantiles) or list(self.quantiles) != sorted(set(self.quantiles)):
            raise ValueError(f"quantiles must be between 0 and 1 and ascending; got {self.quantiles}.")

    def kept(self, nsamples: int) -> int:
        """Draws written per row."""
        return -(-nsamples // self.thin) if self.draws else 0


@dataclasses.dataclass(frozen=True)
class Format:
    """The form of a folder's shards.

    Args:
        id_type: of the catalog's ids.
        names: a name for each of the dim_theta parameters.
        ch_theta: channels of a parameter.
        nsamples: draws made per row.
        output: what is kept of them.
        fingerprint: of the run.
    """

    id_type: pa.DataType
    names: tuple[str, ...]
    ch_theta: int
    nsamples: int
    output: Output
    fingerprint: str

    @property
    def size(self) -> int:
        """Numbers in one draw."""
        return len(self.names) * self.ch_theta

    @property
    def draws_shape(self) -> tuple[int, int, int]:
        return (self.output.kept(self.nsamples), len(self.names), self.ch_theta)

    def schema(self) -> pa.Schema:
        vector = pa.list_(pa.float32(), self.size)
        fields = [
            pa.field("id", self.id_type, nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("observation_id", pa.uint64(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("message", pa.string()),
            *(pa.field(name, vector) for name in ("mean", "sd", *map(quantile_name, self.output.quantiles))),
        ]
        if self.output.draws:
            tensor = pa.fixed_shape_tensor(pa.float32(), self.draws_shape, dim_names=["draw", "parameter", "channel"])
            fields.append(pa.field("draws", tensor))
        about = {
            "fingerprint": self.fingerprint,
            "parameter_names": list(self.names),
            "component_names": list(component_names(self.names, self.ch_theta)),
            "ch_theta": self.ch_theta,
            "nsamples": self.nsamples,
            "thin": self.output.thin,
            "quantiles": list(self.output.quantiles),
            "draws_shape": list(self.draws_shape) if self.output.draws else None,
        }
        return pa.schema(fields, metadata={KEY: json.dumps(about)})

    def table(
        self,
        ids: pa.Array,
        rows: np.ndarray,
        observation_ids: np.ndarray,
        status: Sequence[str],
        message: Sequence[str | None],
        draws: Float[np.ndarray, "ok nsamples dim_theta ch_theta"],
    ) -> pa.Table:
        """One row per observation; `draws` holds those with status "ok", in order."""
        ok = np.asarray([s == OK for s in status], bool)
        flat = draws.reshape(len(draws), draws.shape[1], self.size)  # -1 would not do where no row is ok
        columns = [
            ids,
            pa.array(rows),
            pa.array(observation_ids),
            pa.array(status, pa.string()),
            pa.array(message, pa.string()),
        ]
        columns += [_fixed(values, ok) for values in summaries(flat, self.output.quantiles)]
        schema = self.schema()
        if self.output.draws:
            kept = np.ascontiguousarray(flat[:, :: self.output.thin])
            columns.append(
                pa.ExtensionArray.from_storage(
                    schema.field("draws").type, _fixed(kept.reshape(len(kept), kept.shape[1] * self.size), ok)
                )
            )
        columns = [
            column if isinstance(column, pa.ExtensionArray) else column.cast(field.type)
            for column, field in zip(columns, schema, strict=True)
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def write(self, table: pa.Table, file: Any) -> None:
        """Parquet: row groups by bytes, checksums on the pages; floats as they are (they hardly compress). Rows by status and the
        digest of the contents go into the footer."""
        row_bytes = 4 * (self.size * (2 + len(self.output.quantiles)) + int(np.prod(self.draws_shape))) + 64
        compression: Any = {"id": "ZSTD", "row": "ZSTD", "status": "ZSTD", "message": "ZSTD"}
        with pq.ParquetWriter(
            file, table.schema, use_dictionary=False, compression=compression, write_page_checksum=True
        ) as writer:
            writer.write_table(table, row_group_size=max(1, ROW_GROUP_BYTES // row_bytes))
            writer.add_key_value_metadata({COUNTS: json.dumps(count_rows(table)), DIGEST: digest(table)})

    def encode(self, table: pa.Table) -> pa.Buffer:
        """The bytes of a whole shard file."""
        stream = pa.BufferOutputStream()
        self.write(table, stream)
        return stream.getvalue()


def count_rows(table: pa.Table) -> dict[str, int]:
    """Rows by status."""
    return {name: pc.sum(pc.equal(table["status"], name)).as_py() for name in STATUSES}


def read_counts(path: str | os.PathLike[str] | Place) -> dict[str, int]:
    """Rows by status of one shard, from its footer. Raises ValueError naming a file that is damaged, OSError if it cannot be read now."""
    return decoded(as_place(path), lambda file: json.loads(pq.read_metadata(file).metadata[COUNTS]))


def digest(table: pa.Table) -> str:
    """SHA-256 of the decoded contents, column by column: names, which values are null, and the others. Hexadecimal.

    The same however the table is cut into chunks or stored.
    """
    sha = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        sha.update(name.encode() + b"\0")
        valid = pc.is_valid(column).to_numpy()
        sha.update(np.packbits(valid).tobytes())
        for chunk in column.chunks:
            values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            if pa.types.is_fixed_size_list(values.type):
                values = values.flatten()  # without nulls
            if pa.types.is_primitive(values.type):
                sha.update(np.ascontiguousarray(values.drop_null().to_numpy(zero_copy_only=False)).data)
            else:
                for value in values.drop_null().to_pylist():
                    text = value if isinstance(value, bytes) else value.encode()
                    sha.update(len(text).to_bytes(8, "little") + text)
    return sha.hexdigest()


def summaries(flat: Float[np.ndarray, "rows nsamples size"], quantiles: Sequence[float]) -> list[np.ndarray]:
    """Mean, standard deviation (n - 1; 0 for one draw) and quantiles over the draws, each [rows, size] float32."""
    mean = flat.mean(1, dtype=np.float64)
    spread = flat.std(1, dtype=np.float64, ddof=1) if flat.shape[1] > 1 else np.zeros_like(mean)
    levels = (
        np.quantile(flat, quantiles, axis=1) if len(flat) and quantiles else np.zeros((len(quantiles), *mean.shape))
    )
    return [np.asarray(values, np.float32) for values in (mean, spread, *levels)]


def quantile_name(q: float) -> str:
    """Column of a quantile: q05, q50, q97.5."""
    return "q" + f"{100 * q:g}".zfill(2)


def component_names(names: Sequence[str], ch_theta: int) -> tuple[str, ...]:
    """A name for each number of a draw: the parameter's, with the channel behind it where there are several."""
    return tuple(names) if ch_theta == 1 else tuple(f"{name}[{c}]" for name in names for c in range(ch_theta))


def read_about(schema: pa.Schema) -> dict[str, Any]:
    """The metadata that `Format.schema` wrote. Raises ValueError if there is none."""
    if KEY not in (schema.metadata or {}):
        raise ValueError("this Parquet file was not written by distsbi (no 'distsbi' metadata).")
    return json.loads(schema.metadata[KEY])


def _fixed(values: Float[np.ndarray, "ok width"], ok: np.ndarray) -> pa.FixedSizeListArray:
    """A fixed-size list per row, null where not `ok`."""
    width = values.shape[1]
    if not ok.all():
        spread = np.zeros((len(ok), width), np.float32)
        spread[ok] = values
        values = spread
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values).reshape(-1)), width, mask=pa.array(~ok)
    )
