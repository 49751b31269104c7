"""The pages that the zoo writes: docs/zoo.md and docs/unsupported.md."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .measure import NATURAL

Row = Mapping[str, Any]
Rows = Iterable[Row]

_INTRODUCTION = """# The zoo

Written by `make zoo` (`python -m benchmarks.zoo`); do not edit. Each model has random weights, made non-trivial so that a wrong
slice shows, and the smallest inputs that its code allows. It is traced with its trial, then {structures} random structures are
exported. *Exact* means that each exported model equals the gated one to a relative 1e-4 and that the predicted MACs equal those
that PyTorch counts, to the last one. Modules that get as many rows as values say (experts of a mixture that is looped over,
`space.routed`) are left out of that comparison on both sides. Times are of the wall: compare them within a row.

- **W / H / D / C**: dimensions offered, by kind: widths, heads, depths, choices (which experts or alternatives stay).
- **free**: the share of parameters and of MACs that goes when every width and the heads are at their minimum, with all blocks
  kept. What stays is what no width can reach: the first convolution's colours, the classes, one channel of each layer.
- **half**: MACs at half of every width and of the heads, as a share of the full model's.
- **error**: the largest over the structures, relative to the largest output.
- **read / trace / export**: seconds of a trace without its trial, with it, and the median of an export. **x meta**: read
  against the forward on meta tensors under an empty dispatch mode.
- **frozen**: where under 98% of the parameters are free, the cause that holds most of those that stay, with their share.
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
    parts = [_INTRODUCTION.format(structures=structures), summary(rows)]
    for family in dict.fromkeys(r["family"] for r in rows):
        parts.append(f"## {family}\n\n" + table([r for r in rows if r["family"] == family]))
    if missing:
        parts.append(f"## Not measured yet\n\n{len(missing)} entries: {', '.join(sorted(missing))}.\n")
    return "\n".join([*parts, *([peers] if peers else [])])


def ran(rows: Rows) -> list[Row]:
    """The rows that were measured to the end."""
    return [r for r in rows if r["status"] in ("exact", "inexact")]


def summary(rows: Sequence[Row]) -> str:
    """How many are exact, medians, and the causes of what stays."""
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
        "| cause of frozen axes | models | share of parameters that stay for it, median |", "| --- | ---: | ---: |",
        *_cause_lines(measured),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _cause_lines(rows: Sequence[Row], most: int = 15) -> list[str]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        for cause, value in row["causes"].items():
            if value >= 0.01 and not cause.startswith(NATURAL):
                shares.setdefault(cause, []).append(value)
    order = sorted(shares, key=lambda c: -sum(shares[c]))[:most]
    return [f"| {_cell(c)} | {len(shares[c])} | {statistics.median(shares[c]):.1%} |" for c in order]


