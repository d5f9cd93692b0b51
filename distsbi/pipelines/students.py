"""Few-step students of a trained posterior, and how far they are from it."""

from typing import Any

import numpy as np

from distsbi.diagnostics.distance import distance
from distsbi.hints import warn
from distsbi.sampling import DistillConfig, Posterior, train_student

HELD_OUT = 0.1  # of the observations, where none are held out by the caller


def distill(
    teacher: Posterior, xs: Any, segments: int = 2, *, held_out: Any = None, measure: bool = True, **options: Any
) -> Posterior:
    """A student that draws in `segments` evaluations what its teacher draws in many: a `Posterior` like any other, bound to its own steps, to be saved as
    a run of its own. No simulation is needed.

    Args:
        teacher: a trained posterior, no student.
        xs: observations to learn on, as for `sample_batched`: those that the teacher was trained on, say.
        segments: evaluations per draw, 1 to 8.
        held_out: observations on which the student's distance from its teacher (C2ST, sliced Wasserstein) is measured, for
            `student.facts["distance"]`; None: the last tenth of `xs`, which then are not learned on.
        measure: False: it is not measured.
        options: see `DistillConfig`.

    Raises ValueError for observations of a wrong shape, a teacher that is a student itself and an unknown option; RuntimeError if the loss becomes NaN.

    Example:
        `distsbi.distill(distsbi.load("runs/first"), xs).save("runs/first-student")`
    """
    config = DistillConfig.from_dict({"segments": segments, **options})
    xs = teacher.check_xs(xs)
    if held_out is None:
        count = min(max(1, round(HELD_OUT * len(xs))), len(xs) - 1)
        xs, held_out = (xs[:-count], xs[-count:]) if count else (xs, xs)
    held_out = np.asarray(teacher.check_xs(held_out))
    student, _ = train_student(teacher, xs, config)
    if measure:
        try:
            student.facts["distance"] = distance(teacher, student, held_out)
        except Exception as error:  # the student is there, and stays
            student.facts["distance"] = {"error": f"{type(error).__name__}: {error}"[:300]}
            warn(
                f"the student's distance from its teacher could not be measured ({error}); compare their draws yourself."
            )
    return student
