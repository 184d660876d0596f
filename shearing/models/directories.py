"""Model directories in workspaces that may lie on object stores: what `transformers` opens must be on a local disk."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow.fs as pafs

from shearing.errors import UserError
from shearing.storage import Store, open_store


def local_directory(uri: str) -> Path:
    """A local path to a model directory; a remote one is copied once to this node's temporary folder.

    Raises UserError where a remote one holds no file.
    """
    store = open_store(uri)
    if store.is_local:
        return Path(store.path)
    listing = _listing(store)
    if not listing:
        raise UserError(f"{uri} holds no files: a Hugging Face model directory is expected there.")
    name = hashlib.sha256(f"{uri}|{listing}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"shear-models-{os.getuid()}" / name
    if not folder.is_dir():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # all workers of a node come here at the same moment
            if not folder.is_dir():
                _copy(store, folder)
    return folder


def _copy(store: Store, folder: Path) -> None:
    """Whole or not at all; what a process that died here had copied stays behind, under another name."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        store.download(partial)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(folder)


def _listing(store: Store) -> list[str]:
    """Each file with its size and whatever the filesystem knows that changes when it is written again.

    The size alone would do for no model trained a second time: weights of one shape always have one size.
    """
    filesystem, files = store.filesystem, store.files()
    if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, pafs.FSSpecHandler):
        versions = [filesystem.handler.fs.ukey(info.path) for info in files]
    else:
        versions = [info.mtime_ns for info in files]
    return sorted(f"{info.path}:{info.size}:{version}" for info, version in zip(files, versions, strict=True))


def publish_directory(folder: Path, store: Store) -> None:
    """Make `store` hold what a local folder holds; config.json goes last, so that half a copy is no model."""
    if store.is_local and Path(store.path) == folder:
        return
    store.delete()
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.name == "config.json")
    for path in files:
        store.upload(path, str(path.relative_to(folder)))
