"""Tables and pictures of a search and of a comparison; matplotlib is imported where a picture is drawn.

A comparison is a list of `Row`s: one for each network, method and budget, with the accuracies of all seeds.
The table, its markdown twin and the picture read nothing else.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .optional import require

KINDS = {"width": "widths", "heads": "attention heads", "depth": "depths", "choice": "choices"}
COLOURS = {"dense": "#22223b", "DMS": "#d1495b", "uniform": "#30638e", "uniform+depth": "#00798c", "random": "#9aa5ab"}
OTHER_COLOURS = ("#edae49", "#6a4c93", "#7f9172")


@dataclass(frozen=True)
class Row:
    """What one method made of one network at one budget, over seeds.

    budget: the share of the dense MACs that was allowed; None for the dense network itself.
    accuracies: test accuracy in percent, one for each seed.
    macs, params, latency: MACs of one example, number of parameters, ms; means over the seeds.
    """

    model: str
    method: str
    budget: float | None
    accuracies: tuple[float, ...]
    macs: float
    params: float
    latency: float

    @property
    def mean(self) -> float:
        """Mean test accuracy in percent."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the accuracy over the seeds, in points; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The fields, mean and spread, as JSON takes them."""
        return {**asdict(self), "accuracies": list(self.accuracies), "mean": self.mean, "spread": self.spread}


# ------------------------------------------------------------------------------------------- tables


def comparison_table(rows: Sequence[Row], title: str | None = None, caption: str | None = None) -> Table:
    """The rows as a rich table; the best accuracy of every network and budget is bold."""
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name, numeric in _COLUMNS.items():
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    best = _best(rows)
    for i, row in enumerate(rows):
        cells = _cells(row, _dense_of(row, rows))
        if row in best:
            cells = [f"[bold]{cell}[/bold]" if k in (1, 3) else cell for k, cell in enumerate(cells)]
        ends = i + 1 == len(rows) or _group(row) != _group(rows[i + 1])
        table.add_row(*cells, end_section=ends)
    return table


def comparison_markdown(rows: Sequence[Row], caption: str | None = None) -> str:
    """The rows as a markdown table, with the caption as a paragraph below it."""
    lines = ["| " + " | ".join(_COLUMNS) + " |"]
    lines.append("|" + "|".join("---:" if numeric else "---" for numeric in _COLUMNS.values()) + "|")
    best = _best(rows)
    for row in rows:
        cells = _cells(row, _dense_of(row, rows))
        if row in best:
            cells = [f"**{cell}**" if k in (1, 3) else cell for k, cell in enumerate(cells)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + (f"\n{caption}\n" if caption else "")


_COLUMNS = {  # heading -> whether its cells are numbers
    "net": False,
    "method": False,
    "budget": True,
    "accuracy %": True,
    "diff": True,  # points above or below the dense network; short, so that the table fits 80 columns
    "MACs": True,
    "params": True,
    "ms": True,
}


def _cells(row: Row, dense: Row | None) -> list[str]:
    accuracy = f"{row.mean:.2f}" if row.spread is None else f"{row.mean:.2f} ± {row.spread:.2f}"
    return [
        row.model,
        row.method,
        "" if row.budget is None else f"{row.budget:.0%}",
        accuracy,
        "" if dense is None or row is dense else f"{row.mean - dense.mean:+.2f}",
        _count(row.macs) + ("" if dense is None or row is dense else f" {row.macs / dense.macs:>6.1%}"),
        _count(row.params),
        f"{row.latency:.2f}",
    ]


def _count(number: float) -> str:
    """Three figures or more with a unit: 812, 40.9k, 1.26M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def _group(row: Row) -> tuple[str, float | None]:
    return row.model, row.budget


def _best(rows: Sequence[Row]) -> list[Row]:
    """The most accurate row of every network and budget with several rows; all of those that tie."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    return [
        row
        for group in groups.values()
        if len(group) > 1
        for row in group
        if row.mean == max(other.mean for other in group)
    ]


