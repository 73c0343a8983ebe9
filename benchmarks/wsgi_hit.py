"""A memory hit through the WSGI middleware, under gunicorn with threads."""

from __future__ import annotations

import json

from .harness import Row, compare, show
from .payloads import chat, http_request
from .servers import GUNICORN, serving

__all__ = ["results"]


def results() -> list[Row]:
    request = http_request("/v1/chat/completions", json.dumps(chat(1536)).encode())
    apps = {"bare": "benchmarks.apps:bare_wsgi", "cached": "benchmarks.apps:cached_wsgi"}
    with serving(GUNICORN, apps) as servers:
        servers["cached"].send([request])
        assert servers["cached"].send([request] * 8).hits == 8
        samples = compare(
            {
                name: server.candidate(lambda count: [request] * count, 3000)
                for name, server in servers.items()
            },
            rounds=21,  # threads that contend make single rounds differ by half
        )
    floor = "WSGI app that reads the body and answers with the same bytes"
    return [samples.row("WSGI memory hit, 1.5 KB, gunicorn gthread", "cached", "bare", floor, 1.3)]


if __name__ == "__main__":
    show(results)
