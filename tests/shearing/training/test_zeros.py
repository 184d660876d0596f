"""Recovery of a sparse model: its zeros stay zeros under every ZeRO stage, over a resume, and in what is exported."""

import pytest
import torch
from phase_runs import largest_difference, run_phase

from shearing.models.loading import StoredTensors, read_config, write_model_directory
from shearing.pruning.sparsity.sparsegpt import TWO_OF_FOUR, magnitude
from shearing.training.export import ExportConfig, export_model

SAVED_AFTER = 2


@pytest.fixture(scope="module")
def sparse(tiny_run, tmp_path_factory):
    """The tiny model with two of four weights gone in every linear of its layers, and a row of its embedding."""
    tensors = dict(StoredTensors(tiny_run.model))
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensors[name] = magnitude(tensor, TWO_OF_FOUR)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][5:9] = 0
    folder = tmp_path_factory.mktemp("sparse") / "model"
    write_model_directory(folder, read_config(tiny_run.model), tensors.items(), tokenizer_folder=None)
    return str(folder), {name: tensor == 0 for name, tensor in tensors.items() if ".layers." in name}


def phase_of(tiny_run, sparse, **changed):
    # decay and a high rate: what moves a weight without a gradient would show
    training = {"weight_decay": 0.1, "learning_rate": 1e-2}
    return tiny_run.phase(model=sparse[0], training=training, **{"keep_zeros": True} | changed)


def filled(tensors, zeros):
    """How many weights that were 0 no longer are."""
    return sum(int((tensors[name][where] != 0).sum()) for name, where in zeros.items())


@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")])
def test_zeros_stay_and_all_else_is_trained(two_processes, tiny_run, sparse, stage, dtype):
    """A mask of gradients that misses a way in: decay, moments, a second rank's gradients, partitions of ZeRO 3."""
    run = two_processes.run(run_phase, phase_of(tiny_run, sparse, stage=stage, dtype=dtype))[0]
    assert filled(run.tensors, sparse[1]) == 0
    before = dict(StoredTensors(sparse[0]))
    for name, where in sparse[1].items():
        moved = (run.tensors[name] != before[name])[~where]
        assert moved.float().mean() > 0.9, name
    # rows of the embedding that happened to be 0 are no zeros of sparsity, and tokens 5 to 8 are read
    assert (run.tensors["model.embed_tokens.weight"][5:9] != 0).any()


def test_without_it_zeros_are_filled(two_processes, tiny_run, sparse):
    """That the test above can fail at all."""
    run = two_processes.run(run_phase, phase_of(tiny_run, sparse, keep_zeros=False))[0]
    assert filled(run.tensors, sparse[1]) > 1000


def test_over_a_resume_and_in_the_exported_model(two_processes, tiny_run, sparse, tmp_path):
    """Zeros that are read off once at the start would be lost with the process."""
    phase, folder = phase_of(tiny_run, sparse, stage=3), str(tmp_path / "checkpoint")
    whole = two_processes.run(run_phase, phase, save_after=SAVED_AFTER, folder=folder)[0]
    resumed = two_processes.run(run_phase, phase, resume=folder, save_after=6, folder=str(tmp_path / "end"))[0]
    assert filled(resumed.tensors, sparse[1]) == 0
    assert largest_difference(whole.tensors, resumed.tensors) < 1e-6
    config = ExportConfig(
        checkpoint=str(tmp_path / "end"),
        source=sparse[0],
        destination=str(tmp_path / "recovered"),
        corpus=tiny_run.corpus,
        sequences_per_domain=2,
        batch_sequences=2,
        dtype="bfloat16",
    )
    export_model(config)
    tensors = StoredTensors(tmp_path / "recovered")
    for name, where in sparse[1].items():
        assert torch.equal(tensors[name] == 0, where), name
