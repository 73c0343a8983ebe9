"""What is found while a file of settings is read: problems with their lines, all told at once, and notes.

No message holds a secret: whoever reads a value that may be one says so here, and it is masked in all of
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from ..errors import ConfigError

__all__ = ["ConfigProblems", "Place", "Problem", "Report", "head", "placed"]

_MASK: Final = "***"
_SHORT: Final = 4  # a shorter secret is masked only where it stands in quotes: it may be part of any word
_HEAD: Final = re.compile(r"[^.\[]*")
_LAST: Final = re.compile(r"(?:\.[^.\[]*|\[[^.\[]*)\Z")
_KEYS: Final = re.compile(r"\b(?:sk|gsk|pk|rk)[-_][\w*.-]{4,}")
_PASSWORD: Final = re.compile(r"://[^/?#\s]*?:([^/?#\s]*)@")
_RAW_PASSWORD: Final = re.compile(r"://[^:/\s]*:(\S*)@")

Place = tuple[str | None, int]
"""A file and the line in it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """``path``: as in ``model_list[1].litellm_params.rpm``, empty for the file as a whole. ``line``: counted
    from one, None where it is not known; ``file``: in which it is, where settings come from more than one."""

    path: str
    line: int | None
    message: str
    file: str | None = None

    def __str__(self) -> str:
        place = f"{self.file or 'line'}{':' if self.file else ' '}{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.path, self.message) if part)


class ConfigProblems(ConfigError):  # noqa: N818 - it is many
    """Settings cannot be used. ``problems`` are all that there are, in the order of the file; ``param`` is
    the path of the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = "one problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        listed = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{count} in the configuration:{listed}", param=self.problems[0].path or None)


@dataclass(slots=True)
class Report:
    """``places``: where each path was read, as far as that is known. ``file``: the one that was asked for."""

    file: str | None = None
    places: dict[str, Place] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set, repr=False)

    def problem(self, path: str, message: str) -> None:
        """A further problem of a path follows from the first: a value that could not be read is missing."""
        if all(path != known for known, _ in self.problems):
            self.problems.append((path, message))

    def refused(self, error: ConfigError, place_of: Callable[[str], str]) -> None:
        """``error`` as a problem of the path that ``place_of`` gives for its ``param``."""
        param = error.param or ""
        self.problem(place_of(param), error.message.removeprefix(f"{param}: "))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def secret(self, value: object) -> None:
        """``value`` is not to be seen in any message."""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return
        text = str(value)
        found = [text, text.strip()]
        for pattern in (_PASSWORD, _RAW_PASSWORD):
            for password in pattern.findall(text):
                found += [password, unquote(password)]
        self.secrets.update(each for each in found if each)

    def masked(self, text: str) -> str:
        for secret in sorted(self.secrets, key=len, reverse=True):
            quoted = repr(secret)
            text = text.replace(quoted, repr(_MASK))
            if len(secret) >= _SHORT:
                text = text.replace(secret, _MASK).replace(quoted[1:-1], _MASK)
        return _KEYS.sub(_MASK, text)

    def place(self, path: str) -> Place | None:
        """Of ``path``, else of what it is in."""
        while path and path not in self.places:
            path = _LAST.sub("", path) if _LAST.search(path) else ""
        return self.places.get(path)

    def check(self) -> None:
        """`ConfigProblems` where there are any."""
        if self.problems:
            found = sorted(self.problems, key=lambda problem: self.order(problem[0]))
            raise ConfigProblems([self._problem(path, message) for path, message in found])

    def order(self, path: str) -> tuple[bool, int]:
        """By which paths stand as they do in the file, those of other files after them."""
        file, line = self.place(path) or (self.file, 0)
        return file != self.file, line

    def _problem(self, path: str, message: str) -> Problem:
        file, line = self.place(path) or (None, None)
        return Problem(self.masked(path), line, self.masked(message), file or self.file)


def head(param: str) -> str:
    """The setting that ``param`` is a part of: ``nodes`` of ``nodes[0].host``."""
    match: re.Match[str] | None = _HEAD.match(param)
    return match.group() if match else param


def placed(origins: Mapping[str, str], section: str) -> Callable[[str], str]:
    """From the name of a setting, or of a part of it, to its path: where ``origins`` has it, else in
    ``section``."""

    def place(param: str) -> str:
        name = head(param)
        own = origins.get(name, f"{section}.{name}" if section and name else section or name)
        return own + param[len(name) :]

    return place
