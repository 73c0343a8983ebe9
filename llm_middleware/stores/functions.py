"""A store made of the host's own two functions, sync or async: ``get_cache`` and ``add_cache``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import StoreError

__all__ = ["FunctionStore"]


class _Functions(Protocol):
    get_cache: Callable[[str], object] | None
    add_cache: Callable[..., object] | None


class FunctionStore:
    """``get_cache(key)`` returns the bytes stored or None; ``add_cache(key, value, ttl)`` keeps them. They
    are looked up at each call, so they can be replaced at any time."""

    tier = "custom"
    inline = True

    def __init__(self, owner: _Functions) -> None:
        self._owner = owner

    def get(self, key: str) -> object:
        function = self._owner.get_cache
        return None if function is None else function(key)

    def aget(self, key: str) -> object:
        return self.get(key)

    def set(self, key: str, value: bytes, ttl: float | None) -> object:
        function = self._owner.add_cache
        return None if function is None else function(key, value, ttl)

    def aset(self, key: str, value: bytes, ttl: float | None) -> object:
        return self.set(key, value, ttl)

    def delete(self, keys: Sequence[str]) -> int:
        raise StoreError("get_cache and add_cache cannot delete: use a Store of your own")

    def flush(self, namespace: str) -> int:
        raise StoreError("get_cache and add_cache cannot flush: use a Store of your own")

    def close(self) -> None:
        """Nothing is held."""
