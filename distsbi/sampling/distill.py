"""Few-step students: from a trained posterior to one that draws in 1 to 4 evaluations.

The time axis of the straight path is cut into K segments. The student, a network like its teacher's and started from its weights,
learns the average velocity over each segment from where the segment begins,

    u(s_k, Y) = (Phi(Y; s_k -> s_{k+1}) - Y) / (s_{k+1} - s_k),    Phi: the teacher's ODE

(the regression target of progressive distillation, Salimans & Ho 2202.00512, and of MeanFlow, Geng et al. 2505.13447), with a
pseudo-L1 loss of the segment's end. Drawing is then Euler's method on K steps. Half of every batch begins a segment at the teacher's
own point, half where the student itself arrives, so that it is trained where it is used. No simulation is needed: noise is fresh in
every update, and x is any data, such as the training set's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from distsbi import keys, mesh as meshes
from distsbi.methods import FlowMatching
from distsbi.networks.base import encode
from distsbi.sampling.flow import denoise, make_field
from distsbi.sampling.posterior import Posterior
from distsbi.solvers import FixedGrid
from distsbi.solvers.field import known
from distsbi.training import TrainingConfig
from distsbi.training.update import make_optimizer

DISPATCH = 50  # updates per dispatch


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How to distil.

    Args:
        segments: evaluations per draw of the student, 1 to 8.
        boundaries: where the inner segments begin, increasing in (0, 1); None: 1 - (1 - k / segments)^power.
        power: of those boundaries; larger values put them nearer the data.
        nsteps, batch_size: updates, and noise draws per update, each with its own x.
        max_lr: learning rate after warm-up. ema_decay: of the averaged weights, which are the student's.
        softness: of the pseudo-L1 loss sqrt(r^2 + softness^2), in standardised units per parameter.
        teacher_steps: of the teacher's solver, each segment's share at least two.
        on_policy: share of the batch that begins a segment where the student arrives.
        seed: of noise, order and choice. show_progress: None: on a terminal.
    """

    segments: int = 2
    boundaries: tuple[float, ...] | None = None
    power: float = 2.0
    nsteps: int = 3_000
    batch_size: int = 1_024
    max_lr: float = 1e-3
    ema_decay: float = 0.999
    softness: float = 0.003
    teacher_steps: int = 16
    on_policy: float = 0.5
    seed: int = 0
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.segments <= 8:
            raise ValueError(f"a student has 1 to 8 segments; got {self.segments}.")
        for name in ("nsteps", "batch_size", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"distill option {name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.on_policy <= 1 or not self.softness > 0 or not self.power > 0 or not 0 < self.ema_decay < 1:
            raise ValueError("distill options on_policy and ema_decay are fractions, softness and power positive.")
        inner = np.asarray(self.boundaries if self.boundaries is not None else (), float)
        if self.boundaries is not None and (
            len(inner) != self.segments - 1 or np.any(np.diff(np.concatenate([[0.0], inner, [1.0]])) <= 0)
        ):
            raise ValueError(
                f"{self.segments} segments need {self.segments - 1} increasing boundaries in (0, 1); got {self.boundaries}."
            )

    @property
    def grid(self) -> tuple[float, ...]:
        """0, the boundaries, 1."""
        if self.boundaries is not None:
            return (0.0, *self.boundaries, 1.0)
        return tuple(1.0 - (1.0 - k / self.segments) ** self.power for k in range(self.segments + 1))


def distill(
    teacher: Posterior, xs: Float[np.ndarray, "n dim_x ch_x"], config: DistillConfig | None = None
) -> tuple[Posterior, list[float]]:
    """(the student, its losses, one for each dispatch). The student is a posterior like any other, bound to its own steps.

    Raises ValueError for observations of a wrong shape, or a teacher that is a student itself; RuntimeError if the loss becomes NaN.
    """
    config = config or DistillConfig()
    if "student" in teacher.facts:
        raise ValueError("this posterior is a student already; distil its teacher.")
    xs = teacher._check_batch(xs)
    mesh = teacher.mesh
    optimizer = make_optimizer(
        TrainingConfig(
            nsteps=config.nsteps, max_lr=config.max_lr, warmup_steps=min(200, config.nsteps // 10), weight_decay=0.0
        )
    )
    size = -(-config.batch_size // meshes.data_size(mesh)) * meshes.data_size(mesh)
    advance = _advance(teacher, config, optimizer, size)
    whole = meshes.replicated(mesh)
    params = jax.tree.map(jnp.copy, teacher.weights.params)
    state = jax.device_put((params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0)), whole)
    data, key = jax.device_put((xs, keys.as_key(config.seed)), whole)
    losses: list[float] = []
    hide = None if config.show_progress is None else not config.show_progress
    with tqdm(total=config.nsteps, desc="distilling", unit="update", disable=hide) as bar:
        done = 0
        while done < config.nsteps:
            count = min(DISPATCH, config.nsteps - done)
            state, loss = advance(state, teacher.weights, data, key, count)
            losses.append(float(loss))
            if not np.isfinite(losses[-1]):
                raise RuntimeError(f"the student's loss became {losses[-1]}: lower max_lr (now {config.max_lr}).")
            done += count
            bar.update(count)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "show_progress"}
    facts = {
        **{name: teacher.facts[name] for name in ("training", "data", "versions") if name in teacher.facts},
        "student": {**options, "boundaries": list(config.grid[1:-1]), "teacher": teacher.fingerprint},
    }
    student = Posterior(
        nnx.merge(teacher.graphdef, state[1]), FlowMatching(), teacher.weights.standardizer,
        names=teacher.parameter_names, solver=FixedGrid("euler", config.grid), tile=teacher.tile, mesh=mesh, facts=facts,
    )  # fmt: skip
    return student, losses


def _advance(teacher: Posterior, config: DistillConfig, optimizer: optax.GradientTransformation, size: int) -> Any:
    """(state, teacher's weights, data, key, count) -> (state, mean loss): `count` updates in one dispatch."""
    method, flow, grid = teacher.method, FlowMatching(), config.grid
    shape = (teacher.dim_theta, teacher.ch_theta)
    split = meshes.batch_sharding(teacher.mesh)
    last = len(grid) - 2

    def segment_times(k: int) -> tuple[float, ...]:
        """The teacher's times from s_k to s_{k+1}, in its own time; graded towards the data in the last segment."""
        steps = max(2, round(config.teacher_steps * (grid[k + 1] - grid[k]) ** 0.5))
        u = np.linspace(0.0, 1.0, steps + 1)
        tau = grid[k] + (grid[k + 1] - grid[k]) * (1 - (1 - u) ** flow.power if k == last else u)
        times = np.asarray(
            jax.device_get(method.time_at(jnp.clip(jnp.asarray(tau, jnp.float32), 1e-6, 1.0))), np.float64
        )
        if k == 0:
            times[0] = 0.0
        if k == last:
            times[-1] = 1.0
        return tuple(np.unique(times).tolist())

    scale = lambda t: float(known(method.alpha, t) + known(method.sigma, t))  # noqa: E731
    begin = [known(flow.moment, t) for t in grid[:-1]]
    segments = [FixedGrid("multistep", segment_times(k)) for k in range(len(grid) - 1)]

    def teacher_segment(field: Any, k: int, Y: Array, context: Any) -> Array:
        """Where the teacher's ODE takes Y from s_k to s_{k+1}, in the straight frame."""
        times = segments[k].times
        # a path that begins with a little of the data begins with all noise here
        y = method.initial(Y) if k == 0 else scale(times[0]) * Y
        y = segments[k].solve(field, y, context)
        if k == last:
            return denoise(field, y, context) if method.denoises else y
        return y / scale(times[-1])

    def update(carry: Any, _: Any, weights: Any, data: Array, key: Array) -> Any:
        params, ema, opt, step = carry
        k_x, k_z, k_who = jax.random.split(jax.random.fold_in(key, step), 3)
        rows = jax.random.randint(k_x, (size,), 0, data.shape[0])
        x: Any = jax.lax.with_sharding_constraint(data[rows], split)
        z = jax.random.normal(k_z, (size, 1, *shape))
        frozen = nnx.merge(teacher.graphdef, weights.params)
        field = make_field(frozen, method)
        context, _ = encode(frozen, weights.standardizer, x)
        own = nnx.merge(teacher.graphdef, jax.lax.stop_gradient(params))
        own_context, _ = encode(own, weights.standardizer, x)
        own_field = make_field(own, flow)
        arrives = jax.random.bernoulli(k_who, config.on_policy, (size, 1, 1, 1))
        starts: list[Array] = []
        ends: list[Array] = []
        Y: Array = z
        for k in range(len(grid) - 1):
            end = teacher_segment(field, k, Y, context)
            starts.append(Y)
            ends.append(end)
            if k < last:
                h = grid[k + 1] - grid[k]
                Y = jnp.where(arrives, Y + h * own_field.velocity(begin[k], Y, own_context), end)

        def loss(params: Any) -> Array:
            network = nnx.merge(teacher.graphdef, params)
            inner, _ = encode(network, weights.standardizer, x)
            student = make_field(network, flow)
            total = jnp.zeros(())
            for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
                made = start + (grid[k + 1] - grid[k]) * student.velocity(begin[k], start, inner)
                r2 = jnp.mean((made - end) ** 2, axis=(-2, -1))
                total += jnp.mean(jnp.sqrt(r2 + config.softness**2) - config.softness)
            return total / (len(grid) - 1)

        value, gradient = jax.value_and_grad(loss)(params)
        change, opt = optimizer.update(gradient, opt, params)
        params = optax.apply_updates(params, change)
        decay = jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
        return (params, ema, opt, step + 1), value

    def advance(state: Any, weights: Any, data: Array, key: Array, count: int) -> tuple[Any, Array]:
        state, values = jax.lax.scan(lambda c, n: update(c, n, weights, data, key), state, None, length=count)
        return state, values.mean()

    options = meshes.compiler_options(teacher.mesh, getattr(teacher.network, "cpu_compiler_options", {}))
    return jax.jit(advance, static_argnums=4, donate_argnums=0, compiler_options=options)
