"""Simulators for tests. What they do at a row is chosen by its theta: `marks` are (theta, what)."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

PRIOR = {"mass": "Uniform(0, 1)", "spin": "Normal(0, 2)"}


def plain(theta, rng):
    return np.array([theta[0] + rng.normal(), theta[1] * rng.uniform(), rng.integers(100)])


def other(theta, rng):
    return plain(theta, rng) + 1


def silent(theta):
    return theta * 2


def batched(theta, rng):
    return theta + rng.normal(size=theta.shape)


def keyed(key, theta):
    return theta[..., 0] + jax.random.normal(key, theta[..., 0].shape)


def two_things(theta, phi):
    return theta + phi


def picky(theta, rng):
    if theta[0] > 0.5:
        raise ValueError("too heavy")
    return plain(theta, rng)


def slow(theta, rng):
    time.sleep(0.02)
    return plain(theta, rng)


def hangs(theta):
    Path(os.environ["AT_WORK"]).touch()
    time.sleep(600)


def broken(theta):
    raise ZeroDivisionError("no such universe")


def faulty(theta, rng, *, marks=(), folder=""):
    """`plain`, but for the rows that are marked. Of a batch the first row that is marked counts."""
    rows = np.atleast_2d(theta)
    for value, what in marks:
        if (rows[:, 0] == value).any():
            _do(what, folder)
            if what in ("nan", "inf"):
                return (
                    np.where(rows[:, :1] == value, float(what), np.ones_like(rows))
                    if theta.ndim == 2
                    else np.full(3, float(what))
                )
            if what == "shape":
                return np.ones(2)
            if what == "words":
                return np.array(["a", "b", "c"])
    return plain(theta, rng) if theta.ndim == 1 else batched(theta, rng)


def _do(what: str, folder: str) -> None:
    if what == "raise":
        raise ValueError("it did not converge")
    if what == "exit":
        raise SystemExit(3)
    if what == "abort":
        os.abort()
    if what == "hang":
        time.sleep(600)
    if what == "once":
        try:
            (Path(folder) / "killed").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def marked(theta, what: dict[int, str], folder="") -> partial:
    """`faulty` at these rows of theta [rows, 2]."""
    return partial(faulty, marks=tuple((float(theta[row, 0]), word) for row, word in what.items()), folder=str(folder))
