"""The training loop, read top to bottom: data onto the mesh, state created sharded, K updates per dispatch, validate, checkpoint.

Checkpoints fall on validations and validations on dispatch boundaries, so a resumed run replays the very dispatches that the
uninterrupted one makes, and ends with the same bits on the same devices.

Several processes run this same loop in step: the state and every batch are global arrays on the mesh of all of them.
"""

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from distsbi import keys, mesh as meshes, processes
from distsbi.data.source import Pairs, Source
from distsbi.data.standardise import Standardizer
from distsbi.hints import warn
from distsbi.methods import Method
from distsbi.networks.base import Network
from distsbi.training import rows
from distsbi.training.checkpoints import Checkpoints
from distsbi.training.config import TrainingConfig
from distsbi.training.update import Augment, Learner, Pose, TrainState, as_kept, conditional, in_float32

log = logging.getLogger("distsbi")

DISPATCH = 100  # most updates per dispatch
DISPATCH_BYTES = (
    256 * 2**20
)  # and of streams, whose batches of a dispatch are on the devices together, most bytes of those
VALIDATION_ROWS = 512
OVERFITTED = 0.05  # of the best validation loss: the rise after it that is told,
OVERFITTED_STEPS = 1_000  # of a training that is meant in earnest


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training made: weights averaged at the best validation, losses, and how it went. `updates`: made by this call, and by none before."""

    params: Any
    last: Any
    losses: list[float]
    val_losses: list[float]
    facts: dict[str, Any]
    updates: int = 0


@processes.in_step()
def train(
    network: Network,
    method: Method,
    standardizer: Standardizer,
    source: Source,
    validation: Pairs,
    key: Any,
    config: TrainingConfig,
    *,
    mesh: jax.sharding.Mesh,
    augment: Augment | None = None,
    pose: Pose = conditional,
    identity: dict[str, Any] | None = None,
) -> Trained:
    """Trains `network` and returns its best averaged weights; writes and resumes `config.checkpoint_dir` if there is one.

    `config` must be resolved. `pose`: what is learned of a pair. `identity`: what a resumed run must share with the one that began, JSON-able;
    the weights that it begins with and the seed are added. Several processes whose devices are in `mesh` all call this with the same arguments:
    batches are the same as in one process, and each process keeps only its part of the data on its devices. Only where each process reads row
    groups of its own (a streamed folder with enough of them) batches depend on the number of processes. A stream that ends early ends the training,
    with a warning.

    Raises ValueError for a run directory of another training, processes that differ in what they train and a stream of less than one batch, RuntimeError if the training or
    validation loss becomes NaN or infinite, before a checkpoint of it.
    """
    key = keys.as_key(key)
    nsteps, val_every, save_every = config.nsteps or 1, config.val_every or 1, config.save_every or 1
    graphdef, own, rest = nnx.split(network, nnx.Param, ...)
    what = {**(identity or {}), "seed": keys.key_words(key), "initial weights": _digest(own)}
    root = run_root(config)
    place = root if root is None or "://" in root else os.path.abspath(root)
    processes.agree_on({**what, "run directory": place}, "give all of them the same command and the same data")
    meshes.meet(mesh)

    batch, devices = config.batch_size or 1, meshes.data_size(mesh)
    several, first_process = meshes.is_shared(mesh), processes.is_first()
    if batch % devices and first_process:
        warn(
            f"batch_size={batch} is no multiple of the {devices} devices, so each of them does all of the work; "
            f"give batch_size={max(1, round(batch / devices)) * devices}.",
        )
    most = DISPATCH
    if source.batches is not None:
        most = max(1, min(DISPATCH, DISPATCH_BYTES // (batch * 4 * sum(part[0].size for part in validation))))
    # dispatches between validations, as equal as can be (the last may be shorter), by the options and shapes alone, so that a resumed run makes the same
    chunk = math.ceil(val_every / math.ceil(val_every / most))
    shuffled = source.size if source.arrays is not None else 0
    divided = source.arrays is not None and rows.is_divided(source.arrays, mesh)
    learner = Learner(
        graphdef,
        rest,
        method,
        standardizer,
        config,
        mesh,
        rows.take(mesh) if divided else source.draw,
        epoch=(shuffled or 0) // batch,
        augment=augment,
        pose=pose,
        divided=divided,
    )
    whole = meshes.replicated(mesh)
    data = None
    if source.arrays is not None:
        data = rows.place(source.arrays, mesh) if divided else jax.device_put(source.arrays, whole)
    held_out = meshes.put(_stack(validation, mesh), meshes.batch_sharding(mesh, axis=1))

    begin = functools.partial(learner.init, shuffled=shuffled or 0)
    seed = np.asarray(jax.random.key_data(key))
    params = in_float32(own)
    given = meshes.put(jax.device_get(params), whole) if several else params
    shardings = meshes.state_shardings(mesh, jax.eval_shape(begin, params, seed), fsdp=config.fsdp)
    state: TrainState = jax.jit(begin, out_shardings=shardings)(given, seed)
    options = meshes.compiler_options(mesh, getattr(network, "cpu_compiler_options", {}))
    advance = jax.jit(
        learner.advance,
        static_argnums=2,
        donate_argnums=0,
        out_shardings=(shardings, whole),
        compiler_options=options,
    )
    validate = jax.jit(learner.validate, donate_argnums=0, out_shardings=(shardings, whole))

    ready: set[tuple[Any, ...]] = set()

    def together(program: Any, *arguments: Any, static: int = 0) -> Any:
        """A call that all processes make when all have compiled it: collectives of gloo wait half a minute for the others, and no longer."""
        if several and (program, static) not in ready:
            program.lower(*arguments).compile()
            processes.wait_for_all()
            ready.add((program, static))
        return program(*arguments)

    losses: list[float] = []
    val_losses: list[float] = []
    checkpoints = None
    if root:
        checkpoints = Checkpoints(root, what)
    started, first, before = time.perf_counter(), 0, 0.0
    try:
        if checkpoints is not None:
            restored = checkpoints.restore(state)
            history = checkpoints.history(int(restored.step) if restored is not None else 0)
            if restored is not None:
                state, first = restored, int(restored.step)
                losses = [line["loss"] for line in history]
                val_losses = [line["val_loss"] for line in history]
                before = history[-1].get("seconds") or 0.0 if history else 0.0
        stream, parted = _stream(source, first, batch, mesh)
        with tqdm(
            total=nsteps, initial=first, desc="training", unit="update",
            disable=True if not first_process else None if config.show_progress is None else not config.show_progress,
        ) as bar:  # fmt: skip
            step, saved, ended = first, first, False
            if first_process and step < nsteps:
                log.info("training, update %d of %d; the first ones take a while, to compile", step, nsteps)
            while step < nsteps and not ended and not (config.early_stopping and int(state.stale) >= config.patience):
                until = min((step // val_every + 1) * val_every, nsteps)
                parts = []
                while step < until and not ended:
                    count = wanted = min(chunk, until - step)
                    given: Any = data
                    if stream is not None:
                        given, count = _stacked(stream, wanted, mesh, parted)
                        if several and not parted and len(set(counts := processes.gather(count))) > 1:
                            raise ValueError(
                                f"the training iterable gave the processes {counts} batches after update {step}; it must give the same "
                                f"pairs to all of them."
                            )
                        ended = count < wanted
                    if count:
                        state, loss = together(advance, state, given, count, static=count)
                        parts.append((count, loss))
                        step += count
                        bar.update(count)
                if ended and step == 0:
                    raise ValueError(
                        f"the training iterable ended before one batch of {batch} pairs; give more pairs, one that can be iterated "
                        f"again, or a smaller batch_size."
                    )
                if ended and first_process:
                    warn(
                        f"the training iterable ended at update {step} of {nsteps}, and the training with it; give one that can be iterated "
                        f"again to go on.",
                    )
                if not parts:
                    break
                train_loss = sum(c * float(part) for c, part in parts) / sum(c for c, _ in parts)
                _check_finite("training", train_loss, step, config, root, saved)
                state, val = together(validate, state, held_out)
                _check_finite("validation", float(val), step, config, root, saved)
                losses.append(train_loss)
                val_losses.append(float(val))
                bar.set_postfix(loss=f"{train_loss:.4f}", val=f"{val_losses[-1]:.4f}")
                if first_process and bar.disable:  # a bar says it by itself
                    log.info("update %d of %d: loss %.4f, validation %.4f", step, nsteps, train_loss, val_losses[-1])
                if checkpoints is not None:
                    seconds = round(before + time.perf_counter() - started, 2)
                    checkpoints.log({"step": step, "loss": train_loss, "val_loss": val_losses[-1], "seconds": seconds})
                    if step % save_every == 0:
                        checkpoints.save(step, state)
                        saved = step
            if checkpoints is not None and step > saved:
                checkpoints.save(step, state)
    finally:
        if checkpoints is not None:
            checkpoints.__exit__()
    steps, spent = int(state.step), time.perf_counter() - started
    facts = {
        "steps": steps, "seconds": round(before + spent, 2), "best_val_loss": float(state.best_loss),
        "seed": keys.key_words(key), "config": config.to_dict(), "devices": int(mesh.devices.size),
        "device_kind": mesh.devices.flat[0].device_kind,
        "updates_per_second": round((steps - first) / spent, 2),
    }  # fmt: skip
    if val_losses:
        facts["last_val_loss"] = val_losses[-1]
    if first_process and steps >= OVERFITTED_STEPS and overfitted(facts):
        warn(
            f"the validation loss is {val_losses[-1]:.4g} at the end and was {facts['best_val_loss']:.4g} at its best, whose weights are kept: a longer training does "
            f"not help. More simulations do, or the mean of several runs."
        )
    whole_state = jax.jit(lambda tree: as_kept(tree, own), out_shardings=whole)
    local = lambda tree: jax.tree.map(jax.numpy.asarray, jax.device_get(tree)) if several else tree  # noqa: E731
    merge = lambda tree: nnx.merge_state(local(whole_state(tree)), rest)  # noqa: E731
    return Trained(merge(state.best), merge(state.params), losses, val_losses, facts, steps - first)


def overfitted(facts: Mapping[str, Any]) -> bool:
    """Whether the validation loss of a training, by its facts, rose by more than chance after its best."""
    best, last = facts.get("best_val_loss"), facts.get("last_val_loss")
    return best is not None and last is not None and last - best > OVERFITTED * abs(best)


def run_root(config: TrainingConfig) -> str | None:
    if config.checkpoint_dir is None:
        return None
    parts = [config.checkpoint_dir] + ([] if config.experiment_id is None else [str(config.experiment_id)])
    return os.path.join(*parts)


def _stack(pairs: Pairs, mesh: jax.sharding.Mesh) -> Pairs:
    """Validation pairs as equal batches [count, rows, ...] of at most VALIDATION_ROWS, rows a multiple of the device count; what is left over,
    less than a row of each batch for each device, is dropped."""
    n, devices = len(pairs[0]), meshes.data_size(mesh)
    if n < devices:
        repeat = np.resize(np.arange(n), devices)
        return tuple(part[repeat][None] for part in pairs)  # type: ignore[return-value]
    count = min(-(-n // VALIDATION_ROWS), n // devices)
    rows = n // count // devices * devices
    return tuple(part[: count * rows].reshape(count, rows, *part.shape[1:]) for part in pairs)  # type: ignore[return-value]


def _stream(source: Source, first: int, batch: int, mesh: jax.sharding.Mesh) -> tuple[Iterator[Pairs] | None, bool]:
    """(batches from update `first` on; whether they are this process' part of each batch alone)."""
    if source.batches is None:
        return None, False
    if not meshes.is_shared(mesh) or source.part is None or batch % meshes.data_size(mesh):
        return source.batches(first, batch), False
    return source.part(processes.index(), processes.count())(first, batch), True


def _stacked(stream: Iterator[Pairs], count: int, mesh: jax.sharding.Mesh, parted: bool = False) -> tuple[Any, int]:
    """(the next `count` batches of a stream, stacked, on the mesh; how many they are: fewer where it ends). `parted`: they are this process' part."""
    batches = list(itertools.islice(stream, count))
    if not batches:
        return None, 0
    theta, x = (np.stack(parts) for parts in zip(*batches, strict=True))
    split = meshes.batch_sharding(mesh, axis=1)
    if parted:
        return (
            jax.make_array_from_process_local_data(split, theta),
            jax.make_array_from_process_local_data(split, x),
        ), len(batches)
    even = theta.shape[1] % meshes.data_size(mesh) == 0
    return meshes.put((theta, x), split if even else meshes.replicated(mesh)), len(batches)


def _check_finite(which: str, loss: float, step: int, config: TrainingConfig, root: str | None, saved: int) -> None:
    if math.isfinite(loss):
        return
    kept = f", and keeps the state of update {saved}" if saved else ""
    elsewhere = f", in another run directory: {root} is this training's{kept}" if root else ""
    raise RuntimeError(
        f"the {which} loss became {loss} by update {step}: lower max_lr (now {config.max_lr}) or check the data for extreme values{elsewhere}."
    )


def _digest(params: Any) -> str:
    """SHA-256 of the float32 bytes of all weights, in path order. Hexadecimal."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()
