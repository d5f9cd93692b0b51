"""Checkpoints of the full training state (orbax), and the files beside them.

    run/checkpoints/<step>/    the state, every leaf under its path
    run/training.json          what is being trained: a resumed run must be the same
    run/metrics.jsonl          one line per validation, cut back to the restored step on resume

orbax writes a step under a temporary name and renames it when complete, so a run killed while writing resumes from the step
before.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from distsbi.files import full_disk_says, write_json, write_text

TRAINING, METRICS, CHECKPOINTS = "training.json", "metrics.jsonl", "checkpoints"
ADVICE = "free some space and run the same training again: it resumes from the last complete checkpoint"


def flatten(tree: Any) -> dict[str, Any]:
    """Any pytree of arrays as a flat dict, named by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {re.sub(r"\W+", "_", jax.tree_util.keystr(path)).strip("_"): leaf for path, leaf in flat}


class Checkpoints:
    """The checkpoints of one run directory. A context manager: leaving it waits for writes under way."""

    def __init__(self, root: str | os.PathLike[str], identity: dict[str, Any]):
        """Raises ValueError if the directory holds the training of something else than `identity`."""
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        record = self.root / TRAINING
        if record.exists():
            try:
                found = json.loads(record.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{record} is damaged; remove {self.root} and train again.") from error
            differing = sorted(
                k for k in {*found, *identity} if found.get(k) != json.loads(json.dumps(identity.get(k)))
            )
            if differing:
                raise ValueError(
                    f"{self.root} holds another training (differs in {', '.join(differing)}); "
                    f"choose another checkpoint_dir, or remove this one."
                )
        else:
            write_json(record, identity)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.root / CHECKPOINTS, options=options)

    def restore(self, like: Any) -> Any | None:
        """The newest complete state, with the shapes and shardings of `like`; None if there is none yet."""
        step = self.manager.latest_step()
        if step is None:
            return None
        target = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in flatten(like).items()
        }
        try:
            restored = self.manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(
                f"checkpoint {step} in {self.root / CHECKPOINTS} cannot be read ({error}); remove its folder to resume from the one before."
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in flatten(like)])

    def save(self, step: int, state: Any) -> None:
        """Starts writing; returns when the state has been copied from the devices."""
        with full_disk_says(self.root, ADVICE):
            self.manager.save(step, args=ocp.args.StandardSave(flatten(state)))

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics, on disk before the checkpoint of the same step."""
        with full_disk_says(self.root, ADVICE), open(self.root / METRICS, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self, up_to: int) -> list[dict[str, Any]]:
        """The metrics until step `up_to`; later lines, and a line cut short, are removed from the file."""
        path = self.root / METRICS
        kept = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if line["step"] <= up_to:
                kept.append(line)
        if path.exists():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        with full_disk_says(self.root, ADVICE):
            self.manager.wait_until_finished()
            self.manager.close()
