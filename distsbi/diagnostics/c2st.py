"""Classifier two-sample test (Lopez-Paz & Oquab 1610.06545), with the settings of sbibm (Lueckmann et al. 2101.04653).

The score is the cross-validated accuracy of a classifier that is to tell samples from reference: 0.5 means that it
cannot, 1 that it always can. Both sets are z-scored with the reference's mean and standard deviation; the classifier
has two hidden layers of 10 dim units.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Classifier = Literal["mlp", "random_forest"]


def c2st(
    samples: Float[np.ndarray, "n dim"],
    reference: Float[np.ndarray, "m dim"],
    *,
    seed: int = 1,
    z_score: bool = True,
    n_folds: int = 5,
    classifier: Classifier = "mlp",
    n_jobs: int | None = None,
) -> float:
    """Accuracy in [0, 1], averaged over the folds. A channel axis of size one, `[n, dim, 1]`, is dropped.

    `n_jobs` folds run at once; the score does not depend on it. Use as many samples as references: with unequal sets
    guessing the larger already scores above 0.5.

    Raises ValueError for shapes that do not match, non-finite entries, fewer rows than folds, a constant column of the
    reference (with z_score) or an unknown classifier; ImportError without scikit-learn.
    """
    x, y = _rows("reference", reference), _rows("samples", samples)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"samples have {y.shape[1]} columns and reference has {x.shape[1]}; both must have one per parameter."
        )
    if n_folds < 2 or min(len(x), len(y)) < n_folds:
        raise ValueError(
            f"n_folds={n_folds} needs n_folds >= 2 and at least as many rows; got {len(y)} samples, {len(x)} "
            f"references."
        )
    dim = x.shape[1]
    model = _model(classifier, dim, seed)
    if z_score:
        mean, std = x.mean(axis=0), x.std(axis=0, ddof=1)
        if (std == 0).any():
            raise ValueError(
                f"columns {np.flatnonzero(std == 0).tolist()} of the reference are constant; drop them or pass "
                f"z_score=False."
            )
        x, y = (x - mean) / std, (y - mean) / std
    selection = _sklearn("model_selection")
    folds = selection.KFold(n_splits=n_folds, shuffle=True, random_state=seed)
    label = np.concatenate([np.zeros(len(x)), np.ones(len(y))])
    scores = selection.cross_val_score(
        model, np.concatenate([x, y]), label, cv=folds, scoring="accuracy", n_jobs=n_jobs
    )
    return float(np.mean(scores))


def _model(classifier: str, dim: int, seed: int) -> Any:
    models = {
        "mlp": lambda: _sklearn("neural_network").MLPClassifier(
            activation="relu",
            hidden_layer_sizes=(10 * dim, 10 * dim),
            max_iter=10_000,
            solver="adam",
            random_state=seed,
        ),
        "random_forest": lambda: _sklearn("ensemble").RandomForestClassifier(random_state=seed),
    }
    if classifier not in models:
        raise ValueError(f"there is no classifier {classifier!r}; the known ones are {', '.join(models)}.")
    return models[classifier]()


@functools.cache
def _sklearn(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError("c2st needs scikit-learn; install it with `pip install 'distsbi[report]'`.") from error


def _rows(name: str, array: Any) -> Float[np.ndarray, "n dim"]:
    rows = np.asarray(array, np.float32)  # float32 as in sbibm
    if rows.ndim == 3 and rows.shape[2] == 1:
        rows = rows[..., 0]
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape [n, dim]; got {list(rows.shape)}.")
    if not np.isfinite(rows).all():
        raise ValueError(
            f"{name} must be finite; {int((~np.isfinite(rows)).any(axis=1).sum())} of {len(rows)} rows hold NaN or inf."
        )
    return rows
