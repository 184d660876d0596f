"""Which checkpoint a phase goes on from, settled before Ray Train looks into the same folder.

Ray Train keeps a snapshot of the checkpoints that it knows. A driver that dies while it is written leaves it torn, and
no later start would get past it; one that dies just before leaves a finished checkpoint out of it; and what a cut-off
upload had written would stay for ever. The folders tell the truth: an index names a checkpoint's files and their sizes.
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import psutil

from shearing.storage import Store
from shearing.training.checkpoint import CheckpointReader, IncompleteCheckpointError

SNAPSHOT_NAME = "checkpoint_manager_snapshot.json"
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})-of-\d+-[0-9a-f]+")


def settle_checkpoints(folder: Store) -> str | None:
    """Bring a phase's folder in order, with nobody at work in it. Returns the name of its newest whole checkpoint.

    A snapshot that is torn, or names a checkpoint that is not whole, is removed. So is every checkpoint that
    neither a good snapshot names nor is the newest.
    """
    found = _checkpoint_names(folder)
    whole = {name for name in found if _is_whole(folder.child(name))}
    newest = max(whole, key=_step, default=None)
    listed = _listed(folder)
    if listed is None or not listed <= whole:
        folder.delete(SNAPSHOT_NAME)
        listed = set()
    for name in found:
        if name != newest and name not in listed:
            folder.delete(name)
    return newest


def drop_torn_checkpoints(folder: Store) -> None:
    """Remove what a dead group had begun to upload, before another begins. No snapshot names those.

    Ray Train starts groups anew by itself, and keeps a number of checkpoints that it knows: these would stay for the
    length of the phase, one for each worker that was killed while it saved.
    """
    for name in _checkpoint_names(folder):
        if not _is_whole(folder.child(name)):
            folder.delete(name)


def newest_checkpoint(folder: Store) -> Store | None:
    """The newest whole checkpoint of a phase's folder, while others may be at work there.

    A worker that dies right after a checkpoint was written dies before Ray Train hears of it, and would be sent back
    one checkpoint too far.
    """
    for name in sorted(_checkpoint_names(folder), key=_step, reverse=True):
        if _is_whole(folder.child(name)):
            return folder.child(name)
    return None


def upload_prefix(checkpoints: str) -> str:
    """Of the folders on a node's own disk from which a phase's checkpoints are uploaded; a process' number follows."""
    return f"shear-checkpoint-{hashlib.sha256(checkpoints.encode()).hexdigest()[:12]}-"


def remove_left_uploads(prefix: str) -> None:
    """Remove what workers of this node that were killed while they saved left there, the size of a checkpoint each."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        owner = folder.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def checkpoint_name(checkpoint: Store) -> str:
    """The name of a checkpoint's folder."""
    return checkpoint.path.rstrip("/").rpartition("/")[2]


def _checkpoint_names(folder: Store) -> list[str]:
    return [name for name in folder.list() if CHECKPOINT_NAME.fullmatch(name)]


def _step(name: str) -> int:
    match = CHECKPOINT_NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _listed(folder: Store) -> set[str] | None:
    """Checkpoints that Ray Train's snapshot names; None where it is torn."""
    if not folder.exists(SNAPSHOT_NAME):
        return set()
    text = folder.read_bytes(SNAPSHOT_NAME).decode()
    try:
        json.loads(text)
    except ValueError:
        return None
    return {match[0] for match in CHECKPOINT_NAME.finditer(text)}


def _is_whole(checkpoint: Store) -> bool:
    try:
        CheckpointReader(checkpoint)
    except (IncompleteCheckpointError, ValueError):  # ValueError: an index cut off in its middle
        return False
    return True
