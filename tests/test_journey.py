"""The whole journey by the real command: text and a model in, a smaller model and a report out."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from journeys import (
    GOLDEN,
    ROOT,
    SHARED,
    Journey,
    check_data_account,
    environment,
    largest_loss_difference,
    last_rows,
    redpajama_journey,
)

needs_sample = pytest.mark.skipif(
    not (SHARED / "data/redpajama_sample").exists() or not (SHARED / "golden/models/llama_gqa").exists(),
    reason="the sample in RedPajama's layout and the small golden model are not here",
)
LAYOUT = [
    "recipe.yaml", "stages.json", "metrics/pruning.jsonl", "metrics/recovery.jsonl", "mixture/pruning/000000.json",
    "mixture/recovery/000000.json", "pruned/config.json", "pruned/model.safetensors", "model/config.json",
    "model/model.safetensors", "model/tokenizer.json", "model/generation_config.json", "report/index.html",
    "report/report.json", "report/report.md",
]  # fmt: skip
STAGES = ["corpus", "source", "references", "pruning", "extraction", "recovery", "scores", "report"]

# What a user has who knows nothing of this project: transformers, pyarrow and the model's folder.
STOCK = """
import json, sys
import pyarrow.parquet as pq, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, shards, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
model.eval()
losses = {}
for domain, shard in shards.items():
    rows = torch.tensor(pq.read_table(shard).column("tokens").to_pylist()[:count])
    with torch.no_grad():
        losses[domain] = float(model(input_ids=rows, labels=rows).loss)
prompt = tokenizer("the ", return_tensors="pt")
text = tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0])
modules = [name for name in sys.modules if name.split(".")[0] in ("shearing", "actors", "orchestrator")]
print(json.dumps({"losses": losses, "text": text, "parameters": model.num_parameters(), "modules": modules,
                  "config": model.config.to_dict()}, default=str))
"""


def stock_transformers(journey: Journey, folder: str) -> dict:
    """What a fresh process without this project makes of a folder of the run."""
    corpus = Path(journey.json("stages/corpus.json")["outputs"]["path"])
    domains = json.loads((corpus / "manifest.json").read_text())["domains"]
    shards = {domain: str(corpus / splits["eval"]["shards"][0]["path"]) for domain, splits in domains.items()}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(journey.workspace / folder), json.dumps(shards), "4"],
        capture_output=True, text=True, cwd="/", env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_finished(journey: Journey, done: subprocess.CompletedProcess, target: dict[str, int]) -> None:
    """Everything that a finished run promises."""
    assert done.returncode == 0, done.stderr
    assert f"report  {journey.workspace}/report/index.html" in done.stdout
    for chatter in ("Traceback", "raylet", "worker processes have been started", "WARNING"):
        assert chatter not in done.stderr + done.stdout, f"{chatter!r} reached a quiet console"
    assert [name for name in LAYOUT if not (journey.workspace / name).is_file()] == []
    marks = {stage: journey.json(f"stages/{stage}.json") for stage in STAGES}
    assert all(mark["finished"] for mark in marks.values())
    proof = marks["extraction"]["outputs"]
    assert proof["agrees"], proof["largest_difference"]
    assert math.isclose(proof["proof"]["reloaded"]["mean"], proof["proof"]["exact_target"]["mean"], abs_tol=1e-5)
    check_report(journey, marks)
    found = stock_transformers(journey, "model")
    assert found["modules"] == []
    assert len(found["text"]) > 4
    assert {name: found["config"][name] for name in target} == target
    recovered = marks["scores"]["outputs"]["models"]["recovered"]
    assert found["parameters"] == recovered["parameters"]
    for domain, loss in found["losses"].items():
        assert math.isclose(loss, recovered["losses"][domain], abs_tol=2e-4), domain


def check_report(journey: Journey, marks: dict) -> None:
    """The report's figures are those of the metrics, as JSON lines hold them."""
    report = journey.json("report/report.json")
    for phase in ("pruning", "recovery"):
        rows = last_rows(journey.rows(phase), "step")
        steps = report["recipe"][phase]["steps"]
        batch = report["recipe"][phase]["global_batch_tokens"] // report["recipe"]["corpus"]["sequence_tokens"]
        check_data_account(journey.rows(phase), steps, batch, journey.checkpoints(phase)[-1])
        shown = report["phases"][phase]
        assert shown["steps"] == sorted(rows)
        assert shown["loss"] == [rows[step]["loss"] for step in sorted(rows)]
        for domain in rows[1]["drawn"]:
            assert shown["drawn"][domain] == [rows[step]["drawn"][domain] for step in sorted(rows)]
            assert shown["proportions"][domain] == [rows[step]["proportions"][domain] for step in sorted(rows)]
        assert shown["summary"]["tokens"] == steps * report["recipe"][phase]["global_batch_tokens"]
    assert report["scores"]["models"] == marks["scores"]["outputs"]["models"]
    assert report["references"]["losses"] == marks["references"]["outputs"]["losses"]
    assert {"pruning", "recovery"} <= set(report["replays"])
    for phase, replayed in report["replays"].items():
        assert replayed["differs_at"] is None, (phase, replayed["how"])
    # the model that recovery ended with is the one that was scored: its last evaluation saw the same sequences
    last = last_rows(journey.rows("recovery"), "evaluation")[report["recipe"]["recovery"]["steps"]]
    for domain, loss in last["losses"].items():
        assert math.isclose(loss, report["scores"]["models"]["recovered"]["losses"][domain], abs_tol=1e-4)


