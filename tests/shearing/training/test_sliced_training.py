"""Sliced models in the engine that trains all others."""

import pytest
from sliced_zero import losses_under_zero_3
from tiny_models import shapes_of, tiny_config

from shearing.models.loading import model_tensors, new_model, write_model_directory
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import sliced_config


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_loads_partitioned_and_trains(variant, two_processes, tmp_path):
    """Catches sizes read from weights that lie on other ranks, and residual matrices that no rank gathers."""
    config = sliced_config(tiny_config(variant, shapes_of(variant)[0]), SlicingConfig(hidden_size=16))
    model = new_model(config, seed=1)
    write_model_directory(tmp_path / "model", config, model_tensors(model))
    for difference, losses, partitioned in two_processes.run(losses_under_zero_3, str(tmp_path / "model")):
        assert difference < 1e-5
        assert losses == sorted(losses, reverse=True)
        assert partitioned
