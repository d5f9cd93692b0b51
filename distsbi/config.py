"""A training run as a YAML file, and back.

The sections are GenSBI's, so that its files are read as they are, plus `data` (from what), `mesh` (on what) and `seed`:

    strategy:  {method: flow, model: mlp}        # method: flow, diffusion (EDM) or score_matching (with sde_type: VP or VE); of a joint
                                                 # model also condition_mask: structured, bernoulli or posterior
    data:      {task: two_moons, n: 30000}       # or path: a folder that `distsbi simulate` wrote, and stream: true
    model:     {width: 128, depth: 4}            # parameters of the network: fields of MLPParams or Flux1Params
    optimizer: {max_lr: 1.0e-3, warmup_steps: 500}
    training:  {nsteps: 8000, batch_size: 512}
    prior:     {mass: "LogNormal(0, 0.5)"}       # of each parameter, for data of your own; numpyro's names
    path:      {tilt: 4}                         # options of the method: fields of FlowMatching, EDM, ScoreMatchingVP or -VE
    mesh:      {data: 2}
    seed:      0

With `multistep: k` (gradients of k updates make one step of the optimiser) nsteps, warmup_steps and val_every count steps of the optimiser in a file, as
in GenSBI's, and updates everywhere else. A file with keys that GenSBI alone has (experiment_id, num_layers, ...) is trained as there where it says
nothing else: by AdamW with a weight decay of 1e-4, a joint Flux1 with the ids beside the values.

`model`, `optimizer` and `training` hold only what the file says: their defaults, which depend on the data, are written
once, in the network's parameters and in `distsbi.training.TrainingConfig`.

>>> config = parse_config({"strategy": {"model": "mlp"}, "data": {"task": "two_moons"}, "training": {"nsteps": 100}})
>>> config.pipeline, config.training
('MLPFlow', {'nsteps': 100})
"""

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from distsbi.hints import did_you_mean, warn

# What a YAML file calls a network or a method, and the words of the names `<Network><Method>Pipeline`.
MODELS = {"mlp": "MLP", "flux": "Flux1", "flux1": "Flux1", "flux1joint": "Flux1Joint", "simformer": "Simformer"}
METHODS = {"flow": "Flow", "diffusion": "Diffusion", "edm": "Diffusion", "score_matching": "SM", "sm": "SM"}

# Keys of the training configuration that a file gives under `optimizer`; GenSBI reads `ema_decay` under either.
OPTIMIZER_KEYS = (
    "optimizer",
    "max_lr",
    "min_lr",
    "warmup_steps",
    "decay_transition",
    "clip_norm",
    "weight_decay",
    "ema_decay",
)

# Counts of steps of the optimiser.
OF_OPTIMIZER = ("nsteps", "warmup_steps", "val_every")

# Keys that are decided elsewhere, and where.
ELSEWHERE = {
    **dict.fromkeys(("dim_theta", "ch_theta", "dim_x", "ch_x", "dim_obs", "dim_cond"), "it follows from the data"),
    "rngs": "it follows from `seed`",
    "checkpoint_dir": "it is the run directory, given by --out",
}

