"""YAML files: GenSBI's are read, what is wrong is named, and what is written is read back."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from distsbi.config import RunConfig, parse_config, read_config

# A file of GenSBI's examples (docs/examples/config_examples/config_flow_flux.yaml), as it is.
GENSBI = """
strategy:
  method: "flow"
  model: "flux"

optimizer:
  warmup_steps: 500
  decay_transition: 0.70
  max_lr: 4.0e-4
  min_lr: 4.0e-6

model:
  in_channels: 1
  vec_in_dim: null
  context_in_dim: 1
  mlp_ratio: 4
  num_heads: 4
  depth: 8
  depth_single_blocks: 16
  axes_dim: [10]
  qkv_bias: true
  theta: -1
  id_embedding_strategy: ["absolute", "absolute"]
  params_dtype: "float32"

training:
  batch_size: 4096
  nsteps: 50000
  ema_decay: 0.999
  multistep: 1
  early_stopping: true
  val_every: 100
  experiment_id: 1
  restore_model: true
  train_model: false
  val_error_ratio: 1.3
"""


def test_a_file_of_gensbi(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(GENSBI)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = read_config(file)
    ignored = sorted(str(w.message).split(" ")[0] for w in caught)
    assert ignored == ["training.experiment_id", "training.restore_model", "training.train_model"]
    assert config.pipeline == "Flux1Flow"
    assert config.model["depth"] == 8
    assert config.model["param_dtype"] == "float32"
    assert config.model["theta"] == -1  # which Flux1Params takes as it is
    assert config.training_config["max_lr"] == 4e-4
    assert config.training_config["nsteps"] == 50_000
    assert (config.training_config["optimizer"], config.training_config["weight_decay"]) == ("adamw", 1e-4)


# Of GenSBI's benchmarks (flux1joint) and tests (simformer), as they are.
GENSBI_JOINT = """
task_name: two_moons

strategy:
  method: "score_matching"
  model: "flux1joint"

optimizer:
  warmup_steps: 1000
  decay_transition: 0.80
  rtol: 1.0e-4
  max_lr: 2.0e-4
  min_lr: 2.0e-6

model:
  in_channels: 1
  vec_in_dim: null
  context_in_dim: 1
  mlp_ratio: 4
  num_heads: 4
  depth_single_blocks: 16
  val_emb_dim: 10
  cond_emb_dim: 4
  id_emb_dim: 10
  id_merge_mode: "concat"
  qkv_bias: true
  params_dtype: "float32"

training:
  sigma_min: 1.0e-4
  sigma_max: 15.0
  batch_size: 1024
  nsteps: 90000
  ema_decay: 0.999
  multistep: 1
  early_stopping: true
  val_every: 100
  experiment_id: 1
  restore_model: false
  train_model: true
"""
GENSBI_SIMFORMER = """
strategy: {method: "diffusion", model: "simformer"}
optimizer: {max_lr: 1.0e-4, min_lr: 1.0e-6}
model: {in_channels: 2, val_emb_dim: 40, id_emb_dim: 40, cond_emb_dim: 10, fourier_features: 128, num_heads: 2, num_layers: 2,
        widening_factor: 2, qkv_features: 10, num_hidden_layers: 1}
training: {batch_size: 256, nsteps: 50000, sigma_min: 0.001, sigma_max: 15.0}
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_joint_files_of_gensbi() -> None:
    config = parse_config(yaml.safe_load(GENSBI_JOINT))
    assert (config.pipeline, config.data.task, config.path) == ("Flux1JointSM", "two_moons", {})
    assert config.model["id_emb_dim"] == 10
    assert type(config.method).__name__ == "ScoreMatchingVP"
    config = parse_config(yaml.safe_load(GENSBI_SIMFORMER))
    assert config.pipeline == "SimformerDiffusion"
    assert (config.model["depth"], config.model["mlp_ratio"]) == (2, 2)
    assert (config.method.sigma_min, config.method.sigma_max) == (0.001, 15.0)
    assert config.training_config["optimizer"] == "adamw"
    assert parse_config(config.to_dict()) == config


@pytest.mark.filterwarnings("ignore:training.experiment_id")
def test_what_a_file_of_gensbi_leaves_out() -> None:
    """The noise range of VE, and the ids of a joint Flux1 beside the values, as GenSBI's own readers take them."""
    content = {
        "strategy": {"method": "score_matching", "sde_type": "VE", "model": "flux1joint"},
        "training": {"experiment_id": 1, "sigma_min": "1e-3", "sigma_max": 15},
        "optimizer": {"optimizer": "muon"},
    }
    config = parse_config(content)
    assert (config.method.sigma_min, config.method.sigma_max) == (0.001, 15.0)
    assert config.model == {"id_merge_mode": "concat"}
    assert config.optimizer == {"optimizer": "muon"}
    ours = parse_config({"strategy": {"model": "flux1joint"}, "model": {"id_emb_dim": 6}})
    assert ours.model == {"id_merge_mode": "concat", "id_emb_dim": 6}
    assert not ours.optimizer
    with pytest.warns(UserWarning, match="sigma_max is ignored: ScoreMatchingVP has no such range"):
        parse_config({"strategy": {"method": "score_matching"}, "training": {"sigma_max": 15}})


