"""Calibration against the exact posterior of a linear Gaussian: it passes, and each way of being wrong is found where it shows."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from distsbi import get_task, keys
from distsbi.cli import cli
from distsbi.data import Standardizer, write_pairs
from distsbi.diagnostics import check_calibration
from distsbi.diagnostics.calibration import ALL, LEVELS, Calibration, _rank
from distsbi.sampling import Tile
from tests.gaussian import gaussian_posterior, random_mlp_posterior

PAIRS, DRAWS = 400, 100


@pytest.fixture(scope="module")
def posterior():
    return gaussian_posterior(mesh={"data": 1}, tile=Tile(8, 128))


def pairs(posterior, narrow=1.0, shift=0.0, apart=False):
    """theta | x of the posterior's own kind, but `narrow` times as wide and shifted by so many sds, or with the parameters drawn apart."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(PAIRS, 2, 1)).astype("f4")
    cov = posterior.network.covariance()
    root = np.diag(np.sqrt(np.diag(cov))) if apart else np.linalg.cholesky(cov)
    theta = np.stack([posterior.network.mean(row) for row in x]) + narrow * rng.normal(size=(PAIRS, 3)) @ root.T
    return (theta + shift * np.sqrt(np.diag(cov)))[..., None].astype("f4"), x


def found(posterior, **wrong) -> Calibration:
    return check_calibration(posterior, *pairs(posterior, **wrong), nsamples=DRAWS, steps=12, solver="midpoint")


def test_an_exact_posterior_is_calibrated(posterior):
    """A calibrated one fails here in less than one of a hundred choices of the seeds, which are fixed; coverage within four standard errors."""
    calm = found(posterior)
    assert calm.suspect == ()
    assert set(calm.p_values) == {*posterior.parameter_names, ALL}
    for shares in calm.coverage().values():
        for share, level in zip(shares, LEVELS, strict=True):
            assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / PAIRS)
    assert max(map(abs, calm.bias.values())) < 4
    theta, _ = pairs(posterior)
    left = np.diag(posterior.network.covariance()) / theta[..., 0].var(0)  # within 5 standard errors: 40,000 draws
    np.testing.assert_allclose(
        [1 - value for value in calm.contraction.values()], left, rtol=5 * np.sqrt(2 / PAIRS / DRAWS)
    )
    assert repr(calm) == f"<Calibration of {PAIRS} pairs, {DRAWS} draws of each: nothing suspect>"
    assert calm.ranks.shape == (PAIRS, 3)
    assert (calm.ranks >= 0).all() and (calm.ranks <= DRAWS).all()


def test_too_narrow_and_too_wide(posterior):
    """Truths 1.5 times as wide, and 1.5 times as narrow, as the posterior: coverage says which."""
    names = set(posterior.parameter_names)
    narrow, wide = found(posterior, narrow=1.5), found(posterior, narrow=1 / 1.5)
    assert repr(narrow).count("too narrow") == len(names)
    assert names <= set(narrow.suspect) and names <= set(wide.suspect)
    assert all(shares[2] < 0.8 for shares in narrow.coverage().values())
    assert all(shares[2] > 0.95 for shares in wide.coverage().values())


def test_a_fifth_too_narrow_and_too_wide(posterior):
    """Which the ranks alone hardly tell: truths six standard errors of `spread`, 1 / sqrt(800), further off, or nearer."""
    for narrow, says in ((1.2, "too narrow"), (1 / 1.25, "too wide")):
        wrong = found(posterior, narrow=narrow)
        for name in posterior.parameter_names:
            assert abs(wrong.spread[name] / narrow - 1) < 4 / np.sqrt(2 * PAIRS)
            assert wrong.wrong[name] == says
    calm = found(posterior)
    assert all(abs(value - 1) < 4 / np.sqrt(2 * PAIRS) for value in calm.spread.values())
    assert calm.wrong == {}


