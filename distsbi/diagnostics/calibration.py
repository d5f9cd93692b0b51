"""Whether posteriors are calibrated, on pairs (theta, x) that they were not trained on.

If theta was drawn from the prior and x simulated from it, theta is one more draw of p(theta | x). So, over many pairs,

    SBC       the rank of each theta_i among draws is uniform (Talts et al. 1804.06788); the normal scores of ranks have a sum of squares that is
              chi-squared, which tells too narrow and too wide where ranks themselves hardly do (Cook et al. 2006)
    coverage  so a central interval of probability q holds theta_i in a share q of the pairs (Cook et al. 2006)
    TARP      the share of draws nearer to a point than theta is, is uniform, whatever the point (Lemos et al. 2302.03026)

The first two look at one parameter at a time, and the prior itself passes them. The last looks at all parameters together; its points are what a ridge
regression says of theta given x, for only points that depend on x tell a posterior from the prior (ibid., sec. 3.3). Each half of the pairs has points that
were fitted to the other, given which its shares are independent and uniform; those of both halves are so but for what the two fits have in common.

None of them says whether a posterior could be narrower: `contraction` says how much it learns from x (Schad, Betancourt and Vasishth 1904.12765), to
compare runs by.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from distsbi.data.prior import outside
from distsbi.sampling.checks import warn_far

LEVELS = (0.5, 0.68, 0.9, 0.95)
ALL = "all (TARP)"  # the row of what all parameters have in common
AT_ONCE = 2**22  # numbers of draws in memory
SIGNIFICANT = 0.01
JITTER = 0.3  # of the points, in sds of what the regression leaves
RIDGE = 0.3
MOST_DATA = 4_096  # of x that the points are made of


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `check_calibration` found of `len(ranks)` pairs.

    Args:
        names: of the parameters; with channels `name[channel]`.
        nsamples: draws for each pair.
        ranks: of each parameter among its draws, 0 to nsamples, among equal ones at random.
        nearer: share of the draws that are nearer to the pair's random point than theta is.
        contraction: of each parameter 1 less the mean variance of the draws of a pair, over the variance of theta: near 1 where x says all, 0 where the
            draws are as wide as the prior, NaN where theta is constant. Of two calibrated runs the one with more of it is the better.
        seed: of the draws, points and ties.
    """

    names: tuple[str, ...]
    nsamples: int
    ranks: Int[np.ndarray, "n parameters"]
    nearer: Float[np.ndarray, "n"]
    contraction: dict[str, float]
    seed: int

    def __repr__(self) -> str:
        wrong = ", ".join(f"{name} {words}".rstrip() for name, words in self.wrong.items())
        found = f"suspect: {wrong}" if wrong else "nothing suspect"
        return f"<Calibration of {len(self.ranks)} pairs, {self.nsamples} draws of each: {found}>"

    @functools.cached_property
    def uniform(self) -> dict[str, Float[np.ndarray, "n"]]:
        """For each parameter, and `ALL`, numbers in (0, 1) that are uniform where the posterior is calibrated: at random within a rank."""
        rng = np.random.default_rng(self.seed)
        counts = np.concatenate([self.ranks, np.rint(self.nearer * self.nsamples)[:, None]], axis=1)
        shares = (counts + rng.uniform(size=counts.shape)) / (self.nsamples + 1)
        return dict(zip((*self.names, ALL), shares.T, strict=True))

    @functools.cached_property
    def p_values(self) -> dict[str, float]:
        """Of each row of `uniform`, from Kolmogorov and Smirnov's test and from that of `spread`: twice the smaller, and 1 at most (Bonferroni), so that
        1.0 is common."""
        from scipy.stats import chi2, kstest

        found, n = {}, len(self.ranks)
        for name, shares in self.uniform.items():
            squares = n * self.spread[name] ** 2
            of_spread = 2 * min(chi2.cdf(squares, n), chi2.sf(squares, n))
            found[name] = min(1.0, 2 * float(min(kstest(shares, "uniform").pvalue, of_spread)))
        return found

    @functools.cached_property
    def spread(self) -> dict[str, float]:
        """Root mean square of the normal scores of each row of `uniform`: of a parameter how many times as far the truths lie as the draws say. Above 1
        the draws are too narrow, below 1 too wide; its standard error is 1 / sqrt(2 n)."""
        from scipy.special import ndtri

        return {name: float(np.sqrt(np.mean(ndtri(shares) ** 2))) for name, shares in self.uniform.items()}

    @property
    def bias(self) -> dict[str, float]:
        """Of each parameter the mean of `uniform` less a half, in its standard errors: positive where draws are too low, negative where they are too
        high."""
        error = np.sqrt(1 / 12 / len(self.ranks))
        return {name: float((shares.mean() - 0.5) / error) for name, shares in self.uniform.items() if name != ALL}

    def coverage(self, levels: Sequence[float] = LEVELS) -> dict[str, tuple[float, ...]]:
        """Share of the pairs whose theta lies in the central interval of each probability; below it: too narrow."""
        return {
            name: tuple(float((np.abs(shares - 0.5) <= level / 2).mean()) for level in levels)
            for name, shares in self.uniform.items()
            if name != ALL
        }

    @property
    def suspect(self) -> tuple[str, ...]:
        """Rows that are not uniform: in at most one of a hundred calibrated posteriors any row is called so (Holm's rule)."""
        ordered = sorted(self.p_values.items(), key=lambda item: item[1])
        found = []
        for i, (name, p) in enumerate(ordered):
            if p >= SIGNIFICANT / (len(ordered) - i):
                break
            found.append(name)
        return tuple(found)

    @property
    def wrong(self) -> dict[str, str]:
        """Of each of `suspect` what is wrong with it, in words where its `spread` or `bias` is more than three standard errors off."""
        error, said = 1 / np.sqrt(2 * len(self.ranks)), {}
        for name in self.suspect:
            off, bias = (self.spread[name] - 1) / error, self.bias.get(name, 0.0)
            words = [] if name == ALL or abs(off) < 3 else ["too narrow" if off > 0 else "too wide"]
            said[name] = ", ".join(words + ([] if abs(bias) < 3 else ["too low" if bias > 0 else "too high"]))
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        coverage = {name: dict(zip(map(str, LEVELS), shares, strict=True)) for name, shares in self.coverage().items()}
        return {
            "pairs": len(self.ranks), "nsamples": self.nsamples, "seed": self.seed, "p_values": self.p_values,
            "bias": self.bias, "spread": self.spread, "coverage": coverage, "contraction": {name: None if np.isnan(value) else value for name, value in self.contraction.items()}, "suspect": list(self.suspect),
        }  # fmt: skip

    def plot(self, axes: Any) -> None:
        """Draws the P-P plot of all rows on matplotlib axes: share of the pairs below each level against the level, less the level, in a band
        that holds a calibrated row at 99 % of the levels."""
        n = len(self.ranks)
        levels = np.linspace(0, 1, 201)
        width = 2.576 * np.sqrt(levels * (1 - levels) / n)
        axes.fill_between(levels, -width, width, color="0.9", label="99 %")
        for name, shares in self.uniform.items():
            below = np.searchsorted(np.sort(shares), levels, side="right") / n
            axes.plot(levels, below - levels, label=name, lw=2 if name == ALL else 1)
        axes.set(xlabel="level", ylabel="share of pairs below, less the level", title=f"{n:,} pairs")
        axes.legend(fontsize="small")


