"""What tests of slicing share: tiny sources in directories, calibration text, and sliced results."""

from pathlib import Path

import torch
from tiny_models import TOKENS, VARIANTS, VOCABULARY, tiny_model

from shearing.models.families import FAMILIES
from shearing.models.loading import model_tensors, write_model_directory
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.driver import slice_model
from shearing.pruning.slicing.job import SharesHere

SLICEABLE = [variant for variant in VARIANTS if not FAMILIES[variant.split()[0]].post_norms]
TEXT = torch.randint(1, VOCABULARY, (10, 12), generator=torch.Generator().manual_seed(5))
GOLDEN = Path(__file__).parents[5] / "shared/golden"


def saved(folder, variant, shape, tied=False, dtype=torch.float32):
    model = tiny_model(variant, shape, tied, dtype)
    write_model_directory(
        folder, model.config.to_dict(), model_tensors(model), generation_config={"eos_token_id": None}
    )
    return folder


def shares(source, *texts, **options):
    return SharesHere(CalibrationShare(source, text, batch_sequences=4, **options) for text in texts or (TEXT,))


def sliced(source, folder, texts=(), on_layer=None, dtype=None, **settings):
    """The folder of the sliced model, and the report."""
    report = slice_model(
        source,
        folder / "sliced",
        folder / "work",
        SlicingConfig(**settings),
        shares(source, *texts),
        on_layer=on_layer,
        dtype=dtype,
        max_shard_bytes=20_000,
    )
    return folder / "sliced", report


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def difference(found, expected):
    """The largest difference, relative to the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