def test_few_calibrated_posteriors_are_called_wrong():
    """Of 600 with three rows six or fewer; 5 standard errors."""
    rng, called = np.random.default_rng(0), 0
    for seed in range(600):
        ranks, nearer = rng.integers(0, 101, (60, 2)), rng.integers(0, 101, 60) / 100
        called += bool(Calibration(("a", "b"), 100, ranks, nearer, {}, seed).suspect)
    assert called <= 6 + 5 * np.sqrt(6)


def test_a_shift_has_a_sign(posterior):
    low = found(posterior, shift=0.5)
    assert set(posterior.parameter_names) <= set(low.suspect)
    assert min(low.bias[name] for name in posterior.parameter_names) > 5  # the draws are too low
    assert all("too low" in low.wrong[name] for name in posterior.parameter_names)


def test_contraction_of_a_prior_is_none():
    """Draws that are as wide as the prior, few of them: 0 within 5 standard errors, whose variances come from 20 draws for each of 4,000 pairs."""

    class Wide:
        is_unconditional, dim_theta, ch_theta, parameter_names, facts = False, 2, 1, ("a", "b"), {}
        scales = Standardizer.identity(2, 1)

        def check_xs(self, xs):
            return xs

        def draw(self, key, xs, nsamples, **_):
            return np.random.default_rng(0).normal(size=(len(xs), nsamples, 2, 1))

    theta = np.random.default_rng(1).normal(size=(4_000, 2))
    theta[:, 1] = 3.0
    found = check_calibration(Wide(), theta, np.zeros((4_000, 1, 1)), nsamples=20)
    assert abs(found.contraction["a"]) < 5 * np.sqrt(2 / 4_000 + 2 / 80_000)
    assert np.isnan(found.contraction["b"]) and found.to_dict()["contraction"]["b"] is None


def test_what_only_shows_in_all_parameters_together(posterior):
    """Right marginals, and none of their correlation: ranks are uniform, TARP's are not."""
    assert found(posterior, apart=True).suspect == (ALL,)


def test_the_prior_is_no_posterior(posterior):
    """Draws that do not know x have uniform ranks among them; TARP's points do know it."""
    theta, x = pairs(posterior)
    apart = np.random.default_rng(2).permutation(x)

    class Blind:
        """Answers for another x than it is asked of."""

        def __getattr__(self, name):
            return getattr(posterior, name)

        def draw(self, key, xs, nsamples, **options):
            start = int(options["observation_ids"][0])
            return posterior.draw(key, apart[start : start + len(xs)], nsamples, **options)

    blind = check_calibration(Blind(), theta, x, nsamples=DRAWS, steps=12, solver="midpoint")
    assert blind.p_values[ALL] < 1e-6


def test_draws_do_not_depend_on_how_many_are_at_hand(posterior, monkeypatch):
    whole = found(posterior)
    monkeypatch.setattr("distsbi.diagnostics.calibration.AT_ONCE", 3 * DRAWS * 90)
    parts = found(posterior)
    np.testing.assert_array_equal(parts.ranks, whole.ranks)
    np.testing.assert_array_equal(parts.nearer, whole.nearer)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"theta": np.zeros((30, 2, 1))}, r"theta must have shape \(30, 3, 1\), a row for each of x; got \(30, 2, 1\)"),
        ({"theta": np.full((30, 3), np.nan)}, "theta holds NaN or inf"),
        ({"theta": np.zeros((5, 3)), "x": np.zeros((5, 2, 1))}, "needs 20 pairs at least"),
        ({"x": np.full((30, 2, 1), np.nan)}, "NaN"),
        ({"nsamples": 3}, "nsamples must be 20 or more"),
        ({"theta": np.full((30, 3), np.inf)}, "theta holds NaN or inf"),
    ],
)
def test_what_cannot_be_checked(posterior, change, says):
    with pytest.raises(ValueError, match=says):
        check_calibration(posterior, **{"theta": np.zeros((30, 3)), "x": np.zeros((30, 2, 1)), **change})


