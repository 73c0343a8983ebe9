"""`check_deployments`: whether every deployment of a list could be asked, before anybody asks one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..errors import BadRequestError, ConfigError
from ..providers.adapters import adapter_of
from ..providers.registry import Registry
from ..providers.target import target_of
from .deployment import Deployment

__all__ = ["check_deployments"]

_ANY = "*"
_HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def check_deployments(
    deployments: Iterable[Deployment], providers: Registry, environ: Mapping[str, str] = os.environ
) -> None:
    """`ConfigError`, with the place in the list, for one that can never answer: with no address, an unknown
    provider, or a header that cannot be sent. ``deployments``: all of a ``model_list``, in its order.

    Nothing is sent. A key that is missing is no error, nor is a region of AWS: they may come from elsewhere.
    """
    for place, deployment in enumerate(deployments):
        try:
            _check(_filled(deployment), providers, environ)
        except (ConfigError, BadRequestError) as exc:
            at = f"model_list[{place}]"
            param = at if exc.param is None else f"{at}.{exc.param}"
            raise ConfigError(f"{at}: {exc.message}", param=param) from None


def _filled(deployment: Deployment) -> Deployment:
    """With the name of a model where it stands for many."""
    if deployment.provider == _ANY:
        return replace(deployment, provider="openai", model="x")
    return replace(deployment, model=deployment.model.replace(_ANY, "x"))


def _check(deployment: Deployment, providers: Registry, environ: Mapping[str, str]) -> None:
    target = target_of(deployment, providers=providers, environ=environ)
    adapter = adapter_of(target)
    keyless = "authorization" not in target.headers and target.token is None
    if adapter.signs and keyless and importlib.util.find_spec("boto3") is None:
        raise ConfigError("bedrock needs boto3: pip install 'llm-middleware[bedrock]'", param="provider")
    if target.base_url:  # else AWS's configuration may have the region
        adapter.build(target, "chat", _HELLO, False)
