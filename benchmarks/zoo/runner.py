"""Runs entries, each in a process of its own under a time limit, and keeps what they gave.

Rows are appended to a file of JSON lines as they come, so that a stopped run goes on where it was.  Each row carries a
fingerprint of the code that gave it; rows of other code are measured anew.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dmscale

from .entry import Entry

TIME_LIMIT = 60.0
"""Seconds that one entry may take."""

Measure = Callable[[Entry], Mapping[str, Any] | Iterator[Mapping[str, Any]]]
"""Gives the row of an entry, or the row as it becomes known: the last one counts, or what there is when it is ended."""


def chosen(entries: Iterable[Entry], pattern: str = "*", family: str | None = None) -> list[Entry]:
    """The entries whose name matches a glob, and of one family if given."""
    return [e for e in entries if fnmatch.fnmatchcase(e.name, pattern) and family in (None, e.family)]


def fingerprint(measuring: Sequence[str] = ("measure.py",), versions: str = "") -> str:
    """Changes with the code of dmscale, of the zoo's measuring, and with PyTorch: what a row depends on.

    Args:
        measuring: files of this package.
        versions: of what else a row depends on.
    """
    digest = hashlib.sha256((torch.__version__ + versions).encode())
    for path in sorted([*Path(dmscale.__file__).parent.rglob("*.py"), *map(Path(__file__).with_name, measuring)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Rows by name in a file of JSON lines; of rows with one name the last counts."""

    def __init__(self, path: Path, code: str):
        self.path, self.code = path, code
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = _row_of(line)
                if row is not None and row.get("code") == code:
                    self.rows[row["name"]] = row

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row, in memory and on disk."""
        kept = {**row, "code": self.code}
        self.rows[kept["name"]] = kept
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(kept) + "\n")


def _row_of(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the line that a kill cut in half
        return None


@dataclass
class _Job:
    entry: Entry
    process: Any
    receiver: Any
    started: float
    known: dict[str, Any] = field(default_factory=dict)  # of its row, by now


def run(entries: Sequence[Entry], measure: Measure, limit: float = TIME_LIMIT, jobs: int = 1) -> Iterator[dict]:
    """Measure entries, `jobs` at a time, each in a process of its own; yields their rows as they come.

    A process is a fork of this one, so that what has been imported by now (torch, the model libraries) costs nothing
    again.  One that does not answer within `limit` seconds is ended and gives a row with status 'timeout'; one that dies
    (out of memory, say) a row with status 'crashed'; what was known of the row by then stays in it.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(entries)
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                entry = waiting.pop(0)
                if entry.requires and importlib.util.find_spec(entry.requires) is None:
                    yield _without(entry, "skipped", f"{entry.requires} is not installed")
                    continue
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(entry, measure, sender), daemon=True)
                process.start()
                sender.close()
                running.append(_Job(entry, process, receiver, time.monotonic()))
            multiprocessing.connection.wait([job.receiver for job in running], timeout=0.2)
            for job in list(running):
                row = _answer(job, limit)
                if row is not None:
                    running.remove(job)
                    yield row
    finally:
        for job in running:
            job.process.kill()


def _child(entry: Entry, measure: Measure, sender: Any) -> None:
    torch.set_num_threads(1)
    given = measure(entry)
    for row in [given] if isinstance(given, Mapping) else given:
        sender.send(dict(row))
    sender.send(None)
    sender.close()


def _answer(job: _Job, limit: float) -> dict | None:
    row = None
    try:
        while row is None and job.receiver.poll():
            got = job.receiver.recv()
            job.known, row = (job.known, job.known) if got is None else (got, None)
    except EOFError:
        job.process.join()
        row = job.known | _without(job.entry, "crashed", f"its process ended with exit code {job.process.exitcode}")
    if row is not None:
        job.process.join(1)
        job.process.kill()
        return row
    if time.monotonic() - job.started > limit:
        job.process.kill()
        return job.known | _without(job.entry, "timeout", f"took more than {limit:.0f} s")
    return None


def _without(entry: Entry, status: str, problem: str) -> dict:
    return {"name": entry.name, "family": entry.family, "status": status, "problem": problem}


def regressions(rows: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, str]) -> list[str]:
    """Names that were exact in `baseline` (name -> status) and are not in `rows`; skipped and unrun ones do not count."""
    return [
        name for name, status in baseline.items()
        if status == "exact" and name in rows and rows[name]["status"] not in ("exact", "skipped")
    ]  # fmt: skip


def crashes(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of models that raised something that is not an error of dmscale's own, or took too long."""
    return [name for name, row in rows.items() if row["status"] in ("crashed", "timeout")]
