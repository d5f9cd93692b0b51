"""How a draw is made: a time grid and a step rule, or an adaptive solver."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distsbi.hints import as_count, as_number
from distsbi.methods import Method
from distsbi.solvers.adaptive import SOLVERS, Adaptive
from distsbi.solvers.field import Field
from distsbi.solvers.fixed import AT_END, FixedGrid, shown
from distsbi.solvers.rules import RULES

Solver = FixedGrid | Adaptive

DEFAULT = "midpoint"  # the rule where none is asked for


def make_solver(
    method: Method,
    *,
    solver: str | Solver | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    time_grid: Sequence[float] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    coupled: bool = False,
    solver_options: Mapping[str, float] | None = None,
    default: Solver | None = None,
) -> Solver:
    """The solver that the options describe.

    `time_grid`: times that the steps go through, from 0 (noise) to 1 (data), beside those of the solver that the other options describe.
    Nothing given: `default` (the calibrated grid of a trained run). `step_size=0.01`: 100 equal steps (Euler's unless
    `solver` says otherwise); of 0.3 four of 0.25, the fewest that are no longer. `steps`: that many on the method's graded grid
    (midpoint unless `solver` says otherwise). Times of your own: `solver=FixedGrid("midpoint", times)`. `rtol`, `atol`: adaptive, "tsit5" unless `solver` says
    otherwise; `coupled`: with one error control for all draws of a tile. `solver_options`: numbers of a stochastic solver, such as
    {"churn": 20}.

    Raises ValueError for unknown names and for options that contradict each other.
    """
    if time_grid is not None:
        if np.ndim(time_grid) != 1 or np.asarray(time_grid).dtype.kind not in "fiu":
            raise ValueError(f"time_grid must be a list of times; got {time_grid!r}.")
        _check_ends("time_grid", time_grid)
        plain = make_solver(
            method, solver=solver, steps=steps, step_size=step_size, rtol=rtol, atol=atol, coupled=coupled,
            solver_options=solver_options, default=default,
        )  # fmt: skip
        if not isinstance(plain, FixedGrid):
            raise ValueError(
                f"{plain.name} chooses its own times: for those of a time_grid give steps, step_size or a fixed solver."
            )
        return plain.through(time_grid)
    given = {"steps": steps, "step_size": step_size}
    sizes = [name for name, value in given.items() if value is not None]
    tolerances = [name for name, value in {"rtol": rtol, "atol": atol}.items() if value is not None]
    if isinstance(solver, (FixedGrid, Adaptive)):
        beside = [
            *sizes,
            *tolerances,
            *(["coupled"] if coupled else []),
            *(["solver_options"] if solver_options else []),
        ]
        if beside:
            raise ValueError(f"{', '.join(beside)} given beside a complete solver; leave them out.")
        return check_complete(solver)
    if solver is not None and not isinstance(solver, str):
        raise ValueError(f"solver must be a name, one of {', '.join([*RULES, *SOLVERS])}; got {solver!r}.")
    for name, value in {"step_size": step_size, "rtol": rtol, "atol": atol}.items():
        if value is not None:
            as_number(name, value)
    if len(sizes) > 1:
        raise ValueError("give one of steps and step_size; got both.")
    name = solver.lower() if isinstance(solver, str) else None
    if name is not None and name not in RULES and name not in SOLVERS:
        raise ValueError(
            f"unknown solver {solver!r}; fixed ones are {', '.join(RULES)}, adaptive ones {', '.join(SOLVERS)}."
        )
    if name in SOLVERS or (name is None and tolerances and not sizes):
        if solver_options:
            raise ValueError(f"{name or 'tsit5'} takes no solver_options; got {dict(solver_options)}.")
        if sizes:
            raise ValueError(f"{name} chooses its own steps; leave out {sizes[0]}, or take one of {', '.join(RULES)}.")
        return Adaptive(
            name or "tsit5",
            rtol=1e-5 if rtol is None else rtol,
            atol=1e-5 if atol is None else atol,
            coupled=coupled,
        )
    if coupled:
        raise ValueError(f"coupled=True needs an adaptive solver ({', '.join(SOLVERS)}).")
    if tolerances:
        raise ValueError(f"{tolerances[0]} needs an adaptive solver ({', '.join(SOLVERS)}); got {name or sizes[0]}.")
    options = tuple((solver_options or {}).items())
    if step_size is not None:
        if not 0 < step_size <= 1:
            raise ValueError(f"step_size must be in (0, 1]; got {step_size}. For 100 equal steps pass step_size=0.01.")
        count = max(1, math.ceil(1 / step_size - 1e-6))
        return FixedGrid(name or "euler", tuple(i / count for i in range(count + 1)), options)
    if steps is not None:
        return FixedGrid(name or DEFAULT, method.grid(as_count("steps", steps)), options)
    if name is None:
        if options:
            raise ValueError(f"solver_options {dict(options)} need the name of their solver.")
        return default if default is not None else FixedGrid(DEFAULT, method.grid(RULES[DEFAULT].steps))
    if isinstance(default, FixedGrid) and default.rule == name and not options:
        return default
    return FixedGrid(name, method.grid(RULES[name].steps), options)


def check_complete(solver: Solver) -> Solver:
    """The solver. Raises ValueError for one that stops on the way from noise to data, whose results are no draws."""
    if isinstance(solver, FixedGrid):
        _check_ends("the times of a solver", solver.times)
    return solver


def _check_ends(what: str, times: Sequence[float]) -> None:
    if not (len(times) and times[0] == 0 and abs(times[-1] - 1) < AT_END):
        raise ValueError(f"{what} must run from 0 (noise) to 1 (data); got {shown(times)}.")


def solver_from_dict(fields: dict[str, Any]) -> Solver:
    """The solver that `to_dict` wrote."""
    fields = dict(fields)
    name = fields.pop("solver")
    return (
        Adaptive(name, **fields)
        if name in SOLVERS
        else FixedGrid(name, tuple(fields["times"]), tuple(fields.get("options", {}).items()))
    )


__all__ = [
    "RULES",
    "SOLVERS",
    "Adaptive",
    "Field",
    "FixedGrid",
    "Solver",
    "check_complete",
    "make_solver",
    "solver_from_dict",
]
