"""The index in process: the contract, large scopes, the bound on memory, and the file."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from llm_middleware.errors import ConfigError, CorruptEntryError, InvalidRequestError
from llm_middleware.semantic import cells, scopes, snapshot
from llm_middleware.semantic.cells import Cell, Partition, Record, halves
from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.records import Row, VectorIndex
from llm_middleware.testing import FakeClock
from llm_middleware.types import Clock
from tests.contract.vectors import (
    NEVER,
    AtomicStatesContract,
    key_of,
    keys,
    make_row,
    scope_of,
    unit_vectors,
)


class TestContract(AtomicStatesContract):
    examples = 100

    @contextmanager
    def open_index(self, clock: Clock) -> Iterator[VectorIndex]:
        index = NumpyIndex(clock=clock)
        yield index
        index.close()
        check(index)


class TestContractInSmallCells(TestContract):
    """Cells of four rows: splitting, putting in order and joining happen all the time."""

    threads = 3
    rounds = 240

    @pytest.fixture(autouse=True)
    def _small_cells(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cells, "_LEAST_SHARE", 4)


class TestContractOnDisk(TestContract):
    """The same, where a restart is a new index on the same file."""

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.path = tmp_path / "vectors"

    @contextmanager
    def open_index(self, clock: Clock) -> Iterator[VectorIndex]:
        self.path.unlink(missing_ok=True)
        index = NumpyIndex(clock=clock, path=self.path)
        index.load()
        yield index
        index.close()
        check(index)

    def reopen(self, index: VectorIndex, clock: Clock) -> VectorIndex:
        index.close()
        again = NumpyIndex(clock=clock, path=self.path)
        again.load()
        return again


def check(index: NumpyIndex) -> None:
    """What holds at all times: every row is in one cell, and counted."""
    scopes = index._scopes
    seen: dict[str, Cell] = {}
    for scope, partition in scopes._scopes.items():
        assert partition.cells
        assert partition.rows == sum(len(cell.keys) for cell in partition.cells)
        for place, cell in enumerate(partition.cells):
            assert (cell.place, cell.scope) == (place, scope)
            assert 0 < len(cell.keys) <= len(cell.matrix)
            assert cell.soonest <= min(cell.expires)
            columns = (cell.texts, cell.expires, cell.payloads)
            assert [len(column) for column in columns] == [len(cell.keys)] * 3
            assert cell.weight == sum(cell.record(slot).weight for slot in range(len(cell.keys)))
            seen.update(dict.fromkeys(cell.keys, cell))
    assert seen == dict(scopes._where)
    assert scopes.memory == sum(cell.memory for p in scopes._scopes.values() for cell in p.cells)


def near(vectors: cells.Matrix, cosine: float, seed: int = 5) -> cells.Matrix:
    """Directions at random at this cosine from the given ones."""
    noise = unit_vectors(len(vectors), vectors.shape[1], seed)
    noise -= (noise * vectors).sum(axis=1, keepdims=True) * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    moved: cells.Matrix = (cosine * vectors + (1 - cosine**2) ** 0.5 * noise).astype(np.float32)
    return moved


def fill(index: NumpyIndex, vectors: cells.Matrix, **more: float) -> None:
    for number, vector in enumerate(vectors):
        index.add(make_row(number, vector, **more))  # type: ignore[arg-type]


# Large scopes ---------------------------------------------------------------------------------------


def test_large_scopes_find_what_is_near() -> None:
    """The hardest case there is: directions at random. Of 20 000 rows a search meets an eighth."""
    vectors = unit_vectors(20_000, 64)
    index = NumpyIndex()
    fill(index, vectors)
    check(index)
    queries = near(vectors[:500], 0.9)
    found = [index.search(scope_of(0), query.tobytes(), 8) for query in queries]
    right = sum(keys(neighbours)[0] == key_of(number) for number, neighbours in enumerate(found))
    assert right >= 495
    for query, neighbours in zip(queries, found, strict=True):
        assert len(neighbours) == 8
        cosines = [float(vectors[int(key[2:], 16)] @ query) for key in keys(neighbours)]
        assert [n.similarity for n in neighbours] == pytest.approx(cosines, abs=1e-5)
        assert cosines == sorted(cosines, reverse=True)


def test_large_scopes_are_searched_whole_if_asked() -> None:
    vectors = unit_vectors(5000, 32)
    index = NumpyIndex(exact_rows=5000)
    fill(index, vectors)
    queries = unit_vectors(50, 32, seed=9)
    for query in queries:
        best = np.argsort(-(vectors @ query))[:8]
        assert keys(index.search(scope_of(0), query.tobytes(), 8)) == [key_of(int(n)) for n in best]


def test_cells_stay_small_and_full() -> None:
    index = NumpyIndex()
    vectors = unit_vectors(6000, 32)
    fill(index, vectors)
    (partition,) = index._scopes._scopes.values()
    sizes = [len(cell.keys) for cell in partition.cells]
    assert partition.share == 128
    assert max(sizes) <= 2 * 128
    assert len(sizes) <= 4 * 6000 / 128


def test_equal_vectors_fill_cells_too() -> None:
    vector = unit_vectors(1, 32)[0]
    index = NumpyIndex(exact_rows=100)
    fill(index, np.repeat(vector[None], 1000, axis=0))
    check(index)
    (partition,) = index._scopes._scopes.values()
    assert max(len(cell.keys) for cell in partition.cells) <= 256
    found = index.search(scope_of(0), vector.tobytes(), 50)
    assert len(set(keys(found))) == 50
    assert index.remove([key_of(number) for number in range(1000)]) == 1000
    assert (index.count(), index.memory) == (0, 0)


def test_removing_joins_cells_again() -> None:
    index = NumpyIndex()
    vectors = unit_vectors(6000, 32)
    fill(index, vectors)
    before = index.memory
    index.remove([key_of(number) for number in range(6000) if number % 50])
    check(index)
    (partition,) = index._scopes._scopes.values()
    assert len(partition.cells) <= 8
    assert index.memory < before / 20
    for number in range(0, 6000, 50):
        assert keys(index.search(scope_of(0), vectors[number].tobytes(), 1)) == [key_of(number)]


def test_halves_part_what_lies_apart() -> None:
    centres = unit_vectors(2, 64)
    vectors = np.concatenate(
        [near(np.repeat(centres[:1], 40, 0), 0.9), near(np.repeat(centres[1:], 60, 0), 0.9)]
    )
    side = halves(vectors)
    assert sorted([side[:40].tolist(), side[40:].tolist()]) == [[False] * 40, [True] * 60] or sorted(
        [side[:40].tolist(), side[40:].tolist()]
    ) == sorted([[True] * 40, [False] * 60])


def test_float64_never_gets_in() -> None:
    index = NumpyIndex()
    fill(index, unit_vectors(300, 32))
    (partition,) = index._scopes._scopes.values()
    assert partition.means.dtype == np.float32
    assert {cell.matrix.dtype for cell in partition.cells} == {np.dtype(np.float32)}


# Memory ---------------------------------------------------------------------------------------------


def test_beyond_the_bound_the_row_used_longest_ago_goes() -> None:
    vectors = unit_vectors(400, 384)
    index = NumpyIndex(max_bytes=300_000)
    first = 0
    for number, vector in enumerate(vectors):
        index.add(make_row(number, vector, scope=number))
        assert index.memory <= 300_000
        if number and number % 20 == 0:  # row 0 is used, and stays
            first += keys(index.search(scope_of(0), vectors[0].tobytes(), 1)) == [key_of(0)]
    assert first == 19
    left = [n for n in range(400) if index.search(scope_of(n), vectors[n].tobytes(), 1)]
    assert left == [0, *range(401 - len(left), 400)]
    assert 80 < len(left) < 110
    check(index)


def test_the_bound_holds_in_one_large_scope() -> None:
    vectors = unit_vectors(2000, 64)
    index = NumpyIndex(max_bytes=400_000)
    fill(index, vectors)
    assert index.memory <= 400_000
    count = index.count()
    assert 400 < count < 800
    assert keys(index.search(scope_of(0), vectors[1999].tobytes(), 1)) == [key_of(1999)]
    assert key_of(1999 - count) not in keys(index.search(scope_of(0), vectors[1999 - count].tobytes(), 1))
    check(index)


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    index = NumpyIndex(max_bytes=10_000)
    index.add(make_row(1, unit_vectors(1)[0], text="x" * 20_000))
    assert (index.count(), index.memory) == (0, 0)
    index.add(make_row(2, unit_vectors(1)[0]))
    assert index.update(key_of(2), {"long": "x" * 20_000})
    assert (index.count(), index.memory) == (0, 0)


def test_memory_is_given_back_and_counted_as_it_is() -> None:
    vectors = unit_vectors(3000, 384)
    rows = [make_row(number, vector, expires=2e9) for number, vector in enumerate(vectors)]
    warm = NumpyIndex()
    warm.add(rows[0])
    clock = FakeClock()
    tracemalloc.start()
    try:
        index = NumpyIndex(clock=clock)
        before = tracemalloc.get_traced_memory()[0]
        for row in rows:
            index.add(row)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
        assert 0.7 < taken / index.memory < 1.1  # the texts and keys themselves are `rows`'s
        clock.now = 2e9
        assert index.search(scope_of(0), rows[0].vector, 1) == []
        assert index.purge() + index.count() <= 3000
        assert index.memory == 0
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < taken / 20
    finally:
        tracemalloc.stop()


def test_a_large_scope_is_a_small_part_of_the_garbage_collectors_work() -> None:
    gc.collect()
    before = len(gc.get_objects())
    index = NumpyIndex()
    fill(index, unit_vectors(5000, 16))
    gc.collect()
    assert len(gc.get_objects()) - before < 1500


# On an event loop -----------------------------------------------------------------------------------


def test_insertion_takes_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No insertion touches more rows than a few cells hold, however many there are."""
    index = NumpyIndex()
    largest = 0
    resize = Cell._resize

    def watched(self: Cell, room: int) -> None:
        nonlocal largest
        largest = max(largest, room)
        resize(self, room)

    monkeypatch.setattr(Cell, "_resize", watched)
    fill(index, unit_vectors(10_000, 16))
    assert 128 <= largest <= 512
    assert index.inline is True


