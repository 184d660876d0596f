"""Sequences served through Ray Data against those read in process."""

import threading
import time

import numpy as np
import pytest
import ray
from tiny_corpus import write_corpus

from actors import feeder
from actors.feeder import FeedPlan, RayDataSource, SequenceFeeder, start_feeder
from shearing.data.manifest import load_manifest
from shearing.data.mixing import Draw, MixState, plan_batch
from shearing.data.parquet_source import ParquetSource
from shearing.data.source import Sequences, make_orders
from shearing.errors import UserError
from shearing.storage import open_store

SEQUENCES = {"wiki": 130, "code": 300, "book": 75}
SEED = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, SEQUENCES)
    return str(folder)


@pytest.fixture(scope="module")
def plain(corpus):
    store = open_store(corpus)
    return ParquetSource(store, make_orders(load_manifest(store), "train", SEQUENCES, SEED))


def plan_for(corpus: str, start: int = 0, end: int = 3000) -> FeedPlan:
    return FeedPlan(corpus, "train", SEED, dict.fromkeys(SEQUENCES, start), dict.fromkeys(SEQUENCES, end))


def equal(one: Sequences, other: Sequences) -> bool:
    return np.array_equal(one.tokens_NT, other.tokens_NT) and np.array_equal(one.sequence_ids_N, other.sequence_ids_N)


def batches(steps: int, state: MixState | None = None) -> list[list[Draw]]:
    """Global batches under proportions that change."""
    state, plans = state or MixState.start(list(SEQUENCES)), []
    generator = np.random.default_rng(3)
    for step in range(steps):
        proportions = dict(zip(SEQUENCES, generator.dirichlet([1, 1, 1]), strict=True))
        plan, state = plan_batch(state, proportions, 24, SEED, step)
        plans.append(plan)
    return plans


def test_two_ranks_get_what_the_parquet_reader_gets(ray_session, corpus, plain):
    """Over three epochs, at the same time, each rank at its own pace.

    Catches rows delivered out of order, mixed between ranks or domains, and a rank that waits for another.
    """
    actor = start_feeder(plan_for(corpus))
    plans = batches(90)
    failures: list[object] = []

    def rank(number: int) -> None:
        try:
            source = RayDataSource(actor)
            for step, plan in enumerate(plans):
                share = plan[number::2]
                if not equal(source.fetch(share), plain.fetch(share)):
                    failures.append((number, step))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    stats = ray.get(actor.stats.remote())
    assert stats["rows_served"] == 90 * 24
    assert stats["rebuilds"] == 0


def test_killed_feeder_goes_on_where_it_was_asked(ray_session, corpus, plain):
    """Catches state in the actor that matters: after a kill it starts again at the phase's first draw."""
    actor = start_feeder(plan_for(corpus))
    source, plans = RayDataSource(actor), batches(60)
    for step, plan in enumerate(plans):
        if step in (20, 40):
            on_its_way = actor.fetch.remote(plan)
            ray.kill(actor, no_restart=False)
            assert equal(Sequences(*ray.get(on_its_way)), plain.fetch(plan))
        if step < 3 or step >= 18:
            assert equal(source.fetch(plan), plain.fetch(plan)), step


def test_workers_that_hold_every_cpu_are_read_for(ray_session, corpus, plain):
    """Training that waits for ever: an elastic group takes all that a cluster has, and is read for beside that."""

    class Holder:
        def ready(self):
            return True

    holder = ray.remote(Holder).options(num_cpus=ray.available_resources()["CPU"]).remote()
    try:
        ray.get(holder.ready.remote(), timeout=60)
        assert ray.available_resources().get("CPU", 0.0) == 0.0
        plan = batches(1)[0]
        rows = start_feeder(plan_for(corpus)).fetch.remote(plan)
        assert equal(Sequences(*ray.get(rows, timeout=120)), plain.fetch(plan))
    finally:
        ray.kill(holder)


