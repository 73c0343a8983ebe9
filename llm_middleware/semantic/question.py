"""`question_of`: what of a request may be compared by meaning, and what has to be equal.

Only the text of the last user turn may be compared by meaning. Everything else, whatever it is, belongs to
the question's *scope*: the endpoint kind, who asks, the namespaces, the model, the system prompt, the earlier
turns with roles, names and tool calls, tools, response format, sampling parameters, images and files, the
embedder. Two requests share a scope exactly if they differ in nothing but that text.

The form of a scope says where the text was taken from and has null there, ``{"at": path, "rest": fields}``:
no field of a request can stand for the gap, since the path is said outside of the request's own fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from ..caching import cache_key
from .normal import content_words

__all__ = ["Context", "Question", "Reason", "question_of"]

Context: TypeAlias = Literal["all", "questions"]

FEWEST_WORDS = 3
_ENOUGH = 2000  # characters to find them in

_Path: TypeAlias = tuple[str | int, ...]

_TEXTS = ("text", "input_text")
_TOOL_ROLES = ("tool", "function")
# An assistant's turn of which nothing but this is there was said, not done: it can be asked for again.
_SAYING = "annotations audio content id reasoning reasoning_content refusal role status type"
_SAID = frozenset(_SAYING.split())
_SAID_PARTS = ("text", "output_text", "refusal", "thinking", "redacted_thinking", "reasoning")


class Reason(StrEnum):
    """Why a request is answered from an exact repeat only."""

    KIND = "kind"
    """An endpoint whose requests ask nothing in words; JSON of which nobody said where the question is."""
    MALFORMED = "malformed"
    """Not a request of its kind."""
    MANY_ANSWERS = "many-answers"
    """``n`` > 1, or several prompts at once."""
    ECHO = "echo"
    """The answer repeats the question's own words."""
    NOT_USER = "not-user"
    """The last turn is not the user's."""
    TOOL_RESULT = "tool-result"
    """The last turn has a tool's result."""
    MEDIA = "media"
    """The last turn has something that is no text."""
    NO_TEXT = "no-text"
    FEW_WORDS = "few-words"
    """Too short to mean something by itself: fewer than three content words."""
    TOO_LONG = "too-long"
    """Longer than the embedder reads; it is never cut."""


@dataclass(frozen=True, slots=True)
class Question:
    """``text``: the last user turn's, as it was asked. ``form``: everything else, as JSON."""

    kind: str
    text: str
    form: Mapping[str, object]

    def scope(
        self, *, caller: str, namespaces: Sequence[str], embedder: str, secret: bytes | None = None
    ) -> str:
        """The hard partition that the question belongs to: 64 hex digits.

        ``caller``: whose answers may be shared, as in the cache key; ``namespaces`` likewise. ``embedder``:
        the id of the one that makes the vectors. `UnkeyableError` where the request has no canonical form.
        """
        names = (*namespaces, "semantic", embedder)
        return cache_key.digest(self.kind, caller, names, cache_key.canonical(self.form), secret)


def question_of(
    kind: str,
    fields: object,
    *,
    field: str | None = None,
    context: Context = "all",
    fits: Callable[[str], bool] | None = None,
) -> Question | Reason:
    """The question that a request asks, or the reason why it is answered from an exact repeat only.

    ``fields``: the request's significant fields in canonical form (`caching.plan.Request.form`). ``field``:
    for kind ``json``, where the question is (``a.b`` for a field in a field). ``context``: ``all`` compares
    earlier turns exactly; ``questions`` all of them but what the assistant said, so that the wording of
    sampled answers does not part conversations. ``fits``: whether the embedder can read a text.
    """
    if not isinstance(fields, Mapping):
        return Reason.KIND if kind == "json" else Reason.MALFORMED
    found = _json(fields, field) if kind == "json" else _READERS.get(kind, _no_question)(fields)
    if isinstance(found, Reason):
        return found
    text = _at(fields, found)
    assert isinstance(text, str)
    reason = _unfit(text, fits)
    if reason is not None:
        return reason
    rest = _replaced(fields, found, None)
    if context == "questions":
        rest = _without_sayings(rest, found)
    return Question(kind, text, {"context": context, "at": list(found), "rest": rest})


def _unfit(text: str, fits: Callable[[str], bool] | None) -> Reason | None:
    if not text.strip():
        return Reason.NO_TEXT
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of characters
        return Reason.MALFORMED
    if content_words(text[:_ENOUGH]) < FEWEST_WORDS:
        return Reason.FEW_WORDS
    return None if fits is None or fits(text) else Reason.TOO_LONG


