"""A stream of 500 events that is replayed from memory, under uvicorn."""

from __future__ import annotations

import json

from .harness import Row, compare, show
from .payloads import chat, http_request
from .servers import UVICORN, serving

__all__ = ["results"]


def results() -> list[Row]:
    request = http_request("/v1/chat/completions", json.dumps(chat(1536, stream=True)).encode())
    apps = {
        "bare": "benchmarks.apps:bare_replay",
        "fresh": "benchmarks.apps:bare_stream",
        "cached": "benchmarks.apps:cached_stream",
    }
    with serving(UVICORN, apps) as servers:
        servers["cached"].send([request])
        assert servers["cached"].send([request] * 8).hits == 8
        samples = compare(
            {name: server.candidate(lambda count: [request] * count, 240) for name, server in servers.items()}
        )
    path = "streamed hit, 500 events, uvicorn"
    return [
        samples.row(path, "cached", "bare", "ASGI app that sends 500 events that it has"),
        samples.row(path, "cached", "fresh", "ASGI app that yields to the event loop between events"),
    ]


if __name__ == "__main__":
    show(results)
