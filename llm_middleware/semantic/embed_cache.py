"""`CachedEmbedder`: vectors of texts that were seen before, and one call for each that was not.

However many requests ask for a text at a time, one call embeds it (`Pending`), beside all of them: each waits
for it as long as its budget allows and goes on without. The call itself goes on, so that the answer that is
stored later finds the vector there. An embedder that keeps failing is left alone for a moment.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port, Waiter
from ..caching.breaker import Breaker
from ..caching.memo import Memo
from ..errors import ConfigError, StoreError
from ..stores.per_process import PerProcess
from .embedders import DimensionError, Embedder, EmbeddingError, UnfitTextError

__all__ = ["CachedEmbedder", "EmbedderStats", "Pending"]

_LONGEST_CALL = 10.0  # seconds after which a call is taken for lost, and another may be made
_MOST_CALLS = 64  # at a time; more would only queue at the embedder


class Pending:
    """One text's vector, there or on its way. Any number of threads and tasks may wait for it."""

    __slots__ = ("_waiters", "begun", "done", "error", "vector")

    def __init__(self, vector: bytes | None = None, error: BaseException | None = None) -> None:
        self.vector = vector
        self.error = error
        self.done = vector is not None or error is not None
        self.begun = time.monotonic()
        self._waiters: list[Waiter] = []

    async def wait(self, port: Port, seconds: float | None) -> bytes | None:
        """The vector; None where there is none after ``seconds`` (None: for as long as the call takes) or it
        failed: then ``error`` says why."""
        if not self.done:
            waiter = port.waiter()
            self._waiters.append(waiter)
            if not self.done:  # else whoever settled it may not have seen this waiter
                await waiter.wait(seconds)
        return self.vector

    def settle(self, vector: bytes | None, error: BaseException | None = None) -> None:
        self.vector, self.error = vector, error
        self.done = True
        for waiter in list(self._waiters):
            waiter.wake()


@dataclass(frozen=True, slots=True)
class EmbedderStats:
    """``calls``: of the embedder. ``hits``: texts whose vector was there. ``joined``: texts that another
    request was asking for. ``late``: requests that went on without. ``failed``: calls without a vector.
    ``refused``: texts for which the embedder was not asked, as it kept failing or was busy."""

    calls: int = 0
    hits: int = 0
    joined: int = 0
    late: int = 0
    failed: int = 0
    refused: int = 0


