import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from shearing.data.config import CorpusConfig, DomainConfig, SplitConfig
from shearing.data.manifest import SPLITS, load_manifest
from shearing.data.preparation import check_early, plan_preparation, prepare_in_process
from shearing.data.tokenizer_training import save_tokenizer, train_tokenizer
from shearing.data.tokenizing import load_tokenizer
from shearing.data.unit_work import prepare_unit
from shearing.errors import UserError
from shearing.storage import open_store

SAMPLE = Path(__file__).parents[3] / "../shared/data/redpajama_sample"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    words = [f"document {number} holds words and {number * number}" for number in range(1000)]
    save_tokenizer(train_tokenizer(words, 500), open_store(str(path)))
    return str(path)


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((text if text.startswith("{bad") else json.dumps({"text": text})) + "\n" for text in texts))


def configure(tmp_path, **changes):
    settings = {
        "path": str(tmp_path / "corpora"),
        "domains": {"d": DomainConfig(text=str(tmp_path / "raw"), proportion=1)},
        "sequence_tokens": 32,
        "split": SplitConfig(eval=0.2, prune=0.2),
        "read_unit_bytes": 2**16,
        "shard_sequences": 64,
        "row_group_sequences": 8,
    }
    return CorpusConfig(**(settings | changes))


def read_rows(corpus, entry):
    """Identity -> tokens of every sequence of a split, with the format checked on the way."""
    rows = {}
    for shard in entry.shards:
        file = pq.ParquetFile(corpus.locate(shard.path))
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == shard.row_group_sequences
        table = file.read()
        ids, tokens = table["sequence_id"].to_numpy(), table["tokens"].combine_chunks()
        assert len(ids) == shard.sequences == sum(shard.row_group_sequences)
        values = tokens.flatten().to_numpy().reshape(len(ids), -1)
        rows.update(zip(ids.tolist(), values, strict=True))
    assert len(rows) == entry.sequences, "an identity stands twice"
    return rows


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def test_nothing_is_lost_and_equal_documents_share_a_split(tmp_path, tokenizer_dir):
    """Bugs: tokens lost between units, shards or splits; a duplicate on both sides; empty texts become documents."""
    unique = [f"document {number} " + "words and words " * (number % 37) for number in range(3000)]
    texts = [*unique, *unique[::3], "", "   ", "\n"]
    write_lines(tmp_path / "raw" / "x.jsonl", texts)
    write_lines(tmp_path / "raw" / "deep" / "y.jsonl", unique[:500])
    config = configure(tmp_path)
    corpus, manifest = prepare_in_process(config, tokenizer_dir)

    backend = Tokenizer.from_file(f"{tokenizer_dir}/tokenizer.json")
    expected = Counter(text for text in [*texts, *unique[:500]] if text.strip())
    tokens_in = sum((len(backend.encode(text).ids) + 1) * count for text, count in expected.items())
    entries = manifest.domains["d"]
    assert sum(entry.tokens + entry.dropped_tokens for entry in entries.values()) == tokens_in
    assert sum(entry.documents for entry in entries.values()) == expected.total()
    assert sum(entry.text_bytes for entry in entries.values()) == sum(len(t.encode()) * n for t, n in expected.items())
    assert all(entry.dropped_tokens < config.sequence_tokens for entry in entries.values())
    assert manifest.lines == len(texts) + 500
    assert {Path(file.path).name: file.documents for file in manifest.sources} == {"x.jsonl": 4000, "y.jsonl": 500}

    whole: dict[str, Counter] = {}
    for split, entry in entries.items():
        rows = read_rows(corpus, entry)
        stream = np.concatenate([rows[key] for key in sorted(rows)])
        assert len(stream) == entry.tokens
        documents = "".join(backend.decode(stream.tolist(), skip_special_tokens=False)).split("<|endoftext|>")
        whole[split] = Counter(documents) & expected
    # Two documents at each seam between the 23 units are not found whole; all others are, each in one split only.
    assert sum(counted.total() for counted in whole.values()) >= expected.total() - 2 * 3 * 23
    assert not set(whole["eval"]) & set(whole["train"])
    assert not set(whole["eval"]) & set(whole["prune"])
    assert not set(whole["prune"]) & set(whole["train"])


