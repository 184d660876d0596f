"""LoRA by PEFT through the loop, against PEFT in a plain loop; adapters merged, kept apart, saved and resumed."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from phase_runs import largest_difference, run_phase
from plain_reference import plain_run
from tiny_models import TOKENS, VARIANTS, shapes_of, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from shearing.evaluation.throughput import disk_bytes, parameter_count
from shearing.models.family import family_of, shape_of
from shearing.models.loading import StoredTensors, load_model, model_tensors, read_config, write_model_directory
from shearing.models.parameters import adapter_sizes, projection_modules
from shearing.storage import open_store
from shearing.training.adapters import add_adapters, merged_tensors
from shearing.training.checkpoint import CheckpointReader
from shearing.training.config import LoraConfig
from shearing.training.export import ExportConfig, export_model

SAVED_AFTER = 3
LORA = {"rank": 4, "alpha": 6, "dropout": 0.1}


def adapted(tiny_run, lora=None, **changed):
    training = {"learning_rate": 1e-2} | changed.pop("training", {})
    return tiny_run.phase(lora=LORA | (lora or {}), training=training, **changed)


def trained_tensors(run):
    return {name: tensor for name, tensor in run.tensors.items() if "::" not in name}


class TestAgainstPlainPeft:
    @pytest.mark.parametrize(
        ("stage", "targets", "checkpointing", "taught"),
        [(1, ["attention", "mlp"], False, False), (2, ["mlp"], True, True), (3, ["attention", "mlp"], True, False)],
    )
    def test_one_rank_with_dropout(self, tiny_run, one_process, stage, targets, checkpointing, taught):
        # catches other fresh adapters, scaling or targets, dropout that is off or drawn anew under checkpointing, a
        # base that trains, and a gradient clip or norm over frozen weights
        engine = {"micro_batch_sequences": 8, "activation_checkpointing": checkpointing}
        training = {"steps": 4, "evaluate_every_steps": 100, "gradient_clip": 0.3}
        teacher = {"weight": 0.5, "temperature": 2.0, "teacher": tiny_run.tied} if taught else None
        phase = adapted(
            tiny_run,
            {"targets": targets},
            stage=stage,
            engine=engine,
            training=training,
            mixture={"rule": "static"},
            distillation=teacher,
        )
        run = one_process.run(run_phase, phase)[0]
        history, model, optimizer, _ = plain_run(phase)
        for report, expected in zip(run.of_kind("step"), history, strict=True):
            keys = ("loss", "gradient_norm", "divergence") if taught else ("loss", "gradient_norm")
            assert {k: report[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, abs=1e-5, rel=1e-5)
        plain = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
        assert set(trained_tensors(run)) == set(plain)
        for name, parameter in plain.items():
            torch.testing.assert_close(run.tensors[name], parameter.detach(), atol=2e-5, rtol=1e-4)
            moment = optimizer.state[parameter]["exp_avg"]
            torch.testing.assert_close(run.tensors[f"{name}::exp_avg"], moment, atol=1e-7, rtol=1e-3)

    def test_ranks_and_stages_are_one(self, tiny_run, two_processes):
        # catches adapters that differ between ranks or between a partitioned and a whole model; accumulation
        runs = {}
        for stage in (1, 2, 3):
            phase = adapted(tiny_run, {"dropout": 0.0}, stage=stage, mixture={"rule": "static"})
            runs[stage] = two_processes.run(run_phase, phase)[0]
        history, *_ = plain_run(phase)
        losses = [row["loss"] for row in history]
        for run in runs.values():
            assert [row["loss"] for row in run.of_kind("step")] == pytest.approx(losses, abs=1e-5)
            assert largest_difference(trained_tensors(run), trained_tensors(runs[1])) < 2e-5


@pytest.fixture(scope="module", params=[(1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")], ids=str)
def interrupted(request, tiny_run, two_processes, tmp_path_factory):
    """A whole run of two workers with dropout, its checkpoint on the way, and its phase."""
    stage, dtype = request.param
    folder = str(tmp_path_factory.mktemp("adapters") / "checkpoint")
    phase = adapted(tiny_run, stage=stage, dtype=dtype)
    return phase, two_processes.run(run_phase, phase, save_after=SAVED_AFTER, folder=folder), folder


class TestResumed:
    def test_by_the_same_workers(self, interrupted, two_processes):
        # catches fresh adapters kept in place of the saved ones, and dropout that does not go on as it would have
        phase, whole, folder = interrupted
        rest = two_processes.run(run_phase, phase, resume=folder)
        assert rest[0].history() == whole[0].history(after=SAVED_AFTER)
        assert largest_difference(rest[0].tensors, whole[0].tensors) == 0

    def test_only_adapters_are_saved(self, interrupted, tiny_run):
        # catches a base model in every checkpoint: gigabytes in place of megabytes
        _, whole, folder = interrupted
        files = [path for path in Path(folder).iterdir() if path.name.startswith("weights-")]
        names = {name for path in files for name in CheckpointReader(open_store(folder)).weights(path.name)}
        config = read_config(tiny_run.model)
        sizes = adapter_sizes(config, ("attention", "mlp"))
        assert names == set(whole[0].tensors)
        assert all(".lora_A.default." in name or ".lora_B.default." in name for name in names)
        numbers = 3 * LORA["rank"] * sum(rows + columns for rows, columns in sizes)
        assert 4 * numbers < sum(path.stat().st_size for path in files) < 4 * numbers + 40_000


def test_resumed_by_one_worker_on_another_stage(tiny_run, two_processes, one_process, tmp_path):
    """Catches adapters of one rank's, or shards of them, in the checkpoint; without dropout, which ranks draw apart."""
    folder = str(tmp_path / "checkpoint")
    phase = adapted(tiny_run, {"dropout": 0.0}, stage=3)
    whole = two_processes.run(run_phase, phase, save_after=SAVED_AFTER, folder=folder)[0]
    rest = one_process.run(run_phase, adapted(tiny_run, {"dropout": 0.0}, stage=1), resume=folder)[0]
    losses = [row["loss"] for row in whole.of_kind("step", after=SAVED_AFTER)]
    assert [row["loss"] for row in rest.of_kind("step")] == pytest.approx(losses, abs=1e-5)


