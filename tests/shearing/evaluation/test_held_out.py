import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shearing.data.manifest import Manifest, ShardEntry, SplitEntry, TokenizerEntry
from shearing.errors import UserError
from shearing.evaluation.held_out import held_out_sequences
from shearing.storage import open_store

TOKENS = 6


@pytest.fixture
def corpus(tmp_path):
    store = open_store(str(tmp_path))
    domains = {}
    for domain, first in (("wiki", 0), ("code", 1000)):
        shards = []
        for number in range(2):
            tokens_NT = first + 100 * number + np.arange(5 * TOKENS, dtype=np.uint16).reshape(5, TOKENS)
            path = f"{domain}/eval/{number}.parquet"
            store.write_bytes(path, b"")
            array = pa.FixedSizeListArray.from_arrays(pa.array(tokens_NT.reshape(-1)), TOKENS)
            table = pa.table({"sequence_id": pa.array(range(5)), "tokens": array})
            pq.write_table(table, store.locate(path), row_group_size=2)
            shards.append(
                ShardEntry(
                    first_sequence_id=0,
                    path=path,
                    sequences=5,
                    row_group_sequences=[2, 2, 1],
                    sha256="",
                    file_bytes=store.size(path),
                )
            )
        entry = SplitEntry(sequences=10, tokens=60, documents=1, text_bytes=1, shards=shards)
        domains[domain] = {"eval": entry}
    manifest = Manifest(
        fingerprint="0",
        sequence_tokens=TOKENS,
        token_dtype="uint16",
        tokenizer=TokenizerEntry(sha256="", vocab_size=2000, boundary_token_id=0),
        domains=domains,
        sources=[],
        malformed=[],
        malformed_lines=0,
        lines=0,
    )
    store.write_json("manifest.json", manifest.model_dump())
    return store


@pytest.mark.parametrize(("wanted", "of_each"), [(1, (0, 1)), (3, (1, 2)), (4, (2, 2)), (7, (3, 4)), (10, (5, 5))])
def test_reads_the_first_rows_of_every_shard(corpus, wanted, of_each):
    """A domain judged by its first file alone, a row dropped at a row group's end, rows under another domain's name."""
    found = held_out_sequences(corpus, wanted)
    for domain, first in (("wiki", 0), ("code", 1000)):
        shards = [first + 100 * n + np.arange(30).reshape(5, 6) for n in range(2)]
        expected = np.concatenate([rows[:count] for rows, count in zip(shards, of_each, strict=True)])
        assert found[domain].dtype == np.int64
        assert np.array_equal(found[domain], expected)


def test_gives_all_where_there_are_fewer(corpus):
    """An error, or repeated rows, for a small domain."""
    assert {domain: len(rows) for domain, rows in held_out_sequences(corpus, 64).items()} == {"wiki": 10, "code": 10}


def test_says_which_domain_is_empty(corpus):
    """A domain silently left out of the mean."""
    manifest = corpus.read_json("manifest.json")
    manifest["domains"]["code"]["eval"] |= {"sequences": 0, "shards": []}
    corpus.write_json("manifest.json", manifest)
    with pytest.raises(UserError, match=r"code holds no sequence in its eval split"):
        held_out_sequences(corpus, 4)
