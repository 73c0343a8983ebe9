"""Checks of single settings: each gives the value to use, or a `ConfigError` that names the setting.

Numbers, and ``true``, ``false``, ``1`` and ``0``, may be text, as an environment has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError, did_you_mean

__all__ = ["boolean", "choice", "fail", "function", "number", "or_none", "path", "text", "whole"]

Check = Callable[[str, object], object]

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf", re.IGNORECASE)
_WHOLE = re.compile(r"\+?[0-9]+")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def fail(name: str, expected: str, value: object) -> ConfigError:
    """The error for a setting that is not what is ``expected``."""
    return ConfigError(f"{name}: expected {expected}, got {value!r}", param=name)


def number(expected: str, low: float, high: float = math.inf) -> Check:
    """A number from ``low`` to ``high``, as a float; ``expected`` says so."""

    def check(name: str, value: object) -> object:
        figure = value
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            figure = float(value)
        if isinstance(figure, bool) or not isinstance(figure, (int, float)) or not low <= figure <= high:
            raise fail(name, expected, value)
        try:
            return float(figure)
        except OverflowError:
            raise fail(name, expected, "a number without end") from None

    return check


def whole(expected: str, low: int) -> Check:
    """A whole number from ``low`` on; ``expected`` says so."""

    def check(name: str, value: object) -> object:
        figure = value
        if isinstance(value, str) and len(value) < 20 and _WHOLE.fullmatch(value.strip()):
            figure = int(value)
        if isinstance(figure, bool) or not isinstance(figure, int) or figure < low:
            raise fail(name, expected, value)
        return figure

    return check


def choice(*choices: str) -> Check:
    """One of these."""

    def check(name: str, value: object) -> object:
        if value not in choices:
            hint = did_you_mean(value, choices)
            raise ConfigError(f"{name}: expected one of {list(choices)}, got {value!r}{hint}", param=name)
        return next(choice for choice in choices if choice == value)  # of an enum of text, its text

    return check


def boolean(name: str, value: object) -> bool:
    """True or False."""
    flag = _BOOLEANS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise fail(name, "True or False", value)
    return flag


def text(name: str, value: object) -> object:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise fail(name, "a string that is not empty", value)
    return value


def path(name: str, value: object) -> object:
    """Text that is not empty, or a path, as text."""
    return text(name, str(value) if isinstance(value, Path) else value)


def function(name: str, value: object) -> object:
    """A function, or None."""
    if value is not None and not callable(value):
        raise fail(name, "a function", value)
    return value


def or_none(check: Check) -> Check:
    """``check``, but None is as good."""
    return lambda name, value: None if value is None else check(name, value)