def _dense_of(row: Row, rows: Sequence[Row]) -> Row | None:
    return next((other for other in rows if other.model == row.model and other.budget is None), None)


# ----------------------------------------------------------------------------------------- pictures


def plot_comparison(rows: Sequence[Row], path: str | Path, title: str | None = None) -> None:
    """Accuracy against MACs, one panel for each network and one line for each method, written to `path`.

    Bands are one standard deviation over the seeds on either side of the mean.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    figure = _figure(5.2 * len(models), 4.0)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models):
        _compare(panel, [row for row in rows if row.model == model], model)
    panels[0].set_ylabel("test accuracy (%)")
    seeds = max(len(row.accuracies) for row in rows)
    note = f"mean of {seeds} seeds, band: one standard deviation" if seeds > 1 else "one seed"
    heading = "Accuracy against MACs" if title is None else title
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.99, 0.965, note, ha="right", va="center", fontsize=8.5, color=_SOFT)
    figure.savefig(path, dpi=160)


def plot_history(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str = "",
    kinds: Mapping[str, str] | None = None,
) -> None:
    """One search: cost against its target, and the size of every dimension, written to `path`.

    `history` is `Search.history`: dicts of "step", "cost" and "target" (resource -> share of the full
    model) and "sizes" (dimension -> elements kept).  `kinds` gives each dimension's kind ("width", "heads",
    "depth"): one panel each, all in one without it.  Sizes are shares of the largest in the history; colours
    run from the first dimension of the network to the last.

    Raises:
        ValueError: the history is empty.
        MissingPackageError: matplotlib is not installed.
    """
    if not history:
        raise ValueError("the history is empty: no step of the search was taken, so there is nothing to draw")
    names = list(history[0]["sizes"])
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kinds[name] if kinds else "dimensions", []).append(name)
    groups = {kind: groups[kind] for kind in sorted(groups, key=lambda k: [*KINDS, k].index(k))}

    figure = _figure(8.0, 2.2 + 2.3 * len(groups))
    panels = figure.subplots(1 + len(groups), 1, sharex=True, squeeze=False)[:, 0]
    _draw_cost(panels[0], history)
    for panel, (kind, members) in zip(panels[1:], groups.items()):
        _draw_sizes(panel, history, members, KINDS.get(kind, kind))
    panels[-1].set_xlabel("step of the search")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=140)


_INK, _SOFT, _GRID = "#22223b", "#6c757d", "#e9ecef"


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches; made without pyplot, so that no backend or global state is touched."""
    require("matplotlib", "plot", "drawing a picture")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _plain(panel: Any) -> None:
    """Only the lines that carry information: no box, a pale grid behind."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_SOFT)
    panel.tick_params(colors=_SOFT, labelsize=9)
    panel.xaxis.label.set_color(_INK)
    panel.yaxis.label.set_color(_INK)
    panel.grid(axis="y", color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)


def _compare(panel: Any, rows: list[Row], model: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    dense = next((row for row in rows if row.budget is None), None)
    methods = list(dict.fromkeys(row.method for row in rows if row.budget is not None))
    others = iter(OTHER_COLOURS * len(methods))
    ends: list[tuple[float, str, str]] = []
    for method in reversed(methods):  # the first method is drawn last, on top
        colour = COLOURS.get(method) or next(others)
        line = sorted((r for r in rows if r.method == method), key=lambda r: r.macs)
        line += [dense] if dense else []
        x = [row.macs for row in line]
        y = [row.mean for row in line]
        low = [row.mean - (row.spread or 0) for row in line]
        high = [row.mean + (row.spread or 0) for row in line]
        panel.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
        panel.plot(x, y, color=colour, linewidth=2.2, marker="o", markersize=5.5, markeredgecolor="white")
        ends.append((y[0], method, colour))
    if dense:
        panel.axhline(dense.mean, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        panel.plot(dense.macs, dense.mean, marker="o", markersize=8, color=_INK, zorder=5)
        panel.annotate(
            f"dense {dense.mean:.1f}",
            (dense.macs, dense.mean),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_INK,
        )
    _plain(panel)
    panel.set_xscale("log")
    ticks = sorted({row.macs for row in rows if row.method == methods[0]} | ({dense.macs} if dense else set()))
    panel.set_xticks(ticks)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, dense)))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(axis="x", which="minor", bottom=False)
    ratio = max(ticks[-1] / ticks[0], 1.5)
    panel.set_xlim(ticks[0] / ratio**0.5, ticks[-1] * ratio**0.06)  # names stand left of the lines
    bottom = min(row.mean - (row.spread or 0) for row in rows)
    top = max(row.mean + (row.spread or 0) for row in rows)
    height = max(top - bottom, 1.0)
    panel.set_ylim(bottom - 0.05 * height, min(top + 0.14 * height, max(100.0, top)))
    _label_ends(panel, ends, ticks[0])
    panel.set_xlabel("MACs")
    panel.set_title(model, loc="left", fontsize=10.5, color=_INK)


def _tick(macs: float, dense: Row | None) -> str:
    return _count(macs) + (f"\n{macs / dense.macs:.0%}" if dense else "")


def _label_ends(panel: Any, ends: list[tuple[float, str, str]], x: float) -> None:
    """Names beside the left ends of the lines, pushed apart so that none covers another."""
    bottom, top = panel.get_ylim()
    gap = 0.065 * (top - bottom)
    position = float("-inf")
    for y, method, colour in sorted(ends):
        position = max(y, position + gap)
        panel.annotate(
            f"{method} {y:.1f}",
            (x, position),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9.5,
            color=colour,
            fontweight="bold" if method == "DMS" else "normal",
        )


def _draw_cost(panel: Any, history: Sequence[Mapping[str, Any]]) -> None:
    steps = [entry["step"] for entry in history]
    palette = ("#d1495b", "#30638e", "#00798c", "#edae49")
    for k, resource in enumerate(history[0]["target"]):
        colour = palette[k % len(palette)]
        panel.plot(
            steps,
            [entry["target"][resource] for entry in history],
            color=colour,
            linestyle=(0, (4, 3)),
            linewidth=1.4,
            label=f"{resource} target",
        )
        panel.plot(steps, [entry["cost"][resource] for entry in history], color=colour, linewidth=2, label=resource)
    panel.set_ylim(0, 1.05)
    panel.set_ylabel("share of full cost")
    _percent(panel)
    panel.legend(frameon=False, fontsize=9, ncols=2)
    _plain(panel)


def _draw_sizes(panel: Any, history: Sequence[Mapping[str, Any]], names: list[str], heading: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    steps = [entry["step"] for entry in history]
    colours = LinearSegmentedColormap.from_list("", colormaps["viridis"](range(0, 236)))  # no yellow
    many = len(names) > 12  # more names than fit beside the panel
    for k, name in enumerate(names):
        sizes = [entry["sizes"][name] for entry in history]
        panel.plot(
            steps,
            [size / max(sizes) for size in sizes],
            color=colours(k / max(1, len(names) - 1)),
            linewidth=1.0 if many else 1.7,
            alpha=0.75 if many else 1.0,
            label=f"{name}  {max(sizes)} → {sizes[-1]}",
        )
    panel.set_ylim(0, 1.05)
    panel.set_ylabel(heading)
    _percent(panel)
    _plain(panel)
    if not many:
        panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return
    beside = panel.inset_axes((1.03, 0.12, 0.018, 0.76))
    bar = panel.figure.colorbar(ScalarMappable(Normalize(0, 1), colours), cax=beside)
    bar.set_ticks([0, 1], labels=[f"{names[0]} (first)", f"{names[-1]} (last of {len(names)})"])
    bar.ax.tick_params(colors=_SOFT, labelsize=8)
    bar.outline.set_visible(False)


def _percent(panel: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
