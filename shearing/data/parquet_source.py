"""Sequences read from Parquet shards by this process itself: for one machine, for evaluation and for tests.

Shape suffixes: N sequences, R rows of a read unit, T tokens of a sequence.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shearing.data.mixing import Draw
from shearing.data.order import DrawUnit, SequenceOrder
from shearing.data.source import Sequences, group_by_domain
from shearing.storage import Store


class CorpusDamagedError(RuntimeError):
    """A shard does not hold what the manifest says."""


@dataclass(frozen=True)
class UnitRows:
    """The rows of one read unit in draw order, beginning with draw `first_index`."""

    first_index: int
    tokens_RT: np.ndarray
    sequence_ids_R: np.ndarray


def read_unit(corpus: Store, unit: DrawUnit) -> UnitRows:
    """Read one unit's row groups and put its rows in draw order.

    Raises CorpusDamagedError where the shards hold another number of rows than the manifest says.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for position, (path, row_group) in enumerate(unit.pieces):
        groups.setdefault(path, []).append((position, row_group))
    tokens = [np.empty(0)] * len(unit.pieces)
    ids = [np.empty(0)] * len(unit.pieces)
    for path, wanted in groups.items():
        tables = corpus.read_with(path, partial(_read_groups, groups=[row_group for _, row_group in wanted]))
        for (position, _), table in zip(wanted, tables, strict=True):
            tokens[position], ids[position] = table_tokens(table), table.column("sequence_id").to_numpy()
    tokens_RT, ids_R = np.concatenate(tokens), np.concatenate(ids)
    if len(ids_R) != unit.rows:
        raise CorpusDamagedError(
            f"{corpus.uri}: the row groups {unit.pieces} hold {len(ids_R)} sequences, the manifest says {unit.rows}. "
            f"Delete this folder and prepare the corpus again."
        )
    return UnitRows(unit.first_index, tokens_RT[unit.arrangement], ids_R[unit.arrangement])


def _read_groups(file: BinaryIO, groups: list[int]) -> list[pa.Table]:
    reader = pq.ParquetFile(file, pre_buffer=True)
    return [reader.read_row_group(group, columns=["sequence_id", "tokens"], use_threads=False) for group in groups]


def table_tokens(table: pa.Table) -> np.ndarray:
    """The `tokens` column as an array [rows, T], without a copy where it is one chunk."""
    column = table.column("tokens").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


class ParquetSource:
    """Reads draws from the shards of one split, in process. Holds the last units of each domain. Thread-safe."""

    def __init__(self, corpus: Store, orders: dict[str, SequenceOrder], units_per_domain: int = 2) -> None:
        self.corpus = corpus
        self.orders = orders
        self._units_per_domain = units_per_domain
        self._held: dict[str, OrderedDict[int, UnitRows]] = {domain: OrderedDict() for domain in orders}
        self._locks = {domain: Lock() for domain in orders}
        self.units_read = 0

    def fetch(self, draws: Sequence[Draw]) -> Sequences:
        """The rows of `draws`, in that order."""
        assert draws, "a batch of no sequences"
        tokens_NT: np.ndarray | None = None
        ids_N = np.empty(len(draws), dtype=np.int64)
        for domain, (indices, rows) in group_by_domain(draws).items():
            ascending = np.argsort(indices)  # so that each unit is read once, however the draws are shuffled
            for index, row in zip(indices[ascending].tolist(), rows[ascending].tolist(), strict=True):
                unit = self._unit(domain, index)
                place = index - unit.first_index
                if tokens_NT is None:
                    tokens_NT = np.empty((len(draws), unit.tokens_RT.shape[1]), dtype=unit.tokens_RT.dtype)
                tokens_NT[row], ids_N[row] = unit.tokens_RT[place], unit.sequence_ids_R[place]
        assert tokens_NT is not None
        return Sequences(tokens_NT, ids_N)

    def _unit(self, domain: str, index: int) -> UnitRows:
        order, held = self.orders[domain], self._held[domain]
        with self._locks[domain]:
            for number, unit in reversed(held.items()):
                if unit.first_index <= index < unit.first_index + len(unit.sequence_ids_R):
                    held.move_to_end(number)
                    return unit
            planned = order.unit(order.unit_number(index))
            held[planned.number] = read_unit(self.corpus, planned)
            self.units_read += 1
            while len(held) > self._units_per_domain:
                held.popitem(last=False)
            return held[planned.number]
