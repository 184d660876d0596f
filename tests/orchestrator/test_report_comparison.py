"""The page of a comparison says what was measured: differences, order, sizes, costs and the sentence on top."""

import json
import re

import pytest
from recipes_for_tests import tiny_recipe

from orchestrator.comparison_checks import comparison_recipe
from orchestrator.methods import METHODS, method_recipe, on_source
from orchestrator.recipe_loading import dump_recipe
from orchestrator.report_comparison import build_comparison
from orchestrator.source_model import inspect_source
from shearing.storage import open_store

WIKI, CODE = [2.0, 3.0, 4.0, 3.5], [1.0, 1.2]  # of the source; every other model is so much above it, a sequence each
ABOVE = {
    "learned/before": ([0.9, 0.8, 0.9, 1.0], [0.5, 0.7]),
    "learned/after": ([0.21, 0.19, 0.20, 0.22], [0.11, 0.09]),
    "slicegpt/before": ([0.5, 0.6, 0.5, 0.6], [0.3, 0.4]),
    "slicegpt/after": ([0.22, 0.18, 0.21, 0.23], [0.10, 0.10]),  # 0.0025 above learned: chance
    "sparsegpt_2_4/before": ([0.2, 0.3, 0.2, 0.3], [0.1, 0.2]),
    "sparsegpt_2_4/after": ([0.31, 0.29, 0.30, 0.32], [0.21, 0.19]),  # 0.1 above learned in each sequence
    "scratch/after": ([1.2, 1.1, 1.3, 1.2], [1.0, 1.1]),
}
NAMES = ("learned", "slicegpt", "sparsegpt_2_4", "scratch")
SECONDS = {"pruning": 30.0, "extraction": 5.0, "slicing": 12.0, "sparsifying": 9.0, "recovery": 40.0, "scratch": 41.0}


def entry(above, parameters=1000, not_zero=1000, text=None):
    losses = {
        "wiki": [a + b for a, b in zip(WIKI, above[0], strict=True)],
        "code": [a + b for a, b in zip(CODE, above[1], strict=True)],
    }
    means = {domain: sum(values) / len(values) for domain, values in losses.items()}
    return {
        "sequence_losses": losses,
        "losses": means,
        "mean_loss": sum(means.values()) / 2,
        "perplexity": {"wiki": 20.0, "code": 3.0},
        "parameters": parameters,
        "nonzero_parameters": not_zero,
        "disk_bytes": 2**20,
        "peak_memory_bytes": 2**21,
        "prefill_tokens_per_s": 200.0,
        "prefill_quartiles": [190.0, 210.0],
        "decode_tokens_per_s": 50.0,
        "decode_quartiles": [45.0, 55.0],
    } | ({"text": text} if text else {})


