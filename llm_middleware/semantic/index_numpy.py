"""A vector index in this process: numpy alone, exact in small scopes, and by cells in large ones.

Scopes of up to ``exact_rows`` rows are searched whole. In larger ones the query meets only the rows of the
nearest cells (`cells.py`), each exactly: similarities are never estimated. Vectors are float32 throughout,
queries too, since numpy would convert a whole matrix for a float64 query.

Nothing waits, so an event loop may call all of it but `load`, `save` and `close`, and, before the file is
loaded, what needs all of its rows: `remove`, `flush`, `purge` and `count`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, CorruptEntryError, InvalidRequestError
from ..types import Clock
from .checks import check_expires, check_floats, check_k, check_unit, mismatch, payload_text
from .records import Neighbour, Row
from .states import States

try:
    import numpy as np

    from . import snapshot
    from .cells import Matrix, Record
    from .scopes import Scopes
except ImportError as exc:
    raise ConfigError("a semantic cache needs numpy: pip install 'llm-middleware[semantic]'") from exc

__all__ = ["NumpyIndex"]

logger = logging.getLogger("llm_middleware")


class NumpyIndex:
    """A `VectorIndex` for one process and all its threads.

    ``max_bytes``: memory for all rows, about; beyond it the row goes that was longest neither added nor the
    nearest one of a search. ``dimensions``: of the vectors; the first row's where it is None. ``path``: a
    file that keeps the rows over a restart, as ``<path>.states`` keeps the states; they are one process's
    own. It is read in the background at first use (searches find what is there by then) or by `load`, and
    written by `close` and, at most every ``save_every`` seconds, in the background. ``exact_rows``: up to how
    many rows of a scope a search compares every one.
    """

    inline = True

    def __init__(
        self,
        *,
        max_bytes: int = 512 * 2**20,
        dimensions: int | None = None,
        path: str | Path | None = None,
        save_every: float = 60.0,
        exact_rows: int = 2048,
        clock: Clock = time.time,
    ) -> None:
        for name, value in {
            "max_bytes": max_bytes,
            "dimensions": dimensions,
            "exact_rows": exact_rows,
        }.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}: expected a whole number >= 1, got {value!r}", param=name)
        if not save_every > 0:
            raise ConfigError(f"save_every: expected seconds > 0, got {save_every!r}", param="save_every")
        self._save_every = save_every
        self._dimensions = dimensions
        self._path = None if path is None else Path(path)
        self._scopes = Scopes(max_bytes=max_bytes, exact_rows=exact_rows, clock=clock)
        self._states = States(None if path is None else Path(f"{path}.states"))
        self._fixing = threading.Lock()
        self._disk = threading.Lock()  # held while the file is read or written
        self._begun = self._loaded = self._path is None
        self._changes = self._saved = 0  # what is on disk has the changes up to _saved
        self._saving = False
        self._save_at = time.monotonic() + save_every

    # The protocol -------------------------------------------------------------------------------

    @property
    def dimensions(self) -> int | None:
        return self._dimensions

    @property
    def memory(self) -> int:
        """Bytes that the rows take, about."""
        return self._scopes.memory

    def add(self, row: Row) -> None:
        record, vector = _record(row), self._vector(row.vector)
        self._begin()
        self._fix(len(vector))
        self._scopes.put(row.scope, record, vector)
        self._changed()

    def update(self, key: str, payload: Mapping[str, object]) -> bool:
        text = payload_text(payload)
        self._begin()
        found = self._scopes.change(key, text)
        if found:
            self._changed()
        return found

    def search(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        check_k(k)
        query = self._vector(vector)
        self._begin()
        return self._scopes.search(scope, query, k)

    def remove(self, keys: Sequence[str]) -> int:
        self.load()
        self._changed()
        return self._scopes.discard(keys)

    def flush(self, namespace: str) -> int:
        return self.remove([key for key in self._keys() if key.rpartition(":")[0] == namespace])

    def count(self) -> int:
        self.load()
        return len(self._scopes)

    def purge(self) -> int:
        self.load()
        self._changed()
        return self._scopes.purge()

    def state(self, name: str) -> bytes | None:
        return self._states.get(name)

    def keep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        kept = self._states.keep(name, data, before)
        if kept:
            self._changed()
        return kept

    def close(self) -> None:
        """Write what changed to the file, if there is one. It may be used again."""
        if self._path is not None and self._changes != self._saved:
            self.save()

    # The file -----------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the file, if that has not been done: seconds for a million rows. A file that is damaged, of
        another version or of other dimensions is ignored with a warning, and written over later."""
        if self._loaded:
            return
        with self._disk:
            if not self._loaded:
                self._begun = True
                self._read()
                self._loaded = True

    def save(self) -> bool:
        """Write all rows and states to their files now; whether that was possible. A failure is logged."""
        self.load()
        with self._disk:
            changes, dimensions = self._changes, self._dimensions
            if self._path is None or (dimensions is None and not len(self._states)):
                return False
            try:
                self._states.write()
                if dimensions is not None:
                    snapshot.write(self._path, dimensions, self._scopes.copies())
            except OSError as exc:
                logger.warning("vector index: cannot write %s: %s", self._path, exc)
                return False
            self._saved = changes
            return True

    def _read(self) -> None:
        assert self._path is not None
        try:
            dimensions, cells = snapshot.read(self._path)
            self._fix(dimensions)
        except FileNotFoundError:
            return
        except (OSError, CorruptEntryError, InvalidRequestError) as exc:
            logger.warning("vector index: %s is ignored: %s", self._path, exc)
            return
        for cell in cells:
            self._scopes.adopt(cell)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            threading.Thread(target=self.load, name="llm-vectors-load", daemon=True).start()

    def _changed(self) -> None:
        self._changes += 1
        if self._path is None or self._saving or time.monotonic() < self._save_at:
            return
        self._saving = True
        threading.Thread(target=self._save_later, name="llm-vectors-save", daemon=True).start()

    def _save_later(self) -> None:
        try:
            self.save()
        finally:
            self._save_at = time.monotonic() + self._save_every
            self._saving = False

    # Checks -------------------------------------------------------------------------------------

    def _keys(self) -> list[str]:
        self.load()
        return self._scopes.keys()

    def _fix(self, dimensions: int) -> None:
        with self._fixing:
            if self._dimensions is None:
                self._dimensions = dimensions
        if dimensions != self._dimensions:
            raise mismatch(self._dimensions, dimensions)

    def _vector(self, data: bytes) -> Matrix:
        check_floats(data)
        vector = np.frombuffer(data, "<f4").astype(np.float32, copy=False)
        if self._dimensions is not None and len(vector) != self._dimensions:
            raise mismatch(self._dimensions, len(vector))
        check_unit(math.sqrt(float(np.dot(vector, vector))))
        return vector


def _record(row: Row) -> Record:
    check_expires(row)
    return Record(row.key, row.text, float(row.expires), payload_text(row.payload))
