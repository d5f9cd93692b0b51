"""One training update, K of them per dispatch, and validation: pure functions of one state.

    loss = E_{(theta, x)} E_{t, z} weight(t) |f(t, x_t, encode(x)) - (a(t) y + b(t) z)|^2,    y = standardised theta

(Lipman et al. 2210.02747, eq. 14, for flow matching.) The state is a value: created sharded, donated to every dispatch.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, UInt32

from distsbi import keys, mesh as meshes
from distsbi.data.standardise import Standardizer
from distsbi.methods import Method
from distsbi.networks.base import encode
from distsbi.networks.joint import Completed, Conditional, JointNetwork
from distsbi.training.config import TrainingConfig

Batch = tuple[Array, Array]
Augment = Callable[[Array, Array, Array], Batch]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All of training. `order`: this epoch's shuffle of the training set (one entry where nothing is shuffled)."""

    step: Int32[Array, ""]
    seed: UInt32[Array, "2"]
    params: Any
    ema: Any
    best: Any
    best_loss: Float[Array, ""]
    stale: Int32[Array, ""]
    opt: Any
    order: Int32[Array, "n"]

    @property
    def key(self) -> Array:
        return jax.random.wrap_key_data(self.seed, impl=keys.IMPL)


class Pose(Protocol):
    """What is learned from a batch of pairs."""

    def __call__(
        self, network: Any, standardizer: Standardizer, theta: Array, x: Array, key: Array
    ) -> tuple[Any, Array, Any, Array | None]:
        """(network, y, context, keep): y [batch, dim, ch] is to be noised and predicted by the network given the context; `keep` [batch, dim],
        where its prediction counts, None: everywhere."""
        ...


def conditional(
    network: Any, standardizer: Standardizer, theta: Array, x: Array, key: Array
) -> tuple[Any, Array, Any, None]:
    """theta given x."""
    context, centre = encode(network, standardizer, x)
    return network, standardizer.forward(theta, centre), context, None


@dataclasses.dataclass(frozen=True)
class ConditionMasks:
    """All tokens (theta, x) given a random part of them, a new one for each pair (Gloeckler et al. 2404.09636, sec. 3.3).

    `kind`: "structured", shares of p(theta | x), p(theta, x), p(x | theta) and two Bernoulli masks; "bernoulli", the latter alone;
    "posterior", p(theta | x) alone, which as a fixed pattern costs less: no data are noised, and they are encoded once for all noise levels.
    """

    kind: str = "structured"
    rates: tuple[float, float] = (0.3, 0.7)

    def __call__(
        self, network: Any, standardizer: Standardizer, theta: Array, x: Array, key: Array
    ) -> tuple[Any, Array, Any, Array | None]:
        tokens, n = jnp.concatenate([theta, x], 1), theta.shape[1]
        v = standardizer.forward(tokens, jnp.zeros_like(standardizer.theta_mean))
        if self.kind == "posterior":
            fixed = Conditional(network, tuple(range(n)), tuple(range(n, v.shape[1])))
            return fixed, v[:, :n], fixed.encode(v[:, n:]), None
        given = self.draw(key, theta.shape[0], n, x.shape[1])
        if isinstance(network, JointNetwork):  # it masks by itself
            return network, v, network.encode(v, given), ~given
        own = Completed(network)
        return own, v, own.encode(v, given), ~given

    def draw(self, key: Array, batch: int, dim_theta: int, dim_x: int) -> Bool[Array, "batch tokens"]:
        """Which tokens are given: never all of them."""
        key_kind, key_low, key_high = jax.random.split(key, 3)
        is_x = jnp.arange(dim_theta + dim_x) >= dim_theta
        shape = (batch, dim_theta + dim_x)
        low, high = (
            jax.random.bernoulli(k, jnp.float32(p), shape) for k, p in zip((key_low, key_high), self.rates, strict=True)
        )
        options = jnp.stack([jnp.broadcast_to(mask, shape) for mask in (is_x, jnp.zeros_like(is_x), ~is_x, low, high)])
        shares = jnp.asarray(MASK_SHARES[self.kind], jnp.float32)
        kind = jax.random.choice(key_kind, len(options), (batch,), p=shares)
        given = options[kind, jnp.arange(batch)]
        return given & ~given.all(axis=1, keepdims=True)


MASK_SHARES = {  # of p(theta | x), p(theta, x), p(x | theta) and the Bernoulli masks
    "structured": (0.5, 0.1, 0.1, 0.15, 0.15),
    "bernoulli": (0.0, 0.0, 0.0, 0.5, 0.5),
    "posterior": (1.0, 0.0, 0.0, 0.0, 0.0),
}


