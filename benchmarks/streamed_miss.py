"""A stream of 500 events that passes through the cache for the first time, under uvicorn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import count

from .harness import Row, compare, quick, show
from .payloads import chat, http_request
from .servers import UVICORN, Server, serving

__all__ = ["results"]

_FLOOR = "ASGI app that streams the same events"
_numbers = count()


def _requests(number: int) -> list[bytes]:
    """Requests that nobody has made before."""
    value = chat(1536, stream=True)
    fresh = ({**value, "user": f"user-{next(_numbers)}"} for _ in range(number))
    return [http_request("/v1/chat/completions", json.dumps(body).encode()) for body in fresh]


def _first_bytes(servers: dict[str, Server]) -> Iterator[float]:
    """How much later the first byte comes, in milliseconds: the difference of medians, by round."""
    for _ in range(3 if quick() else 9):
        first = {
            name: statistics.median(server.send(_requests(8 if quick() else 25), connections=1).first)
            for name, server in servers.items()
        }
        yield (first["cached"] - first["bare"]) * 1e3


def results() -> list[Row]:
    apps = {"bare": "benchmarks.apps:bare_stream", "cached": "benchmarks.apps:cached_stream"}
    with serving(UVICORN, apps) as servers:
        samples = compare({name: server.candidate(_requests, 160) for name, server in servers.items()})
        later = list(_first_bytes(servers))
    return [
        samples.row("streamed miss, 500 events, uvicorn", "cached", "bare", _FLOOR, 1.25),
        Row(
            "streamed miss: first byte later by (wall clock)",
            _FLOOR,
            1.0,
            statistics.median(later),
            min(later),
            max(later),
            unit="ms",
        ),
    ]


if __name__ == "__main__":
    show(results)
