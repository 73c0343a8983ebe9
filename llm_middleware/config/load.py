"""`load_config`: a file of settings, LiteLLM's ``config.yaml`` or the shorter form, as a checked `Config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import did_you_mean
from . import known, litellm, short_form
from .checks import check_parts
from .document import read_document
from .parts import KEYS_TTL, Parts, read_keys, read_server
from .problems import ConfigProblems, Problem, Report
from .values import Section, Values

__all__ = ["Config", "ConfigProblems", "Problem", "load_config"]

_EITHER = ("environment_variables", "include", "keys", "server")


def _no_keys() -> dict[str, object]:
    return {"store": None, "ttl": KEYS_TTL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a file of settings says, checked. Variables are replaced, so this holds secrets; its ``repr`` does
    not.

    ``router``: arguments of ``Router(model_list, **router)``. ``cache``: those of ``CacheManager(**cache)``,
    None where no answers are kept. ``keys``: ``store`` (where API keys are kept: None for memory, or a type
    and its settings) and ``ttl`` (seconds). ``share``: whose answers are shared: ``all``, ``team``, ``user``,
    ``key``. ``admin``: whether there are routes to look after cache and keys; ``show_content``: whether they
    show what is kept. ``hooks``: dotted names of functions of the host's own. ``environment``: the variables
    that the file sets; they are not put into ``os.environ`` here. ``ignored``: paths of settings that are
    outside this library; ``notes``: what should be said when the app starts. ``source``: the file.
    """

    model_list: tuple[Mapping[str, object], ...] = field(default=(), repr=False)
    router: Mapping[str, object] = field(default_factory=dict, repr=False)
    cache: Mapping[str, object] | None = field(default=None, repr=False)
    keys: Mapping[str, object] = field(default_factory=_no_keys, repr=False)
    master_key: str | None = field(default=None, repr=False)
    share: str = "team"
    header_profile: str = "standard"
    admin: bool = True
    show_content: bool = False
    max_body_bytes: int | None = None
    hooks: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str | None = None


def load_config(
    source: str | os.PathLike[str] | Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> Config:
    """The settings in ``source``: the path of a YAML file, or a mapping of what would be in one.

    ``environ``: the variables that ``os.environ/NAME`` means, after those of the file's own
    ``environment_variables``. Connects to nothing and changes nothing. `ConfigProblems` tells everything
    that is wrong at once, by path and line, with the nearest valid name and without any secret.
    """
    report = Report()
    data = read_document(source, report)
    values = Values(report, environ)
    top = Section(values, "", data)
    variables = _variables(top, values)
    parts = _parts(top, values)
    read_keys(top.section("keys"), parts)
    read_server(top.section("server"), parts)
    _close(top)
    check_parts(parts, report, values.environ)
    report.check()
    return _config(parts, report, variables)


def _variables(top: Section, values: Values) -> dict[str, str]:
    """The file's own variables; from here on they are part of the environment."""
    section = top.section("environment_variables")
    found: dict[str, str] = {}
    for name, value in section.all().items():
        if not name or "=" in name or "\0" in f"{name}{value}":
            values.report.problem(section.at(name), "no environment can hold this")
        elif isinstance(value, str | int | float):
            found[name] = str(value)
            values.origins[name] = section.at(name)
        elif value is not None:
            values.report.problem(section.at(name), f"expected text, not {type(value).__name__}")
    values.environ = {**values.environ, **found}
    return found


def _parts(top: Section, values: Values) -> Parts:
    """By the form that most of the sections are of."""
    theirs = sum(name in litellm.SECTIONS for name in top.names())
    ours = sum(name in short_form.SECTIONS for name in top.names())
    if ours > theirs or not (ours or theirs or any(name in known.TOP for name in top.names())):
        return short_form.read_short_form(top, values.environ)
    return litellm.read_litellm(top, values.environ)


def _close(top: Section) -> None:
    for name in top.names():
        if name.startswith("x-"):  # by custom, where anchors are
            top.raw(name)
    names = (*litellm.SECTIONS, *short_form.SECTIONS, *_EITHER)

    def hint(name: str) -> str:
        if name in names:
            return "is of the other form of file; sections of LiteLLM's form and of the short one do not mix"
        return f"there is no such section{did_you_mean(name, names)}"

    top.close(names, known.TOP, hint)


def _config(parts: Parts, report: Report, variables: Mapping[str, str]) -> Config:
    return Config(
        model_list=tuple(parts.models) if isinstance(parts.models, list) else (),
        router=parts.router,
        cache=parts.cache,
        keys={"store": parts.store, "ttl": parts.keys_ttl},
        master_key=parts.master_key,
        share=parts.share,
        header_profile=parts.header_profile,
        admin=parts.admin,
        show_content=parts.show_content,
        max_body_bytes=parts.max_body_bytes,
        hooks=tuple(parts.hooks),
        environment=variables,
        ignored=tuple(report.masked(path) for path in sorted(report.ignored, key=report.order)),
        notes=tuple(report.masked(note) for note in report.notes),
        source=report.file,
    )
