"""One unit of preparation: raw text in, Parquet shards of token sequences and a mark of completion out."""

import base64
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shearing.config import Config
from shearing.data.config import CorpusConfig
from shearing.data.documents import Problem, read_piece, sections, split_of
from shearing.data.manifest import SPLITS, ShardEntry, Split
from shearing.data.packing import Packer, TokenArray
from shearing.data.raw_files import Piece, ReadUnit
from shearing.data.tokenizing import CorpusTokenizer
from shearing.storage import Store

MARKS_FOLDER = "marks"
_BATCH_CHARACTERS = 2**20  # text encoded at once: enough to hide the call, little enough to stay in memory
_PROBLEMS_KEPT = 20
_SEQUENCES_OF_A_UNIT = 2**32  # room for identities; int64 holds 2^31 units of it


class PieceCounts(Config):
    """What one piece held. `problems` are the first malformed lines, counted from 0 within the piece."""

    name: str
    lines: int
    documents: int
    malformed: int
    problems: list[tuple[int, str]]


class SplitPart(Config):
    """One unit's part of a split. `remainder` holds the tokens that filled no sequence, base64 of their bytes."""

    documents: int
    text_bytes: int
    tokens: int
    shards: list[ShardEntry]
    remainder: str


class UnitMark(Config):
    """Says that a unit is done, and all that the manifest needs to know of it."""

    domain: str
    index: int
    pieces: list[PieceCounts]
    splits: dict[Split, SplitPart]

    @property
    def documents(self) -> int:
        """Texts read, before they are cut into sections."""
        return sum(piece.documents for piece in self.pieces)

    @property
    def tokens(self) -> int:
        """Tokens made, boundaries and remainders with them."""
        return sum(part.tokens for part in self.splits.values())


def mark_name(domain: str, index: int) -> str:
    """Where the mark of a unit lies in the corpus."""
    return f"{MARKS_FOLDER}/{domain}/{index:06d}.json"


def token_dtype(vocab_size: int) -> str:
    """The smallest type of the corpus format that holds every token id."""
    return "uint16" if vocab_size <= 2**16 else "int32"


def prepare_unit(unit: ReadUnit, config: CorpusConfig, tokenizer: CorpusTokenizer, corpus: Store) -> UnitMark:
    """Reads, tokenises, packs and writes one unit; its mark is written last, so that a unit is done or not.

    The result depends on the unit, the settings and the tokenizer alone.

    Raises:
        UserError: A file of the unit cannot be read.
    """
    builder = _UnitBuilder(unit, config, tokenizer, corpus)
    pieces = [_read(piece, config.text_field, builder) for piece in unit.pieces]
    mark = UnitMark(domain=unit.domain, index=unit.index, pieces=pieces, splits=builder.finish())
    corpus.write_json(mark_name(unit.domain, unit.index), mark.model_dump(mode="json"))
    return mark


class ShardWriter:
    """Rows of one split into shards `<domain>/<split>/<index>-<number>.parquet` of `shard_sequences` rows.

    Rows inside a shard are shuffled, seeded by what they hold, so that neighbours are not from one document.
    """

    def __init__(self, corpus: Store, domain: str, split: Split, index: int, config: CorpusConfig) -> None:
        self._corpus = corpus
        self._folder = f"{domain}/{split}"
        self._index = index
        self._config = config
        self._waiting: list[TokenArray] = []
        self._waiting_rows = 0
        self._next_id = index * _SEQUENCES_OF_A_UNIT
        self.shards: list[ShardEntry] = []

    def add(self, tokens_NT: TokenArray) -> None:
        """Takes rows; writes a shard as soon as one is full."""
        if not len(tokens_NT):
            return
        self._waiting.append(tokens_NT)
        self._waiting_rows += len(tokens_NT)
        if self._waiting_rows >= self._config.shard_sequences:
            rows = np.concatenate(self._waiting)
            full = len(rows) - len(rows) % self._config.shard_sequences
            for start in range(0, full, self._config.shard_sequences):
                self._write(rows[start : start + self._config.shard_sequences])
            self._waiting = [rows[full:].copy()]
            self._waiting_rows = len(rows) - full

    def finish(self) -> list[ShardEntry]:
        """Writes what waits as a last, smaller shard; returns all."""
        if self._waiting_rows:
            self._write(np.concatenate(self._waiting))
            self._waiting, self._waiting_rows = [], 0
        return self.shards

    def _write(self, tokens_NT: TokenArray) -> None:
        rows = len(tokens_NT)
        ids_N = np.arange(self._next_id, self._next_id + rows, dtype=np.int64)
        self._next_id += rows
        seed = int.from_bytes(hashlib.blake2b(tokens_NT.tobytes(), digest_size=16).digest(), "little")
        order_N = np.random.Generator(np.random.Philox(seed)).permutation(rows)
        data = shard_bytes(tokens_NT[order_N], ids_N[order_N], self._config.row_group_sequences)
        path = f"{self._folder}/{self._index:06d}-{len(self.shards):03d}.parquet"
        self._corpus.write_bytes(path, data)
        size = self._config.row_group_sequences
        self.shards.append(
            ShardEntry(
                path=path,
                sequences=rows,
                first_sequence_id=self._next_id - rows,
                row_group_sequences=[min(size, rows - start) for start in range(0, rows, size)],
                sha256=hashlib.sha256(data).hexdigest(),
                file_bytes=len(data),
            )
        )


