"""Sequences for all ranks from one Ray Data stream a domain.

A domain's stream is executed in windows of a few read units. A Ray Data execution that waits for its reader keeps
polling: seven of them take 0.75 of a core, as long as training lasts. So each execution reads its window to the end and
is gone, and the next begins when a reader comes to the second half; in between nothing runs. What a window holds is
addressed by draw index, never by the order in which Ray Data delivers, so nothing depends on it.

Shape suffixes: N sequences, T tokens of a sequence.
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from shearing.data.manifest import Split, load_manifest
from shearing.data.mixing import Draw
from shearing.data.order import DrawUnit, SequenceOrder
from shearing.data.parquet_source import UnitRows, read_unit, table_tokens
from shearing.data.source import Sequences, group_by_domain, make_orders
from shearing.storage import open_store

logger = logging.getLogger(__name__)

WINDOW_BYTES = 2**24
WINDOW_UNITS = 8
READ_TASK_CPUS = 0
"""Workers may hold every CPU there is: a read task that asked for a part of one would never start."""

EXECUTIONS_AT_ONCE = max(2, (os.cpu_count() or 1) // 4)
"""Seven cold reader processes import for longer than two warm ones read seven domains."""


class StreamError(RuntimeError):
    """A domain's stream failed or delivered rows that nobody planned."""


@dataclass(frozen=True)
class FeedPlan:
    """What a feeder serves: draws of `split`, ordered by `seed`.

    `start` is the first draw index that will be asked for in each domain, known when the feeder is made; it only saves
    time. `end` bounds what is read ahead: no rank will ask for that draw or a later one.
    """

    corpus_uri: str
    split: Split
    seed: int
    start: dict[str, int]
    end: dict[str, int]


@dataclass
class _Window:
    """Read units [first, stop) of a domain, arriving."""

    first: int
    stop: int
    units: dict[int, UnitRows] = field(default_factory=dict)
    waiting: int = 0
    error: BaseException | None = None


def _plan_row(unit: DrawUnit) -> dict[str, Any]:
    """A read unit as a row of the Dataset that plans a window."""
    return {
        "unit": unit.number,
        "epoch": unit.epoch,
        "first_index": unit.first_index,
        "paths": [path for path, _ in unit.pieces],
        "row_groups": [group for _, group in unit.pieces],
        "arrangement": unit.arrangement,
    }


def _read_planned(batch: pa.Table, corpus_uri: str) -> pa.Table:
    """One planned unit to its rows: `index` int64, `sequence_id` int64, `tokens` fixed-size list [T]."""
    assert batch.num_rows == 1, "one read unit a task"
    plan = {name: batch.column(name)[0].as_py() for name in ("unit", "epoch", "first_index", "paths", "row_groups")}
    arrangement = np.asarray(batch.column("arrangement")[0].as_py(), dtype=np.int64)
    pieces = tuple(zip(plan["paths"], plan["row_groups"], strict=True))
    unit = DrawUnit(plan["unit"], plan["epoch"], plan["first_index"], pieces, arrangement)
    rows = read_unit(open_store(corpus_uri), unit)
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.tokens_RT.reshape(-1)), rows.tokens_RT.shape[1])
    index = pa.array(np.arange(unit.first_index, unit.end_index))
    return pa.table({"index": index, "sequence_id": pa.array(rows.sequence_ids_R), "tokens": tokens})