MUON_SIZE = (
    32  # the smaller side of the matrices that Muon takes; embeddings of a few numbers and read-outs are AdamW's
)
# By the weight's own name, whatever the module that it is in is called: biases, scales and tables of ids, stacked ones too; and what the Simformer
# makes of values and times.
_NO_MATRIX = re.compile(r"\['\w*(bias|scale|embedding)\w*'\](\.value)?$|\['embedding_(net_value|time)'\]")


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping, warm-up and cosine decay around Muon or AdamW.

    Muon (Jordan et al. 2024; Liu et al. 2502.16982) orthogonalises the momentum of hidden matrices, stacked ones each for
    itself, and leaves all else to AdamW. Its updates are scaled to a root mean square of the learning rate, so one `max_lr`
    serves both.
    """
    every = config.multistep  # the schedule counts steps of the optimiser, of which there is one in so many updates
    nsteps, warmup = max((config.nsteps or 1) // every, 1), (config.warmup_steps or 0) // every
    hold = max(0, int(config.decay_transition * nsteps) - warmup)
    parts = [
        optax.linear_schedule(config.max_lr * 1e-3, config.max_lr, max(warmup, 1)),
        optax.constant_schedule(config.max_lr),
        optax.cosine_decay_schedule(config.max_lr, max(nsteps - warmup - hold, 1), config.min_lr / config.max_lr),
    ]
    schedule = optax.join_schedules(parts, [warmup, warmup + hold])
    decay = config.weight_decay or 0.0
    if config.optimizer == "muon":
        inner = optax.contrib.muon(
            schedule, consistent_rms=1.0, weight_decay=decay, muon_weight_dimension_numbers=_matrices
        )
    else:
        decays = lambda params: jax.tree_util.tree_map_with_path(_is_matrix, params)  # noqa: E731
        inner = optax.adamw(schedule, weight_decay=decay, mask=decays)
    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), inner)
    return optax.MultiSteps(chain, config.multistep).gradient_transformation() if config.multistep > 1 else chain


def _is_matrix(path: Any, leaf: Array) -> bool:
    return leaf.ndim > 1 and not _NO_MATRIX.search(jax.tree_util.keystr(path))


def _matrices(params: Any) -> Any:
    """Muon's axes (in, out) of every large matrix, leading axes being stacks; None for all else."""

    def axes(path: Any, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        if not _is_matrix(path, leaf) or min(leaf.shape[-2:]) < MUON_SIZE:
            return None
        return optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)


def in_float32(params: Any) -> Any:
    """Weights as they are trained, whatever type the network keeps them in: what one update adds to an average, and often to a weight, is
    less than the last bit of a bfloat16."""
    return jax.tree.map(lambda a: a if a.dtype.itemsize >= 4 else a.astype(np.float32), params)


def as_kept(params: Any, own: Any) -> Any:
    """Trained weights in the types of `own`, the network's."""
    return jax.tree.map(lambda a, kept: a.astype(kept.dtype), params, own)


