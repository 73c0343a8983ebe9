"""`cached`: the cache around a function of the host's own."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar, overload

from . import cache_key
from .cache_key import UnkeyableError
from .results import as_json

if TYPE_CHECKING:
    from .manager import CacheManager

__all__ = ["cached"]

F = TypeVar("F", bound=Callable[..., object])


class _Cached:
    """What the four kinds of wrapper share."""

    def __init__(
        self,
        function: Callable[..., object],
        cache: CacheManager | None,
        scope: str | Callable[..., str],
        controls: Mapping[str, object] | None,
        load: Callable[[object], object] | None,
    ) -> None:
        self.function = function
        self.signature = inspect.signature(function)
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.chosen = cache
        self.scope = scope
        self.controls = controls
        self.load = load

    @property
    def cache(self) -> CacheManager:
        from .default import default_cache

        return self.chosen if self.chosen is not None else default_cache()

    def body(self, args: tuple[object, ...], kwargs: dict[str, object], *, stream: bool) -> dict[str, object]:
        """The call as a request: f(1) and f(x=1) are one. None of it where an argument has no JSON form."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return {"function": self.name, "arguments": dict(bound.arguments), "stream": stream}

    def keyable(self, body: dict[str, object]) -> bool:
        try:
            cache_key.canonical(cache_key.jsonable(body))
        except UnkeyableError:
            return False
        return True

    def scope_of(self, args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        return self.scope if isinstance(self.scope, str) else self.scope(*args, **kwargs)

    def value(self, data: bytes) -> object:
        value = json.loads(data)
        return value if self.load is None else self.load(value)


def _wrap_function(own: _Cached) -> Callable[..., object]:
    def wrapper(*args: object, **kwargs: object) -> object:
        body = own.body(args, kwargs, stream=False)
        if not own.keyable(body):
            return own.function(*args, **kwargs)
        answer = own.cache.fetch(
            body,
            lambda _: as_json(own.function(*args, **kwargs)),
            kind="json",
            scope=own.scope_of(args, kwargs),
            controls=own.controls,
        )
        return own.value(answer.body)

    return wrapper


def _wrap_coroutine(own: _Cached) -> Callable[..., object]:
    async def wrapper(*args: object, **kwargs: object) -> object:
        async def call(_: object) -> bytes:
            return as_json(await own.function(*args, **kwargs))  # type: ignore[misc]

        body = own.body(args, kwargs, stream=False)
        if not own.keyable(body):
            return await own.function(*args, **kwargs)  # type: ignore[misc]
        answer = await own.cache.afetch(
            body, call, kind="json", scope=own.scope_of(args, kwargs), controls=own.controls
        )
        return own.value(answer.body)

    return wrapper


def _wrap_generator(own: _Cached) -> Callable[..., object]:
    def items(args: tuple[object, ...], kwargs: dict[str, object]) -> Iterator[bytes]:
        for item in own.function(*args, **kwargs):  # type: ignore[attr-defined]
            yield as_json(item)

    def wrapper(*args: object, **kwargs: object) -> Iterator[object]:
        body = own.body(args, kwargs, stream=True)
        if not own.keyable(body):
            yield from own.function(*args, **kwargs)  # type: ignore[misc]
            return
        answer = own.cache.fetch(
            body,
            lambda _: items(args, kwargs),
            kind="json",
            scope=own.scope_of(args, kwargs),
            controls=own.controls,
        )
        try:
            for chunk in answer:
                yield own.value(chunk)
        finally:
            answer.close()

    return wrapper


def _wrap_async_generator(own: _Cached) -> Callable[..., object]:
    async def items(args: tuple[object, ...], kwargs: dict[str, object]) -> AsyncIterator[bytes]:
        async for item in own.function(*args, **kwargs):  # type: ignore[attr-defined]
            yield as_json(item)

    async def wrapper(*args: object, **kwargs: object) -> AsyncIterator[object]:
        body = own.body(args, kwargs, stream=True)
        if not own.keyable(body):
            async for item in own.function(*args, **kwargs):  # type: ignore[attr-defined]
                yield item
            return
        answer = await own.cache.afetch(
            body,
            lambda _: items(args, kwargs),
            kind="json",
            scope=own.scope_of(args, kwargs),
            controls=own.controls,
        )
        try:
            async for chunk in answer:
                yield own.value(chunk)
        finally:
            await answer.aclose()

    return wrapper


@overload
def cached(function: F) -> F: ...
@overload
def cached(
    function: None = None,
    *,
    cache: CacheManager | None = None,
    scope: str | Callable[..., str] = "",
    controls: Mapping[str, object] | None = None,
    load: Callable[[object], object] | None = None,
) -> Callable[[F], F]: ...
def cached(
    function: Callable[..., object] | None = None,
    *,
    cache: CacheManager | None = None,
    scope: str | Callable[..., str] = "",
    controls: Mapping[str, object] | None = None,
    load: Callable[[object], object] | None = None,
) -> object:
    """Cache a function, coroutine function, generator or async generator by its arguments.

    Arguments and results are JSON values (dictionaries, lists, strings, numbers, pydantic models as
    arguments); results come back as JSON on a miss as well as on a hit, through ``load`` where given. A
    generator's items are replayed one by one. ``scope``: a string, or a function of the same arguments,
    whose results are kept apart. ``cache``: the process's default cache where none is given. A call whose
    arguments have no JSON form is made as if there were no cache.
    """

    def decorate(function: Callable[..., object]) -> Callable[..., object]:
        own = _Cached(function, cache, scope, controls, load)
        if inspect.isasyncgenfunction(function):
            wrapper = _wrap_async_generator(own)
        elif inspect.iscoroutinefunction(function):
            wrapper = _wrap_coroutine(own)
        elif inspect.isgeneratorfunction(function):
            wrapper = _wrap_generator(own)
        else:
            wrapper = _wrap_function(own)
        return functools.wraps(function)(wrapper)

    return decorate if function is None else decorate(function)
