"""The command: refusals with their messages, and the configuration that it passes to the engine."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dream_fast.cli import build_parser, main, parse
from dream_fast.engine.config.compat import REFERENCE_FLAGS, UNSUPPORTED_FLAGS, UNSUPPORTED_VALUES
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import dream_mini_cpu
from dream_fast.engine.config.schema import settings
from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.signals import Stopped
from dream_fast.engine.workspace.folder import Workspace


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A substitute for the engine, whose `configs` are those of the command. Runs in an empty folder."""
    configs = []
    fake = SimpleNamespace(run=lambda config: configs.append(config) or 0)
    monkeypatch.setitem(sys.modules, "dream_fast.engine.run", fake)
    monkeypatch.chdir(tmp_path)
    return configs


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no prompt: give one with --text"),
        (["-O", "--save_mesh"], "no prompt: give one with --text"),
        (["--text", ""], "--text is empty"),
        (["--text", "   "], "--text is empty"),
        (["--text"], "--text: expected one argument"),
        (["--text", "a", "hamburger"], "unexpected 'hamburger': put a prompt of several words in quotes"),
        (["a hamburger"], "unexpected 'a hamburger': put a prompt of several words in quotes after --text"),
        (["--text", "a cat", "--save_mesh", "yes"], "unexpected 'yes' after --save_mesh"),
        (["--text", "a cat", "--phi_range", "-90", "90", "3"], "unexpected '3' after --phi_range"),
        (["--text", "a qwzxlp"], 'does not know what "a qwzxlp" is; it knows hamburger, donut'),
        (["--text", "a cat", "--text_back", "a qwzxlp"], 'does not know what "a qwzxlp" is; it knows hamburger, donut'),
        (["--text", "a cat", "--text_overhead", " "], "--text_overhead is empty"),
        (["--text_front", "a cat"], "no prompt: give one with --text"),
        (["--text", "a wizard\nwith a hat"], 'does not know what "a wizard with a hat" is'),
        (["--text", "a cat", "--iter", "5"], "unknown flag --iter; did you mean --iters?"),
        (["--text", "a cat", "--guidence_scale=5"], "unknown flag --guidence_scale; did you mean --guidance_scale?"),
        (["--text", "a cat", "--zxqvj"], "unknown flag --zxqvj; see --help"),
        (["--text", "a cat", "-x"], "unknown flag -x; see --help"),
        (["--text", "a cat", "-O2", "--cuda_ray"], "--cuda_ray marches through the occupancy grid, which the vanilla"),
        (
            ["--text", "a cat", "-O", "--backbone", "vanilla"],
            "-O marches through the occupancy grid, which the vanilla",
        ),
        (
            ["--text", "a cat", "-O2", "--max_steps", "64"],
            "--max_steps has no meaning with --backbone vanilla: it has",
        ),
        (
            ["--text", "a cat", "-O2", "--lambda_tv", "1"],
            "--lambda_tv has no meaning with --backbone vanilla: it has",
        ),
        (["--text", "a cat", "--num_steps", "64"], "--num_steps has no meaning with --backbone grid: its rays march"),
        (
            ["--text", "a cat", "--upsample_steps", "8"],
            "--upsample_steps has no meaning with --backbone grid: its rays",
        ),
        (["--text", "a cat", "-O2", "--num_steps", "0"], "--num_steps must be at least 1, not 0"),
        (["--text", "a cat", "-O2", "--upsample_steps", "-1"], "--upsample_steps must be at least 0, not -1"),
        (["--text", "a cat", "-O2", "--n_frequencies", "0"], "--n_frequencies must be at least 1, not 0"),
        (
            ["--text", "a cat", "--init_with", "a.glb"],
            "--init_with belongs to the mesh refinement: it works only with --dmtet",
        ),
        (["--text", "a cat", "--dmtet", "--init_with", "a.glb"], "--init_with a.glb: there is no such file"),
        (["--text", "a cat", "--dmtet", "--tet_grid_size", "9"], "--tet_grid_size must be even, not 9"),
        (["--text", "a cat", "--gui"], "--gui is not available: there is no viewer"),
        (["--image", "a_rgba.png"], "--image is not available: image conditioning is not supported"),
        (["--text", "a cat", "--lambda_rgb=3"], "--lambda_rgb is not available"),
        (["--text", "a cat", "--backbone", "mlp"], "--backbone is one of grid, grid_torch, vanilla, not 'mlp'"),
        (["--text", "a cat", "--backbone=grid_tcnn"], "--backbone grid_tcnn is not available"),
        (["--text", "a cat", "--guidance", "SD", "zero123"], "--guidance zero123 is not available"),
        (["--text", "a cat", "--guidance", "clip", "--IF"], "--IF replaces SD, which --guidance clip does"),
        (["--text", "a cat", "--IF", "--sd_version", "2.1"], "--sd_version names a model for --guidance SD, which"),
        (
            ["--text", "a cat", "--IF", "--latent_iter_ratio", "0.1"],
            "--latent_iter_ratio 0.1 cannot be combined with --guida",
        ),
        (["--text", "a cat", "--guidance", "clip", "--perpneg"], "--perpneg has no meaning with --guidance clip alone"),
        (["--text", "a cat", "--ckpt", "best"], "--ckpt best is not available"),
        (["--text", "a cat", "--iters", "0"], "--iters must be at least 1, not 0"),
        (["--text", "a cat", "--iters", "many"], "--iters: 'many' is not a whole number"),
        (["--text", "a cat", "--iters", "1e3"], "--iters: '1e3' is not a whole number"),
        (["--text", "a cat", "--lr", "nan"], "--lr must be a finite number, not nan"),
        (["--text", "a cat", "--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--text", "a cat", "--guidance_scale", "inf"], "--guidance_scale must be a finite number, not inf"),
        (["--text", "a cat", "--t_range", "0.9", "0.1"], "--t_range is reversed"),
        (["--text", "a cat", "--t_range", "0.9"], "--t_range: expected 2 arguments"),
        (["--text", "a cat", "--t_range", "nan", "1"], "--t_range must be a finite number, not nan"),
        (["--text", "a cat", "--radius_range", "3", "2"], "--radius_range is reversed: its lower end 3 is more than"),
        (["--text", "a cat", "--iters", "nan"], "--iters: 'nan' is not a whole number"),
        (["--text", "a cat", "--max_resolution", "8"], "--max_resolution 8 is less than --base_resolution 16"),
        (["--text", "a cat", "--base_resolution", "999"], "is less than --base_resolution 999"),
        (["--text", "a cat", "--occupancy_resolution", "9"], "--occupancy_resolution must be even, not 9"),
        (["--text", "a cat", "--seed", "-2"], "--seed must be at least 0, not -2"),
        (["--text", "a cat", "--workspace", ""], "--workspace is empty"),
        (["--text", "a cat", "--hf_key", ""], "--hf_key is empty"),
        (["--text", "a cat", "--ckpt", ""], "--ckpt is empty"),
        (["--text", "a cat", "--optim", "sgd"], "--optim is one of adan, adam, not 'sgd'"),
        (["--text", "a cat", "--sd_version", "3"], "--sd_version is one of 1.5, 2.0, 2.1, not '3'"),
        (["--text", "a cat", "--hf_key", "x", "--sd_version", "2.1"], "give one of them"),
        (["--test", "--workspace", "empty"], "--test needs a stored run, but --workspace empty holds none"),
    ],
)
def test_bad_input_refused(words, sentence, engine, tmp_path, capsys):
    """Bad input is one sentence and status 2 and writes nothing."""
    assert main([*words, "--device", "cpu"] if words not in (["--text"],) else words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dream-fast: error: ") and output.err.count("\n") == 1
    assert sentence in output.err
    assert engine == [] and list(tmp_path.iterdir()) == []


def test_reference_flags_parsed():
    """Every flag of the reference works or is refused with a reason."""
    flags = set(build_parser()._option_string_actions)
    refused = set(UNSUPPORTED_FLAGS)
    assert set(REFERENCE_FLAGS) - flags == refused
    assert not refused & flags
    assert all(len(reason) > 15 for reason in [*UNSUPPORTED_FLAGS.values(), *UNSUPPORTED_VALUES.values()])
    assert {flag for flag, _ in UNSUPPORTED_VALUES} <= flags


def test_config_reaches_engine(engine):
    """The whole configuration reaches the engine."""
    words = (
        "--workspace trial -O --save_mesh --iters 5 --seed 3 --phi_range -90 -0.5 --w 32 --lambda_orient 0 --cuda_ray"
    )
    assert main(["--text", "a hamburger", "--device", "cpu", *words.split()]) == 0
    typed = dict(
        text="a hamburger", workspace="trial", save_mesh=True, iters=5, seed=3, phi_range=(-90.0, -0.5), w=32,
        lambda_orient=0.0, fp16=True,
    )  # fmt: skip
    assert engine == [configure(typed, "cpu")]


def test_only_what_was_typed_is_typed():
    assert parse(["--text", "a cat"]) == {"text": "a cat"}
    assert parse(["--text", "a cat", "--no-save_mesh", "-O"]) == {"text": "a cat", "save_mesh": False, "fp16": True}


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ("-O2", {"fp16": True, "backbone": "vanilla", "progressive_level": True}),
        ("-O2 --no-fp16 --no-progressive_level", {"fp16": False, "backbone": "vanilla", "progressive_level": False}),
        ("--backbone grid_torch -O2", {"fp16": True, "backbone": "grid_torch", "progressive_level": True}),
        ("--no-fp16 -O", {"fp16": False}),
        ("-O2 --test", {"fp16": True, "backbone": "vanilla", "test": True}),
        ("--backbone vanilla", {"backbone": "vanilla"}),
        ("--IF", {"guidance": ("IF",)}),
        ("--guidance SD clip --IF", {"guidance": ("IF", "clip")}),
        ("--guidance IF SD --IF", {"guidance": ("IF",)}),
    ],
)
def test_shortcut_below_typed(words, typed, capsys):
    """A typed setting wins over a shortcut."""
    assert parse(words.split()) == typed
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["-O", "-O2"], ["-O2", "-O"]])
def test_shortcut_O2_beside_O(words, capsys):
    """-O2 has no effect with -O, with a message."""
    assert parse(words) == {"fp16": True}
    assert capsys.readouterr().err == "dream-fast: note: -O2 has no effect with -O\n"


