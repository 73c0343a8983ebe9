"""`read_model_list`: a Router's ``model_list`` as deployments, and `Groups`: which of them serve a name.

Entries are LiteLLM's: ``{"model_name", "litellm_params": {"model", ...}, "tpm", "rpm", "weight", "order",
"model_info"}`` (https://docs.litellm.ai/docs/routing). Our name for ``litellm_params`` is
``provider_params``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ..caching.environ import resolved
from ..errors import ConfigError, did_you_mean, nearest
from ..providers.connection import CONNECTION, SECRETS
from ..providers.registry import Provider, Registry, registry
from .deployment import Deployment
from .fields import count, headers, info, labels, mapping, number, seconds, switch, text, token
from .parameters import IGNORED, PARAMETERS, UNSERVED

__all__ = ["Groups", "find", "read_model_list"]

ANY: Final = "*"
_ENTRY: Final = frozenset(
    [
        "model_name",
        "litellm_params",
        "provider_params",
        "model_info",
        "rpm",
        "tpm",
        "max_parallel_requests",
        "weight",
        "order",
        "tags",
        "timeout",
        "stream_timeout",
    ]
)
# Read from the entry, else from its parameters, else from its info.
_LIMITS: Final = {
    "rpm": count,
    "tpm": count,
    "max_parallel_requests": count,
    "weight": number,
    "order": number,
    "timeout": seconds,
    "stream_timeout": seconds,
    "tags": labels,
}
_CONNECTION_READERS: Final = {
    "api_key": token,
    "azure_ad_token": token,
    "azure_ad_token_provider": token,
    "extra_headers": headers,
    "extra_body": mapping,
    "drop_params": switch,
    "additional_drop_params": labels,
    "max_retries": number,
    "num_retries": number,
}
_SPECIAL: Final = frozenset(["model", "custom_llm_provider", *_LIMITS])


def read_model_list(
    entries: Sequence[Mapping[str, object]],
    *,
    default_litellm_params: Mapping[str, object] | None = None,
    providers: Registry | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Deployment, ...]:
    """The deployments that ``entries`` describe, in their order. The caller's objects are not changed.

    ``default_litellm_params``: parameters of every entry that does not have them. ``os.environ/NAME`` stands
    for a variable's text. An ``id`` is that of ``model_info``, else a hash of the group and the parameters
    without keys, limits and times, where equal ones are numbered.

    A parameter that is neither a connection's nor known is one of requests, as LiteLLM has it.
    `ConfigError` names the place, as ``model_list[3].litellm_params.rpm``.
    """
    if isinstance(entries, str | bytes | Mapping) or not isinstance(entries, Iterable):
        raise ConfigError("model_list: expected a list of deployments", param="model_list")
    defaults = mapping(default_litellm_params or {}, "default_litellm_params")
    table = registry() if providers is None else providers
    listed = list(entries)
    deployments = [
        _Entry(entry, f"model_list[{place}]", defaults, table, environ).deployment()
        for place, entry in enumerate(listed)
    ]
    return _distinct(deployments, _chosen(listed))


@dataclass(slots=True)
class _Entry:
    """One entry while it is read."""

    entry: Mapping[str, object]
    at: str
    defaults: Mapping[str, object]
    providers: Registry
    environ: Mapping[str, str]

    def deployment(self) -> Deployment:
        entry = mapping(self.entry, self.at)
        _known(entry, _ENTRY, self.at)
        name = self._name_of_params(entry)
        raw = {**self.defaults, **mapping(entry[name], f"{self.at}.{name}")}
        at = f"{self.at}.{name}"
        params = mapping(resolved(raw, param=at, environ=self.environ), at)
        about = info(entry.get("model_info") or {}, f"{self.at}.model_info")
        group = text(entry.get("model_name"), f"{self.at}.model_name")
        provider, model = self._served(params, at)
        _fits(group, model, f"{at}.model")
        limits = self._limits(entry, params, about, at)
        connection, requests, costs = _split(params, at)
        if provider == ANY and connection.keys() & SECRETS and not connection.get("api_base"):
            message = f"{at}.model: a key needs a provider or an api_base, or any provider would be sent it"
            raise ConfigError(message, param=f"{at}.model")
        return Deployment(
            id=str(about.pop("id", "")) or _hash(group, raw),
            group=group,
            provider=provider,
            model=model,
            connection=connection,
            params=requests,
            info={**costs, **about},
            **limits,
        )

    def _name_of_params(self, entry: Mapping[str, object]) -> str:
        names = [name for name in ("litellm_params", "provider_params") if entry.get(name) is not None]
        if len(names) != 1:
            raise ConfigError(f"{self.at}: needs litellm_params, once", param=f"{self.at}.litellm_params")
        return names[0]

    def _served(self, params: Mapping[str, object], at: str) -> tuple[str, str]:
        """Whose it is, and what it is called there."""
        model = text(params.get("model"), f"{at}.model")
        named = params.get("custom_llm_provider")
        base = params.get("api_base") or params.get("base_url")
        if model == ANY and named is None and base is None:
            return ANY, ANY
        place = "model" if named is None else "custom_llm_provider"
        try:
            row, own = self.providers.resolve(
                model,
                None if base is None else text(base, f"{at}.api_base"),
                None if named is None else text(named, f"{at}.custom_llm_provider"),
            )
        except ConfigError as exc:
            if exc.param != "provider":
                raise
            raise ConfigError(f"{at}.{place}: {exc.message}", param=f"{at}.{place}") from None
        if not own:
            raise ConfigError(f"{at}.model: there is no model after the provider", param=f"{at}.model")
        return row.name, own

    def _limits(
        self, entry: Mapping[str, object], params: Mapping[str, object], about: dict[str, Any], at: str
    ) -> dict[str, Any]:
        """Those that are given, of the deployment's own fields."""
        places = ((entry, self.at), (params, at), (about, f"{self.at}.model_info"))
        limits: dict[str, Any] = {}
        for name, read in _LIMITS.items():
            given = [(source[name], where) for source, where in places if source.get(name) is not None]
            values = [read(value, f"{where}.{name}") for value, where in given]
            if values:
                limits[name] = values[0]
        if "tags" in limits:
            limits["tags"] = frozenset(limits["tags"])
        if "order" in limits:
            limits["order"] = int(limits["order"])
        for name in _LIMITS:
            about.pop(name, None)
        return limits


