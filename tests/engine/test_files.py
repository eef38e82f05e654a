"""Files are opened as what they should be, and never waited for."""

import os
import socket
from pathlib import Path

import pytest

from dream_fast.engine.files import BadFile, is_regular, open_append, open_regular, read_regular

KINDS = ("folder", "pipe", "socket", "device", "folder_link", "pipe_link", "device_link")
SENTENCES = {"folder": "a folder", "pipe": "a pipe", "socket": "a socket", "device": "a device"}


def make(kind: str, path: Path) -> Path:
    """Put something of a `kind` at `path`; a link leads to it from beside."""
    target = path.with_name("target") if kind.endswith("_link") else path
    what = kind.removesuffix("_link")
    if what == "folder":
        target.mkdir()
    elif what == "pipe":
        os.mkfifo(target)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(target))  # a socket's name is short
    elif what == "device" and target != path:
        target = Path("/dev/zero")
    elif what == "device":
        pytest.skip("a device is made by root alone; a link leads to one below")
    if target != path:
        path.symlink_to(target)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_open_regular_other_kinds(kind, tmp_path, monkeypatch):
    """Files other than regular ones are refused with their kind, without waiting, for reading and for appending."""
    monkeypatch.chdir(tmp_path)
    path = make(kind, tmp_path / "name.txt")
    with pytest.raises(BadFile, match=f"name.txt is {SENTENCES[kind.removesuffix('_link')]} instead of a file"):
        open_regular(path)
    expected = "a link" if kind.endswith("_link") else SENTENCES[kind]
    with pytest.raises((BadFile, IsADirectoryError), match=f"is {expected}|Is a directory"):
        open_append(path)
    assert not is_regular(path)


def test_open_regular_sizes(tmp_path):
    """A file of just the most bytes is read; one more is refused before it is read, and so is a huge sparse file."""
    path = tmp_path / "name.txt"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(BadFile, match="has 5 bytes, of at most 4"):
        read_regular(path, 4)
    os.truncate(path, 1 << 40)
    with pytest.raises(BadFile, match="has 1099511627776 bytes"):
        open_regular(path, 1000)


def test_read_regular_file_without_size(tmp_path):
    """A file of the system that states no size is read up to the limit and no further."""
    endless = Path("/proc/self/status")
    if not endless.exists():
        pytest.skip("no /proc on this machine")
    with pytest.raises(BadFile, match="has more than 10 bytes"):
        read_regular(endless, 10)


def test_open_regular_in_folder(tmp_path):
    """Inside a folder, links that stay in it are followed; those that leave it are refused, at any level."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    (inside / "deep" / "a.txt").write_text("mine")
    (outside / "a.txt").write_text("other")
    (inside / "near").symlink_to(inside / "deep")
    (inside / "far").symlink_to(outside)
    (inside / "far.txt").symlink_to(outside / "a.txt")
    for name in ("deep/a.txt", "near/a.txt"):
        assert read_regular(inside / name, folder=inside) == b"mine"
    (tmp_path / "door").symlink_to(inside)
    assert read_regular(tmp_path / "door" / "deep" / "a.txt", folder=tmp_path / "door") == b"mine"
    for name in ("far/a.txt", "far.txt", "../out/a.txt", "/etc/hostname", "deep/../../out/a.txt"):
        with pytest.raises((BadFile, FileNotFoundError), match="leads out of|No such file"):
            open_regular(inside / name, folder=inside)


def test_open_regular_replaced_in_between(tmp_path, monkeypatch):
    """A file that becomes a pipe or a link after it was looked at is refused all the same."""
    path, secret = tmp_path / "a.txt", tmp_path / "secret"
    secret.write_text("secret")
    for replace in (lambda: os.mkfifo(path), lambda: path.symlink_to(secret)):
        path.unlink(missing_ok=True)
        path.write_text("mine")
        real = os.path.realpath

        def late(name, replace=replace, real=real):
            result = real(name)
            if str(name) == str(path):
                path.unlink()
                replace()
            return result

        with monkeypatch.context() as patched:
            patched.setattr(os.path, "realpath", late)
            with pytest.raises((BadFile, OSError), match="a pipe instead|symbolic links"):
                open_regular(path).read()


def test_open_append(tmp_path):
    """A new file is made and grows; one with a second name, and a link, are left as they are."""
    path, other = tmp_path / "log.txt", tmp_path / "other"
    for _ in range(2):
        with open_append(path) as file:
            file.write("line\n")
    assert path.read_text() == "line\n" * 2
    os.link(path, other)
    with pytest.raises(BadFile, match="is a hard link"):
        open_append(path)
    path.unlink()
    path.symlink_to(other)
    with pytest.raises(BadFile, match="is a link instead of a file"):
        open_append(path)
    assert other.read_text() == "line\n" * 2


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", ""])
def test_is_regular_bad_names(name, tmp_path):
    """A name that no file can have, and an empty one, are no regular file."""
    assert not is_regular(tmp_path / name)
