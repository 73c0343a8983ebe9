"""The verified mode at work: what it learns behind requests, what it serves then, what users' reports do."""

from __future__ import annotations

import asyncio
import logging
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import pytest

from llm_middleware import CacheManager
from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC
from llm_middleware.semantic import learning, modes, teaching
from llm_middleware.semantic.calibration import State
from llm_middleware.semantic.embed_cache import CachedEmbedder
from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.judges import Pair
from llm_middleware.semantic.learning import Family
from llm_middleware.semantic.static_mode import shipped_pairs, threshold_for
from tests.semantic.conftest import (
    JOIN,
    PATIENT,
    TOPICS,
    WAYS,
    Asking,
    Upstream,
    asked,
    reworded,
    toy,
    wordings,
)
from tests.support import AsyncFace

QUESTIONS = [question for _, question in wordings()]
FEW = QUESTIONS[:40]  # two for each topic: the second of them is compared with the first


def topic_of(text: str) -> str:
    return next(topic for topic in TOPICS if topic in text)


def same_topic(pair: Pair) -> bool:
    return topic_of(pair.question) == topic_of(pair.asked)


def ask(asking: Asking, questions: list[str]) -> None:
    """One after the other; each comparison has ended before the next question."""
    for question in questions:
        _, text = asking(question)
        assert topic_of(text) == topic_of(question)
        asking.done()


def family(asking: Asking) -> Family:
    [known] = asking.cache._flow.semantic.teacher.families.known()
    return known


# --- learning, and then serving


def test_nothing_is_served_before_a_hundred_labels_and_much_after_them(make):
    pairs: list[Pair] = []

    def judge(pair: Pair) -> bool:
        pairs.append(pair)
        return same_topic(pair)

    asking = make(max_error_rate=0.05, judge=judge)
    ask(asking, QUESTIONS[:120])
    told = asking.counts()
    assert told["misses"] == {"none": 20, "learning": 100}
    assert (told["judged-right"], told["hits"], told["hit_rate"]) == (100, {}, 0.0)
    first, second = reworded("gardens", WAYS[0]), reworded("gardens", WAYS[1])
    assert pairs[0] == Pair(first, f"answer 1: {first}", second, f"answer 21: {second}")

    ask(asking, QUESTIONS[120:])
    told = asking.counts()
    hits, checks = told["hits"]["semantic"], told["misses"]["check"]
    assert told["misses"] == {"none": 20, "learning": 100, "check": checks}
    assert hits + checks == 320
    assert 130 < hits < 300  # of the first would-be hits most are checked
    assert told["judged-right"] == 100 + checks
    assert asking.calls == 120 + checks
    assert told["hit_rate"] == hits / 440
    assert 0.0 < told["error_rate"] < 0.05
    assert (told["threshold"], told["lookups"]) == (None, 440)


def test_what_the_judge_finds_wrong_is_not_served(make):
    """And that pair is not compared again."""
    pairs: list[Pair] = []

    def judge(pair: Pair) -> bool:
        pairs.append(pair)
        return False

    asking = make(max_error_rate=0.05, judge=judge)
    ask(asking, FEW)
    assert asking.counts()["judged-wrong"] == 20
    question = FEW[20]
    assert asking.status(question, controls={"no-cache": True})[0] == "miss"
    asking.cache.delete(asking.fetch(asked(question)).cache.key)
    assert asking.status(question)[1] == "blocked"
    asking.done()
    assert len(pairs) == 20
    ask(asking, QUESTIONS[40:300])
    assert asking.counts()["hits"] == {}


def test_what_is_known_of_a_question_outlives_its_answer(make, clock):
    asking = make(max_error_rate=0.05, judge=lambda pair: False, clock=clock)
    ask(asking, [FEW[0], FEW[20]])
    clock.advance(30)
    assert asking.status(FEW[0], controls={"s-maxage": 10})[0] == "miss"  # and a new answer
    asking.done()
    asking.cache.delete(asking.fetch(asked(FEW[20])).cache.key)
    assert asking.status(FEW[20]) == ("miss", "blocked")


