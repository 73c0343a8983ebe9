"""``os.environ/NAME`` in settings: the value of a variable of the environment, as LiteLLM's files name it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

__all__ = ["resolved"]

_PREFIX = "os.environ/"


def resolved(value: Any, *, param: str, environ: Mapping[str, str] = os.environ) -> Any:
    """``value`` with every string ``os.environ/NAME`` in it replaced by that variable's text.

    Looks into mappings, lists and tuples, which come back as new ones; keys and all else stay what they are.
    ``param``: the setting's name, empty for a mapping of settings. `ConfigError` for a variable that is not
    set: it names the place, as in ``nodes[0].host``, and shows no value; and for what is nested too deeply.
    """
    try:
        return _resolved(value, param, environ)
    except RecursionError:
        raise ConfigError(f"{param}: is nested too deeply", param=param) from None


def _resolved(value: Any, param: str, environ: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _text(value, param, environ)
    if isinstance(value, Mapping):
        return {
            key: _resolved(item, f"{param}.{key}" if param else str(key), environ)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_resolved(item, f"{param}[{index}]", environ) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _text(value: str, param: str, environ: Mapping[str, str]) -> str:
    if not value.startswith(_PREFIX):
        return value
    name = value.removeprefix(_PREFIX)
    found = environ.get(name)
    if found is None:
        raise ConfigError(f"{param}: the environment has no {name}", param=param)
    return found
