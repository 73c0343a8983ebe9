"""`build`: a chat completion's body as a request for Bedrock's Converse API."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

from ..errors import BadRequestError, ConfigError
from .anthropic_messages import Block, conversation
from .anthropic_request import (
    OPENAIS,
    limit,
    output,
    reasoning,
    stops,
    supported,
    tool_choice,
    tools,
    unsupported,
)
from .messages import Outgoing
from .openai import dumps, url
from .target import Target

__all__ = ["build"]

# Converse's own, which a caller or a deployment may set.
_CONVERSES: Final = frozenset(
    [
        "additionalModelResponseFieldPaths",
        "guardrailConfig",
        "performanceConfig",
        "promptVariables",
        "requestMetadata",
    ]
)
_OPENAIS: Final = (OPENAIS - {"anthropic_beta"}) | {"additionalModelRequestFields", "top_p"}
_TIERS: Final = ("default", "flex", "priority", "reserved")
_ON_TOP: Final = 4096  # tokens of an answer besides those to think with, where the caller does not say
_IMAGES: Final = ("gif", "jpeg", "png", "webp")
_NOT_IN_A_NAME: Final = re.compile(r"[^a-zA-Z0-9()\[\] -]+|\s\s+")


def build(target: Target, kind: str, body: Mapping[str, object], stream: bool) -> Outgoing:
    """The request for a chat completion (``kind`` is ``chat``); ``body`` is not changed.

    `BadRequestError` names the field that cannot be sent; `ConfigError` where no region is known.
    """
    if kind != "chat":
        raise BadRequestError(f"this provider has no {kind!r} requests", param="kind")
    if not target.base_url:
        raise ConfigError("bedrock needs aws_region_name", param="aws_region_name")
    model = quote(target.model.removeprefix("converse/"), safe="")
    if model in ("", ".", ".."):
        raise BadRequestError("the model is no name of a model", param="model")
    address = url(target.base_url, f"model/{model}/{'converse-stream' if stream else 'converse'}")
    accept = "application/vnd.amazon.eventstream" if stream else "application/json"
    headers = {"content-type": "application/json", "accept": accept} | dict(target.headers)
    return Outgoing(address, headers, dumps(_parameters(target, body)))


def _parameters(target: Target, body: Mapping[str, object]) -> dict[str, Any]:
    given = supported(target, body)
    system, turns = conversation(given.get("messages"))
    own, effort = _thinking(target, given)
    fields: dict[str, Any] = {
        "messages": [{**turn, "content": _blocks(turn["content"])} for turn in turns],
        "system": _blocks(system),
        "inferenceConfig": _inference(target, given, own),
        "toolConfig": _tools(target, given, turns),
        "outputConfig": _output(target, given, effort),
        "serviceTier": _tier(target, given),
        "additionalModelRequestFields": _additional(given, own),
        **{name: given[name] for name in _CONVERSES & given.keys()},
    }
    return {name: value for name, value in fields.items() if value} | dict(target.extra_body)


def _thinking(target: Target, given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The model's own fields, and the effort of ``outputConfig``."""
    if "claude" not in (target.base_model or target.model):
        return {name: given[name] for name in ("reasoning_effort", "thinking") if name in given}, None
    thinking, effort = reasoning(target, given)
    return ({} if thinking is None else {"thinking": thinking}), effort


