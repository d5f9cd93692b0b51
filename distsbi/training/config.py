"""How to train: plain numbers, each default written once. Keys follow GenSBI's `training_config`."""

import dataclasses
import math
from typing import Any, Self

from distsbi.hints import as_count, as_number, refuse_unknown

OPTIMIZERS = ("muon", "adamw")
COUNTS = (
    "nsteps", "batch_size", "noise_draws", "warmup_steps", "multistep", "val_every", "val_draws", "patience", "save_every",
)  # fmt: skip


# What other libraries call these options.
ELSEWHERE = {
    "learning_rate": "max_lr",
    "lr": "max_lr",
    "training_batch_size": "batch_size",
}


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training options; None means: chosen from the number of simulations (see `resolve`).

    Args:
        nsteps: updates.
        batch_size: pairs per update.
        noise_draws: noise levels per pair and update, which share one encoding of x.
        optimizer: "muon" (hidden matrices; AdamW for the rest) or "adamw".
        max_lr, min_lr: learning rate after warm-up and at the end.
        warmup_steps: linear warm-up, in updates.
        decay_transition: fraction of `nsteps` at constant `max_lr` before the cosine decay.
        weight_decay: decoupled (times the learning rate, in every update): with "muon" of the matrices that Muon takes, whose sides are 32 or more,
            with "adamw" of all matrices; never of biases, scales and tables of ids, whose own names contain "bias", "scale" or "embedding", nor of
            what the Simformer makes of values and times.
        clip_norm: bound on the global gradient norm.
        multistep: updates whose gradients are averaged into one.
        ema_decay: of the averaged weights, which are the ones sampled with.
        val_every: updates between validations.
        val_fraction: held out of the training set where no validation set is given: this part of its pairs (of a stream, of its row groups or of the
            batches that it begins with, of which at most 4,096 pairs are used); None: 5 %, of arrays at least 100 and at most 5,000, and no more than a
            half. A Task is validated on 4,096 pairs of its own.
        val_draws: noise levels per validation pair (fixed).
        early_stopping: stop after `patience` validations in a row that are not good; the weights of the lowest validation loss are kept either way.
        val_error_ratio: a validation is good if its loss is at most so many times the lowest before it; None: if it is lower than that.
        save_every: updates between checkpoints, a multiple of `val_every`.
        checkpoint_dir: run directory written while training, and resumed from; None: nothing is written.
        experiment_id: subfolder of `checkpoint_dir`.
        fsdp: split parameters and optimiser state over the devices.
        calibrate: choose the sampling grid on validation pairs after training.
        show_progress: a progress bar; None: on a terminal.
    """

    nsteps: int | None = None
    batch_size: int | None = None
    noise_draws: int = 2
    optimizer: str = "muon"
    max_lr: float = 2e-3
    min_lr: float = 1e-6
    warmup_steps: int | None = None
    decay_transition: float = 0.0
    weight_decay: float | None = None
    clip_norm: float = 1.0
    multistep: int = 1
    ema_decay: float = 0.999
    val_every: int | None = None
    val_fraction: float | None = None
    val_draws: int = 8
    early_stopping: bool = True
    patience: int = 16
    val_error_ratio: float | None = None
    save_every: int | None = None
    checkpoint_dir: str | None = None
    experiment_id: int | str | None = None
    fsdp: bool = False
    calibrate: bool = True
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float, int | None, float | None) and value is not None:
                object.__setattr__(self, field.name, as_number(f"training option {field.name}", value))
        for name in COUNTS:
            if (value := getattr(self, name)) is not None:
                least = 0 if name == "warmup_steps" else 1
                object.__setattr__(self, name, as_count(f"training option {name}", value, least))
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"training option optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}."
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(f"training option weight_decay must be 0 or more; got {self.weight_decay!r}.")
        for name in ("max_lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training option {name} must be positive; got {getattr(self, name)!r}.")
        fractions = (self.ema_decay, 0.5 if self.val_fraction is None else self.val_fraction)
        if not all(0 < value < 1 for value in fractions) or not 0 <= self.decay_transition <= 1:
            raise ValueError(
                "training options ema_decay, val_fraction and decay_transition are fractions between 0 and 1."
            )
        if not 0 <= self.min_lr <= self.max_lr:
            raise ValueError(
                f"training option min_lr must lie between 0 and max_lr; got {self.min_lr} and {self.max_lr}."
            )

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """From a dict. Raises ValueError naming an unknown key and the nearest known."""
        refuse_unknown("training option", options, cls, ELSEWHERE)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options, JSON-able."""
        return dataclasses.asdict(self)

    def resolve(self, simulations: int | None) -> "TrainingConfig":
        """Every None filled in for so many simulations (None: an endless supply).

        Updates grow with the square root of the simulations, the batch with the simulations; weight decay falls with them, as
        a prior's weight does; all within bounds.
        """
        n = simulations if simulations is not None else 100_000
        nsteps = self.nsteps or int(min(20_000, max(1_500, 100 * round(0.5 * math.sqrt(n)))))
        batch = self.batch_size or 2 ** int(min(9, max(6, round(math.log2(max(n, 1) / 100)))))
        val_every = self.val_every or min(max(100, nsteps // 4000 * 100), nsteps)
        if (
            self.val_every is None and self.save_every is not None
        ):  # about as often, at updates that checkpoints fall on
            parts = [k for k in range(1, self.save_every + 1) if self.save_every % k == 0 and 2 * k >= val_every]
            usual, val_every = val_every, self.save_every
            val_every = min(parts, key=lambda k: abs(math.log(k / usual)), default=val_every)
        save_every = self.save_every or max(val_every, val_every * (nsteps // (8 * val_every)))
        if save_every % val_every:
            raise ValueError(f"save_every must be a multiple of val_every; got {save_every} and {val_every}.")
        if val_every > nsteps:  # once, at the end
            val_every = save_every = nsteps
        return dataclasses.replace(
            self,
            nsteps=nsteps,
            batch_size=min(batch, simulations or batch),
            warmup_steps=self.warmup_steps if self.warmup_steps is not None else min(500, nsteps // 10),
            weight_decay=min(3.0, max(0.1, 1e4 / n)) if self.weight_decay is None else self.weight_decay,
            val_every=val_every,
            save_every=save_every,
        )
