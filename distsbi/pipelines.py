"""The facade that users of GenSBI know: a pipeline holds data, a network and a method, trains, and samples.

A named pipeline is a declaration of its network and method; everything else is `ConditionalPipeline`. In this module alone,
`obs` means parameters theta and `cond` means data x, as GenSBI has it.
"""

import dataclasses
import difflib
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distsbi import keys, mesh as meshes
from distsbi.data.pairs import open_pairs
from distsbi.data.prior import parameter_names, supports
from distsbi.data.source import Pairs, Shapes, Source, make_source
from distsbi.data.standardise import Standardizer, Support
from distsbi.diagnostics.distance import distance
from distsbi.methods import EDM, FlowMatching, Method, ScoreMatchingVE, ScoreMatchingVP
from distsbi.networks import (
    MLP,
    NETWORKS,
    Embedded,
    JointNetwork,
    Layout,
    Network,
    Unconditional,
    network_name,
    takes_missing,
)
from distsbi.networks.embedding import default_nets, embedded_shape
from distsbi.networks.flux1_joint import check_channels
from distsbi.networks.observation import Dims
from distsbi.sampling import DistillConfig, Posterior, distill
from distsbi.sampling.calibrate import calibrate
from distsbi.sampling.joint import JointPosterior, pattern_key
from distsbi.sampling.posterior import one_of
from distsbi.sampling.run import load, model_spec, versions
from distsbi.solvers import Solver
from distsbi.training import ConditionMasks, Trained, TrainingConfig, train
from distsbi.training.loop import run_root
from distsbi.training.update import MASK_SHARES, Pose, conditional


