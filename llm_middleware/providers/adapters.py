"""`Adapter`: how one API is spoken: what goes out for OpenAI's request, and its answer from what comes.
`prepared`: a request with the credentials that it needs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import AuthenticationError, ConfigError, ProviderError
from . import azure, openai
from .failures import failure
from .messages import Outgoing
from .target import Blocking, Target, authorized

__all__ = ["Adapter", "Signer", "adapter_of", "prepared"]


class Build(Protocol):
    def __call__(self, target: Target, kind: str, body: Mapping[str, object], stream: bool) -> Outgoing: ...


class Signer(Protocol):
    """Signs requests where a provider wants that of those who have no key. `_ports.bedrock` has one."""

    def ready(self, target: Target) -> bool:
        """Whether the other two return at once, with nothing to wait for."""
        ...

    def located(self, target: Target) -> Target:
        """``target`` with an address. May block."""
        ...

    def signed(self, target: Target, request: Outgoing) -> Outgoing:
        """``request`` with a signature; as it is where it has a key. May block."""
        ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """``answer`` and ``events`` are None where the provider answers as OpenAI does. ``signs``: whether what
    `build` makes goes through a `Signer`."""

    build: Build
    failure: Callable[..., ProviderError] = failure
    answer: Callable[..., bytes] | None = None
    events: Callable[..., AsyncIterator[bytes]] | None = None
    signs: bool = False


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

        return _translating(bedrock, signs=True)
    return _OPENAI


def _translating(module: Any, signs: bool = False) -> Adapter:
    return Adapter(module.build, module.failure, module.answer, module.events, signs)


async def prepared(
    target: Target, kind: str, body: Mapping[str, object], stream: bool, *, signer: Signer, blocking: Blocking
) -> tuple[Target, Outgoing]:
    """The request that `Adapter.build` makes, with its credentials, and the target with its own.

    ``blocking`` runs what may block: a function that gives a token, and ``signer`` where it is not ready.
    `AuthenticationError` where there are no credentials; what is wrong with the deployment's is one too, so
    that another deployment is asked.
    """
    adapter = adapter_of(target)
    target = await authorized(target, blocking)
    if not adapter.signs:
        return target, adapter.build(target, kind, body, stream)

    def signed() -> tuple[Target, Outgoing]:
        there = signer.located(target)
        return there, signer.signed(there, adapter.build(there, kind, body, stream))

    try:
        return signed() if signer.ready(target) else await blocking(signed)
    except ConfigError as exc:
        raise AuthenticationError(exc.message, param=exc.param, code="no_credentials") from exc
