"""OpenAI's messages as Anthropic's: the system's blocks, and turns of a user and an assistant."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from ..errors import BadRequestError

__all__ = ["Block", "Turn", "conversation", "tool_id"]

Block = dict[str, Any]
Turn = dict[str, Any]

_ID: Final = re.compile(r"[^a-zA-Z0-9_-]")
_NOT_HERE: Final = frozenset(["audio", "input_audio", "video_url"])
_IMAGES: Final = {"image/jpg": "image/jpeg"}


def conversation(messages: object) -> tuple[list[Block], list[Turn]]:
    """The blocks of all system and developer messages, and the turns.

    Blocks of text that hold nothing but space are left out: Anthropic refuses them. `BadRequestError` names
    the message that is wrong.
    """
    if not isinstance(messages, list):
        raise BadRequestError("messages: expected a list of messages", param="messages")
    system: list[Block] = []
    turns: list[Turn] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping):
            raise _wrong(where, "expected a mapping")
        role = message.get("role")
        if role in ("system", "developer"):
            system += _content(message, where)
            continue
        blocks = _ROLES.get(role) if isinstance(role, str) else None
        if blocks is None:
            raise _wrong(f"{where}.role", "expected system, developer, user, assistant or tool")
        _add(turns, "assistant" if role == "assistant" else "user", blocks(message, where))
    if not turns:
        raise BadRequestError("messages: expected one of a user with some content", param="messages")
    _trim(turns[-1])
    return system, turns


def tool_id(value: object, where: str) -> str:
    """The id of a call with only the characters that Anthropic takes; other providers use more."""
    if not isinstance(value, str):
        raise _wrong(where, "expected the id of a tool call")
    return _ID.sub("_", value)


def _wrong(where: str, expected: str) -> BadRequestError:
    return BadRequestError(f"{where}: {expected}", param=where)


def _add(turns: list[Turn], role: str, blocks: list[Block]) -> None:
    if not blocks:
        return
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] += blocks
    else:
        turns.append({"role": role, "content": blocks})


def _trim(turn: Turn) -> None:
    """An answer that is to be continued must not end in space."""
    last = turn["content"][-1]
    if turn["role"] == "assistant" and last.get("type") == "text":
        turn["content"][-1] = {**last, "text": last["text"].rstrip()}


# --- the roles


def _assistant(message: Mapping[str, Any], where: str) -> list[Block]:
    blocks = _thinking(message.get("thinking_blocks"))
    blocks += _content(message, where)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _wrong(f"{where}.tool_calls", "expected a list")
    blocks += [_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return blocks


def _thinking(blocks: object) -> list[Block]:
    """Those that Anthropic has made itself: others have no signature, and would be refused."""
    if not isinstance(blocks, list):
        return []
    own = [block for block in blocks if isinstance(block, Mapping) and _signed(block)]
    return [{name: value for name, value in block.items() if name != "index"} for block in own]


def _signed(block: Mapping[str, Any]) -> bool:
    return bool(block.get("signature") if block.get("type") == "thinking" else block.get("data"))


def _call(call: object, where: str) -> Block:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _wrong(where, "expected a call of a function")
    arguments = function.get("arguments") or "{}"
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, Mapping):
        raise _wrong(f"{where}.function.arguments", "expected a JSON object")
    if not isinstance(function.get("name"), str):
        raise _wrong(f"{where}.function.name", "expected text")
    block = {"type": "tool_use", "id": tool_id(call.get("id"), f"{where}.id")}
    return _cached(call, {**block, "name": function["name"], "input": given})


def _result(message: Mapping[str, Any], where: str) -> list[Block]:
    answers = tool_id(message.get("tool_call_id"), f"{where}.tool_call_id")
    block: Block = {"type": "tool_result", "tool_use_id": answers}
    content = _parts(message.get("content"), where)
    if content:
        block["content"] = content
    if message.get("is_error") is True:
        block["is_error"] = True
    return [_cached(message, block)]


# --- content


def _content(message: Mapping[str, Any], where: str) -> list[Block]:
    blocks = _parts(message.get("content"), where)
    if blocks:
        blocks[-1] = _cached(message, blocks[-1])
    return blocks


def _cached(part: Mapping[str, Any], block: Block) -> Block:
    """``block`` with the mark for the prompt cache that ``part`` has."""
    mark = part.get("cache_control")
    return {**block, "cache_control": mark} if mark is not None else block


def _parts(content: object, where: str) -> list[Block]:
    if content is None:
        return []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _wrong(f"{where}.content", "expected text or a list of parts")
    places = [f"{where}.content[{place}]" for place in range(len(content))]
    blocks = [_part(part, place) for part, place in zip(content, places, strict=True)]
    return [block for block in blocks if block.get("type") != "text" or block["text"].strip()]


def _part(part: object, where: str) -> Block:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise _wrong(where, "expected a mapping with a type")
    if kind in _NOT_HERE:
        raise _wrong(where, f"Anthropic reads no {kind}")
    make = _PARTS.get(kind)
    return _cached(part, make(part, where)) if make is not None else dict(part)


def _text(part: Mapping[str, Any], where: str) -> Block:
    text = part.get(part["type"])
    if not isinstance(text, str):
        raise _wrong(where, "expected text")
    kept = {name: part[name] for name in ("citations",) if name in part}
    return {"type": "text", "text": text, **kept}


def _image(part: Mapping[str, Any], where: str) -> Block:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    return {"type": "image", "source": _source(url, f"{where}.image_url.url")}


def _source(url: object, where: str) -> dict[str, str]:
    if isinstance(url, str) and url[:5].lower() == "data:":
        media, data = _data(url)
        return {"type": "base64", "media_type": media, "data": data}
    if isinstance(url, str) and url[:8].lower().startswith(("http://", "https://")):
        return {"type": "url", "url": url}
    raise _wrong(where, "expected a data: or an http(s) URL")


def _data(url: str) -> tuple[str, str]:
    """The media type and the base64 of a ``data:`` URL (RFC 2397)."""
    head, _, data = url[5:].partition(",")
    media, *params = (word.strip().lower() for word in head.split(";"))
    if "base64" not in params:
        data = base64.b64encode(unquote_to_bytes(data.encode(errors="replace"))).decode()
    return _IMAGES.get(media, media), data


def _file(part: Mapping[str, Any], where: str) -> Block:
    file = part.get("file")
    if not isinstance(file, Mapping):
        raise _wrong(f"{where}.file", "expected a mapping")
    title = file.get("filename")
    named = {"title": title} if isinstance(title, str) and title else {}
    data, number = file.get("file_data"), file.get("file_id")
    if data is not None:
        return _document(_source(data, f"{where}.file.file_data"), named, where)
    if not isinstance(number, str) or not number:
        raise _wrong(f"{where}.file", "expected file_data or file_id")
    if number.lower().startswith(("http://", "https://")):
        return _document(_source(number, where), named, where)
    return {"type": "document", "source": {"type": "file", "file_id": number}, **named}


def _document(source: dict[str, str], named: dict[str, str], where: str) -> Block:
    media = source.get("media_type", "application/pdf")
    if media.startswith("image/"):
        return {"type": "image", "source": source}
    if media.startswith("text/"):
        try:
            text = base64.b64decode(source["data"], validate=True).decode()
        except (binascii.Error, ValueError):
            raise _wrong(f"{where}.file.file_data", "expected UTF-8 text in base64") from None
        source = {"type": "text", "media_type": "text/plain", "data": text}
    elif media != "application/pdf":
        raise _wrong(f"{where}.file.file_data", "Anthropic reads PDFs, images and text")
    return {"type": "document", "source": source, **named}


_ROLES: Final[Mapping[str, Callable[[Mapping[str, Any], str], list[Block]]]] = {
    "user": _content,
    "assistant": _assistant,
    "tool": _result,
}
_PARTS: Final[Mapping[str, Callable[[Mapping[str, Any], str], Block]]] = {
    "text": _text,
    "refusal": _text,
    "image_url": _image,
    "file": _file,
}
