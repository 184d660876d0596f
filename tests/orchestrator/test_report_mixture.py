"""What the report says of mixture and teacher: decisions decided again, what measuring cost, settings in words."""

import json

import pytest
import yaml
from example_workspace import write_example

from orchestrator.report import build_report
from orchestrator.report_contents import contents
from orchestrator.report_reading import read_run, without_nan
from orchestrator.report_verdict import verdict


def judged(store):
    """The report's numbers and facts, without its pictures."""
    report = without_nan(contents(read_run(store)))
    return report | {"verdict": verdict(report)}


def fact(report, key):
    return next(fact for fact in report["verdict"]["facts"] if fact["key"] == key)


def with_recipe(store, **sections):
    recipe = yaml.safe_load(store.read_bytes("recipe.yaml"))
    for section, values in sections.items():
        recipe[section] |= values
    store.write_bytes("recipe.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())


def test_decisions_are_replayed_and_a_changed_one_is_named(tmp_path):
    """Catches a history of the mixture that nobody can tell from an edited one."""
    store = write_example(tmp_path)
    report = judged(store)
    assert fact(report, "replay")["level"] == "good"
    assert "recovery: 11 versions equal" in fact(report, "replay")["value"]
    decision = store.read_json("mixture/recovery/000006.json")
    decision["state"]["losses"]["code"] += 0.5
    store.write_json("mixture/recovery/000006.json", decision)
    report = judged(store)
    assert report["replays"]["recovery"]["differs_at"] == 6
    assert report["replays"]["pruning"]["differs_at"] is None
    assert fact(report, "replay")["level"] == "warn"
    assert "recovery, version 6: code was given" in fact(report, "replay")["value"]


def test_a_rule_that_is_not_here_is_said_and_no_judgement(tmp_path):
    """A report may be written where the user's rule is not installed."""
    store = write_example(tmp_path)
    with_recipe(store, mixture={"rule": "rules_of_elsewhere:best"})
    report = judged(store)
    assert fact(report, "replay")["level"] == "info"
    assert "rules_of_elsewhere cannot be imported" in fact(report, "replay")["value"]


def test_what_evaluation_cost(tmp_path):
    """Catches repeated steps counted, and a share of the steps alone, which can pass 100 %."""
    store = write_example(tmp_path)
    report = judged(store)
    summary = report["phases"]["recovery"]["summary"]
    assert summary["evaluation_s"] == pytest.approx(11 * 1.1)
    assert summary["evaluation_share"] == pytest.approx(12.1 / (12.1 + 400 * 0.39))
    cost = fact(report, "evaluation")
    assert "recovery: 12.1\u202fs (7.2\u202f%)" in cost["value"]
    assert "Its losses moved the mixture" in cost["why"]
    with_recipe(store, mixture={"loss_from": "train"})
    assert "It only measured" in fact(judged(store), "evaluation")["why"]


def test_predicted_references_show_their_errors_and_warnings(tmp_path):
    """A mixture steered by a guess that looks like a measurement."""
    store = write_example(tmp_path)
    assert "references" not in [fact["key"] for fact in judged(store)["verdict"]["facts"]]
    mark = store.read_json("stages/references.json")
    mark["outputs"] |= {
        "kind": "scaling_law",
        "standard_errors": {"code": 0.0312},
        "warnings": ["domain tests: shallow"],
    }
    store.write_json("stages/references.json", mark)
    found = fact(judged(store), "references")
    assert "code 1.920 ± 0.031, headers 1.410, " in found["value"]
    assert "1 warning: domain tests: shallow." in found["why"]


def test_rule_and_teacher_in_words(tmp_path):
    store = write_example(tmp_path)
    assert "learned from a teacher" not in _page(store)
    with_recipe(store, mixture={"rule": "temperature", "cap": 0.5}, recovery={"distillation": {"weight": 0.25}})
    lines = store.read_bytes("metrics/recovery.jsonl").decode().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | {"divergence": 1 - row["step"] / 500} if row["kind"] == "step" else row for row in rows]
    store.write_bytes("metrics/recovery.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    page = _page(store)
    assert "the prior to the power of 1/5, never moved; none above 0.5" in page
    assert "0.75 cross-entropy + 0.25 KL to the source model" in page
    assert "went from 0.998 to 0.200 nats a token" in page


def test_adapters_in_words(tmp_path):
    """A reader who takes a LoRA recovery for full training compares what cannot be compared."""
    store = write_example(tmp_path)
    assert "lora" not in [found["key"] for found in judged(store)["verdict"]["facts"]]
    with_recipe(store, recovery={"steps": 400, "lora": {"rank": 16, "targets": ["mlp"]}})
    _page(store)
    assert fact(judged(store), "lora")["value"].startswith("rank 16, alpha 10, dropout 0.05 on every linear of mlp;")
    assert "added to the weights at the end" in store.read_bytes("report/report.md").decode()


def _page(store):
    build_report(store)
    return store.read_bytes("report/index.html").decode()
