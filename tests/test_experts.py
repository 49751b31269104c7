"""Experts in lists: modules that go with the elements of an axis, found in Python's loops and proven by the trial."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, counted_macs, difference, fingerprint, non_trivial, num_params, outputs
from torch import nn

import dmscale

N, CHOSEN, WIDTH = 6, 2, 12


class Mixture(nn.Module):
    """Six experts of which `mix` makes one output; a width before and behind."""

    def __init__(self):
        super().__init__()
        self.num_experts = N
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.router = nn.Linear(WIDTH, N)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8 + i), nn.GELU(), nn.Linear(8 + i, WIDTH)) for i in range(N)
        )

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.mix(x))


class Stacked(Mixture):
    def mix(self, x):
        scores = self.router(x).softmax(-1)
        return (torch.stack([expert(x) for expert in self.experts], -2) * scores.unsqueeze(-1)).sum(-2)


class Contracted(Mixture):
    def mix(self, x):
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return torch.einsum("te,ted->td", self.router(x).softmax(-1), every)


class Joined(Mixture):
    def mix(self, x):
        every = torch.cat([expert(x).unsqueeze(1) for expert in self.experts], 1)
        return (every * self.router(x).softmax(-1).unsqueeze(-1)).sum(1)


class Sliced(Mixture):
    def mix(self, x):
        scores, out = self.router(x).softmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + scores[:, i : i + 1] * expert(x)
        return out


class Counted(Mixture):
    """The loop counts up to a number that the module holds."""

    def mix(self, x):
        scores = self.router(x).softmax(-1)
        return sum(scores[:, i, None] * self.experts[i](x) for i in range(self.num_experts))


class Unbound(Mixture):
    def mix(self, x):
        return sum(s[:, None] * expert(x) for s, expert in zip(self.router(x).softmax(-1).unbind(-1), self.experts))


class InPieces(Mixture):
    def mix(self, x):
        return sum(s * expert(x) for s, expert in zip(self.router(x).softmax(-1).split(1, -1), self.experts))


class Independent(Mixture):
    """No softmax, and none is chosen: with a score nothing else changes, so what the expert gives is masked."""

    def mix(self, x):
        scores = self.router(x).sigmoid()
        return sum(scores[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Sparse(Mixture):
    """Scores that are zero for all but those chosen, and noisy in training."""

    def mix(self, x):
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits)
        best, number = logits.topk(CHOSEN, -1)
        scores = torch.zeros_like(logits).scatter(-1, number, best.softmax(-1))
        return sum(scores[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Measured(Mixture):
    """As many classes as the list is long."""

    def mix(self, x):
        best, number = self.router(x).softmax(-1).topk(CHOSEN, -1)
        scores = (F.one_hot(number, num_classes=len(self.experts)) * best[..., None]).sum(1)
        return sum(scores[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class InTwoLists(Mixture):
    def __init__(self):
        super().__init__()
        del self.experts
        self.up = nn.ModuleList(nn.Linear(WIDTH, 8 + i) for i in range(N))
        self.down = nn.ModuleList(nn.Linear(8 + i, WIDTH) for i in range(N))

    def mix(self, x):
        scores = self.router(x).softmax(-1)
        return sum(scores[:, i, None] * self.down[i](self.up[i](x).relu()) for i in range(len(self.up)))


class Alternatives(Mixture):
    """Different operations, of which parameters tell how much each counts (DARTS)."""

    def __init__(self):
        super().__init__()
        del self.router
        self.alpha = nn.Parameter(torch.randn(N))
        self.experts[1], self.experts[4] = nn.Linear(WIDTH, WIDTH), nn.Identity()

    def mix(self, x):
        return sum(a * operation(x) for a, operation in zip(self.alpha.softmax(0), self.experts))


class Selective(Mixture):
    """The scores are made of the sum of what all give: selective kernels."""

    def __init__(self):
        super().__init__()
        del self.router
        self.squeeze = nn.Linear(WIDTH, 7)
        self.scorers = nn.ModuleList(nn.Linear(7, WIDTH) for _ in range(N))

    def mix(self, x):
        every = [expert(x) for expert in self.experts]
        short = 9 * self.squeeze(sum(every))
        scores = torch.stack([scorer(short) for scorer in self.scorers], 1).softmax(1)
        return (torch.stack(every, 1) * scores).sum(1)


class Edges(nn.Module):
    """Operations at several places, which share the parameters that tell how much each counts (the supernet of DARTS)."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(N))
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.edges = nn.ModuleList(Edge() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        weights = self.alpha.softmax(0)
        left, right, both = self.edges
        y = left(x, weights) + right(x, weights)
        return self.last(both(y.relu(), weights))


class Edge(nn.Module):
    def __init__(self):
        super().__init__()
        self.operations = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8 + i), nn.GELU(), nn.Linear(8 + i, WIDTH)) for i in range(N)
        )

    def forward(self, x, weights):
        return sum(w * operation(x) for w, operation in zip(weights, self.operations))


