"""Priors: what parameters are called, where they live, and whether a set of theta lies there.

Any object with `sample(key, shape)`, `log_prob(theta)` and `support` is a prior; numpyro distributions of event shape
`(dim_theta,)` are. `Prior` makes one of named, independent parts:

>>> import jax, numpyro.distributions as dist
>>> prior = Prior(mass=dist.LogNormal(0.0, 1.0), spin=dist.Uniform(-1.0, 1.0))
>>> prior.names, prior.sample(jax.random.key(0), (5,)).shape
(('mass', 'spin'), (5, 2))
>>> supports(prior)
[Support(low=0.0, high=inf), Support(low=-1.0, high=1.0)]

The support decides the bijection that keeps every draw inside the prior, so it must be elementwise: an interval, a half
line or the real line for each parameter. An object of another library may give `support` as a pair `(low, high)` of
numbers or arrays, infinite where open.
"""

import ast
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.distributions import constraints

from distsbi.data.bijection import Support
from distsbi.hints import did_you_mean
from distsbi.keys import as_key

_REAL = (type(constraints.real),)
_ABOVE = (constraints.greater_than, constraints.greater_than_eq)  # positive, nonnegative, softplus_positive
_BELOW = (constraints.less_than, constraints.less_than_eq)
_INTERVAL = (constraints.interval,)  # unit_interval, open_interval, circular


@dataclasses.dataclass(frozen=True)
class ProductSupport:
    """The support of a named joint: one constraint per part, each over `sizes[i]` entries of the last axis."""

    parts: tuple[Any, ...]
    sizes: tuple[int, ...]

    event_dim = 1
    is_discrete = False

    def __call__(self, theta: Float[Array, "... dim"]) -> Bool[Array, "..."]:
        inside = jnp.ones(jnp.shape(theta)[:-1], bool)
        for part, start, size in zip(self.parts, np.cumsum((0, *self.sizes)), self.sizes, strict=False):
            value = theta[..., int(start)] if part.event_dim == 0 else theta[..., int(start) : int(start) + size]
            inside &= part(value)
        return inside


class Prior:
    """Independent named parts as one prior over a vector. A part of event shape `(k,)` gives the names `part[0]`, ...,
    `part[k-1]`."""

    def __init__(self, **parts: Any) -> None:
        if not parts:
            raise ValueError("Prior() needs at least one part, such as Prior(mass=dist.Uniform(0.0, 1.0)).")
        for name, part in parts.items():
            if isinstance(part, str):
                raise ValueError(
                    f"the part {name!r} is a text, {part!r}: write dist.{part} (import numpyro.distributions as dist), or give texts by name, "
                    f"{{{name!r}: {part!r}}}, where a prior goes."
                )
            _require_prior(part, f"the part {name!r}")
            if part.batch_shape != () or len(part.event_shape) > 1:
                raise ValueError(
                    f"the part {name!r} must be a scalar distribution or one of event shape (k,); it has batch shape "
                    f"{part.batch_shape} and "
                    f"event shape {part.event_shape}. Make a batch of scalars one vector with .to_event(1)."
                )
        self.parts = dict(parts)
        for name, part in parts.items():
            try:
                _from_constraint(part.support, part.event_shape[0] if part.event_shape else 1)
            except ValueError as error:
                raise ValueError(f"the part {name!r} cannot be a prior here: {error}") from error

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(part.event_shape[0] if part.event_shape else 1 for part in self.parts.values())

    @property
    def names(self) -> tuple[str, ...]:
        vectors = ((name, part.event_shape) for name, part in self.parts.items())
        return tuple(
            n for name, shape in vectors for n in ([f"{name}[{i}]" for i in range(shape[0])] if shape else [name])
        )

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (sum(self._sizes),)

    @property
    def support(self) -> ProductSupport:
        return ProductSupport(tuple(part.support for part in self.parts.values()), self._sizes)

    def sample(self, key: Any, sample_shape: int | tuple[int, ...] = ()) -> Float[Array, "*sample_shape dim"]:
        """Draws. `key`: a key, or an integer seed; `sample_shape`: (n,) or n."""
        sample_shape = (sample_shape,) if isinstance(sample_shape, (int, np.integer)) else tuple(sample_shape)
        keys = jax.random.split(as_key(key), len(self.parts))
        draws = [part.sample(k, sample_shape) for k, part in zip(keys, self.parts.values(), strict=True)]
        columns = [d if part.event_shape else d[..., None] for d, part in zip(draws, self.parts.values(), strict=True)]
        return jnp.concatenate(columns, axis=-1)

    def log_prob(self, theta: Float[Array, "... dim"]) -> Float[Array, "..."]:
        """Sum of the parts' log-densities."""
        total: Any = 0.0
        for part, start, size in zip(self.parts.values(), np.cumsum((0, *self._sizes)), self._sizes, strict=False):
            value = theta[..., int(start) : int(start) + size]
            total += part.log_prob(value if part.event_shape else value[..., 0])
        return total

    def __repr__(self) -> str:
        return f"Prior({', '.join(f'{name}={type(part).__name__}' for name, part in self.parts.items())})"


