"""One driver at a time in a workspace."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from shearing.errors import UserError
from shearing.storage import Store

LOCK_NAME = "driver.lock"
STAMP_NAME = "driver.json"
STAMP_EVERY_S = 30.0
STAMP_DEAD_AFTER_S = 150.0
STAMP_POLL_S = 2.0

Say = Callable[[str], None]


def _self() -> dict[str, Any]:
    return {"pid": os.getpid(), "time": time.time()} | _here()


def _here() -> dict[str, str]:
    """Where a process number means something: a host, and in it a container, which may share the host's name."""
    try:
        return {"host": socket.gethostname(), "processes": os.readlink("/proc/self/ns/pid")}
    except OSError:  # no Linux
        return {"host": socket.gethostname()}


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether its process can be looked for from here."""
    return holder | _here() == holder


@contextlib.contextmanager
def lock_workspace(store: Store, say: Say) -> Iterator[None]:
    """Hold a workspace for this driver; `say` is told of waiting, and of another driver that took it over.

    Local folders: a lock of the operating system, which ends with its process however that dies.
    Elsewhere: a stamp renewed every 30 s, the best an object store allows; two drivers that start within the same
    moment can both pass. Another machine's stamp is waited for: renewed, its driver lives; 150 s old, it is dead.

    Raises UserError where another driver holds it.
    """
    with _file_lock(store) if store.is_local else _stamp(store, say):
        yield


def describe_driver(store: Store) -> str:
    """Who drives, or drove, the run of a workspace, as far as it can be told from here; takes no lock."""
    name = LOCK_NAME if store.is_local else STAMP_NAME
    text = store.read_bytes(name) if store.exists(name) else b""
    if not text:
        return "none"
    holder = json.loads(text)
    who = f"process {holder['pid']} on {holder['host']}"
    if not store.is_local:
        return f"{who}, {'at work' if _is_alive(holder) else 'gone'}"
    if not _is_here(holder):
        return f"{who}, which cannot be looked into from here"
    return f"{who}, {'at work' if _began_before(holder['pid'], holder['time']) else 'gone'}"


def _began_before(pid: int, unix_s: float) -> bool:
    """Whether a process lives that was there then; a number is given anew after a while."""
    try:
        return psutil.Process(pid).create_time() <= unix_s
    except psutil.Error:
        return False


def _refuse(store: Store, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"another driver is at work in {store.uri}: process {holder.get('pid', '?')} on {holder.get('host', '?')}. "
        "Wait for it, stop it, or give this run its own folder with workspace=..."
    )


@contextlib.contextmanager
def _file_lock(store: Store) -> Iterator[None]:
    os.makedirs(store.path, exist_ok=True)
    with open(store.locate(LOCK_NAME), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read()
            raise _refuse(store, json.loads(text) if text else {}) from None
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0)
            raise UserError(
                f"the folder {store.path} cannot be locked ({name}: {error.strerror}): its file system knows no flock, "
                "so a second driver could not be kept out. Set workspace to a folder on one that does, or to a URI."
            ) from None
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_self()))
        file.flush()
        yield  # closing the file releases the lock; the file stays, since removing it would race with the next driver


@contextlib.contextmanager
def _stamp(store: Store, say: Say) -> Iterator[None]:
    _wait_for_stamp(store, say)
    done, own = threading.Event(), {"driver": uuid.uuid4().hex}
    hasty = store.hasty()  # a try that went on after the end would leave a stamp

    def is_own() -> bool:
        return not hasty.exists(STAMP_NAME) or hasty.read_json(STAMP_NAME).get("driver") == own["driver"]

    def renew() -> None:
        wait_s = STAMP_EVERY_S
        while not done.wait(wait_s):
            wait_s = STAMP_POLL_S  # after a failure; one for good stops the run elsewhere
            with contextlib.suppress(OSError, ValueError):
                if not is_own():
                    say(f"another driver took {store.uri} over while this one was not heard of; stop one of the two")
                    return
                hasty.write_json(STAMP_NAME, _self() | own)
                wait_s = STAMP_EVERY_S

    store.write_json(STAMP_NAME, _self() | own)
    thread = threading.Thread(target=renew, name="workspace-stamp", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        with contextlib.suppress(OSError, ValueError):
            if is_own():
                hasty.delete(STAMP_NAME)


def _wait_for_stamp(store: Store, say: Say) -> None:
    """Come back once no driver lives behind the stamp that is there. Raises UserError where one does."""
    first = _read_stamp(store)
    if first is None or not _is_alive(first):
        return
    if _is_here(first):  # whose process was looked for, and found
        raise _refuse(store, first)
    age_s = max(0.0, time.time() - first["time"])  # by two machines' clocks
    say(
        f"process {first['pid']} on {first['host']} held {store.uri} {age_s:.0f} s ago; waiting for up to "
        f"{STAMP_DEAD_AFTER_S - age_s:.0f} s to see whether it still lives"
    )
    deadline = time.monotonic() + STAMP_DEAD_AFTER_S - age_s
    while time.monotonic() < deadline:
        time.sleep(STAMP_POLL_S)
        now = _read_stamp(store)
        if now is None:
            return
        if now != first:
            raise _refuse(store, now)


def _read_stamp(store: Store) -> dict[str, Any] | None:
    try:
        return dict(store.read_json(STAMP_NAME))
    except FileNotFoundError:
        return None


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a stamp is fresh, and its process there as long as its host can be looked into from here."""
    if time.time() - holder["time"] > STAMP_DEAD_AFTER_S:
        return False
    return not _is_here(holder) or _began_before(holder["pid"], holder["time"])
