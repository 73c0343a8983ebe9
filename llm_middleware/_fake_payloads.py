"""What `llm_middleware.testing.FakeUpstream` answers: one pure builder per endpoint.

A builder takes the request's fields, a fresh `Stamp` and the number of pieces a streamed text comes in,
and returns an `Answer`. The text depends on the prompt alone, so two calls with one prompt differ in
nothing but what the stamp gave them: ids and creation times. Shapes follow OpenAI's and Anthropic's API
references (https://platform.openai.com/docs/api-reference, https://docs.anthropic.com/en/api/messages).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email import message_from_bytes
from email.message import EmailMessage
from typing import TypeAlias

from .errors import InvalidRequestError

__all__ = [
    "Answer",
    "Builder",
    "Json",
    "Stamp",
    "ToolCall",
    "answer_text",
    "chat",
    "counts",
    "embeddings",
    "last_message",
    "models",
    "named_event",
    "parse_multipart",
    "plain",
    "split",
    "stream",
    "text_completion",
    "tool_calls",
    "transcription",
]

Json: TypeAlias = Mapping[str, object]

_WORDS = (
    "amber",
    "brisk",
    "cedar",
    "délta",
    "ember",
    "fjörd",
    "grain",
    "höher",
    "islet",
    "日本",
    "knoll",
    "lemon",
)
_CITIES = ("Paris", "Oslo")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What sets one answer apart from all others: a random ``token`` for its ids, and its second."""

    token: str
    created: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer in the chunks it is written in: one for a plain body, one per event for a stream."""

    chunks: tuple[bytes, ...]
    content_type: str = "application/json"
    streamed: bool = False


Builder: TypeAlias = Callable[[Json, Stamp, int], Answer]


# Text ---------------------------------------------------------------------------------------------


def answer_text(prompt: str, pieces: int) -> str:
    """A sentence that quotes the prompt, then words its digest picks: never fewer letters than pieces."""
    digest = hashlib.sha256(prompt.encode("utf-8", "replace")).digest()
    words = [_WORDS[digest[i % len(digest)] % len(_WORDS)] for i in range(max(6, pieces))]
    return f"You said: {prompt[:80]}. " + " ".join(words)


def split(text: str, pieces: int) -> list[str]:
    """``text`` cut into so many runs of about one length."""
    edges = [round(i * len(text) / pieces) for i in range(pieces + 1)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def _text_in(content: object) -> str:
    """The text of a message's content: a string, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return " ".join(text for text in texts if isinstance(text, str))


def last_message(request: Json, field: str) -> str:
    """The text of the last message, so that a tool's result does not ask for the tool again."""
    messages = request.get(field)
    if field == "input" and isinstance(messages, str):
        return messages
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise InvalidRequestError(f"{field}: expected a list of messages", param=field)
    return _text_in(messages[-1].get("content"))


def _texts(request: Json, prompt: str, pieces: int) -> list[str]:
    """One text per choice asked for with ``n``, each unlike the others."""
    count = request.get("n")
    text = answer_text(prompt, pieces)
    return [text if i == 0 else f"{text} ({i + 1})" for i in range(count if isinstance(count, int) else 1)]


