"""All elements of a search space in one flat vector, so that a search handles every dimension at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import axes
from .axes import Axis
from .space import Dimension, SearchSpace
from .structure import Structure


class Layout:
    """The elements of a space laid one after another: those of each free axis, then the blocks of each stack.

    E elements, S segments (an axis or a stack each), D dimensions; linked axes are segments of one dimension.

    axes: the axis of each of the first segments.
    members: name of each segment, (S,).
    sizes: elements of each segment, (S,).
    segment, dimension_of: (E,) number of each element's segment and dimension.
    start, size: (S,) first place and number of elements of each segment.
    least: (S,) fewest elements that each segment may keep.
    element_size: (E,) number of elements of each element's segment.
    sharpness: (E,) lambda of the soft masks: N for widths, 4 N for heads and depth, of which there are few.
    in_depth: (E,) whether the element is a block.
    with_modules: (M,) the places of all blocks, then of all experts.
    inside: (M, S) for each of these the segments that it alone holds: its hidden widths, its heads.
    ceiling: (D,) largest share that may be pruned.
    """

    def __init__(self, space: SearchSpace):
        self.space = space
        self.dimensions: list[Dimension] = list(space.dimensions.values())
        self.axes: list[Axis] = []
        self.members: list[str] = []
        owner: list[int] = []
        depth: list[bool] = []
        for i, d in enumerate(self.dimensions):
            if d.kind != "depth":
                self.axes += d.axes
                self.members += d.members
                owner += [i] * len(d.axes)
                depth += [False] * len(d.axes)
        index = {d.name: i for i, d in enumerate(self.dimensions)}
        for name in space.stacks:
            self.members.append(name)
            owner.append(index[name])
            depth.append(True)
        self.sizes = [a.size for a in self.axes] + [len(s.paths) for s in space.stacks.values()]
        self.elements = sum(self.sizes)
        sizes = torch.tensor(self.sizes, dtype=torch.long)
        self.segment = torch.repeat_interleave(torch.arange(len(self.sizes)), sizes)
        self.start = torch.cumsum(sizes, 0) - sizes
        self.size = sizes
        bounds = [self.dimensions[i] for i in owner]
        self.least = torch.tensor([d.count(n, d.lowest) for d, n in zip(bounds, self.sizes)], dtype=torch.long)
        self._owner = np.array(owner, dtype=np.int64)
        self.dimension_of = torch.tensor(owner, dtype=torch.long)[self.segment]
        self.in_depth = torch.tensor(depth, dtype=torch.bool)[self.segment]
        coarse = torch.tensor([self.dimensions[i].kind != "width" for i in owner], dtype=torch.bool)[self.segment]
        self.element_size = sizes[self.segment].float()
        self.sharpness = torch.where(coarse, 4 * self.element_size, self.element_size)
        self.inside = self._inside()
        self.ceiling = torch.tensor([1 - d.lowest / d.size for d in self.dimensions], dtype=torch.float32)
        self.ceiling_array = self.ceiling.double().numpy()
        self.is_width = np.array([d.kind != "depth" for d in self.dimensions])
        self._width_columns = np.array([i for i, d in enumerate(self.dimensions) for _ in d.axes], dtype=np.int64)
        self._width_sizes = np.array([a.size for a in self.axes], dtype=np.float64)
        owner_of = dict(zip(self.members, owner))
        self._parts = [(owner_of[n], len(parts)) for n, parts in space.parts.items()]
        place = dict(zip(self.members, self.start.tolist()))
        places = [place[n] + i for n, parts in space.parts.items() for i in range(len(parts))]
        self.with_modules = torch.tensor(places, dtype=torch.long)

    def _inside(self) -> Tensor:
        held: dict[Axis, list[str]] = {a: [] for a in self.axes}
        for name, dims in self.space.trace.slots.items():
            for a in {a for dim in dims for a in axes.atoms(dim)} & held.keys():
                held[a].append(name)
        modules = [tuple(f"{path}." for path in paths) for parts in self.space.parts.values() for paths in parts]
        inside = torch.zeros(len(modules), len(self.sizes), dtype=torch.bool)
        for i, prefixes in enumerate(modules):
            for j, a in enumerate(self.axes):
                inside[i, j] = bool(held[a]) and all(name.startswith(prefixes) for name in held[a])
        return inside

    def to(self, device: torch.device) -> None:
        """Move every tensor to `device`."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def sum_by_dimension(self, flat: Tensor) -> Tensor:
        """Sum over the elements of each dimension, (D,)."""
        out = torch.zeros(len(self.dimensions), dtype=flat.dtype, device=flat.device)
        return out.index_add_(0, self.dimension_of, flat)

    def sum_by_segment(self, flat: Tensor) -> Tensor:
        """Sum over the elements of each segment, (S,)."""
        out = torch.zeros(len(self.sizes), dtype=flat.dtype, device=flat.device)
        return out.index_add_(0, self.segment, flat)

    def kept_shares(self, mask: Tensor) -> np.ndarray:
        """The share of each dimension's elements that a mask (E,) keeps, (D,): the mean over its members' shares."""
        # ones are counted before anything is divided: a float32 sum of as many shares as a wide layer has is off by elements
        shares = self.sum_by_segment(mask.float()).cpu().double().numpy() / self.sizes
        return np.bincount(self._owner, shares) / np.bincount(self._owner)

    def cost_variables(self, pruned: np.ndarray) -> np.ndarray:
        """The soft values of the space's cost variables at pruned shares (S, D), with a one behind the last, (S, V + 1)."""
        widths = self._width_sizes * (1 - pruned[:, self._width_columns])
        blocks = [np.repeat(1 - pruned[:, i : i + 1], n, 1) for i, n in self._parts]
        return np.concatenate([widths, *blocks, np.ones((len(pruned), 1))], 1)

    def soft_variables(self, mask: Tensor) -> Tensor:
        """The values of the space's cost variables at a mask (E,), differentiable, (V,)."""
        widths = torch.zeros(len(self.sizes), dtype=mask.dtype, device=mask.device).index_add(0, self.segment, mask)
        return torch.cat([widths[: len(self.axes)], mask[self.with_modules]])

    def flat(self, scores: Mapping[str, Any], device: torch.device) -> Tensor:
        """Scores by member as one vector (E,); members that have none get zeros."""
        parts = [torch.as_tensor(scores.get(m, np.zeros(n))).float() for m, n in zip(self.members, self.sizes)]
        return torch.cat([p.cpu() for p in parts]).to(device)

    def by_member(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The inverse of `flat`: member -> (N,) of float64."""
        parts = flat.detach().cpu().double().split(self.sizes)
        return {name: part.numpy() for name, part in zip(self.members, parts)}

    def mask_of(self, structure: Structure, device: torch.device) -> Tensor:
        """The mask of a structure, (E,) of 0 and 1."""
        mask = torch.zeros(self.elements, dtype=torch.float32)
        kept: Sequence[tuple[int, ...]] = [structure.kept[m] for m in self.members]
        places = np.concatenate([np.asarray(k, dtype=np.int64) + int(s) for k, s in zip(kept, self.start.tolist())])
        mask[torch.from_numpy(places)] = 1
        return mask.to(device)
