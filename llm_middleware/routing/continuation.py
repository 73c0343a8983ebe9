"""A chat stream that breaks in the midst of its text, and another deployment that goes on with it.

The other one is asked with what was said so far as the assistant's last message. That makes one answer only
where all that was said is the text of one choice: no tool calls, no log probabilities, no format that a seam
could spoil. The reader sees one stream, under the first one's id; usage is what the last deployment counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from ..caching.results import close_items
from ..caching.sse import DONE, dump_json, format_event, load_json, parse_events, split_events
from ..errors import ProviderError

__all__ = ["Continued", "continuable"]

Again = Callable[[ProviderError, Mapping[str, object]], Awaitable[AsyncIterator[bytes]]]

_INSTRUCTION: Final = (
    "Your last message was cut off by a fault of the line. Go on exactly where it stops, in the middle of a "
    "word if need be. Repeat nothing of it, and say nothing about this."
)
_CHARACTERS: Final = 4  # of English text to a token, about
_LIMITS: Final = ("max_tokens", "max_completion_tokens")
_NAMES: Final = ("id", "created", "model", "system_fingerprint")
_TEXT: Final = frozenset({"role", "content"})


def continuable(kind: str, body: Mapping[str, object]) -> bool:
    """Whether a stream of this request can be gone on with by another deployment."""
    if kind != "chat" or body.get("n") not in (None, 1) or body.get("logprobs"):
        return False
    wanted = body.get("response_format")
    plain = wanted is None or (isinstance(wanted, Mapping) and wanted.get("type") == "text")
    return plain and not body.get("audio") and isinstance(body.get("messages"), list | tuple)


class Continued:
    """The events of a stream, whole events only. ``again(error, body)``: the stream that goes on with it;
    ``most``: how often that may be asked for. ``no_store``: two made it, so it is not kept."""

    def __init__(
        self, events: AsyncIterator[bytes], body: Mapping[str, object], again: Again, most: int
    ) -> None:
        self.no_store = False
        self._events = events
        self._body = body
        self._again = again
        self._left = most
        self._part = b""
        self._named: dict[str, Any] = {}
        self._said: list[str] = []
        self._one = True  # choice
        self._text_only = True
        self._finished = self._ended = False

    def __aiter__(self) -> Continued:
        return self

    async def __anext__(self) -> bytes:
        while True:
            try:
                piece = await anext(self._events)
            except StopAsyncIteration:
                if not self._part:
                    raise
                piece = b"\n\n"  # of the last event
            except ProviderError as exc:
                await self._go_on(exc)
                continue
            whole, self._part = split_events(self._part + piece)
            shown = self._seen(whole) if whole else b""
            if shown:
                return shown

    async def aclose(self) -> None:
        await close_items(self._events)

    def _seen(self, events: bytes) -> bytes:
        """Take notice of ``events``; what the reader gets of them."""
        shown = [self._event(event.data) for event in parse_events(events)]
        return b"".join(shown) if self.no_store else events

    def _event(self, data: str) -> bytes:
        """Take notice of one event; as another deployment's, it goes under the first one's name."""
        try:
            chunk = load_json(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            self._ended |= data == DONE
            self._text_only &= data in (DONE, "")
            return format_event(data)
        self._notice(chunk)
        if not self.no_store:
            return b""
        rest = {name: value for name, value in chunk.items() if name not in _NAMES}
        return format_event(dump_json({**self._named, **rest}))

    def _notice(self, chunk: dict[str, Any]) -> None:
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices:
            return  # usage, or what a filter says of the prompt, which Azure sends under no name
        if not self._named and not self.no_store:
            self._named = {name: chunk[name] for name in _NAMES if name in chunk}
        for choice in choices:
            delta = choice.get("delta") if isinstance(choice, dict) else None
            if isinstance(delta, dict) and choice.get("index") in (None, 0):
                self._notice_choice(choice, delta)
            else:
                self._one = False

    def _notice_choice(self, choice: dict[str, Any], delta: dict[str, Any]) -> None:
        said = delta.get("content")
        others = any(value for name, value in delta.items() if name not in _TEXT)
        self._text_only &= not others and (said is None or isinstance(said, str))
        if isinstance(said, str):
            self._said.append(said)
        if self.no_store:
            delta.pop("role", None)
        self._finished |= bool(choice.get("finish_reason"))

    async def _go_on(self, error: ProviderError) -> None:
        self._part = b""
        said = "".join(self._said)
        if self._ended or (self._finished and self._one):  # all was said
            self.no_store |= not self._ended
            self._events = _rest(b"" if self._ended else format_event(DONE))
            return
        if not (said and self._one and self._text_only and self._left):
            raise error
        self._left -= 1
        self._events = await self._again(error, _going_on(self._body, said))
        self.no_store = True


async def _rest(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _going_on(body: Mapping[str, object], said: str) -> dict[str, object]:
    messages = body["messages"]
    assert isinstance(messages, list | tuple)
    so_far = {"role": "assistant", "content": said}
    made: dict[str, object] = {
        **body,
        "messages": [*messages, so_far, {"role": "user", "content": _INSTRUCTION}],
    }
    for name in _LIMITS:
        most = made.get(name)
        if isinstance(most, int) and not isinstance(most, bool):
            made[name] = max(1, most - len(said) // _CHARACTERS)
    return made
