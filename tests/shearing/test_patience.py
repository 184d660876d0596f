"""Storage that fails for a moment, whatever it was about to do."""

import itertools
import logging
import pickle
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.fs as pafs
import pytest
from failing_storage import AWAY, failing_store

from shearing import patience
from shearing.patience import S3, StorageError, patiently
from shearing.storage import open_store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_WAIT_S", 0.002)


@pytest.fixture
def failing(tmp_path):
    """A remote folder with one file, and what makes its calls fail."""
    store, handler = failing_store(tmp_path / "remote")
    (tmp_path / "remote" / "run" / "old").write_bytes(b"old")
    return store, handler


def upload(store, tmp_path):
    (tmp_path / "file").write_bytes(b"new")
    store.upload(tmp_path / "file", "deep/new")
    return store.read_bytes("deep/new")


def download(store, tmp_path):
    (tmp_path / "here").mkdir()
    store.download(tmp_path / "here")
    return (tmp_path / "here" / "old").read_bytes()


def written(store, _):
    store.write_bytes("deep/new", b"new")
    return store.read_bytes("deep/new")


def deleted(store, _):
    store.delete("old")
    return store.list()


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done, but not answered"])
@pytest.mark.parametrize(
    ("operation", "result"),
    [
        (lambda store, _: store.exists("old"), True),
        (lambda store, _: store.size("old"), 3),
        (lambda store, _: store.list(), ["old"]),
        (lambda store, _: [info.base_name for info in store.files()], ["old"]),
        (lambda store, _: store.read_bytes("old"), b"old"),
        (lambda store, _: store.read_with("old", lambda stream: stream.read()), b"old"),
        (written, b"new"),
        (deleted, []),
        (upload, b"new"),
        (download, b"old"),
    ],
    ids=["exists", "size", "list", "files", "read", "read with", "write", "delete", "upload", "download"],
)
def test_every_operation_outlives_an_outage(failing, tmp_path, operation, result, after):
    """Catches an operation that one failed request ends, and one that a second try spoils."""
    store, handler = failing
    handler.after = after
    handler.faults = iter([AWAY, AWAY, None, AWAY])
    assert operation(store, tmp_path) == result
    assert handler.calls > 2


def test_an_outage_that_lasts_ends_in_words(failing, caplog):
    """Catches a wait without end, one without a word, and an error that names neither file nor reason."""
    store, handler = failing
    handler.faults = itertools.repeat(AWAY)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError) as raised:
        replace(store, patience_s=0.1).read_bytes("old")
    assert handler.calls > 10
    said = str(raised.value)
    assert said.startswith("reading mock://bucket/run/old failed ")
    assert "NETWORK_CONNECTION" in said
    assert "Details" not in said
    assert len([r for r in caplog.records if "tried again" in r.message]) == 1


def test_what_was_away_for_a_while_is_told_once_it_is_back(failing, caplog):
    """Catches a log in which an outage begins and never ends."""
    store, handler = failing
    handler.faults = iter([AWAY])
    with caplog.at_level(logging.WARNING):
        assert store.read_bytes("old") == b"old"
    assert "went well" in caplog.messages[-1]


@pytest.mark.parametrize(
    "refusal",
    [
        OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied"),
        OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist"),
    ],
)
def test_a_refusal_is_told_at_once(failing, refusal):
    """Catches a user with wrong credentials, who waits a minute to hear of it."""
    store, handler = failing
    handler.faults = itertools.repeat(refusal)
    with pytest.raises(StorageError, match="was refused"):
        store.exists("old")
    assert handler.calls == 1


@pytest.mark.parametrize("passing", ["HTTP status 503", "HTTP status 429", "SLOW_DOWN", "INTERNAL_FAILURE"])
def test_what_passes_is_no_refusal(failing, passing):
    """Catches a store that asks for patience, taken for one that says no."""
    store, handler = failing
    handler.faults = iter([OSError(f"AWS Error {passing}")])
    assert store.exists("old")


def test_a_file_that_is_not_there_is_an_answer(failing):
    """Catches a minute's wait for a file that will not come."""
    store, handler = failing
    with pytest.raises(FileNotFoundError):
        store.read_bytes("nothing")
    assert handler.calls == 1


def test_what_is_not_worth_waiting_for_is_tried_once(failing):
    """Catches a stop that takes minutes for words that nobody needs."""
    store, handler = failing
    handler.faults = itertools.repeat(AWAY)
    with pytest.raises(StorageError, match="failed once"):
        store.hasty().child("deep").write_bytes("new", b"new")
    assert handler.calls == 1


def test_a_local_disk_is_not_waited_for(tmp_path, monkeypatch):
    """Catches a full disk that is tried sixty seconds long."""
    store, tries = open_store(str(tmp_path)), []

    def full_disk(_):
        tries.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        store.write_bytes("x", b"1")
    assert len(tries) == 1


def test_waits_within_waits_are_not_multiplied():
    """Catches patience of an hour, made of sixty times sixty seconds."""
    tries = []

    def fail():
        tries.append(1)
        raise OSError("away")

    with pytest.raises(StorageError, match="reading x"):
        patiently(lambda: patiently(fail, "reading x", 0.0), "reading y", 1.0)
    assert len(tries) == 1


def test_s3_keeps_its_limits_in_another_process(monkeypatch):
    """Catches pyarrow's own S3, which is sent to Ray's workers with three tries, whatever it was made with."""
    requests = []

    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"s3://bucket/x?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
        made = S3.like(pafs.FileSystem.from_uri(uri)[0], tries=2)
        for client in (made, pickle.loads(pickle.dumps(made)), S3.like(made, tries=2)):
            requests.clear()
            with pytest.raises(OSError, match="503"):
                client.get_file_info("bucket/x")
            assert requests == ["/bucket/x"] * 2
            assert isinstance(client, pafs.S3FileSystem)  # which Ray Train uploads to with one thread, for a reason
    finally:
        server.shutdown()
        server.server_close()
