"""Similar words, paths in the home folder, and names of other programs' flags."""

import re
from itertools import product
from pathlib import Path

import pytest

from dream_fast.engine.config.other_programs import plain_name
from dream_fast.engine.config.spelling import nearest, slips
from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.paths import expand_user

WORDS = ["".join(letters) for length in range(4) for letters in product("abc", repeat=length)]


def one_slip(word: str) -> set[str]:
    """All words that are one slip away from `word`."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    shorter = {left + right[1:] for left, right in cuts if right}
    swapped = {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    replaced = {left + letter + right[1:] for left, right in cuts if right for letter in "abc"}
    longer = {left + letter + right for left, right in cuts for letter in "abc"}
    return (shorter | swapped | replaced | longer) - {word}


def test_slips_short_words():
    """Two words have a distance of one exactly if one slip makes one of the other."""
    for word in WORDS:
        near = one_slip(word)
        for other in WORDS:
            assert (slips(word, other) == 1) == (other in near), (word, other)
            assert (slips(word, other) == 0) == (other == word)


@pytest.mark.parametrize(
    ("a", "b", "count"),
    [
        ("", "", 0),
        ("abcd", "", 4),
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("flaw", "lawn", 2),
        ("abcd", "badc", 2),  # two swaps
        ("abcdef", "abdcfe", 2),
        ("ca", "abc", 3),  # no letter is touched again after a swap
        ("aabb", "bbaa", 3),
        ("xyabcd", "xyacbd", 1),
    ],
)
def test_slips_of_known_pairs(a, b, count):
    """Pairs from the literature, in both directions."""
    assert slips(a, b) == slips(b, a) == count


@pytest.mark.parametrize(
    ("word", "choices", "meant"),
    [
        ("abc", ["abc"], "abc"),  # three letters may hold no slip
        ("abc", ["abx", "abcd"], None),
        ("abcd", ["abcx"], "abcx"),  # four may hold one
        ("abcd", ["abxy"], None),
        ("abcd", ["abcde"], "abcde"),
        ("abcd", ["abc"], "abc"),
        ("abcdefg", ["abcdexy"], None),
        ("abcdefgh", ["abcdefxy"], "abcdefxy"),  # eight may hold two
        ("abcdefgh", ["abcdef"], "abcdef"),
        ("abcdefgh", ["abcdefghij"], "abcdefghij"),
        ("abcdefghijkl", ["abcdefghijkl", "abcdefghijkx"], "abcdefghijkl"),
        ("abcdefghijklmnop", ["abcdefghijklmxyz"], None),  # and no word more
        ("abcd", ["abcx", "abcy"], None),
        ("abcd", [], None),
    ],
)
def test_nearest_single_choice(word, choices, meant):
    """A slip per four letters is allowed, at most two, and only a single nearest choice."""
    assert nearest(word, {choice: f"--{choice}" for choice in choices}) == (meant and f"--{meant}")


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--CFG-scale", "cfg_scale"),
        ("-O", "O"),
        ("-o", "o"),
        ("-GO", "go"),
        ("\u2014Text", "text"),
        ("\u2013\u2212-A-B-", "a_b_"),
        ("X-name-X", "x_name_x"),
        ("--", ""),
    ],
)
def test_plain_name_of_a_flag(flag, name):
    """Leading dashes of any kind are removed, and names of several letters become lower case."""
    assert plain_name(flag) == name


def test_expand_user_home(monkeypatch, tmp_path):
    """~ is the home folder of the user, other paths stay, and an unknown user is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/runs") == expand_user(Path("~/runs")) == tmp_path / "runs"
    assert expand_user("runs/~") == Path("runs/~")
    with pytest.raises(UserError, match=re.escape("~nobody_knows/runs: there is no home folder")):
        expand_user("~nobody_knows/runs")
