"""One driver at a time in a workspace."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from shearing.errors import UserError
from shearing.storage import Store

LOCK_NAME = "driver.lock"
STAMP_NAME = "driver.json"
STAMP_EVERY_S = 30.0
STAMP_DEAD_AFTER_S = 150.0


def _self() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}


@contextlib.contextmanager
def lock_workspace(store: Store) -> Iterator[None]:
    """Hold a workspace for this driver.

    Local folders: a lock of the operating system, which ends with its process however that dies.
    Elsewhere: a stamp renewed every 30 s, the best an object store allows; two drivers that start within the same
    moment can both pass.

    Raises UserError where another driver holds it.
    """
    with _file_lock(store) if store.is_local else _stamp(store):
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
    if holder["host"] != socket.gethostname():
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
        except OSError:
            file.seek(0)
            text = file.read()
            raise _refuse(store, json.loads(text) if text else {}) from None
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_self()))
        file.flush()
        yield  # closing the file releases the lock; the file stays, since removing it would race with the next driver


@contextlib.contextmanager
def _stamp(store: Store) -> Iterator[None]:
    if store.exists(STAMP_NAME):
        holder = store.read_json(STAMP_NAME)
        if _is_alive(holder):
            raise _refuse(store, holder)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(STAMP_EVERY_S):
            with contextlib.suppress(OSError):  # a storage that fails for good stops the run elsewhere
                store.write_json(STAMP_NAME, _self())

    store.write_json(STAMP_NAME, _self())
    thread = threading.Thread(target=renew, name="workspace-stamp", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        with contextlib.suppress(OSError):
            store.delete(STAMP_NAME)


def _is_alive(holder: dict[str, Any]) -> bool:
    if time.time() - holder["time"] > STAMP_DEAD_AFTER_S:
        return False
    return holder["host"] != socket.gethostname() or psutil.pid_exists(holder["pid"])
