import json
import math
import re
from collections import Counter

import pytest

from shearing.data.config import CorpusConfig, DomainConfig
from shearing.data.installed_text import (
    INSTALLED_DOMAINS,
    installed_documents,
    parse_installed_text,
    with_installed_text,
    write_installed_text,
)
from shearing.data.raw_files import list_domains, list_raw_files
from shearing.errors import UserError

BYTES = 300_000


@pytest.fixture(scope="module")
def texts():
    return {domain: installed_documents(domain, BYTES) for domain in INSTALLED_DOMAINS}


def test_every_domain_has_text_of_more_than_one_hand(texts):
    """Bugs: a package was renamed and its domain is empty; one package fills a domain; texts stand twice."""
    for domain, documents in texts.items():
        size = sum(len(document.text.encode()) for document in documents)
        assert 0.8 * BYTES <= size <= BYTES + 200_000, domain
        assert len({document.text for document in documents}) == len(documents)
        if domain != "models":
            assert len({document.path.split("/")[0] for document in documents}) >= 3, domain


def test_text_is_written_by_hand_not_by_machines(texts):
    """Bug: minified scripts, tables and generated code pass for language."""
    for domain, documents in texts.items():
        lines = [line for document in documents for line in document.text.splitlines() if line.strip()]
        assert 20 < sum(map(len, lines)) / len(lines) < 90, domain
        assert sum(len(line) > 300 for line in lines) < 0.02 * len(lines), domain
        whole = "".join(document.text for document in documents)
        assert 0.4 < sum(character.isalpha() for character in whole) / len(whole) < 0.9, domain


def test_domains_really_differ(texts):
    """Bug: two domains hold the same kind of text, so that a mixture has nothing to tell apart.

    Words of one half of a domain are likelier by the word counts of its other half than by those of any other domain.
    """

    def words(documents):
        return Counter(re.findall(r"\w+|[^\w\s]", "".join(document.text for document in documents)))

    counts = {domain: (words(documents[::2]), words(documents[1::2])) for domain, documents in texts.items()}
    vocabulary = len(set().union(*(half for halves in counts.values() for half in halves)))
    for domain, (_, held_out) in counts.items():
        bits = {}
        for other, (seen, _) in counts.items():
            total = seen.total() + vocabulary
            cost = sum(count * math.log2(total / (seen[word] + 1)) for word, count in held_out.items())
            bits[other] = cost / held_out.total()
        nearest = min((other for other in bits if other != domain), key=bits.get)
        assert bits[domain] < bits[nearest] - 0.1, (domain, bits)


def test_the_same_installation_gives_the_same_text(texts):
    """Bug: the order of a directory or a hash seed decides what the quickstart learns."""
    assert installed_documents("cpp", BYTES) == texts["cpp"]


def test_docstrings_are_not_in_the_python_domain(texts):
    """Bug: one domain holds the other, and training on either tells about both."""
    python = {document.path.split("/")[0] for document in texts["python"]}
    assert not python & {document.path.split("/")[0] for document in texts["docstrings"]}


def test_text_is_written_once_as_lines(tmp_path):
    """Bugs: lines without `text`; a second call changes files that a corpus was made of."""
    sizes = write_installed_text(str(tmp_path), 50_000)
    assert list(sizes) == list(INSTALLED_DOMAINS)
    path = tmp_path / "prose" / "prose-00.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(len(record["text"].encode()) for record in records) == sizes["prose"]
    assert all(record["meta"]["path"] for record in records)
    changed = path.stat().st_mtime_ns
    assert write_installed_text(str(tmp_path), 50_000) == sizes
    assert path.stat().st_mtime_ns == changed


def test_a_recipe_asks_for_installed_text_by_name(tmp_path):
    """Bugs: the forecast before a run writes files; the text is not found afterwards; a wrong name is not told."""
    text = "installed:prose?megabytes=0.05"
    config = CorpusConfig(path=str(tmp_path), domains={"d": DomainConfig(text=text, proportion=1)})
    assert [file.file_bytes for file in list_domains(config)["d"]] == [50_000]
    assert not list(tmp_path.iterdir())
    located = with_installed_text(config).domains["d"]
    assert located.proportion == 1
    assert [file.kind for file in list_raw_files(located.text)] == ["jsonl"]
    assert parse_installed_text("installed:cpp") == ("cpp", 4_000_000)
    for wrong in (
        "installed:latin",
        "installed:cpp?megabytes=none",
        "installed:cpp?megabytes=-1",
        "installed:cpp?megabytes=nan",
    ):
        with pytest.raises(UserError):
            parse_installed_text(wrong)
        with pytest.raises(UserError):
            list_raw_files(wrong)