def counts(prompt: str, completion: str) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, where every word is a token."""
    return max(1, len(prompt.split())), max(1, len(completion.split()))


def _openai_usage(prompt: str, completion: str) -> Json:
    given, made = counts(prompt, completion)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


# Frames -------------------------------------------------------------------------------------------


def dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def plain(value: object) -> Answer:
    return Answer((dump(value),))


def stream(events: Iterable[bytes]) -> Answer:
    return Answer(tuple(events), "text/event-stream; charset=utf-8", streamed=True)


def data_event(value: object) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def named_event(event: Json) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\n" + data_event(event)


# Tools --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    token: str


def tool_calls(request: Json, prompt: str, stamp: Stamp) -> list[ToolCall]:
    """Calls of the first tool offered: one where the prompt is of the weather, two for "two cities"."""
    tools = request.get("tools")
    if not isinstance(tools, list) or not tools or request.get("tool_choice") == "none":
        return []
    if "weather" not in prompt.lower():
        return []
    name = str(tools[0].get("function", tools[0]).get("name"))
    cities = _CITIES if "two cities" in prompt.lower() else _CITIES[:1]
    return [ToolCall(name, json.dumps({"city": city}), f"{stamp.token}{i}") for i, city in enumerate(cities)]


# Chat and text completions ------------------------------------------------------------------------


def _envelope(kind: str, prefix: str, request: Json, stamp: Stamp) -> dict[str, object]:
    return {
        "id": f"{prefix}-{stamp.token}",
        "object": kind,
        "created": stamp.created,
        "model": request.get("model"),
        "system_fingerprint": "fp_fake",
    }


def chat(request: Json, stamp: Stamp, pieces: int) -> Answer:
    prompt = last_message(request, "messages")
    texts = _texts(request, prompt, pieces)
    calls = tool_calls(request, prompt, stamp)
    usage = _openai_usage(prompt, calls[0].arguments if calls else " ".join(texts))
    if request.get("stream"):
        chunk = _envelope("chat.completion.chunk", "chatcmpl", request, stamp)
        return stream(_chunks(request, chunk, list(_chat_steps(request, texts, calls, pieces)), usage))
    choices = [_chat_choice(request, i, split(text, pieces), calls) for i, text in enumerate(texts)]
    envelope = _envelope("chat.completion", "chatcmpl", request, stamp)
    return plain({**envelope, "choices": choices, "usage": usage})


def _chat_choice(request: Json, index: int, tokens: list[str], calls: list[ToolCall]) -> Json:
    message: dict[str, object] = {"role": "assistant", "content": None if calls else "".join(tokens)}
    message |= {"refusal": None, "annotations": []}
    if calls:
        message["tool_calls"] = [_chat_call(call, call.arguments) for call in calls]
    logprobs = None if calls else _logprobs(request, tokens)
    finish = "tool_calls" if calls else "stop"
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def _chat_call(call: ToolCall, arguments: str) -> dict[str, object]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{call.token}", "type": "function", "function": function}


def _logprobs(request: Json, tokens: list[str]) -> Json | None:
    if not request.get("logprobs"):
        return None
    content = [{"token": t, "logprob": -0.25, "bytes": list(t.encode()), "top_logprobs": []} for t in tokens]
    return {"content": content, "refusal": None}


def _chat_steps(request: Json, texts: list[str], calls: list[ToolCall], pieces: int) -> Iterator[Json]:
    """The streamed choices in the order they leave: opening, then the pieces in turn, then the end."""
    deltas = [_call_deltas(calls) if calls else [{"content": p} for p in split(t, pieces)] for t in texts]
    for i in range(len(texts)):
        opening = {"role": "assistant", "content": None if calls else "", "refusal": None}
        yield {"index": i, "delta": opening, "logprobs": None, "finish_reason": None}
    for row in zip(*deltas, strict=True):
        for i, delta in enumerate(row):
            logprobs = None if calls else _logprobs(request, [str(delta["content"])])
            yield {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": None}
    for i in range(len(texts)):
        finish = "tool_calls" if calls else "stop"
        yield {"index": i, "delta": {}, "logprobs": None, "finish_reason": finish}


def _call_deltas(calls: list[ToolCall]) -> list[Json]:
    deltas: list[Json] = []
    for i, call in enumerate(calls):
        deltas.append({"tool_calls": [{"index": i, **_chat_call(call, "")}]})
        fragments = split(call.arguments, 3)
        deltas += [{"tool_calls": [{"index": i, "function": {"arguments": part}}]} for part in fragments]
    return deltas


def _chunks(request: Json, chunk: Json, steps: Sequence[Json], usage: Json) -> Iterator[bytes]:
    """Each step in its envelope, and the usage in a chunk of its own where ``include_usage`` asks for it."""
    options = request.get("stream_options")
    counted = isinstance(options, dict) and bool(options.get("include_usage"))
    for step in steps:
        yield data_event({**chunk, "choices": [step], **({"usage": None} if counted else {})})
    if counted:
        yield data_event({**chunk, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def text_completion(request: Json, stamp: Stamp, pieces: int) -> Answer:
    prompts = request.get("prompt")
    if prompts is None:
        raise InvalidRequestError("prompt: expected a string or a list", param="prompt")
    several = prompts if isinstance(prompts, list) and isinstance(prompts[0], str) else [prompts]
    texts = [text for prompt in several for text in _texts(request, str(prompt), pieces)]
    usage = _openai_usage(" ".join(map(str, several)), " ".join(texts))
    envelope = _envelope("text_completion", "cmpl", request, stamp)
    if request.get("stream"):
        rows = zip(*(split(text, pieces) for text in texts), strict=True)
        steps = [_text_choice(request, i, piece, None) for row in rows for i, piece in enumerate(row)]
        steps += [_text_choice(request, i, "", "stop") for i in range(len(texts))]
        return stream(_chunks(request, envelope, steps, usage))
    choices = [_text_choice(request, i, text, "stop") for i, text in enumerate(texts)]
    return plain({**envelope, "choices": choices, "usage": usage})


def _text_choice(request: Json, index: int, text: str, finish: str | None) -> Json:
    logprobs: Json | None = None
    if text and request.get("logprobs") is not None:
        logprobs = {"tokens": [text], "token_logprobs": [-0.25], "top_logprobs": None, "text_offset": [0]}
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


# Embeddings ---------------------------------------------------------------------------------------


def embeddings(request: Json, stamp: Stamp, _pieces: int) -> Answer:
    inputs = _embedding_inputs(request.get("input"))
    size = request.get("dimensions")
    vectors = [_vector(text, size if isinstance(size, int) else 8) for text in inputs]
    encoded = request.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(v) if encoded else v}
        for i, v in enumerate(vectors)
    ]
    tokens = sum(max(1, len(str(text).split())) for text in inputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    # OpenAI's embeddings have no id; vLLM's have, and a test needs one to tell two answers apart.
    extra = {"id": f"embd-{stamp.token}", "created": stamp.created}
    return plain({"object": "list", "data": data, "model": request.get("model"), "usage": usage, **extra})


def _embedding_inputs(value: object) -> Sequence[object]:
    """The texts or token lists to embed, whichever of the four input shapes they came in."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequestError("input: expected a string, token ids, or a list of these", param="input")
    return [value] if isinstance(value[0], int) else value


