"""The zoo's vision models beside torch-pruning: each library asked for half of every width, as its own user would.

Ours is `space.export(space.uniform(0.5))`.  Theirs is `BasePruner(model, inputs, importance, pruning_ratio=0.5,
ignored_layers=...)` with group magnitude and nothing else than the layers that make the model's output to ignore; which
these are is read off our trace.  Both run in one process, with one thread, on the same random weights.

What theirs computes is compared with the full network in which each of its pruned layers stands in the place of the full
one, takes the channels that it was left with, and gives zero for the others: what the original gives with these channels
zeroed, and normalised over those that stay.  It differs where layers were pruned that do not belong together.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import math
import resource
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dmscale
from dmscale import axes, certify, kernels, running

from ..limits import within
from .entry import Entry
from .measure import counted_macs, non_trivial, said, timed

RATIO = 0.5
TIME_LIMIT = 30.0
"""Seconds that torch-pruning may take on one model: it either takes a few, or does not end."""
MEMORY_LIMIT = 8 << 30
"""Bytes that the process may have."""
LIBRARIES = ("timm", "torchvision")


@dataclass
class Side:
    """What one library gave.

    problem: why there is no pruned network that runs; empty if there is one.
    stage: what it was doing: 'trace' and 'export', or 'graph', 'groups', 'ranking', 'pruning', 'forward'.
    graph_s: seconds of the graph alone: a trace without its trial, which gives every dimension and cost; theirs gives
        what neighbours what.
    ready_s: seconds until a ratio can be asked for: a trace with its trial; a pruner, which is graph and groups.
    whole_s: from the model to the smaller one: trace, trial and verified export; pruner and step.
    macs: of the smaller network, as a share, by PyTorch's counter.
    error: relative; None where it could not be compared.
    heads: the sum of all `num_heads` in the smaller network.
    """

    problem: str = "not tried"
    stage: str = ""
    graph_s: float = 0.0
    ready_s: float = 0.0
    whole_s: float = 0.0
    macs: float = 1.0
    error: float | None = None
    heads: int = 0


@dataclass
class Pair:
    """One model: `heads` of the full one, what either library gave; `status` is 'compared' if both have been tried."""

    name: str
    family: str
    status: str = "compared"
    problem: str = ""
    heads: int = 0
    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)


def entries(all_entries: list[Entry]) -> list[Entry]:
    """Those that are compared."""
    return [e for e in all_entries if e.name.partition(":")[0] in LIBRARIES]


def is_installed() -> bool:
    """Whether torch-pruning is."""
    return importlib.util.find_spec("torch_pruning") is not None


def version() -> str:
    """Of torch-pruning; the number in its module is not kept up to date."""
    return importlib.metadata.version("torch-pruning")


def warm_up() -> None:
    """What is imported and compiled at a first use, once for all the processes that are forked."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    pair = Pair("", "")
    for _ in _compare(pair, net.eval(), torch.randn(1, 3, 8, 8)):
        pass
    assert not pair.ours.problem and not pair.theirs.problem, pair


def compare(entry: Entry) -> Iterator[dict[str, Any]]:
    """Try both libraries on one entry; yields the row as it becomes known, for the case that the process is ended."""
    warnings.simplefilter("ignore")
    pair = Pair(entry.name, entry.family)
    torch.manual_seed(0)
    try:
        model, inputs = entry.build()
    except Exception as error:  # a row of the table, whatever it was
        pair.status, pair.problem = "crashed", said(error)
    else:
        for _ in _compare(pair, non_trivial(model), inputs):
            yield asdict(pair)
    yield asdict(pair)


def _compare(pair: Pair, model: nn.Module, inputs: Any) -> Iterator[None]:
    pair.heads = heads_of(model)
    full = counted_macs(model, inputs)
    with _recorded(pair.ours):
        ignored = _ours(pair.ours, model, inputs, full)
    yield
    if pair.ours.problem:
        ignored = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    pair.theirs.stage = "graph"
    yield
    with _recorded(pair.theirs), _limited():
        _graphs(pair, model, inputs)
        _theirs(pair.theirs, model, inputs, full, ignored)