class CachedEmbedder:
    """``embedder`` behind a cache of at most ``max_bytes`` of texts and vectors.

    ``budget``: seconds that a request waits for a vector. An `Embedder` itself, whose `embed` and `aembed`
    raise what fails and have no budget; `find` and `start` are for requests.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        budget: float = 0.25,
        max_bytes: int = 16 << 20,
        breaker: Breaker | None = None,
    ) -> None:
        if not (hasattr(embedder, "embed") or hasattr(embedder, "aembed")):
            raise ConfigError(
                f"embedding_model: expected an embedder, got {embedder!r}", param="embedding_model"
            )
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
            raise ConfigError(
                f"embedding_budget: expected seconds > 0, got {budget!r}", param="embedding_budget"
            )
        self.budget = budget
        self._embedder = embedder
        self._known: Memo[str, bytes] = Memo(1 << 20, max_bytes // 2)
        self._pending: PerProcess[dict[str, Pending]] = PerProcess(dict)
        self._breaker = breaker or Breaker()
        self._counting = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._size = 4 * (embedder.dimensions or 0)  # bytes; 0 until it is known

    @property
    def id(self) -> str:
        return self._embedder.id

    @property
    def dimensions(self) -> int | None:
        return self._embedder.dimensions

    @property
    def max_tokens(self) -> int | None:
        return self._embedder.max_tokens

    @property
    def stats(self) -> EmbedderStats:
        with self._counting:
            return EmbedderStats(**self._counts)

    def fits(self, text: str) -> bool:
        return self._embedder.fits(text)

    # --- for requests: nothing here fails

    async def find(self, port: Port, text: str) -> bytes | None:
        """The text's vector, within the budget; else None."""
        return await self.wait(port, self.start(port, text))

    async def wait(self, port: Port, pending: Pending) -> bytes | None:
        """What `start` began, within the budget from now; else None."""
        vector = await pending.wait(port, self.budget)
        if not pending.done:
            self._count("late")
        return vector

    def start(self, port: Port, text: str, whose: str = "") -> Pending:
        """Ask for a text's vector, beside the caller. At once: what is known is there when this returns.
        ``whose``: nobody else learns from the time it takes that the text was asked."""
        name = f"{whose}\0{text}" if whose else text
        vector = self._known.get(name, _weight(text))
        if vector is not None:
            self._count("hits")
            return Pending(vector)
        table = self._pending.mine()
        fresh = Pending()
        while (pending := table.setdefault(name, fresh)) is not fresh:
            if time.monotonic() - pending.begun < _LONGEST_CALL:
                self._count("joined")
                return pending
            _forget(table, name, pending)  # its event loop ended before it began, or its thread hangs
        vector = self._known.get(name, _weight(text))
        if vector is not None:  # a call for it ended while we came
            self._end(name, fresh, vector, None)
        elif not _room(table) or not self._breaker.allow():
            self._count("refused")
            self._end(name, fresh, None, EmbeddingError(f"{self.id}: not asked, it fails or is busy"))
        else:
            self._count("calls")
            self._spawn(port, text, fresh, name)
        return fresh

    def _spawn(self, port: Port, text: str, pending: Pending, name: str) -> None:
        try:
            port.spawn(lambda: self._call(port, text, pending, name))
        except RuntimeError as exc:  # no more threads
            self._breaker.failed()
            self._count("failed")
            self._end(name, pending, None, exc)

    async def _call(self, port: Port, text: str, pending: Pending, name: str) -> None:
        try:
            vector = await self._ask(port, text)
        except UnfitTextError as exc:
            self._breaker.succeeded()
            self._end(name, pending, None, exc)
        except Exception as exc:
            self._breaker.failed()
            self._count("failed")
            self._end(name, pending, None, exc)
        except BaseException as exc:  # the event loop ends; others may wait in other threads
            self._end(name, pending, None, exc)
            raise
        else:
            self._breaker.succeeded()
            self._known.put(name, vector, _weight(text, vector))
            self._end(name, pending, vector, None)

    async def _ask(self, port: Port, text: str) -> bytes:
        try:
            given = await port.store(self._embedder, "embed", [text], budget=_LONGEST_CALL)
        except StoreError as exc:
            raise EmbeddingError(f"{self.id}: {exc.message}") from exc
        return self._checked(given, 1)[0]

    def _end(self, text: str, pending: Pending, vector: bytes | None, error: BaseException | None) -> None:
        # Known first and forgotten then: who comes in between asks no second time.
        _forget(self._pending.mine(), text, pending)
        pending.settle(vector, error)

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1

    # --- an embedder itself

    def embed(self, texts: Sequence[str]) -> list[bytes]:
        """One vector for each text, those that are not known by one call."""
        return run_sync(self._embed(SYNC, texts))

    async def aembed(self, texts: Sequence[str]) -> list[bytes]:
        """`embed` for async callers."""
        return await self._embed(async_port(), texts)

    async def _embed(self, port: Port, texts: Sequence[str]) -> list[bytes]:
        found = {text: vector for text in texts if (vector := self._known.get(text, _weight(text)))}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            self._count("calls")
            given = await port.store(self._embedder, "embed", missing)
            for text, vector in zip(missing, self._checked(given, len(missing)), strict=True):
                found[text] = vector
                self._known.put(text, vector, _weight(text, vector))
        return [found[text] for text in texts]

    def _checked(self, given: object, count: int) -> list[bytes]:
        """What an embedder of the host's own may return is checked too."""
        if not isinstance(given, list) or len(given) != count or not all(map(_is_vector, given)):
            raise EmbeddingError(f"{self.id}: expected float32 bytes for each of {count} texts")
        for vector in given:
            self._size = self._size or len(vector)
            if len(vector) != self._size:
                raise DimensionError(
                    f"{self.id}: a vector of {len(vector) // 4} numbers where there were {self._size // 4}"
                )
        return given


def _is_vector(value: object) -> bool:
    return isinstance(value, bytes) and len(value) > 0 and len(value) % 4 == 0


def _weight(text: str, vector: bytes = b"") -> int:
    """About what an entry of the cache takes, in bytes."""
    return 200 + 2 * len(text) + len(vector)


def _room(table: dict[str, Pending]) -> bool:
    """Whether another call may be made; those that were lost do not count."""
    if len(table) > _MOST_CALLS:
        for text, pending in list(table.items()):
            if time.monotonic() - pending.begun >= _LONGEST_CALL:
                _forget(table, text, pending)
    return len(table) <= _MOST_CALLS


def _forget(table: dict[str, Pending], text: str, pending: Pending) -> None:
    if table.get(text) is pending:
        table.pop(text, None)