def _split(
    params: Mapping[str, object], at: str
) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
    """What says where and as whom, what is sent with requests, and what calls cost."""
    connection: dict[str, object] = {}
    requests: dict[str, object] = {}
    costs: dict[str, object] = {}
    for name, value in params.items():
        where = f"{at}.{name}"
        if name in _SPECIAL or name in IGNORED or value is None:
            continue
        if name in UNSERVED:
            raise ConfigError(f"{where}: this is not supported", param=where)
        if name in CONNECTION:
            connection[name] = _CONNECTION_READERS.get(name, text)(value, where)
        elif "_cost_per_" in name or name.endswith("_cost"):
            costs[name] = number(value, where)
        elif name in ("base_model", "mode"):
            costs[name] = text(value, where)
        else:
            _spelt(name, where)
            requests[name] = value
    return connection, requests, costs


def _known(entry: Mapping[str, object], names: Iterable[str], at: str) -> None:
    for name in entry:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(f"{at}.{name}: there is no such field{hint}", param=f"{at}.{name}")


def _spelt(name: str, where: str) -> None:
    """A name that is not known may be a provider's own parameter; one that is nearly known is misspelt."""
    if name in PARAMETERS:
        return
    alike = 0.66 if len(name) <= 4 else 0.81
    near = nearest(name, PARAMETERS | CONNECTION | _SPECIAL, alike)
    if near is not None:
        message = f"{where}: did you mean {near!r}? A provider's own parameter goes into extra_body"
        raise ConfigError(message, param=where)


# --- identity

_PASSING: Final = (_LIMITS.keys() - {"tags"}) | SECRETS | IGNORED | {"max_retries", "num_retries"}


