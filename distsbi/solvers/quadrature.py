"""Integrals of what is known at the times of a grid alone.

Between two neighbouring times an integrand is taken to be the cubic through the four nearest times: in the number of the time where the grid is smooth in it, as
equal steps and a method's own graded grids are (there it is also smoother than in the time itself, for a graded grid is fine where much happens); in the time itself
where step lengths jump. Of order four either way; of lower degree on fewer times.
"""

import functools

import numpy as np

THROUGH = 4  # times that a polynomial goes through
JUMP = 2.0  # third differences of smooth times, in units of the shortest of three steps, are less
LEAST = 1e-3  # of the longest of three steps the shortest must be more for polynomials in the time itself, whose slopes rounding would spoil


def weights(times: np.ndarray) -> np.ndarray:
    """w of every time such that sum(w g) is the integral of g from the first to the last of them, which may rise or fall. Constants and g = t are integrated exactly
    however the times lie, cubics too on equal ones."""
    n = len(times)
    through, found = min(THROUGH, n), np.zeros(n)
    for i in range(n - 1):
        first = min(max(i - (through // 2 - 1), 0), n - through)
        near = slice(first, first + through)
        found[near] += (
            _jumping(times[near], i - first) if _jumps(times[near]) else times[near] @ _form(through, i - first)
        )
    return found


def _jumps(times: np.ndarray) -> bool:
    lengths = np.abs(np.diff(times))
    least = lengths.min()
    return len(times) == THROUGH and abs(np.diff(times, 3)[0]) > JUMP * least > JUMP * LEAST * lengths.max()


@functools.lru_cache
def _form(through: int, step: int) -> np.ndarray:
    """The integrals of L_j' L_k from `step` to step + 1, of the Lagrange polynomials of 0, 1, ... `through` - 1: both g and the time are such polynomials."""
    u, share = np.polynomial.legendre.leggauss(through)
    powers = np.vander(step + (u + 1) / 2, through, increasing=True)
    coefficients = np.linalg.inv(np.vander(np.arange(through, dtype=np.float64), through, increasing=True))
    slopes = powers[:, :-1] * np.arange(1, through) @ coefficients[1:]
    return slopes.T @ (share[:, None] / 2 * (powers @ coefficients))


def _jumping(times: np.ndarray, step: int) -> np.ndarray:
    """The integrals of the Lagrange polynomials of the times from one of them to the next."""
    length = times[step + 1] - times[step]
    powers = np.vander((times - times[step]) / length, increasing=True)
    return length * np.linalg.solve(powers.T, 1 / np.arange(1, len(times) + 1))
