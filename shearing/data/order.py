"""The order in which a domain's sequences are drawn: a pure function of its manifest entry and a seed.

A domain's draws are numbered 0, 1, 2, ... through all epochs, so that one integer a domain is the whole position of
a training run in its data, whatever the number of workers was or is.
"""

import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from shearing.data.manifest import SplitEntry
from shearing.errors import UserError

UNIT_TOKENS = 2**21
"""Tokens read and shuffled together: 4 MiB of uint16. Larger mixes better, smaller starts sooner."""

KEPT_UNITS = 16


@dataclass(frozen=True)
class DrawUnit:
    """Row groups read together and shuffled together: draws `first_index` to `first_index + rows - 1`.

    `pieces` are (shard path, row group) pairs; the row groups joined in that order hold the unit's rows, and draw
    `first_index + i` is row `arrangement[i]` of them.
    """

    number: int
    epoch: int
    first_index: int
    pieces: tuple[tuple[str, int], ...]
    arrangement: np.ndarray = field(repr=False)

    @property
    def rows(self) -> int:
        """Sequences of the unit."""
        return len(self.arrangement)

    @property
    def end_index(self) -> int:
        """The draw after the last of the unit."""
        return self.first_index + self.rows


@dataclass(frozen=True)
class Place:
    """Where one draw lies: row `row` of the Parquet file `shard`, in epoch `epoch`."""

    epoch: int
    shard: str
    row: int


@dataclass(frozen=True)
class _Epoch:
    """One epoch's permutation of row groups [G], and at which draw of the epoch each unit starts [U + 1]."""

    row_groups_G: np.ndarray
    unit_starts_U: np.ndarray


class SequenceOrder:
    """Maps the draw indices of one domain to places in its shards. Thread-safe; the same in every process.

    Each epoch is a seeded permutation of all row groups of the split. Consecutive ones of it form a read unit of about
    `unit_tokens` tokens, whose rows are shuffled together: reads stay few and large, and neighbours in the order come
    from all over the split. Raises UserError for a split without sequences.
    """

    def __init__(self, domain: str, entry: SplitEntry, seed: int, unit_tokens: int = UNIT_TOKENS) -> None:
        if entry.sequences < 1:
            raise UserError(
                f"domain {domain} holds no sequences in a split that is drawn from; allowed: at least 1. "
                f"Give the domain more text, or take it out of corpus.domains."
            )
        self.domain = domain
        self.sequences = entry.sequences
        self.sequence_tokens = entry.tokens // entry.sequences
        self._paths = [shard.path for shard in entry.shards]
        counts = [shard.row_group_sequences for shard in entry.shards]
        self._shard_G = np.repeat(np.arange(len(counts)), [len(c) for c in counts])
        self._group_in_shard_G = np.concatenate([np.arange(len(c)) for c in counts])
        self._rows_G = np.concatenate([np.asarray(c, dtype=np.int64) for c in counts])
        self._first_row_G = np.concatenate([np.cumsum([0, *c])[:-1] for c in counts])
        assert int(self._rows_G.sum()) == self.sequences, f"{domain}: row groups do not add up to the split"
        group_tokens = entry.tokens / len(self._rows_G)
        self._groups_per_unit = max(1, min(len(self._rows_G), round(unit_tokens / group_tokens)))
        self.units_per_epoch = -(-len(self._rows_G) // self._groups_per_unit)
        self._entropy = (seed, zlib.crc32(domain.encode()))
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._units: OrderedDict[int, DrawUnit] = OrderedDict()
        self._lock = Lock()

    def unit_number(self, index: int) -> int:
        """The read unit that holds a draw. Units are numbered through all epochs."""
        epoch, offset = divmod(index, self.sequences)
        starts_U = self._epoch(epoch).unit_starts_U
        return epoch * self.units_per_epoch + int(np.searchsorted(starts_U, offset, side="right")) - 1

    def unit(self, number: int) -> DrawUnit:
        """The read unit of that number."""
        with self._lock:
            if number in self._units:
                self._units.move_to_end(number)
                return self._units[number]
        unit = self._make_unit(number)
        with self._lock:
            self._units[number] = unit
            while len(self._units) > KEPT_UNITS:
                self._units.popitem(last=False)
        return unit

    def locate(self, index: int) -> Place:
        """Epoch, shard and row of a draw."""
        unit = self.unit(self.unit_number(index))
        row = int(unit.arrangement[index - unit.first_index])
        for shard, first_row, rows in self._pieces(unit.number):
            if row < rows:
                return Place(unit.epoch, self._paths[shard], first_row + row)
            row -= rows
        raise AssertionError(f"draw {index} lies outside its unit")

    def _pieces(self, number: int) -> list[tuple[int, int, int]]:
        """(shard, first row, rows) of each row group of a unit."""
        groups = self._groups(number)
        return [(int(self._shard_G[g]), int(self._first_row_G[g]), int(self._rows_G[g])) for g in groups]

    def _groups(self, number: int) -> np.ndarray:
        epoch, unit = divmod(number, self.units_per_epoch)
        first = unit * self._groups_per_unit
        return self._epoch(epoch).row_groups_G[first : first + self._groups_per_unit]

    def _make_unit(self, number: int) -> DrawUnit:
        epoch, unit = divmod(number, self.units_per_epoch)
        groups = self._groups(number)
        rows = int(self._rows_G[groups].sum())
        generator = np.random.default_rng((*self._entropy, epoch, 1 + unit))
        return DrawUnit(
            number=number,
            epoch=epoch,
            first_index=epoch * self.sequences + int(self._epoch(epoch).unit_starts_U[unit]),
            pieces=tuple((self._paths[self._shard_G[g]], int(self._group_in_shard_G[g])) for g in groups),
            arrangement=generator.permutation(rows),
        )

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                generator = np.random.default_rng((*self._entropy, epoch, 0))
                row_groups_G = generator.permutation(len(self._rows_G))
                ends_G = np.concatenate([[0], np.cumsum(self._rows_G[row_groups_G])])
                starts_U = np.append(ends_G[: -1 : self._groups_per_unit], self.sequences)
                self._epochs[epoch] = _Epoch(row_groups_G, starts_U)
                while len(self._epochs) > 3:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]
