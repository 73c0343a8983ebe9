"""`build`: a chat completion's body as a request for Anthropic's Messages API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from ..errors import BadRequestError
from .anthropic_messages import conversation
from .anthropic_schema import fitted
from .messages import Outgoing
from .openai import dumps, url
from .target import Target

__all__ = [
    "OPENAIS",
    "build",
    "limit",
    "output",
    "reasoning",
    "stops",
    "supported",
    "tool_choice",
    "tools",
    "unsupported",
]

_VERSION: Final = "2023-06-01"
_MOST: Final = 4096  # tokens of an answer where nobody says
_SMALLEST_BUDGET: Final = 1024
# Tokens to think with, where a model has budgets and no efforts.
_BUDGETS: Final[Mapping[str, int]] = {
    "minimal": 1024,
    "low": 1024,
    "medium": 2048,
    "high": 4096,
    "xhigh": 8192,
    "max": 16384,
}
# No counterpart; with a value that asks for nothing, where there is one.
_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "seed": (),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Translated below, or of no matter to the answer.
OPENAIS: Final = frozenset(
    [
        "anthropic_beta",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "metadata",
        "model",
        "output_config",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "service_tier",
        "stop",
        "store",
        "stream",
        "stream_options",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "user",
        *_UNSUPPORTED,
    ]
)
_SAMPLING: Final = ("temperature", "top_p", "top_k")
_TIERS: Final = {"auto": "auto", "default": "standard_only", "standard_only": "standard_only"}
_CLAUDE: Final = re.compile(r"claude-[a-z]+-(\d+)(?:[.-](\d{1,2})(?!\d))?")
_OLD_CLAUDE: Final = re.compile(r"claude-(?:v?\d|instant)")


def build(target: Target, kind: str, body: Mapping[str, object], stream: bool) -> Outgoing:
    """The request for a chat completion (``kind`` is ``chat``); ``body`` is not changed.

    ``anthropic_beta`` in the body, a text or a list, joins the header ``anthropic-beta``.
    `BadRequestError` names the field that cannot be sent.
    """
    if kind != "chat":
        raise BadRequestError(f"this provider has no {kind!r} requests", param="kind")
    below = urlsplit(target.base_url).path.rstrip("/")
    address = url(target.base_url, "messages" if below.endswith("/v1") else "v1/messages")
    return Outgoing(address, _headers(target, body, stream), dumps(_parameters(target, body, stream)))


def _headers(target: Target, body: Mapping[str, object], stream: bool) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream" if stream else "application/json",
        "anthropic-version": _VERSION,
    } | dict(target.headers)
    beta = body.get("anthropic_beta")
    named = [beta] if isinstance(beta, str) else beta or []
    if not isinstance(named, list) or not all(isinstance(n, str) and _is_beta(n) for n in named):
        raise BadRequestError("anthropic_beta: expected a list of names", param="anthropic_beta")
    both = [*filter(None, [headers.get("anthropic-beta")]), *named]
    return {**headers, "anthropic-beta": ",".join(both)} if both else headers


def _is_beta(name: str) -> bool:
    return re.fullmatch(r"[\w., -]+", name, re.ASCII) is not None


def _parameters(target: Target, body: Mapping[str, object], stream: bool) -> dict[str, Any]:
    given = supported(target, body)
    system, turns = conversation(given.get("messages"))
    thinking, effort = reasoning(target, given)
    fields: dict[str, Any] = {
        "model": target.model,
        "max_tokens": _most(target, given, thinking),
        "messages": turns,
        "system": system or None,
        "tools": tools(given),
        "tool_choice": tool_choice(given),
        "thinking": thinking,
        "output_config": output(given, effort, target.drop_params),
        "stop_sequences": stops(given, target.drop_params),
        "metadata": _metadata(given),
        "service_tier": _tier(given, target.drop_params),
        "stream": stream or None,
        **_sampling(target, given, thinking),
    }
    fields |= {name: value for name, value in given.items() if name not in OPENAIS and name not in _SAMPLING}
    return {name: value for name, value in fields.items() if value is not None} | dict(target.extra_body)


def supported(target: Target, body: Mapping[str, object]) -> dict[str, Any]:
    """What of ``body`` is set and to be sent. `BadRequestError` for what has no counterpart."""
    given = {n: value for n, value in body.items() if value is not None and n not in target.drop}
    for name in _UNSUPPORTED.keys() & given.keys():
        if given[name] not in _UNSUPPORTED[name] and not target.drop_params:
            raise unsupported(name)
        del given[name]
    return given


def unsupported(name: str) -> BadRequestError:
    """The error for a field that has no counterpart."""
    text = f"{name}: this provider has nothing like it; drop_params leaves it out"
    return BadRequestError(text, param=name, code="unsupported_parameter")


# --- how long, and how much thought


def limit(given: Mapping[str, Any]) -> int | None:
    """How many tokens the caller allows; the newer name's where both are there."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = given.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise BadRequestError(f"{name}: expected a whole number", param=name)
    return None


