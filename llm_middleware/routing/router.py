"""`Router`: many deployments, one answer. Faces only: the way of a call is in `flow`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from random import Random
from typing import Any

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..caching.answer import Answer, CacheInfo
from ..caching.groups import shared_names
from ..caching.manager import CacheManager
from ..errors import ProviderError
from ..providers.messages import Transport
from .connect import Blocking, http_settings, new_transport
from .flow import Asked, RoutedCall
from .limits import Limits
from .request import Options, from_client, read_body, read_options, routed_kind
from .response import ModelResponse, ModelStream, RouteInfo
from .settings import make_settings

__all__ = ["Router"]

_ASIDE = ("model", "cache")  # of a request, and not for the provider


class Router:
    """Answers calls of models by name from whichever deployment of that name can.

    ``model_list``: as LiteLLM has it: ``model_name``, ``litellm_params`` (or ``provider_params``), ``rpm``,
    ``tpm`` ... ``cache``: the `CacheManager` that answers are kept in, unless ``cache_responses`` is False;
    where that is True and none is given, one in the Router's Redis, else in memory. ``http_client``: an httpx
    client of your own; ``http``: what else `HTTPSettings` has (``proxy``, ``verify``, ``http2`` ...).
    ``limits``: where calls are counted. ``settings``: those of `RouterSettings`, which have LiteLLM's names
    and meanings. `ConfigError` names one that is unknown or wrong.

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
        http: Mapping[str, object] | None = None,
        limits: Limits | None = None,
        random: Random | None = None,
        **settings: object,
    ) -> None:
        self.settings = make_settings(settings)
        self.deployments, self._routing = self.settings.routing(model_list, limits, random or Random())
        self._owns_cache = cache is None and bool(cache_responses)
        if self._owns_cache:
            cache = self.settings.cache()
        self.cache = None if cache_responses is False else cache
        name = self._routing.groups.name
        self._cache_names = {
            name(one): other for one, other in shared_names(self.settings.caching_groups).items()
        }
        self._http = http_settings(http or {}, http_client)
        self._transports: dict[str, Transport] = {}

    @property
    def models(self) -> list[str]:
        """The names that callers may use, aliases and patterns among them."""
        return sorted({each.group for each in self.deployments} | self._routing.groups.aliases)

    def __contains__(self, model: object) -> bool:
        return model in self._routing.groups

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

    def call(self, kind: str, body: object, *, content_type: str = "", **options: Any) -> Any:
        """The answer to a client's request as it came: a `ModelResponse`; a `ModelStream` if it asks for one.

        ``kind``: ``chat``, ``text``, ``embedding``, ``responses`` or ``transcription``. ``body``: JSON as
        bytes, a form as bytes with its ``content_type``, or a mapping. Of `Options` a client may set
        ``timeout``, ``num_retries`` and ``fallbacks`` in the body; ``options`` go before it.
        `InvalidRequestError` names what is wrong, such as an address of the client's own.
        """
        return run_sync(self._call(SYNC, "sync", kind, body, content_type, options))

    async def acall(self, kind: str, body: object, *, content_type: str = "", **options: Any) -> Any:
        """`call` for async callers."""
        return await self._call(async_port(), "async", kind, body, content_type, options)

    def close(self) -> None:
        """Close the connections of sync calls; the Router opens others when it is used again."""
        run_sync(self._close(SYNC, "sync"))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._close(async_port(), "async", "sync")

    # --- what both faces share

    def _sync(self, kind: str, model: str, options: dict[str, Any]) -> Any:
        return run_sync(self._answer(SYNC, "sync", kind, model, options))

    async def _async(self, kind: str, model: str, options: dict[str, Any]) -> Any:
        return await self._answer(async_port(), "async", kind, model, options)

    async def _close(self, port: Port, *faces: str) -> None:
        for face in faces:
            transport = self._transports.pop(face, None)
            if transport is not None:
                await transport.aclose()
        await self._routing.limits.close(port)
        if self._owns_cache and self.cache is not None:
            await self.cache._close(port)

    def _transport(self, face: str) -> Transport:
        transport = self._transports.get(face)
        if transport is None:
            transport = self._transports.setdefault(face, new_transport(face, self._http))
        return transport

    async def _call(
        self, port: Port, face: str, kind: str, body: object, content_type: str, options: dict[str, Any]
    ) -> Any:
        kind = routed_kind(kind)
        said, rest = from_client(read_body(kind, body, content_type))
        given = {**rest, **said, **options}
        return await self._answer(port, face, kind, given.pop("model", None), given)

    async def _answer(
        self, port: Port, face: str, kind: str, model: object, given: dict[str, Any]
    ) -> ModelResponse | ModelStream:
        options, body = read_options(model, given)
        assert isinstance(model, str)
        route = RouteInfo(model)
        transport = self._transport(face)

        if self.cache is None or not options.shareable:
            return _shown(await self._routed(port, transport, kind, body, options, route), None, route)

        async def call(asked: object) -> object:
            assert isinstance(asked, Mapping)
            return await self._routed(port, transport, kind, asked, options, route)

        named = {"model": self._cache_name(model), **body}
        answer = await self.cache._fetch(port, named, call, kind, options.scope, options.controls, True)
        if answer.streamed:
            return ModelStream(answer, answer.cache, route)
        return ModelResponse(answer.body, answer.cache, route)

    def _cache_name(self, model: str) -> str:
        """The name by which answers of ``model`` are kept: of its group, not of an alias."""
        group = self._routing.groups.name(model)
        return self._cache_names.get(group, group)

    async def _routed(
        self,
        port: Port,
        transport: Transport,
        kind: str,
        body: Mapping[str, object],
        options: Options,
        route: RouteInfo,
    ) -> object:
        asked = Asked(
            kind=kind,
            body={name: value for name, value in body.items() if name not in _ASIDE},
            stream=body.get("stream") is True,
            timeout=options.timeout,
            fallbacks=options.fallbacks,
            num_retries=options.num_retries,
            connection=options.connection,
            may_use=options.may_use,
        )
        routed = RoutedCall(self._routing, port, transport, asked, route)
        try:
            result = await routed.run()
        except ProviderError as exc:
            exc.route = route
            raise
        if isinstance(result, bytes):
            return result
        if (options.on_stream_error or self.settings.on_stream_error) == "continue":
            result = routed.continued(result)
        return Blocking(result) if port is SYNC else result


def _shown(result: object, cache: CacheInfo | None, route: RouteInfo) -> ModelResponse | ModelStream:
    if isinstance(result, bytes):
        return ModelResponse(result, cache, route)
    events = result.events if isinstance(result, Blocking) else result
    assert isinstance(events, AsyncIterator)
    return ModelStream(Answer(CacheInfo("bypass"), stream=lambda: events), cache, route)
