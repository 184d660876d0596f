"""Files of a run on any filesystem: local paths, and every URI that pyarrow or fsspec can open."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs


@dataclass(frozen=True)
class Store:
    """A folder on some filesystem. Writes are atomic: a reader sees the whole file or none."""

    filesystem: pafs.FileSystem
    path: str
    uri: str

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine, or one that looks like it."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> "Store":
        """The sub-folder `name`; a URI keeps its query (endpoint, region ...)."""
        head, _, query = self.uri.partition("?")
        uri = f"{head.rstrip('/')}/{name}" + (f"?{query}" if query else "")
        return Store(self.filesystem, self.locate(name), uri)

    def locate(self, name: str) -> str:
        """The filesystem path of `name`. Raises ValueError where it would leave this folder."""
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} would leave {self.uri}")
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        return self.filesystem.get_file_info(self.locate(name)).type != pafs.FileType.NotFound

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        info = self.filesystem.get_file_info(self.locate(name))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{name} in {self.uri}")
        return int(info.size)

    def list(self, name: str = "") -> list[str]:
        """Sorted names of what lies directly in a folder; empty where there is none."""
        selector = pafs.FileSelector(self.locate(name), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def read_bytes(self, name: str) -> bytes:
        """A file, whole. Raises FileNotFoundError."""
        with self.filesystem.open_input_stream(self.locate(name), compression=None) as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        """The value that a JSON file holds. Raises FileNotFoundError."""
        return json.loads(self.read_bytes(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; folders on the way are made."""
        path = self.locate(name)
        self.filesystem.create_dir(os.path.dirname(path), recursive=True)
        if not self.is_local:  # object stores show an object only once it is whole
            with self.filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)
            return
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

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, whole or not at all."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def delete(self, name: str = "") -> None:
        """Remove a file or a folder with all in it; nothing happens where there is none."""
        info = self.filesystem.get_file_info(self.locate(name))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.locate(name))
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(self.locate(name))


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and path that a local path or URI names. Raises ValueError for a scheme nobody knows."""
    if len(urlsplit(uri).scheme) < 2:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    except (pa.ArrowInvalid, NotImplementedError):
        pass  # not one of pyarrow's own schemes
    from fsspec.core import url_to_fs

    try:
        remote, path = url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {uri!r}: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(remote)), path


def open_store(uri: str) -> Store:
    """The folder at a local path or URI; it need not exist yet."""
    filesystem, path = resolve(uri)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    return Store(filesystem, path, path if local else uri)
