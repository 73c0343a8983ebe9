"""The English word lists behind the guards and the features: closed sets that change slowly, written by hand.
They are in `data/english.txt`, as words are written; `stem` brings those and a text's to one form."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

__all__ = [
    "ANTONYMS",
    "AUXILIARIES",
    "CLASSES",
    "COMPARING",
    "ENGLISH_MARKS",
    "HOLLOW_NEGATIONS",
    "IMPLICIT_NEGATIONS",
    "LIMITERS",
    "NEGATORS",
    "NOT_PREFIXED",
    "NUMBER_WORDS",
    "PHRASAL",
    "PREFIXES",
    "QUESTION_WORDS",
    "STOP",
    "SYMMETRIC",
    "TITLES",
    "UNITS",
    "stem",
]


def _sections() -> dict[str, list[str]]:
    """The lines of each section of the file."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (files(__package__) / "data" / "english.txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


_LINES = _sections()


def _set(name: str) -> frozenset[str]:
    return frozenset(" ".join(_LINES[name]).split())


def _map(name: str) -> dict[str, str]:
    """Each word of a section with colons, and what stands before it."""
    rows = (line.partition(": ") for line in _LINES[name])
    return {word: head for head, _, words in rows for word in words.split()}


_IRREGULAR = _map("irregular")


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """``word`` (lower case) without its inflection: plural, -ed, -ing. Light on purpose: -er, -ly, un-
    stay."""
    known = _IRREGULAR.get(word)
    if known or len(word) < 4 or not word.isascii():
        return known or word
    if word.endswith("ies"):
        return word[:-3] + "y" if len(word) > 4 else word[:-1]
    if word.endswith("ing") and len(word) > 5:
        return _bare(word[:-3])
    if word.endswith("ed") and len(word) > 4:
        return _bare(word[:-2])
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return _bare(word[:-1])
    return _bare(word)


def _bare(word: str) -> str:
    """One form for make/making, plan/planned: no final e, no doubled final consonant."""
    if len(word) > 3 and word[-1] == "e":
        return word[:-1]
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "lsz":
        return word[:-1]
    return word


def _stems(name: str) -> frozenset[str]:
    words = _set(name)
    return words | frozenset(map(stem, words))


def _antonyms() -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for line in _LINES["antonyms"]:
        left, _, rights = line.partition(": ")
        for right in rights.split():
            for one, other in ((stem(left), stem(right)), (stem(right), stem(left))):
                found[one] = found.get(one, frozenset()) | {other}
    return found


def _units() -> dict[str, tuple[str, float]]:
    """word: (what it measures, how many of the base unit)"""
    rows = ((word, head.split()) for word, head in _map("units").items())
    return {stem(word): (kind, float(size)) for word, (kind, size) in rows}


ANTONYMS = _antonyms()
CLASSES = {stem(word): kind for word, kind in _map("classes").items()}
"""Words of which each stands for another thing: two of one class conflict."""
PHRASAL = {
    (stem(verb), particle): word
    for pair, word in _map("phrasal").items()
    for verb, particle in [pair.split("-")]
}
"""(verb, particle): the one word for what they mean together."""
UNITS = _units()
NUMBER_WORDS = {word: float(value) for word, value in _map("number_words").items()}
QUESTION_WORDS = {form: kind for word, kind in _map("question_words").items() for form in (word, stem(word))}

STOP, NEGATORS, ENGLISH_MARKS = _set("stop"), _set("negators"), _set("english_marks")
PREFIXES = tuple(_LINES["prefixes"][0].split())
AUXILIARIES, LIMITERS, TITLES = _stems("auxiliaries"), _stems("limiters"), _stems("titles")
NOT_PREFIXED = _stems("not_prefixed")
"""What is left when such letters are cut off is another word, not the opposite."""
HOLLOW_NEGATIONS = _stems("hollow_negations")
"""Denied, these change nothing: "I do not know how" asks what "how" asks."""
IMPLICIT_NEGATIONS = _stems("implicit_negations")
"""Words that deny without a "not"; beside one, a "not" on the other side says nothing."""
SYMMETRIC, COMPARING = _stems("symmetric"), _stems("comparing")
"""Order around these says nothing."""
