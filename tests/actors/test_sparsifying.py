"""Zeros by shares whose sums are added: as by one share of all the text, also when it was stopped in between."""

import pytest
import torch
from tiny_models import MULTI_HEAD, VOCABULARY, tiny_model

from actors.calibration import CalibrationSettings
from actors.sparsifying import CalibrationOnCluster, SparsifyingSettings, _sparsify
from shearing.models.loading import StoredTensors, model_tensors, write_model_directory
from shearing.pruning.sparsity.calibration import CalibrationShare
from shearing.pruning.sparsity.config import SparsityConfig
from shearing.training.config import EngineConfig

TEXT_NT = torch.randint(1, VOCABULARY, (12, 10), generator=torch.Generator().manual_seed(5))


class SharesInOneProcess:
    """What workers do, without workers; stops before a call that it is told of."""

    def __init__(self, source, texts, stop_before=None):
        self.shares = [CalibrationShare(source, text, batch_sequences=3) for text in texts]
        self.text, self.stop_before, self.calls = "the text", stop_before, []

    def map(self, method, *arguments):
        self.calls.append(method)
        if (method, arguments[:1]) == self.stop_before:
            raise KeyboardInterrupt
        return [getattr(share, method)(*arguments) for share in self.shares]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    model = tiny_model("llama", MULTI_HEAD)
    write_model_directory(folder, model.config.to_dict(), model_tensors(model))
    return folder


def sparsified(source, folder, shares, told=None):
    calibration = CalibrationSettings(
        source=str(source), corpus="", proportions={}, sequences=12, engine=EngineConfig(), seed=0
    )
    settings = SparsifyingSettings(
        destination=str(folder / "sparse"), work=str(folder / "work"), sparsifying=SparsityConfig(),
        calibration=calibration,
    )  # fmt: skip
    told = [] if told is None else told
    return _sparsify(
        settings, CalibrationOnCluster(shares), folder / "work", lambda: None, lambda *layer: told.append(layer)
    )


def test_shares_add_up_to_the_whole_text(source, tmp_path):
    """A Hessian of the first share alone, or shares that walk through different weights."""
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    one = sparsified(source, whole, SharesInOneProcess(source, [TEXT_NT]))
    told = []
    two = sparsified(source, parts, SharesInOneProcess(source, [TEXT_NT[0::2], TEXT_NT[1::2]]), told)
    assert one["zeros"] == two["zeros"] > 0
    assert [layer for layer, *_ in told] == [0, 1, 2]
    assert all(record.relative_error > 0 for _, records, _ in told for record in records.values())
    expected, found = StoredTensors(whole / "sparse"), StoredTensors(parts / "sparse")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_stopped_run_goes_on_at_its_last_finished_layer(source, tmp_path):
    """Layers that are pruned again, or text that does not pass the finished ones."""
    expected = sparsified(source, tmp_path / "whole", SharesInOneProcess(source, [TEXT_NT]))
    stopped = SharesInOneProcess(source, [TEXT_NT], stop_before=("hessians", (2,)))
    with pytest.raises(KeyboardInterrupt):
        sparsified(source, tmp_path / "again", stopped)
    going_on = SharesInOneProcess(source, [TEXT_NT])
    found = sparsified(source, tmp_path / "again", going_on)
    assert going_on.calls == ["embed", "follow", "follow", "hessians"]
    assert found == expected
    ours, theirs = StoredTensors(tmp_path / "again/sparse"), StoredTensors(tmp_path / "whole/sparse")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
