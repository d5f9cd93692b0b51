"""A user's simulator: found by its name, called row by row or batch by batch, and what became of every row.

    def simulate(theta): ...              theta: float64 [dim_theta]
    def simulate(theta, rng): ...         and a numpy.random.Generator of the row's own
    def simulate(key, theta): ...         a jax key of the row's own, and theta: float32 [dim_theta]

It returns x: a number, [dim_x], [dim_x, channels] or an image [rows, columns, channels], of one shape for all rows. The random argument is known by
its name: `rng`, or `key`. With a batch size theta is [batch, dim_theta] and x has an axis of as many rows in front; `rng` or `key` is then the
batch's.

Everything of row i depends on (seed, i) alone. theta comes from the prior in blocks of BLOCK rows, one key each. `rng` is one Philox
generator whose counter is set to the row: the stream of row i is (key, (., ., i, .)), 2^128 numbers long, and setting it costs half a µs, where
a new generator costs ten.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from distsbi.fanout.agenda import MachinesFault, one_line
from distsbi.fanout.blame import machines_fault
from distsbi.store.schema import FAILED, INVALID, QUARANTINED

BLOCK = 8_192  # rows of theta that have a key together: a constant of the format, for it decides every theta
RNG, KEY = "rng", "key"

TIMED_SECONDS = 0.05  # a row is simulated again until so much time has passed, to know how long one takes

Simulate = Callable[..., Any]


Bad = dict[int, tuple[str, str]]  # of a row that is no pair: status, message


@dataclasses.dataclass(frozen=True)
class Made:
    """Rows as they were simulated. `x`: of the good ones, in order; `bad`: the others, by their place among the rows."""

    theta: Float[np.ndarray, "rows dim_theta"]
    x: Float[np.ndarray, "good *dim_x"]
    bad: Bad

    @property
    def good(self) -> np.ndarray:
        """Which rows are pairs: bool [rows]."""
        good = np.ones(len(self.theta), bool)
        good[list(self.bad)] = False
        return good


class Simulator:
    """A function with its prior and its random numbers.

    Args:
        function: as above.
        prior: anything with `sample(key, (n,))`.
        key: the seed's key.
        batch: rows of one call; None: single ones.
        missing: NaN in x is an entry that is missing, not a failure.
    """

    def __init__(self, function: Simulate, prior: Any, key: Any, batch: int | None = None, missing: bool = False):
        from distsbi import keys

        self._call, self._random = arranged(function)
        self._sample, self._key, self.batch, self._missing = _sampler(prior), key, batch, missing
        self._philox = np.random.Philox(key=[keys.seed_of(keys.key_words(key)), keys.SIMULATIONS])
        self._rng = np.random.Generator(self._philox)
        fresh = self._philox.state
        words = {name: fresh["state"][name].tolist() for name in ("counter", "key")}
        self._fresh: Any = {**fresh, "state": words, "buffer": fresh["buffer"].tolist()}
        self._block = functools.lru_cache(maxsize=2)(self._draw_block)

    def theta(self, start: int, stop: int) -> Float[np.ndarray, "rows dim_theta"]:
        """The parameters of rows `start` to `stop - 1`, float32."""
        parts = []
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            parts.append(self._block(block)[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def run(
        self, start: int, stop: int, shape: tuple[int, ...], skip: Mapping[int, str], *, blame_rows: bool = False
    ) -> Made:
        """Simulates rows `start` to `stop - 1`, those in `skip` aside. `shape`: of one x, as `look` tells it. In batches `start` must be a
        multiple of the batch size, and `stop` too, or the end of all.

        Raises MachinesFault where the simulator raises what is the machine's fault (blame.py); `blame_rows`: that is the row's, too.
        """
        rows, step = stop - start, self.batch or 1
        units = -(-rows // step)
        theta = self.theta(start, start + units * step)
        given = self._given(theta)
        if self.batch is not None:
            given, shape = given.reshape(units, step, -1), (step, *shape)
        x = np.zeros((units, *shape))  # copied into: a simulator may return the same array again and again
        call, array, number = self._call, np.ndarray, x.dtype
        firsts: Sequence[int] = range(start, start + units * step, step)
        bad = {unit: (QUARANTINED, skip[first]) for unit, first in enumerate(firsts) if first in skip} if skip else {}
        todo: Sequence[int] = range(units)
        if bad:
            todo = [unit for unit in todo if unit not in bad]
            given, firsts = given[todo], [firsts[unit] for unit in todo]
        # what is in this loop is the cost of a row beside the simulator
        for unit, own, random in zip(todo, given, self._randoms(firsts), strict=True):
            try:
                value = call(own, random)
                if type(value) is not array:
                    value = np.asarray(value)
            except (Exception, SystemExit) as error:
                if not blame_rows and (fault := machines_fault(error)) is not None:
                    again = "if another call ends so too, the row is recorded as failed"
                    raise MachinesFault(f"row {start + unit * step}: {fault}; {again}") from error
                alone = "" if self.batch is None else "its batch raised (return NaN for a bad row): "
                bad[unit] = FAILED, alone + one_line(error)
                continue
            if value.shape != shape or (value.dtype is not number and value.dtype.kind not in "fiub"):
                bad[unit] = INVALID, _not_like(value, shape)
            else:
                x[unit] = value
        with np.errstate(over="ignore"):  # beyond float32 is inf
            flat = x.reshape(units * step, *shape[self.batch is not None :])[:rows].astype(np.float32)
        of_rows = self._not_finite(flat)
        for unit, why in bad.items():
            of_rows.update(dict.fromkeys(range(unit * step, min((unit + 1) * step, rows)), why))
        made = Made(theta[:rows], flat, of_rows)
        return dataclasses.replace(made, x=flat[made.good]) if of_rows else made

    def look(self, start: int) -> tuple[tuple[int, ...], float]:
        """(the shape of one x, the seconds that a row takes), from calls at row `start`, or at the batch that begins there.

        Raises what the simulator raises, and ValueError where it gives no numbers, or NaN.
        """
        size, single = self.batch or 1, self.batch is None
        given = self._given(self.theta(start, start + size))
        value = np.asarray(self._call(given[0] if single else given, next(self._randoms([start]))))
        if value.dtype.kind not in "fiub" or not (single or value.shape[:1] == (size,)):
            raise ValueError(_not_like(value, None if single else (size, "...")))
        shape = value.shape if single else value.shape[1:]
        if 0 in shape:
            raise ValueError(f"x has shape {list(shape)}, which holds no numbers")
        with np.errstate(over="ignore"):
            bad = self._not_finite(value.reshape(size, *shape).astype(np.float32))
        if len(bad) == size:
            raise ValueError(bad[0][1])
        spent, calls = 0.0, 0
        while spent < TIMED_SECONDS:  # not the first call, which may import, compile or read for a minute
            given = self._given(self.theta(start, start + size))
            began, calls = time.monotonic(), max(1, 2 * calls)
            for _ in range(calls):
                self._call(given[0] if single else given, next(self._randoms([start])))
            spent = time.monotonic() - began
        return shape, spent / (calls * size)

    def _draw_block(self, block: int) -> Float[np.ndarray, "block dim_theta"]:
        """On the CPU, whatever else there is: other devices round otherwise."""
        import jax

        from distsbi import keys

        with jax.default_device(_cpu()):
            drawn = self._sample(keys.theta_key(self._key, block))
        theta = np.asarray(drawn, np.float32)
        if theta.ndim != 2 or len(theta) != BLOCK or not np.isfinite(theta).all():
            raise ValueError(
                f"prior.sample(key, ({BLOCK},)) must give finite numbers [{BLOCK}, dim_theta]; got shape {list(theta.shape)}"
                f"{'' if np.isfinite(theta).all() else ' with NaN or inf'}. Mend the prior."
            )
        return theta

    def _given(self, theta: np.ndarray) -> np.ndarray:
        """theta as the function sees it: a copy, which it may change."""
        return theta.copy() if self._random == KEY else theta.astype(np.float64)

    def _randoms(self, firsts: Sequence[int]) -> Iterator[Any]:
        """The random argument of each unit that begins at these rows, in turn. That of numpy is one generator, which the next sets anew."""
        if self._random == KEY:
            import jax

            from distsbi import keys

            with jax.default_device(_cpu()):
                words = np.asarray(jax.random.key_data(keys.simulation_keys(self._key, _padded(np.asarray(firsts)))))
            yield from map(keys.from_words, words[: len(firsts)])
        elif self._random is None:
            yield from itertools.repeat(None, len(firsts))
        else:
            philox, fresh, rng = self._philox, self._fresh, self._rng
            counter = fresh["state"]["counter"]  # a list: set twice as fast as an array
            for first in firsts:
                counter[2] = first
                philox.state = fresh
                yield rng

    def _not_finite(self, x: np.ndarray) -> Bad:
        good = np.isfinite(x)
        if good.all():
            return {}
        good |= np.isnan(x) if self._missing else False
        flat, bad = good.reshape(len(x), -1), {}
        for i in np.flatnonzero(~flat.all(1)).tolist():
            wrong = np.flatnonzero(~flat[i])
            bad[i] = (
                INVALID,
                f"x has {len(wrong)} values that are NaN or infinite as float32, the first at entry {wrong[0]}",
            )
        if self._missing:
            for i in np.flatnonzero(np.isnan(x.reshape(len(x), -1)).all(1)).tolist():
                bad[i] = INVALID, "every entry of x is NaN"
        return bad


def import_simulator(name: str) -> Simulate:
    """The function that "module:function" names.

    Raises ValueError, naming this machine, if there is no such module or function, or importing it raises.
    """
    module, _, path = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
        raise ValueError(f"a simulator must be named as module:function, such as my_simulator:simulate; got {name!r}.")
    advice = (
        "give module:function of a module that is installed on every machine, or lies in a folder on PYTHONPATH there."
    )
    where = f"the simulator {name!r} cannot be imported on {socket.gethostname()}"
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if module.endswith(".py"):
            advice = f"leave out .py: {module.removesuffix('.py')}:{path}."
        raise ValueError(f"{where} ({one_line(error)}); {advice}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{where}: {module} ({getattr(found, '__file__', 'built in')}) has no {path!r}; {advice}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"the simulator {name!r} is no function; it is {type(found).__name__}.")
    return found


def name_of(function: str | Simulate) -> str:
    """ "module:function" of a function, or its name as it is."""
    if isinstance(function, str):
        return function
    inner = function if hasattr(function, "__qualname__") else getattr(function, "func", type(function))
    return f"{inner.__module__}:{getattr(inner, '__qualname__', type(inner).__name__)}"


def by_name(function: str | Simulate) -> str | Simulate:
    """The name of a function that every process can import; the function itself where they cannot (a lambda, one of a script)."""
    if isinstance(function, str):
        return function
    if not callable(function):
        raise ValueError(f"simulator must be a function or 'module:function'; got {type(function).__name__}.")
    name = name_of(function)
    if name.startswith("__main__:") or "<" in name:
        return function
    try:
        return name if import_simulator(name) is function else function
    except ValueError:
        return function


def source_digest(function: Simulate) -> str | None:
    """blake2b of the file that a function is in (of its own text, where it is in the script itself), and of the numbers and words that it was
    made with: what `functools.partial` gave it, and `_held`. So another version is told apart; None where there is none to read."""
    bound = ""
    while isinstance(function, functools.partial):
        given = [*enumerate(function.args), *sorted(function.keywords.items())]
        bound += repr([(name, value if _is_plain(value) else type(value).__name__) for name, value in given])
        function = function.func
    layers: list[Any] = [function]
    while hasattr(layers[-1], "__wrapped__"):  # by a decorator
        layers.append(layers[-1].__wrapped__)
    try:
        held = [value for layer in layers for value in _held(layer)]
        if layers[-1].__module__ == "__main__":
            of = getattr(layers[-1], "__self__", layers[-1])
            source = of if inspect.isroutine(of) or inspect.isclass(of) else type(of)
        else:
            source = inspect.getmodule(layers[-1]) or layers[-1]  # what it calls is as much of it
        text = bound + (repr(held) if held else "") + inspect.getsource(source)
    except (AttributeError, TypeError, ValueError, OSError):
        return None
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _held(function: Any) -> list[tuple[str, Any]]:
    """Numbers and words, by name, which make two functions of one text different ones: attributes of the object that it is or is a method of, its
    closure and its defaults, and in a script the globals that it uses. Not arrays or dicts: buffers and caches hold something else each time."""
    owner = getattr(function, "__self__", None) if inspect.isroutine(function) else function
    named = [{} if owner is None or inspect.ismodule(owner) else getattr(owner, "__dict__", {})]
    inner = getattr(function, "__func__", function)
    if inspect.isfunction(inner):
        found, defaults = inspect.getclosurevars(inner), inner.__defaults__ or ()
        named += [found.nonlocals, {str(i): value for i, value in enumerate(defaults)}, inner.__kwdefaults__ or {}]
        named += [found.globals] if inner.__module__ == "__main__" else []
    pairs = [pair for values in named for pair in sorted(values.items(), key=lambda pair: pair[0])]
    return [(name, value) for name, value in pairs if not name.startswith("__") and _is_plain(value)]


def _sampler(prior: Any) -> Callable[[Any], Any]:
    """A block of theta from its key; compiled where the prior is numpyro's, for others may hold what jax cannot trace."""
    import jax
    import numpyro.distributions as dist

    from distsbi.data.prior import Prior

    parts = prior.parts.values() if isinstance(prior, Prior) else [prior]
    sample = functools.partial(_sample_block, prior)
    return jax.jit(sample) if all(isinstance(part, dist.Distribution) for part in parts) else sample