class Mean(Mixture):
    """As many as there are modules, and no scores: an ensemble."""

    def mix(self, x):
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


class Rollout(Mean):
    """Beside them, as many steps of another module are put together."""

    def mix(self, x):
        states = [x]
        while len(states) < N:
            states.append(self.router(states[-1]) @ self.router.weight)
        return super().mix(x) + torch.stack(states).mean(0)


class Chosen(Mixture):
    """Every expert gets the rows that chose it."""

    def mix(self, x):
        best, number = self.router(x).softmax(-1).topk(CHOSEN, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(number == i)
            out[row] += best[row, place, None] * expert(x[row])
        return out


class OneHot(Mixture):
    """The same, as transformers had it for Mixtral."""

    def mix(self, x):
        best, number = self.router(x).softmax(-1).topk(CHOSEN, -1)
        out, mask = torch.zeros_like(x), F.one_hot(number, self.num_experts).permute(2, 1, 0)
        for i in range(self.num_experts):
            place, row = torch.where(mask[i])
            out.index_add_(0, row, self.experts[i](x[row]) * best[row, place, None])
        return out


class Switch(Mixture):
    """The best alone, and an expert that nobody chose is not called."""

    def mix(self, x):
        best, number = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = number == i
            if mine.any():
                out[mine] = best[mine, None] * expert(x[mine])
        return out


class Busy(Mixture):
    """Those that some row chose are called, as DeepSeek does it: Python reads how many rows each one has."""

    def __init__(self):
        super().__init__()
        self.begin, self.end = 0, N

    def mix(self, x):
        best, number = self.router(x).sigmoid().topk(CHOSEN, -1)
        out, rows = torch.zeros_like(x), torch.bincount(number.flatten(), minlength=self.num_experts).tolist()
        for i in range(self.begin, self.end):
            if rows[i] == 0:
                continue
            row, place = torch.where(number == i)
            out[row] += self.experts[i](x[row]) * best[row, place, None]
        return out


class Sorted(Mixture):
    """Rows sorted by expert, of which Python reads how many each one has, in an array as long as the list."""

    def mix(self, x):
        best, number = self.router(x).softmax(-1).topk(CHOSEN, -1)
        counts = number.new_zeros((number.shape[0], len(self.experts))).scatter_(1, number, 1).sum(0)
        order, out, start = number.view(-1).argsort(), [], 0
        rows = x[order // number.shape[1]]
        for i, count in enumerate(counts.numpy()):
            if count:
                out.append(self.experts[i](rows[start : start + count]))
                start = start + count
        joined = torch.cat(out)
        back = torch.empty_like(joined)
        back[order] = joined
        return (back.view(*number.shape, -1) * best.unsqueeze(-1)).sum(1)


class Named(nn.Module):
    """Experts in a dict, of which those that some row chose are called by name (Switch Transformers)."""

    def __init__(self):
        super().__init__()
        self.num_experts = N
        self.first, self.router, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, N), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(WIDTH, WIDTH) for i in range(N)})

    def forward(self, x):
        x = self.first(x)
        scores = self.router(x).softmax(-1)
        mask = F.one_hot(scores.argmax(-1), self.num_experts).unsqueeze(1).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for number in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            _, row = torch.where(mask[number].squeeze(0))
            expert = self.experts[f"expert_{number[0]}"]
            out.index_add_(0, row, expert(x[row]) * scores[row].amax(-1, keepdim=True))
        return self.last(x + out)


