"""Lists of embedding inputs, answered input by input."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_middleware import CacheManager
from llm_middleware.caching.batch import Batch, joined, split

PATH = "/v1/embeddings"


def vector(item: object) -> list[float]:
    return [float(len(str(item))), float(sum(map(ord, str(item))))]


def embed(body: dict, *, reverse: bool = False) -> dict:
    """An answer to all inputs, in order or turned round; three tokens each."""
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    if inputs and all(isinstance(item, int) for item in inputs):
        inputs = [inputs]
    rows = [
        {"object": "embedding", "index": index, "embedding": vector(item)}
        for index, item in enumerate(inputs)
    ]
    usage = {"prompt_tokens": 3 * len(rows), "total_tokens": 3 * len(rows)}
    return {"object": "list", "model": "e", "data": rows[::-1] if reverse else rows, "usage": usage}


def body_of(value: object, **more: object) -> dict:
    return {"model": "e", "input": value, **more}


def vectors(answer: dict) -> list:
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return [row["embedding"] for row in answer["data"]]


class Provider:
    """Embeds, and keeps what it was asked."""

    def __init__(self, **options: bool) -> None:
        self.inputs: list[object] = []
        self.options = options

    def __call__(self, request: object) -> dict:
        body = request if isinstance(request, dict) else request.json()
        self.inputs.append(body["input"])
        return embed(body, **self.options)


@pytest.fixture
def post(front):
    cache = CacheManager(ttl_jitter=0)

    def make(provider: Provider):
        client = front(provider, cache=cache)
        return lambda body: client.post(body, path=PATH)

    make.cache = cache
    return make


def test_c111_partial_and_whole_hits_say_how_much_was_stored(post) -> None:
    provider = Provider()
    send = post(provider)
    first = send(body_of(["a", "b", "c"]))
    assert (first.cache, first.cache_status) == ("miss", "llm-middleware; fwd=miss; stored")
    partial = send(body_of(["x", "a", "b", "c"]))
    assert partial.cache == "partial"
    assert partial.cache_status == 'llm-middleware; fwd=partial; stored; detail="3/4"'
    assert vectors(partial.json()) == [vector(item) for item in ("x", "a", "b", "c")]
    whole = send(body_of(["c", "x"]))
    assert (whole.cache, whole.cache_status) == ("hit", "llm-middleware; hit; ttl=3599")
    assert vectors(whole.json()) == [vector("c"), vector("x")]
    assert provider.inputs == [["a", "b", "c"], ["x"]]


def test_c111_one_of_a_list_is_the_same_as_it_alone(post) -> None:
    provider = Provider()
    send = post(provider)
    send(body_of(["a", "b"]))
    assert [send(body_of("a")).cache, send(body_of(["b"])).cache] == ["hit", "hit"]
    assert send(body_of("a")).json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


@pytest.mark.parametrize("reverse", [False, True])
def test_only_what_is_missing_goes_upstream_each_once(face, reverse: bool) -> None:
    cache, provider = CacheManager(), Provider(reverse=reverse)
    face.fetch(cache, body_of(["a", "b"]), provider, kind="embedding")
    answer = face.fetch(cache, body_of(["x", "a", "y", "b", "x"]), provider, kind="embedding")
    assert (answer.cache.status, answer.cache.detail) == ("partial", "2/5")
    assert vectors(answer.json()) == [vector(item) for item in ("x", "a", "y", "b", "x")]
    assert answer.json()["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    assert provider.inputs == [["a", "b"], ["x", "y"]]


def test_inputs_that_are_tokens(face) -> None:
    cache, provider = CacheManager(), Provider()
    face.fetch(cache, body_of([1, 2, 3]), provider, kind="embedding")
    answer = face.fetch(cache, body_of([[1, 2, 3], [4]]), provider, kind="embedding")
    assert (answer.cache.status, answer.cache.detail) == ("partial", "1/2")
    assert provider.inputs == [[1, 2, 3], [[4]]]


def test_an_error_for_the_rest_is_the_answer_and_nothing_is_lost(front) -> None:
    cache = CacheManager()
    good = Provider()
    front(good, cache=cache).post(body_of(["a"]), path=PATH)
    failing = front(lambda seen: (429, {"content-type": "application/json"}, b'{"error": {}}'), cache=cache)
    reply = failing.post(body_of(["a", "b"]), path=PATH)
    assert (reply.status, reply.body) == (429, b'{"error": {}}')
    assert reply.cache_status == "llm-middleware; fwd=partial; detail=upstream-error"
    assert front(good, cache=cache).post(body_of(["a"]), path=PATH).cache == "hit"


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"index": 0, "embedding": []}] * 2,
        [{"index": 1, "embedding": []}],
        [{"embedding": []}],
        [{"index": True, "embedding": []}],
        "x",
    ],
)
def test_an_answer_that_does_not_match_the_rest_is_a_502(front, data: object) -> None:
    """It cannot be put together, and half of it is no answer."""
    cache = CacheManager()
    front(Provider(), cache=cache).post(body_of(["a"]), path=PATH)
    odd = front(lambda seen: {"object": "list", "data": data}, cache=cache)
    reply = odd.post(body_of(["a", "b"]), path=PATH)
    assert reply.status == 502
    assert reply.json()["error"]["code"] == "unexpected_upstream_answer"
    assert front(Provider(), cache=cache).post(body_of("b"), path=PATH).cache == "miss"


def test_no_cache_asks_for_the_whole_list_again(post) -> None:
    provider = Provider()
    send = post(provider)
    send(body_of(["a", "b"]))
    again = send({**body_of(["a", "b"]), "cache": {"no-cache": True}})
    assert (again.cache, again.cache_status) == ("miss", "llm-middleware; fwd=request; stored")
    assert provider.inputs == [["a", "b"], ["a", "b"]]


def test_another_encoding_is_another_answer(post) -> None:
    provider = Provider()
    send = post(provider)
    assert send(body_of(["a", "b"])).cache == "miss"
    assert send(body_of(["a", "b"], encoding_format="base64")).cache == "miss"
    assert send(body_of(["a", "b"], encoding_format="float")).cache == "hit"


def test_c32_sync_then_async_then_sync_and_an_entry_of_another_endpoint() -> None:
    """One store, both faces; an entry of another kind under the same key is a miss, never an error."""
    cache, provider = CacheManager(), Provider()
    cache.fetch(body_of(["a", "b"]), provider, kind="embedding")
    assert asyncio.run(cache.afetch(body_of(["a", "b"]), provider, kind="embedding")).cache.status == "hit"
    assert cache.fetch(body_of(["a", "b"]), provider, kind="embedding").cache.status == "hit"
    plan = cache.plan("embedding", body_of("c"))
    other = cache.plan("json", {"question": "x"})
    cache.set({"question": "x"}, {"answer": "y"}, kind="json")
    stored = cache._flow.tiers.memory.get(other.key)
    cache._flow.tiers.memory.set(plan.key, stored, 60.0)
    answer = cache.fetch(body_of("c"), provider, kind="embedding")
    assert (answer.cache.status, vectors(answer.json())) == ("miss", [vector("c")])


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=9), st.sets(st.sampled_from("abcdef")))
def test_what_is_split_and_joined_is_what_one_call_would_give(inputs: list[str], stored: set[str]) -> None:
    found = {item: json.dumps(embed({"input": item})).encode() for item in stored}
    batch = Batch(tuple(inputs), found)
    asked = [inputs[position] for position in batch.missing]
    assert asked == list(dict.fromkeys(item for item in inputs if item not in stored))
    parts = {}
    if asked:
        parts = split(json.dumps(embed({"input": asked}, reverse=True)).encode(), batch, inputs)
        assert parts is not None
    answer = json.loads(joined(inputs, {**found, **parts}))
    assert vectors(answer) == [vector(item) for item in inputs]
    assert answer["usage"]["total_tokens"] == 3 * len(set(inputs))
