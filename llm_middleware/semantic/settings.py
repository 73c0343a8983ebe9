"""`SemanticSettings`: what a cache that looks for questions of like meaning takes beside the settings of
every cache. LiteLLM's names of the same things are read too."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

from ..caching.checked import boolean, choice, fail, number, or_none, path, whole
from ..errors import ConfigError

__all__ = ["LITELLM_NAMES", "MODELS", "NAMES", "SemanticSettings", "read_settings"]

_DEFAULT_ERROR: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticSettings:
    """Times are seconds, sizes bytes, shares and cosines from 0 to 1.

    What is served: ``max_error_rate``, the bound on wrong answers as a share of look-ups (the verified mode;
    0.01 where nothing is said), or ``similarity_threshold``, the least cosine (the static mode), or
    ``static_error_target``, the share of errors from which that cosine is found. ``similarity_threshold``
    beside ``max_error_rate`` is the least cosine that is looked at. ``shadow``: nothing is served, what would
    be is counted. ``judge``: a model of the ``router``, a function of a `Pair`, or a `Judge`; None: by the
    answers' embeddings. ``judge_budget``: comparisons per thousand look-ups.

    ``embedding_model``: ``local``, a model of the ``router``, a function from texts to vectors, or an
    `Embedder`. ``embedding_budget``: how long a request waits for a vector. ``embedding_timeout``: how long
    the call may take. ``embedding_max_tokens``, ``embedding_dimensions``: of the model, where it does not
    say.

    ``context``: ``all`` compares earlier turns exactly, ``questions`` without what the assistant said in
    them. ``question_field``: where the question is in requests of kind ``json``. ``vector_index``: a
    `VectorIndex` of one's own. ``index_name``: of the index in Redis, of the collection in Qdrant.
    ``index_bytes``: memory for the index of this process; ``index_path``: a file that keeps it. ``qdrant_*``:
    see `QdrantIndex`."""

    similarity_threshold: float | None = None
    max_error_rate: float | None = None
    static_error_target: float | None = None
    shadow: bool = False
    judge: object = None
    judge_budget: float = 1000.0
    embedding_model: object = "local"
    embedding_budget: float = 0.25
    embedding_timeout: float = 5.0
    embedding_max_tokens: int | None = None
    embedding_dimensions: int | None = None
    router: Any = None
    context: str = "all"
    question_field: str | None = None
    vector_index: object = None
    index_name: str | None = None
    index_bytes: int = 512 << 20
    index_path: str | None = None
    qdrant_api_base: str | None = None
    qdrant_api_key: str | None = None
    qdrant_quantization_config: str | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.static_error_target is not None and not (
            self.similarity_threshold is None and self.max_error_rate is None
        ):
            raise ConfigError(
                "static_error_target: goes without similarity_threshold and max_error_rate",
                param="static_error_target",
            )
        if self.static and self.judge is not None:
            raise ConfigError("judge: goes with max_error_rate, which needs one", param="judge")
        if not self.static and self.max_error_rate is None:
            object.__setattr__(self, "max_error_rate", _DEFAULT_ERROR)

    @property
    def static(self) -> bool:
        """Whether one threshold decides."""
        alone = self.similarity_threshold is not None and self.max_error_rate is None
        return alone or self.static_error_target is not None


def _model(name: str, value: object) -> object:
    embeds = callable(value) or hasattr(value, "embed") or hasattr(value, "aembed")
    if not embeds and (not isinstance(value, str) or not value):
        raise fail(name, "a model's name, a function or an embedder", value)
    return value


def _index(name: str, value: object) -> object:
    if value is not None and not (hasattr(value, "search") or hasattr(value, "asearch")):
        raise fail(name, "a vector index", value)
    return value


def _router(name: str, value: object) -> object:
    if value is not None and not (hasattr(value, "__contains__") and hasattr(value, "models")):
        raise fail(name, "a Router", value)
    return value


_positive = number("seconds > 0", math.ulp(0.0), sys.float_info.max)
_cosine = number("a cosine from 0 to 1", 0.0, 1.0)
_share = or_none(number("a share over 0 and under 1", math.ulp(0.0), math.nextafter(1.0, 0.0)))
_count = whole("a whole number >= 1", 1)
_name = or_none(path)

_CHECKS: Mapping[str, Callable[[str, object], object]] = {
    "similarity_threshold": or_none(_cosine),
    "max_error_rate": _share,
    "static_error_target": _share,
    "shadow": boolean,
    "judge_budget": number("calls per thousand, 0 to 1000", 0.0, 1000.0),
    "embedding_model": _model,
    "embedding_budget": _positive,
    "embedding_timeout": _positive,
    "embedding_max_tokens": or_none(_count),
    "embedding_dimensions": or_none(_count),
    "router": _router,
    "context": choice("all", "questions"),
    "question_field": _name,
    "vector_index": _index,
    "index_name": _name,
    "index_bytes": _count,
    "index_path": _name,
    "qdrant_api_base": _name,
    "qdrant_api_key": _name,
    "qdrant_quantization_config": _name,
}

NAMES: Final = tuple(setting.name for setting in fields(SemanticSettings))

LITELLM_NAMES: Final[Mapping[str, str | None]] = MappingProxyType(
    {
        "redis_semantic_cache_embedding_model": "embedding_model",
        "redis_semantic_cache_index_name": "index_name",
        "redis_semantic_cache_use_async": None,
        "qdrant_semantic_cache_embedding_model": "embedding_model",
        "qdrant_semantic_cache_vector_size": "embedding_dimensions",
        "qdrant_collection_name": "index_name",
        "semantic_cache_embedding_max_input_tokens": "embedding_max_tokens",
        "semantic_cache_embedding_timeout": "embedding_timeout",
    }
)
"""From LiteLLM's names to those here; None: of no meaning, since both faces are always there."""

MODELS: Final = frozenset(
    ["embedding_model", "judge", *(name for name, own in LITELLM_NAMES.items() if own == "embedding_model")]
)
"""Settings that may name a model of a Router's."""


def read_settings(given: Mapping[str, object]) -> tuple[SemanticSettings, dict[str, object]]:
    """The settings, and what of ``given`` is not theirs. `ConfigError` names one that is wrong, by the name
    under which it was given."""
    own: dict[str, object] = {}
    said: dict[str, str] = {}
    rest: dict[str, object] = {}
    for name, value in given.items():
        mine = LITELLM_NAMES.get(name, name if name in NAMES else "")
        if mine == "":
            rest[name] = value
        elif mine is not None and value is not None and (mine not in own or name == mine):
            own[mine], said[mine] = value, name
    try:
        return SemanticSettings(**own), rest  # type: ignore[arg-type]  # checked there
    except ConfigError as exc:
        name = said.get(exc.param or "", exc.param or "")
        raise ConfigError(exc.message.replace(f"{exc.param}:", f"{name}:", 1), param=name) from None
