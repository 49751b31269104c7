"""Operators without PyTorch's way to them: what is noted of them is what is noted when they go it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import patterns
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmscale
from dmscale import axes, direct
from dmscale.arrivals import Arrivals, transparent_functional
from dmscale.tracer import Tracer

NETS = {**nets.NETS, **patterns.PATTERNS}


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches the short way off."""

    def off() -> None:
        monkeypatch.setattr(direct, "result", lambda *args: None)
        monkeypatch.setattr(direct, "layer", lambda module: None)

    return off


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions of which the result was told, as they are called."""
    told: list[Any] = []
    result = direct.result

    def noted(tracer: Any, function: Any, *rest: Any) -> Any:
        out = result(tracer, function, *rest)
        if out is not None:
            told.append(function)
        return out

    monkeypatch.setattr(direct, "result", noted)
    return told


def summary(space: dmscale.SearchSpace) -> dict[str, Any]:
    structures = [space.full(), *map(space.sample, range(3))]
    return {
        "dimensions": [(n, d.kind, d.size, d.lowest, d.multiple, d.members) for n, d in space.dimensions.items()],
        "frozen": space.frozen.keys(),
        "costs": [space.cost(s) for s in structures],
        "attributes": {str(a): q.evaluate({v: v.size for v in q.variables}) for a, q in space.attributes.items()},
        "weights": sorted((s.module, s.name, [i for i, _ in s.dims]) for s in space.sites.weights),
        "others": sorted(s.module for s in (*space.sites.inputs, *space.sites.norms, *space.sites.calls)),
        "stacks": {n: s.paths for n, s in space.stacks.items()},
    }


@pytest.mark.parametrize("name", NETS)
def test_the_short_way_finds_the_space_of_the_long_one(name: str, long_way: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    short = dmscale.trace(model.eval(), inputs, verify=False)
    long_way()
    long = dmscale.trace(model, inputs, verify=False)
    assert summary(short) == summary(long) and short.trace.on == long.trace.on


def steps(function: Callable[[Tensor], Any], x: Tensor) -> tuple[list[Any], list[Any], Tracer]:
    """(result in form, the operators that ran and what depends on the input of what each gave, the tracer)."""
    tracer = Tracer(meta=True)
    with torch.no_grad(), transparent_functional(), tracer, Arrivals(tracer):
        x = tracer.watch(x.to("meta"), data=True)
        outs = function(x)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    form = [(tuple(t.shape), t.stride(), t.dtype, [axes.size(d) for d in tracer.dims(t)]) for t in outs]
    written = [(a.element, [axes.size(d) for d in a.dims]) for a in tracer.record.activations]
    ran = [(s.operator, len(s.takes), len(s.gives), s.writes) for s in tracer.record.steps.values()]
    return form, [written, ran], tracer


def w(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


CALLS: dict[str, list[Callable[[Tensor], Any]]] = {  # of x (2, 4, 5, 6)
    "convolutions": [
        lambda x: F.conv2d(x, w(8, 4, 3, 2)), lambda x: F.conv2d(x, w(8, 2, 3, 3), w(8), 2, 1, 2, 2),
        lambda x: F.conv2d(x, w(4, 1, 1, 1), None, (1, 2), (0, 1), groups=4), lambda x: F.conv2d(x[0], w(8, 4, 3, 3)),
        lambda x: F.conv1d(x[:, :, 0], w(3, 4, 5), padding=2), lambda x: F.conv2d(x, w(8, 4, 3, 3), padding="same"),
        lambda x: F.conv2d(x.transpose(1, 3), w(8, 6, 1, 1)), lambda x: F.conv2d(x, w(3, 4, 1, 1), None, [1], [0]),
    ],
    "norms": [
        lambda x: F.batch_norm(x, w(4), w(4), w(4), w(4)), lambda x: F.batch_norm(x, w(4), w(4)),
        lambda x: F.batch_norm(x, w(4), w(4), None, None, True), lambda x: F.batch_norm(x, None, None, w(4), w(4), True),
        lambda x: F.layer_norm(x, (6,)), lambda x: F.layer_norm(x, (5, 6), w(5, 6)),
        lambda x: F.layer_norm(x.transpose(1, 3), (4,), w(4), w(4)),
    ],
    "arithmetic": [
        lambda x: x + x, lambda x: x + 1, lambda x: 1 + x, lambda x: x * 2.0, lambda x: 2 * x, lambda x: x - x, lambda x: 1 - x,
        lambda x: x / 2, lambda x: x / x, lambda x: 2 / x, lambda x: x * x[:, :1], lambda x: x[:, :1] * x, lambda x: x + x.int(),
        lambda x: x * torch.tensor(2.0), lambda x: x.add(x, alpha=2), lambda x: torch.add(x, x), lambda x: x + True,
        lambda x: x.int() + 1, lambda x: x.int() / 2, lambda x: x.add_(x), lambda x: x.add_(1), lambda x: x.add_(x[:, :1]),
        lambda x: x**2, lambda x: x.pow(0.5), lambda x: 2**x, lambda x: x**x, lambda x: x.int() ** 2, lambda x: x.rsqrt(),
        lambda x: x * x.shape[1], lambda x: x / x.shape[1], lambda x: x + x.double(), lambda x: x * x.transpose(2, 3).mT,
    ],
    "activations": [
        lambda x: F.relu(x), lambda x: F.relu(x, inplace=True), lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.silu(x), lambda x: F.silu(x, inplace=True), lambda x: F.hardswish(x), lambda x: F.hardsigmoid(x),
        lambda x: x.sigmoid(), lambda x: torch.sigmoid(x.transpose(1, 2)), lambda x: F.relu(x.int()), lambda x: x.relu(),
        lambda x: F.softmax(x, 1), lambda x: x.softmax(dim=-1), lambda x: torch.softmax(x, 1, torch.float64),
        lambda x: F.softmax(x.transpose(1, 2), -1), lambda x: torch.softmax(x, dim=1, dtype=None),
    ],
    "views": [
        lambda x: x.view(2, 20, 6), lambda x: x.view([2, -1]), lambda x: x.view(torch.int32), lambda x: x.view(x.shape[0], -1),
        lambda x: x.reshape(2, 2, 2, 30), lambda x: x.transpose(1, 2).reshape(2, -1), lambda x: torch.reshape(x, (4, 60)),
        lambda x: x.flatten(), lambda x: x.flatten(1), lambda x: x.flatten(1, 2), lambda x: torch.flatten(x, 2),
        lambda x: x.flatten(1, 1),
        lambda x: x.transpose(1, 2).flatten(1), lambda x: x.flatten(start_dim=2), lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.permute((0, -1, 1, 2)), lambda x: torch.permute(x, (3, 2, 1, 0)), lambda x: x.permute(dims=(0, 1, 3, 2)),
        lambda x: x.transpose(1, -1), lambda x: torch.transpose(x, 0, 1), lambda x: x.transpose(dim0=0, dim1=1), lambda x: x.mT,
        lambda x: x[:, :2], lambda x: x[:, :4, :], lambda x: x[:, :9], lambda x: x[:, 1:-1], lambda x: x[:, 3:3],
        lambda x: x[1:, :2], lambda x: x[:, 0], lambda x: x[:, ::2], lambda x: x[1:], lambda x: x[..., :2], lambda x: x[:, None],
        lambda x: x[:, : x.shape[1] // 2], lambda x: x[:, : torch.tensor(2)], lambda x: x[:, :2, :].add_(1), lambda x: x[:, -9:2],
        lambda x: x.unbind(), lambda x: x.unbind(1), lambda x: x.unbind(dim=-1), lambda x: x.view(2, 4, 30).add_(1),
    ],
    "others": [
        lambda x: torch.cat([x, x]), lambda x: torch.cat([x, x], dim=1), lambda x: torch.cat((x, x.double()), 1),
        lambda x: torch.cat([x, torch.empty(0, device="meta")]), lambda x: torch.cat([x.transpose(1, 3), x.transpose(1, 3)], 1),
        lambda x: x.mean((2, 3)), lambda x: x.mean(-1, keepdim=True), lambda x: x.mean(), lambda x: x.mean(dim=[1, 2]),
        lambda x: x.mean(1, dtype=torch.float64), lambda x: torch.mean(x, 1, True), lambda x: x.transpose(1, 3).mean(1),
        lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, (1, 1)), lambda x: F.adaptive_avg_pool2d(x, 2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", CALLS)
def test_functions_are_the_operators_that_pytorch_makes_of_them(
    kind: str, autocast: bool, long_way: Callable[[], None], found: list[Any]
) -> None:
    x = torch.randn(2, 4, 5, 6)
    with torch.autocast("cpu", enabled=autocast):
        short = [steps(function, x)[:2] for function in CALLS[kind]]
        assert bool(found) is not autocast  # there PyTorch casts what operators take
        long_way()
        for function, noted in zip(CALLS[kind], short):
            assert noted == steps(function, x)[:2]


PRODUCTS: list[Callable[[Tensor], Any]] = [
    lambda x: F.linear(x, w(7, 6), w(7)), lambda x: F.linear(x, w(7, 6)), lambda x: F.linear(x[0, 0], w(7, 6), w(7)),
    lambda x: F.linear(x[0, 0, 0], w(7, 6)), lambda x: F.linear(x.transpose(1, 2), w(7, 6), w(7)), lambda x: x @ w(6, 3),
    lambda x: torch.matmul(x, x.mT), lambda x: x.transpose(1, 2) @ w(6, 3), lambda x: x[0, 0] @ x[0, 0].t(),
    lambda x: x.transpose(1, 2) @ x.transpose(1, 2).mT, lambda x: x[:1].transpose(1, 2) @ x[:1].transpose(1, 2).mT,
    lambda x: x @ x[:, :1].mT, lambda x: x @ w(6), lambda x: w(5) @ x, lambda x: x[0] @ x[0].mT, lambda x: w(3, 5) @ x,
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(PRODUCTS)))
def test_a_product_of_matrices_is_noted_as_one(i: int, long_way: Callable[[], None]) -> None:
    """One operator in place of views and a product of two or three dimensions: the same result, MACs and writes."""

    def noted() -> Any:
        form, (written, _), tracer = steps(PRODUCTS[i], torch.randn(2, 4, 5, 6))
        macs = [torch.Size(axes.size(d) for d in term.dims).numel() for term in tracer.record.terms]
        contracted = [[axes.size(own) for _, own in c.operands] for c in tracer.record.contractions]
        by_bytes = [element * torch.Size(sizes).numel() for element, sizes in written]
        return form, macs, contracted, by_bytes, tracer.record.conflicts

    short = noted()
    long_way()
    assert short == noted()


def changed_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: F.linear(x, layer.weight) * 2  # type: ignore[method-assign, operator]
    return layer


def plain_tensors(layer: nn.Module) -> nn.Module:
    weight = layer.weight
    del layer.weight
    layer.weight = weight.detach() * 2  # type: ignore[operator]
    return layer


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


UNUSUAL = {
    "forward": changed_forward,
    "plain tensors": plain_tensors,
    "class": lambda layer: Doubled(6, 6),
    "hook": lambda layer: (layer.register_forward_hook(lambda m, args, out: out * 2), layer)[1],
    "parametrised": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "pruned": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("how", UNUSUAL)
def test_layers_that_somebody_has_changed_do_what_they_do(how: str, long_way: Callable[[], None]) -> None:
    import torch.nn.utils.prune  # noqa: F401

    torch.manual_seed(0)
    layer = UNUSUAL[how](nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3)).eval()
    space = dmscale.trace(model, torch.randn(2, 5))
    space.export(space.sample(0))
    short = summary(space)
    long_way()
    assert short == summary(dmscale.trace(model, torch.randn(2, 5)))


def test_layers_that_are_not_plain_are_followed_all_the_same(long_way: Callable[[], None]) -> None:
    """What a forward says of sizes (groups, statistics) is heard where a layer does more than its operator."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=4, padding_mode="reflect"), nn.BatchNorm2d(12, momentum=None), nn.GELU("tanh"),
        nn.Conv2d(12, 6, 3, padding="same", groups=2), nn.BatchNorm2d(6, track_running_stats=False), nn.Dropout(0.5),
        nn.Conv2d(6, 4, 1),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 7, 7)
    space = dmscale.trace(model, x, verify=False)
    short = summary(space)
    assert short["dimensions"] and short["attributes"] and space.trace.on == "meta"
    space = dmscale.trace(model, x)
    space.export(space.sample(1))
    long_way()
    assert short == summary(dmscale.trace(model, x, verify=False))


def test_a_layer_that_takes_its_tensor_by_name_is_traced_without_values() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(input=x).relu())

    space = dmscale.trace(Named(), torch.randn(2, 5))
    assert space.trace.on == "meta" and list(space.dimensions) == ["up"]


def test_a_hook_on_all_modules_sees_every_layer() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        dmscale.trace(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 5), verify=False)
    finally:
        handle.remove()
    assert seen == ["Linear", "ReLU", "Linear", "Sequential"]


def test_forwards_that_have_been_replaced_in_pytorch_itself_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[nn.Module] = []
    forward = nn.Linear.forward

    def noted(self: nn.Linear, x: Tensor) -> Tensor:
        ran.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", noted)
    dmscale.trace(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 5), verify=False)
    assert len(ran) == 2


def test_most_of_a_network_goes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nobody would notice that a new PyTorch calls its functions otherwise."""
    dispatched: list[Any] = []
    dispatch = Tracer.__torch_dispatch__

    def counted(self: Tracer, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dispatched.append(func)
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(Tracer, "__torch_dispatch__", counted)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=2), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Dropout(), nn.Linear(12, 2),
    ).eval()  # fmt: skip
    dmscale.trace(model, torch.randn(2, 3, 9, 9), verify=False)
    assert dispatched == []
