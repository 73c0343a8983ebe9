"""Questions that look like an earlier one and must not get its answer: a number, a name, the polarity or a
direction changed. Made from the questions of a stream by fixed rules and a fixed seed, so that nobody has
to keep them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random

from llm_middleware.semantic.eval_files import PairRows
from llm_middleware.semantic.evaluation import Pairs, replay_static

__all__ = ["KINDS", "served_table", "traps", "with_traps"]

_NUMBER = re.compile(r"(?<![\w.,])\d{1,6}(?![\w.,]*\w)")
_AUXILIARY = re.compile(r"\b(is|are|was|can|could|should|would|will|does|do|did)\b( \w+)?", re.IGNORECASE)
_NAME = re.compile(r"(?<=[a-z] )[A-Z][a-z]{3,}\b")
_DIRECTION = re.compile(r"\b(\w{3,}) (to|into|from|than) (\w{3,})\b")
_SMALL_WORDS = """
    the and how what who you can way have want need able going used try due get has are is was was's your
    its his her their this that these those any some much many more less best good like one ones out not
    which there three two first
"""
_SMALL = frozenset(_SMALL_WORDS.split())


def _number(text: str, random: Random, names: Sequence[str]) -> str | None:
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    match = random.choice(found)
    value = int(match[0])
    other = random.choice([value + 1, value * 10, value + random.randrange(2, 9), max(0, value // 2)])
    return None if other == value else text[: match.start()] + str(other) + text[match.end() :]


def _negation(text: str, random: Random, names: Sequence[str]) -> str | None:
    match = _AUXILIARY.search(text)
    if not match or re.search(r"n't|\bnot\b|\bno\b|\bnever\b|\bwithout\b", text, re.IGNORECASE):
        return None
    at = match.end() if match[2] else match.end(1)
    return text[:at] + " not" + text[at:]


def _name(text: str, random: Random, names: Sequence[str]) -> str | None:
    found = list(_NAME.finditer(text))
    if not found:
        return None
    match = random.choice(found)
    other = random.choice(names)
    return None if other in text else text[: match.start()] + other + text[match.end() :]


def _direction(text: str, random: Random, names: Sequence[str]) -> str | None:
    for match in _DIRECTION.finditer(text):
        one, word, other = match.groups()
        if one.lower() != other.lower() and not {one.lower(), other.lower()} & _SMALL and one.isalpha():
            return f"{text[: match.start()]}{other} {word} {one}{text[match.end() :]}"
    return None


KINDS: dict[str, tuple[Callable[[str, Random, Sequence[str]], str | None], int]] = {
    "number": (_number, 600),
    "negation": (_negation, 600),
    "name": (_name, 600),
    "direction": (_direction, 300),
}
"""What changes, and how many of each."""


def traps(texts: Sequence[str], seed: int = 11) -> list[tuple[str, str, str]]:
    """(a question of ``texts``, the question that looks like it, what was changed), each question used
    once."""
    random = Random(seed)
    found = Counter(match[0] for text in texts for match in _NAME.finditer(text))
    names = sorted(name for name, count in found.items() if count > 4 and name.lower() not in _SMALL)
    order = list(dict.fromkeys(texts))
    random.shuffle(order)
    known, used, made = set(order), set[str](), list[tuple[str, str, str]]()
    for kind, (change, count) in KINDS.items():
        wanted = count
        for text in order:
            if not wanted:
                break
            changed = None if text in used else change(text, random, names)
            if changed and changed not in known:
                used.add(text)
                made.append((text, changed, kind))
                wanted -= 1
    return made


def with_traps(stream: Sequence[tuple[str, str]], seed: int = 11) -> list[tuple[str, str]]:
    """``stream`` with its `traps` among the requests, each somewhere behind its original and in a class of
    its own."""
    random = Random(seed)
    first = {text: at for at, (text, _) in reversed(list(enumerate(stream)))}
    extra: dict[int, list[tuple[str, str]]] = {}
    for number, (text, changed, _) in enumerate(traps([text for text, _ in stream], seed)):
        at = random.randrange(first[text], len(stream))
        extra.setdefault(at, []).append((changed, f"trap {number}"))
    return [row for at, one in enumerate(stream) for row in (one, *extra.get(at, ()))]


def served_table(
    made: Sequence[tuple[str, str, str]],
    others: Mapping[str, PairRows],
    pairs_of: Callable[[PairRows], Pairs],
    threshold: float = 0.8,
) -> tuple[list[str], float]:
    """(lines of Markdown: how many traps a threshold serves alone and with guards, the share of all ``made``
    with guards). ``others``: more pairs that never have one answer, by name."""
    by_kind = {kind: [row for row in made if row[2] == kind] for kind in KINDS}
    sets = {**{kind: _rows(some) for kind, some in by_kind.items()}, "all": _rows(made), **others}
    lines = [
        f"| what was changed | traps | served at {threshold:g}: alone | with guards |",
        "|---|---|---|---|",
    ]
    share = 0.0
    for name, rows in sets.items():
        pairs = pairs_of(rows)
        alone, guarded = (
            replay_static(pairs, threshold, guards=guards).whole.hit_rate for guards in (False, True)
        )
        lines.append(f"| {name} | {len(rows.same):,} | {100 * alone:.1f} % | {100 * guarded:.1f} % |")
        share = guarded if name == "all" else share
    return lines, share


def _rows(some: Sequence[tuple[str, str, str]]) -> PairRows:
    return PairRows([row[0] for row in some], [row[1] for row in some], [False] * len(some))
