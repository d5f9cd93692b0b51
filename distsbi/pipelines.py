"""The facade that users of GenSBI know: a pipeline holds data, a network and a method, trains, and samples.

A named pipeline is a declaration of its network and method; everything else is `ConditionalPipeline`. In this module alone,
`obs` means parameters theta and `cond` means data x, as GenSBI has it.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distsbi import keys, mesh as meshes
from distsbi.data.pairs import open_pairs
from distsbi.data.prior import parameter_names, supports
from distsbi.data.source import Pairs, Source, make_source
from distsbi.data.standardise import Standardizer
from distsbi.methods import FlowMatching, Method
from distsbi.networks import MLP, Flux1, Flux1Params, MLPParams, Network, network_name
from distsbi.sampling import Posterior
from distsbi.sampling.calibrate import calibrate
from distsbi.sampling.posterior import one_of
from distsbi.sampling.run import versions
from distsbi.solvers import Solver
from distsbi.training import Trained, TrainingConfig, train


class ConditionalPipeline:
    """Trains `model` to p(theta | x) and samples from it.

    Args:
        model: an `nnx.Module` with `encode(x)` and `__call__(t, theta_t, context)`; see `distsbi.networks.Network`.
        train_dataset: arrays `(theta, x)` of shapes (n, dim_obs, ch_obs) and (n, dim_cond, ch_cond), an iterable of such
            batches, a Parquet folder, a `Task`, or None for inference only.
        val_dataset: the same, or None: a part of the training set is held out.
        dim_obs, dim_cond: number of parameters and of data.
        ch_obs, ch_cond: channels of each.
        training_config: a dict or `TrainingConfig`; see there.
        mesh: None (all local devices), "auto", a dict of axis sizes, or a `jax.sharding.Mesh`.
        prior: gives parameter names and the support that no draw leaves: a numpyro distribution, `distsbi.Prior`, or any
            object with `sample(key, shape)`, `log_prob` and `support`. A Task brings its own.
        method: what is learned; default flow matching.
        augment: `augment(key, theta, x) -> (theta, x)`, traceable: noise or nuisances added afresh to every training batch.

    Raises ValueError for datasets of wrong shape or length, non-finite rows and theta outside the prior.
    """

    def __init__(
        self,
        model: Any,
        train_dataset: Any,
        val_dataset: Any,
        dim_obs: int,
        dim_cond: int,
        ch_obs: int = 1,
        ch_cond: int = 1,
        training_config: dict[str, Any] | TrainingConfig | None = None,
        *,
        mesh: meshes.MeshLike = None,
        prior: Any = None,
        method: Method | None = None,
        augment: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None,
    ):
        if not isinstance(model, Network):
            _adopt(model, dim_obs, dim_cond, ch_obs, ch_cond)
        self.model = model
        self.dim_obs, self.dim_cond, self.ch_obs, self.ch_cond = dim_obs, dim_cond, ch_obs, ch_cond
        self.method = method or FlowMatching()
        self.mesh = meshes.make_mesh(mesh)
        self.prior = prior if prior is not None else getattr(train_dataset, "prior", None)
        self.augment = augment
        self.training_config = (
            training_config
            if isinstance(training_config, TrainingConfig)
            else TrainingConfig.from_dict(training_config or {})
        )
        self._shapes = (dim_obs, ch_obs), (dim_cond, ch_cond)
        self._supports = supports(self.prior, dim_obs)
        names = getattr(train_dataset, "parameter_names", None)
        if isinstance(train_dataset, (str, os.PathLike)):
            names = open_pairs(train_dataset).names
        self.parameter_names = tuple(names) if names and prior is None else parameter_names(self.prior, dim_obs)
        self._source, self._validation = self._datasets(train_dataset, val_dataset)
        self._posterior: Posterior | None = None
        self._last: Posterior | None = None

    def _datasets(self, train_dataset: Any, val_dataset: Any) -> tuple[Source | None, Pairs | None]:
        if train_dataset is None:
            return None, None
        source = make_source(train_dataset, self._shapes, self.prior)
        if val_dataset is not None:
            return source, make_source(val_dataset, self._shapes, self.prior).fit()
        assert source.hold_out is not None
        return source.hold_out(self.training_config.val_fraction)

    def train(
        self, rngs: nnx.Rngs | Any, nsteps: int | None = None, **overrides: Any
    ) -> tuple[list[float], list[float]]:
        """Trains, or goes on training from the present weights; returns (training losses, validation losses), one per validation.

        With `checkpoint_dir` in the training configuration the run directory is written while training; a killed run started
        again resumes from its last checkpoint and ends with the same bits. `overrides`: training options for this call.

        Raises ValueError without a training set, or where `checkpoint_dir` holds another training.
        """
        if self._source is None or self._validation is None:
            raise ValueError(
                "this pipeline was made for inference (train_dataset=None); make one with a training set to train."
            )
        key = keys.as_key(rngs() if isinstance(rngs, nnx.Rngs) else rngs)
        base = dataclasses.replace(
            TrainingConfig.from_dict({**self.training_config.to_dict(), **overrides}),
            **({} if nsteps is None else {"nsteps": nsteps}),
        )
        config = base.resolve(self._source.size)
        validation = self._augmented(self._validation, 1)
        standardizer = (
            self._posterior.weights.standardizer
            if self._posterior
            else Standardizer.fit(*self._augmented(self._source.fit(), 0), self._supports)
        )
        standardizer = jax.tree.map(np.asarray, standardizer)
        name = network_name(self.model)
        identity = {
            "network": [name, self.model.params.to_dict() if name else type(self.model).__name__],
            "method": [type(self.method).__name__, self.method.to_dict()],
            "config": {
                k: v for k, v in config.to_dict().items() if k not in ("show_progress", "checkpoint_dir", "calibrate")
            },
            "data": self._source.fingerprint,
            "validation": _digest(validation),
            "standardizer": _digest((standardizer.kinds, *jax.tree.leaves(standardizer))),
        }
        trained = train(
            self.model, self.method, standardizer, self._source, validation, key, config,
            mesh=self.mesh, augment=self.augment, identity=identity,
        )  # fmt: skip
        self._finish(trained, standardizer, validation[1], config)
        return trained.losses, trained.val_losses

    def _augmented(self, pairs: Pairs, seed: int) -> Pairs:
        """Pairs as training sees them, under fixed random numbers: what scales are fitted on, and validation is made of."""
        if self.augment is None:
            return pairs
        return jax.device_get(jax.jit(self.augment)(jax.random.key(seed), *pairs))

    def _finish(self, trained: Trained, standardizer: Standardizer, xs: np.ndarray, config: TrainingConfig) -> None:
        assert self._source is not None
        facts = {"training": trained.facts, "data": self._source.fingerprint, "versions": versions()}
        self._last = self._make_posterior(trained.last, standardizer, None, facts)
        solver = None
        if config.calibrate:
            raw = self._make_posterior(trained.params, standardizer, None, facts)
            solver, facts["certificate"] = calibrate(raw, xs)
        self._posterior = self._make_posterior(trained.params, standardizer, solver, facts)
        nnx.update(self.model, trained.params)
        if config.checkpoint_dir is not None:
            from distsbi.training.loop import run_root

            self._posterior.save(run_root(config) or config.checkpoint_dir)

    def _make_posterior(
        self, params: Any, standardizer: Standardizer, solver: Solver | None, facts: dict[str, Any]
    ) -> Posterior:
        network = nnx.merge(nnx.graphdef(self.model), params)
        return Posterior(
            network, self.method, standardizer, names=self.parameter_names, solver=solver, mesh=self.mesh, facts=facts
        )

    @property
    def posterior(self) -> Posterior:
        """The trained posterior. Raises ValueError before training."""
        if self._posterior is None:
            raise ValueError(
                "this pipeline is not trained yet: call pipeline.train(nnx.Rngs(0)), or distsbi.load a saved run."
            )
        return self._posterior

    def _chosen(self, use_ema: bool) -> Posterior:
        posterior = self.posterior
        if use_ema:
            return posterior
        if self._last is None:
            raise ValueError(
                "the weights before averaging are not kept in a saved run; use_ema=False works after train() only."
            )
        return self._last

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

    def get_sampler(
        self, x_o: Any = None, *args: Any, use_ema: bool = True, **options: Any
    ) -> Callable[..., np.ndarray]:
        """A function `sampler(key, nsamples)` for one observation, compiled once. See `Posterior.get_sampler`."""
        return self._chosen(use_ema).get_sampler(x_o, *args, **options)

    def sample_batched(
        self,
        key: Any = None,
        xs: Any = None,
        nsamples: int = 10_000,
        *,
        rng: Any = None,
        use_ema: bool = True,
        **options: Any,
    ) -> Float[np.ndarray, "nsamples batch dim_obs ch_obs"]:
        """Draws for many observations. See `Posterior.sample_batched`."""
        return self._chosen(use_ema).sample_batched(one_of("rng", rng, "key", key), xs, nsamples, **options)

    def log_prob(self, theta: Any, x_o: Any, **options: Any) -> Float[np.ndarray, "n"]:
        """log p(theta | x_o). See `Posterior.log_prob`."""
        return self.posterior.log_prob(theta, x_o, **options)

    def save(self, path: str) -> None:
        """Writes the run directory, for `distsbi.load`."""
        self.posterior.save(path)


class NamedPipeline(ConditionalPipeline):
    """A pipeline that makes its own network. `params`: its size; default: `make_params.default(...)`."""

    make_params: ClassVar[Any]
    make_model: ClassVar[Any]
    make_method: ClassVar[type[Method]]

    def __init__(
        self,
        train_dataset: Any,
        val_dataset: Any,
        dim_obs: int,
        dim_cond: int,
        ch_obs: int = 1,
        ch_cond: int = 1,
        params: Any = None,
        training_config: dict[str, Any] | TrainingConfig | None = None,
        mesh: meshes.MeshLike = None,
        prior: Any = None,
        **options: Any,
    ):
        params = self.make_params.default(dim_obs, dim_cond, ch_obs, ch_cond) if params is None else params
        if not isinstance(params, self.make_params):
            raise ValueError(f"params must be {self.make_params.__name__}; got {type(params).__name__}.")
        rngs = getattr(params, "rngs", None)
        super().__init__(
            self.make_model(params, rngs=rngs if rngs is not None else nnx.Rngs(0)),
            train_dataset, val_dataset, dim_obs, dim_cond, ch_obs, ch_cond, training_config,
            mesh=mesh, prior=prior, **{"method": self.make_method(), **options},
        )  # fmt: skip


class Flux1FlowPipeline(NamedPipeline):
    """Flow matching with `Flux1`. `params`: `Flux1Params`."""

    make_params, make_model, make_method = Flux1Params, Flux1, FlowMatching


class MLPFlowPipeline(NamedPipeline):
    """Flow matching with the residual `MLP`. `params`: `MLPParams`."""

    make_params, make_model, make_method = MLPParams, MLP, FlowMatching


PIPELINES: dict[str, type[NamedPipeline]] = {"Flux1Flow": Flux1FlowPipeline, "MLPFlow": MLPFlowPipeline}


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() if isinstance(part, tuple) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _adopt(model: Any, dim_obs: int, dim_cond: int, ch_obs: int, ch_cond: int) -> None:
    """Checks a user's own module and gives it the sizes that the contract asks for."""
    if not isinstance(model, nnx.Module) or not callable(getattr(model, "encode", None)) or not callable(model):
        raise ValueError(
            f"model must be a flax.nnx.Module with encode(x) and __call__(t, theta_t, context); got {type(model).__name__}. "
            f"See distsbi.networks.Network."
        )
    other = {type(leaf).__name__ for _, leaf in nnx.to_flat_state(nnx.state(model)) if not isinstance(leaf, nnx.Param)}
    if other:
        raise ValueError(
            f"{type(model).__name__} keeps state beside its weights ({', '.join(sorted(other))}), which sampling could not carry: "
            f"leave out dropout and batch norm (layer norm does)."
        )
    for name, value in (("dim_theta", dim_obs), ("ch_theta", ch_obs), ("dim_x", dim_cond), ("ch_x", ch_cond)):
        setattr(model, name, value)