def test_an_event_loop_and_threads_share_one_index() -> None:
    index = NumpyIndex()
    vectors = unit_vectors(400)

    async def serve() -> None:
        for number in range(0, 400, 2):
            index.add(make_row(number, vectors[number]))
            await asyncio.sleep(0)

    def add_others() -> None:
        for number in range(1, 400, 2):
            index.add(make_row(number, vectors[number]))

    thread = threading.Thread(target=add_others)
    thread.start()
    asyncio.run(serve())
    thread.join()
    assert len(index.search(scope_of(0), vectors[0].tobytes(), 500)) == 400
    check(index)


# The file -------------------------------------------------------------------------------------------


def saved(path: Path, count: int = 300, **more: object) -> NumpyIndex:
    index = NumpyIndex(path=path, **more)  # type: ignore[arg-type]
    fill(index, unit_vectors(count))
    index.close()
    return index


def loaded(path: Path, **more: object) -> NumpyIndex:
    index = NumpyIndex(path=path, **more)  # type: ignore[arg-type]
    index.load()
    return index


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    saved(tmp_path / "deep" / "er" / "vectors")
    path = tmp_path / "deep" / "er" / "vectors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["vectors"]


def test_vectors_stay_in_the_file_until_they_change(tmp_path: Path) -> None:
    saved(tmp_path / "vectors")
    index = loaded(tmp_path / "vectors")
    check(index)
    (partition,) = index._scopes._scopes.values()
    assert not any(cell.matrix.flags.writeable for cell in partition.cells)
    assert all(cell.matrix.ctypes.data % 64 == 0 for cell in partition.cells)
    index.remove([key_of(7)])
    index.add(make_row(1000, unit_vectors(1, seed=3)[0]))
    assert {cell.matrix.flags.writeable for cell in partition.cells} == {True, False}
    vectors = unit_vectors(300)
    for number in range(300):
        found = keys(index.search(scope_of(0), vectors[number].tobytes(), 1))
        assert (found == [key_of(number)]) == (number != 7)
    check(index)


