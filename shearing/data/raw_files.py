"""Where raw text lies: files behind paths, folders, globs and URIs, and the units in which they are read."""

import functools
import os
import re
from pathlib import PurePosixPath
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from shearing.config import Config
from shearing.data.config import CorpusConfig
from shearing.data.installed_text import is_installed_text, parse_installed_text
from shearing.errors import UserError
from shearing.storage import resolve

Kind = Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"]
KINDS: tuple[Kind, ...] = ("jsonl.gz", "jsonl.zst", "jsonl", "parquet", "txt")
RESERVED_DOMAINS = frozenset({"tokenizer", "marks"})  # folders of the corpus itself
MINIMUM_UNIT_BYTES = 4 * 2**20
UNITS_WANTED = 64
# What a stored byte is worth as text, so that units of different kinds cost about the same.
_EXPANSION: dict[Kind, int] = {"jsonl": 1, "txt": 1, "parquet": 2, "jsonl.gz": 3, "jsonl.zst": 3}


class RawFile(Config):
    """One file of raw text. `root` names its filesystem for `resolve`; `path` is the path on it.

    `version` changes when the content does: the time of the last change, where the filesystem tells it.
    """

    root: str
    path: str
    name: str
    kind: Kind
    file_bytes: int
    version: str


class Piece(Config):
    """A part of a raw file: lines that begin in bytes [start, stop), or row groups [start, stop) of a Parquet file.

    A compressed or `.txt` file, or a Parquet file too small to cut, is one piece that spans its bytes. `text_bytes` is
    roughly what there is to read.
    """

    root: str
    path: str
    name: str
    kind: Kind
    start: int
    stop: int
    text_bytes: int


class ReadUnit(Config):
    """The work of one task: pieces of one domain, read in order. `index` counts the units of the domain."""

    domain: str
    index: int
    pieces: list[Piece]

    @property
    def text_bytes(self) -> int:
        """Roughly what there is to read."""
        return sum(piece.text_bytes for piece in self.pieces)


class _Location(NamedTuple):
    """A pattern cut into what `resolve` understands and what has to be matched."""

    root: str
    pattern: str | None
    prefix: str  # how names under the root are shown


@functools.lru_cache(maxsize=64)
def filesystem_of(root: str) -> pafs.FileSystem:
    """The filesystem that `root` names; opened once a process."""
    return resolve(root)[0]


def list_raw_files(text: str | list[str]) -> list[RawFile]:
    """The files that paths, folders (searched deeply), globs (`*`, `?`, `[..]`, `**`) or URIs name, sorted by path.

    An `installed:` text that is not written yet stands as one file of its expected size, for forecasts alone.

    Raises:
        UserError: A pattern finds nothing, or a single file is of a kind that cannot be read.
    """
    found: dict[tuple[str, str], RawFile] = {}
    problems: list[str] = []
    for pattern in [text] if isinstance(text, str) else text:
        try:
            files = _list_pattern(pattern)
        except (UserError, OSError, ValueError) as error:
            problems.append(str(error))
            continue
        found.update({(type(filesystem_of(file.root)).__name__, file.path): file for file in files})
    if problems:
        raise UserError(problems)
    return sorted(found.values(), key=lambda file: file.path)


def list_domains(config: CorpusConfig) -> dict[str, list[RawFile]]:
    """The raw files of every domain, in the recipe's order.

    Raises:
        UserError: All problems of all domains at once.
    """
    files: dict[str, list[RawFile]] = {}
    problems: list[str] = []
    for domain, settings in config.domains.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", domain) or domain in RESERVED_DOMAINS:
            problems.append(
                f"corpus.domains: {domain!r} cannot name a domain; allowed: letters, digits, '.', '_' and '-', "
                f"except {' and '.join(sorted(RESERVED_DOMAINS))}. Rename it."
            )
            continue
        try:
            files[domain] = list_raw_files(settings.text)
        except UserError as error:
            problems.extend(f"corpus.domains.{domain}.text: {problem}" for problem in error.problems)
            continue
        if not files[domain]:
            problems.append(f"corpus.domains.{domain}.text is an empty list: name at least one file or folder.")
        elif sum(file.file_bytes for file in files[domain]) == 0:
            problems.append(f"corpus.domains.{domain}.text: all {len(files[domain])} files are empty.")
    if problems:
        raise UserError(problems)
    return files


