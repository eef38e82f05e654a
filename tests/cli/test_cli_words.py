"""The words of the command: its help, its messages about words that it refuses, and its exit status."""

import argparse
import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

import dream_fast
from dream_fast import cli
from dream_fast.cli import MAX_WORDS, build_parser, main, parse
from dream_fast.engine.config.compat import RENAMED_FLAGS, UNSUPPORTED_FLAGS, UNSUPPORTED_VALUES
from dream_fast.engine.config.options_page import COMMAND_FLAGS
from dream_fast.engine.config.other_programs import COMMANDS, FLAGS, KEYS, VALUES
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.schema import Config, settings
from dream_fast.engine.config.setting import MAX_TEXT, setting
from dream_fast.engine.errors import UserError

DASH = ": it begins with a dash that is not a hyphen; type flags as in --text"
CURLY = ": put the prompt in straight quotes, as in --text 'a hamburger'"
SCHEDULE = LinearSchedule(0, 0.9, 0.5, 10, fractions=False)


def refusal(*words: str) -> str:
    """The message with which `words` are refused."""
    with pytest.raises(UserError) as error:
        parse(words)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_groups():
    """Titles are the first lines of the sections, and a flag has the help of its setting or of the table of flags."""
    parser = build_parser()
    titles = [group.title for group in parser._action_groups][2:]
    assert titles == list(dict.fromkeys(section.type.__doc__.removesuffix(".") for section, _ in settings()))
    helps = {flag: action.help for action in parser._actions for flag in action.option_strings}
    for flag, words in COMMAND_FLAGS.items():
        assert helps[flag] == words
    for _, field in settings():
        assert helps[f"--{field.name}"] == field.metadata["help"].replace("%", "%%")


@pytest.mark.parametrize(
    ("flag", "metavar"),
    [
        ("--file", "FILE"),
        ("--iters", "N"),
        ("--seed", "N"),
        ("--lr", "X"),
        ("--angle_front", "X"),
        ("--text", "TEXT"),
        ("--backbone", "grid|grid_torch|vanilla"),
        ("--guidance", "dream-mini|SD|IF|clip"),
        ("--phi_range", ("LOW", "HIGH")),
        ("--t_range", ("LOW", "HIGH")),
        ("--guidance_scale", "X|START:V0:V1:END"),
    ],
)
def test_help_metavars(flag, metavar):
    """Whole numbers, numbers, texts, choices, ranges and schedules have their own forms."""
    assert build_parser()._option_string_actions[flag].metavar == metavar


def test_help_may_name_a_percentage(monkeypatch):
    """A percent sign in the help of a setting is not a format."""
    field = dataclasses.make_dataclass("Section", [("share", float, setting(0.5, "50 % of it"))])
    section = SimpleNamespace(name="section", type=SimpleNamespace(__doc__="A section."))
    monkeypatch.setattr(cli, "settings", lambda: [(section, dataclasses.fields(field)[0])])
    assert "50 % of it" in build_parser().format_help()