def _inference(target: Target, given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    thinking = own.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    most = limit(given)
    if most is None and isinstance(budget, int):
        most = budget + _ON_TOP
        if target.max_output_tokens is not None:
            most = min(most, target.max_output_tokens)
    heat = given.get("temperature")
    capped = isinstance(heat, int | float) and not isinstance(heat, bool) and heat > 1
    found = {
        "maxTokens": most,
        "temperature": 1 if capped else heat,
        "topP": given.get("top_p"),
        "stopSequences": stops(given, target.drop_params),
    }
    return {name: value for name, value in found.items() if value is not None}


def _output(target: Target, given: Mapping[str, Any], effort: str | None) -> dict[str, Any]:
    made = output(given, effort, target.drop_params) or {}
    found = {"effort": made["effort"]} if "effort" in made else {}
    wanted = made.get("format")
    if not isinstance(wanted, Mapping):
        return found
    name = _mapping(_mapping(given.get("response_format")).get("json_schema")).get("name")
    schema = {"schema": dumps(_mapping(wanted.get("schema"))).decode(), "name": name or "answer"}
    return {**found, "textFormat": {"type": "json_schema", "structure": {"jsonSchema": schema}}}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _tier(target: Target, given: Mapping[str, Any]) -> dict[str, str] | None:
    tier = given.get("service_tier")
    if tier in _TIERS:
        return {"type": tier}
    if tier not in (None, "auto") and not target.drop_params:
        raise unsupported("service_tier")
    return None


def _additional(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What is the model's own: said as such, or not known to be anyone else's."""
    said = given.get("additionalModelRequestFields")
    if said is not None and not isinstance(said, Mapping):
        message = "additionalModelRequestFields: expected a mapping"
        raise BadRequestError(message, param="additionalModelRequestFields")
    others = {n: value for n, value in given.items() if n not in _OPENAIS and n not in _CONVERSES}
    return {**others, **own, **(said or {})}


# --- tools


def _tools(target: Target, given: Mapping[str, Any], turns: list[dict[str, Any]]) -> dict[str, Any] | None:
    if given.get("parallel_tool_calls") is False and given.get("tools") and not target.drop_params:
        raise unsupported("parallel_tool_calls")
    choice = tool_choice({**given, "parallel_tool_calls": None}) or {"type": "auto"}
    blocks = [block for turn in turns for block in turn["content"] if block["type"] == "tool_use"]
    used = dict.fromkeys(str(block.get("name")) for block in blocks)
    if choice["type"] == "none":
        if used and not target.drop_params:
            raise unsupported("tool_choice")
        given = {**given, "tools": None}
    # Bedrock refuses calls in a conversation that has no tools.
    specs = [spec for tool in tools(given) or [] for spec in _spec(tool)] or [_known(name) for name in used]
    if not specs:
        return None
    made: dict[str, Any] = {"tools": specs}
    if choice["type"] == "any":
        made["toolChoice"] = {"any": {}}
    elif choice["type"] == "tool":
        made["toolChoice"] = {"tool": {"name": choice["name"]}}
    return made


def _spec(tool: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "input_schema" not in tool:
        raise BadRequestError("tools: Bedrock has functions only", param="tools")
    spec = {"name": tool.get("name"), "inputSchema": {"json": tool["input_schema"]}}
    spec |= {name: tool[name] for name in ("description", "strict") if name in tool}
    return [{"toolSpec": spec}, *_cache_point(tool)]


def _known(name: str) -> dict[str, Any]:
    """A tool of which only the name is known, from an earlier call."""
    schema = {"json": {"type": "object", "properties": {}}}
    return {"toolSpec": {"name": name, "inputSchema": schema}}


# --- blocks


def _cache_point(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mark for the prompt cache, which is a block of its own here."""
    mark = block.get("cache_control")
    if not isinstance(mark, Mapping):
        return []
    lasting = {"ttl": mark["ttl"]} if "ttl" in mark else {}
    return [{"cachePoint": {"type": "default", **lasting}}]


def _blocks(blocks: list[Block]) -> list[dict[str, Any]]:
    return [made for block in blocks for made in (_block(block), *_cache_point(block))]


def _block(block: object) -> dict[str, Any]:
    made = _mapping(block)
    kind = made.get("type")
    make = _KINDS.get(kind) if isinstance(kind, str) else None
    if make is None:
        raise BadRequestError(f"messages: Bedrock reads no {kind}", param="messages")
    return make(made)


def _text(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": block.get("text")}


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    named = {"toolUseId": block.get("id"), "name": block.get("name")}
    return {"toolUse": {**named, "input": block.get("input")}}


def _result(block: Mapping[str, Any]) -> dict[str, Any]:
    content = block.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise BadRequestError("messages: expected the content of a result to be a list", param="messages")
    failed = {"status": "error"} if block.get("is_error") else {}
    made = {"toolUseId": block.get("tool_use_id"), "content": [_block(part) for part in parts], **failed}
    return {"toolResult": made}


def _thought(block: Mapping[str, Any]) -> dict[str, Any]:
    if block["type"] == "redacted_thinking":
        return {"reasoningContent": {"redactedContent": block.get("data")}}
    told = {"text": block.get("thinking"), "signature": block.get("signature")}
    return {"reasoningContent": {"reasoningText": told}}


def _media(block: Mapping[str, Any]) -> dict[str, Any]:
    source = _mapping(block.get("source"))
    data, form = source.get("data"), str(source.get("media_type")).rpartition("/")[2]
    if not isinstance(data, str):
        raise BadRequestError("messages: Bedrock fetches nothing; expected a data: URL", param="messages")
    if source.get("type") == "text":
        data, form = base64.b64encode(data.encode(errors="replace")).decode(), "txt"
    if block["type"] == "document":
        name = _NOT_IN_A_NAME.sub(" ", str(block.get("title") or "")).strip() or "document"
        return {"document": {"format": form, "name": name[:200], "source": {"bytes": data}}}
    if form not in _IMAGES:
        raise BadRequestError(f"messages: Bedrock reads images as {', '.join(_IMAGES)}", param="messages")
    return {"image": {"format": form, "source": {"bytes": data}}}


_KINDS: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "document": _media,
    "image": _media,
    "redacted_thinking": _thought,
    "text": _text,
    "thinking": _thought,
    "tool_result": _result,
    "tool_use": _call,
}
