"""The evaluation: what a setting would have answered, how much of it wrongly, and what that is worth."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_middleware.errors import ConfigError
from llm_middleware.semantic import pictures
from llm_middleware.semantic.embedders import UnfitTextError, callable_embedder
from llm_middleware.semantic.eval_files import EvaluationFileError, LogRows, PairRows, read_rows
from llm_middleware.semantic.eval_report import Report, advice, as_json, table
from llm_middleware.semantic.eval_vectors import Vectors, cosines, nearest_earlier
from llm_middleware.semantic.evaluation import (
    Counts,
    Kind,
    Log,
    Outcome,
    Pairs,
    Plan,
    Shelf,
    best_static,
    evaluate,
    replay_static,
    replay_verified,
    verdict,
    wilson,
)
from llm_middleware.semantic.records import Neighbour, Row
from tests.semantic.eval_data import DIMENSIONS, Near, embed, questions

ENABLE, DISABLE = "How do I enable 2FA?", "How do I disable 2FA?"


def counts(outcome: Outcome) -> tuple[int, int, int]:
    return outcome.whole.requests, outcome.whole.hits, outcome.whole.wrong


@pytest.fixture(scope="module")
def log() -> Log:
    asked, answers = questions(1000)
    vectors = Vectors(callable_embedder(embed)).of(asked)
    return Log(asked, answers, nearest_earlier(vectors))


# ---- replaying thresholds


def test_a_log_is_answered_from_what_was_stored_before() -> None:
    # 1 is near 0 and right; 2 is near 1, which was a hit and is not stored, and 0, which is of another class;
    # 3 is near 2 only, which was a hit; 4 is not near enough.
    near = Near(
        {1: [(0, 0.95)], 2: [(1, 0.99), (0, 0.91)], 3: [(2, 0.97)], 4: [(3, 0.89), (0, 0.85)]},
    )
    outcome = replay_static(Log(list("abcde"), ["x", "x", "y", "y", "x"], near), 0.9, guards=False)
    assert counts(outcome) == (5, 2, 1)
    assert (outcome.second.requests, outcome.second.hits, outcome.second.wrong) == (3, 1, 1)
    assert (outcome.first.requests, outcome.first.hits, outcome.first.wrong) == (2, 1, 0)
    assert outcome.mistakes == [("a", "c", 0.91)]
    assert (outcome.kind, outcome.setting, outcome.threshold, outcome.judged) == ("plain", 0.9, 0.9, 0)


def test_a_miss_is_stored_and_answers_later() -> None:
    near = Near({1: [(0, 0.5)], 2: [(1, 0.96), (0, 0.95)]})
    assert counts(replay_static(Log(list("abc"), ["x", "y", "y"], near), 0.9)) == (3, 1, 0)


def test_guards_veto_and_end_the_look_up() -> None:
    """C103"""
    near = Near({1: [(0, 0.97)], 2: [(1, 0.99), (0, 0.97)]})
    data = Log([ENABLE, DISABLE, "How can I disable 2FA?"], ["on", "off", "off"], near)
    assert counts(replay_static(data, 0.9, guards=False)) == (3, 2, 2)
    assert counts(replay_static(data, 0.9)) == (3, 1, 0)


def test_each_pair_stands_alone() -> None:
    pairs = Pairs(
        [ENABLE, ENABLE, "a b"], [DISABLE, "Enable 2FA?", "a c"], [False, True, False], [0.9, 0.9, 0.8]
    )
    assert counts(replay_static(pairs, 0.9, guards=False)) == (3, 2, 1)
    assert counts(replay_static(pairs, 0.9)) == (3, 1, 0)
    assert counts(replay_static(pairs, 0.8)) == (3, 2, 1)


# ---- replaying the verified mode


def test_the_verified_mode_learns_answers_and_keeps_to_its_bound(log: Log) -> None:
    tight, loose = replay_verified(log, 0.02), replay_verified(log, 0.2)
    assert 100 <= tight.judged <= 1000 - tight.whole.hits
    assert 20 <= tight.whole.hits < loose.whole.hits
    assert tight.whole.wrong <= 20
    assert loose.whole.wrong <= 200
    assert (tight.kind, tight.setting, tight.threshold) == ("verified", 0.02, None)


def test_nothing_is_answered_before_a_hundred_labels(log: Log) -> None:
    outcome = replay_verified(Log(log.asked[:100], log.answers[:100], log.nearest), 0.2)
    assert (outcome.whole.hits, outcome.judged > 50) == (0, True)


def test_a_judge_that_errs_costs_hits(log: Log) -> None:
    erring = replay_verified(log, 0.1, judge_error=0.2)
    assert erring.kind == "doubtful"
    assert erring.whole.hits < replay_verified(log, 0.1).whole.hits
    with pytest.raises(ConfigError) as raised:
        replay_verified(log, 0.1, judge_error=0.5)
    assert raised.value.param == "judge_error"


def test_a_seed_repeats_a_run(log: Log) -> None:
    assert replay_verified(log, 0.1, seed=3) == replay_verified(log, 0.1, seed=3)
    assert replay_verified(log, 0.1, seed=3) != replay_verified(log, 0.1, seed=4)


def test_what_was_learnt_of_a_stored_question_stays_with_it() -> None:
    shelf = Log(["a", "b", "c"], ["x", "x", "x"], Near({2: [(1, 0.9), (0, 0.8)]})).shelf()
    shelf.keep(0, None)
    shelf.keep(1, "0")
    shelf.learnt(Neighbour(Row("0", "", "a", b"", math.inf, {}), 0.9), {"told": [1.0, 0.2]})
    found = shelf.found(2, 8, 0.5)
    assert [(one.row.key, one.row.text, one.row.payload) for one in found] == [
        ("1", "b", {"group": "0"}),
        ("0", "a", {"told": [1.0, 0.2]}),
    ]
    assert [one.row.key for one in shelf.found(2, 1, 0.5)] == ["1"]
    assert [one.row.key for one in shelf.found(2, 8, 0.85)] == ["1"]


class Watched(Log):
    """A log whose shelf tells what is stored."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.kept: list[tuple[int, str | None]] = []

    def shelf(self) -> Shelf:
        shelf = super().shelf()
        keep = shelf.keep

        def kept(at: int, group: str | None) -> None:
            self.kept.append((at, group))
            keep(at, group)

        shelf.keep = kept  # type: ignore[method-assign]
        return shelf


