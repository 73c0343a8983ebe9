"""What a caller hands to a Router: the request itself, and what it says about the way of its call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from ..caching.cache_key import UnkeyableError
from ..caching.endpoints import CALL_TYPES
from ..caching.sse import load_json
from ..errors import InvalidRequestError
from ..providers.target import CONNECTION
from .fallback import own_fallbacks
from .settings import STREAM_ERRORS

if TYPE_CHECKING:
    from ..caching.multipart import Part  # it brings the email parser

__all__ = ["Options", "form_values", "from_client", "read_body", "read_options", "routed_kind"]

_KINDS: Final = ("chat", "text", "embedding", "transcription", "responses")
_FROM_CLIENTS: Final = ("timeout", "num_retries", "fallbacks")
_MOST_RETRIES: Final = 10  # that a client may ask for
_LIST: Final = "[]"
_DEEPEST: Final = 100  # levels of a body; what reads it later calls itself for each of them
_FLAGS: Final = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Arguments of a call that are no part of the request. ``scope``: whose answer it is, for the cache.
    ``controls``: as in the ``cache`` field, and before it. ``caching``: False asks for no stored answer, and
    stores none. ``may_use``: whether the caller may use a group, which fallbacks ask. ``connection``:
    credentials and addresses of the caller's own. The others: as the Router's settings of that name."""

    timeout: float | None = None
    fallbacks: Sequence[str] | None = None
    num_retries: int | None = None
    on_stream_error: str | None = None
    scope: str = ""
    controls: Mapping[str, object] | None = None
    caching: bool = True
    may_use: Callable[[str], bool] | None = None
    connection: Mapping[str, object] = field(default_factory=dict)

    @property
    def shareable(self) -> bool:
        """Whether others may get this answer: what another server or key answers is nobody else's."""
        return self.caching and (not self.connection or self.connection.keys() <= {"max_retries"})


_NAMES: Final = frozenset(each.name for each in fields(Options)) - {"connection"}
_CONNECTION: Final = CONNECTION - _NAMES
_ALL: Final = CONNECTION | _NAMES
_UNSAID: Final = Options()  # of most calls


