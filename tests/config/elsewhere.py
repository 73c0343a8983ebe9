"""A process with sub-apps of its own: what to ask comes as lines of JSON, answers go out as such."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.api.clients import AsgiClient, WsgiClient

__all__ = ["FRONTS", "Answer", "Elsewhere"]

ROOT = Path(__file__).parents[2]
FRONTS = {"asgi": AsgiClient, "wsgi": WsgiClient}

Asked = tuple[str, object, str | None]
"""A path, a body and an API key."""


@dataclass
class Answer:
    """What came back. ``headers``: names in lower case."""

    status_code: int
    headers: dict[str, str]
    text: str


class Elsewhere:
    """One such process."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.config.elsewhere"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, front: str, file: Path, *asked: Asked) -> list[Answer]:
        """Make the sub-app of ``file`` there, in this process's environment as it is now, and post these."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        told = {"front": front, "file": str(file), "cwd": os.getcwd(), "environ": dict(os.environ)}
        self._popen.stdin.write(json.dumps({**told, "asked": asked}) + "\n")
        line = self._popen.stdout.readline()
        assert line, "the process ended"
        return [Answer(*each) for each in json.loads(line)]

    def close(self) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.close()
        self._popen.wait(30)
        self._popen.stdout.close()


def _answers(told: Mapping[str, Any]) -> list[object]:
    os.chdir(told["cwd"])
    sys.path.insert(0, told["cwd"])  # as servers do
    os.environ.clear()
    os.environ.update(told["environ"])
    client = FRONTS[told["front"]](told["file"])
    try:
        answers = [client.post(path, body, key=key) for path, body, key in told["asked"]]
    finally:
        client.close()
    return [[each.status_code, dict(each.headers), each.text] for each in answers]


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_answers(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