def test_rows_are_shuffled_inside_a_shard(tmp_path, tokenizer_dir):
    """Bug: neighbours in a shard come from one document, so a batch is one document."""
    write_lines(tmp_path / "raw" / "x.jsonl", [f"document {number} " + "word " * 500 for number in range(60)])
    corpus, manifest = prepare_in_process(configure(tmp_path, shard_sequences=4096), tokenizer_dir)
    path = manifest.domains["d"]["train"].shards[0].path
    ids = pq.read_table(corpus.locate(path))["sequence_id"].to_numpy()
    assert len(ids) > 100
    assert sorted(ids.tolist()) == list(range(len(ids)))
    assert np.mean(np.abs(np.diff(ids)) == 1) < 0.1


@pytest.mark.parametrize("boundary", ["eos", "bos"])
def test_the_boundary_token_stands_where_its_name_says(tmp_path, tokenizer_dir, boundary):
    """Bug: documents begin with the end token, or run into each other."""
    write_lines(tmp_path / "raw" / "x.jsonl", ["words and words"] * 400)
    tokenizer = load_tokenizer(tokenizer_dir, boundary)
    config = configure(tmp_path, boundary_token=boundary)
    # One text is in one split; the others are empty, which the check refuses after the work is done.
    with pytest.raises(UserError):
        prepare_in_process(config, tokenizer_dir)
    corpus = plan_preparation(config, tokenizer_dir).corpus
    files = sorted(Path(corpus.path).glob("d/*/000000-000.parquet"))
    assert len(files) == 1
    table = pq.read_table(files[0])
    first = int(np.argmin(table["sequence_id"].to_numpy()))
    tokens = table["tokens"].to_pylist()[first]
    document = tokenizer.encode_batch(["words and words"])[0]
    assert tokens[: len(document) + 1] == ([0, *document] if boundary == "bos" else [*document, 0])


def test_malformed_lines_are_reported_by_file_and_line_up_to_the_limit(tmp_path, tokenizer_dir):
    """Bugs: line numbers restart at every unit; the limit is not held; the message names no file or key."""
    texts = [f"document {number} " + "words " * 30 for number in range(4000)]
    for line in (7, 2500, 3999):
        texts[line] = "{bad"
    write_lines(tmp_path / "raw" / "x.jsonl", texts)
    config = configure(tmp_path)
    assert len(plan_preparation(config, tokenizer_dir).pending) > 5
    _, manifest = prepare_in_process(config, tokenizer_dir)
    assert [line.line for line in manifest.malformed] == [8, 2501, 4000]
    assert (manifest.malformed_lines, manifest.lines, manifest.sources[0].malformed) == (3, 4000, 3)

    strict = config.model_copy(update={"malformed_limit": 0.0005})
    with pytest.raises(UserError, match=r"3 of 4,000 lines.*0\.050%.*x\.jsonl:8: not JSON.*corpus\.malformed_limit"):
        prepare_in_process(strict, tokenizer_dir)  # the corpus is there already, but not as this recipe wants it


def test_a_wrong_field_stops_early_and_names_the_key(tmp_path, tokenizer_dir):
    """Bug: a terabyte is read before the user learns that the field has another name."""
    write_lines(tmp_path / "raw" / "x.jsonl", [f"document {number} " + "words " * 30 for number in range(4000)])
    config = configure(tmp_path, text_field="content")
    preparation = plan_preparation(config, tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir, "eos")
    marks = [prepare_unit(unit, config, tokenizer, preparation.corpus) for unit in preparation.pending[:4]]
    assert len(marks) < len(preparation.pending)
    with pytest.raises(UserError, match=r"x\.jsonl:1: no field 'content'; fields: text.*corpus\.text_field"):
        check_early(marks, config.malformed_limit)