def table(rows: Sequence[Row]) -> str:
    """A line a model."""
    lines = [
        "| model | params | MACs | W / H / D / C | free params | free MACs | half | error | MACs = | read | x meta | trace "
        "| export | frozen |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :-: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        if r["status"] not in ("exact", "inexact"):
            lines.append(f"| {r['name']} | | | | | | | | **{r['status']}** | | | | | {_cell(r['problem'])} |")
            continue
        kinds = " / ".join(str(r["dimensions"].get(k, 0)) for k in ("width", "heads", "depth", "choice"))
        lines.append(
            f"| {r['name']} | {short(r['params'])} | {short(r['macs'])} | {kinds} | {r['free_params']:.1%} | "
            f"{r['free_macs']:.1%} | {r['half_macs']:.1%} | {_error(r['error'])} | {'yes' if r['macs_equal'] else '**no**'} | "
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
    return f"{_cell(cause)}: {held:.1%}"


_PEERS = """## Beside torch-pruning {version}

The same models of timm and torchvision, with the same weights and inputs, in one process with one thread: half of every width
by either library, as its own user would ask for it. Ours is `space.export(space.uniform(0.5))`, trial and verification
included. Theirs is `BasePruner(model, inputs, pruning_ratio=0.5)` with group magnitude, which layers make the output being
all that it is told (no table of heads); it is stopped after {limit:.0f} s or at 8 GiB.

- **MACs**: of the smaller network, as a share of the full one's, by PyTorch's counter; a dash where there is none that runs.
- **error**: ours, exported against gated. Theirs, against the full network in which the removed channels are zero and
  normalisations see the others only; **bold** above 1e-4, empty where that could not be worked out.
- **heads**: the sum of `num_heads` over the modules, full > smaller.
- **graph**: seconds of our trace without its trial (every dimension, gate, size equation and cost) and of their dependency
  graph (which operator neighbours which), the median of up to three in turns. **ready**: seconds until a ratio can be asked for:
  our trace with its trial; their pruner, which is the graph and the groups. **whole**: from the model to the smaller one.
"""


def peers_section(rows: Rows, version: str, limit: float) -> str:
    """The side by side with torch-pruning, from the rows that `peers.compare` gives."""
    rows = sorted(rows, key=lambda r: (r["family"], r["name"]))
    pairs = [r for r in rows if "ours" in r]
    lines = [
        _PEERS.format(version=version, limit=limit), *_peers_summary(pairs), "",
        "| model | MACs, ours | theirs | error, ours | theirs | heads, ours | theirs | graph, ours | theirs | ready, ours "
        "| theirs | whole, ours | theirs | what stopped it |",
        "| --- |" + " ---: |" * 12 + " --- |",
    ]  # fmt: skip
    for r in rows:
        if "ours" not in r:
            lines.append(f"| {r['name']} |" + " |" * 12 + f" {r['status']}: {_cell(r['problem'])} |")
            continue
        both = (r["ours"], r["theirs"])
        cells = [f"{s['macs']:.1%}" if _works(s) else "-" for s in both]
        cells += ["" if s["error"] is None else _error(s["error"]) for s in both]
        cells += [f"{r['heads']} > {s['heads']}" if r["heads"] and _works(s) else "" for s in both]
        for key in ("graph_s", "ready_s", "whole_s"):
            cells += [f"{s[key]:.2f}" if s[key] else "-" for s in both]
        lines.append(f"| {r['name']} | {' | '.join(cells)} | {_stopped(r)} |")
    return "\n".join([*lines, ""])


def _peers_summary(pairs: Sequence[Row]) -> list[str]:
    both = [r for r in pairs if _works(r["ours"]) and _works(r["theirs"])]
    attention = [r for r in pairs if r["heads"]]

    def count(among: Sequence[Row], holds: Callable[[Row, Row], bool]) -> list[str]:
        """Of how many it holds: ours as (ours, theirs), theirs the other way round."""
        return [
            f"{sum(holds(r[a], r[b]) for r in among)} of {len(among)}"
            for a, b in (("ours", "theirs"), ("theirs", "ours"))
        ]

    def faster(key: str) -> Callable[[Row, Row], bool]:
        return lambda a, b: a[key] < b[key]

    table = {
        "a smaller network that runs": count(pairs, lambda a, _: _works(a)),
        "and computes what it should, to 1e-4": count(pairs, lambda a, _: _works(a) and _is_exact(a)),
        "fewer heads, of the models with heads": [
            f"{sum(_works(r[w]) and r[w]['heads'] < r['heads'] for r in attention)} of {len(attention)}"
            for w in ("ours", "theirs")
        ],
        "faster graph, of the models that both can do": count(both, faster("graph_s")),
        "faster until a ratio can be asked for, of these": count(both, faster("ready_s")),
        "faster to the smaller network, of these": count(both, faster("whole_s")),
        "MACs left, median of these": [f"{_median(both, lambda r: r[w]['macs']):.1%}" for w in ("ours", "theirs")],
    }
    stages = Counter(r["theirs"]["stage"] for r in pairs if not _works(r["theirs"]))
    return [
        "| | ours | torch-pruning |", "| --- | ---: | ---: |",
        *(f"| {what} | {ours} | {theirs} |" for what, (ours, theirs) in table.items()),
        "",
        f"The trace is below torch-pruning's graph on {table['faster graph, of the models that both can do'][0]} models that "
        "both can do. Where torch-pruning stopped: "
        + (", ".join(f"{stage} {n}" for stage, n in stages.most_common()) or "nowhere") + ".",
    ]  # fmt: skip


def _works(side: Row) -> bool:
    return not side["problem"]


def _is_exact(side: Row) -> bool:
    return side["error"] is not None and side["error"] <= 1e-4


def _error(error: float) -> str:
    return f"{error:.0e}" if error <= 1e-4 else f"**{error:.0e}**"


def _stopped(row: Row) -> str:
    told = [f"{who}, {row[who]['stage']}: {row[who]['problem']}" for who in ("ours", "theirs") if not _works(row[who])]
    return _cell("; ".join(([row["problem"]] if row["problem"] else []) + told))


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
