"""The pages that the zoo writes: docs/zoo.md and docs/unsupported.md."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = Iterable[Row]

_INTRODUCTION = """# The zoo

Written by `make zoo` (`python -m benchmarks.zoo`); do not edit. Each model has random weights, made non-trivial so that a wrong
slice shows, and the smallest inputs that its code allows. It is traced with its trial, then {structures} random structures are
exported. *Exact* means that each exported model equals the gated one to a relative 1e-4 and that the predicted MACs equal those
that PyTorch counts, to the last one.

- **W / H / D**: dimensions offered, by kind: widths, heads, depths.
- **free**: the share of parameters and of MACs that goes when every width and the heads are at their minimum, with all blocks
  kept. What stays is what no width can reach: the first convolution's colours, the classes, one channel of each layer.
- **half**: MACs at half of every width and of the heads, as a share of the full model's.
- **error**: the largest over the structures, relative to the largest output.
- **read / trace / export**: seconds of a trace without its trial, with it, and the median of an export. **x meta**: read
  against the forward on meta tensors under an empty dispatch mode.
- **frozen**: the cause that holds most parameters where under 98% are free, with the share that it indexes.
"""


def zoo_page(rows: Rows, structures: int, peers: str = "", missing: Sequence[str] = ()) -> str:
    """docs/zoo.md from the rows of a whole run.

    Args:
        rows: as `measure.Row.to_dict` gives them.
        structures: random structures tried on each model.
        peers: a section that compares with other libraries, in Markdown.
        missing: entries of the list that have no row.
    """
    rows = sorted(rows, key=lambda r: (r["family"], r["name"]))
    parts = [_INTRODUCTION.format(structures=structures), _summary(rows)]
    for family in dict.fromkeys(r["family"] for r in rows):
        parts.append(f"## {family}\n\n" + _table([r for r in rows if r["family"] == family]))
    if missing:
        parts.append(f"## Not measured yet\n\n{len(missing)} entries: {', '.join(sorted(missing))}.\n")
    return "\n".join([*parts, *([peers] if peers else [])])


def ran(rows: Rows) -> list[Row]:
    """The rows that were measured to the end."""
    return [r for r in rows if r["status"] in ("exact", "inexact")]


def _summary(rows: Sequence[Row]) -> str:
    tried = [r for r in rows if r["status"] != "skipped"]
    count = Counter(r["status"] for r in tried)
    measured = ran(rows)
    lines = [
        "## Summary\n",
        f"**{count['exact']} of {len(tried)} models exact ({share(count['exact'], len(tried))}).** "
        + ", ".join(f"{count[s]} {s}" for s in ("inexact", "refused", "crashed", "timeout"))
        + (f"; {len(rows) - len(tried)} skipped (a package is missing)." if len(rows) > len(tried) else "."),
        "",
        "| median over the models | |", "| --- | ---: |",
        f"| parameters free | {_median(measured, lambda r: r['free_params']):.1%} |",
        f"| MACs free | {_median(measured, lambda r: r['free_macs']):.1%} |",
        f"| MACs at half width | {_median(measured, lambda r: r['half_macs']):.1%} |",
        f"| models with 98% of the parameters free or more | {_share_of(measured, lambda r: r['free_params'] >= 0.98)} |",
        f"| models with under 90% free | {_share_of(measured, lambda r: r['free_params'] < 0.9)} |",
        f"| seconds of a trace with its trial | {_median(measured, lambda r: r['trace_s']):.2f} |",
        f"| trace without its trial, against the meta forward | {_median(_on_meta(measured), _ratio):.1f} x |",
        f"| seconds of an export | {_median(measured, lambda r: r['export_s']):.2f} |",
        "",
        "| cause of frozen axes | models | share of parameters it indexes there, median |", "| --- | ---: | ---: |",
        *_cause_lines(measured),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _cause_lines(rows: Sequence[Row], most: int = 15) -> list[str]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        for cause, value in row["causes"].items():
            if value >= 0.01:
                shares.setdefault(cause, []).append(value)
    order = sorted(shares, key=lambda c: -sum(shares[c]))[:most]
    return [f"| {_cell(c)} | {len(shares[c])} | {statistics.median(shares[c]):.1%} |" for c in order]


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | params | MACs | W / H / D | free params | free MACs | half | error | MACs = | read | x meta | trace | export "
        "| frozen |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :-: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        if r["status"] not in ("exact", "inexact"):
            lines.append(f"| {r['name']} | | | | | | | | **{r['status']}** | | | | | {_cell(r['problem'])} |")
            continue
        kinds = " / ".join(str(r["dimensions"].get(k, 0)) for k in ("width", "heads", "depth"))
        error = f"{r['error']:.0e}" if r["error"] <= 1e-4 else f"**{r['error']:.0e}**"
        lines.append(
            f"| {r['name']} | {short(r['params'])} | {short(r['macs'])} | {kinds} | {r['free_params']:.1%} | "
            f"{r['free_macs']:.1%} | {r['half_macs']:.1%} | {error} | {'yes' if r['macs_equal'] else '**no**'} | "
            f"{r['read_s']:.2f} | {f'{_ratio(r):.1f}' if r['forward_s'] else '-'} | {r['trace_s']:.2f} | "
            f"{r['export_s']:.2f} | {_frozen(r)} |"
        )
    return "\n".join([*lines, ""])


def _frozen(row: Row) -> str:
    if row["status"] == "inexact":
        return _cell(row["problem"])
    if row["free_params"] >= 0.98 or not row["causes"]:
        return ""
    cause, held = next(iter(row["causes"].items()))
    return f"{_cell(cause)}: {held:.0%}"


def unsupported_page(rows: Rows) -> str:
    """docs/unsupported.md: operators that the zoo met without a rule, and what each froze."""
    models: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for operator in row.get("unknown", {}):
            models.setdefault(operator, {})[row["name"]] = row["frozen_by_unknown"].get(operator, [])
    lines = [
        "# Operators without a rule", "",
        "Written by `make zoo`; do not edit. An operator without a rule freezes the axes that pass through it and nothing else; "
        "its MACs are not counted. These are the ones that the models of the zoo met.", "",
    ]  # fmt: skip
    if not models:
        return "\n".join([*lines, "None: every operator that the zoo ran has a rule.", ""])
    lines += ["| operator | models | dimensions frozen by it |", "| --- | --- | --- |"]
    for operator in sorted(models):
        met = models[operator]
        frozen = sum(len(names) for names in met.values())
        some = [f"{n} of {m}" for m, names in met.items() for n in names[:1]][:3]
        told = f"{frozen}: {', '.join(some)}" + (" ..." if frozen > len(some) else "") if frozen else "none"
        named = ", ".join(list(met)[:5]) + (f" and {len(met) - 5} more" if len(met) > 5 else "")
        lines.append(f"| `{operator}` | {named} | {told} |")
    return "\n".join([*lines, ""])


def share(part: int, whole: int) -> str:
    """`part` of `whole` as a percentage."""
    return f"{part / whole:.1%}" if whole else "-"


def short(n: float) -> str:
    """A large number in three digits: 25.6M."""
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


def _share_of(rows: Sequence[Row], holds: Callable[[Row], bool]) -> str:
    return f"{sum(holds(r) for r in rows)} of {len(rows)}"


def _median(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return statistics.median(map(value, rows)) if rows else float("nan")


def _on_meta(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["forward_s"]]


def _ratio(row: Row) -> float:
    return row["read_s"] / row["forward_s"]


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]