def test_a_split_without_a_sequence_says_what_to_change(tmp_path, tokenizer_dir):
    """Bug: an empty evaluation split shows up hours later as a division by zero."""
    write_lines(tmp_path / "raw" / "x.jsonl", ["one long document " * 500])
    with pytest.raises(UserError) as caught:
        prepare_in_process(configure(tmp_path, sequence_tokens=512), tokenizer_dir)
    assert len(caught.value.problems) >= 2
    for problem in caught.value.problems:
        for key in ("corpus.domains.d", "corpus.section_characters", "corpus.sequence_tokens"):
            assert key in problem


def test_preparing_twice_does_nothing_and_what_shapes_the_corpus_names_it(tmp_path, tokenizer_dir):
    """Bugs: a second run writes again; proportions make a new corpus; changed text or settings reuse the old one."""
    raw = tmp_path / "raw" / "x.jsonl"
    write_lines(raw, [f"document {number} " + "words " * 30 for number in range(500)])
    config = configure(tmp_path)
    corpus, manifest = prepare_in_process(config, tokenizer_dir)
    times = {path: path.stat().st_mtime_ns for path in Path(corpus.path).rglob("*")}
    again = plan_preparation(config, tokenizer_dir)
    assert again.manifest == manifest == load_manifest(corpus)
    assert times == {path: path.stat().st_mtime_ns for path in Path(corpus.path).rglob("*")}
    assert not corpus.exists("marks")

    def name(**changes):
        return plan_preparation(config.model_copy(update=changes), tokenizer_dir).fingerprint

    assert name(domains={"d": config.domains["d"].model_copy(update={"proportion": 0.5})}) == manifest.fingerprint
    assert name(malformed_limit=0.5) == manifest.fingerprint
    for change in (
        {"sequence_tokens": 64},
        {"split": SplitConfig(eval=0.3, prune=0.2)},
        {"section_characters": 1000},
        {"boundary_token": "bos"},
        {"domains": {"other": config.domains["d"]}},
    ):
        assert name(**change) != manifest.fingerprint, change
    with raw.open("a") as file:
        file.write('{"text": "more"}\n')
    assert name() != manifest.fingerprint


KILLED = """
import sys, time
from shearing.data.config import CorpusConfig
from shearing.data.preparation import plan_preparation
from shearing.data.tokenizing import load_tokenizer
from shearing.data.unit_work import prepare_unit
config = CorpusConfig.model_validate_json(sys.argv[1])
preparation = plan_preparation(config, sys.argv[2])
tokenizer = load_tokenizer(sys.argv[2], "eos")
for unit in preparation.pending:
    prepare_unit(unit, config, tokenizer, preparation.corpus)
    print(unit.index, flush=True)
time.sleep(600)
"""


def test_a_killed_preparation_goes_on_and_ends_the_same(tmp_path, tokenizer_dir):
    """Bugs: finished units are done again; half of a unit counts; the result differs from an undisturbed one."""
    write_lines(tmp_path / "raw" / "x.jsonl", [f"document {number} " + "words " * 60 for number in range(8000)])
    config = configure(tmp_path)
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), tokenizer_dir]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    preparation = plan_preparation(config, tokenizer_dir)
    units = len(preparation.pending) + len(preparation.done)
    assert 5 <= len(preparation.done) < units
    kept = {path: path.stat().st_mtime_ns for path in Path(preparation.corpus.path).rglob("*.parquet")}
    done = {f"{mark.index:06d}-" for mark in preparation.done}
    corpus, manifest = prepare_in_process(config, tokenizer_dir)
    for path, changed in kept.items():
        if path.name[:7] in done:
            assert path.stat().st_mtime_ns == changed, "a finished unit was written again"

    undisturbed = config.model_copy(update={"path": str(tmp_path / "undisturbed")})
    other, expected = prepare_in_process(undisturbed, tokenizer_dir)
    assert manifest == expected
    found = {name: data for name, data in snapshot(corpus.path).items() if not name.endswith(".partial")}
    assert found == snapshot(other.path)


