"""The catalog that comes in: rows of (id, x), read a few at a time.

    catalog.parquet, or a folder of Parquet files    id column + one list or tensor column x, or named columns
    catalog.npy                                      x alone, (rows, dim_x) or (rows, dim_x, ch_x); row numbers are the ids
    catalog.npz, a Zarr group (version 2 or 3)       arrays named like the columns

on local disks or in an object store (place.py). Rows are numbered 0, 1, 2, ... through the files in name order. A reader
takes any range of rows and touches only what holds them: the row groups of a Parquet file (parquet.py), the pages of a mapped .npy,
the chunks of a Zarr array (arrays.py). A row that holds no usable x comes back as the reason (rows.py).
"""

import hashlib

from distsbi.store import unique
from distsbi.store.arrays import ArraySource, is_zarr, open_arrays
from distsbi.store.parquet import ParquetSource
from distsbi.store.place import Place, as_place
from distsbi.store.spec import Source, SourceSpec

GLANCE_BYTES = 2**20  # what `glance` reads at either end of a file
BLOCK_BYTES = 8 * 2**20
KINDS = "a Parquet file, a folder of them, a .npy or .npz file, or a Zarr group"


def open_source(spec: SourceSpec) -> Source:
    """Raises ValueError for a missing or unreadable catalog, and for a missing column or one of the wrong kind."""
    place = as_place(spec.path)
    if not place.exists():
        raise ValueError(f"there is no catalog at {place}; give {KINDS}.")
    if place.suffix == ".npy":
        return ArraySource(spec, place, {spec.x_column: open_arrays(place)[""]})
    if place.suffix == ".npz" or is_zarr(place):
        return ArraySource(spec, place, open_arrays(place))
    if place.suffix in (".parquet", ".pq") or place.is_folder():
        return ParquetSource(spec, _files(place))
    raise ValueError(f"{place} is no catalog that can be read; give {KINDS}.")


def check_ids(source: Source, spec: SourceSpec) -> None:
    """Raises ValueError, naming some, for missing or repeated ids, and for a catalog without rows.

    In memory it has eight bytes for each id (unique.py).
    """
    if source.n_rows == 0:
        raise ValueError(f"the catalog {as_place(spec.path)} has no rows.")
    if spec.id_column is None:
        return
    row = missing = 0
    first = None
    for chunk in source.id_chunks():
        if chunk.null_count:
            missing += chunk.null_count
            first = row + chunk.is_null().index(True).as_py() if first is None else first
        row += len(chunk)
    if missing:
        raise ValueError(
            f"{missing} rows of {as_place(spec.path)} have no {spec.id_column!r} (the first is row {first}); give every "
            "row its own id, or pass id_column=None to number the rows."
        )
    repeated = unique.repeated(source.id_chunks, source.n_rows)
    if repeated:
        some = ", ".join(f"{value!r} ({count} times)" for value, count in repeated[:5])
        more = ", ..." if len(repeated) > 5 else ""
        raise ValueError(
            f"{len(repeated)} ids of {as_place(spec.path)} occur more than once: {some}{more}; the id names an observation's "
            "random numbers and result, so make them unique, or pass id_column=None to number the rows."
        )


def fingerprint(spec: SourceSpec) -> str:
    """blake2b of the bytes of the catalog's files, in row order. Hexadecimal. A moved catalog keeps it, also one that is
    moved to an object store; a changed one does not."""
    digest = hashlib.blake2b(digest_size=16)
    place = as_place(spec.path)
    chunks = is_zarr(place)
    for path in _files(place):
        if chunks:  # the names of the chunks say where they belong
            digest.update(path.path.removeprefix(place.path).encode() + b"\0")
        with path.open() as file:
            digest.update(file.size().to_bytes(8, "big"))
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def glance(spec: SourceSpec) -> str:
    """blake2b of the size, the first and the last MiB of each of the catalog's files, in row order. Hexadecimal. In an object store,
    and of the many files of a Zarr group, of names, sizes and times of writing alone.

    Cheap enough for every worker. It tells another catalog, other files, and a Parquet file that was written anew (its
    footer comes last); not numbers changed in place in the middle of a large file: those `fingerprint` tells.
    """
    digest = hashlib.blake2b(digest_size=16)
    place = as_place(spec.path)
    if not place.local or is_zarr(place):
        found = place.files(deep=True) or [place.info()]  # of a file, its own
        times = [0 if place.local else file.mtime_ns for file in found]  # copies on local disks have times of their own
        if place.local or all(times):
            for file, written in zip(found, times, strict=True):
                digest.update(f"{getattr(file, 'name', '')} {file.size} {written}\n".encode())
            return digest.hexdigest()
    for path in _files(place):
        with path.open() as file:
            size = file.size()
            digest.update(size.to_bytes(8, "big"))
            digest.update(file.read(GLANCE_BYTES))
            file.seek(max(size - GLANCE_BYTES, 0))
            digest.update(file.read(GLANCE_BYTES))
    return digest.hexdigest()


def _files(place: Place) -> list[Place]:
    """The file itself, all files of a Zarr group, or the Parquet files of a folder, in name order."""
    if not place.is_folder():
        return [place]
    names = [file.name for file in place.files(deep=True)]
    if not is_zarr(place):
        names = [n for n in names if n.endswith(".parquet") and not any(part[0] in "._" for part in n.split("/"))]
    if not names:
        raise ValueError(f"the folder {place} has no .parquet files; give the catalog's own folder.")
    return [place / name for name in names]
