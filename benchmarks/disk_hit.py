"""A hit in the disk store, in this process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .harness import Row, compare, in_process, show
from .payloads import ANSWER, chat
from .repeat_hit import FLOOR, SCOPE, filled, floor_of

__all__ = ["results"]


def results() -> list[Row]:
    body = json.dumps(chat(2048)).encode()

    def copies(count: int) -> list[bytes]:
        return [bytes(bytearray(body)) for _ in range(count)]

    with tempfile.TemporaryDirectory() as folder:
        cache = filled(body, type="disk", disk_cache_dir=folder)
        kept = Path(folder, "answer")
        kept.write_bytes(ANSWER)

        def get(bodies: Sequence[bytes]) -> None:
            for raw in bodies:
                answer = cache.get(raw, scope=SCOPE)
                assert answer is not None
                assert answer.body == ANSWER

        def read(bodies: Sequence[bytes]) -> None:
            for _ in bodies:
                assert kept.read_bytes() == ANSWER

        samples = compare(
            {
                "floor": in_process(copies, floor_of(body)),
                "file": in_process(copies, read),
                "get": in_process(copies, get),
            }
        )
        cache.close()
    return [
        samples.row("disk hit, same bytes, 2 KB: `get`", "get", "floor", FLOOR),
        samples.row(
            "disk hit, same bytes, 2 KB: `get`", "get", "file", "reading a file of the answer's size"
        ),
    ]


if __name__ == "__main__":
    show(results)