def test_a_file_is_written_over_while_it_is_in_use(tmp_path: Path) -> None:
    saved(tmp_path / "vectors")
    index = loaded(tmp_path / "vectors")
    saved(tmp_path / "vectors", 10)
    assert index.count() == 300
    assert keys(index.search(scope_of(0), unit_vectors(300)[200].tobytes(), 1)) == [key_of(200)]
    assert loaded(tmp_path / "vectors").count() == 300  # the second had loaded the first's rows


def test_rows_added_before_the_file_is_read_are_newer(tmp_path: Path) -> None:
    saved(tmp_path / "vectors")
    index = NumpyIndex(path=tmp_path / "vectors")
    vector = unit_vectors(1, seed=8)[0]
    index._begun = True  # the file is not read before `load` says so
    index.add(make_row(5, vector, text="newer"))
    index.load()
    assert index.count() == 300
    assert index.search(scope_of(0), vector.tobytes(), 1)[0].row.text == "newer"
    check(index)


def test_first_use_reads_the_file_beside(tmp_path: Path) -> None:
    saved(tmp_path / "vectors")
    index = NumpyIndex(path=tmp_path / "vectors")
    index.search(scope_of(0), unit_vectors(1)[0].tobytes(), 1)
    for thread in threading.enumerate():
        if thread.name == "llm-vectors-load":
            thread.join(30)
    assert len(index._scopes) == 300


