"""The command `dream-fast`: parses the arguments, makes the configuration of the run, and calls the engine.

Nothing heavy is imported until the arguments are valid, so help and errors appear at once.
Exit status: 0 success, 2 an error of the user or files that could not be written (one sentence on stderr), 128 + N the
signal N, such as 130 (SIGINT).
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn, get_args, get_origin

import dream_fast
from dream_fast.engine.config.argument_file import read_arguments
from dream_fast.engine.config.compat import RENAMED_FLAGS, UNSUPPORTED_FLAGS, UNSUPPORTED_VALUES
from dream_fast.engine.config.configure import configure, expand_shortcuts
from dream_fast.engine.config.guidances import chosen_guidances
from dream_fast.engine.config.model_names import typed_name
from dream_fast.engine.config.options_page import COMMAND_FLAGS
from dream_fast.engine.config.other_programs import COMMANDS, FLAGS, KEYS, VALUES, plain_name
from dream_fast.engine.config.prompt_syntax import foreign_syntax
from dream_fast.engine.config.schedule import LinearSchedule, Scalar
from dream_fast.engine.config.schema import Config, settings
from dream_fast.engine.config.sections import RunConfig
from dream_fast.engine.config.setting import ScalarRange, check_value, value_type
from dream_fast.engine.config.spelling import nearest
from dream_fast.engine.config.validate import check_typed
from dream_fast.engine.dream_mini import check_prompt
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.streams import safe_output
from dream_fast.engine.text import one_line

_EXAMPLES = """examples:
  dream-fast --text "a hamburger" -O --save_mesh
  dream-fast --text "a red teapot" -O --workspace teapot --iters 1000
  dream-fast --text "a hamburger" -O2                           (the vanilla backbone)
  dream-fast --text "a photo of an owl" -O --sd_version 2.1     (downloads Stable Diffusion)
  dream-fast --test --workspace teapot --six_views

Defaults depend on the model and the device; --print_config shows them."""

# Settings that hold a whole prompt each.
_PROMPTS = ("text", "text_front", "text_side", "text_back", "text_overhead")


MAX_WORDS = 2000  # of a command line or a file of arguments; there are some 120 flags


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _whole(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number") from None


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number") from None


def _scalar(word: str) -> Scalar:
    if ":" not in word:
        return _number(word)
    try:
        return LinearSchedule.parse(word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """Build the parser: a group for each section, a flag for each field. Its namespace has only typed settings."""
    parser = _Parser(
        prog="dream-fast",
        usage="dream-fast --text PROMPT [-O] [--save_mesh] [--workspace FOLDER] [FLAG ...]",
        description=dream_fast.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"dream-fast {dream_fast.__version__}",
        help=COMMAND_FLAGS["--version"],
    )
    parser.add_argument("--file", metavar="FILE", help=COMMAND_FLAGS["--file"])
    parser.add_argument("--print_config", "--print-config", action="store_true", help=COMMAND_FLAGS["--print_config"])
    parser.add_argument("--doctor", action="store_true", help=COMMAND_FLAGS["--doctor"])
    parser.add_argument("-O", dest="O", action="store_true", help=COMMAND_FLAGS["-O"])
    parser.add_argument("-O2", dest="O2", action="store_true", help=COMMAND_FLAGS["-O2"])
    parser.add_argument("--IF", action="store_true", help=COMMAND_FLAGS["--IF"])
    parser.add_argument("--cuda_ray", action="store_true", help=COMMAND_FLAGS["--cuda_ray"])
    groups: dict[str, Any] = {}
    for section, field in settings():
        if section.name not in groups:
            groups[section.name] = parser.add_argument_group((section.type.__doc__ or "").rstrip("."))
        names = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
        groups[section.name].add_argument(*names, **_argument(field))
    return parser


def _argument(field: dataclasses.Field) -> dict[str, Any]:
    kind, choices = value_type(field), field.metadata["choices"]
    text = field.metadata["help"].replace("%", "%%")
    if kind is bool:
        return dict(help=text, action=argparse.BooleanOptionalAction)
    if get_origin(kind) is tuple:
        if get_args(kind)[-1] is Ellipsis:
            return dict(help=text, nargs="+", metavar="|".join(choices))
        return dict(help=text, nargs=2, type=_scalar if kind == ScalarRange else _number, metavar=("LOW", "HIGH"))
    readers = {int: (_whole, "N"), float: (_number, "X"), str: (str, "|".join(choices or ["TEXT"]))}
    reader, metavar = (readers | {Scalar: (_scalar, "X|START:V0:V1:END")})[kind]
    return dict(help=text, type=reader, metavar=metavar)


def _looks_like_flag(word: str) -> bool:
    return re.match(r"-[^\d.]", word) is not None  # and not a negative number


def _check_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raise UserError for a refused flag or value and for an unknown flag, with the equivalent here."""
    known = list(parser._option_string_actions)
    flag = ""
    for word in words:
        if _looks_like_flag(word):
            flag, sign, word = word.partition("=")
            if flag in UNSUPPORTED_FLAGS:
                raise UserError(f"{flag} is not available: {UNSUPPORTED_FLAGS[flag]}")
            if flag in RENAMED_FLAGS:
                raise UserError(f"{flag} was removed: {RENAMED_FLAGS[flag]}")
            if flag not in known:
                raise UserError(f"unknown flag {flag}{_instead(flag, known)}")
            if sign and _off(flag) in known:
                raise UserError(f"{flag} takes no value, so not {word!r}: {_off(flag)} turns it off")
        if (flag, word) in UNSUPPORTED_VALUES:
            raise UserError(f"{flag} {word} is not available: {UNSUPPORTED_VALUES[flag, word]}")
        if (flag, word) in VALUES:
            raise UserError(f"{flag} {word} is unknown: {VALUES[flag, word]}")


