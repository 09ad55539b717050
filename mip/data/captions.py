"""Names in captions: whole words, in any case, singular or plural."""

import re
from collections.abc import Sequence
from functools import lru_cache

_IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "tooth": "teeth",
    "woman": "women",
}
_WORD = re.compile(r"[\w-]+")  # a hyphenated word is one: "cat-like" does not name a cat
_SILENT_H = ("hour", "honest", "heir")
_SPOKEN_AS_CONSONANT = ("uni", "use", "euro", "one")


def is_same(name: str, other: str) -> bool:
    """True for names that differ only in case, spaces and the number of the last word: "Robot Toys", "robot toy"."""
    return _are_same(_words(name), _words(other))


def names(caption: str, label: str) -> bool:
    """True where the caption says the label as whole words."""
    said, wanted = _words(caption), _words(label)
    width = len(wanted)
    return width > 0 and any(_are_same(said[i : i + width], wanted) for i in range(len(said) - width + 1))


def compose(labels: Sequence[str]) -> str:
    """A caption of labels alone: "a cup, an apple and a star"."""
    nouns = [f"{_article(label)} {label}" for label in labels]
    return nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} and {nouns[-1]}"


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _are_same(one: Sequence[str], other: Sequence[str]) -> bool:
    if one == other:
        return bool(one)
    if len(one) != len(other) or one[:-1] != other[:-1]:
        return False
    return one[-1] in _plurals(other[-1]) or other[-1] in _plurals(one[-1])


@lru_cache(maxsize=4096)
def _plurals(word: str) -> frozenset[str]:
    """Spellings that a plural may have. Too many do no harm: they are only compared with words that somebody wrote."""
    found = {word + "s", word + "es", _IRREGULAR.get(word, word + "s")}
    if word.endswith("y"):
        found.add(word[:-1] + "ies")
    if word.endswith("f"):
        found.add(word[:-1] + "ves")
    if word.endswith("fe"):
        found.add(word[:-2] + "ves")
    return frozenset(found)


def _article(label: str) -> str:
    word = label.casefold()
    has_vowel = word.startswith(_SILENT_H) or (word[:1] in "aeiou" and not word.startswith(_SPOKEN_AS_CONSONANT))
    return "an" if word and has_vowel else "a"
