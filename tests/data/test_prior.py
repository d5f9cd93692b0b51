"""Priors: which supports are understood, which refused and how, named joints, and the check of theta."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from distsbi.data import Support
from distsbi.data.prior import Prior, as_texts, check_theta, parameter_names, parse_prior, supports

KEY = jax.random.key(0)
INF = float("inf")


class Plain:
    """A prior of no library: three methods' worth of duck."""

    support = (np.array([0.0, -1.0]), INF)

    def sample(self, key, shape=()):
        return jax.random.exponential(key, (*shape, 2)) + jnp.array([0.0, -1.0])

    def log_prob(self, theta):
        return -(theta - jnp.array([0.0, -1.0])).sum(-1)


UNDERSTOOD = {
    "uniform": (lambda: dist.Uniform(-jnp.ones(2), 2 * jnp.ones(2)).to_event(1), [(-1, 2), (-1, 2)]),
    "uniform, own bounds": (lambda: dist.Uniform(jnp.array([0.0, -3.0]), 1.0).to_event(1), [(0, 1), (-3, 1)]),
    "scalar, expanded": (lambda: dist.Normal(0.0, 1.0).expand((3,)).to_event(1), [(-INF, INF)] * 3),
    "multivariate normal": (lambda: dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), [(-INF, INF)] * 2),
    "positive": (lambda: dist.LogNormal(jnp.zeros(2), 1.0).to_event(1), [(0, INF)] * 2),
    "half normal": (lambda: dist.HalfNormal(1.0).expand((1,)).to_event(1), [(0, INF)]),
    "beta": (lambda: dist.Beta(2.0, 3.0).expand((1,)).to_event(1), [(0, 1)]),
    "pareto": (lambda: dist.Pareto(1.5, 2.0).expand((1,)).to_event(1), [(1.5, INF)]),
    "truncated above": (lambda: dist.TruncatedNormal(high=0.5).expand((1,)).to_event(1), [(-INF, 0.5)]),
    "truncated": (lambda: dist.TruncatedNormal(low=-1.0, high=0.5).expand((1,)).to_event(1), [(-1, 0.5)]),
    "angle": (lambda: dist.VonMises(0.0, 1.0).expand((1,)).to_event(1), [(-np.pi, np.pi)]),
    "affine of uniform": (
        lambda: dist.TransformedDistribution(
            dist.Uniform(0.0, 1.0).expand((2,)).to_event(1),
            dist.transforms.AffineTransform(1.0, 2.0, domain=dist.constraints.unit_interval),
        ),
        [(1, 3)] * 2,
    ),
    "named": (
        lambda: Prior(
            m=dist.Uniform(0.0, 2.0), v=dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), s=dist.Exponential(2.0)
        ),
        [(0, 2), (-INF, INF), (-INF, INF), (0, INF)],
    ),
    "duck": (Plain, [(0, INF), (-1, INF)]),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_supports(case):
    make, expected = UNDERSTOOD[case]
    prior = make()
    found = supports(prior)
    np.testing.assert_allclose([(s.low, s.high) for s in found], expected, rtol=1e-6)
    draws = np.asarray(prior.sample(KEY, (500,)))
    assert draws.shape == (500, len(expected))
    check_theta(prior, draws[..., None])
    assert supports(prior, len(expected)) == found


