"""A prepared corpus of a few random sequences, written by hand so that readers are checked against the format."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shearing.data.manifest import Manifest, ShardEntry, SplitEntry, TokenizerEntry
from shearing.storage import Store


def write_tiny_corpus(corpus: Store, sequences: dict[str, list[int]], tokens: int = 16, vocabulary: int = 40):
    """`sequences`: domain -> sequences of each eval shard. Returns domain -> all tokens [N, T]."""
    draw = np.random.default_rng(5)
    domains, everything = {}, {}
    for domain, shard_sizes in sequences.items():
        shards, rows = [], []
        for number, size in enumerate(shard_sizes):
            tokens_NT = draw.integers(vocabulary, size=(size, tokens), dtype=np.uint16)
            array = pa.FixedSizeListArray.from_arrays(pa.array(tokens_NT.reshape(-1)), tokens)
            ids = pa.array(np.arange(size, dtype=np.int64) + sum(map(len, rows)))
            path = f"{domain}/eval/{number:05d}.parquet"
            corpus.filesystem.create_dir(corpus.locate(f"{domain}/eval"), recursive=True)
            table = pa.table({"sequence_id": ids, "tokens": array})
            pq.write_table(table, corpus.locate(path), row_group_size=2, compression="zstd")
            shards.append(
                ShardEntry(
                    path=path,
                    sequences=size,
                    first_sequence_id=sum(map(len, rows)),
                    row_group_sequences=[2],
                    sha256="0",
                    file_bytes=corpus.size(path),
                )
            )
            rows.append(tokens_NT)
        count = sum(shard_sizes)
        entry = SplitEntry(sequences=count, tokens=count * tokens, documents=count, text_bytes=99, shards=shards)
        domains[domain] = {"eval": entry}
        everything[domain] = np.concatenate(rows) if rows else np.zeros((0, tokens), np.uint16)
    manifest = Manifest(
        fingerprint="ab" * 8,
        sequence_tokens=tokens,
        token_dtype="uint16",
        tokenizer=TokenizerEntry(sha256="1", vocab_size=vocabulary, boundary_token_id=0),
        domains=domains,
        sources=[],
        malformed=[],
        malformed_lines=0,
        lines=0,
    )
    corpus.write_json("manifest.json", manifest.model_dump())
    return everything