def test_pairs_of_another_prior():
    posterior = random_mlp_posterior(mesh={"data": 1})
    theta = np.zeros((30, 2))
    theta[7, 1] = 1.5
    with pytest.raises(
        ValueError, match=r"theta of 1 pairs lies outside .* first in row 7: theta_1 = 1.5, prior \[-1, 1\]"
    ):
        check_calibration(posterior, theta, np.zeros((30, 3, 1)))


def test_equal_draws_are_on_both_sides():
    """All draws on the truth: ranks are uniform over 0 to 10; four standard errors of 3,000."""
    found = _rank(np.zeros((3_000, 10)), np.zeros((3_000, 1)), np.random.default_rng(0))
    assert np.abs(np.bincount(found, minlength=11) / 3_000 - 1 / 11).max() < 4 * np.sqrt(1 / 11 / 3_000)


def test_new_pairs_of_a_task_are_not_those_of_a_training():
    task, key = get_task("two_moons"), keys.as_key(0)
    trained, checked = (task.pairs(make(key), 50)[0] for make in (keys.pairs_key, keys.checked_key))
    assert not np.isin(np.asarray(checked), np.asarray(trained)).any()


def test_a_density_is_not_checked():
    density = random_mlp_posterior(dim_x=1, unconditional=True)
    with pytest.raises(ValueError, match="a density without conditions"):
        check_calibration(density, np.zeros((30, 2)), np.zeros((30, 1, 1)))


def test_the_command(tmp_path):
    """A network of another problem is found out; the plot and the JSON are of the same."""
    random_mlp_posterior(mesh={"data": 1}, dim_x=2, tile=Tile(8, 64), names=("a", "b")).save(tmp_path / "run")
    rng = np.random.default_rng(0)
    theta = rng.uniform(0.5, 1, (60, 2))  # which it does not know
    write_pairs(tmp_path / "pairs", theta, 3 * theta, names=["a", "b"], rows_per_file=25)
    write_pairs(tmp_path / "other", theta, theta, names=["b", "a"])

    def run(*words):
        return CliRunner().invoke(cli, ["check", str(tmp_path / "run"), *map(str, words), "--mesh", "data=1"])

    words = ("--data", tmp_path / "pairs", "-n", 40, "--nsamples", 64, "--steps", 2)
    told = run(*words, "--plot", tmp_path / "pp.png")
    assert told.exit_code == 0, told.output
    assert (
        "parameter" in told.output
        and "contraction" in told.output
        and "spread" in told.output
        and "train longer or on more simulations" in told.output
        and "not calibrated: " in told.output
        and "40 pairs of 64 draws" in told.output
    )
    assert (tmp_path / "pp.png").stat().st_size > 1_000
    spec = json.loads((tmp_path / "run" / "spec.json").read_text())
    spec["facts"]["training"] = {"best_val_loss": 0.8, "last_val_loss": 0.9}
    (tmp_path / "run" / "spec.json").write_text(json.dumps(spec))
    assert "its validation loss rose after its best: more simulations help" in run(*words).output
    found = json.loads(run(*words, "--json").output)
    assert (
        found["pairs"] == 40
        and set(found["p_values"]) == {"a", "b", ALL}
        and set(found["contraction"]) == {"a", "b"}
        and found["suspect"]
    )
    of_task = run("--task", "two_moons", "-n", 20, "--nsamples", 20, "--steps", 1)
    assert "the task two_moons is of theta_0, theta_1" not in of_task.output  # it has no names
    assert of_task.exit_code == 0 and "20 pairs of 20 draws" in of_task.output
    assert "the task slcp is of" in str(run("--task", "slcp").exception)
    assert "give either --data" in run().output
    assert "are of b, a, and this run is of a, b" in str(run("--data", tmp_path / "other").exception)