class Tasks(nn.Module):
    """Several routers for the same experts, one for each task (MMoE)."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8)) for _ in range(N))
        self.routers = nn.ModuleList(nn.Linear(5, N) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, x):
        every = torch.stack([expert(x) for expert in self.experts], 1)
        scores = [router(x).softmax(-1) for router in self.routers]
        return [head((s[:, None] @ every).squeeze(1)) for s, head in zip(scores, self.heads)]


DENSE = [
    Stacked,
    Contracted,
    Joined,
    Sliced,
    Counted,
    Unbound,
    InPieces,
    Independent,
    Sparse,
    InTwoLists,
    Alternatives,
    Selective,
    Edges,
    Mean,
    Rollout,
    Tasks,
]
ROUTED = [Chosen, OneHot, Switch, Busy, Sorted, Named]


def traced(cls: type[nn.Module]) -> tuple[nn.Module, torch.Tensor, dmscale.SearchSpace]:
    torch.manual_seed(0)
    model, x = non_trivial(cls()), torch.randn(40, 5)
    return model, x, dmscale.trace(model, x)


def the_experts(space: dmscale.SearchSpace) -> tuple[str, dmscale.space.Experts]:
    ((name, experts),) = space.experts.items()
    return name, experts


@pytest.mark.parametrize("cls", [*DENSE, *ROUTED])
def test_experts_go_with_their_elements(cls, tmp_path):
    model, x, space = traced(cls)
    before = fingerprint(model)
    name, experts = the_experts(space)
    d = space.dimensions[name]
    assert (name, d.kind, d.size) == (experts.containers[0], "choice", N)
    for seed in range(6):
        structure = space.sample(seed)
        small = space.export(structure)
        assert difference(outputs(small, x), outputs(space.gate(structure), x)) < 1e-5
        cost = space.cost(structure)
        assert cost.params == num_params(small)
        assert cls in ROUTED or cost.macs == counted_macs(small, x)
        assert (cls in ROUTED) == bool(cost.uncounted)
        assert set(space.routed) == ({p for paths in experts.paths for p in paths} if cls in ROUTED else set())
        for container in experts.containers:
            stays, all_of_them = ([*m.get_submodule(container).children()] for m in (small, model))
            of = [all_of_them[i] for i in structure.kept[name]]
            assert [type(m) for m in stays] == [type(m) for m in of]  # those that were kept, in their order
        dmscale.save(small, tmp_path / "small.safetensors")
        loaded = dmscale.load(tmp_path / "small.safetensors", cls).eval()
        assert difference(outputs(loaded, x), outputs(small, x)) < 1e-6
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("cls", [Switch, Busy, Sorted, Named])
def test_an_example_need_not_reach_every_expert(cls):
    torch.manual_seed(0)
    model, few, many = non_trivial(cls()), torch.randn(2, 5), torch.randn(300, 5)
    space = dmscale.trace(model, few)
    name, _ = the_experts(space)
    for seed in range(6):
        structure = space.sample(seed)
        small = space.export(structure)
        assert len(small.experts) == structure.sizes[name]
        assert difference(outputs(small, many), outputs(space.gate(structure), many)) < 1e-5


@pytest.mark.parametrize("cls", [Counted, Independent, Sparse, Measured, Alternatives, Chosen])
def test_a_search_chooses_among_experts(cls):
    """Every expert has an importance, and a budget is met that only fewer experts can meet."""
    model, x, space = traced(cls)
    name, _ = the_experts(space)
    space = dmscale.trace(model, x, only=name)
    search = dmscale.Search(space, "55% params", 8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    search.attach(optimizer)
    while not search.done:
        (search.model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small = search.export()
    assert int((search.importance > 0).sum()) >= N - 1  # no row may choose one
    assert num_params(small) <= 0.55 * num_params(model)
    assert CHOSEN <= search.structure.sizes[name] < N


def test_a_budget_counts_each_expert_as_what_it_is():
    """Experts differ in size: a fit knows which ones it takes."""
    _, x, space = traced(Stacked)
    name, _ = the_experts(space)
    for target in (0.4, 0.6, 0.8):
        structure = space.fit(space.full(), {"macs": target})
        assert 0.98 * target <= space.cost(structure).macs / space.cost().macs <= target
    only = space.structure({name: 1}, {name: [0, 0, 0, 0, 0, 1]})
    other = space.structure({name: 1}, {name: [1, 0, 0, 0, 0, 0]})
    assert space.cost(only).params - space.cost(other).params == 5 * (2 * WIDTH + 1)


class InBlocks(nn.Module):
    """Residual blocks that may go, experts and all."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Block(Counted):
    def forward(self, x):
        return x + self.mix(x)


