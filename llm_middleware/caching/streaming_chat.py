"""Chat and text completions: many chunks to one body.

The tables below say, field by field, how what several chunks say becomes one value. A field that no
table names is kept if it was said once or always the same way; otherwise nobody can know how to put
it together, and the conversion is refused (`LossyError`). A null adds nothing anywhere.

Shapes: https://platform.openai.com/docs/api-reference/chat-streaming, and the same for completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from .sse import dump_json

__all__ = [
    "HEAD",
    "JSON",
    "LOGPROBS",
    "LossyError",
    "chat_body",
    "index_of",
    "list_of",
    "object_of",
    "text_body",
    "text_of",
]

JSON: TypeAlias = dict[str, object]
"""A JSON object."""

HEAD = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
"""What every chunk of a stream says alike."""

LOGPROBS = ("content", "refusal", "tokens", "token_logprobs", "top_logprobs", "text_offset")
"""The lists of log probabilities, one item per token: two in chat, four in text completions."""

_Rule: TypeAlias = Callable[[JSON, str, object], None]


class LossyError(ValueError):
    """The other form cannot say what this one says."""


class _Text(list[str]):
    """A string in pieces."""


class _Indexed(dict[int, "_Merged"]):
    """A list whose items come in pieces, each piece under the index of its item."""


class _Merged:
    """An object in pieces, put together by ``rules``; ``other`` is the rule for fields without one."""

    __slots__ = ("fields", "other", "rules")

    def __init__(self, rules: Mapping[str, _Rule], other: _Rule) -> None:
        self.fields: JSON = {}
        self.rules = rules
        self.other = other

    def add(self, data: JSON) -> None:
        for key, value in data.items():
            if value is None:
                self.fields.setdefault(key, None)
            else:
                self.rules.get(key, self.other)(self.fields, key, value)

    def result(self) -> JSON:
        return {key: _whole(value) for key, value in self.fields.items()}


def _whole(value: object) -> object:
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, _Merged):
        return value.result()
    if isinstance(value, _Indexed):
        return [value[index].result() for index in sorted(value)]
    return value


def object_of(value: object) -> JSON:
    """``value``, which must be an object."""
    if not isinstance(value, dict):
        raise LossyError("not an object")
    return value


def list_of(value: object) -> list[object]:
    """``value``, which must be a list."""
    if not isinstance(value, list):
        raise LossyError("not a list")
    return value


def text_of(value: object) -> str:
    """``value``, which must be a string."""
    if not isinstance(value, str):
        raise LossyError("not a string")
    return value


def index_of(item: JSON) -> int:
    """The ``index`` of a choice or tool call, which must have one."""
    index = item.get("index")
    if not isinstance(index, int) or isinstance(index, bool):
        raise LossyError("no index")
    return index


# The rules: what one more value, never null, does to a field.


def _same(fields: JSON, key: str, value: object) -> None:
    """Always the same value."""
    old = fields.setdefault(key, value)
    if old is None:
        fields[key] = value
    elif dump_json(old) != dump_json(value):
        raise LossyError(f"{key} was said in two ways")


def _name(fields: JSON, key: str, value: object) -> None:
    """Always the same value, but for the "" and 0 that some providers send before they know it."""
    if not fields.get(key):
        fields[key] = value
    elif value:
        _same(fields, key, value)


def _once(fields: JSON, key: str, value: object) -> None:
    """One value. Equal texts may be one value said twice or two pieces of it, so they do not do."""
    if fields.get(key) is not None and value and isinstance(value, str | list | dict):
        raise LossyError(f"{key} was said twice")
    _same(fields, key, value)


def _newest(fields: JSON, key: str, value: object) -> None:
    """The last value: usage that is told more than once is a running total."""
    fields[key] = value


def _join(fields: JSON, key: str, value: object) -> None:
    """A string in pieces."""
    pieces = fields.get(key)
    if not isinstance(pieces, _Text):
        fields[key] = pieces = _Text()
    pieces.append(text_of(value))


def _extend(fields: JSON, key: str, value: object) -> None:
    """A list in pieces."""
    if fields.get(key) is None:
        fields[key] = []
    list_of(fields[key]).extend(list_of(value))


def _nested(rules: Mapping[str, _Rule], other: _Rule) -> _Rule:
    """An object in pieces."""

    def add(fields: JSON, key: str, value: object) -> None:
        merged = fields.get(key)
        if not isinstance(merged, _Merged):
            fields[key] = merged = _Merged(rules, other)
        merged.add(object_of(value))

    return add


def _by_index(rules: Mapping[str, _Rule], other: _Rule) -> _Rule:
    """A list of objects in pieces that name the object they belong to."""

    def add(fields: JSON, key: str, value: object) -> None:
        items = fields.get(key)
        if not isinstance(items, _Indexed):
            fields[key] = items = _Indexed()
        for item in map(object_of, list_of(value)):
            items.setdefault(index_of(item), _Merged(rules, other)).add(item)

    return add


def _drop(fields: JSON, key: str, value: object) -> None:
    """Not part of the answer."""


_FUNCTION: Mapping[str, _Rule] = {"name": _name, "arguments": _join}
_TOOL_CALL: Mapping[str, _Rule] = {
    "index": _drop,  # no field of the plain form, unlike that of a choice
    "id": _name,
    "type": _name,
    "function": _nested(_FUNCTION, _once),
}
_DELTA: Mapping[str, _Rule] = {
    "role": _name,
    "reasoning_content": _join,
    "reasoning": _join,
    "content": _join,
    "refusal": _join,
    "tool_calls": _by_index(_TOOL_CALL, _once),
    "function_call": _nested(_FUNCTION, _once),
}
_LOGPROBS: Mapping[str, _Rule] = dict.fromkeys(LOGPROBS, _extend)
_CHAT_CHOICE: Mapping[str, _Rule] = {
    "delta": _nested(_DELTA, _once),
    "finish_reason": _name,
    "logprobs": _nested(_LOGPROBS, _once),
}
_TEXT_CHOICE: Mapping[str, _Rule] = {
    "text": _join,
    "finish_reason": _name,
    "logprobs": _nested(_LOGPROBS, _once),
}
_CHUNK: Mapping[str, _Rule] = {
    **dict.fromkeys(HEAD, _name),
    "usage": _newest,
    "obfuscation": _drop,  # random padding against traffic analysis
}


_INSTEAD = ("tool_calls", "function_call", "refusal")


def chat_body(chunks: Sequence[JSON]) -> JSON:
    """The ``chat.completion`` that ``chat.completion.chunk`` objects make up; `LossyError` if none."""
    return _body(chunks, _CHAT_CHOICE, _chat_choice, "chat.completion")


def text_body(chunks: Sequence[JSON]) -> JSON:
    """The whole ``text_completion`` that streamed ones make up; `LossyError` if they make none."""
    return _body(chunks, _TEXT_CHOICE, _Merged.result, "text_completion")


def _body(
    chunks: Sequence[JSON], rules: Mapping[str, _Rule], choice: Callable[[_Merged], JSON], name: str
) -> JSON:
    merged = _Merged({**_CHUNK, "choices": _by_index(rules, _same)}, _same)
    for chunk in chunks:
        merged.add(chunk)
    choices = merged.fields.pop("choices", None)
    if not isinstance(choices, _Indexed) or not choices:
        raise LossyError("no choices")
    if not all(each.fields.get("finish_reason") for each in choices.values()):
        raise LossyError("an unfinished choice")
    whole = [choice(choices[index]) for index in sorted(choices)]
    body = {**merged.result(), "object": name, "choices": whole}
    # A plain body always tells its usage, a stream only on request.
    body["usage"] = object_of(body.pop("usage", None))
    return body


def _chat_choice(choice: _Merged) -> JSON:
    delta = choice.fields.pop("delta", None)
    if not isinstance(delta, _Merged) or "message" in choice.fields:
        raise LossyError("no delta")
    message = {"role": None, "content": None, **delta.result()}
    if "role" not in delta.fields:
        del message["role"]
    # A lone "" only accompanies the role; beside a call or a refusal it stands for no content at all.
    if delta.fields.get("content") == [""] and any(message.get(key) for key in _INSTEAD):
        message["content"] = None
    return {"index": choice.fields["index"], "message": message, **choice.result()}