def _hash(group: str, params: Mapping[str, object]) -> str:
    """What stays the same over another key, another limit and another environment."""
    lasting = {name: value for name, value in params.items() if name not in _PASSING and value is not None}
    said = json.dumps([group, _plain(lasting)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    """As JSON can hold it; of what it cannot, the kind: an object's own text may be another tomorrow."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _distinct(deployments: Sequence[Deployment], chosen: Sequence[str]) -> tuple[Deployment, ...]:
    """With ids for those that have none: of equal ones the second gets ``-2``, and so on."""
    taken = {name for name in chosen if name}
    told: list[Deployment] = []
    for deployment, own in zip(deployments, chosen, strict=True):
        name, times = deployment.id, 1
        while name in taken and not own:
            times += 1
            name = f"{deployment.id}-{times}"
        taken.add(name)
        told.append(deployment if name == deployment.id else replace(deployment, id=name))
    return tuple(told)


def _chosen(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ids that the entries have; empty for those that have none."""
    ids = [str((entry.get("model_info") or {}).get("id") or "") for entry in entries]
    for place, name in enumerate(ids):
        if name and name in ids[:place]:
            where = f"model_list[{place}].model_info.id"
            raise ConfigError(f"{where}: another deployment has this id", param=where)
    return ids


# --- which deployments a name means


class Groups:
    """The deployments by the names that callers use, made once and asked for every call.

    ``aliases``: other names of groups, as ``model_group_alias`` has them: to a name, or to a mapping with a
    ``model``.
    """

    def __init__(
        self,
        deployments: Iterable[Deployment],
        aliases: Mapping[str, object] | None = None,
        providers: Registry | None = None,
    ) -> None:
        self._providers = registry() if providers is None else providers
        self._aliases = {name: _alias(name, value) for name, value in (aliases or {}).items()}
        self._named: dict[str, list[Deployment]] = {}
        patterns: dict[str, list[Deployment]] = {}
        for deployment in deployments:
            groups = patterns if ANY in deployment.group else self._named
            groups.setdefault(deployment.group, []).append(deployment)
        # The one with the most letters of its own says most; of two, the one with fewer blanks.
        order = sorted(patterns, key=lambda group: (group.count(ANY) - len(group), group.count(ANY)))
        self._patterns = [(_pattern(group), patterns[group]) for group in order]

    @property
    def aliases(self) -> frozenset[str]:
        return frozenset(self._aliases)

    def __contains__(self, model: object) -> bool:
        return isinstance(model, str) and bool(self.find(model))

    def name(self, model: str) -> str:
        """What ``model`` is an alias of, else itself."""
        return self._aliases.get(model, model)

    def find(self, model: str) -> list[Deployment]:
        """Those that serve ``model``: of the group of that name, else of the most specific pattern that all
        of the name fits. What stood for ``*`` stands in the deployment's model. Empty where there is none."""
        model = self._aliases.get(model, model)
        named = self._named.get(model)
        if named is not None:
            return list(named)
        for pattern, deployments in self._patterns:
            match = pattern.fullmatch(model)
            if match is not None:
                return [one for deployment in deployments for one in self._filled(deployment, match)]
        return []

    def _filled(self, deployment: Deployment, match: re.Match[str]) -> list[Deployment]:
        parts = iter(match.groups())
        model = re.sub(r"\*", lambda _: next(parts, ""), deployment.model)
        provider = deployment.provider
        if provider == ANY:
            row = self._whose(model)
            if row is None:
                return []
            provider, model = row
        return [replace(deployment, provider=provider, model=model)] if model else []

    def _whose(self, model: str) -> tuple[str, str] | None:
        try:
            row: tuple[Provider, str] = self._providers.resolve(model)
        except ConfigError:
            return None
        return row[0].name, row[1]


def find(
    deployments: Iterable[Deployment], model: str, aliases: Mapping[str, object] | None = None
) -> list[Deployment]:
    """`Groups.find`, for once."""
    return Groups(deployments, aliases).find(model)


def _alias(name: str, value: object) -> str:
    found = value.get("model") if isinstance(value, Mapping) else value
    return text(found, f"model_group_alias.{name}")


def _pattern(group: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(map(re.escape, group.split(ANY))), re.DOTALL)


def _fits(group: str, model: str, where: str) -> None:
    if model.count(ANY) > group.count(ANY):
        raise ConfigError(f"{where}: has more * than the model_name has", param=where)
