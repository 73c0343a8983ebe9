"""The sub-app: what a hit on its chat endpoint takes, with API keys, and what a miss takes.

The floor is an app that reads the body and answers with the same bytes, whatever is asked. A call of a model
goes to an upstream in another process, whose CPU time is nobody's here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from .harness import Row, Samples, compare, show
from .network import environment
from .payloads import chat, http_request
from .servers import GUNICORN, UVICORN, Server, serving
from .upstream import upstream

__all__ = ["results"]

_PATH = "/v1/chat/completions"
_SIZE = 1536  # bytes of a request's body
_HIT_GOAL, _MISS_GOAL = 1.5, 8.0
_FLOOR = "{} app that reads the body and answers with the same bytes"
_MOUNTED_FLOOR = "the same app, mounted in the same host"

# What is asked of the caller, and the row's words for it.
_VARIANTS = {
    "keyed": "API key",
    "mounted": "API key, mounted in {}",
    "limited": "API key with `rpm_limit`",
    "open": "no keys",
    "authorized": "`authorize`",
}


def results() -> list[Row]:
    with upstream() as port, environment(BENCHMARK_UPSTREAM_PORT=port):
        return [
            *_hits("ASGI", "uvicorn", UVICORN, "Starlette", count=4000, rounds=11),
            # Threads that contend make single rounds differ by half.
            *_hits("WSGI", "gunicorn gthread", GUNICORN, "a Werkzeug dispatcher", count=1200, rounds=15),
            *_misses(),
        ]


def _apps(front: str) -> Mapping[str, str]:
    names = {
        "bare": f"bare_{front}",
        "bare mounted": f"bare_{front}_mounted",
        "keyed": front,
        "mounted": f"{front}_mounted",
        "limited": f"{front}_limited",
        "open": f"{front}_open",
        "authorized": f"{front}_authorized",
    }
    return {name: f"benchmarks.sub_apps:{app}" for name, app in names.items()}


def _hits(front: str, server: str, command: str, host: str, *, count: int, rounds: int) -> list[Row]:
    body = json.dumps(chat(_SIZE)).encode()
    with serving(command, _apps(front.lower())) as servers:
        requests = {
            name: http_request(f"/llm{_PATH}" if "mounted" in name else _PATH, body) for name in servers
        }
        for name in _VARIANTS:
            servers[name].send([requests[name]])
            assert servers[name].send([requests[name]] * 8).hits == 8
        samples = compare(
            {name: _repeated(servers[name], requests[name], count) for name in servers}, rounds=rounds
        )
    return _hit_rows(samples, front, server, host)


def _repeated(server: Server, request: bytes, count: int) -> Callable[[], float]:
    return server.candidate(lambda number: [request] * number, count)


def _hit_rows(samples: Samples, front: str, server: str, host: str) -> list[Row]:
    rows = []
    for name, words in _VARIANTS.items():
        goal = _HIT_GOAL if name in ("keyed", "mounted") else None
        path = f"{front} sub-app, hit, {words.format(host)}, {server}"
        rows.append(samples.row(path, name, "bare", _FLOOR.format(front), goal))
        if name == "mounted":
            rows.append(samples.row(path, name, "bare mounted", _MOUNTED_FLOOR))
    return rows


def _misses() -> list[Row]:
    """Each request asks what nobody asked before."""
    names = {"bare": "bare_asgi", "proxy": "bare_proxy", "keyed": "asgi"}
    with serving(UVICORN, {name: f"benchmarks.sub_apps:{app}" for name, app in names.items()}) as servers:
        fresh = _fresh()
        assert servers["keyed"].send(list(itertools.islice(fresh, 8))).hits == 0
        samples = compare({name: server.candidate(_several(fresh), 1000) for name, server in servers.items()})
    path = "ASGI sub-app, miss, API key, uvicorn"
    return [
        samples.row(path, "keyed", "bare", _FLOOR.format("ASGI"), _MISS_GOAL),
        samples.row(path, "keyed", "proxy", "ASGI app that passes body and answer on with aiohttp"),
    ]


def _several(requests: Iterator[bytes]) -> Callable[[int], Sequence[bytes]]:
    return lambda count: list(itertools.islice(requests, count))


def _fresh() -> Iterator[bytes]:
    for number in itertools.count():
        yield http_request(_PATH, json.dumps(chat(_SIZE, user=f"user-{number:08}")).encode())


if __name__ == "__main__":
    show(results)