REFUSED = {
    "simplex": (lambda: dist.Dirichlet(jnp.ones(3)), "is not elementwise"),
    "ordered": (
        lambda: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0).expand((3,)).to_event(1), dist.transforms.OrderedTransform()
        ),
        "is not elementwise",
    ),
    "sphere": (lambda: dist.ProjectedNormal(jnp.ones(3)), "is not elementwise"),
    "counts": (lambda: dist.Poisson(3.0).expand((2,)).to_event(1), "is discrete"),
    "simplex inside a joint": (lambda: Prior(a=dist.Normal(), p=dist.Dirichlet(jnp.ones(3))), "is not elementwise"),
    "batch of scalars": (lambda: dist.Uniform(-jnp.ones(2), jnp.ones(2)), r"one vector with .to_event\(1\)"),
    "scalar": (lambda: dist.Uniform(0.0, 1.0), r"\.expand\(\[1\]\)\.to_event\(1\)"),
    "matrix": (lambda: dist.Normal(jnp.zeros((2, 2))).to_event(2), "event shape \\(dim_theta,\\)"),
    "no prior at all": (lambda: "uniform", "str has no sample and no log_prob and no support"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        supports(make())


def test_no_prior_is_the_real_line():
    assert supports(None, 2) == [Support(), Support()]
    with pytest.raises(ValueError, match="must be given"):
        supports(None)


def test_wrong_dimension():
    with pytest.raises(ValueError, match="the prior has 2 parameters; 3 were expected"):
        supports(UNDERSTOOD["uniform"][0](), 3)


class TestNamed:
    prior = property(lambda _: UNDERSTOOD["named"][0]())

    def test_names(self):
        assert self.prior.names == ("m", "v[0]", "v[1]", "s") == parameter_names(self.prior, 4)
        assert parameter_names(UNDERSTOOD["uniform"][0](), 2) == ("theta_0", "theta_1")

    def test_density_is_the_sum_of_the_parts(self):
        theta = self.prior.sample(KEY, (7,))
        expected = (
            dist.Uniform(0.0, 2.0).log_prob(theta[:, 0])
            + dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)).log_prob(theta[:, 1:3])
            + dist.Exponential(2.0).log_prob(theta[:, 3])
        )
        np.testing.assert_allclose(self.prior.log_prob(theta), expected, rtol=1e-5)
        assert self.prior.sample(KEY).shape == (4,) == self.prior.event_shape

    def test_support_is_a_constraint(self):
        theta = jnp.array([[1.0, 0, 0, 1], [3.0, 0, 0, 1], [1.0, 0, 0, -1]])
        assert self.prior.support(theta).tolist() == [True, False, False]

    def test_adding_a_part_leaves_the_others_draws_apart(self):
        draws = np.asarray(Prior(a=dist.Normal(), b=dist.Normal()).sample(KEY, (4000,)))
        assert abs(np.corrcoef(draws.T)[0, 1]) < 5 / np.sqrt(4000)

    def test_errors(self):
        with pytest.raises(ValueError, match="needs at least one part"):
            Prior()
        with pytest.raises(ValueError, match=r"part 'a' .* batch shape \(2,\)"):
            Prior(a=dist.Normal(jnp.zeros(2)))
        with pytest.raises(ValueError, match="the part 'a' must have sample"):
            Prior(a=3.0)


class TestCheckTheta:
    prior = property(lambda _: Prior(mass=dist.LogNormal(), spin=dist.Uniform(-1.0, 0.1)))

    def test_names_row_parameter_value_and_bounds(self):
        theta = np.full((5, 2, 1), 0.05, np.float32)
        theta[3, 1], theta[4, 0] = 0.2, -7.0
        message = r"2 of 5 rows .* row 3, parameter 'spin' = 0.2, prior support \[-1, 0.1\]"
        with pytest.raises(ValueError, match=message):
            check_theta(self.prior, theta)

    def test_bounds_belong_to_the_support_in_float32(self):
        check_theta(self.prior, np.array([[0.0, -1.0], [1.0, np.float32(0.1)]])[..., None])

    def test_other_dimension(self):
        with pytest.raises(ValueError, match="2 parameters; 3 were expected"):
            check_theta(self.prior, np.zeros((4, 3, 1)))


@pytest.mark.parametrize("names", [("a",), ("a", "a"), ("a", ""), ("a", 3)])
def test_bad_names(names):
    class Named(Plain):
        pass

    Named.names = names
    with pytest.raises(ValueError, match="parameter names"):
        parameter_names(Named(), 2)


