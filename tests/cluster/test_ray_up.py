"""`ray up` files: Ray's own check, the clouds' own words for a machine, no doors left open."""

import copy
import re

import click
import jsonschema
import pytest
import yaml

from tests.cluster.manifests import CLUSTER

pytest.importorskip("ray")
FILES = {path.stem: path for path in sorted((CLUSTER / "ray-up").glob("*.yaml"))}


@pytest.fixture(params=FILES)
def config(request):
    return yaml.safe_load(FILES[request.param].read_text())


def _prepare(config):
    """The file as `ray up` reads it, filled with Ray's defaults."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


def test_two_clouds():
    assert set(FILES) == {"aws", "gcp"}


def test_ray_accepts_the_file(config):
    filled = _prepare(config)
    assert filled["available_node_types"].keys() == {"head", "gpu"}  # and not its default types beside
    # Its default commands would install another Ray and open the dashboard to all.
    everything = str([value for key, value in filled.items() if key.endswith("_commands")])
    assert "pip install" not in everything
    assert "0.0.0.0" not in everything


@pytest.mark.parametrize("place", [(), ("docker",), ("auth",), ("available_node_types", "gpu")])
def test_ray_refuses_a_misspelt_key(config, place):
    part = config
    for step in place:
        part = part[step]
    part[f"{next(iter(part))}s"] = 1
    with pytest.raises(jsonschema.ValidationError):
        _prepare(config)


def _aws_says(node: dict) -> str:
    """What EC2's RunInstances would refuse."""
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    node = {**node, "MinCount": 1, "MaxCount": 1}
    node["SubnetId"] = node.pop("SubnetIds")[0]  # Ray tries one after another
    model = ServiceModel(Loader().load_service_model("ec2", "service-2"))
    return ParamValidator().validate(node, model.operation_model("RunInstances").input_shape).generate_report()


def _gcp_says(node: dict) -> str:
    """What Compute Engine's Instance does not know."""
    import json

    from googleapiclient.discovery_cache import get_static_doc

    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]

    def check(value, schema, where):
        if "$ref" in schema:
            schema = schemas[schema["$ref"]]
        if "properties" in schema:
            assert isinstance(value, dict), where
            for key, part in value.items():
                if key not in schema["properties"]:
                    wrong.append(f"{where}.{key}")
                else:
                    check(part, schema["properties"][key], f"{where}.{key}")
        elif schema.get("type") == "array":
            for part in value:
                check(part, schema["items"], where)
        elif "enum" in schema and value not in schema["enum"]:
            wrong.append(f"{where}: {value}")
        elif not isinstance(value, {"boolean": bool, "integer": int, "string": (str, int)}[schema["type"]]):
            wrong.append(f"{where}: {value!r}")  # 64-bit integers are strings in the schema

    wrong: list[str] = []
    check(node, {"$ref": "Instance"}, "node_config")
    return "; ".join(wrong)


SAYS = {"aws": _aws_says, "gcp": _gcp_says}


def test_the_cloud_knows_every_key_of_a_machine(config):
    cloud = config["provider"]["type"]
    for node_type in config["available_node_types"].values():
        node = copy.deepcopy(node_type["node_config"])
        assert SAYS[cloud](copy.deepcopy(node)) == ""
        nested = next(value[0] for value in node.values() if isinstance(value, list) and isinstance(value[0], dict))
        nested["Misspelt"] = 1
        assert "Misspelt" in SAYS[cloud](node)


def test_nothing_is_open_to_the_outside(config):
    assert config["provider"]["use_internal_ips"] is True
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        if config["provider"]["type"] == "aws":
            # Without groups of its own Ray makes one that lets SSH in from everywhere.
            assert node["SecurityGroupIds"]
            assert node["SubnetIds"]
            assert node["MetadataOptions"]["HttpTokens"] == "required"
        else:
            assert all("accessConfigs" not in interface for interface in node["networkInterfaces"])


def test_containers_get_token_and_environment(config):
    docker = config["docker"]
    shared = _environment(docker["run_options"])
    (folder,) = config["file_mounts"]
    assert shared["RAY_AUTH_MODE"] == "token"
    assert shared["RAY_AUTH_TOKEN_PATH"] == f"{folder}/auth_token"
    volumes = dict(text.removeprefix("--volume ").split(":") for text in docker["run_options"] if "--volume" in text)
    assert set(volumes.values()) == {"/data", "/cache"}
    made = "\n".join(config["initialization_commands"])
    assert all(folder in made for folder in volumes)
    assert shared["JAX_COMPILATION_CACHE_DIR"].startswith("/cache/")
    assert _environment(docker["head_run_options"]) == {"JAX_PLATFORMS": "cpu"}
    workers = _environment(docker["worker_run_options"])
    assert workers == {"JAX_PLATFORMS": "cuda,cpu", "XLA_CLIENT_MEM_FRACTION": "0.9"}
    assert int(shared["PJRT_NPROC"]) <= config["available_node_types"]["gpu"]["resources"]["CPU"]


def _environment(options: list[str]) -> dict[str, str]:
    return dict(text.removeprefix("--env ").split("=", 1) for text in options if text.startswith("--env "))


def test_ray_start_knows_the_options(config):
    from ray.scripts.scripts import start

    heads, workers = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    for command in (heads[-1], workers[-1]):
        words = re.sub(r"^.*?ray start ", "", command).split()
        start.make_context("ray start", words)
        with pytest.raises(click.NoSuchOption):
            start.make_context("ray start", [*words, "--no-such-option"])
    assert "--dashboard-host=127.0.0.1" in heads[-1]
    assert "--num-cpus=0" in heads[-1]
