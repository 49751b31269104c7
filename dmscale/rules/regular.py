"""Contractions: matrix products and convolutions, each one equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import axes
from ..axes import Conflict, Dim
from .registry import Equation, contract, equation, rule

if TYPE_CHECKING:
    from ..tracer import Tracer

aten = torch.ops.aten

equation(aten.mm, "n k, k m -> n m")
equation(aten.mv, "n k, k -> n")
equation(aten.dot, "k, k -> ")
equation(aten.vdot, "k, k -> ")
equation(aten.bmm, "b n k, b k m -> b n m")
equation(aten.addmm, "n k, k m -> n m", bias=True)
equation(aten._sparse_addmm, "n k, k m -> n m", bias=True)
equation(aten.addmv, "n k, k -> n", bias=True)
equation(aten.baddbmm, "b n k, b k m -> b n m", bias=True)

_LINEAR = Equation("*n k, m k -> *n m")
_ROWS = Equation("*n k, k m -> *n m")
_BATCHED = Equation("*b n k, *b k m -> *b n m")


@rule(aten.linear)
def linear(trace: Tracer, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> list[Dim]:
    """(..., K) with (M, K), and a bias."""
    dims, _ = contract(trace, _LINEAR, (x, weight))
    if bias is not None:
        axes.unify(dims[-1], trace.dims(bias)[0])
    return dims


@rule(aten.matmul)
def matmul(trace: Tracer, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[Dim]:
    """(..., N, K) with (K, M), or with one matrix for each of the same leading dimensions."""
    if b.dim() != 2 and a.shape[:-2] != b.shape[:-2]:
        raise Conflict("matrices in batches of different shapes")
    return contract(trace, _ROWS if b.dim() == 2 else _BATCHED, (a, b))[0]


# One line is every convolution: in a depthwise one `i` and `o` have size one, in a plain one `g`.  But most are of these two
# kinds, and are written out.  The letters of the MACs are those of `torch.utils.flop_counter`.
_GROUPED = Equation("b (g i) *x, (g o) i *k -> b (g o) *y", macs="b g i o k y")
_TRANSPOSED = Equation("b (g i) *x, (g i) o *k -> b (g o) *y", macs="b g i o k x")


@rule(aten.convolution)
def convolution(
    trace: Tracer, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> list[Dim]:  # fmt: skip
    """(B, C, *spatial) with (O, C / groups, *kernel); the kernel axes are fixed, the spatial ones come anew.

    Places that a kernel of size one looks at one by one are as free as those of any pointwise operator.  What a kernel takes
    whole (the features of words, in a TextCNN) it sums over as it does over channels.
    """
    taken, weights = trace.value(x), trace.value(weight)
    kernel = weights.dims[2:]
    depthwise = 1 < groups == x.shape[1] == weight.shape[0]
    whole = {
        j for j, dim in enumerate(taken.dims[2:])
        if dim and x.shape[2 + j] == weight.shape[2 + j] and not any(padding) and axes.is_free(dim)
    } if groups == 1 and not transposed else set()  # fmt: skip
    for j in whole:
        axes.unify(taken.dims[2 + j], kernel[j])
    trace.freeze_dims([dim for j, dim in enumerate(kernel) if j not in whole], "kernel size")
    still = set(stride) == {1} and not any(padding) and not any(output_padding)
    pointwise = still and not any(kernel)  # a dimension of size one has no axis
    spatial = list(taken.dims[2:]) if pointwise else trace.spatial(out, x, 2, whole)
    if transposed or (groups > 1 and not depthwise):
        eq = _TRANSPOSED if transposed else _GROUPED
        dims, _ = contract(trace, eq, (x, weight), sizes={"g": groups}, known={"y": spatial})
    else:
        (b, c), (o, i) = taken.dims[:2], weights.dims[:2]
        axes.unify(c, o if depthwise else i)
        dims = [b, o, *spatial]
        trace.count_macs((b, i, o, *kernel, *spatial))
        trace.contracted(i, [(v, dim) for v, dim in ((taken, c), (weights, i)) if dim])
        for j in whole:
            trace.contracted(kernel[j], [(taken, taken.dims[2 + j]), (weights, kernel[j])])
        if taken.data and weights.data:
            trace.batched(b)
        if not weights.data and not (depthwise and taken.data):
            trace.produced(o)
        if not taken.data:  # a weight too
            trace.produced(b)
    if bias is not None:
        axes.unify(dims[1], trace.dims(bias)[0])
    return dims


@rule(aten._trilinear)
def trilinear(
    trace: Tracer, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor,
    missing_a: Sequence[int], missing_b: Sequence[int], missing_c: Sequence[int], summed: Sequence[int], *args: Any,
) -> list[Dim]:  # fmt: skip
    """Three tensors with dimensions of one put in at `missing_*`, multiplied and summed over `summed`: `nn.Bilinear`."""
    laid: list[list[tuple[torch.Tensor, Dim]]] = [[] for _ in range(a.dim() + len(missing_a))]
    for t, missing in ((a, missing_a), (b, missing_b), (c, missing_c)):
        places = [i for i in range(len(laid)) if i not in missing]
        for i, n, dim in zip(places, t.shape, trace.dims(t)):
            if n != 1:
                laid[i].append((t, dim))
    for met in laid:
        for _, dim in met[1:]:
            axes.unify(met[0][1], dim)
    dims = [met[0][1] if met else () for met in laid]
    trace.count_macs(dims)
    for i in summed:
        if laid[i]:
            trace.contracted(dims[i], [(trace.value(t), own) for t, own in laid[i]])
    kept = [i for i in range(len(dims)) if i not in summed]
    for i in kept:
        if laid[i] and not any([trace.value(t).data for t, _ in laid[i]]):  # weights alone
            trace.produced(dims[i])
    return [dims[i] for i in kept]


@rule(aten.linalg_solve_triangular)
def solve_triangular(
    trace: Tracer, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, upper: bool, left: bool = True, **kw: Any
) -> list[Dim]:  # fmt: skip
    """X of A X = B, A (*B, N, N) and B (*B, N, K), or of X A = B: each column (row) by itself, over the N that are solved for.

    PyTorch's counter has no MACs for it.
    """
    square, given = trace.dims(a), trace.dims(b)
    trace.freeze_dims([*square[-2:], given[-2 if left else -1]], "solved for together")
    lead: list[Dim] = [()] * (out.dim() - 2)
    for dims in (square[:-2], given[:-2]):
        for i, dim in enumerate(reversed(dims), 1):
            if dim and lead[-i]:
                axes.unify(lead[-i], dim)
            lead[-i] = lead[-i] or dim
    return [*lead, *given[-2:]]


@rule(aten._grouped_mm)
def grouped_mm(trace: Tracer, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *rest: Any, **kw: Any) -> list[Dim]:
    """Rows of `a` (T, K) in groups, each with its own matrix of `b` (G, K, M): mixtures of experts.

    A group may go with its matrix where the rows of each end as the numbers say that were chosen: it has none.
    """
    rows, groups = trace.dims(a)[:-1], trace.dims(b)[:-2]
    k, m = trace.dims(b)[-2:]
    axes.unify(trace.dims(a)[-1], k)
    trace.freeze_dims(rows, "rows are matched by the routing")
    offsets = [t for t in (*rest, *kw.values()) if isinstance(t, torch.Tensor)]
    ends = [trace.value(t).said.ends for t in offsets]
    if len(offsets) == len(groups) == 1 and ends[0] is not None and axes.same(ends[0], trace.dims(offsets[0])[0]):
        axes.unify(groups[0], ends[0])
        trace.looked_up(groups[0], b)
    else:
        for t in offsets:
            trace.freeze_dims(trace.dims(t), "one for each expert")
        trace.freeze_dims(groups, "rows and experts are matched by the routing")
    trace.contracted(k, [(trace.value(a), trace.dims(a)[-1]), (trace.value(b), k)])
    trace.count_macs([*rows, k, m])
    trace.produced(m)
    for dim in (k, m):  # its kernels load 16 bytes at a time
        trace.multiple_of(dim, 16 // a.element_size())
    return [*rows, m]
