"""How far two posteriors' draws are from each other, where the answer is known."""

import numpy as np
import pytest

from distsbi.diagnostics.distance import C2ST_DIMENSIONS, distance, sliced_wasserstein


class Normal:
    """Draws of N(shift, 1) in `dim` dimensions, whatever x is."""

    def __init__(self, dim, shift=0.0):
        self.dim, self.shift = dim, shift

    def draw(self, key, xs, nsamples, **_):
        rng = np.random.default_rng(key)
        return self.shift + rng.normal(size=(len(xs), nsamples, self.dim, 1))


def test_a_shift_in_one_dimension():
    """The Wasserstein-1 distance of two normals that differ by a shift is the shift: mean of 2,000 draws, within 5 standard errors."""
    a, b = (np.random.default_rng(seed).normal(size=(2_000, 1)) for seed in (0, 1))
    assert sliced_wasserstein(a + 0.7, b) == pytest.approx(0.7, abs=5 * np.sqrt(2 / 2_000))
    with pytest.raises(ValueError, match="must have the same shape"):
        sliced_wasserstein(a, b[:5])


def test_no_classifier_for_many_dimensions(monkeypatch):
    monkeypatch.setitem(distance.__globals__, "c2st", lambda a, b: 0.75)
    few, many = (
        distance(Normal(dim), Normal(dim, 0.5), np.zeros((9, 1, 1)), nsamples=200)
        for dim in (C2ST_DIMENSIONS, C2ST_DIMENSIONS + 1)
    )
    assert (few["c2st"], many["c2st"]) == (0.75, None)
    assert few["observations"] == 4 and many["sliced"] > 2 * many["sliced_floor"]
