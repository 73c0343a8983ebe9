"""A store made of the host's own two functions, sync or async: ``get_cache`` and ``add_cache``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import StoreError

__all__ = ["FunctionStore", "Functions"]


@dataclass(slots=True)
class Functions:
    """The host's own functions; either may be replaced while in use."""

    get_cache: Callable[[str], object] | None = None
    add_cache: Callable[..., object] | None = None

    @property
    def given(self) -> bool:
        return self.get_cache is not None or self.add_cache is not None


class FunctionStore:
    """``get_cache(key)`` returns the bytes stored or None; ``add_cache(key, value, ttl)`` keeps them. They
    are looked up at each call, so they can be replaced at any time."""

    tier = "custom"
    inline = True

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def get(self, key: str) -> object:
        function = self._functions.get_cache
        return None if function is None else function(key)

    def aget(self, key: str) -> object:
        return self.get(key)

    def set(self, key: str, value: bytes, ttl: float | None) -> object:
        function = self._functions.add_cache
        return None if function is None else function(key, value, ttl)

    def aset(self, key: str, value: bytes, ttl: float | None) -> object:
        return self.set(key, value, ttl)

    def delete(self, keys: Sequence[str]) -> int:
        raise StoreError("get_cache and add_cache cannot delete: use a Store of your own")

    def flush(self, namespace: str) -> int:
        raise StoreError("get_cache and add_cache cannot flush: use a Store of your own")

    def close(self) -> None:
        """Nothing is held."""
