"""Files of arguments: their words, and refusals."""

import os
import re
import threading

import pytest

from dream_fast.engine.config import argument_file
from dream_fast.engine.config.argument_file import read_arguments, split
from dream_fast.engine.errors import UserError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t# only a comment", []),
        ("--text 'a cat' # a comment\n-O", ["--text", "a cat", "-O"]),
        ("--workspace runs#3 --seed 1#", ["--workspace", "runs#3", "--seed", "1#"]),
        ("#first\n#second\n--seed 1", ["--seed", "1"]),
        ('--text "a \'small\' \\"cat\\""', ["--text", "a 'small' \"cat\""]),
        ("'two\nlines' a\\ b", ["two\nlines", "a b"]),
        ("--iters \\\n 5\\\n --w 8", ["--iters", "5", "--w", "8"]),
        ("--text=''\"\"", ["--text="]),
    ],
)
def test_split_words_of_a_shell(text, words):
    """Quotes, comments and joined lines are read as in a shell."""
    assert split(text, "run.txt") == words


@pytest.mark.parametrize(
    ("text", "sign", "line"),
    [("'a", "'", 1), ("a\n\n  b 'c\nd", "'", 3), ('#\'\n"\\"', '"', 2), ("a\nb\nc\\", "\\", 3)],
)
def test_split_open_quote(text, sign, line):
    """The message has the sign and the line of an open quote."""
    sentence = f"--file run.txt: the {sign} in line {line} is not closed"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        split(text, "run.txt")


def test_read_arguments_longest_file(tmp_path, monkeypatch):
    """A file of the maximum length is read, whatever its bytes; a longer one is refused."""
    monkeypatch.setattr(argument_file, "LARGEST", 11)
    path = tmp_path / "run.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "--text K\u00e4se".encode())  # eleven characters behind a byte-order mark
    assert read_arguments(str(path)) == ["--text", "K\u00e4se"]
    path.write_text("--text Kekse", encoding="utf-8")
    with pytest.raises(UserError, match=f"^--file {re.escape(str(path))} is longer than 11 characters"):
        read_arguments(str(path))


def test_read_arguments_at_home(tmp_path, monkeypatch):
    """~ is the home folder; an unknown user is refused with the reason."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.txt").write_text("--seed 3", encoding="utf-8")
    assert read_arguments("~/run.txt") == ["--seed", "3"]
    with pytest.raises(UserError, match=r"^--file ~nobody_knows/x cannot be read \(.*home directory"):
        read_arguments("~nobody_knows/x")


def test_read_arguments_pipe(tmp_path):
    """`--file <(command)` is a pipe and is read; a device, which may have no end, is not opened."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("--seed 3",), daemon=True)
    writer.start()
    assert read_arguments(str(pipe)) == ["--seed", "3"]
    writer.join()
    with pytest.raises(UserError, match="^--file /dev/zero is not a text file$"):
        read_arguments("/dev/zero")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe-O", "is not a text file"),
        (b"-O\0", "is not a text file"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_read_arguments_not_text(content, reason, tmp_path):
    """The message names the file and the reason."""
    path = tmp_path / "run.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(f'--file {path} {reason}')}$"):
        read_arguments(str(path))
    with pytest.raises(UserError, match=f"^{re.escape(f'--file {tmp_path} cannot be read (Is a directory)')}$"):
        read_arguments(str(tmp_path))