def _most(target: Target, given: Mapping[str, Any], thinking: object) -> int:
    most = limit(given)
    if most is None:
        most = target.max_output_tokens
    if most is not None:
        return most
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return _MOST + (budget if isinstance(budget, int) else 0)


def _budgeted(model: str) -> bool:
    """Whether a model takes a number of tokens to think with; Claude after 4.5 takes an effort."""
    release = _release(model)
    return release is None or release <= (4, 5)


def _release(model: str) -> tuple[int, int] | None:
    """``claude-sonnet-4-5-20250929`` is (4, 5). None for what is no Claude, and for those before 3.7."""
    found = _CLAUDE.search(model)
    if found is not None:
        return int(found[1]), int(found[2] or 0)
    if "claude" not in model or _OLD_CLAUDE.search(model):
        return None
    return (99, 0)  # names without a number came after those with one


def reasoning(target: Target, given: Mapping[str, Any]) -> tuple[object, str | None]:
    """``thinking`` and ``output_config.effort``; the caller's own ``thinking`` decides where it is given."""
    effort = given.get("reasoning_effort")
    if "thinking" in given or effort in (None, "none"):
        return given.get("thinking"), None
    if not isinstance(effort, str) or effort not in _BUDGETS:
        message = f"reasoning_effort: expected none or one of {', '.join(_BUDGETS)}"
        raise BadRequestError(message, param="reasoning_effort")
    if not _budgeted(target.base_model or target.model):
        return {"type": "adaptive"}, "low" if effort == "minimal" else effort
    most = limit(given)
    if most is None:
        most = target.max_output_tokens
    budget = _BUDGETS[effort] if most is None else min(_BUDGETS[effort], most - 1)
    # A hint that has no room within the limit is left out.
    return ({"type": "enabled", "budget_tokens": budget} if budget >= _SMALLEST_BUDGET else None), None


def _sampling(target: Target, given: Mapping[str, Any], thinking: object) -> dict[str, object]:
    fields = {name: given[name] for name in _SAMPLING if name in given}
    if fields and target.drop_params and _refuses_sampling(target, thinking):
        return {}
    heat = fields.get("temperature")
    if isinstance(heat, int | float) and not isinstance(heat, bool) and heat > 1:
        fields["temperature"] = 1
    return fields


def _refuses_sampling(target: Target, thinking: object) -> bool:
    """Newer models do, the newer version of the API does, and all do while they think."""
    version = target.headers.get("anthropic-version", _VERSION)
    thinks = isinstance(thinking, Mapping) and thinking.get("type") != "disabled"
    return thinks or version > _VERSION or (_release(target.base_model or target.model) or (0, 0)) > (4, 6)


# --- the rest, one by one


