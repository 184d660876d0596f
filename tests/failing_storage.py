"""A storage whose every call can fail, before or after its work: a real filesystem of pyarrow over a local folder."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow.fs as pafs

from shearing.storage import Store

AWAY = OSError(
    "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server\nDetails: ..."
)


class Failing(pafs.FileSystemHandler):
    """A folder of the local disk behind calls that raise what `faults` gives next, before or after the work is done."""

    def __init__(self, folder: Path, faults: Iterable[OSError | None] = ()) -> None:
        self.inner = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
        self.faults, self.calls, self.after = iter(faults), 0, False

    def _call(self, operation, *arguments):
        self.calls += 1
        fault = next(self.faults, None)
        if fault is not None and not self.after:
            raise fault
        result = operation(*arguments)
        if fault is not None:
            raise fault
        return result

    def get_type_name(self):
        return "failing"

    def normalize_path(self, path):
        return path

    def get_file_info(self, paths):
        return self._call(self.inner.get_file_info, paths)

    def get_file_info_selector(self, selector):
        return self._call(self.inner.get_file_info, selector)

    def create_dir(self, path, recursive):
        self._call(lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path):
        self._call(self.inner.delete_dir, path)

    def delete_dir_contents(self, path, missing_dir_ok):
        self._call(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self):
        raise AssertionError("the whole storage")

    def delete_file(self, path):
        self._call(self.inner.delete_file, path)

    def move(self, src, dest):
        self._call(self.inner.move, src, dest)

    def copy_file(self, src, dest):
        self._call(self.inner.copy_file, src, dest)

    def open_input_stream(self, path):
        return self._call(lambda: self.inner.open_input_stream(path, compression=None))

    def open_input_file(self, path):
        return self._call(self.inner.open_input_file, path)

    def open_output_stream(self, path, metadata):
        return self._call(lambda: self.inner.open_output_stream(path, compression=None))

    def open_append_stream(self, path, metadata):
        raise AssertionError("object stores cannot append")


def failing_store(folder: Path) -> tuple[Store, Failing]:
    """A remote folder `run`, and what makes its calls fail."""
    (folder / "run").mkdir(parents=True)
    handler = Failing(folder)
    return Store(pafs.PyFileSystem(handler), "run", "mock://bucket/run?region=x"), handler