def check_calibration(
    posterior: Any,
    theta: Float[np.ndarray, "n dim_theta ch_theta"],
    x: Any,
    *,
    nsamples: int = 500,
    seed: int = 0,
    show_progress: bool | None = None,
    **options: Any,
) -> Calibration:
    """SBC, coverage and TARP of a `Posterior`, or of a trained pipeline, from `nsamples` draws for each of n pairs; a few hundred pairs, simulated
    from the prior and not trained on. `options`: of `Posterior.draw`.

    Warns of x far outside the simulations. Raises ValueError for fewer than 20 pairs, wrong shapes, non-finite values, theta outside the prior that the
    posterior was trained with, and a density without conditions.
    """
    posterior = getattr(posterior, "posterior", posterior)
    if posterior.is_unconditional:
        raise ValueError("this is a density without conditions; calibration is of posteriors given data.")
    xs = warn_far(posterior.check_xs(x), posterior.scales, posterior.facts)
    truth = np.asarray(theta, np.float32)
    truth = truth[..., None] if truth.ndim == 2 and posterior.ch_theta == 1 else truth
    shape = (len(xs), posterior.dim_theta, posterior.ch_theta)
    if truth.shape != shape:
        raise ValueError(f"theta must have shape {shape}, a row for each of x; got {truth.shape}.")
    if not np.isfinite(truth).all():
        raise ValueError("theta holds NaN or inf; leave those pairs out.")
    bounds = posterior.scales.bijection.supports
    beyond = outside(bounds, truth)
    if beyond.any():
        row, column, channel = (int(i) for i in np.argwhere(beyond)[0])
        raise ValueError(
            f"theta of {int(beyond.any((1, 2)).sum())} pairs lies outside the prior that this posterior was trained with, first in row {row}: "
            f"{posterior.parameter_names[column]} = {truth[row, column, channel]:g}, prior [{bounds[column].low:g}, {bounds[column].high:g}]. Simulate the "
            f"pairs from that prior."
        )
    if len(xs) < 20:
        raise ValueError(f"calibration needs 20 pairs at least, and hundreds to say much; got {len(xs)}.")
    if isinstance(nsamples, bool) or not isinstance(nsamples, (int, np.integer)) or nsamples < 20:
        raise ValueError(f"nsamples must be 20 or more draws for each pair; got {nsamples!r}.")
    flat = truth.reshape(len(xs), -1)
    rng = np.random.default_rng(seed)
    points, scales = _points(flat, xs.reshape(len(xs), -1), rng)
    ranks, nearer, variances = np.empty(flat.shape, np.int64), np.empty(len(xs)), np.empty(flat.shape)
    step = max(1, AT_ONCE // (nsamples * flat.shape[1]))
    hidden = None if show_progress is None else not show_progress
    with tqdm(total=len(xs), unit="pair", desc="calibration", disable=hidden, delay=3) as bar:
        for start in range(0, len(xs), step):
            rows = slice(start, min(start + step, len(xs)))
            drawn = posterior.draw(
                seed,
                xs[rows],
                nsamples,
                observation_ids=np.arange(rows.start, rows.stop),
                show_progress=False,
                **options,
            )
            drawn = drawn.reshape(len(drawn), nsamples, -1)
            ranks[rows] = _rank(drawn, flat[rows, None], rng)
            variances[rows] = drawn.var(1, ddof=1, dtype=np.float64)
            point, scale = points[rows, None], scales[rows, None]
            far = np.linalg.norm((flat[rows, None] - point) / scale, axis=-1)
            nearer[rows] = _rank(np.linalg.norm((drawn - point) / scale, axis=-1), far, rng) / nsamples
            bar.update(rows.stop - rows.start)
    channels = posterior.ch_theta
    names = tuple(
        name if channels == 1 else f"{name}[{channel}]"
        for name in posterior.parameter_names
        for channel in range(channels)
    )
    spread = flat.var(0, ddof=1, dtype=np.float64)
    contraction = 1 - variances.mean(0) / np.where(spread > 0, spread, np.nan)
    return Calibration(
        names, int(nsamples), ranks, nearer, dict(zip(names, contraction.tolist(), strict=True)), int(seed)
    )


def _rank(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many draws, along axis 1, are below the truth; those that equal it are below or above at random."""
    below, equal = (draws < truth).sum(1), (draws == truth).sum(1)
    return below + rng.integers(0, equal + 1)


def _points(
    theta: Float[np.ndarray, "n parameters"], x: Float[np.ndarray, "n data"], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "n parameters"], Float[np.ndarray, "n parameters"]]:
    """(points near theta, scales of what lies between). Those of each half of the pairs come of the other half, so that given x they say nothing of the
    pair's own theta."""
    if x.shape[1] > MOST_DATA:
        x = x[:, np.linspace(0, x.shape[1] - 1, MOST_DATA).round().astype(int)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an entry that is missing in all pairs
        data = np.nan_to_num((x - np.nanmean(x, 0)) / np.maximum(np.nanstd(x, 0), 1e-12)) / np.sqrt(x.shape[1])
    points, scales = np.empty(theta.shape), np.empty(theta.shape)
    halves = slice(0, None, 2), slice(1, None, 2)
    for here, there in (halves, halves[::-1]):
        known, mean = data[there], theta[there].mean(0)
        kernel = known @ known.T
        weights = np.linalg.solve(kernel + RIDGE * np.eye(len(kernel)), theta[there] - mean)
        spread = (theta[there] - mean - kernel @ weights).std(0)
        whole = theta[there].std(0)
        scales[here] = np.where(spread > 1e-3 * whole, spread, np.where(whole > 0, whole, 1.0))
        points[here] = (
            mean + data[here] @ (known.T @ weights) + JITTER * scales[here] * rng.normal(size=theta[here].shape)
        )
    return points, scales
