"""The log as a plain class."""

import itertools
import json
import resource

import pytest
from failing_storage import AWAY, failing_store

from actors import run_log
from actors.run_log import RunLog
from shearing.patience import StorageError
from shearing.storage import open_store


@pytest.fixture(params=["local", "object store"])
def workspace(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://run-log-{tmp_path.name}"


def written(workspace):
    return [json.loads(line) for line in open_store(workspace).read_bytes("metrics/pruning.jsonl").splitlines()]


class TestWriting:
    def test_rows_in_order(self, workspace):
        # catches rows lost between a push and the flush that a checkpoint waits for
        log = RunLog(workspace, "pruning")
        log.push([{"step": 1}, {"step": 2}])
        log.push([{"step": 3, "text": "Größe\nzwei"}])
        log.flush()
        assert written(workspace) == [{"step": 1}, {"step": 2}, {"step": 3, "text": "Größe\nzwei"}]

    def test_a_restarted_log_goes_on(self, workspace):
        # catches a restart that empties the file, or writes its rows twice
        for step in (1, 2, 3):
            log = RunLog(workspace, "pruning")
            log.push([{"step": step}])
            log.flush()
            log.flush()
        assert [row["step"] for row in written(workspace)] == [1, 2, 3]

    def test_half_a_line(self, workspace):
        # catches a line that a killed writer left, joined to the first one of the next
        open_store(workspace).write_bytes("metrics/pruning.jsonl", b'{"step": 1}\n{"step": 2, "lo')
        log = RunLog(workspace, "pruning")
        log.push([{"step": 2}])
        log.flush()
        assert written(workspace) == [{"step": 1}, {"step": 2}]

    def test_phases_have_files_of_their_own(self, workspace):
        for phase in ("pruning", "recovery"):
            log = RunLog(workspace, phase)
            log.push([{"phase": phase}])
            log.flush()
        assert written(workspace) == [{"phase": "pruning"}]

    def test_a_disk_that_fills_up_and_is_cleared(self, tmp_path):
        """Catches the part of a row that still fitted, joined to the first row that fits again."""
        log = RunLog(str(tmp_path), "pruning")
        log.push([{"step": 1}])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len('{"step": 1}\n') + 5, hard))
        try:
            with pytest.raises(OSError, match="large"):
                log.push([{"step": 2}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.push([{"step": 2}])
        assert written(str(tmp_path)) == [{"step": 1}, {"step": 2}]
        assert [row for _, row in log.newer(0)] == [{"step": 1}, {"step": 2}]

    def test_local_rows_need_no_flush(self, tmp_path):
        # catches a console and a report that lag behind on a local disk
        RunLog(str(tmp_path), "pruning").push([{"step": 1}])
        assert written(str(tmp_path)) == [{"step": 1}]


class TestObjectStore:
    def test_rows_that_a_killed_log_took_with_it_are_written_again(self):
        """Catches steps that are in no file: pushed to a log that was killed before it could write them."""
        workspace = "memory://run-log-killed"
        rows = [{"step": step} for step in range(1, 7)]
        first = RunLog(workspace, "pruning")
        first.push(rows[:2])
        first.flush(rows[:2])
        first.push(rows[2:4])
        again = RunLog(workspace, "pruning")
        again.push(rows[4:])
        again.flush(rows[2:])
        again.flush()
        assert written(workspace) == rows

    def test_rows_of_others_stay(self):
        # catches a flush by new workers that drops what dead ones had pushed
        workspace = "memory://run-log-others"
        log = RunLog(workspace, "pruning")
        log.push([{"step": 1, "of": "dead workers"}, {"step": 1, "of": "new workers"}])
        log.flush([{"step": 1, "of": "new workers"}])
        assert [row["of"] for row in written(workspace)] == ["dead workers", "new workers"]

    def test_an_outage_loses_no_row(self, tmp_path):
        """Catches rows that are forgotten because a write of theirs failed."""
        store, handler = failing_store(tmp_path / "remote")
        log = RunLog("memory://run-log-outage", "pruning")
        log.store = store.hasty()
        handler.faults = itertools.repeat(AWAY)
        log.push([{"step": 1}])
        with pytest.raises(StorageError, match="failed once"):
            log.flush([{"step": 1}])
        handler.faults = iter(())
        log.push([{"step": 2}])
        log.flush([{"step": 2}])
        assert [json.loads(line) for line in store.read_bytes("pruning.jsonl").splitlines()] == [
            {"step": 1},
            {"step": 2},
        ]

    def test_who_looks_on_need_not_wait_for_a_checkpoint(self, monkeypatch):
        # catches a run that is dead to whoever watches, for as long as its checkpoints are apart; and a failure to show
        monkeypatch.setattr(run_log, "WRITE_EVERY_S", 0.0)
        workspace = "memory://run-log-watched"
        log = RunLog(workspace, "pruning")
        log.push([{"step": 1}])
        assert written(workspace) == [{"step": 1}]

    def test_a_push_that_cannot_be_written_is_kept(self, tmp_path, monkeypatch):
        # catches a phase that ends for rows which nobody needed yet
        monkeypatch.setattr(run_log, "WRITE_EVERY_S", 0.0)
        store, handler = failing_store(tmp_path / "remote")
        log = RunLog("memory://run-log-unwatched", "pruning")
        log.store, handler.faults = store, itertools.repeat(AWAY)
        log.push([{"step": 1}])
        assert handler.calls == 1
        handler.faults = iter(())
        log.flush()
        assert store.read_bytes("pruning.jsonl") == b'{"step": 1}\n'


class TestNewer:
    def test_gives_each_row_once(self, workspace):
        # catches rows that a follower misses or sees twice
        log, seen, found = RunLog(workspace, "pruning"), 0, []
        for rows in ([{"step": 1}], [], [{"step": 2}, {"step": 3}]):
            log.push(rows)
            for number, row in log.newer(seen):
                seen = number
                found.append(row["step"])
        assert found == [1, 2, 3]
        assert log.newer(seen) == []

    def test_numbers_go_on_rising_after_a_restart(self, workspace):
        # catches a follower that waits for numbers which a restarted log will not reach for hours
        first = RunLog(workspace, "pruning")
        first.push([{"step": n} for n in range(50)])
        seen = first.newer(0)[-1][0]
        again = RunLog(workspace, "pruning")
        again.push([{"step": 50}])
        assert [row for _, row in again.newer(seen)] == [{"step": 50}]

    def test_keeps_the_newest(self, workspace):
        # catches a log whose memory grows with the run
        log = RunLog(workspace, "pruning")
        log.push([{"step": n} for n in range(run_log.KEPT_ROWS + 7)])
        rows = log.newer(0)
        assert len(rows) == run_log.KEPT_ROWS
        assert rows[-1][1] == {"step": run_log.KEPT_ROWS + 6}


class Shown:
    """A watcher that remembers, and fails at a step or from the first."""

    def __init__(self, fails_at=None):
        self.rows, self.fails_at = [], fails_at

    def __call__(self, workspace_uri, phase):
        if self.fails_at == "start":
            raise ImportError("no such tracker here")
        return self

    def recall(self, row):
        self.rows.append(("recalled", row["step"]))

    def see(self, row):
        if row["step"] == self.fails_at:
            raise OSError("the tracker's server is gone")
        self.rows.append(("seen", row["step"]))

    def close(self):
        self.rows.append(("closed", None))
        if self.fails_at == "end":
            raise OSError("the tracker's server is gone")


class TestWatchers:
    def test_see_every_row_and_are_told_what_was_before(self, workspace):
        # catches sums and counts that start anew with each life of the log
        RunLog(workspace, "pruning").push([{"step": 1}])
        shown = Shown()
        if not open_store(workspace).is_local:
            open_store(workspace).write_bytes("metrics/pruning.jsonl", b'{"step": 1}\n')
        log = RunLog(workspace, "pruning", [shown])
        log.push([{"step": 2}, {"step": 3}])
        assert shown.rows == [("recalled", 1), ("seen", 2), ("seen", 3)]

    def test_one_that_fails_ends_nothing(self, workspace):
        # catches a run that dies of a tracker, or a broken tracker that is asked at every step
        broken, missing, sound = Shown(fails_at=2), Shown(fails_at="start"), Shown()
        log = RunLog(workspace, "pruning", [missing, broken, sound])
        log.push([{"step": 1}, {"step": 2}, {"step": 3}])
        log.flush()
        assert [row for row in written(workspace) if "kind" not in row] == [{"step": 1}, {"step": 2}, {"step": 3}]
        assert broken.rows == [("seen", 0), ("seen", 1)], "the missing one is told of first"
        assert [step for _, step in sound.rows] == [0, 1, 2, 3, 2]

    def test_one_that_fails_is_told_of(self, workspace):
        # catches a tracker that says nothing for hours, and nobody knows that it has failed
        log = RunLog(workspace, "pruning", [Shown(fails_at="start"), Shown(fails_at=2)])
        log.ask_to_leave()
        assert log.push([{"step": 1}, {"step": 2}])
        events = [row for _, row in log.newer(0) if row.get("kind") == "event"]
        assert [(event["step"], event["text"].split(": ", 1)[1]) for event in events] == [
            (0, "ImportError: no such tracker here"),
            (2, "OSError: the tracker's server is gone"),
        ]
        log.flush()
        assert [row for row in written(workspace) if "kind" in row] == events

    def test_are_closed_with_the_phase(self, workspace):
        # catches a tracker whose run is shown as going on for ever, and one that fails before the others are closed
        failing, sound = Shown(fails_at="end"), Shown()
        RunLog(workspace, "pruning", [failing, sound]).close()
        assert failing.rows == sound.rows == [("closed", None)]
