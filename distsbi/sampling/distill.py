"""Few-step students: from a trained posterior to one that draws in 1 to 4 evaluations.

The time axis of the straight path is cut into K segments. The student, a network like its teacher's and started from its weights,
learns the average velocity over each segment from where the segment begins,

    u(s_k, Y) = (Phi(Y; s_k -> s_{k+1}) - Y) / (s_{k+1} - s_k),    Phi: the teacher's ODE

(the regression target of progressive distillation, Salimans & Ho 2202.00512, and of MeanFlow, Geng et al. 2505.13447), with a
pseudo-L1 loss of the segment's end. Drawing is then Euler's method on K steps. Half of every batch begins a segment at the teacher's
own point, half where the student itself arrives, so that it is trained where it is used. No simulation is needed: noise is fresh in
every update, and x is any data, such as the training set's.

Two other objectives learn the same averages, for comparison; both train u(s, Y) at every time s of a segment, towards its end:
- "consistency": from two neighbours on a teacher's path the student is to arrive at the same end (consistency distillation, Song et al.
  2303.01469; within segments, Heek et al. 2403.06807; without a second set of averaged weights, Song & Dhariwal 2310.14189).
- "mean_flow": u = v + (s_{k+1} - s) du/ds along the teacher's path, the limit of neighbours that touch (Geng et al. 2505.13447, eq. 6).
"""

import dataclasses
import logging
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from distsbi import keys, mesh as meshes, processes
from distsbi.hints import as_count, as_number, refuse_unknown
from distsbi.methods import FlowMatching, Method, Moment
from distsbi.networks.base import encode
from distsbi.sampling.flow import denoise
from distsbi.sampling.posterior import Posterior
from distsbi.solvers import Field, FixedGrid
from distsbi.solvers.field import known
from distsbi.training import TrainingConfig
from distsbi.training.update import as_kept, averaged, in_float32, make_optimizer

log = logging.getLogger("distsbi")

DISPATCH = 50  # updates per dispatch
SAID = 250  # updates between lines of the log
FEWEST_STEPS = 8  # of the teacher in a segment
OBJECTIVES = ("endpoint", "consistency", "mean_flow")


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
        teacher_steps: of the teacher's solver, each segment's share at least 8, or all of them.
        on_policy: share of the batch that begins a segment where the student arrives.
        objective: "endpoint" (measured to be the best), "consistency" or "mean_flow"; see the module.
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
    objective: str = "endpoint"
    seed: int = 0
    show_progress: bool | None = None

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """From a dict. Raises ValueError naming an unknown key and the nearest known."""
        refuse_unknown("distill option", options, cls)
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("segments", "nsteps", "batch_size", "teacher_steps"):
            object.__setattr__(self, name, as_count(f"distill option {name}", getattr(self, name)))
        if self.segments > 8:
            raise ValueError(f"a student has 1 to 8 segments; got {self.segments}.")
        for name in ("on_policy", "softness", "power", "max_lr", "ema_decay"):
            object.__setattr__(self, name, as_number(f"distill option {name}", getattr(self, name)))
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"distill option {name} must be finite; got {getattr(self, name)!r}.")
        if (
            not 0 <= self.on_policy <= 1
            or not 0 < self.ema_decay < 1
            or min(self.softness, self.power, self.max_lr) <= 0
        ):
            raise ValueError(
                "distill options on_policy and ema_decay are fractions, softness, power and max_lr positive."
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"distill option objective must be one of {', '.join(OBJECTIVES)}; got {self.objective!r}."
            )
        try:
            inner = np.asarray(self.boundaries if self.boundaries is not None else (), float).reshape(-1)
        except (TypeError, ValueError):
            raise ValueError(f"distill option boundaries must be numbers; got {self.boundaries!r}.") from None
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
            return (0.0, *map(float, self.boundaries), 1.0)
        return tuple(1.0 - (1.0 - k / self.segments) ** self.power for k in range(self.segments + 1))


