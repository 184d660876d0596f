import contextlib
import io
import logging
import os

import pytest

from orchestrator import console as console_module
from orchestrator.console import Console, format_duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


ROW = {"step": 1, "loss": 2.4131, "tokens_per_s": 12300.4, "sparsity": {"head": {"expected": 0.421, "target": 0.5}}}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"), (8.14, "8.1s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m 00s"), (200, "3m 20s"),
        (7500, "2h 05m"), (97200, "1d 03h"), (float("inf"), "?"),
    ],
)  # fmt: skip
def test_durations_read_well(seconds, text):
    """Bands that round apart show `60s` or `1m 60s`."""
    assert format_duration(seconds) == text


def test_progress_says_what_is_going_on(clock):
    stream = io.StringIO()
    console = Console(stream)
    console.progress("pruning", ROW | {"step": 1}, 3200)
    clock.now += 10
    console.progress("pruning", ROW | {"step": 101}, 3200)
    lines = stream.getvalue().splitlines()
    assert lines[0].strip() == "pruning  1/3,200  0 %  loss 2.413  head 0.42/0.50  12,300 tok/s"
    # 3,099 steps at ten a second
    assert lines[1].strip() == "pruning  101/3,200  3 %  loss 2.413  head 0.42/0.50  12,300 tok/s  left 5m 10s"


def test_a_log_gets_a_line_every_few_seconds(clock):
    """A line a step fills a job's log with nothing else."""
    stream = io.StringIO()
    console = Console(stream)
    for step in range(1, 101):
        clock.now += 0.5
        console.progress("recovery", {"step": step, "loss": 1.0}, 100)
    assert 10 <= len(stream.getvalue().splitlines()) <= 12
    assert "100/100  100 %" in stream.getvalue()


def test_a_terminal_shows_one_line_that_changes(clock):
    stream = Terminal()
    console = Console(stream)
    for step in range(1, 11):
        clock.now += 1
        console.progress("recovery", {"step": step, "loss": 1.0}, 100)
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().count("\r") == 2 * 9  # blank the line, then write it
    console.note("a note")
    assert stream.getvalue().endswith("      a note\n")
    console.close()


def test_a_warning_of_a_module_does_not_fall_into_the_line_that_changes(clock):
    """Catches a storage's failure written behind a line of progress, or shown twice, or by a console that is closed."""
    stream = Terminal()
    console = Console(stream)
    logger = logging.getLogger("shearing.patience")
    with console.warnings_of_packages():
        console.progress("recovery", {"step": 1, "loss": 1.0}, 100)
        clock.now += 1
        console.progress("recovery", {"step": 2, "loss": 1.0}, 100)
        logger.warning("writing %s failed", "s3://bucket/x")
        logger.info("nobody asked")
    assert stream.getvalue().endswith("\r      warning: writing s3://bucket/x failed\n")
    logger.warning("too late")
    assert "too late" not in stream.getvalue()


def test_nobody_who_looks_on_ends_no_run():
    """Catches Ctrl-C that also ends `tee`: the run failed on its next word, before it had saved a checkpoint."""
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(OSError), os.fdopen(writing, "w") as stream:
        console = Console(stream)
        console.note("nobody hears")
        console.progress("recovery", {"step": 1, "loss": 1.0}, 100)
        console.close()
    console.warn("nor this, by a stream that is closed")


def test_a_resumed_phase_does_not_get_a_wrong_time_left(clock):
    """Steps repeated after a restart would make the rate negative."""
    stream = io.StringIO()
    console = Console(stream)
    for step in (50, 60, 41, 42, 43):
        clock.now += 10
        console.progress("recovery", {"step": step, "loss": 1.0}, 100)
    last = stream.getvalue().splitlines()[-1]
    assert last.endswith("left 9m 30s")  # 57 steps at 10 s each


def test_stages_are_counted_and_details_are_for_who_asks():
    stream = io.StringIO()
    console = Console(stream)
    console.stage("corpus", 1, 9, "text to sequences")
    console.detail("hidden")
    console.warn("careful")
    assert stream.getvalue() == "[1/9] corpus: text to sequences  (0.0s since the start)\n      warning: careful\n"
    verbose = Console(stream, verbose=True)
    verbose.detail("shown")
    assert stream.getvalue().endswith("shown\n")
