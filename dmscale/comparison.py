"""The outcome of `compare`: rows, what the noise lets one say about them, the table and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .optional import require

# Two-sided 95% quantiles of Student's t by degrees of freedom; beyond 30 the normal distribution's serves.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One strategy over its seeds.

    values: the metric after recovery, one a seed; `before`: the same ahead of it, BatchNorm recalibrated.
    macs, params: shares of the dense model, means.  speedup: dense latency over this model's, measured in turns, median.
    search_share: seconds of the search as a share of search and recovery, mean.
    gain: relative improvement over the mean random structure in percent, positive is better (Yang et al., 2020).
    verdict: 'best', 'tie' (within the noise of the best), 'behind', or '' with one seed, where noise is unknown.
    problem: why there is no value, where there is none.
    """

    strategy: str
    values: tuple[float, ...] = ()
    before: tuple[float, ...] = ()
    macs: float = math.nan
    params: float = math.nan
    latency_ms: float = math.nan
    speedup: float = math.nan
    search_share: float = math.nan
    gain: float | None = None
    verdict: str = ""
    problem: str = ""

    @property
    def mean(self) -> float:
        """Mean of the metric over the seeds; NaN without a value."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None with one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: `rows`, best first, and what they mean.

    metric: its name; higher_is_better: its sense.  dense: the metric of the full model.
    settings: all that was the same for all.
    """

    rows: Sequence[Row]
    metric: str
    higher_is_better: bool
    dense: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def row(self, strategy: str) -> Row:
        """The row of one strategy.

        Raises:
            KeyError: it was not compared.
        """
        return {r.strategy: r for r in self.rows}[strategy]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        rows = [{**vars(r), "mean": r.mean, "spread": r.spread} for r in self.rows]
        return {
            "metric": self.metric, "higher_is_better": self.higher_is_better, "dense": self.dense,
            "settings": dict(self.settings), "rows": [{k: _plain(v) for k, v in r.items()} for r in rows],
        }  # fmt: skip

    @property
    def caption(self) -> str:
        """What a reader must know of the table."""
        s = self.settings
        seeds = max((len(r.values) for r in self.rows), default=0)
        noise = (
            "tie: not told apart from the best by Welch's t-test at 95%" if seeds > 1
            else "one seed: the noise is unknown, so nothing is said to be ahead"
        )  # fmt: skip
        return (
            f"{self.metric}, mean ± standard deviation of {seeds} seed{'s' * (seeds != 1)}; dense {_short(self.dense)}. "
            f"Budget {s.get('budget')}. All take {s.get('total_steps')} optimizer steps; those that search take "
            f"{s.get('search_steps')} of them in the search. before: ahead of recovery. vs random: relative improvement "
            f"over the mean random structure. {noise}."
        )

    def markdown(self, timing: bool = True) -> str:
        """The table in markdown; without `timing` it is the same for two runs with one seed."""
        heads, rows = self._cells(timing)
        lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
        lines += ["| " + " | ".join(r) + " |" for r in rows]
        return "\n".join(lines) + "\n\n" + "".join(f"{line}\n\n" for line in self._problems()) + f"{self.caption}\n"

    def _problems(self) -> list[str]:
        """A line for each strategy without a result; in the table they would take the columns' room."""
        return [f"{r.strategy}: no result, {r.problem}" for r in self.rows if not r.values]

    def __rich__(self) -> Group:
        heads, rows = self._cells(True)
        table = Table(
            title=f"{self.settings.get('model', '')} at {self.settings.get('budget', '')}", caption=self.caption
        )
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for r in rows:
            table.add_row(*r)
        return Group(table, *map(Text, self._problems()))

    def __str__(self) -> str:
        from .tables import to_text

        return to_text(self.__rich__())

    def _cells(self, timing: bool) -> tuple[list[str], list[list[str]]]:
        heads = ["strategy", self.metric, "verdict", "before", "vs random", "MACs", "params"]
        heads += ["ms", "speedup", "search share"] * timing
        return heads, [self._row_cells(r, timing) for r in self.rows]

    def _row_cells(self, r: Row, timing: bool) -> list[str]:
        if not r.values:
            return [r.strategy, "no result", *[""] * (8 if timing else 5)]
        spread = "" if r.spread is None else f" ± {_short(r.spread, like=r.mean)}"
        gain = "" if r.gain is None else f"{r.gain:+.1f}%"
        cells = [r.strategy, _short(r.mean) + spread, r.verdict, _short(statistics.fmean(r.before)), gain]
        cells += [f"{r.macs:.1%}", f"{r.params:.1%}"]
        return cells + [f"{r.latency_ms:.2f}", f"{r.speedup:.2f}x", f"{r.search_share:.0%}"] * timing

    def plot(self, path: str | Path) -> None:
        """A picture: every seed as a dot, the mean as a bar, the band of random structures, the dense model as a line.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        require("matplotlib", "plot", "drawing a comparison")
        from matplotlib.figure import Figure

        rows = [r for r in self.rows if r.values][::-1]
        figure = Figure(figsize=(7.6, 1.6 + 0.32 * len(rows)), layout="constrained")
        panel = figure.subplots()
        for i, r in enumerate(rows):
            colour = (
                "#d1495b"
                if r.strategy.startswith("dms")
                else "#9aa5ab"
                if r.strategy.startswith("random")
                else "#30638e"
            )
            panel.plot(r.values, [i] * len(r.values), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0)
            panel.plot([r.mean], [i], "|", color=colour, markersize=15, markeredgewidth=2.5)
            panel.annotate(_short(r.mean), (r.mean, i), (0, 8), textcoords="offset points", ha="center", fontsize=7.5)
        chance = next((r for r in rows if r.strategy == "random"), None)
        if chance is not None and chance.spread is not None:
            panel.axvspan(
                chance.mean - chance.spread, chance.mean + chance.spread, color="#9aa5ab", alpha=0.2, linewidth=0
            )
        panel.axvline(self.dense, color="#22223b", linestyle=":", linewidth=1.2)
        panel.annotate(
            "dense", (self.dense, len(rows) - 0.4), ha="right", fontsize=8, color="#22223b", rotation=90, va="top"
        )
        panel.set_yticks(range(len(rows)), [r.strategy for r in rows])
        panel.set_ylim(-0.7, len(rows) - 0.2)
        panel.set_xlabel(self.metric + ("" if self.higher_is_better else " (lower is better)"))
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        figure.suptitle(
            f"{self.settings.get('model', '')} at {self.settings.get('budget', '')}", fontsize=11, fontweight="bold"
        )
        figure.savefig(path, dpi=150)


def judge(rows: Sequence[Row], higher_is_better: bool) -> list[Row]:
    """Rows best first, with `gain` over random and a `verdict` that the noise allows."""
    sign = 1 if higher_is_better else -1
    done = sorted((r for r in rows if r.values), key=lambda r: -sign * r.mean)
    chance = next((r.mean for r in done if r.strategy == "random"), None)
    out = []
    for r in done:
        gain = None if not chance else 100 * sign * (r.mean - chance) / abs(chance)
        verdict = "" if min(len(r.values), len(done[0].values)) < 2 else (
            "best" if r is done[0] else "tie" if indistinguishable(r.values, done[0].values) else "behind"
        )  # fmt: skip
        out.append(Row(**{**vars(r), "gain": gain, "verdict": verdict}))
    return out + [r for r in rows if not r.values]


def indistinguishable(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether Welch's t-test at 95% does not tell the means of two samples of at least two values apart."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    if va + vb == 0:
        return difference == 0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return difference <= _t95(freedom) * math.sqrt(va + vb)


def _t95(freedom: float) -> float:
    """The quantile at a real number of degrees of freedom, at least one: linear in the inverse between whole ones."""
    freedom = max(freedom, 1.0)  # it may round below
    whole = int(freedom)
    if whole >= len(_T95):
        return 1.96
    share = (1 / whole - 1 / freedom) / (1 / whole - 1 / (whole + 1))
    return _T95[whole - 1] + share * (_T95[whole] - _T95[whole - 1])


def _short(value: float, like: float | None = None) -> str:
    """Four figures: 91.73, 5.213, 0.8412; or as many decimals as another number has."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value if like is None else like)
    return f"{value:.2f}" if size >= 10 else f"{value:.3f}" if size >= 1 else f"{value:.4f}"


def _plain(value: Any) -> Any:
    """NaN has no place in JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
