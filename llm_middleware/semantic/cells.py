"""The rows of one scope, in cells: contiguous blocks of vectors that lie near each other.

A scope begins as one cell. A cell with more rows than its share is split in two along the line between its
two halves' means, so there is no training, no rebuilding and no work in the background, and no step touches
more than a few hundred rows. A search compares the query with the cells' means first and then, exactly, with
the rows of the nearest cells. Removing a row moves the cell's last one into its place.

Nothing here takes a lock. Who reads without one notes the versions first and compares them afterwards: a
cell's changes when a row changes its place, a partition's when a cell does. Adding a row at the end of a
cell changes neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Cell",
    "Matrix",
    "Partition",
    "Record",
    "best_places",
    "halves",
    "mean",
    "nearest",
    "rows_to_compare",
]

Matrix: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]

_CELL_BYTES: Final = 1200  # what a cell costs beside its rows: its lists and its share of the scope's
_ROW_BYTES: Final = 250  # what a row costs beside its vector and strings: places in lists and dicts
_LEAST_SHARE: Final = 128
_ROUNDS: Final = 4
# Measured: recall@1 of paraphrases stays near 0.99 or above up to a million rows, however they are spread.
_COMPARED: Final = 0.75  # of the rows of the largest scope that is searched whole, in larger ones
_COMPARED_AT: Final = 10_000  # up to so many, and beyond
_GROWTH: Final = 0.45


class Record(NamedTuple):
    """What a cell keeps of a row beside its vector; ``payload`` is JSON, empty for an empty object."""

    key: str
    text: str
    expires: float
    payload: str

    @property
    def weight(self) -> int:
        """Bytes in memory, about."""
        width = 1 if self.text.isascii() else 2
        return _ROW_BYTES + len(self.key) + width * len(self.text) + len(self.payload)


class Cell:
    """Rows in parallel lists: a million small objects would cost every pass of the garbage collector."""

    __slots__ = (
        "expires",
        "keys",
        "matrix",
        "payloads",
        "place",
        "scope",
        "soonest",
        "texts",
        "version",
        "weight",
    )

    def __init__(self, scope: str, matrix: Matrix, records: Sequence[Record]) -> None:
        self.scope = scope
        self.matrix = matrix  # rows from len(keys) on are room
        self.version = 0
        self.place = 0  # among the partition's cells
        self._fill(records)

    def _fill(self, records: Sequence[Record]) -> None:
        self.keys = [record.key for record in records]
        self.texts = [record.text for record in records]
        self.expires = [record.expires for record in records]
        self.payloads = [record.payload for record in records]
        self.soonest = min(self.expires, default=math.inf)
        self.weight = sum(record.weight for record in records)

    @property
    def memory(self) -> int:
        """Bytes, about."""
        return _CELL_BYTES + int(self.matrix.nbytes) + self.weight

    @property
    def vectors(self) -> Matrix:
        return self.matrix[: len(self.keys)]

    def record(self, slot: int) -> Record:
        return Record(self.keys[slot], self.texts[slot], self.expires[slot], self.payloads[slot])

    def append(self, record: Record, vector: Matrix) -> None:
        size = len(self.keys)
        if size == len(self.matrix):
            self._resize(max(2 * size, 1))
        self.matrix[size] = vector
        self.keys.append(record.key)
        self.texts.append(record.text)
        self.expires.append(record.expires)
        self.payloads.append(record.payload)
        self.soonest = min(self.soonest, record.expires)
        self.weight += record.weight

    def replace(self, slot: int, record: Record) -> None:
        """Another text, time or payload for the row, which keeps its key and vector."""
        self.weight += record.weight - self.record(slot).weight
        self.texts[slot], self.expires[slot], self.payloads[slot] = (
            record.text,
            record.expires,
            record.payload,
        )
        self.soonest = min(self.soonest, record.expires)

    def take(self, slot: int) -> Record:
        """Remove a row; the last one takes its place, and memory that is no longer needed is given back."""
        record, last = self.record(slot), len(self.keys) - 1
        self.version += 1
        if not self.matrix.flags.writeable:  # a snapshot's
            self._resize(len(self.keys))
        self.matrix[slot] = self.matrix[last]
        columns: tuple[list[Any], ...] = (self.keys, self.texts, self.expires, self.payloads)
        for column in columns:
            column[slot] = column[last]
            column.pop()
        self.weight -= record.weight
        if 4 * last < len(self.matrix):
            self._resize(2 * last)
        return record

    def copy(self) -> Cell:
        return Cell(self.scope, self.vectors.copy(), [self.record(slot) for slot in range(len(self.keys))])

    def clear(self) -> None:
        """Hold no rows any more; who compares with them now notices."""
        self.version += 1
        self._fill(())

    def over(self, now: float) -> list[int]:
        """The slots of rows that are over, last first: in this order they can be taken."""
        slots = [slot for slot, expires in enumerate(self.expires) if expires <= now]
        return slots[::-1]

    def forget_soonest(self) -> None:
        """Look again which row is over first, after some were taken."""
        self.soonest = min(self.expires, default=math.inf)

    def divide(self, mask: Mask) -> Cell:
        """Keep the rows that ``mask`` tells of and those after its end; the others as a new cell."""
        records = [self.record(slot) for slot in range(len(self.keys))]
        stays = np.concatenate([mask, np.ones(len(records) - len(mask), np.bool_)])
        vectors = self.vectors
        leaving = Cell(
            self.scope, vectors[~stays], [r for r, kept in zip(records, stays, strict=True) if not kept]
        )
        self.matrix, self.version = vectors[stays], self.version + 1
        self._fill([record for record, kept in zip(records, stays, strict=True) if kept])
        return leaving

    def _resize(self, room: int) -> None:
        matrix = np.empty((room, self.matrix.shape[1]), np.float32)
        size = min(len(self.keys), room)
        matrix[:size] = self.matrix[:size]
        self.matrix = matrix


class Partition:
    """The cells of one scope. ``means``: their means, of unit length, in the same order, and room behind
    them; nothing while there is one cell."""

    __slots__ = ("cells", "means", "rows", "version")

    def __init__(self, dimensions: int) -> None:
        self.cells: list[Cell] = []
        self.means: Matrix = np.empty((0, dimensions), np.float32)  # most scopes never have a second cell
        self.rows = 0
        self.version = 0

    @property
    def share(self) -> int:
        """How many rows a cell may hold: more where there are many, as the means are compared as well."""
        return max(_LEAST_SHARE, math.isqrt(self.rows) // 2)

    def insert(self, cell: Cell, centre: Matrix) -> None:
        """Add a cell; its rows are not counted here."""
        place = cell.place = len(self.cells)
        if place >= max(len(self.means), 1):
            means = np.empty((2 * place, self.means.shape[1]), np.float32)
            means[:place] = self.means if len(self.means) else mean(self.cells[0].vectors)
            self.means = means
        if place:
            self.means[place] = centre
        self.cells.append(cell)
        self.version += 1

    def drop(self, cell: Cell) -> None:
        """Remove a cell; the last one takes its place."""
        last = self.cells.pop()
        if last is not cell:
            self.cells[cell.place] = last
            self.means[cell.place] = self.means[last.place]
            last.place = cell.place
        if 4 * len(self.cells) < len(self.means):
            self.means = self.means[: max(2 * len(self.cells), 2)].copy()
        self.version += 1

    def move(self, cell: Cell, centre: Matrix) -> None:
        """Give a cell another mean."""
        self.means[cell.place] = centre
        self.version += 1

    def neighbour(self, cell: Cell) -> Cell:
        """The other cell that is nearest; there must be one."""
        scores = self.means[: len(self.cells)] @ self.means[cell.place]
        scores[cell.place] = -math.inf
        return self.cells[int(scores.argmax())]


def rows_to_compare(rows: int, exact_rows: int) -> int:
    """How many of a scope's rows a search compares: all up to ``exact_rows``, and slowly more beyond."""
    if rows <= exact_rows:
        return rows
    return int(_COMPARED * exact_rows * max(1.0, rows / _COMPARED_AT) ** _GROWTH) + 1


