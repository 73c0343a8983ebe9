"""Guards: what makes two questions differ however close their vectors are. Pure functions of two texts.

Only a *conflict* vetoes: both sides say something, and not the same (another number, unit, name, date,
quoted text; a word negated here and not there; one word and its opposite; two words that changed places).
What one side merely lacks is evidence for `features`. Numbers, identifiers, dates in digits, operators,
quotes and code are compared in every script; the rest knows English and is off for texts that do not look
English.
"""

from __future__ import annotations

from collections.abc import Iterator

from .phrases import Phrase, phrase_of
from .words import (
    ANTONYMS,
    AUXILIARIES,
    CLASSES,
    COMPARING,
    IMPLICIT_NEGATIONS,
    NEGATORS,
    NOT_PREFIXED,
    PREFIXES,
    SYMMETRIC,
)

__all__ = ["conflict", "conflict_of"]

# How much of their content words two texts share, before one difference between them tells anything: two
# wordings of one thing differ in many words, a trap in one.
_RELATED, _SAME, _EQUAL = 0.5, 2 / 3, 0.85
_NONE: frozenset[str] = frozenset()
_ARTICLES = frozenset(("a", "an", "the", "my", "your", "his", "her", "their", "our", "its"))
_IDLE = frozenset(["is", "are", "was", "were", "be", "been", "and", "or", "vs", "versus", "nor", "but"])


def conflict_of(stored: str, asked: str) -> str | None:
    """Why an answer to ``stored`` must not be given to ``asked``, as ``rule:theirs!=ours``; ``None``: no
    guard minds."""
    return conflict(phrase_of(stored), phrase_of(asked))


def conflict(a: Phrase, b: Phrase) -> str | None:
    """`conflict_of` two texts that were read already. The same whichever comes first, but for the reason's
    sides."""
    if (
        a.tokens == b.tokens
        and a.numbers == b.numbers
        and a.operators == b.operators
        and a.quoted == b.quoted
    ):
        return _layout(a.text, b.text)
    found = _numbers(a, b) or _strings(a, b)
    if found or not (a.english and b.english):
        return found
    return _polarity(a, b) or _classes(a, b) or _names(a, b) or _order(a, b)


# ---- every script


def _layout(a: str, b: str) -> str | None:
    """The same words on lines that are indented otherwise: code, or a list in a list. No embedder sees it."""
    ours, theirs = _indents(a), _indents(b)
    return f"layout:{ours}!={theirs}" if len(ours) == len(theirs) and ours != theirs else None


def _indents(text: str) -> list[int]:
    lines = [line for line in text.expandtabs(4).splitlines() if line.strip()]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    return [indent - min(indents) for indent in indents]


def _numbers(a: Phrase, b: Phrase) -> str | None:
    if a.numbers and b.numbers:
        found = _amounts(a.numbers, b.numbers)
        if found:
            return found
    if a.operators != b.operators and a.operators and b.operators:
        return f"operator:{a.operators}!={b.operators}"
    return None


def _amounts(a: tuple[tuple[float, str, float], ...], b: tuple[tuple[float, str, float], ...]) -> str | None:
    left, right = list(a), list(b)
    for one in a:
        for other in right:
            if _same_amount(one, other):
                left.remove(one)
                right.remove(other)
                break
    if not left or not right:
        return None
    one, other = left[0], right[0]
    rule = "unit" if one[0] == other[0] else "number"
    return f"{rule}:{_shown(one)}!={_shown(other)}"


def _same_amount(one: tuple[float, str, float], other: tuple[float, str, float]) -> bool:
    (value, kind, size), (value2, kind2, size2) = one, other
    if not kind or not kind2:
        return value == value2
    if kind != kind2:
        return False
    if kind in ("money", "temperature", "power"):  # their sizes only name them
        return value == value2 and size == size2
    return abs(value * size - value2 * size2) <= 1e-9 * abs(value * size)


def _shown(amount: tuple[float, str, float]) -> str:
    return f"{amount[0]:g}"


def _strings(a: Phrase, b: Phrase) -> str | None:
    return _apart("id", a.ids, b.ids) or _apart("quoted", a.quoted, b.quoted)


def _apart(rule: str, a: frozenset[str], b: frozenset[str]) -> str | None:
    """A conflict where each side has what the other lacks."""
    left, right = a - b, b - a
    return f"{rule}:{min(left)}!={min(right)}" if left and right else None


# ---- English


def _share(left: frozenset[str], right: frozenset[str], least: float) -> bool:
    """Whether at least ``least`` of the words of either are in both."""
    return len(left & right) >= least * len(left | right)


def _polarity(a: Phrase, b: Phrase) -> str | None:
    """Negations and opposites, which cancel out: "not enabled" says what "disabled" says."""
    left, right = frozenset(a.tokens) - frozenset(b.tokens), frozenset(b.tokens) - frozenset(a.tokens)
    if a.denials != b.denials and left | right <= (NEGATORS | AUXILIARIES):
        return "negation:parity"
    pairs = _opposites(left, right)
    kept = [pair for pair in pairs if (pair[0] in a.governed) == (pair[1] in b.governed)]
    if pairs and not kept:
        return None
    found = _negation(a, b) if _share(a.bag, b.bag, _SAME) else None
    if kept and not found:
        word, other = min(kept)
        if _share(a.bag - {word}, b.bag - {other}, _RELATED):
            return f"opposite:{word}!={other}"
    return found


