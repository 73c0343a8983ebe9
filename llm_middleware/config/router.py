"""The settings of a Router in a file: LiteLLM's spellings, a Redis spelt ``redis_*``, and texts of the
environment where numbers are meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

from ..routing.settings import RouterSettings
from .parts import Parts
from .values import Section

__all__ = ["NAMES", "read_router", "set_option"]

_TYPES: Final[Mapping[str, str]] = {each.name: str(each.type) for each in fields(RouterSettings)}
NAMES: Final = frozenset([*_TYPES, "cache_responses", "default_max_parallel_requests", "http"])
_REDIS: Final = "redis_"
_FLAGS: Final = {"true": True, "false": False}


def read_router(section: Section, parts: Parts, *, null_timeout: bool = False) -> None:
    """Every name of ``section`` that a Router knows, into ``parts``; the others are left in it.
    ``null_timeout``: a timeout that is null means that there is none, not that none is given."""
    if null_timeout and section.peek("timeout", 0) is None:
        parts.set_router("timeout", section.raw("timeout"), section.at("timeout"))
    redis: dict[str, object] = {}
    for name in section.names():
        if name in NAMES:
            set_option(section, name, name, parts)
        elif name == "cache_kwargs":
            for own, value in (inner := section.section(name)).all().items():
                redis.setdefault(own, value)
                parts.redis_origins.setdefault(own, inner.at(own))
        elif name.startswith(_REDIS):
            own = name.removeprefix(_REDIS)
            redis[own] = section.take(name)
            parts.redis_origins[own] = section.at(name)
    if redis:
        written = parts.router.get("redis")
        path = parts.router_origins.get("redis", section.path)
        parts.set_router("redis", {**redis, **(written if isinstance(written, Mapping) else {})}, path)


def set_option(section: Section, name: str, option: str, parts: Parts) -> None:
    """The setting ``name`` as the Router's ``option``. None is as good as not given."""
    value, path = section.take(name), section.at(name)
    if value is None:
        return
    kind = _TYPES.get(option, "bool" if option == "cache_responses" else "")
    kind = "int" if option == "default_max_parallel_requests" else kind
    if path in section.values.from_environment:
        value = _read(str(value), kind)
    expected = _expected(kind, value)
    if expected is not None:
        section.report.problem(path, f"expected {expected}, not {type(value).__name__}")
        return
    parts.set_router(option, value, path)


def _read(text: str, kind: str) -> object:
    """``text`` as what ``kind`` has, where it is one; else as it is, for others to refuse."""
    if kind == "bool":
        return _FLAGS.get(text.strip().lower(), text)
    if kind.startswith(("int", "float")) and "str" not in kind:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _expected(kind: str, value: object) -> str | None:
    """What ``value`` should have been, where the settings themselves do not look."""
    if kind == "bool" and not isinstance(value, bool):
        return "true or false"
    if kind.startswith("Mapping") and not isinstance(value, Mapping):
        return "names and their values"
    if kind.startswith("Sequence") and not isinstance(value, list):
        return "a list"
    return None
