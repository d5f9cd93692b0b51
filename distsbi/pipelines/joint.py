"""Pipelines of other densities than p(theta | x): all conditionals of (theta, x), and theta alone.

A joint model learns them by random masks of what is given. A density without conditions is one whose x is always 0.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from distsbi.data.bijection import Support
from distsbi.data.pairs import read_pairs
from distsbi.data.prior import parse_prior
from distsbi.data.source import Pairs
from distsbi.data.standardise import Standardizer
from distsbi.networks import MLP, JointNetwork, MLPParams, Unconditional
from distsbi.networks.flux1_joint import check_channels
from distsbi.pipelines.base import ConditionalPipeline
from distsbi.pipelines.given import brought_by, check_module, check_output
from distsbi.sampling import Dataset, Posterior
from distsbi.sampling.checks import extent
from distsbi.sampling.joint import JointPosterior, X, check_names
from distsbi.solvers import Solver
from distsbi.training import ConditionMasks, TrainingConfig
from distsbi.training.update import MASK_SHARES

NOTHING: Any = np.zeros((1, 1, 1), np.float32)  # the x of a density without conditions


class JointPipeline(ConditionalPipeline):
    """Trains `model` to all conditionals of (theta, x), by random masks of what is given, and samples any of them.

    Args:
        model: a joint network over dim_obs + dim_cond tokens (`Flux1Joint`, `Simformer`), or an `nnx.Module` with
            `encode(values, mask)` and `__call__(t, v_t, context)` over all tokens: `values` [batch, tokens, channels], standardised, are 0 where the
            mask [batch, tokens] says that a token is not given; `v_t` [batch, draws, tokens, channels] are the values of tokens that are given, and noisy
            ones elsewhere, where its prediction is asked for.
        condition_mask: how masks are drawn, "structured" (the default), "bernoulli" or "posterior"; see `ConditionMasks`. `condition_mask_kind`, GenSBI's
            word, means the same.
        other arguments: as for `ConditionalPipeline`; parameters and data need the same channels.
    """

    makes = JointPosterior

    def __init__(
        self, *args: Any, condition_mask: str | None = None, condition_mask_kind: str | None = None, **options: Any
    ):
        if condition_mask is not None and condition_mask_kind is not None:
            raise ValueError("condition_mask and condition_mask_kind mean the same; give one of them.")
        named = [mask for mask in (condition_mask, condition_mask_kind) if mask is not None]
        condition_mask = named[0] if named else "structured"
        if not isinstance(condition_mask, str) or condition_mask not in MASK_SHARES:
            raise ValueError(
                f"condition_mask must be one of {', '.join(MASK_SHARES)}, how masks are drawn in training; got {condition_mask!r}. What is known is given "
                f"where draws are made: sample(given=...)."
            )
        self.condition_mask, self.pose = condition_mask, ConditionMasks(condition_mask)
        super().__init__(*args, **options)
        check_names(self.parameter_names, self.dim_cond)  # its errors come here, not after training

    def _adopted(self, model: Any, dim_obs: int, ch_obs: int, nets: dict[str, Any] | None) -> Any:
        if nets is not None or not self.layout.is_plain:
            raise ValueError(
                "a joint model draws data too, so it takes them as they are, (n, dim, channels): images, instruments and embedding nets go with "
                "conditional networks, such as Flux1FlowPipeline."
            )
        dim_cond, ch_cond = self.layout.packed
        check_channels(ch_obs, ch_cond)
        total = dim_obs + dim_cond
        if not isinstance(model, JointNetwork):
            check_module(model)
            for name, value in {"num_tokens": total, "ch_theta": ch_obs}.items():
                setattr(model, name, value)
            blank = jnp.zeros((2, total, ch_obs)), jnp.zeros((2, total), bool)
            check_output(model, lambda network: network.encode(*blank), total, ch_obs)
        elif (model.num_tokens, model.ch_theta) != (total, ch_obs):
            raise ValueError(
                f"the model has {model.num_tokens} tokens of {model.ch_theta} channels; dim_obs + dim_cond is {total}, ch_obs {ch_obs}."
            )
        return model

    def _fit(self, theta: np.ndarray, x: np.ndarray) -> Standardizer:
        tokens = np.concatenate([theta, x], 1)
        nothing = np.zeros((len(tokens), 0, tokens.shape[2]), np.float32)
        return Standardizer.fit(tokens, nothing, [*self._supports, *[Support()] * self.dim_cond], linear=False)

    def _make_posterior(
        self, params: Any, standardizer: Standardizer, solver: Solver | None, facts: dict[str, Any]
    ) -> Posterior:
        network = nnx.merge(nnx.graphdef(self.model), params)
        return JointPosterior(
            network, self.method, standardizer, self.dim_obs,
            names=self.parameter_names, solver=solver, mesh=self.mesh, facts={**facts, "condition_mask": self.condition_mask},
        )  # fmt: skip

    def _extents(self, pairs: Pairs, posterior: Posterior) -> dict[str, Any]:
        assert isinstance(posterior, JointPosterior)
        scales = jax.tree.map(np.asarray, posterior.joint_standardizer)
        every = range(self.dim_obs + self.dim_cond)
        tokens = extent(np.concatenate(pairs, 1), scales.restrict([], every))
        return {**super()._extents(pairs, posterior), "token_extent": tokens}

    def calibrate(self, given: Sequence[str] = (X,)) -> dict[str, Any]:
        """Chooses and certifies the sampling grid of the pattern where the tokens named are given, on validation pairs; it is used from
        then on, and saved with the run. Returns the certificate. Raises ValueError before training, and without a training set."""
        posterior = self.posterior
        assert isinstance(posterior, JointPosterior)
        tokens = np.concatenate(self._held_out(), 1)
        return self._calibrate(tokens[:, sorted(posterior.tokens(given))], given=given)


class UnconditionalPipeline(ConditionalPipeline):
    """Trains `model` to the density of theta alone, and samples it.

    Args:
        model: a joint network over dim_obs tokens, or a network made for one datum (which is always 0); None: an `MLP`.
        train_dataset, val_dataset: arrays (n, dim_obs, ch_obs) or (n, dim_obs), or a folder of pairs, of which theta is taken, with its prior and
            names; or None.
        dim_obs, ch_obs: number of parameters, channels of each.
        other arguments: as for `ConditionalPipeline`.
    """

    def __init__(
        self, model: Any, train_dataset: Any, val_dataset: Any, dim_obs: int, ch_obs: int = 1,
        training_config: dict[str, Any] | TrainingConfig | None = None, *, prior: Any = None, **options: Any,
    ):  # fmt: skip
        prior = parse_prior(prior) if isinstance(prior, Mapping) else prior
        carried, names = brought_by(train_dataset, prior)
        if model is None:
            model = MLP(MLPParams.default(dim_obs, 1, ch_obs, 1), rngs=nnx.Rngs(0))
        if isinstance(model, JointNetwork):
            model = Unconditional(model)
        train_dataset, val_dataset = (None if d is None else _with_nothing(d) for d in (train_dataset, val_dataset))
        super().__init__(
            model, train_dataset, val_dataset, dim_obs, 1, ch_obs, 1, training_config, prior=carried if prior is None else prior, **options
        )  # fmt: skip
        if names and prior is None:
            self.parameter_names = tuple(names)

    def _make_posterior(
        self, params: Any, standardizer: Standardizer, solver: Solver | None, facts: dict[str, Any]
    ) -> Posterior:
        network = nnx.merge(nnx.graphdef(self.model), params)
        return Posterior(
            network, self.method, standardizer, names=self.parameter_names, solver=solver, mesh=self.mesh, facts=facts, unconditional=True,
        )  # fmt: skip

    def sample(  # type: ignore[override]
        self, key: Any = None, nsamples: int | None = None, *, rng: Any = None, use_ema: bool = True, **options: Any
    ) -> Float[np.ndarray, "nsamples dim_obs ch_obs"]:
        """Draws; `rng=` or `key=`. See `Posterior.sample`."""
        return self._chosen(use_ema).sample(key, NOTHING, nsamples, rng=rng, **options)

    def get_sampler(self, *, use_ema: bool = True, **options: Any) -> Callable[..., np.ndarray]:  # type: ignore[override]
        """A function `sampler(key, nsamples)`, compiled once. See `Posterior.get_sampler`."""
        return self._chosen(use_ema).get_sampler(NOTHING, **options)

    def sample_dataset(  # type: ignore[override]
        self,
        path: str | os.PathLike[str],
        key: Any = None,
        nsamples: int | None = None,
        *,
        use_ema: bool = True,
        **options: Any,
    ) -> Dataset:
        """`sample` into a Parquet dataset, a folder of parts. See `Posterior.sample_dataset`."""
        return self._chosen(use_ema).sample_dataset(path, key, NOTHING, nsamples, **options)

    def log_prob(self, theta: Any, *, use_ema: bool = True, **options: Any) -> Float[np.ndarray, "n"]:  # type: ignore[override]
        """log p(theta). See `Posterior.log_prob`."""
        return self._chosen(use_ema).log_prob(theta, NOTHING, **options)

    def sample_and_log_prob(  # type: ignore[override]
        self, key: Any = None, nsamples: int | None = None, *, use_ema: bool = True, **options: Any
    ) -> Any:
        """(draws, their log p(theta)). See `Posterior.sample_and_log_prob`."""
        return self._chosen(use_ema).sample_and_log_prob(key, NOTHING, nsamples, **options)

    def map(self, *, use_ema: bool = True, **options: Any) -> tuple[Float[np.ndarray, "dim_obs ch_obs"], float]:  # type: ignore[override]
        """(theta, log p) at the maximum. See `Posterior.map`."""
        return self._chosen(use_ema).map(NOTHING, **options)

    def sample_batched(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError: there are no observations."""
        raise ValueError("a density without conditions has no observations to draw for; use sample(key, nsamples).")

    def log_prob_batched(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError: there are no observations."""
        raise ValueError("a density without conditions has no observations; use log_prob(theta).")


def _with_nothing(theta: Any) -> Any:
    """theta beside as many zeros, as a dataset of pairs."""
    if isinstance(theta, tuple):
        raise ValueError(
            "a density without conditions is of theta alone: give one array, [n, dim] or [n, dim, channels], not pairs."
        )
    if isinstance(theta, (str, os.PathLike)):
        theta = read_pairs(theta).theta
    try:
        array = np.asarray(theta, np.float32)
    except (TypeError, ValueError):
        raise ValueError(
            f"theta must be an array of numbers, [n, dim] or [n, dim, channels], or a folder of pairs; got {type(theta).__name__}."
        ) from None
    if array.ndim not in (2, 3):
        raise ValueError(f"theta must have shape [n, dim] or [n, dim, channels]; got {list(array.shape)}.")
    return array, np.zeros((len(array), 1, 1), np.float32)