def test_a_neighbour_that_a_guard_vetoes_is_passed_over(make):
    pairs: list[Pair] = []
    asking = make(max_error_rate=0.05, judge=lambda pair: pairs.append(pair) or True)
    first = f"{reworded('gardens', 'slowly')} in 10 steps"
    asking(first)
    asking.done()
    assert asking.status(f"{reworded('gardens', 'briefly')} in 12 steps") == ("miss", "veto-number")
    asking.done()
    assert pairs == []
    asking(f"{reworded('gardens', 'briefly')} in 10 steps")  # the nearest is the one with 12
    asking.done()
    assert [(each.question, each.answer) for each in pairs] == [(first, f"answer 1: {first}")]


def test_the_floor_is_the_threshold_beside_the_bound(make):
    pairs: list[Pair] = []
    asking = make(
        max_error_rate=0.05, similarity_threshold=0.95, judge=lambda pair: pairs.append(pair) or True
    )
    told = [asking.status(question)[1] for question in FEW]
    assert (Counter(told), pairs) == (Counter({"none": 40}), [])


def test_streams_are_compared_like_plain_answers(make):
    pairs: list[Pair] = []
    asking = make(max_error_rate=0.05, judge=lambda pair: pairs.append(pair) or True)
    first, second = FEW[0], FEW[20]
    for question, stream in ((first, True), (second, False), (reworded("gardens", "kindly"), True)):
        asking.status(asked(question, stream=stream))
        asking.done()
    assert [each.fresh.split(":")[0] for each in pairs] == ["answer 2", "answer 3"]
    assert pairs[0] == Pair(first, f"answer 1: {first}", second, f"answer 2: {second}")


# --- judges that have no opinion, or fail


@pytest.mark.parametrize("said", [None, "yes", 1])
def test_a_judge_without_an_opinion_teaches_nothing(make, said):
    asking = make(max_error_rate=0.05, judge=lambda pair: said)
    ask(asking, FEW)
    told = asking.counts()
    assert (told["unjudged"], family(asking).state.labels) == (20, 0)
    assert "judged-right" not in told
    assert "judged-wrong" not in told


def test_a_judge_that_fails_is_told_once_and_stops_nobody(make, caplog):
    failing = True

    def judge(pair: Pair) -> bool:
        if failing:
            raise OSError("no such judge")
        return True

    asking = make(max_error_rate=0.05, judge=judge)
    ask(asking, FEW)
    told = asking.counts()
    assert (told["judge-error"], told["error"], family(asking).state.labels) == (20, 20, 0)
    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert lines == ["the semantic cache failed at judging: OSError: no such judge"]
    failing = False
    ask(asking, QUESTIONS[40:60])
    assert asking.counts()["judged-right"] == 20


def test_an_answer_that_is_gone_by_then_is_not_judged(make):
    asking = make(max_error_rate=0.05, judge=lambda pair: True)
    key = asking.fetch(asked(FEW[0])).cache.key

    def removing(body):
        assert asking.cache.delete(key) == 1
        return asking.upstream(body)

    asking.face.fetch(asking.cache, asked(FEW[20]), removing)
    asking.done()
    assert asking.counts()["unjudged"] == 1
    assert family(asking).state.labels == 0


def test_without_a_budget_nothing_is_judged(make):
    pairs: list[Pair] = []
    asking = make(max_error_rate=0.05, judge_budget=0, judge=lambda pair: pairs.append(pair) or True)
    told = Counter(asking.status(question)[1] for question in FEW)
    asking.done()
    assert (told, pairs) == (Counter({"none": 20, "budget": 20}), [])


def test_a_budget_is_kept_to(make):
    """Comparisons for each thousand look-ups."""
    asking = make(max_error_rate=0.05, judge_budget=250, judge=lambda pair: True)
    ask(asking, QUESTIONS[:200])
    assert 40 <= asking.counts()["judged-right"] <= 51


def test_at_most_32_are_judged_at_a_time(make):
    gate, judging = threading.Event(), []

    def judge(pair: Pair) -> bool:
        judging.append(pair)
        assert gate.wait(JOIN)
        return True

    asking = make(max_error_rate=0.05, judge=judge)
    for question in QUESTIONS[:60]:
        assert asking(question)[0] == "miss"  # nobody waits for a judge
    assert asking.counts()["judge-busy"] == 8
    gate.set()
    asking.done()
    assert (len(judging), asking.counts()["judged-right"]) == (32, 32)
    ask(asking, QUESTIONS[60:70])
    assert asking.counts()["judged-right"] == 42


