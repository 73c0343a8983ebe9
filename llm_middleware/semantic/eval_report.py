"""An evaluation in words and numbers: the table, what to choose, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .evaluation import BOUNDS, Counts, Outcome, best_static, verdict, wilson

__all__ = ["Report", "advice", "as_json", "name_of", "table"]

_HEAD = ("setting", "hits %", "wrong %", "precision %", "judged/1000", "2nd half: hits %", "wrong %")
_KEPT_TO = {
    "sure": "kept to, and sure of it",
    "likely": "kept to here, but there are too few requests to be sure",
    "broken": "not kept to",
}


@dataclass(slots=True)
class Report:
    """Outcomes and what they are of. ``about``: the data in a few words. ``notes``: what to know of them."""

    name: str
    about: str
    outcomes: Sequence[Outcome]
    notes: Sequence[str] = ()
    bounds: Sequence[float] = BOUNDS
    judge_error: float = 0.0
    settings: dict[str, object] = field(default_factory=dict)


def percent(share: float, places: int = 1) -> str:
    return f"{100.0 * share:.{places}f}"


def _bound(share: float) -> str:
    return f"{100.0 * share:g} %"


def name_of(outcome: Outcome, judge_error: float = 0.0) -> str:
    """The setting as it is written in a configuration, and what stands beside it."""
    if outcome.kind == "plain":
        return f"cosine {outcome.setting:g} alone, no guards"
    if outcome.kind == "guards":
        return f"similarity_threshold={outcome.setting:g}"
    if outcome.kind == "target":
        return f"error target {_bound(outcome.setting)}: cosine {outcome.threshold or 0.0:.3f}"
    errs = f", judge errs {_bound(judge_error)}" if outcome.kind == "doubtful" else ""
    return f"max_error_rate={outcome.setting:g}{errs}"


def table(report: Report) -> str:
    """A line for each setting, under a head. Shares of all requests, in percent."""
    rows = [(name_of(outcome, report.judge_error), *_cells(outcome)) for outcome in report.outcomes]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    lines, before = [_line(_HEAD, widths)], ""
    for outcome, row in zip(report.outcomes, rows, strict=True):
        if outcome.kind != before:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        lines.append(_line(row, widths))
        before = outcome.kind
    return "\n".join([f"{report.name}: {report.about}", *report.notes, "", *lines])


def _cells(outcome: Outcome) -> tuple[str, ...]:
    whole, second = outcome.whole, outcome.second
    return (
        percent(whole.hit_rate),
        percent(whole.wrong_rate, 2),
        "-" if whole.precision is None else percent(whole.precision),
        f"{1000.0 * outcome.judged / whole.requests:.0f}" if outcome.threshold is None else "",
        percent(second.hit_rate),
        percent(second.wrong_rate, 2),
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = row
    cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def advice(report: Report) -> list[str]:
    """For each bound which setting keeps to it, and how sure that is."""
    lines = []
    for bound in report.bounds:
        lines.append(f"At most {_bound(bound)} of all requests answered wrongly:")
        lines += [f"  {line}" for line in (_verified(report, bound), _static(report, bound)) if line]
    return lines


def _verified(report: Report, bound: float) -> str:
    for outcome in report.outcomes:
        if outcome.kind == "verified" and outcome.setting == bound:
            return f"with a judge, {name_of(outcome)}: {_told(outcome.whole, bound)}."
    return ""


def _static(report: Report, bound: float) -> str:
    best = best_static(report.outcomes, bound)
    if best is None:
        if not any(outcome.kind == "guards" for outcome in report.outcomes):
            return ""
        return "without a judge: no threshold that was tried is sure to keep to it in the first half."
    return (
        f"without a judge, {name_of(best)}, chosen on the first half of the requests; on the second half: "
        f"{_told(best.second, bound)}."
    )


def _told(counts: Counts, bound: float) -> str:
    low, high = (percent(end, 2) for end in wilson(counts.wrong, counts.requests))
    return (
        f"{percent(counts.hit_rate)} % hits, {percent(counts.wrong_rate, 2)} % wrong "
        f"(95 % interval {low} to {high} %): {_KEPT_TO[verdict(counts, bound)]}"
    )


def as_json(report: Report) -> dict[str, object]:
    """The same for programs. Shares are from 0 to 1."""
    return {
        "name": report.name,
        "about": report.about,
        "notes": list(report.notes),
        "settings": report.settings,
        "outcomes": [_as_json(outcome, report.judge_error) for outcome in report.outcomes],
        "advice": advice(report),
    }


def _as_json(outcome: Outcome, judge_error: float) -> dict[str, object]:
    return {
        "kind": outcome.kind,
        "setting": outcome.setting,
        "name": name_of(outcome, judge_error),
        "threshold": outcome.threshold,
        **_counts(outcome.whole),
        "judged": outcome.judged,
        "first_half": _counts(outcome.first),
        "second_half": _counts(outcome.second),
        "mistakes": [
            {"stored": stored, "asked": asked, "similarity": round(float(cosine), 4)}
            for stored, asked, cosine in outcome.mistakes
        ],
    }


def _counts(counts: Counts) -> dict[str, object]:
    low, high = wilson(counts.wrong, counts.requests)
    return {
        "requests": counts.requests,
        "hits": counts.hits,
        "wrong": counts.wrong,
        "hit_rate": counts.hit_rate,
        "wrong_rate": counts.wrong_rate,
        "wrong_rate_low": low,
        "wrong_rate_high": high,
        "precision": counts.precision,
    }
