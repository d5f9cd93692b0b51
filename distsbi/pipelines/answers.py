"""What a trained pipeline is asked, handed on to its posterior: draws, densities and the likeliest theta.

`use_ema=False` asks the weights as they were last, not their average.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from distsbi.sampling import Dataset, Posterior


class Answers(ABC):
    """Every way to sample; a subclass says by which posterior, and keeps it as `_asked`."""

    _asked: Posterior | None = None

    @abstractmethod
    def _chosen(self, use_ema: bool) -> Posterior:
        """The posterior of the averaged weights, or of the last ones. Raises ValueError if there is none."""

    @property
    def last_check(self) -> dict[str, float] | None:
        """What the last draw with `check=` found, of the weights that were last asked."""
        return None if self._asked is None else self._asked.last_check

    def sample(
        self,
        key: Any = None,
        x_o: Any = None,
        nsamples: int | None = None,
        *,
        rng: Any = None,
        use_ema: bool = True,
        **options: Any,
    ) -> Float[np.ndarray, "nsamples dim_obs ch_obs"]:
        """Draws from p(theta | x_o); `rng=` or `key=`. See `Posterior.sample`."""
        return self._chosen(use_ema).sample(key, x_o, nsamples, rng=rng, **options)

    def get_sampler(self, x_o: Any, *, use_ema: bool = True, **options: Any) -> Callable[..., np.ndarray]:
        """A function `sampler(key, nsamples)` for one observation, compiled once. See `Posterior.get_sampler`."""
        return self._chosen(use_ema).get_sampler(x_o, **options)

    def sample_batched(
        self,
        key: Any = None,
        xs: Any = None,
        nsamples: int | None = None,
        *,
        rng: Any = None,
        use_ema: bool = True,
        **options: Any,
    ) -> Float[np.ndarray, "nsamples batch dim_obs ch_obs"]:
        """Draws for many observations, `xs`, `x_o` or `condition`. See `Posterior.sample_batched`."""
        return self._chosen(use_ema).sample_batched(key, xs, nsamples, rng=rng, **options)

    def sample_dataset(
        self,
        path: str | os.PathLike[str],
        key: Any = None,
        x_o: Any = None,
        nsamples: int | None = None,
        *,
        use_ema: bool = True,
        **options: Any,
    ) -> Dataset:
        """`sample` into a Parquet dataset, a folder of parts. See `Posterior.sample_dataset`."""
        return self._chosen(use_ema).sample_dataset(path, key, x_o, nsamples, **options)

    def log_prob(self, theta: Any, x_o: Any = None, *, use_ema: bool = True, **options: Any) -> Float[np.ndarray, "n"]:
        """log p(theta | x_o). See `Posterior.log_prob`."""
        return self._chosen(use_ema).log_prob(theta, x_o, **options)

    def log_prob_batched(
        self, theta: Any, xs: Any, *, use_ema: bool = True, **options: Any
    ) -> Float[np.ndarray, "n batch"]:
        """log p(theta[:, i] | xs[i]) for many observations. See `Posterior.log_prob_batched`."""
        return self._chosen(use_ema).log_prob_batched(theta, xs, **options)

    def sample_and_log_prob(
        self, key: Any = None, x_o: Any = None, nsamples: int | None = None, *, use_ema: bool = True, **options: Any
    ) -> Any:
        """(draws, their log p(theta | x_o)). See `Posterior.sample_and_log_prob`."""
        return self._chosen(use_ema).sample_and_log_prob(key, x_o, nsamples, **options)

    def map(
        self, x_o: Any = None, *, use_ema: bool = True, **options: Any
    ) -> tuple[Float[np.ndarray, "dim_obs ch_obs"], float]:
        """(theta, log p) at the maximum a posteriori. See `Posterior.map`."""
        return self._chosen(use_ema).map(x_o, **options)