MADE_BY_FUNCTIONS = ("TruncatedNormal", "TruncatedCauchy")  # distributions that numpyro has as functions


def parse_prior(parts: Mapping[str, str]) -> Prior:
    """A `Prior` from text: names of parameters, each with a numpyro distribution of numbers. Nothing of the text is executed.

    >>> parse_prior({"mass": "LogNormal(0, 0.5)", "spin": "Uniform(low=-1, high=1)"})
    Prior(mass=LogNormal, spin=Uniform)

    Raises ValueError for anything else.
    """
    made = {}
    for name, text in parts.items():
        make, numbers, named = read_part(name, text)
        try:
            made[name] = make(*numbers, **named, validate_args=True)
            supports(Prior(**{name: made[name]}))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{_refusal(name, text)} {type(error).__name__}: {str(error).rstrip('.')}. {_arguments(make)}"
            ) from error
    return Prior(**made)


def _refusal(name: str, text: str) -> str:
    return f"the prior of {name!r} must read like Uniform(-1, 1) or Normal(loc=0, scale=2), a numpyro distribution of numbers; got {text!r}."


def _arguments(make: Any) -> str:
    """Names and defaults of what a distribution takes.

    >>> import numpyro.distributions as dist
    >>> _arguments(dist.Uniform)
    'Uniform takes low=0.0, high=1.0.'
    """
    known = [p for p in inspect.signature(make).parameters.values() if p.name != "validate_args"]
    return f"{make.__name__} takes {', '.join(p.name if p.default is p.empty else f'{p.name}={p.default}' for p in known)}."


