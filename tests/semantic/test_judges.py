"""Judges of every kind, on both faces: the answers' vectors, a function, an object, a model of a Router's."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from llm_middleware import ConfigError, Router
from llm_middleware.semantic.embed_cache import CachedEmbedder
from llm_middleware.semantic.embedders import callable_embedder
from llm_middleware.semantic.judges import (
    CallableJudge,
    EmbeddingJudge,
    Judge,
    Pair,
    RouterJudge,
    made_judge,
)
from llm_middleware.testing import FakeUpstream
from tests.semantic.conftest import reworded, toy
from tests.support import completion

PAIR = Pair("What is the capital of France?", "Paris.", "Which city is France's capital?", "It is Paris.")
LONG = "The engine turns slowly because the oil is cold and thick in winter. "


def judged(face, judge: Judge, pair: Pair) -> bool | None:
    return judge.judge(pair) if face.name == "sync" else face.run(judge.ajudge(pair))


def answers(one: str, other: str) -> Pair:
    return Pair("q", one, "r", other)


# --- by the answers' vectors


@pytest.fixture
def by_vectors(local):
    embedder = CachedEmbedder(local)
    return EmbeddingJudge(embedder), embedder


SAME = {
    "the same words": answers("It is Paris.", " It  is\nParis."),
    "a rewording": answers("Open the settings page, choose reset.", "On the settings page, choose reset."),
    "a yes before the sentence": answers("Yes, it is safe to eat.", "It is safe to eat."),
    "a no before the sentence": answers("No, you can't rename it later on.", "You can't rename it later on."),
}  # fmt: skip
OTHER = {
    "another subject": answers("You can reset your password on the settings page.", "Bake it for an hour."),
    "a number": answers("Take 10 mg twice a day.", "Take 100 mg twice a day."),
    "yes and no": answers("Yes.", "No."),
    "yes and no, with the sentence": answers("Yes, that is safe to eat.", "No, that is not safe to eat."),
    "yes and no, a long one": answers("Yes. " + "You can use it. " * 40, "No. " + "You can use it. " * 40),
    "true and false": answers("True: it does.", "False: it does."),
    "a negation": answers("That is safe to eat.", "That is not safe to eat."),
}  # fmt: skip


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_answers_alike(face, by_vectors, pair):
    assert judged(face, by_vectors[0], pair) is True


@pytest.mark.parametrize("pair", OTHER.values(), ids=OTHER)
def test_answers_unlike(face, by_vectors, pair):
    assert judged(face, by_vectors[0], pair) is False


def test_long_answers_are_read_in_pieces(face, by_vectors):
    """What is longer than the embedder reads is not cut: an end that differs counts."""
    judge, embedder = by_vectors
    start = LONG * 30
    assert not embedder.fits(start)
    alike = answers(start + "Warm it up first.", start + "Let it warm up first.")
    unlike = answers(LONG * 12 + "Warm it. " * 2, LONG * 12 + "Bread needs yeast, salt and flour. " * 60)
    assert judged(face, judge, alike) is True
    assert judged(face, judge, unlike) is False


def test_answers_too_long_even_in_pieces_are_not_judged(face, by_vectors):
    judge, embedder = by_vectors
    assert judged(face, judge, answers(LONG * 400, "short")) is None
    one_sentence = "word and " * 300
    assert judged(face, judge, answers(one_sentence, "short")) is None
    assert judged(face, judge, answers(LONG * 400, LONG * 400)) is True  # the same words
    assert embedder.stats.calls == 0


def test_answers_that_the_embedder_cannot_read_are_not_judged(face, by_vectors):
    judge, embedder = by_vectors
    assert judged(face, judge, answers("\U0001f980 \U0001f9ad", "\U0001f9a5")) is None
    assert judged(face, judge, answers("", "something")) is None
    assert embedder.stats.calls == 1


def test_the_threshold_of_the_answers(face):
    embedder = CachedEmbedder(callable_embedder(toy))
    pair = answers(reworded("gardens", "briefly"), reworded("gardens", "slowly"))  # 0.941
    assert judged(face, EmbeddingJudge(embedder, 0.95), pair) is False
    assert judged(face, EmbeddingJudge(embedder, 0.94), pair) is True


# --- functions and objects


@pytest.mark.parametrize("said", [True, False, None])
def test_a_function(face, said):
    given = []

    def judge(pair: Pair) -> bool | None:
        given.append(pair)
        return said

    assert judged(face, CallableJudge(judge), PAIR) is said
    assert given == [PAIR]


@pytest.mark.parametrize("said", ["yes", 1, 0, [], object()])
def test_only_true_and_false_are_verdicts(face, said):
    assert judged(face, CallableJudge(lambda pair: said), PAIR) is None


def test_an_async_function():
    async def judge(pair: Pair) -> bool:
        await asyncio.sleep(0)
        return pair == PAIR

    class Callable:
        async def __call__(self, pair: Pair) -> bool:
            await asyncio.sleep(0)
            return True

    assert asyncio.run(CallableJudge(judge).ajudge(PAIR)) is True
    assert asyncio.run(CallableJudge(lambda pair: judge(pair)).ajudge(PAIR)) is True
    assert asyncio.run(CallableJudge(Callable()).ajudge(PAIR)) is True


def test_an_async_function_that_waits_for_nothing_serves_sync_callers_too():
    async def judge(pair: Pair) -> bool:
        return True

    assert CallableJudge(judge).judge(PAIR) is True


def test_what_a_function_raises_is_raised(face):
    def judge(pair: Pair) -> bool:
        raise OSError("no such judge")

    with pytest.raises(OSError, match="no such judge"):
        judged(face, CallableJudge(judge), PAIR)


def test_functions_that_take_long_take_no_thread_of_the_event_loop():
    """Which are few, and are needed for embeddings."""
    gate, names = threading.Event(), set()

    def judge(pair: Pair) -> bool:
        names.add(threading.current_thread().name)
        return gate.wait(30)

    async def many() -> list[bool | None]:
        judging = [asyncio.create_task(CallableJudge(judge).ajudge(PAIR)) for _ in range(64)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 30) == "free"
        gate.set()
        return await asyncio.gather(*judging)

    assert asyncio.run(many()) == [True] * 64
    assert names == {"llm-middleware-background"}


class Own:
    def judge(self, pair: Pair) -> bool:
        return True

    async def ajudge(self, pair: Pair) -> bool:
        return True


def test_what_a_setting_may_name():
    embedder = CachedEmbedder(callable_embedder(toy))
    own = Own()
    assert isinstance(own, Judge)
    assert made_judge(own, embedder, None) is own
    assert isinstance(made_judge(None, embedder, None), EmbeddingJudge)
    assert isinstance(made_judge(lambda pair: True, embedder, None), CallableJudge)


def test_what_a_setting_may_not_name():
    embedder = CachedEmbedder(callable_embedder(toy))
    router = Router([{"model_name": "m", "litellm_params": {"model": "openai/m", "api_key": "k"}}])
    for judge, given, message in (
        (5, None, "judge: expected a function or a model's name, got 5"),
        ("m", None, "judge: 'm' is a model: give the router that has it"),
        ("n", router, "judge: the router has no model 'n'; it has m"),
    ):
        with pytest.raises(ConfigError) as caught:
            made_judge(judge, embedder, given)
        assert (str(caught.value), caught.value.param) == (message, "judge")


# --- a model of a Router's


@pytest.fixture
def upstream():
    with FakeUpstream() as server:
        yield server


def router_of(upstream: FakeUpstream) -> Router:
    params = {"model": "openai/judge-up", "api_base": upstream.url, "api_key": "sk-x"}
    return Router([{"model_name": "judge", "litellm_params": params}], num_retries=0)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("YES", True),
        ("yes.", True),
        ("  No, the numbers differ", False),
        ("NO", False),
        ("Perhaps", None),
        ("", None),
        (None, None),
    ],
)
def test_what_a_model_says(face, upstream, said, verdict):
    upstream.fail_next(200, body=completion(said))
    judge = RouterJudge(router_of(upstream), "judge")
    assert judged(face, judge, PAIR) is verdict
    [call] = upstream.calls
    sent = call.json
    assert (sent["model"], sent["temperature"]) == ("judge-up", 0)
    [message] = sent["messages"]
    assert message["role"] == "user"
    for text in (PAIR.question, PAIR.answer, PAIR.asked, PAIR.fresh):
        assert text in message["content"]


def test_braces_in_texts_are_texts(face, upstream):
    upstream.fail_next(200, body=completion("YES"))
    pair = Pair("{answer}", "{0} %s {", "}{", json.dumps({"a": {}}))
    assert judged(face, RouterJudge(router_of(upstream), "judge"), pair) is True
    content = upstream.calls[0].json["messages"][0]["content"]
    assert "First question: {answer}\n\nAnswer to the first question: {0} %s {\n\n" in content


def test_texts_that_are_too_long_are_not_shown(face, upstream):
    judge = RouterJudge(router_of(upstream), "judge", most=20)
    assert judged(face, judge, Pair("q", "x" * 21, "r", "y")) is None
    assert upstream.count == 0


def test_a_model_that_fails(face, upstream):
    upstream.fail_next(500, n=3)
    with pytest.raises(Exception, match="fake failure 500"):
        judged(face, RouterJudge(router_of(upstream), "judge"), PAIR)


# --- in a cache


@pytest.mark.parametrize("kind", ["function", "object", "router", "vectors"])
def test_every_kind_teaches(make, face, upstream, local, kind):
    router = router_of(upstream)
    judges = {"function": lambda pair: True, "object": Own(), "router": "judge", "vectors": None}
    asking = make(max_error_rate=0.05, judge=judges[kind], router=router)
    if kind == "vectors":
        asking = make(
            max_error_rate=0.05, embedding_model=local, upstream=lambda body: completion("On page 3.")
        )
    upstream.fail_next(200, n=2, body=completion("YES"))
    if kind == "vectors":
        questions = ["How do I reset my password?", "How can I reset my password?"]
    else:
        questions = [reworded("gardens", way) for way in ("briefly", "slowly", "kindly")]
    for question in questions:
        assert asking.status(question)[0] == "miss"
        asking.done()
    told = asking.counts()
    assert told["judged-right"] == len(questions) - 1
    assert told.get("judge-error") is None
    if kind == "router":
        assert upstream.count == 2
        face.do(router, "close")


def test_an_async_judge_teaches_async_callers_and_is_told_to_sync_ones(make, face):
    async def judge(pair: Pair) -> bool:
        await asyncio.sleep(0)
        return True

    asking = make(max_error_rate=0.05, judge=judge)
    for way in ("briefly", "slowly"):
        asking(reworded("gardens", way))
        asking.done()
    told = asking.counts()
    assert told.get("judged-right", 0) == (1 if face.name == "async" else 0)
    assert told.get("judge-error", 0) == (0 if face.name == "async" else 1)
