"""Checksums of a checkpoint: SHA-256 of every file of the state, beside them, so that altered numbers are not trained on.

    run/checkpoints/<step>/default/   the state, as orbax writes it
                      sha256.json     {"format": 1, "files": {path in the folder: SHA-256}, "sha256": that of "files"}

TensorStore keeps none of float data: with one bit changed it restores without an error, and other numbers. orbax calls `finalize` in process 0 when
all processes have written their files and before the folder gets its name, so that a step that is there has its checksums.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from distsbi.files import sha256_of, write_json

ITEM = "default"  # orbax's name of the one thing that a step holds
FILE, FORMAT = "sha256.json", 1


class Handler(ocp.StandardCheckpointHandler):
    """orbax's handler of pytrees, that leaves checksums beside what it wrote."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)  # which merges the files of all processes
        write_checksums(Path(directory))


def registry() -> ocp.handlers.CheckpointHandlerRegistry:
    """For `CheckpointManager`: the handler of what `StandardSave` and `StandardRestore` ask for."""
    made, handler = ocp.handlers.DefaultCheckpointHandlerRegistry(), Handler()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        made.add(ITEM, args, handler)
    return made


def write_checksums(folder: Path) -> None:
    """Writes those of all files in the folder. Raises OSError."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != FILE)
    content = {str(file.relative_to(folder)): sha256_of(file) for file in files}
    write_json(folder / FILE, {"format": FORMAT, "files": content, "sha256": _of_all(content)})


def has_checksums(folder: Path) -> bool:
    return (folder / FILE).exists()


def find_altered(folder: Path, index: int = 0, count: int = 1) -> str | None:
    """Which file is not as it was written, in words, of every `count`-th from the `index`-th on; None if all are."""
    try:
        found = json.loads((folder / FILE).read_text())
        version, files, own = found["format"], found["files"], found["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{FILE} is damaged"
    except OSError as error:
        return f"{FILE} cannot be read: {error.strerror}"
    if version != FORMAT:
        return f"{FILE} has format {version}, and this distsbi reads {FORMAT}"
    if own != _of_all(files):
        return f"{FILE} is not the file that was written: its checksum differs"
    for name, digest in sorted(files.items())[index::count]:
        try:
            if sha256_of(folder / name) != digest:
                return f"{name} is not the file that was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _of_all(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
