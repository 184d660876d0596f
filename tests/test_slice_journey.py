"""The whole way of a run that slices, over Ray: text and a model in, a narrower model and a report out."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from journeys import check_data_account, environment

from orchestrator.console import Console
from orchestrator.plan import plan
from orchestrator.preflight import preflight
from orchestrator.recipe_loading import load_recipe
from orchestrator.run import run_recipe

STAGES = ["corpus", "source", "references", "slicing", "recovery", "scores", "report"]
# What a user has who knows nothing of this project.
STOCK = """
import json, sys
import pyarrow.parquet as pq, torch
from transformers import AutoModelForCausalLM
folder, shards = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
losses = {}
for domain, shard in shards.items():
    rows = torch.tensor(pq.read_table(shard).column("tokens").to_pylist()[:4])
    with torch.no_grad():
        losses[domain] = float(model(input_ids=rows, labels=rows).loss)
text = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
modules = [name for name in sys.modules if name.split(".")[0] in ("shearing", "actors", "orchestrator")]
print(json.dumps({"losses": losses, "tokens": text.shape[1], "parameters": sum(p.numel() for p in model.parameters()),
                  "modules": modules}))
"""


class JoinedRay:
    """The Ray that the tests share, in place of one of the run's own."""

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def start(self, console):
        pass


@pytest.fixture(scope="module")
def sliced(ray_session, finished_journey, tmp_path_factory):
    """A run on the model that the sheared journey trained: its recipe, its folder, what the console said."""
    journey, _ = finished_journey
    workspace = tmp_path_factory.mktemp("sliced") / "run"
    overrides = [
        "source.train=null",
        f"source.model={journey.workspace}/source",
        f"workspace={workspace}",
        "slicing={hidden_size: 24, calibration: {sequences: 12}}",
        "recovery.lora={rank: 4, learning_rate: 5e-3, merge: false}",
        "recovery.steps=8",
        "recovery.checkpoint_every_steps=4",
    ]
    recipe = load_recipe(journey.arguments[0], overrides).only("slicing")
    assert preflight(recipe) == []
    stream = io.StringIO()
    run_recipe(recipe, Console(stream), JoinedRay())
    return recipe, workspace, stream.getvalue()


def outputs(workspace, stage):
    return json.loads((workspace / "stages" / f"{stage}.json").read_text())["outputs"]


def test_the_figures_hang_together(sliced):
    """Catches seams between slicing, recovery, scores and plan that the tests of either side do not see."""
    recipe, workspace, _ = sliced
    slicing, models = outputs(workspace, "slicing"), outputs(workspace, "scores")["models"]
    assert slicing["agrees"], slicing["largest_difference"]
    planned = {model.name: model for model in plan(recipe).models}
    assert models["sliced"]["parameters"] == planned["sliced"].parameters == slicing["parameters"]["target"]
    assert models["source"]["parameters"] == planned["source"].parameters
    adapters = models["recovered"]["parameters"] - models["sliced"]["parameters"]
    assert adapters == plan(recipe).phases[-1].checkpoint_bytes // 12 > 0
    assert outputs(workspace, "recovery")["parameters"] == models["recovered"]["parameters"]
    for domain, loss in slicing["proof"]["sliced"]["domains"].items():
        assert math.isclose(loss, models["sliced"]["losses"][domain], abs_tol=1e-5)
        assert math.isclose(
            slicing["proof"]["dense"]["domains"][domain], models["source"]["losses"][domain], abs_tol=1e-5
        )
    assert models["recovered"]["mean_loss"] < models["sliced"]["mean_loss"]
    assert "decode_tokens_per_s" in models["recovered"]
    assert not (workspace / "slicing").exists()
    assert not (workspace / "rotated").exists()


def test_every_token_of_recovery_is_read_once(sliced):
    _, workspace, _ = sliced
    rows = [json.loads(line) for line in (workspace / "metrics/recovery.jsonl").read_text().splitlines()]
    newest = sorted((workspace / "checkpoints/recovery").glob("step-*"))[-1]
    check_data_account(rows, 8, 8, newest)
    whole = sum(path.stat().st_size for path in newest.glob("weights-*"))
    assert whole < sum(path.stat().st_size for path in (workspace / "sliced").glob("*.safetensors"))


def test_console_metrics_and_report_tell_it(sliced):
    _, workspace, told = sliced
    rows = [json.loads(line) for line in (workspace / "metrics/slicing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < share <= 1 for row in rows for share in row["kept_variance"].values())
    assert [row["kept"] for row in rows] == [[24, 24], [24, 24], [24, 32]]
    assert all(f"layer {number} of 3: kept 24 and " in told for number in (1, 2, 3))
    report = json.loads((workspace / "report/report.json").read_text())
    levels = {fact["key"]: fact["level"] for fact in report["verdict"]["facts"]}
    assert {levels[key] for key in ("rotation", "recovery", "accounting", "replay")} == {"good"}
    assert [stage["state"] for stage in report["stages"]] == ["finished"] * 6
    assert "rank 4, alpha 10" in (workspace / "report/report.md").read_text()


def test_stock_software_runs_the_result(sliced):
    """Catches a directory that only this project loads, or that loads without the adapters that lie beside it."""
    _, workspace, _ = sliced
    corpus = Path(outputs(workspace, "corpus")["path"])
    domains = json.loads((corpus / "manifest.json").read_text())["domains"]
    shards = {domain: str(corpus / splits["eval"]["shards"][0]["path"]) for domain, splits in domains.items()}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(workspace / "model"), json.dumps(shards)],
        capture_output=True, text=True, cwd="/", env=environment(), timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    recovered = outputs(workspace, "scores")["models"]["recovered"]
    assert found["modules"] == []
    assert found["tokens"] == 8
    assert found["parameters"] == recovered["parameters"]
    for domain, loss in found["losses"].items():
        assert math.isclose(loss, recovered["losses"][domain], abs_tol=2e-4), domain


def test_nothing_is_done_again(sliced):
    recipe, workspace, _ = sliced
    before = {path: path.stat().st_mtime_ns for path in (workspace / "stages").iterdir()}
    stream = io.StringIO()
    run_recipe(recipe, Console(stream), JoinedRay())
    assert stream.getvalue().count("finished already") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before
