"""Corrections of mistyped words. Imports nothing heavy."""

from collections.abc import Mapping

# One slip is allowed for so many letters of a word, at most MAX_SLIPS.
LETTERS_A_SLIP = 4
MAX_SLIPS = 2


def nearest(word: str, choices: Mapping[str, str]) -> str | None:
    """Return the value of the key nearest in spelling to `word`, or None where no single key is near."""
    allowed = min(MAX_SLIPS, len(word) // LETTERS_A_SLIP)
    distances = {key: slips(word, key) for key in choices if abs(len(key) - len(word)) <= allowed}
    least = min(distances.values(), default=allowed + 1)
    near = [choices[key] for key, distance in distances.items() if distance == least]
    return near[0] if least <= allowed and len(near) == 1 else None


def slips(a: str, b: str) -> int:
    """Count the letters to insert, remove, replace, or swap with a neighbour to turn `a` into `b` (optimal string
    alignment distance)."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]
