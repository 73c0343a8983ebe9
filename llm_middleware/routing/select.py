"""Which deployments of a group a request may go to, before any strategy chooses among them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import ContextWindowExceededError
from .deployment import Deployment

__all__ = ["fitting", "prompt_tokens", "tagged", "tags_of", "without_tags"]

_CHARACTERS = 4  # of English text to a token, about
_PER_MESSAGE = 4  # tokens
_DEFAULT = "default"
_UNREAD = frozenset(
    {"role", "type", "image_url", "input_audio", "file", "file_data"}
)  # no text of the prompt
_PLAIN = frozenset({"role", "content"})  # what most messages have


def prompt_tokens(body: Mapping[str, object]) -> int:
    """About how many tokens the prompt has: a quarter of its characters, and four for each message."""
    messages = body.get("messages")
    parts = messages if isinstance(messages, list) else [body.get("input"), body.get("prompt")]
    count = sum(_length(part) for part in parts) // _CHARACTERS
    return count + (_PER_MESSAGE * len(parts) if parts is messages else 0)


def _length(value: object) -> int:
    if type(value) is dict and type(text := value.get("content")) is str and value.keys() <= _PLAIN:
        return len(text)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_length(item) for name, item in value.items() if name not in _UNREAD)
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], int):
            return len(value) * _CHARACTERS  # tokens already
        return sum(map(_length, value))
    return 0


def tags_of(body: Mapping[str, object]) -> frozenset[str]:
    """The tags that a request asks for, in its metadata as LiteLLM has them."""
    metadata = body.get("metadata")
    tags = metadata.get("tags") if isinstance(metadata, Mapping) else None
    return frozenset(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else frozenset()


def without_tags(body: dict[str, object]) -> dict[str, object]:
    """As it may be sent: the tags are for the Router, and providers refuse a list there."""
    metadata = body.get("metadata")
    if not isinstance(metadata, Mapping) or "tags" not in metadata:
        return body
    rest = {name: value for name, value in metadata.items() if name != "tags"}
    return {
        name: rest if name == "metadata" else value
        for name, value in body.items()
        if rest or name != "metadata"
    }


def tagged(deployments: Sequence[Deployment], tags: Iterable[str]) -> list[Deployment]:
    """Those that have one of ``tags``, else those tagged ``default``. Without tags: those tagged ``default``,
    else all."""
    wanted = frozenset(tags)
    found = [each for each in deployments if each.tags & wanted]
    found = found or [each for each in deployments if _DEFAULT in each.tags]
    return found if found or wanted else list(deployments)


def fitting(deployments: Sequence[Deployment], tokens: int) -> list[Deployment]:
    """Those whose model reads ``tokens``. `ContextWindowExceededError` where there are none."""
    fit = [each for each in deployments if tokens <= _window(each)]
    if deployments and not fit:
        raise ContextWindowExceededError(f"the prompt has about {tokens} tokens, more than this model reads")
    return fit


def _window(deployment: Deployment) -> float:
    window = deployment.info.get("max_input_tokens")
    return window if isinstance(window, (int, float)) and not isinstance(window, bool) else float("inf")
