"""Text for a terminal: control characters escaped, lines joined, words quoted for a shell."""

import re
import shlex
import unicodedata

# Invisible characters of visible categories: fillers, variation selectors, and codes reserved for more of them.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
# Characters of invisible categories that are shown: signs of numbers.
_VISIBLE = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"
# Joiners and variation selectors, which change the character before them: an emoji, or a letter of some scripts.
_JOINERS, _SELECTORS = "\u200c\u200d", "".join(map(chr, range(0xFE00, 0xFE10)))


def quote(word: str) -> str:
    """Return `word` quoted for a shell."""
    if not any(_hidden(word, index) for index in range(len(word))):
        return shlex.quote(word)
    return "$'" + escape_controls(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def escape_controls(text: str) -> str:
    """Return `text` with control and invisible characters as escapes: \\x1b, \\u202e, \\u200b."""
    return "".join(_escaped(letter) if _hidden(text, index) else letter for index, letter in enumerate(text))


def one_line(text: str, most: int = 1000) -> str:
    """Return `text` escaped, cut in the middle to about `most` characters, for a terminal and a log."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... ({len(text) - most} characters) ... {text[-most // 2 :]}"
    return escape_controls(text)


def _hidden(text: str, index: int) -> bool:
    """True for a character that is not seen where it stands."""
    character = text[index]
    if " " <= character <= "~":
        return False
    if character in _JOINERS:
        before = index - 2 if text[index - 1 : index] in tuple(_SELECTORS) else index - 1
        return not (_is_joined(text, before) and _is_joined(text, index + 1))
    if character in _SELECTORS:
        return not (_is_joined(text, index - 1) or text[index + 1 : index + 2] == "\u20e3")
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character not in _VISIBLE
    return _INVISIBLE.match(character) is not None


def _is_joined(text: str, index: int) -> bool:
    """True for a letter or sign that joiners and variation selectors act on."""
    if not 0 <= index < len(text) or text[index] < "\u00a9" or text[index] in _SELECTORS:
        return False
    return unicodedata.category(text[index]) in ("Lo", "Mn", "Mc", "So", "Sk", "Sm")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of the command line that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
