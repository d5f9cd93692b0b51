"""A certificate is true: of exact networks the error of every grid is known."""

import jax
import numpy as np
import pytest

from distsbi import keys
from distsbi.data import Standardizer
from distsbi.methods import EDM, FlowMatching, ScoreMatchingVP
from distsbi.sampling import Posterior, calibrate
from tests.sampling.test_density import Exact
from tests.solvers.test_solvers import MEAN, SD

XS = np.zeros((2, 1, 1), np.float32)
DRAWS = 32


@pytest.fixture(params=[FlowMatching(), EDM(), ScoreMatchingVP()], ids=lambda method: type(method).__name__)
def posterior(request):
    return Posterior(Exact(request.param), request.param, Standardizer.identity(3, 1), mesh={"data": 1})  # type: ignore[arg-type]


def known_errors(posterior, rule, steps):
    """Lengths of z' - z for the draws that `calibrate` judges: y - alpha mean is sqrt(alpha^2 sd^2 + sigma^2) times one number along the whole path."""
    method, mean, sd = posterior.method, np.asarray(MEAN), np.asarray(SD)
    (a0, s0), (a1, s1) = ((float(method.alpha(np.float32(t))), float(method.sigma(np.float32(t)))) for t in (0, 1))
    noise = jax.vmap(lambda w: keys.draw_noise(keys.as_key(0), w, np.uint32(0), DRAWS, (3, 1)))
    z = np.asarray(noise(keys.split_id(np.arange(len(XS)))), np.float64)
    y = np.asarray(posterior.draw(0, XS, DRAWS, solver=rule, steps=steps), np.float64)
    variance = (a1 * sd) ** 2 + s1**2
    if method.denoises:  # E[x | y], undone
        y = a1 * mean + (y - mean) * variance / (a1 * sd**2)
    along = (y - a1 * mean) / np.sqrt(variance)
    start = (a0 * mean + np.sqrt((a0 * sd) ** 2 + s0**2) * along) / s0
    return np.sqrt(((start - z) ** 2).sum((2, 3)))


def test_errors_are_the_known_ones(posterior, monkeypatch):
    """Within 10 %, where they are above the rounding of float32."""
    monkeypatch.setattr(
        calibrate, "CANDIDATES", (("euler", 24), ("multistep", 10), ("multistep", 16), ("midpoint", 24))
    )
    monkeypatch.setattr(calibrate, "TOLERANCE", 0.0)  # so that all are tried
    _, certificate = calibrate.calibrate(posterior, XS)
    assert len(certificate["candidates"]) == 4
    for row in certificate["candidates"]:
        error = known_errors(posterior, row["solver"], row["steps"])
        assert row["median"] == pytest.approx(np.median(error), rel=0.1, abs=1e-4), row
        assert row["q95"] == pytest.approx(np.quantile(error, 0.95, method="higher"), rel=0.1, abs=1e-4), row
    assert certificate["reference"]["q95"] < 0.1 * certificate["chosen"]["q95"]


def test_a_reference_that_is_too_coarse_certifies_nothing(posterior, monkeypatch):
    """It says by how much it is wrong, and the chosen grid, which is its own, is measured by a finer one."""
    monkeypatch.setattr(calibrate, "CANDIDATES", (("rk4", 3),))
    monkeypatch.setattr(calibrate, "REFERENCE_STEPS", 3)
    with pytest.warns(UserWarning, match="no sampling grid is under tolerance"):
        certificate = posterior.calibrate(XS)
    assert not certificate["met"]
    assert certificate["reference"]["q95"] > calibrate.TOLERANCE_Q95
    assert certificate["chosen"]["q95"] > calibrate.TOLERANCE_Q95
    assert posterior.facts["certificate"] is certificate
