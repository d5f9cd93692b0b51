"""What cluster/ holds, read: Kubernetes objects with their schemas, pods, and the commands inside."""

import copy
import functools
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
VERSION = "1.37"  # of Kubernetes, whose schemas are used

# Beside the repository, or where DISTSBI_KUBERAY says.
SCHEMAS = [Path(os.environ.get("DISTSBI_KUBERAY", ROOT.parent / "shared" / "kuberay")), Path("/work/shared/kuberay")]


class Pod(NamedTuple):
    """A pod's template, and which it is: "head", a worker group's name, "submitter" or "pod"."""

    name: str
    metadata: dict[str, Any]
    spec: dict[str, Any]


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def named(kind: str) -> list[Any]:
    """Every object of that kind, as parameters of a test."""
    found = [(path.stem, doc) for path in KUBERNETES for doc in documents(path) if doc["kind"] == kind]
    return [pytest.param(doc, id=f"{stem}-{kind}") for stem, doc in found]


EVERY = [
    pytest.param(doc, id=f"{path.stem}-{doc['kind']}") for path in KUBERNETES for doc in documents(path)
]  # each object


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError for a wrong value or a key that the schema does not name. KubeRay's objects go by its own schemas,
    skipping the test where those are not at hand; the others, and the metadata of all, by Kubernetes'."""
    if document["apiVersion"].startswith("ray.io/"):
        _kuberay(document["kind"]).validate(document)
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
    try:
        kubernetes_validate.validate(copy.deepcopy(document), VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise jsonschema.ValidationError(str(error)) from error


@functools.cache
def _kuberay(kind: str) -> jsonschema.Draft202012Validator:
    name = f"{kind.lower()}s.v1.schema.json"
    for folder in SCHEMAS:
        if (folder / name).is_file():
            return jsonschema.Draft202012Validator(_closed(json.loads((folder / name).read_text())))
    pytest.skip(f"no {name} in {' or '.join(map(str, SCHEMAS))}; DISTSBI_KUBERAY names the folder")


def _closed(schema: Any) -> Any:
    """The schema with no keys allowed beside those it names; Kubernetes drops others silently."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict):
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
        closed["properties"] = {name: _closed(part) for name, part in schema["properties"].items()}
    return closed


def pods(document: dict[str, Any]) -> list[Pod]:
    """The templates of all pods that the object makes."""
    spec = document["spec"]
    if document["kind"] == "Pod":
        return [Pod("pod", document["metadata"], spec)]
    found = []
    if "submitterPodTemplate" in spec:
        found.append(Pod("submitter", **spec["submitterPodTemplate"]))
    cluster = spec.get("rayClusterSpec", {}) if document["kind"] == "RayJob" else spec
    if cluster:
        found.append(Pod("head", **cluster["headGroupSpec"]["template"]))
        found += [Pod(group["groupName"], **group["template"]) for group in cluster["workerGroupSpecs"]]
    return found


def cluster_spec(path: Path) -> dict[str, Any]:
    """The one Ray cluster in a file."""
    (spec,) = [
        doc["spec"].get("rayClusterSpec", doc["spec"])
        for doc in documents(path)
        if doc["kind"] == "RayCluster" or "rayClusterSpec" in doc.get("spec", {})
    ]
    return spec


def entrypoint(path: Path) -> str:
    """The command of the one job in a file."""
    (command,) = [doc["spec"]["entrypoint"] for doc in documents(path) if doc["kind"] == "RayJob"]
    return command


def environment(spec: dict[str, Any]) -> dict[str, str]:
    """What the manifest sets for the pod's first container."""
    return {item["name"]: item["value"] for item in spec["containers"][0].get("env", [])}


def ray_start(path: Path, which: str) -> tuple[list[str], dict[str, str]]:
    """Options of `ray start` as KubeRay (controllers/ray/common/pod.go, generateRayStartCommand) makes them of a group's parameters and its
    container's limits, and the container's environment."""
    spec = cluster_spec(path)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]} | {"head": spec["headGroupSpec"]}
    container = groups[which]["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    options = {"num-cpus": limits["cpu"], "num-gpus": str(limits.get("nvidia.com/gpu", 0))}
    options |= groups[which]["rayStartParams"]
    return [f"--{name}={value}" for name, value in options.items()], environment({"containers": [container]})


def commands(text: str) -> Iterator[list[str]]:
    """The distsbi commands in the README's text, in words: plain, after `kubectl exec ... --` or `ray exec ... '`, or by a batch script."""
    for line in text.replace("\\\n", " ").splitlines():
        if plain := re.search(r"(?:^|-- |')(distsbi [a-z]+ .*?)(?= 2>|'|$)", line):
            yield shlex.split(plain[1])
        elif script := re.search(r"^sbatch .*?/(train|catalog)\.sbatch (.*)", line):
            first, second, *more = shlex.split(script[2])
            given = [first, second, *more] if script[1] == "catalog" else ["--config", first, "--out", second, *more]
            yield ["distsbi", script[1], *given]
