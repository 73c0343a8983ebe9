"""Answers as OpenAI's SDK shows them, and streams that are cut at any byte."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_middleware.caching.answer import Answer, CacheInfo
from llm_middleware.routing.response import ModelResponse, ModelStream, RouteInfo

DOCUMENT = {
    "id": "c",
    "choices": [{"message": {"role": "assistant", "content": "hé"}, "finish_reason": "stop"}],
    "usage": {"total_tokens": 3},
    "items": [[{"a": 1}]],
}


def response(value: object = DOCUMENT) -> ModelResponse:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return ModelResponse(raw, None, RouteInfo("m"))


def test_by_attribute_and_by_item() -> None:
    made = response()
    assert made.choices[0].message.content == made["choices"][0]["message"]["content"] == "hé"
    assert made.usage.total_tokens == 3
    assert made["items"][0][0].a == 1
    assert (dict(made).keys(), len(made), "id" in made, made.get("nothing")) == (
        DOCUMENT.keys(),
        4,
        True,
        None,
    )
    assert made.model_dump() == DOCUMENT
    assert repr(made.usage) == "Object({'total_tokens': 3})"


def test_what_an_answer_may_leave_out_is_none_and_what_is_unknown_an_error() -> None:
    made = response()
    assert made.choices[0].message.tool_calls is None
    assert response({"choices": [{"delta": {}}]}).choices[0].delta.content is None
    with pytest.raises(AttributeError, match="no 'contents'"):
        _ = made.choices[0].message.contents
    with pytest.raises(KeyError):
        made["tool_calls"]
    assert not hasattr(made, "_private")


def test_a_dump_is_a_copy_and_so_is_a_copy() -> None:
    made = response()
    made.model_dump()["usage"]["total_tokens"] = 9
    assert made.usage.total_tokens == 3
    assert copy.deepcopy(made).model_dump() == DOCUMENT
    assert made == response()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [(b"[1, 2]", {"data": [1, 2]}), (b"{}", {}), ("one\n\né".encode(), {"text": "one\n\né"})],
)
def test_other_documents(raw: bytes, shown: dict[str, object]) -> None:
    assert response(raw).model_dump() == shown


PAYLOADS = [{"choices": [{"delta": {"content": word}}]} for word in ("a", "é\n\n", "\u2028", "\r\n\r\n", "")]


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.data())
def test_a_stream_is_the_same_wherever_it_is_cut(end: str, ended: bool, data: st.DataObject) -> None:
    events = [f": ping{end}data: {json.dumps(each, ensure_ascii=False)}{end}{end}" for each in PAYLOADS]
    raw = ("".join(events) + f"data: [DONE]{end}" + (end if ended else "")).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    def stream() -> ModelStream:
        return ModelStream(Answer(CacheInfo("bypass"), stream=source), None, RouteInfo("m"))

    async def read() -> list[object]:
        return [chunk.model_dump() async for chunk in stream()]

    assert [chunk.model_dump() for chunk in stream()] == PAYLOADS
    assert asyncio.run(read()) == PAYLOADS