def _off(flag: str) -> str:
    """Return the flag that turns `flag` off."""
    return f"--no-{flag.removeprefix('--')}"


def _instead(flag: str, known: Sequence[str]) -> str:
    """Return the end of the message about an unknown flag: the equivalent here, or the flag nearest in spelling."""
    name = plain_name(flag)
    same_letters = [other for other in known if len(name) > 1 and plain_name(other) == name]
    if len(same_letters) == 1:
        return f"; did you mean {same_letters[0]}?"
    if name in FLAGS:
        return f": {FLAGS[name]}"
    refused = [other for other in UNSUPPORTED_FLAGS if plain_name(other) == name]
    if refused:
        return f"; {refused[0]} is not available: {UNSUPPORTED_FLAGS[refused[0]]}"
    near = nearest(name, {plain_name(other): other for other in known})
    return "; see --help" if near is None else f"; did you mean {near}?"


def _why_unexpected(parser: argparse.ArgumentParser, words: Sequence[str], word: str) -> str:
    """Return the end of the message about a word that belongs to no flag."""
    if word.startswith(("\u2013", "\u2014", "\u2212")):
        return ": it begins with a dash that is not a hyphen; type flags as in --text"
    if word == words[0] and word in COMMANDS:
        return f": there are no commands here; {COMMANDS[word]}"
    key, sign, _ = word.partition("=")
    name = plain_name(key.rpartition(".")[2])
    if sign and name in KEYS:
        return f": settings are flags here; {KEYS[name]}"
    if sign and key.replace(".", "").replace("_", "").isalnum():
        return ": settings are flags here, as in --iters 5000; see --help"
    flags = [before for before in words[: list(words).index(word)] if _looks_like_flag(before)]
    if any(sign in "\u201c\u201d\u2018\u2019" for sign in " ".join(words)):
        return ": put the prompt in straight quotes, as in --text 'a hamburger'"
    if flags and flags[-1] != "--text":
        off = _off(flags[-1]) in parser._option_string_actions
        return f" after {flags[-1]}" + f", which takes no value: {_off(flags[-1])} turns it off" * off
    return ": put a prompt of several words in quotes after --text"


def _parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Return the values of `words` by name, each checked alone. Raises UserError: when a word or value is refused."""
    if len(words) > MAX_WORDS:
        raise UserError(f"{len(words)} words were typed, of at most {MAX_WORDS}")
    _check_words(parser, words)
    namespace, rest = parser.parse_known_args(words)
    if rest:
        raise UserError(f"unexpected {rest[0]!r}{_why_unexpected(parser, words, rest[0])}")
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
    for _, field in settings():
        if field.name in typed:
            check_value(field, typed[field.name])
    return typed


def _parse_file(parser: argparse.ArgumentParser, name: str) -> dict[str, Any]:
    """Return the values of the words in the file `name`. Raises UserError: as `_parse_words`, naming the file."""
    words = read_arguments(name)
    try:
        if any(word.partition("=")[0] == "--file" for word in words):
            raise UserError("a file of arguments cannot name another one")
        return _parse_words(parser, words)
    except UserError as error:
        raise UserError(f"--file {name}: {error}") from error


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Return the typed values by name, including those of `--file`, with shortcuts expanded.

    Raises UserError: when a word or a value is refused.
    """
    parser = build_parser()
    starts = [i for i, word in enumerate(words) if word.partition("=")[0] == "--file"]
    typed: dict[str, Any] = {}
    # Piece by piece, so that no flag takes its value from another file, and later values win.
    for start, end in pairwise([0, *starts, len(words)]):
        piece = _parse_words(parser, words[start:end])
        if "file" in piece:
            typed |= _parse_file(parser, piece.pop("file"))
        typed |= piece
    for name in ("hf_key", "if_key", "clip_key"):
        if name in typed:
            typed[name] = typed_name(typed[name])
    if typed.get("O") and typed.get("O2"):
        print("dream-fast: note: -O2 has no effect with -O", file=sys.stderr)
    return expand_shortcuts(typed)