def test_changes_are_written_in_the_background(tmp_path: Path) -> None:
    index = NumpyIndex(path=tmp_path / "vectors", save_every=1e-9)
    index.add(make_row(1, unit_vectors(1)[0]))
    for thread in threading.enumerate():
        if thread.name == "llm-vectors-save":
            thread.join(30)
    assert loaded(tmp_path / "vectors").count() == 1


def test_nothing_changed_is_not_written(tmp_path: Path) -> None:
    saved(tmp_path / "vectors")
    path = tmp_path / "vectors"
    before = path.stat().st_ino
    index = loaded(path)
    index.search(scope_of(0), unit_vectors(1)[0].tobytes(), 1)
    index.close()
    assert path.stat().st_ino == before
    index.flush("a")
    index.close()
    assert path.stat().st_ino != before
    assert loaded(path).count() == 0


def test_an_index_without_rows_writes_no_file(tmp_path: Path) -> None:
    index = NumpyIndex(path=tmp_path / "vectors")
    assert index.save() is False
    index.close()
    assert os.listdir(tmp_path) == []


def test_the_bound_holds_for_what_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path / "vectors")
    index = loaded(tmp_path / "vectors", max_bytes=30_000)
    assert 20_000 < index.memory <= 30_000
    check(index)


def test_saving_while_others_write_gives_a_file_without_holes(tmp_path: Path) -> None:
    path, vectors = tmp_path / "vectors", unit_vectors(3000)
    index = NumpyIndex(path=path)
    fill(index, vectors[:1000])
    stop = threading.Event()

    def write() -> None:
        number = 1000
        while not stop.is_set() and number < 3000:
            index.add(make_row(number, vectors[number]))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(5):
        assert index.save() is True
        _, stored = snapshot.read(path)
        found = {key: cell.matrix[slot] for cell in stored for slot, key in enumerate(cell.keys)}
        assert len(found) >= 900  # one that changes cells at that moment may be missing
        for key, vector in found.items():
            assert vector.tobytes() == vectors[int(key[2:], 16)].tobytes()
    stop.set()
    writer.join()
    index.close()
    assert loaded(path).count() == index.count()


