"""Vectors for an evaluation: embedded in batches, kept in a file if one is named, and of each request the
nearest earlier ones.

The file is an array of numpy's: of each text 16 bytes that stand for the model and the text, and the vector.
It says nothing of the texts themselves, several evaluations may share it, and what it lacks is added.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .embedders import Embedder, UnfitTextError

__all__ = ["NearestEarlier", "Vectors", "cosines", "nearest_earlier"]

_BATCH = 128  # texts: a few seconds' work for the local model, one call for a service
_NAME = 16  # bytes
_KEPT = 64
_BLOCK = 256  # requests compared at a time with all before them

Matrix = Any  # float32 rows
Tell = Callable[[int], object]


def _silent(_: int) -> None: ...


class Vectors:
    """The vectors of an embedder, each made once. ``path``: a file that keeps them."""

    def __init__(self, embedder: Embedder, path: str | Path | None = None) -> None:
        self._embedder = embedder
        self._path = None if path is None else Path(path)
        self._known: dict[bytes, bytes] = {}
        self._kept = 0
        if self._path is not None and self._path.exists():
            self._known = _loaded(self._path)
            self._kept = len(self._known)

    def missing(self, texts: Iterable[str]) -> int:
        """How many of ``texts`` are still to be embedded."""
        return sum(self._name(text) not in self._known for text in set(texts))

    def of(self, texts: Sequence[str], tell: Tell = _silent) -> Matrix:
        """A row for each text; zeros where the embedder cannot read it (it is near nothing, as in the cache:
        such a question is answered from an exact repeat only). What was made before an error or an interrupt
        is kept in the file."""
        try:
            self._add(texts, tell)
        finally:
            self._save()
        rows = [self._known[self._name(text)] for text in texts]
        return _matrix(rows)

    def unread(self, texts: Iterable[str]) -> int:
        """How many of ``texts``, which have vectors, the embedder could not read."""
        return sum(not any(self._known[self._name(text)]) for text in set(texts))

    def _name(self, text: str) -> bytes:
        told = f"{self._embedder.id}\0{text}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(told, digest_size=_NAME).digest()

    def _add(self, texts: Sequence[str], tell: Tell) -> None:
        wanted = [text for text in dict.fromkeys(texts) if self._name(text) not in self._known]
        wanted.sort(key=len)  # texts of one length go through a model best
        unfit: list[str] = []
        for start in range(0, len(wanted), _BATCH):
            batch = wanted[start : start + _BATCH]
            for text, vector in zip(batch, self._embedded(batch), strict=True):
                if vector is None:
                    unfit.append(text)
                else:
                    self._put(text, vector)
            tell(len(batch))
        if unfit and not self._known:
            raise ConfigError(f"{self._embedder.id} can read none of the texts", param="embedding_model")
        self._known.update((self._name(text), bytes(self._width())) for text in unfit)

    def _put(self, text: str, vector: bytes) -> None:
        width = self._width()
        if width and len(vector) != width:
            before, now = width // 4, len(vector) // 4
            raise ConfigError(
                f"vectors: {now} numbers in one of {self._embedder.id}, {before} in those of "
                f"{self._path or 'before'}: name another file",
                param="vectors",
            )
        self._known[self._name(text)] = vector

    def _width(self) -> int:
        return len(next(iter(self._known.values()), b""))

    def _embedded(self, batch: list[str]) -> Iterator[bytes | None]:
        try:
            yield from self._embedder.embed(batch)
        except UnfitTextError:
            for text in batch:  # which of them?
                try:
                    yield from self._embedder.embed([text])
                except UnfitTextError:
                    yield None

    def _save(self) -> None:
        if self._path is None or len(self._known) == self._kept:
            return
        _write(self._path, self._known, self._width() // 4)
        self._kept = len(self._known)


def _loaded(path: Path) -> dict[bytes, bytes]:
    import numpy as np

    try:
        table = np.load(path, allow_pickle=False)
        names, vectors = table["text"], np.asarray(table["vector"], "<f4")
        if names.shape != (len(vectors), _NAME) or vectors.ndim != 2:
            raise ValueError("another shape")
    except (OSError, ValueError, EOFError, IndexError, KeyError, TypeError) as exc:
        raise ConfigError(f"vectors: {path} is no file of vectors: {exc}", param="vectors") from exc
    return {name.tobytes(): vector.tobytes() for name, vector in zip(names, vectors, strict=True)}


def _write(path: Path, known: dict[bytes, bytes], dimensions: int) -> None:
    import numpy as np

    table = np.zeros(len(known), np.dtype([("text", "u1", (_NAME,)), ("vector", "<f4", (dimensions,))]))
    table["text"] = np.frombuffer(b"".join(known), "u1").reshape(-1, _NAME)
    table["vector"] = np.frombuffer(b"".join(known.values()), "<f4").reshape(-1, dimensions)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, table)
        beside.replace(path)  # whole or not at all
    except OSError as exc:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"vectors: {path} cannot be written: {exc.strerror}", param="vectors") from exc


def _matrix(rows: Sequence[bytes]) -> Matrix:
    import numpy as np

    return np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), -1)


def cosines(stored: Matrix, asked: Matrix) -> list[float]:
    """Of each pair of rows the cosine."""
    import numpy as np

    return [float(value) for value in np.einsum("ij,ij->i", stored, asked)]


class NearestEarlier:
    """Of each row the rows before it, nearest first (`evaluation.Nearest`). The first 64 are remembered; who
    needs more has them computed."""

    def __init__(self, vectors: Matrix, places: Matrix, near: Matrix) -> None:
        self._vectors, self._places, self._near = vectors, places, near

    def of(self, at: int) -> Iterator[tuple[int, float]]:
        kept = min(at, self._places.shape[1])
        places = self._places[at, :kept].tolist()
        yield from zip(places, self._near[at, :kept].tolist(), strict=True)
        if kept < at:
            yield from self._others(at, set(places))

    def _others(self, at: int, known: set[int]) -> Iterator[tuple[int, float]]:
        scores = self._vectors[:at] @ self._vectors[at]
        order = (-scores).argsort(kind="stable")
        every = zip(order.tolist(), scores[order].tolist(), strict=True)
        return itertools.filterfalse(lambda one: one[0] in known, every)


def nearest_earlier(vectors: Matrix, tell: Tell = _silent, kept: int = _KEPT) -> NearestEarlier:
    """Compares every row of ``vectors`` with all before it: seconds for 10,000, minutes for 100,000."""
    import numpy as np

    count = len(vectors)
    kept = min(kept, count)
    places, near = np.zeros((count, kept), np.int32), np.zeros((count, kept), np.float32)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        scores = vectors[start:end] @ vectors[:end].T
        scores[:, start:][np.triu_indices(end - start)] = -np.inf  # itself and later ones
        best = _best(scores, kept)
        places[start:end, : best.shape[1]] = best
        near[start:end, : best.shape[1]] = np.take_along_axis(scores, best, 1)
        tell(end - start)
    return NearestEarlier(vectors, places, near)


def _best(scores: Matrix, kept: int) -> Matrix:
    """Of each row the columns with the highest scores, highest first, and of equals the first."""
    import numpy as np

    width = scores.shape[1]
    if kept < width:
        best = np.sort(np.argpartition(scores, width - kept, axis=1)[:, width - kept :], axis=1)
    else:
        best = np.broadcast_to(np.arange(width), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)
