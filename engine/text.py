"""Text for a terminal: control characters escaped, lines joined, words quoted for a shell."""

import re
import shlex
import unicodedata

# Invisible characters of visible categories: fillers and variation selectors.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U000e0100-\U000e01ef]")
# Characters of invisible categories that are shown: joiners of emoji and Persian, and signs of numbers.
_VISIBLE = "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"


def quote(word: str) -> str:
    """Return `word` quoted for a shell."""
    if not any(map(_hidden, word)):
        return shlex.quote(word)
    return "$'" + escape_controls(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def escape_controls(text: str) -> str:
    """Return `text` with control and invisible characters as escapes: \\x1b, \\u202e, \\u200b."""
    return "".join(_escaped(character) if _hidden(character) else character for character in text)


def one_line(text: str, most: int = 1000) -> str:
    """Return `text` escaped, cut in the middle to about `most` characters, for a terminal and a log."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... ({len(text) - most} characters) ... {text[-most // 2 :]}"
    return escape_controls(text)


def _hidden(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character not in _VISIBLE
    return _INVISIBLE.match(character) is not None


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of the command line that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
