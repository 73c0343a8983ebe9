"""A memory hit for a prompt of a megabyte: too long for the memo, so it is parsed and digested each time."""

from __future__ import annotations

import json

from .harness import Row, compare, in_process, show
from .payloads import chat
from .repeat_hit import FLOOR, filled, floor_of, look_up

__all__ = ["results"]


def results() -> list[Row]:
    body = json.dumps(chat(1 << 20)).encode()

    def copies(count: int) -> list[bytes]:
        return [bytes(bytearray(body)) for _ in range(count)]

    samples = compare(
        {
            "floor": in_process(copies, floor_of(body), batch=4),
            "look up": in_process(copies, look_up(filled(body)), batch=4),
        }
    )
    return [samples.row("memory hit, 1 MB prompt: look-up", "look up", "floor", FLOOR)]


if __name__ == "__main__":
    show(results)
