"""Writes small corpora by the corpus contract, without the code that prepares real ones."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shearing.data.manifest import MANIFEST_NAME, SPLITS, Manifest, ShardEntry, SplitEntry, TokenizerEntry
from shearing.storage import open_store


def token_rows(domain: str, split: str, ids: np.ndarray, sequence_tokens: int, vocab_size: int) -> np.ndarray:
    """Tokens [N, T] that tell their domain, split and sequence apart."""
    seed = int.from_bytes(hashlib.sha256(f"{domain}/{split}".encode()).digest()[:4], "big")
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, vocab_size, (int(ids.max()) + 1 if len(ids) else 0, sequence_tokens))
    return noise[ids]


def shard_sizes(sequences: int, shard_sequences: int) -> list[int]:
    """Rows of each shard; the last one is short."""
    return [min(shard_sequences, sequences - first) for first in range(0, sequences, shard_sequences)]


def write_corpus(
    folder: Path,
    sequences: dict[str, int],
    *,
    sequence_tokens: int = 16,
    shard_sequences: int = 40,
    row_group_sequences: int = 8,
    token_dtype: str = "uint16",
    vocab_size: int = 5000,
) -> Manifest:
    """A corpus whose every split of each domain holds that many sequences, with ids shuffled inside each shard."""
    domains: dict[str, dict] = {}
    for domain, count in sequences.items():
        domains[domain] = {}
        for split in SPLITS:
            shuffle, sizes = np.random.default_rng(count), shard_sizes(count, shard_sequences)
            ids = np.concatenate(
                [np.empty(0, int)] + [sum(sizes[:n]) + shuffle.permutation(size) for n, size in enumerate(sizes)]
            )
            tokens = token_rows(domain, split, ids, sequence_tokens, vocab_size).astype(token_dtype)
            shards, first = [], 0
            for number, rows in enumerate(shard_sizes(count, shard_sequences)):
                path = f"{domain}/{split}/{number:05d}.parquet"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                part = tokens[first : first + rows]
                column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), sequence_tokens)
                table = pa.table({"sequence_id": pa.array(ids[first : first + rows]), "tokens": column})
                pq.write_table(table, folder / path, row_group_size=row_group_sequences, compression="zstd")
                data = (folder / path).read_bytes()
                shards.append(
                    ShardEntry(
                        path=path,
                        sequences=rows,
                        first_sequence_id=first,
                        row_group_sequences=shard_sizes(rows, row_group_sequences),
                        sha256=hashlib.sha256(data).hexdigest(),
                        file_bytes=len(data),
                    )
                )
                first += rows
            domains[domain][split] = SplitEntry(
                sequences=count, tokens=count * sequence_tokens, documents=count, text_bytes=count, shards=shards
            )
    manifest = Manifest(
        fingerprint="0" * 64,
        sequence_tokens=sequence_tokens,
        token_dtype=token_dtype,
        tokenizer=TokenizerEntry(sha256="0" * 64, vocab_size=vocab_size, boundary_token_id=0),
        domains=domains,
        sources=[],
        malformed=[],
        malformed_lines=0,
        lines=0,
    )
    open_store(str(folder)).write_json(MANIFEST_NAME, manifest.model_dump())
    return manifest


def split_of_shards(*shards: tuple[int, int]) -> SplitEntry:
    """A split on paper, of shards of (first id, sequences)."""
    entries = [
        ShardEntry(
            path=str(first), sequences=n, first_sequence_id=first, row_group_sequences=[n], sha256="", file_bytes=1
        )
        for first, n in shards
    ]
    total = sum(n for _, n in shards)
    return SplitEntry(sequences=total, tokens=total, documents=1, text_bytes=1, shards=entries)
