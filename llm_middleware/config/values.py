"""Values of a file of settings: ``os.environ/NAME`` replaced wherever it stands, and a mapping's names taken
one by one, so that those which nobody took are told."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Final

from ..errors import did_you_mean
from .problems import Report

__all__ = ["Section", "Values"]

_PREFIX: Final = "os.environ/"
_SECRET: Final = re.compile(
    r"(?:^|_)key$|access_key|secret|passw|token$|credential(?:s|_values)?$|authorization|cookie|headers$",
    re.IGNORECASE,
)
_BOOLEANS: Final = {"true": True, "false": False}


class Values:
    """``environ``: the variables that ``os.environ/NAME`` means. ``from_environment``: the paths of the texts
    that came from there. ``origins``: from a variable that the file sets to the path where it does."""

    def __init__(self, report: Report, environ: Mapping[str, str]) -> None:
        self.report = report
        self.environ = environ
        self.origins: dict[str, str] = {}
        self.from_environment: set[str] = set()

    def read(self, value: object, path: str, *, secret: bool = False) -> object:
        """``value`` with its variables replaced; a variable that is not set is a problem, and None."""
        if isinstance(value, Mapping):
            return {
                name: self.read(item, f"{path}.{name}", secret=secret or bool(_SECRET.search(str(name))))
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self.read(item, f"{path}[{index}]", secret=secret) for index, item in enumerate(value)]
        if isinstance(value, str) and value.startswith(_PREFIX):
            return self._variable(value.removeprefix(_PREFIX), path)
        if secret or (isinstance(value, str) and "://" in value):
            self.report.secret(value)
        return value

    def _variable(self, name: str, path: str) -> str | None:
        found = self.environ.get(name)
        if found is None:
            self.report.problem(path, f"the environment has no {name}")
            return None
        self.from_environment.add(path)
        self.report.secret(found)
        return found


class Section:
    """One mapping of the file, at ``path``; what is none is a problem, and empty."""

    def __init__(self, values: Values, path: str, raw: object) -> None:
        self.values = values
        self.report = values.report
        self.path = path
        self._left: dict[str, object] = {}
        if raw is not None and not isinstance(raw, Mapping):
            self.report.problem(path, f"expected names and their settings, not {type(raw).__name__}")
            return
        for name, value in (raw or {}).items():
            if isinstance(name, str):
                self._left[name] = value
            else:
                self.report.problem(path, f"names are text, not {type(name).__name__}")

    def __contains__(self, name: str) -> bool:
        """Whether it is still there to be taken."""
        return name in self._left

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def names(self) -> list[str]:
        return list(self._left)

    def peek(self, name: str, default: object) -> object:
        """As it stands in the file, left there."""
        return self._left.get(name, default)

    def raw(self, name: str) -> object:
        """As it stands in the file; it counts as taken."""
        return self._left.pop(name, None)

    def take(self, name: str) -> object:
        """Its value with variables replaced; None where it is not given."""
        secret = bool(_SECRET.search(name))
        return self.values.read(self._left.pop(name, None), self.at(name), secret=secret)

    def section(self, name: str) -> Section:
        return Section(self.values, self.at(name), self.raw(name))

    def all(self) -> dict[str, object]:
        """Every name that is left, taken."""
        return {name: self.take(name) for name in self.names()}

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        self.report.problem(self.at(name), "expected text" if not isinstance(value, str) else "is empty")
        return None

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name)
        found = _BOOLEANS.get(value.strip().lower()) if isinstance(value, str) else value
        if found is None and value is None:
            return default
        if not isinstance(found, bool):
            self.report.problem(self.at(name), "expected true or false")
            return default
        return found

    def number(self, name: str, default: float, *, expected: str) -> float:
        """A finite one from zero on, as text too: an environment has nothing else."""
        value = self.take(name)
        if value is None:
            return default
        try:
            found = float(value) if isinstance(value, str | int | float) else math.nan
        except (ValueError, OverflowError):
            found = math.nan
        if isinstance(value, bool) or not 0 <= found < math.inf:
            self.report.problem(self.at(name), f"expected {expected}")
            return default
        return found

    def choice(self, name: str, default: str, choices: Iterable[str]) -> str:
        value = self.text(name)
        if value is None or value in choices:
            return default if value is None else value
        hint = did_you_mean(value, choices)
        self.report.problem(self.at(name), f"expected one of {', '.join(choices)}, got {value!r}{hint}")
        return default

    def close(
        self,
        known: Iterable[str],
        outside: Container[str] = (),
        hint: Callable[[str], str | None] | None = None,
    ) -> None:
        """Of the names that are left, those ``outside`` the library are ignored and told, the others are
        unknown: problems that name the nearest that is ``known``, or what ``hint`` says."""
        for name, value in self._left.items():
            if name in outside:
                if value is not None:
                    self.report.ignored.append(self.at(name))
                continue
            said = hint(name) if hint is not None else None
            text = said or f"there is no such setting{did_you_mean(name, known)}"
            self.report.problem(self.at(name), text)
        self._left.clear()
