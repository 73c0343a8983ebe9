"""The index in process: a search among 10 000 and 100 000 questions of one scope, and what insertion takes.

CPU time, one BLAS thread, 384 dimensions, eight neighbours. A query is a stored vector moved to a cosine of
0.91, as a paraphrase is. Two kinds of vectors: *clustered*, as texts are, and *random directions*, the
hardest there is, since no vector says anything about another. The floor of a search is numpy's product of the
whole matrix with the query, which is what an exact search takes at least. More, not part of the table::

    python -m benchmarks.vector_index --million     # a million rows: inserted, saved, loaded, searched
    python -m benchmarks.vector_index --libraries   # beside usearch, hnswlib and faiss, where installed
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: what follows is about one core

import argparse
import importlib.util
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.records import Row as Stored

from .harness import Row, compare, in_process, quick, set_quick, table

__all__ = ["results"]

Vectors = NDArray[np.float32]

_DIMENSIONS, _NEIGHBOURS = 384, 8
_SCOPE = "0" * 64
_GOALS = {10_000: 300.0, 100_000: 1000.0}  # microseconds, the decision's share included
_ROOM = 2**34
_TEXT = "What do I have to do if my card did not arrive?"


def results() -> list[Row]:
    rows: list[Row] = []
    for count in (1000, 10_000) if quick() else (1000, 10_000, 100_000):
        for name, make in _KINDS.items():
            rows += _measure(f"{count:,} rows, {name}", make(count, 1), _GOALS.get(count))
    return rows


def _measure(where: str, vectors: Vectors, goal: float | None) -> list[Row]:
    index = NumpyIndex(max_bytes=_ROOM)
    steps = [_cpu(lambda row=row: index.add(row)) * 1e3 for row in _stored(vectors)]  # type: ignore[misc]
    queries = paraphrases(vectors, 1000)
    right = (vectors @ queries.T).max(axis=0)
    found = [index.search(_SCOPE, query.tobytes(), _NEIGHBOURS)[0].similarity for query in queries]
    missed = 100 * float(np.mean(np.array(found) < right - 1e-5))
    turns = itertools.cycle([query.tobytes() for query in queries])

    def search(asked: Sequence[bytes]) -> None:
        for query in asked:
            index.search(_SCOPE, query, _NEIGHBOURS)

    def floor(asked: Sequence[bytes]) -> None:
        for query in asked:
            vectors @ np.frombuffer(query, np.float32)

    def prepare(batch: int) -> Sequence[bytes]:
        return [next(turns) for _ in range(batch)]

    runs = {"search": in_process(prepare, search, batch=50), "floor": in_process(prepare, floor, batch=10)}
    samples = compare(runs)
    taken = [seconds * 1e6 for seconds in samples.by_name["search"]]
    exact = f"the whole matrix: {samples.median('floor') * 1e6:,.0f} µs"
    return [
        Row(f"search, {where}", exact, goal, statistics.median(taken), min(taken), max(taken), unit="µs"),
        Row(f"best neighbour missed, {where}", "", 1.0, missed, missed, missed, unit="%"),
        _insertions(where, steps),
    ]


def _insertions(where: str, steps: list[float]) -> Row:
    """The longest of 99.9 % of all insertions: what else the machine does is in the rest."""
    longest = sorted(steps)[math.ceil(len(steps) * 0.999) - 1]
    return Row(f"insertion, {where}", "", 5.0, longest, statistics.median(steps), max(steps), unit="ms")


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _stored(vectors: Vectors) -> list[Stored]:
    return [
        Stored(f"llm:{number:064x}", _SCOPE, _TEXT, vector.tobytes(), math.inf, {})
        for number, vector in enumerate(vectors)
    ]


# Vectors --------------------------------------------------------------------------------------------


def random_directions(count: int, seed: int) -> Vectors:
    drawn = np.random.default_rng(seed).standard_normal((count, _DIMENSIONS), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def clustered(count: int, seed: int) -> Vectors:
    """Clouds of fifty in 32 of the dimensions, with a little noise in all of them."""
    draw = np.random.default_rng(0)
    turn = draw.standard_normal((32, _DIMENSIONS), dtype=np.float32)
    centres = draw.standard_normal((max(10, count // 50), 32), dtype=np.float32)
    draw = np.random.default_rng(seed)
    vectors = np.empty((count, _DIMENSIONS), np.float32)
    for start in range(0, count, 50_000):
        some = vectors[start : start + 50_000]
        inner = centres[draw.integers(len(centres), size=len(some))]
        inner = inner + np.float32(0.5) * draw.standard_normal((len(some), 32), dtype=np.float32)
        some[:] = inner @ turn + np.float32(0.3) * draw.standard_normal(some.shape, dtype=np.float32)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    return vectors


def paraphrases(vectors: Vectors, count: int, cosine: float = 0.91) -> Vectors:
    draw = np.random.default_rng(7)
    chosen = vectors[draw.choice(len(vectors), count)]
    noise = random_directions(count, 8)
    noise -= (noise * chosen).sum(axis=1, keepdims=True) * chosen
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    moved: Vectors = (cosine * chosen + math.sqrt(1 - cosine**2) * noise).astype(np.float32)
    return moved


_KINDS: dict[str, Callable[[int, int], Vectors]] = {
    "clustered": clustered,
    "random directions": random_directions,
}


# A million ------------------------------------------------------------------------------------------


def _million(count: int) -> None:
    vectors = clustered(count, 1)
    queries = paraphrases(vectors, 500)
    right = np.concatenate([(vectors @ queries[at : at + 50].T).max(axis=0) for at in range(0, 500, 50)])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vectors"
        index = NumpyIndex(max_bytes=_ROOM, path=path, save_every=1e9)
        index.load()
        began, steps = time.process_time(), []
        for at in range(0, count, 10_000):
            for row in _numbered(vectors[at : at + 10_000], at):
                before = time.process_time()
                index.add(row)
                steps.append(time.process_time() - before)
        spent = time.process_time() - began
        print(f"insert {count:,}: {spent:.0f} s CPU; {index.memory / 1e6:,.0f} MB by count")
        steps.sort()
        late = steps[count * 999 // 1000] * 1e3
        print(f"one insertion: median {steps[count // 2] * 1e6:.0f} µs, 99.9 % {late:.1f} ms", flush=True)
        _search_all("inserted", index, queries, right)
        began = time.perf_counter()
        index.save()
        print(f"save: {time.perf_counter() - began:.1f} s, {path.stat().st_size / 1e6:,.0f} MB")
        np.savez(Path(directory) / "queries.npz", queries=queries, right=right)
        del index, vectors
        subprocess.run([sys.executable, "-m", __spec__.name, "--load", directory], check=True)


def _numbered(vectors: Vectors, first: int) -> list[Stored]:
    return [
        Stored(
            f"llm:{first + number:064x}", _SCOPE, f"{_TEXT} {first + number}", vector.tobytes(), math.inf, {}
        )
        for number, vector in enumerate(vectors)
    ]


def _load(directory: Path) -> None:
    began = time.perf_counter()
    index = NumpyIndex(max_bytes=_ROOM, path=directory / "vectors", save_every=1e9)
    index.load()
    print(f"load in a new process: {time.perf_counter() - began:.1f} s, {index.count():,} rows")
    print(f"resident: {_status('RssAnon') / 1e3:,.0f} MB and {_status('RssFile') / 1e3:,.0f} MB of the file")
    with np.load(directory / "queries.npz") as kept:
        _search_all("loaded", index, kept["queries"], kept["right"])


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _search_all(what: str, index: NumpyIndex, queries: Vectors, right: Vectors) -> None:
    taken, best = [], []
    for query in queries:
        before = time.process_time()
        best.append(index.search(_SCOPE, query.tobytes(), _NEIGHBOURS)[0].similarity)
        taken.append(time.process_time() - before)
    taken.sort()
    recall = float(np.mean(np.array(best) >= right - 1e-5))
    middle, late = taken[len(taken) // 2] * 1e6, taken[len(taken) * 99 // 100] * 1e6
    print(
        f"search, {what}: median {middle:.0f} µs, 99 % {late:.0f} µs CPU; recall@1 {recall:.3f}", flush=True
    )


# Other libraries ------------------------------------------------------------------------------------


def _libraries(count: int) -> None:
    """HNSW with M=16, efConstruction=100, ef=64; the 32 nearest are ranked again exactly."""
    print(f"| {count:,} rows | index | build s | search µs | recall@1 |\n|---|---|---|---|---|")
    for kind, make in _KINDS.items():
        vectors = make(count, 1)
        queries = paraphrases(vectors, 500)
        right = (vectors @ queries.T).max(axis=0)
        for name, build in _BUILDERS.items():
            if name != "this" and importlib.util.find_spec(name.split()[0]) is None:
                continue
            began = time.process_time()
            search = build(vectors)
            built = time.process_time() - began
            taken, best = [], []
            for query in queries:
                began = time.process_time()
                best.append(search(query))
                taken.append(time.process_time() - began)
            recall = float(np.mean(np.array(best) >= right - 1e-5))
            cells = (kind, name, f"{built:.1f}", f"{statistics.median(taken) * 1e6:.0f}", f"{recall:.3f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def _this(vectors: Vectors) -> Callable[[Vectors], float]:
    index = NumpyIndex(max_bytes=_ROOM)
    for row in _stored(vectors):
        index.add(row)
    return lambda query: index.search(_SCOPE, query.tobytes(), _NEIGHBOURS)[0].similarity


def _usearch(kind: str) -> Callable[[Vectors], Callable[[Vectors], float]]:
    def build(vectors: Vectors) -> Callable[[Vectors], float]:
        from usearch.index import Index  # type: ignore[import-not-found,unused-ignore]

        index = Index(
            ndim=_DIMENSIONS, metric="ip", dtype=kind, connectivity=16, expansion_add=100, expansion_search=64
        )
        for number, vector in enumerate(vectors):
            index.add(number, vector)
        return lambda query: float((vectors[index.search(query, 32).keys.astype(int)] @ query).max())

    return build


def _hnswlib(vectors: Vectors) -> Callable[[Vectors], float]:
    import hnswlib  # type: ignore[import-untyped,import-not-found,unused-ignore]

    index = hnswlib.Index("ip", _DIMENSIONS)
    index.init_index(len(vectors), ef_construction=100, M=16)
    index.set_ef(64)
    index.set_num_threads(1)
    for vector in vectors:
        index.add_items(vector)
    return lambda query: float((vectors[index.knn_query(query, 32)[0][0]] @ query).max())


def _faiss(vectors: Vectors) -> Callable[[Vectors], float]:
    import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]

    faiss.omp_set_num_threads(1)
    lists = 4 * math.isqrt(len(vectors))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(_DIMENSIONS), _DIMENSIONS, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    index.nprobe = 16
    return lambda query: float(index.search(query[None], _NEIGHBOURS)[0][0, 0])


_BUILDERS: dict[str, Callable[[Vectors], Callable[[Vectors], float]]] = {
    "this": _this,
    "usearch f32": _usearch("f32"),
    "usearch i8": _usearch("i8"),
    "hnswlib": _hnswlib,
    "faiss IVF": _faiss,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--million", nargs="?", const=1_000_000, type=int, metavar="ROWS")
    parser.add_argument("--libraries", nargs="?", const=100_000, type=int, metavar="ROWS")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_quick(options.quick)
    if options.load:
        _load(options.load)
    elif options.million:
        _million(options.million)
    elif options.libraries:
        _libraries(options.libraries)
    else:
        print(table(results()))
