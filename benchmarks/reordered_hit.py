"""The same request in other words: keys in another order, other white space. No memo helps, the key does."""

from __future__ import annotations

import json
from itertools import islice

from .harness import Row, compare, in_process, show
from .payloads import chat, reserialised
from .repeat_hit import FLOOR, filled, floor_of, look_up

__all__ = ["results"]


def results() -> list[Row]:
    value = chat(2048)
    body = json.dumps(value).encode()
    texts = reserialised(value)

    def others(count: int) -> list[bytes]:
        return list(islice(texts, count))

    samples = compare(
        {
            "floor": in_process(others, floor_of(body)),
            "look up": in_process(others, look_up(filled(body))),
        }
    )
    return [samples.row("memory hit, other key order, 2 KB: look-up", "look up", "floor", FLOOR, 1.3)]


if __name__ == "__main__":
    show(results)
