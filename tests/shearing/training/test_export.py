"""From checkpoints of real phases to directories that stock transformers opens."""

from pathlib import Path

import pytest
import torch
from phase_runs import SHAPE, TARGET, VOCABULARY, largest_difference, run_phase
from tiny_models import SQUARE, tiny_config
from transformers import AutoModelForCausalLM

from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.models.family import shape_of
from shearing.models.loading import load_model, model_tensors, new_model, read_config, write_model_directory
from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader
from shearing.training.export import (
    AGREEMENT_NATS,
    CheckpointTensors,
    ExportConfig,
    agreement,
    export_model,
    fill,
    with_mean,
)
from shearing.training.shrinking import extract_model


@pytest.fixture(scope="module")
def trained(tiny_run, two_processes, tmp_path_factory):
    """Checkpoints at the end of real phases of two workers: (phase, run of rank 0, folder) by name."""
    phases = {
        "train": tiny_run.phase(stage=3, training={"steps": 2}),
        "tied": tiny_run.phase(stage=2, training={"steps": 2}, model=tiny_run.tied),
        "masks": tiny_run.phase(pruning=True, stage=3),
        "tied masks": tiny_run.phase(pruning=True, stage=2, model=tiny_run.tied),
    }
    for folder in {phase.model for phase in phases.values()}:
        (Path(folder) / "tokenizer.json").write_text("{}")
    found = {}
    for name, phase in phases.items():
        folder = str(tmp_path_factory.mktemp("trained") / "checkpoint")
        steps = phase.training.steps
        found[name] = phase, two_processes.run(run_phase, phase, save_after=steps, folder=folder)[0], folder
    return found


def export_config(trained, name, destination, **changed):
    phase, _, checkpoint = trained[name]
    values = {
        "checkpoint": checkpoint,
        "source": phase.model,
        "destination": str(destination),
        "corpus": phase.corpus,
        "sequences_per_domain": 5,
        "batch_sequences": 2,
        "dtype": "float32",
        "pruning": phase.pruning,
    }
    return ExportConfig(**values | changed)