def _damage(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]


def _ignored(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "llm_middleware"):
        index = loaded(path)
    assert index.count() == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{path} is ignored" in caplog.text
    index.add(make_row(1, unit_vectors(1)[0]))
    index.close()
    assert loaded(path).count() == 1  # it is written over


def test_a_damaged_file_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "vectors"
    saved(path, 20)
    whole = path.read_bytes()
    assert len(whole) % 64 == 0
    cases = [b"", b"x", whole[:63], whole[:-1], whole[:-64], whole[:128], whole[:64], whole + bytes(64)]
    cases += [
        _damage(whole, at)
        for at in (0, 7, 9, 13, 64, 68, 72, 76, 130, 400, len(whole) - 100, len(whole) - 60)
    ]
    cases += [b"\x80\x04" + whole, whole.replace(b"CELL", b"LAST", 1), os.urandom(4096)]
    for data in cases:
        path.write_bytes(data)
        _ignored(path, caplog)


def test_every_byte_that_counts_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    saved(path, 3)
    whole = path.read_bytes()
    vectors = unit_vectors(3)
    for at in range(0, len(whole), 3):
        path.write_bytes(_damage(whole, at))
        try:
            dimensions, stored = snapshot.read(path)
        except CorruptEntryError:
            continue
        assert dimensions == 16  # it was padding
        assert [(cell.keys, cell.vectors.tobytes()) for cell in stored] == [
            ([key_of(n) for n in range(3)], vectors.tobytes())
        ]


