"""What the exact target forces, said plainly. That the models agree is shown in test_export and test_choosing."""

import pytest
import torch
from phase_runs import SHAPE, TARGET, run_phase

from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.models.family import shape_of
from shearing.models.loading import load_model, read_config
from shearing.models.parameters import prunable_parameters
from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader
from shearing.training.export import ExportConfig, agreement, export_model, with_mean
from shearing.training.shrinking import describe_forced, extract_model, forced_units


def extraction(phase, checkpoint, destination):
    return ExportConfig(
        checkpoint=checkpoint, source=phase.model, destination=str(destination), corpus=phase.corpus,
        sequences_per_domain=5, batch_sequences=2, dtype="float32", pruning=phase.pruning,
    )  # fmt: skip


class TestForced:
    def test_units_of_every_row(self):
        # catches gates of another value counted as changed, and rows that cancel
        learned = {"head": torch.tensor([[0.9, 0.2, 0.0], [0.3, 0.2, 0.1]]), "hidden": torch.tensor([0.9, 0.0])}
        exact = {"head": torch.tensor([[1.0, 0.2, 0.1], [0.3, 0.0, 0.0]]), "hidden": torch.tensor([0.8, 0.0])}
        assert forced_units(learned, exact) == {"head": [1, -2]}

    def test_sentence(self):
        text = describe_forced("head", {"units": [1, 0, -2], "nats": 0.25})
        assert "'head'" in text
        assert "closed 2 and opened 1 more than they had learned (layer 0: +1, layer 2: -2)" in text
        assert "cost +0.2500 nats a token" in text

    def test_cost_of_each_group(self, tiny_run, one_process, tmp_path):
        # catches a cost that is the whole target's, or of the other groups: with one group they are the same
        phase = tiny_run.phase(pruning=True, training={"target": {"intermediate_size": 24}})
        folder = str(tmp_path / "checkpoint")
        one_process.run(run_phase, phase, save_after=6, folder=folder)
        (tmp_path / "tokenizer.json").write_text("{}")
        outputs = extract_model(extraction(phase, folder, tmp_path / "model"))
        proof, forced = outputs["proof"], outputs["forced"]
        assert set(forced) == {"intermediate"}
        assert len(forced["intermediate"]["units"]) == 3
        assert max(forced["intermediate"]["units"]) < 0  # six steps close hardly any
        cost = proof["exact_target"]["mean"] - proof["learned"]["mean"]
        assert forced["intermediate"]["nats"] == pytest.approx(cost, abs=1e-6)
        assert abs(cost) > 1e-3


