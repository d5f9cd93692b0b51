"""From tiles to arrays: what a posterior makes of many observations, dispatch by dispatch (stream.py), put where the caller wants it.

Work is in order, observation by observation and draw by draw, so what is wanted of a dispatch is one range of the flat arrays.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from distsbi.sampling import tiles
from distsbi.sampling.checks import SolveError, unsolved
from distsbi.sampling.flow import EXACT, Divergence, make_schedule
from distsbi.sampling.stream import stream
from distsbi.sampling.tiles import Tile
from distsbi.solvers import Solver

if TYPE_CHECKING:
    from distsbi.sampling.density import Densities


def fill(
    posterior: "Densities",
    out: tuple[np.ndarray, ...],
    make: str,
    key: Array,
    xs: np.ndarray,
    ids: np.ndarray,
    solver: Solver,
    tile: Tile,
    show_progress: bool | None,
    divergence: Divergence = EXACT,
    theta: np.ndarray | None = None,
    at: tuple[int, ...] | None = None,
) -> None:
    """Streams tiles into arrays [batch, nsamples, ...] as np.empty makes them; `theta` [batch, nsamples, ...] is what a density is asked of;
    `at`: numbers of the solver's times that a trajectory is wanted at.

    Raises SolveError if some are not finite, when all others are there.
    """
    nsamples = out[0].shape[1]
    tile = tile.for_draws(nsamples, posterior.most_slots)

    def payload(observation: np.ndarray, start: np.ndarray) -> np.ndarray:
        assert theta is not None
        rows = np.minimum(start[:, None] + np.arange(tile.draws), nsamples - 1)
        return theta[observation[:, None], rows]

    unit = "points" if make == tiles.DENSITY else "draws"
    failed: dict[int, int] = {}
    asked = payload if theta is not None else None
    flat, first = [array.reshape(-1, *array.shape[2:]) for array in out], 0
    with _progress(len(xs) * nsamples, unit, show_progress) as bar:
        for _, start, made in dispatches(
            posterior, make, key, xs, ids, nsamples, solver, tile, divergence, asked, at=at
        ):
            parts = [part.reshape(-1, *part.shape[2:]) for part in made]
            wanted = (start[:, None] + np.arange(tile.draws) < nsamples).ravel()
            if not wanted.all():
                parts = [part[wanted] for part in parts]
            stop = first + len(parts[0])
            for array, part in zip(flat, parts, strict=True):
                array[first:stop] = part
            rows, counts = np.unique((first + np.flatnonzero(unsolved(parts, make))) // nsamples, return_counts=True)
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                failed[row] = failed.get(row, 0) + count
            bar.update(stop - first)
            first = stop
    if failed:
        raise SolveError(failed, ids, unit, out[0])


def dispatches(
    posterior: "Densities",
    make: str,
    key: Array,
    xs: np.ndarray,
    ids: np.ndarray,
    nsamples: int,
    solver: Solver,
    tile: Tile,
    divergence: Divergence = EXACT,
    payload: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    first_draw: int = 0,
    at: tuple[int, ...] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]]:
    """Yields (observation [slots], number of its first draw [slots], what was made [slots, draws, ...]), in order; `first_draw`: the first that
    is wanted. See `stream`, also for what comes after the last."""
    sizes = (posterior.dim_theta, posterior.ch_theta)
    for observation, start, made in stream(
        tiles.encode_program(posterior.graphdef, posterior.mesh),
        tiles.join_program(posterior.mesh),
        tiles.tile_program(
            posterior.graphdef, posterior.method, solver, tile, sizes, posterior.mesh, make, divergence, at
        ),
        posterior.weights,
        make_schedule(
            solver,
            posterior.method,
            reverse=make == tiles.DENSITY,
            density=make in (tiles.DENSITY, tiles.DRAWS_AND_DENSITY),
        ),
        key,
        xs,
        ids,
        nsamples,
        tile,
        posterior.mesh,
        payload,
        first_draw,
    ):
        yield observation, start, made if isinstance(made, tuple) else (made,)


def _progress(total: int, unit: str, show: bool | None) -> tqdm:
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        disable=None if show is None else not show,
        delay=3 if show is None else 0,
    )
