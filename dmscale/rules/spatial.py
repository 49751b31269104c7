"""Operators on the spatial dimensions behind (batch, channel): pooling, resizing, padding, windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import axes
from ..axes import Dim
from .registry import rule

if TYPE_CHECKING:
    from ..tracer import Tracer

aten = torch.ops.aten
Tensor = torch.Tensor


def _spatial(rank: int) -> Any:
    def apply(trace: Tracer, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Sequence[Any]:
        first = out if isinstance(out, Tensor) else out[0]
        lead = x.dim() - rank
        dims = [*trace.dims(x)[:lead], *trace.spatial(first, x, lead)]
        return dims if isinstance(out, Tensor) else [dims for _ in out]

    return apply


one = rule(
    aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.upsample_nearest1d, aten._upsample_nearest_exact1d,
    aten.upsample_linear1d, aten.reflection_pad1d, aten.replication_pad1d,
)(_spatial(1))  # fmt: skip
two = rule(
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d,
    aten.mkldnn_adaptive_avg_pool2d, aten.upsample_bilinear2d, aten.upsample_nearest2d,
    aten._upsample_nearest_exact2d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa, aten.reflection_pad2d, aten.replication_pad2d,
)(_spatial(2))  # fmt: skip
three = rule(
    aten.max_pool3d_with_indices, aten.avg_pool3d, aten._adaptive_avg_pool3d, aten.adaptive_max_pool3d,
    aten.upsample_trilinear3d, aten.upsample_nearest3d, aten.reflection_pad3d, aten.replication_pad3d,
)(_spatial(3))  # fmt: skip


@rule(aten.max_unpool2d, aten.max_unpool3d)
def max_unpool(trace: Tracer, out: Tensor, x: Tensor, places: Tensor, size: Sequence[int], *args: Any) -> Sequence[Dim]:
    """Every element goes where the pooling took it from, in its own channel."""
    lead = x.dim() - len(size)
    for own, other in zip(trace.dims(x), trace.dims(places)):
        axes.unify(own, other)
    return [*trace.dims(x)[:lead], *trace.spatial(out, x, lead)]


@rule(aten.im2col)
def im2col(trace: Tracer, out: Tensor, x: Tensor, kernel: Sequence[int], *args: Any) -> Sequence[Dim]:
    """(B, C, H, W) -> (B, C * window, places)."""
    *lead, c, h, w = trace.dims(x)
    trace.freeze_dims([h, w], "spatial")
    return [*lead, (*c, *axes.axis(math.prod(kernel), "window")), axes.axis(out.shape[-1], "spatial")]


@rule(aten.col2im)
def col2im(trace: Tracer, out: Tensor, x: Tensor, size: Any, kernel: Sequence[int], *args: Any) -> Sequence[Dim]:
    """(B, C * window, places) -> (B, C, H, W)."""
    *lead, c, places = trace.dims(x)
    trace.freeze(places, "spatial")
    channels = axes.axis(out.shape[-3])
    axes.unify(c, (*channels, *axes.axis(math.prod(kernel), "window")))
    return [*lead, channels, *(axes.axis(n, "spatial") for n in out.shape[-2:])]


@rule(aten.grid_sampler_2d)
def grid_sampler(trace: Tracer, out: Tensor, x: Tensor, grid: Tensor, *args: Any) -> Sequence[Dim]:
    """Channels of the picture, places of the grid."""
    batch, channels, *spatial = trace.dims(x)
    batch_of_grid, *places, coordinate = trace.dims(grid)
    axes.unify(batch, batch_of_grid)
    trace.freeze_dims([*spatial, coordinate], "sampled by a grid")
    return [batch, channels, *places]
