"""Files of questions for an evaluation: tab-separated text, or a JSON object on each line.

*Pairs*: a stored question, an asked one, and whether one answer serves both. A *log*: a question, and the
class of its right answer, in order of arrival. Which of the two it is shows in the columns. A first line
that names the columns is known by its names; other columns beside them are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from ..errors import ConfigError
from .normal import normalised

__all__ = ["EvaluationFileError", "LogRows", "PairRows", "read_rows"]

Form = Literal["pairs", "log"]
Fields: TypeAlias = Sequence[object]

_NAMES: Mapping[Form, tuple[frozenset[str], ...]] = {
    "pairs": (
        frozenset(("a", "text_a", "stored", "cached", "question1", "sentence1")),
        frozenset(("b", "text_b", "asked", "incoming", "question2", "sentence2")),
        frozenset(("same", "label", "is_duplicate")),
    ),
    "log": (
        frozenset(("question", "text", "prompt", "query")),
        frozenset(("class", "answer", "answer_class", "intent", "category")),
    ),
}
_WANTED: Mapping[Form, str] = {
    "pairs": "two texts and 0 or 1 (tab-separated, or as a, b and same)",
    "log": "a question and its answer's class (tab-separated, or as question and answer)",
}
_SAME = {"1": True, "0": False, "true": True, "false": False}
_TOLD = 20  # bad lines


class EvaluationFileError(ConfigError):
    """A file that cannot be read as pairs or a log. ``problems``: a line of text for each."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
        super().__init__("\n".join([*problems[:_TOLD], *more]), param="file")


@dataclass(slots=True)
class PairRows:
    stored: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def texts(self) -> list[str]:
        return [*self.stored, *self.asked]


@dataclass(slots=True)
class LogRows:
    """``repeats``: questions that were left out because an earlier one is the same but for case, spacing and
    end punctuation: the exact cache answers these. ``repeats_wrong``: of them those of another class."""

    asked: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    repeats: int = 0
    repeats_wrong: int = 0

    def texts(self) -> list[str]:
        return self.asked

    @property
    def most(self) -> float:
        """The share of requests that a perfect cache would answer."""
        return 1.0 - len(set(self.answers)) / len(self.answers)


def read_rows(path: str | Path, form: Form | None = None, limit: int | None = None) -> PairRows | LogRows:
    """The first ``limit`` rows of a file. ``form``: what it is, where the columns do not show it.

    `EvaluationFileError` tells every line that is wrong, with its number.
    """
    path = Path(path)
    if path.suffix not in (".tsv", ".txt", ".jsonl", ".ndjson"):
        raise EvaluationFileError(path, [f"{path}: expected a .tsv or a .jsonl file"])
    reader = _Reader(path, form)
    for number, fields in reader.rows():
        if limit is not None and reader.count >= limit:
            break
        reader.take(number, fields)
    if not reader.count and not reader.problems:
        reader.problems.append(f"{path}: no rows in it")
    if reader.problems:
        raise EvaluationFileError(path, reader.problems)
    return reader.finished()


class _Reader:
    def __init__(self, path: Path, form: Form | None) -> None:
        self.path, self.form = path, form
        self.problems: list[str] = []
        self.count = 0
        self._kept: list[tuple[object, ...]] = []

    def rows(self) -> Iterator[tuple[int, Fields | None]]:
        """(number of the line, its fields in the order of `_NAMES`, or None where it has other ones)"""
        split = self._objects if self.path.suffix in (".jsonl", ".ndjson") else self._tabbed
        yield from split()

    def take(self, number: int, fields: Fields | None) -> None:
        self.count += 1
        if fields is None:
            self._wrong(
                number, f"expected {_WANTED[self.form] if self.form else ' or '.join(_WANTED.values())}"
            )
            return
        *texts, last = fields
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                self._wrong(
                    number, "a question is empty" if isinstance(text, str) else "a question is no text"
                )
                return
        if self.form == "pairs":
            same = _SAME.get(str(last).strip().lower())
            if same is None:
                self._wrong(number, f"expected 0 or 1 as its label, got {str(last)[:40]!r}")
                return
            last = same
        elif not isinstance(last, (str, int, float)) or last == "":
            self._wrong(number, "its answer's class is empty, or no text and no number")
            return
        self._kept.append((*texts, last))

    def finished(self) -> PairRows | LogRows:
        if self.form == "pairs":
            stored, asked, same = (list(column) for column in zip(*self._kept, strict=True))
            return PairRows(stored, asked, same)
        rows, first = LogRows(), dict[str, str]()
        for question, answer in self._kept:
            text, name = str(question), str(answer)
            key = normalised(text)
            if key in first:
                rows.repeats += 1
                rows.repeats_wrong += first[key] != name
            else:
                first[key] = name
                rows.asked.append(text)
                rows.answers.append(name)
        return rows

    def _wrong(self, number: int, why: str) -> None:
        self.problems.append(f"{self.path}:{number}: {why}")

    def _lines(self) -> Iterator[tuple[int, str]]:
        try:
            with self.path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    try:
                        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                    except UnicodeDecodeError:
                        self.count += 1
                        self._wrong(number, "not UTF-8")
                        continue
                    if line.strip():
                        yield number, line
        except OSError as exc:
            raise EvaluationFileError(self.path, [f"{self.path}: {exc.strerror}"]) from exc

    # ---- tab-separated

    def _tabbed(self) -> Iterator[tuple[int, Fields | None]]:
        columns: Sequence[int] | None = None
        for place, (number, line) in enumerate(self._lines()):
            cells = line.split("\t")
            if not place:
                columns = self._header(cells)
                if columns is not None:
                    continue
                self.form = self.form or _form_of(cells)
            yield number, self._picked(cells, columns)

    def _header(self, cells: Sequence[str]) -> Sequence[int] | None:
        """Where the columns are, if this line names them."""
        found = _named([cell.strip().lower() for cell in cells], self.form)
        if found is None:
            return None
        self.form, columns = found
        return columns

    def _picked(self, cells: Sequence[str], columns: Sequence[int] | None) -> Fields | None:
        if self.form is None:
            return None
        if columns is None:
            return cells if len(cells) == len(_NAMES[self.form]) else None
        return [cells[at] for at in columns] if len(cells) > max(columns) else None

    # ---- objects

    def _objects(self) -> Iterator[tuple[int, Fields | None]]:
        for number, line in self._lines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as exc:
                self.count += 1
                self._wrong(number, f"not JSON: {exc}")
                continue
            yield number, self._values(row)

    def _values(self, row: object) -> Fields | None:
        if not isinstance(row, dict):
            return None
        names = list(row)
        found = _named(names, self.form)
        if found is None:
            return None
        self.form, columns = found
        return [row[names[at]] for at in columns]


def _named(names: Sequence[str], form: Form | None) -> tuple[Form, list[int]] | None:
    """What the columns of these names are, and where its parts stand."""
    forms: Sequence[Form] = (form,) if form else ("pairs", "log")
    for one in forms:
        places = [_place(names, known.__contains__) for known in _NAMES[one]]
        if None not in places:
            return one, [place for place in places if place is not None]
    return None


def _place(names: Sequence[str], fits: Callable[[str], bool]) -> int | None:
    return next((at for at, name in enumerate(names) if fits(name)), None)


def _form_of(cells: Sequence[str]) -> Form | None:
    """What a file without names is, from its first line."""
    return {2: "log", 3: "pairs"}.get(len(cells))  # type: ignore[return-value]
