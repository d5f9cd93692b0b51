"""The catalog that came out, opened: who is done, summaries by name, draws by id. Nothing is read unasked."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from jaxtyping import Float

from distsbi.store import layout, record, schema
from distsbi.store.schema import OK, STATUSES

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a catalog is.

    `counts`: rows by status ("ok", "invalid", "failed"); `left`: rows of shards not done.
    """

    shards: int
    shards_done: int
    rows: int
    left: int
    counts: dict[str, int]

    @property
    def complete(self) -> bool:
        return self.shards_done == self.shards


class Catalog:
    """An output folder of `distsbi.sample_catalog`, complete or not: it shows the shards that are there."""

    def __init__(self, path: str | Path):
        """Raises ValueError if `path` is no such folder, or is damaged."""
        self.path = Path(path)
        run = record.read_run(self.path)
        if run is None:
            raise ValueError(f"{path} is no output folder of sample_catalog (no {layout.run_file(path)}).")
        self.run: dict[str, Any] = run
        definition = run["definition"]
        self.fingerprint: str = run["fingerprint"]
        self.n_rows: int = definition["n_rows"]
        self.rows_per_shard: int = definition["rows_per_shard"]
        self.n_shards = -(-self.n_rows // self.rows_per_shard)

    def __repr__(self) -> str:
        return f"Catalog({str(self.path)!r}, {self.n_rows} rows, {len(self.shards)} of {self.n_shards} shards done)"

    @functools.cached_property
    def shards(self) -> list[int]:
        """Numbers of the shards that are done."""
        return layout.shards_done(self.path, self.n_shards)

    @functools.cached_property
    def dataset(self) -> ds.Dataset:
        """The finished shards as one lazy pyarrow dataset. Raises ValueError if there are none yet."""
        if not self.shards:
            raise ValueError(f"{self.path} has no finished shards yet.")
        return ds.dataset([str(self._file(shard)) for shard in self.shards], format="parquet")

    @property
    def about(self) -> dict[str, Any]:
        """Parameter names, shapes and fingerprint, from the shards' metadata."""
        return schema.read_about(self.dataset.schema)

    def status(self) -> Status:
        """How far it is, from the shards' footers."""
        counts = dict.fromkeys(STATUSES, 0)
        for shard in self.shards:
            for status, count in schema.read_counts(self._file(shard)).items():
                counts[status] += count
        return Status(self.n_shards, len(self.shards), self.n_rows, self.n_rows - sum(counts.values()), counts)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of all finished rows, in catalog order; None: all but the draws.

        Raises ValueError naming an unknown column.
        """
        names = self.dataset.schema.names
        wanted = [name for name in names if name != "draws"] if columns is None else list(columns)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(f"there is no column {unknown[0]!r}; the columns are {', '.join(names)}.")
        return self.dataset.to_table(columns=wanted)

    def summary(self) -> pa.Table:
        """id, status, message and `<parameter>_<mean, sd, q05, ...>`, plain columns; `.to_pandas()` makes a
        DataFrame."""
        table = self.table()
        kinds = [name for name in table.column_names if pa.types.is_fixed_size_list(table.schema.field(name).type)]
        columns = {name: table[name] for name in ("id", "status", "message")}
        for i, component in enumerate(self.about["component_names"]):
            columns |= {f"{component}_{kind}": pc.list_element(table[kind], i) for kind in kinds}
        return pa.table(columns)

    def draws(self, id: int | str | bytes) -> Float[np.ndarray, "draws dim_theta ch_theta"]:
        """The draws of one observation, read from its row group alone.

        Raises ValueError for an id that the catalog lacks or that is not done, a row without draws (saying why), or
        an output without draws.
        """
        if "draws" not in self.dataset.schema.names:
            raise ValueError(f"{self.path} was written with draws=False; it has summaries only.")
        try:
            value = pa.scalar(id, self.dataset.schema.field("id").type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            raise ValueError(f"ids of {self.path} are {self.dataset.schema.field('id').type}; got {id!r}.") from None
        at = pc.index(self._index["id"], value).as_py()
        if at < 0:
            unfinished = "" if len(self.shards) == self.n_shards else " among the finished shards"
            raise ValueError(f"there is no id {id!r} in {self.path}{unfinished}.")
        row = self._index["row"][at].as_py()
        shard = row // self.rows_per_shard
        with pq.ParquetFile(self._file(shard)) as file:
            offset, group = row - shard * self.rows_per_shard, 0
            while offset >= file.metadata.row_group(group).num_rows:
                offset -= file.metadata.row_group(group).num_rows
                group += 1
            found = file.read_row_group(group, columns=["status", "message", "draws"]).slice(offset, 1).combine_chunks()
        if found["status"][0].as_py() != OK:
            raise ValueError(
                f"id {id!r} has no draws: {found['status'][0].as_py()}, {str(found['message'][0].as_py()).rstrip('.')}."
            )
        values = found["draws"].chunk(0).storage.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(self.about["draws_shape"])

    def verify(self) -> list[str]:
        """Reads everything, checking page checksums, row numbers, fingerprints and that no id comes twice.

        Returns what is wrong, a sentence each; empty: all is well. Shards not done yet are not wrong.
        """
        problems = []
        ids = []
        for shard in self.shards:
            path, start = self._file(shard), shard * self.rows_per_shard
            expected = range(start, min(start + self.rows_per_shard, self.n_rows))
            try:
                table = pq.read_table(path, page_checksum_verification=True)
                about = schema.read_about(table.schema)
            except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
                problems.append(f"{path.name} cannot be read ({error}); delete it and sample again.")
                continue
            if about["fingerprint"] != self.fingerprint:
                problems.append(f"{path.name} is of another run ({about['fingerprint']}, not {self.fingerprint}).")
            if table["row"].to_pylist() != list(expected):
                problems.append(
                    f"{path.name} must hold rows {expected.start} to {expected.stop - 1}; it holds {table.num_rows} "
                    "rows."
                )
            ids.append(table["id"])
        if ids:
            together = pa.chunked_array([chunk for part in ids for chunk in part.chunks], ids[0].type)
            repeated = len(together) - pc.count_distinct(together).as_py()
            if repeated:
                problems.append(f"{repeated} rows have an id that occurs before.")
        return problems

    def _file(self, shard: int) -> Path:
        return layout.shard_file(self.path, shard, self.n_shards)

    @functools.cached_property
    def _index(self) -> pa.Table:
        return self.dataset.to_table(columns=["id", "row"])


def open_catalog(path: str | Path) -> Catalog:
    """Opens an output folder of `distsbi.sample_catalog`. Raises ValueError if it is none."""
    return Catalog(path)
