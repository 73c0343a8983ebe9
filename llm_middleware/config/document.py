"""A file of settings as plain data, with the line of every value: YAML without tags, of bounded size.

``include`` names further files, relative to the one that names them: their lists are added to those that are
there, their settings take the place of those of the same name, as LiteLLM has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError
from .problems import Place, Report

__all__ = ["read_document"]

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 50
MAX_VALUES: Final = 100_000
MAX_FILES: Final = 100
_TAG: Final = "tag:yaml.org,2002:"
_TAGS: Final = frozenset(
    [None, "!", *(_TAG + name for name in ("bool", "float", "int", "map", "null", "seq", "str"))]
)

Data = dict[Any, Any]


class _RefusedError(Exception):
    """A file that cannot be read at all."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def read_document(source: str | os.PathLike[str] | Mapping[str, object], report: Report) -> Data:
    """The settings in ``source``, a file or a mapping, with what they include. A problem that leaves nothing
    to read ends it: `ConfigProblems`. `ConfigError` where PyYAML is missing."""
    if isinstance(source, Mapping):
        try:
            data = _Copy().copy(source, 0)
        except _RefusedError as exc:
            report.problem("", exc.message)
            report.check()
        return _included(data, Path(), (), report, report.places, [0])
    path = Path(source)
    report.file = str(source)
    return _file(path, "", (), report, report.places, [0])


# --- files


def _file(
    path: Path,
    asked: str,
    chain: tuple[Path, ...],
    report: Report,
    places: dict[str, Place],
    count: list[int],
) -> Data:
    """The settings in the file ``path``, which ``chain`` includes by the setting at ``asked``."""
    name = str(path)
    try:
        data, duplicates = _parsed(_text(path), name, places)
    except _RefusedError as exc:
        if exc.line is not None:
            report.places[asked] = (name, exc.line)
        report.problem(asked, exc.message if exc.line is not None or not asked else f"{name}: {exc.message}")
        report.check()
        raise AssertionError from exc  # there was one
    for text in duplicates:
        report.note(text if not chain else f"{name}: {text}")
    return _included(data, path, (*chain, path.resolve()), report, places, count)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _RefusedError("there is no such file") from None
    except (OSError, ValueError) as exc:
        raise _RefusedError(f"cannot be read: {getattr(exc, 'strerror', None) or 'not a path'}") from None
    if len(raw) > MAX_BYTES:
        raise _RefusedError(f"is longer than {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise _RefusedError("is not UTF-8", raw[: exc.start].count(b"\n") + 1) from None


def _included(
    data: Data,
    path: Path,
    chain: tuple[Path, ...],
    report: Report,
    places: dict[str, Place],
    count: list[int],
) -> Data:
    named = data.pop("include", None)
    names = [named] if isinstance(named, str) else named
    if names is None:
        return data
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        report.problem("include", "expected a list of files")
        return data
    for index, name in enumerate(names):
        asked = "include" if isinstance(named, str) else f"include[{index}]"
        other = path.parent / name
        count[0] += 1
        if _resolved(other) in chain:
            report.problem(asked, f"{name}: includes itself")
        elif count[0] > MAX_FILES:
            report.problem("include", f"more than {MAX_FILES} files")
            report.check()
        else:
            theirs: dict[str, Place] = {}
            _merge(data, _file(other, asked, chain, report, theirs, count), places, theirs)
    return data


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path


def _merge(data: Data, theirs: Data, places: dict[str, Place], their_places: Mapping[str, Place]) -> None:
    added: dict[str, int] = {}
    for name, value in theirs.items():
        own = data.get(name)
        if isinstance(value, list) and isinstance(own, list):
            added[f"{name}["] = len(own)
            data[name] = own + value
        elif isinstance(value, dict) and isinstance(own, dict):
            data[name] = {**own, **value}
        else:
            data[name] = value
    for path, place in their_places.items():
        match = re.match(r"([^\[]*\[)(\d+)(?=\])", path)
        if match and match[1] in added:
            path = f"{match[1]}{int(match[2]) + added[match[1]]}{path[match.end() :]}"
        places[path] = place


# --- YAML


@cache
def _loader() -> Any:
    try:
        import yaml
    except ImportError as exc:
        raise ConfigError("a YAML file needs PyYAML: pip install 'llm-middleware[config]'") from exc
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]  # its base is whichever there is
        """Dates stay text: versions of APIs look like them."""

        yaml_implicit_resolvers: Final = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
            for first, resolvers in base.yaml_implicit_resolvers.items()
        }

    return Loader