def plan_units(files: dict[str, list[RawFile]], read_unit_bytes: int) -> list[ReadUnit]:
    """The units of work, domain by domain: large plain files are cut, small files are put together.

    The plan follows from the files alone, never from the machine: units are of `read_unit_bytes`, or smaller
    where the whole corpus would otherwise make fewer than 64 of them.
    """
    total_bytes = sum(file.file_bytes * _EXPANSION[file.kind] for listed in files.values() for file in listed)
    unit_bytes = min(read_unit_bytes, max(MINIMUM_UNIT_BYTES, total_bytes // UNITS_WANTED))
    units: list[ReadUnit] = []
    for domain, listed in files.items():
        pieces = [piece for file in listed for piece in cut_file(file, unit_bytes)]
        groups = _group(pieces, unit_bytes)
        units.extend(ReadUnit(domain=domain, index=index, pieces=group) for index, group in enumerate(groups))
    return units


def kind_of(name: str) -> Kind | None:
    """The kind of a file by its ending; None for what cannot be read as text."""
    return next((kind for kind in KINDS if name.lower().endswith("." + kind)), None)


def _list_pattern(pattern: str) -> list[RawFile]:
    if is_installed_text(pattern):
        _, size_bytes = parse_installed_text(pattern)
        return [RawFile(root="/", path=pattern, name=pattern, kind="jsonl", file_bytes=size_bytes, version="")]
    location = _locate(pattern)
    filesystem, base = resolve(location.root)
    if location.pattern is None:
        info = filesystem.get_file_info(base)
        if info.type == pafs.FileType.File:
            return [_single_file(info, location)]
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"{pattern!r} does not exist. Correct the path, or put the text there.")
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    matches = re.compile(_glob_to_regex(location.pattern or "**"))
    files = []
    for info in filesystem.get_file_info(selector):
        inside = info.path[len(base) :].lstrip("/")
        hidden = any(part.startswith(".") for part in PurePosixPath(inside).parts)
        kind = kind_of(info.base_name)
        if info.type == pafs.FileType.File and kind and not hidden and matches.fullmatch(inside):
            files.append(_raw_file(info, location.root, f"{location.prefix}{inside}", kind))
    if not files:
        raise UserError(f"{pattern!r} finds no file that can be read; allowed: {_allowed()}. Correct the path.")
    return files


def _single_file(info: pafs.FileInfo, location: _Location) -> RawFile:
    kind = kind_of(info.base_name)
    if kind is None:
        raise UserError(f"{info.path!r} is of an unknown kind; allowed: {_allowed()}. Rename or convert it.")
    return _raw_file(info, location.root, location.prefix.rstrip("/"), kind)


def _raw_file(info: pafs.FileInfo, root: str, name: str, kind: Kind) -> RawFile:
    changed_ns = info.mtime_ns
    version = str(changed_ns) if changed_ns is not None else ""
    return RawFile(root=root, path=info.path, name=name, kind=kind, file_bytes=int(info.size or 0), version=version)


def _allowed() -> str:
    return ", ".join(f".{kind}" for kind in sorted(KINDS))


def _locate(pattern: str) -> _Location:
    """Cuts at the first component with a glob character; a URI keeps its query (endpoint, region ...)."""
    is_uri = len(urlsplit(pattern).scheme) > 1
    # In a URI `?` opens the query, so it is a wild card in local paths only.
    place, _, query = pattern.partition("?") if is_uri else (os.path.abspath(os.path.expanduser(pattern)), "", "")
    suffix = f"?{query}" if query else ""
    wild = re.search(r"[*\[]" if is_uri else r"[*?\[]", place)
    if wild is None or (not is_uri and os.path.exists(place)):  # a real file may have brackets in its name
        return _Location(place + suffix, None, place.rstrip("/") + "/")
    cut = place.rfind("/", 0, wild.start()) + 1
    root = place[:cut] if place[:cut] in ("/", "") or place[:cut].endswith("://") else place[: cut - 1]
    return _Location(root + suffix, place[cut:], place[:cut])


def _glob_to_regex(pattern: str) -> str:
    """`**` crosses folders, `*` and `?` do not, `[..]` and `[!..]` are sets."""
    parts: list[str] = []
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, flags=re.DOTALL):
        if part == "**/":
            parts.append("(?:.*/)?")
        elif part == "**":
            parts.append(".*")
        elif part == "*":
            parts.append("[^/]*")
        elif part == "?":
            parts.append("[^/]")
        elif len(part) > 1:
            body = part[1:-1].replace("\\", r"\\")
            parts.append(f"[^{body[1:]}]" if body.startswith("!") else f"[{body}]")
        else:
            parts.append(re.escape(part))
    return "".join(parts)


def cut_file(file: RawFile, unit_bytes: int) -> list[Piece]:
    """The file in pieces of about `unit_bytes` of text, where its kind can be cut.

    Raises:
        UserError: A Parquet file whose footer cannot be read.
    """
    if file.kind == "jsonl":
        starts = range(0, file.file_bytes, unit_bytes)
        ranges = [(start, min(start + unit_bytes, file.file_bytes)) for start in starts]
        return [_piece(file, start, stop, stop - start) for start, stop in ranges]
    text_bytes = file.file_bytes * _EXPANSION[file.kind]
    if file.kind == "parquet" and text_bytes > unit_bytes:
        return _cut_row_groups(file, unit_bytes)
    return [_piece(file, 0, file.file_bytes, text_bytes)]


def _cut_row_groups(file: RawFile, unit_bytes: int) -> list[Piece]:
    try:
        with filesystem_of(file.root).open_input_file(file.path) as stream:
            metadata = pq.read_metadata(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot read {file.name}: {error}. Replace or remove the file.") from None
    pieces: list[Piece] = []
    start = waiting_bytes = 0
    for index in range(metadata.num_row_groups):
        waiting_bytes += metadata.row_group(index).total_byte_size
        if waiting_bytes >= unit_bytes or index + 1 == metadata.num_row_groups:
            pieces.append(_piece(file, start, index + 1, waiting_bytes))
            start, waiting_bytes = index + 1, 0
    return pieces


def _piece(file: RawFile, start: int, stop: int, text_bytes: int) -> Piece:
    return Piece(
        root=file.root,
        path=file.path,
        name=file.name,
        kind=file.kind,
        start=start,
        stop=stop,
        text_bytes=text_bytes,
    )


def _group(pieces: list[Piece], unit_bytes: int) -> list[list[Piece]]:
    """Pieces in their order, as many in a group as fit in `unit_bytes`; a larger piece stands alone."""
    groups: list[list[Piece]] = []
    filled_bytes = 0
    for piece in pieces:
        if groups and filled_bytes + piece.text_bytes <= unit_bytes:
            groups[-1].append(piece)
            filled_bytes += piece.text_bytes
        else:
            groups.append([piece])
            filled_bytes = piece.text_bytes
    return groups
