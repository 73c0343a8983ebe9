"""A provider to play with, in place of a real one: it needs no account and no network."""

from __future__ import annotations

import os
from functools import cache

from llm_middleware.testing import FakeUpstream

__all__ = ["fake_upstream"]


@cache
def fake_upstream() -> FakeUpstream:
    """One for this process, on 127.0.0.1; ``FAKE_UPSTREAM_URL`` says where, unless it names another."""
    upstream = FakeUpstream()
    upstream.start()
    os.environ.setdefault("FAKE_UPSTREAM_URL", upstream.url)
    return upstream