def test_shard_sizes_and_checksums_are_as_the_manifest_says(tmp_path, tokenizer_dir):
    """Bugs: a shard grows without bound; a checksum of other bytes than those on disk."""
    import hashlib

    write_lines(tmp_path / "raw" / "x.jsonl", [f"document {number} " + "words " * 60 for number in range(3000)])
    corpus, manifest = prepare_in_process(configure(tmp_path, read_unit_bytes=2**26), tokenizer_dir)
    shards = manifest.domains["d"]["train"].shards
    assert [shard.sequences for shard in shards[:-1]] == [64] * (len(shards) - 1)
    assert len(shards) > 10
    for shard in shards:
        data = corpus.read_bytes(shard.path)
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard.sha256, shard.file_bytes)
    assert pq.read_schema(corpus.locate(shards[0].path)).field("tokens").type.list_size == 32


@pytest.mark.skipif(not SAMPLE.exists(), reason="no sample of RedPajama here")
def test_redpajama_as_it_lies(tmp_path):
    """Bug: RedPajama's own layout needs a conversion first."""
    names = sorted(path.name for path in SAMPLE.iterdir())
    domains = {name: DomainConfig(text=str(SAMPLE / name / "*.jsonl"), proportion=1 / 7) for name in names}
    tokenizer = train_tokenizer((SAMPLE / "c4-rp" / "c4-rp-00.jsonl").read_text().splitlines()[:200], 2000)
    save_tokenizer(tokenizer, open_store(str(tmp_path / "tokenizer")))
    config = configure(
        tmp_path,
        domains=domains,
        sequence_tokens=128,
        section_characters=2000,
        split=SplitConfig(eval=0.05),
        read_unit_bytes=2**20,
    )
    corpus, manifest = prepare_in_process(config, str(tmp_path / "tokenizer"))
    assert list(manifest.domains) == names
    assert manifest.malformed_lines == 0
    lines = {name: sum(1 for _ in (SAMPLE / name / f"{name}-00.jsonl").open("rb")) for name in names}
    assert {file.domain: file.documents for file in manifest.sources} == lines
    for name in names:
        raw = [json.loads(line)["text"] for line in (SAMPLE / name / f"{name}-00.jsonl").open()]
        text_bytes = sum(manifest.domains[name][split].text_bytes for split in SPLITS)
        assert text_bytes == sum(len(text.encode()) for text in raw)
        assert len(read_rows(corpus, manifest.domains[name]["eval"])) == manifest.domains[name]["eval"].sequences


def test_raw_text_and_corpus_on_s3(tmp_path, tokenizer_dir, monkeypatch):
    """Bug: names with a query, writes, marks or listings work on local paths only."""
    server_module = pytest.importorskip("moto.server")
    from pyarrow import fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3 = fs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        s3.create_dir("bucket")
        texts = [f"document {number} " + "words " * 30 for number in range(1500)]
        write_lines(tmp_path / "raw" / "x.jsonl", texts)
        for name in ("raw/one file.jsonl", "raw/README.md"):
            with s3.open_output_stream(f"bucket/{name}") as stream:
                stream.write((tmp_path / "raw" / "x.jsonl").read_bytes())
        query = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        remote = configure(
            tmp_path,
            path=f"s3://bucket/corpora{query}",
            domains={"d": DomainConfig(text=f"s3://bucket/raw/*.jsonl{query}", proportion=1)},
        )
        corpus, manifest = prepare_in_process(remote, tokenizer_dir)
        _, local = prepare_in_process(configure(tmp_path), tokenizer_dir)
        assert manifest.domains == local.domains
        assert prepare_in_process(remote, tokenizer_dir)[1] == manifest
        assert corpus.list() == ["d", "manifest.json", "tokenizer"]
    finally:
        server.stop()
