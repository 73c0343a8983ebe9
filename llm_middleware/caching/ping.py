"""`ping`: a round trip through the real store."""

from __future__ import annotations

import os
import time

from .._ports.protocol import Port
from .entry import Entry, Form
from .flow import Flow

__all__ = ["ping"]


async def ping(port: Port, flow: Flow, namespace: str) -> dict[str, object]:
    """Write, read and delete a probe; ``status`` (``healthy``/``unhealthy``), ``tier``, ``latency_ms``, and
    what the store tells of its server and connection. Raises what the store raises."""
    key = f"{namespace}:{os.urandom(32).hex()}"
    now = flow.lookup.clock()
    probe = Entry("json", now, now + 60, Form((), b"probe"))
    began = time.perf_counter()
    healthy = await flow.tiers.probe(port, key, probe)
    taken = time.perf_counter() - began
    return {
        **await flow.tiers.facts(port),
        "status": "healthy" if healthy else "unhealthy",
        "tier": flow.reporter.tier,
        "latency_ms": round(taken * 1e3, 3),
    }
