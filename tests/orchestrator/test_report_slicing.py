"""The report of a run that slices, on invented figures."""

import json

import pytest
import yaml
from example_workspace import DOMAINS, SOURCE, SOURCE_LOSS, write_example

from orchestrator.report import build_report

KEPT = [192] * 12 + [256]
LAYER = {"kind": "layer", "time": 0.0, "kept_variance": {"attention": 0.97, "mlp": 0.95}, "seconds": 2.0}
PEAKS = {"driver_peak_bytes": 300 * 2**20, "worker_peak_bytes": 200 * 2**20}


def sliced_outputs(**changed):
    def losses(extra):
        domains = {domain: loss + extra for domain, loss in SOURCE_LOSS.items()}
        return {"mean": sum(domains.values()) / len(domains), "domains": domains}

    return {
        "model": "sliced",
        "proof": {"dense": losses(0), "rotated": losses(1e-6), "sliced": losses(0.9)},
        "agrees": True,
        "largest_difference": 1e-6,
        "agreement_tolerance": 1e-4,
        "kept": KEPT,
        "kept_variance": [0.96] * 12 + [1.0],
        "source_shape": SOURCE,
        "parameters": {"source": 7_000_000, "target": 5_600_000, "residual": 560_000},
    } | changed


@pytest.fixture
def workspace(tmp_path):
    """What a sliced run leaves: marks of the other method's stages and its scores taken out."""

    def write(recovered=True, **changed):
        left_out = ("pruning", "extraction", "scratch") + (() if recovered else ("recovery",))
        store = write_example(tmp_path, leave_out=left_out)
        recipe = yaml.safe_load(store.read_bytes("recipe.yaml"))
        recipe |= {"pruning": None, "slicing": {"fraction": 0.25}, "scratch": None}
        recipe["recovery"] = recipe["recovery"] if recovered else None
        store.write_bytes("recipe.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())
        asked = ("corpus", "source", "references", "slicing", *["recovery"] * recovered, "scores", "report")
        store.write_json("stages.json", asked)
        mark = {"stage": "slicing", "inputs": "0", "started": 1.0, "finished": 2.0, "seconds": 9.0}
        store.write_json("stages/slicing.json", mark | {"outputs": sliced_outputs(**changed)})
        rows = [LAYER | PEAKS | {"step": step} for step in (1, 2, 2, 3, 4, 5, 6)]
        store.write_bytes("metrics/slicing.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        scores = store.read_json("stages/scores.json")
        models = scores["outputs"]["models"]
        models["sliced"] = models.pop("pruned")
        models.pop("scratch", None)
        if not recovered:
            models["sliced"] |= {key: models["recovered"][key] for key in models["recovered"] if "tokens_per_s" in key}
            models.pop("recovered")
        store.write_json("stages/scores.json", scores)
        return store

    return write


def facts(report):
    return {found["key"]: found for found in report["verdict"]["facts"]}


def test_everything_is_told(workspace):
    """Catches a report that speaks of masks, or leaves out what slicing did."""
    store = workspace()
    report = build_report(store)
    found = facts(report)
    assert found["rotation"]["level"] == "good"
    assert "undid" in found["recovery"]["why"]
    assert "of what slicing cost" in found["recovery"]["why"]
    assert found["slicing"]["value"].startswith("+0.900 nats a token")
    assert found["residuals"]["value"].startswith("10.0")
    assert found["cost"]["value"].startswith("12.0")
    assert found["accounting"]["level"] == "good"
    assert not {"target", "proof", "rounding", "scratch"} & set(found)
    assert [stage["stage"] for stage in report["stages"]] == [
        "corpus", "source", "references", "slicing", "recovery", "scores",
    ]  # fmt: skip
    assert report["shapes"]["target"]["hidden_size"] == 192
    assert report["slicing"]["signals"][3] == {"after": "layer 1, attention", "kept": 192, "kept_variance": 0.96}
    page, markdown = (store.read_bytes(f"report/{name}").decode() for name in ("index.html", "report.md"))
    for text in (page, markdown):
        for expected in ("Fused and rotated at full size", "layer 5, MLP", "96.00", "300.0", "Sliced, not healed"):
            assert expected in text, expected
    assert "rotating and slicing its residual stream" in page
    assert "560,000 of its parameters are matrices" in page
    for absent in ("Mask learning: sparsity", "Extraction", "undecided"):
        assert absent not in page.replace("extraction left it", "")
    assert "## Gates" not in markdown


def test_a_rotation_that_changes_the_model_is_the_headline(workspace):
    report = build_report(workspace(agrees=False, largest_difference=0.3))
    assert facts(report)["rotation"]["level"] == "bad"
    assert report["verdict"]["headline"] == "Do not rely on this model yet: rotation alone changes the model."


def test_a_result_larger_than_its_source_is_no_success(workspace):
    """Residual matrices can outweigh what slicing took; "25 % sliced" hides that."""
    report = build_report(workspace(parameters={"source": 5_000_000, "target": 5_600_000, "residual": 900_000}))
    assert facts(report)["size"]["level"] == "warn"


def test_without_recovery_the_sliced_model_is_the_result(workspace):
    report = build_report(workspace(recovered=False))
    assert "recovery" not in facts(report)
    assert "On held-out text the result has a loss of" in report["verdict"]["summary"]
    assert "speed" in facts(report)
    assert report["verdict"]["level"] != "open"


def test_one_rotation_for_all_has_one_share(workspace):
    """Catches a table of a share for every signal where only their mean is known."""
    parameters = {"source": 7_000_000, "target": 5_000_000, "residual": 0}
    store = workspace(kept=[192] * 13, kept_variance=[0.93], parameters=parameters)
    report = build_report(store)
    assert {row["kept_variance"] for row in report["slicing"]["signals"]} == {None}
    assert report["slicing"]["kept_variance"] == 0.93
    assert "The result is a plain dense model" in store.read_bytes("report/index.html").decode()
    assert set(DOMAINS) == set(report["slicing"]["proof"]["dense"]["domains"])


def test_a_run_that_has_not_sliced_yet_is_open(workspace):
    store = workspace()
    store.delete("stages/slicing.json")
    report = build_report(store)
    assert report["slicing"] is None
    assert facts(report)["rotation"]["level"] == "open"
    assert "slicing" in report["verdict"]["headline"]


def test_a_recovery_beyond_the_source_is_said_so(workspace):
    """Catches "undid 1222 % of what slicing cost" where little was lost and training went on."""
    store = workspace()
    scores = store.read_json("stages/scores.json")
    scores["outputs"]["models"]["recovered"]["mean_loss"] = scores["outputs"]["models"]["source"]["mean_loss"] - 0.1
    store.write_json("stages/scores.json", scores)
    why = facts(build_report(store))["recovery"]["why"]
    assert "undid" not in why
    assert "below the source" in why
