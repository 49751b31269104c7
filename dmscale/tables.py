"""Tables that one wants to read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from . import causes

if TYPE_CHECKING:
    from .space import SearchSpace


_CHOSEN = ("frozen by freeze=", "not named in only=")


def number(n: float, unit: str = "") -> str:
    """`n` with three digits and a decimal prefix: 4.09 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}".strip()


def space_table(space: SearchSpace) -> Group:
    """Every dimension with its size and what of the cost depends on it; every frozen one with the reason."""
    cost = space.cost()
    dimensions = Table(box=box.SIMPLE, title_justify="left", title_style="bold", title="What can shrink")
    dimensions.add_column(
        "dimension", overflow="fold"
    )  # in a narrow terminal names take two lines, and no number is cut
    dimensions.add_column("kind", no_wrap=True)
    for header in ("size", "MACs", "params"):
        dimensions.add_column(header, justify="right", no_wrap=True)
    for name, d in space.dimensions.items():
        share = space.shares[name]
        size = f"{d.size}" if d.multiple == 1 else f"{d.size} by {d.multiple}"
        dimensions.add_row(name, d.kind, size, f"{share['macs']:.1%}", f"{share['params']:.1%}")
    parts: list[Any] = [
        Text(
            f"{type(space.model).__name__}: {number(cost.macs)} MACs, {number(cost.params)} parameters, "
            f"{len(space.dimensions)} {'dimension' if len(space.dimensions) == 1 else 'dimensions'}, {len(space.frozen)} frozen"
        ),
        dimensions if space.dimensions else Text("\nNothing can shrink", style="bold"),
    ]
    if space.frozen:
        frozen = Table(box=box.SIMPLE, title_justify="left", title_style="bold", title="What cannot, and why")
        frozen.add_column("axis", overflow="fold")
        frozen.add_column("reason")
        chosen: dict[str, list[str]] = {}
        for name, reason in space.frozen.items():
            if reason in _CHOSEN:
                chosen.setdefault(reason, []).append(name)
            else:
                frozen.add_row(name, reason)
        for reason, names in chosen.items():  # the user knows which: no need to list them all
            frozen.add_row(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), reason)
        parts.append(frozen)
    if space.costs.uncounted:
        parts.append(Text("MACs not counted: " + ", ".join(space.costs.uncounted)))
    if space.trace.unread:
        few = ", ".join(space.trace.unread[:6]) + (" ..." if len(space.trace.unread) > 6 else "")
        parts.append(
            Text(f"Never read on the example, so exported as they are (a branch not taken would not fit): {few}")
        )
    parts += [Text(f"Note: {note}") for note in space.trace.notes]
    return Group(*parts, *_what_is_free(space))


def _what_is_free(space: SearchSpace) -> list[Text]:
    """The last lines: the share that is free, the largest causes of the rest, and what would free it."""
    free, found = causes.free_share(space), causes.find(space)
    lines = [Text(f"Free: {free['macs']:.1%} of the MACs, {free['params']:.1%} of the parameters")]
    for cause in found[:3]:
        few = ", ".join(cause.axes[:2]) + (f" and {len(cause.axes) - 2} more" if len(cause.axes) > 2 else "")
        held = f"{cause.macs:.1%} of the MACs, {cause.params:.1%} of the parameters"
        lines += [Text(f"Frozen along an axis: {held}: {cause.reason} ({few})"), Text(f"  {cause.remedy}")]
    return lines


def to_text(renderable: Any, width: int = 120) -> str:
    """A rich renderable as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
