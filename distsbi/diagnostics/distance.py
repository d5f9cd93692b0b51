"""How far one posterior's draws are from another's, on the same observations: a student from its teacher."""

import contextlib
from typing import Any

import numpy as np
from jaxtyping import Float

from distsbi.diagnostics.c2st import c2st

DIRECTIONS = 64
C2ST_DIMENSIONS = 100  # at most


def sliced_wasserstein(
    a: Float[np.ndarray, "n dim"], b: Float[np.ndarray, "n dim"], *, directions: int = DIRECTIONS, seed: int = 0
) -> float:
    """Mean over random directions of the Wasserstein-1 distance of the projections (Rabin et al. 2011; Bonneel et al. 2015), both z-scored
    by `b`: in its standard deviations.

    Raises ValueError for sets of different shapes.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"both sets must have the same shape (n, dim); got {a.shape} and {b.shape}.")
    mean, std = b.mean(0), b.std(0)
    std = np.where(std > 0, std, 1.0)
    axes = np.random.default_rng(seed).normal(size=(a.shape[1], directions))
    axes /= np.linalg.norm(axes, axis=0)
    projected = [np.sort(((part - mean) / std) @ axes, axis=0) for part in (a, b)]
    return float(np.abs(projected[0] - projected[1]).mean())


def distance(
    reference: Any,
    other: Any,
    xs: Float[np.ndarray, "n dim_x ch_x"],
    *,
    observations: int = 4,
    nsamples: int = 2_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Sliced Wasserstein distance and C2ST of two posteriors' draws, means over evenly chosen observations of `xs`.

    `sliced_floor` is what two sets of the reference's own draws give. C2ST is None without scikit-learn, and beyond 100 dimensions, of which so few draws
    tell a classifier little, in hours.
    """
    rows = xs[np.linspace(0, len(xs) - 1, min(observations, len(xs))).round().astype(int)]
    quiet = {"show_progress": False}
    first, again = (reference.draw(seed + i, rows, nsamples, **quiet).reshape(len(rows), nsamples, -1) for i in (0, 1))
    drawn = other.draw(seed + 2, rows, nsamples, **quiet).reshape(len(rows), nsamples, -1)
    scores = None
    if drawn.shape[-1] <= C2ST_DIMENSIONS:
        with contextlib.suppress(ImportError):
            scores = [c2st(d, r) for d, r in zip(drawn, first, strict=True)]
    return {
        "observations": len(rows), "nsamples": nsamples, "seed": seed,
        "sliced": float(np.mean([sliced_wasserstein(d, r) for d, r in zip(drawn, first, strict=True)])),
        "sliced_floor": float(np.mean([sliced_wasserstein(d, r) for d, r in zip(again, first, strict=True)])),
        "c2st": None if scores is None else float(np.mean(scores)),
    }  # fmt: skip
