"""Checkpoints of the full training state (orbax), and the files beside them.

    run/checkpoints/<step>/    the state, every leaf under its path
    run/training.json          what is being trained: a resumed run must be the same
    run/metrics.jsonl          one line per validation, cut back to the restored step on resume

orbax writes a step under a temporary name and renames it when complete, so a run killed while writing resumes from the step
before.
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import orbax.checkpoint as ocp

from distsbi.files import full_disk_says, write_json, write_text

TRAINING, METRICS, CHECKPOINTS = "training.json", "metrics.jsonl", "checkpoints"
SPEC = "spec.json"  # what distsbi.sampling.run, a layer above, writes of a finished run
LINE = ("step", "loss", "val_loss")  # of metrics
ADVICE = "free some space and run the same training again: it resumes from the last complete checkpoint"


def flatten(tree: Any) -> dict[str, Any]:
    """Any pytree of arrays as a flat dict, named by path: "/" and all else that is no plain name is percent-escaped, since orbax makes
    paths of the names.

    Raises ValueError if two leaves have one name.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {quote(jax.tree_util.keystr(path), safe="[]'"): leaf for path, leaf in flat}
    if len(named) < len(flat):
        names = [jax.tree_util.keystr(path) for path, _ in flat]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two weights of the network have one name, {twice}; rename one of them.")
    return named


class Checkpoints:
    """The checkpoints of one run directory. A context manager: leaving it waits for writes under way."""

    def __init__(self, root: str | os.PathLike[str], identity: dict[str, Any]):
        """Raises ValueError if the directory holds the training of something else than `identity`, or a finished run whose training was
        elsewhere."""
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
                    f"choose another checkpoint_dir, also to go on training from the weights of a finished run, or remove this one."
                )
        elif (self.root / SPEC).exists():
            raise ValueError(
                f"{self.root} holds a finished run ({SPEC}) that was not trained there; give another checkpoint_dir, or remove it."
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
        except Exception as error:  # TensorStore raises whatever it likes, with pages of text
            reason = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__
            raise ValueError(
                f"checkpoint {step} in {self.root / CHECKPOINTS} cannot be read ({reason}); remove its folder to resume from the one before."
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
        """The metrics until step `up_to`; later lines, and all from the first that is cut short or damaged, are removed from the file."""
        path = self.root / METRICS
        kept = []
        for text in path.read_bytes().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:  # no JSON, or no text
                break
            if not isinstance(line, dict) or not all(isinstance(line.get(k), (int, float)) for k in LINE):
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
