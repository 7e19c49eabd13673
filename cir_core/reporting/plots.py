"""Plots of results: a metric over alpha, and the curves of a training run. Each returns a Figure.

Figures are built with matplotlib's object interface on an Agg canvas: no display, no global state, safe in
threads. Series differ in colour (Okabe and Ito's palette, told apart by colour-blind people), line style and
marker. matplotlib is imported by the first plot: a second that no program should start with.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING

from cir_core import files
from cir_core.schema import CirError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#56B4E9", "-", "v"),
    ("#E69F00", "--", "P"),
)
_RIVAL_COLOUR = "#555555"
_RIVAL_DASHES = ((0, (1, 1)), (0, (5, 2)), (0, (3, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)))
_FORMATS = (".png", ".svg", ".pdf")


def alpha_curve(
    results: Mapping[str, Mapping[float, float]],
    metric: str,
    *,
    title: str,
    path: str | None = None,
    intervals: Mapping[str, Mapping[float, tuple[float, float]]] | None = None,
    rivals: Mapping[str, float] | None = None,
    note: str = "",
) -> Figure:
    """Plot a metric against alpha, one curve a label ("before TAT", "after TAT"), its best alpha marked.

    results: {label: {alpha: value}}, values as fractions; shown in percent. title: names the benchmark and
    split.
    intervals: {label: {alpha: (low, high)}}, drawn as a band around that label's curve.
    rivals: {label: value} of methods without an alpha, drawn as horizontal lines named at the right.
    note: a line under the title, such as "generated data: a smoke signal, not a benchmark result".
    path: file to write, .png, .svg or .pdf; a local path or any URI.
    Raises CirError for no results, an empty curve, values outside [0, 1], and intervals of an unknown curve
    or alpha.
    """
    from matplotlib.ticker import PercentFormatter

    _check_curves(results, intervals or {})
    _check_fractions({**{f"rival {name}": value for name, value in (rivals or {}).items()}})
    figure, (axes,) = _figure(1, width=7.2, height=4.4)
    for (label, curve), (colour, line, marker) in zip(results.items(), _cycle(len(results)), strict=True):
        alphas = sorted(curve)
        axes.plot(
            alphas,
            [curve[a] for a in alphas],
            color=colour,
            ls=line,
            marker=marker,
            ms=4.5,
            lw=1.8,
            label=label,
        )
        band = (intervals or {}).get(label, {})
        if band:
            spans = [band[a] for a in sorted(band)]
            axes.fill_between(
                sorted(band),
                [low for low, _ in spans],
                [high for _, high in spans],
                color=colour,
                alpha=0.15,
                lw=0,
            )
        best = max(alphas, key=lambda alpha: curve[alpha])
        axes.plot([best], [curve[best]], marker=marker, ms=10, mfc="none", mec=colour, mew=1.8, ls="none")
        axes.annotate(
            f"{100 * curve[best]:.1f}", (best, curve[best]), xytext=(0, 9), textcoords="offset points",
            ha="center", color=colour, fontsize=9, fontweight="bold",
        )  # fmt: skip
    _draw_rivals(axes, rivals or {})
    axes.set_xlabel("alpha (0 = image only, 1 = text only)")
    axes.set_ylabel(f"{metric} (%)")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="best", handlelength=3)
    _finish(figure, title, note, path)
    return figure


def training_curves(
    series: Mapping[str, Mapping[int, float]], *, title: str, path: str | None = None, note: str = ""
) -> Figure:
    """Plot a training run: one panel a quantity, over the optimizer step.

    series: {name: {step: value}}. Names with one part before "/" share a panel: "loss/train" and
    "loss/validation" are two lines of the panel "loss"; a name without "/" has a panel of its own. A value
    that is not finite leaves a gap. path, note and errors: as in `alpha_curve`.
    """
    from matplotlib.ticker import MaxNLocator

    if not series or not all(series.values()):
        raise CirError(f"training_curves: a series has no values: {sorted(series)}")
    panels: dict[str, dict[str, Mapping[int, float]]] = {}
    for name, values in series.items():
        panel, _, line = name.partition("/")
        panels.setdefault(panel, {})[line] = values
    figure, all_axes = _figure(len(panels), width=7.2, height=1.0 + 2.0 * len(panels))
    for axes, (panel, lines) in zip(all_axes, panels.items(), strict=True):
        for (label, values), (colour, line, _) in zip(lines.items(), _cycle(len(lines)), strict=True):
            steps = sorted(values)
            axes.plot(
                steps, [values[step] for step in steps], color=colour, ls=line, lw=1.6, label=label or panel,
                marker="o" if len(steps) == 1 else None,
            )  # fmt: skip
        axes.set_ylabel(panel)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) > 1:
            axes.legend(frameon=False, loc="best", handlelength=3)
    all_axes[-1].set_xlabel("optimizer step")
    _finish(figure, title, note, path)
    return figure


def _figure(num_panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = [axes for row in figure.subplots(num_panels, 1, sharex=True, squeeze=False) for axes in row]
    for axes in all_axes:
        axes.grid(visible=True, color="#DDDDDD", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _cycle(count: int) -> list[tuple[str, str, str]]:
    """Styles for `count` lines: the palette again with the next line styles when it runs out."""
    size = len(_STYLES)
    return [
        (_STYLES[i % size][0], _STYLES[(i + i // size) % size][1], _STYLES[(i + i // size) % size][2])
        for i in range(count)
    ]


def _draw_rivals(axes: Axes, rivals: Mapping[str, float]) -> None:
    """Draw horizontal lines, named right of the axes; names that would touch are moved apart."""
    if not rivals:
        return
    ordered = sorted(rivals.items(), key=lambda item: item[1])
    for number, (_, value) in enumerate(ordered):
        axes.axhline(value, color=_RIVAL_COLOUR, lw=1.1, ls=_RIVAL_DASHES[number % len(_RIVAL_DASHES)], zorder=1)
    axes.margins(y=0.12)
    axes.autoscale_view()
    low, high = axes.get_ylim()
    places = _spread([value for _, value in ordered], 0.055 * (high - low))
    for (label, value), place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{label} {100 * value:.1f}", (1, value), xytext=(1.02, place),
            xycoords=("axes fraction", "data"), textcoords=("axes fraction", "data"),
            va="center", fontsize=8.5, color="#333333", annotation_clip=False,
        )  # fmt: skip


def _spread(values: list[float], gap: float) -> list[float]:
    """Move ascending values apart to at least `gap`, each crowd staying centred where it was."""
    crowds: list[tuple[float, int]] = []  # centre, size
    for value in values:
        centre, size = value, 1
        while crowds and centre - crowds[-1][0] < gap * (size + crowds[-1][1]) / 2 * (1 - 1e-9):
            other, others = crowds.pop()
            centre, size = (centre * size + other * others) / (size + others), size + others
        crowds.append((centre, size))
    return [centre + gap * (place - (size - 1) / 2) for centre, size in crowds for place in range(size)]


def _finish(figure: Figure, title: str, note: str, path: str | None) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold")
    if note:
        figure.axes[0].set_title(note, fontsize=9, color="#555555", style="italic")
    if path is None:
        return
    suffix = PurePath(path).suffix.lower()
    if suffix not in _FORMATS:
        raise CirError(
            f"{files.redact(path)}: a plot is written as {', '.join(_FORMATS)}, not {suffix or 'no suffix'!r}"
        )
    buffer = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else {"CreationDate": None} if suffix == ".pdf" else None
    figure.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)  # no date: equal results, equal files
    files.write_bytes(path, buffer.getvalue())


def _check_curves(
    results: Mapping[str, Mapping[float, float]], intervals: Mapping[str, Mapping[float, tuple[float, float]]]
) -> None:
    if not results:
        raise CirError("alpha_curve: no results to plot")
    for label, curve in results.items():
        if not curve:
            raise CirError(f"alpha_curve: {label!r} has no values")
        _check_fractions({f"{label} at alpha {alpha}": value for alpha, value in curve.items()})
    for label, band in intervals.items():
        if label not in results:
            raise CirError(f"alpha_curve: intervals for {label!r}, but the curves are {sorted(results)}")
        if strange := sorted(band.keys() - results[label].keys()):
            raise CirError(f"alpha_curve: intervals of {label!r} at alphas without a value: {strange}")


def _check_fractions(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise CirError(f"alpha_curve: {name} is {value}; metrics are fractions in [0, 1]")
