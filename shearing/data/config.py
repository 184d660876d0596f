"""What a recipe says about text: where it lies, how it becomes sequences, how domains are mixed."""

from typing import Literal

from pydantic import Field

from shearing.config import Config


class DomainConfig(Config):
    """One domain of text and its share of the training mixture."""

    text: str | list[str] = Field(description="Paths, globs or URIs of .jsonl[.gz|.zst], .parquet or .txt files")
    proportion: float = Field(gt=0, le=1, description="Prior share of this domain in the mixture")


class SplitConfig(Config):
    """Fractions of documents held out; what is left is the `train` split."""

    eval: float = Field(0.02, gt=0, lt=1)
    prune: float = Field(0.10, gt=0, lt=1)


class TrainedTokenizerConfig(Config):
    """A byte-level BPE tokenizer learned from the corpus itself, for a source model trained from nothing."""

    vocab_size: int = Field(ge=300)
    sample_bytes_per_domain: int = Field(1_000_000, ge=1000)


class CorpusConfig(Config):
    """Raw text per domain, and how it is tokenised, packed and split."""

    path: str = Field(description="Folder or URI that holds prepared corpora; each has its own sub-folder")
    root: str | None = Field(None, description="Folder or URI that relative text paths start from; joined on loading")
    domains: dict[str, DomainConfig]
    sequence_tokens: int = Field(4096, ge=16)
    split: SplitConfig = SplitConfig()
    text_field: str = "text"
    boundary_token: Literal["eos", "bos"] = Field("eos", description="Stands between documents")
    section_characters: int | None = Field(
        None, ge=1000, description="Longer documents are cut into sections of about this length, each hashed to a split"
    )
    malformed_limit: float = Field(0.001, ge=0, lt=1, description="Share of lines that may be skipped as malformed")
    shard_sequences: int = Field(4096, ge=1)
    row_group_sequences: int = Field(64, ge=1)
    read_unit_bytes: int = Field(64 * 2**20, ge=2**16, description="Plain files are read in pieces of this size")


class ReferencesConfig(Config):
    """Where the reference loss of each domain comes from, in nats a token."""

    kind: Literal["source", "scaling_law", "values", "file"] = "source"
    values: dict[str, float] | None = None
    file: str | None = Field(None, description="YAML: domain losses (file), or parameters and losses (scaling_law)")
    bounded: bool = Field(True, description="scaling_law only: hold the irreducible loss at or above zero")


class MixtureConfig(Config):
    """How losses move the proportions (dynamic batch loading, arXiv 2310.06694, Algorithm 1)."""

    rule: Literal["sheared", "sheared_unclipped", "static", "uniform"] = "sheared"
    floor: float = Field(0.0, ge=0, lt=1, description="No proportion falls below this")
    cap: float = Field(1.0, gt=0, le=1, description="No proportion rises above this")
    prior_pull: float = Field(0.0, ge=0, lt=1, description="Weight of the prior in each new set of proportions")
    on_exhausted: Literal["next_epoch", "stop"] = "next_epoch"
