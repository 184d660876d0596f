"""Files of a run on any filesystem: local paths, and every URI that pyarrow or fsspec can open.

What a remote one fails at is tried again for a minute (`shearing.patience`): every operation of a Store may be done
twice. Streams and uploads that are not made by a Store have `resolve`'s filesystem, which is as patient by itself.
"""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from shearing.patience import CALL_TRIES, PATIENCE_S, S3, STREAM_TRIES, patiently

Result = TypeVar("Result")
UNKNOWN_SCHEME = "Unrecognized filesystem type"
Infos = list[pafs.FileInfo]


@dataclass(frozen=True)
class Store:
    """A folder on some filesystem. Writes are atomic: a reader sees the whole file or none.

    Where a remote one goes on failing for `patience_s`, or refuses, every method raises StorageError.
    """

    filesystem: pafs.FileSystem
    path: str
    uri: str
    patience_s: float = PATIENCE_S

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine, or one that looks like it."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> "Store":
        """The sub-folder `name`; a URI keeps its query (endpoint, region ...)."""
        head, _, query = self.uri.partition("?")
        uri = f"{head.rstrip('/')}/{name}" + (f"?{query}" if query else "")
        return replace(self, path=self.locate(name), uri=uri)

    def hasty(self) -> "Store":
        """The same folder, for what is not worth waiting for: every operation is tried once."""
        return replace(self, patience_s=0.0)

    def locate(self, name: str) -> str:
        """The filesystem path of `name`. Raises ValueError where it would leave this folder."""
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} would leave {self.uri}")
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        return self._info(name).type != pafs.FileType.NotFound

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        info = self._info(name)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{name} in {self.uri}")
        return int(info.size)

    def list(self, name: str = "") -> list[str]:
        """Sorted names of what lies directly in a folder; empty where there is none."""
        return sorted(info.base_name for info in self._infos(name, recursive=False))

    def files(self) -> Infos:
        """Every file, however deep."""
        return [info for info in self._infos("", recursive=True) if info.type == pafs.FileType.File]

    def read_bytes(self, name: str) -> bytes:
        """A file, whole. Raises FileNotFoundError."""

        def read() -> bytes:
            with self.filesystem.open_input_stream(self.locate(name), compression=None) as stream:
                return bytes(stream.read())

        return self._patiently("reading", name, read)

    def read_with(self, name: str, reader: Callable[[BinaryIO], Result]) -> Result:
        """What `reader` makes of a file that it may seek in, called again for another try. Raises FileNotFoundError."""

        def read() -> Result:
            with self.filesystem.open_input_file(self.locate(name)) as stream:
                return reader(stream)

        return self._patiently("reading", name, read)

    def read_json(self, name: str) -> Any:
        """The value that a JSON file holds. Raises FileNotFoundError."""
        return json.loads(self.read_bytes(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; folders on the way are made."""
        if self.is_local:
            self._write_local(self.locate(name), data)
            return

        def write() -> None:  # object stores show an object only once it is whole
            with self.filesystem.open_output_stream(self._with_folder(name), compression=None) as stream:
                stream.write(data)

        self._patiently("writing", name, write)

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file, in pieces; folders on the way are made."""
        self._patiently(
            "writing",
            name,
            lambda: pafs.copy_files(str(file), self._with_folder(name), destination_filesystem=self.filesystem),
        )

    def download(self, folder: Path) -> None:
        """Copy all that is in this folder into a local one, in pieces."""
        self._patiently(
            "reading", "", lambda: pafs.copy_files(self.path, str(folder), source_filesystem=self.filesystem)
        )

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, whole or not at all."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def delete(self, name: str = "") -> None:
        """Remove a file or a folder with all in it; nothing happens where there is none."""

        def delete() -> None:
            info = self.filesystem.get_file_info(self.locate(name))
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.locate(name))
            elif info.type == pafs.FileType.File:
                self.filesystem.delete_file(self.locate(name))

        self._patiently("deleting", name, delete)

    def _info(self, name: str) -> pafs.FileInfo:
        return self._patiently("looking for", name, lambda: self.filesystem.get_file_info(self.locate(name)))

    def _infos(self, name: str, recursive: bool) -> Infos:
        selector = pafs.FileSelector(self.locate(name), allow_not_found=True, recursive=recursive)
        return self._patiently("listing", name, lambda: self.filesystem.get_file_info(selector))

    def _with_folder(self, name: str) -> str:
        """The filesystem path of a file to be written, whose folder is made first; on S3 there are none."""
        path = self.locate(name)
        if not isinstance(self.filesystem, pafs.S3FileSystem):
            self.filesystem.create_dir(os.path.dirname(path), recursive=True)
        return path

    def _write_local(self, path: str, data: bytes) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.partial"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)  # a full disk would stay full
            raise

    def _patiently(self, doing: str, name: str, operation: Callable[[], Result]) -> Result:
        if self.is_local:  # the operating system waits for disks by itself; a full one does not pass in a minute
            return operation()
        return patiently(operation, f"{doing} {self._shown(name)}", self.patience_s)

    def _shown(self, name: str) -> str:
        folder = self.uri.partition("?")[0].rstrip("/")
        return f"{folder}/{name}" if name else folder


def resolve(uri: str, tries: int = STREAM_TRIES) -> tuple[pafs.FileSystem, str]:
    """The filesystem and path that a local path or URI names. Raises ValueError for a scheme or option nobody knows.

    `tries` are those of S3's own client at every request; other schemes have limits of their own.
    """
    scheme = urlsplit(uri).scheme
    if len(scheme) < 2:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    patience_s = PATIENCE_S if scheme == "s3" else 0.0  # which is asked for its region where the URI does not say
    try:
        what = f"opening {uri.partition('?')[0]}"
        filesystem, path = patiently(lambda: pafs.FileSystem.from_uri(uri), what, patience_s)
    except NotImplementedError:
        pass  # left out of this pyarrow
    except pa.ArrowInvalid as error:
        if not str(error).startswith(UNKNOWN_SCHEME):  # such as an option of S3 that there is not
            raise ValueError(f"cannot open {uri!r}: {error}") from None
    else:
        return S3.like(filesystem, tries) if isinstance(filesystem, pafs.S3FileSystem) else filesystem, path
    from fsspec.core import url_to_fs

    try:
        remote, path = url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {uri!r}: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(remote)), path


def open_store(uri: str) -> Store:
    """The folder at a local path or URI; it need not exist yet."""
    filesystem, path = resolve(uri, CALL_TRIES)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    return Store(filesystem, path, path if local else uri)