def test_a_judge_that_never_ends_is_left(monkeypatch):
    monkeypatch.setattr(teaching, "_JUDGING", 0.05)

    async def judge(pair: Pair) -> bool:
        await asyncio.Event().wait()
        return True

    asking = Asking(
        AsyncFace(),
        CacheManager(
            "semantic", embedding_model=toy, embedding_budget=PATIENT, max_error_rate=0.05, judge=judge
        ),
    )
    ask(asking, [FEW[0], FEW[20]])
    assert asking.counts()["judge-error"] == 1
    assert asking.cache._flow.semantic.teacher._judging == {}
    asking.face.close()


def test_judgements_that_were_lost_make_room_again(monkeypatch):
    """An event loop that ends before they begin, or a process that is forked, leaves their places taken."""

    async def judge(pair: Pair) -> bool:
        await asyncio.sleep(3600)
        return True

    cache = CacheManager(
        "semantic", embedding_model=toy, embedding_budget=PATIENT, max_error_rate=0.05, judge=judge
    )
    upstream = Upstream()
    for question in QUESTIONS[:20]:
        cache.fetch(asked(question), upstream)

    async def explored(question: str) -> None:
        await cache.afetch(asked(question), upstream)

    for question in QUESTIONS[20:60]:
        asyncio.run(explored(question))  # ends with the judgement under way, or not even begun
    teacher = cache._flow.semantic.teacher
    left = len(teacher._judging)
    with teacher._lock:
        for _ in range(32 - left):
            teacher._judging[object()] = 0.0
    monkeypatch.setattr(teaching, "_LOST", -1.0)
    assert teacher._begins(object())
    assert len(teacher._judging) == 1


# --- restarts, and other processes


def test_what_was_learnt_survives_a_restart(make, tmp_path):
    places = {"index_path": tmp_path / "index", "disk_cache_dir": str(tmp_path / "answers")}
    before = make(max_error_rate=0.05, judge=same_topic, **places)
    ask(before, QUESTIONS[:240])
    labels = family(before).state.labels
    assert labels > 120
    before.face.do(before.cache, "close")

    after = make(max_error_rate=0.05, judge=same_topic, **places)
    after.cache._flow.semantic.index.index.load()
    ask(after, QUESTIONS[240:320])
    told = after.counts()
    assert set(told["misses"]) == {"check"}  # no learning any more
    assert told["hits"]["semantic"] + told["misses"]["check"] == 80
    assert told["hits"]["semantic"] > 20
    assert family(after).state.labels == labels + told["judged-right"]


def test_two_managers_with_one_index_learn_together(make):
    """Labels of both count, once each."""
    index = NumpyIndex()
    one, other = (make(max_error_rate=0.05, judge=same_topic, vector_index=index) for _ in range(2))
    for at in range(20, 100, 20):
        ask(one, QUESTIONS[: at + 20])
    face = one.face
    face.do(one.cache, "close")
    ask(other, QUESTIONS[100:160])
    face.do(other.cache, "close")
    labels = [family(each).state.labels for each in (one, other)]
    [name] = {family(each).name for each in (one, other)}
    kept = State.from_bytes(index.state(name))
    assert kept.labels == labels[1]
    assert labels[0] == one.counts()["judged-right"] == 80
    told = other.counts()
    assert kept.labels == 80 + told.get("judged-right", 0)


