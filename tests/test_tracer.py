"""The tracer: MACs are those that PyTorch counts, unknown operators freeze what passes, nothing stays behind."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, counted_macs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import dmscale
from dmscale import axes, sizes
from dmscale.arrivals import Arrivals, transparent_functional
from dmscale.errors import TraceError
from dmscale.tracer import Tracer
from dmscale.tracing import read
from dmscale.tree import walk

small = st.integers(1, 5)


def traced(function, *tensors):
    """Run `function` as a model is run; its result and the tracer."""
    tracer = Tracer()
    watched = [tracer.watch(t.clone()) for t in tensors]
    with torch.no_grad(), transparent_functional(), tracer, Arrivals(tracer):
        out = function(*watched)
    return out, tracer


def macs(tracer):
    return sum(math.prod(axes.measure(d, {}) for d in term.dims) for term in tracer.record.terms)


def counted(function, *tensors):
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = function(*tensors)
    return out, counter.get_total_flops() / 2


def agrees(function, *tensors):
    """The same result, the same MACs, and axes of the right sizes."""
    out, tracer = traced(function, *tensors)
    expected, number = counted(function, *tensors)
    torch.testing.assert_close(out, expected)
    assert macs(tracer) == number > 0
    assert [axes.size(d) for d in tracer.dims(out)] == list(out.shape)
    assert not tracer.record.conflicts and not tracer.record.unknown
    return tracer


# -- MACs ----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(small, small, small, small)
def test_macs_of_matrix_products(b, n, k, m):
    agrees(torch.mm, torch.randn(n, k), torch.randn(k, m))
    agrees(torch.bmm, torch.randn(b, n, k), torch.randn(b, k, m))
    agrees(torch.matmul, torch.randn(b, 2, n, k), torch.randn(k, m))
    agrees(torch.addmm, torch.randn(m), torch.randn(n, k), torch.randn(k, m))
    agrees(torch.baddbmm, torch.randn(b, n, m), torch.randn(b, n, k), torch.randn(b, k, m))
    agrees(F.linear, torch.randn(b, n, k), torch.randn(m, k), torch.randn(m))


@pytest.mark.parametrize("rank", [1, 2, 3])
@settings(max_examples=8)
@given(st.data())
def test_macs_of_convolutions(rank, data):
    b, g, i, o, kernel = (data.draw(st.integers(1, 3)) for _ in range(5))
    stride, padding = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1))
    convolution = getattr(F, f"conv{rank}d")
    transposed = getattr(F, f"conv_transpose{rank}d")
    x = torch.randn(b, g * i, *[5] * rank)
    settings = {"stride": stride, "padding": padding, "groups": g}
    agrees(lambda x, w: convolution(x, w, **settings), x, torch.randn(g * o, i, *[kernel] * rank))
    agrees(lambda x, w: transposed(x, w, **settings), x, torch.randn(g * i, o, *[kernel] * rank))


@settings(max_examples=10)
@given(st.data())
def test_macs_of_einsum(data):
    letters = {letter: data.draw(small) for letter in "bhqkd"}
    for text in ("bhqd,bhkd->bhqk", "bhqk,bhkd->bqhd", "qd,kd->qk", "bqd,hd->bhq", "bqd,dh->bqh"):
        operands = text.split("->")[0].split(",")
        tensors = [torch.randn([letters[letter] for letter in operand]) for operand in operands]
        expected = math.prod(letters[letter] for letter in set(text) & set(letters))
        out, tracer = traced(lambda *t, text=text: torch.einsum(text, *t), *tensors)
        assert macs(tracer) in (expected, 0)  # PyTorch multiplies and sums where a letter has size one
        if min(letters.values()) > 1:
            agrees(lambda *t, text=text: torch.einsum(text, *t), *tensors)


@settings(max_examples=10)
@given(small, small, small, small, st.integers(1, 3), st.booleans())
def test_macs_of_attention(b, h, n, d, repeats, causal):
    q, k, v = torch.randn(b, h * repeats, n, d), torch.randn(b, h, n, d), torch.randn(b, h, n, d)
    gqa = {"enable_gqa": True} if repeats > 1 else {}
    agrees(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, **gqa), q, k, v)


def test_attention_by_the_fused_kernel_counts_both_products():
    """The kernel that would run here is fused, and PyTorch's counter does not see into it."""
    q = torch.randn(2, 3, 4, 5)
    out, tracer = traced(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    assert macs(tracer) == 2 * (2 * 3 * 4 * 4 * 5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))


# -- operators without a rule --------------------------------------------------------------------------------

_library = torch.library.Library("dmscale_tests", "DEF")
_library.define("odd(Tensor x) -> Tensor")
_library.impl("odd", lambda x: x.flip(-1) * 2, "CompositeExplicitAutograd")


class Odd(nn.Module):
    def forward(self, x):
        return torch.ops.dmscale_tests.odd(x)


class Branches(nn.Module):
    """One branch passes an unknown operator, the other does not."""

    def __init__(self):
        super().__init__()
        self.a, self.odd, self.b = nn.Linear(4, 6), Odd(), nn.Linear(6, 3)
        self.c, self.d = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.b(self.odd(self.a(x))) + self.d(self.c(x).relu())


def test_an_unknown_operator_freezes_what_passes_through_it_and_nothing_else():
    trace = read(Branches(), torch.randn(2, 4))
    assert trace.record.unknown == {"odd": {"odd": None}}
    for name, position in [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]:
        assert not axes.is_free(trace.slots[name][position]), name
    for name, position in [("c.weight", 0), ("c.bias", 0), ("d.weight", 1)]:
        assert axes.is_free(trace.slots[name][position]), name
    (reason,) = axes.reasons(trace.slots["a.weight"][0])
    assert reason == "no rule for the operator in odd (odd)"


