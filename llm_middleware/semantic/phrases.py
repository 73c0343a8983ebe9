"""A text read once into what the guards and the features compare: words, numbers with units, names,
negations."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .words import (
    ANTONYMS,
    ENGLISH_MARKS,
    HOLLOW_NEGATIONS,
    NEGATORS,
    NUMBER_WORDS,
    PHRASAL,
    STOP,
    TITLES,
    UNITS,
    stem,
)

__all__ = ["Phrase", "phrase_of"]

_TOKEN = re.compile(
    r"(?i:c\+\+|[cf]\#)|[vV]\d+(?:\.\d+)+[^\W_]*|\d+(?:[.,]\d+)*[^\W_]*"
    r"|[^\W_]+(?:['\u2019][^\W_]+)*|[%$€£¥*+/=^<>.,;:!?()&-]"
)
# What people type for an apostrophe: before NFKC, which makes a space and an accent of the first.
_APOSTROPHE = re.compile(r"(?<=[^\W\d_])\u00b4(?=[^\W\d_])|(?<=[nN])`(?=[tT]\b)")
_NUMBER = re.compile(r"(\d+(?:[.,]\d+)*)([^\W\d_]*)$")
_VERSION = re.compile(r"\d+(?:\.\d+){2,}")
_THOUSANDS = re.compile(r"\d{1,3}(?:\.\d{3}){2,}")
_QUOTED = re.compile(r"```(.+?)```|`([^`]+)`|\"([^\"]+)\"|“([^”]+)”|«([^»]+)»", re.DOTALL)
_MARKS = frozenset("%$€£¥*+/=^<>.,;:!?()&-")
_ENDS = frozenset(".,;:!?()")
_OPERATORS = frozenset("*+/=^<>-")
_MONEY = frozenset("$€£¥")
_SCALES = {"k": 1e3, "m": 1e6, "bn": 1e9}
_ORDINALS = frozenset(("st", "nd", "rd", "th"))
_REPLIES = frozenset(("no", "nope"))
_AFTER_REPLY = frozenset(",.!")
_BREAKS = frozenset(("but", "and", "or", "because", "if", "when", "while"))
_VERBS = frozenset(verb for verb, _ in PHRASAL)
_PARTICLES = frozenset(particle for _, particle in PHRASAL)
_OBJECT = 3  # words at most between a verb and its particle
_REACH = 2  # content words after a negator that it is taken to negate


@dataclass(frozen=True, slots=True)
class Phrase:
    """A text, read once: what the guards and the features compare."""

    text: str
    tokens: tuple[str, ...]
    """Stems of all words and numbers, in order."""
    content: tuple[str, ...]
    """Those that are not stop words."""
    bag: frozenset[str]
    numbers: tuple[tuple[float, str, float], ...]
    """(value, what its unit measures or "", how many base units that is)"""
    operators: str
    ids: frozenset[str]
    names: frozenset[str]
    quoted: frozenset[str]
    negated: frozenset[str]
    governed: frozenset[str]
    """All that a word which denies may belong to: what follows it in its clause, `negated` among it."""
    negators: int
    """How many words deny, "do not know" and its like left out."""
    denials: int
    """How many words deny."""
    english: bool


@lru_cache(maxsize=4096)
def phrase_of(text: str) -> Phrase:
    """``text``, read. The last few thousand are kept."""
    return _Reader(unicodedata.normalize("NFKC", _APOSTROPHE.sub("'", text))).phrase(text)


def _joined(tokens: list[str]) -> list[str]:
    """``tokens`` with one word for a verb and its particle: "turn off", and "turn it off" where nothing of
    the clause follows, so that "turn the page on my site" stays."""
    words = [token.lower() for token in tokens]
    if _PARTICLES.isdisjoint(words):
        return tokens
    joined, gone = list(tokens), set()
    for at, word in enumerate(words):
        verb = stem(word)
        if verb not in _VERBS:
            continue
        for place in range(at + 1, min(at + 2 + _OBJECT, len(words))):
            if words[place] in _ENDS:
                break
            meant = PHRASAL.get((verb, words[place]))
            ends = place + 1 == len(words) or words[place + 1] in _ENDS
            if meant is not None and (place == at + 1 or ends):
                joined[at] = meant
                gone.add(place)
                break
    return [token for at, token in enumerate(joined) if at not in gone]


class _Reader:
    def __init__(self, text: str) -> None:
        self._raw = _joined(_TOKEN.findall(text))
        self._quoted = _quoted(text)
        self.tokens: list[str] = []
        self.numbers: list[tuple[float, str, float]] = []
        self.operators: list[str] = []
        self.ids: set[str] = set()
        self.names: set[str] = set()
        self.negated: set[str] = set()
        self.governed: set[str] = set()
        self.negators = 0
        self._denials = 0
        self._titled = False
        self._reach = 0
        self._denying = False
        self._first = True
        self._content: list[str] = []

    def phrase(self, text: str) -> Phrase:
        raw = self._raw
        for at, token in enumerate(raw):
            if token in _MARKS:
                self._mark(token, at)
            elif token[0].isdigit() or "." in token:
                self._number(token.lstrip("vV"), at)
            elif not (self._first and self._says_no(at)):
                self._word(token)
        words = [token for token in raw if token[0].isalpha()]
        shouting = self._titled or (
            len(self._content) > 4 and len(self.names) >= 0.9 * (len(self._content) - 1)
        )
        return Phrase(
            text,
            tuple(self.tokens),
            tuple(self._content),
            frozenset(self._content),
            tuple(self.numbers),
            "".join(self.operators),
            frozenset(self.ids),
            frozenset() if shouting else frozenset(self.names),
            self._quoted,
            frozenset(self.negated),
            frozenset(self.governed),
            self.negators,
            self._denials,
            _looks_english(words),
        )

    def _mark(self, token: str, at: int) -> None:
        if token in _ENDS:
            self._end_clause()
            self._first = self._first or token in ".!?:"
        elif token in _OPERATORS and self._between_values(at):
            self.operators.append(token)

    def _between_values(self, at: int) -> bool:
        raw = self._raw
        return 0 < at < len(raw) - 1 and raw[at - 1][0].isdigit() and raw[at + 1][0].isdigit()

    def _says_no(self, at: int) -> bool:
        """Whether the word is a "No," that answers: it denies nothing of what follows."""
        raw = self._raw
        return raw[at].lower() in _REPLIES and at + 1 < len(raw) and raw[at + 1] in _AFTER_REPLY

    def _end_clause(self) -> None:
        self._reach, self._denying = 0, False

    def _number(self, token: str, at: int) -> None:
        match = _NUMBER.match(token)
        digits, tail = (match[1], match[2].lower()) if match else ("", "?")
        if _is_version(digits):
            tail = tail or "?"
        raw = self._raw
        if not tail:
            follows = raw[at + 1].lower() if at + 1 < len(raw) else ""
            if follows == "-" and at + 2 < len(raw):
                follows = raw[at + 2].lower()
            tail = stem(follows) if stem(follows) in UNITS and follows not in ("in",) else ""
        if at and raw[at - 1] in _MONEY:
            tail, scale = raw[at - 1], _SCALES.get(tail, 1.0)
        else:
            scale = 1.0
        if tail in _SCALES and tail not in UNITS:
            tail, scale = "", _SCALES[tail]
        unit = UNITS.get(stem(tail))
        if tail and not unit and tail not in _ORDINALS:
            self.ids.add(token.lower())
            self._keep(token.lower(), True)
            return
        kind, size = unit or ("", 1.0)
        value = _value(digits) * scale
        self.numbers.append((value, kind, size))
        self._keep(f"{value:g}", True)

    def _word(self, token: str) -> None:
        lower = token.lower().replace("\u2019", "'")
        first, self._first = self._first, False
        if lower.endswith("n't"):
            self._negator(lower.replace("'", ""))
            return
        lower = lower.removesuffix("'s").replace("'", "")
        if lower in NEGATORS:
            if lower == "not" and self._asks_whether():
                self.tokens.append(lower)
            else:
                self._negator(lower)
            return
        value = NUMBER_WORDS.get(lower)
        if value is not None:
            self.numbers.append((value, "", 1.0))
            self._keep(f"{value:g}", True)
            return
        if any(map(str.isdigit, lower)):
            self.ids.add(lower)
        if lower in _BREAKS:
            self._end_clause()
        is_content = lower not in STOP
        word = stem(lower)
        if token[0].isupper() and not first:
            if not is_content:
                self._titled |= len(token) > 1 and token.istitle()  # "How Do I ...": capitals say nothing
            elif word not in UNITS and word not in TITLES:
                self.names.add(word)
        self._keep(word, is_content)

    def _negator(self, word: str) -> None:
        self.negators += 1
        self._denials += 1
        self._reach, self._denying = _REACH, True
        self.tokens.append(word)

    def _asks_whether(self) -> bool:
        """Whether what was read ends in "or" or "or why", so that "not" only says that both may be."""
        return self.tokens[-1:] == ["or"] or self.tokens[-2:] == ["or", "why"]

    def _keep(self, word: str, is_content: bool) -> None:
        self.tokens.append(word)
        if is_content:
            if self._denying:
                self._negate(word)
            self._content.append(word)
        elif self._reach == _REACH and word in HOLLOW_NEGATIONS:
            self._take_back()

    def _negate(self, word: str) -> None:
        if self._reach == _REACH and word in HOLLOW_NEGATIONS:
            self._take_back()
            return
        self.governed.add(word)
        if self._reach:
            self.negated.add(word)
            self._reach -= 1

    def _take_back(self) -> None:
        self.negators -= 1
        self._end_clause()


def _is_version(digits: str) -> bool:
    """Whether ``digits`` number something with several levels (``2.10.0``, ``192.168.0.1``) and are no
    amount."""
    return bool(_VERSION.fullmatch(digits)) and not _THOUSANDS.fullmatch(digits)


def _value(digits: str) -> float:
    """``1,000`` and ``1.5`` as numbers; what is neither (``1.000.000``) by its digits alone."""
    plain = digits.replace(",", "") if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits) else digits
    try:
        return float(plain.replace(",", "."))
    except ValueError:
        return float(re.sub(r"\D", "", digits))


def _quoted(text: str) -> frozenset[str]:
    if not any(mark in text for mark in '`"“«'):
        return frozenset()
    found: Iterable[tuple[str, ...]] = _QUOTED.findall(text)
    return frozenset(" ".join("".join(groups).split()).lower().strip(" .,;:!?") for groups in found)


def _looks_english(words: list[str]) -> bool:
    if not words:
        return False
    if not all(map(str.isascii, words)) and sum(map(str.isascii, words)) < 0.8 * len(words):
        return False
    lower = [word.lower() for word in words]
    # Commands have few small words: "increase font size vscode".
    return len(words) < 4 or any(word in ENGLISH_MARKS or stem(word) in ANTONYMS for word in lower)
