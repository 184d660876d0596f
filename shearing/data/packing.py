"""Documents into sequences of one length, with the boundary token between documents and no token lost."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.integer[Any]]  # uint16 or int32


class Packer:
    """A stream of tokens cut into rows of `sequence_tokens`; what does not fill a row waits as the remainder.

    Args:
        sequence_tokens: T, tokens a row.
        dtype: `uint16` or `int32`.
        boundary_token_id: Goes before (`boundary_first`) or after each document, the last one too.
    """

    def __init__(self, sequence_tokens: int, dtype: str, boundary_token_id: int, boundary_first: bool) -> None:
        self._sequence_tokens = sequence_tokens
        self._dtype = np.dtype(dtype)
        self._boundary = boundary_token_id
        self._boundary_first = boundary_first
        self.remainder: TokenArray = np.empty(0, self._dtype)
        self.tokens = 0

    def add(self, documents: list[list[int]]) -> TokenArray:
        """Takes token ids of documents, in order; returns the rows [N, T] that are full now."""
        stream: list[int] = []
        for ids in documents:
            if self._boundary_first:
                stream.append(self._boundary)
                stream.extend(ids)
            else:
                stream.extend(ids)
                stream.append(self._boundary)
        return self.add_tokens(np.array(stream, self._dtype))

    def add_tokens(self, tokens: TokenArray) -> TokenArray:
        """Takes tokens that hold their boundaries already: the remainder of another packer."""
        self.tokens += len(tokens)
        stream = np.concatenate([self.remainder, tokens])
        rows = len(stream) // self._sequence_tokens
        used = rows * self._sequence_tokens
        self.remainder = stream[used:].copy()  # a view would keep the whole stream in memory
        return stream[:used].reshape(rows, self._sequence_tokens)
