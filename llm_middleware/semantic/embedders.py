"""Embedders: from texts to vectors of which the directions of like meanings are near each other.

A vector is bytes: float32, little-endian, of length one, so that the cosine of two is their dot product. What
an embedder cannot read whole it refuses (`UnfitTextError`): a text that is cut means something else.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import logging
import math
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import isawaitable, iscoroutinefunction
from typing import Any, Protocol, runtime_checkable

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..errors import ConfigError, LLMMiddlewareError
from .aside import apart

__all__ = [
    "CallableEmbedder",
    "DimensionError",
    "Embedder",
    "EmbeddingError",
    "RouterEmbedder",
    "TwoFaced",
    "UnfitTextError",
    "callable_embedder",
    "router_embedder",
    "unit",
]

logger = logging.getLogger("llm_middleware")

_WINDOW = 512  # tokens that every embedding model in use reads
_WINDOWS: Mapping[str, int] = {
    "text-embedding-3-large": 8191,
    "text-embedding-3-small": 8191,
    "text-embedding-ada-002": 8191,
}
_SPECIAL_TOKENS = 2  # that models put around a text
_MOST_CALLS = 64  # of a function at a time; those that hang count
_LONGEST_CALL = 5.0  # seconds; who asked has gone on long before


class EmbeddingError(LLMMiddlewareError):
    """An embedder gave no vectors that can be used. The user's request goes on as a miss."""

    status = 502
    code = "embedding_failed"


class UnfitTextError(EmbeddingError):
    """The embedder cannot read all of a text, and so not tell it from others: the request is answered from an
    exact repeat only. It says nothing of the embedder's health. ``code``: ``text_too_long`` or
    ``text_unknown`` (characters or words that the model has no tokens for)."""

    code = "text_too_long"


class DimensionError(EmbeddingError):
    """Vectors of another length than those before: it is another model, and they cannot be compared."""

    code = "dimensions_changed"


@runtime_checkable
class Embedder(Protocol):
    """``id``: the model and its revision; vectors of embedders with different ids are never compared.
    ``dimensions``: numbers in a vector, None until that is known. ``max_tokens``: the longest text, None for
    any. A sync face is enough: on an event loop it is called in a thread."""

    @property
    def id(self) -> str: ...

    @property
    def dimensions(self) -> int | None: ...

    @property
    def max_tokens(self) -> int | None: ...

    def fits(self, text: str) -> bool:
        """Whether the text is read whole. Quick."""
        ...

    def embed(self, texts: Sequence[str]) -> list[bytes]:
        """One vector for each text. `UnfitTextError` where one cannot be read whole; raises what fails."""
        ...

    async def aembed(self, texts: Sequence[str]) -> list[bytes]:
        """`embed` for async callers."""
        ...


def unit(vector: object) -> bytes:
    """A vector as bytes: float32, little-endian, of length one.

    ``vector``: numbers in a sequence or an array, or float32 as bytes or base64. `EmbeddingError` where it
    has no direction: empty, zero, or not finite.
    """
    values = _numbers(vector)
    length = math.hypot(*values)
    if not 0 < length < math.inf:
        raise EmbeddingError(f"a vector of {len(values)} numbers has no direction (length {length})")
    packed = array("f", (value / length for value in values))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _numbers(vector: object) -> Sequence[float]:
    if isinstance(vector, str):
        try:
            vector = base64.b64decode(vector, validate=True)
        except binascii.Error as exc:
            raise EmbeddingError("a vector is text, and not base64") from exc
    if isinstance(vector, (bytes, bytearray, memoryview)):
        return _floats(bytes(vector))
    listed: Any = vector.tolist() if hasattr(vector, "tolist") else vector
    try:
        return array("d", listed)  # of numbers only: no text, no lists
    except (TypeError, OverflowError) as exc:
        raise EmbeddingError(f"a vector is no list of numbers: {type(vector).__name__}") from exc


def _floats(packed: bytes) -> array[float]:
    values = array("f")
    if len(packed) % values.itemsize:
        raise EmbeddingError(f"a vector of {len(packed)} bytes is not made of float32 numbers")
    values.frombytes(packed)
    if sys.byteorder == "big":
        values.byteswap()
    return values


