"""A student draws in its own few steps what its teacher draws in many."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import distsbi
from distsbi import MLPFlowPipeline, MLPParams, get_task, load
from distsbi.diagnostics import sliced_wasserstein
from distsbi.diagnostics.distance import distance
from distsbi.methods import METHODS, FlowMatching
from distsbi.networks import MLP
from distsbi.sampling import DistillConfig, train_student
from distsbi.sampling.distill import _Segment
from distsbi.solvers import FixedGrid
from tests.gaussian import random_mlp_posterior
from tests.solvers.test_solvers import MEAN, SD, gaussian_field

pytestmark = pytest.mark.optimised


@pytest.fixture(scope="module")
def pipeline():
    task = get_task("two_moons")
    pairs = tuple(np.asarray(a) for a in task.pairs(jax.random.key(0), 4_000))
    made = MLPFlowPipeline(
        pairs, None, 2, 2, params=MLPParams(2, 2, width=48, depth=2), prior=task.prior, mesh={"data": 1},
        training_config={"nsteps": 300, "batch_size": 128, "calibrate": False, "show_progress": False},
    )  # fmt: skip
    made.train(nnx.Rngs(0))
    return made


@pytest.fixture(scope="module")
def student(pipeline):
    """Told apart from its teacher on two observations, for a C2ST costs ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distsbi.pipelines.students.distance", partial(distance, observations=2, nsamples=500))
        return pipeline.distill(2, nsteps=400, batch_size=256, show_progress=False)


@pytest.mark.long
def test_two_steps_come_near_many(pipeline, student):
    """Against the teacher's own two Euler steps, the student's distance from the teacher is less than a third."""
    x = np.zeros((1, 2, 1), np.float32)
    many = pipeline.sample(rng=0, x_o=x, nsamples=4_000)[..., 0]
    few = pipeline.sample(rng=1, x_o=x, nsamples=4_000, solver=FixedGrid("euler", student.default_solver.times))[..., 0]
    drawn = student.sample(1, x, 4_000)[..., 0]
    assert sliced_wasserstein(drawn, many) < sliced_wasserstein(few, many) / 3
    assert student.default_solver.evaluations == 2
    assert np.abs(drawn).max() <= 1
    told = student.facts["distance"]
    assert (told["observations"], told["nsamples"]) == (2, 500)
    assert 0 < told["sliced_floor"] < 0.1
    assert 0 < told["sliced"] < 0.2
    assert 0.4 < told["c2st"] < 0.7


@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda m: type(m).__name__)
def test_the_path_of_every_method_is_its_flow(method):
    """Through both segments, against the known end: within 3 % of the sd for half of the draws, 8 % for 95 % (of eight steps or more in each)."""
    z = jax.random.normal(jax.random.key(0), (500, 1, 3, 1))
    field, Y = gaussian_field(method), z
    for k in range(2):
        segment = _Segment.make(method, DistillConfig(2), k)
        path = segment.path(field, Y, None, whole=True)
        assert len(path) == len(segment.taus) == len(segment.solver.times)
        np.testing.assert_array_equal(path[0], Y)
        (Y,) = segment.path(field, Y, None)
        np.testing.assert_allclose(Y, path[-1], atol=1e-5)
    error = np.abs(Y - (MEAN + SD * z)) / SD
    assert np.median(error) < 0.03
    assert np.quantile(error, 0.95) < 0.08


@pytest.mark.parametrize("scale_input", [True, False])
def test_a_student_starts_as_its_teacher(scale_input):
    """Before it has learned anything it draws what its teacher's own two Euler steps draw."""
    teacher = random_mlp_posterior({"data": 1})
    teacher.method = FlowMatching(scale_input=scale_input)
    x = np.full((1, 3, 1), 0.3, np.float32)
    config = DistillConfig(2, nsteps=1, batch_size=8, teacher_steps=2, max_lr=1e-12, show_progress=False)
    student, _ = train_student(teacher, x, config)
    own = teacher.sample(0, x, 50, solver=FixedGrid("euler", config.grid))
    np.testing.assert_allclose(student.sample(0, x, 50), own, atol=1e-6)