def test_steps_of_the_optimiser() -> None:
    """GenSBI's files count them, training options count updates."""
    config = parse_config(
        {
            "training": {"nsteps": 1_000, "multistep": 4, "val_every": 100, "save_every": 800},
            "optimizer": {"warmup_steps": 50},
        }
    )
    expected = {"nsteps": 4_000, "multistep": 4, "val_every": 400, "save_every": 800, "warmup_steps": 200}
    assert config.training_config == expected
    assert parse_config(config.to_dict()).training_config == expected
    often = parse_config({"training": {"multistep": 4, "val_every": 100, "save_every": 1_000}}).training_config
    assert (often["val_every"], often["save_every"]) == (400, 1_200)  # after a validation


def test_methods_and_their_options() -> None:
    config = parse_config({"strategy": {"method": "score_matching", "sde_type": "VE"}, "path": {"sigma_max": "30"}})
    assert (type(config.method).__name__, config.method.sigma_max) == ("ScoreMatchingVE", 30.0)
    for content, says in (
        ({"strategy": {"method": "flwo"}}, "strategy.method must be one of flow, diffusion"),
        ({"strategy": {"sde_type": "VE"}}, "sde_type is VP or VE"),
        ({"path": {"tlit": 1}}, "Did you mean tilt"),
        ({"path": {"tilt": -1}}, "tilt >= 0"),
        (
            {"strategy": {"model": "simformer", "condition_mask": "some"}},
            "condition_mask is structured or bernoulli or posterior, .* got 'some'",
        ),
        ({"strategy": {"condition_mask": "posterior"}}, "of joint models alone; got 'posterior' with mlp"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_config(content)


def test_the_seed_of_the_weights() -> None:
    config = parse_config({"model": {"width": 8, "depth": 1}})
    first, again, other = (
        jax.tree.leaves(nnx.state(config.make_pipeline(None, None, 2, 2, mesh={"data": 1}, **options).model))
        for options in ({}, {"rngs": nnx.Rngs(0)}, {"rngs": nnx.Rngs(1)})
    )
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))


def test_defaults_are_not_repeated() -> None:
    config = parse_config({})
    assert config == RunConfig()
    assert config.pipeline == "MLPFlow"
    assert config.training_config == {}


def test_written_and_read_back(tmp_path: Path) -> None:
    config = parse_config(
        {
            "strategy": {"model": "flux"},
            "data": {"task": "two_moons", "n": 1000},
            "model": {"depth": 2, "axes_dim": [6, 2], "id_embedding_strategy": ["absolute", "pos1d"]},
            "optimizer": {"max_lr": "1e-3"},  # YAML reads 1e-3 as text
            "training": {"nsteps": 10},
            "mesh": {"data": 2},
            "seed": 3,
        }
    )
    assert config.optimizer == {"max_lr": 1e-3}
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert read_config(file) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainng": {}}, r"unknown section 'trainng' in the configuration\. Did you mean training\?"),
        ({"training": {"nstep": 10}}, r"unknown key 'nstep' in section 'training'\. Did you mean nsteps"),
        ({"training": {"max_lr": 1e-3}}, r"max_lr belongs in section 'optimizer'"),
        ({"optimizer": {"nsteps": 1}}, r"nsteps belongs in section 'training'"),
        ({"model": {"wdth": 64}}, r"unknown key 'wdth' in section 'model'\. Did you mean width"),
        ({"strategy": {"model": "flux"}, "model": {"width": 64}}, r"unknown key 'width' in section 'model'"),
        ({"model": {"dim_x": 64}}, r"model\.dim_x cannot be set in a file: it follows from the data"),
        ({"training": {"checkpoint_dir": "a"}}, r"checkpoint_dir cannot be set in a file: .* --out"),
        ({"training": {"nsteps": "many"}}, r"training\.nsteps: .*integer.*; got 'many'"),
        (
            {"strategy": {"method": "flows"}},
            r"strategy\.method must be one of flow, diffusion, edm, score_matching, sm; got 'flows'",
        ),
        (
            {"strategy": {"model": "unet"}},
            r"strategy\.model must be one of mlp, flux, flux1, flux1joint, simformer; got 'unet'",
        ),
        ({"data": {"task": "two_moons", "path": "pairs"}}, r"both task 'two_moons' and path 'pairs'; keep one"),
        ({"data": {"task": "two_moons", "n": 0}}, r"data\.n counts the pairs to simulate from a task; got 0"),
        ({"training": [1]}, r"section 'training' must be a mapping of names to values; got list"),
        ({"training": {"ema_decay": 0.9}, "optimizer": {"ema_decay": 0.9}}, r"ema_decay is given in both sections"),
        ({"mesh": {"data": "two"}}, r"mesh\.data: .*integer.*; got 'two'"),
        ("two_moons", r"the configuration must be a mapping"),
    ],
)
def test_what_is_wrong_is_named(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(content)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        read_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("strategy: {model: mlp\ntraining: 3")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML \(line 2\)"):
        read_config(broken)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("seeed: 3")
    with pytest.raises(ValueError, match=r"wrong\.yaml: unknown section 'seeed'.* Did you mean seed"):
        read_config(wrong)