class DomainStream:
    """One domain's rows by draw index, from Ray Data executions over windows of its order. Thread-safe."""

    def __init__(
        self, corpus_uri: str, order: SequenceOrder, end: int, token_bytes: int, slots: threading.Semaphore
    ) -> None:
        self.corpus_uri = corpus_uri
        self.order = order
        self._slots = slots
        self.end_unit = order.unit_number(max(0, end - 1)) + 1
        row_bytes = order.sequence_tokens * token_bytes
        unit_bytes = row_bytes * order.sequences / order.units_per_epoch
        self._units_per_window = max(1, min(WINDOW_UNITS, int(WINDOW_BYTES // unit_bytes)))
        self._windows: list[_Window] = []  # least recently used first
        self._kept_windows = 1
        self._changed = threading.Condition()
        self.windows_opened = 0
        self.rebuilds = 0
        self.seconds_to_open: float | None = None
        self._made = time.monotonic()

    def expect(self, first: int, last: int) -> None:
        """Begin to read the windows of draws `first` to `last`, and the next one where that ends in a second half.

        Windows of three such requests are kept: ranks that are one apart would take away each other's otherwise.
        """
        number, last_number = self.order.unit_number(first), self.order.unit_number(last)
        with self._changed:
            for spanned in itertools.count(1):
                self._kept_windows = max(self._kept_windows, 3 * spanned + 1)
                window = self._window(number)
                number = window.stop
                if last_number < window.stop:
                    break
            if 2 * (last_number + 1 - window.first) > window.stop - window.first and window.stop < self.end_unit:
                self._window(window.stop)
                self._use(window)

    def unit_rows(self, number: int) -> UnitRows:
        """The rows of one read unit; waits for them. Raises StreamError."""
        with self._changed:
            window = self._window(number)
            window.waiting += 1
            try:
                self._changed.wait_for(lambda: number in window.units or window.error is not None)
            finally:
                window.waiting -= 1
            if number in window.units:
                return window.units[number]
            if window in self._windows:
                self._windows.remove(window)  # so that the next who asks begins anew
            raise StreamError(
                f"domain {self.order.domain}: read unit {number} could not be read: {window.error}"
            ) from window.error

    def _window(self, number: int) -> _Window:
        """The window that holds a unit, opened where there is none. The caller holds the lock."""
        for window in self._windows:
            if window.first <= number < window.stop and window.error is None:
                self._use(window)
                return window
        assert number < self.end_unit, (
            f"{self.order.domain}: unit {number} was asked for, the plan ends at {self.end_unit}"
        )
        following = [w for w in self._windows if w.first > number]
        stop = min([number + self._units_per_window, self.end_unit, *(w.first for w in following)])
        self.rebuilds += bool(self._windows) and all(w.stop != number for w in self._windows)
        window = _Window(number, stop)
        self._windows.append(window)
        self._drop_unused()
        self.windows_opened += 1
        threading.Thread(target=self._execute, args=(window,), name=f"stream-{self.order.domain}", daemon=True).start()
        return window

    def _use(self, window: _Window) -> None:
        self._windows.remove(window)
        self._windows.append(window)

    def _drop_unused(self) -> None:
        for window in self._windows[: -self._kept_windows]:
            if not window.waiting:
                self._windows.remove(window)

    def _execute(self, window: _Window) -> None:
        """Run one window's Ray Data execution to its end, handing on each unit as it comes."""
        try:
            with self._slots:
                for bundle in self._dataset(window).iter_internal_ref_bundles():
                    for block in ray.get(list(bundle.block_refs)):
                        self._deliver(window, block)
            missing = sorted(set(range(window.first, window.stop)) - set(window.units))
            if missing:
                raise StreamError(f"Ray Data ended without units {missing}")
        except BaseException as error:  # whoever waits for the window has to hear of it
            logger.warning("stream of %s failed: %s", self.order.domain, error)
            with self._changed:
                window.error = error
                self._changed.notify_all()

    def _dataset(self, window: _Window) -> Any:
        plans = [_plan_row(self.order.unit(number)) for number in range(window.first, window.stop)]
        read: Any = _read_planned
        dataset = ray.data.from_items(plans, override_num_blocks=len(plans)).map_batches(
            read,
            fn_kwargs={"corpus_uri": self.corpus_uri},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=READ_TASK_CPUS,
            compute=ray.data.TaskPoolStrategy(size=1),
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        context.execution_no_progress_timeout_s = -1
        context.enable_progress_bars = False
        context.enable_auto_log_stats = False
        dataset.set_name(f"{self.order.domain}_{window.first}")
        return dataset

    def _deliver(self, window: _Window, block: pa.Table) -> None:
        """Take a block of whole units. Raises StreamError where its rows are not those planned."""
        index_N = block.column("index").to_numpy()
        ids_N = block.column("sequence_id").to_numpy()
        tokens_NT = table_tokens(block)
        while len(index_N):
            planned = self.order.unit(self.order.unit_number(int(index_N[0])))
            if not np.array_equal(index_N[: planned.rows], np.arange(planned.first_index, planned.end_index)):
                raise StreamError(f"rows of unit {planned.number} came torn or out of order")
            if planned.number in window.units or not window.first <= planned.number < window.stop:
                raise StreamError(f"unit {planned.number} came twice or unasked")
            if len(np.unique(ids_N[: planned.rows])) != planned.rows:
                raise StreamError(f"unit {planned.number} holds a sequence_id twice")
            rows = UnitRows(planned.first_index, tokens_NT[: planned.rows], ids_N[: planned.rows])
            with self._changed:
                window.units[planned.number] = rows
                if self.seconds_to_open is None:
                    self.seconds_to_open = time.monotonic() - self._made
                self._changed.notify_all()
            index_N, ids_N, tokens_NT = index_N[planned.rows :], ids_N[planned.rows :], tokens_NT[planned.rows :]


class SequenceFeeder:
    """Serves any draws of any domain to any number of ranks at once.

    A plain class; `start_feeder` makes it an actor. All domains open at the same time. It keeps nothing that matters:
    made anew, or asked for draws long past, it reads from there again. Raises UserError for a domain that
    the corpus lacks.
    """

    def __init__(self, plan: FeedPlan) -> None:
        import ray.data  # takes seconds: better while the actor starts than in the first fetch

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        manifest = load_manifest(open_store(plan.corpus_uri))
        token_bytes = np.dtype(manifest.token_dtype).itemsize
        orders = make_orders(manifest, plan.split, plan.start, plan.seed)
        slots = threading.Semaphore(EXECUTIONS_AT_ONCE)
        self.streams = {d: DomainStream(plan.corpus_uri, o, plan.end[d], token_bytes, slots) for d, o in orders.items()}
        self.rows_served = 0
        self._count_lock = threading.Lock()
        for domain, stream in self.streams.items():
            if plan.start[domain] < plan.end[domain]:
                stream.expect(plan.start[domain], plan.start[domain])

    def fetch(self, draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
        """`draws` -> (tokens [N, T] in the corpus's type, sequence ids [N] int64), rows in the order asked."""
        assert draws, "a batch of no sequences"
        grouped = group_by_domain(draws)
        for domain, (indices, _) in grouped.items():
            self.streams[domain].expect(int(indices.min()), int(indices.max()))
        tokens_NT: np.ndarray | None = None
        ids_N = np.empty(len(draws), dtype=np.int64)
        for domain, (indices_M, rows_M) in grouped.items():
            stream = self.streams[domain]
            units_M = np.array([stream.order.unit_number(index) for index in indices_M.tolist()])
            for number in np.unique(units_M).tolist():
                here_M = units_M == number
                unit = stream.unit_rows(number)
                places = indices_M[here_M] - unit.first_index
                if tokens_NT is None:
                    tokens_NT = np.empty((len(draws), unit.tokens_RT.shape[1]), dtype=unit.tokens_RT.dtype)
                tokens_NT[rows_M[here_M]] = unit.tokens_RT[places]
                ids_N[rows_M[here_M]] = unit.sequence_ids_R[places]
        assert tokens_NT is not None
        with self._count_lock:
            self.rows_served += len(draws)
        return tokens_NT, ids_N

    def stats(self) -> dict[str, Any]:
        """Seconds until the last domain's first unit came (None: not yet), rows served, executions, rebuilds."""
        opened = [s.seconds_to_open for s in self.streams.values()]
        return {
            "seconds_to_open": None if None in opened else max(o for o in opened if o is not None),
            "rows_served": self.rows_served,
            "windows_opened": sum(s.windows_opened for s in self.streams.values()),
            "rebuilds": sum(s.rebuilds for s in self.streams.values()),
        }


def start_feeder(plan: FeedPlan, name: str | None = None, max_concurrency: int = 64) -> Any:
    """A SequenceFeeder as a restartable actor; `max_concurrency` bounds the fetches served at once."""
    actor: Any = ray.remote(SequenceFeeder)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": max_concurrency}
    return actor.options(name=name, get_if_exists=name is not None, **options).remote(plan)


class RayDataSource:
    """A SequenceSource that asks a feeder actor; one on every rank. Thread-safe."""

    def __init__(self, feeder: Any) -> None:
        self.feeder = feeder

    def fetch(self, draws: Sequence[Draw]) -> Sequences:
        """The rows of `draws`, in that order. Arrays are read-only views of shared memory."""
        tokens_NT, ids_N = ray.get(self.feeder.fetch.remote(list(draws)))
        return Sequences(tokens_NT, ids_N)