def test_help_examples(capsys):
    """Usage, description and examples keep their lines, and --version shows one line."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: dream-fast --text PROMPT [-O] [--save_mesh] [--workspace FOLDER] [FLAG ...]\n")
    assert cli._EXAMPLES in shown and dream_fast.__doc__.strip() in shown
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dream-fast {dream_fast.__version__}\n"
    assert build_parser().prog == "dream-fast"


# ------------------------------------------------------------------------------------------------- what is not taken


def test_refused_flags_messages():
    """The message has the flag, a colon and the reason, also with a value after =."""
    for flag, reason in UNSUPPORTED_FLAGS.items():
        assert refusal("--text", "a cat", flag, "1") == f"{flag} is not available: {reason}"
    for flag, reason in RENAMED_FLAGS.items():
        assert refusal("--text", "a cat", f"{flag}=1") == f"{flag} was removed: {reason}"


def test_refused_values_messages():
    """A value of a flag, apart or behind =, is refused with its reason."""
    for (flag, word), reason in UNSUPPORTED_VALUES.items():
        sentence = f"{flag} {word} is not available: {reason}"
        assert refusal("--text", "a cat", flag, word) == refusal(f"{flag}={word}") == sentence
    for (flag, word), answer in VALUES.items():
        if not word.startswith("-"):
            sentence = f"{flag} {word} is unknown: {answer}"
            assert refusal("--text", "a cat", flag, word) == refusal(f"{flag}={word}") == sentence
    assert refusal("--guidance", "SD", "zero123").startswith("--guidance zero123 is not available: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--Save-Mesh"], "unknown flag --Save-Mesh; did you mean --save_mesh?"),
        (["--itres=5"], "unknown flag --itres; did you mean --iters?"),
        (["--CFG-Scale", "3"], f"unknown flag --CFG-Scale: {FLAGS['cfg_scale']}"),
        (
            ["--Zero123-config"],
            "unknown flag --Zero123-config; --zero123_config is not available: "
            f"{UNSUPPORTED_FLAGS['--zero123_config']}",
        ),
        (["-w", "3"], "unknown flag -w; did you mean --w?"),
        (["-W", "3"], "unknown flag -W; did you mean --W?"),
        (["-x", "3"], "unknown flag -x; see --help"),
        (["--zxqvj"], "unknown flag --zxqvj; see --help"),
        (["--fp16=false"], "--fp16 takes no value, so not 'false': --no-fp16 turns it off"),
        (["\u2014text", "a"], f"unexpected '\u2014text'{DASH}"),
        (["\u2013w"], f"unexpected '\u2013w'{DASH}"),
        (["\u2212w"], f"unexpected '\u2212w'{DASH}"),
        (["train", "-O"], f"unexpected 'train': there are no commands here; {COMMANDS['train']}"),
        (["-O", "train"], "unexpected 'train' after -O"),
        (["a.b.seed=3"], f"unexpected 'a.b.seed=3': settings are flags here; {KEYS['seed']}"),
        (["max_steps=3"], f"unexpected 'max_steps=3': settings are flags here; {KEYS['max_steps']}"),
        (["my_own.key=3"], "unexpected 'my_own.key=3': settings are flags here, as in --iters 5000; see --help"),
        (["a b=3"], "unexpected 'a b=3': put a prompt of several words in quotes after --text"),
        (["seed"], "unexpected 'seed': put a prompt of several words in quotes after --text"),
        (["--text", "\u201ca", "cat\u201d"], f"unexpected 'cat\u201d'{CURLY}"),
        (["--text", "\u2018a", "cat"], f"unexpected 'cat'{CURLY}"),
        (["--save_mesh", "on"], "unexpected 'on' after --save_mesh, which takes no value: --no-save_mesh turns it off"),
        (["--iters", "5", "6"], "unexpected '6' after --iters"),
        (
            ["--iters", "5", "--text", "a", "cat"],
            "unexpected 'cat': put a prompt of several words in quotes after --text",
        ),
        (["--lr", "0,5"], "--lr: '0,5' is not a number"),
        (["--w", "1.0"], "--w: '1.0' is not a whole number"),
        (["--lambda_tv", "a"], "--lambda_tv: 'a' is not a number"),
        (
            ["--lambda_tv", "1:2:3"],
            "--lambda_tv: '1:2:3' is not a schedule; write start:v0:v1:end, as in 0.0:8:4:1.0 "
            "(fractions of the run) or 0:8:4:500 (steps)",
        ),
    ],
)
def test_unexpected_word_advice(words, sentence):
    """Each kind of unexpected word has its own advice."""
    assert refusal(*words) == sentence


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["--phi_range", "-90", "-.5"], {"phi_range": (-90.0, -0.5)}),
        (["--guidance", "SD", "clip"], {"guidance": ("SD", "clip")}),
        (["--lambda_tv=1e-3"], {"lambda_tv": 1e-3}),
        (["--t_range", "0.1", "0:0.9:0.5:10"], {"t_range": (0.1, SCHEDULE)}),
        (["--text=-x"], {"text": "-x"}),
        (["--print_config"], {"print_config": True}),
        (["--doctor", "--cuda_ray"], {"doctor": True, "cuda_ray": True}),
        (
            ["--hf_key", "https://huggingface.co/a/b", "--if_key", "c/d/", "--clip_key", "e/f/"],
            {"hf_key": "a/b", "if_key": "c/d", "clip_key": "e/f"},
        ),
    ],
)
def test_words_by_type(words, typed):
    """Ranges and lists become tuples, a negative number is not a flag, and models get the names of the hub."""
    assert parse(words) == typed


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["--levels", "4", "--features", "4", "--log2_entries", "9"], {"n_levels": 4, "n_features_per_level": 4,
                                                                       "log2_hashmap_size": 9}),
        (["--frequencies", "3"], {"n_frequencies": 3}),
        (["--step_graph"], {"cuda_graph": True}),
        (["--no-step_graph"], {"cuda_graph": False}),
        (["--score", "csd"], {"objective": "csd"}),
        (["--lambda_entropy", "0:1:2:10"], {"lambda_opacity_entropy": LinearSchedule.parse("0:1:2:10")}),
        (["--print-config"], {"print_config": True}),
    ],
)  # fmt: skip
def test_aliases_read(words, typed):
    """An earlier name of a flag sets the same setting; the later one wins."""
    assert parse(words) == typed
    name, value = next(iter(typed.items()))
    if value not in (True, False):
        assert parse([words[0], "1" if name != "objective" else "sds", f"--{name}", *words[1:2]])[name] == value


def test_every_alias_has_a_test():
    """The earlier names are those of the settings, no more and no fewer."""
    aliases = {alias for _, field in settings() for alias in field.metadata["aliases"]}
    assert aliases == {"levels", "features", "log2_entries", "frequencies", "step_graph", "score", "lambda_entropy"}


def test_file_between_words(tmp_path):
    """Words after a file win over it, and a later file over an earlier one."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("--seed 1 --w 1 --h 1")
    two.write_text("--w 2")
    assert parse(["--h", "9", "--file", str(one), "--seed", "5", f"--file={two}"]) == {"seed": 5, "w": 2, "h": 1}
    two.write_text("--seed 1 --file three")
    assert refusal("--file", str(two)) == f"--file {two}: a file of arguments cannot name another one"


