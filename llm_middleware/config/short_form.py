"""The shorter form of file: ``models``, ``router`` and ``cache``, with this library's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from .cache import read_cache
from .parts import Parts
from .router import NAMES, read_router
from .values import Section

__all__ = ["SECTIONS", "read_short_form"]

SECTIONS: Final = ("models", "router", "cache", "hooks")
_DOTTED: Final = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\Z")


def read_short_form(top: Section, environ: Mapping[str, str]) -> Parts:
    """The parts that the sections of ``top`` come to; those sections are taken."""
    parts = Parts(models=top.take("models"), model_path="models")
    read_router(router := top.section("router"), parts, null_timeout=True)
    router.close(NAMES)
    _cache(top, parts, environ)
    _hooks(top, parts)
    return parts


def _cache(top: Section, parts: Parts, environ: Mapping[str, str]) -> None:
    """``true``, ``false``, or settings."""
    raw = top.raw("cache")
    if raw is None or raw is False:
        return
    switch = "cache: true" if raw is True else "cache"
    read_cache(Section(top.values, "cache", {} if raw is True else raw), parts, environ, switch=switch)


def _hooks(top: Section, parts: Parts) -> None:
    names = top.take("hooks")
    fits = isinstance(names, list) and all(isinstance(name, str) and _DOTTED.match(name) for name in names)
    if fits and isinstance(names, list):
        parts.hooks = list(dict.fromkeys(names))
    elif names is not None:
        top.report.problem("hooks", "expected a list of names like package.module.function")