class TestParsed:
    def test_text_is_a_prior(self):
        prior = parse_prior({"mass": "LogNormal(0, 0.5)", "spin": "Uniform(low=-1, high=1.0)"})
        assert prior.names == ("mass", "spin")
        assert supports(prior) == [Support(0.0, np.inf), Support(-1.0, 1.0)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("Uniform(-1, 1", "must read like Uniform"),
            ("__import__('os').system('true')", "must read like Uniform"),
            ("Uniform(open('x'), 1)", "must read like Uniform"),
            ("Unifrom(-1, 1)", r"no distribution 'Unifrom'. Did you mean Uniform\?"),
            ("constraints(1)", "no distribution 'constraints'"),
            ("Uniform(1, -1)", "support needs low < high"),
            ("Normal(0, 1, 2, 3, 4)", "TypeError.* Normal takes loc=0.0, scale=1.0"),
            ("Normal(mean=2, sd=1)", "unexpected keyword argument 'mean'. Normal takes loc=0.0, scale=1.0"),
            ("Uniform(5)", r"needs low < high; got .5.0, 1.0.\. Uniform takes low=0.0, high=1.0"),
            ("Gamma()", "Gamma takes concentration, rate=1.0"),
            ("Poisson(3)", "is discrete"),
            ("", "must read like Uniform"),
        ],
    )
    def test_other_text_is_refused(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_prior({"a": text})


def test_a_prior_takes_seeds_and_counts_and_refuses_bounds_that_are_swapped():
    prior = Prior(mass=dist.LogNormal(0.0, 1.0), spin=dist.Uniform(-1.0, 1.0))
    np.testing.assert_array_equal(prior.sample(0, 5), prior.sample(jax.random.key(0), (5,)))
    with pytest.raises(ValueError, match="the part 'spin' cannot be a prior here: a support needs low < high"):
        Prior(spin=dist.Uniform(1.0, -1.0))


def test_a_wrapped_prior_is_described_alike_in_every_process():
    """numpyro gathers what a distribution holds in a set, whose order differs from process to process."""
    code = (
        "import numpyro.distributions as d; from distsbi.data.prior import describe; "
        "print(describe(d.TruncatedNormal(0.0, 1.0, low=0.5))); print(describe(d.Normal(0, 2).expand((2,)).to_event(1)))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    (one,) = said
    assert one.splitlines() == [
        "LeftTruncatedDistribution(_support=0.5, base_dist=Normal(loc=0, scale=1), low=0.5)",
        "Independent(base_dist=ExpandedDistribution(base_dist=Normal(loc=0, scale=2), shape=2), shape=2)",
    ]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (lambda: dist.Uniform(0.1, 2), "Uniform(low=0.1, high=2.0)"),
        (lambda: dist.LogNormal(jnp.float32(0.1), 0.5), "LogNormal(loc=0.10000000149011612, scale=0.5)"),
        (lambda: dist.TruncatedNormal(0.0, 2.0, low=-1.0), "TruncatedNormal(loc=0.0, scale=2.0, low=-1.0)"),
        (lambda: dist.LogUniform(1e-4, 1e4), "LogUniform(low=0.0001, high=10000.0)"),
        (lambda: dist.Normal(jnp.zeros(2), 1.0).to_event(1), None),
        (lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.ExpTransform()), None),
        (lambda: dist.Normal(0.0, 1.0).expand((1,)).to_event(1), None),
    ],
)
def test_priors_as_texts(part, text):
    """The text of a distribution makes it again, to the last bit; of those that have none it is not guessed."""
    prior = Prior(a=part())
    assert as_texts(prior) == (text and {"a": text})
    if text:
        again = parse_prior({"a": text})
        np.testing.assert_array_equal(again.sample(KEY, (5,)), prior.sample(KEY, (5,)))
    assert as_texts(part()) is None