class TwoFaced:
    """What embedders share: both faces of one `_vectors`, and the checks before and after it.

    ``count``: how many tokens a text is. Where it is not given a text counts as many as it has bytes in
    UTF-8, of which no tokenizer in use makes more.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - the name in the protocol
        *,
        dimensions: int | None = None,
        max_tokens: int | None = None,
        count: Callable[[str], int] | None = None,
    ) -> None:
        if not isinstance(id, str) or not id:
            raise ConfigError(f"id: expected a name that is not empty, got {id!r}", param="id")
        for name, value in {"dimensions": dimensions, "max_tokens": max_tokens}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}: expected a number >= 1, got {value!r}", param=name)
        if count is not None and not callable(count):
            raise ConfigError(f"count: expected a function, got {count!r}", param="count")
        self.id = id
        self.dimensions = dimensions
        self.max_tokens = max_tokens
        self._count = count

    def fits(self, text: str) -> bool:
        if self.max_tokens is None or 4 * len(text) + _SPECIAL_TOKENS <= self.max_tokens:
            return True
        if self._count is not None:
            return self._count(text) <= self.max_tokens
        return len(text.encode("utf-8", "surrogatepass")) + _SPECIAL_TOKENS <= self.max_tokens

    def embed(self, texts: Sequence[str]) -> list[bytes]:
        return run_sync(self._embed(SYNC, texts))

    async def aembed(self, texts: Sequence[str]) -> list[bytes]:
        return await self._embed(async_port(), texts)

    async def _embed(self, port: Port, texts: Sequence[str]) -> list[bytes]:
        if isinstance(texts, str):
            raise TypeError("texts: expected a list of texts, got one text")
        texts = list(texts)
        if not texts:
            return []
        vectors = await self._vectors(port, texts)
        if len(vectors) != len(texts):
            raise EmbeddingError(f"{self.id}: {len(vectors)} vectors for {len(texts)} texts")
        return [self._checked(vector) for vector in vectors]

    async def _vectors(self, port: Port, texts: list[str]) -> Sequence[bytes]:
        """A vector for each text, of which `_refuse_long` has been asked."""
        raise NotImplementedError

    def _refuse_long(self, texts: Sequence[str]) -> None:
        if not all(map(self.fits, texts)):
            raise self._too_long()

    def _too_long(self) -> UnfitTextError:
        return UnfitTextError(f"{self.id}: a text is longer than {self.max_tokens} tokens")

    def _checked(self, vector: bytes) -> bytes:
        dimensions = len(vector) // 4
        if self.dimensions is None:
            self.dimensions = dimensions
        elif dimensions != self.dimensions:
            raise DimensionError(
                f"{self.id}: a vector of {dimensions} numbers where there were {self.dimensions}: "
                "vectors of different models cannot be compared; use an index of its own for each"
            )
        return vector


class CallableEmbedder(TwoFaced):
    """See `callable_embedder`."""

    def __init__(self, function: Callable[[list[str]], object], **options: Any) -> None:
        if not callable(function):
            raise ConfigError(
                f"embedding_model: expected a function, got {function!r}", param="embedding_model"
            )
        named = getattr(function, "__qualname__", None) or type(function).__qualname__
        super().__init__(options.pop("id", None) or f"callable:{named}", **options)
        self._function = function
        self._calls = threading.BoundedSemaphore(_MOST_CALLS)
        self._is_async = iscoroutinefunction(function) or iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
        )

    async def _vectors(self, port: Port, texts: list[str]) -> Sequence[bytes]:
        self._refuse_long(texts)
        if self._is_async:
            given = await port.call(self._function, texts)
        else:
            given = await self._apart(port, texts)
            if isawaitable(given):
                awaitable = given
                given = await port.call(lambda: awaitable)
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise EmbeddingError(f"{self.id}: expected a list of vectors, got {type(given).__name__}")
        return [unit(vector) for vector in given]

    def _called(self, texts: list[str]) -> object:
        try:
            return self._function(texts)
        finally:
            self._calls.release()

    async def _apart(self, port: Port, texts: list[str]) -> object:
        """What the function returns. One that hangs must not hold the threads of an event loop, which are
        few and the host's own, nor be called again and again."""
        if not self._calls.acquire(blocking=False):
            raise EmbeddingError(f"{self.id}: {_MOST_CALLS} calls have not returned")
        return await apart(port, self._called, texts)


