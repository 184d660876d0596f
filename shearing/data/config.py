"""What a recipe says about text: where it lies, how it becomes sequences, how domains are mixed."""

import difflib
import re
from typing import Literal

from pydantic import Field, field_validator

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


_FOLDER_NAME = re.compile(r"\w[\w.-]*")


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

    @field_validator("domains")
    @classmethod
    def _names_of_folders(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        if wrong := [name for name in domains if not _FOLDER_NAME.fullmatch(name)]:
            raise ValueError(
                f"domains give their names to folders and metrics; {', '.join(map(repr, wrong))} will not do. Allowed: "
                "letters, digits, '_', '-' and '.', with a letter, a digit or '_' first."
            )
        return domains


class ReferencesConfig(Config):
    """Where the reference loss of each domain comes from, in nats a token."""

    kind: Literal["source", "scaling_law", "values", "file"] = "source"
    values: dict[str, float] | None = None
    file: str | None = Field(None, description="YAML: domain losses (file), or parameters and losses (scaling_law)")
    bounded: bool = Field(True, description="scaling_law only: hold the irreducible loss at or above zero")


LOSS_RULES = ("sheared", "sheared_unclipped", "dro", "exp3")
"""Rules that look at losses."""

STILL_RULES = ("static", "uniform", "temperature")
"""Rules whose proportions never move."""

RULE_WORDS = (*STILL_RULES, *LOSS_RULES)
_RULE_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

LossFrom = Literal["eval", "train"]


class DroConfig(Config):
    """Rule `dro` only: a chi-square ball around a slowly moving centre (DRPruning, arXiv 2411.14055)."""

    rho: float = Field(0.1, gt=0, description="Radius of the ball: half the mean squared relative change")
    smallest_ratio: float = Field(0.2, ge=0, lt=1, description="A proportion is at least this share of the centre's")
    centre_step: float = Field(0.1, ge=0, le=1, description="How far the centre follows the proportions at an update")
    centre_factor: float = Field(2.0, ge=1, description="The centre stays within prior / this and prior * this")


class MixtureConfig(Config):
    """How losses move the proportions (dynamic batch loading, arXiv 2310.06694, Algorithm 1)."""

    rule: str = Field(
        "sheared", description=f"{', '.join(RULE_WORDS)}, or a Python function as package.module:function"
    )
    loss_from: LossFrom = Field(
        "eval", description="Held-out evaluation, or the loss on training batches gathered since the last update"
    )
    temperature: float = Field(
        5.0, gt=0, description="Rule temperature only: proportions go as prior^(1/temperature) (arXiv 1907.05019)"
    )
    dro: DroConfig = DroConfig()
    floor: float = Field(0.0, ge=0, lt=1, description="No proportion falls below this")
    cap: float = Field(1.0, gt=0, le=1, description="No proportion rises above this")
    prior_pull: float = Field(0.0, ge=0, lt=1, description="Weight of the prior in each new set of proportions")
    on_exhausted: Literal["next_epoch", "stop"] = "next_epoch"

    @field_validator("rule")
    @classmethod
    def _known_or_a_path(cls, rule: str) -> str:
        if rule in RULE_WORDS or _RULE_PATH.fullmatch(rule):
            return rule
        near = difflib.get_close_matches(rule, RULE_WORDS, n=1)
        raise ValueError(
            f"no rule of that name; allowed: {', '.join(RULE_WORDS)}, or a Python function as package.module:function."
            + (f" Did you mean {near[0]}?" if near else "")
        )

    @property
    def is_path(self) -> bool:
        """Whether the rule is a Python function of the user's."""
        return self.rule not in RULE_WORDS

    def unsteered(self) -> "MixtureConfig":
        """The same mixture held at the prior, for a phase that has no reference losses yet."""
        return self.model_copy(update={"rule": "static"})
