"""KubeRay's manifests against the CRDs' schemas, their pods against Kubernetes' own, and what no schema sees."""

from __future__ import annotations

import copy
import functools
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "kuberay"
KUBERNETES = "1.33"
FILES = ("raycluster", "rayjob")


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())
    return loaded


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifest(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of a manifest."""
    spec = cluster_spec(name)
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if name == "rayjob":
        yield "submitter", manifest(name)["spec"]["submitterPodTemplate"]


ALL_PODS = [pytest.param(pod, id=f"{name}-{which}") for name in FILES for which, pod in pods(name)]


def strict(schema: Any) -> Any:
    """The CRD's schema as jsonschema reads it: no unknown keys unless it keeps them, int-or-string and nullable."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and isinstance(schema.get("type"), str) and not keeps:
        made["additionalProperties"] = False
    return made


@functools.cache
def crd(name: str) -> Any:
    file = SCHEMAS / f"{name}.v1.schema.json"
    if not file.exists():
        pytest.skip(f"{file} is not here: KubeRay's schemas lie beside the checkout where it is developed")
    schema = strict(json.loads(file.read_text()))
    return jsonschema.validators.validator_for(schema)(schema)


@pytest.mark.parametrize("name", FILES)
def test_the_crds_schema_is_met(name: str) -> None:
    assert [error.message for error in crd(name).iter_errors(manifest(name))] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayVersoin"), "2.60.0"),
        (("spec", "authOptions", "mode"), "tokne"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePulPolicy"), "Always"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "many"),
    ],
)
def test_the_schema_catches_a_planted_mistake(path: tuple[Any, ...], value: Any) -> None:
    broken = copy.deepcopy(manifest("raycluster"))
    at: Any = broken
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        crd("raycluster").validate(broken)


def refusal(resource: dict[str, Any]) -> str | None:
    """What Kubernetes' own schema has against it."""
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return None


@pytest.mark.parametrize("pod", ALL_PODS)
def test_pods_are_kubernetes_own(pod: dict[str, Any]) -> None:
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod["spec"]}
    assert refusal(whole) is None


def test_the_volume_is_kubernetes_own_and_shared() -> None:
    claim = manifest("storage")
    assert refusal(claim) is None
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


# --- what schemas miss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pod", ALL_PODS)
def test_no_pod_is_root_or_without_limits(pod: dict[str, Any]) -> None:
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] >= 1000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["spec"]["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(limits)
        assert limits == requests  # guaranteed: not the first to be evicted
        tag = container["image"].rsplit(":", 1)[1]
        assert tag.endswith(version())
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}


def version() -> str:
    project: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return project


@pytest.mark.parametrize("name", FILES)
def test_ray_asks_for_a_token_and_shows_no_dashboard(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["networkPolicy"]["mode"] == "DenyAllIngress"
    head = spec["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    # The operator writes 0.0.0.0 where this is left out.
    assert head["rayStartParams"]["dashboard-host"] in ("127.0.0.1", "$POD_IP")
    text = (KUBERAY / f"{name}.yaml").read_text()
    assert not any(word in text for word in ("0.0.0.0", "LoadBalancer", "NodePort", "privileged", "hostPath"))


@pytest.mark.parametrize("name", FILES)
def test_only_workers_have_gpus_and_their_number_grows(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head = dict(pods(name))["head"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    # The driver waits for the autoscaler instead of refusing what is not there yet.
    assert {"name": "DISTSEG_WAIT_FOR_NODES_S", "value": "1200"} in head["env"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", FILES)
def test_a_head_without_gcs_is_not_alive(name: str) -> None:
    """Ray's agent tells of the raylet and, on the head, of the GCS at this path, without a token."""
    reporter = Path(ray.__file__).parent / "dashboard"
    assert '@routes.get("/api/healthz")' in (reporter / "modules" / "reporter" / "healthz_agent.py").read_text()
    public = (reporter / "http_server_agent.py").read_text().split("PUBLIC_EXACT_PATHS = [")[1].split("]")[0]
    assert '"/api/healthz"' in public
    for which, pod in pods(name):
        if which != "submitter":
            (container,) = pod["spec"]["containers"]
            for probe in ("readinessProbe", "livenessProbe"):
                assert "'http://localhost:52365/api/healthz'" in container[probe]["exec"]["command"][2]
                assert container[probe]["exec"]["command"][:2] == ["python", "-c"]


@pytest.mark.parametrize("name", FILES)
def test_ray_is_the_version_that_was_tested(name: str) -> None:
    assert f"ray=={cluster_spec(name)['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_job_ends_is_retried_and_asks_for_what_the_cluster_has() -> None:
    spec = manifest("rayjob")["spec"]
    assert spec["submissionMode"] == "K8sJobMode"  # the schema takes any text
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 0
    words = dict(word.split("=", 1) for word in spec["entrypoint"].split() if "=" in word)
    group = cluster_spec("rayjob")["workerGroupSpecs"][0]
    assert int(words["resources.workers"]) <= group["maxReplicas"]
    assert words["cohort"].startswith("/data/")
    assert words["run"].startswith("/data/")
