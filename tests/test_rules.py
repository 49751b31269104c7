"""Every operator rule is proven on PyTorch's own operator samples; see `laws` for the law.

A new rule needs a sample: most operators have one in PyTorch's OpInfo database, which is run here as a whole and whose
ATen calls are recorded.  `by_hand` adds what it does not reach.
"""

import functools
import itertools
import random
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from laws import Call, Recorder, check

from dmscale.rules import RULES
from dmscale.tracer import POINTWISE, Tracer

aten = torch.ops.aten

CANNOT_RUN_HERE = {
    "cudnn_batch_norm": "needs CUDA",
    "miopen_batch_norm": "needs ROCm",
    "mkldnn_adaptive_avg_pool2d": "takes tensors in oneDNN's own layout, which cannot be indexed",
}
"""Operators without a proof of their own: their rule is that of operators which have one (tested below)."""


def name_of(func):
    return func._overloadpacket.__name__


def is_pointwise(func):
    return func not in RULES and (func in POINTWISE or torch.Tag.pointwise in func.tags)


@functools.cache
def recorded():
    """(calls of operators with a rule, calls of pointwise operators) in PyTorch's operator samples."""
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db

    def seed(*_):  # torch.manual_seed formats a stack trace for each kind of device: a minute in all
        random.seed(0), np.random.seed(0), torch.default_generator.manual_seed(0)

    ruled, pointwise = Recorder(lambda f: f in RULES, 40, 6), Recorder(is_pointwise, 3, 2)
    with (
        warnings.catch_warnings(),
        mock.patch.object(common_utils, "set_rng_seed", seed),
        mock.patch.object(common_utils, "extract_test_fn", lambda: None),  # names the sample in error messages
    ):
        warnings.simplefilter("ignore")
        for op in op_db:
            if torch.float32 not in op.dtypes:
                continue
            ruled.next_source(), pointwise.next_source()
            samples = list(itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=False), 40))
            for sample in samples[:: max(1, len(samples) // 10)]:
                try:
                    with ruled, pointwise:
                        op(sample.input, *sample.args, **sample.kwargs)
                except Exception:  # some samples need what this build of PyTorch lacks
                    continue
    return ruled.calls, pointwise.calls


def by_hand():
    """Calls of operators that the samples do not reach: composite ones, in-place ones, kernels of other paths."""
    x, image, volume = torch.randn(4, 6), torch.randn(2, 4, 6, 6), torch.randn(2, 6, 8)
    channels = [torch.rand(4) + 0.5 for _ in range(4)]
    index = torch.randint(0, 4, (3, 6))
    calls = [
        # composite: seen only where nothing takes them apart (inference mode, some backends)
        (aten.argsort.default, x, 1), (aten.argsort.stable, x, {"stable": True, "dim": 0}),
        (aten.topk.default, volume, 2, 0), (aten.topk.default, volume, 6, 1), (aten.topk.default, torch.tensor(1.0), 1),
        (aten.avg_pool1d.default, volume, [2]), (aten.adaptive_avg_pool1d.default, volume, [4]),
        (aten.contiguous.default, x), (aten.positive.default, x), (aten.lift.default, x),
        (aten.reshape.default, volume, [2, 2, 3, 8]), (aten.reshape.default, volume, [12, -1]),
        (aten._reshape_alias.default, volume, [2, 48], [48, 1]),
        (aten._reshape_alias.default, volume, [2, 2, 24], [48, 24, 1]),
        (aten.chunk.default, volume, 2, 1), (aten.chunk.default, volume, 3, -1),
        (aten.unsafe_chunk.default, volume, 2, 2),
        (aten.unsafe_split_with_sizes.default, volume, [2, 4], 1),
        (aten.narrow.default, volume, 1, 2, 3), (aten.narrow.default, volume, -1, 0, 8),
        (aten.softmax.int, volume, 1), (aten.log_softmax.int, volume, -1),
        (aten.swapaxes.default, volume, 0, -1), (aten.rand_like.default, x), (aten.unsqueeze_.default, x, 1),
        (aten.squeeze_.default, x[:, None]), (aten.squeeze_.dim, x[:, None], 1), (aten.squeeze_.dim, x, 0),
        (aten.transpose_.default, volume, 0, 2), (aten.t_.default, x),
        (aten.select.int, volume, 1, 2), (aten.select.int, volume, -1, -1), (aten.unbind.int, volume, 1),
        (aten.view.default, volume, [2, 3, 2, 8]), (aten.view.default, volume, [96]), (aten.view.dtype, x, torch.int32),
        (aten.slice.Tensor, volume, 2, 1, None, 1), (aten.slice.Tensor, volume, 2, 0, None, 2),
        (aten.slice.Tensor, volume, 2, 1, 6, 2), (aten.slice.Tensor, volume, 2, -3, -1),
        (aten.as_strided.default, x, [4, 6], [6, 1]), (aten.as_strided.default, torch.randn(3, 3), [3, 3], [1, 3]),
        (aten.as_strided_.default, x, [4, 6], [6, 1]),
        (aten.view_as_real.default, torch.complex(x, x)), (aten.view_as_real_copy.default, torch.complex(x, x)),
        (aten.view_as_complex.default, torch.randn(3, 4, 2)), (aten.view_as_complex_copy.default, torch.randn(3, 4, 2)),
        (aten.pixel_unshuffle.default, image, 2), (aten.pixel_shuffle.default, torch.randn(2, 12, 3, 3), 2),
        (aten.native_channel_shuffle.default, image, 2), (aten.channel_shuffle.default, torch.randn(1, 12, 2, 2), 3),
        (aten.constant_pad_nd.default, volume, [0, 0, 2, 1]), (aten.constant_pad_nd.default, volume, [-2, -1], 0.0),
        (aten.unfold.default, volume, -1, 3, 2), (aten.unfold.default, volume, 1, 3, 2),
        # contractions
        (aten._sparse_addmm.default, torch.zeros(3, 4), torch.randn(3, 6), torch.randn(6, 4)),
        *((aten.linear.default, torch.randn(*rows, 6), torch.randn(4, 6), b)
          for rows in [(3,), (2, 3), (2, 5, 3)] for b in (None, torch.randn(4))),
        (aten.matmul.default, volume, torch.randn(8, 5)), (aten.matmul.default, torch.randn(2, 3, 6, 8), torch.randn(8, 5)),
        (aten.matmul.default, volume, volume.transpose(1, 2)),
        (aten.matmul.default, torch.randn(2, 3, 6, 8), torch.randn(2, 3, 8, 4)),
        (aten._grouped_mm.default, torch.randn(8, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16(),
         torch.tensor([3, 8], dtype=torch.int32)),
        *((aten.convolution.default, torch.randn(2, i, *[5] * n), torch.randn(o, i // g, *[3] * n), b, [1] * n, [1] * n,
           [1] * n, False, [0] * n, g)
          for n in (1, 2, 3)
          for i, o, g, b in [(6, 4, 1, None), (6, 4, 2, torch.randn(4)), (4, 4, 4, None), (4, 12, 4, None)]),
        *((aten.convolution.default, torch.randn(2, i, *[5] * n), torch.randn(i, o // g, *[3] * n), b, [2] * n, [1] * n,
           [1] * n, True, [1] * n, g)
          for n in (1, 2) for i, o, g, b in [(6, 4, 1, None), (6, 4, 2, torch.randn(4)), (4, 4, 4, None)]),
        # normalisations
        (aten._fused_rms_norm.default, volume, [8], torch.randn(8), 1e-5),
        (aten._fused_rms_norm.default, volume, [6, 8], None, 1e-5),
        (aten._native_batch_norm_legit_no_training.default, image, *channels, 0.1, 1e-5),
        (aten._native_batch_norm_legit_functional.default, image, *channels, False, 0.1, 1e-5),
        (aten._native_batch_norm_legit_functional.default, image, *channels, True, 0.1, 1e-5),
        (aten._batch_norm_no_update.default, image, *channels, 0.1, 1e-5),
        (aten._weight_norm_interface.default, torch.randn(4, 6, 3), torch.rand(4, 1, 1), 0),
        (aten._weight_norm_interface.default, torch.randn(4, 6, 3), torch.rand(1, 1, 3), 2),
        (aten.native_group_norm.default, torch.randn(2, 12, 3, 3), torch.randn(12), torch.randn(12), 2, 12, 9, 4, 1e-5),
        (aten.native_group_norm.default, image, torch.randn(4), None, 2, 4, 36, 4, 1e-5),
        (aten._softmax_backward_data.default, x, x.softmax(1), 1, torch.float32),
        (aten._log_softmax_backward_data.default, x, x.log_softmax(0), 0, torch.float32),
        # spatial
        (aten.col2im.default, torch.randn(2, 12, 16), [5, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
        (aten.im2col.default, image, [2, 2], [1, 1], [0, 0], [2, 2]),
        (aten._upsample_bicubic2d_aa.default, image, [8, 8], False),
        (aten.upsample_nearest3d.default, torch.randn(1, 3, 2, 2, 2), [4, 4, 4]),
        # indexing
        (aten.index_put.default, volume, [None, torch.tensor([1, 3])], torch.randn(2, 2, 8)),
        (aten.index_put.default, volume, [torch.rand(2, 6) > 0.5], torch.randn(8)),
        (aten.index.Tensor, volume, [None, torch.tensor([1, 3])]),
        (aten.masked_scatter.default, x, torch.tensor([[True], [False], [True], [True]]), torch.randn(3, 6)),
        (aten.masked_scatter.default, volume, torch.rand(2, 6, 8) > 0.5, torch.randn(96)),
        (aten.glu.default, x, -1), (aten.glu.default, volume, 1),
        (aten.index.Tensor, volume, [torch.rand(2, 6) > 0.5]),
        (aten.index.Tensor, volume, [torch.tensor([[1], [0]]), None, torch.tensor([1, 2, 2])]),
        (aten.bincount.default, torch.tensor([0, 2, 1, 2]), None, 4),
        (aten.gather.default, x, 0, index), (aten.gather.default, x[:, :5], 0, index[:, :4]),
        (aten.scatter.src, x, 0, index, torch.randn(3, 6)), (aten.scatter.value, x, 0, index, 1.0),
        (aten.scatter_add.default, x, 0, index, torch.randn(3, 6)),
        (aten.scatter_reduce.two, x, 0, index, torch.randn(3, 6), "amax"),
        (aten.index_add.default, x, 0, torch.tensor([1, 3]), torch.randn(2, 6)),
        (aten.index_copy.default, x, 0, torch.tensor([1, 3]), torch.randn(2, 6)),
        (aten.isin.Tensor_Tensor, index, torch.tensor([1, 2, 3])), (aten.isin.Tensor_Scalar, index, 2),
        (aten.bucketize.Tensor, x, torch.tensor([-1.0, 0.0, 1.0])),
        *((aten._embedding_bag.default, x, torch.tensor([0, 3, 1, 2, 2]), torch.tensor([0, 2]), False, mode)
          for mode in range(3)),
        # sequences of unlike lengths
        (aten._pack_padded_sequence.default, volume, torch.tensor([6, 4]), True),
        (aten._pack_padded_sequence.default, volume, torch.tensor([2, 2, 1, 1, 1, 1]), False),
    ]  # fmt: skip
    for func, *args in calls:
        kwargs = args.pop() if isinstance(args[-1], dict) else {}
        yield Call(func, tuple(args), kwargs)


def in_place(calls):
    """The in-place twin of each call, where it has a rule: the same arguments."""
    for call in calls:
        if call.func is aten.as_strided.default:
            continue  # in place it sets the memory layout of a result that is not yet written
        twin = getattr(aten, name_of(call.func) + "_", None)
        overload = call.func._overloadname
        if twin is not None and overload in twin.overloads() and getattr(twin, overload) in RULES:
            yield Call(getattr(twin, overload), call.args, call.kwargs)


def stands_alone(call):
    """Whether the call reads its arguments' own elements only: samples of `as_strided` read memory beyond a view."""
    if call.func is not aten.as_strided.default:
        return True
    x, sizes, strides, *offset = call.args
    last = sum((n - 1) * s for n, s in zip(sizes, strides)) + (offset[0] if offset else 0)
    return last < x.numel()


@functools.cache
def samples():
    """Operator name -> calls."""
    torch.manual_seed(0)
    found = {}
    calls = [c for same in recorded()[0].values() for c in same if stands_alone(c)] + list(by_hand())
    for call in (*calls, *in_place(calls)):
        found.setdefault(name_of(call.func), []).append(call)
    return found


BY_NUMBERS = {"histc", "bincount", "nonzero"}
"""They leave an axis free only where numbers of one go in, or counts of these: `test_numbering` tries them."""

OF_ALL = {"dist"}
"""Their result is one number of all elements, whose number matters: `test_unusual` tries them."""


@functools.cache
def verdicts(name):
    return [check(call) for call in samples().get(name, [])]


RULED = sorted({name_of(f) for f in RULES})


@pytest.mark.parametrize("name", [n for n in RULED if n not in CANNOT_RUN_HERE])
def test_slicing_and_running_equals_running_and_slicing(name):
    found = verdicts(name)
    problems = [p for v in found for p in v.problems]
    assert not problems, "\n".join(problems[:5])
    assert found, f"the rule of aten.{name} has no sample: add one to `by_hand`"
    assert name in BY_NUMBERS | OF_ALL or sum(v.proven for v in found), (
        f"no sample of aten.{name} leaves an axis free: add one that does"
    )


@pytest.mark.parametrize("name", CANNOT_RUN_HERE)
def test_a_rule_that_cannot_be_tried_is_one_that_was(name):
    rules = {RULES[f] for f in RULES if name_of(f) == name}
    proven = {RULES[f] for f in RULES if name_of(f) not in CANNOT_RUN_HERE}
    assert rules <= proven


def test_pointwise_operators_need_no_rule():
    found = recorded()[1]
    checked = [[check(call) for call in calls] for calls in found.values()]
    problems = [p for verdicts in checked for v in verdicts for p in v.problems]
    assert not problems, "\n".join(problems[:10])
    assert sum(any(v.proven for v in verdicts) for verdicts in checked) > 100


def test_what_the_result_depends_on_by_number_is_noted():
    """Normalised axes are exempt from the law, so they must be declared: freezing decides on them later."""
    x = torch.randn(2, 6, 4)
    for func, args, kind, size in [
        (aten._softmax.default, (x, 1, False), "softmax", 6),
        (aten.native_layer_norm.default, (x, [4], None, None, 1e-5), "centred", 4),
        (aten._fused_rms_norm.default, (x, [4], None, 1e-5), "scaled", 4),
        (aten.native_group_norm.default, (x, None, None, 2, 6, 4, 2, 1e-5), "centred", 3),
        (aten.mean.dim, (x, [2]), "mean", 4),
        (aten.sum.dim_IntList, (x, [1]), "sum", 6),
        (aten.amax.default, (x, [1]), "reduced", 6),
        (aten.var.correction, (x, [2]), "variance", 4),
    ]:
        tracer = Tracer()
        tracer.__torch_dispatch__(func, (), (tracer.watch(x.clone()), *args[1:]))
        (noted,) = tracer.record.normalisations
        assert (noted.kind, [a.size for d in noted.dims for a in d]) == (kind, [size]), func


# -- planted mistakes: the checker must report each ----------------------------------------------------------


def forgets_to_swap(trace, out, x, i, j):
    return trace.dims(x)


def joins_the_wrong_way(trace, out, tensors, dim=0):
    return RULES_OF["cat"](trace, out, tensors, 1 - dim if out.dim() == 2 else dim)


def ignores_groups(trace, out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    w, dims = trace.dims(weight), trace.dims(x)
    return [dims[0], w[1] if transposed else w[0], *trace.spatial(out, x, 2)]


def cuts_in_reverse(trace, out, x, sizes, dim=0):
    return RULES_OF["split"](trace, out[::-1], x, sizes, dim)


def shuffles_nothing(trace, out, x, groups):
    return trace.dims(x)


def views_column_major(trace, out, x, *args):
    from dmscale import axes

    return axes.regroup(trace.dims(x)[::-1], out.shape)


def repeats_element_by_element(trace, out, x, counts):
    return [dim[::-1] for dim in RULES_OF["repeat"](trace, out, x, counts)]


def keeps_the_order(trace, out, x, positions):
    return trace.dims(x)


def leaves_vocabulary_free(trace, out, weight, index, *args, **kwargs):
    return [*trace.dims(index), *trace.dims(weight)[1:]]


def forgets_the_contraction(trace, out, a, b):
    return [trace.dims(a)[0], trace.dims(b)[1]]


def ignores_what_is_normalised(trace, out, x, dim, *args):
    return trace.dims(x)


RULES_OF = {name_of(f): r for f, r in RULES.items()}
PLANTED = {
    "transpose": forgets_to_swap,
    "cat": joins_the_wrong_way,
    "convolution": ignores_groups,
    "split_with_sizes": cuts_in_reverse,
    "channel_shuffle": shuffles_nothing,
    "view": views_column_major,
    "repeat": repeats_element_by_element,
    "flip": keeps_the_order,
    "embedding": leaves_vocabulary_free,
    "mm": forgets_the_contraction,
    "_softmax": ignores_what_is_normalised,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_rule_is_caught(name, monkeypatch):
    for func in [f for f in RULES if name_of(f) == name]:
        monkeypatch.setitem(RULES, func, PLANTED[name])
    assert any(check(call).problems for call in samples()[name])
