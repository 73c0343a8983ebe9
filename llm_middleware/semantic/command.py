"""The command ``llm-middleware semantic-eval FILE``: which setting of the semantic cache answers most of your
questions, and how many of them wrongly. What it needs beyond the standard library is loaded when it runs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, LLMMiddlewareError

if TYPE_CHECKING:
    from .embedders import Embedder
    from .eval_files import LogRows, PairRows
    from .eval_report import Report
    from .eval_vectors import Vectors
    from .evaluation import Data, Plan

__all__ = ["Progress", "add_semantic_eval", "data_of", "embedder_of", "targets_of"]

_ABOUT = """Replay labelled questions through the semantic cache and tell, for every setting, how many it
would have answered and how many of them wrongly. FILE holds pairs (stored question, asked question, 1 where
one answer serves both and else 0) or a log in order of arrival (question, class of its right answer):
tab-separated in a .tsv, or objects with a, b, same or question, answer in a .jsonl."""


def add_semantic_eval(commands: Any) -> None:
    """Add the command to ``commands``, what `argparse` gave for ``add_subparsers``."""
    parser = commands.add_parser("semantic-eval", help="measure the semantic cache on your own questions")
    parser.description = _ABOUT
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="pairs or a log, .tsv or .jsonl")
    add("--as", dest="form", choices=("pairs", "log"), help="what FILE is (else its columns tell)")
    add(
        "--embedding-model",
        metavar="MODEL",
        default="local",
        help="local (all-MiniLM-L6-v2), or module:name of a function of a list of texts, or of an embedder",
    )
    add("--max-error", metavar="SHARES", type=_shares, help="bounds on wrong answers (0.01,0.02,0.05)")
    add("--thresholds", metavar="COSINES", type=_shares, help="similarity thresholds to try")
    add("--judge-error", metavar="SHARE", type=float, default=0.05, help="the judge's mistakes (0.05)")
    add("--seed", metavar="N", type=int, default=0, help="of everything that is left to chance (0)")
    add("--limit", metavar="N", type=_count, help="read the first N rows only")
    add("--vectors", metavar="FILE.npy", type=Path, help="keep the embeddings in this file")
    add("--picture", metavar="FILE.svg|png", type=Path, help="draw hits against wrong answers")
    add("--json", metavar="FILE", type=Path, help="write all figures, and wrong answers as examples")


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}") from None


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number over 0, got {text!r}")


def _run(given: argparse.Namespace) -> int:
    try:
        report = _report(given)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except LLMMiddlewareError as exc:
        print(
            f"{exc}" if isinstance(exc, ConfigError) else f"the embedding model failed: {exc}",
            file=sys.stderr,
        )
        return 2 if isinstance(exc, ConfigError) else 1
    from .eval_report import advice, table

    print("\n".join([table(report), "", *advice(report)]))
    return 0


def _report(given: argparse.Namespace) -> Report:
    from .eval_files import read_rows
    from .eval_report import as_json

    plan = _plan(given)  # what is wrong with the arguments is told before any work
    if given.picture is not None:
        from .pictures import check_drawable

        check_drawable(given.picture)
    rows = read_rows(given.file, given.form, given.limit)
    report = _measured(given, plan, rows)
    if given.json is not None:
        _written(given.json, json.dumps(as_json(report), indent=1, ensure_ascii=False))
    if given.picture is not None:
        from .pictures import draw

        draw([report], given.picture)
    return report


def _plan(given: argparse.Namespace) -> Plan:
    from .evaluation import BOUNDS, THRESHOLDS, Plan

    return Plan(
        thresholds=given.thresholds or THRESHOLDS,
        bounds=given.max_error or BOUNDS,
        judge_error=given.judge_error,
        seed=given.seed,
    )


def _measured(given: argparse.Namespace, plan: Plan, rows: PairRows | LogRows) -> Report:
    from .eval_report import Report
    from .evaluation import evaluate

    vectors = _vectors(given, rows)
    data = data_of(rows, vectors)
    plan = replace(plan, targets=targets_of(plan.bounds, vectors))
    with Progress("replaying", plan.replays * len(data.asked)) as progress:
        outcomes = evaluate(data, plan, progress.add)
    settings = {"file": str(given.file), "embedding_model": given.embedding_model, "seed": given.seed}
    return Report(
        given.file.stem,
        _described(rows, len(data.asked)),
        outcomes,
        _notes(rows, vectors.unread(rows.texts())),
        plan.bounds,
        plan.judge_error,
        {**settings, "judge_error": plan.judge_error},
    )


def _vectors(given: argparse.Namespace, rows: PairRows | LogRows) -> Vectors:
    from .static_mode import shipped_pairs

    _numpy()
    from .eval_vectors import Vectors

    vectors = Vectors(embedder_of(given.embedding_model), given.vectors)
    texts = [*rows.texts(), *(text for pair in shipped_pairs() for text in pair[:2])]
    with Progress("embedding", vectors.missing(texts)) as progress:
        vectors.of(texts, progress.add)
    return vectors


def _numpy() -> None:
    if importlib.util.find_spec("numpy") is None:
        raise ConfigError("semantic-eval needs numpy: pip install 'llm-middleware[semantic]'")


def data_of(rows: PairRows | LogRows, vectors: Vectors) -> Data:
    """What was read, with what is near what."""
    from .eval_files import PairRows
    from .eval_vectors import cosines, nearest_earlier
    from .evaluation import Log, Pairs

    if isinstance(rows, PairRows):
        near = cosines(vectors.of(rows.stored), vectors.of(rows.asked))
        return Pairs(rows.stored, rows.asked, rows.same, near)
    with Progress("comparing", len(rows.asked)) as progress:
        return Log(rows.asked, rows.answers, nearest_earlier(vectors.of(rows.asked), progress.add))


def targets_of(bounds: Sequence[float], vectors: Vectors) -> Mapping[float, float]:
    """Of each error target the cosine that the shipped pairs give with this embedder."""
    from .static_mode import threshold_for

    return {
        bound: threshold_for(bound, lambda texts: [row.tobytes() for row in vectors.of(texts)])
        for bound in bounds
    }


def _described(rows: PairRows | LogRows, count: int) -> str:
    from .eval_files import PairRows

    if isinstance(rows, PairRows):
        return f"{count:,} pairs, {100 * sum(rows.same) / count:.1f} % of them with one answer"
    return (
        f"{count:,} questions in order, {len(set(rows.answers)):,} answers; "
        f"a perfect cache would have {100 * rows.most:.1f} % hits"
    )


def _notes(rows: PairRows | LogRows, unread: int) -> list[str]:
    from .eval_files import LogRows

    notes = ["Shares are of all requests. Judged: comparisons by the judge for each 1,000 requests."]
    if isinstance(rows, LogRows) and rows.repeats:
        wrong = f", {rows.repeats_wrong:,} of them of another class" if rows.repeats_wrong else ""
        notes.append(
            f"Left out: {rows.repeats:,} word-for-word repeats, which the exact cache answers{wrong}."
        )
    if unread:
        notes.append(f"The embedder cannot read {unread:,} of the texts: never a hit.")
    return notes


def _written(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", "utf-8")
    except OSError as exc:
        raise ConfigError(f"json: {path} cannot be written: {exc.strerror}", param="json") from exc


def embedder_of(name: str) -> Embedder:
    """The embedder that ``local`` or ``module:name`` stands for. `ConfigError` says why there is none."""
    if name == "local":
        from .embed_local import LocalEmbedder

        return LocalEmbedder()
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ConfigError(
            f"embedding_model: expected local or module:name, got {name!r}", param="embedding_model"
        )
    found = _loaded(module_name, attribute)
    from .embedders import Embedder, callable_embedder

    if isinstance(found, Embedder) and not isinstance(found, type):
        return found
    return callable_embedder(found, id=name)


def _loaded(module_name: str, attribute: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of the folder that the command is run in
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"embedding_model: {exc}", param="embedding_model") from exc


class Progress:
    """A bar on stderr, where that is a terminal, for work of ``total`` steps; nothing in the first second."""

    _WIDTH = 30

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._clock = what, max(total, 1), clock
        self._done, self._told = 0, clock()
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def add(self, steps: int) -> None:
        self._done += steps
        if self._clock() - self._told >= 1.0 and sys.stderr.isatty():
            share = min(1.0, self._done / self._total)
            bar = ("#" * round(share * self._WIDTH)).ljust(self._WIDTH, ".")
            print(f"\r{self._what} {bar} {share:4.0%}", end="", file=sys.stderr, flush=True)
            self._told, self._shown = self._clock(), True

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
