"""C2ST against accuracies known in closed form and a score computed by sbibm's own function."""

import sys

import numpy as np
import pytest
from scipy import stats

from distsbi.diagnostics import c2st

N = 1_000
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, N, 2))
SHIFTED = A + np.array([1.0, 0.0])


def test_equal_distributions():
    """Accuracy of a coin over 2,000 rows has sd 0.011; overfitting adds variance. Five sd."""
    assert abs(c2st(A, B) - 0.5) < 5 * 0.5 / np.sqrt(2 * N)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("classifier", ["mlp", "random_forest"])
def test_shifted_normals(shift, classifier):
    """The best classifier of N(0, I) from N(shift e_0, I) has accuracy Phi(shift / 2); a forest overfits some of it
    away."""
    score = c2st(A + np.array([shift, 0.0]), B, classifier=classifier)
    best = stats.norm.cdf(shift / 2)
    assert best - 0.07 < score < best + 0.03


def test_score_of_sbibm():
    """0.6815: the code of sbibm's c2st with numpy for torch, X=B and Y=A shifted, scikit-learn 1.9."""
    assert c2st(SHIFTED, B) == pytest.approx(0.6815, abs=0.01)


def test_z_scores_with_the_reference():
    """A column in other units changes nothing, up to float32."""
    scale = np.array([1.0, 1e4])
    assert c2st(SHIFTED * scale, B * scale) == pytest.approx(c2st(SHIFTED, B), abs=0.01)


def test_channel_axis_folds_and_jobs_do_not_change_the_score():
    score = c2st(A[:200], B[:200])
    assert c2st(A[:200, :, None], B[:200, :, None], n_jobs=2) == score


@pytest.mark.parametrize(
    ("samples", "reference", "options", "message"),
    [
        (A[:, :1], B, {}, "samples have 1 columns and reference has 2"),
        (A[:, 0], B, {}, r"samples must have shape \[n, dim\]; got \[1000\]"),
        (np.where(np.arange(N)[:, None] < 3, np.nan, A), B, {}, "samples must be finite; 3 of 1000 rows"),
        (A[:3], B, {}, "got 3 samples, 1000 references"),
        (A, B * [1, 0], {}, r"columns \[1\] of the reference are constant"),
        (A, B, {"classifier": "svm"}, "no classifier 'svm'; the known ones are mlp, random_forest"),
    ],
)
def test_errors(samples, reference, options, message):
    with pytest.raises(ValueError, match=message):
        c2st(samples, reference, **options)


def test_without_scikit_learn(monkeypatch):
    from distsbi.diagnostics.c2st import _sklearn

    _sklearn.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(ImportError, match=r"pip install 'distsbi\[report\]'"):
        c2st(A, B)
    _sklearn.cache_clear()
