"""What the tests of the semantic cache share: requests, an upstream that tells its calls apart, the local
embedder, loaded once, and a small one where meanings do not matter."""

from __future__ import annotations

import asyncio
import re
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import pytest

from llm_middleware import CacheManager
from llm_middleware.semantic.embed_local import LocalEmbedder
from tests.support import AsyncFace, SyncFace, chunk, completion, sse

PATIENT = 60.0  # seconds for an embedding, on a machine that is busy with something else
JOIN = 30.0

Face = SyncFace | AsyncFace
Messages = list[dict[str, object]]

_TOPICS = """
    gardens volcanoes engines glaciers markets satellites bridges vaccines planets rivers batteries castles
    orchestras submarines deserts telescopes bakeries elevators turbines harbours
"""
_WAYS = """
    briefly slowly carefully thoroughly plainly usually roughly properly gently formally loosely vividly
    cheerfully patiently honestly wisely calmly boldly neatly warmly quickly kindly
"""
TOPICS, WAYS = _TOPICS.split(), _WAYS.split()


def asked(text: str, **fields: object) -> dict[str, object]:
    """A chat request of one question."""
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def talk(*turns: tuple[str, object], **fields: object) -> dict[str, object]:
    """A chat request of these turns, (role, content) each."""
    return {
        "model": "m",
        "messages": [{"role": role, "content": content} for role, content in turns],
        **fields,
    }


def reworded(topic: str, way: str) -> str:
    """A question about a topic; all ways of one topic mean the same to `toy`."""
    return f"please explain {way} what makes {topic} work"


def wordings() -> list[tuple[str, str]]:
    """(topic, question) for every way to ask about every topic, topic by topic and way by way."""
    return [(topic, reworded(topic, way)) for way, topic in product(WAYS, TOPICS)]


def toy(texts: list[str]) -> list[list[float]]:
    """Vectors by the topic and, a little, by the way: 0.94 for one topic, under 0.1 for two."""
    return [_toy(text) for text in texts]


def _toy(text: str) -> list[float]:
    words = set(text.lower().replace("?", " ").replace(".", " ").split())
    vector = [0.0] * (len(TOPICS) + len(WAYS) + 1)
    for at, topic in enumerate(TOPICS):
        vector[at] = 1.0 if topic in words else 0.0
    for at, way in enumerate(WAYS):
        vector[len(TOPICS) + at] = 0.25 if way in words else 0.0
    vector[-1] = 0.05
    return vector


def toy_bytes(text: str) -> bytes:
    """The vector of `toy`, of unit length, as an index takes it."""
    vector = _toy(text)
    length = sum(value * value for value in vector) ** 0.5
    return array("f", [value / length for value in vector]).tobytes()


class Counted:
    """An embedder's function that counts: ``calls``, the texts of each."""

    def __init__(self, function: Callable[[list[str]], list[list[float]]] = toy) -> None:
        self.calls: list[list[str]] = []
        self._function = function

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.calls.append(list(texts))
        return self._function(texts)


class Held(Counted):
    """`Counted` whose calls wait until `release`."""

    def __init__(self) -> None:
        super().__init__()
        self._gate = threading.Event()

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.calls.append(list(texts))
        assert self._gate.wait(JOIN), "never released"
        return toy(texts)

    def release(self) -> None:
        self._gate.set()


def question_in(body: Mapping[str, object]) -> str:
    """The text of the last turn."""
    messages = body["messages"]
    assert isinstance(messages, list)
    content = messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class Upstream:
    """Each call gets another answer, which quotes its question: ``answer 1: how do ...``."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, body: Mapping[str, object]) -> object:
        with self._lock:
            self.calls += 1
            text = f"answer {self.calls}: {question_in(body)}"
        if body.get("stream"):
            words = re.findall(r"\S+\s*", text)
            chunks = [chunk("", role="assistant"), *map(chunk, words), chunk(None, "stop")]
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            return iter(sse(*chunks, {**chunk(None), "choices": [], "usage": usage}))
        return completion(text)


def calm(face: Face) -> None:
    """Return when nothing is done beside the requests any more."""
    if isinstance(face, AsyncFace):
        face.run(_calm_loop())
    for thread in threading.enumerate():
        if thread.name == "llm-middleware-background":
            thread.join(JOIN)
            assert not thread.is_alive()


async def _calm_loop() -> None:
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        _, late = await asyncio.wait(others, timeout=JOIN)
        assert not late, late


class Asking:
    """Fetches from one cache on one face. ``asking(body)``: what the cache did, and the answer's text."""

    def __init__(self, face: Face, cache: CacheManager, upstream: Upstream | None = None) -> None:
        self.face, self.cache = face, cache
        self.upstream = upstream or Upstream()

    @property
    def calls(self) -> int:
        return self.upstream.calls

    def fetch(self, body: object, **options: object):
        return self.face.fetch(self.cache, body, self.upstream, **options)

    def __call__(self, body: object, **options: object) -> tuple[str, str]:
        answer = self.fetch(body if not isinstance(body, str) else asked(body), **options)
        return answer.cache.status, answer.json()["choices"][0]["message"]["content"]

    def status(self, body: object, **options: object) -> tuple[str, str | None]:
        """What the cache did, and its reason."""
        answer = self.fetch(body if not isinstance(body, str) else asked(body), **options)
        self.face.chunks(answer)
        return answer.cache.status, answer.cache.detail

    def done(self) -> None:
        calm(self.face)

    def counts(self) -> dict[str, object]:
        """What the cache tells of its look-ups by meaning."""
        told = self.cache.stats()["semantic"]
        assert isinstance(told, dict)
        return told


@pytest.fixture(scope="module")
def local() -> LocalEmbedder:
    embedder = LocalEmbedder()
    embedder.load()
    return embedder


@pytest.fixture
def make(face: Face) -> Iterator[Callable[..., Asking]]:
    """``make(**settings)``: one who asks a semantic cache of these settings, by `toy` unless told."""
    made: list[Asking] = []

    def making(kind: str = "semantic", *, upstream: Upstream | None = None, **settings: object) -> Asking:
        known = {"embedding_model": toy, "embedding_budget": PATIENT, "similarity_threshold": 0.5}
        if "max_error_rate" in settings or "static_error_target" in settings:
            del known["similarity_threshold"]
        made.append(Asking(face, CacheManager(kind, **{**known, **settings}), upstream))
        return made[-1]

    yield making
    for each in made:
        each.done()
        face.do(each.cache, "close")