@pytest.mark.parametrize(
    "target",
    [
        {"num_layers": 2},
        {"hidden_size": 36},
        {"num_heads": 3},
        {"num_heads": 3, "num_kv_heads": 1},
        {"hidden_size": 36, "intermediate_size": 24},
    ],
    ids=["depth", "hidden", "queries", "kv_heads", "width"],
)
def test_any_subset_of_the_dimensions(tiny_run, one_process, tmp_path, target):
    # catches a group that only works beside another
    phase, folder = tiny_run.phase(pruning=True, training={"target": target, "steps": 2}), str(tmp_path / "last")
    one_process.run(run_phase, phase, save_after=2, folder=folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    config = extraction(phase, folder, tmp_path / "model")
    outputs = extract_model(config)
    sequences = held_out_sequences(open_store(config.corpus), 5)
    reloaded = mean_losses(domain_loss_sums(load_model(config.destination), sequences, 2, "cpu"))
    assert agreement(outputs["proof"] | {"reloaded": with_mean(reloaded)}, "float32")["largest_difference"] < 1e-5
    assert shape_of(read_config(config.destination)) == SHAPE.model_copy(update=target)


def test_forced_layers_hold_from_the_first_step_to_the_files(tiny_run, one_process, tmp_path):
    # catches lists that training, resuming or extraction forgets
    lists = {"keep": {"layers": [0]}, "drop": {"layers": [-2]}}
    phase = tiny_run.phase(pruning=True, training=lists)
    middle, last = str(tmp_path / "middle"), str(tmp_path / "last")
    whole = one_process.run(run_phase, phase, save_after=3, folder=middle)[0]
    rest = one_process.run(run_phase, phase, resume=middle, save_after=6, folder=last)[0]
    assert rest.history() == whole.history(after=3)
    (tmp_path / "tokenizer.json").write_text("{}")
    outputs = extract_model(extraction(phase, last, tmp_path / "model"))
    assert outputs["kept"]["layer"] == [0, 2]
    log_alpha = CheckpointReader(open_store(last)).arrays("gates")["gates:log_alpha.layer"]
    assert log_alpha[:2].tolist() == pytest.approx([4.60517, -4.60517], abs=1e-5)
    assert TARGET["num_layers"] == 2
    row = whole.of_kind("step")[-1]["sparsity"]["layer"]
    assert row["undecided"] <= 1
    assert 1 <= row["expected_units"][0] <= 2


@pytest.fixture(scope="module")
def shrunk(tiny_run, two_processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("overall")
    gates = {"sparsity_warmup_steps": 3, "learning_rate": 0.3, "extra_steps": 2}
    phase = tiny_run.phase(pruning=True, stage=3, training={"target": {"sparsity": 0.5}, "gates": gates})
    middle, last = str(folder / "middle"), str(folder / "last")
    whole = two_processes.run(run_phase, phase, save_after=3, folder=middle)[0]
    rest = two_processes.run(run_phase, phase, resume=middle, save_after=8, folder=last)[0]
    (folder / "tokenizer.json").write_text("{}")
    config = extraction(phase, last, folder / "model")
    return phase, whole, rest, config, extract_model(config)


class TestOverallSparsity:
    """CoFi from its first step to a recovered model, with weights that deepspeed trains."""

    def test_resumes(self, shrunk):
        # catches multipliers of groups in place of the one, or a count that starts anew
        _, whole, rest, *_ = shrunk
        assert rest.history() == whole.history(after=3)

    def test_one_constraint(self, shrunk):
        # catches groups that are held to targets of their own
        _, whole, *_ = shrunk
        row = whole.of_kind("step")[-1]["sparsity"]
        assert row["overall"]["target"] == 0.5
        assert {row[group]["target"] for group in row if group != "overall"} == {None}
        assert set(row) == {"overall", "hidden", "kv_head", "intermediate", "attention_layer", "mlp_layer"}
        assert row["overall"]["expected"] > whole.of_kind("step")[0]["sparsity"]["overall"]["expected"]
        assert {name for name in whole.gates if name.startswith("lagrangian:")} == {
            "lagrangian:linear.overall", "lagrangian:quadratic.overall"
        }  # fmt: skip

    def test_proof_and_budget(self, shrunk):
        # catches a loss of another model than the one saved, and one larger than asked for
        _, _, _, config, outputs = shrunk
        sequences = held_out_sequences(open_store(config.corpus), 5)
        reloaded = mean_losses(domain_loss_sums(load_model(config.destination), sequences, 2, "cpu"))
        assert agreement(outputs["proof"] | {"reloaded": with_mean(reloaded)}, "float32")["largest_difference"] < 1e-5
        left, whole = (prunable_parameters(read_config(folder)) for folder in (config.destination, config.source))
        assert 0.47 * whole < left <= 0.5 * whole
        assert outputs["parameters"]["target"] == sum(p.numel() for p in load_model(config.destination).parameters())

    def test_recovers(self, shrunk, tiny_run, two_processes, tmp_path):
        # catches an uneven model that no engine trains, or that is exported as an even one
        _, _, _, config, outputs = shrunk
        phase, folder = tiny_run.phase(stage=3, model=config.destination), str(tmp_path / "checkpoint")
        run = two_processes.run(run_phase, phase, save_after=6, folder=folder)[0]
        assert run.of_kind("evaluation")[0]["losses"] == pytest.approx(
            outputs["proof"]["extracted"]["domains"], abs=1e-4
        )
        assert run.of_kind("step")[-1]["loss"] < run.of_kind("step")[0]["loss"] + 0.1
        export = config.model_copy(
            update={"checkpoint": folder, "source": config.destination, "destination": str(tmp_path / "recovered")}
        )
        assert export_model(export)["parameters"] == outputs["parameters"]["target"]
        found = {name: parameter.detach() for name, parameter in load_model(export.destination).named_parameters()}
        assert all(torch.equal(found[name], run.tensors[name]) for name in found)
        assert (tmp_path / "recovered/modeling_uneven.py").exists()
