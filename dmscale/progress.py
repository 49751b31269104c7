"""The one progress bar of the library: shown on a terminal, silent anywhere else."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(show: bool = True, console: Console | None = None) -> Progress:
    """A rich progress bar, to be used in a `with`; it prints nothing where the output is no terminal or `show` is off."""
    console = console or Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