def test_shortcut_help():
    """The help of a shortcut names all of its settings."""
    text = " ".join(build_parser().format_help().split())
    assert "--fp16, --backbone vanilla and --progressive_level" in text
    assert set(parse(["-O2"])) == {"fp16", "backbone", "progressive_level"}


@pytest.mark.parametrize(
    ("content", "typed"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("--text 'a red  hamburger' -O --seed 3\n", {"text": "a red  hamburger", "fp16": True, "seed": 3}),
        ('--text "a cat\\"s hat"', {"text": 'a cat"s hat'}),
        ("# the prompt: don't close this\n--text cat # its name\n\n\t--iters 5", {"text": "cat", "iters": 5}),
        ("--workspace runs#3 --text '#1'", {"workspace": "runs#3", "text": "#1"}),
        ("--text a\\ cat \\\n  --seed=3\r\n--phi_range -90 90", {"text": "a cat", "seed": 3, "phi_range": (-90, 90)}),
        ("\ufeff--text K\u00e4se", {"text": "K\u00e4se"}),
    ],
)
def test_split_as_shell(content, typed, tmp_path):
    """A file of arguments is split as a shell would."""
    (tmp_path / "run.txt").write_bytes(content.encode())
    assert parse(["--file", str(tmp_path / "run.txt")]) == typed
    assert parse([f"--file={tmp_path / 'run.txt'}"]) == typed