def check_nothing_is_done_again(journey: Journey, stages: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (journey.workspace / "stages").iterdir()}
    again = journey.run(timeout_s=60)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished already") == len(stages)
    assert all(f"] {stage}:" in again.stderr for stage in stages)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_small_text_and_a_model_trained_on_it(finished_journey):
    """Catches any seam between two stages that the tests of either side do not see."""
    journey, done = finished_journey
    target = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 64}
    check_finished(journey, done, target)
    events = [row for row in journey.rows("pruning") if row["kind"] == "event"]
    assert any("tables begins epoch 2" in row["text"] for row in events), "the small domain was meant to run out"
    check_nothing_is_done_again(journey, STAGES)


def test_a_workspace_holds_no_pickle(finished_journey):
    """Catches whatever could run code where a workspace is opened: Ray Train's and DeepSpeed's own files as well."""
    journey, _ = finished_journey
    files = [path for path in journey.workspace.rglob("*") if path.is_file()]
    assert {"checkpoints", "metrics", "model", "report"} <= {
        path.relative_to(journey.workspace).parts[0] for path in files
    }
    pickles = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
    assert [path for path in files if path.read_bytes()[:4].startswith((*pickles, b"PK\x03\x04"))] == []


def test_other_inputs_are_refused_in_a_workspace_that_has_work(finished_journey):
    """Catches a changed recipe that silently goes on from another one's checkpoint."""
    journey, _ = finished_journey
    done = journey.with_overrides("pruning.learning_rate=5e-3").run(timeout_s=60)
    assert done.returncode == 2
    assert "pruning.learning_rate: 0.001 -> 0.005" in done.stderr
    assert "Traceback" not in done.stderr


ARRANGEMENTS = [
    pytest.param(zero_stage, workers, marks=() if (zero_stage, workers) == (3, 2) else pytest.mark.slow)
    for zero_stage in (1, 2, 3)
    for workers in (1, 2)
]


