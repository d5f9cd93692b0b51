"""A pipeline holds data, a network and a method; it trains, and samples.

    datasets -> scales -> `train` -> `calibrate` -> Posterior, which every way to sample is handed on to (`Answers`)

`ConditionalPipeline` is all of it for p(theta | x), `obs` being theta and `cond` x. What another kind of pipeline decides for itself are the
methods under that heading.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distsbi import keys, mesh as meshes, processes
from distsbi.data.float32 import warn_of_steps
from distsbi.data.prior import parameter_names, parse_prior, supports
from distsbi.data.source import FIT_PAIRS, Pairs, Shapes, Source, make_source
from distsbi.data.standardise import Standardizer
from distsbi.environment import versions
from distsbi.methods import Method, as_method
from distsbi.networks import Embedded, Layout, Network, takes_missing
from distsbi.networks.embedding import embedded_shape
from distsbi.networks.observation import Dims
from distsbi.pipelines.answers import Answers
from distsbi.pipelines.given import brought_by, check_module, check_output, check_state, nets_by_part, on_packed
from distsbi.pipelines.identity import training_identity
from distsbi.pipelines.saved import check_prior, common_names, saved_run
from distsbi.pipelines.students import distill
from distsbi.sampling import Posterior
from distsbi.sampling.checks import extent, missing_counts
from distsbi.sampling.joint import JointPosterior
from distsbi.sampling.run import check_place, read_spec
from distsbi.solvers import Solver, solver_from_dict
from distsbi.training import Trained, TrainingConfig, train
from distsbi.training.loop import run_root
from distsbi.training.update import Pose, conditional

UNFINISHED = "training was interrupted before the grid was chosen; give it again, or restore it in its pipeline and call calibrate()"
AUGMENT_BYTES = 128 * 2**20  # of pairs that are augmented together outside training

log = logging.getLogger("distsbi")


def key_of_rngs(rngs: nnx.Rngs) -> Array:
    """A key of the stream that is there; `nnx.Rngs(params=0)` has no default one. Raises ValueError if there is none."""
    for name in ("default", "params"):
        if name in rngs:
            return rngs[name]()
    raise ValueError("rngs holds no random numbers; give nnx.Rngs(0).")


class ConditionalPipeline(Answers):
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
        mesh: where to train: None or "auto" (all devices, of several processes those of all), a dict of axis sizes, or a `jax.sharding.Mesh`.
        prior: gives parameter names and the support that no draw leaves: a numpyro distribution, `distsbi.Prior`, texts by name such as
            {"mass": "LogNormal(0, 0.5)"}, or any object with `sample(key, shape)`, `log_prob` and `support`. A Task brings its own, and so do
            folders that `simulate` wrote.
        method: what is learned, or its name, "flow" (the default), "edm", "vp" or "ve".
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
        method: Method | str | None = None,
        augment: Callable[[Array, Any, Any], tuple[Array, Any]] | None = None,
        embedding: Any = None,
    ):
        self.layout = Layout.of(dim_cond, ch_cond)
        self.model = self._adopted(model, dim_obs, ch_obs, nets_by_part(self.layout, embedding))
        self.dim_obs, self.ch_obs = dim_obs, ch_obs
        self.dim_cond, self.ch_cond = self.layout.packed
        self.method = as_method(method)
        self.mesh = meshes.make_mesh(mesh, shared=True)
        prior = parse_prior(prior) if isinstance(prior, Mapping) else prior
        carried, names = brought_by(train_dataset, prior)
        self.prior = prior if prior is not None else carried
        self.augment = augment if augment is None or self.layout.is_plain else on_packed(augment, self.layout)
        self.training_config = (
            training_config
            if isinstance(training_config, TrainingConfig)
            else TrainingConfig.from_dict(training_config or {})
        )
        self._shapes = Shapes((dim_obs, ch_obs), self.layout.packed, takes_missing(self.model), self.layout)
        self._supports = supports(self.prior, dim_obs)
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
    makes: type[Posterior] = Posterior

    def _adopted(self, model: Any, dim_obs: int, ch_obs: int, nets: dict[str, Any] | None) -> Any:
        """The model, checked and behind its embedding nets; a user's own gets the sizes that the contract asks for."""
        own = not isinstance(model, Network)
        seen = self.layout.packed if nets is None else embedded_shape(nets, self.layout)
        if not own and nets is None and self.layout.is_plain:  # what fits behind nets `Embedded` knows
            made, asked = (model.dim_theta, model.ch_theta, model.dim_x, model.ch_x), (dim_obs, ch_obs, *seen)
            if made != asked:
                raise ValueError(
                    f"the model was made for (dim_theta, ch_theta, dim_x, ch_x) = {made}, and these data need {asked}; make it with those sizes."
                )
        if own:
            check_module(model)
            for name, value in zip(("dim_theta", "ch_theta", "dim_x", "ch_x"), (dim_obs, ch_obs, *seen), strict=True):
                setattr(model, name, value)
            blank: Any = jnp.zeros((2, *seen))
            blank = self.layout.unpack(blank) if nets is None else blank
            check_output(model, lambda network: network.encode(blank), dim_obs, ch_obs)
        for net in (nets or {}).values():
            check_state(net)
        if isinstance(model, Embedded) or (nets is None and self.layout.is_plain):
            return model
        if nets is None and not own:
            raise ValueError(
                f"{type(model).__name__} takes data of shape (n, dim, channels), these are {self.layout.describe()}: give embedding=, such as "
                f"distsbi.networks.CNN, or use a named pipeline, which makes one."
            )
        return Embedded(model, nets, self.layout)

    def _fit(self, theta: np.ndarray, x: np.ndarray) -> Standardizer:
        return Standardizer.fit(
            theta, x, self._supports, decades=self.layout.is_plain, pool=self.layout.pooled,
            exchangeable=self._exchangeable,
        )  # fmt: skip

    @property
    def _exchangeable(self) -> bool:
        """Whether the data are a set, whose order must not matter."""
        return bool(getattr(self.model, "exchangeable", False))

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
        self, rngs: nnx.Rngs | Any, nsteps: int | None = None, save_model: bool = True, **overrides: Any
    ) -> tuple[list[float], list[float]]:
        """Trains, or goes on training from the present weights; returns (training losses, validation losses), one per validation.

        With `checkpoint_dir` in the training configuration the run directory is written while training; a killed run started
        again resumes from its last checkpoint and ends with the same bits. `rngs`: of batches and noise; the weights begin as the model was made (for an ensemble
        give `params={"rngs": nnx.Rngs(seed)}`). A directory holds one training: to go on from a finished
        one, also with more simulations, `restore` it and give another `checkpoint_dir`. `save_model=False`: nothing is written there. `overrides`:
        training options for this call.

        Raises ValueError without a training set, or where `checkpoint_dir` holds another training.
        """
        if self._source is None:
            raise ValueError(
                "this pipeline was made for inference (train_dataset=None); make one with a training set to train."
            )
        key = keys.as_key(key_of_rngs(rngs) if isinstance(rngs, nnx.Rngs) else rngs)
        base = dataclasses.replace(
            TrainingConfig.from_dict({**self.training_config.to_dict(), **overrides}),
            **({} if nsteps is None else {"nsteps": nsteps}),
            **({} if save_model else {"checkpoint_dir": None}),
        )
        config = base.resolve(self._source.size)
        root = run_root(config)
        if root is not None and "://" not in root:
            check_place(root)
        validation = self._held_out()
        standardizer = self._standardizer
        if standardizer is None:
            pairs = self._fit_pairs()
            if processes.is_first():
                for name, array in zip(("theta", "x"), pairs, strict=True):
                    warn_of_steps(name, array)
            standardizer = self._fit(*pairs)
        standardizer = self._standardizer = jax.tree.map(np.asarray, standardizer)
        identity = training_identity(
            self.model, self.method, config, self.pose, self._source.fingerprint, validation, standardizer
        )
        trained = train(
            self.model, self.method, standardizer, self._source, validation, key, config,
            mesh=self.mesh, augment=self.augment, pose=self.pose, identity=identity,
        )  # fmt: skip
        self._take(trained, standardizer)
        finished = None if root is None or trained.updates else self._finished(root, config)
        if finished is not None:  # by an earlier call, of which nothing is to be forgotten
            for posterior in filter(None, (self._posterior, self._last)):
                posterior.facts, posterior.default_solver = (
                    dict(finished["facts"]),
                    solver_from_dict(finished["solver"]),
                )
            return trained.losses, trained.val_losses
        if config.calibrate:
            if root is not None:  # what was learned is on the disk before anything else can fail
                self.posterior.facts["certificate"] = {"met": None, "says": UNFINISHED}
                self.posterior.save(root)
            self._calibrate(validation[1])
        if root is not None:
            self.posterior.save(root)
        return trained.losses, trained.val_losses

    def _finished(self, root: str, config: TrainingConfig) -> dict[str, Any] | None:
        """The spec of the run directory, if that holds this very posterior with its grid."""
        try:
            spec = read_spec(Path(root))
        except (ValueError, OSError):
            return None
        chosen = spec["facts"].get("certificate", {}).get("met") is not None or not config.calibrate
        return spec if chosen and spec["fingerprint"] == self.posterior.fingerprint else None

    def _held_out(self) -> Pairs:
        """The validation pairs as training sees them. Raises ValueError without a training set."""
        if self._validation is None:
            raise ValueError(
                "this pipeline was made for inference (train_dataset=None): it holds no observations; make it with its training set."
            )
        return self._augmented(self._validation, keys.FOR_VALIDATION)

    def _augmented(self, pairs: Pairs, purpose: int) -> Pairs:
        """Pairs as training sees them, under fixed random numbers: what scales are fitted on, and validation is made of. Block by block: all
        of a training set need not fit on a device."""
        if self.augment is None:
            return pairs
        augment, made = jax.jit(self.augment), []
        rows = max(1, AUGMENT_BYTES // sum(part[0].nbytes for part in pairs))
        for block, start in enumerate(range(0, len(pairs[0]), rows)):
            key = keys.augmentation_key(purpose, block)
            made.append(jax.device_get(augment(key, *(part[start : start + rows] for part in pairs))))
        thetas, xs = zip(*made, strict=True)
        return np.concatenate(thetas), np.concatenate(xs)

    def _fit_pairs(self) -> Pairs:
        """Pairs to fit scales on, as training sees them: evenly spaced ones where many would have to be augmented."""
        assert self._source is not None
        pairs = self._source.fit()
        if self.augment is not None and len(pairs[0]) > FIT_PAIRS:
            some = np.linspace(0, len(pairs[0]) - 1, FIT_PAIRS).round().astype(int)
            pairs = pairs[0][some], pairs[1][some]
        return self._augmented(pairs, keys.FOR_SCALES)

    def _take(self, trained: Trained, standardizer: Standardizer) -> None:
        """Makes the posteriors of the averaged weights and of the last."""
        assert self._source is not None
        facts: dict[str, Any] = {"training": trained.facts, "data": self._source.fingerprint, "versions": versions()}
        self._last, self._asked = self._make_posterior(trained.last, standardizer, None, facts), None
        self._last.facts |= self._extents(self._fit_pairs(), self._last)
        self._posterior = self._make_posterior(trained.params, standardizer, None, self._last.facts)
        nnx.update(self.model, trained.params)

    def calibrate(self) -> dict[str, Any]:
        """Chooses and certifies the sampling grid on validation pairs, as `train` does; it is used from then on, and saved with the run. Returns
        the certificate. Raises ValueError before training, without a training set, and for a student."""
        return self._calibrate(self._held_out()[1])

    def _calibrate(self, xs: np.ndarray, **given: Any) -> dict[str, Any]:
        """On these observations, for the posterior, and for the weights before averaging, which are of the same flow."""
        log.info(
            "choosing the sampling grid: held-out observations are solved on one after another until the error is small"
        )
        certificate = self.posterior.calibrate(xs, **given)
        if self._last is not None:
            self._last.adopt_grids(self.posterior)
        return certificate

    def _extents(self, pairs: Pairs, posterior: Posterior) -> dict[str, Any]:
        """How far these pairs lie from their mean, by which `Posterior.far` tells what is far outside; one number where the entries
        of x are many, or a set; and how many entries are missing at most, where some may be."""
        missing = {"x_missing": int(missing_counts(pairs[1]).max())} if posterior.missing else {}
        return {"x_extent": extent(pairs[1], posterior.scales, alike=self._exchangeable), **missing}

    @property
    def example(self) -> Float[np.ndarray, "1 dim_cond ch_cond"]:
        """An observation that was held out of training. Raises ValueError without a training set."""
        return self._held_out()[1][:1]

    def restore(self, path: str | os.PathLike[str]) -> Self:
        """Takes up a saved run of the same network and method: its weights, scales and sampling grid, to sample from or to go on training
        from. Returns the pipeline.

        Raises ValueError for a run of another network, method, parameters' names or prior's support, and as `distsbi.load` does.
        """
        sizes = [self.dim_obs, self.ch_obs, self.dim_cond, self.ch_cond]
        make = functools.partial(self._make_posterior, nnx.state(self.model, nnx.Param), solver=None, facts={})
        found, scales = saved_run(path, self.model, self.makes, sizes, self.mesh, make)
        names = common_names(path, self.parameter_names, found)
        if self.prior is not None:
            check_prior(path, names, self._supports, scales)
        self.parameter_names = names
        found.rename(names)
        weights = found.joint if isinstance(found, JointPosterior) else found.network
        nnx.update(self.model, nnx.state(weights, nnx.Param))
        self._standardizer, self._posterior, self._last, self._asked = scales, found, None, None
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
        if not use_ema:
            if self._last is None:
                raise ValueError(
                    "the weights before averaging are not kept in a saved run; use_ema=False works after train() only."
                )
            posterior = self._last
        self._asked = posterior
        return posterior

    def distill(self, segments: int = 2, **options: Any) -> Posterior:
        """A student that draws in `segments` evaluations, trained on the data x of the training set without new simulations; a
        `Posterior`, to be saved as a run of its own.

        Its distance from this posterior on held-out observations is in `student.facts["distance"]`. `options`: those of
        `distsbi.distill`. Raises ValueError without a training set.
        """
        if self._source is None:
            raise ValueError("distilling needs data x: make the pipeline with its training set.")
        _, xs = self._fit_pairs()
        return distill(self.posterior, xs, segments, **{"held_out": self._held_out()[1], **options})

    def save(self, path: str) -> None:
        """Writes the run directory, for `distsbi.load`."""
        self.posterior.save(path)
