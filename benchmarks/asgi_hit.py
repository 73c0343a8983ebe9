"""A memory hit through the ASGI middleware, under uvicorn."""

from __future__ import annotations

import json

from .harness import Row, compare, show
from .payloads import chat, http_request
from .servers import UVICORN, serving

__all__ = ["results"]


def results() -> list[Row]:
    request = http_request("/v1/chat/completions", json.dumps(chat(1536)).encode())
    apps = {"bare": "benchmarks.apps:bare_asgi", "cached": "benchmarks.apps:cached_asgi"}
    with serving(UVICORN, apps) as servers:
        servers["cached"].send([request])
        assert servers["cached"].send([request] * 8).hits == 8
        samples = compare(
            {
                name: server.candidate(lambda count: [request] * count, 12000)
                for name, server in servers.items()
            }
        )
    floor = "ASGI app that reads the body and answers with the same bytes"
    return [samples.row("ASGI memory hit, 1.5 KB, uvicorn", "cached", "bare", floor, 1.3)]


if __name__ == "__main__":
    show(results)