def test_a_conflict_names_operator_and_module():
    class Flat(nn.Module):
        def forward(self, x):
            return x.view(torch.float16).float()  # two numbers for each

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.flat, self.b = nn.Linear(4, 6), Flat(), nn.Linear(12, 2)

        def forward(self, x):
            return self.b(self.flat(self.a(x)))

    trace = read(Model(), torch.randn(2, 2, 4))
    assert any(line.startswith("flat (view)") for line in trace.record.conflicts)
    assert any("in flat (view)" in r for r in axes.reasons(trace.slots["a.weight"][0]))


def test_what_conflicts_is_counted_all_the_same():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 9, 1)
            self.grouped = nn.Conv2d(15, 6, 3, groups=3)

        def forward(self, x):
            parts = self.c(self.b(x)).unflatten(1, (3, 3)).flatten(1, 2)
            return self.grouped(
                torch.cat([self.a(x), x[:, :2], parts], 1)
            )  # of the three groups, 5 each, one ends in a part

    model, x = Model(), torch.randn(2, 3, 8, 8)
    trace = read(model, x)
    assert any(line.startswith("grouped (convolution)") for line in trace.record.conflicts)
    assert dmscale.trace(model, x).cost().macs == counted_macs(model, (x,))


def test_two_views_that_do_not_fit_name_the_module():
    class Rows(nn.Module):
        def forward(self, x):
            return x.reshape(len(x), 3, -1)  # of the two rows of six, three of four

    model = nn.Sequential(nn.Linear(4, 6), Rows(), nn.Linear(4, 2))
    trace = read(model, torch.randn(2, 2, 4))
    rows, rest = axes.atoms(trace.slots["0.weight"][0])
    assert (rows.size, rest.size) == (3, 2) and not trace.record.conflicts and not rest.reasons
    assert list(rows.reasons) == ["two views of it do not fit (2 against 3) in 1 (view)"]


# -- nothing stays behind ------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, fails=False):
        super().__init__()
        self.width, self.heads, self.fails = 8, 2, fails
        self.mha = nn.MultiheadAttention(self.width, self.heads, batch_first=True)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.norm(self.mha(x, x, x)[0])
        if self.fails:
            raise ValueError("a forward that fails")
        return F.dropout(x, 0.5) + torch.rand(8)


def state_of_the_world():
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    functions = [getattr(m, n, None) for m in (torch.nn.functional, torch.functional) for n in names]
    listener = (sizes._listener.equal, sizes._listener.escaped)
    modes = (_get_current_function_mode_stack(), _get_current_dispatch_mode_stack())
    return functions, torch.backends.mha.get_fastpath_enabled(), listener, modes, torch.is_grad_enabled()


def state_of(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [{k: (type(v), v) for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    held = model.state_dict(keep_vars=True).values()
    tensors = [(id(t), dict(t.__dict__), t.device, t.requires_grad) for t in held]
    return hooks, attributes, tensors, [m.training for m in model.modules()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fast_path", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, fast_path, training):
    model, x = Attention(fails).train(training), torch.randn(2, 3, 8)
    before_values = {k: v.clone() for k, v in model.state_dict().items()}
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        before, own, rng = state_of_the_world(), state_of(model), torch.get_rng_state()
        if fails:
            with pytest.raises(TraceError, match="a forward that fails"):
                read(model, x)
        else:
            read(model, x)
        assert state_of_the_world() == before and torch.is_grad_enabled()
        assert state_of(model) == own
        assert torch.equal(torch.get_rng_state(), rng)
        assert not x.__dict__
        for k, v in model.state_dict().items():
            torch.testing.assert_close(v, before_values[k], rtol=0, atol=0)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_failing_module_is_named():
    model = nn.Sequential(nn.Linear(8, 8), Attention(fails=True))
    with pytest.raises(TraceError, match="in module '1'"):
        read(model, torch.randn(2, 3, 8))


@pytest.mark.parametrize("name", NETS)
def test_a_walk_gives_the_modules_that_pytorch_gives(name):
    """Shared modules once, or at each of their places, parents first."""
    model, _ = NETS[name]()
    shared = nn.ModuleDict({"a": model, "b": nn.ModuleList([model, nn.ReLU()])})
    for tree in (model, shared):
        assert walk(tree) == list(tree.named_modules())
        assert walk(tree, again=True) == list(tree.named_modules(remove_duplicate=False))


class _Doubled(nn.Module):
    """A module with hooks of the user's own, which change what goes in and out."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)
        self.inner.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.inner.register_forward_hook(lambda module, args, out: out.relu())

    def forward(self, x):
        return self.head(self.inner(x))


def test_calls_are_noted_with_and_without_hooks_of_the_users_own():
    model = _Doubled()
    space = dmscale.trace(model, torch.randn(3, 8))
    calls = {call.path: call for call in space.trace.record.calls}
    assert set(calls) == {"", "inner", "head"}
    inner, head, whole = calls["inner"], calls["head"], calls[""]
    assert whole.start <= inner.start < inner.end <= head.start < head.end <= whole.end
    assert [d.size for d in space.dimensions.values()] == [6]
    assert not any("_compiled_call_impl" in vars(m) for m in model.modules())


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_after_a_trace_that_failed(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(dmscale.TraceError):
            dmscale.trace(nn.Linear(3, 4), torch.randn(2, 5))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