def test_a_posterior_alone_is_distilled(monkeypatch):
    """The last tenth of the observations measures the distance."""
    seen = []
    monkeypatch.setattr(
        "distsbi.pipelines.students.distance", lambda teacher, student, xs: seen.append(xs) or {"c2st": 0.5}
    )
    xs = np.random.default_rng(0).normal(size=(20, 3, 1)).astype("f4")
    options = {"nsteps": 1, "batch_size": 8, "teacher_steps": 2, "show_progress": False}
    student = distsbi.distill(random_mlp_posterior({"data": 1}), xs, 1, **options)
    assert student.facts["distance"] == {"c2st": 0.5}
    np.testing.assert_array_equal(seen[0], xs[-2:])
    with pytest.raises(ValueError, match="a student already"):
        distsbi.distill(student, xs, 1, **options)
    seen.clear()
    alone = distsbi.distill(random_mlp_posterior({"data": 1}), xs, 1, measure=False, held_out=xs[:3], **options)
    assert "distance" not in alone.facts and not seen


def test_a_student_outlives_its_measurement(monkeypatch):
    def fails(*_):
        raise RuntimeError("the classifier gave up")

    monkeypatch.setattr("distsbi.pipelines.students.distance", fails)
    xs = np.random.default_rng(0).normal(size=(20, 3, 1)).astype("f4")
    with pytest.warns(
        UserWarning, match="the student's distance from its teacher could not be measured .the classifier gave up"
    ):
        student = distsbi.distill(
            random_mlp_posterior({"data": 1}), xs, 1, nsteps=1, batch_size=8, teacher_steps=2, show_progress=False
        )
    assert student.is_student and student.facts["distance"] == {"error": "RuntimeError: the classifier gave up"}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["consistency", "mean_flow"])
def test_the_other_objectives_come_near_too(pipeline, objective, monkeypatch):
    """Nearer than half of what the teacher's own two Euler steps leave."""
    monkeypatch.setattr("distsbi.pipelines.students.distance", lambda *a: {})
    made = pipeline.distill(2, nsteps=400, batch_size=256, objective=objective, show_progress=False)
    x = np.zeros((1, 2, 1), np.float32)
    many = pipeline.sample(rng=0, x_o=x, nsamples=4_000)[..., 0]
    few = pipeline.sample(rng=1, x_o=x, nsamples=4_000, solver=FixedGrid("euler", made.default_solver.times))[..., 0]
    assert sliced_wasserstein(made.sample(1, x, 4_000)[..., 0], many) < sliced_wasserstein(few, many) / 2