class ConditionalPipeline:
    """Trains `model` to p(theta | x) and samples from it.

    Args:
        model: an `nnx.Module` with `encode(x)` and `__call__(t, theta_t, context)`; see `distsbi.networks.Network`.
        train_dataset: arrays `(theta, x)` of shapes (n, dim_obs, ch_obs) and (n, dim_cond, ch_cond), an iterable of such
            batches, a Parquet folder, a `Task`, or None for inference only.
        val_dataset: the same, or None: a part of the training set is held out.
        dim_obs, dim_cond: number of parameters and of data. Of images dim_cond is (rows, columns), of several instruments a dict
            such as {"image": (32, 32), "spectrum": 100}; x is then an array (n, 32, 32, ch_cond) or a dict of arrays.
        ch_obs, ch_cond: channels of each; of several instruments a number or a dict.
        training_config: a dict or `TrainingConfig`; see there.
        mesh: None (all local devices), "auto", a dict of axis sizes, or a `jax.sharding.Mesh`.
        prior: gives parameter names and the support that no draw leaves: a numpyro distribution, `distsbi.Prior`, or any
            object with `sample(key, shape)`, `log_prob` and `support`. A Task brings its own.
        method: what is learned; default flow matching.
        augment: `augment(key, theta, x) -> (theta, x)`, traceable: noise or nuisances added afresh to every training batch.
        embedding: an `nnx.Module` that makes tokens (batch, tokens, features) of x (batch, ...), or a dict with one for each instrument.
            It is trained with the rest and runs once per observation. The named pipelines make one for images and instruments: a
            `CNN` before an MLP, a `PatchEmbedding` before Flux1.

    Raises ValueError for datasets of wrong shape or length, non-finite rows and theta outside the prior.
    """

    def __init__(
        self,
        model: Any,
        train_dataset: Any,
        val_dataset: Any,
        dim_obs: int,
        dim_cond: Dims,
        ch_obs: int = 1,
        ch_cond: int | Mapping[str, int] = 1,
        training_config: dict[str, Any] | TrainingConfig | None = None,
        *,
        mesh: meshes.MeshLike = None,
        prior: Any = None,
        method: Method | None = None,
        augment: Callable[[Array, Any, Any], tuple[Array, Any]] | None = None,
        embedding: Any = None,
    ):
        self.layout = Layout.of(dim_cond, ch_cond)
        self.model = self._adopted(model, dim_obs, ch_obs, _nets(self.layout, embedding))
        self.dim_obs, self.ch_obs = dim_obs, ch_obs
        self.dim_cond, self.ch_cond = self.layout.packed
        self.method = method or FlowMatching()
        self.mesh = meshes.make_mesh(mesh)
        self.prior = prior if prior is not None else getattr(train_dataset, "prior", None)
        self.augment = augment if augment is None or self.layout.is_plain else _on_packed(augment, self.layout)
        self.training_config = (
            training_config
            if isinstance(training_config, TrainingConfig)
            else TrainingConfig.from_dict(training_config or {})
        )
        self._shapes = Shapes((dim_obs, ch_obs), self.layout.packed, takes_missing(self.model), self.layout)
        self._supports = supports(self.prior, dim_obs)
        names = getattr(train_dataset, "parameter_names", None)
        if isinstance(train_dataset, (str, os.PathLike)):
            names = _names_of(train_dataset, prior)
        self.parameter_names = tuple(names) if names and prior is None else parameter_names(self.prior, dim_obs)
        self._source, self._validation = self._datasets(train_dataset, val_dataset)
        self._standardizer: Standardizer | None = None
        self._posterior: Posterior | None = None
        self._last: Posterior | None = None

    def __repr__(self) -> str:
        state = "trained" if self._posterior is not None else "not trained"
        return f"<{type(self).__name__} of {', '.join(self.parameter_names)} given {self.layout.describe()}, {state}>"

    # What a kind of pipeline decides for itself

    pose: Pose = staticmethod(conditional)  # type: ignore[assignment]

    def _adopted(self, model: Any, dim_obs: int, ch_obs: int, nets: dict[str, Any] | None) -> Any:
        """The model, checked and behind its embedding nets; a user's own gets the sizes that the contract asks for."""
        own = not isinstance(model, Network)
        if own:
            _check_module(model)
            seen = self.layout.packed if nets is None else embedded_shape(nets, self.layout)
            for name, value in zip(("dim_theta", "ch_theta", "dim_x", "ch_x"), (dim_obs, ch_obs, *seen), strict=True):
                setattr(model, name, value)
        for net in (nets or {}).values():
            _check_state(net)
        if isinstance(model, Embedded) or (nets is None and self.layout.is_plain):
            return model
        if nets is None and not own:
            raise ValueError(
                f"{type(model).__name__} takes data of shape (n, dim, channels), these are {self.layout.describe()}: give embedding=, such as "
                f"distsbi.networks.CNN, or use a named pipeline, which makes one."
            )
        return Embedded(model, nets, self.layout)

    def _fit(self, theta: np.ndarray, x: np.ndarray) -> Standardizer:
        return Standardizer.fit(theta, x, self._supports, pool=self.layout.pooled)

    def _make_posterior(
        self, params: Any, standardizer: Standardizer, solver: Solver | None, facts: dict[str, Any]
    ) -> Posterior:
        network = nnx.merge(nnx.graphdef(self.model), params)
        return Posterior(
            network, self.method, standardizer, names=self.parameter_names, solver=solver, mesh=self.mesh, facts=facts
        )

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
        again resumes from its last checkpoint and ends with the same bits. A directory holds one training: to go on from a finished
        one, also with more simulations, `restore` it and give another `checkpoint_dir`. `overrides`: training options for this call.

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
            self._standardizer if self._standardizer is not None else self._fit(*self._augmented(self._source.fit(), 0))
        )
        standardizer = self._standardizer = jax.tree.map(np.asarray, standardizer)
        identity = {
            "network": _identity(self.model),
            "method": [type(self.method).__name__, self.method.to_dict()],
            "config": {
                k: v for k, v in config.to_dict().items() if k not in ("show_progress", "checkpoint_dir", "calibrate")
            },
            "pose": repr(self.pose) if dataclasses.is_dataclass(self.pose) else "conditional",
            "data": self._source.fingerprint,
            "validation": _digest(validation),
            "standardizer": _digest((standardizer.kinds, *jax.tree.leaves(standardizer))),
        }
        trained = train(
            self.model, self.method, standardizer, self._source, validation, key, config,
            mesh=self.mesh, augment=self.augment, pose=self.pose, identity=identity,
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
        facts: dict[str, Any] = {"training": trained.facts, "data": self._source.fingerprint, "versions": versions()}
        self._last = self._make_posterior(trained.last, standardizer, None, facts)
        facts["x_extent"] = self._extent(self._last.weights.standardizer)
        self._last.facts = facts
        self._posterior = self._make_posterior(trained.params, standardizer, None, facts)
        nnx.update(self.model, trained.params)
        root = run_root(config)
        if config.calibrate:
            if root is not None:  # what was learned is on the disk before anything else can fail
                self._posterior.facts["certificate"] = {"met": None, "says": UNFINISHED}
                self._posterior.save(root)
            solver, certificate = calibrate(self._posterior, xs)
            if not certificate["met"]:
                warnings.warn(
                    f"no sampling grid is under tolerance: 5 % of the draws are off by more than {certificate['chosen']['q95']:.2g} of the "
                    f"posterior's local scale (tolerance {certificate['tolerance']['q95']}); the velocity may be rough, so train longer, or sample with "
                    f'solver="tsit5".',
                    stacklevel=3,
                )
            facts = {**facts, "certificate": certificate}
            self._posterior = self._make_posterior(trained.params, standardizer, solver, facts)
        if root is not None:
            self._posterior.save(root)

    def _extent(self, scales: Any) -> list[float]:
        """The largest absolute standardised value of every entry of x among pairs of the training set; one number for all where they are
        many."""
        assert self._source is not None
        x = self._augmented(self._source.fit(), 0)[1]
        largest = np.zeros(x[0].size)
        for start in range(0, len(x), EXTENT_ROWS):
            z = np.abs(np.asarray(scales.forward_x(x[start : start + EXTENT_ROWS]))).reshape(-1, x[0].size)
            largest = np.fmax(largest, np.fmax.reduce(z, axis=0))
        return [float(f"{v:.4g}") for v in (largest if largest.size <= EXTENT_ENTRIES else [largest.max()])]

    @property
    def example(self) -> Float[np.ndarray, "1 dim_cond ch_cond"]:
        """An observation that was held out of training. Raises ValueError without a training set."""
        if self._validation is None:
            raise ValueError("this pipeline was made for inference (train_dataset=None): it holds no observations.")
        return self._augmented(self._validation, 1)[1][:1]

    def restore(self, path: str | os.PathLike[str]) -> Self:
        """Takes up a saved run of the same network and method: its weights, scales and sampling grid, to sample from or to go on training
        from. Returns the pipeline.

        Raises ValueError for a run of another network or method, and as `distsbi.load` does.
        """
        inner = getattr(self.model, "network", self.model)
        own = self.model if network_name(self.model) is None and network_name(inner) is None else None
        found = load(path, mesh=self.mesh, network=own)
        scales = found.joint_standardizer if isinstance(found, JointPosterior) else found.weights.standardizer
        made = self._make_posterior(nnx.state(self.model, nnx.Param), jax.tree.map(np.asarray, scales), None, {})
        here, there = model_spec(made), model_spec(found)
        differing = [name for name in ("network", "sizes", "method") if here[name] != there[name]]
        if differing:
            raise ValueError(
                f"{path} holds a run of another {' and '.join(differing)} than this pipeline; make the pipeline that it was trained with, or "
                f"distsbi.load it."
            )
        weights = found.joint if isinstance(found, JointPosterior) else found.network
        nnx.update(self.model, nnx.state(weights, nnx.Param))
        self._standardizer, self._posterior, self._last = jax.tree.map(np.asarray, scales), found, None
        self.parameter_names = found.parameter_names
        return self

    @property
    def posterior(self) -> Posterior:
        """The trained posterior. Raises ValueError before training."""
        if self._posterior is None:
            raise ValueError(
                "this pipeline is not trained yet: call pipeline.train(nnx.Rngs(0)), or pipeline.restore(run) a saved one."
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

    def get_sampler(self, x_o: Any, *, use_ema: bool = True, **options: Any) -> Callable[..., np.ndarray]:
        """A function `sampler(key, nsamples)` for one observation, compiled once. See `Posterior.get_sampler`."""
        return self._chosen(use_ema).get_sampler(x_o, **options)

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

    def sample_and_log_prob(self, key: Any = None, x_o: Any = None, nsamples: int = 10_000, **options: Any) -> Any:
        """(draws, their log p(theta | x_o)). See `Posterior.sample_and_log_prob`."""
        return self.posterior.sample_and_log_prob(key, x_o, nsamples, **options)

    def map(self, x_o: Any, **options: Any) -> tuple[Float[np.ndarray, "dim_obs ch_obs"], float]:
        """(theta, log p) at the maximum a posteriori. See `Posterior.map`."""
        return self.posterior.map(x_o, **options)

    def distill(self, segments: int = 2, **options: Any) -> Posterior:
        """A student that draws in `segments` evaluations, trained on the data x of the training set without new simulations; a
        `Posterior`, to be saved as a run of its own.

        Its distance from this posterior on held-out observations is in `student.facts["distance"]`. `options`: see `DistillConfig`.
        Raises ValueError without a training set.
        """
        if self._source is None or self._validation is None:
            raise ValueError("distilling needs data x: make the pipeline with its training set.")
        _, xs = self._augmented(self._source.fit(), 0)
        student, _ = distill(self.posterior, xs, DistillConfig(segments=segments, **options))
        held_out = self._augmented(self._validation, 1)[1]
        student.facts["distance"] = distance(self.posterior, student, held_out)
        return student

    def save(self, path: str) -> None:
        """Writes the run directory, for `distsbi.load`."""
        self.posterior.save(path)


class JointPipeline(ConditionalPipeline):
    """Trains `model` to all conditionals of (theta, x), by random masks of what is given, and samples any of them.

    Args:
        model: a joint network over dim_obs + dim_cond tokens (`Flux1Joint`, `Simformer`), or an `nnx.Module` with
            `encode(values, mask)` and `__call__(t, v_t, context)` over all tokens; see `distsbi.networks.JointNetwork`.
        condition_mask: how masks are drawn, "structured", "bernoulli" or "posterior"; see `ConditionMasks`.
        other arguments: as for `ConditionalPipeline`; parameters and data need the same channels.
    """

    def __init__(self, *args: Any, condition_mask: str = "structured", **options: Any):
        if condition_mask not in MASK_SHARES:
            raise ValueError(f"condition_mask must be one of {', '.join(MASK_SHARES)}; got {condition_mask!r}.")
        self.pose = ConditionMasks(condition_mask)
        super().__init__(*args, **options)

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
            _check_module(model)
            for name, value in {"num_tokens": total, "ch_theta": ch_obs}.items():
                setattr(model, name, value)
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
            names=self.parameter_names, solver=solver, mesh=self.mesh, facts=facts,
        )  # fmt: skip

    def calibrate(self, given: Sequence[str]) -> dict[str, Any]:
        """Chooses and certifies the sampling grid of the pattern where the tokens named are given, on validation pairs; it is used from
        then on, and saved with the run. Returns the certificate."""
        posterior = self.posterior
        assert isinstance(posterior, JointPosterior) and self._validation is not None
        fixed = sorted(posterior.tokens(given))
        tokens = np.concatenate(self._augmented(self._validation, 1), 1)
        solver, certificate = calibrate(posterior.pattern(given), tokens[:, fixed])
        patterns = posterior.facts.setdefault("patterns", {})
        patterns[pattern_key(fixed)] = {"solver": solver.to_dict(), "certificate": certificate}
        posterior.forget_patterns()
        return certificate


class UnconditionalPipeline(ConditionalPipeline):
    """Trains `model` to the density of theta alone, and samples it.

    Args:
        model: a joint network over dim_obs tokens, or a network made for one datum (which is always 0).
        train_dataset, val_dataset: arrays (n, dim_obs, ch_obs) or (n, dim_obs); or None.
        dim_obs, ch_obs: number of parameters, channels of each.
        other arguments: as for `ConditionalPipeline`.
    """

    def __init__(
        self, model: Any, train_dataset: Any, val_dataset: Any, dim_obs: int, ch_obs: int = 1,
        training_config: dict[str, Any] | TrainingConfig | None = None, **options: Any,
    ):  # fmt: skip
        if isinstance(model, JointNetwork):
            model = Unconditional(model)
        train_dataset, val_dataset = (None if d is None else _with_nothing(d) for d in (train_dataset, val_dataset))
        super().__init__(model, train_dataset, val_dataset, dim_obs, 1, ch_obs, 1, training_config, **options)

    def sample(  # type: ignore[override]
        self, key: Any = None, nsamples: int | None = None, *, rng: Any = None, use_ema: bool = True, **options: Any
    ) -> Float[np.ndarray, "nsamples dim_obs ch_obs"]:
        """Draws; `rng=` or `key=`. See `Posterior.sample`."""
        return self._chosen(use_ema).sample(key, NOTHING, nsamples, rng=rng, **options)

    def get_sampler(self, *, use_ema: bool = True, **options: Any) -> Callable[..., np.ndarray]:  # type: ignore[override]
        """A function `sampler(key, nsamples)`, compiled once. See `Posterior.get_sampler`."""
        return self._chosen(use_ema).get_sampler(NOTHING, **options)

    def log_prob(self, theta: Any, **options: Any) -> Float[np.ndarray, "n"]:  # type: ignore[override]
        """log p(theta). See `Posterior.log_prob`."""
        return self.posterior.log_prob(theta, NOTHING, **options)

    def sample_and_log_prob(self, key: Any = None, nsamples: int = 10_000, **options: Any) -> Any:  # type: ignore[override]
        """(draws, their log p(theta)). See `Posterior.sample_and_log_prob`."""
        return self.posterior.sample_and_log_prob(key, NOTHING, nsamples, **options)


UNFINISHED = "training was interrupted before the grid was chosen; give it again to choose one"
EXTENT_ROWS, EXTENT_ENTRIES = 4_096, 4_096
NOTHING: Any = np.zeros((1, 1, 1), np.float32)  # the x of a density without conditions


def _with_nothing(theta: Any) -> Any:
    """theta beside as many zeros, as a dataset of pairs."""
    array = np.asarray(theta, np.float32)
    if array.ndim not in (2, 3):
        raise ValueError(f"theta must have shape [n, dim] or [n, dim, channels]; got {list(array.shape)}.")
    return array, np.zeros((len(array), 1, 1), np.float32)


class _Named:
    """The constructor of a pipeline that makes its own network and method. `params`: its size; default: `make_params.default(...)`.
    `missing`: NaN in x means that the entry is missing, in training and after."""

    make_params: ClassVar[Any]
    make_model: ClassVar[Any]
    make_method: ClassVar[type[Method]]

    def __init__(
        self,
        train_dataset: Any,
        val_dataset: Any,
        dim_obs: int,
        dim_cond: Dims,
        ch_obs: int = 1,
        ch_cond: int | Mapping[str, int] = 1,
        params: Any = None,
        training_config: dict[str, Any] | TrainingConfig | None = None,
        mesh: meshes.MeshLike = None,
        prior: Any = None,
        sde_type: str | None = None,
        missing: bool | None = None,
        embedding: Any = None,
        **options: Any,
    ):
        layout, rngs = Layout.of(dim_cond, ch_cond), getattr(params, "rngs", None)
        nets = _nets(layout, embedding)
        if nets is None and not layout.is_plain and not issubclass(type(self).make_model, JointNetwork):
            nets = default_nets(layout, "CNN" if self.make_model is MLP else "PatchEmbedding", nnx.Rngs(1))
        if params is None or isinstance(params, dict):
            tokens, features = layout.packed if nets is None else embedded_shape(nets, layout)
            default = self.make_params.default(dim_obs, tokens, ch_obs, features)
            params = _with_fields(default, params or {})
        if missing is not None and isinstance(params, self.make_params):
            if not hasattr(params, "missing"):
                raise ValueError(
                    f"{type(self).__name__} takes no missing data: say what is there with sample(given={{...}})."
                )
            params = dataclasses.replace(params, missing=missing)
        if not isinstance(params, self.make_params):
            raise ValueError(
                f"params must be {self.make_params.__name__}, or a dict of its fields; got {type(params).__name__}."
            )
        known = ("augment", "method", *(["condition_mask"] if isinstance(self, JointPipeline) else []))
        for name in options:
            if name not in known:
                every = [*inspect.signature(_Named.__init__).parameters][1:-1] + list(known)
                raise ValueError(
                    f"{type(self).__name__} has no keyword {name!r}.{_nearest(name, every)} The keywords are {', '.join(every)}."
                )
        make: Any = super().__init__  # of the pipeline that this is mixed into
        make_model: Any = self.make_model
        make(
            make_model(params, rngs=rngs if rngs is not None else nnx.Rngs(0)),
            train_dataset, val_dataset, dim_obs, dim_cond, ch_obs, ch_cond, training_config,
            mesh=mesh, prior=prior, **{"method": self._method(sde_type), "embedding": nets, **options},
        )  # fmt: skip

    def _method(self, sde_type: str | None) -> Method:
        if sde_type is None:
            return self.make_method()
        if self.make_method is not ScoreMatchingVP or sde_type.upper() not in SDE_TYPES:
            raise ValueError(
                f'sde_type is "VP" or "VE", for score matching alone; got {sde_type!r} for {self.make_method.__name__}.'
            )
        return SDE_TYPES[sde_type.upper()]()


SDE_TYPES: dict[str, type[Method]] = {"VP": ScoreMatchingVP, "VE": ScoreMatchingVE}
_KINDS = {"Flow": FlowMatching, "Diffusion": EDM, "SM": ScoreMatchingVP}
_SAY = {
    "Flow": "Flow matching", "Diffusion": "EDM diffusion", "SM": 'Score matching (`sde_type`: "VP", the default, or "VE")'
}  # fmt: skip


def _named(network: str, kind: str) -> type[Any]:
    make_params, make_model = NETWORKS[network]
    base = JointPipeline if issubclass(make_model, JointNetwork) else ConditionalPipeline
    body = {
        "__doc__": f"{_SAY[kind]} with `{network}`. `params`: `{make_params.__name__}`. Else as `{base.__name__}`.",
        "__module__": __name__,
        "make_params": make_params, "make_model": make_model, "make_method": _KINDS[kind],
    }  # fmt: skip
    return type(f"{network}{kind}Pipeline", (_Named, base), body)


PIPELINES: dict[str, type[Any]] = {f"{network}{kind}": _named(network, kind) for network in NETWORKS for kind in _KINDS}

MLPFlowPipeline, MLPDiffusionPipeline, MLPSMPipeline = (PIPELINES[f"MLP{kind}"] for kind in _KINDS)
Flux1FlowPipeline, Flux1DiffusionPipeline, Flux1SMPipeline = (PIPELINES[f"Flux1{kind}"] for kind in _KINDS)
Flux1JointFlowPipeline, Flux1JointDiffusionPipeline, Flux1JointSMPipeline = (
    PIPELINES[f"Flux1Joint{kind}"] for kind in _KINDS
)
SimformerFlowPipeline, SimformerDiffusionPipeline, SimformerSMPipeline = (
    PIPELINES[f"Simformer{kind}"] for kind in _KINDS
)


def _names_of(folder: str | os.PathLike[str], prior: Any) -> tuple[str, ...]:
    """The parameters of a folder of pairs. Raises ValueError if the prior has other names for them, or another order."""
    names = open_pairs(folder).names
    given = getattr(prior, "names", None)
    unnamed = names == tuple(f"theta_{i}" for i in range(len(names)))
    if given is not None and not unnamed and len(given) == len(names) and tuple(given) != names:
        raise ValueError(
            f"the pairs in {folder} are of {', '.join(names)}, in this order; the prior is of {', '.join(given)}. Give the prior in the order of "
            f"the pairs, with their names."
        )
    return names


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _with_fields(default: Any, given: dict[str, Any]) -> Any:
    """`default` with these fields. Raises ValueError naming an unknown one and the nearest known, or one of a wrong type."""
    known = [field.name for field in dataclasses.fields(default)]
    for name in given:
        if name not in known:
            raise ValueError(
                f"{type(default).__name__} has no field {name!r};{_nearest(name, known)} The fields are {', '.join(known)}."
            )
    try:
        return dataclasses.replace(default, **given)
    except TypeError as error:
        raise ValueError(f"a field of {type(default).__name__} has a wrong type: {error}; got {given}.") from error


def _nets(layout: Layout, embedding: Any) -> dict[str, Any] | None:
    """The embedding net of every part by name. Raises ValueError for nets of other parts."""
    if embedding is None:
        return None
    nets = dict(embedding) if isinstance(embedding, Mapping) else dict.fromkeys(layout.names[:1], embedding)
    if set(nets) != set(layout.names):
        raise ValueError(f"embedding must be a dict with a net for each of {list(layout.names)}; got {sorted(nets)}.")
    return nets


def _on_packed(augment: Callable[..., tuple[Array, Any]], layout: Layout) -> Callable[..., tuple[Array, Array]]:
    """The user's `augment` on data that are packed."""

    def packed(key: Array, theta: Array, x: Array) -> tuple[Array, Array]:
        theta, x = augment(key, theta, layout.unpack(x))
        return theta, layout.join(x)

    return packed


def _identity(model: Any) -> list[Any]:
    """What a resumed training must share with the one that began."""
    if isinstance(model, Embedded):
        return ["Embedded", model.params.to_dict(), *_identity(model.network)]
    name = network_name(model)
    return [name, model.params.to_dict() if name else type(model).__name__]


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() if isinstance(part, tuple) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _check_module(model: Any) -> None:
    """Raises ValueError for what is no user's own network."""
    if not isinstance(model, nnx.Module) or not callable(getattr(model, "encode", None)) or not callable(model):
        raise ValueError(
            f"model must be a flax.nnx.Module with encode(x) and __call__(t, theta_t, context); got {type(model).__name__}. "
            f"See distsbi.networks.Network."
        )
    _check_state(model)


def _check_state(model: Any) -> None:
    """Raises ValueError for a module that keeps more than weights."""
    other = {type(leaf).__name__ for _, leaf in nnx.to_flat_state(nnx.state(model)) if not isinstance(leaf, nnx.Param)}
    if other:
        raise ValueError(
            f"{type(model).__name__} keeps state beside its weights ({', '.join(sorted(other))}), which sampling could not carry: "
            f"leave out dropout and batch norm (layer norm does)."
        )
