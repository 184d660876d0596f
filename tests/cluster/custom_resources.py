"""Schemas of custom resources of Kubernetes: made strict for validation, and cut down to what a resource uses.

    python tests/cluster/custom_resources.py CRD_FOLDER CRD_FOLDER

writes `custom_resources.json` anew from the CRDs of checkouts of KubeRay (helm-chart/kuberay-operator/crds) and of the
Prometheus operator (example/prometheus-operator-crd), after having validated this repository's resources against the
whole of them.
"""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import yaml

ROOT = Path(__file__).parents[2]
EXCERPT = Path(__file__).with_suffix(".json")
KINDS = {
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}
CONSTRAINTS = (
    "type", "enum", "format", "minimum", "maximum", "pattern", "minItems", "maxItems", "minLength", "maxLength",
    "required", "x-kubernetes-int-or-string", "anyOf", "additionalProperties",
)  # fmt: skip


def documents(name):
    """The resources of one of our files."""
    return list(yaml.safe_load_all((ROOT / "cluster" / "kuberay" / name).read_text()))


def monitoring():
    """What the command in cluster/README.md hands to kubectl: `monitoring.yaml`, the alerts below its end."""
    readme = (ROOT / "cluster" / "README.md").read_text()
    (command,) = (line for line in readme.splitlines() if "cluster/kuberay/monitoring.yaml" in line and "|" in line)
    made, _, kubectl = command.rpartition("|")
    assert kubectl.split()[:2] == ["kubectl", "apply"]
    done = subprocess.run(["sh", "-c", made], cwd=ROOT, capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def resources():
    """Our custom resources by kind."""
    found = [*documents("raycluster.yaml"), *documents("rayjob.yaml"), *monitoring()]
    return {each["kind"]: each for each in found if each["kind"] in KINDS}


def schema_of(crd):
    """What version 1 of a CRD says of a whole object."""
    (version,) = (each for each in crd["spec"]["versions"] if each["name"] == "v1")
    return version["schema"]["openAPIV3Schema"]


def strict(schema):
    """The same with unknown keys refused: a server would drop them without a word."""
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key not in ("properties", "items", "anyOf")}
    if "properties" in schema:
        made["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and schema["properties"].keys() - {"metadata"}:
            made.setdefault("additionalProperties", False)
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


def excerpt(schema, value):
    """Of a schema the part that speaks of what `value` holds, without its prose."""
    made = {key: schema[key] for key in CONSTRAINTS if key in schema}
    if isinstance(value, dict) and "properties" in schema:
        made["properties"] = {
            name: excerpt(schema["properties"][name], inner)
            for name, inner in value.items()
            if name in schema["properties"]
        }
    if isinstance(value, list) and "items" in schema:
        parts = [excerpt(schema["items"], inner) for inner in value]
        made["items"] = parts[0] if parts else {}
        for part in parts[1:]:
            merge(made["items"], part)
    return made


def merge(schema, other):
    """Add what another excerpt of the same schema has more."""
    for name, inner in other.get("properties", {}).items():
        if name in schema.setdefault("properties", {}):
            merge(schema["properties"][name], inner)
        else:
            schema["properties"][name] = inner
    if "items" in other:
        merge(schema.setdefault("items", other["items"]), other["items"])


def problems(schema, resource):
    """Where a resource does not fit."""
    validator = jsonschema.Draft202012Validator(strict(schema))
    return [f"{'/'.join(map(str, each.path))}: {each.message}" for each in validator.iter_errors(resource)]


def main(*folders):
    """Validate against whole CRDs and write the excerpts."""
    schemas = {}
    for kind, resource in resources().items():
        (crd,) = (found for folder in folders if (found := Path(folder) / KINDS[kind]).exists())
        whole = schema_of(yaml.safe_load(crd.read_text()))
        assert not problems(whole, resource), problems(whole, resource)
        schemas[kind] = excerpt(whole, resource)
    about = (
        "Excerpts of the CRDs of KubeRay (github.com/ray-project/kuberay) and of the Prometheus operator "
        "(github.com/prometheus-operator/prometheus-operator), both under the Apache License 2.0: constraints of the "
        "fields that cluster/kuberay uses, without descriptions. Made by tests/cluster/custom_resources.py."
    )
    EXCERPT.write_text(json.dumps({"about": about, "schemas": schemas}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
