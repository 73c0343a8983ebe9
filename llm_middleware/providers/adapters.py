"""`Adapter`: how one API is spoken: what goes out for OpenAI's request, and its answer from what comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ProviderError
from . import azure, openai
from .failures import failure
from .messages import Outgoing
from .target import Target

__all__ = ["Adapter", "adapter_of"]


class Build(Protocol):
    def __call__(self, target: Target, kind: str, body: Mapping[str, object], stream: bool) -> Outgoing: ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """``answer`` and ``events`` are None where the provider answers as OpenAI does."""

    build: Build
    failure: Callable[..., ProviderError] = failure
    answer: Callable[..., bytes] | None = None
    events: Callable[..., AsyncIterator[bytes]] | None = None


_OPENAI = Adapter(openai.build)
_AZURE = Adapter(azure.build)


def adapter_of(target: Target) -> Adapter:
    """The adapter of a target's API."""
    name = target.adapter
    if name == "azure":
        return _AZURE
    if name == "anthropic":
        from . import anthropic  # on first use: most apps never ask it

        return _translating(anthropic)
    if name == "bedrock":
        from . import bedrock

        return _translating(bedrock)
    return _OPENAI


def _translating(module: Any) -> Adapter:
    return Adapter(module.build, module.failure, module.answer, module.events)