@contextlib.contextmanager
def _recorded(side: Side) -> Iterator[None]:
    try:
        yield
        side.problem = ""
    except Exception as error:  # whatever another library raises on a network that it cannot handle
        side.problem = said(error)


def _ours(side: Side, model: nn.Module, inputs: Any, full: int) -> list[str]:
    """Fills in our side; returns the layers that make the model's output."""
    start, side.stage = time.perf_counter(), "trace"
    space = dmscale.trace(model, inputs)
    side.ready_s = time.perf_counter() - start
    side.stage, structure = "export", space.uniform(RATIO)
    small = space.export(structure)
    side.whole_s = time.perf_counter() - start
    side.error = certify.compare(space.gate(structure), small, inputs)
    side.macs, side.heads = counted_macs(small, inputs) / full, heads_of(small)
    return [
        name for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and _makes_output(space.trace.slots, name)
    ]  # fmt: skip


def _makes_output(slots: Any, name: str) -> bool:
    rows = slots.get(f"{name}.weight", ((),))[0]
    return any(r.startswith("an axis of the model's output") for r in axes.reasons(rows))


def _graphs(pair: Pair, model: nn.Module, inputs: Any, most: int = 3, seconds: float = 3.0) -> None:
    """Times both graphs in turns, the median of up to `most` while they take less than `seconds`."""
    import torch_pruning as tp

    mine = copy.deepcopy(model)
    ours, theirs, start = [], [], time.perf_counter()
    try:
        while not theirs or (len(theirs) < most and time.perf_counter() - start < seconds):
            if not pair.ours.problem:
                kernels.forget()  # a first trace
                ours.append(timed(lambda: dmscale.trace(model, inputs, verify=False))[0])
            theirs.append(timed(lambda: tp.DependencyGraph().build_dependency(mine, _given(inputs)))[0])
    finally:  # ours counts where theirs fails
        pair.ours.graph_s, pair.theirs.graph_s = (statistics.median(took) if took else 0.0 for took in (ours, theirs))


def _theirs(side: Side, model: nn.Module, inputs: Any, full: int, ignored: list[str]) -> None:
    import torch_pruning as tp

    small = copy.deepcopy(model)
    names = {m: n for n, m in small.named_modules()}
    start, side.stage = time.perf_counter(), "groups"
    pruner = tp.pruner.BasePruner(
        small, _given(inputs), importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=RATIO,
        ignored_layers=[small.get_submodule(n) for n in ignored],
    )  # fmt: skip
    side.ready_s, gone = time.perf_counter() - start, Gone()
    side.stage = "ranking"
    for group in pruner.step(interactive=True):
        side.stage = "pruning"
        for dep, indices in group:
            gone.note(pruner.DG, dep, indices, names)
        group.prune()
    side.whole_s = time.perf_counter() - start
    side.stage = "forward"
    got, expected = running.outputs(small, inputs), running.outputs(model, inputs)
    if [t.shape for t in got] != [t.shape for t in expected]:
        raise ValueError(
            f"gives {[tuple(t.shape) for t in got][:2]}, the full one {[tuple(t.shape) for t in expected][:2]}"
        )
    side.macs, side.heads = counted_macs(small, inputs) / full, heads_of(small)
    with contextlib.suppress(Exception):  # a kind of layer that has no place in the full network: not compared
        side.error = running.relative_error(got, running.outputs(gone.zeroed(model, small), inputs))


def _given(inputs: Any) -> Any:
    return inputs if isinstance(inputs, (Tensor, dict)) else tuple(inputs)


def heads_of(model: nn.Module) -> int:
    """The sum of `num_heads` over all modules that have it."""
    return sum(n for m in model.modules() if isinstance(n := getattr(m, "num_heads", 0), int))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """An error inside after `TIME_LIMIT` seconds, or at an allocation that takes the process beyond `MEMORY_LIMIT`."""

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, hard))
    try:
        with within(TIME_LIMIT):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# -- what theirs computes ---------------------------------------------------------------------------------------------