def _negation(a: Phrase, b: Phrase) -> str | None:
    """Where one denies: a word of it that the other has and does not deny. Where both do: two words, each
    denied by one, neither being within what the other may deny."""
    if a.negators % 2 == b.negators % 2:
        if not (a.negated.isdisjoint(b.governed) and b.negated.isdisjoint(a.governed)):
            return None
        ours, theirs = a.negated & b.bag, b.negated & a.bag
        return f"negation:{min(ours)}!={min(theirs)}" if ours and theirs else None
    plain, other = (b, a) if a.negators % 2 else (a, b)
    if not IMPLICIT_NEGATIONS.isdisjoint(frozenset(plain.tokens) - frozenset(other.tokens)):
        return None
    turned = (a.negated & b.bag) - b.negated or (b.negated & a.bag) - a.negated
    return f"negation:{min(turned)}" if turned else None


def _opposites(left: frozenset[str], right: frozenset[str]) -> list[tuple[str, str]]:
    """Each word of ``left`` that has an opposite in ``right``, with that."""
    listed = [(word, other) for word in left for other in ANTONYMS.get(word, _NONE) & right]
    return [*listed, *_prefixed(left, right), *((word, base) for base, word in _prefixed(right, left))]


def _prefixed(left: frozenset[str], right: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Each word of ``left`` that ``right`` has with a prefix which denies, with that."""
    for word in right:
        if word.startswith(PREFIXES):
            for prefix in PREFIXES:
                base = word[len(prefix) :].lstrip("-")
                if word.startswith(prefix) and len(base) > 2 and base in left and base not in NOT_PREFIXED:
                    yield base, word


def _classes(a: Phrase, b: Phrase) -> str | None:
    left, right = a.bag - b.bag, b.bag - a.bag
    ours = {word: CLASSES[word] for word in left if word in CLASSES}
    if not ours:
        return None
    found = [(word, other) for other in right for word in ours if CLASSES.get(other) == ours[word]]
    if not found:
        return None
    word, other = min(found)
    return f"{ours[word].replace(' ', '-')}:{word}!={other}"


def _names(a: Phrase, b: Phrase) -> str | None:
    if not a.names or not b.names:
        return None
    left, right = _unknown(a, b), _unknown(b, a)
    if left and right and _share(a.bag - left, b.bag - right, _EQUAL):
        return f"name:{min(left)}!={min(right)}"
    return _one_name(a, b) if len(a.tokens) == len(b.tokens) else None


def _one_name(a: Phrase, b: Phrase) -> str | None:
    """A name in the place of another, all else being the same: however often either occurs."""
    differ = [pair for pair in zip(a.tokens, b.tokens, strict=True) if pair[0] != pair[1]]
    if len(differ) != 1 or differ[0][0] not in a.names or differ[0][1] not in b.names or _alike(*differ[0]):
        return None
    return f"name:{differ[0][0]}!={differ[0][1]}"


def _unknown(a: Phrase, b: Phrase) -> set[str]:
    """The names of ``a`` that ``b`` has in no form."""
    missing, new = a.names - b.bag, b.bag - a.bag
    return {
        name for name in missing if not (_spelt_out(name, b) or any(_alike(name, other) for other in new))
    }


def _spelt_out(name: str, other: Phrase) -> bool:
    """Whether ``name`` is the initials of words of ``other``, or the first letter of some."""
    if len(name) < 2 or len(name) > 5:
        return False
    initials = "".join(word[0] for word in other.content)
    return name in initials or name in "".join(word[0] for word in other.tokens)


def _alike(one: str, other: str) -> bool:
    """Whether one may be the other misspelt, shortened or inflected."""
    if sorted(one) == sorted(other):  # two letters changed places
        return True
    if one[0] != other[0] or abs(len(one) - len(other)) > 3:
        return False
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other)) > 2
    if len(one) < 5 or len(other) < 5:
        return False
    pairs = {one[at : at + 2] for at in range(len(one) - 1)}
    pairs2 = {other[at : at + 2] for at in range(len(other) - 1)}
    return len(pairs & pairs2) / min(len(pairs), len(pairs2)) >= 0.6


# A word's places: which of its occurrences, and what stands around it (see `_slots`).
_Slot = tuple[str, str, str, str]


def _order(a: Phrase, b: Phrase) -> str | None:
    # What took whose place is asked from one side: always the same one, so that the verdict is.
    found = _traded(a, b) if a.text <= b.text else _traded(b, a)[::-1]
    return f"order:{found[0]},{found[1]}" if found else None


def _traded(a: Phrase, b: Phrase) -> tuple[str, ...]:
    """Two words that changed places: each shared, in the other order, and standing where the other stood.
    Of two names it is enough that one does: a name that moved took another's part, where a word that moved
    is mostly the same thing said in another way."""
    shared = a.bag & b.bag
    if len(shared) < 2 or not _share(a.bag, b.bag, _SAME):
        return ()
    bags = a.bag, b.bag
    if len(a.tokens) == len(b.tokens) and sorted(a.tokens) == sorted(b.tokens):
        bags = frozenset(a.tokens), frozenset(b.tokens)  # the same words: each counts
    elif [word for word in a.content if word in shared] == [word for word in b.content if word in shared]:
        return ()
    if ("by" in a.tokens) != ("by" in b.tokens):  # active and passive
        return ()
    if any(not SYMMETRIC.isdisjoint(one.tokens) and not COMPARING.isdisjoint(one.tokens) for one in (a, b)):
        return ()
    slots, slots2 = _slots(a, bags[0]), _slots(b, bags[1])
    before = {word: at for at, word in enumerate(word for word in slots if word in slots2)}
    after = {word: at for at, word in enumerate(word for word in slots2 if word in slots)}
    names = a.names & b.names
    for one, other, taken, given in _exchanged(slots, slots2, before, after):
        named = one[0] in names and other[0] in names
        if (named or _mutual(taken, given, a.bag == b.bag)) and not _idle(a, b, one, other):
            return one[0], other[0]
    return ()


_Word = tuple[str, int]  # and which of its occurrences


def _exchanged(
    slots: dict[_Word, _Slot], slots2: dict[_Word, _Slot], before: dict[_Word, int], after: dict[_Word, int]
) -> Iterator[tuple[_Word, _Word, int, int]]:
    """Two words in the other order, how surely the first stands where the second stood (see `_took`), and
    the second where the first stood."""
    words = list(before)
    for at, one in enumerate(words):
        for other in words[at + 1 :]:
            if after[one] > after[other] and one[0] != other[0]:
                taken = _took(slots[one], slots2[other], slots2[one])
                given = _took(slots[other], slots2[one], slots2[other])
                if taken + given >= 2:
                    yield one, other, taken, given


def _mutual(taken: int, given: int, same: bool) -> bool:
    """Whether each took the other's place: by a content word at one of them, unless all content words are
    the ``same``, as function words around two clauses change with their order."""
    return taken > 0 and given > 0 and (same or taken + given > 2)


def _took(slot: _Slot, by: _Slot, own: _Slot) -> int:
    """How surely the place ``slot`` was taken over: 2 where a content word says so, 1 where a function
    word does."""
    if (slot[0] and slot[0] == by[0] != own[0]) or (slot[2] and slot[2] == by[2] != own[2]):
        return 2
    return int(bool((slot[1] and slot[1] == by[1]) or (slot[3] and slot[3] == by[3])))


def _between(phrase: Phrase, one: _Word, other: _Word) -> tuple[str, ...]:
    places = _place(phrase.tokens, one), _place(phrase.tokens, other)
    return phrase.tokens[min(places) + 1 : max(places)]


def _idle(a: Phrase, b: Phrase, one: _Word, other: _Word) -> bool:
    """Whether two words' order says nothing: side by side (adjectives, "job agency" and "agency for jobs",
    "5 May"), or joined by "and" and its like."""
    left, right = _between(a, one, other), _between(b, one, other)
    if not (a.bag.isdisjoint(left) and b.bag.isdisjoint(right)):
        return False
    return not left or not right or not SYMMETRIC.isdisjoint(left)


def _place(tokens: tuple[str, ...], word: _Word) -> int:
    at = -1
    for _ in range(word[1] + 1):
        at = tokens.index(word[0], at + 1)
    return at


def _slots(phrase: Phrase, bag: frozenset[str]) -> dict[_Word, _Slot]:
    """Of each content word: what stands before it with the content word before that, before it, and the
    same behind. Articles are passed over; what tells nothing (the text's ends, is, and) is ""."""
    found: dict[_Word, _Slot] = {}
    seen: dict[str, int] = {}
    tokens = [token for token in phrase.tokens if token not in _ARTICLES]
    for at, word in enumerate(tokens):
        if word in bag:
            left, far_left = _beside(tokens, at, -1, bag)
            right, far_right = _beside(tokens, at, 1, bag)
            seen[word] = seen.get(word, -1) + 1
            found[word, seen[word]] = (
                far_left and f"{far_left} {left}",
                left,
                far_right and f"{right} {far_right}",
                right,
            )
    return found


def _beside(tokens: list[str], at: int, step: int, bag: frozenset[str]) -> tuple[str, str]:
    """(the word beside ``at``, the content word that it belongs to)"""
    near = at + step
    if not 0 <= near < len(tokens):
        return "", ""
    word = tokens[near]
    if word in _IDLE:
        return "", ""
    if word in bag:
        return word, word
    far = near + step
    return word, tokens[far] if 0 <= far < len(tokens) and tokens[far] in bag else ""
