"""The run's log: one actor that writes the reports of a phase as JSON lines and keeps the newest for the console."""

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray

from shearing.patience import StorageError
from shearing.storage import Store, open_store

logger = logging.getLogger(__name__)

KEPT_ROWS = 2000
WRITE_EVERY_S = 30.0


class Watcher(Protocol):
    """Whoever shows the rows of a log elsewhere: metrics, a tracker."""

    def recall(self, row: dict[str, Any]) -> None:
        """Learn of a row that an earlier life of the log wrote."""

    def see(self, row: dict[str, Any]) -> None:
        """Show a new row."""

    def close(self) -> None:
        """The phase is over, or its driver was asked to stop."""


MakeWatcher = Callable[[str, str], Watcher]
"""Makes a watcher of the workspace's URI and the phase's name."""


class RunLog:
    """Appends rows to `<workspace>/metrics/<phase>.jsonl`.

    A resumed phase repeats the steps after its checkpoint, so a reader takes the last row of a step and kind.
    On a local disk each push is appended; an object store cannot append, so there the file is written whole by `flush`,
    and by a push every 30 s for those who look on. Rows that a life of this actor took with it before they were written
    are handed in again by `flush`.
    A watcher that fails is let go of, which the log says in a row: what shows a run may not end it.
    """

    def __init__(self, workspace_uri: str, phase: str, watchers: Sequence[MakeWatcher] = ()) -> None:
        self.store: Store = open_store(workspace_uri).child("metrics")
        self.name = f"{phase}.jsonl"
        self.rows: deque[tuple[int, dict[str, Any]]] = deque(maxlen=KEPT_ROWS)
        self.last_number = 0
        self.leaving = False
        self.write_after_s = time.monotonic() + WRITE_EVERY_S
        earlier = self.store.read_bytes(self.name) if self.store.exists(self.name) else b""
        earlier = earlier[: earlier.rfind(b"\n") + 1]  # a killed writer leaves half a line
        self.flushed, self.newest = b"", earlier.splitlines(keepends=True)
        if self.store.is_local:
            self.store.write_bytes(self.name, earlier)
            self.newest = []
        self.watchers: list[Watcher] = []
        rows = [json.loads(line) for line in earlier.splitlines()] if watchers else []
        lost = []
        for make in watchers:
            try:
                self.watchers.append(make(workspace_uri, phase))
            except Exception as error:
                logger.exception("the phase goes on without %s", make)
                lost.append(_without(name_of(make), error, rows[-1]["step"] if rows else 0))
        for row in rows:
            lost += self._tell("recall", row)
        if lost:
            self.push(lost)

    def ask_to_leave(self) -> None:
        """From now on every push is answered with True: the workers are to save a checkpoint and leave."""
        self.leaving = True

    def push(self, rows: list[dict[str, Any]]) -> bool:
        """Write rows and keep them for `newer`. Whether the workers are asked to leave."""
        self._write([_line(row) for row in rows])
        lost = []
        for row in rows:
            self.last_number = max(self.last_number + 1, time.time_ns())  # goes on rising in a restarted actor
            self.rows.append((self.last_number, row))
            lost += self._tell("see", row)
        return self.push(lost) if lost else self.leaving

    def _write(self, lines: list[bytes]) -> None:
        if self.store.is_local:
            self._append(b"".join(lines))
            return
        self.newest += lines
        if time.monotonic() >= self.write_after_s:
            with contextlib.suppress(StorageError):  # the rows are kept, and `flush` is who must not fail
                self.store.hasty().write_bytes(self.name, self._text())
            self.write_after_s = time.monotonic() + WRITE_EVERY_S

    def _text(self) -> bytes:
        return self.flushed + b"".join(self.newest)

    def _append(self, text: bytes) -> None:
        """Whole or not at all: of a line that a full disk cut off, the next one would become a part."""
        with open(self.store.locate(self.name), "ab", buffering=0) as file:
            end = file.tell()
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                file.truncate(end)
                raise

    def _tell(self, how: str, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Show a row to all watchers. Returns rows on those that failed and are watchers no more."""
        lost = []
        for watcher in list(self.watchers):
            try:
                getattr(watcher, how)(row)
            except Exception as error:
                logger.exception("the phase goes on without %s, which failed at %s", name_of(watcher), row)
                self.watchers.remove(watcher)
                lost.append(_without(name_of(watcher), error, row["step"]))
        return lost

    def close(self) -> None:
        """Let the watchers end what they have open."""
        for watcher in self.watchers:
            try:
                watcher.close()
            except Exception:
                logger.exception("%s could not be closed", name_of(watcher))
        self.watchers = []

    def flush(self, pushed: Sequence[dict[str, Any]] = ()) -> None:
        """All that was pushed is on storage when this returns, or StorageError is raised.

        `pushed` are the rows since the last flush that went well, of which a restarted actor knows nothing.
        """
        if self.store.is_local:
            return
        lines = [_line(row) for row in pushed]
        own = set(lines)
        self.newest = [line for line in self.newest if line not in own] + lines
        text = self._text()
        self.store.write_bytes(self.name, text)
        self.flushed, self.newest = text, []

    def newer(self, than: int) -> list[tuple[int, dict[str, Any]]]:
        """Rows pushed after the one numbered `than`, with their numbers; at most the newest KEPT_ROWS."""
        return [(number, row) for number, row in self.rows if number > than]


class RankLog:
    """Sends reports to the log actor from one rank, without waiting for them until `flush`."""

    def __init__(self, actor: Any | None) -> None:
        self.actor = actor
        self.sent: list[Any] = []
        self.unflushed: list[dict[str, Any]] = []
        self.asked = False

    def push(self, report: dict[str, Any]) -> None:
        """Send one."""
        if self.actor is not None:
            self.unflushed.append(report)
            self.sent = [*self.sent[-100:], self.actor.push.remote([report])]

    def asked_to_leave(self) -> bool:
        """Whether the driver wants the workers to leave, as far as the log has answered."""
        if self.sent and not self.asked:
            answered, _ = ray.wait(self.sent[-2:], num_returns=1, timeout=0)
            self.asked = any(ray.get(answered))
        return self.asked

    def flush(self) -> None:
        """All that was sent is on storage when this returns."""
        if self.actor is not None:
            ray.get([*self.sent, self.actor.flush.remote(self.unflushed)])
            self.sent, self.unflushed = [], []


def name_of(shown: Any) -> str:
    """Of a watcher, or of what makes one."""
    return str(getattr(shown, "name", None) or getattr(shown, "__name__", type(shown).__name__))


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _without(name: str, error: Exception, step: int) -> dict[str, Any]:
    """The row that says so, of the same form as `shearing.training.loop.event_report`, whose module loads torch."""
    why = f"{type(error).__name__}: {error}"
    return {
        "kind": "event",
        "step": step,
        "time": time.time(),
        "event": "tracker",
        "text": f"goes on without {name}, which failed: {why}",
    }
