"""Distillation compares what belongs together; recovery learns, averages and leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, non_trivial
from torch import nn

import dmscale
from dmscale import DmscaleError, distill, recovery
from dmscale.distill import Distill, Distiller, frozen_copy

CHEAP = ["mlp", "residual_conv", "residual_stack", "unet", "fused_attention", "dense_concat", "grouped"]


def made(net, seed=0):
    """(space of a non-trivial network, its inputs)."""
    torch.manual_seed(seed)
    model, inputs = NETS[net]()
    return dmscale.trace(non_trivial(model), inputs, verify=False), inputs


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", CHEAP)
@pytest.mark.parametrize("seed", [0, 1])
def test_features_of_the_teacher_at_the_kept_indices_are_the_students(net, seed):
    """Against the gated full-size network every place agrees, so its loss is zero: indices, paths and axes are right."""
    space, inputs = made(net, seed)
    structure = space.sample(seed)
    small = space.export(structure).eval()
    found = distill._comparable(space, structure)
    gated = space.gate(structure).eval()
    chosen = [p for p in found.values() if not _inside_a_normalisation(space, p.teacher)]
    assert chosen
    teacher, student = (
        distill._Watch(m, [getattr(p, k) for p in chosen]) for m, k in ((gated, "teacher"), (small, "student"))
    )
    with torch.no_grad():
        gated(inputs), small(inputs)
    for place in chosen:
        t, s = place.of_teacher(teacher.seen[place.teacher]), student.seen[place.student]
        assert t.shape == s.shape, place
        torch.testing.assert_close(s, t, rtol=1e-4, atol=1e-5, msg=lambda m, p=place: f"{p.teacher}: {m}")
    teacher.close(), student.close()


def _inside_a_normalisation(space, path):
    """Its output is rescaled by a hook behind it; what is watched is before that hook."""
    return any(s.module == path and s.weight is None for s in space.sites.norms)


@pytest.mark.parametrize("net", CHEAP)
def test_the_default_places_are_few_and_differ(net):
    space, _ = made(net)
    structure = space.uniform(0.5)
    chosen = distill.places(space, structure)
    assert 1 <= len(chosen) <= 4
    assert all(p.kept for p in chosen)  # each has an axis that may shrink
    assert len({p.student for p in chosen}) == len(chosen)


def test_blocks_that_went_are_no_places_and_those_behind_them_are_renumbered():
    space, inputs = made("residual_stack")
    scores = {"blocks depth": [0.1, 0.9, 0.2, 0.8, 0.7]}
    structure = space.structure({"blocks depth": 3}, scores)
    assert [distill.student_path(space, structure, f"blocks.{i}.up") for i in range(5)] == [
        None, "blocks.0.up", None, "blocks.1.up", "blocks.2.up"
    ]  # fmt: skip
    assert distill.student_path(space, structure, "head") == "head"
    with pytest.raises(DmscaleError, match="at='blocks.0' matches no module"):
        distill.places(space, structure, ["blocks.0"])
    assert [p.student for p in distill.places(space, structure, ["blocks.?"])] == ["blocks.0", "blocks.1", "blocks.2"]


# -- losses -----------------------------------------------------------------------------------------------------------


def test_losses_vanish_for_equal_predictions_and_match_their_definitions():
    t, s = torch.randn(6, 5), torch.randn(6, 5)
    for loss in (distill.logits_loss, distill.relations_loss, distill.feature_loss):
        assert float(loss(t, t)) == pytest.approx(0, abs=1e-5)
        assert float(loss(s, t)) > 0.01
    p, q = (t / 3).softmax(-1), (s / 3).softmax(-1)
    assert float(distill.logits_loss(s, t, 3.0)) == pytest.approx(
        float((p * (p / q).log()).sum(1).mean() * 9), rel=1e-5
    )
    rows = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p, q)])
    columns = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p.T, q.T)])
    expected = 9 * (2 - rows.mean() - columns.mean())
    assert float(distill.relations_loss(s, t, 3.0)) == pytest.approx(float(expected), rel=1e-4)
    assert float(distill.feature_loss(2 * t, t)) == pytest.approx(1)


@pytest.mark.parametrize(
    "wish, expected",
    [
        (None, None), (False, None), (True, Distill(logits=1)), ("logits", Distill(logits=1)),
        ("relations, features", Distill(relations=1, features=1)),
        (dict(logits=0.5, temperature=2.0), Distill(logits=0.5, temperature=2.0)), (Distill(features=2), Distill(features=2)),
    ],
)  # fmt: skip
def test_wishes_are_read(wish, expected):
    assert Distill.parse(wish) == expected


def test_wrong_wishes_are_named():
    with pytest.raises(DmscaleError, match="'logit' is none of logits, relations, features"):
        Distill.parse("logit")
    space, inputs = made("mlp")
    small = space.export(space.uniform(0.5))
    with pytest.raises(DmscaleError, match="needs teacher="):
        recovery.recover(small, [], F.mse_loss, 1, distill="logits")
    with pytest.raises(DmscaleError, match="needs space= and structure="):
        recovery.recover(small, [], F.mse_loss, 1, teacher=space.model, distill="features")
    with pytest.raises(DmscaleError, match="ema=1.5"):
        recovery.recover(small, [], F.mse_loss, 1, ema=1.5)


def test_predictions_of_any_shape_are_compared_by_class():
    class Predictor(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.out = nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return self.out

    for shape, dim, rows in (
        ((2, 5), None, (2, 5)),
        ((2, 3, 5), None, (6, 5)),
        ((2, 5, 3, 4), None, (24, 5)),
        ((2, 5, 3), 1, (6, 5)),
    ):
        model = Predictor(shape)
        with Distiller(Distill(logits=1, class_dim=dim), frozen_copy(model), model) as d:
            assert d._rows(model.out).shape == rows
            assert float(d(torch.zeros(1), model(None))) == pytest.approx(0, abs=1e-5)


# -- recovering -------------------------------------------------------------------------------------------------------


def cut(net="residual_stack", share=0.5):
    space, inputs = made(net)
    structure = space.uniform(share)
    batches = [(torch.randn(8, *inputs.shape[1:]), torch.zeros(8, 4)) for _ in range(4)]
    return space, structure, space.export(structure), batches


def no_task(out, y):
    return 0 * out.sum()


@pytest.mark.parametrize("what", ["logits", "relations", "features", "function"])
def test_a_student_comes_nearer_to_its_teacher(what):
    space, structure, small, batches = cut()
    teacher = frozen_copy(space.model)
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    hooks = {p: len(m._forward_hooks) for p, m in small.named_modules()}
    how = (lambda s, t: (s - t).square().mean()) if what == "function" else what

    def distance(model):
        with Distiller(Distill.parse(how), teacher, model, space, structure) as d, torch.no_grad():
            model.eval()
            return sum(float(d(x, model(x))) for x, _ in batches)

    far = distance(copy.deepcopy(small))
    told = dict(teacher=teacher, distill=how, space=space, structure=structure)
    recovery.recover(small, batches, no_task, 40, 1e-2, weight_decay=0.0, **told)
    assert distance(small) < 0.7 * far
    assert {p: len(m._forward_hooks) for p, m in small.named_modules()} == hooks
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_an_average_follows_the_weights():
    """Against the recurrence written out, decay and warm-up included."""
    model = nn.Linear(3, 2)
    average = recovery.Average(model, 0.5)
    expected = model.weight.detach().clone()
    for n in range(1, 12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        average.update()
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.weight.detach()
    average.apply()
    torch.testing.assert_close(model.weight.detach(), expected)


def test_recovery_averages_and_resumes_to_the_bit():
    space, structure, small, batches = cut("mlp")
    twin, third = copy.deepcopy(small), copy.deepcopy(small)
    plain = recovery.recover(third, batches, F.mse_loss, 8, 1e-2)
    averaged = recovery.recover(small, batches, F.mse_loss, 8, 1e-2, ema=0.9)
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), averaged.parameters()))
    first = recovery.Recovery(twin, F.mse_loss, 8, 1e-2, ema=0.9)
    for batch in [*batches, batches[0]]:
        first.step(batch)
    state = copy.deepcopy(first.state_dict())
    other = space.export(structure)
    again = recovery.Recovery(other, F.mse_loss, 8, 1e-2, ema=0.9)
    again.load_state_dict(state)
    for batch in batches[1:]:
        again.step(batch)
    assert again.done
    for a, b in zip(again.finish().state_dict().values(), averaged.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(DmscaleError, match="8 steps with ema.*this one has 9"):
        recovery.Recovery(other, F.mse_loss, 9, 1e-2, ema=0.9).load_state_dict(state)


def test_scale_distils_in_both_phases_from_the_weights_before_it():
    torch.manual_seed(0)
    model, inputs = NETS["residual_conv"]()
    dense = copy.deepcopy(model)
    seen = []

    def near(student, teacher):
        seen.append(teacher)
        return F.mse_loss(student, teacher)

    x = torch.randn(4, 3, 8, 8)
    found = dmscale.scale(
        model, inputs, [(x, torch.zeros(4, 5))], no_task, budget="50% macs", steps=4, finetune_steps=3, distill=near, ema=0.9,
        progress=False,
    )  # fmt: skip
    expected = dense.eval()(x)
    assert len(seen) == 7 and all(torch.equal(t, expected) for t in seen)
    assert [entry["loss"] > 0 for entry in found.search.history] == [True] * 4
    assert any(not torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters()))