def test_argument_readers_raise():
    """The readers of numbers raise errors that argparse turns into messages."""
    for reader in (cli._whole, cli._number, cli._scalar):
        with pytest.raises(argparse.ArgumentTypeError, match="'x' is not a"):
            reader("x")


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def handed(monkeypatch, tmp_path):
    """The configurations that the command passes to the engine, whose run returns 7. Runs in an empty folder."""
    configs = []
    monkeypatch.setitem(sys.modules, "dream_fast.engine.run", SimpleNamespace(run=lambda c: configs.append(c) or 7))
    monkeypatch.chdir(tmp_path)
    return configs


def test_main_status_and_arguments(handed, monkeypatch):
    """Without arguments main reads those of the process."""
    monkeypatch.setattr(sys, "argv", ["dream-fast", "--text", "a cat", "--device", "cpu", "--seed", "5"])
    assert main() == 7 and handed[0].run.seed == 5
    assert main(["--text", "a cat", "--device", "cpu", "--seed", "6"]) == 7 and handed[1].run.seed == 6


def test_an_interrupt_is_one_line(monkeypatch, handed, capsys):
    """The status is 130, and stderr has one line."""

    def interrupt(_config):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "dream_fast.engine.run", SimpleNamespace(run=interrupt))
    assert main(["--text", "a cat", "--device", "cpu"]) == 130
    assert capsys.readouterr() == ("", "dream-fast: interrupted\n")