class Nested(NumpyIndex):
    """An index that has something done as soon as a state is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.next = lambda: None

    def keep_state(self, name, data, before):
        kept = super().keep_state(name, data, before)
        then, self.next = self.next, lambda: None
        then()
        return kept


def test_sharing_at_the_same_time_counts_a_label_once(make):
    """As a report does while what is due is being shared."""
    index = Nested()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    ask(asking, QUESTIONS[:35])
    known, families = family(asking), asking.cache._flow.semantic.teacher.families
    index.next = lambda: run_sync(families.share(SYNC, known))
    run_sync(families.share(SYNC, known))
    run_sync(families.share(SYNC, known))
    assert State.from_bytes(index.state(known.name)).labels == known.state.labels == 15


def test_sharing_that_was_lost_is_begun_again(monkeypatch):
    known = Family("f", None)
    assert known.begins()
    assert not known.begins()
    monkeypatch.setattr(learning, "_LOST", 0.0)
    assert known.begins()
    known.ends()
    assert known.sharing is None


def test_a_state_that_cannot_be_read_or_kept_costs_nothing_but_what_it_had(make, caplog):
    index = NumpyIndex()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    plan = asking.cache.plan("chat", asked(FEW[0]))
    name = asking.cache._flow.semantic.family(plan.key, plan.kind, plan.model)
    assert index.keep_state(name, b"nonsense", None)
    ask(asking, FEW)
    assert family(asking).state.labels == 20
    lines = {each.getMessage() for each in caplog.records if each.levelno == logging.WARNING}
    assert f"what a semantic cache had learnt ({name}) cannot be read and begins anew" in lines


class Stateless(NumpyIndex):
    def state(self, name):
        raise OSError("no state")


def test_an_index_without_its_states_is_a_plain_miss(make):
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=Stateless())
    told = Counter(asking.status(question) for question in FEW)
    assert told == {("miss", "error"): 40}
    assert asking.counts()["misses"] == {"error": 40}
    assert asking.status(FEW[0]) == ("hit", None)


class Unchanging(NumpyIndex):
    def update(self, key, payload):
        raise OSError("no update")


def test_an_index_that_cannot_be_updated_is_told_and_stops_nobody(make):
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=Unchanging())
    ask(asking, FEW)
    assert asking.counts()["judge-error"] == 20


# --- what users say


def served_by_meaning(asking: Asking) -> str:
    """Ask until an answer is served by meaning; its key."""
    for question in QUESTIONS:
        answer = asking.fetch(asked(question))
        asking.done()
        if answer.cache.status == "semantic-hit":
            return answer.cache.key
    raise AssertionError("nothing was ever served")


def test_a_report_evicts_counts_and_raises_the_bar(make):
    asking = make(max_error_rate=0.05, judge=same_topic)
    key = served_by_meaning(asking)
    state = family(asking).state
    before = state.strictness, state.wrong, state.labels
    assert before[0] == 1.0
    assert asking.face.do(asking.cache, "report", key) is True
    state = family(asking).state
    assert state.wrong == pytest.approx(before[1] * 0.99 + 1, abs=0.02)
    assert state.strictness > 1.2
    assert state.labels == before[2]
    assert asking.counts()["reported"] == 1
    assert asking.face.do(asking.cache, "report", key) is False
    _, page = asking.cache.entries(prefix=key)
    assert page == []


def test_reports_never_lower_the_bar(make):
    asking = make(max_error_rate=0.05, judge=same_topic)
    ask(asking, QUESTIONS[:120])
    seen = [family(asking).state.strictness]
    for question in QUESTIONS[:10]:
        key = asking.fetch(asked(question)).cache.key
        asking.face.do(asking.cache, "report", key)
        seen.append(family(asking).state.strictness)
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_a_report_of_what_is_not_there_teaches_nothing(make):
    asking = make(max_error_rate=0.05, judge=same_topic)
    ask(asking, FEW)
    before = family(asking).state.to_bytes()
    assert asking.face.do(asking.cache, "report", "0" * 64) is False
    assert family(asking).state.to_bytes() == before


def test_a_report_in_static_mode_evicts_and_counts(make):
    asking = make()
    key = asking.fetch(asked(FEW[0])).cache.key
    assert asking.face.do(asking.cache, "report", key) is True
    assert asking.counts()["reported"] == 1
    assert asking(FEW[20])[0] == "miss"


def test_a_report_is_shared_at_once(make):
    """Other processes have the higher bar too, and a restart."""
    index = NumpyIndex()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    key = served_by_meaning(asking)
    asking.face.do(asking.cache, "report", key)
    known = family(asking)
    assert State.from_bytes(index.state(known.name)).strictness == known.state.strictness > 1.2


def test_a_report_that_could_not_be_shared_is_shared_at_the_end(make):
    index = NumpyIndex()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    key = served_by_meaning(asking)
    known = family(asking)
    run_sync(asking.cache._flow.semantic.teacher.families.share(SYNC, known))
    assert known.begins()  # somebody else shares just now
    asking.face.do(asking.cache, "report", key)
    known.ends()
    asking.face.do(asking.cache, "close")
    assert State.from_bytes(index.state(known.name)).strictness == known.state.strictness > 1.2


# --- shadow


def test_in_the_shadow_it_learns_and_serves_nothing(make):
    asking = make(max_error_rate=0.05, judge=same_topic, shadow=True)
    ask(asking, QUESTIONS[:200])
    told = asking.counts()
    assert told["hits"] == {}
    assert told["misses"] == {"none": 20, "learning": 100, "check": 80}
    assert told["judged-right"] == 180
    assert asking.calls == 200


# --- a threshold from an error target


def words(texts: list[str]) -> list[list[float]]:
    """Vectors by the words of a text."""
    return [_words(text) for text in texts]


def _words(text: str) -> list[float]:
    vector = [0.0] * 512
    for word in text.lower().strip("?. ").split():
        vector[zlib.crc32(word.encode()) % 512] = 1.0
    return vector


def test_a_threshold_from_an_error_target(make):
    asking = make(embedding_model=words, static_error_target=0.05)
    assert asking.status("how do I reset the password of my account") == ("miss", "none")
    asking.done()
    embedder: CachedEmbedder = asking.cache._flow.semantic.embedder
    found = asking.counts()["threshold"]
    assert found == threshold_for(0.05, embedder.embed)
    assert embedder.stats.calls == 2  # that one knew them all
    assert 0.8 < found < 0.95
    asked_again = "how do I reset the password of my new account"
    assert asking.status(asked_again)[0] == "semantic-hit"
    assert asking.status("how do I change the name of my account")[0] == "miss"


def test_until_the_threshold_is_known_nothing_is_served(make):
    gate = threading.Event()
    pairs = len({text for pair in shipped_pairs() for text in pair[:2]})

    def embed(texts):
        if len(texts) == pairs:
            assert gate.wait(JOIN)
        return toy(texts)

    asking = make(embedding_model=embed, static_error_target=0.02)
    assert [asking.status(question)[1] for question in (FEW[0], FEW[20])] == ["none", "learning"]
    assert asking.counts()["threshold"] is None
    gate.set()
    asking.done()
    assert asking.counts()["threshold"] == 0.999  # `toy` finds nothing in them


def test_a_threshold_that_cannot_be_found_is_not_looked_for_all_the_time(make, caplog, monkeypatch):
    tried = []

    def embed(texts):
        if len(texts) > 1:
            tried.append(len(texts))
            raise OSError("too many texts")
        return toy(texts)

    asking = make(embedding_model=embed, static_error_target=0.02)
    ask(asking, FEW)
    assert len(tried) == 1
    assert asking.counts()["hits"] == {}
    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert lines == ["no threshold for static_error_target yet: OSError: too many texts"]
    monkeypatch.setattr(modes, "_AGAIN", 0.0)
    asking.cache._flow.semantic.mode._measure_at = 0.0
    ask(asking, [reworded("gardens", "kindly")])
    assert len(tried) == 2


# --- threads and an event loop at once


@dataclass
class Crowd:
    cache: CacheManager
    upstream: Upstream

    def check(self, topic: str, answer) -> str:
        text = answer.json()["choices"][0]["message"]["content"]
        assert topic in text, (topic, text)
        return answer.cache.status

    def thread(self, seed: int) -> Counter:
        return Counter(
            self.check(topic, self.cache.fetch(asked(text), self.upstream)) for topic, text in shuffled(seed)
        )

    async def loop(self) -> Counter:
        told: Counter = Counter()
        for at in range(0, 200, 10):
            some = shuffled(99)[at : at + 10]
            answers = await asyncio.gather(
                *[self.cache.afetch(asked(text), self.upstream) for _, text in some]
            )
            told.update(self.check(topic, each) for (topic, _), each in zip(some, answers, strict=True))
        return told


def shuffled(seed: int) -> list[tuple[str, str]]:
    questions = wordings()
    Random(seed).shuffle(questions)
    return questions[:200]


def test_every_answer_belongs_to_its_question():
    """Twenty topics in all their ways, asked by eight threads and an event loop while it learns."""
    cache = CacheManager(
        "semantic",
        embedding_model=toy,
        embedding_budget=PATIENT,
        max_error_rate=0.05,
        judge=same_topic,
    )
    crowd = Crowd(cache, Upstream())
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(crowd.thread, seed) for seed in range(8)]
        futures.append(pool.submit(asyncio.run, crowd.loop()))
        told = sum((future.result() for future in futures), Counter())
    for thread in threading.enumerate():
        if thread.name == "llm-middleware-background":
            thread.join(JOIN)
    assert sum(told.values()) == 9 * 200
    counts = cache.stats()["semantic"]
    assert counts.get("judged-wrong") is None
    assert counts.get("error") is None
    labels = cache._flow.semantic.teacher.families.known()[0].state.labels
    assert labels == counts["judged-right"] >= 60