@pytest.mark.long
def test_a_student_is_a_run_like_any_other(pipeline, student, tmp_path):
    student.save(tmp_path / "student")
    again = load(tmp_path / "student", mesh={"data": 8})
    x = np.zeros((1, 2, 1), np.float32)
    np.testing.assert_array_equal(again.sample(0, x, 300), student.sample(0, x, 300))
    assert again.facts["student"]["teacher"] == pipeline.posterior.fingerprint
    spec = json.loads((tmp_path / "student" / "spec.json").read_text())
    assert spec.pop("kind") == ["student"]
    (tmp_path / "student" / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(
        ValueError, match="was changed since it was saved"
    ):  # else its average velocities would be taken for velocities
        load(tmp_path / "student")
    with pytest.warns(UserWarning, match=r"x\[0\] lies far outside the simulations"):
        again.sample(0, x + 1e4, 5)
    for call, says in (
        (lambda: again.sample(0, x, 5, steps=8), "this run is a student"),
        (lambda: again.log_prob(np.zeros((1, 2, 1)), x), "has no log_prob; use its teacher"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.slow
def test_bfloat16_weights_are_distilled_in_float32():
    """As the same weights kept in float32 are, and rounded once, at the end."""
    config = DistillConfig(1, nsteps=50, batch_size=16, teacher_steps=2, max_lr=1e-2, show_progress=False)
    single = MLP(MLPParams(2, 3, width=8, depth=1), rngs=nnx.Rngs(0))
    single.theta_out[...] = 0.3 * jax.random.normal(jax.random.key(1), single.theta_out.shape)
    half = nnx.clone(single)
    nnx.update(half, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(single)))
    nnx.update(single, jax.tree.map(lambda a: a.astype(jnp.float32), nnx.state(half)))
    teachers = [random_mlp_posterior(network=network) for network in (half, single)]
    students = [train_student(teacher, np.zeros((1, 3, 1)), config)[0].weights.params for teacher in teachers]
    for a, b in zip(*map(jax.tree.leaves, students), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-6)


@pytest.mark.long
def test_the_same_seed_makes_the_same_student(pipeline, monkeypatch):
    monkeypatch.setattr("distsbi.pipelines.students.distance", lambda *a: {})
    options = {"nsteps": 20, "batch_size": 64, "show_progress": False}
    first, second = (pipeline.distill(1, **options) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != pipeline.distill(1, seed=1, **options).fingerprint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"segments": 9}, "1 to 8 segments"), ({"nsteps": 0}, "nsteps must be a positive integer"), ({"segments": 2.5}, "a positive integer; got 2.5"),
        ({"nstep": 3}, "unknown distill option 'nstep'; Did you mean nsteps"),
        ({"segments": 3, "boundaries": (0.5,)}, "need 2 increasing boundaries"),
        ({"boundaries": (1.5,)}, "increasing boundaries"), ({"boundaries": ("a",)}, "boundaries must be numbers"),
        ({"on_policy": "half"}, "on_policy must be a number; got 'half'"), ({"max_lr": 0.0}, "max_lr positive"), ({"on_policy": 2.0}, "fractions"),
        ({"objective": "adversarial"}, "must be one of endpoint, consistency, mean_flow; got 'adversarial'"),
    ],
)  # fmt: skip
def test_errors(options, says):
    with pytest.raises(ValueError, match=says):
        DistillConfig.from_dict(options)


def test_distilling_says_how_far_it_is_where_there_is_no_bar(caplog):
    xs = np.zeros((8, 3, 1), np.float32)
    options = DistillConfig(nsteps=3, batch_size=8, teacher_steps=2, show_progress=False)
    with caplog.at_level("INFO", "distsbi"):
        train_student(random_mlp_posterior({"data": 1}), xs, options)
    assert [record.message.split(":")[0] for record in caplog.records][-1] == "update 3 of 3"


def test_boundaries_beyond_the_path_of_a_method():
    """That of EDM begins with 1/81 of the data."""
    posterior, xs = random_mlp_posterior({"data": 1}, method=METHODS["edm"]()), np.zeros((4, 3, 1), np.float32)
    for boundary in (0.01, 0.9995):
        with pytest.raises(
            ValueError, match=r"EDM, whose path runs from 0.01235 to 0.998: give boundaries well between"
        ):
            train_student(posterior, xs, DistillConfig(boundaries=(boundary,)))
    with pytest.raises(ValueError, match="xs holds no observations to distil on"):
        train_student(posterior, xs[:0])


def test_sliced_wasserstein_of_shifted_sets():
    """A shift by d sd along one of two axes moves a projection by d |cos|, 2 d / pi on average."""
    a = np.random.default_rng(0).normal(size=(5_000, 2))
    moved = sliced_wasserstein(a + np.asarray([0.5, 0.0]) * a.std(0), a, directions=2_000)
    assert moved == pytest.approx(0.5 * 2 / np.pi, rel=0.05)
    with pytest.raises(ValueError, match="same shape"):
        sliced_wasserstein(a, a[:5])
