"""`Deployment`: one place where a model is served, as the Router knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Deployment"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Deployment:
    """``group``: the name that callers use (``model_name``); with ``*`` it stands for many. ``provider`` and
    ``model``: whose it is and what it is called there. ``connection``: ``api_key``, ``api_base``,
    ``api_version`` and what else says where and as whom. ``params``: parameters of requests that the caller
    does not set. ``info``: facts of the model (``max_input_tokens``, ``input_cost_per_token``, ...).

    ``id``: public, and stable over a change of keys. Limits are per minute; times are seconds. ``weight``:
    None where it is not set, which counts as 1.
    """

    id: str
    group: str
    provider: str
    model: str
    connection: Mapping[str, object] = field(default_factory=dict, repr=False)
    params: Mapping[str, object] = field(default_factory=dict)
    info: Mapping[str, object] = field(default_factory=dict)
    rpm: int | None = None
    tpm: int | None = None
    max_parallel_requests: int | None = None
    weight: float | None = None
    order: int = 0
    tags: frozenset[str] = frozenset()
    timeout: float | None = None
    stream_timeout: float | None = None
