"""The command that repeats a run resolves to its settings, also through a shell."""

import json
import subprocess
import sys

import pytest

from dream_fast.cli import parse
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.reproduce import reproduce_command
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.schema import Config
from dream_fast.engine.text import escape_controls, quote

SHELL = "bash"


def words_of(line: str) -> list[str]:
    """The words into which a shell splits `line`."""
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = [SHELL, "-c", f'{sys.executable} -c "$0" {line}', show]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def settings_of(line: str) -> Config:
    """The settings to which the command `line` resolves."""
    program, *words = words_of(line)
    assert program == "dream-fast"
    typed = parse(words)
    return configure(typed, typed["device"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "typed",
    [
        {},
        {"fp16": True, "save_mesh": True, "iters": 7, "phi_range": (-90.0, -0.5)},
        {"guidance_scale": 20.0},
        {"guidance_scale": 8.0},  # the default at the start, and then not at the end
        {"guidance_scale": LinearSchedule(0.0, 20.0, 5.0, 1.0)},
        {"t_range": (0.02, LinearSchedule(10, 0.98, 0.5, 300, fractions=False)), "objective": "asd"},
        {"lambda_orient": LinearSchedule(1 / 3, 1e-7, 12345.678901, 2 / 3)},
        {"objective": "csd"},
        {"objective": "asd", "guidance_scale": 3.0},
        {"preset": "reference"},
        {"preset": "reference", "lr": 0.5},
        {"sd_version": "1.5", "negative": "blurry"},
        {"hf_key": "a folder/with 'quotes'"},
        {"guidance": ("SD",)},
        {"guidance": ("SD", "clip"), "hf_key": "a/b", "clip_key": "c/d"},
        {"guidance": ("IF",), "if_key": "a/b"},
        {"guidance": ("clip",), "preset": "reference"},
        {"guidance": ("dream-mini", "clip")},
        {"deterministic": True},
        {"lambda_tv": 1.0},
        {"cuda_graph": False, "grad_clip": -1.0, "bg_radius": -1.0, "view_blend": 90.0},
        {"text": "-a \"hamburger\" $(rm) `x` !! \\ 'q'", "text_back": "--iters"},
        {"text": "two\nlines\tand \x1b[31m \u202e and K\u00e4se \U0001f354", "workspace": "a b"},
        {"exp_start_iter": 3, "exp_end_iter": 9, "test_interval": 1, "save_guidance": True},
    ],
    ids=lambda typed: "-".join(typed) or "default",
)
def test_the_command_comes_out_as_the_settings(typed, device):
    typed = {"text": "a hamburger", "seed": 3} | typed
    config = configure(typed, device)
    line = reproduce_command(config)
    assert settings_of(line) == config
    assert "\x1b" not in line and "\n" not in line
    assert settings_of(reproduce_command(config, 12)) == config.override({"iters": 12})


def test_only_what_differs_is_in_it():
    config = configure({"text": "a hamburger", "seed": 3, "fp16": True}, "cuda")
    assert reproduce_command(config) == "dream-fast --text 'a hamburger' --seed 3 -O --device cuda"


def test_reproduce_without_ckpt():
    """--ckpt latest and scratch are left out."""
    config = configure({"text": "cat", "seed": 3}, "cpu")
    for changes in ({"test": True}, {"ckpt": "scratch"}):
        assert reproduce_command(config.override(changes)) == reproduce_command(config)
    assert "--ckpt old/step_000004.safetensors" in reproduce_command(
        config.override({"ckpt": "old/step_000004.safetensors"})
    )


def test_undecodable_bytes_kept():
    """Bytes of the command line that are not text are kept."""
    word = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    assert quote(word) == "$'caf\\xe9'" and escape_controls(word) == "caf\\xe9"
    assert words_of(quote(word)) == [word]


@pytest.mark.parametrize(
    "code", [0x85, 0xAD, 0x61C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0x2060, 0x3164, 0xFEFF, 0xE0041]
)
def test_invisible_characters(code):
    """They are escaped wherever a prompt is shown, and the printed command has the original prompt for a shell."""
    word = f"a c{chr(code)}at"
    escape = f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    assert escape_controls(word) == f"a c{escape}at" and quote(word) == f"$'a c{escape}at'"
    assert words_of(quote(word)) == [word]


@pytest.mark.parametrize(
    "word", ["\U0001f469\u200d\U0001f680", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "K\u00e4se \u2764\ufe0f"]
)
def test_joiners_of_emoji_and_scripts_stay(word):
    """Joiners that words need are not hidden characters."""
    assert escape_controls(word) == word