def test_file_order(engine, tmp_path):
    """Later arguments win over a file, and a file over earlier ones."""
    (tmp_path / "one.txt").write_text("--seed 2 --w 2 --no-save_mesh --text 'a cat'")
    (tmp_path / "two.txt").write_text("--w 3 -O --lr 0.5")
    words = "--seed 1 --iters 1 --w 1 --save_mesh --file one.txt --h 9 --file two.txt --h 4 --lr 0.25".split()
    typed = dict(seed=2, iters=1, w=3, save_mesh=False, text="a cat", fp16=True, h=4, lr=0.25)
    assert parse(words) == typed
    assert main([*words, "--device", "cpu"]) == 0
    assert engine == [configure(typed, "cpu")]


@pytest.mark.parametrize(
    ("content", "words", "sentence"),
    [
        (None, "--file run.txt", "--file run.txt cannot be read (No such file or directory)"),
        (None, "--file .", "--file . cannot be read (Is a directory)"),
        (None, "--file", "--file: expected one argument"),
        (None, "--file ~nobody_knows/run.txt", "--file ~nobody_knows/run.txt cannot be read ("),
        (b"--text a\0b", "--file run.txt", "--file run.txt is not a text file"),
        (b"\x89PNG\r\n\xff\xfe", "--file run.txt", "--file run.txt is not a text file"),
        (b"-O\n--text 'a cat", "--file run.txt", "--file run.txt: the ' in line 2 is not closed"),
        (b'--text "a cat\n', "--file run.txt", '--file run.txt: the " in line 1 is not closed'),
        (b"--text cat\\", "--file run.txt", "--file run.txt: the \\ in line 1 is not closed"),
        (b"--file run.txt", "--file run.txt", "--file run.txt: a file of arguments cannot name another one"),
        (b"--file=x", "--file run.txt", "--file run.txt: a file of arguments cannot name another one"),
        (b"--text cat --itres 5", "--file run.txt", "--file run.txt: unknown flag --itres; did you mean --iters?"),
        (b"--text cat --gui", "--file run.txt", "--file run.txt: --gui is not available: "),
        (b"--iters 0", "--text cat --iters 5 --file run.txt", "--file run.txt: --iters must be at least 1, not 0"),
        (b"cat --seed 3", "--text --file run.txt", "--text: expected one argument"),
        (b"cat --seed 3", "--save_mesh --file run.txt", "--file run.txt: unexpected 'cat'"),
        (b"--guidance SD", "--text cat --file run.txt dream-mini", "unexpected 'dream-mini' after --file"),
    ],
)
def test_bad_argument_file(content, words, sentence, engine, tmp_path, capsys):
    if content is not None:
        (tmp_path / "run.txt").write_bytes(content)
    assert main(words.split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"dream-fast: error: {sentence}") and output.err.count("\n") == 1
    assert output.out == "" and engine == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_argument_file(tmp_path):
    (tmp_path / "run.txt").touch(mode=0)
    with pytest.raises(UserError, match="cannot be read \\(Permission denied\\)"):
        parse(["--file", str(tmp_path / "run.txt")])


