"""What a request says about its caching: the body's ``cache`` object and the ``Cache-Control`` header.

Each source becomes a dictionary of the controls it sets; `merge` lays them over each other field by field.
Order of precedence: the API key's own, the body's, the header's, the manager's settings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import InvalidRequestError, nearest

__all__ = ["Controls", "merge", "parse_body", "parse_header"]


@dataclass(frozen=True, slots=True)
class Controls:
    """All controls of one request. Times are seconds; ``max_age`` and ``ttl`` None: no limit asked for."""

    ttl: float | None = None
    max_age: float | None = None
    min_fresh: float = 0.0
    max_stale: float = 0.0
    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    use_cache: bool = False
    namespace: str | None = None
    tags: tuple[str, ...] = ()
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 0.0


_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _wrong(field: str, expected: str, got: object) -> InvalidRequestError:
    try:
        shown = _short(json.dumps(got, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):  # too deep, too many digits, or no JSON at all
        shown = f"a value of type {type(got).__name__}"
    return InvalidRequestError(
        f"{field}: expected {expected}, got {shown}", param=field, code="invalid_cache_control"
    )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _seconds(field: str, value: object) -> float:
    number = math.nan
    if isinstance(value, str) and len(value) <= 32 and _NUMBER.fullmatch(value):
        number = float(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not 0 <= number < math.inf:
        raise _wrong(field, "seconds >= 0", value)
    return number


def _boolean(field: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    raise _wrong(field, "true or false", value)


def _text(field: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise _wrong(field, "a string of 1 to 256 characters", value)
    return value


def _tags(field: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > 64:
        raise _wrong(field, "a list of at most 64 strings", value)
    return tuple(_text(f"{field}[{index}]", tag) for index, tag in enumerate(value))


_Parser = Callable[[str, object], object]

_BODY: Mapping[str, tuple[str, _Parser]] = {
    "ttl": ("ttl", _seconds),
    "s-maxage": ("max_age", _seconds),
    "s-max-age": ("max_age", _seconds),
    "no-cache": ("no_cache", _boolean),
    "no-store": ("no_store", _boolean),
    "namespace": ("namespace", _text),
    "use-cache": ("use_cache", _boolean),
    "tags": ("tags", _tags),
    "stale-while-revalidate": ("stale_while_revalidate", _seconds),
    "stale-if-error": ("stale_if_error", _seconds),
}


def _unknown(field: str, name: str) -> InvalidRequestError:
    near = nearest(name.replace("_", "-"), _BODY)
    hint = f"known: {', '.join(_BODY)}" if near is None else f'did you mean "{near}"?'
    return InvalidRequestError(
        f"{field}.{name}: unknown cache control; {hint}",
        param=f"{field}.{name}",
        code="unknown_cache_control",
    )


def parse_body(value: object, *, field: str = "cache") -> dict[str, object]:
    """The controls that a ``cache`` object sets. `InvalidRequestError` (400) names the field at fault."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(field, "an object", value)
    controls: dict[str, object] = {}
    for name, item in value.items():
        row = _BODY.get(name)
        if row is None:
            raise _unknown(field, _short(str(name)))
        if item is not None:
            control, parser = row
            controls[control] = parser(f"{field}.{name}", item)
    return controls


_FLAGS = {"no-cache": "no_cache", "no-store": "no_store", "only-if-cached": "only_if_cached"}
_DELTAS = {
    "max-age": "max_age",
    "min-fresh": "min_fresh",
    "max-stale": "max_stale",
    "stale-if-error": "stale_if_error",
}
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def _directives(value: str) -> list[tuple[str, str]]:
    """(name, argument) of each directive; an empty argument where it has none. Junk is left out."""
    if '"' in value:
        # Commas and blanks inside quotes are part of the argument; no directive of ours has any.
        value = _QUOTED.sub(lambda match: match[0][1:-1].replace(",", ";").replace(" ", ";"), value)
    pairs = []
    for part in value.split(","):
        name, _, argument = part.partition("=")
        name, argument = name.strip().lower(), argument.strip()
        if name and len(name.split()) == 1 and len(argument.split()) <= 1:
            pairs.append((name, argument))
    return pairs


def parse_header(value: str) -> dict[str, object]:
    """The controls that a ``Cache-Control`` request header sets (RFC 9111, section 5.2.1).

    Directives that a cache may ignore are ignored; a number that is none is an `InvalidRequestError`.
    """
    controls: dict[str, object] = {}
    for name, argument in _directives(value):
        if name in _FLAGS:
            controls[_FLAGS[name]] = True
        elif name == "max-stale" and not argument:
            controls["max_stale"] = math.inf  # without a number: any staleness will do
        elif name in _DELTAS:
            controls[_DELTAS[name]] = _seconds(f"Cache-Control: {name}", argument)
    return controls


def merge(*sources: Mapping[str, object]) -> Controls:
    """The controls that hold: of each field the value of the first source that sets it."""
    merged: dict[str, object] = {}
    for source in reversed(sources):
        merged.update(source)
    return Controls(**merged)  # type: ignore[arg-type]
