"""The training loop, read top to bottom: data onto the mesh, state created sharded, K updates per dispatch, validate, checkpoint.

Checkpoints fall on validations and validations on dispatch boundaries, so a resumed run replays the very dispatches that the
uninterrupted one makes, and ends with the same bits on the same devices.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from distsbi import keys, mesh as meshes
from distsbi.data.source import Pairs, Source
from distsbi.data.standardise import Standardizer
from distsbi.methods import Method
from distsbi.networks.base import Network
from distsbi.training.checkpoints import Checkpoints
from distsbi.training.config import TrainingConfig
from distsbi.training.update import Augment, Learner, Pose, TrainState, conditional

DISPATCH = 100  # most updates per dispatch
DISPATCH_BYTES = (
    256 * 2**20
)  # and of streams, whose batches of a dispatch are on the devices together, most bytes of those
VALIDATION_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training made: weights averaged at the best validation, losses, and how it went."""

    params: Any
    last: Any
    losses: list[float]
    val_losses: list[float]
    facts: dict[str, Any]


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
    the weights that it begins with and the seed are added. A stream that ends early ends the training, with a warning.

    Raises ValueError for a run directory of another training and a stream of less than one batch, RuntimeError if the loss becomes NaN.
    """
    key = keys.as_key(key)
    nsteps, val_every, save_every = config.nsteps or 1, config.val_every or 1, config.save_every or 1
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)

    batch, devices = config.batch_size or 1, meshes.data_size(mesh)
    if batch % devices:
        warnings.warn(
            f"batch_size={batch} is no multiple of the {devices} devices, so each of them does all of the work; "
            f"give batch_size={max(1, round(batch / devices)) * devices}.",
            stacklevel=3,
        )
    most = DISPATCH
    if source.batches is not None:
        most = max(1, min(DISPATCH, DISPATCH_BYTES // (batch * 4 * sum(part[0].size for part in validation))))
    # by the options and shapes alone, so that a resumed run makes the same dispatches
    chunk = max(k for k in range(1, min(most, val_every) + 1) if val_every % k == 0)
    shuffled = source.size if source.arrays is not None else 0
    learner = Learner(
        graphdef,
        rest,
        method,
        standardizer,
        config,
        mesh,
        source.draw,
        epoch=(shuffled or 0) // batch,
        augment=augment,
        pose=pose,
    )
    whole = meshes.replicated(mesh)
    data = jax.device_put(source.arrays, whole) if source.arrays is not None else None
    held_out = jax.device_put(_stack(validation, mesh), meshes.batch_sharding(mesh, axis=1))

    begin = functools.partial(learner.init, shuffled=shuffled or 0)
    shardings = meshes.state_shardings(mesh, jax.eval_shape(begin, params, key), fsdp=config.fsdp)
    state: TrainState = jax.jit(begin, out_shardings=shardings)(params, key)
    options = meshes.compiler_options(mesh, getattr(network, "cpu_compiler_options", {}))
    advance = jax.jit(
        learner.advance,
        static_argnums=2,
        donate_argnums=0,
        out_shardings=(shardings, whole),
        compiler_options=options,
    )
    validate = jax.jit(learner.validate, donate_argnums=0, out_shardings=(shardings, whole))

    root = run_root(config)
    losses: list[float] = []
    val_losses: list[float] = []
    checkpoints = None
    if root:
        begun = {"seed": keys.key_words(key), "initial weights": _digest(params)}
        checkpoints = Checkpoints(root, {**(identity or {}), **begun})
    started, first = time.perf_counter(), 0
    try:
        if checkpoints is not None:
            restored = checkpoints.restore(state)
            history = checkpoints.history(int(restored.step) if restored is not None else 0)
            if restored is not None:
                state, first = restored, int(restored.step)
                losses = [line["loss"] for line in history]
                val_losses = [line["val_loss"] for line in history]
        stream = source.batches(first, batch) if source.batches is not None else None
        with tqdm(
            total=nsteps, initial=first, desc="training", unit="update",
            disable=None if config.show_progress is None else not config.show_progress,
        ) as bar:  # fmt: skip
            step, saved, ended = first, first, False
            while step < nsteps and not ended and not (config.early_stopping and int(state.stale) >= config.patience):
                until = min((step // val_every + 1) * val_every, nsteps)
                parts = []
                while step < until and not ended:
                    count = wanted = min(chunk, until - step)
                    given: Any = data
                    if stream is not None:
                        given, count = _stacked(stream, wanted, mesh)
                        ended = count < wanted
                    if count:
                        state, loss = advance(state, given, count)
                        parts.append((count, loss))
                        step += count
                        bar.update(count)
                if ended and step == 0:
                    raise ValueError(
                        f"the training iterable ended before one batch of {batch} pairs; give more pairs, one that can be iterated "
                        f"again, or a smaller batch_size."
                    )
                if ended:
                    warnings.warn(
                        f"the training iterable ended at update {step} of {nsteps}, and the training with it; give one that can be iterated "
                        f"again to go on.",
                        stacklevel=3,
                    )
                if not parts:
                    break
                train_loss = sum(c * float(part) for c, part in parts) / sum(c for c, _ in parts)
                if not math.isfinite(train_loss):
                    raise RuntimeError(
                        f"the training loss became {train_loss} by update {step}: lower max_lr (now {config.max_lr}) or check the data "
                        f"for extreme values." + (f" The last good state is kept in {root}." if root else "")
                    )
                state, val = validate(state, held_out, jax.numpy.float32(train_loss))
                losses.append(train_loss)
                val_losses.append(float(val))
                bar.set_postfix(loss=f"{train_loss:.4f}", val=f"{val_losses[-1]:.4f}")
                if checkpoints is not None:
                    checkpoints.log({"step": step, "loss": train_loss, "val_loss": val_losses[-1]})
                    if step % save_every == 0:
                        checkpoints.save(step, state)
                        saved = step
            if checkpoints is not None and step > saved:
                checkpoints.save(step, state)
    finally:
        if checkpoints is not None:
            checkpoints.__exit__()
    best = state.best if math.isfinite(float(state.best_loss)) else state.ema
    seconds = time.perf_counter() - started
    facts = {
        "steps": int(state.step), "seconds": round(seconds, 2), "best_val_loss": float(state.best_loss),
        "seed": keys.key_words(key), "config": config.to_dict(), "devices": int(mesh.devices.size),
        "updates_per_second": round((int(state.step) - first) / seconds, 2),
    }  # fmt: skip
    whole_state = jax.jit(lambda tree: tree, out_shardings=whole)
    merge = lambda tree: nnx.merge_state(whole_state(tree), rest)  # noqa: E731
    return Trained(merge(best), merge(state.params), losses, val_losses, facts)


def run_root(config: TrainingConfig) -> str | None:
    if config.checkpoint_dir is None:
        return None
    parts = [config.checkpoint_dir] + ([] if config.experiment_id is None else [str(config.experiment_id)])
    return os.path.join(*parts)


def _stack(pairs: Pairs, mesh: jax.sharding.Mesh) -> Pairs:
    """Validation pairs as equal batches [count, rows, ...], rows a multiple of the device count; what is left over is dropped."""
    n, devices = len(pairs[0]), meshes.data_size(mesh)
    rows = min(VALIDATION_ROWS, n) // devices * devices
    if rows == 0:
        repeat = np.resize(np.arange(n), devices)
        return tuple(part[repeat][None] for part in pairs)  # type: ignore[return-value]
    count = n // rows
    return tuple(part[: count * rows].reshape(count, rows, *part.shape[1:]) for part in pairs)  # type: ignore[return-value]


def _stacked(stream: Iterator[Pairs], count: int, mesh: jax.sharding.Mesh) -> tuple[Any, int]:
    """(the next `count` batches of a stream, stacked, on the mesh; how many they are: fewer where it ends)."""
    batches = list(itertools.islice(stream, count))
    if not batches:
        return None, 0
    theta, x = (np.stack(parts) for parts in zip(*batches, strict=True))
    even = theta.shape[1] % meshes.data_size(mesh) == 0
    sharding = meshes.batch_sharding(mesh, axis=1) if even else meshes.replicated(mesh)
    return jax.device_put((theta, x), sharding), len(batches)


def _digest(params: Any) -> str:
    """SHA-256 of the float32 bytes of all weights, in path order. Hexadecimal."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()
