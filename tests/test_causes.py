"""The end of the report: how much is free, what holds the rest, and what would free it."""

import json
import re

import pytest
import torch
from nets import NETS, non_trivial
from torch import nn
from typer.testing import CliRunner

import dmscale
from dmscale import causes
from dmscale.cli import app


class Holds(nn.Module):
    """Two hidden layers that a softmax and a number hold, unless they are written as the report says."""

    def __init__(self, freed=False):
        super().__init__()
        self.freed = freed
        self.a, self.b, self.c, self.d = nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.a(x)
        e = x.exp()
        x = self.b(e / e.sum(-1, keepdim=True) if self.freed else x.cumsum(-1)).relu()
        return self.d(self.c(x.view(-1, x.shape[1] if self.freed else 24)))


def test_causes_hold_what_their_axes_index():
    """Counted by hand: an axis holds every parameter and every product that has it."""
    space = dmscale.trace(Holds(), torch.randn(2, 8))
    found = {c.axes[0]: c for c in causes.find(space)}
    total = space.cost()
    assert found["a"].params == pytest.approx((8 * 32 + 32 + 32 * 24) / total.params)
    assert found["a"].macs == pytest.approx(2 * (8 * 32 + 32 * 24) / total.macs)
    assert found["a"].reason == "cumulative (cumsum)"
    assert found["b"].params == pytest.approx((32 * 24 + 24 + 24 * 16) / total.params)
    assert found["b"].reason == "its size is fixed in a view"
    assert found["d"].reason == "an axis of the model's output"
    held = [c.macs + c.params for c in causes.find(space)]
    assert held == sorted(held, reverse=True)


def test_the_remedy_frees_the_axis():
    """Another operator than one that fixes the order, a size taken from the tensor."""
    x = torch.randn(2, 8)
    before = dmscale.trace(Holds(), x)
    assert "a" in before.frozen and "b" in before.frozen
    after = dmscale.trace(Holds(freed=True), x)
    assert {"a", "b"} <= set(after.dimensions)
    assert causes.free_share(after)["params"] > causes.free_share(before)["params"] + 0.3


@pytest.mark.parametrize("name", ["unet", "gqa_by_expand", "fused_attention", "residual_stack"])
def test_the_free_share_is_what_the_smallest_widths_save(name):
    model, inputs = NETS[name]()
    space = dmscale.trace(non_trivial(model), inputs)
    small = space.export(space.structure({n: d.lowest for n, d in space.dimensions.items() if d.kind != "depth"}))
    share = 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert causes.free_share(space)["params"] == pytest.approx(share)
    assert 0.5 < share < 1


@pytest.mark.parametrize(
    "reason, says",
    [
        ("softmax over it in blocks.3.attn (_softmax)", "e / e.sum"),
        ("no rule for the operator in the model (foo)", "register a rule"),
        ("an axis of the model's output", "output of the model"),
        ("its size is fixed in attn (power)", "keep it as a float"),
        ("its size is fixed in attn (arithmetic with 0.5)", "keep it as a float"),
        ("its size is fixed in attn (float())", "keep it as a float"),
        ("its size is fixed in attn (view)", "x.shape[i]"),
        ("the default scale of attention depends on the head size in attn (scaled_dot_product_attention)", "scale="),
        ("normalised inside a module that does more than that, in block (native_layer_norm)", "module of its own"),
        ("cumulative in ssm (cumsum)", "order or number"),
    ],
)
def test_every_reason_has_a_remedy(reason, says):
    short = causes._placeless(reason)
    assert says in causes.remedy(short)
    assert not re.search(r" in (the model|\w+\.\w+|attn|block)\b", short)


def test_a_reason_of_any_kind_is_known():
    """What the rules and the planning of gates may say begins as the table of remedies does, or is of the last kind."""
    assert all(causes.remedy(start) == text for start, text in causes.REMEDIES.items() if "fixed in" not in start)
    assert causes.remedy("rolled in x (roll)") == causes.OTHERWISE


def test_an_axis_with_several_reasons_counts_for_the_one_that_is_hardest_to_remove():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 16)

        def forward(self, x):
            return self.a(x).cumsum(-1)

    (cause,) = causes.find(dmscale.trace(Both(), torch.randn(2, 8)))
    assert cause.reason == "an axis of the model's output" and cause.params == cause.macs == 1.0


def test_what_the_user_froze_is_the_users_to_thaw():
    """Not by another operator, whatever words the reason begins with."""
    x = torch.randn(2, 8)
    space = dmscale.trace(Holds(freed=True), x, freeze="b")
    space.freeze("a", "softmax over it in calib.a (measured)")
    found = {c.axes: c for c in causes.find(space)}
    assert found["a",].reason == "softmax over it in calib.a (measured)"
    assert "yours to thaw: trace anew, without the call of space.freeze" in found["a",].remedy
    assert found["b",].remedy == "it is yours to thaw: leave it out of freeze="
    left_out = {c.axes[0]: c for c in causes.find(dmscale.trace(Holds(freed=True), x, only="b"))}
    assert left_out["a"].remedy == "it is yours to thaw: name it in only="


FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 4)
    def forward(self, x):
        return self.c(self.b(self.a(x).cumsum(-1)).relu())

def net():
    return Net(), torch.randn(1, 8)
"""


def test_the_command_and_the_table_end_with_the_report(tmp_path):
    (tmp_path / "own_net.py").write_text(FILE)
    spec = f"{tmp_path / 'own_net.py'}:net"
    text = CliRunner().invoke(app, ["trace", spec]).output
    end = " ".join(text[text.index("Free:") :].split())
    assert re.match(r"Free: \d+\.\d% of the MACs, \d+\.\d% of the parameters Frozen along an axis: ", end)
    assert "cumulative (cumsum) (a) its operator depends on the order" in end
    assert "an axis of the model's output (c) it is an output of the model" in end
    data = json.loads(CliRunner().invoke(app, ["trace", spec, "--json"]).stdout)
    assert set(data["free"]) == {"macs", "params"}
    assert [c["axes"] for c in data["causes"]] == [["a"], ["c"]]
    for cause in data["causes"]:
        assert f"Frozen along an axis: {cause['macs']:.1%} of the MACs, {cause['params']:.1%} of the parameters" in end
        assert cause["reason"] in end and cause["remedy"] in end


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_number_of_the_table_is_cut_in_a_narrow_terminal(width):
    from dmscale.tables import to_text

    class Deep(nn.Module):
        def __init__(self, net, levels=8):
            super().__init__()
            self.encoder_block = net if levels == 0 else Deep(net, levels - 1)

        def forward(self, x):
            return self.encoder_block(x)

    space = dmscale.trace(Deep(nn.Sequential(nn.Linear(8, 160), nn.ReLU(), nn.Linear(160, 4))), torch.randn(2, 8))
    text = to_text(space, width)
    (share,) = space.shares.values()
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    for shown in ("width", "160", f"{share['macs']:.1%}", f"{share['params']:.1%}"):
        assert shown in text
