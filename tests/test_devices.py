"""Nothing that a search makes stays on the CPU while the model is elsewhere: on a pretended device, which refuses to mix.

No GPU is needed: what would raise on one raises here.  The arithmetic is the CPU's, so structures must agree too.
"""

from __future__ import annotations

import copy

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, There, move
from nets import NETS, floats_of, non_trivial, run
from torch import nn

import dmscale

SETTINGS = {
    **{name: {} for name in ("residual_stack", "unet", "gqa_by_expand", "fused_attention", "layer_norm", "rms_norm",
                             "group_norm", "buffers", "conv_transpose", "dense_concat")},
    **{f"residual_stack, {m}": {"method": m} for m in ("dms", "dms-unnormalised", "estimated-topk")},
    **{f"residual_stack, {m}": {"method": "dms", "mode": m} for m in ("projected", "lagrangian", "two-sided")},
    **{f"residual_stack, {i}": {"importance": i} for i in ("snip", "fisher", "magnitude", "activation", "index")},
    **{f"residual_stack, {i}": {"depth_importance": i} for i in ("residual", "similarity")},
    "residual_stack, balanced": {"method": "dms", "balance": True},
    "residual_stack, structure only": {"train_weights": False},
    "residual_stack, branches": {"branches": True},
}  # fmt: skip


def searched(setting, place):
    """(structure, exported model) of a short search with model and batch on the CPU (`place` is the identity) or elsewhere."""
    options = dict(SETTINGS[setting])
    torch.manual_seed(0)
    model, inputs = NETS[setting.partition(",")[0]]()
    space = dmscale.trace(non_trivial(model), inputs, branches=options.pop("branches", False))
    place(space.model)
    space.example_inputs = place(space.example_inputs)
    search = dmscale.Search(space, "70% params", 8, **options)
    optimizer = torch.optim.SGD(space.model.parameters(), 1e-4)
    search.attach(optimizer)
    while not search.done:
        sum(t.square().mean() for t in floats_of(run(search.model, space.example_inputs))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return search.structure, search.export()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_search_and_its_export_stay_on_the_device_of_the_model(setting):
    expected, _ = searched(setting, lambda x: x)
    with Elsewhere():
        structure, small = searched(setting, move)
    assert structure == expected
    assert all(isinstance(p, There) for p in small.state_dict().values())


@pytest.mark.parametrize("distill", [None, "logits", "relations", "features"])
def test_all_in_one_call_stays_on_the_device_of_the_model(distill):
    torch.manual_seed(0)
    model, inputs = NETS["residual_stack"]()
    non_trivial(model)
    with Elsewhere():
        model, inputs = move(model), move(inputs)
        labels = torch.zeros(len(inputs), dtype=torch.long, device=DEVICE)
        batches, criterion = [(inputs, labels)] * 4, nn.functional.cross_entropy
        result = dmscale.scale(model, inputs, batches, criterion, budget="60% macs", steps=8, distill=distill)
    assert all(isinstance(p, There) for p in result.model.state_dict().values())


def test_every_kind_of_strategy_stays_on_the_device_of_the_model(tmp_path):
    torch.manual_seed(0)
    model, inputs = NETS["residual_stack"]()
    non_trivial(model)
    names = ["lamp", "knapsack-exact", "skip-similar"]
    with Elsewhere():
        inputs, labels = move(inputs), torch.zeros(len(inputs), dtype=torch.long, device=DEVICE)
        result = dmscale.compare(
            lambda: move(copy.deepcopy(model)), inputs, lambda seed: [(inputs, labels)] * 20, nn.functional.cross_entropy,
            lambda net: net(inputs).sum().item(), budget="60% macs", out=tmp_path, strategies=names, seeds=1, search_steps=4,
            recovery_steps=2,
        )  # fmt: skip
    assert {row.strategy for row in result.rows} >= set(names)
    assert not [(row.strategy, row.problem) for row in result.rows if row.problem or not row.values]


def test_the_pretended_device_refuses_to_mix():
    with Elsewhere():
        x = torch.ones(3, device=DEVICE)
        assert x.device == DEVICE and (x * 2 + torch.tensor(1.0)).sum().item() == 9
        assert torch.zeros(2).device.type == "cpu" and type(x.cpu()) is torch.Tensor
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
