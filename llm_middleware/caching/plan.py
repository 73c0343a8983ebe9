"""One request's `Plan`: its cache key and what may be done with it. Pure: no store, no clock, no I/O."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from . import cache_key
from .answer import CacheInfo
from .batch import inputs_of, single
from .cache_key import UnkeyableError
from .controls import Controls, merge, parse_body, parse_header
from .endpoints import ENDPOINTS, Endpoint
from .labels import label
from .settings import CacheSettings
from .splice import without_member

__all__ = ["Asked", "Body", "Plan", "Request", "decompressed", "make_plan", "read_request"]

Body = bytes | Mapping[str, object]


@dataclass(slots=True)
class Asked:
    """A request as it came.

    ``body``: as sent, or the Python value it was made of. ``scope``: whose answer it is. ``route``: which
    endpoint of the host's, where the kind does not say it. ``cache_control``: the header. ``enforced``: the
    API key's own controls, already parsed.
    """

    kind: str
    body: Body
    scope: str = ""
    route: str = ""
    cache_control: str = ""
    content_type: str = ""
    content_encoding: str = ""
    enforced: Mapping[str, object] | None = None

    @property
    def is_plain_json(self) -> bool:
        return not self.content_encoding and self.kind != "transcription"


@dataclass(slots=True)
class Request:
    """What is known of a request once its body is read.

    ``fields``: the JSON object (numbers canonical) or None where the body is no such thing. ``form``: the
    value that is keyed. ``controls``: of the body. ``forward``: the body for the handler where it differs
    from the one sent, else None. ``problem``: why there is no key.
    """

    kind: str
    form: object = None
    controls: Mapping[str, object] | None = None
    forward: bytes | None = None
    stream: bool = False
    usage: bool = False
    model: str | None = None
    sampled: bool = False
    problem: str | None = None


_NO_CONTROLS = Controls()


@dataclass(slots=True)
class Plan:
    """What the cache will do for one request.

    ``bypass``: the reason code why it does nothing, else None. ``key``: the store key
    ``<namespace>:<64 hex>``. ``lookup``/``store``: whether it may answer from the store and keep the answer.
    ``simple``: any entry that is fresh will do. ``stream``, ``usage``: which form the caller wants.
    ``forward``: the body for the handler where it differs from the one sent. ``items``: for a list of
    embedding ``inputs``, the store key of each. ``scope``: whose answer it is. ``asked``: the controls that
    the request itself sets, by their names in `Controls`. ``route``: which endpoint of the host's. ``form``:
    the value that is keyed, where answers are looked for by meaning too.
    """

    kind: str
    key: str = ""
    bypass: str | None = None
    lookup: bool = True
    store: bool = True
    simple: bool = True
    stream: bool = False
    usage: bool = False
    model: str | None = None
    sampled: bool = False
    forward: bytes | None = None
    controls: Controls = _NO_CONTROLS
    items: tuple[str, ...] = ()
    inputs: tuple[object, ...] = ()
    scope: str = ""
    asked: tuple[str, ...] = ()
    route: str = ""
    form: object = None

    @property
    def digest(self) -> str:
        """The cache key without the namespace: what ``x-llm-cache-key`` tells."""
        return self.key[-64:]

    def miss(self, detail: str | None = None) -> CacheInfo:
        """What to tell of a request that goes on."""
        return CacheInfo("miss", self.digest, detail, "miss" if self.lookup else "request")

    @property
    def owner(self) -> str:
        """Who asks for what kind of answer, as 16 hex digits."""
        return label("owner", f"{self.kind}\0{self.scope}").hex()

    @property
    def labels(self) -> bytes:
        """What the answer may be found by beside its key."""
        named = [label("kind", self.kind), label("scope", self.scope)]
        if self.model is not None:
            named.append(label("model", self.model))
        if self.controls.namespace is not None:
            named.append(label("namespace", self.controls.namespace))
        return b"".join([*named, *(label("tag", tag) for tag in self.controls.tags)])


def decompressed(body: bytes, limit: int) -> bytes:
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        data = decoder.decompress(body, limit + 1)
    except zlib.error as exc:
        raise UnkeyableError("not gzip") from exc
    if len(data) > limit or not decoder.eof or decoder.unused_data:
        raise UnkeyableError("gzip body is too large or not whole")
    return data


def _sampled(fields: Mapping[str, object]) -> bool:
    temperature = fields.get("temperature")
    return isinstance(temperature, (int, float)) and temperature > 0


def _wants_usage(fields: Mapping[str, object]) -> bool:
    options = fields.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def read_request(settings: CacheSettings, asked: Asked) -> Request:
    """Read a body as sent, or the Python value it was made of. Only a wrong ``cache`` object raises
    (`InvalidRequestError`); a body that cannot be understood is a problem told in the result."""
    kind, body, content_encoding = asked.kind, asked.body, asked.content_encoding
    try:
        if not isinstance(body, bytes):
            return _read_fields(settings, kind, cache_key.jsonable(_upload(kind, body)), None)
        text = body
        if content_encoding not in ("", "identity"):
            if content_encoding != "gzip":
                return Request(kind, problem="encoded-body")
            text = decompressed(body, settings.max_body_bytes)
        if kind == "transcription" and not asked.content_type.startswith("application/json"):
            from .multipart import form_fields  # on first use: it brings the email parser

            return _read_fields(settings, kind, form_fields(text, asked.content_type), None)
        request = _read_fields(settings, kind, cache_key.parse(text), text)
    except (UnkeyableError, RecursionError):
        return Request(kind, problem="unparsable-body")
    if request.forward is not None and text is not body:
        return _recompressed(request)
    return request


def _upload(kind: str, fields: Mapping[str, object]) -> Mapping[str, object]:
    """A file given as SDKs take it, (name, content, ...), is its content."""
    file = fields.get("file")
    if kind == "transcription" and isinstance(file, tuple) and len(file) > 1:
        return {**fields, "file": file[1]}
    return fields


def _recompressed(request: Request) -> Request:
    from dataclasses import replace

    assert request.forward is not None
    return replace(request, forward=gzip.compress(request.forward, mtime=0))


def _read_fields(settings: CacheSettings, kind: str, value: object, text: bytes | None) -> Request:
    endpoint = ENDPOINTS[kind]
    if not isinstance(value, dict):
        # An opaque handler may take any JSON value; the typed endpoints take objects only.
        return Request(kind, value) if kind == "json" else Request(kind, problem="unparsable-body")
    controls = parse_body(value["cache"]) if "cache" in value else None
    form = cache_key.significant(endpoint, value, settings.ignore_fields)
    named = settings.stands_for.get(str(value.get("model"))) if settings.stands_for else None
    if named is not None:
        form = {**form, "model": named}
    if settings.image_content is not None:
        form = cache_key.image_fields(form, settings.image_content)  # type: ignore[assignment]
    model = value.get("model")
    return Request(
        kind,
        form,
        controls,
        without_member(text, "cache") if text is not None and "cache" in value else None,
        stream=value.get("stream") in (True, "true"),
        usage=_wants_usage(value),
        model=model if isinstance(model, str) else None,
        sampled=_sampled(value),
        problem=_stateful(endpoint, value),
    )


def _stateful(endpoint: Endpoint, fields: Mapping[str, object]) -> str | None:
    # A Responses conversation grows with every call: the same request is never the same question twice.
    if endpoint.kind == "responses" and fields.get("conversation") is not None:
        return "stateful"
    return None


def _bypass(settings: CacheSettings, kind: str, controls: Controls) -> str | None:
    if not settings.enabled:
        return "disabled"
    if settings.kinds is not None and kind not in settings.kinds:
        return "call-type-off"
    if settings.mode == "default_off" and not controls.use_cache:
        return "default-off"
    return None


def make_plan(
    settings: CacheSettings,
    request: Request,
    asked: Asked,
    *,
    custom_key: str | None = None,
    keep_form: bool = False,
) -> Plan:
    """Lay the sources of controls over each other and derive the key.

    ``custom_key``: what the host's own key function returned; it takes the place of the canonical form,
    inside the same scope and namespace. ``keep_form``: whether the plan has the form.
    """
    said: tuple[str, ...] = ()
    if asked.enforced or request.controls or asked.cache_control:
        own = request.controls or {}
        header = parse_header(asked.cache_control) if asked.cache_control else {}
        controls = merge(asked.enforced or {}, own, header, settings.controls)
        said = (*own, *header)
    else:
        controls = settings.own_controls
    bypass = _bypass(settings, request.kind, controls) or request.problem
    if bypass is None and controls.no_cache and controls.no_store:
        bypass = "no-store"
    key = ""
    items: list[str] = []
    inputs: tuple[object, ...] = ()
    if bypass is None:
        try:
            form = request.form if custom_key is None else {"$key": custom_key}
            namespaces = (settings.namespace, controls.namespace or "", asked.route)
            if request.kind == "embedding":
                inputs, forms = _separate(request.kind, form)
                key, *items = [_store_key(settings, asked, namespaces, each) for each in forms]
            else:
                key = _store_key(settings, asked, namespaces, form)
        except UnkeyableError:
            bypass = "unparsable-body"
    return Plan(
        request.kind,
        key,
        bypass,
        lookup=not controls.no_cache and controls.max_age != 0,
        store=not controls.no_store and controls.ttl != 0,
        simple=not (controls.max_age is not None or controls.min_fresh),
        stream=request.stream,
        usage=request.usage,
        model=request.model,
        sampled=request.sampled,
        forward=request.forward,
        controls=controls,
        items=tuple(items),
        inputs=inputs,
        scope=asked.scope,
        asked=said,
        route=asked.route,
        form=request.form if keep_form and bypass is None and custom_key is None else None,
    )


def _separate(kind: str, form: object) -> tuple[tuple[object, ...], list[object]]:
    """The inputs of a list of embeddings, and the forms to key: the request's, and then each input's own. A
    list of one input is that input."""
    inputs = inputs_of(form) if kind == "embedding" and isinstance(form, dict) else None
    if inputs is None:
        return (), [form]
    assert isinstance(form, dict)
    singles: list[object] = [single(form, item) for item in inputs]
    return ((), singles) if len(inputs) == 1 else (tuple(inputs), [form, *singles])


def _store_key(settings: CacheSettings, asked: Asked, namespaces: tuple[str, ...], form: object) -> str:
    text = cache_key.canonical(form)
    digest = cache_key.digest(asked.kind, asked.scope, namespaces, text, settings.secret)
    return f"{settings.namespace}:{digest}"
