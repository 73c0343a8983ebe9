"""Answers to questions that were asked before in other words: what may be compared, and what never is. Cases
C100 to C108."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from llm_middleware import CacheManager
from llm_middleware.caching.cache_key import UnkeyableError
from llm_middleware.semantic.answers import answer_text
from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.question import Question
from tests.semantic.conftest import (
    PATIENT,
    TOPICS,
    Asking,
    Counted,
    Held,
    Upstream,
    asked,
    calm,
    question_in,
    reworded,
    talk,
    toy,
    toy_bytes,
    wordings,
)
from tests.services import wait_for
from tests.support import AsyncFace, SyncFace, chat_stream, chunk, completion, sse

GARDENS = reworded("gardens", "briefly")
FOX = "data:image/png;base64,Zm94"
OWL = "data:image/png;base64,b3ds"
PASSWORD = "How do I reset the password of my account?"
RESET = "What is the way to reset my account password?"
INVOICE = "Where can I find the invoice of my last order?"
RULES = " ".join(f"Rule {number}: answer politely and never mention the weather." for number in range(60))


def seen(image: str, text: str) -> dict[str, object]:
    """A picture in an earlier turn, and a question."""
    picture = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Look at this."}]
    return talk(("user", picture), ("assistant", "I see it."), ("user", text))


def paid(arguments: str, text: str) -> dict[str, object]:
    """A tool's call in an earlier turn, and a question."""
    call = {"id": "c1", "type": "function", "function": {"name": "pay", "arguments": arguments}}
    return {
        "model": "m",
        "messages": [
            {"role": "user", "content": "Pay my bill please."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
            {"role": "user", "content": text},
        ],
    }


BILL, BILLED = "How much of my bill did you pay?", "What amount of my bill have you paid?"
ANIMAL, BEAST = "What kind of animal is in the picture?", "Which kind of animal does the picture show?"
SIDES = ("Be brief and friendly.", "Be thorough and formal.")

STRUCTURAL = {
    "C100 other image": (
        seen(FOX, ANIMAL), seen(OWL, ANIMAL), seen(FOX, BEAST),
    ),
    "C101 other tool arguments": (
        paid('{"amount":10}', BILL), paid('{"amount":99999}', BILL), paid('{"amount":10}', BILLED),
    ),
    "roles swapped": (
        talk(("system", SIDES[0]), ("user", SIDES[1]), ("user", PASSWORD)),
        talk(("user", SIDES[0]), ("system", SIDES[1]), ("user", PASSWORD)),
        talk(("system", SIDES[0]), ("user", SIDES[1]), ("user", RESET)),
    ),
    "other question behind a long system prompt": (
        talk(("system", RULES), ("user", PASSWORD)),
        talk(("system", RULES), ("user", INVOICE)),
        talk(("system", RULES), ("user", RESET)),
    ),
    "C103 a number": (
        asked("How often may I take 10 mg of ibuprofen?"),
        asked("How often may I take 100 mg of ibuprofen?"),
        asked("How frequently can I take 10 mg of ibuprofen?"),
    ),
    "a direction": (
        asked("How do I convert USD to EUR at the bank?"),
        asked("How do I convert EUR to USD at the bank?"),
        asked("At the bank, how can I convert USD to EUR?"),
    ),
    "C103 a negation": (
        asked("Why is it safe to mix bleach with water?"),
        asked("Why is it not safe to mix bleach with water?"),
        asked("Why is mixing bleach with water safe?"),
    ),
    "C102 other system prompt": (
        talk(("system", "Answer in French."), ("user", PASSWORD)),
        talk(("system", "Answer in German."), ("user", PASSWORD)),
        talk(("system", "Answer in French."), ("user", RESET)),
    ),
    "last question of a chat": (
        talk(("user", "Hello there."), ("assistant", "Hello!"), ("user", PASSWORD)),
        talk(("user", "Hello there."), ("assistant", "Hello!"), ("user", INVOICE)),
        talk(("user", "Hello there."), ("assistant", "Hello!"), ("user", RESET)),
    ),
    "C103 a sum": (
        asked("What is the sum 2+2?"), asked("What is the sum 2+3?"), asked("How much is the sum 2+2?"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("first", "other", "same"), STRUCTURAL.values(), ids=STRUCTURAL)
def test_what_differs_in_more_than_wording_is_a_miss(make, local, first, other, same):
    """At a threshold where nearly everything is alike. The same request in other words is a hit."""
    asking = make(embedding_model=local)
    assert asking(first)[0] == "miss"
    assert asking(other)[0] == "miss"
    again = asking(same)
    assert (again[0], asking.calls) == ("semantic-hit", 2)
    assert again[1].startswith("answer 1:")


def test_embeddings_are_never_answered_by_meaning(make, local, face):
    """The tenth of the structural cases."""
    cache = make(embedding_model=local).cache
    bodies = [
        {"model": "e", "input": f"How often may I take {amount} mg of ibuprofen?"}
        for amount in (10, "10.", 100, 10)
    ]
    calls = []

    def call(body):
        calls.append(body)
        row = {"object": "embedding", "index": 0, "embedding": [float(len(calls))]}
        return {
            "object": "list",
            "data": [row],
            "model": "e",
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }

    told = [face.fetch(cache, body, call, kind="embedding") for body in bodies]
    assert [each.cache.status for each in told] == ["miss", "miss", "miss", "hit"]
    assert [each.cache.detail for each in told] == ["kind", "kind", "kind", None]
    assert told[-1].json()["data"][0]["embedding"] == [1.0]


def test_c104_two_tenants_share_nothing(make, local):
    asking = make(embedding_model=local)
    assert asking(PASSWORD, scope="id:one")[0] == "miss"
    assert asking(RESET, scope="id:two")[0] == "miss"
    assert asking(RESET, scope="")[0] == "miss"
    assert asking("How can I reset my account's password?", scope="id:one") == (
        "semantic-hit",
        f"answer 1: {PASSWORD}",
    )
    assert asking.calls == 3


# --- embeddings: when, and how many


def test_c105_an_exact_repeat_embeds_nothing(make):
    embed = Counted()
    asking = make(embedding_model=embed)
    question = GARDENS
    assert [asking(question)[0] for _ in range(3)] == ["miss", "hit", "hit"]
    assert embed.calls == [[question]]
    assert asking.counts()["lookups"] == 1


def test_c107_a_miss_embeds_once(make):
    embed = Counted()
    asking = make(embedding_model=embed)
    for topic in TOPICS[:5]:
        assert asking(reworded(topic, "briefly"))[0] == "miss"
        again = asked(reworded(topic, "slowly"), stream=True)
        assert asking.status(again, controls={"no-cache": True}) == ("miss", None)
    asking.done()
    assert embed.calls == [[reworded(topic, way)] for topic in TOPICS[:5] for way in ("briefly", "slowly")]


@pytest.mark.parametrize("stream", [False, True])
def test_c107_twenty_who_ask_the_same_at_once_cost_one_embedding(face, stream):
    """And one call: the others read along."""
    embed = Held()
    cache = CacheManager(
        "semantic", embedding_model=embed, embedding_budget=PATIENT, similarity_threshold=0.5
    )
    upstream = Upstream()
    body = asked(GARDENS, stream=stream)
    release = threading.Thread(target=_release_when_all_wait, args=(cache, embed, 19))
    release.start()
    if face.name == "sync":
        answers = face.together(*[lambda: cache.fetch(body, upstream)] * 20)
        texts = [b"".join(answer) for answer in answers]
    else:
        texts = face.run(_at_once(cache, body, upstream))
    assert len(set(texts)) == 1
    assert (upstream.calls, embed.calls) == (1, [[GARDENS]])
    release.join()
    calm(face)


def _release_when_all_wait(cache: CacheManager, embed: Held, count: int) -> None:
    """The leader waits for its vector, and the others for the leader."""
    tick = threading.Event()
    for _ in range(20_000):
        if embed.calls and sum(each.readers for each in list(cache._flow.flights._flights.values())) == count:
            break
        tick.wait(0.001)
    embed.release()


async def _at_once(cache: CacheManager, body: object, upstream: Upstream) -> list[bytes]:
    async def one() -> bytes:
        answer = await cache.afetch(body, upstream)
        return b"".join([piece async for piece in answer])

    return await asyncio.gather(*[one() for _ in range(20)])


def test_c106_a_slow_embedder_costs_its_budget_and_no_answer(make):
    """The vector that comes late is kept with the answer all the same."""
    embed = Held()
    asking = make(embedding_model=embed, embedding_budget=0.01)
    body = asked(GARDENS)
    assert asking.status(body) == ("miss", "embedding-late")
    assert asking.cache._flow.semantic.index.index.count() == 0
    embed.release()
    asking.done()
    assert asking.cache._flow.semantic.index.index.count() == 1
    assert len(embed.calls) == 1
    asking.cache._flow.semantic.embedder.budget = PATIENT
    assert asking(reworded("gardens", "slowly")) == ("semantic-hit", f"answer 1: {question_in(body)}")


def test_c106_a_failing_embedder_is_a_plain_miss_and_told_once(make, caplog):
    def fails(texts):
        raise OSError("no such host")

    asking = make(embedding_model=fails)
    told = [asking.status(reworded(topic, "briefly")) for topic in TOPICS[:8]]
    assert told == [("miss", "embedding-failed")] * 8
    assert asking.calls == 8
    told = asking.counts()
    assert (told["misses"], told["hits"], told["error"]) == ({"embedding-failed": 8}, {}, 8)
    assert told["embedding"]["calls"] < 8  # it is left alone for a while
    lines = [each.getMessage() for each in caplog.records if each.name == "llm_middleware"]
    assert lines == ["the semantic cache failed at embedding: OSError: no such host"]
    assert asking.status(GARDENS) == ("hit", None)


# --- the same question in another spelling


@pytest.mark.parametrize(
    "other",
    [
        "please explain briefly what makes Gardens work.",
        "  Please explain  briefly what makes gardens work",
        "please explain briefly\u00a0what makes gardens work?",
    ],
)
def test_another_spelling_is_a_hit_without_an_embedding(make, other):
    embed = Counted()
    asking = make(embedding_model=embed, similarity_threshold=1.0)
    first = asking(GARDENS)
    assert asking.status(other) == ("semantic-hit", "normalized")
    assert asking(other)[1] == first[1]
    assert len(embed.calls) == 1
    assert asking.counts()["hits"] == {"normalized": 2}


def test_another_spelling_is_a_hit_in_a_process_that_never_saw_the_first(make):
    """By the vector, which is nearly the same, and at any threshold."""
    index, store = NumpyIndex(), Shelf()
    make("semantic", vector_index=index, store=store)(GARDENS)
    second = make("semantic", vector_index=index, store=store, similarity_threshold=1.0)
    assert second.status("Please explain briefly what makes gardens work?") == ("semantic-hit", "normalized")
    assert second.status("Please explain slowly what makes gardens work?") == ("miss", "uncertain")


# --- streams


@pytest.mark.parametrize("streamed", [True, False], ids=["a stream", "plain"])
def test_the_other_form_answers_too(make, streamed):
    """What was streamed answers a plain paraphrase, and the other way round."""
    asking = make()
    usage = {"stream_options": {"include_usage": True}}
    first = asking.fetch(asked(GARDENS, stream=streamed, **usage))
    asking.face.chunks(first)
    second = asking.fetch(asked(reworded("gardens", "slowly"), stream=not streamed, **usage))
    chunks = asking.face.chunks(second)
    assert (second.cache.status, asking.calls) == ("semantic-hit", 1)
    assert answer_text("chat", b"".join(chunks)) == f"answer 1: {GARDENS}"
    assert (len(chunks) > 1) is not streamed


def test_a_stream_is_replayed_as_it_was(make):
    asking = make()
    first = asking.face.chunks(asking.fetch(asked(GARDENS, stream=True)))
    second = asking.fetch(asked(reworded("gardens", "slowly"), stream=True))
    assert second.cache.status == "semantic-hit"
    assert asking.face.chunks(second) == first
    assert len(first) > 5


def test_an_answer_in_the_other_form_only_is_no_reason_to_look_for_another(make):
    """The new answer joins it."""
    asking = make()
    bare = iter(chat_stream("no", "usage"))  # nothing plain can be made of it
    asking.face.chunks(asking.face.fetch(asking.cache, asked(GARDENS, stream=True), lambda _: bare))
    asking(reworded("gardens", "slowly"))
    assert asking.status(GARDENS) == ("miss", None)
    assert asking.counts()["lookups"] == 2
    assert asking.status(asked(GARDENS, stream=True))[0] == "hit"


def test_a_stream_left_half_way_is_not_compared(make):
    asking = make()
    answer = asking.fetch(asked(GARDENS, stream=True), controls={})
    if asking.face.name == "sync":
        next(iter(answer))
        answer.close()
    else:
        asking.face.run(_first_of(answer))
    asking.done()
    assert asking(reworded("gardens", "slowly")) == ("miss", f"answer 2: {reworded('gardens', 'slowly')}")


async def _first_of(answer) -> None:
    iterator = aiter(answer)
    await anext(iterator)
    await answer.aclose()


# --- what is answered from an exact repeat only

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PICTURE = [{"type": "text", "text": GARDENS}, {"type": "image_url", "image_url": {"url": FOX}}]
EXACT = {
    "many-answers": asked(GARDENS, n=2),
    "few-words": asked("And then what?"),
    "too-long": asked(f"{GARDENS} " * 400),
    "media": asked(PICTURE),
    "tool-result": talk(("user", "x"), ("assistant", "y"), ("tool", GARDENS)),
    "not-user": talk(("user", "x"), ("assistant", GARDENS)),
    "no-text": asked("  "),
}


@pytest.mark.parametrize(("reason", "body"), EXACT.items(), ids=EXACT)
def test_what_no_meaning_can_be_taken_from_is_answered_exactly(make, local, reason, body):
    upstream = []

    def call(_):
        upstream.append(1)
        return completion("fixed", choices=[*completion("fixed")["choices"]] * body.get("n", 1))

    asking = make(embedding_model=local)
    told = []
    for _ in range(2):
        answer = asking.face.fetch(asking.cache, body, call)
        told.append((answer.cache.status, answer.cache.detail, answer.cache.similarity))
    assert told == [("miss", reason, None), ("hit", None, None)]
    assert len(upstream) == 1
    counts = asking.counts()
    assert (counts["lookups"], counts["misses"], counts["exact_only"]) == (0, {}, {reason: 1})
    assert asking.cache._flow.semantic.index.index.count() == 0


def test_words_that_the_embedder_does_not_know_are_not_compared(make, local):
    """All that it does not know is one and the same to it."""
    asking = make(embedding_model=local)
    for animal in ("\U0001f980", "\U0001f9ad"):
        assert asking.status(f"Where does {animal} live in winter?") == ("miss", "unknown-words")
    assert asking.cache._flow.semantic.index.index.count() == 0
    assert asking.counts().get("error") is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_calls_a_tool_is_kept_for_its_own_question_only(make, stream):
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    plain = completion(choices=[{"index": 0, "message": message, "finish_reason": "tool_calls"}])
    pieces = sse(chunk(None, tool_calls=[{"index": 0, **CALL}]), chunk(None, "tool_calls"))
    asking = make()

    def ask(way: str) -> str:
        body = asked(reworded("gardens", way), stream=stream)
        answer = asking.face.fetch(asking.cache, body, lambda _: iter(pieces) if stream else plain)
        asking.face.chunks(answer)
        return answer.cache.status

    assert [ask("briefly"), ask("slowly"), ask("briefly")] == ["miss", "miss", "hit"]
    assert asking.cache._flow.semantic.index.index.count() == 0


@pytest.mark.parametrize("status", [500, 429, 200])
def test_errors_and_empty_answers_are_not_compared(make, status):
    asking = make()
    fails = Answered(status, b'{"error": {"message": "no"}}')
    for way in ("briefly", "slowly"):
        answer = asking.face.fetch(asking.cache, asked(reworded("gardens", way)), lambda _: fails)
        assert (answer.cache.status, answer.status) == ("miss", status)
    assert asking.cache._flow.semantic.index.index.count() == 0


class Answered:
    """A response as httpx gives it."""

    def __init__(self, status: int, content: bytes) -> None:
        self.status_code, self.content, self.headers = status, content, {"content-type": "application/json"}

    def json(self) -> object:
        return json.loads(self.content)


def test_a_key_of_the_hosts_own_means_exact_answers_only(make):
    asking = make(key=lambda kind, form: question_in(form))
    assert asking.status(GARDENS) == ("miss", None)
    assert asking.status(reworded("gardens", "slowly")) == ("miss", None)
    assert asking.status(GARDENS) == ("hit", None)
    assert asking.counts()["lookups"] == 0


# --- controls


def test_no_cache_asks_and_its_answer_takes_the_place(make):
    asking = make()
    assert asking(GARDENS) == ("miss", f"answer 1: {GARDENS}")
    assert asking(GARDENS, controls={"no-cache": True}) == ("miss", f"answer 2: {GARDENS}")
    assert asking(reworded("gardens", "slowly")) == ("semantic-hit", f"answer 2: {GARDENS}")
    assert asking.counts()["lookups"] == 2
    assert asking.cache._flow.semantic.index.index.count() == 1


def test_no_store_leaves_nothing_and_may_be_answered(make):
    asking = make()
    assert asking(GARDENS, controls={"no-store": True})[0] == "miss"
    assert asking(reworded("gardens", "slowly"))[0] == "miss"
    assert asking(reworded("gardens", "calmly"), controls={"no-store": True})[0] == "semantic-hit"
    assert asking.cache._flow.semantic.index.index.count() == 1


def test_what_is_over_is_not_served(make, clock):
    asking = make(clock=clock, ttl=600, ttl_jitter=0)
    assert asking(GARDENS, controls={"ttl": 10})[0] == "miss"
    clock.advance(9)
    assert asking(reworded("gardens", "slowly"))[0] == "semantic-hit"
    clock.advance(2)
    assert asking(reworded("gardens", "slowly"))[0] == "miss"
    assert asking(reworded("gardens", "calmly")) == (
        "semantic-hit",
        f"answer 2: {reworded('gardens', 'slowly')}",
    )


def test_a_ttl_of_zero_keeps_nothing(make):
    asking = make()
    assert asking(GARDENS, controls={"ttl": 0})[0] == "miss"
    assert asking(reworded("gardens", "slowly"))[0] == "miss"


def test_max_age_holds_for_like_questions_too(make, clock):
    asking = make(clock=clock)
    asking(GARDENS)
    clock.advance(30)
    assert asking(reworded("gardens", "slowly"), controls={"s-maxage": 31})[0] == "semantic-hit"
    assert asking(reworded("gardens", "slowly"), controls={"s-maxage": 29})[0] == "miss"


def test_a_like_answer_stands_in_for_ones_own_that_is_too_old(make, clock):
    asking = make(clock=clock)
    asking(GARDENS)
    clock.advance(30)
    slowly = reworded("gardens", "slowly")
    asking(slowly, controls={"no-cache": True})
    asking.done()
    assert asking(GARDENS, controls={"s-maxage": 10}) == ("semantic-hit", f"answer 2: {slowly}")


@pytest.mark.parametrize("late", [1, 59])
def test_a_stale_answer_is_served_to_its_own_question_only(make, clock, late):
    asking = make(clock=clock, ttl=100, ttl_jitter=0, stale_while_revalidate=60)
    asking(GARDENS)
    clock.advance(100 + late)
    assert asking(reworded("gardens", "slowly"))[0] == "miss"
    assert asking.counts()["misses"] == {"none": 1, "unsuitable": 1}
    assert asking(GARDENS) == ("stale", f"answer 1: {GARDENS}")
    asking.done()
    assert asking(GARDENS) == ("hit", f"answer 3: {GARDENS}")


def test_what_a_stale_answer_is_refreshed_with_is_not_one_of_like_meaning(make, clock):
    asking = make(clock=clock, ttl=100, ttl_jitter=0, stale_while_revalidate=60)
    asking(GARDENS)
    clock.advance(90)
    asking(reworded("gardens", "slowly"), controls={"no-cache": True})
    clock.advance(20)
    assert asking(GARDENS)[0] == "stale"
    asking.done()
    assert (asking(GARDENS), asking.calls) == (("hit", f"answer 3: {GARDENS}"), 3)


def test_namespaces_of_requests_are_apart(make):
    asking = make()
    asking(GARDENS, controls={"namespace": "a"})
    slowly, calmly = reworded("gardens", "slowly"), reworded("gardens", "calmly")
    assert asking(slowly, controls={"namespace": "b"})[0] == "miss"
    assert asking(calmly)[0] == "miss"
    assert asking(calmly, controls={"namespace": "a"})[0] == "semantic-hit"


def test_a_namespace_that_changes_in_use_leaves_the_others_answers_behind(make):
    asking = make(namespace="one")
    asking(GARDENS)
    asking.cache.update(namespace="two")
    assert asking(reworded("gardens", "slowly"))[0] == "miss"
    asking.cache.update(namespace="one")
    assert asking(reworded("gardens", "calmly")) == ("semantic-hit", f"answer 1: {GARDENS}")


def test_by_consent_only(make):
    asking = make(mode="default_off")
    agreed = {"use-cache": True}
    assert asking(GARDENS)[0] == "bypass"
    assert asking(GARDENS, controls=agreed)[0] == "miss"
    assert asking(reworded("gardens", "slowly"))[0] == "bypass"
    assert asking(reworded("gardens", "slowly"), controls=agreed)[0] == "semantic-hit"


def test_endpoints_that_are_not_cached_are_not_compared(make):
    asking = make(supported_call_types=["embedding"])
    assert [asking(GARDENS)[0], asking(reworded("gardens", "slowly"))[0]] == ["bypass", "bypass"]
    assert asking.counts()["lookups"] == 0


def test_an_answer_too_large_to_keep_is_not_compared(make):
    asking = make(max_entry_bytes=100)
    assert [asking(GARDENS)[0], asking(reworded("gardens", "slowly"))[0]] == ["miss", "miss"]
    assert asking.cache._flow.semantic.index.index.count() == 0


def test_models_of_a_caching_group_share_answers_and_others_do_not(make):
    asking = make(caching_groups=[["m", "n"]])
    asking(GARDENS)
    assert asking(asked(reworded("gardens", "slowly"), model="n"))[0] == "semantic-hit"
    assert asking(asked(reworded("gardens", "slowly"), model="o"))[0] == "miss"


@pytest.mark.parametrize("field", [{"temperature": 0.5}, {"user": "u"}, {"max_tokens": 5}, {"seed": 1}])
def test_other_parameters_are_another_question(make, field):
    asking = make()
    asking(GARDENS)
    assert asking(asked(reworded("gardens", "slowly"), **field))[0] == "miss"
    assert asking(asked(reworded("gardens", "calmly"), **field))[0] == "semantic-hit"
    assert asking.calls == 2


# --- what is removed elsewhere


def test_what_another_process_removed_is_not_served(make):
    """The row goes with it, which is seen at the next look."""
    index, store = NumpyIndex(), Shelf()
    one, other = (make("semantic", vector_index=index, store=store) for _ in range(2))
    one(GARDENS)
    assert other(reworded("gardens", "slowly"))[0] == "semantic-hit"
    store.values.clear()
    assert other.status(reworded("gardens", "calmly")) == ("miss", "gone")
    other.done()
    assert [each.row.text for each in index.search(*_asked_for(other))] == [reworded("gardens", "calmly")]


def test_a_store_that_fails_to_say_costs_no_row(make):
    index, store = NumpyIndex(), Shelf()
    asking = make("semantic", vector_index=index, store=store)
    asking(GARDENS)
    store.failing = True
    assert asking.status(reworded("gardens", "slowly"))[0] == "miss"
    asking.done()
    assert asking.counts()["misses"] == {"none": 1, "gone": 1}
    assert index.count() == 1
    store.failing = False
    body = asked(reworded("gardens", "slowly"))
    wait_for(lambda: asking.face.get(asking.cache, body), "the store is asked again")
    assert asking(body) == ("semantic-hit", f"answer 1: {GARDENS}")


REMOVALS = {
    "delete": lambda asking, key: asking.face.do(asking.cache, "delete", key),
    "flush": lambda asking, key: asking.face.do(asking.cache, "flush"),
    "report": lambda asking, key: asking.face.do(asking.cache, "report", key),
}


@pytest.mark.parametrize("how", REMOVALS)
def test_what_is_removed_is_gone_by_meaning_too(make, how):
    asking = make()
    key = asking.fetch(asked(GARDENS)).cache.key
    asking(reworded("rivers", "briefly"), scope="x")
    assert int(REMOVALS[how](asking, key)) == (2 if how == "flush" else 1)
    assert asking.cache._flow.semantic.index.index.count() == (0 if how == "flush" else 1)
    assert asking(reworded("gardens", "slowly"))[0] == "miss"


def test_what_is_removed_by_its_tag_is_gone_by_meaning_too(make):
    asking = make()
    asking(GARDENS, controls={"tags": ["a"]})
    if asking.face.name == "sync":
        count = asking.cache.invalidate(tags=["a"])
    else:
        count = asking.face.run(asking.cache.ainvalidate(tags=["a"]))
    assert count == 1
    assert asking(reworded("gardens", "slowly"))[0] == "miss"
    assert asking.cache._flow.semantic.index.index.count() == 1


def test_purging_removes_what_is_over(make, clock):
    asking = make(clock=clock, ttl=10, ttl_jitter=0)
    asking(GARDENS)
    asking(reworded("rivers", "briefly"), controls={"ttl": 100})
    clock.advance(20)
    assert asking.face.do(asking.cache, "purge_expired") == 1
    assert asking.cache._flow.semantic.index.index.count() == 1


def _asked_for(asking: Asking) -> tuple[str, bytes, int]:
    """What an index is asked for a question about gardens."""
    plan = asking.cache.plan("chat", asked(GARDENS))
    tier = asking.cache._flow.semantic
    return tier._scope(plan, tier._question(plan)), toy_bytes(GARDENS), 8


class Shelf:
    """A store of the host's own that may fail."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.failing = False

    def _check(self) -> None:
        if self.failing:
            raise OSError("the shelf is locked")

    def get(self, key: str) -> bytes | None:
        self._check()
        return self.values.get(key)

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        self._check()
        self.values[key] = value

    def delete(self, keys) -> int:
        self._check()
        return sum(self.values.pop(key, None) is not None for key in keys)

    def flush(self, namespace: str) -> int:
        self._check()
        count = len(self.values)
        self.values.clear()
        return count

    def close(self) -> None:
        """Nothing to release."""


# --- without a call


def test_get_finds_by_meaning(make):
    asking = make()
    slowly = asked(reworded("gardens", "slowly"))
    assert asking.face.get(asking.cache, slowly) is None
    asking.face.set(asking.cache, asked(GARDENS), completion("stored"))
    asking.done()
    found = asking.face.get(asking.cache, slowly)
    assert (found.cache.status, found.cache.detail, found.cache.tier) == (
        "semantic-hit",
        "semantic",
        "semantic",
    )
    assert found.cache.similarity == pytest.approx(0.942, abs=0.001)
    assert found.json() == completion("stored")
    assert asking.face.get(asking.cache, slowly, scope="other") is None


def test_a_decorated_function_is_asked_by_meaning_where_its_question_is_named(make):
    asking = make(question_field="arguments.question")
    calls = []
    if asking.face.name == "sync":

        @asking.cache.cached
        def answer(question: str, tone: str = "dry") -> str:
            calls.append(question)
            return f"{tone}: {question}"

        ask = answer
    else:

        @asking.cache.cached
        async def answer(question: str, tone: str = "dry") -> str:
            calls.append(question)
            return f"{tone}: {question}"

        def ask(*args: str) -> str:
            return asking.face.run(answer(*args))

    assert ask(GARDENS) == f"dry: {GARDENS}"
    assert ask(reworded("gardens", "slowly")) == f"dry: {GARDENS}"
    assert ask(reworded("gardens", "slowly"), "warm") == f"warm: {reworded('gardens', 'slowly')}"
    assert len(calls) == 2


# --- what is told


def test_what_stats_tell_after_a_known_sequence(make):
    asking = make()
    for question in (
        GARDENS,  # a miss
        GARDENS,  # exact
        "Please explain briefly what makes gardens work.",  # normalised
        reworded("gardens", "slowly"),  # by meaning
        reworded("rivers", "briefly"),  # nothing near
        "And then what?",
    ):
        asking(question)
    asking(reworded("gardens", "slowly") + " 12")  # by meaning
    asking(reworded("gardens", "slowly") + " 12", controls={"no-cache": True})
    asking(reworded("gardens", "slowly") + " 13")  # against 12, with which it conflicts
    told = asking.cache.stats()
    assert told["semantic"] == {
        "lookups": 6,
        "hits": {"normalized": 1, "semantic": 2},
        "misses": {"none": 1, "uncertain": 1, "veto-number": 1},
        "exact_only": {"few-words": 1},
        "hit_rate": 3 / 6,
        "error_rate": None,
        "threshold": 0.5,
        "embedding": {"calls": 5, "hits": 1, "joined": 0, "late": 0, "failed": 0, "refused": 0},
    }
    assert (told["hit"], told["miss"]) == (4, 5)


def test_hooks_are_told_of_the_similarity(make):
    events = []
    asking = make(hooks=[events.append])
    asking(GARDENS)
    asking(reworded("gardens", "slowly"))
    told = [
        (each.name, each.detail, each.tier, each.cache_hit, each.similarity)
        for each in events
        if each.name in ("hit", "miss")
    ]
    assert told == [
        ("miss", "none", None, False, 0.0),
        ("hit", "semantic", "semantic", True, pytest.approx(0.942, abs=0.001)),
    ]


# --- shadow


def test_in_the_shadow_nothing_is_served_and_all_is_counted(make):
    asking = make(shadow=True)
    asking(GARDENS)
    assert asking.status(reworded("gardens", "slowly")) == ("miss", "shadow")
    assert asking.status("Please explain briefly what makes gardens work.") == ("miss", "shadow")
    assert asking.status(reworded("rivers", "slowly")) == ("miss", "uncertain")
    assert asking.status(GARDENS) == ("hit", None)
    assert asking.counts()["misses"] == {"none": 1, "shadow": 2, "uncertain": 1}
    assert asking.counts()["hits"] == {}


# --- failures


class Broken(NumpyIndex):
    """An index that raises at one operation."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at: str | None = at

    def _operation(self, name: str, *args):
        if name == self.at:
            raise OSError(f"no {name}")
        return getattr(super(), name)(*args)

    def search(self, *args):
        return self._operation("search", *args)

    def add(self, *args):
        return self._operation("add", *args)

    def remove(self, *args):
        return self._operation("remove", *args)

    def close(self):
        return self._operation("close")


def failures(caplog) -> list[str]:
    """What was warned of, since the last time."""
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    caplog.clear()
    return lines


@pytest.mark.parametrize(
    ("at", "doing", "detail"), [("search", "a look-up", "error"), ("add", "storing", "none")]
)
def test_an_index_that_fails_is_a_plain_miss_and_told_once_a_burst(make, caplog, at, doing, detail):
    index = Broken(at)
    asking = make(vector_index=index)
    for topic in TOPICS[:5]:
        assert asking.status(reworded(topic, "briefly")) == ("miss", detail)
        assert asking.status(reworded(topic, "briefly")) == ("hit", None)
    assert asking.counts()["error"] == 5
    assert failures(caplog) == [f"the semantic cache failed at {doing}: OSError: no {at}"]
    index.at = None
    asking(reworded("castles", "briefly"))
    assert asking(reworded("castles", "slowly"))[0] == "semantic-hit"
    index.at = at
    asking(reworded("harbours", "briefly"))
    assert len(failures(caplog)) == 1


class Remote:
    """An index with an async face only, which answers when its gate is open."""

    dimensions = None

    def __init__(self) -> None:
        self.index, self.gate = NumpyIndex(), True

    def __getattr__(self, name: str):
        if not name.startswith("a"):
            raise AttributeError(name)
        method = getattr(self.index, name[1:])

        async def operation(*args):
            while not self.gate:  # noqa: ASYNC110 - it never opens while this waits
                await asyncio.sleep(0.01)
            return method(*args)

        return operation


def test_an_index_that_does_not_answer_costs_its_budget():
    index = Remote()
    asking = Asking(
        AsyncFace(),
        CacheManager(
            "semantic",
            embedding_model=toy,
            embedding_budget=PATIENT,
            similarity_threshold=0.5,
            vector_index=index,
            store_timeout=0.05,
        ),
    )
    assert [asking.status(GARDENS), asking.status(reworded("gardens", "slowly"))] == [
        ("miss", "none"),
        ("semantic-hit", "semantic"),
    ]
    index.gate = False
    assert asking.status(reworded("rivers", "slowly")) == ("miss", "error")
    asking.done()
    asking.face.close()


def test_an_index_for_async_callers_only_is_a_plain_miss_for_sync_ones(caplog):
    asking = Asking(
        SyncFace(),
        CacheManager(
            "semantic",
            embedding_model=toy,
            embedding_budget=PATIENT,
            similarity_threshold=0.5,
            vector_index=Remote(),
        ),
    )
    assert [asking.status(GARDENS) for _ in range(2)] == [("miss", "error"), ("hit", None)]
    assert "Remote has no sync search()" in caplog.text
    asking.cache.close()


def test_an_index_that_cannot_remove_or_close_stops_nobody(make, caplog):
    index = Broken("remove")
    asking = make(vector_index=index)
    key = asking.fetch(asked(GARDENS)).cache.key
    assert asking.face.do(asking.cache, "delete", key) == 1
    assert asking(reworded("gardens", "slowly"))[0] == "miss"
    index.at = "close"
    asking.face.do(asking.cache, "close")
    index.at = None
    assert failures(caplog) == [
        "the semantic cache failed at removing: OSError: no remove",
        "the semantic cache failed at closing: OSError: no close",
    ]


def test_a_scope_that_cannot_be_computed_is_a_plain_miss(make, monkeypatch):
    asking = make()

    def fails(*args, **kwargs):
        raise UnkeyableError("no")

    monkeypatch.setattr(Question, "scope", fails)
    assert asking.status(GARDENS) == ("miss", "error")
    assert asking.status(GARDENS) == ("hit", None)
    assert asking.status(reworded("gardens", "slowly")) == ("miss", "error")
    monkeypatch.undo()
    assert asking.status(reworded("gardens", "calmly"))[0] == "miss"
    assert asking.status(reworded("gardens", "boldly"))[0] == "semantic-hit"


def test_vectors_of_another_model_are_a_plain_miss(make, caplog):
    """Such as an embedding model that was replaced under its name."""
    index = NumpyIndex()
    make(vector_index=index)(GARDENS)
    other = make(vector_index=index, embedding_model=lambda texts: [[1.0, 0.0]] * len(texts))
    assert other.status(reworded("gardens", "slowly")) == ("miss", "error")
    assert other.counts()["error"] == 2
    assert index.count() == 1


def test_a_request_cancelled_while_it_embeds_leaves_the_vector(face):
    """And the next one is answered as ever."""
    embed = Held()
    asking = Asking(
        face,
        CacheManager("semantic", embedding_model=embed, embedding_budget=PATIENT, similarity_threshold=0.5),
    )
    if face.name == "async":
        face.run(_cancelled(asking, embed))
    embed.release()
    assert asking(GARDENS)[0] == "miss"
    assert asking(reworded("gardens", "slowly"))[0] == "semantic-hit"
    assert embed.calls == [[GARDENS], [reworded("gardens", "slowly")]]
    asking.done()


async def _cancelled(asking: Asking, embed: Held) -> None:
    task = asyncio.create_task(asking.cache.afetch(asked(GARDENS), asking.upstream))
    while not embed.calls:  # noqa: ASYNC110 - another thread says so
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_event_loops_that_end_while_they_embed_take_nothing_with_them():
    embed = Held()
    cache = CacheManager("semantic", embedding_model=embed, embedding_budget=0.01, similarity_threshold=0.5)
    upstream = Upstream()

    async def first():
        answer = await cache.afetch(asked(GARDENS), upstream)
        embed.release()  # else the end of the loop would wait for it
        return answer

    assert asyncio.run(first()).cache.detail == "embedding-late"
    cache._flow.semantic.embedder.budget = PATIENT
    answer = asyncio.run(cache.afetch(asked(reworded("gardens", "slowly")), upstream))
    assert answer.cache.status == "miss"
    answer = asyncio.run(cache.afetch(asked(reworded("gardens", "calmly")), upstream))
    assert answer.cache.status == "semantic-hit"
    assert cache._flow.flights._flights == {}


def test_a_forked_process_goes_on(make):
    """As under a server that preloads the app: what was stored before is found in the child."""
    asking = make()
    asking(GARDENS)
    asking.done()
    if asking.face.name == "async":
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads are there; that is the point
        child = os.fork()
    if child == 0:
        told = [asking(reworded("gardens", "slowly"))[0], asking(reworded("rivers", "slowly"))[0]]
        told.append(asking(reworded("rivers", "calmly"))[0])
        os.write(writing, " ".join(told).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "semantic-hit miss semantic-hit"
    os.waitpid(child, 0)


# --- threads and an event loop at once


def test_every_answer_belongs_to_its_question():
    """Twenty topics in all their ways, asked by eight threads and an event loop through one manager."""
    cache = CacheManager("semantic", embedding_model=toy, embedding_budget=PATIENT, similarity_threshold=0.5)
    upstream, wrong, statuses = Upstream(), [], Counter()

    def check(topic: str, answer) -> None:
        text = answer.json()["choices"][0]["message"]["content"]
        statuses[answer.cache.status] += 1
        if topic not in text:
            wrong.append((topic, text))

    def thread(seed: int) -> None:
        questions = wordings()
        Random(seed).shuffle(questions)
        for topic, question in questions[:150]:
            check(topic, cache.fetch(asked(question), upstream))

    async def loop() -> None:
        questions = wordings()
        Random(99).shuffle(questions)

        async def one(topic: str, question: str) -> None:
            check(topic, await cache.afetch(asked(question), upstream))

        for at in range(0, 150, 10):
            await asyncio.gather(*[one(*each) for each in questions[at : at + 10]])

    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(thread, seed) for seed in range(8)]
        futures.append(pool.submit(asyncio.run, loop()))
        for future in futures:
            future.result()
    assert wrong == []
    assert sum(statuses.values()) == 9 * 150
    assert statuses["semantic-hit"] > 9 * 150 * 0.2
    assert upstream.calls < 9 * 150 * 0.3
    assert cache.stats()["semantic"].get("error") is None
