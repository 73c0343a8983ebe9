"""Whether the arguments that a file came to can be used: the settings are really made of them, connecting to
nothing. What refuses one is asked again without it, so that all that is wrong is told at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from ..caching.backends import SEMANTIC
from ..caching.manager import CacheManager
from ..caching.settings import SETTINGS
from ..errors import ConfigError, did_you_mean
from ..keys.resolver import KeyResolver
from ..providers.registry import Registry, registry
from ..routing.checks import check_deployments
from ..routing.connect import http_settings
from ..routing.deployment import Deployment
from ..routing.model_list import Groups, read_model_list
from ..routing.settings import make_settings
from ..semantic.settings import MODELS
from ..stores.redis_settings import read_settings
from .parts import Parts
from .problems import Report, head, placed

__all__ = ["check_parts"]

_DATABASE: Final = "database_url"
_PARAMS: Final = "litellm_params"
_STEP: Final = re.compile(r"[^.\[\]]+")
_MOST: Final = 100  # problems of one entry
_FALLBACKS: Final = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks", "default_fallbacks")
_REDIS: Final = ("redis_url", "redis_host", "redis_port", "redis_password")

Environ = Mapping[str, str]


def check_parts(parts: Parts, report: Report, environ: Environ) -> None:
    """Everything that is wrong with ``parts``, into ``report``."""
    deployments = _check_models(parts, report, environ)
    _check_router(parts, report, environ, deployments)
    _check_cache(parts, report)
    _check_keys(parts, report)


def _every(
    given: Mapping[str, object],
    make: Callable[[dict[str, object]], object],
    refused: Callable[[ConfigError], None],
) -> object:
    """What ``make`` makes of ``given``; of what it refuses, each in turn is told and left out. None where
    nothing can be made of the rest."""
    left = {name: value for name, value in given.items() if isinstance(name, str)}
    if len(left) != len(given):
        refused(ConfigError("names are text"))
    while True:
        try:
            return make(left)
        except ConfigError as exc:
            refused(exc)
            name = head(exc.param or "")
        except Exception as exc:  # a value that nobody thought of is a wrong one
            refused(ConfigError(f"cannot be used ({type(exc).__name__})"))
            return None
        if name not in left or name == "type":
            return None
        del left[name]


# --- models


def _check_models(parts: Parts, report: Report, environ: Environ) -> list[Deployment]:
    """The deployments that can be used; none where two have one id."""
    if parts.models is None:
        return []
    if not isinstance(parts.models, list):
        report.problem(parts.model_path, f"expected a list of deployments, not {type(parts.models).__name__}")
        return []
    try:
        providers = registry(_mapping(parts.router.get("providers")))
    except ConfigError:  # told where the Router is checked
        providers = registry()
    reading = _Reading(parts, report, environ, providers)
    good = [(place, entry) for place, entry in enumerate(parts.models) if reading.fits(entry, place)]
    return reading.distinct(good)


@dataclass(slots=True)
class _Reading:
    """Of a list of models, one entry after the other."""

    parts: Parts
    report: Report
    environ: Environ
    providers: Registry

    @property
    def defaults(self) -> Mapping[str, object]:
        return _mapping(self.parts.router.get("default_litellm_params")) or {}

    def read(self, entries: Sequence[Any]) -> tuple[Deployment, ...]:
        return read_model_list(
            entries, default_litellm_params=self.defaults, providers=self.providers, environ={}
        )

    def fits(self, entry: object, place: int) -> bool:
        """Whether nothing is wrong with ``entry``; else all that is."""
        path, good = f"{self.parts.model_path}[{place}]", True
        entry = copy.deepcopy(entry) if isinstance(entry, dict) else entry
        for _ in range(_MOST):
            try:
                check_deployments(self.read([entry]), self.providers, self.environ)
                return good
            except ConfigError as exc:
                self._refused(exc, entry, path)
                if not _without(entry, exc.param or ""):
                    return False
            except Exception as exc:  # as above
                self.report.problem(path, f"cannot be used ({type(exc).__name__})")
                return False
            good = False
        return False

    def distinct(self, good: Sequence[tuple[int, object]]) -> list[Deployment]:
        try:
            return list(self.read([entry for _, entry in good]))
        except ConfigError as exc:
            match = re.match(r"model_list\[(\d+)\]", exc.param or "")
            place = f"{self.parts.model_path}[{good[int(match[1])][0]}]" if match else self.parts.model_path
            rest = (exc.param or "")[match.end() :] if match else ""
            self.report.problem(place + rest, exc.message.removeprefix(f"{exc.param}: "))
            return []

    def _refused(self, error: ConfigError, entry: object, path: str) -> None:
        param = error.param or "model_list[0]"
        message = error.message
        for prefix in (param, "model_list[0]"):
            message = message.removeprefix(f"{prefix}: ")
        self.report.problem(self._place(param.removeprefix("model_list[0]"), entry, path), message)

    def _place(self, rest: str, entry: object, path: str) -> str:
        """The path of ``rest``, as in ``.litellm_params.rpm``: where the defaults are, of a parameter that
        only these have. What a connection lacks is a parameter too."""
        given: Mapping[str, object] = entry if isinstance(entry, dict) else {}
        own = given.get(_PARAMS)
        steps = _STEP.findall(rest)
        if len(steps) == 1 and steps[0] not in ("model_name", _PARAMS, *given):
            steps = [_PARAMS, *steps]
            rest = f".{_PARAMS}{rest}"
        if len(steps) > 1 and isinstance(own, dict) and steps[1] not in own and steps[1] in self.defaults:
            return f"{self.parts.router_origins['default_litellm_params']}{rest.removeprefix(f'.{_PARAMS}')}"
        return path + rest


def _without(entry: Any, param: str) -> bool:
    """Take what ``model_list[0].a.b`` names out of ``entry``; whether it was there."""
    steps = _STEP.findall(param.removeprefix("model_list[0]"))
    for step in steps[:-1]:
        entry = entry.get(step) if isinstance(entry, dict) else None
    if not steps or not isinstance(entry, dict) or steps[-1] not in entry:
        return False
    del entry[steps[-1]]
    return True


def _mapping(value: object) -> Any:
    return value if isinstance(value, Mapping) else None


# --- router


def _check_router(parts: Parts, report: Report, environ: Environ, deployments: Sequence[Deployment]) -> None:
    place = placed(parts.router_origins, parts.router_path)
    given = {name: value for name, value in parts.router.items() if name not in (*_REDIS, "redis")}
    http = given.pop("http", None)
    for name in ("cache_responses", "set_verbose"):  # checked as they were read; the latter acts at once
        given.pop(name, None)
    if http is not None:
        settings = {"http": http}
        _every(settings, lambda left: http_settings(left.get("http", {}), None), _refuse(report, place))  # type: ignore[arg-type]
    _check_redis(parts, report, environ)

    def make(left: dict[str, object]) -> Groups:
        settings = make_settings(left)
        settings.routing([], None, Random())  # the deployments were checked one by one
        return Groups(deployments, settings.model_group_alias)

    made = _every(given, make, _refuse(report, place))
    if isinstance(made, Groups):
        _check_groups(made, parts, report)


def _refuse(report: Report, place: Callable[[str], str]) -> Callable[[ConfigError], None]:
    return lambda error: report.refused(error, place)


def _check_redis(parts: Parts, report: Report, environ: Environ) -> None:
    named = {
        name.removeprefix("redis_"): (name, parts.router[name]) for name in _REDIS if name in parts.router
    }
    inner = _mapping(parts.router.get("redis")) or {}
    path = parts.router_origins.get("redis", parts.router_path)
    origins = {name: parts.redis_origins.get(name, f"{path}.{name}") for name in inner}
    origins |= {name: parts.router_origins.get(option, option) for name, (option, _) in named.items()}
    given = {**inner, **{name: value for name, (_, value) in named.items()}}
    given.pop("namespace", None)
    if inner or named:
        _check_connection(given, placed(origins, path), report, environ)


def _check_connection(
    given: Mapping[str, object], place: Callable[[str], str], report: Report, environ: Environ
) -> None:
    _every(given, lambda left: read_settings(left, environ), _refuse(report, place))


def _check_groups(groups: Groups, parts: Parts, report: Report) -> None:
    """A fallback to a model that nobody serves is no reason not to start: told."""
    for name in _FALLBACKS:
        for model in sorted(set(_targets(parts.router.get(name)))):
            if model not in groups:
                hint = did_you_mean(model, _served(parts))
                place = parts.router_origins.get(name, name)
                report.note(f"{place}: no deployment serves {model!r}{hint}")


def _targets(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [name for each in value.values() for name in _targets(each)]
    return [name for each in value for name in _targets(each)] if isinstance(value, list) else []


def _served(parts: Parts) -> list[str]:
    models = parts.models if isinstance(parts.models, list) else []
    return [str(entry.get("model_name")) for entry in models if isinstance(entry, Mapping)]


# --- cache and keys


def _check_cache(parts: Parts, report: Report) -> None:
    if parts.cache is None:
        return
    given = parts.cache
    if any(known == f"{parts.cache_path}.type" for known, _ in report.problems):
        given = {name: value for name, value in given.items() if name in SETTINGS and name != "type"}
    _every(given, _make_cache, _refuse(report, placed(parts.cache_origins, parts.cache_path)))


def _make_cache(settings: dict[str, object]) -> CacheManager:
    if settings.get("type") in SEMANTIC:
        # Models are the Router's affair, which is not made here.
        settings = {name: _unnamed(value) if name in MODELS else value for name, value in settings.items()}
    return CacheManager(**settings)  # type: ignore[arg-type]  # checked there


def _unnamed(value: object) -> object:
    return (lambda each: each) if isinstance(value, str) and value not in ("", "local") else value


def _check_keys(parts: Parts, report: Report) -> None:
    settings = {"store": parts.store, "master_key": parts.master_key, "ttl": parts.keys_ttl}
    _every(settings, _make_keys, lambda error: _refuse_keys(error, parts, report))


def _make_keys(settings: dict[str, object]) -> KeyResolver:
    return KeyResolver(**settings)  # type: ignore[arg-type]  # checked there


def _refuse_keys(error: ConfigError, parts: Parts, report: Report) -> None:
    """A store's own settings may have been written for the cache, or be one text."""
    param = error.param or "store"
    name, _, rest = param.partition(".")
    path = parts.store_path if name == "store" else f"keys.{name}"
    if rest and not path.endswith(_DATABASE):
        path = placed(parts.cache_origins if path == parts.cache_path else {}, path)(rest)
    message = error.message
    for prefix in (param, name, rest):
        message = message.removeprefix(f"{prefix}: ")
    report.problem(path, message)
