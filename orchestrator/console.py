"""What a person sees while a run goes on: stage headers, progress, notes and warnings."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

PLAIN_EVERY_S = 5.0
LIVE_EVERY_S = 0.2
RATE_WINDOW_STEPS = 20
PACKAGES = ("actors", "orchestrator", "shearing")


def format_duration(seconds: float) -> str:
    """Seconds as `8.1s`, `3m 20s`, `2h 05m` or `4d 03h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, below, small_unit, width in ((60, 3600, "s", 2), (3600, 86400, "m", 2), (86400, math.inf, "h", 2)):
        if whole < 60:
            return f"{whole}s"
        if whole < below:
            big = {60: "m", 3600: "h", 86400: "d"}[unit]
            small = whole % unit // {60: 1, 3600: 60, 86400: 3600}[unit]
            return f"{whole // unit}{big} {small:0{width}d}{small_unit}"
    raise AssertionError("the last band has no upper end")


def describe_row(row: Mapping[str, Any]) -> str:
    """The figures of one metrics row that a person follows: loss, sparsity against target, tokens a second."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.3f}")
    if "divergence" in row:
        parts.append(f"KL to teacher {row['divergence']:.3f}")
    for group, state in row.get("sparsity", {}).items():
        if state["target"] is None:  # its target is one with the others'
            continue
        parts.append(f"{group} {state['expected']:.2f}/{state['target']:.2f}")
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tok/s")
    if row.get("text"):
        parts.append(str(row["text"]))
    return "  ".join(parts)


class Console:
    """Lines for a person. On a terminal the progress of a phase rewrites one line; elsewhere a line every few seconds.

    Args:
        stream: Where it is written, usually standard error.
        verbose: Also show what is marked as detail.
    """

    def __init__(self, stream: TextIO, verbose: bool = False) -> None:
        self.verbose = verbose
        self._stream = stream
        self._live = stream.isatty()
        self._live_width = 0
        self._started = time.monotonic()
        self._last_shown = -math.inf
        self._phase = ""
        self._rate: list[tuple[int, float]] = []

    def stage(self, name: str, number: int, of: int, title: str = "") -> None:
        """A stage begins."""
        elapsed = format_duration(time.monotonic() - self._started)
        self._line(f"[{number}/{of}] {name}{f': {title}' if title else ''}  ({elapsed} since the start)")
        self._phase = ""

    def progress(self, phase: str, row: Mapping[str, Any], total_steps: int) -> None:
        """The newest row of a phase; `row` holds `step` and what metrics rows hold. Shown when it is time to.

        The first and the last step of a phase are always shown.
        """
        step = int(row["step"])
        now = time.monotonic()
        first = phase != self._phase or (bool(self._rate) and step < self._rate[-1][0])
        if first:
            self._phase, self._rate = phase, []
        if not self._rate or step > self._rate[-1][0]:
            self._rate = [*self._rate[-RATE_WINDOW_STEPS:], (step, now)]
        last = step >= total_steps
        if not (first or last) and now - self._last_shown < (LIVE_EVERY_S if self._live else PLAIN_EVERY_S):
            return
        self._last_shown = now
        share = 100 * step / max(total_steps, 1)
        text = f"{phase}  {step:,}/{total_steps:,}  {share:.0f} %  {describe_row(row)}{self._left(step, total_steps)}"
        if self._live and not last:
            self._rewrite(text)
        else:
            self._line(f"      {text}")

    def note(self, text: str) -> None:
        """Something worth a line."""
        for line in text.splitlines():
            self._line(f"      {line}")

    def detail(self, text: str) -> None:
        """Something worth a line only to who asked for all."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Something that may be wrong and does not stop the run."""
        self._line(f"      warning: {text}")

    @contextlib.contextmanager
    def warnings_of_packages(self) -> Iterator[None]:
        """What this process' own packages log as a warning is one here, not a line amid a line of progress."""
        handler = _AsWarnings(self)
        for name in PACKAGES:
            logging.getLogger(name).addHandler(handler)
        try:
            yield
        finally:
            for name in PACKAGES:
                logging.getLogger(name).removeHandler(handler)

    def text(self, text: str) -> None:
        """Text as it is, at the left margin."""
        for line in text.splitlines():
            self._line(line)

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        if self._live_width:
            self._write("\n")
            self._live_width = 0

    def _left(self, step: int, total_steps: int) -> str:
        (first_step, first_time), (last_step, last_time) = self._rate[0], self._rate[-1]
        if step >= total_steps or last_step == first_step:
            return ""
        return f"  left {format_duration((last_time - first_time) / (last_step - first_step) * (total_steps - step))}"

    def _line(self, text: str) -> None:
        self._write(f"{self._blank()}{text}\n")
        self._live_width = 0

    def _rewrite(self, text: str) -> None:
        text = f"      {text}"
        self._write(f"{self._blank()}{text}")
        self._live_width = len(text)

    def _blank(self) -> str:
        return f"\r{' ' * self._live_width}\r" if self._live_width else ""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever looked on is gone, which ends no run
            self._stream.write(text)
            self._stream.flush()


class _AsWarnings(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.warn(self.format(record))
