"""What a vector index holds and gives back, and the protocol that every index follows.

An index is a hint: it says which stored question is nearest to a new one. The answer itself lives in the
ordinary store under the row's key, and who finds it gone there removes the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["AsyncVectorIndex", "Neighbour", "Row", "VectorIndex"]


@dataclass(frozen=True, slots=True)
class Row:
    """One stored question.

    ``key``: the answer's key in the store, ``<namespace>:<64 hex digits>``; the id of the row. ``scope``: 64
    hex digits; rows of two scopes never meet. ``text``: the last user text as it was asked. ``vector``:
    float32, little-endian, of unit length. ``expires``: seconds since the epoch; infinity for never.
    ``payload``: a little JSON that the decision keeps with the row.
    """

    key: str
    scope: str
    text: str
    vector: bytes
    expires: float
    payload: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row near the query. ``row.vector`` may be empty; ``similarity`` is the cosine, at most 1."""

    row: Row
    similarity: float


@runtime_checkable
class VectorIndex(Protocol):
    """The sync face of an index. ``inline``: True where `add`, `update` and `search` wait for nothing, so
    that an event loop may call them."""

    inline: bool

    @property
    def dimensions(self) -> int | None:
        """The length of its vectors; None until the first row says it."""
        ...

    def add(self, row: Row) -> None:
        """Keep ``row`` in place of any other of the same key; one that is over is removed instead.

        `InvalidRequestError` names the field at fault, as ``vector`` where its length is another one.
        """
        ...

    def update(self, key: str, payload: Mapping[str, object]) -> bool:
        """Give the row another payload; False where there is no such row."""
        ...

    def search(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        """The ``k`` rows of exactly this scope nearest to ``vector``, best first, or as many as there are.

        None that is over. `InvalidRequestError` as in `add`.
        """
        ...

    def remove(self, keys: Sequence[str]) -> int:
        """Remove rows; how many of them were there and not over."""
        ...

    def flush(self, namespace: str) -> int:
        """Remove the rows of exactly this namespace; how many there were."""
        ...

    def count(self) -> int:
        """How many rows there are; some may be over."""
        ...

    def purge(self) -> int:
        """Remove the rows that are over; how many."""
        ...

    def state(self, name: str) -> bytes | None:
        """What was kept under this name: a few kilobytes of what a decision has learnt. None: nothing."""
        ...

    def keep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        """Keep ``data`` under this name if what is there is still ``before`` (None: nothing).

        False where it is something else, and then nothing is changed. `flush` leaves states alone.
        """
        ...

    def close(self) -> None:
        """Keep what is to be kept, release files and connections. It may be used again afterwards."""
        ...


@runtime_checkable
class AsyncVectorIndex(Protocol):
    """The async face: the same contract, awaited."""

    @property
    def dimensions(self) -> int | None: ...

    async def aadd(self, row: Row) -> None: ...

    async def aupdate(self, key: str, payload: Mapping[str, object]) -> bool: ...

    async def asearch(self, scope: str, vector: bytes, k: int) -> list[Neighbour]: ...

    async def aremove(self, keys: Sequence[str]) -> int: ...

    async def aflush(self, namespace: str) -> int: ...

    async def acount(self) -> int: ...

    async def apurge(self) -> int: ...

    async def astate(self, name: str) -> bytes | None: ...

    async def akeep_state(self, name: str, data: bytes, before: bytes | None) -> bool: ...

    async def aclose(self) -> None: ...
