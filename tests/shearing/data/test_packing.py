import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearing.data.packing import Packer

DOCUMENTS = st.lists(st.lists(st.integers(1, 60_000), max_size=30), max_size=20)


@given(batches=st.lists(DOCUMENTS, max_size=5), sequence_tokens=st.integers(2, 17), first=st.booleans())
def test_rows_and_remainder_are_the_stream(batches, sequence_tokens, first):
    """Bugs: tokens lost or doubled at a row's end; the boundary is missing after some documents; batching matters."""
    packer = Packer(sequence_tokens, "uint16", 0, boundary_first=first)
    rows = [packer.add(batch) for batch in batches]
    expected = []
    for document in (document for batch in batches for document in batch):
        expected += [0, *document] if first else [*document, 0]
    packed = np.concatenate([row.reshape(-1) for row in rows] + [packer.remainder])
    assert packed.tolist() == expected
    assert packer.tokens == len(expected)
    assert len(packer.remainder) < sequence_tokens
    assert all(row.shape[1] == sequence_tokens and row.dtype == np.uint16 for row in rows)


def test_an_id_that_does_not_fit_is_refused():
    """Bug: ids beyond the type wrap round to other tokens without a word."""
    with pytest.raises(OverflowError):
        Packer(4, "uint16", 0, boundary_first=False).add([[70_000]])
