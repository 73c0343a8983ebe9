"""Pictures of an evaluation: hits against wrong answers, a line for each kind of setting, a panel for each
set of data. Drawn by matplotlib, which is loaded here and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .eval_report import Report
from .evaluation import Kind, Outcome

__all__ = ["check_drawable", "draw"]

_FORMATS = (".svg", ".png")
_LOOKS: dict[Kind, tuple[str, str, str, str]] = {  # colour, marker, line, name
    "plain": ("#8a8a8a", "o", "--", "cosine alone"),
    "guards": ("#0072b2", "o", "-", "static mode: similarity_threshold"),
    "target": ("#009e73", "D", "none", "static mode: error target"),
    "doubtful": ("#e69f00", "s", "-", "verified mode, judge errs"),
    "verified": ("#d55e00", "s", "-", "verified mode: max_error_rate"),
}
_SIZE = (5.6, 4.4)  # inches, of a panel
_SETTINGS = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llm-middleware",  # the same picture each time
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_CLEAR = 0.045  # of the panel's size: labels nearer to another than this are left out


def check_drawable(path: str | Path) -> None:
    """`ConfigError` where ``path`` is no picture's name, or what draws it is not installed."""
    if Path(path).suffix.lower() not in _FORMATS:
        raise ConfigError(f"picture: {path}: expected a name that ends in .svg or .png", param="picture")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("picture: it needs matplotlib: pip install 'llm-middleware[eval]'", param="picture")


def draw(reports: Sequence[Report], path: str | Path, *, columns: int = 2) -> None:
    """Write a picture of ``reports``, one panel each, as SVG or PNG by the name's end.

    `ConfigError` names ``picture``: another ending, no matplotlib, a file that cannot be written.
    """
    check_drawable(path)
    if not reports:
        raise ConfigError("picture: nothing to draw", param="picture")
    # By name: its types are there only where it is installed.
    figure_module, matplotlib = (
        importlib.import_module(name) for name in ("matplotlib.figure", "matplotlib")
    )
    columns = min(columns, len(reports))
    rows = -(-len(reports) // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = figure_module.Figure((_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for panel, report in zip(panels, reports, strict=False):
            _panel(panel, report)
        for panel in list(panels)[len(reports) :]:
            panel.remove()
        figure.axes[0].legend(loc="lower right", frameon=False, fontsize=8)
        _save(figure, Path(path))


def _save(figure: Any, path: Path) -> None:
    dated = {"Date": None} if path.suffix.lower() == ".svg" else {}
    try:
        figure.savefig(path, dpi=144, metadata=dated)
    except OSError as exc:
        raise ConfigError(f"picture: {path} cannot be written: {exc.strerror}", param="picture") from exc


def _panel(axes: Any, report: Report) -> None:
    widest = 130.0 * max(report.bounds, default=0.05)
    shown = [outcome for outcome in report.outcomes if 100.0 * outcome.whole.wrong_rate <= widest]
    highest = max((100.0 * outcome.whole.hit_rate for outcome in shown), default=1.0)
    axes.set_xlim(0.0, widest)
    axes.set_ylim(0.0, max(1.0, 1.12 * highest))
    for bound in report.bounds:
        axes.axvline(100.0 * bound, color="#cccccc", linewidth=0.8, zorder=0)
    labels: list[tuple[float, float]] = []
    for kind in reversed(_LOOKS):  # what matters most is labelled first
        _line(axes, kind, [outcome for outcome in report.outcomes if outcome.kind == kind], labels)
    axes.set_title(report.name, fontsize=10, loc="left")
    axes.set_xlabel("wrong answers, % of all requests")
    axes.set_ylabel("hits, % of all requests")


def _line(axes: Any, kind: Kind, outcomes: Sequence[Outcome], labels: list[tuple[float, float]]) -> None:
    if not outcomes:
        return
    colour, marker, line, name = _LOOKS[kind]
    points = [(100.0 * one.whole.wrong_rate, 100.0 * one.whole.hit_rate, one.setting) for one in outcomes]
    points.sort(key=lambda point: point[2])
    across, up = [point[0] for point in points], [point[1] for point in points]
    axes.plot(
        across, up, linestyle=line, marker=marker, markersize=4, color=colour, linewidth=1.4, label=name
    )
    for x, y, setting in points:
        if _clear(axes, x, y, labels):
            above = kind in ("verified", "guards") and x > _CLEAR * axes.get_xlim()[1]
            axes.annotate(
                f"{setting:g}" if kind in ("plain", "guards") else f"{100.0 * setting:g} %",
                (x, y),
                xytext=(-4, 5) if above else (5, -9),
                textcoords="offset points",
                ha="right" if above else "left",
                fontsize=7,
                color=colour,
            )


def _clear(axes: Any, x: float, y: float, labels: list[tuple[float, float]]) -> bool:
    """Whether there is room for a label at this point; if so it is taken."""
    width, height = axes.get_xlim()[1], axes.get_ylim()[1]
    if x > width:
        return False
    here = x / width, y / height
    if any(abs(here[0] - a) < _CLEAR and abs(here[1] - b) < _CLEAR for a, b in labels):
        return False
    labels.append(here)
    return True
