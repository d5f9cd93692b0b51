"""Kubernetes objects: known keys alone, nothing exposed, nothing unbounded."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.cluster.manifests import CLUSTER, EVERY, KUBERNETES, documents, environment, named, pods, validate

PARTS = {"app.kubernetes.io/part-of": "distsbi"}
# Objects whose keys are anybody's.
FREE = {"labels", "matchLabels", "nodeSelector", "rayStartParams", "clusterSelector", "requests", "limits"}
MAKERS = [*named("RayJob"), *named("RayCluster"), *named("Pod")]  # of pods


@pytest.mark.parametrize("document", EVERY)
def test_every_object_fits_its_schema(document):
    validate(document)


def _keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the keys that a schema names."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(key, str):
            yield (*path, key)
        if key not in FREE:
            yield from _keys(value, (*path, key))


@pytest.mark.parametrize("document", EVERY)
def test_a_misspelt_key_is_refused(document):
    """Each of its nested keys in turn."""
    paths = [path for path in _keys(document) if len(path) > 1]
    assert len(paths) >= 1
    for path in paths:
        wrong = copy.deepcopy(document)
        place = wrong
        for step in path[:-1]:
            place = place[step]
        place[path[-1] + "s"] = place.pop(path[-1])
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


@pytest.mark.parametrize("document", MAKERS)
def test_pods_are_bounded_and_may_do_nothing(document):
    for name, metadata, spec in pods(document):
        assert spec["serviceAccountName"] == "distsbi"
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert PARTS.items() <= metadata["labels"].items(), "the network policy goes by this label"
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        on_tpu = document["spec"].get("workerGroupSpecs", [{}])[0].get("groupName") == "tpu"
        if not on_tpu:
            assert spec["securityContext"]["runAsNonRoot"] is True
        if name != "submitter":
            assert 5 <= spec["terminationGracePeriodSeconds"] <= 120
        for container in spec["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert on_tpu or container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert re.fullmatch(r"registry\.example/distsbi:(cpu|cuda12|tpu)", container["image"])


@pytest.mark.parametrize("document", MAKERS)
def test_environment_of_the_pods(document):
    for name, _, spec in pods(document):
        if name == "submitter":
            continue
        env = environment(spec)
        kind = name if name in ("gpu", "tpu") else "cpu"
        assert env["JAX_PLATFORMS"] == {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}[kind]
        assert ("XLA_CLIENT_MEM_FRACTION" in env) == (kind == "gpu")
        assert 1 <= int(env["PJRT_NPROC"]) <= int(spec["containers"][0]["resources"]["limits"]["cpu"])
        if name != "pod":
            mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            cache = next(path for path in mounts if env["JAX_COMPILATION_CACHE_DIR"].startswith(path))
            assert "emptyDir" in volumes[mounts[cache]], "programs compiled for one machine may crash another"
            assert "persistentVolumeClaim" in volumes[mounts["/data"]]


@pytest.mark.parametrize("document", [*named("RayJob"), *named("RayCluster")])
def test_ray_asks_for_a_token_and_is_not_exposed(document):
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    if "headGroupSpec" not in spec:
        assert spec["clusterSelector"] == {"ray.io/cluster": "distsbi-train"}
        assert not spec.get("backoffLimit"), "KubeRay refuses retries on a cluster that is there"
        return
    assert spec["authOptions"] == {"mode": "token", "secretName": "distsbi-ray-token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False
    assert spec["rayVersion"] == _pinned("ray")
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def _pinned(name: str) -> str:
    (version,) = re.findall(rf"^{name}==(.*)$", (CLUSTER / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_the_network_policy_lets_in_distsbi_and_the_operator():
    (policy,) = [param.values[0]["spec"] for param in named("NetworkPolicy")]
    assert policy["podSelector"] == {"matchLabels": PARTS}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    ours, operator = policy["ingress"]
    assert ours == {"from": [{"podSelector": {"matchLabels": PARTS}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert operator["from"][0]["podSelector"]
    out, dns = policy["egress"]
    assert out == {"to": [{"podSelector": {"matchLabels": PARTS}}]}
    assert {port["port"] for port in dns["ports"]} == {53}


def test_only_harmless_kinds_and_one_namespace():
    every = [doc for path in KUBERNETES for doc in documents(path)]
    assert {doc["kind"] for doc in every} == {
        "Namespace", "ServiceAccount", "PersistentVolumeClaim", "NetworkPolicy", "Pod", "RayJob", "RayCluster",
    }  # fmt: skip
    assert {doc["metadata"].get("namespace", "distsbi") for doc in every} == {"distsbi"}
    (claim,) = [doc for doc in every if doc["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for doc in every
        if doc["kind"] in ("Pod", "RayJob", "RayCluster")
        for pod in pods(doc)
        for volume in pod.spec.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert used == {claim["metadata"]["name"]}


def test_the_old_name_of_the_memory_fraction_is_not_set():
    """jax refuses to have both, and the workers set the new one."""
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix != ".md":
            for line in path.read_text().splitlines():
                assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in line or line.startswith("unset "), path


def test_the_readme_makes_the_secret_and_names_the_files():
    text = (CLUSTER / "README.md").read_text()
    assert "create secret generic distsbi-ray-token" in text
    assert "--from-literal=auth_token=" in text, "the key that KubeRay looks for"
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    named = set(re.findall(r"`([\w./-]+\.\w+|Dockerfile)`", table))
    here = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()}
    assert here - {"README.md", "Dockerfile.dockerignore"} == named