def nearest(means: Matrix, query: Matrix, wanted: int) -> list[int]:
    """The places of the ``wanted`` means nearest to the query, best first."""
    return best_places(means @ query, wanted)


def best_places(scores: Matrix, wanted: int) -> list[int]:
    """Where the ``wanted`` highest scores are, or all if there are fewer, highest first."""
    if wanted == 1:
        return [int(scores.argmax())]
    if wanted >= len(scores):
        return list(map(int, np.argsort(-scores, kind="stable")))
    places = np.argpartition(scores, len(scores) - wanted)[-wanted:]
    return list(map(int, places[np.argsort(-scores[places], kind="stable")]))


def mean(vectors: Matrix) -> Matrix:
    """The mean of some unit vectors, of unit length itself; the first one where they cancel out."""
    centre: Matrix = vectors.mean(axis=0, dtype=np.float32)
    length = float(np.linalg.norm(centre))
    return centre / np.float32(length) if length > 1e-6 else vectors[0].copy()


def halves(vectors: Matrix) -> Mask:
    """Which rows belong to the first of two groups of rows near each other (2-means); neither is empty."""
    first = vectors[int((vectors @ vectors[0]).argmin())]
    second = vectors[int((vectors @ first).argmin())]
    difference = vectors @ (first - second)
    side: Mask = difference >= np.median(difference)
    for _ in range(_ROUNDS):
        if side.all() or not side.any():
            break
        side = vectors @ (mean(vectors[side]) - mean(vectors[~side])) >= 0
    if min(int(side.sum()), int((~side).sum())) * 16 < len(side):  # all the same, or nearly
        side = np.arange(len(side)) % 2 == 0
    return side
