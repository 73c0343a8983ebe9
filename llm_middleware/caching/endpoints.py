"""Endpoint kinds: one row per API shape, read by keys, admission, streaming and the middlewares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ConfigError, did_you_mean

__all__ = ["CALL_TYPES", "ENDPOINTS", "OPENAI_ROUTES", "Endpoint", "kind_of"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is particular to one kind of request.

    ``ignored``: body fields that never change the answer. ``defaults``: values that mean the same as
    leaving the field out, whoever the provider is (so not ``temperature``: its default is the model's).
    ``null_is_absent``: a top-level ``null`` means the field was not given.
    ``terminal``: how a complete stream ends; None where that is not known.
    ``convertible``: streams and plain bodies of this kind can be turned into each other.
    """

    kind: str
    ignored: frozenset[str]
    defaults: Mapping[str, object] = field(default_factory=dict)
    null_is_absent: bool = True
    terminal: str | None = None
    convertible: bool = False


_COMMON = frozenset({"cache", "stream", "stream_options", "metadata"})

ENDPOINTS: Mapping[str, Endpoint] = {
    "chat": Endpoint(
        "chat",
        _COMMON,
        {
            "n": 1,
            "tools": [],
            "functions": [],
            "stop": [],
            "logprobs": False,
            "logit_bias": {},
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "response_format": {"type": "text"},
        },
        terminal="[DONE]",
        convertible=True,
    ),
    "text": Endpoint(
        "text",
        _COMMON,
        {
            "n": 1,
            "echo": False,
            "stop": [],
            "logit_bias": {},
            "frequency_penalty": 0,
            "presence_penalty": 0,
        },
        terminal="[DONE]",
        convertible=True,
    ),
    "embedding": Endpoint("embedding", _COMMON, {"encoding_format": "float"}),
    "transcription": Endpoint("transcription", _COMMON, {"response_format": "json"}),
    "responses": Endpoint(
        "responses",
        _COMMON,
        {"tools": [], "background": False, "include": [], "text": {"format": {"type": "text"}}},
        terminal="response.completed",
        convertible=True,
    ),
    "messages": Endpoint("messages", _COMMON, {"tools": [], "stop_sequences": []}, terminal="message_stop"),
    "json": Endpoint("json", frozenset({"cache", "stream"}), null_is_absent=False),
}

# LiteLLM's names for call types, https://docs.litellm.ai/docs/caching/all_caches
CALL_TYPES: Mapping[str, str] = {
    "completion": "chat",
    "acompletion": "chat",
    "text_completion": "text",
    "atext_completion": "text",
    "embedding": "embedding",
    "aembedding": "embedding",
    "transcription": "transcription",
    "atranscription": "transcription",
    "responses": "responses",
    "aresponses": "responses",
    "anthropic_messages": "messages",
    **{kind: kind for kind in ENDPOINTS},
}

OPENAI_ROUTES: Mapping[str, str] = {
    prefix + path: kind
    for prefix in ("/v1", "")
    for path, kind in {
        "/chat/completions": "chat",
        "/completions": "text",
        "/embeddings": "embedding",
        "/audio/transcriptions": "transcription",
        "/responses": "responses",
    }.items()
}


def kind_of(name: str, *, param: str) -> str:
    """The kind that ``name`` (a kind or one of LiteLLM's call types) stands for; `ConfigError` else."""
    kind = CALL_TYPES.get(name)
    if kind is None:
        hint = did_you_mean(name, CALL_TYPES) or f"; known: {', '.join(CALL_TYPES)}"
        raise ConfigError(f"{param}: unknown call type {name!r}{hint}", param=param)
    return kind
