"""A look-up by meaning whose vector is known: from the plan to the stored answer or the miss; and the guards.

CPU time, one BLAS thread, 384 dimensions, one scope. All of a look-up: the question is found, its scope and
its spelling hashed, and then, after the embedding, its eight nearest neighbours searched for, the decision
made, and on a hit the answer taken from memory. Questions have the texts of the pairs that come with the
package, vectors are those of `benchmarks.vector_index` (*clustered*).
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: what follows is about one core

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

from llm_middleware import CacheManager
from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC
from llm_middleware.caching.fastlane import no_header
from llm_middleware.caching.plan import Plan
from llm_middleware.semantic.guards import conflict_of
from llm_middleware.semantic.phrases import phrase_of
from llm_middleware.semantic.records import Row as Stored
from llm_middleware.semantic.static_mode import shipped_pairs
from llm_middleware.semantic.tier import Sought
from tests.support import completion

from .harness import Row, compare, in_process, quick, show
from .vector_index import Vectors, clustered, paraphrases

__all__ = ["results"]

_QUERIES = 500
_GOALS = {10_000: 300.0, 100_000: 1000.0}  # µs
_MODES: dict[str, dict[str, float]] = {
    "static, hits": {"similarity_threshold": 0.8},
    "static, misses": {"similarity_threshold": 0.99},
    "verified": {"max_error_rate": 0.01, "judge_budget": 0.0},
}


def results() -> list[Row]:
    rows = [_guards(fresh=False), _guards(fresh=True)]
    for count in (1000, 10_000) if quick() else (1000, 10_000, 100_000):
        vectors = clustered(count, 1)
        for name, settings in _MODES.items():
            rows += _lookups(name, settings, count, vectors)
    return rows


def _guards(*, fresh: bool) -> Row:
    """``fresh``: both texts are read; else they were before."""
    pairs = itertools.cycle([pair[:2] for pair in shipped_pairs()])

    def run(some: Sequence[tuple[str, str]]) -> None:
        for stored, asked in some:
            if fresh:
                phrase_of.cache_clear()
            conflict_of(stored, asked)

    def prepare(batch: int) -> Sequence[tuple[str, str]]:
        return [next(pairs) for _ in range(batch)]

    name = f"guards, a pair of questions{' read for the first time' if fresh else ''}"
    return _row(name, 100.0, in_process(prepare, run, batch=200))


def _lookups(mode: str, settings: dict[str, float], count: int, vectors: Vectors) -> list[Row]:
    asked = _texts("asked", _QUERIES)
    known = dict(zip(asked, paraphrases(vectors, _QUERIES), strict=True))
    cache = CacheManager(
        "semantic",
        embedding_model=lambda texts: [known[text] for text in texts],
        embedding_budget=60.0,
        index_bytes=4 << 30,
        max_bytes=1 << 30,
        **settings,
    )
    tier = cache._flow.semantic
    assert tier is not None
    plans = [cache.plan("chat", _body(text)) for text in asked]
    for plan in plans:  # what was asked is embedded once
        run_sync(tier.find(SYNC, plan, no_header))
    _fill(cache, plans[0], count, vectors)
    turns = itertools.cycle(plans)

    def prepare(batch: int) -> Sequence[Plan]:
        return [next(turns) for _ in range(batch)]

    def begun(batch: int) -> Sequence[tuple[Plan, Sought]]:
        questions = [(plan, tier._question(plan)) for plan in prepare(batch)]
        return [
            (plan, Sought("none", question=question, scope=tier._scope(plan, question)))
            for plan, question in questions
            if not isinstance(question, str)
        ]

    def decide(some: Sequence[tuple[Plan, Sought]]) -> None:
        for plan, sought in some:
            run_sync(tier._compare(SYNC, plan, no_header, sought, "another spelling"))

    def find(some: Sequence[Plan]) -> None:
        for plan in some:
            run_sync(tier.find(SYNC, plan, no_header))

    where = f"{count:,} questions, {mode}"
    return [
        _row(
            f"decision after the embedding, {where}", _GOALS.get(count), in_process(begun, decide, batch=50)
        ),
        _row(f"all of a look-up, {where}", None, in_process(prepare, find, batch=50)),
    ]


def _fill(cache: CacheManager, plan: Plan, count: int, vectors: Vectors) -> None:
    """As many questions as there are vectors, in the scope of ``plan``, all with one answer."""
    key = cache.set(_body("Which answer do all of these have?"), completion("an answer"))
    tier = cache._flow.semantic
    assert tier is not None
    question = tier._question(plan)
    assert not isinstance(question, str)
    scope = tier._scope(plan, question)
    entry = run_sync(cache._flow.tiers.get(SYNC, "chat", f"llm:{key}"))[0]
    assert entry is not None
    memory = cache._flow.tiers.memory
    assert memory is not None
    for number, (text, vector) in enumerate(zip(_texts("stored", count), vectors, strict=True)):
        name = f"llm:{number:064x}"
        tier.index.index.add(Stored(name, scope, text, vector.tobytes(), math.inf, {}))
        memory.set(name, entry, None)


def _texts(mark: str, count: int) -> list[str]:
    texts = list(dict.fromkeys(text for pair in shipped_pairs() for text in pair[:2]))
    # No numbers, about which the guards would mind: letters that count.
    return [f"{texts[number % len(texts)]} {mark}{_letters(number)}" for number in range(count)]


def _letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def _body(text: str) -> dict[str, object]:
    return {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
    }


def _row(path: str, goal: float | None, work: Callable[[], float]) -> Row:
    taken = [seconds * 1e6 for seconds in compare({path: work}).by_name[path]]
    return Row(path, "", goal, statistics.median(taken), min(taken), max(taken), unit="µs")


if __name__ == "__main__":
    show(results)
