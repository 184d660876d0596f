import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shearing.errors import UserError
from shearing.models import directories
from shearing.models.directories import local_directory, publish_directory
from shearing.storage import open_store


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A model directory on an object store, and a node with a temporary folder of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    store = open_store(f"memory://directories-{tmp_path.name}/model")
    store.write_bytes("config.json", b"{}")
    store.write_bytes("model.safetensors", b"weights")
    return store


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class TestLocalDirectory:
    def test_local_paths_stay(self, tmp_path):
        # catches a needless copy of a large model
        assert local_directory(str(tmp_path)) == tmp_path

    def test_copies_a_remote_one_once(self, remote):
        # catches a copy for every worker of a node
        folder = local_directory(remote.uri)
        assert contents(folder) == {"config.json": b"{}", "model.safetensors": b"weights"}
        (folder / "marked").touch()
        assert local_directory(remote.uri) == folder
        assert (folder / "marked").exists()
        assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]

    def test_copies_it_once_for_workers_that_ask_together(self, remote, monkeypatch):
        # catches eight workers of a node that each copy a model of 140 GB to the same disk at the same time
        copy, copied = directories.pafs.copy_files, []

        def slow_copy(*args, **kwargs):
            copied.append(args)
            time.sleep(0.3)
            copy(*args, **kwargs)

        monkeypatch.setattr(directories.pafs, "copy_files", slow_copy)
        with ThreadPoolExecutor(4) as workers:
            (folder,) = set(workers.map(local_directory, [remote.uri] * 4))
        assert contents(folder) == {"config.json": b"{}", "model.safetensors": b"weights"}
        assert len(copied) == 1

    def test_a_copy_that_fails_leaves_nothing(self, remote, monkeypatch, tmp_path):
        # catches a disk that fills with halves of a model while workers are started again
        def fail(source, target, **_kwargs):
            (Path(target) / "half").touch()
            raise OSError("the link is down")

        with monkeypatch.context() as broken:
            broken.setattr(directories.pafs, "copy_files", fail)
            with pytest.raises(OSError, match="the link is down"):
                local_directory(remote.uri)
        assert not list((tmp_path / "tmp").rglob("half"))
        assert contents(local_directory(remote.uri))["config.json"] == b"{}"

    def test_follows_new_weights_of_the_same_size(self, remote):
        # catches training on from the weights of an earlier run: weights of one shape always have one size
        first = local_directory(remote.uri)
        time.sleep(0.01)
        remote.write_bytes("model.safetensors", b"WEIGHTS")
        second = local_directory(remote.uri)
        assert contents(second)["model.safetensors"] == b"WEIGHTS"
        assert contents(first)["model.safetensors"] == b"weights"

    def test_folders_inside(self, remote):
        # catches model repositories that hold more than files, as many do
        remote.write_bytes("original/params.json", b"1")
        assert contents(local_directory(remote.uri))["original/params.json"] == b"1"

    def test_nothing_there(self, remote):
        # catches an empty folder kept as if it were the model
        with pytest.raises(UserError, match=r"memory://.*/nothing holds no files"):
            local_directory(remote.child("nothing").uri)


class TestPublishDirectory:
    @pytest.fixture
    def model(self, tmp_path):
        for name, data in {"config.json": b"{}", "a.safetensors": b"1", "z.safetensors": b"2", "sub/x": b"3"}.items():
            (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / name).write_bytes(data)
        return tmp_path / "model"

    @pytest.mark.parametrize("uri", ["{0}/published", "memory://publish-{1}/model"])
    def test_holds_the_same_and_no_more(self, model, tmp_path, uri):
        # catches shards of an earlier, larger model left beside the new ones
        store = open_store(uri.format(tmp_path, tmp_path.name))
        store.write_bytes("old.safetensors", b"old")
        publish_directory(model, store)
        assert store.list() == ["a.safetensors", "config.json", "sub", "z.safetensors"]
        assert {name: store.read_bytes(name) for name in contents(model)} == contents(model)

    def test_config_goes_last(self, model, tmp_path, monkeypatch):
        # catches half a model that looks whole: a reader asks for config.json first
        from shearing.models import directories

        order, copy = [], directories.pafs.copy_files

        def watched(source, *args, **kwargs):
            order.append(Path(source).name)
            copy(source, *args, **kwargs)

        monkeypatch.setattr(directories.pafs, "copy_files", watched)
        publish_directory(model, open_store(f"memory://order-{tmp_path.name}/model"))
        assert order[-1] == "config.json"
        assert len(order) == 4

    def test_onto_itself(self, model):
        # catches a model deleted before it is copied
        before = contents(model)
        publish_directory(model, open_store(str(model)))
        assert contents(model) == before
