"""A server of Qdrant's REST API for the tests, over Qdrant's own engine: a part of the API, one shard each.

Real: the storage engine (``qdrant-edge-py``: filters, conditional writes, distances, HNSW, quantization), and
the checks of what is sent, by the models that are made from Qdrant's OpenAPI document (``qdrant-client``): an
unknown field or a wrong type is refused, as is JSON that is no UTF-8 text.

Ours: the routes, the API key, error texts and statuses after those of the server, updates one after another,
and the description of a collection, which says what it was made with. What is written without ``wait=true``
is there a little later. The server indexes and quantizes in the background; here a ``POST`` to
``/collections/<name>/optimize``, which Qdrant does not have, does that. The engine has no collection without
vectors, so that one gets a sparse vector that no point has.

``python -m tests.servers.qdrant_edge`` prints its port once it listens. All is gone when it ends.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import qdrant_edge as edge
import uvicorn
from pydantic import TypeAdapter, ValidationError
from qdrant_client.http import models
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

__all__ = ["main"]

LATER_S = 0.05
DISTANCES = {name: getattr(edge.Distance, name) for name in ("Cosine", "Dot", "Euclid", "Manhattan")}
SCHEMAS = {name.lower(): getattr(edge.PayloadSchemaType, name) for name in ("Keyword", "Float", "Integer")}


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Collection:
    """One shard of the engine, and what it was made with."""

    def __init__(self, path: Path, made: models.CreateCollection, indexing_threshold: int) -> None:
        self.path = path
        self.made = made
        self.indexes: dict[str, dict[str, Any]] = {}
        self.updating = threading.Lock()
        self.operation = 0
        config: dict[str, Any] = {
            "quantization_config": quantization(made.quantization_config),
            "optimizers": edge.EdgeOptimizersConfig(
                indexing_threshold=indexing_threshold, default_segment_number=1
            ),
        }
        if made.hnsw_config is not None:
            hnsw: dict[str, Any] = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000}
            hnsw |= made.hnsw_config.model_dump(exclude_none=True)
            config["hnsw_config"] = edge.HnswIndexConfig(**hnsw)
        if isinstance(made.vectors, models.VectorParams):
            config["vectors"] = edge.EdgeVectorParams(
                size=made.vectors.size,
                distance=DISTANCES[made.vectors.distance.value],
                on_disk=made.vectors.on_disk,
            )
        elif not made.vectors:
            config["sparse_vectors"] = {"none": edge.EdgeSparseVectorParams()}
        else:
            raise RefusedError(400, "Wrong input: this server has no named vectors")
        self.shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(**config))

    def update(self, operation: Any) -> dict[str, Any]:
        with self.updating:
            self.operation += 1
            self.shard.update(operation)
            return {"operation_id": self.operation, "status": "completed"}

    def describe(self) -> dict[str, Any]:
        info = self.shard.info()
        made = self.made.model_dump(mode="json", exclude_none=True)
        params = {"vectors": made.get("vectors", {}), "shard_number": 1, "replication_factor": 1}
        hnsw = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000, "max_indexing_threads": 0}
        optimizers = {
            "deleted_threshold": 0.2,
            "vacuum_min_vector_number": 1000,
            "default_segment_number": 0,
            "flush_interval_sec": 5,
        }
        return {
            "status": "green",
            "optimizer_status": "ok",
            "indexed_vectors_count": info.indexed_vectors_count,
            "points_count": info.points_count,
            "segments_count": info.segments_count,
            "config": {
                "params": params,
                "hnsw_config": {**hnsw, **made.get("hnsw_config", {})},
                "optimizer_config": optimizers,
                "wal_config": {"wal_capacity_mb": 32, "wal_segments_ahead": 0},
                "quantization_config": made.get("quantization_config"),
            },
            "payload_schema": {
                name: {"data_type": schema["type"], "params": schema, "points": info.points_count}
                for name, schema in self.indexes.items()
            },
        }


def quantization(config: Any) -> Any:
    """The engine's own form of a quantization."""
    if config is None:
        return None
    if isinstance(config, models.BinaryQuantization):
        return edge.BinaryQuantizationConfig(always_ram=config.binary.always_ram)
    if isinstance(config, models.ProductQuantization):
        ratio = getattr(edge.CompressionRatio, config.product.compression.value.upper())
        return edge.ProductQuantizationConfig(ratio, always_ram=config.product.always_ram)
    if isinstance(config, models.ScalarQuantization):
        scalar = config.scalar
        return edge.ScalarQuantizationConfig(
            edge.ScalarType.Int8, quantile=scalar.quantile, always_ram=scalar.always_ram
        )
    raise RefusedError(400, "Wrong input: this server does not know the quantization")