def _vector(text: object, size: int) -> list[float]:
    """A unit vector that the text picks, in the float32 values that base64 carries too."""
    seed = hashlib.shake_256(dump(text)).digest(4 * size)
    raw = [n / 2**31 - 1 for n in struct.unpack(f"<{size}I", seed)]
    norm = math.hypot(*raw)
    return list(struct.unpack(f"<{size}f", struct.pack(f"<{size}f", *(x / norm for x in raw))))


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


# Transcriptions -----------------------------------------------------------------------------------


def parse_multipart(content_type: str, body: bytes) -> dict[str, object]:
    """The parts of a form by name (RFC 7578): ``str`` for fields, ``bytes`` for files."""
    header = EmailMessage()
    header["content-type"] = content_type
    boundary = str(header.get_param("boundary", "")).encode("latin-1")
    fields: dict[str, object] = {}
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        disposition = message_from_bytes(head.strip())
        name = str(disposition.get_param("name", "", "content-disposition"))
        fields[name] = data if disposition.get_filename() is not None else data.decode("utf-8", "replace")
    return fields


def transcription(request: Json, stamp: Stamp, pieces: int) -> Answer:
    audio = request.get("file")
    if not isinstance(audio, bytes):
        raise InvalidRequestError("file: expected an audio file in a multipart form", param="file")
    text = answer_text(f"{len(audio)} bytes, {hashlib.sha256(audio).hexdigest()[:8]}", pieces)
    if request.get("stream") == "true":
        deltas = [{"type": "transcript.text.delta", "delta": piece} for piece in split(text, pieces)]
        return stream(map(data_event, [*deltas, {"type": "transcript.text.done", "text": text}]))
    shape = request.get("response_format", "json")
    if shape in _CAPTIONS:
        return Answer((_CAPTIONS[str(shape)].format(text=text).encode(),), "text/plain; charset=utf-8")
    answer: dict[str, object] = {"text": text, "id": f"trsc-{stamp.token}", "created": stamp.created}
    if shape == "verbose_json":
        segment = {
            "id": 0,
            "seek": 0,
            "start": 0.0,
            "end": 1.0,
            "text": text,
            "tokens": [],
            "temperature": 0.0,
        }
        segment |= {"avg_logprob": -0.25, "compression_ratio": 1.0, "no_speech_prob": 0.0}
        answer |= {"task": "transcribe", "language": request.get("language", "english"), "duration": 1.0}
        answer |= {"segments": [segment], "usage": {"type": "duration", "seconds": 1}}
    return plain(answer)


_CAPTIONS = {
    "text": "{text}\n",
    "srt": "1\n00:00:00,000 --> 00:00:01,000\n{text}\n",
    "vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{text}\n",
}


# Models -------------------------------------------------------------------------------------------


def models(created: int) -> Answer:
    """``GET /models``: one model of each kind."""
    names = ("gpt-4o-mini", "gpt-4o", "text-embedding-3-small", "whisper-1", "claude-test")
    data = [{"id": name, "object": "model", "created": created, "owned_by": "fake"} for name in names]
    return plain({"object": "list", "data": data, "has_more": False})