class Gone:
    """Which inputs and outputs of which layers torch-pruning has taken away, numbered as in the full network."""

    def __init__(self) -> None:
        self.left: dict[str, dict[str, list[int]]] = {}  # module -> 'ins' and 'outs' -> the channels that it has
        self.total: dict[str, int] = {}  # module -> its outputs in the full network
        self.speaker: dict[str, str] = {}  # module -> of several parameters that lose the same, the one that counts

    def note(self, graph: Any, dep: Any, indices: Any, names: dict[nn.Module, str]) -> None:
        """One step of a group, before it is made: its indices are those of the layer as it is by then."""
        target = dep.target.module
        if isinstance(target, nn.Parameter):
            owner, _, parameter = graph._param_to_name[target].rpartition(".")
            alone = next(graph.model.get_submodule(owner).children(), None) is None
            name = owner if alone and self.speaker.setdefault(owner, parameter) == parameter else None
        else:
            name = names.get(target)
        if name is None:  # the layers behind a parameter among others leave out what it had there
            return
        layer, pruner = self.left.setdefault(name, {}), graph.get_pruner_of_module(target)
        taken = {int(i) for i in indices}
        for side, concerned, count in (
            ("outs", graph.is_out_channel_pruning_fn, pruner.get_out_channels),
            ("ins", graph.is_in_channel_pruning_fn, pruner.get_in_channels),
        ):
            if concerned(dep.handler):
                before = layer.get(side) or list(range(count(target)))
                if side == "outs":
                    self.total.setdefault(name, len(before))
                layer[side] = [c for i, c in enumerate(before) if i not in taken]

    def zeroed(self, model: nn.Module, small: nn.Module) -> nn.Module:
        """A copy of `model` whose layers compute what those of `small` do, on the channels that these have.

        Raises:
            NotImplementedError: a layer was pruned of which it is not known where its channels are.
        """
        twin = copy.deepcopy(model)
        for name, left in self.left.items():
            whole, part = twin.get_submodule(name), small.get_submodule(name)
            kept = {side: torch.tensor(channels) for side, channels in left.items()}
            if isinstance(whole, nn.MultiheadAttention):
                _zero_attention(whole, kept["outs"])
            else:
                whole.forward = functools.partial(_on_a_part, part, kept, self.total.get(name, 0))
        return twin


def _on_a_part(part: nn.Module, kept: Mapping[str, Tensor], total: int, x: Tensor) -> Tensor:
    """What `part` gives on the inputs that it has, among zeros."""
    if isinstance(part, nn.Linear):
        dim = -1
    elif isinstance(part, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)):
        dim = 1
    else:  # a normalisation or a scale of somebody's own
        places = [i for i, n in enumerate(x.shape) if i and n == total]
        if not places or not isinstance(part, nn.LayerNorm) and len(places) > 1:
            raise NotImplementedError(f"{type(part).__name__} of {total} channels, given {tuple(x.shape)}")
        dim = places[-1]
    y = part(x.index_select(dim, kept["ins"]) if "ins" in kept else x)
    if "outs" not in kept:
        return y
    shape = list(y.shape)
    shape[dim] = total
    return y.new_zeros(shape).index_copy(dim, kept["outs"], y)


@torch.no_grad()
def _zero_attention(whole: nn.MultiheadAttention, kept: Tensor) -> None:
    """In place: only the `kept` channels go in, through every projection, and out; scaled by the size of what is left."""
    size = whole.embed_dim
    mask = torch.zeros(size).index_fill(0, kept, 1.0)
    rows = torch.cat([mask * math.sqrt(size / len(kept)), mask, mask])
    whole.in_proj_weight.mul_(rows[:, None] * mask)
    whole.out_proj.weight.mul_(mask[:, None] * mask)
    if whole.in_proj_bias is not None:
        whole.in_proj_bias.mul_(rows)
        whole.out_proj.bias.mul_(mask)
