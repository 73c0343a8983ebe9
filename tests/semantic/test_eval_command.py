"""The command ``llm-middleware semantic-eval``."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_middleware.cli import main
from llm_middleware.errors import ConfigError
from llm_middleware.semantic.command import Progress, embedder_of
from tests.semantic.eval_data import questions

WORDS = "tests.semantic.eval_data:embed"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "log.tsv"
    asked, answers = questions(300)
    rows = [f"{text}\t{answer}" for text, answer in zip(asked, answers, strict=True)]
    file.write_text("\n".join(["question\tclass", *rows, f"{asked[0].lower()}\tx", rows[1]]) + "\n")
    return file


def run(*arguments: object) -> int:
    return main(["semantic-eval", *map(str, arguments)])


def test_a_log_gives_a_table_figures_a_picture_and_advice(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture, vectors = tmp_path / "out.json", tmp_path / "out.svg", tmp_path / "kept.npy"
    settings = ("--thresholds", "0.8,0.95", "--max-error", "0.05,0.1", "--judge-error", "0.1", "--seed", "7")
    files = ("--json", figures, "--picture", picture, "--vectors", vectors)
    assert run(log, "--embedding-model", WORDS, *settings, *files) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "log: 300 questions in order, 64 answers; a perfect cache would have 78.7 % hits"
    assert lines[2] == (
        "Left out: 2 word-for-word repeats, which the exact cache answers, 1 of them of another class."
    )
    found = json.loads(figures.read_text())
    assert [(row["kind"], row["setting"]) for row in found["outcomes"]] == [
        ("plain", 0.8),
        ("plain", 0.95),
        ("guards", 0.8),
        ("guards", 0.95),
        ("target", 0.05),
        ("target", 0.1),
        ("verified", 0.05),
        ("verified", 0.1),
        ("doubtful", 0.05),
        ("doubtful", 0.1),
    ]
    assert {row["requests"] for row in found["outcomes"]} == {300}
    assert found["settings"] == {
        "file": str(log),
        "embedding_model": WORDS,
        "seed": 7,
        "judge_error": 0.1,
    }
    for row in found["outcomes"]:
        assert row["name"] in out
    assert lines[-len(found["advice"]) :] == found["advice"]
    assert ">log<" in picture.read_text()
    assert len(np.load(vectors)) >= 300


def test_pairs_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"a": "How do I reset my password?", "b": "How do I reset my password now?", "same": True},
        {"a": "How do I enable 2FA?", "b": "How do I disable 2FA?", "same": False},
        {"a": "Is it open?", "b": "Where are you?", "same": False},
        {"a": "one two", "b": "one two", "same": True},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert run(file, "--embedding-model", WORDS, "--thresholds", "0.75", "--limit", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pairs: 3 pairs, 33.3 % of them with one answer"
    by_name = {line.split("  ")[0]: line.split()[-5:] for line in lines}
    assert by_name["cosine 0.75 alone, no guards"][:3] == ["66.7", "33.33", "50.0"]
    assert by_name["similarity_threshold=0.75"][:3] == ["33.3", "0.00", "100.0"]


def test_the_same_seed_gives_the_same_figures(log: Path, tmp_path: Path) -> None:
    written = []
    for number, seed in enumerate((1, 1, 2)):
        file = tmp_path / f"{number}.json"
        small = ("--thresholds", "0.9", "--max-error", "0.2", "--json", file, "--seed", seed)
        assert run(log, "--embedding-model", WORDS, *small) == 0
        written.append(json.loads(file.read_text())["outcomes"])
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("none.tsv",), "none.tsv: No such file or directory"),
        (("bad.tsv",), "bad.tsv:2: expected 0 or 1 as its label, got 'x'"),
        (("good.tsv", "--as", "log"), "good.tsv:1: expected a question and its answer's class"),
        (("good.tsv", "--embedding-model", "nothing"), "embedding_model: expected local or module:name"),
        (("good.tsv", "--embedding-model", "no_such_module:f"), "embedding_model: No module named"),
        (
            ("good.tsv", "--embedding-model", "json:nothing"),
            "embedding_model: module 'json' has no attribute",
        ),
        (("good.tsv", "--embedding-model", "json:__name__"), "embedding_model: expected a function"),
        (("good.tsv", "--max-error", "1.5"), "max_error_rate: expected a share over 0 and under 1"),
        (("good.tsv", "--thresholds", "0,0.9"), "thresholds: expected cosines over 0, up to 1"),
        (("good.tsv", "--judge-error", "0.5"), "judge_error: expected a share from 0 to under 0.5"),
        (("good.tsv", "--picture", "x.gif"), "picture: x.gif: expected a name that ends in .svg or .png"),
        (("good.tsv", "--vectors", "bad.tsv"), "vectors: bad.tsv is no file of vectors"),
        (("good.tsv", "--json", "no/x.json"), "json: no/x.json cannot be written"),
    ],
)
def test_bad_input_is_told_and_the_status_is_2(
    arguments: tuple[str, ...],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.tsv").write_text("a b\ta c\t1\n")
    Path("bad.tsv").write_text("a\tb\t1\na\tb\tx\n")
    given = arguments if "--embedding-model" in arguments else (*arguments, "--embedding-model", WORDS)
    assert run(*given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(why)


@pytest.mark.parametrize("wrong", [("--limit", "0"), ("--limit", "x"), ("--max-error", "a"), ("--seed", "x")])
def test_arguments_of_another_kind_are_refused(
    wrong: tuple[str, str], log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        run(log, *wrong)
    assert raised.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_failing_model_is_told(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zeros_of_mine.py").write_text("def embed(texts):\n    return [[0.0, 0.0] for _ in texts]\n")
    assert run(log, "--embedding-model", "zeros_of_mine:embed") == 1
    assert capsys.readouterr().err.startswith(
        "the embedding model failed: a vector of 2 numbers has no direction"
    )


def test_an_embedder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("embedder_of_mine.py").write_text(
        "from llm_middleware.semantic.embedders import callable_embedder\n"
        "mine = callable_embedder(lambda texts: [[1.0] for _ in texts], id='mine')\n"
    )
    assert embedder_of("embedder_of_mine:mine").id == "mine"
    assert embedder_of(WORDS).id == WORDS
    with pytest.raises(ConfigError) as raised:
        embedder_of(":x")
    assert raised.value.param == "embedding_model"


def test_an_interrupt_ends_it_with_one_line_and_keeps_the_vectors(log: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import threading\n"
        "from tests.semantic.eval_data import embed as words\n"
        "calls = []\n"
        "def embed(texts):\n"
        "    calls.append(len(texts))\n"
        "    if len(calls) > 1:\n"
        "        print('waiting', flush=True)\n"
        "        threading.Event().wait()\n"
        "    return words(texts)\n"
    )
    command = [sys.executable, "-m", "llm_middleware.cli", "semantic-eval", str(log)]
    process = subprocess.Popen(
        [*command, "--embedding-model", "slow:embed", "--vectors", "kept.npy"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "\nstopped\n")
    assert len(np.load(tmp_path / "kept.npy")) == 128


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    now = iter([0.0, 0.5, 1.0, 1.0, 1.5, 2.5, 2.5])
    with Progress("embedding", 200, lambda: next(now)) as progress:
        for _ in range(4):
            progress.add(50)
    half, whole = "#" * 15 + "." * 15, "#" * 30
    shown = f"\rembedding {half}  50%\rembedding {whole} 100%\r\033[K"
    assert stream.getvalue() == (shown if terminal else "")


def test_the_other_commands_load_nothing_of_it() -> None:
    code = (
        "import sys, llm_middleware.cli\n"
        "print(*sorted({'numpy', 'matplotlib', 'llm_middleware.semantic.evaluation'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