def point_id(given: int | str | UUID) -> Any:
    if isinstance(given, int | UUID):
        return given
    try:
        return UUID(given)
    except ValueError:
        known = "valid values are either an unsigned integer or a UUID"
        message = f"Format error in JSON body: value {given} is not a valid point ID, {known}"
        raise RefusedError(400, message) from None


def point_filter(given: models.Filter | None) -> Any:
    if given is None:
        return None
    parts: dict[str, Any] = {}
    for name in ("must", "should", "must_not"):
        conditions = getattr(given, name)
        if conditions is not None:
            listed = conditions if isinstance(conditions, list) else [conditions]
            parts[name] = [condition(one) for one in listed]
    return edge.Filter(**parts)


def condition(given: Any) -> Any:
    if isinstance(given, models.Filter):
        return point_filter(given)
    if isinstance(given, models.HasIdCondition):
        return edge.HasIdCondition({point_id(one) for one in given.has_id})
    if isinstance(given, models.FieldCondition):
        if isinstance(given.match, models.MatchValue):
            return edge.FieldCondition(key=given.key, match=edge.MatchValue(given.match.value))
        if isinstance(given.range, models.Range):
            limits = given.range.model_dump(exclude_none=True)
            return edge.FieldCondition(key=given.key, range=edge.RangeFloat(**limits))
    raise RefusedError(400, f"Wrong input: this server does not know the condition {given!r}")


def record(found: Any) -> dict[str, Any]:
    identity = found.id if isinstance(found.id, int) else str(found.id)
    shown = {"id": identity, "payload": found.payload}
    if found.vector is not None:
        shown["vector"] = found.vector
    return shown


