"""What a recipe can say about sparsity."""

import pytest
from pydantic import ValidationError

from shearing.pruning.sparsity.config import SparsityConfig


def test_a_fraction_belongs_to_unstructured():
    """A fraction of 0.7 asked for and half dropped."""
    assert SparsityConfig().dropped == SparsityConfig(pattern="unstructured").dropped == 0.5
    assert SparsityConfig(pattern="unstructured", fraction=0.7).dropped == 0.7
    with pytest.raises(ValidationError, match="Remove fraction, or set pattern=unstructured"):
        SparsityConfig(fraction=0.7)
