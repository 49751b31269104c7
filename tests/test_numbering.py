"""Numbers of elements: an axis whose elements are called by number may shrink where renumbering changes nothing.

The law of every operator that takes numbers: keep some elements of the axis, all those among them that are called; give
sliced tensors and new numbers to the operator, and it gives what slicing and renumbering its results gives.
"""

from __future__ import annotations

import pytest
import torch
from nets import assert_same, fingerprint, non_trivial
from patterns import PATTERNS
from torch import Tensor, nn

import dmscale
from dmscale import axes, gates
from dmscale.numbering import Said
from dmscale.tracer import Tracer

aten = torch.ops.aten
E = 7
CALLED = torch.tensor([[5, 1], [1, 6], [5, 6], [2, 1]])  # of 7 elements: 0, 3 and 4 are never called
SCORES, WEIGHTS, ROWS = torch.randn(4, E), torch.randn(E, 4, 8), torch.randn(8, 4)


def all_numbers(n: int) -> Tensor:
    return torch.arange(n)


def ends(i: Tensor, n: int) -> Tensor:
    return aten.cumsum(aten.bincount(i.flatten(), None, n), 0, dtype=torch.int32)


# tensors that have the axis (first or last), what they and the numbers become; n is the size of the axis
ALLOWED = {
    "gather": lambda i, n, s, w, r: aten.gather(s, 1, i),
    "index": lambda i, n, s, w, r: aten.index(w, [i]),
    "index beside another": lambda i, n, s, w, r: aten.index(s, [torch.arange(4)[:, None], i]),
    "index_select": lambda i, n, s, w, r: aten.index_select(w, 0, i[0]),
    "embedding": lambda i, n, s, w, r: aten.embedding(w.flatten(1), i),
    "scatter": lambda i, n, s, w, r: aten.scatter(s, 1, i, 0.5),
    "scatter of scores": lambda i, n, s, w, r: aten.scatter(aten.zeros_like(s), 1, i, aten.gather(s, 1, i)),
    "scatter in place": lambda i, n, s, w, r: aten.scatter_(aten.clone(s), 1, i, float("-inf")),
    "sort": lambda i, n, s, w, r: aten.sort(aten.view(i, [-1])),
    "cat": lambda i, n, s, w, r: aten.cat([i, aten.expand(aten.unsqueeze(aten.select(i, 1, 0), 1), [4, 3])], 1),
    "stack": lambda i, n, s, w, r: aten.stack([i, i]),
    "picked by others": lambda i, n, s, w, r: aten.index(i, [torch.tensor([2, 0])]),
    "compared": lambda i, n, s, w, r: aten.lt(aten.slice(i, 1, 0, 1), aten.slice(i, 1, 1, 2)),
    "found": lambda i, n, s, w, r: aten.nonzero(aten.gt(aten.bincount(i.flatten(), None, n), 0)),
    "bincount": lambda i, n, s, w, r: aten.bincount(i.flatten(), None, n),
    "weighted": lambda i, n, s, w, r: aten.bincount(i.flatten(), aten.gather(s, 1, i).flatten(), n),
    "histc": lambda i, n, s, w, r: aten.histc(aten._to_copy(i, dtype=torch.float32), n, 0, n - 1),
    "ends": lambda i, n, s, w, r: ends(i, n),
    "rows of each": lambda i, n, s, w, r: aten._grouped_mm(r, w, ends(i, n)),
}


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("keep", [[1, 2, 5, 6], [0, 1, 2, 4, 5, 6]])
def test_renumbering_and_running_equals_running_and_renumbering(name, keep):
    function = ALLOWED[name]
    with Tracer() as tracer:
        i = tracer.watch(CALLED.clone())
        s, w, r = (tracer.watch(t.clone()) for t in (SCORES, WEIGHTS, ROWS))
        axis = tracer.dims(w)[0]
        axes.unify(axis, tracer.dims(s)[1])
        tracer.value(i).said = Said(axis)
        whole = function(i, E, s, w, r)
    assert axes.is_free(axis), axes.reasons(axis)
    results = whole if isinstance(whole, (tuple, list)) else [whole]
    kept = torch.tensor(keep)
    new = torch.full((E,), -1)
    new[kept] = torch.arange(len(keep))
    masks = {axes.atoms(axis)[0]: torch.isin(torch.arange(E), kept)}
    part = function(new[CALLED], len(keep), SCORES[:, kept], WEIGHTS[kept], ROWS)
    for full, small in zip(results, part if isinstance(part, (tuple, list)) else [part]):
        value = tracer.value(full)
        full = new[full] if value.said.numbers is not None else full
        for position, dim in enumerate(value.dims):
            full = full.index_select(position, axes.kept(dim, masks).nonzero()[:, 0])
        assert torch.allclose(full.float(), small.float(), atol=1e-5)


