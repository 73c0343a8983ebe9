"""`ModelResponse`: an answer as OpenAI's SDK shows it, by attribute and by item; `ModelStream`: its chunks.

Both decode JSON only when it is looked at.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..caching.answer import Answer, CacheInfo
from ..caching.sse import parse_events

__all__ = ["ModelResponse", "ModelStream", "RouteInfo"]

# What answers may leave out: None then, as in OpenAI's SDK.
_OPTIONAL = frozenset(
    [
        "annotations",
        "audio",
        "completion_tokens_details",
        "content",
        "error",
        "finish_reason",
        "function_call",
        "input_tokens_details",
        "logprobs",
        "name",
        "output_tokens_details",
        "prompt_tokens_details",
        "reasoning_content",
        "refusal",
        "role",
        "service_tier",
        "system_fingerprint",
        "tool_calls",
        "usage",
    ]
)
_BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")


@dataclass(slots=True)
class RouteInfo:
    """How an answer was got. ``model``: the group that answered; ``deployment``: its public id; both None for
    an answer from the cache. ``attempts``: calls of providers in all. ``fallback``: whether another group
    than the one asked for answered. ``failures``: (deployment, code) of the attempts before.

    When the answer is whole: ``tokens`` in all and ``output_tokens``, as the provider counts them, or an
    estimate for a stream of which it says nothing; ``cost`` by the deployment's prices, None where they are
    not known; ``latency``: seconds that the deployment took."""

    asked: str
    model: str | None = None
    deployment: str | None = None
    attempts: int = 0
    fallback: bool = False
    failures: list[tuple[str, str | None]] = field(default_factory=list)
    tokens: int | None = None
    output_tokens: int = 0
    cost: float | None = None
    latency: float | None = None


class _Object(Mapping[str, Any]):
    """A JSON object whose members are attributes too."""

    __slots__ = ("_data",)

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def _members(self) -> dict[str, Any]:
        return self._data

    def __getitem__(self, name: str) -> Any:
        return _shown(self._members()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._members())

    def __len__(self) -> int:
        return len(self._members())

    def __getattr__(self, name: str) -> Any:
        if name[:1] == "_":
            raise AttributeError(name)
        try:
            value = (self._data or self._members())[name]
        except KeyError:
            if name in _OPTIONAL:
                return None
            raise AttributeError(f"the answer has no {name!r}") from None
        return _Object(value) if type(value) is dict else _shown(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__.lstrip('_')}({self._members()!r})"

    def model_dump(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        copy: dict[str, Any] = json.loads(json.dumps(self._members()))
        return copy


def _shown(value: Any) -> Any:
    if type(value) is dict:  # JSON has no other kinds
        return _Object(value)
    if type(value) is list:
        return [_shown(item) for item in value]
    return value


class ModelResponse(_Object):
    """An answer: ``r.choices[0].message.content``, ``r["usage",]``.

    ``raw``: the JSON as bytes. ``cache``: what the cache did, None where there is none. ``route``: how the
    answer was got.
    """

    __slots__ = ("cache", "raw", "route")

    def __init__(self, raw: bytes, cache: CacheInfo | None, route: RouteInfo) -> None:
        self._data = {}
        self.raw = raw
        self.cache = cache
        self.route = route

    def _members(self) -> dict[str, Any]:
        if not self._data:
            try:
                value = json.loads(self.raw)
            except ValueError:  # a transcription in one of the formats that are plain text
                value = {"text": self.raw.decode("utf-8", "replace")}
            self._data = value if isinstance(value, dict) else {"data": value}
        return self._data


class ModelStream:
    """The chunks of an answer, each a `ModelResponse`, with ``for`` or ``async for``. ``cache`` and ``route``
    as there. Closing it, which ``with`` and ``async with`` do, ends the call; `events` gives its bytes
    instead."""

    def __init__(self, answer: Answer, cache: CacheInfo | None, route: RouteInfo) -> None:
        self._answer = answer
        self._chunks: Generator[ModelResponse, None, None] | None = None
        self._achunks: AsyncGenerator[ModelResponse] | None = None
        self.cache = cache
        self.route = route

    def __iter__(self) -> ModelStream:
        return self

    def __next__(self) -> ModelResponse:
        if self._chunks is None:
            self._chunks = _read(self._answer, self.cache, self.route)
        return next(self._chunks)

    def __aiter__(self) -> ModelStream:
        return self

    async def __anext__(self) -> ModelResponse:
        if self._achunks is None:
            self._achunks = _aread(self._answer, self.cache, self.route)
        return await anext(self._achunks)

    @property
    def events(self) -> Answer:
        """The stream as bytes, event by event."""
        return self._answer

    def close(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
        self._answer.close()

    async def aclose(self) -> None:
        if self._achunks is not None:
            await self._achunks.aclose()
        await self._answer.aclose()

    def __enter__(self) -> ModelStream:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    async def __aenter__(self) -> ModelStream:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.aclose()


# Functions, not methods: a stream that is dropped is closed at once, with no cycle in the way.
def _read(answer: Answer, cache: CacheInfo | None, route: RouteInfo) -> Generator[ModelResponse, None, None]:
    rest = b""
    for piece in answer:
        whole, rest = _whole(rest + piece)
        for data in _data(whole):
            yield ModelResponse(data, cache, route)
    for data in _data(rest):
        yield ModelResponse(data, cache, route)


async def _aread(answer: Answer, cache: CacheInfo | None, route: RouteInfo) -> AsyncGenerator[ModelResponse]:
    rest = b""
    async for piece in answer:
        whole, rest = _whole(rest + piece)
        for data in _data(whole):
            yield ModelResponse(data, cache, route)
    for data in _data(rest):
        yield ModelResponse(data, cache, route)


def _data(events: bytes) -> list[bytes]:
    return [event.data.encode() for event in parse_events(events) if event.data != "[DONE]"]


def _whole(data: bytes) -> tuple[bytes, bytes]:
    """The whole events of ``data``, and the rest."""
    end = max(data.rfind(blank) + len(blank) if blank in data else 0 for blank in _BLANK_LINES)
    return data[:end], data[end:]