def test_a_verdict_is_kept_with_both_questions() -> None:
    texts = ["How do I open it?", "How do I lock it?", "how do I LOCK it?", "How could I open it?"]
    near = Near({at: [(0, 0.9)] for at in (1, 2, 3)})
    log = Watched(texts, ["open", "lock", "lock", "open"], near)
    outcome = replay_verified(log, 0.1)
    # 2 is not compared: that pair was judged different before; 3 has the answer of 0.
    assert outcome.judged == 2
    assert log.kept == [(0, None), (1, None), (2, None), (3, "0")]


def test_a_plan_is_gone_through_whole(log: Log) -> None:
    data, told = Log(log.asked[:300], log.answers[:300], log.nearest), list[int]()
    plan = Plan(thresholds=(0.9, 0.8), targets={0.01: 0.95}, bounds=(0.1,), judge_error=0.05)
    outcomes = evaluate(data, plan, told.append)
    assert [(one.kind, one.setting, one.threshold) for one in outcomes] == [
        ("plain", 0.8, 0.8),
        ("plain", 0.9, 0.9),
        ("guards", 0.8, 0.8),
        ("guards", 0.9, 0.9),
        ("target", 0.01, 0.95),
        ("verified", 0.1, None),
        ("doubtful", 0.1, None),
    ]
    assert sum(told) == 300 * plan.replays == 300 * 7
    assert [one.kind for one in evaluate(data, Plan((), {}, (0.1,), 0.0))] == ["verified"]


