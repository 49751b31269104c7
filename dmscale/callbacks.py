"""What watches a search: a console, a table, a log.

A callback is any object with `on_step(search, record)` and `on_end(search)`.  The record is the entry of `search.history`
that was just made, every `log_every` steps:

    step, cost (metric -> share of the full model), target (likewise), sizes (dimension -> elements), and what
    `search.note(loss=...)` has been told since.

Give them to `Search(..., callbacks=[...])`, or append to `search.callbacks`.  Callbacks look on: they get no say in the
search, and are not part of its state.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .optional import require

if TYPE_CHECKING:
    from .search import Search


class Callback:
    """A callback that does nothing: derive from it and override what is needed."""

    def on_step(self, search: Search, record: Mapping[str, Any]) -> None:
        """Called after each entry of `search.history`."""

    def on_end(self, search: Search) -> None:
        """Called once, after the last step, when `search.structure` is final."""


class Console(Callback):
    """A progress line with cost, target and loss; where the output is no terminal, ten plain lines.

    Args:
        console: where to print; standard error by default.
        lines: how many plain lines a whole search prints where there is no terminal.
    """

    def __init__(self, console: RichConsole | None = None, lines: int = 10):
        self.console = console or RichConsole(file=sys.stderr)
        self.lines = lines
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = -1

    def on_step(self, search: Search, record: Mapping[str, Any]) -> None:
        """Redraw the line, or print one if a further tenth has passed."""
        text = describe(record)
        if self.console.is_terminal:
            if self._bar is None:
                columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self._bar = Progress(*columns, TextColumn("{task.description}"), console=self.console)
                self._task = self._bar.add_task(text, total=search.steps)
                self._bar.start()
            self._bar.update(self._task, completed=record["step"], description=text)
        elif (part := record["step"] * self.lines // search.steps) != self._printed:
            self._printed = part
            self.console.print(f"step {record['step']} of {search.steps}: {text}", soft_wrap=True, highlight=False)

    def on_end(self, search: Search) -> None:
        """Leave the last state of the line on the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(record: Mapping[str, Any]) -> str:
    """`macs 61.2% (target 61.3%), loss 0.4312`."""
    parts = [f"{m} {share:.1%} (target {record['target'][m]:.1%})" for m, share in record["cost"].items()]
    parts += [f"{name} {value:.4g}" for name, value in noted(record).items()]
    return ", ".join(parts)


def noted(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that `search.note` brought."""
    return {k: v for k, v in record.items() if k not in ("step", "cost", "target", "sizes")}


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Everything in a record as flat numbers: `cost/macs`, `target/macs`, `loss`, `sizes/NAME`, in this order."""
    flat: dict[str, float] = {}
    for part in ("cost", "target"):
        flat |= {f"{part}/{name}": value for name, value in record[part].items()}
    flat |= noted(record)
    return flat | {f"sizes/{name}": value for name, value in record["sizes"].items()}


class _Lines(Callback):
    """A text file with a line for each record; a resumed search goes on behind the last step that it still knows of."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._started = False

    def on_step(self, search: Search, record: Mapping[str, Any]) -> None:
        """Append a line."""
        if not self._started:
            self._started = True
            self._begin(record, {earlier["step"] for earlier in search.history[:-1]})
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(self._line(record))

    def _begin(self, record: Mapping[str, Any], known: Container[int]) -> None:
        """Keep the lines of the steps that the search knows of: what a killed run wrote after its last checkpoint comes again,
        and of what another search has left there nothing is known."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in old if (step := self._step(line)) is None or step in known]
        if len(kept) == sum(self._step(line) is None for line in kept):  # nothing but a header: a new search
            kept = [self._header(record)]
        self.path.write_text("".join(kept), "utf-8", newline="")

    def _header(self, record: Mapping[str, Any]) -> str:
        return ""

    def _line(self, record: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def _step(self, line: str) -> int | None:
        """The step that a line is of; None for a header."""
        raise NotImplementedError


class JSONL(_Lines):
    """Every record as one line of JSON."""

    def _line(self, record: Mapping[str, Any]) -> str:
        return json.dumps(record) + "\n"

    def _step(self, line: str) -> int | None:
        try:
            return int(json.loads(line)["step"])
        except ValueError:  # the process was killed while it wrote
            return sys.maxsize


class CSV(_Lines):
    """Every record as one row of numbers, with a header; columns are those of the first record."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._columns: list[str] = []

    def _begin(self, record: Mapping[str, Any], known: Container[int]) -> None:
        super()._begin(record, known)
        with open(self.path, newline="", encoding="utf-8") as file:
            self._columns = next(csv.reader(file))

    def _header(self, record: Mapping[str, Any]) -> str:
        return _row(["step", *scalars(record)])

    def _line(self, record: Mapping[str, Any]) -> str:
        values = {"step": record["step"], **scalars(record)}
        return _row([values.get(name, "") for name in self._columns])

    def _step(self, line: str) -> int | None:
        first = line.partition(",")[0]
        if first == "step":
            return None
        return int(first) if first.isdigit() and line.endswith("\n") else sys.maxsize


def _row(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


class TensorBoard(Callback):
    """Cost, target, sizes and what was noted, as scalars of a TensorBoard run.

    Args:
        folder: of the run.
    Raises:
        MissingPackageError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        require("tensorboard", "tensorboard", "writing a TensorBoard log")
        self.folder = Path(folder)
        self._writer: Any = None

    def on_step(self, search: Search, record: Mapping[str, Any]) -> None:
        """Add one point to each curve."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # a resumed search hides what its killed predecessor wrote from this step on
            self._writer = SummaryWriter(str(self.folder), purge_step=record["step"])
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def on_end(self, search: Search) -> None:
        """Write everything out."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
