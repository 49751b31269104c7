"""python -m benchmarks.zoo [--filter GLOB] [--family F] [--out docs] [--jobs 2] [--peers]

Runs the zoo (see `measure.Row` for what is recorded), writes docs/zoo.md and docs/unsupported.md after a whole run, and
returns 1 when a model that was exact in baseline.json no longer is, or when one crashes.  A stopped run goes on where it was.
With `--peers` the models of timm and torchvision are also given to torch-pruning, and put side by side (see `peers`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmscale.progress import progress_bar
from dmscale.sources import allow_missing_torchvision_operators

from . import Entry, entries, pages, peers, runner
from .measure import STRUCTURES, measure

BASELINE = Path(__file__).with_name("baseline.json")


def main(arguments: list[str] | None = None) -> int:
    """Run the zoo; 1 if a model is no longer exact or one crashes, else 0."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    allow_missing_torchvision_operators()
    everything = entries()
    wanted = runner.chosen(everything, options.filter, options.family)
    if not wanted:
        families = ", ".join(sorted({e.family for e in everything}))
        print(f"no entry matches --filter {options.filter!r} --family {options.family!r}; families: {families}")
        return 1
    results = runner.Results(options.results, runner.fingerprint())
    with progress_bar() as bar:
        rows = _measured(wanted, results, options, bar, "zoo", _line, lambda e: measure(e).to_dict())
        pairs = _compared(wanted, options, bar) if options.peers else []
    if len(wanted) == len(everything):
        _write_pages(options.out, rows, pages.peers_section(pairs, peers.version(), peers.TIME_LIMIT) if pairs else "")
    if options.accept:
        _accept(rows)
    return _verdict(rows)


def _measured(
    wanted: Sequence[Entry], results: runner.Results, options: argparse.Namespace, bar: Any, title: str,
    line: Callable[[Mapping[str, Any]], str], measuring: runner.Measure, more_seconds: float = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Name -> row of every entry; those that this very code has measured are not measured again."""
    todo = [e for e in wanted if options.fresh or e.name not in results.rows]
    if done := len(wanted) - len(todo):
        bar.console.print(
            f"{title}: {done} of {len(wanted)} entries were measured with this very code; --fresh runs all"
        )
    task = bar.add_task(title, total=len(todo))
    for row in runner.run(todo, measuring, options.limit + more_seconds, options.jobs):
        results.add(row)
        bar.console.print(line(row), highlight=False, markup=False, soft_wrap=True)
        bar.advance(task)
    return {e.name: results.rows[e.name] for e in wanted}


def _compared(wanted: Sequence[Entry], options: argparse.Namespace, bar: Any) -> list[dict[str, Any]]:
    """The rows of `peers`; none, with a word on it, where torch-pruning is not installed."""
    if not peers.is_installed():
        bar.console.print(
            "--peers: torch-pruning is not installed (pip install -e '.[zoo]'); no side by side", markup=False
        )
        return []
    code = runner.fingerprint(["measure.py", "peers.py"], peers.version())
    results = runner.Results(options.results.with_suffix(".peers.jsonl"), code)
    peers.warm_up()
    more = 2 * peers.TIME_LIMIT  # it stops by itself; this is for what does not listen
    chosen = peers.entries(wanted)
    return list(_measured(chosen, results, options, bar, "peers", _peers_line, peers.compare, more).values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="Does dmscale work on your model?")
    parser.add_argument("--filter", default="*", help="glob of entry names, such as 'timm:*vit*'")
    parser.add_argument("--family", help="run one family of docs/zoo.md")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where a whole run writes its pages")
    parser.add_argument("--results", type=Path, default=Path("runs/zoo.jsonl"), help="rows so far, one JSON line each")
    parser.add_argument("--fresh", action="store_true", help="measure again what this code has measured")
    parser.add_argument("--jobs", type=int, default=1, help="entries at a time, one core each")
    parser.add_argument("--limit", type=float, default=runner.TIME_LIMIT, help="seconds that one entry may take")
    parser.add_argument(
        "--peers", action="store_true", help="give the vision models to torch-pruning too, side by side"
    )
    parser.add_argument("--accept", action="store_true", help="make what was run the new baseline")
    return parser


def _line(row: Mapping[str, Any]) -> str:
    if row["status"] not in ("exact", "inexact"):
        return f"{row['status']:8} {row['name']}: {row['problem']}"
    text = f"{row['status']:8} {row['name']}: {row['free_params']:.1%} of params free, half {row['half_macs']:.0%} of MACs, "
    text += f"error {row['error']:.0e}, trace {row['trace_s']:.1f} s"
    return text + (f"; {row['problem']}" if row["problem"] else "")


def _peers_line(row: Mapping[str, Any]) -> str:
    if row["status"] != "compared":
        return f"{row['status']:8} {row['name']}: {row['problem']}"
    told = [
        f"{who} {side['problem']} ({side['stage']})" if side["problem"] else f"{who} {side['macs']:.0%} of MACs"
        for who, side in (("ours", row["ours"]), ("torch-pruning", row["theirs"]))
    ]
    return f"compared {row['name']}: {'; '.join(told)}"


def _write_pages(out: Path, rows: Mapping[str, Mapping[str, Any]], peers: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "zoo.md").write_text(pages.zoo_page(rows.values(), STRUCTURES, peers))
    (out / "unsupported.md").write_text(pages.unsupported_page(rows.values()))
    print(f"wrote {out / 'zoo.md'} and {out / 'unsupported.md'}")


def read_baseline() -> dict[str, str]:
    """Name -> status of the committed baseline."""
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {}


def _accept(rows: Mapping[str, Mapping[str, Any]]) -> None:
    baseline = read_baseline() | {n: r["status"] for n, r in rows.items() if r["status"] != "skipped"}
    BASELINE.write_text(json.dumps(dict(sorted(baseline.items())), indent=0) + "\n")


def _verdict(rows: Mapping[str, Mapping[str, Any]]) -> int:
    worse, broken = runner.regressions(rows, read_baseline()), runner.crashes(rows)
    exact = sum(r["status"] == "exact" for r in rows.values())
    tried = sum(r["status"] != "skipped" for r in rows.values())
    print(f"{exact} of {tried} exact")
    for name in worse:
        print(f"no longer exact: {name} ({rows[name]['status']}: {rows[name]['problem']})")
    for name in broken:
        print(f"{rows[name]['status']}: {name} ({rows[name]['problem']})")
    return int(bool(worse or broken))


if __name__ == "__main__":
    sys.exit(main())