def test_rewinding_to_a_checkpoint_gives_the_same_rows_again(ray_session, corpus, plain, monkeypatch):
    """Catches rows dropped for good once served. Windows of one unit: what lies behind is really gone."""
    monkeypatch.setattr(feeder, "WINDOW_UNITS", 1)
    local, rebuilds = SequenceFeeder(plan_for(corpus, end=3150)), []
    for start in (0, 600, 1200, 1800, 2400, 3000, 0):
        draws = [Draw(d, i) for d in SEQUENCES for i in range(start, start + 150, 7)]
        tokens, ids = local.fetch(draws)
        assert equal(Sequences(tokens, ids), plain.fetch(draws)), start
        rebuilds.append(local.stats()["rebuilds"])
    assert rebuilds[-1] > rebuilds[-2] > 0, "of leaps ahead, and of the way back"
    assert all(len(stream._windows) <= stream._kept_windows for stream in local.streams.values())


def test_a_request_of_many_windows_reads_each_once(ray_session, corpus, plain, monkeypatch):
    """Catches windows that a request takes away from itself, or from a rank that is one request behind."""
    monkeypatch.setattr(feeder, "WINDOW_UNITS", 1)
    local = SequenceFeeder(plan_for(corpus))
    for start in range(0, 1500, 300):
        for first in (start, max(0, start - 300)):
            draws = [Draw(d, i) for d in SEQUENCES for i in range(first, first + 300)]
            assert equal(Sequences(*local.fetch(draws)), plain.fetch(draws))
    for stream in local.streams.values():
        last = stream.order.unit_number(1499)
        assert stream.windows_opened in (last + 1, last + 2), "the next one is begun ahead"


def test_a_stale_request_far_ahead_does_not_hold_up_the_others(ray_session, corpus, plain, monkeypatch):
    """Catches one read position for all: a rank of a dead group and a live one would drag it to and fro for ever."""
    monkeypatch.setattr(feeder, "WINDOW_UNITS", 1)
    local = SequenceFeeder(plan_for(corpus, end=100_000))
    done: list[bool] = []

    def ask(start: int) -> None:
        for i in range(start, start + 1000, 50):
            draws = [Draw("book", i)]
            done.append(equal(Sequences(*local.fetch(draws)), plain.fetch(draws)))

    threads = [threading.Thread(target=ask, args=(start,)) for start in (0, 20_000, 60_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert done == [True] * 60


def test_lost_shard_is_named_and_asking_again_recovers(ray_session, tmp_path):
    """Catches a stream that hangs for ever after a failed read, and one that stays broken once the file is back."""
    write_corpus(tmp_path, {"wiki": 30})
    shard = tmp_path / "wiki/train/00000.parquet"
    shard.rename(tmp_path / "gone")
    local = SequenceFeeder(FeedPlan(str(tmp_path), "train", 1, {"wiki": 0}, {"wiki": 30}))
    with pytest.raises(feeder.StreamError, match="domain wiki: read unit 0 could not be read"):
        local.fetch([Draw("wiki", 3)])
    (tmp_path / "gone").rename(shard)
    assert local.fetch([Draw("wiki", 3)])[0].shape == (1, 16)


def test_rows_that_nobody_planned_are_refused(ray_session, corpus, monkeypatch):
    """Catches trust in whatever arrives: a reader of another order must not feed a run silently."""

    def swapped(batch, corpus_uri):
        table = original(batch, corpus_uri)
        return table.take([*range(1, table.num_rows), 0])

    original = feeder._read_planned
    monkeypatch.setattr(feeder, "_read_planned", swapped)
    local = SequenceFeeder(plan_for(corpus))
    with pytest.raises(feeder.StreamError, match="torn or out of order"):
        local.fetch([Draw("wiki", 0)])


def test_missing_domain_is_refused_before_anything_is_read(corpus):
    with pytest.raises(UserError, match="domain poems is not in the corpus's split train"):
        SequenceFeeder(FeedPlan(corpus, "train", 1, {"poems": 0}, {"poems": 10}))


def test_reading_ahead_stops_at_the_end_of_the_plan(ray_session, corpus):
    """Catches reading beyond what a phase needs, and executions that go on polling while nobody asks."""
    local = SequenceFeeder(plan_for(corpus, end=100))
    local.fetch([Draw(d, 99) for d in SEQUENCES])
    deadline = time.monotonic() + 30
    while any(t.name.startswith("stream-") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("stream-")]
    assert local.stats()["windows_opened"] == 3
