"""What the exact target forces, said plainly. That the models agree is shown in test_export and test_choosing."""

import pytest
import torch
from phase_runs import TARGET, run_phase

from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader
from shearing.training.export import ExportConfig
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