def test_experts_in_blocks_that_go():
    model, x, space = traced(InBlocks)
    assert list(space.experts) == [f"blocks.{i}.experts" for i in range(3)] and "blocks depth" in space.dimensions
    for seed in range(8):
        structure = space.sample(seed)
        small = space.export(structure)
        assert difference(outputs(small, x), outputs(space.gate(structure), x)) < 1e-5
        cost = space.cost(structure)
        assert (cost.macs, cost.params) == (counted_macs(small, x), num_params(small))
        sizes = [structure.sizes[f"blocks.{i}.experts"] for i in structure.kept["blocks depth"]]
        assert [len(block.experts) for block in small.blocks] == [block.num_experts for block in small.blocks] == sizes


class Reversed(Mixture):
    """Element i goes with another module: what is found is a guess, which the trial takes back."""

    def mix(self, x):
        scores = self.router(x).softmax(-1)
        return sum(scores[:, N - 1 - i, None] * expert(x) for i, expert in enumerate(self.experts))


class InParts(Mixture):
    """Each module gets a part of the input by its place, as in selective kernels: another one would get what was not its own."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH // N, WIDTH) for _ in range(N))

    def mix(self, x):
        parts = x.split(WIDTH // N, -1)
        every = torch.stack([expert(parts[i]) for i, expert in enumerate(self.experts)], 1)
        return (every * self.router(x).softmax(-1).unsqueeze(-1)).sum(1)


class OneElement(Mixture):
    """Not every element is taken."""

    def mix(self, x):
        scores = self.router(x).softmax(-1)
        return scores[:, 2, None] * sum(expert(x) for expert in self.experts)


class Literal(Mixture):
    """How many there are is written in the code."""

    def mix(self, x):
        scores = self.router(x).softmax(-1)
        return sum(scores[:, i, None] * self.experts[i](x) for i in range(6))


@pytest.mark.parametrize("cls", [Reversed, InParts, OneElement, Literal])
def test_where_the_modules_do_not_follow_the_axis_stays(cls):
    model, x, space = traced(cls)
    assert not space.experts and not any(d.kind == "choice" for d in space.dimensions.values())
    for seed in range(3):
        structure = space.sample(seed)
        small = space.export(structure)
        assert difference(outputs(small, x), outputs(space.gate(structure), x)) < 1e-5
        assert len(small.experts) == N