def callable_embedder(
    function: Callable[[list[str]], object],
    *,
    id: str | None = None,  # noqa: A002 - the name in the protocol
    dimensions: int | None = None,
    max_tokens: int | None = None,
    count: Callable[[str], int] | None = None,
) -> CallableEmbedder:
    """An embedder of ``function(texts)``, sync (called in a thread where there is an event loop) or async
    (for async callers only). It returns as many vectors as it got texts: lists of numbers, arrays, or float32
    as bytes or base64, of any length, which is made one.

    ``id``: give one that changes with the model; else the function's name. ``dimensions``: numbers in a
    vector, checked if given. ``max_tokens``: the longest text, as ``count(text)`` counts.
    """
    return CallableEmbedder(function, id=id, dimensions=dimensions, max_tokens=max_tokens, count=count)


class RouterEmbedder(TwoFaced):
    """See `router_embedder`."""

    def __init__(
        self,
        router: Any,
        model: str,
        *,
        options: Mapping[str, object] | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(model, str) or model not in router:
            raise ConfigError(
                f"embedding_model: the router has no model {model!r}; it has {', '.join(router.models)}",
                param="embedding_model",
            )
        served = [each for each in getattr(router, "deployments", ()) if each.group == model]
        names = sorted({each.model for each in served}) or [model]
        if len(names) > 1:
            logger.warning(
                "embedding_model %r is served by %s: unless these are one model, their vectors cannot be "
                "compared",
                model,
                ", ".join(names),
            )
        if settings.get("max_tokens") is None:
            settings["max_tokens"] = _window(names, served)
        super().__init__(settings.pop("id", None) or "|".join(names), **settings)
        self._router = router
        self._model = model
        self._options = {"timeout": _LONGEST_CALL, **(options or {})}

    async def _vectors(self, port: Port, texts: list[str]) -> Sequence[bytes]:
        self._refuse_long(texts)
        name = "embedding" if port is SYNC else "aembedding"
        ask = functools.partial(getattr(self._router, name), self._model, texts, **self._options)
        return _rows(self.id, await port.call(ask), len(texts))


def _window(names: Sequence[str], served: Iterable[Any]) -> int:
    told = [tokens for each in served if type(tokens := each.info.get("max_input_tokens")) is int]
    known = [_WINDOWS.get(name.rpartition("/")[2], _WINDOW) for name in names]
    return min(told or known)


def _rows(name: str, response: Any, count: int) -> list[bytes]:
    """The vectors of an answer of OpenAI's embeddings API, in the order of its indexes."""
    raw = getattr(response, "raw", None)
    try:
        rows = (json.loads(raw) if isinstance(raw, bytes) else response)["data"]
        vectors = {row["index"]: row["embedding"] for row in rows}
        ordered = [vectors[index] for index in range(count)]
    except (ValueError, TypeError, KeyError) as exc:
        raise EmbeddingError(f"{name}: the answer has no vectors for the texts") from exc
    if len(rows) != count:
        raise EmbeddingError(f"{name}: {len(rows)} vectors for {count} texts")
    return [unit(vector) for vector in ordered]


def router_embedder(
    router: object,
    model: str,
    *,
    id: str | None = None,  # noqa: A002 - the name in the protocol
    dimensions: int | None = None,
    max_tokens: int | None = None,
    count: Callable[[str], int] | None = None,
    options: Mapping[str, object] | None = None,
) -> RouterEmbedder:
    """An embedder of ``model`` in a `Router`'s model list, on both of its faces.

    ``id``: else the provider's name of the model. ``dimensions``: what is expected, checked if given.
    ``max_tokens``: else ``max_input_tokens`` of the deployments' ``model_info``, what is known of OpenAI's
    models, or 512. ``options``: more arguments of `Router.embedding`, such as ``dimensions``; ``timeout`` is
    5 seconds unless it is there. `ConfigError` where the router does not have the model.
    """
    return RouterEmbedder(
        router,
        model,
        id=id,
        dimensions=dimensions,
        max_tokens=max_tokens,
        count=count,
        options=options,
    )
