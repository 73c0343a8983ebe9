"""`Router`: many deployments, one answer. Faces only: the way of a call is in `flow`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from random import Random
from typing import Any

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..caching.answer import Answer, CacheInfo
from ..caching.manager import CacheManager
from ..caching.results import close_items
from ..errors import InvalidRequestError
from ..providers.messages import Transport
from ..providers.target import CONNECTION
from .fallback import own_fallbacks
from .flow import Asked, RoutedCall
from .limits import Limits
from .response import ModelResponse, ModelStream, RouteInfo
from .settings import check_seconds, make_settings

__all__ = ["Router"]

# Arguments of a call that are not part of the request.
_OWN = ("timeout", "fallbacks", "num_retries", "scope", "may_use", "caching")


class Router:
    """Answers calls of models by name from whichever deployment of that name can.

    ``model_list``: as LiteLLM has it: ``model_name``, ``litellm_params`` (or ``provider_params``), ``rpm``,
    ``tpm`` ... ``cache``: the `CacheManager` that answers are kept in, unless ``cache_responses`` is False.
    ``http_client``: an httpx client of your own. ``limits``: where calls are counted. ``settings``: those of
    `RouterSettings`, which have LiteLLM's names and meanings; `ConfigError` names one that is unknown or
    wrong.

    Every method has an async twin (``acompletion`` ...). One Router serves threads and event loops at once;
    making one connects to nothing.
    """

    def __init__(
        self,
        model_list: Sequence[Mapping[str, object]],
        *,
        cache: CacheManager | None = None,
        cache_responses: bool | None = None,
        http_client: object = None,
        limits: Limits | None = None,
        random: Random | None = None,
        **settings: object,
    ) -> None:
        self.settings = make_settings(settings)
        self.deployments, self._routing = self.settings.routing(model_list, limits, random or Random())
        if cache is None and cache_responses:
            cache = CacheManager()
        self.cache = None if cache_responses is False else cache
        self._http_client = http_client
        self._transports: dict[str, Transport] = {}

    # --- calls

    def completion(self, model: str, messages: Sequence[object], **options: Any) -> Any:
        """A chat completion: a `ModelResponse`; with ``stream=True`` a `ModelStream`."""
        return self._sync("chat", model, {"messages": messages, **options})

    async def acompletion(self, model: str, messages: Sequence[object], **options: Any) -> Any:
        """`completion` for async callers."""
        return await self._async("chat", model, {"messages": messages, **options})

    def text_completion(self, model: str, prompt: object, **options: Any) -> Any:
        """A text completion: a `ModelResponse`; with ``stream=True`` a `ModelStream`."""
        return self._sync("text", model, {"prompt": prompt, **options})

    async def atext_completion(self, model: str, prompt: object, **options: Any) -> Any:
        """`text_completion` for async callers."""
        return await self._async("text", model, {"prompt": prompt, **options})

    def embedding(self, model: str, input: object, **options: Any) -> Any:  # noqa: A002 - OpenAI's name
        """Embeddings: a `ModelResponse`."""
        return self._sync("embedding", model, {"input": input, **options})

    async def aembedding(self, model: str, input: object, **options: Any) -> Any:  # noqa: A002
        """`embedding` for async callers."""
        return await self._async("embedding", model, {"input": input, **options})

    def responses(self, model: str, input: object, **options: Any) -> Any:  # noqa: A002
        """An answer of the Responses API: a `ModelResponse`; with ``stream=True`` a `ModelStream`."""
        return self._sync("responses", model, {"input": input, **options})

    async def aresponses(self, model: str, input: object, **options: Any) -> Any:  # noqa: A002
        """`responses` for async callers."""
        return await self._async("responses", model, {"input": input, **options})

    def transcription(self, model: str, file: object, **options: Any) -> Any:
        """A transcription: a `ModelResponse`. ``file``: bytes, or ``(name, bytes[, type])``."""
        return self._sync("transcription", model, {"file": file, **options})

    async def atranscription(self, model: str, file: object, **options: Any) -> Any:
        """`transcription` for async callers."""
        return await self._async("transcription", model, {"file": file, **options})

    def close(self) -> None:
        """Close the connections of sync calls; the Router opens others when it is used again."""
        transport = self._transports.pop("sync", None)
        if transport is not None:
            run_sync(transport.aclose())

    async def aclose(self) -> None:
        """Close all connections."""
        transport = self._transports.pop("async", None)
        if transport is not None:
            await transport.aclose()
        self.close()

    # --- what both faces share

    def _sync(self, kind: str, model: str, options: dict[str, Any]) -> Any:
        return run_sync(self._answer(SYNC, self._transport("sync"), kind, model, options))

    async def _async(self, kind: str, model: str, options: dict[str, Any]) -> Any:
        return await self._answer(async_port(), self._transport("async"), kind, model, options)

    def _transport(self, face: str) -> Transport:
        transport = self._transports.get(face)
        if transport is None:
            from .._ports.http_settings import HTTPSettings

            settings = HTTPSettings(http_client=self._http_client)
            made: Transport
            if face == "sync":
                from .._ports.http_sync import SyncTransport

                made = SyncTransport(settings)
            else:
                from .._ports.http_async import AsyncTransport

                made = AsyncTransport(settings)
            transport = self._transports.setdefault(face, made)
        return transport

    async def _answer(
        self, port: Port, transport: Transport, kind: str, model: str, options: dict[str, Any]
    ) -> Any:
        own = {name: options.pop(name) for name in _OWN if name in options}
        connection = {name: options.pop(name) for name in tuple(options) if name in CONNECTION}
        check_seconds("timeout", own.get("timeout"), InvalidRequestError)
        _check_retries(own.get("num_retries"))
        fallbacks = own_fallbacks(own.get("fallbacks"), model)
        body = {"model": model, **options}
        route = RouteInfo(model)

        async def call(asked_body: object) -> object:
            assert isinstance(asked_body, Mapping)
            routed = RoutedCall(
                self._routing,
                port,
                transport,
                Asked(
                    kind=kind,
                    body={name: asked_body[name] for name in asked_body.keys() - {"model", "cache"}},
                    stream=asked_body.get("stream") is True,
                    timeout=own.get("timeout"),
                    fallbacks=fallbacks,
                    num_retries=own.get("num_retries"),
                    connection=connection,
                    may_use=own.get("may_use"),
                ),
                route,
            )
            result = await routed.run()
            if not isinstance(result, bytes) and port is SYNC and caching:
                return _Blocking(result)
            return result

        # What another server or another key answers is nobody else's.
        caching = (
            self.cache is not None
            and own.get("caching") is not False
            and not connection.keys() - {"max_retries"}
        )
        if not caching:
            return _shown(await call(body), None, route)
        assert self.cache is not None
        answer = await self.cache._fetch(port, body, call, kind, own.get("scope") or "", None, True)
        if answer.streamed:
            return ModelStream(answer, answer.cache, route)
        return ModelResponse(answer.body, answer.cache, route)


def _shown(result: object, cache: CacheInfo | None, route: RouteInfo) -> ModelResponse | ModelStream:
    if isinstance(result, bytes):
        return ModelResponse(result, cache, route)
    assert isinstance(result, AsyncIterator)
    return ModelStream(Answer(CacheInfo("bypass"), stream=lambda: result), cache, route)


class _Blocking:
    """A stream of the sync transport as an iterator; closing it closes that, begun or not."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    def __iter__(self) -> _Blocking:
        return self

    def __next__(self) -> bytes:
        try:
            return run_sync(self._next())
        except StopAsyncIteration:
            raise StopIteration from None

    async def _next(self) -> bytes:
        return await anext(self._events)

    def close(self) -> None:
        run_sync(close_items(self._events))


def _check_retries(value: object) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < 0
    if value is not None and wrong:
        raise InvalidRequestError(f"num_retries: expected a number >= 0, got {value!r}", param="num_retries")
