"""The static mode: no judge, one threshold, and guards. The threshold is asked for as an error target and
mapped to a cosine of the embedder at hand through 400 pairs of questions that come with the package
(`data/pairs.txt`)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from operator import mul
from statistics import NormalDist, fmean, stdev

from ..errors import ConfigError
from .decision import Decision
from .guards import conflict_of
from .records import Neighbour

__all__ = ["decide_static", "shipped_pairs", "threshold_for"]

_LOWEST, _HIGHEST = 0.5, 0.999


@lru_cache(maxsize=1)
def shipped_pairs() -> tuple[tuple[str, str, bool], ...]:
    """(stored question, asked question, whether one answer serves both): 200 that fit, 200 near misses."""
    text = (files(__package__) / "data" / "pairs.txt").read_text("utf-8")
    rows = [
        [part.strip() for part in line.split("|")] for line in text.splitlines() if line and line[0] != "#"
    ]
    return tuple((row[0], other, at < 2) for row in rows for at, other in enumerate(row[1:]))


def threshold_for(max_error: float, embed: Callable[[Sequence[str]], Sequence[bytes]]) -> float:
    """The cosine above which a share of at most about ``max_error`` of look-ups is answered wrongly, as
    far as the shipped pairs tell: half of them near misses, which is harder than most traffic. Embeds 500
    short texts.

    ``embed`` gives a float32 vector of unit length for each text. `ConfigError` unless 0 < ``max_error`` < 1.
    """
    if not 0.0 < max_error < 1.0:
        raise ConfigError("max_error: expected a share over 0 and under 1", param="max_error")
    pairs = shipped_pairs()
    texts = list(dict.fromkeys(text for pair in pairs for text in pair[:2]))
    vectors = dict(zip(texts, map(_floats, embed(texts)), strict=True))
    wrong = [
        sum(map(mul, vectors[a], vectors[b])) for a, b, fits in pairs if not fits and not conflict_of(a, b)
    ]
    spread = NormalDist(fmean(wrong), stdev(wrong))
    share = len(wrong) / len(pairs)
    return min(_HIGHEST, max(_LOWEST, spread.inv_cdf(1.0 - min(0.999, max_error / share))))


def decide_static(text: str, neighbours: Sequence[Neighbour], threshold: float) -> Decision:
    """A hit where the nearest of ``neighbours`` (best first) is at least ``threshold`` near and no guard
    minds.

    Only the nearest: falling through to the next one after a veto serves more wrong answers than right ones.
    """
    if not neighbours:
        return Decision("miss", None, 0.0, 0.0, "none")
    best = neighbours[0]
    if best.similarity < threshold:
        return Decision("miss", None, 0.0, best.similarity, "uncertain")
    minds = conflict_of(best.row.text, text)
    if minds is not None:
        return Decision("miss", None, 0.0, best.similarity, minds)
    return Decision("hit", best, 0.0, best.similarity, "match")


def _floats(data: bytes) -> array[float]:
    vector = array("f")
    vector.frombytes(data)
    return vector
