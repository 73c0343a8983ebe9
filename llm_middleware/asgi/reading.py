"""Reading what a client sends: where it asks, who it says it is, and its body."""

from __future__ import annotations

import asyncio

from ..api.message import Head
from ..caching.headers import get_header
from .types import Receive, Scope

__all__ = ["about_body", "client_left", "head_of", "path_below", "read_body"]


def path_below(scope: Scope) -> str:
    """What is left of the path below the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path.startswith(root):
        return path[len(root) :]
    # The host's own root path is not in front of the path everywhere: not where a proxy has taken it away.
    return path.removeprefix(root.removeprefix(scope.get("app_root_path", "")))


def head_of(scope: Scope) -> Head:
    """What is known of a request before its body."""
    query = scope.get("query_string", b"").decode("latin-1")
    path, headers = path_below(scope), scope["headers"]
    return Head(method=scope["method"], path=path, query=query, headers=headers, native=scope)


async def client_left(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        await asyncio.sleep(0)  # a server that has more to say than the body must not hold the loop


def about_body(scope: Scope) -> tuple[str, str]:
    """The content type and the encoding that the headers tell."""
    form, encoding = (get_header(scope["headers"], name) for name in (b"content-type", b"content-encoding"))
    return form.decode("latin-1"), encoding.decode("latin-1").strip().lower()


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """The body; None where it is longer than ``limit`` bytes."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)
