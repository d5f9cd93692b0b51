"""Checkpoints of the full training state (orbax), and the files beside them.

    run/checkpoints/<step>/    the state, every leaf under its path, and checksums of the files (`distsbi.training.checksums`)
    run/training.json          what is being trained: a resumed run must be the same
    run/metrics.jsonl          one line per validation, cut back to the restored step on resume
    run/training.lock          of the one training that writes here, held by its process 0

orbax writes a step under a temporary name and renames it when complete, so a run killed while writing resumes from the step
before. Of several processes each writes what its devices hold, into a folder that all of them share; process 0 writes the other files.
A checkpoint is restored onto any number of processes and devices.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import orbax.checkpoint as ocp

from distsbi import processes
from distsbi.files import full_disk_says, one_holder, write_json, write_text
from distsbi.hints import warn
from distsbi.training import checksums

TRAINING, METRICS, CHECKPOINTS, LOCK = "training.json", "metrics.jsonl", "checkpoints", "training.lock"
SPEC = "spec.json"  # what distsbi.sampling.run, a layer above, writes of a finished run
LINE = ("step", "loss", "val_loss")  # of metrics
RESUME = "remove its folder to resume from the one before"
SHARED = "the run directory must be on a file system that all processes share and may read and write"
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
    """The checkpoints of one run directory, which is this training's alone until it is left. A context manager: leaving it waits for writes
    under way."""

    def __init__(self, root: str | os.PathLike[str], identity: dict[str, Any]):
        """Raises ValueError, in every process, if the directory holds the training of something else than `identity`, or a finished run whose
        training was elsewhere, or if another training is writing there."""
        self.root = Path(root).absolute()
        with contextlib.ExitStack() as stack:
            refused = None
            if processes.is_first():
                try:
                    self._begin(identity, stack)
                except ValueError as error:
                    refused = str(error)
            if refused := processes.gather(refused)[0]:
                raise ValueError(refused)
            if not (self.root / TRAINING).exists():
                raise ValueError(
                    f"process {processes.index()} does not see {self.root / TRAINING}, which process 0 wrote: {SHARED}."
                )
            options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=True)
            self.manager = ocp.CheckpointManager(
                self.root / CHECKPOINTS, options=options, handler_registry=checksums.registry()
            )
            self._held = stack.pop_all()

    def _begin(self, identity: dict[str, Any], stack: contextlib.ExitStack) -> None:
        """Takes the directory, until `stack` is left."""
        self._is_there(identity)  # before the lock, which leaves a file
        self.root.mkdir(parents=True, exist_ok=True)
        stack.enter_context(one_holder(self.root / LOCK, self.root))
        if not self._is_there(identity):
            write_json(self.root / TRAINING, identity)

    def _is_there(self, identity: dict[str, Any]) -> bool:
        """Whether the directory holds this training. Raises ValueError if it holds something else."""
        record = self.root / TRAINING
        if not record.exists():
            if (self.root / SPEC).exists():
                raise ValueError(
                    f"{self.root} holds a finished run ({SPEC}) that was not trained there; give another checkpoint_dir, or remove it."
                )
            return False
        try:
            found = json.loads(record.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{record} is damaged; remove {self.root} and train again.") from error
        if differing := list(differences(found, json.loads(json.dumps(identity)))):
            raise ValueError(
                f"{self.root} holds another training (differs in {', '.join(differing)}); "
                f"choose another checkpoint_dir, also to go on training from the weights of a finished run (pipeline.restore), or remove this one."
            )
        return True

    def restore(self, like: Any) -> Any | None:
        """The newest complete state, with the shapes and shardings of `like`; None if there is none yet.

        Raises ValueError, in every process, naming a file that is not as it was written, and for a checkpoint that cannot be read or is not seen
        by all processes.
        """
        step = self.manager.latest_step()
        for other, found in enumerate(processes.gather(step)):
            if found != step:
                raise ValueError(
                    f"in {self.root / CHECKPOINTS} process {processes.index()} sees {_named(step)} and process {other} {_named(found)}: {SHARED}."
                )
        if step is None:
            return None
        self._check(step)
        target = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in flatten(like).items()
        }
        try:
            restored = self.manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # TensorStore raises whatever it likes, with pages of text
            who = f" by process {processes.index()}" if processes.count() > 1 else ""
            reason = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__
            raise ValueError(
                f"checkpoint {step} in {self.root / CHECKPOINTS} cannot be read{who} ({reason}); {SHARED if 'ermission' in reason else RESUME}."
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in flatten(like)])

    def _check(self, step: int) -> None:
        """Each process reads its share of the files."""
        folder = self.root / CHECKPOINTS / str(step) / checksums.ITEM
        there = processes.gather(checksums.has_checksums(folder))[0]
        if not there:
            if processes.is_first():
                warn(
                    f"checkpoint {step} in {self.root / CHECKPOINTS} has no checksums (an older distsbi wrote it, or {checksums.FILE} was removed) "
                    f"and is restored unchecked.",
                )
            return
        share = checksums.find_altered(folder, processes.index(), processes.count())
        wrong = next((said for said in processes.gather(share) if said), None)
        if wrong:
            raise ValueError(
                f"checkpoint {step} in {self.root / CHECKPOINTS} is damaged ({wrong}); {SHARED if 'ermission' in wrong else RESUME}."
            )

    def save(self, step: int, state: Any) -> None:
        """Starts writing; returns when the state has been copied from the devices."""
        with full_disk_says(self.root, ADVICE):
            self.manager.save(step, args=ocp.args.StandardSave({k: _once(leaf) for k, leaf in flatten(state).items()}))

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics, on disk before the checkpoint of the same step."""
        if not processes.is_first():
            return
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
        if path.exists() and processes.is_first():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        with self._held, full_disk_says(self.root, ADVICE):
            self.manager.wait_until_finished()
            self.manager.close()


def _once(leaf: Any) -> Any:
    """One device's copy of what all devices of this one process hold: orbax would cut it into a slice for each, by a program for each shape."""
    alone = processes.count() == 1 and isinstance(leaf, jax.Array) and leaf.is_fully_replicated
    return leaf.addressable_data(0) if alone else leaf


def _named(step: int | None) -> str:
    return "no checkpoint" if step is None else f"checkpoint {step}"


def differences(found: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    """What differs, by name; with both values where they are short."""
    for name in sorted({*found, *given}):
        old, new = found.get(name), given.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new)
            continue
        if (
            isinstance(old, list) and isinstance(new, list) and isinstance(new[0], str)
        ):  # a kind, and what it is made of
            old, new = old[0], new[0]
        says = name != "seed"  # a key's words say nothing
        short = says and all(value is None or len(str(value)) < 30 for value in (old, new))
        yield f"{name}: given {new}, found {old}" if short and old != new else name
