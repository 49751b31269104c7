"""Results of meta kernels from memory are those of the kernels themselves."""

from __future__ import annotations

import inspect
from typing import Any

import nets
import patterns
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmscale import kernels, running
from dmscale.clone import clone

NOT_ON_META = {
    "branch_on_value", "rotary_half", "experts_grouped", "experts_by_logits", "experts_in_groups", "experts_one_by_one",
    "experts_compared",
}  # fmt: skip
"""Forwards that look at elements, or make tensors on the CPU."""


def form(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.device.type
    return [form(y) for y in x] if isinstance(x, (tuple, list)) else x


class Beside(TorchDispatchMode):
    """Runs every operator by its kernel and from memory, and notes where the results differ in form."""

    def __init__(self) -> None:
        super().__init__()
        self.differ: list[str] = []
        self.remembered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = len(kernels._results)
        if torch.Tag.inplace_view in func.tags:  # each run of it would change its argument again
            return kernels.run(func, args, kwargs)
        mine = [form(kernels.run(func, args, kwargs)) for _ in range(2)]  # when it is new, and again
        self.remembered += len(kernels._results) > before or func in kernels._FORMULAS
        out = func(*args, **kwargs)
        if any(m != form(out) for m in mine):
            self.differ.append(f"{func.name()}: {mine} against {form(out)}")
        return out


def beside(model: nn.Module, inputs: Any, training: bool = False) -> Beside:
    def bare(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    twin = clone(model, lambda t: nn.Parameter(bare(t), False) if isinstance(t, nn.Parameter) else bare(t))
    args, kwargs = running.map_tensors(bare, running.arguments(inputs))
    with torch.no_grad(), Beside() as mode:
        twin.train(training)(*args, **kwargs)
    return mode


NETS = {name: make for name, make in {**nets.NETS, **patterns.PATTERNS}.items() if name not in NOT_ON_META}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_operators_of_a_network_give_what_their_kernels_give(name: str, training: bool) -> None:
    kernels.forget()
    mode = beside(*NETS[name](), training=training)
    assert mode.differ == []
    assert mode.remembered


ACTIVATIONS = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Mish,
    nn.Softplus, nn.PReLU, nn.Softmax2d,
)  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "double", "half"])
@pytest.mark.parametrize("layer", ACTIVATIONS)
def test_activations_give_what_their_kernels_give(layer: type[nn.Module], layout: str) -> None:
    kernels.forget()
    x = torch.randn(2, 3, 4, 5)
    x = {"channels last": x.contiguous(memory_format=torch.channels_last), "transposed": x.transpose(0, 3),
         "double": x.double(), "half": x.half()}.get(layout, x)  # fmt: skip
    convolution = nn.Conv2d(x.shape[1], 6, 3, padding=1, dtype=x.dtype)
    inplace = {"inplace": True} if "inplace" in inspect.signature(layer.__init__).parameters else {}
    norms = nn.BatchNorm2d(6, dtype=x.dtype), nn.BatchNorm2d(6, track_running_stats=False, dtype=x.dtype)
    own = [m.to(x.dtype) for m in (layer(), layer(**inplace))]
    assert beside(nn.Sequential(convolution, norms[0], own[0], norms[1], own[1]), x).differ == []
    assert beside(own[0], x).differ == []