def test_errors_escape_controls(handed, capsys):
    """Control characters of arguments are escaped in messages."""
    assert main(["--text", "a cat", "--zx\x1bqvj"]) == 2
    assert capsys.readouterr() == ("", "dream-fast: error: unknown flag --zx\\x1bqvj; see --help\n")


def test_print_config_whole(handed, capsys):
    """--print-config prints the configuration as it is stored."""
    assert main(["--print-config", "--device", "cpu", "--seed", "3", "--cuda_ray"]) == 0
    shown = capsys.readouterr().out
    again = Config.from_dict(json.loads(shown))
    assert (again.run.seed, again.run.device, handed) == (3, "cpu", [])
    assert shown == json.dumps(again.to_dict(), indent=2) + "\n"


@pytest.mark.parametrize(
    ("there", "why", "device", "note"),
    [
        (True, "", "cuda", ""),
        (False, "", "cpu", ""),
        (False, "too \x1b old", "cpu", "dream-fast: note: the GPU is not used (too \\x1b old)\n"),
    ],
)
def test_device_auto(there, why, device, note, handed, capsys, monkeypatch):
    """auto takes the GPU that torch finds, and prints torch's reason for one that it cannot use."""
    monkeypatch.setattr("dream_fast.engine.runtime.device.find_gpu", lambda: (there, why))
    for words in ([], ["--device", "auto"]):
        assert main(["--text", "a cat", *words]) == 7
        assert handed.pop().run.device == device
        assert capsys.readouterr().err == note
    assert main(["--text", "a cat", "-O"]) == 7
    on_cpu = "dream-fast: note: no GPU in use, so this runs on the CPU\n" if device == "cpu" else ""
    assert capsys.readouterr().err == note + on_cpu
    assert main(["--text", "a cat", "--device", "cuda:3"]) == 7
    assert handed.pop().run.device == "cuda:3" and capsys.readouterr().err == ""


def test_doctor_needs_nothing_else(handed, monkeypatch):
    """--doctor returns the status of the doctor, and no run begins."""
    from dream_fast.bench.doctor import doctor

    monkeypatch.setattr(doctor, "main", lambda: 4)
    assert main(["--doctor"]) == 4 and handed == []


def test_each_prompt_is_checked_once(handed, capsys):
    """A word in several prompts gives one warning; a note about syntax names its flag."""
    words = ["--text", "a shiny cat", "--text_back", "a shiny cat", "--negative", "shiny (blurry:1.2)"]
    assert main([*words, "--device", "cpu"]) == 7
    notes, warnings = [], []
    for line in capsys.readouterr().err.splitlines():
        (notes if line.startswith("dream-fast: note: ") else warnings).append(line)
    assert len(notes) == 1 and notes[0].startswith(
        'dream-fast: note: --negative: "(blurry:1.2)" has no special meaning'
    )
    assert [line.split('"')[1] for line in warnings] == ["shiny", "blurry", "1", "2"]
    assert all(line.startswith("dream-fast: warning: the embedded model does not know the word ") for line in warnings)


def test_too_many_words_refused(tmp_path, capsys):
    """A command line, a file and a prompt beyond their lengths are refused before they are looked at."""
    (tmp_path / "arguments.txt").write_text("--seed 1 " * MAX_WORDS)
    for words, sentence in (
        (["--seed", "1"] * MAX_WORDS, f"{2 * MAX_WORDS + 1} words were typed, of at most {MAX_WORDS}"),
        (["--file", str(tmp_path / "arguments.txt")], f"{2 * MAX_WORDS} words were typed, of at most {MAX_WORDS}"),
        (["--text", "a " * MAX_TEXT], f"--text has {2 * MAX_TEXT} characters, of at most {MAX_TEXT}"),
    ):
        assert main([*words, "--print_config"]) == 2
        assert sentence in capsys.readouterr().err
