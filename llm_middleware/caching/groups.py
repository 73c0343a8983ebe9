"""``caching_groups``: models that share their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError

__all__ = ["shared_names"]


def shared_names(groups: object) -> dict[str, str]:
    """From the name of a model to the one that stands for it in cache keys, by lists of names. `ConfigError`
    where it is no list of lists, or a name is there twice."""
    names: dict[str, str] = {}
    for place, group in enumerate(_list(groups, "caching_groups")):
        param = f"caching_groups[{place}]"
        for name in _list(group, param):
            if not isinstance(name, str):
                raise ConfigError(f"{param}: expected names of models, got {name!r}", param=param)
            if name in names:
                raise ConfigError(f"caching_groups: {name!r} is there twice", param="caching_groups")
            names[name] = str(group[0])
    return names


def _list(value: object, param: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{param}: expected a list, got {value!r}", param=param)
    return value