@pytest.mark.parametrize(
    ("setting", "param"),
    [
        ({"bounds": (0.0,)}, "max_error_rate"),
        ({"thresholds": (1.1,)}, "thresholds"),
        ({"judge_error": -0.1}, "judge_error"),
    ],
)
def test_a_plan_refuses_what_is_no_share(setting: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Plan(**setting)  # type: ignore[arg-type]
    assert raised.value.param == param


def test_lists_of_different_lengths_are_refused() -> None:
    for make in (lambda: Log(["a"], [], Near({})), lambda: Pairs(["a"], ["b"], [True], [])):
        with pytest.raises(ConfigError):
            make()


# ---- how sure that is


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 100, 0.0, 0.0370), (10, 100, 0.0552, 0.1744), (100, 100, 0.9630, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilsons_interval(count: int, of: int, low: float, high: float) -> None:
    assert wilson(count, of) == pytest.approx((low, high), abs=5e-5)


def test_shares_of_nothing() -> None:
    assert (Counts().hit_rate, Counts().wrong_rate, Counts().precision) == (0.0, 0.0, None)
    assert Counts(200, 50, 5).precision == pytest.approx(0.9)


def test_a_verdict_looks_at_the_interval() -> None:
    assert verdict(Counts(1000, 100, 3), 0.01) == "sure"
    assert verdict(Counts(1000, 100, 9), 0.01) == "likely"
    assert verdict(Counts(1000, 100, 11), 0.01) == "broken"


def made(kind: Kind, setting: float, first: Counts, second: Counts, judged: int = 0) -> Outcome:
    whole = Counts(*(a + b for a, b in zip(_three(first), _three(second), strict=True)))
    return Outcome(kind, setting, None if judged else setting, whole, second, judged, [("s", "a", 0.93)])


def _three(one: Counts) -> tuple[int, int, int]:
    return one.requests, one.hits, one.wrong


OUTCOMES = [
    made("plain", 0.9, Counts(1000, 500, 0), Counts(1000, 500, 0)),
    made("guards", 0.8, Counts(1000, 400, 12), Counts(1000, 450, 2)),
    made("guards", 0.9, Counts(1000, 300, 2), Counts(1000, 350, 15)),
    made("guards", 0.95, Counts(1000, 100, 0), Counts(1000, 150, 0)),
    made("verified", 0.01, Counts(1000, 200, 4), Counts(1000, 300, 5), 1500),
]
REPORT = Report("mine", "2,000 questions", OUTCOMES, ["A note."], (0.01,), 0.05, {"seed": 1})


def test_the_threshold_is_chosen_without_looking_at_the_second_half() -> None:
    best = best_static(OUTCOMES, 0.01)
    assert best is OUTCOMES[2]
    assert best_static(OUTCOMES, 0.05) is OUTCOMES[1]
    assert best_static(OUTCOMES, 0.001) is None
    assert best_static(OUTCOMES[:1], 0.01) is None


def test_the_advice_names_the_setting_and_how_sure_it_is() -> None:
    head, verified, static = advice(REPORT)
    assert head == "At most 1 % of all requests answered wrongly:"
    assert verified == (
        "  with a judge, max_error_rate=0.01: 25.0 % hits, 0.45 % wrong (95 % interval 0.24 to 0.85 %): "
        "kept to, and sure of it."
    )
    assert static == (
        "  without a judge, similarity_threshold=0.9, chosen on the first half of the requests; "
        "on the second half: 35.0 % hits, 1.50 % wrong (95 % interval 0.91 to 2.46 %): not kept to."
    )
    none = Report("mine", "", OUTCOMES[1:4], bounds=(0.001,))
    assert advice(none)[1:] == [
        "  without a judge: no threshold that was tried is sure to keep to it in the first half."
    ]


def test_the_table_has_a_line_for_each_setting() -> None:
    assert table(REPORT).splitlines() == [
        "mine: 2,000 questions",
        "A note.",
        "",
        "setting                      hits %  wrong %  precision %  judged/1000  2nd half: hits %  wrong %",
        "-------------------------------------------------------------------------------------------------",
        "cosine 0.9 alone, no guards    50.0     0.00        100.0                           50.0     0.00",
        "-------------------------------------------------------------------------------------------------",
        "similarity_threshold=0.8       42.5     0.70         98.4                           45.0     0.20",
        "similarity_threshold=0.9       32.5     0.85         97.4                           35.0     1.50",
        "similarity_threshold=0.95      12.5     0.00        100.0                           15.0     0.00",
        "-------------------------------------------------------------------------------------------------",
        "max_error_rate=0.01            25.0     0.45         98.2          750              30.0     0.50",
    ]


def test_json_has_every_figure() -> None:
    found = as_json(REPORT)
    assert (found["name"], found["about"], found["settings"]) == ("mine", "2,000 questions", {"seed": 1})
    last = found["outcomes"][-1]  # type: ignore[index]
    assert (last["kind"], last["setting"], last["threshold"], last["judged"]) == (
        "verified",
        0.01,
        None,
        1500,
    )
    assert (last["requests"], last["hits"], last["wrong"], last["hit_rate"]) == (2000, 500, 9, 0.25)
    assert last["second_half"]["wrong_rate"] == pytest.approx(0.005)
    assert last["first_half"]["hits"] == 200
    assert last["mistakes"] == [{"stored": "s", "asked": "a", "similarity": 0.93}]
    assert found["advice"] == advice(REPORT)


# ---- vectors


def test_the_nearest_earlier_ones_are_exact_and_all_of_them() -> None:
    rows = np.random.default_rng(2).normal(size=(600, 8)).astype("<f4")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    told = list[int]()
    nearest = nearest_earlier(rows, told.append, kept=5)
    assert sum(told) == 600
    for at in (0, 1, 4, 5, 6, 255, 256, 257, 599):
        found = list(nearest.of(at))
        right = sorted(range(at), key=lambda other: -float(rows[other] @ rows[at]))
        assert [other for other, _ in found] == right
        assert [cosine for _, cosine in found] == pytest.approx(
            [float(rows[o] @ rows[at]) for o in right], abs=1e-6
        )


def test_cosines_of_pairs() -> None:
    eye = np.eye(2, dtype="<f4")
    assert cosines(eye, eye[::-1]) == [0.0, 0.0]
    assert cosines(eye, eye) == [1.0, 1.0]


class Counting:
    """`embed` as an embedder that counts, refuses a text, and can be interrupted."""

    max_tokens, dimensions = None, DIMENSIONS

    def __init__(self, name: str = "words", stop_after: int = 10**9) -> None:
        self.id, self.embedded, self._stop_after = name, list[str](), stop_after

    def fits(self, text: str) -> bool:
        return True

    def embed(self, texts: Sequence[str]) -> list[bytes]:
        if len(self.embedded) >= self._stop_after:
            raise KeyboardInterrupt
        if any("☃" in text for text in texts):
            raise UnfitTextError("no")
        self.embedded += texts
        return [np.array(vector, "<f4").tobytes() for vector in embed(list(texts))]

    async def aembed(self, texts: Sequence[str]) -> list[bytes]:
        raise NotImplementedError


def test_vectors_are_made_once_and_kept_in_the_file(tmp_path: Path) -> None:
    file, first = tmp_path / "kept.npy", Counting()
    vectors = Vectors(first, file)
    assert vectors.missing(["a b", "c", "a b"]) == 2
    rows = vectors.of(["a b", "c", "a b"])
    assert (rows.shape, sorted(first.embedded)) == ((3, DIMENSIONS), ["a b", "c"])
    assert rows[0].tolist() == rows[2].tolist() == pytest.approx(embed(["a b"])[0])
    again = Counting()
    kept = Vectors(again, file)
    assert kept.of(["c", "d", "a b"]).tolist()[2] == rows[0].tolist()
    assert again.embedded == ["d"]
    assert Vectors(Counting("other model"), file).missing(["a b", "c", "d"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npy"]


def test_a_text_that_cannot_be_read_is_near_nothing(tmp_path: Path) -> None:
    vectors = Vectors(Counting(), tmp_path / "kept.npy")
    texts = ["a b", "a ☃", "a b c"]
    rows = vectors.of(texts)
    assert rows[1].tolist() == [0.0] * DIMENSIONS
    assert cosines(rows[:1], rows[2:])[0] == pytest.approx(2 / 6**0.5)
    assert vectors.unread(texts) == 1
    again = Counting()
    Vectors(again, tmp_path / "kept.npy").of(texts)
    assert again.embedded == []
    with pytest.raises(ConfigError) as raised:
        Vectors(Counting()).of(["☃"])
    assert raised.value.param == "embedding_model"


def test_what_was_made_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    texts = [f"word {number}" for number in range(300)]
    with pytest.raises(KeyboardInterrupt):
        Vectors(Counting(stop_after=128), tmp_path / "kept.npy").of(texts)
    assert Vectors(Counting(), tmp_path / "kept.npy").missing(texts) == 300 - 128


@pytest.mark.parametrize("spoil", [b"", b"nothing of numpy's", b"\x93NUMPY"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, spoil: bytes) -> None:
    file = tmp_path / "kept.npy"
    file.write_bytes(spoil)
    with pytest.raises(ConfigError, match=r"kept\.npy is no file of vectors") as raised:
        Vectors(Counting(), file)
    assert raised.value.param == "vectors"
    np.save(file, np.zeros((3, 4)))
    with pytest.raises(ConfigError, match=r"kept\.npy is no file of vectors"):
        Vectors(Counting(), file)
    assert np.load(file).shape == (3, 4)


def test_vectors_of_another_length_are_refused(tmp_path: Path) -> None:
    Vectors(Counting(), tmp_path / "kept.npy").of(["a"])
    short = callable_embedder(lambda texts: [[1.0, 0.0] for _ in texts], id="short")
    with pytest.raises(
        ConfigError, match=rf"2 numbers in one of short, {DIMENSIONS} in those of .*kept\.npy"
    ):
        Vectors(short, tmp_path / "kept.npy").of(["b"])
    with pytest.raises(ConfigError, match="cannot be written"):
        Vectors(Counting(), tmp_path / "no folder" / "kept.npy").of(["a"])


# ---- files

PAIRS = PairRows(["a a", "c c"], ["b b", "d d"], [True, False])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.tsv", "a a\tb b\t1\nc c\td d\t0\n"),
        ("x.tsv", "\ufeffa\tb\tlabel\tcategory\r\na a\tb b\t1\tz\r\n\r\nc c\td d\t0\tz\r\n"),
        ("x.tsv", "id\tquestion1\tquestion2\tis_duplicate\n7\ta a\tb b\tTrue\n8\tc c\td d\tfalse"),
        ("x.jsonl", '{"a": "a a", "b": "b b", "same": true}\n{"same": 0, "b": "d d", "a": "c c", "x": 1}\n'),
    ],
)
def test_pairs_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, "utf-8", newline="")
    assert read_rows(tmp_path / name) == PAIRS
    assert read_rows(tmp_path / name, "pairs", 1) == PairRows(["a a"], ["b b"], [True])


OBJECTS = """
{"question": "cat\\u2028do", "answer": "one"}
{"question": "b b", "answer": 2}
{"question": "Cat\\u2028do?", "answer": "one"}
{"question": "b  b", "answer": "one"}
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.tsv", "cat\u2028do\tone\nb b\t2\nCat\u2028do?\tone\nb  b\tone\n"),
        ("x.txt", "text\tanswer_class\ncat\u2028do\tone\nb b\t2\nCat\u2028do?\tone\nb  b\tone\n"),
        ("x.jsonl", OBJECTS),
    ],
)
def test_a_log_is_read_without_its_repeats(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    rows = read_rows(tmp_path / name)
    assert rows == LogRows(["cat\u2028do", "b b"], ["one", "2"], repeats=2, repeats_wrong=1)
    assert isinstance(rows, LogRows)
    assert (rows.most, rows.texts()) == (0.0, rows.asked)


@pytest.mark.parametrize(
    ("name", "text", "problems"),
    [
        (
            "x.tsv",
            "a\tb\t1\na\tb\t2\na\tb\n\t b\t1\n",
            ["2: expected 0 or 1 as its label, got '2'", "3", "4"],
        ),
        (
            "x.tsv",
            "q\tx\nq\t\n \tx\nq\tx\ty\n",
            ["2: its answer's class is empty", "3: a question is empty", "4"],
        ),
        ("x.tsv", "a\tb\tc\td\n", ["1: expected two texts and 0 or 1 (tab-separated"]),
        ("x.tsv", b"q\tx\n\xff\tx\n", ["2: not UTF-8"]),
        ("x.jsonl", '{"a": "x"}\n', ["1: expected two texts"]),
        (
            "x.jsonl",
            '[1]\n{"question": 5, "answer": "x"}\n{]',
            ["1: expected", "2: a question is no text", "3: not JSON"],
        ),
        ("x.jsonl", '{"question": "a", "answer": ["x"]}', ["1: its answer's class is empty, or no text"]),
        (
            "x.jsonl",
            '{"a": "a", "b": "b", "same": true}\n{"question": "a", "answer": "b"}',
            ["2: expected two texts"],
        ),
    ],
)
def test_every_bad_line_is_told_with_its_number(
    tmp_path: Path, name: str, text: str | bytes, problems: list[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EvaluationFileError) as raised:
        read_rows(file)
    assert len(raised.value.problems) == len(problems)
    for found, wanted in zip(raised.value.problems, problems, strict=True):
        assert found.startswith(f"{file}:{wanted}")
    assert raised.value.param == "file"


def test_an_explicit_form_holds(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a a\tb b\t1\n")
    with pytest.raises(EvaluationFileError, match="1: expected a question and its answer's class"):
        read_rows(tmp_path / "x.tsv", "log")


def test_of_many_bad_lines_the_first_are_told(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\tb\t1\n" + "a\tb\tz\n" * 50)
    with pytest.raises(EvaluationFileError) as raised:
        read_rows(tmp_path / "x.tsv")
    lines = raised.value.message.splitlines()
    assert (len(raised.value.problems), len(lines), lines[-1]) == (50, 21, "and 30 more")


@pytest.mark.parametrize(
    ("name", "why"),
    [("x.csv", r"\.tsv or a \.jsonl"), ("none.tsv", "No such file"), ("empty.tsv", "no rows")],
)
def test_a_file_that_is_none(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "empty.tsv").write_text("\n")
    with pytest.raises(EvaluationFileError, match=why):
        read_rows(tmp_path / name)


# ---- pictures


def test_a_picture_has_a_panel_for_each_report_and_is_the_same_each_time(tmp_path: Path) -> None:
    reports = [
        REPORT,
        Report("yours", "", OUTCOMES[:4], bounds=(0.02, 0.05)),
        Report("theirs", "", OUTCOMES[4:]),
    ]
    pictures.draw(reports, tmp_path / "a.svg")
    pictures.draw(reports, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for told in ("mine", "yours", "theirs", "wrong answers, % of all requests", ">0.95<", ">1 %<"):
        assert told in text
    assert text.count("hits, % of all requests") == 3
    pictures.draw([REPORT], tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_labels_of_points_in_one_place_are_drawn_once(tmp_path: Path) -> None:
    same = [made("guards", at, Counts(500, 100, 1), Counts(500, 100, 1)) for at in (0.91, 0.92)]
    apart = made("guards", 0.87, Counts(500, 200, 5), Counts(500, 200, 5))
    pictures.draw([Report("mine", "", [*same, apart], bounds=(0.02,))], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert [f">{at}<" in text for at in (0.87, 0.91, 0.92)] == [True, True, False]


def test_a_picture_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, why in (("a.gif", r"\.svg or \.png"), ("no folder/a.svg", "cannot be written")):
        with pytest.raises(ConfigError, match=why) as raised:
            pictures.draw([REPORT], tmp_path / name)
        assert raised.value.param == "picture"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'llm-middleware\[eval\]'"):
        pictures.check_drawable(tmp_path / "a.svg")
