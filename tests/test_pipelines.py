"""The pipelines of `scale`: which weights the search moves, and which the smaller network starts from."""

import copy

import pytest
import torch
from nets import NETS
from torch.nn import functional as F

import dmscale
from dmscale.export import EXPANSION


def scaled(model, inputs, **options):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    options = {"budget": "50% macs", "steps": 10, "finetune_steps": 0, "progress": False} | options
    return dmscale.scale(model, inputs, [(x, torch.randn(8, 5))], F.mse_loss, **options)


def net():
    torch.manual_seed(0)
    return NETS["residual_conv"]()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(t, b[n]) for n, t in a.items())


def test_by_default_the_smaller_network_inherits_what_the_search_has_trained():
    model, inputs = net()
    before = weights(model)
    found = scaled(model, inputs)
    assert not same(before, weights(model))
    assert same(weights(found.space.export(found.structure)), weights(found.model))


def test_from_scratch_it_starts_from_the_weights_before_the_search():
    model, inputs = net()
    first = copy.deepcopy(model)
    found = scaled(model, inputs, inherit=False)
    assert not same(weights(first), weights(model))  # the search has trained the network all the same
    expected = dmscale.trace(first, inputs).export(found.structure)
    assert same(weights(expected), weights(found.model))


def test_a_structure_only_search_moves_neither_weights_nor_statistics():
    model, inputs = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = scaled(model, inputs, train_weights=False, finetune_steps=None)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert 0.99 <= found.cost.macs / (0.5 * found.space.cost().macs) <= 1
    with pytest.raises(dmscale.DmscaleError, match="inherit=False"):
        scaled(model, inputs, train_weights=False, inherit=False)


def test_from_a_larger_network_back_to_the_cost_of_the_given_one():
    model, inputs = net()
    before, own = weights(model), dmscale.trace(model, inputs).cost().macs
    found = scaled(model, inputs, budget="100% macs", expand={"width": 2.0})
    assert found.space.cost().macs > 2 * own and EXPANSION in vars(found.space.model)
    assert 0.99 <= found.cost.macs / own <= 1
    assert same(before, weights(model))
    assert type(found.model) is type(model)