class Server:
    """The handlers; each gets the request and its body."""

    def __init__(self, root: Path, api_key: str | None, indexing_threshold: int) -> None:
        self.root, self.api_key, self.indexing_threshold = root, api_key, indexing_threshold
        self.collections: dict[str, Collection] = {}
        self.making = threading.Lock()
        self.made = 0
        self.served: dict[str, int] = {}

    def app(self) -> Starlette:
        one = "/collections/{name}"
        table: list[tuple[str, str, Callable[[Request, bytes], Any]]] = [
            ("GET", "/collections", self.names),
            ("GET", one, self.describe),
            ("PUT", one, self.create),
            ("DELETE", one, self.drop),
            ("GET", f"{one}/exists", self.exists),
            ("PUT", f"{one}/index", self.index),
            ("PUT", f"{one}/points", self.upsert),
            ("POST", f"{one}/points", self.retrieve),
            ("POST", f"{one}/points/query", self.query),
            ("POST", f"{one}/points/count", self.count),
            ("POST", f"{one}/points/scroll", self.scroll),
            ("POST", f"{one}/points/delete", self.delete),
            ("POST", f"{one}/points/payload", self.set_payload),
            ("POST", f"{one}/optimize", self.optimize),
            ("GET", "/served", lambda request, body: self.served),
        ]
        routes = [Route(path, self.endpoint(handler), methods=[method]) for method, path, handler in table]
        return Starlette(routes=[Route("/", self.version), *routes])

    def endpoint(self, handler: Callable[[Request, bytes], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            if (refusal := self.stranger(request)) is not None:
                return PlainTextResponse(refusal, 401)
            body = await request.body()
            name = getattr(handler, "__name__", "")
            self.served[name] = self.served.get(name, 0) + 1
            try:
                result = await run_in_threadpool(handler, request, body)
            except Exception as exc:
                refused = refusal_of(exc)
                taken = time.perf_counter() - began
                return JSONResponse(
                    {"status": {"error": refused.message}, "time": taken}, status_code=refused.status
                )
            return JSONResponse({"result": result, "status": "ok", "time": time.perf_counter() - began})

        return answer

    def stranger(self, request: Request) -> str | None:
        if self.api_key is None:
            return None
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("api-key") or bearer
        if not given:
            return "Must provide an API key or an Authorization bearer token"
        return None if given == self.api_key else "Invalid API key or JWT"

    async def version(self, request: Request) -> Response:
        return JSONResponse({"title": "qdrant - vector search engine", "version": "1.20.0", "commit": ""})

    def names(self, request: Request, body: bytes) -> Any:
        return {"collections": [{"name": name} for name in self.collections]}

    def existing(self, request: Request) -> Collection:
        name = request.path_params["name"]
        found = self.collections.get(name)
        if found is None:
            raise RefusedError(404, f"Not found: Collection `{name}` doesn't exist!")
        return found

    def describe(self, request: Request, body: bytes) -> Any:
        return self.existing(request).describe()

    def exists(self, request: Request, body: bytes) -> Any:
        return {"exists": request.path_params["name"] in self.collections}

    def create(self, request: Request, body: bytes) -> Any:
        made, name = models.CreateCollection.model_validate_json(body), request.path_params["name"]
        with self.making:
            if name in self.collections:
                raise RefusedError(409, f"Wrong input: Collection `{name}` already exists!")
            self.made += 1
            path = self.root / str(self.made)
            self.collections[name] = Collection(path, made, self.indexing_threshold)
        return True

    def drop(self, request: Request, body: bytes) -> Any:
        with self.making:
            found = self.collections.pop(request.path_params["name"], None)
        if found is not None:
            with found.updating:
                found.shard.close()
            shutil.rmtree(found.path)
        return found is not None

    def index(self, request: Request, body: bytes) -> Any:
        asked, found = models.CreateFieldIndex.model_validate_json(body), self.existing(request)
        schema: Any = asked.field_schema
        listed = schema.model_dump(mode="json", exclude_none=True) if hasattr(schema, "type") else {}
        kind = listed.get("type") or getattr(schema, "value", None)
        if kind not in SCHEMAS:
            raise RefusedError(400, f"Wrong input: this server has no index of {schema!r}")
        known: Any = SCHEMAS[kind]
        if listed.get("is_tenant") is not None:
            known = edge.KeywordIndexParams(is_tenant=listed["is_tenant"])
        done = found.update(edge.UpdateOperation.create_field_index(asked.field_name, known))
        found.indexes[asked.field_name] = {"type": kind, **listed}
        return done

    def written(self, request: Request, operation: Any) -> Any:
        """Do it now, or, for those who do not wait, a little later."""
        found = self.existing(request)
        if request.query_params.get("wait") == "true":
            return found.update(operation)
        threading.Timer(LATER_S, found.update, [operation]).start()
        return {"operation_id": found.operation, "status": "acknowledged"}

    def upsert(self, request: Request, body: bytes) -> Any:
        asked = models.PointsList.model_validate_json(body)
        given: list[Any] = asked.points
        points = [edge.Point(point_id(p.id), p.vector, p.payload or {}) for p in given]
        modes = {
            None: None,
            models.UpdateMode.UPSERT: edge.UpdateMode.Upsert,
            models.UpdateMode.INSERT_ONLY: edge.UpdateMode.InsertOnly,
            models.UpdateMode.UPDATE_ONLY: edge.UpdateMode.UpdateOnly,
        }
        operation = edge.UpdateOperation.upsert_points(
            points, point_filter(asked.update_filter), modes[asked.update_mode]
        )
        return self.written(request, operation)

    def retrieve(self, request: Request, body: bytes) -> Any:
        asked, found = models.PointRequest.model_validate_json(body), self.existing(request)
        ids = [point_id(one) for one in asked.ids]
        whole = asked.with_payload is None or bool(asked.with_payload)
        return [record(one) for one in found.shard.retrieve(ids, whole, bool(asked.with_vector))]

    def query(self, request: Request, body: bytes) -> Any:
        asked, found = models.QueryRequest.model_validate_json(body), self.existing(request)
        nearest: Any = asked.query.nearest if isinstance(asked.query, models.NearestQuery) else asked.query
        params = None
        if asked.params is not None:
            given = asked.params.model_dump(exclude_none=True)
            if "quantization" in given:
                given["quantization"] = edge.QuantizationSearchParams(**given["quantization"])
            params = edge.SearchParams(**given)
        points = found.shard.query(
            edge.QueryRequest(
                limit=asked.limit or 10,
                offset=asked.offset,
                query=edge.Query.Nearest(nearest),
                filter=point_filter(asked.filter),
                score_threshold=asked.score_threshold,
                with_payload=bool(asked.with_payload),
                with_vector=bool(asked.with_vector),
                params=params,
            )
        )
        return {"points": [{**record(one), "version": one.version, "score": one.score} for one in points]}

    def count(self, request: Request, body: bytes) -> Any:
        asked, found = models.CountRequest.model_validate_json(body), self.existing(request)
        exact = asked.exact is not False
        return {"count": found.shard.count(edge.CountRequest(exact, point_filter(asked.filter)))}

    def scroll(self, request: Request, body: bytes) -> Any:
        asked, found = models.ScrollRequest.model_validate_json(body), self.existing(request)
        points, following = found.shard.scroll(
            edge.ScrollRequest(
                offset=None if asked.offset is None else point_id(asked.offset),
                limit=asked.limit or 10,
                filter=point_filter(asked.filter),
                with_payload=asked.with_payload is None or bool(asked.with_payload),
                with_vector=bool(asked.with_vector),
            )
        )
        following = following if following is None or isinstance(following, int) else str(following)
        return {"points": [record(one) for one in points], "next_page_offset": following}

    def delete(self, request: Request, body: bytes) -> Any:
        asked: Any = _DELETE.validate_json(body)
        if isinstance(asked, models.PointIdsList):
            ids = [point_id(one) for one in asked.points]
            return self.written(request, edge.UpdateOperation.delete_points(ids))
        chosen = point_filter(asked.filter)
        return self.written(request, edge.UpdateOperation.delete_points_by_filter(chosen))

    def set_payload(self, request: Request, body: bytes) -> Any:
        asked = models.SetPayload.model_validate_json(body)
        if asked.points is not None:
            ids = [point_id(one) for one in asked.points]
            return self.written(request, edge.UpdateOperation.set_payload(ids, asked.payload))
        chosen = point_filter(asked.filter)
        return self.written(request, edge.UpdateOperation.set_payload_by_filter(chosen, asked.payload))

    def optimize(self, request: Request, body: bytes) -> Any:
        found = self.existing(request)
        with found.updating:
            return found.shard.optimize()


_DELETE: TypeAdapter[Any] = TypeAdapter(models.PointIdsList | models.FilterSelector)


def refusal_of(exc: Exception) -> RefusedError:
    """In the words of the server, as far as they matter."""
    if isinstance(exc, RefusedError):
        return exc
    if isinstance(exc, ValidationError):
        first = exc.errors(include_url=False, include_input=False)[0]
        return RefusedError(400, f"Format error in JSON body: {first['loc']}: {first['msg']}")
    if str(exc).startswith("No point with id"):
        return RefusedError(404, f"Not found: {exc} found")
    return RefusedError(400, f"Wrong input: {exc}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api-key")
    parser.add_argument("--indexing-threshold", type=int, default=10_000, help="KB of vectors in a segment")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="qdrant-edge-"))
    try:
        app = Server(root, options.api_key, options.indexing_threshold).app()
        config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            print(listener.getsockname()[1], flush=True)
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