def test_unknown_words_warned(engine, capsys):
    """Words that the embedded model does not know give a warning."""
    assert main(["--text", "a shiny hamburger", "--device", "cpu"]) == 0
    warning = 'dream-fast: warning: the embedded model does not know the word "shiny" and will ignore it\n'
    assert capsys.readouterr().err == warning
    assert engine[0].run.text == "a shiny hamburger"
    assert main(["--text", "a shiny hamburger", "--hf_key", "folder", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_texts_of_the_sides_are_prompts_too(engine, capsys):
    words = [
        "--text",
        "a shiny cat",
        "--text_front",
        "a shiny red cat",
        "--text_side",
        "a plump cat",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    warned = capsys.readouterr().err
    assert warned.count('"shiny"') == 1 and warned.count('"plump"') == 1 and warned.count("\n") == 2
    assert engine[0].run.view_prompts == {"front": "a shiny red cat", "side": "a plump cat"}
    for view in ("front", "side", "back", "overhead"):
        assert main(["--text", "a cat", f"--text_{view}", "qwzxlp", "--device", "cpu"]) == 2
        assert main(["--text", "a cat", f"--text_{view}", "qwzxlp", "--hf_key", "folder", "--device", "cpu"]) == 0
        assert engine[-1].run.view_prompts == {view: "qwzxlp"}


def test_a_prompt_for_stable_diffusion_is_free(engine):
    assert main(["--text", "a qwzxlp", "--hf_key", "folder", "--device", "cpu"]) == 0
    assert engine[0].guidance.hf_key == "folder"


def test_O_without_a_gpu_says_so(engine, capsys):
    assert main(["--text", "a cat", "-O", "--device", "cpu"]) == 0
    assert "no GPU in use, so this runs on the CPU" in capsys.readouterr().err
    assert main(["--text", "a cat", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_print_config_without_prompt(engine, capsys):
    """Print config needs no prompt and runs nothing."""
    assert main(["--print-config", "--device", "cpu", "--lr", "0.5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optim"]["lr"] == 0.5
    assert shown["run"]["iters"] == dream_mini_cpu().run.iters
    assert engine == []


def test_test_uses_stored_settings(engine, tmp_path):
    typed = {"text": "a cat", "lr": 0.25, "hf_key": "folder", "seed": 1, "W": 32}
    stored = configure(
        {"guidance": ("SD",)} | typed | {"save_mesh": True, "ckpt": "scratch", "workspace": "old"}, "cpu"
    )
    Workspace(tmp_path / "trial").write_config(stored)
    assert main("--test --workspace trial -O --W 48 --device cpu".split()) == 0
    assert engine == [configure({"guidance": ("SD",)} | typed | {"test": True, "workspace": "trial", "W": 48}, "cpu")]


def test_a_workspace_may_lie_at_home(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Workspace(tmp_path / "home" / "trial").write_config(configure({"text": "a cat"}, "cpu"))
    assert main("--test --workspace=~/trial --device cpu".split()) == 0
    assert engine[0].run.text == "a cat"


def test_main_error_statuses(monkeypatch, capsys):
    """Errors and interrupts of the engine have their exit status."""

    def fail(error):
        def run(config):
            raise error

        monkeypatch.setitem(sys.modules, "dream_fast.engine.run", SimpleNamespace(run=run))
        return main(["--text", "a cat", "--device", "cpu"])

    assert fail(UserError("the disk is full")) == 2
    assert capsys.readouterr().err == "dream-fast: error: the disk is full\n"
    assert fail(KeyboardInterrupt()) == 130 and fail(Stopped(signal.SIGTERM)) == 143
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_help_lists_every_setting_by_room(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{field.name}" in shown for _, field in settings())
    assert all(section.type.__doc__.rstrip(".") in shown for section, _ in settings())


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--text ''",
        "--iters 0",
        "--gui",
        "--text qwzxlp",
        "--text cat --lr nan",
        "--file missing",
        "--file /dev/null",
    ],
)
def test_help_imports_nothing_heavy(words):
    code = f"""
import sys
from dream_fast.cli import main
try:
    main({words.replace("''", "").split(" ")!r})
finally:
    print([name for name in ("torch", "numpy", "diffusers", "transformers", "rich") if name in sys.modules])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert process.stdout.splitlines()[-1] == "[]", process.stderr
