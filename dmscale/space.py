"""The search space of a model: what can shrink, what cannot and why, and every sub-network in between."""

from __future__ import annotations

import fnmatch
import functools
import math
import numbers
import os
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import axes, budget, causes, certify, decisions, export, gates, latency, routing, running, settings, tracing
from .axes import Axis
from .clone import alias, clone, own_copy
from .cost import METRICS, Cost, CostModel, block_finder, cost_model
from .dimensions import Dimension, Options, dimensions, resolve
from .errors import BudgetError, DmscaleError, ExportError, TraceError, did_you_mean
from .experts import Experts
from .structure import Structure

TOLERANCE = 1e-4
"""Largest relative error of an exported model against the gated one, in float32."""


class SearchSpace:
    """What `trace` returns.  `dimensions`, `frozen`, and the operations on structures.

    A space holds the model it was traced from and the example inputs; it never changes either.
    """

    dimensions: dict[str, Dimension]
    frozen: dict[str, str]
    experts: dict[str, Experts]

    def __init__(self, model: nn.Module, example_inputs: Any, trace: tracing.Trace, options: Options):
        self.model = model
        self.example_inputs = example_inputs
        self.trace = trace
        self.options = options
        self.latency: latency.Latency | None = None
        self._rebuild()

    # -- building -----------------------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        """Derive everything from the trace and from what is frozen by now."""
        resolved = resolve(self.trace, self.model, self.options)
        self.stacks = {s.name: s for s in resolved.stacks}
        self.sites, self.solution = resolved.sites, resolved.solution
        self.attributes = resolved.solution.attributes
        self.dimensions, self.frozen = dimensions(self.trace, resolved, self.options)
        self.experts = {
            m: self.trace.experts[a]
            for d in self.dimensions.values() for m, a in zip(d.members, d.axes) if a in self.trace.experts
        }  # fmt: skip
        self.__dict__.pop("costs", None)
        self.__dict__.pop("shares", None)
        self.__dict__.pop("turns", None)
        self.__dict__.pop("routed", None)

    def trace_with_cache(self) -> None:
        """Trace anew with the model's key-value cache, whose numbers then follow; all as it was where that fails."""
        try:
            self.trace = tracing.read(self.model, self.example_inputs, cached=True)
        except TraceError:
            return
        self._rebuild()

    @functools.cached_property
    def turns(self) -> dict[str, decisions.Turn]:
        """Dimension -> a size at which the forward may take another branch, of those that it has."""
        return decisions.turns(self.trace.record.decisions, self.solution, self.dimensions)

    def hold(self, name: str, turn: decisions.Turn) -> None:
        """Keep a dimension to sizes at which the forward takes the branch that it takes now."""
        assert turn.minimum is not None
        axis = self.dimensions[name].axes[0]
        size, step = self.options.held.get(axis, (1, 1))  # another branch may hold it already
        self.options.held[axis] = max(size, turn.minimum), math.lcm(step, turn.multiple or 1)
        self._rebuild()

    def freeze(self, names: str | Iterable[str], reason: str) -> None:
        """Take dimensions out of the space, for good: only a new trace offers them again.

        Structures and searches made before are of another space then.

        Args:
            names: a name or a glob of dimensions, or several.  What is frozen already stays so.
            reason: what `frozen` and the table show.
        Raises:
            DmscaleError: one of `names` matches neither a dimension nor what is frozen; nothing is frozen then.
        """
        globs = _globs("freeze", names)
        if not isinstance(reason, str) or not reason:
            raise DmscaleError(f"reason is {reason!r}; say in words why {', '.join(globs)} shall stay as it is")
        _check_globs("freeze", globs, [*self.dimensions, *self.frozen])
        self.options.by_hand.add(reason)
        self.take_out([n for n in self.dimensions if n in globs or _matches(n, globs)], reason)

    def take_out(self, names: Iterable[str], reason: str) -> None:
        """`freeze`, of dimensions by name, for a reason that was found and not given by the user."""
        for name in names:
            dimension = self.dimensions[name]
            if dimension.kind == "depth":
                self.options.no_depth[name] = reason
            for a in dimension.axes:
                axes.freeze((a,), reason)
        self._rebuild()

    @functools.cached_property
    def costs(self) -> CostModel:
        """The cost polynomials over `variables`."""
        return cost_model(self)

    @property
    def writes_parameters(self) -> bool:
        """Whether the forward of the model writes to parameters, as that of a momentum encoder does."""
        written = self.trace.record.written
        return bool(written) and any(n in written for n, _ in self.model.named_parameters())

    @functools.cached_property
    def routed(self) -> tuple[str, ...]:
        """Modules whose MACs depend on values too, experts of a mixture say: they are counted as the example routes."""
        chosen = [p for e in self.trace.experts.values() if e.chosen for paths in e.paths for p in paths]
        return tuple(dict.fromkeys([*routing.routed(self.trace.record, self.model), *chosen]))

    def block_of_operator(self) -> Callable[[int], tuple[Hashable, ...]]:
        """What tells of an operator's number the removable block and the expert that it runs in, as cost variables."""
        return block_finder(self)

    @property
    def free_axes(self) -> set[Axis]:
        """The axes that can still change their size."""
        return {a for d in self.dimensions.values() for a in d.axes}

    @property
    def variables(self) -> list[Hashable]:
        """What the cost polynomials are in: the free axes, then (stack, i) for each block and (member, i) for each expert."""
        return [a for d in self.dimensions.values() for a in d.axes] + [
            (name, i) for name, parts in self.parts.items() for i in range(len(parts))
        ]

    @property
    def parts(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Stack, or member whose elements are experts -> the modules that go with each of its elements."""
        blocks = {n: tuple((path,) for path in s.paths) for n, s in self.stacks.items()}
        return blocks | {m: e.paths for m, e in self.experts.items()}

    # -- structures ---------------------------------------------------------------------------------------------------

    def full(self) -> Structure:
        """The structure that keeps everything."""
        return self.structure({})

    def structure(self, sizes: Mapping[str, float], scores: Mapping[str, Any] | None = None) -> Structure:
        """A structure of given sizes.

        Args:
            sizes: dimension -> number of elements, rounded to what the dimension allows; those not named stay full.
            scores: member name (see `Dimension.members`; of a stack its own name) -> one score an element, as a tensor, an
                array or a list; the highest are kept.  Where there are none the first elements are.
        Raises:
            DmscaleError: a name is no dimension or no member of this space, a size is no number, or scores are NaN or not
                one an element.
        """
        for name, size in sizes.items():
            if name not in self.dimensions:
                raise DmscaleError(f"{name!r} is no dimension of this space{did_you_mean(name, self.dimensions)}")
            if not isinstance(size, numbers.Real) or math.isnan(size):
                raise DmscaleError(f"the size of {name!r} is {size!r}; give a number of elements")
        return self._structure(sizes, self._checked_scores(scores or {}))

    def _structure(self, sizes: Mapping[str, float], ranked: Mapping[str, np.ndarray]) -> Structure:
        """`structure` of sizes and scores that are known to be good."""
        chosen = {n: d.allowed(sizes.get(n, d.size)) for n, d in self.dimensions.items()}
        kept: dict[str, tuple[int, ...]] = {}
        for name, d in self.dimensions.items():
            for member, total in self._members(d):
                kept[member] = _best(total, d.count(total, chosen[name]), ranked.get(member))
        return Structure(chosen, kept, {n: d.size for n, d in self.dimensions.items()})

    def _checked_scores(self, scores: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Scores by member as arrays, (elements,) of float64.

        Raises:
            DmscaleError: a member is unknown, or has not one number for each of its elements.
        """
        totals = {m: t for d in self.dimensions.values() for m, t in self._members(d)}
        ranked: dict[str, np.ndarray] = {}
        for member, given in scores.items():
            if member not in totals:
                raise DmscaleError(
                    f"scores of {member!r}: no dimension has such a member{did_you_mean(member, totals)}"
                )
            ranked[member] = _array(given, f"scores of {member!r}")
            if ranked[member].shape != (totals[member],):
                raise DmscaleError(
                    f"scores of {member!r} have shape {ranked[member].shape}; give one an element: ({totals[member]},)"
                )
            if np.isnan(ranked[member]).any():
                raise DmscaleError(f"scores of {member!r} hold NaN; an order needs numbers")
        return ranked

    def _members(self, d: Dimension) -> list[tuple[str, int]]:
        """(name, elements) of every axis of a dimension, or of a stack of blocks."""
        return [(d.name, d.size)] if d.kind == "depth" else [(m, a.size) for m, a in zip(d.members, d.axes)]

    def uniform(self, share: float, depth: bool = False) -> Structure:
        """Every width and the heads at `share`, in (0, 1]; the strongest elements by weight magnitude stay.

        Args:
            share: kept share of each dimension, rounded to whole elements, at least the minimum.
            depth: whether stacks of blocks are scaled too.
        Raises:
            DmscaleError: `share` is no number in (0, 1].
        """
        if not isinstance(share, numbers.Real):
            raise DmscaleError(f"share is {share!r}, no number in (0, 1]; for a budget use uniform_at({share!r})")
        if not 0 < share <= 1:
            raise DmscaleError(f"share {share} is not in (0, 1]")
        sizes = {n: share * d.size for n, d in self.dimensions.items() if depth or d.kind != "depth"}
        return self.structure(sizes, self.magnitudes())

    def sample(self, seed: int = 0) -> Structure:
        """A random structure: every size uniform between the minimum and all, the elements at random."""
        rng = random.Random(seed)
        sizes, scores = {}, {}
        for name, d in self.dimensions.items():
            sizes[name] = rng.randint(d.lowest, d.size)
            for member, total in self._members(d):
                scores[member] = [rng.random() for _ in range(total)]
        return self.structure(sizes, scores)

    def fit(self, structure: Structure, target: Any, scores: Mapping[str, Any] | None = None) -> Structure:
        """The structure nearest to `structure` that meets a budget: every constraint holds, none is wasted.

        Args:
            structure: where to start from.
            target: a budget, as in `Search`.
            scores: member -> score an element: which ones go first, and which come back; magnitudes by default.
        Raises:
            BudgetError: the budget is misspelt or out of reach.
            DmscaleError: the structure is of another space, or scores are as `structure` refuses them.
        """
        self._check_structure(structure)
        ranked = self._checked_scores(scores) if scores else self.magnitudes()
        return budget.fit(self, structure, budget.parse(target, self), ranked, keep=structure)

    def uniform_at(self, target: Any, depth: bool = False) -> Structure:
        """Uniform scaling to a budget, exactly met: the field's plainest baseline.

        Args:
            target: a budget, as in `Search`.
            depth: whether stacks of blocks are scaled too, at the share of the widths.
        Raises:
            BudgetError: the budget is misspelt or out of reach.
        """
        if isinstance(target, numbers.Real):
            raise BudgetError(
                f"{target!r} is no budget as '50% macs' is one; for a share of every width use uniform({target!r})"
            )
        wanted, scores = budget.parse(target, self), self._checked_scores(self.magnitudes())
        low, high = 0.0, 1.0

        def uniform(share: float) -> Structure:
            sizes = {n: share * d.size for n, d in self.dimensions.items() if depth or d.kind != "depth"}
            return self._structure(sizes, scores)

        for _ in range(30):
            middle = (low + high) / 2
            fits = budget.satisfied(self.costs.exact(self.vector(uniform(middle))), wanted)
            low, high = (middle, high) if fits else (low, middle)
        return budget.fit(self, uniform(low), wanted, scores, keep=None)

    def sample_at(self, target: Any, seed: int = 0) -> Structure:
        """A random structure brought to a budget: sizes drawn around the uniform one, then exactly fitted.

        Args:
            target: a budget, as in `Search`.
            seed: of the sizes and of the elements that stay; the same seed gives the same structure.
        Raises:
            BudgetError: the budget is misspelt or out of reach.
        """
        rng = random.Random(seed)
        wanted = budget.parse(target, self)
        base = self.uniform_at(target)
        sizes = {n: base.sizes[n] * rng.uniform(0.4, 1.6) for n in self.dimensions}
        scores = {m: [rng.random() for _ in range(t)] for d in self.dimensions.values() for m, t in self._members(d)}
        return budget.fit(self, self.structure(sizes, scores), wanted, scores, keep=None)

    def magnitudes(self) -> dict[str, Tensor]:
        """Member -> the L2 norm of all weights at each of its elements: a score without data."""
        squares = {
            n: p.detach().abs().float().square() for n, p in self.model.named_parameters() if p.device.type != "meta"
        }
        return {m: s.sqrt() for m, s in self.project(squares).items()}

    def project(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Member -> the sum of `values` at each of its elements, (elements,) of float32 on the CPU.

        Args:
            values: parameter name -> a tensor of its shape; parameters not named count as zero.
        Returns:
            an entry for every member that any named parameter has, and for every stack of blocks.
        """
        scores: dict[str, Tensor] = {}
        index = {a: (m, a.size) for d in self.dimensions.values() for m, a in zip(d.members, d.axes)}
        for name, dims in self.trace.slots.items():
            t = values.get(name)
            if t is None or t.device.type == "meta":
                continue
            for position, dim in enumerate(dims):
                inside = [a for a in axes.atoms(dim) if a in index]
                if not inside:
                    continue
                along = t.sum([i for i in range(t.dim()) if i != position]).cpu() if t.dim() > 1 else t.cpu()
                coordinates = axes.coordinates(dim)
                for a in inside:
                    member, size = index[a]
                    at = coordinates[a]  # which element each position belongs to; -1: none
                    total = along.new_zeros(size).index_add_(0, at.clamp(min=0), along * (at >= 0))
                    scores[member] = scores.get(member, 0) + total
        for name, parts in self.parts.items():
            held = [sum(self._inside(path, values) for path in paths) for paths in parts]
            scores[name] = scores.get(name, 0) + torch.tensor(held, dtype=torch.float32)
        return scores

    def _inside(self, path: str, values: Mapping[str, Tensor]) -> float:
        """The sum of `values` over the parameters inside a module."""
        held = {id(p) for p in self.model.get_submodule(path).parameters()}
        names = [n for n, p in self.model.named_parameters() if id(p) in held]
        return sum(float(values[n].sum()) for n in names if n in values)

    # -- cost ---------------------------------------------------------------------------------------------------------

    def cost(self, structure: Structure | None = None) -> Cost:
        """The exact cost of a structure, of the full model without one: what a count on the exported model gives.

        Of one forward on the example inputs, their batch included: `.macs`, `.params`, `.bytes` of the parameters,
        `.activations` (bytes written), `.kv_cache` (bytes); `["latency"]` in ms and `["macs in GLOB"]` when asked for.  See
        `Cost`.

        Raises:
            DmscaleError: the structure is of another space.
        """
        if structure is None:
            return self.costs.exact(self.vector(self.full()))
        self._check_structure(structure)
        return self.costs.exact(self.vector(structure))

    def vector(self, structure: Structure) -> np.ndarray:
        """The values of `variables` at a structure, (V,) of int64."""
        values: list[int] = []
        for d in self.dimensions.values():
            values += [d.count(a.size, structure.sizes[d.name]) for a in d.axes]
        for name, parts in self.parts.items():
            kept = set(structure.kept[name])
            values += [int(i in kept) for i in range(len(parts))]
        return np.array(values, dtype=np.int64)

    def cost_of_many(self, structures: Sequence[Structure], metric: str = "macs") -> np.ndarray:
        """One metric of many structures at once, in their order.

        Args:
            structures: of this space.
            metric: a name as in a budget: "macs", "params in backbone.*", "latency".
        Returns:
            (S,) of int64; of float64 for latency, in ms.
        Raises:
            DmscaleError: a structure is of another space, or the metric is unknown.
        """
        for structure in structures:
            self._check_structure(structure)
        rows = [self.vector(s) for s in structures]
        return self.costs.many(np.reshape(rows, (len(rows), len(self.variables))), metric)

    def measure_latency(
        self,
        *,
        runtime: str = "torch",
        threads: int | None = None,
        calibration: int = 8,
        repeats: int = 7,
        cache: str | os.PathLike[str] | bool | None = None,
        progress: bool = True,
        meter: latency.Meter | None = None,
    ) -> latency.Latency:
        """Learn what any structure takes on the model's device, for `cost()["latency"]` and budgets such as "3 ms latency".

        The model is measured as it is deployed: its device and dtype, the batch of the example inputs, evaluation mode.  A
        budget that names latency calls this with the defaults; call it first for other options, or again to measure anew.

            space.measure_latency(threads=1)
            search = dmscale.Search(space, "60% latency", steps=2000)

        Args:
            runtime: what runs whole models: "torch", or "onnx" for ONNX Runtime on the CPU.
            threads: of PyTorch while measuring, and of ONNX Runtime; as they are now by default.
            calibration: number of structures that are exported and measured whole.
            repeats: measurements of which a median is taken.
            cache: file that keeps measurements (see `latency.Cache`), or False for none.
            progress: whether to show a bar, if the output is a terminal.
            meter: takes the measurements, in place of `runtime` and `repeats`.
        Raises:
            DmscaleError: the model has no weights (it is on the meta device), or the runtime cannot run it.
        """
        found = latency.learn(
            self, runtime=runtime, threads=threads, calibration=calibration, repeats=repeats, cache=cache,
            progress=progress, meter=meter,
        )  # fmt: skip
        self.use_latency(found)
        return found

    def use_latency(self, found: latency.Latency) -> None:
        """Predict by what has been measured elsewhere: by `measure_latency`, of a space of the same model."""
        self.latency = found
        self.__dict__.pop("costs", None)

    def _latency_metric(self) -> latency.LatencyMetric:
        return latency.LatencyMetric(self.latency or self.measure_latency(), self)

    @functools.cached_property
    def shares(self) -> dict[str, dict[str, float]]:
        """Dimension -> the share of MACs and of parameters that goes when only its minimum is kept."""
        names = list(self.dimensions)
        rows = np.stack(
            [self.vector(self.structure({n: self.dimensions[n].lowest})) for n in names] or [self.vector(self.full())]
        )
        out: dict[str, dict[str, float]] = {n: {} for n in names}
        for metric in ("macs", "params"):
            whole = max(self.cost()[metric], 1)
            for n, value in zip(names, self.costs.many(rows, metric)):
                out[n][metric] = 1 - int(value) / whole
        return out

    # -- models -------------------------------------------------------------------------------------------------------

    def gate(self, structure: Structure) -> nn.Module:
        """The full-size model with everything outside `structure` masked, sharing the user's parameters.

        Its outputs are those of `export(structure)`, up to rounding, as long as the weights are the same.

        Raises:
            DmscaleError: the structure is of another space.
        """
        self._check_structure(structure)
        return self._gate(self.model, structure)

    def _gate(self, model: nn.Module, structure: Structure) -> nn.Module:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        widths = {a: _indicator(a.size, k, device) for a, k in self.widths_of(structure).items()}
        depths = {n: _indicator(len(s.paths), structure.kept[n], device) for n, s in self.stacks.items()}
        return gates.attach(model, self.sites, widths, depths)

    def widths_of(self, structure: Structure) -> dict[Axis, tuple[int, ...]]:
        """Free axis -> indices kept."""
        return {a: structure.kept[m] for d in self.dimensions.values() for m, a in zip(d.members, d.axes)}

    def build(self, structure: Structure, model: nn.Module | None = None) -> nn.Module:
        """The plain smaller model, not verified (`export` verifies).

        Args:
            structure: of this space.
            model: whose weights it gets, with the modules and shapes of the traced one; the traced one by default.
        Raises:
            DmscaleError: the structure is of another space.
        """
        self._check_structure(structure)
        return export.build(
            model or self.model, self.trace, self.attributes, self.stacks, self.experts, self.widths_of(structure),
            {n: structure.kept[n] for n in self.parts},
        )  # fmt: skip

    @torch.inference_mode(False)
    def export(self, structure: Structure, verify: bool = True) -> nn.Module:
        """A plain, smaller model of the user's class, proven equal to the gated one on the example inputs.

        Args:
            structure: of this space.
            verify: whether to run both models once and compare their outputs: half precision in float32, where the model runs so
                and there is memory for it.  A model on the meta device is never run.
        Raises:
            ExportError: the exported model fails, differs by a relative error above 1e-4, in float64 too, or there is no memory
                for both; the space and the user's model stay usable.
            DmscaleError: the structure is of another space.
        """
        small = self.build(structure)
        self._settle(small, structure)
        if verify and not running.is_empty(self.model):
            self._verify(small, structure)
        return small

    def _verify(self, small: nn.Module, structure: Structure) -> None:
        """Compare what was exported with the gated model: half precision in float32, and in float64 where they differ.

        Rounding in half precision would hide what a wrong slice makes, and in float32 it may be all by which they differ.
        """
        # copies: a forward may write to buffers and attributes, some to parameters, and these are the user's
        apart = own_copy if self.writes_parameters else alias
        kind, tolerance, by_rounding = type(self.model).__name__, certify.tolerance(self.model), 0.0
        try:
            half = tolerance > TOLERANCE
            error = certify.compare_in(self, structure, small, torch.float32) if half else math.inf
            exactly = error < math.inf
            if exactly:
                tolerance = TOLERANCE
            else:
                gated = self._gate(clone(self.model, apart), structure)
                error = certify.compare(gated, clone(small, apart), self.example_inputs)
            if error <= tolerance or certify.compare_in(self, structure, small, torch.float64) <= TOLERANCE:
                return
            if not exactly:
                by_rounding = certify.shaken(self, clone(self.model, apart), self.example_inputs, structure)
        except Exception as failure:
            if not running.is_out_of_memory(failure):
                raise
            raise ExportError(
                f"no memory to run {kind} gated and exported side by side; give smaller example_inputs to trace, or export with "
                "verify=False and compare later"
            ) from failure
        raise ExportError(
            f"the exported {kind} differs from the gated one by {error:.1e} (relative; allowed {tolerance:.0e}). "
            + (
                f"Its {certify.unsteady(by_rounding)}; give other example_inputs, or export with verify=False."
                if by_rounding > tolerance
                else "Please report it; space.freeze([...], 'reason') takes dimensions out meanwhile."
            )
        )

    def _settle(self, small: nn.Module, structure: Structure) -> None:
        """Let the settings object of an exported model say what it is; what changed goes into its plan too."""
        sizes = {a: len(kept) for a, kept in self.widths_of(structure).items()}
        stacks: dict[int, list[int]] = {}
        for stack in self.stacks.values():
            children = [name for name, _ in self.model.get_submodule(stack.container).named_children()]
            lost = {p.rpartition(".")[2] for i, p in enumerate(stack.paths) if i not in structure.kept[stack.name]}
            if lost:
                stacks[len(children)] = [i for i, name in enumerate(children) if name not in lost]
        changes = settings.settle(self.model, small, self.trace.slots, sizes, stacks, self.example_inputs)
        plan = getattr(small, export.PLAN)
        plan["attributes"] += [["", ["config", field], value] for field, value in changes.items()]

    def _check_structure(self, structure: Structure) -> None:
        if not isinstance(structure, Structure):
            raise DmscaleError(f"expected a Structure, got {structure!r}; space.structure(sizes) makes one")
        missing = [n for n in self.dimensions if n not in structure.sizes]
        extra = [n for n in structure.sizes if n not in self.dimensions]
        if missing or extra:
            told = ([f"it lacks {missing[:3]}"] if missing else []) + ([f"it has {extra[:3]}"] if extra else [])
            raise DmscaleError("the structure is of another space: " + "; ".join(told))
        for name, d in self.dimensions.items():
            size = structure.sizes[name]
            if not 0 <= size <= d.size or structure.full.get(name, d.size) != d.size:
                of = structure.full.get(name, "unknown")
                raise DmscaleError(
                    f"the structure is of another space: it keeps {size} of {of} of {name!r}, whose size is {d.size} here"
                )
            for member, total in self._members(d):
                kept = structure.kept.get(member, ())
                if len(kept) != d.count(total, size) or (kept and kept[-1] >= total):
                    raise DmscaleError(
                        f"the structure contradicts itself: it keeps {d.count(total, size)} of {member!r} and lists "
                        f"{len(kept)} indices below {kept[-1] + 1 if kept else 0}"
                    )

    # -- showing ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything that the printed table says, for machines."""
        return {
            "model": type(self.model).__name__,
            "cost": {m: self.cost()[m] for m in METRICS} | {"uncounted": list(self.costs.uncounted)},
            "dimensions": {
                n: {"kind": d.kind, "size": d.size, "minimum": d.lowest, "multiple": d.multiple, **self.shares[n]}
                for n, d in self.dimensions.items()
            },
            "frozen": dict(self.frozen),
            "notes": self.trace.notes,
            "free": causes.free_share(self),
            "causes": [cause.to_dict() for cause in causes.find(self)],
        }

    def __rich__(self) -> Any:
        from .tables import space_table

        return space_table(self)

    def __str__(self) -> str:
        from .tables import to_text

        return to_text(self.__rich__())

    def __repr__(self) -> str:
        return f"<SearchSpace of {type(self.model).__name__}: {len(self.dimensions)} dimensions, {len(self.frozen)} frozen>"


@torch.inference_mode(False)
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    freeze: str | Iterable[str] = (),
    only: str | Iterable[str] = (),
    minimum: int | Mapping[str, int] = 1,
    multiple: int | Mapping[str, int] = 1,
    branches: bool = False,
    verify: bool = True,
) -> SearchSpace:
    """Find everything in `model` that can be made narrower or shallower.

    The model runs once on a copy without elements; then half of every dimension found is exported and compared with the
    gated model, and what fails that trial is frozen with the reason.

        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> space = trace(model, torch.randn(2, 8))
        >>> {name: d.size for name, d in space.dimensions.items()}
        {'0': 32}

    Args:
        model: any module; it is left as it is.  Of one that `torch.compile` made the module inside is traced.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device, or on any if
            that is "meta".  Costs are those of one forward on them.
        freeze: a name or a glob of dimensions to leave alone, or several.
        only: a name or a glob of the dimensions to offer, or several; all by default.
        minimum: fewest elements to keep: one number for all widths and heads, or a dict of numbers by glob, of which the last
            match counts.  What operators need stays a bound of its own.
        multiple: keep multiples of this many elements (or all): one number for all widths, or a dict as for `minimum`.
        branches: offer what residual blocks add (attention, MLP) one by one, where that is all a block does, instead of
            whole blocks.
        verify: whether to run the trial; without it an export is still verified.
    Raises:
        TraceError: the model does not run on the example inputs, or has a form that cannot be resized (wrapped by DDP,
            TorchScript, lazy, packed by quantisation); the message says what to trace instead.
        DmscaleError: a glob matches nothing, or a bound is no whole number (`minimum` of at least 0, `multiple` of 1).
    """
    # known by its name, since importing its class takes seconds
    while isinstance(model, nn.Module) and type(model).__name__ == "OptimizedModule":
        model = model.get_submodule("_orig_mod")
    options = Options(
        _globs("freeze", freeze), _globs("only", only), _by_glob("minimum", minimum, 0), _by_glob("multiple", multiple, 1),
        branches=branches,
    )  # fmt: skip
    with tracing.uncollected():
        space = SearchSpace(model, example_inputs, tracing.read(model, example_inputs), options)
    names = [*space.dimensions, *space.frozen]
    for argument in ("freeze", "only", "minimum", "multiple"):
        _check_globs(argument, getattr(options, argument), names)
    _check_bounds("minimum", options.minimum, ("width", "heads", "choice"), space)
    _check_bounds("multiple", options.multiple, ("width",), space)
    if verify and space.dimensions and not running.is_empty(model):
        certify.certify(space)
    return space


def _globs(argument: str, names: str | Iterable[str]) -> tuple[str, ...]:
    globs: tuple[Any, ...] = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    for glob in globs:
        if not isinstance(glob, str):
            raise DmscaleError(f"{argument} holds {glob!r}; give a name or a glob of dimensions, or several")
    return globs


def _by_glob(argument: str, bound: int | Mapping[str, int], least: int) -> dict[str, int]:
    """Glob -> number; a number alone is for all."""
    by_glob = dict(bound) if isinstance(bound, Mapping) else {"*": bound}
    for glob, value in by_glob.items():
        what = f"{argument}={{{glob!r}: {value!r}}}" if isinstance(bound, Mapping) else f"{argument}={value!r}"
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise DmscaleError(f"{what}: give a whole number of elements, at least {least}, or a dict of them by glob")
    return {glob: int(value) for glob, value in by_glob.items()}


def _check_globs(argument: str, globs: Iterable[str], names: Sequence[str]) -> None:
    for glob in globs:
        if glob != "*" and glob not in names and not any(_matches(n, (glob,)) for n in names):
            meant = did_you_mean(glob, names) or f"; there are {', '.join(map(repr, names[:6]))}"
            raise DmscaleError(f"{argument}={glob!r} matches no dimension{meant}")


def _check_bounds(argument: str, bounds: Mapping[str, int], kinds: tuple[str, ...], space: SearchSpace) -> None:
    """Refuse a bound on what it has no effect on; one is none."""
    for glob in [g for g, bound in bounds.items() if bound > 1]:
        found = {d.kind for n, d in space.dimensions.items() if _matches(n, (glob,))}
        if (
            glob != "*"
            and found
            and not found.intersection(kinds)
            and not any(_matches(n, (glob,)) for n in space.frozen)
        ):
            raise DmscaleError(
                f"{argument}={glob!r} matches {' and '.join(found)} only; it bounds {' and '.join(kinds)}"
            )


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _array(values: Any, what: str) -> np.ndarray:
    """Numbers in any container, as float64 on the CPU."""
    try:
        return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DmscaleError(f"{what} are no numbers ({error})") from error


@functools.lru_cache(maxsize=256)
def _first(n: int) -> tuple[int, ...]:
    """The first `n` indices; one object for all that are so wide, of which a large network has hundreds."""
    return tuple(range(n))


def _best(total: int, wanted: int, score: np.ndarray | None) -> tuple[int, ...]:
    """Indices of the `wanted` highest of `total` scores, ascending; ties go to the first."""
    if wanted >= total or score is None:
        return _first(min(wanted, total))
    order = np.argsort(-score, kind="stable")
    return tuple(np.sort(order[:wanted]).tolist())


def _indicator(size: int, kept: Sequence[int], device: torch.device) -> Tensor:
    mask = torch.zeros(size, dtype=torch.float32, device=device)
    mask[torch.tensor(kept, dtype=torch.long)] = 1
    return mask
