import json
from pathlib import Path

import pytest

from actors.corpus import prepare_corpus
from shearing.data.config import CorpusConfig, DomainConfig, SplitConfig
from shearing.data.preparation import finish_preparation, plan_preparation
from shearing.data.tokenizer_training import save_tokenizer, train_tokenizer
from shearing.data.tokenizing import load_tokenizer
from shearing.data.unit_work import prepare_unit
from shearing.errors import UserError
from shearing.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def config(tmp_path):
    for domain, documents in (("left", 4000), ("right", 1500)):
        (tmp_path / domain).mkdir()
        with (tmp_path / domain / "x.jsonl").open("w") as file:
            for number in range(documents):
                file.write(json.dumps({"text": f"{domain} document {number} " + "words " * (number % 90)}) + "\n")
    save_tokenizer(
        train_tokenizer(["words left right document 1 2 3"] * 50, 300), open_store(str(tmp_path / "tokenizer"))
    )
    return CorpusConfig(
        path=str(tmp_path / "corpora"),
        domains={name: DomainConfig(text=str(tmp_path / name), proportion=0.5) for name in ("left", "right")},
        sequence_tokens=64,
        split=SplitConfig(eval=0.1, prune=0.1),
        read_unit_bytes=2**16,
        shard_sequences=64,
    )


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def test_many_tasks_and_one_loop_make_the_same_bytes(config, tmp_path):
    """Bugs: the order in which tasks end reaches the corpus; marks stay; the second call works again."""
    tokenizer_dir = str(tmp_path / "tokenizer")
    lines: list[str] = []
    corpus, manifest = prepare_corpus(config, tokenizer_dir, lines.append)
    assert "100%" in lines[-1]
    assert "tokens/s" in lines[-1]

    alone = config.model_copy(update={"path": str(tmp_path / "alone")})
    preparation = plan_preparation(alone, tokenizer_dir)
    assert len(preparation.pending) > 8
    tokenizer = load_tokenizer(tokenizer_dir, "eos")
    marks = [prepare_unit(unit, alone, tokenizer, preparation.corpus) for unit in reversed(preparation.pending)]
    assert finish_preparation(preparation, marks) == manifest
    assert snapshot(corpus.path) == snapshot(preparation.corpus.path)

    again: list[str] = []
    assert prepare_corpus(config, tokenizer_dir, again.append) == (corpus, manifest)
    assert len(again) == 1
    assert "prepared before" in again[0]


def test_only_what_is_missing_is_done_after_a_stop(config, tmp_path):
    """Bug: a driver that was killed begins the whole corpus anew."""
    tokenizer_dir = str(tmp_path / "tokenizer")
    preparation = plan_preparation(config, tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir, "eos")
    for unit in preparation.pending[:6]:
        prepare_unit(unit, config, tokenizer, preparation.corpus)
    kept = {path: path.stat().st_mtime_ns for path in Path(preparation.corpus.path).rglob("*.parquet")}
    lines: list[str] = []
    _, manifest = prepare_corpus(config, tokenizer_dir, lines.append)
    assert lines[0].startswith(f"6 of {len(preparation.pending)} units")
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    assert sum(entry.documents for splits in manifest.domains.values() for entry in splits.values()) == 5500


def test_what_a_user_can_mend_arrives_as_such(config, tmp_path):
    """Bug: a broken file in a worker reaches the user as a page of Ray's trace."""
    (tmp_path / "left" / "y.jsonl.gz").write_bytes(b"this is no gzip")
    with pytest.raises(UserError, match=r"cannot read .*y\.jsonl\.gz") as caught:
        prepare_corpus(config, str(tmp_path / "tokenizer"), lambda _: None)
    assert len(str(caught.value).splitlines()) == 1