def _sample_block(prior: Any, key: Any) -> Any:
    return prior.sample(key, (BLOCK,))


def _is_plain(value: Any) -> bool:
    """Whether its repr says all of it, in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | bytes | np.generic)


def arranged(function: Simulate) -> tuple[Callable[[Any, Any], Any], str | None]:
    """(the function as one of (theta, random), which random argument it takes).

    Raises ValueError for arguments that are none of those above.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of C, which tells nothing
        return lambda theta, _: function(theta), None
    named = [p for p in parameters if p.name in (RNG, KEY)]
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    theta = next((p for p in placed if p not in named), None)
    needed = [p for p in parameters if p not in named and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p for p in needed if p.default is p.empty and p is not theta]
    if len(named) > 1 or theta is None or needed:
        raise ValueError(
            f"a simulator takes (theta), (theta, rng) or (key, theta); {name_of(function)} takes "
            f"({', '.join(p.name for p in parameters)}). Wrap it in a function that does."
        )
    if not named:
        return lambda theta, _: function(theta), None
    random = named[0].name
    if placed[0].name == random:
        return lambda theta, value: function(value, theta), random
    if placed[1:2] == named:
        return function, random
    return lambda theta, value: function(theta, **{random: value}), random


def _not_like(value: np.ndarray, wanted: Any) -> str:
    if value.dtype.kind not in "fiub":
        return f"x is no array of real numbers but {value.dtype} of shape {list(value.shape)}"
    return f"x has shape {list(value.shape)}, not {list(wanted)}".replace("'", "")


def _padded(rows: np.ndarray) -> np.ndarray:
    """More rows behind, up to a power of two: few shapes to compile."""
    return np.resize(rows, 1 << math.ceil(math.log2(max(1, len(rows)))))


def _cpu() -> Any:
    """jax's CPU; the default device where it has none."""
    import jax

    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