def train_student(
    teacher: Posterior, xs: Float[np.ndarray, "n dim_x ch_x"], config: DistillConfig | None = None
) -> tuple[Posterior, list[float]]:
    """(the student, its losses, one for each dispatch). The student is a posterior like any other, bound to its own steps; `distsbi.distill` also measures
    how far it is from its teacher.

    Raises ValueError for observations of a wrong shape, or a teacher that is a student itself; RuntimeError if the loss becomes NaN.
    """
    config = config or DistillConfig()
    if teacher.is_student:
        raise ValueError("this posterior is a student already; distil its teacher.")
    xs = teacher.check_xs(xs)
    if not len(xs):
        raise ValueError(
            "xs holds no observations to distil on; give some, such as those that the teacher was trained on."
        )
    mesh = teacher.mesh
    optimizer = make_optimizer(
        TrainingConfig(
            nsteps=config.nsteps,
            max_lr=config.max_lr,
            min_lr=min(TrainingConfig.min_lr, config.max_lr),
            warmup_steps=min(200, config.nsteps // 10),
            weight_decay=0.0,
        )
    )
    size = -(-config.batch_size // meshes.data_size(mesh)) * meshes.data_size(mesh)
    advance = _advance(teacher, config, optimizer, size)
    whole = meshes.replicated(mesh)
    params = in_float32(jax.tree.map(jnp.copy, teacher.weights.params))
    state = jax.device_put((params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0)), whole)
    data, key = jax.device_put((xs, keys.as_key(config.seed)), whole)
    losses: list[float] = []
    hide = None if config.show_progress is None else not config.show_progress
    first = processes.is_first()
    hide = hide if first else True
    with tqdm(total=config.nsteps, desc="distilling", unit="update", disable=hide) as bar:
        done = 0
        if first:
            log.info("distilling, update 0 of %d; the first ones take a while, to compile", config.nsteps)
        while done < config.nsteps:
            count = min(DISPATCH, config.nsteps - done)
            state, loss = advance(state, teacher.weights, data, key, count)
            losses.append(float(loss))
            if not np.isfinite(losses[-1]):
                raise RuntimeError(f"the student's loss became {losses[-1]}: lower max_lr (now {config.max_lr}).")
            done += count
            bar.update(count)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            if bar.disable and first and (done % SAID == 0 or done == config.nsteps):
                log.info("update %d of %d: loss %.4f", done, config.nsteps, losses[-1])
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "show_progress"}
    facts = {
        **{
            name: teacher.facts[name]
            for name in ("training", "data", "versions", "x_extent", "x_missing")
            if name in teacher.facts
        },
        "student": {**options, "boundaries": list(config.grid[1:-1]), "teacher": teacher.fingerprint},
    }
    student = Posterior(
        nnx.merge(teacher.graphdef, as_kept(state[1], teacher.weights.params)), _student_method(teacher), teacher.weights.standardizer,
        names=teacher.parameter_names, solver=FixedGrid("euler", config.grid), tile=teacher.tile_by_kind, mesh=mesh, facts=facts,
        student=True, unconditional=teacher.is_unconditional,
    )  # fmt: skip
    return student, losses


def _student_method(teacher: Posterior) -> FlowMatching:
    """What a student predicts: the average velocity of the straight path. Its input has its teacher's scale, whose weights it starts from."""
    return teacher.method if isinstance(teacher.method, FlowMatching) else FlowMatching()


def _advance(teacher: Posterior, config: DistillConfig, optimizer: optax.GradientTransformation, size: int) -> Any:
    """(state, teacher's weights, data, key, count) -> (state, mean loss): `count` updates in one dispatch."""
    method, flow, grid = teacher.method, _student_method(teacher), config.grid
    shape = (teacher.dim_theta, teacher.ch_theta)
    split = meshes.batch_sharding(teacher.mesh)
    last = len(grid) - 2
    begin = [known(flow.moment, t) for t in grid[:-1]]
    segments = [_Segment.make(method, config, k) for k in range(len(grid) - 1)]
    whole_path = config.objective != "endpoint"

    def neighbours(
        student: Field, inner: Any, field: Field, context: Any, segment: "_Segment", path: Array, key: Array
    ) -> Array:
        """What is left between the student and its goal at one random time of each row's path, [batch, 1, ...]."""
        rows = jnp.arange(size)
        j = jax.random.randint(key, (size,), 0, len(segment.taus) - 1, jnp.int32)
        Y, tau = path[j, rows], jnp.asarray(segment.taus)[j]
        left = (segment.taus[-1] - tau)[:, None, None, None]

        def average(Y: Array, tau: Array) -> Array:
            return student.velocity(_by_row(flow, tau), Y, inner)

        if config.objective == "consistency":
            next_Y, next_tau = path[j + 1, rows], jnp.asarray(segment.taus)[j + 1]
            rest = (segment.taus[-1] - next_tau)[:, None, None, None]
            goal = next_Y + rest * jax.lax.stop_gradient(average(next_Y, next_tau))
            return Y + left * average(Y, tau) - goal
        m = _by_row(method, jnp.asarray(segment.solver.times, jnp.float32)[j])
        data, noise = field.parts(m, m.scale * Y, context)
        u, along = jax.jvp(average, (Y, tau), (data - noise, jnp.ones_like(tau)))
        return u - jax.lax.stop_gradient(data - noise + left * along)

    def update(carry: Any, _: Any, weights: Any, data: Array, key: Array) -> Any:
        params, ema, opt, step = carry
        k_x, k_z, k_who, k_when = keys.student_keys(key, step)
        rows = jax.random.randint(k_x, (size,), 0, data.shape[0], jnp.int32)
        x: Any = jax.lax.with_sharding_constraint(data[rows], split)
        z = jax.random.normal(k_z, (size, 1, *shape), jnp.float32)
        frozen = nnx.merge(teacher.graphdef, weights.params)
        field = Field(frozen, method)
        context, _ = encode(frozen, weights.standardizer, x)
        own = nnx.merge(teacher.graphdef, jax.lax.stop_gradient(params))
        own_context, _ = encode(own, weights.standardizer, x)
        own_field = Field(own, flow)
        arrives = jax.random.bernoulli(k_who, jnp.float32(config.on_policy), (size, 1, 1, 1))
        starts: list[Array] = []
        paths: list[Array] = []
        Y: Array = z
        for k in range(len(grid) - 1):
            path = segments[k].path(field, Y, context, whole=whole_path)
            starts.append(Y)
            paths.append(path)
            if k < last:
                h = grid[k + 1] - grid[k]
                Y = jnp.where(arrives, Y + h * own_field.velocity(begin[k], Y, own_context), path[-1])

        def loss(params: Any) -> Array:
            network = nnx.merge(teacher.graphdef, params)
            inner, _ = encode(network, weights.standardizer, x)
            student = Field(network, flow)
            total = jnp.zeros((), jnp.float32)
            for k, (start, path, segment) in enumerate(zip(starts, paths, segments, strict=True)):
                if config.objective == "endpoint":
                    r = start + (grid[k + 1] - grid[k]) * student.velocity(begin[k], start, inner) - path[-1]
                else:
                    r = neighbours(student, inner, field, context, segment, path, keys.segment_key(k_when, k))
                r2 = jnp.mean(r**2, axis=(-2, -1))
                total += jnp.mean(jnp.sqrt(r2 + config.softness**2) - config.softness)
            return total / (len(grid) - 1)

        value, gradient = jax.value_and_grad(loss)(params)
        change, opt = optimizer.update(gradient, opt, params)
        params = optax.apply_updates(params, change)
        ema = averaged(ema, params, step, config.ema_decay)
        return (params, ema, opt, step + 1), value

    def advance(state: Any, weights: Any, data: Array, key: Array, count: int) -> tuple[Any, Array]:
        state, values = jax.lax.scan(lambda c, n: update(c, n, weights, data, key), state, None, length=count)
        return state, values.mean()

    options = meshes.compiler_options(teacher.mesh, getattr(teacher.network, "cpu_compiler_options", {}))
    return jax.jit(advance, static_argnums=4, donate_argnums=0, compiler_options=options)


