"""Rows read in process against the shards themselves."""

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from tiny_corpus import write_corpus

from shearing.data.manifest import load_manifest
from shearing.data.mixing import Draw
from shearing.data.order import SequenceOrder
from shearing.data.parquet_source import CorpusDamagedError, ParquetSource, read_unit
from shearing.data.source import make_orders
from shearing.errors import UserError
from shearing.storage import Store, open_store

SEQUENCES = {"wiki": 133, "code": 61}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, SEQUENCES)
    return open_store(str(folder))


def small_orders(corpus: Store, split: str = "train") -> dict[str, SequenceOrder]:
    """Orders with several units an epoch, unlike what the default unit would give so small a corpus."""
    manifest = load_manifest(corpus)
    return {d: SequenceOrder(d, manifest.domains[d][split], 11, unit_tokens=16 * 8 * 3) for d in SEQUENCES}


def test_rows_are_those_that_the_order_places(corpus):
    """Catches rows arranged by the wrong permutation, answered in another order, or of another split or epoch."""
    orders = small_orders(corpus)
    generator = np.random.default_rng(0)
    draws = [Draw(d, int(i)) for d in SEQUENCES for i in generator.integers(0, 3 * SEQUENCES[d], 200)]
    draws = [draws[i] for i in generator.permutation(len(draws))]
    rows = ParquetSource(corpus, orders).fetch(draws)
    assert rows.tokens_NT.shape == (400, 16)
    assert rows.tokens_NT.dtype == np.uint16
    tables = {}
    for n, draw in enumerate(draws):
        place = orders[draw.domain].locate(draw.index)
        table = tables.setdefault(place.shard, pq.read_table(corpus.locate(place.shard)))
        assert place.shard.startswith(f"{draw.domain}/train/")
        assert rows.sequence_ids_N[n] == table.column("sequence_id")[place.row].as_py()
        assert rows.tokens_NT[n].tolist() == table.column("tokens")[place.row].as_py()


def test_an_epoch_gives_every_sequence_id_once(corpus):
    source = ParquetSource(corpus, small_orders(corpus))
    for epoch in range(2):
        rows = source.fetch([Draw("wiki", epoch * 133 + i) for i in range(133)])
        assert sorted(rows.sequence_ids_N) == list(range(133))


def test_each_unit_is_read_once_by_a_reader_that_goes_on(corpus):
    """Catches a cache that thrashes: a shuffled batch over three units would read them again for each row."""
    source = ParquetSource(corpus, small_orders(corpus))
    generator = np.random.default_rng(1)
    for batch in np.arange(130).reshape(2, 65):
        source.fetch([Draw("wiki", int(i)) for i in generator.permutation(batch)])
    assert source.units_read == 6


def test_remote_filesystem_gives_the_same(corpus):
    """Catches a local path that slipped into reading; the sub-tree filesystem knows no absolute paths."""
    remote = Store(pafs.SubTreeFileSystem(corpus.path, pafs.LocalFileSystem()), "", "test:")
    assert not remote.is_local
    remote = Store(remote.filesystem, ".", "test:")
    draws = [Draw("wiki", i) for i in range(0, 130, 9)]
    here, there = (ParquetSource(store, small_orders(corpus)).fetch(draws) for store in (corpus, remote))
    assert np.array_equal(here.tokens_NT, there.tokens_NT)


def test_damaged_shard_is_named(tmp_path):
    write_corpus(tmp_path, {"wiki": 40})
    corpus = open_store(str(tmp_path))
    order = SequenceOrder("wiki", load_manifest(corpus).domains["wiki"]["train"], 1)
    whole = pq.read_table(tmp_path / "wiki/train/00000.parquet")
    pq.write_table(whole.slice(0, 37), tmp_path / "wiki/train/00000.parquet", row_group_size=8)
    with pytest.raises(CorpusDamagedError, match="hold 37 sequences, the manifest says 40"):
        read_unit(corpus, order.unit(0))


def test_missing_and_empty_domains_come_at_once(tmp_path):
    manifest = write_corpus(tmp_path, {"wiki": 40, "code": 0})
    with pytest.raises(UserError) as caught:
        make_orders(manifest, "train", ["wiki", "book", "code"], 1)
    assert [p.split(" ")[1] for p in caught.value.problems] == ["book", "code"]
