"""The held-out sequences that losses and perplexities are measured on."""

from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq

from shearing.data.manifest import Split, load_manifest
from shearing.errors import UserError
from shearing.storage import Store


def held_out_sequences(corpus: Store, sequences_per_domain: int, split: Split = "eval") -> dict[str, np.ndarray]:
    """Sequences from all over each domain's split, in stored order: domain -> token ids [N, T], int64.

    A shard is a part of the raw files, in their order, and its sequences are shuffled: of each shard the first ones are
    taken, as many as its size is of the domain's. The same ones are read every time and for every model. A domain that
    has fewer gives all.

    Raises:
        FileNotFoundError: The corpus is not prepared.
        UserError: A domain holds no sequence in this split, or its shards hold fewer than the manifest says.
    """
    manifest = load_manifest(corpus)
    found = {}
    for domain, splits in manifest.domains.items():
        entry = splits.get(split)
        if entry is None or entry.sequences == 0:
            raise UserError(
                f"{domain} holds no sequence in its {split} split, so no loss can be measured on it; "
                f"give it more text or raise corpus.split.{split}"
            )
        wanted = min(sequences_per_domain, entry.sequences)
        parts: list[np.ndarray] = []
        for shard, count in zip(entry.shards, _spread([s.sequences for s in entry.shards], wanted), strict=True):
            parts += _first_rows(corpus, shard.path, count, manifest.sequence_tokens) if count else []
        tokens_NT = np.concatenate(parts)
        if len(tokens_NT) < wanted:
            raise UserError(
                f"{corpus.uri}: {domain}/{split} holds {len(tokens_NT)} of {wanted} sequences; prepare again"
            )
        found[domain] = tokens_NT
    return found


def _spread(sizes: list[int], wanted: int) -> list[int]:
    """How many of each shard's sequences are taken: of all, one after another, the middles of `wanted` equal parts."""
    middles = (2 * np.arange(wanted) + 1) * sum(sizes) // (2 * wanted)
    shards = np.searchsorted(np.cumsum(sizes), middles, side="right")
    return np.bincount(shards, minlength=len(sizes)).tolist()


def _first_rows(corpus: Store, shard: str, wanted: int, sequence_tokens: int) -> list[np.ndarray]:
    def read(stream: BinaryIO) -> list[np.ndarray]:
        parts: list[np.ndarray] = []
        file, missing = pq.ParquetFile(stream), wanted
        for group in range(file.num_row_groups):
            if missing <= 0:
                break
            column = file.read_row_group(group, columns=["tokens"]).column("tokens").combine_chunks()
            tokens_NT = column.flatten().to_numpy().astype(np.int64).reshape(-1, sequence_tokens)[:missing]
            parts.append(tokens_NT)
            missing -= len(tokens_NT)
        return parts

    return corpus.read_with(shard, read)