def read_options(model: object, given: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The options among ``given``, and the rest, which is the request's. `InvalidRequestError` names the
    option that is wrong."""
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("model: expected the name of a model", param="model")
    if not isinstance(given.get("stream"), bool | None):  # it would mean different things later
        raise InvalidRequestError("stream: expected true or false", param="stream")
    if _ALL.isdisjoint(given):
        return _UNSAID, given
    said = {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {name: said[name] for name in _NAMES & said.keys()}
    connection = {name: said[name] for name in _CONNECTION & said.keys()}
    for name, (expected, fits) in _CHECKS.items():
        if name in said and not fits(said[name]):
            raise InvalidRequestError(f"{name}: expected {expected}", param=name)
    if "fallbacks" in options:
        options["fallbacks"] = own_fallbacks(options["fallbacks"], model)
    rest = {name: value for name, value in given.items() if name not in _NAMES and name not in CONNECTION}
    return Options(**options, connection=connection), rest


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


_CHECKS: Final[Mapping[str, tuple[str, Callable[[object], bool]]]] = {
    "timeout": ("seconds > 0", _is_seconds),
    "num_retries": ("a whole number >= 0", _is_count),
    "on_stream_error": (f"one of {', '.join(STREAM_ERRORS)}", lambda value: value in STREAM_ERRORS),
    "scope": ("text", _is(str)),
    "controls": ("a mapping", _is(Mapping)),
    "caching": ("True or False", _is(bool)),
    "may_use": ("a function", callable),
}


def routed_kind(name: object) -> str:
    """The kind of endpoint that ``name`` stands for. `InvalidRequestError` where a Router has none such."""
    kind = CALL_TYPES.get(name) if isinstance(name, str) else None
    if kind not in _KINDS:
        raise InvalidRequestError(f"kind: a Router answers {', '.join(_KINDS)}, not {name}", param="kind")
    return kind


def read_body(kind: str, body: object, content_type: str) -> dict[str, Any]:
    """The fields of a request: of JSON, of a form for transcriptions, or of a mapping."""
    if isinstance(body, bytes):
        as_json = content_type.partition(";")[0].strip().lower() == "application/json"
        fields = _json(body) if kind != "transcription" or as_json else _form(body, content_type)
    elif isinstance(body, Mapping):
        _check_depth(body)
        fields = dict(body)
    else:
        raise InvalidRequestError("expected the body as bytes or as a mapping")
    if kind == "embedding" and fields.get("stream"):  # the answer would be taken for a broken stream
        raise InvalidRequestError("stream: embeddings do not come in a stream", param="stream")
    return fields


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = load_json(body)
    except ValueError:
        raise InvalidRequestError("the body is not JSON") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the body is not a JSON object")
    if body.count(b"[") + body.count(b"{") > _DEEPEST:  # else it cannot be
        _check_depth(value)
    return value


_FLAT: Final = frozenset({str, int, float, bool, type(None), bytes})  # told from the others at once


def _check_depth(value: Mapping[str, object]) -> None:
    level: list[object] = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for each in level
            for item in _items(each)
            if type(item) not in _FLAT and isinstance(item, (dict, list, tuple, Mapping))
        ]
        if not level:
            return
    raise InvalidRequestError(f"the body is nested deeper than {_DEEPEST} levels")


def _items(value: object) -> Iterable[object]:
    if isinstance(value, (dict, Mapping)):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def from_client(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a client says of its call's way in the body of a request, and the rest. A client may not say
    where it goes, as whom, or whose answers it may have: `InvalidRequestError` names the field."""
    for name in body:
        if name not in _FROM_CLIENTS and (name in CONNECTION or name in _NAMES):
            raise InvalidRequestError(f"{name}: is not taken from clients", param=name)
    options: dict[str, Any] = {name: body[name] for name in _FROM_CLIENTS if name in body}
    retries = options.get("num_retries")
    if isinstance(retries, int) and retries > _MOST_RETRIES:
        raise InvalidRequestError(f"num_retries: at most {_MOST_RETRIES}", param="num_retries")
    return options, {name: value for name, value in body.items() if name not in _FROM_CLIENTS}


def _form(body: bytes, content_type: str) -> dict[str, Any]:
    from ..caching.multipart import form_parts  # on first use: it brings the email parser

    try:
        parts = form_parts(body, content_type)
    except UnkeyableError as exc:
        raise InvalidRequestError(f"the body is not a form: {exc}") from None
    return form_values(parts)


def form_values(parts: Iterable[Part]) -> dict[str, Any]:
    """The fields of a request that came as a form: texts, lists of them, and the file as ``(name, content,
    content type)``. `InvalidRequestError` names the field that is wrong."""
    named: dict[str, list[Part]] = {}
    for part in parts:
        named.setdefault(part.name.removesuffix(_LIST), []).append(part)
    form: dict[str, Any] = {name: _form_value(name, same) for name, same in named.items()}
    # A form has texts only; these are told by what they say.
    for name, read in (("timeout", float), ("num_retries", int), ("stream", _flag)):
        if isinstance(form.get(name), str):
            with suppress(ValueError):
                form[name] = read(form[name])
    return form


def _form_value(name: str, parts: Sequence[Part]) -> object:
    """Of all the parts of one name, with ``[]`` behind it or without."""
    if any(part.filename is not None for part in parts) and name != "file":
        raise InvalidRequestError(f"{name}: a file is not expected here", param=name)
    if all(part.name.endswith(_LIST) for part in parts) and name != "file":
        return [part.text for part in parts]
    if len(parts) > 1:
        raise InvalidRequestError(f"{name}: is there more than once", param=name)
    (part,) = parts
    return part.text if part.filename is None else (part.filename, part.content, part.content_type)


def _flag(text: str) -> bool | str:
    return _FLAGS.get(text.lower(), text)
