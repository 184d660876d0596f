"""What a prepared corpus holds; the one file that readers of it trust."""

from typing import Literal

from shearing.config import Config
from shearing.storage import Store

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
Split = Literal["eval", "prune", "train"]
SPLITS: tuple[Split, ...] = ("eval", "prune", "train")


class ShardEntry(Config):
    """One Parquet file. Columns: `sequence_id` int64, unique in domain and split; `tokens` fixed-size list [T]."""

    path: str
    sequences: int
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
    path: str
    line: int
    problem: str


class Manifest(Config):
    """The whole corpus. `fingerprint` names what went in: raw files, tokenizer and every setting that shapes the output."""

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
