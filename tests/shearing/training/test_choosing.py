"""Every way of choosing, from the recipe's word to a directory that stock transformers opens."""

import pytest
import torch
from phase_runs import PROPORTIONS, SEQUENCES, SHAPE, TARGET

from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.models.family import shape_of
from shearing.models.loading import load_model, read_config
from shearing.pruning.config import PruningConfig
from shearing.storage import open_store
from shearing.training.choosing import ChoosingConfig, calibration_batches, choose_and_write, read_chosen_gates
from shearing.training.export import ExportConfig, agreement, with_mean
from shearing.training.shrinking import extract_model

METHODS = ("magnitude", "activation", "block_influence", "random")


def choosing(tiny_run, folder, method, **changed):
    (values := {"steps": 6, "global_batch_tokens": 256, "method": method, "target": TARGET}).update(changed)
    return ChoosingConfig(
        source=tiny_run.model,
        destination=str(folder),
        corpus=tiny_run.corpus,
        proportions=PROPORTIONS,
        batch_sequences=4,
        dtype="float32",
        pruning=PruningConfig(**values),
        seed=3,
    )


def extraction(config, folder):
    return ExportConfig(
        checkpoint=config.destination,
        source=config.source,
        destination=str(folder),
        corpus=config.corpus,
        sequences_per_domain=5,
        batch_sequences=2,
        dtype="float32",
        pruning=config.pruning,
    )


@pytest.fixture(scope="module", params=METHODS)
def chosen(request, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder.parent / "tokenizer.json").write_text("{}")
    config = choosing(tiny_run, folder / "chosen", request.param, keep={"layers": [2]})
    return config, choose_and_write(config), extraction(config, folder / "model")


class TestJourney:
    def test_gates_are_decided_and_exact(self, chosen):
        # catches scores in place of gates: what is between 0 and 1 would be folded into weights
        config, outcome, _ = chosen
        gates = read_chosen_gates(open_store(config.destination))
        assert {name: gate.unique().tolist() for name, gate in gates.items()} == {name: [0, 1] for name in gates}
        sizes = {name: set(gate.reshape(-1, gate.shape[-1]).sum(-1).tolist()) for name, gate in gates.items()}
        assert sizes == {"layer": {2}, "hidden": {24}, "head": {2}, "kv_head": {1}, "intermediate": {24}}
        assert gates["layer"][2] == 1  # forced to stay
        assert outcome["converged"]
        assert outcome["missed"] == []
        assert len(outcome["gaps"]["head"]) == 3

    def test_extracted_is_masked_is_reloaded(self, chosen):
        # catches gates of other units than those cut out
        config, _, export = chosen
        outputs = extract_model(export)
        sequences = held_out_sequences(open_store(config.corpus), 5)
        reloaded = mean_losses(domain_loss_sums(load_model(export.destination), sequences, 2, "cpu"))
        verdict = agreement(outputs["proof"] | {"reloaded": with_mean(reloaded)}, "float32")
        assert verdict["largest_difference"] < 1e-5
        assert outputs["proof"]["learned"] == outputs["proof"]["exact_target"]
        assert outputs["forced"] == {}
        assert shape_of(read_config(export.destination)) == SHAPE.model_copy(update=TARGET)
        gates = read_chosen_gates(open_store(config.destination))
        assert outputs["kept"]["layer"] == gates["layer"].nonzero().flatten().tolist()
        assert outputs["kept"]["hidden"] == gates["hidden"].nonzero().flatten().tolist()


def test_methods_choose_differently(tiny_run, tmp_path):
    # catches a word that is read and ignored
    found = []
    for method in METHODS:
        config = choosing(tiny_run, tmp_path / method, method)
        choose_and_write(config)
        found.append(read_chosen_gates(open_store(config.destination)))
    for i, one in enumerate(found):
        for other in found[:i]:
            assert any(not torch.equal(one[name], other[name]) for name in one)
    activation, influence = found[1], found[2]
    assert all(torch.equal(activation[name], influence[name]) for name in activation if name != "layer")


def test_calibration_text_is_of_all_domains(tiny_run, tmp_path):
    # catches calibration on the first domain only, on held-out text, or beyond what there is
    config = choosing(tiny_run, tmp_path, "activation", calibration={"sequences": 30})
    batches = list(calibration_batches(config))
    assert sum(len(batch) for batch in batches) == 30
    assert {batch.shape[1] for batch in batches} == {32}
    again = list(calibration_batches(config))
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))
    more = choosing(tiny_run, tmp_path, "activation", calibration={"sequences": 3 * sum(SEQUENCES.values())})
    assert sum(len(batch) for batch in calibration_batches(more)) == 3 * sum(SEQUENCES.values())