@pytest.fixture(scope="module")
def finished(tiny_run, two_processes, tmp_path_factory):
    """The last checkpoint of a phase with adapters on attention and MLP, merged or not by its name."""
    (Path(tiny_run.tied) / "tokenizer.json").write_text("{}")
    found = {}
    for merge in (True, False):
        folder = str(tmp_path_factory.mktemp("finished") / "checkpoint")
        phase = adapted(tiny_run, {"merge": merge}, model=tiny_run.tied, training={"steps": 3})
        run = two_processes.run(run_phase, phase, save_after=3, folder=folder)[0]
        found[merge] = folder, run.of_kind("evaluation")[-1]["losses"]
    return found


def exported(tiny_run, finished, destination, *, merge, dtype="float32"):
    config = ExportConfig(
        checkpoint=finished[merge][0],
        source=tiny_run.tied,
        destination=str(destination),
        corpus=tiny_run.corpus,
        sequences_per_domain=5,
        batch_sequences=2,
        dtype=dtype,
    )
    return export_model(config)


TEXT = torch.arange(40).reshape(2, 20) % 97


class TestExported:
    def test_merged_is_unmerged(self, tiny_run, finished, tmp_path):
        # catches a wrong scaling, adapters of another module or transposed, and weights that were left as they were
        plain = exported(tiny_run, finished, tmp_path / "merged", merge=True)
        apart = exported(tiny_run, finished, tmp_path / "apart", merge=False)
        assert not (tmp_path / "merged/adapter_config.json").exists()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        base = AutoModelForCausalLM.from_pretrained(tiny_run.tied).eval()
        before = base(input_ids=TEXT).logits
        by_peft = PeftModel.from_pretrained(base, str(tmp_path / "apart")).eval()
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "apart").eval()
        ours = load_model(tmp_path / "apart")
        expected = merged(input_ids=TEXT).logits
        assert (before - expected).abs().max() > 0.01
        for model in (by_peft, stock, ours):
            torch.testing.assert_close(model(input_ids=TEXT).logits, expected, atol=1e-4, rtol=1e-4)
        assert plain["parameters"] == parameter_count(merged) == parameter_count(load_model(tiny_run.tied))
        assert apart["parameters"] == parameter_count(ours) == parameter_count(by_peft) > plain["parameters"]

    def test_apart_the_base_stays_as_it_was(self, tiny_run, finished, tmp_path):
        # catches a base that was written again, in another type or without its tokenizer, and a path to one machine
        uri = f"memory://adapters-{tmp_path.name}/model"
        exported(tiny_run, finished, uri, merge=False)
        store = open_store(uri)
        for path in Path(tiny_run.tied).iterdir():
            assert store.read_bytes(path.name) == path.read_bytes()
        names = {path.name for path in Path(tiny_run.tied).iterdir()}
        assert set(store.list()) == names | {"adapter_config.json", "adapter_model.safetensors"}
        assert json.loads(store.read_bytes("adapter_config.json"))["base_model_name_or_path"] == "."

    def test_in_bfloat16(self, tiny_run, finished, tmp_path):
        # catches a merge in eight bits, where most of a small update is lost
        exported(tiny_run, finished, tmp_path / "whole", merge=True)
        exported(tiny_run, finished, tmp_path / "rounded", merge=True, dtype="bfloat16")
        whole, rounded = StoredTensors(tmp_path / "whole"), StoredTensors(tmp_path / "rounded")
        assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)
        assert disk_bytes(tmp_path / "rounded") < 0.7 * disk_bytes(tmp_path / "whole")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [["attention"], ["attention", "mlp"]], ids=str)
