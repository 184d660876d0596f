"""What is a checkpoint and what is none; that real ones resume is shown in test_phase."""

import shutil

import pytest
from phase_runs import largest_difference, new_trainer, run_phase
from safetensors.torch import load_file, save_file

from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader, IncompleteCheckpointError
from shearing.training.phase import restore


@pytest.fixture(scope="module")
def saved(tiny_run, one_process, tmp_path_factory):
    """A checkpoint after one step of mask learning, and the run that wrote it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    phase = tiny_run.phase(pruning=True, stage=3)
    return folder, one_process.run(run_phase, phase, save_after=1, folder=str(folder), until=1)[0]


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "index.json")


class TestReader:
    def test_holds_what_the_engine_held(self, saved):
        # catches partitions in place of whole tensors, and moments under another weight's name
        reader = CheckpointReader(open_store(str(saved[0])))
        tensors = {}
        for file in reader.weight_files:
            tensors |= reader.weights(file)
        assert largest_difference(tensors, saved[1].tensors) == 0
        assert largest_difference(reader.arrays("gates"), saved[1].gates) == 0
        assert reader.state()["step"] == 1
        assert reader.arrays("nothing") == {}

    def test_without_an_index(self, copy):
        # catches a save that was cut short taken for a checkpoint
        (copy / "index.json").unlink()
        with pytest.raises(IncompleteCheckpointError, match=r"has no index\.json"):
            CheckpointReader(open_store(str(copy)))

    @pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
    def test_damaged_files(self, copy, damage):
        # catches each kind of file that nobody compares with the index
        assert {name.split("-")[0].split(".")[0] for name in files_of(copy)} == {
            "weights",
            "gates",
            "consumed",
            "state",
        }
        for name in files_of(copy):
            whole = (copy / name).read_bytes()
            if damage == "missing":
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(whole[:-1] if damage == "truncated" else whole + b"\n")
            with pytest.raises(IncompleteCheckpointError, match=f"{name} is missing or not {len(whole)} bytes long"):
                CheckpointReader(open_store(str(copy)))
            (copy / name).write_bytes(whole)
        CheckpointReader(open_store(str(copy)))


class TestLoading:
    def test_a_weight_that_is_not_there(self, tiny_run, one_process, copy):
        # catches a checkpoint of another model, whose missing weights would stay as they were
        file = next(copy.glob("weights-*"))
        tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
        save_file(tensors, file)
        store = open_store(str(copy))
        index = store.read_json("index.json")
        index["files"][file.name] = file.stat().st_size
        store.write_json("index.json", index)
        text = one_process.run(refused, tiny_run.phase(pruning=True, stage=3), str(copy))[0]
        assert "has no weights or moments for ['model.layers.1.mlp.up_proj.weight']" in text


def refused(rank, world, phase, folder):
    trainer = new_trainer(rank, world, phase)
    try:
        restore(trainer, CheckpointReader(open_store(folder)))
    except IncompleteCheckpointError as error:
        return str(error)
    return ""