CALLS = {
    "convolutions": lambda x: [
        F.conv2d(x, torch.randn(8, 4, 3, 2)), F.conv2d(x, torch.randn(8, 2, 3, 3), torch.randn(8), 2, 1, 2, 2),
        F.conv2d(x, torch.randn(4, 1, 1, 1), None, (1, 2), (0, 1), groups=4),
        F.conv1d(x[:, :, 0], torch.randn(3, 4, 5), padding=2), F.conv_transpose2d(x, torch.randn(4, 3, 2, 2)),
        F.conv2d(x[0], torch.randn(8, 4, 3, 3)), F.conv2d(x[:, :, :1, :1], torch.randn(8, 4, 1, 1)),
    ],
    "sums": lambda x: [
        x + x, x * 2, x - 1.5, x + True, 3 - x, x * x[:, :, :1, :1], x[:, :, :1, :1] * x, x + x[0, 0, 0], x[0, 0, 0] - x,
        x[:, :1] * x[:1], torch.add(x, x, alpha=2), x * x.double(), x + x.int(), x * torch.tensor(2.0),
        x.transpose(1, 3) + x.transpose(1, 3), x.transpose(1, 3) + x.transpose(1, 3).contiguous(), x / 2, x / x, x / 0.5,
        x / x.norm(dim=1, keepdim=True).expand_as(x), x.transpose(1, 3) * x.transpose(1, 3)[:, :, :, :1].expand(2, 6, 5, 4),
        x[:1] + x[:1].contiguous(), x[:1].transpose(1, 3) + x[:1].transpose(1, 3).contiguous(), x[:, :1] - x[:, :1].contiguous(),
        x[..., :1].transpose(1, 3) + x[..., :1].transpose(1, 3).contiguous(), x[:, :2].transpose(2, 3) + x[:, :2].transpose(2, 3),
    ],
    "means": lambda x: [
        x.mean((2, 3)), x.mean(-1, keepdim=True), x.mean([0, 1, 2, 3]), x.mean(()), x.mean(1, dtype=torch.float64),
        x.transpose(1, 3).mean(1), x[0, 0, 0].mean(0),
    ],
    "joined": lambda x: [
        torch.cat([x, x]), torch.cat([x, x[:, :2], x], 1), torch.cat([x, x[..., :1]], -1), torch.cat([x, torch.empty(0)]),
        torch.cat([x, x.double()]), torch.cat([x[:, :, 0].mT, x[:, :, 0].mT], 1), torch.cat([x[:1, :, 0].mT, x[:1, :, 1].mT], 2),
        torch.cat([x[0, 0, 0, :1].expand(2, 1, 4), x[:, :, 0].mT], 1), torch.cat([x[0, 0].t(), x[0, 1].t()]),
        torch.cat([x[0].mT, x[0].double().mT]), torch.cat([x.transpose(1, 3), x.transpose(1, 3)], 1),
    ],
    "matrices": lambda x: [
        F.linear(x, torch.randn(7, 6), torch.randn(7)), torch.addmm(torch.randn(1), x[0, 0], torch.randn(6, 3)),
        torch.addmm(torch.randn(3), x[:, 0, 0], torch.randn(6, 3)),
        torch.addmm(torch.randn(3), x[0, 0, ::2], torch.randn(3, 6).t()),
        torch.addmm(torch.randn(5, 3), x[0, 0], torch.randn(6, 3)), torch.addmm(torch.randn(3), x[0, 0].t(), torch.randn(5, 3)),
    ],
    "layer norms": lambda x: [
        F.layer_norm(x, (6,)), F.layer_norm(x, (5, 6), torch.randn(5, 6)), F.layer_norm(x.transpose(1, 3), (4,)),
        F.layer_norm(x.permute(0, 2, 3, 1), (4,)), F.layer_norm(x.permute(0, 2, 3, 1), (4,), torch.randn(4), torch.randn(4)),
        F.layer_norm(x.permute(1, 0, 2, 3), (6,)), F.layer_norm(x[:, :, :1].permute(0, 2, 3, 1), (4,)),
        F.layer_norm(x[:1].permute(0, 2, 3, 1), (4,)), F.layer_norm(x[..., :1].permute(0, 2, 3, 1), (4,)),
        F.layer_norm(torch.randn(1, 4, 7).transpose(1, 2), (4,)),
    ],
    "stacked": lambda x: [
        torch.stack([x, x]), torch.stack([x, x, x], 2), torch.stack([x[0, 0, 0]], -1), torch.stack([x.transpose(1, 3)] * 2, 1),
        torch.stack([x, x.transpose(2, 3).contiguous().transpose(2, 3)]), torch.stack([x[0, 0, 0, 0]] * 3),
        torch._weight_norm_interface(x, torch.randn(2, 1, 1, 1)), torch._weight_norm_interface(x, torch.randn(1, 1, 1, 6), 3),
    ],
    "pieces": lambda x: [
        f(y, z) for f in (torch.add, torch.mul, torch.sub, torch.div)
        for y, z in (
            x.chunk(2, -1), x.chunk(2, 1), (x[..., :3], x[..., :3].contiguous()), (x[:, 0, 0], x[:, 1, 0]),
            (x[..., ::2], x[..., 1::2]),
            (x[:, :1], x[:, 2:3]), (x[..., :1], x[..., 2:3]), (x.transpose(1, 3)[..., :2], x.transpose(1, 3)[..., 2:]),
            (x[0, :, :, :1].expand(4, 5, 6), x[0]), (x[0, :, :, :3], x[1, :, :, :3].transpose(0, 1).contiguous().transpose(0, 1)),
        )
    ],
    "compared": lambda x: [
        f(y)
        for f in (lambda y: y == 0, lambda y: y > 0.5, lambda y: y != 1, lambda y: y <= 2, lambda y: y < 1, lambda y: y >= True)
        for y in (x, x.int(), x[..., 0], x.transpose(1, 3), x[0, 0, 0, 0], x > 0)
    ],
    "lengths": lambda x: [
        torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(x, 1, (1, -1), True), torch.linalg.vector_norm(x),
        torch.linalg.vector_norm(x.transpose(1, 3), dim=1, keepdim=True), x.cumsum(1), x.cumsum(-1), x.transpose(0, 2).cumsum(1),
        torch.linalg.vector_norm(x[..., ::2], dim=(0, 2)), x[0, 0, 0].cumsum(0), x[0, 0, 0, 0].cumsum(0), x.int().cumsum(1),
    ],
    "of every element": lambda x: [
        f(y) for f in (torch.neg, torch.exp, torch.sin, torch.cos, torch.relu, torch.sigmoid)
        for y in (
            x, x.transpose(1, 3), x.transpose(0, 1), x[:, :, ::2], x[:1].transpose(1, 3), x[..., :1], x[:1].expand(2, 4, 5, 6),
        )
    ],
    "clamped": lambda x: [
        F.normalize(x, dim=-1), F.normalize(x.transpose(1, 3), dim=1), F.normalize(x[:, :, :1], dim=1), x.clamp_min(0),
        x.transpose(1, 2).clamp_min(0.5), x[..., :1].clamp_min(1), x.int().clamp_min(1),
    ],
    "group norms": lambda x: [
        F.group_norm(x, 2), F.group_norm(x, 4, torch.randn(4), torch.randn(4)), F.group_norm(x.transpose(1, 3), 3),
    ],
    "resized": lambda x: [
        F.interpolate(x, scale_factor=2, mode=mode, align_corners=corners)
        for mode, corners in (("nearest", None), ("bilinear", False), ("bicubic", True))
    ] + [F.interpolate(x[:, :, 0], 7), F.interpolate(x.transpose(1, 3), (7, 3), mode="bilinear")],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("calls", CALLS)
def test_formulas_give_what_the_kernels_give(calls: str, dtype: torch.dtype) -> None:
    kernels.forget()
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad(), torch.device("meta"), Beside() as mode:
            for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)):
                CALLS[calls](x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mode.differ == []
    assert mode.remembered


def test_groups_of_rows_have_the_form_that_the_cpu_gives_them() -> None:
    """The meta kernel refuses float32, in which a mixture is traced on the CPU."""
    a, b, ends = torch.randn(10, 8), torch.randn(3, 8, 12), torch.tensor([4, 4, 10], dtype=torch.int32)
    for weights in (b, b.mT.contiguous().mT):
        expected = torch._grouped_mm(a, weights, offs=ends)
        given = kernels.told(torch.ops.aten._grouped_mm.default, (a.to("meta"), weights.to("meta")))
        assert form(given)[:3] == form(expected)[:3]
    half = a.to("meta", torch.bfloat16), b.to("meta", torch.bfloat16)
    assert kernels.told(torch.ops.aten._grouped_mm.default, half) is None


@pytest.mark.parametrize("wrong", [
    lambda x: F.conv2d(x, torch.randn(8, 4, 9, 9)), lambda x: F.conv2d(x, torch.randn(8, 3, 1, 1)), lambda x: x + x[..., :2],
    lambda x: torch.cat([x, x[0]]), lambda x: torch.cat([x, x[..., :2]]), lambda x: torch.addmm(x[0, 0, 0], x[0, 0], x[0, 0]),
])  # fmt: skip
def test_what_a_kernel_refuses_is_refused(wrong: Any) -> None:
    with torch.no_grad(), torch.device("meta"):
        x = torch.randn(2, 4, 5, 6)
        with pytest.raises((RuntimeError, IndexError)):
            wrong(x)
        with pytest.raises((RuntimeError, IndexError)), Beside():
            wrong(x)


def test_equal_numbers_of_another_type_are_other_arguments() -> None:
    x = torch.empty(3, dtype=torch.int64, device="meta")
    add = torch.ops.aten.add.Tensor
    assert [kernels.run(add, (x, n), {}).dtype for n in (1, 1.0, 1, 1.0)] == [torch.int64, torch.float32] * 2


def test_an_operator_that_changes_the_form_of_its_argument_is_run() -> None:
    for _ in range(2):
        x = torch.empty(6, device="meta")
        kernels.run(torch.ops.aten.resize_.default, (x, [2, 5]), {})
        assert x.shape == (2, 5)
        kernels.run(torch.ops.aten.unsqueeze_.default, (x, 0), {})
        assert x.shape == (1, 2, 5)


def test_views_share_their_storage() -> None:
    for _ in range(2):
        x = torch.empty(6, device="meta")
        assert kernels.run(torch.ops.aten.view.default, (x, [2, 3]), {})._base is x
