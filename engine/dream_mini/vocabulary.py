"""The words that the embedded model knows, read from `vocabulary.json` beside its weights."""

import json
import re
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path

from dream_fast.engine.dream_mini.catalogue import VIEWS, Thing
from dream_fast.engine.errors import UserError

FILE = "vocabulary.json"
MOST_NAMED = 10  # unknown words, in warnings
# A word is taken for a known one that is so like it (share of letters in common, in order), of no fewer letters, with
# the same first letter, and neither the beginning of the other: "beard" is no bear.
ALIKE, LETTERS = 0.83, 5
IRREGULAR = {"mice": "mouse", "leaves": "leaf"}


class Vocabulary:
    """Things, colours and other words of one model.

    Raises KeyError or ValueError: the file lacks something.
    """

    def __init__(self, content: dict):
        self.things = {
            name: Thing(tuple(thing["synonyms"]), tuple(thing["natural"]) if thing["natural"] else None, thing["face"])
            for name, thing in content["things"].items()
        }
        self.colors = {name: tuple(rgb) for name, rgb in content["colors"].items()}
        self.shades = {name: tuple(rgb) for name, rgb in content["shades"].items()}
        self.color_synonyms = dict(content["color_synonyms"])
        self.attributes, self.parts = tuple(content["attributes"]), tuple(content["parts"])
        self.relations = {name: tuple(phrases) for name, phrases in content["relations"].items()}
        self.filler = frozenset(content["filler"])
        self.names = {name: name for name in self.things}
        self.names |= {s: name for name, thing in self.things.items() for s in thing.synonyms}

    @cached_property
    def words(self) -> list[str]:
        """All words that a caption can hold, sorted: the tokenizer's vocabulary."""
        phrases = [*self.names, *self.colors, *self.color_synonyms, *self.attributes, *self.parts, *self.filler]
        phrases += [phrase for phrases in self.relations.values() for phrase in phrases]
        return sorted({word for phrase in phrases for word in phrase.split()})

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.words)

    def read(self, word: str) -> str | None:
        """The known word that a word in lower case is, is the plural of, or nearly is; None where there is none."""
        if word in self._known:
            return word
        if word in IRREGULAR and IRREGULAR[word] in self._known:
            return IRREGULAR[word]
        for ending, singular in (("ies", "y"), ("es", ""), ("s", "")):
            if word.endswith(ending) and word.removesuffix(ending) + singular in self._known:
                return word.removesuffix(ending) + singular
        return self._nearest(word)

    def _nearest(self, word: str) -> str | None:
        if len(word) < LETTERS:
            return None
        best, most = None, ALIKE
        for known in self.words:
            if len(known) < LETTERS or known[0] != word[0] or known.startswith(word) or word.startswith(known):
                continue
            if 2 * min(len(word), len(known)) <= most * (len(word) + len(known)):
                continue  # too different in length; a comparison letter by letter would be slow for long words
            alike = SequenceMatcher(None, word, known, autojunk=False).ratio()
            if alike > most:
                best, most = known, alike
        return best

    def known_words(self, text: str) -> str:
        """The words of a prompt as the model reads them: in lower case, without punctuation and unknown words."""
        return " ".join(known for word in _split(text) if (known := self.read(word)))

    def find_object(self, text: str) -> str | None:
        """The first known object that a prompt names (by its own name), or None. A part that is worn is no object."""
        plain = f" {' '.join(self.read(word) or word for word in _split(text))} "
        plain = re.sub(rf" (?:with|wearing) (?:\w+ ){{0,3}}(?:{'|'.join(self.parts)})(?= )", "", plain)
        longest_first = sorted(self.names, key=len, reverse=True)
        found = [(plain.find(f" {name} "), name) for name in longest_first if f" {name} " in plain]
        return self.names[min(found, key=lambda place: place[0])[1]] if found else None

    def check_prompt(self, text: str, negative: str = "") -> list[str]:
        """Check a prompt; returns warnings about words, also of ``negative``, that are ignored or read as others.

        Raises UserError when the prompt names no object that the model knows.
        """
        if self.find_object(text) is None:
            shown = " ".join(text.split())[:80]
            raise UserError(
                f'the embedded model does not know what "{shown}" is; it knows {", ".join(self.things)}; '
                "for anything else use Stable Diffusion: --sd_version 2.1, or --hf_key FOLDER_OR_HUB_NAME"
            )
        unread = [word for word in dict.fromkeys(_split(f"{text} {negative}")) if word not in self._known]
        warnings, ignored = [], 0
        for word in unread:
            known = self.read(word)
            if known is None and (ignored := ignored + 1) <= MOST_NAMED:
                warnings.append(f'the embedded model does not know the word "{word}" and will ignore it')
            if known is not None and known not in _singulars(word):
                warnings.append(f'the embedded model does not know the word "{word}" and reads "{known}"')
        if ignored > MOST_NAMED:
            warnings.append(f"nor does it know {ignored - MOST_NAMED} other words")
        return warnings


def _singulars(word: str) -> tuple[str, ...]:
    return (IRREGULAR.get(word, ""), word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y")


def _split(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary beside the weights in a model folder."""
    return Vocabulary(json.loads((folder / FILE).read_text(encoding="utf-8")))


EMBEDDED = read_vocabulary(Path(__file__).parent / "weights")
THINGS, COLORS, SHADES, ATTRIBUTES = EMBEDDED.things, EMBEDDED.colors, EMBEDDED.shades, EMBEDDED.attributes
COLOR_SYNONYMS, FILLER = EMBEDDED.color_synonyms, EMBEDDED.filler
find_object, known_words, check_prompt = EMBEDDED.find_object, EMBEDDED.known_words, EMBEDDED.check_prompt


def words() -> list[str]:
    """All words that the embedded model knows, sorted."""
    return EMBEDDED.words


__all__ = [
    "ATTRIBUTES", "COLORS", "COLOR_SYNONYMS", "EMBEDDED", "FILLER", "SHADES", "THINGS", "VIEWS", "Vocabulary",
    "check_prompt", "find_object", "known_words", "read_vocabulary", "words",
]  # fmt: skip