@pytest.fixture
def workspace(tmp_path):
    """A comparison whose methods have run and whose models are measured, as its stages leave it."""
    recipe = comparison_recipe(tiny_recipe(tmp_path))
    config = inspect_source(recipe.only("pruning")).config
    base = open_store(recipe.workspace)
    base.write_bytes("recipe.yaml", dump_recipe(recipe).encode())
    runs = {}
    for name in NAMES:
        run = on_source(
            name, method_recipe(name, recipe, config), base.uri, f"{base.uri}/source", {"wiki": 3, "code": 1}
        )
        store = open_store(run.workspace)
        runs[name] = store.uri
        store.write_bytes("recipe.yaml", dump_recipe(run).encode())
        for stage, seconds in SECONDS.items():
            if stage not in ("scratch", "recovery") or (stage == "scratch") == (name == "scratch"):
                store.write_json(f"stages/{stage}.json", {"stage": stage, "finished": 1.0, "seconds": seconds})
        phase = "scratch" if name == "scratch" else "recovery"
        rows = [{"kind": "step", "step": step, "tokens": 512 * step} for step in (1, 2, 20)]
        store.write_bytes(f"metrics/{phase}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        if name == "learned":
            store.write_bytes("metrics/pruning.jsonl", json.dumps(rows[1]).encode())
    models = {name: entry(above, *_counts(name)) for name, above in ABOVE.items()}
    models["source"] = entry(([0.0] * 4, [0.0] * 2), 2000, 2000)
    protocol = {
        "sequences_per_domain": 4, "sequence_tokens": 64, "split": "eval", "windows": "side by side",
        "bos_rule": "nothing before", "dtype": "float32", "load_batch_sequences": 1, "prompt_tokens": 32,
        "decode_tokens": 8, "repeats": 5, "device": "cpu", "threads": 1,
    }  # fmt: skip
    failed = {"cofi": ["its driver died"]}
    base.write_json("stages/methods.json", {"outputs": {"runs": runs, "failed": failed, "parameters": 1000}})
    base.write_json("stages/measures.json", {"outputs": {"models": models, "protocol": protocol}})
    return base


def _counts(name):
    return (2000, 1200) if "2_4" in name else (1000, 1000)


def test_differences_to_the_source_are_paired(workspace):
    """Standard errors of losses in place of those of differences: ten times too large here."""
    found = build_comparison(workspace)
    by_name = {method["name"]: method for method in found["methods"]}
    to_source = by_name["learned"]["after"]["to_source"]
    assert to_source["nats"] == pytest.approx((0.205 + 0.1) / 2)
    assert 0 < to_source["standard_error"] < 0.01
    assert by_name["scratch"]["before"] is None
    assert by_name["sparsegpt_2_4"]["nonzero_parameters"] == 1200


def test_the_sentence_on_top_names_the_best_and_who_cannot_be_told_from_it(workspace):
    """A winner by chance, or the loser: everything else on the page is read after this sentence."""
    said = build_comparison(workspace)["verdict"]
    before, large, after, larger = re.split(r"(?<=\.) (?=[A-Z])", said.replace("SparseGPT 2:4", "SparseGPT-2:4"))
    assert before.startswith("Before recovery, at 1,000 parameters or fewer, SliceGPT is best of 2: ")
    assert before.endswith("below learned shearing, which is more than noise.")
    assert large == "Larger ones before recovery: SparseGPT-2:4 2.312."  # 1,200 of them: no winner at 1,000
    assert after.startswith("After recovery, at 1,000 parameters or fewer, learned shearing is best of 3: 2.265 nats")
    # sqrt(0.01^2 / 4 + 0.02^2 / 2 / 2) / 2 by hand
    assert after.endswith("0.003 ± 0.006 below SliceGPT; within noise of it: SliceGPT.")
    assert larger == "Larger ones after recovery: SparseGPT-2:4 2.365."


def test_time_and_tokens_are_those_of_each_methods_own_stages(workspace):
    """Recovery counted as choosing, calibration forgotten, and the steps of a resumed phase counted twice."""
    costs = {method["name"]: (method["seconds"], method["tokens"]) for method in build_comparison(workspace)["methods"]}
    every = sum(SECONDS[stage] for stage in ("pruning", "extraction", "slicing", "sparsifying"))
    assert costs["learned"][0] == {"choosing": every, "recovery": 40.0}
    assert costs["scratch"][0]["recovery"] == 41.0
    assert costs["learned"][1] == {"calibration": 0, "mask_learning": 1024, "recovery": 10240}
    assert costs["slicegpt"][1] == {"calibration": 128 * 64, "mask_learning": 0, "recovery": 10240}
    assert costs["scratch"][1] == {"calibration": 0, "mask_learning": 0, "recovery": 10240}


def test_page_markdown_and_json_hold_the_same(workspace):
    found = build_comparison(workspace)
    assert json.loads(workspace.read_bytes("comparison/comparison.json")) == found
    text, page = (workspace.read_bytes(f"comparison/{name}").decode() for name in ("comparison.md", "index.html"))
    for method in found["methods"]:
        assert METHODS[method["name"]].title in text
        link = f'href="../methods/{method["name"]}/report/index.html"'
        assert (link in page) == ("2_4" not in method["name"]), "a link to a report that no stage writes"
        assert f"{method['after']['mean_loss']:.3f}" in text
        assert f"{method['after']['mean_loss']:.3f}" in page
    assert "its driver died" in text
    assert "its driver died" in page
    rows = [line.split(" | ")[0].strip("| ") for line in text.split("## After recovery")[1].splitlines() if "|" in line]
    assert rows[2:7] == ["source", "learned shearing", "SliceGPT", "SparseGPT 2:4", "from scratch"]
    assert page.count("<svg") == 3
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page), "the page loads nothing"


def test_perplexity_on_a_text_and_tasks_are_columns_where_they_were_measured(workspace):
    text = {"perplexity": 33.25, "protocol": {"file": "wiki.txt", "window_rule": "whole", "bos_rule": "none"}}
    protocol = {"harness": "lm-eval 0.4", "fewshot": None, "limit": 20}
    tasks = {"tasks": {"arc": {"metrics": {"acc": {"value": 0.25, "stderr": 0.01}}}}, "protocol": protocol}
    mark = workspace.read_json("stages/measures.json")
    for measured in mark["outputs"]["models"].values():
        measured |= {"text": text, "tasks": tasks}
    workspace.write_json("stages/measures.json", mark)
    build_comparison(workspace)
    table = workspace.read_bytes("comparison/comparison.md").decode().split("## After recovery")[1]
    assert "lm-eval 0.4, the first 20 questions of each, solved examples before each: as each task says." in table
    head, _, source, *_ = (line for line in table.splitlines() if line.startswith("|"))
    assert head.endswith("| text, perplexity | arc |")
    assert source.endswith("| 33.25 | acc 0.250 ± 0.010 |")
