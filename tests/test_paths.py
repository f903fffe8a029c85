"""Paths mean the same however a person, a sweep or a scheduler writes them, or are refused by name."""

import os

import program
import pytest
from etils import epath

from attn_cnn import paths
from attn_cnn.errors import UserError


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert os.fspath(paths.resolve("~/runs/x", "the workdir")) == "/home/somebody/runs/x"


@pytest.mark.parametrize("path", ["runs/x", "/a b/ü/[x]*?", "runs/x/", "./x", "gs://bucket/run", "a:b/c"])
def test_any_other_path_stays_what_it_is(path):
    assert os.fspath(paths.resolve(path, "the workdir")).rstrip("/") == path.rstrip("/").removeprefix("./")


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "the workdir is empty"),
        (" ", "the workdir is empty"),
        ("gs:/bucket/run", "with one slash; write gs://bucket/run"),
        ("s3://bucket/run", "must be a local path, or one of gs://"),
        ("memory://run", "must be a local path"),
        ("~nobody-of-that-name/x", "there is no such home"),
        ("x\0y", "null character"),
    ],
)
def test_what_cannot_be_used_is_named(path, message):
    with pytest.raises(UserError, match=message):
        paths.resolve(path, "the workdir")


def test_the_cache_has_a_place_without_a_home(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(type(paths.cache_folder()), "expanduser", no_home)
    assert paths.cache_folder().is_absolute()


def test_what_a_bucket_refuses_is_said_as_what_a_disk_refuses(tmp_path, monkeypatch):
    tensorflow = pytest.importorskip("tensorflow")

    def refuse(*_):
        raise tensorflow.errors.PermissionDeniedError(None, None, "a read-only bucket")

    path = epath.Path(tmp_path) / "figure.png"
    monkeypatch.setattr(type(path), "write_bytes", refuse)
    with pytest.raises(UserError, match="figure.png cannot be written: .*a read-only bucket"):
        paths.write(path, b"")


def test_a_link_stays_one_and_a_folder_is_refused(tmp_path):
    folder = epath.Path(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    paths.write(folder / "link", b"page")
    assert (tmp_path / "link").is_symlink() and (folder / "page.html").read_bytes() == b"page"
    for place in (folder, epath.Path(".")):
        with pytest.raises(UserError, match="cannot be written: .*Is a directory"):
            paths.write(place, b"page")


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    paths.write(epath.Path(tmp_path) / "pipe", b"page")
    assert os.read(reader, 100) == b"page"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_cannot_be_written_whole_is_as_it_was(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "page.html"
    paths.write(path, b"before")
    program.fill_disk(monkeypatch, "no space left")
    with pytest.raises(UserError, match="page.html cannot be written: no space left"):
        paths.write(path, b"after it was full")
    assert path.read_bytes() == b"before" and [each.name for each in tmp_path.iterdir()] == ["page.html"]