def _parsed(text: str, file: str, places: dict[str, Place]) -> tuple[Data, list[str]]:
    """The data, and what is given twice in it."""
    loader_type = _loader()
    import yaml

    try:
        _scan(yaml.parse(text, Loader=loader_type))
        loader = loader_type(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return {}, []
            walk = _Walk(file, places)
            walk.visit(node, "", 0)
            data = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise _RefusedError(f"not YAML: {_said(exc.problem)}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError:
        raise _RefusedError("not YAML: a character that may not stand there") from None
    except (ValueError, OverflowError, TypeError, AttributeError):
        raise _RefusedError("not YAML: a number that cannot be read") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise _RefusedError(f"expected names and their settings, not a {type(data).__name__}")
    return data, walk.duplicates


def _said(problem: str | None) -> str:
    """What the parser says, without the text that it met: that may be a password with a ``*`` before it."""
    said = re.split(r"['\"](?!<)(?=[^'\"]{2})", problem or "wrong syntax")[0].strip()
    return said.rstrip(":, ") or "wrong syntax"


def _scan(events: Iterator[Any]) -> None:
    """Depth, number and tags, before anything is made of them."""
    depth = 0
    for count, event in enumerate(events):
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        line = event.start_mark.line + 1
        if depth > MAX_DEPTH + 2:  # the stream and the document are two
            raise _RefusedError("is nested too deeply", line)
        if count > 2 * MAX_VALUES:
            raise _RefusedError("has too many values", line)
        if getattr(event, "tag", None) not in _TAGS:
            raise _RefusedError("not plain YAML: tags are not read", line)


class _Walk:
    """Visits every value as often as it is used, so that what aliases multiply is counted."""

    def __init__(self, file: str, places: dict[str, Place]) -> None:
        self.file = file
        self.places = places
        self.count = 0
        self.duplicates: list[str] = []

    def visit(self, node: Any, path: str, depth: int) -> None:
        line = node.start_mark.line + 1
        self.count += 1
        if depth > MAX_DEPTH:
            raise _RefusedError("is nested too deeply, or in itself", line)
        if self.count > MAX_VALUES:
            raise _RefusedError("has too many values", line)
        if node.id == "mapping":
            self._mapping(node, path, depth)
        elif node.id == "sequence":
            for index, item in enumerate(node.value):
                at = f"{path}[{index}]"
                self.places[at] = (self.file, item.start_mark.line + 1)
                self.visit(item, at, depth + 1)

    def _mapping(self, node: Any, path: str, depth: int) -> None:
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value) if key.id == "scalar" else "", key.start_mark.line + 1
            at = f"{path}.{name}" if path else name
            if name in seen and name != "<<":
                self.duplicates.append(
                    f"{at} is given twice (lines {seen[name]} and {line}): the last counts"
                )
            seen[name] = line
            self.places[at] = (self.file, line)
            self.visit(key, at, depth + 1)
            self.visit(value, at, depth + 1)


class _Copy:
    """A mapping of the caller's: copied, so that nothing of theirs is changed or changes while it is read."""

    def __init__(self) -> None:
        self.count = 0

    def copy(self, value: Any, depth: int) -> Any:
        self.count += 1
        if depth > MAX_DEPTH:
            raise _RefusedError("is nested too deeply, or in itself")
        if self.count > MAX_VALUES:
            raise _RefusedError("has too many values")
        if isinstance(value, Mapping):
            return {name: self.copy(item, depth + 1) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(item, depth + 1) for item in value]
        return value