class TestExportModel:
    @pytest.mark.parametrize("name", ["train", "tied"])
    def test_round_trip(self, trained, tmp_path, name):
        # catches weights of the start, partitions in place of wholes, and an LM head lost where it is the embedding
        outputs = export_model(export_config(trained, name, tmp_path / "model"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        engine = {name: value for name, value in trained[name][1].tensors.items() if "::" not in name}
        assert largest_difference({n: p.detach() for n, p in model.named_parameters()}, engine) == 0
        source = load_model(trained[name][0].model)
        assert largest_difference({n: p.detach() for n, p in source.named_parameters()}, engine) > 1e-4
        assert outputs["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert (tmp_path / "model/tokenizer.json").exists()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")

    def test_in_bfloat16_to_a_remote_store(self, trained, tmp_path):
        # catches weights written in the checkpoint's float32, and destinations that must be local
        uri = f"memory://export-{tmp_path.name}/model"
        export_model(export_config(trained, "train", uri, dtype="bfloat16"))
        store = open_store(uri)
        (tmp_path / "copy").mkdir()
        for name in store.list():
            (tmp_path / "copy" / name).write_bytes(store.read_bytes(name))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        engine = trained["train"][1].tensors
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, engine[name].bfloat16())


@pytest.fixture(scope="module", params=["masks", "tied masks"])
def extracted(request, trained, tmp_path_factory):
    config = export_config(trained, request.param, tmp_path_factory.mktemp("extracted") / "model")
    return config, extract_model(config)


class TestExtractModel:
    def test_losses_agree(self, extracted):
        # catches gates folded twice or not at all, norms over the wrong dimensions, units left out of order
        config, outputs = extracted
        sequences = held_out_sequences(open_store(config.corpus), 5)
        reloaded = mean_losses(domain_loss_sums(load_model(config.destination), sequences, 2, "cpu"))
        proof = outputs["proof"] | {"reloaded": with_mean(reloaded)}
        verdict = agreement(proof, "float32")
        assert verdict["agrees"]
        assert verdict["largest_difference"] < 1e-5
        assert abs(proof["learned"]["mean"] - proof["exact_target"]["mean"]) > 1e-5
        assert set(proof["learned"]["domains"]) == {"a", "b", "c"}

    def test_learned_loss_is_the_last_evaluation(self, extracted, trained):
        # catches gates or weights of another step, and other held-out text than training evaluated on
        config, outputs = extracted
        run = next(run for _, run, folder in trained.values() if folder == config.checkpoint)
        expected = run.of_kind("evaluation")[-1]["losses"]
        assert outputs["proof"]["learned"]["domains"] == pytest.approx(expected, abs=1e-5)

    def test_directory_is_a_plain_model(self, extracted):
        # catches names, sizes or layer numbers that only our own loader understands
        config, outputs = extracted
        model, report = AutoModelForCausalLM.from_pretrained(config.destination, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert shape_of(model.config) == shape_of(read_config(config.source)).model_copy(update=TARGET)
        assert outputs["parameters"]["target"] == sum(parameter.numel() for parameter in model.parameters())
        text = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert text.shape == (1, 8)
        assert torch.isfinite(model(input_ids=text).logits).all()

    def test_kept_units(self, extracted):
        # catches figures for the report that are not what was cut
        _, outputs = extracted
        kept = outputs["kept"]
        assert len(kept["layer"]) == TARGET["num_layers"]
        assert len(kept["hidden"]) == TARGET["hidden_size"]
        assert [len(row) for row in kept["intermediate"]] == [TARGET["intermediate_size"]] * SHAPE.num_layers
        assert outputs["source_shape"] == SHAPE.model_dump()


FAMILY_TARGET = {"num_layers": 2, "hidden_size": 24, "num_heads": 3, "intermediate_size": 13}


@pytest.mark.parametrize(
    ("variant", "tied"), [("gemma3_text", True), ("olmo2", False), ("gpt_neox", False), ("opt", True)]
)
def test_every_kind_of_norm_and_projection_under_zero_3(variant, tied, tiny_run, two_processes, tmp_path):
    """Catches gated modules that need weights which lie on another worker, and names that only llama has."""
    config = tiny_config(variant, SQUARE, tied) | {"vocab_size": VOCABULARY}
    write_model_directory(tmp_path / "model", config, model_tensors(new_model(config, seed=5)))
    training = {"steps": 2, "evaluate_every_steps": 2, "target": FAMILY_TARGET}
    phase = tiny_run.phase(pruning=True, stage=3, model=str(tmp_path / "model"), training=training)
    checkpoint = str(tmp_path / "checkpoint")
    run = two_processes.run(run_phase, phase, save_after=2, folder=checkpoint)[0]
    export = export_config({variant: (phase, run, checkpoint)}, variant, tmp_path / "pruned")
    outputs = extract_model(export)
    assert outputs["proof"]["learned"]["domains"] == pytest.approx(run.of_kind("evaluation")[-1]["losses"], abs=1e-5)
    sequences = held_out_sequences(open_store(export.corpus), 5)
    reloaded = mean_losses(domain_loss_sums(load_model(export.destination), sequences, 2, "cpu"))
    verdict = agreement(outputs["proof"] | {"reloaded": with_mean(reloaded)}, "float32")
    assert verdict["largest_difference"] < 1e-5


class TestCheckpointTensors:
    def test_mapping(self, trained, monkeypatch):
        # catches moments taken for weights, and files that are read whole to learn what is in them
        monkeypatch.setattr(CheckpointReader, "weights", None)
        tensors = CheckpointTensors(CheckpointReader(open_store(trained["train"][2])), torch.bfloat16)
        engine = {name: value for name, value in trained["train"][1].tensors.items() if "::" not in name}
        assert set(tensors) == set(engine)
        assert len(tensors) == len(engine)
        monkeypatch.undo()
        assert all(torch.equal(tensors[name], engine[name].bfloat16()) for name in tensors)

    def test_fill_wants_every_weight(self, tiny_run):
        # catches a model that keeps some of its initial weights
        model = load_model(tiny_run.model)
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        with pytest.raises(KeyError, match="up_proj"):
            fill(model, tensors)


class TestAgreement:
    def proof(self, **losses):
        return {name: with_mean({"a": 1.0 + shift, "b": 3.0 - shift}) for name, shift in losses.items()}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_every_pair_and_domain_counts(self, dtype):
        # catches differences that cancel in the mean over domains, and a model that is compared with nothing
        limit = AGREEMENT_NATS[dtype]
        names = ("exact_target", "extracted", "reloaded")
        for name in names:
            shifts = dict.fromkeys(names, 0.0)
            assert agreement(self.proof(learned=5.0, **shifts | {name: 0.9 * limit}), dtype)["agrees"]
            verdict = agreement(self.proof(learned=0.0, **shifts | {name: 1.1 * limit}), dtype)
            assert not verdict["agrees"]
            assert verdict["largest_difference"] == pytest.approx(1.1 * limit, rel=1e-6)
            assert verdict["agreement_tolerance"] == limit

    def test_opposite_differences_add_up(self):
        # catches a comparison with one of the three only
        limit = AGREEMENT_NATS["float32"]
        shifts = {"exact_target": -0.6 * limit, "extracted": 0.0, "reloaded": 0.6 * limit}
        assert not agreement(self.proof(**shifts), "float32")["agrees"]

    @pytest.mark.parametrize("name", ["exact_target", "extracted", "reloaded"])
    def test_what_is_no_number_agrees_with_nothing(self, name):
        # catches a NaN that the largest of several losses passes over
        shifts = dict.fromkeys(("exact_target", "extracted", "reloaded"), 0.0)
        assert not agreement(self.proof(**shifts | {name: float("nan")}), "float32")["agrees"]
