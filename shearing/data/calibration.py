"""The calibration text: what a method looks at that measures a model without training it."""

from collections.abc import Mapping

import numpy as np

from shearing.data.manifest import load_manifest
from shearing.data.mixing import MixState, plan_batch
from shearing.data.parquet_source import ParquetSource
from shearing.data.source import make_orders
from shearing.storage import Store


def calibration_tokens(corpus: Store, proportions: Mapping[str, float], sequences: int, seed: int) -> np.ndarray:
    """Token ids [N, T] of the prune split, from all domains by their proportions; the same ones for the same seed."""
    domains = list(proportions)
    draws, _ = plan_batch(MixState.start(domains), dict(proportions), sequences, seed, step=0)
    return ParquetSource(corpus, make_orders(load_manifest(corpus), "prune", domains, seed)).fetch(draws).tokens_NT