def read_part(name: str, text: str) -> tuple[Any, list[float], dict[str, float]]:
    """What one part of `parse_prior` says: a numpyro distribution (or one of its functions that make one) and its numbers. Nothing is
    made, so no device is touched.

    Raises ValueError for what does not read so.
    """
    import numpyro.distributions as dist

    refusal = _refusal(name, text)
    try:
        call = ast.parse(str(text).strip(), mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        numbers = [float(ast.literal_eval(a)) for a in call.args]
        named = {str(k.arg): float(ast.literal_eval(k.value)) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(refusal) from error
    made = getattr(dist, call.func.id, None)
    classes = {n for n, made in vars(dist).items() if isinstance(made, type) and issubclass(made, dist.Distribution)}
    if call.func.id not in (known := [*sorted(classes), *MADE_BY_FUNCTIONS]):
        raise ValueError(f"{refusal} numpyro has no distribution {call.func.id!r}.{did_you_mean(call.func.id, known)}")
    return made, numbers, named


def describe(prior: Any) -> dict[str, str] | str:
    """What a prior is, in words that are equal for equal priors: of a `Prior` each part by name. Other libraries' are told by their class.

    >>> describe(parse_prior({"mass": "LogNormal(0, 0.5)"}))
    {'mass': 'LogNormal(loc=0, scale=0.5)'}
    """
    import numpyro.distributions as dist

    if isinstance(prior, Prior):
        return {name: str(describe(part)) for name, part in prior.parts.items()}
    kind = type(prior)
    if not isinstance(prior, dist.Distribution):
        return f"{kind.__module__}.{kind.__qualname__}"
    wrapped = hasattr(prior, "base_dist") and not (
        isinstance(prior, dist.TransformedDistribution) and kind.arg_constraints
    )
    given = {name: vars(prior).get(name) for name in kind.arg_constraints if name in vars(prior)}
    if (
        wrapped or not given
    ):  # truncated, of several entries, ...: all that it holds, by name, for numpyro's own order is that of a set
        held = {name: vars(prior).get(name) for name in sorted(kind.gather_pytree_data_fields())}
        inner = {
            name: describe(value)
            if isinstance(value, dist.Distribution)
            else " ".join(map(_numbers, jax.tree.leaves(value)))
            for name, value in held.items()
        }
        inner["shape"] = " ".join(map(str, prior.shape()))
        return f"{kind.__name__}({', '.join(f'{name}={said}' for name, said in inner.items() if said)})"
    return f"{kind.__name__}({', '.join(f'{name}={_numbers(value)}' for name, value in given.items())})"


def as_texts(prior: Any) -> dict[str, str] | None:
    """What `parse_prior` makes this very prior of; None where no text does, as for parts of several entries.

    >>> as_texts(parse_prior({"mass": "LogNormal(0, 0.5)", "spin": "Uniform(-1, 1)"}))
    {'mass': 'LogNormal(loc=0.0, scale=0.5)', 'spin': 'Uniform(low=-1.0, high=1.0)'}
    """
    if not isinstance(prior, Prior):
        return None
    texts = {name: _text(part) for name, part in prior.parts.items()}
    try:
        made = parse_prior(texts)
    except ValueError:
        return None
    return texts if describe(made) == describe(prior) and supports(made) == supports(prior) else None


def _text(part: Any) -> str:
    """The class and the arguments of a distribution, of which each is one number where `parse_prior` is to take it."""
    kind, held = type(part).__name__, [part]
    if "Truncated" in kind and (made_by := f"Truncated{type(part.base_dist).__name__}") in MADE_BY_FUNCTIONS:
        kind, held = made_by, [part.base_dist, part]
    given = {argument: getattr(of, argument, None) for of in held for argument in type(of).arg_constraints}
    return f"{kind}({', '.join(f'{argument}={_exactly(value)}' for argument, value in given.items())})"


def _exactly(value: Any) -> str:
    try:
        return repr(float(value)) if np.ndim(value) == 0 else "?"
    except (TypeError, ValueError):
        return "?"


def _numbers(value: Any) -> str:
    return " ".join(f"{number:.7g}" for number in np.ravel(np.asarray(value, np.float64)).tolist())


def parameter_names(prior: Any, dim: int) -> tuple[str, ...]:
    """The prior's own `names`, else `theta_0`, `theta_1`, ... Raises ValueError if they are not `dim` different
    names."""
    given = getattr(prior, "names", None)
    return check_names(given, dim) if given is not None else default_names(dim)


def default_names(dim: int) -> tuple[str, ...]:
    """What parameters without names are called."""
    return tuple(f"theta_{i}" for i in range(dim))


def same_parameters(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether they may be the same parameters in the same order: of equal names, or as many where one side has none."""
    unnamed = default_names(len(names))
    return tuple(names) == tuple(others) or (len(names) == len(others) and unnamed in (tuple(names), tuple(others)))


def check_names(names: Sequence[str], dim: int) -> tuple[str, ...]:
    """The names as a tuple. Raises ValueError if they are not `dim` different, non-empty strings."""
    names = tuple(names)
    if len(names) != dim:
        raise ValueError(f"{len(names)} parameter names given for {dim} parameters: {', '.join(map(str, names))}.")
    if bad := [n for n in names if not isinstance(n, str) or not n or names.count(n) > 1]:
        raise ValueError(f"parameter names must be different, non-empty strings; got {bad}.")
    return names


def supports(prior: Any, dim: int | None = None) -> list[Support]:
    """The support of each parameter. `prior=None` is the real line in `dim` dimensions.

    Raises ValueError if the prior is no prior, is not a distribution over one vector, has not `dim` parameters, or has
    a support that is not elementwise (simplex, ordered, positive definite, ...) or not continuous.
    """
    if prior is None:
        if dim is None:
            raise ValueError("without a prior the number of parameters must be given.")
        return [Support()] * dim
    _require_prior(prior, "the prior")
    size = _size(prior, dim)
    found = _from_constraint(prior.support, size)
    if len(found) != size:
        raise ValueError(f"the prior's support has {len(found)} entries, its samples have {size}.")
    return found


def check_theta(prior: Any, theta: Float[np.ndarray, "n dim ..."], names: Sequence[str] | None = None) -> None:
    """Raises ValueError, naming the first row, parameter, value and bounds, if a theta lies outside the prior. Bounds
    belong to the support."""
    theta = np.asarray(theta, np.float32)
    bounds = supports(prior, theta.shape[1])
    per_component = theta.reshape(*theta.shape[:2], -1)
    beyond = outside(bounds, per_component)
    if not beyond.any():
        return
    row, column, channel = (int(i) for i in np.argwhere(beyond)[0])
    name = (tuple(names) if names is not None else parameter_names(prior, theta.shape[1]))[column]
    rows = int(beyond.any(axis=(1, 2)).sum())
    raise ValueError(
        f"{rows} of {len(theta)} rows of theta lie outside the prior; first: row {row}, parameter {name!r} = "
        f"{per_component[row, column, channel]:g}, "
        f"prior support [{bounds[column].low:g}, {bounds[column].high:g}]. Drop those rows or give the prior they were "
        f"drawn from."
    )


def outside(bounds: Sequence[Support], theta: Float[np.ndarray, "n dim ch"]) -> Bool[np.ndarray, "n dim ch"]:
    """Which numbers lie outside their support, to which its bounds belong."""
    low, high = (np.asarray([getattr(s, end) for s in bounds], np.float32)[:, None] for end in ("low", "high"))
    return (theta < low) | (theta > high)


def _require_prior(prior: Any, what: str) -> None:
    missing = [a for a in ("sample", "log_prob", "support") if not hasattr(prior, a)]
    if missing:
        raise ValueError(
            f"{what} must have sample(key, shape), log_prob(theta) and support, as numpyro distributions do; "
            f"{type(prior).__name__} has no "
            f"{' and no '.join(missing)}. A support may be a pair (low, high)."
        )


def _size(prior: Any, dim: int | None) -> int:
    """The number of parameters, from event_shape where there is one, else from the shape of one abstract sample."""
    batch, event = getattr(prior, "batch_shape", None), getattr(prior, "event_shape", None)
    if event is None:
        shape = prior.sample(jax.random.key(0), (1,)).shape[1:]
        batch, event = (), tuple(shape)
    if batch or len(event) != 1:
        advice = (
            "Make it one vector with .to_event(1)."
            if batch and not event
            else "Use .expand([1]).to_event(1), or distsbi.Prior(name=...)."
            if not batch and not event
            else "Give a distribution of event shape (dim_theta,)."
        )
        raise ValueError(
            f"the prior must be over one vector; it has batch shape {tuple(batch or ())} and event shape "
            f"{tuple(event)}. {advice}"
        )
    if dim is not None and event[0] != dim:
        raise ValueError(
            f"the prior has {event[0]} parameters; {dim} were expected, as many as theta has (dim_obs, not dim_cond)."
        )
    return int(event[0])


def _from_constraint(support: Any, size: int) -> list[Support]:
    """`size` supports from one constraint: products and `independent` are opened, bounds are broadcast."""
    if isinstance(support, ProductSupport):
        return [s for part, n in zip(support.parts, support.sizes, strict=True) for s in _from_constraint(part, n)]
    if isinstance(support, constraints.cat):
        return [s for c, n in zip(support.cseq, support.lengths, strict=True) for s in _from_constraint(c, n)]
    if isinstance(support, constraints.independent):
        return _from_constraint(support.base_constraint, size)
    if isinstance(support, tuple) and len(support) == 2:
        return _from_bounds(support[0], support[1], size)
    if getattr(support, "is_discrete", False):
        raise ValueError(
            f"the prior's support {support!r} is discrete; flow and diffusion posteriors need continuous parameters."
        )
    if isinstance(support, _REAL):
        return [Support()] * size
    if isinstance(support, _INTERVAL):
        return _from_bounds(support.lower_bound, support.upper_bound, size)
    if isinstance(support, _ABOVE):
        return _from_bounds(support.lower_bound, np.inf, size)
    if isinstance(support, _BELOW):
        return _from_bounds(-np.inf, support.upper_bound, size)
    raise ValueError(
        f"the prior's support {support!r} is not elementwise: distsbi keeps draws inside the prior with one bijection "
        f"per parameter, for intervals, "
        "half lines and the real line. Infer unconstrained parameters instead (such as the logits of a simplex) and "
        "transform the draws."
    )


def _from_bounds(low: Any, high: Any, size: int) -> list[Support]:
    lows, highs = (np.broadcast_to(np.asarray(b, np.float64), (size,)).tolist() for b in (low, high))
    return [Support(a, b) for a, b in zip(lows, highs, strict=True)]