def test_every_family_takes_adapters(variant, targets, tmp_path):
    """Catches a family's linear that adapters miss, a head or norm that they hit, and a count that leaves one out."""
    model = tiny_model(variant, shapes_of(variant)[-1])
    config = model.config.to_dict()
    inside = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in name]
    wanted = inside if "mlp" in targets else [n for n in inside if "attn" in n or "attention" in n]
    write_model_directory(tmp_path / "model", config, model_tensors(model))
    expected, lora = model(input_ids=TOKENS).logits, LoraConfig(rank=3, targets=targets)
    add_adapters(model, lora, seed=1)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected)  # B is zero
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0] for name in adapters} == set(wanted)
    sizes = adapter_sizes(config, targets)
    assert sum(parameter.numel() for parameter in adapters.values()) == 3 * sum(map(sum, sizes))
    assert (
        len(sizes) == len(wanted) == shape_of(config).num_layers * len(projection_modules(family_of(config), targets))
    )
    with torch.no_grad():
        for number, parameter in enumerate(adapters.values()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    moved = model(input_ids=TOKENS).logits
    assert (moved - expected).abs().max() > 1e-3
    stored = StoredTensors(tmp_path / "model")
    merged = merged_tensors(stored, {n: p.detach() for n, p in adapters.items()}, lora, torch.float32)
    write_model_directory(tmp_path / "merged", config, merged)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(found, moved, atol=1e-4, rtol=1e-4)


def test_global_random_state_is_left_alone(tiny_run):
    """Catches adapters that are drawn from whatever came before them, and that move what is drawn after."""
    found = []
    for before in (1, 2):
        model = load_model(tiny_run.model)
        torch.manual_seed(before)
        add_adapters(model, LoraConfig(rank=4), seed=9)
        found.append(({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, torch.rand(3)))
    assert largest_difference(found[0][0], found[1][0]) == 0
    torch.manual_seed(2)
    assert torch.equal(found[1][1], torch.rand(3))
