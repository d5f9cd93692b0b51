"""The keywords of every way to sample, once: their names, GenSBI's other names for them, and the error for the rest."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Self

from distsbi.hints import as_count, did_you_mean
from distsbi.methods import Method
from distsbi.sampling.tiles import Tile
from distsbi.solvers import Solver, make_solver

ALIASES = {"show_progress_bars": "show_progress", "method": "solver", "return_intermediates": "return_trajectory"}

# What the calls for one observation take themselves.
ONE = ("rng", "key", "x_o", "nsamples", "num_samples", "observation_id")
NO_GIVEN = "given= is for joint networks (Flux1Joint, Simformer); this posterior takes all of x as x_o."


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How to draw.

    Fixed grids, and adaptive solves of flow matching, give the same bits on any number of devices. Adaptive ones of EDM and score matching (VP, VE)
    differ there in the last digits, within their tolerances, and `coupled` ties the draws of a tile together.

    Args:
        solver, steps, step_size, time_grid, rtol, atol, coupled, solver_options: see `distsbi.solvers.make_solver`; all None: the calibrated grid.
        tile: rows worked on at a time, `Tile(slots, draws)`; None: the run's.
        chunk_size: an upper bound on draws in one dispatch of a device, for devices with little memory.
        return_trajectory: theta at every time of the grid, with a leading axis of times; of a `time_grid`, which the steps then go through, at its
            times, whatever this says.
        check: a share of the draws, in (0, 1], that is solved again with every step halved; what that changes is reported in
            `Posterior.last_check`, and warned of where it is large. Of the points of a log_prob too.
        show_progress: a progress bar; None: on a terminal, where the work takes more than a few seconds.
    """

    solver: str | Solver | None = None
    steps: int | None = None
    step_size: float | None = None
    time_grid: Sequence[float] | None = None
    rtol: float | None = None
    atol: float | None = None
    coupled: bool = False
    solver_options: Mapping[str, float] | None = None
    tile: Tile | None = None
    chunk_size: int | None = None
    return_trajectory: bool = False
    check: float = 0.0
    show_progress: bool | None = None

    @classmethod
    def parse(cls, options: dict[str, Any], words: Sequence[str] = (), no_given: str = NO_GIVEN) -> Self:
        """From the keywords of a call. `words`: what that call takes besides; `no_given`: what is said to one that has no given=.

        Raises ValueError naming an unknown keyword and the nearest known.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        renamed: dict[str, Any] = {}
        for name, value in options.items():
            name_here = ALIASES.get(name, name)
            if name == "given":
                raise ValueError(no_given)
            if name_here not in known:
                hint = did_you_mean(name, {*known, *ALIASES, *words}, by_word=words)
                raise ValueError(
                    f"unknown keyword {name!r}.{hint} The keywords are {', '.join([*words, *sorted(known)])}."
                )
            if name_here in renamed:
                raise ValueError(f"{name!r} and {name_here!r} mean the same; give one of them.")
            renamed[name_here] = value
        return cls(**renamed)

    def __post_init__(self) -> None:
        if self.solver_options is not None and not isinstance(self.solver_options, Mapping):
            raise ValueError(
                f'solver_options must be a dict of numbers by name, such as {{"churn": 10}}; got {self.solver_options!r}.'
            )
        if not isinstance(self.check, numbers.Real) or not 0 <= self.check <= 1:
            raise ValueError(f"check is a share of the draws, between 0 and 1; got {self.check!r}.")
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", as_count("chunk_size", self.chunk_size))
        if self.tile is not None and not isinstance(self.tile, Tile):
            raise ValueError(
                f"tile must be a distsbi.sampling.Tile, such as Tile(slots=8, draws=256); got {self.tile!r}."
            )

    @property
    def on_the_way(self) -> bool:
        """Whether theta is wanted at times before the last, too."""
        return self.return_trajectory or self.time_grid is not None

    def make_solver(self, method: Method, default: Solver | None = None) -> Solver:
        """The solver these options describe; `default`: where they describe none."""
        return make_solver(
            method, solver=self.solver, steps=self.steps, step_size=self.step_size, time_grid=self.time_grid,
            rtol=self.rtol, atol=self.atol, coupled=self.coupled, solver_options=self.solver_options, default=default,
        )  # fmt: skip

    def make_tile(self, default: Tile) -> Tile:
        """The tile these options describe."""
        tile = self.tile or default
        if self.chunk_size is None:
            return tile
        if self.chunk_size >= tile.rows:
            return tile
        return Tile(max(1, self.chunk_size // tile.draws), min(tile.draws, self.chunk_size))
