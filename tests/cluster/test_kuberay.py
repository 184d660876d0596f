"""Kubernetes resources: against KubeRay's schemas, and whether what they name is there."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from custom_resources import EXCERPT, ROOT, documents, monitoring, problems, resources
from ray._private import ray_constants

from orchestrator.recipe_loading import load_recipe

FILES = ("raycluster.yaml", "rayjob.yaml")
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
SCHEMAS = json.loads(EXCERPT.read_text())["schemas"]


def cluster_of(name):
    """The cluster's specification in a file."""
    spec = documents(name)[-1]["spec"]
    return spec.get("rayClusterSpec", spec)


def pods_of(name):
    cluster = cluster_of(name)
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "PodMonitor", "PrometheusRule"])
def test_schema(kind):
    """A field that the server drops without a word, or refuses. `custom_resources.py` does it with the whole CRDs."""
    assert problems(SCHEMAS[kind], resources()[kind]) == []


def test_the_schema_refuses_what_is_wrong():
    """Keeps the test above from passing on anything."""
    good = resources()["RayCluster"]
    for spoil in (
        lambda spec: spec.update(enableInTreeAutoscalling=True),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["workerGroupSpecs"][0].update(minReplicas="one"),
        lambda spec: spec["workerGroupSpecs"][1]["template"]["spec"]["containers"][0].update(volumemounts=[]),
        lambda spec: spec["headGroupSpec"].pop("template"),
    ):
        wrong = copy.deepcopy(good)
        spoil(wrong["spec"])
        assert problems(SCHEMAS["RayCluster"], wrong)


@pytest.mark.parametrize("name", FILES)
def test_what_is_named_is_there(name):
    """A pod that waits for ever for an account, a claim or a class that nobody made."""
    made = {(each["kind"], each["metadata"]["name"]) for each in documents(name)}
    for pod in pods_of(name):
        spec = pod["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in made
        assert ("PriorityClass", spec["priorityClassName"]) in made
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made
        (container,) = spec["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/shared", "/dev/shm"}
        assert container["resources"]["limits"] == container["resources"]["requests"], "a pod that may be evicted"


@pytest.mark.parametrize("name", FILES)
def test_secure_as_they_say(name):
    """A cluster without tokens, pods as root, workers that hold a key to the cluster's API, ports open to all."""
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    policies = [each["spec"] for each in documents(name) if each["kind"] == "NetworkPolicy"]
    (policy,) = policies
    assert all(rule["from"] for rule in policy["ingress"])
    own = policy["podSelector"]["matchLabels"]
    assert {"from": [{"podSelector": {"matchLabels": own}}]} in policy["ingress"], "pods that do not reach one another"
    for pod in pods_of(name):
        assert pod["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "a start takes 2 TiB of chown"
    # the pod that submits waits for ever where the policy does not let it in
    submitters = [documents(name)[-1]["spec"]["submitterPodTemplate"]] if name == "rayjob.yaml" else []
    for pod in (*pods_of(name), *submitters):
        assert own.items() <= pod["metadata"]["labels"].items()
        restricted(pod["spec"]["securityContext"], *(each["securityContext"] for each in pod["spec"]["containers"]))
    restricted(pods_of(name)[0]["spec"]["securityContext"], cluster["autoscalerOptions"]["securityContext"])
    (worker,) = (each for each in documents(name) if each["metadata"]["name"] == "shear-worker" and "value" not in each)
    assert worker["automountServiceAccountToken"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]


def restricted(pod, *containers):
    """Kubernetes' Pod Security Standards, level `restricted`, of security contexts. KubeRay's init containers have that
    of the Ray container; the autoscaler has its own."""
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == 1000, "a user that the image does not have"
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers:
        assert container == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_what_prometheus_is_given():
    """A monitor of no pod or port, rules that are not those which are tested, resources that are made twice."""
    monitor, rules = monitoring()
    assert rules["spec"] == yaml.safe_load((ROOT / "cluster" / "grafana" / "alerts.yml").read_text())
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for name in FILES:
        (policy,) = (each["spec"] for each in documents(name) if each["kind"] == "NetworkPolicy")
        assert [{"port": 8080}] in [rule.get("ports") for rule in policy["ingress"]]
        for pod in pods_of(name):
            assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            named = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
            assert {named.get(port) for port in ports} == {8080}


@pytest.mark.parametrize("name", FILES)
def test_a_pod_that_ends_leaves_time_for_a_checkpoint(name):
    """A variable that Ray knows no more, so that a large checkpoint gets Ray's own 30 s; a kill before its end."""
    for group in cluster_of(name)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (given_s,) = (float(each["value"]) for each in pod["containers"][0]["env"] if each["name"] == DRAIN)
        assert getattr(ray_constants, DRAIN) < given_s < pod["terminationGracePeriodSeconds"]


def test_both_files_have_the_same_cluster():
    """One of two copies that was mended alone."""
    one, other = (copy.deepcopy(cluster_of(name)) for name in FILES)
    pod = other["headGroupSpec"]["template"]["spec"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "recipe"]
    mounts = pod["containers"][0]["volumeMounts"]
    pod["containers"][0]["volumeMounts"] = [mount for mount in mounts if mount["name"] != "recipe"]
    assert one == other
    named = [[each for each in documents(name) if each["kind"] not in ("RayCluster", "RayJob", "ConfigMap")]
             for name in FILES]  # fmt: skip
    assert named[0] == named[1]


def test_the_jobs_recipe_is_a_recipe(tmp_path):
    """A key that was renamed, in a recipe that lies in a ConfigMap; a stop that is cut short."""
    (config,) = (each for each in documents("rayjob.yaml") if each["kind"] == "ConfigMap")
    assert config["metadata"]["name"] == documents("rayjob.yaml")[-1]["metadata"]["name"], "two runs with one recipe"
    (tmp_path / "recipe.yaml").write_text(config["data"]["recipe.yaml"])
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), [], needs=("pruning", "recovery"))
    assert recipe.workspace.startswith("/shared/")
    assert recipe.corpus.path.startswith("/shared/")
    job = documents("rayjob.yaml")[-1]["spec"]
    assert job["entrypoint"].endswith("pipelines/shear.py /recipe/recipe.yaml")
    assert float(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3
    workers = job["rayClusterSpec"]["workerGroupSpecs"]
    most = sum(group["maxReplicas"] for group in workers)
    assert recipe.engine.workers <= 8 * most, "more GPUs than the cluster may ever have"
    assert Path(recipe.source.model).is_absolute()
