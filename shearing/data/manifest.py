"""What a prepared corpus holds; the one file that readers of it trust."""

from typing import Literal

import numpy as np

from shearing.config import Config
from shearing.storage import Store

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
Split = Literal["eval", "prune", "train"]
SPLITS: tuple[Split, ...] = ("eval", "prune", "train")


class ShardEntry(Config):
    """One Parquet file. Columns: `sequence_id` int64, unique in domain and split; `tokens` fixed-size list [T].

    Its ids are those from `first_sequence_id` on, one for each of its sequences, in shuffled order.
    """

    path: str
    sequences: int
    first_sequence_id: int
    row_group_sequences: list[int]
    sha256: str
    file_bytes: int


class SplitEntry(Config):
    """One split of one domain. `tokens` are those in sequences; `dropped_tokens` did not fill a last one."""

    sequences: int
    tokens: int
    dropped_tokens: int = 0
    documents: int
    text_bytes: int
    shards: list[ShardEntry]


class SequencePlaces:
    """Where the sequences of a split stand among all of it, by their ids: the bits of a bitmap."""

    def __init__(self, split: SplitEntry) -> None:
        shards = sorted(split.shards, key=lambda shard: shard.first_sequence_id)
        self.first_S = np.array([shard.first_sequence_id for shard in shards], dtype=np.int64)
        self.size_S = np.array([shard.sequences for shard in shards], dtype=np.int64)
        self.start_S = np.cumsum(self.size_S) - self.size_S

    def of(self, sequence_ids_N: np.ndarray) -> np.ndarray:
        """Places in [0, sequences), int64 [N]. Raises ValueError for an id that is not of this split."""
        shard_N = np.searchsorted(self.first_S, sequence_ids_N, side="right") - 1
        within_N = sequence_ids_N - self.first_S[shard_N]
        if np.any(shard_N < 0) or np.any(within_N >= self.size_S[shard_N]):
            raise ValueError(f"sequence ids {sequence_ids_N.tolist()} are not all of this split")
        return self.start_S[shard_N] + within_N


class TokenizerEntry(Config):
    """The tokenizer that made the corpus; its files lie in the corpus under `tokenizer/`."""

    sha256: str
    vocab_size: int
    boundary_token_id: int


class SourceFile(Config):
    """Provenance of one raw file."""

    path: str
    domain: str
    file_bytes: int
    documents: int
    malformed: int


class MalformedLine(Config):
    """A line of raw text that was left out, counted from 1, and why."""

    path: str
    line: int
    problem: str


class Manifest(Config):
    """The whole corpus. `fingerprint` names all that went in: raw files, tokenizer and the settings that matter."""

    format_version: int = 1
    fingerprint: str
    sequence_tokens: int
    token_dtype: Literal["uint16", "int32"]
    tokenizer: TokenizerEntry
    domains: dict[str, dict[Split, SplitEntry]]
    sources: list[SourceFile]
    malformed: list[MalformedLine]
    malformed_lines: int
    lines: int


def load_manifest(corpus: Store) -> Manifest:
    """The manifest of a prepared corpus. Raises FileNotFoundError where preparation has not finished."""
    if not corpus.exists(MANIFEST_NAME):
        raise FileNotFoundError(f"{corpus.uri} holds no {MANIFEST_NAME}: prepare the corpus first")
    return Manifest.model_validate(corpus.read_json(MANIFEST_NAME))