def averaged(ema: Any, params: Any, step: Int32[Array, ""], decay: float) -> Any:
    """The averaged weights after update number `step` (from 0) has made `params`: over few updates at first, then with `decay`."""
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - decay_now) * (p - e), ema, params)


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is fixed while training: turns states into states."""

    graphdef: nnx.GraphDef
    rest: Any
    method: Method
    standardizer: Standardizer
    config: TrainingConfig
    mesh: jax.sharding.Mesh
    draw: (
        Callable[[Array, Array, Any], Batch] | None
    )  # (key, index in epoch order, data) -> batch; None: batches come in
    epoch: int  # updates per epoch where `order` is used, else 0
    augment: Augment | None = None
    pose: Pose = conditional
    divided: bool = False  # whether the rows of the training set are divided over the devices

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", make_optimizer(self.config))

    def init(self, params: Any, seed: UInt32[Array, "2"], shuffled: int) -> TrainState:
        """The first state; `seed`: the words of the key. Run under jit with sharded outputs."""
        copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
        return TrainState(
            step=jnp.zeros((), jnp.int32), seed=jnp.asarray(seed), params=params, ema=copy(params), best=copy(params),
            best_loss=jnp.full((), jnp.inf, jnp.float32), stale=jnp.zeros((), jnp.int32), opt=self.optimizer.init(params),  # type: ignore[attr-defined]
            order=jnp.arange(max(shuffled, 1), dtype=jnp.int32),
        )  # fmt: skip

    def loss(
        self, params: Any, batch: Batch, key_times: Array, key_noise: Array, key_pose: Array, draws: int
    ) -> Float[Array, ""]:
        """Mean loss of a batch of (theta, x), with `draws` noise levels per pair."""
        theta, x = batch
        network = nnx.merge(self.graphdef, params, self.rest)
        network, y, context, keep = self.pose(network, self.standardizer, theta, x, key_pose)
        t = self.method.draw_times(key_times, (y.shape[0], draws))
        z = jax.random.normal(key_noise, (y.shape[0], draws, *y.shape[1:]), jnp.float32)
        times = t[..., None, None]
        y_t = self.method.perturb(times, y[:, None], z)
        f = network(self.method.c_time(t), self.method.c_in(times) * y_t, context)
        error = self.method.weight(times) * (f - self.method.goal(times, y[:, None], z)) ** 2
        if keep is None:
            return jnp.mean(error)
        counts = keep[:, None, :, None]
        return jnp.sum(jnp.where(counts, error, 0.0)) / (jnp.sum(counts) * draws * y.shape[-1])

    def advance(self, state: TrainState, data: Any, count: int) -> tuple[TrainState, Float[Array, ""]]:
        """`count` updates; the mean training loss. `data`: the training set, or `count` stacked batches where `draw` is None."""

        def update(state: TrainState, given: Any) -> tuple[TrainState, Array]:
            k_data, k_augment, k_times, k_noise, k_pose = keys.training_keys(state.key, state.step)
            order = state.order
            if self.epoch:
                fresh = lambda: jax.random.permutation(  # noqa: E731
                    keys.epoch_key(state.key, state.step // self.epoch), order.shape[0]
                ).astype(jnp.int32)
                order = jax.lax.cond(state.step % self.epoch == 0, fresh, lambda: order)
            if self.draw is None:
                batch = given
            else:
                size = self.config.batch_size or 1
                at = (state.step % max(self.epoch, 1)) * size
                index = jax.lax.dynamic_slice(order, (at,), (size,)) if self.epoch else jnp.arange(size)
                if not self.divided:  # each device takes its rows of the batch from its own copy of the set
                    index = jax.lax.with_sharding_constraint(index, self._split(size))
                batch = self.draw(k_data, index, data)
            if self.augment is not None:
                batch = self.augment(k_augment, *batch)
            batch = jax.lax.with_sharding_constraint(batch, self._split(batch[0].shape[0]))
            loss, grads = jax.value_and_grad(self.loss)(
                state.params, batch, k_times, k_noise, k_pose, self.config.noise_draws
            )
            updates, opt = self.optimizer.update(grads, state.opt, state.params)  # type: ignore[attr-defined]
            params = optax.apply_updates(state.params, updates)
            every = self.config.multistep
            ema = averaged(state.ema, params, state.step // every, self.config.ema_decay)
            if every > 1:  # between steps of the optimiser the weights stand still
                ema = jax.tree.map(lambda new, old: jnp.where((state.step + 1) % every == 0, new, old), ema, state.ema)
            return dataclasses.replace(state, step=state.step + 1, params=params, ema=ema, opt=opt, order=order), loss

        state, losses = jax.lax.scan(update, state, data if self.draw is None else None, length=count)
        return state, losses.mean()

    def validate(self, state: TrainState, batches: Batch) -> tuple[TrainState, Float[Array, ""]]:
        """Loss of the averaged weights on stacked validation batches under fixed noise; keeps the best weights, and counts the validations in
        a row that early stopping is patient with."""

        def one(numbered: tuple[Array, Batch]) -> Array:
            number, batch = numbered
            k_times, k_noise, k_pose = keys.validation_keys(number)
            return self.loss(state.ema, batch, k_times, k_noise, k_pose, self.config.val_draws)

        count = batches[0].shape[0]
        loss = jnp.mean(jax.lax.map(one, (jnp.arange(count), batches)))
        better, ratio = loss < state.best_loss, self.config.val_error_ratio
        good = better if ratio is None else loss <= ratio * state.best_loss
        best = jax.tree.map(lambda b, e: jnp.where(better, e, b), state.best, state.ema)
        stale = jnp.where(good, 0, state.stale + 1)
        return dataclasses.replace(
            state, best=best, best_loss=jnp.where(better, loss, state.best_loss), stale=stale
        ), loss

    def _split(self, size: int) -> jax.sharding.NamedSharding:
        even = size % meshes.data_size(self.mesh) == 0
        return meshes.batch_sharding(self.mesh) if even else meshes.replicated(self.mesh)