@pytest.mark.parametrize(
    "planted",
    [
        {"keys": [1]},
        {"texts": ["a", "b"]},
        {"expires": [None]},
        {"expires": [float("nan")]},
        {"payloads": ["[1]"]},
        {"payloads": ["{"]},
        {"scope": 5},
        {"keys": "x"},
    ],
    ids=str,
)
def test_what_only_looks_like_ours_is_ignored(
    tmp_path: Path,
    planted: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The sums are right, and the content is not what the index writes."""
    path = tmp_path / "vectors"
    dumps = json.dumps
    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", lambda parts, **more: dumps({**parts, **planted}, **more))
        saved(path, 1)
    _ignored(path, caplog)


def test_vectors_that_are_none_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in (np.nan, np.inf, 0.0, 3.0):
        vector = np.full((1, 16), value, np.float32)
        cell = Cell(scope_of(0), vector, [Record(key_of(1), "text", NEVER, "")])
        snapshot.write(tmp_path / "vectors", 16, [cell])
        _ignored(tmp_path / "vectors", caplog)


def test_a_file_of_another_embedding_model_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "vectors", 5)
    with caplog.at_level(logging.WARNING, "llm_middleware"):
        index = loaded(tmp_path / "vectors", dimensions=32)
    assert "this index holds 32 dimensions, got 16" in caplog.text
    assert index.count() == 0
    index.add(make_row(1, unit_vectors(1, 32)[0]))
    assert index.dimensions == 32


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    index = NumpyIndex(path=tmp_path / "file" / "vectors")
    index._loaded = True
    vector = unit_vectors(1)[0]
    index.add(make_row(1, vector))
    with caplog.at_level(logging.WARNING, "llm_middleware"):
        index.close()
    assert "cannot write" in caplog.text
    assert keys(index.search(scope_of(0), vector.tobytes(), 1)) == [key_of(1)]


def test_what_a_killed_writer_left_is_cleared_up(tmp_path: Path) -> None:
    old, young = tmp_path / "vectors.1.tmp", tmp_path / "vectors.2.tmp"
    for left in (old, young):
        left.write_bytes(b"x")
    os.utime(old, (1, 1))
    saved(tmp_path / "vectors", 1)
    assert sorted(os.listdir(tmp_path)) == ["vectors", "vectors.2.tmp"]


def test_another_process_reads_what_one_wrote(tmp_path: Path) -> None:
    saved(tmp_path / "vectors")
    code = (
        "import sys; from llm_middleware.semantic.index_numpy import NumpyIndex;"
        "index = NumpyIndex(path=sys.argv[1]); print(index.count(), index.dimensions)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "vectors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["300", "16"]


# Settings and errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_bytes", 0),
        ("max_bytes", 1.5),
        ("dimensions", 0),
        ("dimensions", True),
        ("exact_rows", "2"),
        ("save_every", 0),
        ("save_every", float("nan")),
    ],
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        NumpyIndex(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_dimensions_may_be_set_beforehand() -> None:
    index = NumpyIndex(dimensions=32)
    with pytest.raises(InvalidRequestError, match="32 dimensions, got 16"):
        index.add(make_row(1, unit_vectors(1)[0]))


@pytest.mark.parametrize("payload", [{"x": object()}, {"x": {1, 2}}], ids=["object", "set"])
def test_a_payload_is_json(payload: dict[str, object]) -> None:
    index = NumpyIndex()
    vector = unit_vectors(1)[0]
    with pytest.raises(InvalidRequestError) as caught:
        index.add(make_row(1, vector, payload=payload))
    assert caught.value.param == "payload"
    with pytest.raises(InvalidRequestError) as caught:
        index.update(key_of(1), payload)
    assert caught.value.param == "payload"


def test_a_time_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        NumpyIndex().add(make_row(1, unit_vectors(1)[0], expires=float("nan")))
    assert caught.value.param == "expires"


def test_a_row_says_nothing_of_the_index_it_came_from() -> None:
    """A caller that changes a payload it got changes nothing in the index."""
    index, vector = NumpyIndex(), unit_vectors(1)[0]
    index.add(make_row(1, vector, payload={"labels": [1]}))
    row = index.search(scope_of(0), vector.tobytes(), 1)[0].row
    assert isinstance(row, Row)
    assert isinstance(row.payload["labels"], list)
    row.payload["labels"].append(2)
    assert index.search(scope_of(0), vector.tobytes(), 1)[0].row.payload == {"labels": [1]}


def test_many_scopes_of_one_row_are_cheap() -> None:
    index = NumpyIndex()
    for number, vector in enumerate(unit_vectors(2000, 384)):
        index.add(make_row(number, vector, scope=number))
    assert index.memory / 2000 < 3500
    assert all(isinstance(partition, Partition) for partition in index._scopes._scopes.values())
    check(index)


# What happens in between -----------------------------------------------------------------------------


def _meanwhile(monkeypatch: pytest.MonkeyPatch, step: str, work: Callable[[], object]) -> None:
    """Have ``work`` done once, as by another thread, when ``step`` is taken without the lock."""
    real = getattr(scopes, step)
    waiting = [work]

    def stepped(*arguments: object) -> object:
        result = real(*arguments)
        if waiting:
            waiting.pop()()
        return result

    monkeypatch.setattr(scopes, step, stepped)


def test_cells_that_go_while_a_place_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = NumpyIndex(), unit_vectors(600, 32)
    fill(index, vectors)
    gone = [key_of(number) for number in range(1, 600)]
    _meanwhile(monkeypatch, "nearest", lambda: index.remove(gone))
    index.add(make_row(1000, vectors[1]))
    check(index)
    assert sorted(keys(index.search(scope_of(0), vectors[0].tobytes(), 9))) == [key_of(0), key_of(1000)]


def test_a_scope_that_goes_while_a_place_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = NumpyIndex(), unit_vectors(600, 32)
    fill(index, vectors)
    _meanwhile(monkeypatch, "nearest", lambda: index.flush("a"))
    index.add(make_row(1000, vectors[1]))
    check(index)
    assert keys(index.search(scope_of(0), vectors[0].tobytes(), 9)) == [key_of(1000)]


def test_the_same_key_while_a_place_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = NumpyIndex(), unit_vectors(600, 32)
    fill(index, vectors)
    _meanwhile(monkeypatch, "nearest", lambda: index.add(make_row(1000, vectors[2], text="other")))
    index.add(make_row(1000, vectors[1], text="mine"))
    check(index)
    assert index.count() == 601
    assert index.search(scope_of(0), vectors[1].tobytes(), 2)[1].row.text in ("question 1", "mine")


def test_rows_that_change_places_while_they_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = NumpyIndex(), unit_vectors(600, 32)
    fill(index, vectors)
    gone = [key_of(number) for number in range(600) if number % 3]
    _meanwhile(monkeypatch, "best_places", lambda: index.remove(gone))
    found = index.search(scope_of(0), vectors[0].tobytes(), 600)
    assert sorted(keys(found)) == [key_of(number) for number in range(0, 600, 3)]
    for neighbour in found:
        cosine = float(vectors[int(neighbour.row.key[2:], 16)] @ vectors[0])
        assert neighbour.similarity == pytest.approx(cosine, abs=1e-5)


def test_a_cell_that_changes_while_it_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = NumpyIndex(), unit_vectors(140, 32)
    _meanwhile(monkeypatch, "halves", lambda: index.remove([key_of(3)]))
    fill(index, vectors)
    check(index)
    (partition,) = index._scopes._scopes.values()
    assert len(partition.cells) == 2
    assert index.count() == 139


def test_rows_added_while_a_cell_is_split_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = NumpyIndex(), unit_vectors(200, 32)
    _meanwhile(monkeypatch, "halves", lambda: index.add(make_row(999, vectors[199])))
    fill(index, vectors[:150])
    check(index)
    assert index.count() == 151
    assert keys(index.search(scope_of(0), vectors[199].tobytes(), 1)) == [key_of(999)]


def test_a_search_that_is_overtaken_every_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the lock at last, and others wait for it."""
    index, vectors = NumpyIndex(), unit_vectors(300, 32)
    fill(index, vectors)
    real, owner = cells.best_places, threading.get_ident()
    overtaken: list[threading.Thread] = []

    def stepped(*arguments: object) -> object:
        if threading.get_ident() == owner and len(overtaken) < 50:
            number = len(overtaken)
            thread = threading.Thread(target=index.remove, args=([key_of(number)],))
            thread.start()
            thread.join(0.05)
            overtaken.append(thread)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scopes, "best_places", stepped)
    found = index.search(scope_of(0), vectors[299].tobytes(), 1)
    for thread in overtaken:
        thread.join()
    assert keys(found) == [key_of(299)]
    assert len(overtaken) == 4


def test_a_cell_that_joined_another_is_empty() -> None:
    index, vectors = NumpyIndex(), unit_vectors(600, 32)
    fill(index, vectors)
    (partition,) = index._scopes._scopes.values()
    before = list(partition.cells)
    index.remove([key_of(number) for number in range(600) if number % 10])
    joined = [cell for cell in before if cell not in partition.cells]
    assert joined
    assert not any(cell.keys for cell in joined)


def test_rows_lie_where_a_search_looks_first() -> None:
    """Splitting alone leaves one row in four in a cell whose mean is not the nearest."""
    index, vectors = NumpyIndex(), unit_vectors(6000, 16)
    fill(index, vectors)
    (partition,) = index._scopes._scopes.values()
    means = partition.means[: len(partition.cells)]
    home = [
        int((cell.vectors @ means.T).argmax(axis=1).tolist().count(cell.place)) for cell in partition.cells
    ]
    assert sum(home) >= 0.85 * 6000


def test_a_cell_gives_back_its_room() -> None:
    index = NumpyIndex()
    fill(index, unit_vectors(100, 384))
    full = index.memory
    index.remove([key_of(number) for number in range(95)])
    assert index.count() == 5
    assert index.memory < full / 8
