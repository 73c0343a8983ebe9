"""All scopes of an index in one process, each a `Partition`, under one lock and one bound on memory.

The lock is held for microseconds. Comparing vectors and splitting a cell happen outside it, on what was noted
under it; what changed meanwhile is noticed by its version, and the step is done again.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Final, TypeAlias

import numpy as np

from ..types import Clock
from .cells import Cell, Matrix, Partition, Record, best_places, halves, mean, nearest, rows_to_compare
from .records import Neighbour, Row

__all__ = ["Scopes"]

Visited: TypeAlias = tuple[Cell, int, Matrix]
"""A cell, its version, and its vectors then."""

_TRIES: Final = 3  # without the lock, before a search or an insertion holds it
_SLICE: Final = 256  # rows removed at a time, so that others get their turn
_AROUND: Final = 8  # cells that are put in order after one was split
_GAIN: Final = 1e-5  # by how much another mean must be nearer for a row to move; equal rows stay
_NONE: Final[Mapping[str, object]] = {}


class Scopes:
    """Rows by scope and key. Beyond ``max_bytes`` of memory the row goes that was longest neither put nor the
    nearest one of a search. Up to ``exact_rows`` rows of a scope, a search compares every one."""

    def __init__(self, *, max_bytes: int, exact_rows: int, clock: Clock) -> None:
        self._max_bytes, self._exact_rows, self._clock = max_bytes, exact_rows, clock
        self._lock = threading.RLock()
        self._scopes: dict[str, Partition] = {}
        self._where: OrderedDict[str, Cell] = OrderedDict()  # the row that goes first is first
        self.memory = 0

    def __len__(self) -> int:
        return len(self._where)

    def keys(self) -> list[str]:
        return list(self._where)

    def put(self, scope: str, record: Record, vector: Matrix) -> None:
        """Keep a row in place of any other of its key; one that is over is removed instead."""
        with self._lock:
            cell = self._where.get(record.key)
            if record.expires > self._clock() and cell and self._replace(cell, scope, record, vector):
                return
            if cell is not None:
                self._discard(cell, record.key)
            if record.expires <= self._clock():
                return
        self._insert(scope, record, vector)

    def change(self, key: str, payload: str) -> bool:
        """Give a row another payload; False where there is no such row."""
        with self._lock:
            cell = self._where.get(key)
            if cell is None:
                return False
            slot = cell.keys.index(key)
            before = cell.memory
            cell.replace(slot, cell.record(slot)._replace(payload=payload))
            self.memory += cell.memory - before
            self._evict()
            return True

    def search(self, scope: str, query: Matrix, k: int) -> list[Neighbour]:
        for _ in range(_TRIES):
            found = self._search(scope, query, k)
            if found is not None:
                return found
        with self._lock:  # rows change their places faster than they can be compared
            while (found := self._search(scope, query, k)) is None:
                pass
            return found

    def discard(self, keys: Iterable[str]) -> int:
        """Remove rows; how many of them were there and not over."""
        removed, remaining = 0, iter(keys)
        while some := list(islice(remaining, _SLICE)):
            with self._lock:
                now = self._clock()
                for key in some:
                    cell = self._where.get(key)
                    if cell is not None:
                        removed += self._discard(cell, key).expires > now
        return removed

    def purge(self) -> int:
        """Remove the rows that are over; how many."""
        removed, remaining = 0, iter(list(self._scopes))
        while some := list(islice(remaining, _SLICE)):
            with self._lock:
                now = self._clock()
                cells = [cell for scope in some for cell in self._cells(scope) if cell.soonest <= now]
            for cell in cells:
                with self._lock:
                    removed += self._purge(cell, now)
        return removed

    def copies(self) -> Iterator[Cell]:
        """Every cell as it is at its turn. A row that changes cells meanwhile may come twice, or never."""
        for scope in list(self._scopes):
            seen: set[Cell] = set()
            while True:
                with self._lock:
                    fresh = [cell for cell in self._cells(scope) if cell not in seen]
                if not fresh:
                    break
                for cell in fresh:
                    with self._lock:
                        copy = cell.copy()
                    if copy.keys:
                        yield copy
                seen.update(fresh)

    def adopt(self, cell: Cell) -> None:
        """Take in a cell from elsewhere, but for rows whose keys are here: those here are newer."""
        centre = mean(cell.vectors)
        with self._lock:
            for slot in range(len(cell.keys) - 1, -1, -1):
                if cell.keys[slot] in self._where:
                    cell.take(slot)
            if cell.keys:
                partition = self._scopes.get(cell.scope)
                if partition is None:
                    partition = self._scopes[cell.scope] = Partition(len(centre))
                self._join(partition, cell, centre)
                self._evict()

    # Searching ----------------------------------------------------------------------------------

    def _search(self, scope: str, query: Matrix, k: int) -> list[Neighbour] | None:
        """None where something changed its place meanwhile."""
        with self._lock:
            partition = self._scopes.get(scope)
            if partition is None:
                return []
            version, means = partition.version, partition.means[: len(partition.cells)]
            rows, count = partition.rows, len(partition.cells)
        wanted = max(k, rows_to_compare(rows, self._exact_rows))
        compared: float = wanted
        places: Sequence[int] = range(count)
        if count == 1 or wanted >= rows:
            compared = math.inf
        else:
            places = nearest(means, query, min(count, 4 + 2 * wanted * count // rows))
        with self._lock:
            visited = self._visit(partition, places, compared) if partition.version == version else None
        if visited is None:
            return None
        scores = np.concatenate([vectors.dot(query) for _, _, vectors in visited])
        best = best_places(scores, k)
        with self._lock:
            if any(cell.version != version for cell, version, _ in visited):
                return None
            return self._neighbours(visited, scores, best)

    def _visit(self, partition: Partition, places: Sequence[int], rows: float) -> list[Visited] | None:
        """The cells at the first places that have so many rows; None where some were over, and had to go."""
        now, cells, visited = self._clock(), partition.cells, []
        for place in places:
            cell = cells[place]
            if cell.soonest <= now:
                self._purge(cell, now)
                return None
            size = len(cell.keys)
            visited.append((cell, cell.version, cell.matrix[:size]))
            rows -= size
            if rows <= 0:
                break
        return visited

    def _neighbours(self, visited: list[Visited], scores: Matrix, best: list[int]) -> list[Neighbour]:
        found, ends = [], list(accumulate(len(vectors) for _, _, vectors in visited))
        for position in best:
            number = bisect_right(ends, position)
            cell, _, vectors = visited[number]
            slot = position - ends[number] + len(vectors)
            text = cell.payloads[slot]
            payload = json.loads(text) if text else _NONE
            row = Row(cell.keys[slot], cell.scope, cell.texts[slot], b"", cell.expires[slot], payload)
            found.append(Neighbour(row, min(1.0, float(scores[position]))))
        if found:
            self._where.move_to_end(found[0].row.key)
        return found

    # Changing; all but _insert and _split under the lock ------------------------------------------

    def _insert(self, scope: str, record: Record, vector: Matrix) -> None:
        tries = 0
        while True:
            with contextlib.nullcontext() if tries < _TRIES else self._lock:
                cell = self._try_insert(scope, record, vector)
                if cell is not None:
                    break
                tries += 1
        partition = self._scopes.get(scope)
        if partition is not None and len(cell.keys) > partition.share:
            self._split(scope, cell)
        with self._lock:
            self._evict()

    def _try_insert(self, scope: str, record: Record, vector: Matrix) -> Cell | None:
        with self._lock:
            partition = self._scopes.get(scope)
            if record.key in self._where:  # another thread was quicker with the same key
                self._discard(self._where[record.key], record.key)
                return None
            if partition is None:
                partition = self._scopes[scope] = Partition(len(vector))
                cell = Cell(scope, vector.reshape(1, -1).copy(), [record])
                return self._join(partition, cell, vector)
            version, count = partition.version, len(partition.cells)
            means = partition.means[:count]
        place = nearest(means, vector, 1)[0] if count > 1 else 0
        with self._lock:
            if partition.version != version or record.key in self._where:
                return None
            cell = partition.cells[place]
            before = cell.memory
            cell.append(record, vector)
            self.memory += cell.memory - before
            partition.rows += 1
            self._where[record.key] = cell
            return cell

    def _join(self, partition: Partition, cell: Cell, centre: Matrix) -> Cell:
        for key in cell.keys:
            self._where[key] = cell
        partition.insert(cell, centre)
        partition.rows += len(cell.keys)
        self.memory += cell.memory
        return cell

    def _replace(self, cell: Cell, scope: str, record: Record, vector: Matrix) -> bool:
        """Whether the row is the one there with other words around it; then it is brought up to date."""
        slot = cell.keys.index(record.key)
        if cell.scope != scope or not np.array_equal(cell.matrix[slot], vector):
            return False
        before = cell.memory
        cell.replace(slot, record)
        self.memory += cell.memory - before
        self._where.move_to_end(record.key)
        return True

    def _split(self, scope: str, cell: Cell) -> None:
        with self._lock:
            version, vectors = cell.version, cell.vectors.copy()
        mask = halves(vectors)
        centres = mean(vectors[mask]), mean(vectors[~mask])
        with self._lock:
            partition = self._scopes.get(scope)
            if partition is None or cell.version != version or not cell.keys:
                return  # the next insertion tries again
            before = cell.memory
            other = cell.divide(mask)
            for key in other.keys:
                self._where[key] = other
            partition.insert(other, centres[1])
            partition.move(cell, centres[0])
            self.memory += cell.memory + other.memory - before
        self._rearrange(partition, cell)

    def _rearrange(self, partition: Partition, cell: Cell) -> None:
        """Move rows of the cells around ``cell`` to the cell whose mean is now the nearest: a search that
        visits few cells finds more of what is near."""
        with self._lock:
            version, count = partition.version, len(partition.cells)
            if cell.place >= count or partition.cells[cell.place] is not cell:
                return
            means = partition.means[:count]
            places = nearest(means, means[cell.place], min(_AROUND, count))
            around, centres = [partition.cells[place] for place in places], means[places]
        for number, source in enumerate(around):
            with self._lock:
                noted, vectors = source.version, source.vectors
            scores = vectors @ centres.T
            choice, gain = scores.argmax(axis=1), scores.max(axis=1) - scores[:, number]
            leaving = [int(slot) for slot in np.flatnonzero(gain > _GAIN)[::-1]]
            with self._lock:
                if partition.version != version:
                    return
                if source.version == noted:
                    for slot in leaving:
                        if len((target := around[int(choice[slot])]).keys) < partition.share:
                            self._move(source, slot, target)
                    self._settle(source)

    def _move(self, source: Cell, slot: int, target: Cell) -> None:
        before = source.memory + target.memory
        vector = source.matrix[slot].copy()
        record = source.take(slot)
        target.append(record, vector)
        self._where[record.key] = target
        self.memory += source.memory + target.memory - before

    def _discard(self, cell: Cell, key: str) -> Record:
        record = self._take(cell, cell.keys.index(key))
        self._settle(cell)
        return record

    def _take(self, cell: Cell, slot: int) -> Record:
        before = cell.memory
        record = cell.take(slot)
        self.memory += cell.memory - before
        self._scopes[cell.scope].rows -= 1
        del self._where[record.key]
        return record

    def _settle(self, cell: Cell) -> None:
        """After rows were taken: an empty cell goes, and a nearly empty one joins its neighbour."""
        partition = self._scopes[cell.scope]
        if 8 * len(cell.keys) >= partition.share or (cell.keys and len(partition.cells) == 1):
            return
        self.memory -= cell.memory
        if cell.keys:
            other = partition.neighbour(cell)
            before = other.memory
            for slot, key in enumerate(cell.keys):
                other.append(cell.record(slot), cell.matrix[slot])
                self._where[key] = other
            self.memory += other.memory - before
            cell.clear()
        partition.drop(cell)
        if not partition.cells:
            del self._scopes[cell.scope]

    def _purge(self, cell: Cell, now: float) -> int:
        if cell.soonest > now or not cell.keys:
            return 0
        slots = cell.over(now)
        for slot in slots:
            self._take(cell, slot)
        cell.forget_soonest()
        self._settle(cell)
        return len(slots)

    def _cells(self, scope: str) -> Sequence[Cell]:
        partition = self._scopes.get(scope)
        return () if partition is None else partition.cells

    def _evict(self) -> None:
        while self.memory > self._max_bytes and self._where:
            key, cell = next(iter(self._where.items()))
            self._discard(cell, key)
