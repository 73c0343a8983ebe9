"""Azure's addresses. What is sent and what comes back is OpenAI's; only the URL and the credentials differ.

* Classic: ``<resource>/openai/deployments/<deployment>/<path>?api-version=<version>``.
* v1: ``<resource>/openai/v1/<path>``, by an ``api_version`` of ``v1``, ``preview`` or ``latest``, or a base
  that ends in ``/openai/v1`` (https://learn.microsoft.com/azure/ai-foundry/openai/api-version-lifecycle).
* Foundry models (``azure_ai``): ``<resource>.services.ai.azure.com/models/<path>?api-version=<version>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from ..errors import BadRequestError, ConfigError
from .messages import Outgoing
from .openai import parameters, path, request, url
from .target import Target

__all__ = ["build"]

_V1: Final = ("v1", "preview", "latest")
_V1_PATH: Final = "/openai/v1"
_FOUNDRY_VERSION: Final = "2024-05-01-preview"


def build(target: Target, kind: str, body: Mapping[str, object], stream: bool) -> Outgoing:
    """The request of ``kind``, as `openai.build` makes it, at its address on Azure.

    `ConfigError` where the classic address has no ``api_version``.
    """
    fields = parameters(target, kind, body, stream)
    return request(target, kind, _address(target, kind), fields)


def _address(target: Target, kind: str) -> str:
    base, version = _versioned(target)
    here = path(kind)
    if target.adapter == "azure_ai":
        return _foundry(base, here, version)
    if urlsplit(base).path.endswith(_V1_PATH):
        return url(base, here, _query(version if version in ("preview", "latest") else None))
    if version in _V1:
        return url(_resource(base) + _V1_PATH, here, _query(None if version == "v1" else version))
    if version is None:
        message = "azure needs an api_version, or an api_base that ends in /openai/v1"
        raise ConfigError(message, param="api_version")
    if kind == "responses":  # it names its deployment in the body
        return url(f"{_resource(base)}/openai", here, _query(version))
    return url(_deployment(target, base), here, _query(version))


def _versioned(target: Target) -> tuple[str, str | None]:
    """The base without a query, and the version: the one in the base's query where no other is given."""
    parts = urlsplit(target.base_url)
    given = target.api_version or dict(parse_qsl(parts.query)).get("api-version")
    return urlunsplit(parts._replace(query="")), given


def _deployment(target: Target, base: str) -> str:
    """The deployment's own base; one that names a deployment already is it."""
    if "/openai/deployments/" in base:
        return base
    name = quote(target.model, safe="")
    if name in ("", ".", ".."):
        raise BadRequestError("the model is no name of a deployment", param="model")
    return f"{_resource(base)}/openai/deployments/{name}"


def _resource(base: str) -> str:
    """What is before ``/openai``."""
    return base.partition("/openai/deployments/")[0].removesuffix("/openai")


def _query(version: str | None) -> str:
    return urlencode({"api-version": version}) if version else ""


def _foundry(base: str, path: str, version: str | None) -> str:
    parts = urlsplit(base)
    if not (parts.hostname or "").endswith(".services.ai.azure.com") or parts.path.endswith(_V1_PATH):
        return url(base, path, _query(version if version != "v1" else None))
    if version in _V1:
        return url(base.removesuffix("/models") + _V1_PATH, path)
    models = base if parts.path.endswith("/models") or "/models/" in parts.path else f"{base}/models"
    return url(models, path, _query(version or _FOUNDRY_VERSION))
