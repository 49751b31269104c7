"""What gates made is not kept for the backward where it can be made again: same gradients to the bit, fewer bytes."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from nets import NETS, floats_of, non_trivial, run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import dmscale
from dmscale import gates, remaking


class Block(nn.Module):
    """Pre-norm: a projection that is mixed over the tokens, and an MLP."""

    def __init__(self, norm, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x = x + self.out(self.value(self.norm1(x)).roll(1, 1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stream(nn.Module):
    """Blocks on one residual stream; the checkpointed ones run again in the backward."""

    def __init__(self, norm=nn.LayerNorm, width=64, hidden=256, depth=4, reentrant=None):
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(norm, width, hidden) for _ in range(depth))
        self.norm, self.head = norm(width), nn.Linear(width, 10)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


@functools.cache
def stream(norm=nn.LayerNorm, reentrant=None):
    torch.manual_seed(0)
    return dmscale.trace(non_trivial(Stream(norm, reentrant=reentrant)), torch.randn(8, 32, 16))


@functools.cache
def space(name):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    return dmscale.trace(non_trivial(model), inputs)


def halved(over):
    """A gated model of which half of every width is masked, all blocks in, and which knows it."""
    widths = {a: (torch.arange(a.size) % 2 == 0).float() for d in over.dimensions.values() for a in d.axes}
    gated = gates.attach(
        over.model, over.sites, widths, {n: torch.ones(len(s.paths)) for n, s in over.stacks.items()}, trainable=True
    )
    masks = gates.masks_of(gated)
    masks.hard = {a: int(m.sum()) for a, m in widths.items()}
    masks.decided = {n: [True] * len(s.paths) for n, s in over.stacks.items()}
    return gated


def loss_of(model, inputs):
    return sum((t.float().square() * torch.linspace(1, 2, t.shape[-1])).mean() for t in floats_of(run(model, inputs)))


def gradients(gated, inputs):
    """(loss, gradients of all parameters, masks included)."""
    gated.zero_grad()
    torch.manual_seed(0)
    loss = loss_of(gated, inputs)
    loss.backward()
    return [loss.detach(), *(p.grad for p in gated.parameters())]


def assert_equal(a, b):
    assert len(a) == len(b)
    for p, q in zip(a, b):
        assert (p is None) == (q is None) and (p is None or torch.equal(p, q))


@pytest.fixture
def let_go(monkeypatch):
    """Even of what is small; how often."""
    monkeypatch.setattr(remaking, "SMALL", 0)
    made, recipe = [], remaking._recipe
    monkeypatch.setattr(remaking, "_recipe", lambda *args: made.append(args[1].shape) or recipe(*args))
    return made


class Made(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.storages.append((StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()))
        return out


def bytes_kept(model, inputs):
    """Bytes that a forward has made and that are there for its backward."""
    given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *floats_of(inputs))}
    with Made() as made:
        loss = loss_of(model, inputs)
    gc.collect()
    alive = {ref.cdata: size for ref, size in made.storages if not ref.expired() and ref.cdata not in given}
    del loss
    return sum(alive.values())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_masked_model_keeps_what_the_plain_one_keeps(norm, let_go):
    """One residual stream for each block and a copy of each masked weight would be a sixth more."""
    over = stream(norm)
    inputs = over.example_inputs
    gated, plain = halved(over), bytes_kept(over.model, inputs)
    assert bytes_kept(gated, inputs) <= 1.02 * plain  # masks, and a number or two for each row of a normalisation
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):  # where nothing can be let go
        assert bytes_kept(gated, inputs) > 1.1 * plain


@pytest.mark.parametrize("name", NETS)
def test_what_is_made_again_is_the_same_to_the_bit(name, let_go, monkeypatch):
    over = space(name)
    gated = halved(over)
    found = gradients(gated, over.example_inputs)
    monkeypatch.setattr(remaking, "_taken", lambda: True)
    assert_equal(found, gradients(gated, over.example_inputs))


def test_under_autocast_as_well(let_go, monkeypatch):
    gated, inputs = halved(stream()), stream().example_inputs
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(gated, inputs)
        assert let_go
        monkeypatch.setattr(remaking, "_taken", lambda: True)
        assert_equal(found, gradients(gated, inputs))


def test_what_the_user_does_with_saved_tensors_goes_first(let_go):
    """Such hooks come in one pair only: where the user has one, nothing is let go."""
    gated, inputs = halved(stream()), stream().example_inputs
    expected = gradients(gated, inputs)
    assert let_go
    let_go.clear()
    with torch.autograd.graph.save_on_cpu():
        assert_equal(gradients(gated, inputs), expected)
    assert not let_go
    for reentrant in (True, False):
        over = stream(nn.LayerNorm, reentrant)
        found = gradients(halved(over), inputs.clone().requires_grad_())
        for p, q in zip(found, expected):
            torch.testing.assert_close(p, q)


def test_a_graph_is_followed_twice_and_differentiated_twice(let_go):
    over = stream()
    gated, inputs = halved(over), over.example_inputs
    weights = [p for p in gated.parameters() if p.dim() > 1]
    loss = loss_of(gated, inputs)
    once, twice = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    assert let_go
    assert_equal(once, twice)

    def penalty():
        grads = torch.autograd.grad(loss_of(gated, inputs), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), weights)

    found = penalty()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        for p, q in zip(found, penalty()):
            torch.testing.assert_close(p, q)


def test_a_weight_that_has_changed_since_is_refused():
    """As without gates: the backward of the new weights would be wrong."""
    over = stream()
    loss = loss_of(halved(over), over.example_inputs)
    with torch.no_grad():
        over.model.blocks[1].down.weight.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_its_module_changes_is_not_made_again(let_go):
    class Clipped(nn.Linear):
        def forward(self, x):
            weight = self.weight * 1 if self.weight.is_leaf else self.weight
            with torch.no_grad():
                weight.clamp_(-0.05, 0.05)
            return F.linear(x, weight)

    torch.manual_seed(0)
    over = dmscale.trace(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Clipped(32, 4)), torch.randn(2, 8))
    gradients(halved(over), over.example_inputs)
    assert not let_go


class Around(nn.Module):
    """Takes the weight of a child, and never calls it."""

    def __init__(self):
        super().__init__()
        self.first, self.weight, self.child = nn.Linear(8, 32), nn.Parameter(torch.randn(24, 32)), nn.Linear(24, 4)

    def forward(self, x):
        return F.linear(F.linear(self.first(x).relu(), self.weight).relu(), self.child.weight)


class Beside(Around):
    """Calls its child, besides using a weight of its own."""

    def forward(self, x):
        return self.child(F.linear(self.first(x).relu(), self.weight).relu())


@pytest.mark.parametrize("kind, expected", [(Around, {(32, 24), (24, 4)}), (Beside, {(24, 4)})])
def test_only_the_innermost_module_that_runs_is_searched(kind, expected, let_go):
    torch.manual_seed(0)
    over = dmscale.trace(nn.Sequential(kind()), torch.randn(2, 8))
    gradients(halved(over), over.example_inputs)
    assert {tuple(s) for s in let_go} == expected
