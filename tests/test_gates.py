"""Gates: the full-size model as if parts of it were gone, on a clone that shares the user's parameters."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from nets import NETS, assert_same, difference, fingerprint, floats_of, non_trivial, outputs, run
from torch import nn

import dmscale
from dmscale import gates

WITH_NORMS = ["layer_norm", "layer_norm_plain", "rms_norm", "own_rms_norm", "group_norm"]


@functools.cache
def space(name):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    return dmscale.trace(non_trivial(model), inputs)


def soft(over, low=0.2, high=1.0, trainable=True):
    """(gated model, its masks): every mask random between two values."""
    widths = {a: torch.empty(a.size).uniform_(low, high) for d in over.dimensions.values() for a in d.axes}
    depths = {n: torch.empty(len(s.paths)).uniform_(low, high) for n, s in over.stacks.items()}
    gated = gates.attach(over.model, over.sites, widths, depths, trainable=trainable)
    masks = gates.masks_of(gated)
    return gated, [*masks.widths.values(), *masks.depths.values()]


@pytest.mark.parametrize("name", NETS)
def test_masks_of_one_are_the_plain_model(name):
    over = space(name)
    expected = outputs(over.model, over.example_inputs)
    gated, masks = soft(over, 1.0, 1.0)
    assert masks and all(bool((m == 1).all()) for m in masks)
    assert difference(outputs(gated, over.example_inputs), expected) <= 1e-5
    assert difference(outputs(over.gate(over.full()), over.example_inputs), expected) <= 1e-5


@pytest.mark.parametrize("name", NETS)
def test_every_mask_acts_and_has_a_finite_gradient(name):
    """Also at zero, and also where a normalisation has a single element left."""
    over = space(name)
    inputs = over.example_inputs
    plain = outputs(over.model, inputs)
    for low, high in ((0.3, 1.0), (1.0, 1.0), (0.0, 0.0)):
        gated, masks = soft(over, low, high)
        if high == 0:
            for m in masks:
                m.data[:1] = 1
        sum((t.square() * torch.rand_like(t)).sum() for t in floats_of(run(gated, inputs))).backward()
        for m in masks:
            assert m.grad is not None and bool(m.grad.isfinite().all())
        if low == 0.3:
            assert all(bool((m.grad != 0).any()) for m in masks)
            assert difference(outputs(gated, inputs), plain) > 1e-3


@pytest.mark.parametrize(
    "name", [*WITH_NORMS, "residual_stack", "gqa_by_expand", "unet", "fused_attention", "dense_concat"]
)
def test_the_gradient_of_a_mask_is_that_of_finite_differences(name):
    """In double precision; kept-count forms included, whose statistics depend on the mask."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    over = dmscale.trace(non_trivial(model).double(), inputs.double(), verify=False)
    gated, masks = soft(over, 0.5, 1.0)
    for m in masks:
        m.data = m.data.double()
    weight = [torch.rand_like(t) for t in outputs(gated, over.example_inputs)]

    def loss():
        return sum((t * w).sum() for t, w in zip(floats_of(run(gated, over.example_inputs)), weight))

    loss().backward()
    h = 1e-5
    for m in masks:
        for i in {0, len(m) // 2, len(m) - 1}:
            with torch.no_grad():
                value = m[i].item()
                m[i] = value + h
                above = loss()
                m[i] = value - h
                below = loss()
                m[i] = value
            numeric = float((above - below) / (2 * h))
            assert float(m.grad[i]) == pytest.approx(numeric, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_what_gates_know_of_their_masks_changes_nothing(name):
    """Told which masks are hard, gates leave products out: same outputs, same gradients of masks and weights."""
    over = space(name)
    rng = torch.Generator().manual_seed(0)
    of_axes, hard = {}, {}
    for a in (a for d in over.dimensions.values() for a in d.axes):
        of_axes[a] = torch.ones(a.size)
        if torch.rand((), generator=rng) < 0.4:
            of_axes[a] = (torch.rand(a.size, generator=rng) < 0.6).float()
            of_axes[a][0] = 1
        hard[a] = int(of_axes[a].sum())
        if torch.rand((), generator=rng) < 0.2:
            of_axes[a], _ = torch.empty(a.size).uniform_(0.3, 1, generator=rng), hard.pop(a)
    of_stacks = {n: torch.ones(len(s.paths)) for n, s in over.stacks.items()}
    found = []
    for told in (False, True):
        gated = gates.attach(over.model, over.sites, of_axes, of_stacks, trainable=True)
        masks = gates.masks_of(gated)
        if told:
            masks.hard, masks.decided = hard, {n: [True] * len(m) for n, m in masks.depths.items()}
        gated.zero_grad()
        values = floats_of(run(gated, over.example_inputs))
        rng.manual_seed(1)
        sum((t.square() * torch.rand(t.shape, generator=rng)).sum() for t in values).backward()
        grads = {n: p.grad for n, p in gated.named_parameters() if p.grad is not None}
        assert {id(m) for m in masks.parameters()} <= {id(p) for n, p in gated.named_parameters() if n in grads}
        found.append((values, grads))
    (plain, expected), (values, grads) = found
    assert difference([t.detach() for t in values], [t.detach() for t in plain]) <= 1e-5
    assert grads.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for n, g in grads.items():
        scale = max(float(expected[n].abs().max()), 1e-3 * largest)
        assert float((g - expected[n]).abs().max()) <= 2e-4 * scale, n


@pytest.mark.parametrize("name", NETS)
def test_what_is_masked_cannot_be_seen(name):
    """Whatever a removed element of a weight holds, the output of the gated model is the same."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    over = dmscale.trace(non_trivial(model), inputs)
    structure = over.uniform(0.5)
    gated, small = over.gate(structure), over.export(structure)
    expected = outputs(gated, inputs)
    kept = over.widths_of(structure)
    with torch.no_grad():
        for parameter, dims in ((p, over.trace.slots[n]) for n, p in model.named_parameters() if n in over.trace.slots):
            for position, dim in enumerate(dims):
                keep = dmscale.axes.kept(dim, {a: _indicator(a.size, k) for a, k in kept.items()})
                gone = (~keep).nonzero()[:, 0]
                if len(gone):
                    parameter.index_add_(position, gone, 3 * torch.randn(*_with(parameter.shape, position, len(gone))))
    assert difference(outputs(gated, inputs), expected) <= 1e-4
    assert difference(outputs(small, inputs), expected) <= 1e-4  # and the exported one shares nothing with the user's


def _indicator(size, kept):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def _with(shape, position, size):
    return [size if i == position else n for i, n in enumerate(shape)]


@pytest.mark.parametrize("name", ["residual_stack", "residual_conv", "transformer_encoder"])
def test_a_depth_gate_of_zero_is_the_identity(name):
    over = space(name)
    stack = next(iter(over.stacks.values()))
    for gone in range(len(stack.paths)):
        kept = tuple(i for i in range(len(stack.paths)) if i != gone)
        structure = over.structure(
            {stack.name: len(kept)}, {stack.name: [float(i != gone) for i in range(len(stack.paths))]}
        )
        assert structure.kept[stack.name] == kept
        small = over.export(structure)
        assert (
            len(list(small.get_submodule(stack.container).children()))
            == len(list(over.model.get_submodule(stack.container).children())) - 1
        )
        error = difference(outputs(small, over.example_inputs), outputs(over.gate(structure), over.example_inputs))
        assert error <= 1e-5


@pytest.mark.parametrize(
    "name", ["residual_conv", "gqa_by_expand", "tied_embeddings", "own_rms_norm", "dataclass_output"]
)
def test_a_copy_of_a_gated_model_is_independent(name):
    over = space(name)
    gated, masks = soft(over)
    before = outputs(gated, over.example_inputs)
    twin = copy.deepcopy(gated)
    assert all(torch.equal(a, b) for a, b in zip(outputs(twin, over.example_inputs), before))
    others = gates.masks_of(twin)
    for m in (*others.widths.values(), *others.depths.values()):
        m.data.fill_(1.0)
    assert difference(outputs(twin, over.example_inputs), outputs(over.model, over.example_inputs)) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(outputs(gated, over.example_inputs), before))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(outputs(gated, over.example_inputs), before))
    assert all(bool((m > 0).all()) for m in masks)


@pytest.mark.parametrize("name", NETS)
def test_the_gated_model_shares_parameters_and_class(name):
    over = space(name)
    before = fingerprint(over.model)
    gated = over.gate(over.sample(seed=0))
    assert isinstance(gated, type(over.model))
    own = {id(p) for p in over.model.parameters()}
    masks = gates.masks_of(gated)
    extra = {id(p) for p in (*masks.widths.values(), *masks.depths.values())}
    assert {id(p) for p in gated.parameters()} == own | extra
    assert_same(before, fingerprint(over.model))
    outputs(gated, over.example_inputs)
    assert_same(before, fingerprint(over.model))


def test_gradients_reach_the_users_parameters():
    over = space("residual_stack")
    gated = over.gate(over.uniform(0.5))
    over.model.zero_grad()
    floats_of(run(gated, over.example_inputs))[0].sum().backward()
    try:
        kept = over.uniform(0.5).kept["blocks.0.up"]
        grad = over.model.blocks[0].down.weight.grad
        gone = [i for i in range(22) if i not in kept]
        assert bool((grad[:, list(kept)] != 0).any()) and bool((grad[:, gone] == 0).all())
    finally:
        over.model.zero_grad()


@pytest.mark.parametrize("where", ["parametrize", "deepcopy", "forward"])
def test_an_exception_leaves_the_users_module(where, monkeypatch):
    torch.manual_seed(0)
    model, inputs = NETS["residual_stack"]()
    over = dmscale.trace(non_trivial(model), inputs)
    before = fingerprint(model)

    def fails(*args, **kwargs):
        raise RuntimeError("planted")

    if where == "parametrize":
        monkeypatch.setattr(gates.parametrize, "register_parametrization", fails)
    elif where == "deepcopy":
        monkeypatch.setattr(gates, "clone", fails)
    else:
        monkeypatch.setattr(gates.KeptCount, "apply", fails)
    with pytest.raises(Exception, match="planted"):
        outputs(over.gate(over.uniform(0.5)), inputs)
    with pytest.raises(Exception, match="planted"):
        over.export(over.uniform(0.5))
    monkeypatch.undo()
    assert_same(before, fingerprint(model))
    assert (
        difference(outputs(over.export(over.uniform(0.5)), inputs), outputs(over.gate(over.uniform(0.5)), inputs))
        <= 1e-5
    )


def test_a_wrong_gate_is_caught(monkeypatch):
    """The law can fail: a normalisation without its kept-count form differs, and `trace` then freezes what it is over."""
    torch.manual_seed(0)
    model, inputs = NETS["layer_norm"]()
    non_trivial(model)
    monkeypatch.setattr(gates.KeptCount, "apply", lambda self, x: x)
    over = dmscale.trace(model, inputs, verify=False)
    with pytest.raises(dmscale.ExportError, match="differs from the gated one"):
        over.export(over.uniform(0.5))
    assert "failed its trial" in dmscale.trace(model, inputs).frozen["0"]


class SoftmaxOfSeveral(nn.Module):
    """Sums `parts` linear maps, weighted by a softmax over them; where there is one, by a sigmoid: split attention."""

    def __init__(self, width: int, hidden: int, parts: int):
        super().__init__()
        self.parts = parts
        self.up, self.scores, self.down = (
            nn.Linear(width, parts * hidden),
            nn.Linear(hidden, parts),
            nn.Linear(hidden, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = self.up(x).view(x.shape[0], self.parts, -1).relu()
        scores = self.scores(each.sum(1))
        weights = scores.softmax(-1) if self.parts > 1 else scores.sigmoid()
        return x + self.down((each * weights[..., None]).sum(1))


def test_what_lies_in_a_block_that_is_gone_is_tried_as_well():
    """Blocks go in a trial, here the only one: what is wrong in it must be found all the same."""
    torch.manual_seed(0)
    over = dmscale.trace(
        nn.Sequential(nn.Linear(5, 12), SoftmaxOfSeveral(12, 7, 2), nn.Linear(12, 3)).eval(), torch.randn(4, 5)
    )
    assert [d.size for d in over.dimensions.values() if d.kind == "depth"] == [1]
    (why,) = [why for why in over.frozen.values() if "failed its trial" in why]  # the number of parts
    assert "at 1 of 2, where its forward decides otherwise" in why
    for seed in range(4):
        over.export(over.sample(seed=seed))


def test_a_mask_of_complex_weights_gets_the_real_part_of_its_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(n, m, dtype=torch.complex64) for n, m in ((4, 6), (6, 3))))
    x = torch.randn(5, 4, dtype=torch.complex64)
    space = dmscale.trace(model, x)
    search = dmscale.Search(space, "60% params", 10)
    search.model(x).abs().square().sum().backward()
    mask = torch.ones(6, requires_grad=True)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.linear(model[0](x) * mask, model[1].weight, model[1].bias).abs().square().sum(), mask
    )
    torch.testing.assert_close(search.masks[0].grad, expected, rtol=1e-4, atol=1e-5)


def test_what_waits_for_its_backward_does_not_mind_a_gated_model():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(4, 5)
    with torch.no_grad():
        model.first_rows = model[2].weight[
            :2
        ]  # a view, which PyTorch copies while nothing has been written to its base
    loss = model(x).square().sum()
    space = dmscale.trace(model, x)
    space.gate(space.uniform(0.5))
    space.export(space.uniform(0.5))
    loss.backward()
    assert copy.deepcopy(model).first_rows.shape == (2, 12)
