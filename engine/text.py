"""Text for a terminal: control characters escaped, lines joined, words quoted for a shell."""

import re
import shlex
import unicodedata

# Characters that show nothing and belong to no category that says so: fillers, and the marks of variants of letters.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U000e0100-\U000e01ef]")
# Of the category of invisible ones: joiners, which emoji and Persian are written with, and signs that are seen.
_SEEN = "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"


def quote(word: str) -> str:
    """``word`` as a shell reads it back."""
    if not any(map(_hidden, word)):
        return shlex.quote(word)
    return "$'" + escape_controls(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def escape_controls(text: str) -> str:
    """``text`` with the characters that steer a terminal or that nobody sees as escapes: \\x1b, \\u202e, \\u200b."""
    return "".join(_escaped(character) if _hidden(character) else character for character in text)


def one_line(text: str, most: int = 1000) -> str:
    """`visible` text of at most about ``most`` characters, its middle left out: for a terminal and a log."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... ({len(text) - most} characters) ... {text[-most // 2 :]}"
    return escape_controls(text)


def _hidden(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character not in _SEEN
    return _INVISIBLE.match(character) is not None


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of the command line that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
