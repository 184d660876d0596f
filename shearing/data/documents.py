"""Reading raw text: documents out of pieces of files, sections of long documents, and the split each belongs to."""

import hashlib
import json
from collections.abc import Iterator
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shearing.data.config import SplitConfig
from shearing.data.manifest import Split
from shearing.data.raw_files import Piece, filesystem_of
from shearing.errors import UserError

_CHUNK_BYTES = 4 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HASH_RANGE = 2**64


class Document(NamedTuple):
    """One text as it stands in a file. `line` counts from 0 within the piece; a Parquet row is a line."""

    line: int
    text: str


class Problem(NamedTuple):
    """A line that holds no text that can be used, and why."""

    line: int
    problem: str


def read_piece(piece: Piece, text_field: str) -> Iterator[Document | Problem]:
    """Every line of a piece in order: a document (perhaps with an empty text) or a problem; blank lines too.

    Raises:
        UserError: The file itself cannot be read: broken compression, or no such column in a Parquet file.
    """
    try:
        if piece.kind == "parquet":
            yield from _read_parquet(piece, text_field)
        elif piece.kind == "txt":
            yield _read_whole(piece)
        else:
            for number, line in enumerate(_read_lines(piece)):
                yield _parse_line(number, line, text_field)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise UserError(f"cannot read {piece.name}: {error}. Replace or remove the file.") from None


def sections(text: str, section_characters: int | None) -> list[str]:
    """The text in sections of at most `section_characters`, cut after a paragraph, else a line, else a word.

    A last section shorter than half of that stays with its neighbour, so a section may have half as much again.
    The sections joined are the text.
    """
    if section_characters is None or len(text) <= section_characters + section_characters // 2:
        return [text]
    cut: list[str] = []
    start = 0
    while len(text) - start > section_characters + section_characters // 2:
        stop = _boundary(text, start + section_characters // 2, start + section_characters)
        cut.append(text[start:stop])
        start = stop
    return [*cut, text[start:]]


def split_of(text_bytes: bytes, fractions: SplitConfig) -> Split:
    """The split of a document, from the hash of its UTF-8 bytes alone: equal documents never stand on both sides."""
    digest = hashlib.blake2b(text_bytes, digest_size=8).digest()
    place = int.from_bytes(digest, "little") / _HASH_RANGE
    if place < fractions.eval:
        return "eval"
    return "prune" if place < fractions.eval + fractions.prune else "train"


def _boundary(text: str, low: int, high: int) -> int:
    """The last place in (low, high] after a paragraph, a line or a word; `high` where there is none."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    return high


def _read_lines(piece: Piece) -> Iterator[bytes]:
    filesystem = filesystem_of(piece.root)
    if piece.kind == "jsonl":
        with filesystem.open_input_file(piece.path) as stream:
            yield from lines_of_range(stream, piece.start, piece.stop)
        return
    compression = "gzip" if piece.kind == "jsonl.gz" else "zstd"
    with filesystem.open_input_stream(piece.path, compression=compression) as stream:
        yield from _split_lines(stream)


def lines_of_range(stream: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in bytes [start, stop) of a seekable stream, without their newlines.

    Neighbouring ranges give every line exactly once, wherever the cut falls.
    """
    # The byte before the range tells whether a line begins right at its start.
    position = max(start - 1, 0)
    stream.seek(position)
    lines = _split_lines(stream)
    if start > 0:
        position += len(next(lines, b"")) + 1
    for line in lines:
        if position >= stop:
            return
        yield line
        position += len(line) + 1


def _split_lines(stream: IO[bytes]) -> Iterator[bytes]:
    tail = b""
    # Reading as much again as is waiting keeps a very long line from being copied a thousand times.
    while chunk := stream.read(max(_CHUNK_BYTES, len(tail))):
        lines = (tail + chunk).split(b"\n")
        tail = lines.pop()
        yield from lines
    if tail:
        yield tail


def _parse_line(number: int, line: bytes, text_field: str) -> Document | Problem:
    if number == 0 and line.startswith(_BYTE_ORDER_MARK):
        line = line[len(_BYTE_ORDER_MARK) :]
    if not line or line.isspace():
        return Document(number, "")
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Problem(number, f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are no JSONDecodeError
        return Problem(number, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Problem(number, f"not a JSON object but {type(record).__name__}")
    if text_field not in record:
        return Problem(number, f"no field {text_field!r}; fields: {', '.join(list(record)[:8]) or 'none'}")
    return _check_text(number, record[text_field], text_field)


def _check_text(number: int, text: object, text_field: str) -> Document | Problem:
    if not isinstance(text, str):
        return Problem(number, f"field {text_field!r} is not a string but {type(text).__name__}")
    if not text.isascii() and _holds_surrogate(text):
        return Problem(number, f"field {text_field!r} holds half of a surrogate pair, which is no character")
    return Document(number, text)


def _holds_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_whole(piece: Piece) -> Document | Problem:
    with filesystem_of(piece.root).open_input_stream(piece.path, compression=None) as stream:
        data = bytes(stream.read())
    try:
        return Document(0, data.removeprefix(_BYTE_ORDER_MARK).decode())
    except UnicodeDecodeError as error:
        return Problem(0, f"not UTF-8: byte 0x{data[error.start]:02x} at {error.start}")


def _read_parquet(piece: Piece, text_field: str) -> Iterator[Document | Problem]:
    with filesystem_of(piece.root).open_input_file(piece.path) as stream:
        file = pq.ParquetFile(stream)
        schema = file.schema_arrow
        if text_field not in schema.names:
            columns = ", ".join(schema.names)
            raise UserError(f"{piece.name} has no column {text_field!r}; columns: {columns}. Set corpus.text_field.")
        kind = schema.field(text_field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f"{piece.name}: column {text_field!r} is {kind}, not text. Set corpus.text_field.")
        groups = list(range(piece.start, min(piece.stop, file.num_row_groups)))
        line = 0
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_field]):
            for value in batch.column(0):
                yield _parse_value(line, value, text_field)
                line += 1


def _parse_value(number: int, value: pa.Scalar, text_field: str) -> Document | Problem:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return Problem(number, f"column {text_field!r} is not UTF-8")
    return _check_text(number, text, text_field)