# --- where the text is, by endpoint kind


def _no_question(fields: Mapping[str, object]) -> Reason:
    return Reason.KIND


def _asks_for_many(fields: Mapping[str, object]) -> bool:
    n = fields.get("n")
    return n is not None and (type(n) is not int or n != 1)


def _chat(fields: Mapping[str, object]) -> _Path | Reason:
    return Reason.MANY_ANSWERS if _asks_for_many(fields) else _last_turn(fields, "messages")


def _messages(fields: Mapping[str, object]) -> _Path | Reason:
    return _last_turn(fields, "messages")


def _responses(fields: Mapping[str, object]) -> _Path | Reason:
    return ("input",) if isinstance(fields.get("input"), str) else _last_turn(fields, "input")


def _text(fields: Mapping[str, object]) -> _Path | Reason:
    if _asks_for_many(fields):
        return Reason.MANY_ANSWERS
    if fields.get("echo"):
        return Reason.ECHO
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return ("prompt",)
    if not isinstance(prompt, list) or not prompt:
        return Reason.NO_TEXT if prompt is None or prompt == [] else Reason.MALFORMED
    if isinstance(prompt[0], int):
        return Reason.NO_TEXT  # token ids
    if len(prompt) > 1:
        return Reason.MANY_ANSWERS
    return ("prompt", 0) if isinstance(prompt[0], str) else Reason.NO_TEXT


def _json(fields: Mapping[str, object], field: str | None) -> _Path | Reason:
    if field is None:
        return Reason.KIND
    path = tuple(field.split("."))
    value: object = fields
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return path if isinstance(value, str) else Reason.NO_TEXT


_READERS: Mapping[str, Callable[[Mapping[str, object]], _Path | Reason]] = {
    "chat": _chat,
    "messages": _messages,
    "responses": _responses,
    "text": _text,
}


def _last_turn(fields: Mapping[str, object], name: str) -> _Path | Reason:
    turns = fields.get(name)
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return Reason.MALFORMED
    turn = turns[-1]
    role, kind = turn.get("role"), turn.get("type", "message")
    if role in _TOOL_ROLES or (isinstance(kind, str) and kind.endswith("_output")):
        return Reason.TOOL_RESULT
    if role != "user" or kind != "message":
        return Reason.NOT_USER
    return _content(turn.get("content"), (name, len(turns) - 1, "content"))


def _content(content: object, path: _Path) -> _Path | Reason:
    """Where the text of a turn is. Of several texts the last is the question: what comes before it, such as
    a document, is compared exactly."""
    if isinstance(content, str):
        return path
    if content is None or content == []:
        return Reason.NO_TEXT
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return Reason.MALFORMED
    kinds = [part.get("type") for part in content]
    if any(kind not in _TEXTS for kind in kinds):
        return Reason.TOOL_RESULT if "tool_result" in kinds else Reason.MEDIA
    if not all(isinstance(part.get("text"), str) for part in content):
        return Reason.MALFORMED
    return (*path, len(content) - 1, "text")


# --- the form of everything else


def _at(value: object, path: _Path) -> object:
    for step in path:
        value = value[step]  # type: ignore[index]  # the path was found in it
    return value


def _replaced(value: object, path: _Path, new: object) -> object:
    """A copy of ``value`` with ``new`` at the path; what is beside the path is shared with it."""
    if not path:
        return new
    step, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        return {**value, str(step): _replaced(value[step], rest, new)}
    assert isinstance(value, list)
    assert isinstance(step, int)
    return [*value[:step], _replaced(value[step], rest, new), *value[step + 1 :]]


def _without_sayings(rest: object, path: _Path) -> object:
    """``rest`` with the assistant's earlier turns emptied of what it said."""
    turns = rest.get(path[0]) if isinstance(rest, dict) else None
    if len(path) < 2 or not isinstance(turns, list):
        return rest
    assert isinstance(rest, dict)
    return {**rest, path[0]: [_unsaid(turn) for turn in turns]}


def _unsaid(turn: object) -> object:
    if not isinstance(turn, dict) or turn.get("role") != "assistant":
        return turn
    if {name for name, value in turn.items() if value is not None} - _SAID:
        return turn
    content = turn.get("content")
    if isinstance(content, list) and not all(
        isinstance(part, dict) and part.get("type") in _SAID_PARTS for part in content
    ):
        return turn
    return {"role": "assistant"}