@needs_sample
@pytest.mark.parametrize(("zero_stage", "workers"), ARRANGEMENTS)
def test_real_text_and_a_grouped_query_model(tmp_path_factory, zero_stage, workers):
    """RedPajama's layout and a model that this project did not make, under every ZeRO stage."""
    folder = tmp_path_factory.getbasetemp() / "arrangements"  # one prepared corpus for all
    folder.mkdir(exist_ok=True)
    workspace = folder / f"run-{zero_stage}-{workers}"
    engine = [f"engine.zero_stage={zero_stage}", f"engine.workers={workers}", f"workspace={workspace}"]
    journey = Journey(workspace, redpajama_journey(folder, *GOLDEN, *engine).arguments)
    target = {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    check_finished(journey, journey.run(), target)
    check_nothing_is_done_again(journey, STAGES)
    # The same sums in another arrangement: ZeRO stage and workers may change nothing but rounding.
    first = Journey(folder / "run-1-1", []).rows("pruning")
    assert largest_loss_difference(journey.rows("pruning"), first) < 1e-3


@pytest.mark.slow
@needs_sample
def test_real_text_as_its_recipe_has_it(tmp_path):
    """With a source model of its own and the comparison from nothing: the stages that a given model leaves out."""
    few = [f"source.train.{key}" for key in ("steps=8", "warmup_steps=1", "global_batch_tokens=1024")]
    journey = redpajama_journey(tmp_path, *few, "scratch={}", "engine.workers=2")
    target = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 128}
    check_finished(journey, journey.run(), target)
    scratch = journey.json("stages/scores.json")["outputs"]["models"]["scratch"]
    assert scratch["parameters"] == journey.json("stages/scores.json")["outputs"]["models"]["recovered"]["parameters"]


@pytest.mark.slow
@needs_sample
def test_another_family_with_a_teacher(tmp_path):
    """LayerNorms, learned positions and biases, by the words of a recipe: the mixture moved by training losses."""
    roads = [
        *GOLDEN,
        f"source.model={(SHARED / 'golden/models/opt').resolve()}",
        "pruning.target={num_layers: 3, hidden_size: 96, num_heads: 3, intermediate_size: 384}",
        "mixture={rule: dro, loss_from: train}",
        "recovery.distillation.weight=0.5",
    ]
    journey = redpajama_journey(tmp_path, *roads, "engine.workers=2", "engine.zero_stage=3")
    target = {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 3, "ffn_dim": 384}
    check_finished(journey, journey.run(), target)
    steps = last_rows(journey.rows("recovery"), "step")
    assert all(row["divergence"] > 0 for row in steps.values())
    assert [row["version"] for row in journey.rows("recovery") if row["kind"] == "mixture"]


@pytest.mark.slow
@needs_sample
@pytest.mark.parametrize("road", ["pruning.method=activation", "pruning.target={sparsity: 0.4}"])
def test_other_ways_to_choose_what_stays(tmp_path, road):
    """Units chosen without learning, and uneven layers: the same command, proof and report."""
    journey = redpajama_journey(tmp_path, *GOLDEN, road, "engine.workers=1")
    done = journey.run()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    extraction = journey.json("stages/extraction.json")["outputs"]
    assert extraction["agrees"], extraction["largest_difference"]
    assert extraction["parameters"]["target"] < extraction["parameters"]["source"]
    models = journey.json("stages/scores.json")["outputs"]["models"]
    assert models["recovered"]["parameters"] == extraction["parameters"]["target"]
    assert models["recovered"]["mean_loss"] < models["pruned"]["mean_loss"]
    check_nothing_is_done_again(journey, STAGES)


@pytest.mark.slow
@needs_sample
def test_the_same_by_a_submitted_job(cluster, tmp_path):
    """Catches what works only from a checkout: paths, imports, environment and handlers are another under a job."""
    journey = redpajama_journey(tmp_path, *GOLDEN, "engine.workers=2", "engine.zero_stage=2")
    words = ["python", "pipelines/shear.py", *(word.replace(f"{ROOT}/", "") for word in journey.arguments)]

    def submit(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["ray", "job", "submit", "--working-dir", ".", "--", *words, *more],
            env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip

    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joining the Ray cluster at" in done.stdout
    assert "succeeded" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    check_report(journey, {stage: journey.json(f"stages/{stage}.json") for stage in STAGES})
    assert stock_transformers(journey, "model")["text"]

    again = submit()
    assert again.returncode == 0
    assert again.stdout.count("finished already") == len(STAGES)

    wrong = submit("pruning.stepps=3")
    assert wrong.returncode != 0
    assert "did you mean pruning.steps?" in wrong.stdout
    assert "exit code 2" in wrong.stdout + wrong.stderr
