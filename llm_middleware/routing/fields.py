"""The values of settings, above all of a ``model_list``: each read or refused with the name of its place."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from ..errors import ConfigError

__all__ = [
    "check_number",
    "count",
    "headers",
    "info",
    "labels",
    "mapping",
    "number",
    "seconds",
    "switch",
    "text",
    "token",
]

_WHOLE: Final = re.compile(r"\d{1,15}(?:\.0+)?\Z")


def _refuse(where: str, expected: str, value: object) -> NoReturn:
    """No value is shown: it may be a secret."""
    raise ConfigError(f"{where}: expected {expected}, not {type(value).__name__}", param=where)


def text(value: object, where: str) -> str:
    if value is None:
        raise ConfigError(f"{where}: is missing", param=where)
    if not isinstance(value, str):
        _refuse(where, "text", value)
    if not value.strip():
        raise ConfigError(f"{where}: is empty", param=where)
    return value.strip()


def token(value: object, where: str) -> object:
    """A key, or a function that gives one. An empty one is none."""
    if callable(value) or value == "":
        return value
    return text(value, where)


def number(value: object, where: str) -> float:
    """A finite number from zero on; as text too, which is how an environment has it."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            _refuse(where, "a number", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(where, "a number", value)
    if not 0 <= value <= sys.float_info.max:
        raise ConfigError(f"{where}: expected a number from 0 on", param=where)
    return value


def check_number(name: str, value: object, *, whole: bool = False, optional: bool = False) -> None:
    """`ConfigError` where ``value`` is no finite number from zero on. Here a text is none: what an
    environment has goes through `number`. ``optional``: None is as good."""
    if value is None and optional:
        return
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= sys.float_info.max:
        expected = "a whole number" if whole else "a number"
        raise ConfigError(f"{name}: expected {expected} >= 0, got {value!r}", param=name)


def count(value: object, where: str) -> int:
    """A whole number from one on."""
    if isinstance(value, str) and _WHOLE.match(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(where, "a whole number", value)
    if not 1 <= value <= sys.float_info.max or value != int(value):
        raise ConfigError(f"{where}: expected a whole number from 1 on", param=where)
    return int(value)


def seconds(value: object, where: str) -> float:
    """More than zero: a limit of no time lets nothing pass, and is never meant."""
    found = float(number(value, where))
    if found == 0:
        raise ConfigError(f"{where}: expected more than 0 seconds; leave it out for no limit", param=where)
    return found


def switch(value: object, where: str) -> bool:
    named = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(named, bool):
        _refuse(where, "true or false", value)
    return named


def labels(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        _refuse(where, "a list of texts", value)
    return tuple(text(item, f"{where}[{place}]") for place, item in enumerate(value))


def mapping(value: object, where: str) -> dict[str, Any]:
    """A new one with the same items."""
    if not isinstance(value, Mapping):
        _refuse(where, "a mapping", value)
    for key in value:
        if not isinstance(key, str):
            _refuse(where, "names that are texts", key)
    return dict(value)


def headers(value: object, where: str) -> dict[str, str]:
    return {name: text(item, f"{where}.{name}") for name, item in mapping(value, where).items()}


def info(value: object, where: str) -> dict[str, Any]:
    """Facts of a model. Costs and sizes are numbers, the id is text; the rest is the user's own."""
    facts = mapping(value, where)
    for name, item in facts.items():
        if item is None:
            continue
        at = f"{where}.{name}"
        if "_cost_per_" in name:
            facts[name] = number(item, at)
        elif name in ("max_tokens", "max_input_tokens", "max_output_tokens"):
            facts[name] = count(item, at)
        elif name == "id":
            facts[name] = text(str(item) if isinstance(item, int) else item, at)
        elif name == "base_model":
            facts[name] = text(item, at)
    return {name: item for name, item in facts.items() if item is not None}