def _choose_device(typed: dict[str, Any]) -> str:
    """Return the device of the run. torch is imported only for `--device auto`."""
    device = typed.get("device", RunConfig().device)
    if device == "auto":
        from dream_fast.engine.runtime.device import find_gpu

        has_gpu, reason = find_gpu()
        if reason:
            print(f"dream-fast: note: the GPU is not used ({one_line(reason)})", file=sys.stderr)
        device = "cuda" if has_gpu else "cpu"
    return device


def _check_prompts(typed: dict[str, Any], *, required: bool) -> None:
    """Print notes and warnings about the prompts.

    Raises UserError: when there is no prompt, or none of its words are in the vocabulary of the guidance.
    """
    if "text" not in typed and required:
        raise UserError("no prompt: give one with --text, as in --text 'a hamburger'")
    for name in (*_PROMPTS, "negative"):
        for note in foreign_syntax(typed.get(name, "")):
            print(f"dream-fast: note: --{name}: {one_line(note)}", file=sys.stderr)
    if any(spec.closed_vocabulary for spec in chosen_guidances(typed)):
        texts = [typed[name] for name in _PROMPTS if name in typed]
        warnings = [warning for text in texts for warning in check_prompt(text, typed.get("negative", ""))]
        for warning in dict.fromkeys(warnings):
            print(f"dream-fast: warning: {one_line(warning)}", file=sys.stderr)


def _make_config(typed: dict[str, Any], print_only: bool) -> Config:
    """Return the configuration of the run: a preset or a stored run, overridden by the typed settings."""
    folder = typed.get("workspace", RunConfig().workspace)
    if typed.get("test"):
        return _make_test_config(typed, folder)
    check_typed(typed)
    _check_prompts(typed, required=not print_only)
    device = _choose_device(typed)
    if typed.get("dmtet") and "init_with" in typed:
        from dream_fast.engine.training.dmtet_init import inherited_settings

        typed = {**inherited_settings(typed["init_with"], folder, fresh=typed.get("ckpt") == "scratch"), **typed}
    config = configure(typed, device)
    if typed.get("fp16") and device == "cpu":
        print("dream-fast: note: no GPU in use, so this runs on the CPU", file=sys.stderr)
    if print_only or config.run.ckpt == "scratch":
        return config

    from dream_fast.engine.workspace.folder import Workspace
    from dream_fast.engine.workspace.stored_run import override_stored

    stored = Workspace(expand_user(folder)).stored_run()
    if stored is None or stored.is_of_this_version:
        return config
    return override_stored(stored.config, typed, folder, device)  # another version had other defaults


def _make_test_config(typed: dict[str, Any], folder: str) -> Config:
    """Return the configuration of `--test`: that of the run in `folder`, overridden by the typed settings."""
    from dream_fast.engine.workspace.folder import Workspace
    from dream_fast.engine.workspace.stored_run import override_stored

    stored = Workspace(expand_user(folder)).stored_config()
    if stored is None:
        raise UserError(f"--test needs a stored run, but --workspace {folder} holds none")
    return override_stored(stored, typed, folder, _choose_device(typed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on `argv` (default: the arguments of the process) and return its exit status."""
    with safe_output():
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        except UserError as error:
            print(f"dream-fast: error: {one_line(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as signal:
            print("dream-fast: interrupted", file=sys.stderr)
            return getattr(signal, "status", 130)


def _main(words: Sequence[str]) -> int:
    typed = parse(words)
    typed.pop("cuda_ray", None)
    print_only = typed.pop("print_config", False)
    if typed.pop("doctor", False):
        from dream_fast.bench.doctor import doctor

        return doctor.main()
    config = _make_config(typed, print_only)
    if print_only:
        print(json.dumps(config.to_dict(), indent=2), flush=True)
        error = getattr(sys.stdout, "error", None)
        if error is not None and not isinstance(error, BrokenPipeError):
            raise UserError(f"--print_config: cannot write to standard output ({first_line(error)})")
        return 0
    from dream_fast.engine.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
