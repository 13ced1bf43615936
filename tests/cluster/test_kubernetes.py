"""cluster/kubernetes against KubeRay's schema, field by field; needs no Kubernetes."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.kuberay import KINDS
from ray.autoscaler._private.kuberay.node_provider import IN_CLUSTER_TOKEN_PATH

from cl_ray.cli import parse_flags
from cl_ray.commands.train import TrainCommand

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "cluster" / "kubernetes"
MAPPINGS = {"labels", "matchLabels", "rayStartParams", "limits", "requests"}
"""Fields whose keys are values, not field names."""
CLOSED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def pods(spec: Any) -> list[Any]:
    """The templates of all pods of a cluster, or of a job with its cluster."""
    cluster = spec.get("rayClusterSpec", spec)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = [spec["submitterPodTemplate"]] if cluster is not spec else []
    return [*(group["template"] for group in groups), *submitter]


def fields(given: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field."""
    pairs = given.items() if isinstance(given, dict) else enumerate(given)
    for key, value in pairs:
        if isinstance(key, str):
            yield (*path, key)
        if isinstance(value, dict | list) and key not in MAPPINGS:
            yield from fields(value, *path, key)


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "storage", "network"])
def test_every_field_is_in_the_schema(name: str) -> None:
    manifest = read(name)
    kind = KINDS[manifest["kind"]]
    assert list(kind.iter_errors(manifest)) == []
    paths = list(fields(manifest))
    assert len(paths) > 5
    for *parents, last in paths:  # a misspelt field is found at any level
        wrong = copy.deepcopy(manifest)
        parent = wrong
        for key in parents:
            parent = parent[key]
        parent[f"{last}s"] = parent.pop(last)
        assert any(f"'{last}s'" in error.message for error in kind.iter_errors(wrong))


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_cluster_is_protected_and_bounded(name: str) -> None:
    spec = read(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"  # not reachable from outside
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0 < group["maxReplicas"] <= 8
    claim = read("storage")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in (cluster["headGroupSpec"], group):
        inside = pod["template"]["spec"]
        volumes = {v["name"]: v for v in inside["volumes"]}
        claimed = volumes["runs"]["persistentVolumeClaim"]["claimName"]
        assert claimed == claim["metadata"]["name"]
        for container in inside["containers"]:
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == set(volumes) - {"kubernetes-api"}
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_pods_meet_the_restricted_standard(name: str) -> None:
    """And more: no token for the Kubernetes API, a read-only image by its digest."""
    for pod in pods(read(name)["spec"]):
        inside = pod["spec"]
        assert inside["automountServiceAccountToken"] is False
        security = inside["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in inside["containers"]:
            assert re.fullmatch(r"[\w./-]+@sha256:(DIGEST|[0-9a-f]{64})", container["image"])
            assert container["securityContext"] == CLOSED
            home = next(v["value"] for v in container["env"] if v["name"] == "HOME")
            assert home in {mount["mountPath"] for mount in container["volumeMounts"]}
        kinds = {kind for volume in inside["volumes"] for kind in volume} - {"name"}
        assert kinds <= {"persistentVolumeClaim", "emptyDir", "projected"}
    spec = read(name)["spec"]
    autoscaler = spec.get("rayClusterSpec", spec)["autoscalerOptions"]
    assert autoscaler["securityContext"] == CLOSED
    (api,) = (m for m in autoscaler["volumeMounts"] if m["name"] == "kubernetes-api")
    assert api["mountPath"] == IN_CLUSTER_TOKEN_PATH.rpartition("/")[0]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_network_policy_selects_every_pod(name: str) -> None:
    policy = read("network")["spec"]
    for pod in pods(read(name)["spec"]):
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
    assert all(peer.get("podSelector", {}).get("matchLabels") for peer in peers)  # none is open
    assert all(rule["ports"] for rule in policy["egress"] if "ipBlock" in str(rule["to"]))


def test_job_resumes_and_shuts_down() -> None:
    spec = read("rayjob")["spec"]
    python, _, module, verb, *flags = spec["entrypoint"].split()
    assert (python, module, verb) == ("python", "cl_ray", "train")
    flags_ = parse_flags(TrainCommand, flags, prog="cl-ray train")
    assert flags_.name  # without a name each retry would start a new run
    assert flags_.storage == "/runs"
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True


def test_image_has_the_same_ray() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    (tested,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"FROM rayproject/ray:{tested}-py311-gpu@${{BASE_DIGEST}}" in dockerfile
    assert "ARG BASE_DIGEST\n" in dockerfile  # without a default: a build needs one
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)
    assert len(copied) == 3
    assert all((ROOT / file).exists() for files in copied for file in files.split())
    assert "pip install --no-cache-dir --require-hashes" in dockerfile
    assert "USER 1000:100" in dockerfile
