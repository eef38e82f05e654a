"""Words of the reproducing command and of messages, character by character."""

import subprocess

import pytest

from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.reproduce import reproduce_command
from dream_fast.engine.text import escape_controls, one_line, quote


def command(**typed) -> str:
    return reproduce_command(configure({"text": "cat", "seed": 3} | typed, typed.pop("device", "cpu")))


def test_reproduce_without_machine():
    """The number of a GPU and the output folder are left out."""
    plain = "dream-fast --text cat --seed 3"
    assert command(device="cuda:1") == command(device="cuda") == f"{plain} --device cuda"
    assert command(test=True, output="elsewhere") == command() == f"{plain} --device cpu"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"device": "cuda", "cuda_graph": False}, "--device cuda --no-cuda_graph"),
        ({"save_mesh": True}, "--save_mesh"),
        ({"workspace": "-w"}, "--workspace=-w"),
        ({"ckpt": "latest"}, None),
        ({"ckpt": "scratch"}, None),
        ({"ckpt": "a/b"}, "--ckpt a/b"),
        ({"phi_range": (-90.0, 5.5)}, "--phi_range -90.0 5.5"),
        ({"fp16": True}, "-O"),
    ],
)
def test_command_formats_settings(typed, words):
    """Switches have their name, values with a dash an =, ranges two words, and --ckpt only a path."""
    plain = ["dream-fast", "--text", "cat", "--seed", "3"]
    added = [word for word in command(**typed).replace(" --device cpu", "").split() if word not in plain]
    assert " ".join(added) == (words or "")


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("cat", "cat"),
        ("a 'b' \\", "'a '\"'\"'b'\"'\"' \\'"),
        ("\x1b\\'b'\\n", "$'\\x1b\\\\\\'b\\'\\\\n'"),
        ("a\tb", "$'a\\x09b'"),
    ],
)
def test_quote_is_read_back(word, quoted):
    """Backslashes and quotes beside a hidden character are escaped, and bash reads the word back."""
    assert quote(word) == quoted
    printed = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=True).stdout
    assert printed == word


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (0x1F, "\\x1f"),
        (0x20, " "),
        (0x7F, "\\x7f"),
        (0x80, "\\u0080"),
        (0x9F, "\\u009f"),
        (0xDC7F, "\\udc7f"),
        (0xDC80, "\\x80"),
        (0xDCFF, "\\xff"),
        (0xDD00, "\\udd00"),
        (0x2028, "\\u2028"),
        (0x2029, "\\u2029"),
        (0xFFFB, "\\ufffb"),
        (0x200C, "\\u200c"),
        (0xFE0F, "\\ufe0f"),
        (0x2065, "\\u2065"),
        (0xFFA0, "\\uffa0"),
        (0x1D173, "\\U0001d173"),
        (0xE0100, "\\U000e0100"),
        (0x10000, "\U00010000"),
    ],
)
def test_escape_controls_hidden(code, shown):
    """Each kind of hidden character is escaped, at its borders: controls, formats, separators, bytes."""
    assert escape_controls(chr(code)) == shown


def test_one_line_cuts_the_middle():
    """A text of the maximum length is kept; a longer one is cut in the middle, with a count."""
    assert one_line("abcdef\n", 7) == "abcdef\\x0a"
    assert one_line("abcdefghijk", 6) == "abc ... (5 characters) ... ijk"
    assert one_line("x" * 1000) == "x" * 1000
    assert one_line("x" * 500 + "y" + "z" * 500) == "x" * 500 + " ... (1 characters) ... " + "z" * 500