def output(given: Mapping[str, Any], effort: str | None, drop: bool) -> dict[str, Any] | None:
    """``output_config``: the effort, and the form of the answer that ``response_format`` asks for."""
    own = given.get("output_config", {})
    if not isinstance(own, Mapping):
        raise BadRequestError("output_config: expected a mapping", param="output_config")
    made = dict(own)
    if effort is not None:
        made.setdefault("effort", effort)
    wanted = given.get("response_format") or {"type": "text"}
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "json_schema":
        made["format"] = {"type": "json_schema", "schema": _schema(wanted)}
    elif kind != "text" and not drop:
        message = "response_format: expected text or a json_schema; this provider has no other"
        raise BadRequestError(message, param="response_format", code="unsupported_parameter")
    return made or None


def _schema(wanted: Mapping[str, Any]) -> object:
    named = wanted.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, Mapping):
        message = "response_format.json_schema.schema: expected a schema"
        raise BadRequestError(message, param="response_format")
    try:
        return fitted(schema)
    except RecursionError:
        raise BadRequestError("response_format: too deep", param="response_format") from None


def stops(given: Mapping[str, Any], drop: bool) -> object:
    """The texts that end the answer; None for none."""
    stop = given.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if drop and isinstance(stops, list):  # Anthropic refuses those of nothing but space
        stops = [text for text in stops if not isinstance(text, str) or text.strip()]
    return stops or None


def _metadata(given: Mapping[str, Any]) -> dict[str, object] | None:
    """OpenAI's metadata are the caller's notes; Anthropic's have one field."""
    metadata = given.get("metadata")
    user = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    user = user or given.get("user") or given.get("safety_identifier")
    return {"user_id": user} if user else None


def _tier(given: Mapping[str, Any], drop: bool) -> str | None:
    tier = given.get("service_tier")
    if tier is None or (isinstance(tier, str) and tier in _TIERS):
        return None if tier is None else _TIERS[tier]
    if drop:
        return None
    raise unsupported("service_tier")


# --- tools


def tools(given: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """OpenAI's functions as Anthropic's tools; tools in Anthropic's own words as they are."""
    found = given.get("tools") or []
    if not isinstance(found, list):
        raise BadRequestError("tools: expected a list", param="tools")
    return [_tool(tool, f"tools[{place}]") for place, tool in enumerate(found)] or None


def _tool(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or isinstance(tool.get("custom"), Mapping):
        raise BadRequestError(f"{where}: expected a function", param=where)
    function = tool.get("function")
    if tool.get("type") != "function":
        return dict(tool)
    if not isinstance(function, Mapping):
        raise BadRequestError(f"{where}.function: expected a mapping", param=where)
    schema = function.get("parameters") or {"properties": {}}
    if not isinstance(schema, Mapping):
        raise BadRequestError(f"{where}.function.parameters: expected a schema", param=where)
    made = {"name": function.get("name"), "input_schema": {"type": "object", **schema}}
    made |= {name: function[name] for name in ("description", "cache_control") if function.get(name)}
    made |= {name: tool[name] for name in ("cache_control",) if tool.get(name)}
    return {**made, "strict": True} if function.get("strict") is True else made


def tool_choice(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which tool the model is to use; None where there is none to choose from, or nothing is said."""
    if not given.get("tools"):
        return None
    choice = _choice(given.get("tool_choice"))
    if given.get("parallel_tool_calls") is False:
        choice = choice or {"type": "auto"}
        if choice["type"] != "none":
            choice["disable_parallel_tool_use"] = True
    return choice


def _choice(wanted: object) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if isinstance(wanted, str) and wanted in ("auto", "none", "required"):
        return {"type": "any" if wanted == "required" else wanted}
    if isinstance(wanted, Mapping) and wanted.get("type") in ("auto", "any", "tool", "none"):
        return dict(wanted)
    function = wanted.get("function") if isinstance(wanted, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        return {"type": "tool", "name": function["name"]}
    message = "tool_choice: expected auto, none, required or a function"
    raise BadRequestError(message, param="tool_choice")