@dataclasses.dataclass(frozen=True, eq=False)
class _Segment:
    """The teacher's ODE over one segment: its solver, and alpha + sigma and tau at each of the times. `first`, `last`: whether it begins with noise,
    and whether it ends with data."""

    solver: FixedGrid
    scales: Float[np.ndarray, "times"]
    taus: Float[np.ndarray, "times"]
    first: bool
    last: bool

    @classmethod
    def make(cls, method: Method, config: DistillConfig, k: int) -> "_Segment":
        """From s_k to s_{k+1}, in the teacher's own times; graded towards the data in the last segment."""
        grid, first, last = config.grid, k == 0, k == config.segments - 1
        # each segment begins with a step of first order
        fewest = min(FEWEST_STEPS, config.teacher_steps)
        steps = max(fewest, round(config.teacher_steps * (grid[k + 1] - grid[k]) ** 0.5))
        u = np.linspace(0.0, 1.0, steps + 1)
        tau = grid[k] + (grid[k + 1] - grid[k]) * (1 - (1 - u) ** FlowMatching.power if last else u)
        times = np.array(known(method.time_at, np.clip(np.asarray(tau, np.float32), 1e-6, 1.0)), np.float64)
        times[0], times[-1] = 0.0 if first else times[0], 1.0 if last else times[-1]
        times = np.unique(times)
        if len(times) < 2:
            start, end = (known(method.moment, t) for t in (0.0, 1.0))
            raise ValueError(
                f"boundaries {grid[1:-1]} leave the segment from {grid[k]:g} to {grid[k + 1]:g} no times of {type(method).__name__}, whose path runs from "
                f"{start.alpha / start.scale:.4g} to {end.alpha / end.scale:.4g}: give boundaries well between these."
            )
        alpha, sigma = (np.asarray(known(f, times)) for f in (method.alpha, method.sigma))
        taus = alpha / (alpha + sigma)
        taus[0], taus[-1] = grid[k], grid[k + 1]
        return cls(FixedGrid("multistep", tuple(times.tolist())), alpha + sigma, taus, first, last)

    def path(self, field: Field, Y: Float[Array, "batch 1 dim ch"], context: Any, *, whole: bool = False) -> Array:
        """Where the teacher's ODE takes Y, in the straight frame: at the segment's end alone, [1, batch, 1, dim, ch], or, `whole`, at each of its
        times."""
        # a path that begins with a little of the data begins with all noise here
        y = field.method.initial(Y) if self.first else self.scales[0] * Y
        y = self.solver.solve(field, y, context, trajectory=whole)
        y = y if whole else y[None]
        denoises = self.last and field.method.denoises
        end = denoise(field, y[-1], context) if denoises else y[-1] / self.scales[-1]
        inner = y[1:-1] / self.scales[1:-1, None, None, None, None] if whole else y[:0]
        return jnp.concatenate([*([Y[None]] if whole else []), inner, end[None]])


def _by_row(method: Method, t: Float[Array, "batch"]) -> Moment:
    """The moment of a time for each row, against states [batch, 1, dim, ch]."""
    m = jax.tree.map(lambda a: a[:, None, None, None], method.moment(t))
    return dataclasses.replace(m, c_time=m.c_time[..., 0, 0])