def shard_bytes(tokens_NT: TokenArray, ids_N: NDArray[np.int64], row_group_sequences: int) -> bytes:
    """A shard as a Parquet file: `sequence_id` int64 and `tokens`, a fixed-size list of T."""
    values = pa.array(np.ascontiguousarray(tokens_NT).reshape(-1))
    table = pa.table(
        {
            "sequence_id": pa.array(ids_N),
            "tokens": pa.FixedSizeListArray.from_arrays(values, tokens_NT.shape[1]),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=row_group_sequences,
        use_dictionary=False,  # token ids have too many values: measured slower and no smaller
        write_statistics=["sequence_id"],
    )
    return sink.getvalue().to_pybytes()


def encode_remainder(tokens: TokenArray) -> str:
    """Tokens as text that a mark can hold."""
    return base64.b64encode(tokens.tobytes()).decode()


def decode_remainder(text: str, dtype: str) -> TokenArray:
    """What `encode_remainder` was given."""
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype))


class _SplitBuilder:
    """Documents of one unit and split on their way into shards."""

    def __init__(
        self, unit: ReadUnit, split: Split, config: CorpusConfig, tokenizer: CorpusTokenizer, corpus: Store
    ) -> None:
        entry = tokenizer.entry
        dtype = token_dtype(entry.vocab_size)
        self._packer = Packer(config.sequence_tokens, dtype, entry.boundary_token_id, tokenizer.boundary_first)
        self._writer = ShardWriter(corpus, unit.domain, split, unit.index, config)
        self.waiting: list[list[int]] = []
        self.documents = 0
        self.text_bytes = 0

    def flush(self) -> None:
        if self.waiting:
            self._writer.add(self._packer.add(self.waiting))
            self.waiting = []

    def finish(self) -> SplitPart:
        self.flush()
        return SplitPart(
            documents=self.documents,
            text_bytes=self.text_bytes,
            tokens=self._packer.tokens,
            shards=self._writer.finish(),
            remainder=encode_remainder(self._packer.remainder),
        )


class _UnitBuilder:
    """Texts of one unit: cut into sections, sent to their splits, encoded many at a time."""

    def __init__(self, unit: ReadUnit, config: CorpusConfig, tokenizer: CorpusTokenizer, corpus: Store) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._splits = {split: _SplitBuilder(unit, split, config, tokenizer, corpus) for split in SPLITS}
        self._texts: list[str] = []
        self._targets: list[_SplitBuilder] = []
        self._characters = 0

    def add(self, text: str) -> None:
        for section in sections(text, self._config.section_characters):
            data = section.encode()
            builder = self._splits[split_of(data, self._config.split)]
            builder.documents += 1
            builder.text_bytes += len(data)
            self._texts.append(section)
            self._targets.append(builder)
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self._encode()

    def finish(self) -> dict[Split, SplitPart]:
        self._encode()
        return {split: builder.finish() for split, builder in self._splits.items()}

    def _encode(self) -> None:
        for ids, builder in zip(self._tokenizer.encode_batch(self._texts), self._targets, strict=True):
            builder.waiting.append(ids)
        self._texts, self._targets, self._characters = [], [], 0
        for builder in self._splits.values():
            builder.flush()


def _read(piece: Piece, text_field: str, builder: _UnitBuilder) -> PieceCounts:
    lines = documents = malformed = 0
    problems: list[tuple[int, str]] = []
    for item in read_piece(piece, text_field):
        lines += 1
        if isinstance(item, Problem):
            malformed += 1
            if len(problems) < _PROBLEMS_KEPT:
                problems.append((item.line, item.problem))
        elif item.text and not item.text.isspace():
            documents += 1
            builder.add(item.text)
    return PieceCounts(name=piece.name, lines=lines, documents=documents, malformed=malformed, problems=problems)