# GenSBI's spellings, and its keys that steer its own scripts only: accepted with a warning, so that its files are read.
ALIASES = {"params_dtype": "param_dtype", "num_layers": "depth", "widening_factor": "mlp_ratio"}
OF_PATH = ("sigma_min", "sigma_max")  # GenSBI gives these, of EDM and VE, under `training`
OF_GENSBI = {"optimizer": {"optimizer": "adamw", "weight_decay": 1e-4}, "model": {"id_merge_mode": "concat"}}
UNUSED = {
    "context_in_dim": "parameters and data of a joint model have the same channels",
    "rtol": "the learning rate follows its schedule",
    "mesh": "the devices are named in section `mesh`",
    "sharding_rule": "parameters are replicated, or split with `fsdp`",
    "experiment_id": "name the run with --out",
    "restore_model": "a run directory is resumed by itself",
    "train_model": "`distsbi train` always trains",
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is learned, by what network."""

    method: str = "flow"
    model: str = "mlp"
    sde_type: str | None = None
    condition_mask: str | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """From what: a task by name, simulated, or a folder of pairs.

    task: a name of `distsbi.tasks`.
    path: a Parquet folder of pairs.
    n: pairs to simulate from the task; None: new pairs at every step, simulated on the devices.
    stream: read the folder while training, in a shuffled order, as is done where it is large; False: only there.
    """

    task: str | None = None
    path: str | None = None
    n: int | None = None
    stream: bool = False


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All sections of a file. See the module's page for their keys."""

    strategy: Strategy = Strategy()
    data: Data = Data()
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prior: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mesh: Mapping[str, int] | None = None
    seed: int = 0

    @property
    def network(self) -> str:
        """The network's name, as in `distsbi.networks.NETWORKS`."""
        return MODELS[self.strategy.model.lower()]

    @property
    def pipeline(self) -> str:
        """The pipeline's name, as in `distsbi.pipelines.PIPELINES`."""
        return f"{self.network}{METHODS[self.strategy.method.lower()]}"

    @property
    def method(self) -> Any:
        """The method, with the options of section `path`."""
        from distsbi.methods import METHODS as KNOWN

        return KNOWN[_method_name(self.strategy)].from_dict(dict(self.path))

    @property
    def training_config(self) -> dict[str, Any]:
        """`optimizer` and `training` together: the `training_config` of a pipeline, which counts updates."""
        options = {**self.optimizer, **self.training}
        every = options.get("multistep") or 1
        counted = {name: every * options[name] for name in OF_OPTIMIZER if options.get(name) is not None}
        if counted.get("val_every") and options.get("save_every"):  # of updates; only after validations
            counted["save_every"] = -(-options["save_every"] // counted["val_every"]) * counted["val_every"]
        return {**options, **counted}

    def make_pipeline(self, train_dataset: Any, val_dataset: Any, dim_obs: int, dim_cond: Any, **options: Any) -> Any:
        """The pipeline that the file describes, for these data, its prior and its mesh among them; its sections `data` and `seed` are the command's.
        `options`: keywords of the pipeline beside `params`, `training_config` and `method`, and `checkpoint_dir` and `rngs` (of the weights). Raises as the
        pipeline does."""
        from distsbi.pipelines import PIPELINES

        training = {**self.training_config, "checkpoint_dir": options.pop("checkpoint_dir", None)}
        rngs = options.pop("rngs", None)
        if self.strategy.condition_mask is not None:
            options["condition_mask"] = self.strategy.condition_mask
        if self.prior:
            options.setdefault("prior", self.prior)
        if self.mesh is not None:
            options.setdefault("mesh", dict(self.mesh))
        return PIPELINES[self.pipeline](
            train_dataset,
            val_dataset,
            dim_obs,
            dim_cond,
            params={**self.model, **({} if rngs is None else {"rngs": rngs})},
            training_config=training,
            method=self.method,
            **options,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `parse_config` gives the same configuration back. Sections that say nothing are left out."""
        sections = {
            "strategy": {key: value for key, value in dataclasses.asdict(self.strategy).items() if value is not None},
            "data": {
                key: value
                for key, value in dataclasses.asdict(self.data).items()
                if value is not None and value is not False
            },
            **{
                name: dict(getattr(self, name) or {})
                for name in ("model", "optimizer", "training", "path", "prior", "mesh")
            },
        }
        return {name: _plain(section) for name, section in sections.items() if section} | {"seed": self.seed}

    def to_yaml(self) -> str:
        """The file's text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """The configuration in a YAML file.

    Raises ValueError, naming the file, if it is missing or no YAML, and for what `parse_config` refuses.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}.") from error
    try:
        return parse_config({} if content is None else content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(content: Any) -> RunConfig:
    """The configuration in a nested dict.

    Raises ValueError naming the section, the unknown key and the nearest known ones, or the value and what is wrong.
    """
    from distsbi.networks import NETWORKS, JointNetwork
    from distsbi.training import TrainingConfig
    from distsbi.training.update import MASK_SHARES

    names = _fields(RunConfig)
    given = _mapping("the configuration", content)
    if "task_name" in given:  # of GenSBI's benchmarks
        given["data"] = {"task": given.pop("task_name"), **_mapping("section 'data'", given.get("data") or {})}
    for name in given:
        if name not in names:
            raise ValueError(f"unknown section {name!r} in the configuration{_nearest(name, names)}")
    seed = _typed("seed", int, given.pop("seed", 0))
    given = {name: _mapping(f"section {name!r}", values) for name, values in given.items() if values is not None}

    strategy = Strategy(**_section("strategy", Strategy, given))
    for name, value, known in (("method", strategy.method, METHODS), ("model", strategy.model, MODELS)):
        if value.lower() not in known:
            raise ValueError(f"strategy.{name} must be one of {', '.join(known)}; got {value!r}.")
    if strategy.sde_type is not None and (
        METHODS[strategy.method.lower()] != "SM" or strategy.sde_type.upper() not in ("VP", "VE")
    ):
        raise ValueError(
            f"strategy.sde_type is VP or VE, of score_matching alone; got {strategy.sde_type!r} with {strategy.method}."
        )
    joint_flux = MODELS[strategy.model.lower()] == "Flux1Joint"
    model = given.get("model", {})
    if joint_flux and (model.get("id_emb_dim") or model.get("cond_emb_dim")):  # which mean nothing in a sum
        given["model"] = {"id_merge_mode": "concat", **model}
    if _is_gensbis(given):
        if "optimizer" not in given.get("optimizer", {}):
            given["optimizer"] = {**OF_GENSBI["optimizer"], **given.get("optimizer", {})}
        if joint_flux:
            given["model"] = {**OF_GENSBI["model"], **given.get("model", {})}
    mask = strategy.condition_mask
    if mask is not None and (
        mask not in MASK_SHARES or not issubclass(NETWORKS[MODELS[strategy.model.lower()]][1], JointNetwork)
    ):
        raise ValueError(
            f"strategy.condition_mask is {' or '.join(MASK_SHARES)}, of joint models alone; got {mask!r} with {strategy.model}."
        )
    path = _path_options(strategy, given)
    data = Data(**_section("data", Data, given))
    if data.task is not None and data.path is not None:
        raise ValueError(f"section 'data' gives both task {data.task!r} and path {data.path!r}; keep one of them.")
    if data.n is not None and (data.n < 1 or data.path is not None):
        raise ValueError(f"data.n counts the pairs to simulate from a task; got {data.n} with path {data.path!r}.")

    if data.stream and data.path is None:
        raise ValueError("data.stream is for a folder of pairs; give data.path, or leave it out.")

    network_params = NETWORKS[MODELS[strategy.model.lower()]][0]
    model_keys = [key for key in _fields(network_params) if key not in ELSEWHERE]
    optimizer_keys = [key for key in _fields(TrainingConfig) if key in OPTIMIZER_KEYS]
    training_keys = [key for key in _fields(TrainingConfig) if key not in OPTIMIZER_KEYS or key == "ema_decay"]
    config = RunConfig(
        strategy=strategy,
        data=data,
        model=_section("model", network_params, given, model_keys),
        optimizer=_section("optimizer", TrainingConfig, given, optimizer_keys),
        training=_section("training", TrainingConfig, given, training_keys),
        path=path,
        prior=_prior(given.get("prior") or {}, data),
        mesh=_mesh(given.get("mesh")),
        seed=seed,
    )
    twice = set(config.optimizer) & set(config.training)
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is given in both sections 'optimizer' and 'training'; keep one.")
    return config


def _is_gensbis(sections: Mapping[str, Any]) -> bool:
    """Whether a file has keys that no other has than GenSBI's."""
    of_scripts = set(UNUSED) - {"context_in_dim", "mesh"}
    return bool(
        of_scripts & {*sections.get("training", {}), *sections.get("optimizer", {})}
        or set(ALIASES) & set(sections.get("model", {}))
    )


def _method_name(strategy: Strategy) -> str:
    """The name in `distsbi.methods.METHODS`."""
    kind = METHODS[strategy.method.lower()]
    return {"Flow": "flow", "Diffusion": "edm", "SM": (strategy.sde_type or "VP").lower()}[kind]


def _path_options(strategy: Strategy, sections: dict[str, Any]) -> dict[str, Any]:
    """Section `path`, checked by the method itself; GenSBI's noise range is taken out of `training`."""
    from distsbi.methods import METHODS as KNOWN

    training = sections.get("training", {})
    method = KNOWN[_method_name(strategy)]
    moved = {key: _typed(f"training.{key}", float, training.pop(key)) for key in OF_PATH if key in training}
    if moved and not set(moved) <= set(_fields(method)):
        warn(f"training.{', training.'.join(moved)} is ignored: {method.__name__} has no such range.")
        moved = {}
    options = {**moved, **_section("path", method, sections)}
    method.from_dict(options)
    return options


def _section(name: str, cls: type, sections: Mapping[str, Any], keys: list[str] | None = None) -> dict[str, Any]:
    """What the section gives, each value as the type of its field in `cls`; `keys`: the fields allowed."""
    known = _fields(cls) if keys is None else keys
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for given, value in sections.get(name, {}).items():
        key = ALIASES.get(given, given)
        if key in UNUSED and (name == "training" or key not in _fields(cls)):
            warn(f"{name}.{key} is ignored: {UNUSED[key]}.")
        elif key in ELSEWHERE and key in _fields(cls):
            raise ValueError(f"{name}.{given} cannot be set in a file: {ELSEWHERE[key]}.")
        elif key not in known and key in _fields(cls):
            other = "optimizer" if key in OPTIMIZER_KEYS else "training"
            raise ValueError(f"{given} belongs in section {other!r}, not in {name!r}; move it there.")
        elif key not in known:
            raise ValueError(f"unknown key {given!r} in section {name!r}{_nearest(given, known)}")
        elif key in found:
            raise ValueError(f"{name}.{given} and {name}.{key} mean the same; keep one.")
        else:
            found[key] = _typed(f"{name}.{given}", hints[key], value)
    return found


def _typed(where: str, hint: Any, value: Any) -> Any:
    """The value as the type `hint`, numbers written as text (YAML reads 1e-3 as text) included."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise ValueError(f"{where}: {reason[0].lower()}{reason[1:]}; got {value!r}.") from error


def _prior(parts: dict[str, Any], data: Data) -> dict[str, str]:
    """Section `prior`, read: a distribution for each parameter, in order. They are made later, for that starts JAX."""
    from distsbi.data.prior import read_part

    if parts and data.task is not None:
        raise ValueError(f"task {data.task!r} has a prior of its own; leave out section 'prior'.")
    for name, text in parts.items():
        read_part(name, text)
    return {name: str(text) for name, text in parts.items()}


def _mesh(sizes: dict[str, Any] | None) -> dict[str, int] | None:
    """Sizes of mesh axes; their names are checked where the mesh is made."""
    return {axis: _typed(f"mesh.{axis}", int, size) for axis, size in sizes.items()} if sizes else None


def _fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _mapping(what: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{what} must be a mapping of names to values; got {type(values).__name__} ({values!r}).")
    return dict(values)


def _nearest(name: str, known: list[str]) -> str:
    return f".{did_you_mean(name, known, most=2)} The known ones are {', '.join(known)}."


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML's safe loader knows no tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
