"""run.json: what defines the draws in a folder, so that only the very same run goes on in it, and where they come from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distsbi.store import layout, schema
from distsbi.store.layout import Where
from distsbi.store.place import Place, as_place

FORMAT = 2  # 2: rows may be quarantined
DIFFERS = {
    # of what a digest says no more than that it differs
    "catalog.content": "the rows of the catalog are others, or have changed",
    "simulator.source": "the code of the simulator is another, or has changed",
    # which no option gives: it follows from the devices
    "tile": "tile: given {given}, found {found}, for it was drawn on {devices} ({as_then})",
}
AS_THEN = {
    "cpu": "give no --gpus-per-worker; with workers=0 set JAX_PLATFORMS=cpu",
    "other": "give the same --gpus-per-worker as then, which distsbi status prints",
}
KINDS = {"catalog": "a catalog", "simulation": "simulations"}  # of folders
OF_WHAT = ("posterior", "catalog.content", "simulator", "prior")  # where none of them differs nothing is to be deleted


def fingerprint(definition: Mapping[str, Any]) -> str:
    """blake2b of a definition (JSON-able). Hexadecimal."""
    return hashlib.blake2b(json.dumps(definition, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_run(out: Where) -> dict[str, Any] | None:
    """run.json of a folder; None if there is none.

    Raises ValueError if it is damaged or of a newer format.
    """
    place = layout.run_file(as_place(out))
    try:
        found = json.loads(place.read())
        version, _ = found["format"], found["definition"]["n_rows"]
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place} is damaged ({type(error).__name__}); restore it, or sample into another folder."
        ) from error
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{as_place(out)} has catalog format {version}; this distsbi reads up to {FORMAT}. Update distsbi."
        )
    return found


def refuse_bare_shards(out: Where) -> None:
    """Raises ValueError for a folder without run.json that holds shards all the same, as a copy of the Parquet files alone does."""
    place = as_place(out)
    names = [file.name for file in place.files() if file.name.endswith(".parquet") and file.name[0] not in "._"]
    shards = [name for name in names if layout.is_shard(name)]
    of = [_is_of_catalog(place / name) for name in (shards[:1] or names[:1])]  # shards may have been renamed
    if shards or True in of:
        what = {True: "a catalog", False: "simulations", None: "a catalog or of simulations"}[of[0]]
        raise ValueError(
            f"{place} holds shards of {what}, but no {layout.HIDDEN}/run.json, which says what they belong to. Copy the folder {layout.HIDDEN} "
            "too, from where these files were copied; if it is lost, use another folder for what you make anew."
        )


def _is_of_catalog(file: Place) -> bool | None:
    """Whether a Parquet file says that it is a shard of a catalog; None if it cannot be read."""
    try:
        with file.open() as opened:
            note = (pq.read_schema(opened).metadata or {}).get(schema.KEY, b"null")
        return isinstance(json.loads(note), dict)  # of a part of draws it is a digest
    except (pa.ArrowException, OSError, ValueError):
        return None


def begin(
    out: Where, definition: Mapping[str, Any], about: Mapping[str, Any], latest: Mapping[str, Any] | None = None
) -> None:
    """Claims a folder for the run that `definition` defines, or checks that it is this run's already.

    `about`: what else to remember (paths, versions, when); it may differ between calls, and that of the first is kept. (The device
    and the versions that made a shard are in its line of the journal.) `latest`: more of it, of which that of the last call is kept.

    Raises ValueError naming what differs, given and found, if another run began in this folder.
    """
    place = as_place(out)
    found = read_run(place)
    if found is None:
        refuse_bare_shards(place)
        _write(
            place,
            {
                "format": FORMAT,
                "fingerprint": fingerprint(definition),
                "definition": dict(definition),
                "about": {**about, **(latest or {})},
            },
        )
        return
    check_same(place, definition, found["definition"], found["about"])
    told = {**found["about"], **(latest or {})}
    if told != found["about"]:
        _write(place, {**found, "about": told})


def check_part(out: Where, part: Mapping[str, Any], found: Mapping[str, Any], of: str) -> None:
    """Raises ValueError if what was found in a folder (`read_run`) is of another kind than `of` (one of KINDS), or naming what differs between some
    entries of a definition and those that were found."""
    definition = found["definition"]
    there = "simulation" if "simulator" in definition else "catalog"
    if there != of:
        raise ValueError(f"{out} holds {KINDS[there]}; give another folder for {KINDS[of]}.")
    check_same(out, part, {name: definition.get(name) for name in part}, found["about"])


def check_same(
    out: Where, definition: Mapping[str, Any], found: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError naming what differs between a definition and the one that was found in a folder, or the same entries of both. `about`:
    what else was found there."""
    given, there = _flat(definition), _flat(found)
    # in the order of the definition, which names what was asked for before what follows from it
    differing = [name for name in dict.fromkeys([*given, *there]) if given.get(name) != there.get(name)]
    if differing:
        kinds = (about or {}).get("devices", ())
        devices = " and ".join(kinds) or "other devices"
        as_then = AS_THEN["cpu" if kinds and all(kind.startswith("cpu") for kind in kinds) else "other"]
        named = "; ".join(
            DIFFERS.get(name, "{name}: given {given}, found {found}").format(
                name=name,
                given=_short(name, given.get(name)),
                found=_short(name, there.get(name)),
                devices=devices,
                as_then=as_then,
            )
            for name in differing
        )
        delete = f", or delete {out}" if any(name.startswith(OF_WHAT) for name in differing) else ""
        raise ValueError(
            f"{out} holds another run, and mixing two would spoil both: {named}. Use another folder, or give what was "
            f"found to go on with it{delete}."
        )


def note_device(out: Where, device: str) -> None:
    """Adds a kind of hardware to those on which the draws were made. Only for who holds the folder."""
    found = read_run(out)
    if found is not None and device not in found["about"].setdefault("devices", []):
        found["about"]["devices"].append(device)
        _write(as_place(out), found)


def _write(out: Place, run: dict[str, Any]) -> None:
    layout.run_file(out).write((json.dumps(run, indent=1) + "\n").encode())


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in json.loads(json.dumps(value)).items():
        if isinstance(item, dict):
            flat.update(_flat(item, f"{prefix}{name}."))
        else:
            flat[prefix + name] = item
    return flat


def _short(name: str, value: Any) -> str:
    if name == "seed" and isinstance(value, list):  # the words of the key; see keys.seed_of, which is jax's
        value = value[0] << 32 | value[1]
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({fingerprint({'value': value})[:8]})"
