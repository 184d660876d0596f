import itertools

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shearing.data.config import CorpusConfig, DomainConfig
from shearing.data.documents import Document, read_piece
from shearing.data.raw_files import RawFile, list_domains, list_raw_files, plan_units
from shearing.errors import UserError


@pytest.fixture
def tree(tmp_path):
    for name in ("a.jsonl", "b/c.jsonl.gz", "b/d/e.parquet", "b/d/f.txt", "b/notes.md", ".hidden/g.jsonl", "h[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["a.jsonl", "b/c.jsonl.gz", "b/d/e.parquet", "b/d/f.txt", "h[1].txt"]),
        ("a.jsonl", ["a.jsonl"]),
        ("*.jsonl", ["a.jsonl"]),
        ("**/*.jsonl*", ["a.jsonl", "b/c.jsonl.gz"]),
        ("b/*", ["b/c.jsonl.gz"]),
        ("b/**", ["b/c.jsonl.gz", "b/d/e.parquet", "b/d/f.txt"]),
        ("?/[cd].*", ["b/c.jsonl.gz"]),
        ("[!b].jsonl", ["a.jsonl"]),
        ("h[1].txt", ["h[1].txt"]),
    ],
)
def test_patterns_find_what_a_shell_finds(tree, pattern, found):
    """Bugs: `*` crosses folders, `**` misses the top, hidden files count as text, brackets of a real name are a set."""
    files = list_raw_files(f"{tree}/{pattern}".rstrip("/"))
    assert [file.path.removeprefix(f"{tree}/") for file in files] == found


def test_a_file_named_twice_is_read_once(tree):
    """Bug: overlapping patterns of one domain double its text."""
    assert len(list_raw_files([f"{tree}/a.jsonl", f"{tree}/*.jsonl", str(tree)])) == 5


def test_fsspec_filesystem_with_glob_and_line_ranges():
    """Bug: only local paths can be listed and cut."""
    memory = fsspec.filesystem("memory")
    lines = "".join(f'{{"text": "document {number}"}}\n' for number in range(5000))
    memory.pipe("/raw-text/one/part-0.jsonl", lines.encode())
    memory.pipe("/raw-text/two/other.jsonl", b'{"text": "not asked for"}\n')
    files = list_raw_files("memory://raw-text/*/part-*.jsonl")
    assert [file.path for file in files] == ["/raw-text/one/part-0.jsonl"]
    units = plan_units({"d": files}, read_unit_bytes=2**16)
    assert len(units) == 2
    texts = [item.text for unit in units for piece in unit.pieces for item in read_piece(piece, "text")]
    assert texts == [f"document {number}" for number in range(5000)]


def test_all_problems_of_all_domains_at_once(tree):
    """Bug: the user learns of one wrong path a run."""
    config = CorpusConfig(
        path=str(tree / "out"),
        domains={
            "gone": DomainConfig(text=str(tree / "nowhere"), proportion=0.25),
            "marks": DomainConfig(text=str(tree), proportion=0.25),
            "kind": DomainConfig(text=str(tree / "b/notes.md"), proportion=0.25),
            "many": DomainConfig(text=[str(tree / "*.zst"), "nosuchscheme://x/y"], proportion=0.25),
        },
    )
    with pytest.raises(UserError) as caught:
        list_domains(config)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for expected in ("domains.gone.text", "'marks' cannot name a domain", "notes.md", "*.zst", "nosuchscheme"):
        assert expected in problems


def _file(number, kind, size):
    return RawFile(root="/", path=f"/{number}", name=f"/{number}", kind=kind, file_bytes=size, version="")


def test_large_files_are_cut_and_small_ones_put_together():
    """Bugs: a million small files make a million shards; a large file is read by one core; a cut loses bytes."""
    unit = 2**20 * 8
    files = [_file(0, "jsonl", 10 * unit + 17), *(_file(number, "txt", 1000) for number in range(1, 5001))]
    units = plan_units({"d": files, "e": [_file("z", "jsonl.gz", 40 * unit)]}, read_unit_bytes=unit)
    ranges = [(piece.start, piece.stop) for u in units for piece in u.pieces if piece.path == "/0"]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 10 * unit + 17
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    assert sum(len(u.pieces) for u in units) == len(ranges) + 5000 + 1
    assert len([u for u in units if u.domain == "d"]) <= 13
    assert [u.index for u in units if u.domain == "e"] == [0]
    assert all(u.text_bytes <= unit for u in units if u.domain == "d")


def test_parquet_is_cut_at_row_groups(tmp_path):
    """Bug: a large Parquet file is one unit, or row groups are read twice at the seams."""
    rows = 400
    texts = [f"{number} " + "x" * 1000 for number in range(rows)]
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "x.parquet", row_group_size=50, compression=None, use_dictionary=False
    )
    units = plan_units({"d": list_raw_files(str(tmp_path))}, read_unit_bytes=2**17)
    assert [(piece.start, piece.stop) for unit in units for piece in unit.pieces] == [(0, 3), (3, 6), (6, 8)]
    read = [item for unit in units for piece in unit.pieces for item in read_piece(piece, "text")]
    assert [item.text for item in read if isinstance(item, Document)] == texts
