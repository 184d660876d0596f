"""Slicing over Ray: the same model as in one process, also after a death in the middle."""

import os

import pytest
import torch
from journeys import ray_processes
from tiny_corpus import write_corpus
from tiny_models import GROUPED, VOCABULARY, tiny_model

from actors.slicing import SlicingSettings, slice_on_cluster
from shearing.data.calibration import calibration_tokens
from shearing.errors import UserError
from shearing.models.loading import StoredTensors, model_tensors, write_model_directory
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.driver import slice_model
from shearing.pruning.slicing.job import SharesHere
from shearing.storage import open_store

PROPORTIONS = {"wiki": 0.75, "code": 0.25}
SLICING = {"hidden_size": 16, "calibration": {"sequences": 7}}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Folders of a source model and a corpus, and the model that one process makes of them."""
    folder = tmp_path_factory.mktemp("slicing")
    write_corpus(folder / "corpus", {"wiki": 9, "code": 6}, sequence_tokens=12, vocab_size=VOCABULARY)
    model = tiny_model("llama", GROUPED)
    write_model_directory(folder / "source", model.config.to_dict(), model_tensors(model))
    text = calibration_tokens(open_store(str(folder / "corpus")), PROPORTIONS, 7, seed=3)
    shares = SharesHere([CalibrationShare(folder / "source", torch.from_numpy(text.astype("int64")))])
    slice_model(folder / "source", folder / "alone", folder / "work", SlicingConfig.model_validate(SLICING), shares)
    return folder, dict(StoredTensors(folder / "alone"))


def settings(material, folder, workers=2, **slicing):
    asked = SlicingConfig.model_validate(SLICING | slicing)
    return SlicingSettings(
        destination=f"{folder}/sliced",
        work=f"{folder}/work",
        slicing=asked,
        calibration={
            "source": str(material / "source"),
            "corpus": str(material / "corpus"),
            "proportions": PROPORTIONS,
            "sequences": asked.calibration.sequences,
            "engine": {"workers": workers, "cpus_per_worker": 0.5, "dtype": "float32", "micro_batch_sequences": 2},
            "seed": 3,
        },
    )


def largest_difference(folder, expected):
    """Of two models whose rotations may differ in the sign of a direction."""
    found = dict(StoredTensors(folder))
    assert found.keys() == expected.keys()
    return max(float((found[name].abs() - tensor.abs()).abs().max()) for name, tensor in expected.items())


def run(wanted, after=None):
    """Layers that were told of, sentences on losses; `after` is called with each layer's report."""
    layers, losses = [], []

    def on_layer(report, figures):
        assert figures["seconds"] > 0
        assert min(figures["driver_peak_bytes"], figures["worker_peak_bytes"]) > 2**20
        layers.append(report.layer)
        if after is not None:
            after(report)

    slice_on_cluster(wanted, on_layer, losses.append)
    return layers, losses


def test_workers_make_what_one_process_makes(ray_session, material, tmp_path):
    """Catches a share of the text that is left out, taken twice, or weighed by its worker."""
    folder, alone = material
    assert run(settings(folder, tmp_path)) == ([0, 1, 2], [])
    assert largest_difference(tmp_path / "sliced", alone) < 1e-4
    assert run(settings(folder, tmp_path)) == ([], []), "a stop in what comes after costs no layer"
    assert largest_difference(tmp_path / "sliced", alone) < 1e-4


def test_a_driver_that_died_goes_on_where_it_was(ray_session, material, tmp_path):
    """Catches finished layers that are sliced again, and a number of workers that a run is bound to for ever."""
    folder, alone = material

    def die(report):
        if report.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings(folder, tmp_path), die)
    assert not (tmp_path / "sliced").exists()
    with pytest.raises(UserError, match="started with another slicing"):
        run(settings(folder, tmp_path, hidden_size=8))
    assert run(settings(folder, tmp_path, workers=1)) == ([2], [])
    assert largest_difference(tmp_path / "sliced", alone) < 1e-4


def test_a_worker_that_died_is_replaced(ray_session, material, tmp_path):
    """Catches a covariance over the shares that are left, and a run that one lost machine ends."""
    folder, alone = material

    def kill_one(report):
        if report.layer == 0 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            ray_processes(os.getpid(), "CalibrationWorker")[0].kill()

    layers, losses = run(settings(folder, tmp_path), kill_one)
    assert layers == [0, 1, 2]
    assert "a worker died and all are started again" in losses[0]
    assert largest_difference(tmp_path / "sliced", alone) < 1e-4


def test_a_workspace_on_an_object_store(ray_session, material, tmp_path):
    """Catches work in progress that only this node has: after a move to another, all begins anew."""
    folder, alone = material
    uri = f"memory://slicing-{tmp_path.name}"

    def die(report):
        if report.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings(folder, uri), die)
    assert run(settings(folder, uri)) == ([2], [])
    store = open_store(uri)
    (tmp_path / "copy").mkdir()
    for name in store.list("sliced"):
        (tmp_path / "copy" / name).write_bytes(store.read_bytes(f"sliced/{name}"))
    assert largest_difference(tmp_path / "copy", alone) < 1e-4
