import gzip
import os
import resource

import pyarrow.fs as pafs
import pytest

from shearing.storage import Store, open_store


@pytest.fixture(params=["local", "object store", "sub-tree"])
def store(request, tmp_path):
    """The same folder contract on three kinds of filesystem."""
    if request.param == "local":
        return open_store(str(tmp_path / "run"))
    if request.param == "object store":
        return open_store(f"memory://storage-{tmp_path.name}/run")
    tree = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    return Store(tree, "run", "tree://run")


class TestFiles:
    def test_round_trip(self, store):
        # catches folders that are not made on the way, and text that is no longer what was written
        assert not store.exists()
        assert not store.exists("a/b.json")
        store.write_json("a/b.json", {"name": "Käse", "share": 0.1})
        assert store.read_json("a/b.json") == {"name": "Käse", "share": 0.1}
        assert "Käse".encode() in store.read_bytes("a/b.json")
        assert store.exists()
        assert store.exists("a")
        assert store.size("a/b.json") == len(store.read_bytes("a/b.json"))

    def test_overwrites(self, store):
        store.write_bytes("x", b"a longer first version")
        store.write_bytes("x", b"second")
        assert store.read_bytes("x") == b"second"
        assert store.list() == ["x"]

    def test_nothing_is_left_of_what_does_not_fit(self, tmp_path):
        # catches a full disk that stays full of halves, and a good file lost to one
        store = open_store(str(tmp_path))
        store.write_bytes("x", b"first")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="large"):
                store.write_bytes("x", bytes(5000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.list() == ["x"]
        assert store.read_bytes("x") == b"first"

    def test_compressed_files_stay_as_they_are(self, store):
        # catches pyarrow's own unpacking by file name, which would break sizes and hashes
        data = gzip.compress(b"text" * 100)
        store.write_bytes("x.jsonl.gz", data)
        assert store.read_bytes("x.jsonl.gz") == data

    def test_missing(self, store):
        # catches an absent file taken for an empty one
        with pytest.raises(FileNotFoundError):
            store.size("nothing")
        with pytest.raises(FileNotFoundError):
            store.read_bytes("nothing")
        store.write_bytes("folder/x", b"")
        with pytest.raises(FileNotFoundError):
            store.size("folder")
        assert store.size("folder/x") == 0

    def test_list(self, store):
        # catches names with their folders, and files of sub-folders
        assert store.list() == []
        for name in ("b", "a", "sub/deep"):
            store.write_bytes(name, b"1")
        assert store.list() == ["a", "b", "sub"]
        assert store.list("sub") == ["deep"]
        assert store.list("nothing") == []

    def test_delete(self, store):
        store.write_bytes("a/b/c", b"1")
        store.write_bytes("a/d", b"1")
        store.delete("nothing")
        store.delete("a/d")
        assert store.list("a") == ["b"]
        store.delete("a")
        assert not store.exists("a/b/c")
        store.write_bytes("e", b"1")
        store.delete()
        assert not store.exists("e")

    def test_child(self, store):
        store.child("metrics").write_bytes("x", b"1")
        assert store.read_bytes("metrics/x") == b"1"
        assert store.child("metrics").child("deep").uri == f"{store.uri}/metrics/deep"

    @pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd"])
    def test_stays_inside(self, store, name):
        # catches a name from a recipe or an index file that leads out of the workspace
        with pytest.raises(ValueError, match="would leave"):
            store.write_bytes(name, b"1")
        with pytest.raises(ValueError, match="would leave"):
            store.child(name)


class TestLocal:
    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        # catches half a file where a reader expects a whole one
        store = open_store(str(tmp_path))
        store.write_bytes("x", b"old")

        def full_disk(_):
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            store.write_bytes("x", b"new")
        assert store.read_bytes("x") == b"old"

    @pytest.mark.parametrize("form", ["{0}", "file://{0}", "{0}/"])
    def test_forms(self, tmp_path, form):
        # catches a local folder taken for a remote one
        store = open_store(form.format(tmp_path))
        assert store.is_local
        assert store.uri == store.path == str(tmp_path)

    def test_relative_and_home(self, tmp_path, monkeypatch):
        # catches paths that mean another folder once a worker has another working directory
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert open_store("runs/x").path == str(tmp_path / "runs/x")
        assert open_store("~/runs").path == str(tmp_path / "runs")


class TestUri:
    def test_child_keeps_the_query(self):
        # catches a child that forgets endpoint and region
        parent = Store(
            pafs.LocalFileSystem(), "bucket/run", "s3://bucket/run?endpoint_override=localhost:9000&scheme=http"
        )
        child = parent.child("metrics")
        assert child.uri == "s3://bucket/run/metrics?endpoint_override=localhost:9000&scheme=http"
        assert child.path == "bucket/run/metrics"

    def test_reopens_elsewhere(self):
        # catches a store whose URI names another folder than the store itself
        store = open_store("memory://uri-test/run").child("a")
        store.write_bytes("x", b"1")
        assert open_store(store.uri).read_bytes("x") == b"1"
        assert not store.is_local

    def test_unknown_option(self):
        # catches a misspelt option told as another package to install
        with pytest.raises(ValueError, match=r"cannot open .*Unexpected query parameter in S3 URI: 'endpoint'"):
            open_store("s3://bucket/x?endpoint=localhost:9000&region=us-east-1")

    def test_unknown_scheme(self):
        # catches a typing error in a scheme that would make a local folder of that name
        with pytest.raises(ValueError, match="cannot open 'gopher://host/x'"):
            open_store("gopher://host/x")