def test_an_equal_pair_of_numbers_is_one_hot():
    with Tracer() as tracer:
        i, every = tracer.watch(CALLED.clone()), tracer.watch(all_numbers(E))
        axis, (own,) = axes.axis(E), tracer.dims(every)
        tracer.value(i).said, tracer.value(every).said = Said(axis), Said(own)
        equal = aten.eq(aten.unsqueeze(i, -1), every)
        doubled = aten.mul(aten._to_copy(equal, dtype=torch.int64), 2)
        counts = aten.sum(doubled, [0, 1])
        aten.sum(doubled, [2])
    assert axes.same(axis, own) and axes.is_free(axis)
    assert [axes.same(d, axis) for d in tracer.value(counts).said.zero] == [True]
    assert not tracer.record.normalisations[-1].dims  # nothing has to be masked for this sum


REFUSED = {
    "arithmetic": lambda i, s: i * 2,
    "a literal": lambda i, s: i == 3,
    "a table of numbers": lambda i, s: i[..., None] == torch.arange(E),
    "float": lambda i, s: i.float() / 7,
    "bins of another width": lambda i, s: torch.histc(i.float(), E, 0, E),
    "where others end": lambda i, s: torch.searchsorted(i.flatten().sort()[0], i),
    "which are not zero": lambda i, s: i.bool(),
    "other bits": lambda i, s: i.view(torch.int32),
    "written over": lambda i, s: i.scatter(1, torch.zeros(4, 1, dtype=torch.int64), 0),
    "read by Python": lambda i, s: i[0, 0].item(),
    "written at": lambda i, s: torch.zeros(E).index_add(0, i[0], torch.ones(2)),
    "elements of another axis": lambda i, s: torch.randn(9)[i],
    "mixed with others": lambda i, s: torch.cat([i, torch.zeros(4, 1, dtype=torch.int64)], 1),
    "an operator without a rule": lambda i, s: i.nonzero(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_are_used_for_anything_else_fix_their_axis(name):
    with Tracer() as tracer:
        s = tracer.watch(SCORES.clone())
        i = s.topk(2)[1]
        assert axes.is_free(tracer.dims(s)[1])
        REFUSED[name](i, s)
    assert not axes.is_free(tracer.dims(s)[1])


def test_there_are_as_many_as_are_chosen():
    with Tracer() as tracer:
        s = tracer.watch(SCORES.clone())
        first = s.argmax(1, keepdim=True)
        rest = s.scatter(1, first, float("-inf"))
        rest.masked_fill(rest > 3, 0.0).topk(2)
        all_of_it = tracer.watch(SCORES.clone())
        all_of_it.topk(E)
    assert sorted(n for _, n in tracer.record.least) == [1, 3]
    assert not axes.is_free(tracer.dims(all_of_it)[1])


# -- mixtures of experts ----------------------------------------------------------------------------------------------

CHOOSING = {
    "experts_grouped": "1 experts", "experts_by_logits": "1 experts", "experts_one_by_one": "1 experts",
    "einsum_experts": "1 experts", "experts_one_hot": "1.router", "experts_compared": "1.router",
    "experts_scattered": "1.router", "experts_switch": "1.router", "codebook": "1.book",
}  # fmt: skip


def traced(name: str):
    torch.manual_seed(0)
    model, inputs = PATTERNS[name]()
    return non_trivial(model), inputs, dmscale.trace(model, inputs)


@pytest.mark.parametrize("name", CHOOSING)
def test_experts_have_a_name_and_stay_as_many_as_are_chosen(name):
    model, inputs, space = traced(name)
    d = space.dimensions[CHOOSING[name]]
    least = 1 if name in ("codebook", "experts_switch") else 2
    assert (d.kind, d.size, d.lowest) == ("width", 7 if name == "codebook" else 9, least)
    small = space.export(space.structure({d.name: 1}))[1]
    table = small.book.weight if name == "codebook" else small.down
    assert table.shape[0] == least
    if name not in ("codebook", "einsum_experts"):  # these read no number of elements
        assert small.num_experts == least


def test_groups_of_experts_have_enough_in_those_that_are_chosen():
    model, inputs, space = traced("experts_in_groups")
    groups, each = (space.dimensions[f"1 {n}"] for n in ("expert groups", "experts per group"))
    assert (groups.lowest, each.lowest) == (2, 2)
    small = space.export(space.structure({groups.name: 2, each.name: 2}))
    assert (small[1].groups, small[1].num_experts, small[1].correction.shape) == (2, 4, (4,))


@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_used_matters_and_a_search_removes_experts(name, tmp_path):
    """The importance of an expert is made of the gradient of its mask: not zero for those that some row chose."""
    model, inputs, space = traced(name)
    before, d = fingerprint(model), space.dimensions[CHOOSING[name]]
    search = dmscale.Search(space, "45% params", 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    search.attach(optimizer)
    slopes = []
    while not search.done:
        search.model(inputs).square().mean().backward()
        slopes.append(gates.masks_of(search.model).widths[d.axes[0]].grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    assert bool(slopes[0][used(model, name, inputs)].all())
    small = search.export()
    assert_same(before, fingerprint(model))
    assert sum(p.numel() for p in small.parameters()) <= 0.45 * sum(p.numel() for p in model.parameters())
    dmscale.save(small, tmp_path / "small.safetensors")
    loaded = dmscale.load(tmp_path / "small.safetensors", lambda: PATTERNS[name]()[0])
    assert torch.equal(loaded.eval()(inputs), small(inputs))


def used(model, name, inputs) -> Tensor:
    """The numbers of the experts that any row chooses."""
    x = model[0](inputs)
    if name == "codebook":
        return torch.cdist(x, model[1].book.weight).argmin(-1).unique()
    routed = model[1].route(model[1], model[1].router(x))
    return routed[1].unique() if isinstance(routed, tuple) else routed.any(0).nonzero()[:, 0]


class Strongest(nn.Module):
    """The sum of the three largest of a few channels."""

    def __init__(self):
        super().__init__()
        self.make = nn.Linear(5, 9)

    def forward(self, x):
        return self.make(x).topk(3)[0].sum(-1)


def test_a_mask_learns_from_what_is_chosen_where_nothing_else_reads_it():
    """Against finite differences, at masks that are soft."""
    model, x = Strongest(), torch.randn(6, 5)
    space = dmscale.trace(model, x)
    d = space.dimensions["make"]
    assert (d.size, d.lowest) == (9, 3)

    def result(mask):
        gated = gates.attach(model, space.sites, {d.axes[0]: mask}, {}, trainable=True)
        return gated(x).sum(), gates.masks_of(gated).widths[d.axes[0]]

    mask = torch.rand(9) * 0.5 + 0.5
    total, leaf = result(mask)
    total.backward()
    for i in range(9):
        step = torch.zeros(9)
        step[i] = 1e-2
        slope = (result(mask + step)[0] - result(mask - step)[0]) / 2e-2
        assert float(leaf.grad[i]) == pytest.approx(float(slope), rel=1e-2, abs=1e-3)


class Told(nn.Module):
    """Experts in a table; `handed_out` returns the numbers too, else those who chose number 2 get something more."""

    def __init__(self, handed_out=False):
        super().__init__()
        self.handed_out, self.router = handed_out, nn.Linear(5, 4)
        self.table = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x):
        weight, number = self.router(x).softmax(-1).topk(2)
        out = torch.einsum("td,tkdh,tk->th", x, self.table[number], weight)
        return (out, number) if self.handed_out else out + (number == 2).sum(-1, keepdim=True)


@pytest.mark.parametrize("handed_out, reason", [(False, "numbers of its elements"), (True, "output")])
def test_experts_that_are_told_apart_by_a_literal_or_handed_out_stay(handed_out, reason):
    space = dmscale.trace(non_trivial(Told(handed_out)), torch.randn(8, 5))
    assert reason in space.frozen["experts"], space.frozen
    assert not space.dimensions


def test_new_experts_would_be_chosen():
    model, inputs = PATTERNS["codebook"]()
    kept = dmscale.expand(model, inputs, width=2).dmscale_expansion["kept"]
    assert "chosen" in kept["1.book"]
