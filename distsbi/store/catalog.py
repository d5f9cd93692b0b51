"""The catalog that came out, opened: who is done, summaries by name, draws by id. Nothing is read unasked."""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from jaxtyping import Float

from distsbi.store import check, layout, record, schema, status
from distsbi.store.place import Place, as_place, shown
from distsbi.store.schema import OK
from distsbi.store.status import Status

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

Id = int | str | bytes
_DAMAGED = (pa.ArrowException, OSError)  # what pyarrow says of a file that is cut off or altered, or does not come
_CHECKED = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
_NO_SUCH_IDS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)  # what pyarrow says of values of another type


class NoDraws(ValueError, KeyError):
    """An id that the catalog lacks, that is not done, or whose row has no draws."""

    __str__ = ValueError.__str__


class Catalog:
    """An output folder of `distsbi.sample_catalog`, complete or not: it shows the shards that are there.

    `catalog[id]` are the draws of an observation [draws, dim_theta, ch_theta], `id in catalog` says whether there are some,
    `for id in catalog` goes through the ids that have draws, `catalog.items()` through them with their draws, and `len(catalog)` counts
    them. Only what is asked for is read, and its pages' checksums are compared: what reads raises ValueError for a shard that is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Raises ValueError if `path`, a folder or a URI, is no such output, or is damaged."""
        self.place = as_place(path)
        self.path: Path | str = Path(self.place.path) if self.place.local else str(self.place)
        run = record.read_run(self.place)
        if run is None:
            record.refuse_bare_shards(self.place)
            raise ValueError(
                f"{shown(path)} is no output folder of sample_catalog or simulate (no {layout.run_file(self.place)})."
            )
        if "simulator" in run["definition"]:
            raise ValueError(
                f"{shown(path)} is a folder of simulations, not a catalog; read it with distsbi.data.read_pairs."
            )
        self.run: dict[str, Any] = run
        definition = run["definition"]
        self.fingerprint: str = run["fingerprint"]
        self.n_rows: int = definition["n_rows"]
        self.rows_per_shard: int = definition["rows_per_shard"]
        self.n_shards = layout.shard_count(self.n_rows, self.rows_per_shard)

    def __repr__(self) -> str:
        return f"Catalog({str(self.path)!r}, {self.n_rows} rows, {len(self.shards)} of {self.n_shards} shards done)"

    @functools.cached_property
    def shards(self) -> list[int]:
        """Numbers of the shards that are done."""
        return layout.shards_done(self.place, self.n_shards)

    @functools.cached_property
    def dataset(self) -> ds.Dataset:
        """The finished shards as one lazy pyarrow dataset. Raises ValueError if there are none yet."""
        if not self.shards:
            raise ValueError(f"{self.path} has no finished shards yet.")
        files = [self._file(shard).path for shard in self.shards]
        with self._telling_damage():
            return ds.dataset(
                files, format=ds.ParquetFileFormat(default_fragment_scan_options=_CHECKED), filesystem=self.place.fs
            )

    @property
    def about(self) -> dict[str, Any]:
        """Parameter names, shapes and fingerprint, from the shards' metadata."""
        return schema.read_about(self.dataset.schema)

    def status(self) -> Status:
        """How far it is now, and how fast. Raises ValueError naming a shard that is damaged."""
        return status.read_status(self.place, self.n_rows, self.rows_per_shard)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of all finished rows, in catalog order; None: all but the draws.

        Raises ValueError naming an unknown column.
        """
        names = self.dataset.schema.names
        wanted = [name for name in names if name != "draws"] if columns is None else list(columns)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(f"there is no column {unknown[0]!r}; the columns are {', '.join(names)}.")
        with self._telling_damage():
            return self.dataset.to_table(columns=wanted)

    def summary(self) -> pa.Table:
        """id, status, message and `<parameter>_<mean, sd, q05, ...>`, plain columns; `.to_pandas()` makes a
        DataFrame. The draws are not read."""
        table = self.table()
        kinds = [name for name in table.column_names if pa.types.is_fixed_size_list(table.schema.field(name).type)]
        columns = {name: table[name] for name in ("id", "status", "message")}
        for i, component in enumerate(self.about["component_names"]):
            columns |= {f"{component}_{kind}": pc.list_element(table[kind], i) for kind in kinds}
        return pa.table(columns)

    def __getitem__(self, id: Id) -> Float[np.ndarray, "draws dim_theta ch_theta"]:
        return self.draws(id)

    def __contains__(self, id: object) -> bool:
        try:
            (at,) = self._find([id])  # type: ignore[list-item]
            return self._index["status"][int(at)].as_py() == OK
        except NoDraws:
            return False

    def __len__(self) -> int:
        return pc.sum(pc.equal(self._index["status"], OK)).as_py() or 0

    def __iter__(self) -> Iterator[Id]:
        for id, state in zip(self._index["id"], self._index["status"], strict=True):
            if state.as_py() == OK:
                yield id.as_py()

    def items(self) -> Iterator[tuple[Id, Float[np.ndarray, "draws dim_theta ch_theta"]]]:
        """Every id with its draws, in catalog order, a row group in memory at a time."""
        self._check_draws()
        for shard in self.shards:
            with self._opened(shard) as file:
                for group in range(file.num_row_groups):
                    with self._telling_damage(shard):
                        table = file.read_row_group(group, columns=["id", "status", "draws"]).combine_chunks()
                    good = table.filter(pc.equal(table["status"], OK)).combine_chunks()
                    if good.num_rows:
                        yield from zip(good["id"].to_pylist(), self._arrays(good), strict=True)

    def draws(self, id: Id) -> Float[np.ndarray, "draws dim_theta ch_theta"]:
        """The draws of one observation, read from its row group alone. The same as `catalog[id]`.

        Raises ValueError (a NoDraws, which is a KeyError too) for an id that the catalog lacks or that is not done, or a row
        without draws, saying why; for an output without draws.
        """
        return self.draws_of([id])[0]

    def draws_of(self, ids: Sequence[Id]) -> Float[np.ndarray, "ids draws dim_theta ch_theta"]:
        """The draws of some observations, in the order of `ids`. Every row group is read once. Raises as `draws`."""
        self._check_draws()
        rows = self._index["row"].take(pa.array(self._find(ids))).to_pylist()
        made = np.empty((len(rows), *self.about["draws_shape"]), np.float32)
        for shard, places in _grouped((row // self.rows_per_shard, i) for i, row in enumerate(rows)).items():
            with self._opened(shard) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                starts = np.cumsum([0, *sizes[:-1]])
                offsets = {i: rows[i] - shard * self.rows_per_shard for i in places}
                groups = _grouped((int(np.searchsorted(starts, offsets[i], "right")) - 1, i) for i in places)
                for group, members in groups.items():
                    with self._telling_damage(shard):
                        table = file.read_row_group(group, columns=["status", "message", "draws"])
                    found = table.take([offsets[i] - starts[group] for i in members]).combine_chunks()
                    for i, state, message in zip(
                        members, found["status"].to_pylist(), found["message"].to_pylist(), strict=True
                    ):
                        if state != OK:
                            raise NoDraws(f"id {ids[i]!r} has no draws: {state}, {str(message).rstrip('.')}.")
                    made[members] = self._arrays(found)
        return made

    def to_xarray(self, ids: Sequence[Id] | Id | None = None) -> Any:
        """The draws as an xarray.DataArray with dimensions observation, draw, parameter (and channel, where there are
        several). `ids`: of which observations, or of one; None: of all that have draws, up to 8 GiB. Raises as `draws`."""
        from distsbi.store import export

        self._check_draws()
        return export.to_xarray(self, ids)

    def to_inference_data(self, id: Id) -> Any:
        """The draws of one observation for ArviZ: group `posterior`, a variable for each parameter, one chain. Raises as `draws`."""
        from distsbi.store import export

        return export.to_inference_data(self, id)

    def verify(self) -> list[str]:
        """Reads everything, checking both checksums of every shard, row numbers, fingerprints and that no id comes twice.

        Returns what is wrong, a sentence each; empty: all is well. Shards not done yet are not wrong. `distsbi verify` also
        draws some rows again and compares.
        """
        return [f"{problem.what}." for problem in self.problems()]

    def problems(self) -> Iterator[check.Problem]:
        """What `verify` finds, shard by shard."""
        good = []
        for found in self.checked_shards():
            if isinstance(found, check.Problem):
                yield found
            else:
                good.append(found["row"][0].as_py() // self.rows_per_shard)
        yield from check.check_ids(self.place, good, self.n_shards)

    def checked_shards(self) -> Iterator[check.Problem | pa.Table]:
        """The table of every finished shard that is as it was written, or what is wrong with it."""
        journal = status.last_lines(layout.read_journal(self.place))
        return check.check_shards(self.place, self.shards, self.n_rows, self.rows_per_shard, self.fingerprint, journal)

    def _file(self, shard: int) -> Place:
        return layout.shard_file(self.place, shard, self.n_shards)

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[pq.ParquetFile]:
        with contextlib.ExitStack() as stack:
            with self._telling_damage(shard):
                source = stack.enter_context(self._file(shard).open())
                file = stack.enter_context(pq.ParquetFile(source, page_checksum_verification=True))
            yield file

    @contextlib.contextmanager
    def _telling_damage(self, shard: int | None = None) -> Iterator[None]:
        """Of a block that reads."""
        try:
            yield
        except _DAMAGED as error:
            which = f"{self.path} has a shard that" if shard is None else f"{self._file(shard)}"
            raise ValueError(
                f"{which} cannot be read ({str(error).splitlines()[0].rstrip('.')}); `distsbi verify {self.path} --repair` finds shards that "
                "are damaged and makes them again."
            ) from error

    def _check_draws(self) -> None:
        if "draws" not in self.dataset.schema.names:
            raise ValueError(f"{self.path} was written with draws=False; it has summaries only.")

    def _find(self, ids: Sequence[Id]) -> np.ndarray:
        """The places of some ids in the index, which is gone through once. Raises NoDraws naming the first that it lacks."""
        kind = self.dataset.schema.field("id").type
        try:
            wanted = pa.array(list(ids), kind)
        except _NO_SUCH_IDS:
            wrong = next(id for id in ids if not _fits(id, kind))
            raise NoDraws(f"ids of {self.path} are {kind}; got {wrong!r}.") from None
        different = wanted.unique()
        numbers = pc.index_in(self._index["id"], value_set=different)  # null for an id that is not wanted
        there = np.flatnonzero(pc.is_valid(numbers).to_numpy())
        place = np.full(len(different), -1)
        place[numbers.drop_null().to_numpy()] = there
        found = place[pc.index_in(wanted, value_set=different).to_numpy()]
        if (found < 0).any():
            lacking = ids[int(np.flatnonzero(found < 0)[0])]
            unfinished = "" if len(self.shards) == self.n_shards else " among the finished shards"
            raise NoDraws(f"there is no id {lacking!r} in {self.path}{unfinished}.")
        return found

    def _arrays(self, table: pa.Table) -> Float[np.ndarray, "rows draws dim_theta ch_theta"]:
        """The draws of rows that have some."""
        values = table["draws"].chunk(0).storage.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(table.num_rows, *self.about["draws_shape"])

    @functools.cached_property
    def _index(self) -> pa.Table:
        with self._telling_damage():
            return self.dataset.to_table(columns=["id", "row", "status"])


def _fits(id: object, kind: pa.DataType) -> bool:
    try:
        pa.scalar(id, kind)
    except _NO_SUCH_IDS:
        return False
    return True


def _grouped(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Second numbers by the first, in order."""
    groups: dict[int, list[int]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def open_catalog(path: str | os.PathLike[str]) -> Catalog:
    """Opens an output of `distsbi.sample_catalog`: a folder, or a URI such as s3://bucket/out. Raises ValueError if it is none."""
    return Catalog(path)
