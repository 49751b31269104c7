"""Distillation: a smaller network learns from the dense one that it was cut from.

Three terms, each with a weight, added to the user's own loss:

logits     T^2 KL(softmax(t / T) || softmax(s / T)) of teacher and student outputs t, s (Hinton et al. 2015, section 2).
relations  1 - Pearson correlation of the softened predictions, between the classes of each example (inter-class) and
           between the examples of each class (intra-class), both times T^2 (DIST: Huang et al., NeurIPS 2022, eqs. 8-10).
features   inner activations.  A student's channels *are* channels of its teacher, those that `structure.kept` names, so the
           teacher's activation is indexed along its traced axes and no projection has to be learnt:
           |s - t[kept]|^2 / |t[kept]|^2, the mean over several modules.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from . import axes, blocks, running
from .clone import clone, own_copy
from .errors import DmscaleError
from .space import SearchSpace
from .structure import Structure


@dataclass(frozen=True)
class Distill:
    """How to distil: the weight of each term.

    logits, relations, features: weights, 0 leaves a term out.
    temperature: T of logits and relations.
    at: globs of the modules whose activations are compared; by default four, spread evenly over the forward.
    class_dim: the dimension of the classes in the output; by default the last one of up to three, the second of more.
    function: function(student_output, teacher_output) -> scalar, a term of the user's own, for outputs of any form.
    """

    logits: float = 0.0
    relations: float = 0.0
    features: float = 0.0
    temperature: float = 4.0
    at: tuple[str, ...] = ()
    class_dim: int | None = None
    function: Callable[[Any, Any], Tensor] | None = None

    @staticmethod
    def parse(wish: Any) -> Distill | None:
        """From True ("logits"), "logits", "relations, features", dict(logits=1, features=0.5), a function, or None.

        Raises:
            DmscaleError: the wish names no such term.
        """
        if wish is None or wish is False or isinstance(wish, Distill):
            return wish or None
        if wish is True:
            return Distill(logits=1.0)
        if callable(wish):
            return Distill(function=wish)
        terms = dict.fromkeys((t.strip() for t in wish.split(",")), 1.0) if isinstance(wish, str) else wish
        known = [f.name for f in fields(Distill)]
        unknown = [t for t in terms if t not in known] if isinstance(terms, Mapping) else [wish]
        if unknown:
            raise DmscaleError(f"distill={wish!r}: {unknown[0]!r} is none of {', '.join(known)}")
        return Distill(**terms)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` with tensors of its own, in evaluation mode, that takes no gradients: a teacher."""
    copy = clone(model, own_copy)
    copy.eval()
    return copy.requires_grad_(False)


# -- terms ------------------------------------------------------------------------------------------------------------


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL of the teacher's softened predictions and the student's, (n, classes) each, mean over n (Hinton 2015)."""
    s, t = (torch.log_softmax(z.float() / temperature, -1) for z in (student, teacher))
    return nn.functional.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2


def relations_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The inter- plus the intra-class relation loss of DIST on logits (n, classes), times T^2."""
    s, t = (torch.softmax(z.float() / temperature, -1) for z in (student, teacher))
    return (2 - correlation(s, t).mean() - correlation(s.T, t.T).mean()) * temperature**2


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation along the last dimension, (n, m), (n, m) -> (n,); 0 where one of them is constant."""
    return torch.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1, eps=1e-8)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|^2 / |t|^2, of equal shapes: modules of large and small activations count alike."""
    s, t = student.float(), teacher.float()
    return (s - t).square().mean() / t.square().mean().clamp(min=1e-12)


# -- features through the kept indices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A module whose activation is compared.

    teacher, student: its path in the two models (removed blocks renumber what is behind them).
    kept: position -> indices of the teacher's activation that the student has.
    """

    teacher: str
    student: str
    kept: Mapping[int, Tensor]

    def of_teacher(self, activation: Tensor) -> Tensor:
        """The part of the teacher's activation that the student computes."""
        for position, indices in self.kept.items():
            activation = activation.index_select(position, indices.to(activation.device))
        return activation


def places(space: SearchSpace, structure: Structure, at: Iterable[str] = (), count: int = 4) -> list[Place]:
    """Where teacher and student can be compared.

    Args:
        space: of the teacher.
        structure: of the student.
        at: globs of modules of the full model; each must match one that is called once and is still there.
        count: how many, spread evenly over the forward, without `at`.
    Raises:
        DmscaleError: a glob matches no module that can be compared.
    """
    found = _comparable(space, structure)
    at = tuple(at)
    for glob in at:
        if not any(fnmatch.fnmatchcase(path, glob) for path in found):
            raise DmscaleError(
                f"at={glob!r} matches no module that is called once, is kept and gives a tensor; there are "
                f"{', '.join(map(repr, list(found)[:8]))} ..."
            )
    if at:
        return [place for path, place in found.items() if any(fnmatch.fnmatchcase(path, glob) for glob in at)]
    named = dict(space.model.named_modules())
    outer = {call.result.origin: call.path for call in space.trace.record.calls if call.result is not None}
    chosen = [
        place for path, place in found.items()
        if place.kept and any(True for _ in named[path].parameters()) and _is_child_of_container(named, path)
        and path in outer.values()  # the last block of a stage and the stage give the same tensor
    ]  # fmt: skip
    step = max(len(chosen) / count, 1.0)
    return [chosen[int((i + 1) * step) - 1] for i in range(min(count, len(chosen)))]


def _comparable(space: SearchSpace, structure: Structure) -> dict[str, Place]:
    """Path -> place, in the order of the forward."""
    calls: dict[str, list[Any]] = {}
    for call in space.trace.record.calls:
        calls.setdefault(call.path, []).append(call)
    masks = {a: _mask(a.size, kept) for a, kept in space.widths_of(structure).items()}
    found: dict[str, Place] = {}
    for path, made in calls.items():
        call, student = made[0], student_path(space, structure, path)
        if (
            len(made) > 1
            or not path
            or student is None
            or call.result is None
            or call.result.dtype is None
            or not call.result.dtype.is_floating_point
        ):
            continue
        kept = {i: axes.kept(dim, masks).nonzero()[:, 0] for i, dim in enumerate(call.result.dims) if axes.is_free(dim)}
        found[path] = Place(path, student, kept)
    return found


def _mask(size: int, kept: Iterable[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def _is_child_of_container(named: Mapping[str, nn.Module], path: str) -> bool:
    parent = path.rpartition(".")[0]
    return not parent or isinstance(named[parent], (nn.Sequential, nn.ModuleList))


def student_path(space: SearchSpace, structure: Structure, path: str) -> str | None:
    """Where module `path` of the full model is in the exported one; None if it went with a block or an expert."""
    gone: dict[str, set[str]] = {}
    for part, of_each in space.parts.items():
        for lost in [p for i, paths in enumerate(of_each) if i not in structure.kept[part] for p in paths]:
            container, _, name = lost.rpartition(".")
            gone.setdefault(container, set()).add(name)
    old: list[str] = []
    new: list[str] = []
    for part in path.split(".") if path else []:
        container, renamed = ".".join(old), part
        if gone.get(container):
            holder = space.model.get_submodule(container)
            if part in gone[container]:
                return None
            prefix = blocks.numbered_as(holder)
            if prefix is not None:
                stay = [n for n, _ in holder.named_children() if n not in gone[container]]
                renamed = f"{prefix}{stay.index(part)}"
        old.append(part)
        new.append(renamed)
    return ".".join(new)


class _Watch:
    """Keeps the first tensor that some modules of a model give, until `close`."""

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self.seen: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(p).register_forward_hook(self._hook(p)) for p in paths]

    def _hook(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            self.seen[path] = running.tensors_in(out)[0]

        return keep

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.seen = [], {}


# -- all of it --------------------------------------------------------------------------------------------------------


class Distiller:
    """The distillation loss of one student; use as a context manager, it hooks both models while it is open.

    Args:
        how: the terms.
        teacher: the dense model, see `frozen_copy`.
        student: the model that learns.
        space, structure: of teacher and student, for the features; without them there are none.
    Raises:
        DmscaleError: features are wanted without space and structure, or where nothing can be compared.
    """

    def __init__(
        self,
        how: Distill,
        teacher: nn.Module,
        student: nn.Module,
        space: SearchSpace | None = None,
        structure: Structure | None = None,
    ):
        self.how, self.teacher, self.student = how, teacher, student
        self.places: list[Place] = []
        if how.features:
            if space is None or structure is None:
                raise DmscaleError(
                    "distilling features needs space= and structure=: they tell which channels were kept"
                )
            self.places = places(space, structure, how.at)
            if not self.places:
                raise DmscaleError("no module's activation can be compared; name some with at=, or leave features out")
        self._of_teacher = _Watch(teacher, [p.teacher for p in self.places])
        self._of_student = _Watch(student, [p.student for p in self.places])

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks away."""
        self._of_teacher.close()
        self._of_student.close()

    def __call__(self, inputs: Any, output: Any) -> Tensor:
        """The weighted sum of all terms, for a student that gave `output` on `inputs` just now."""
        how = self.how
        args, kwargs = running.arguments(inputs)
        expected = running.call(self.teacher, args, kwargs)
        loss = torch.zeros((), device=running.tensors_in(output)[0].device)
        if how.logits or how.relations:
            s, t = (self._rows(logits_of(o)) for o in (output, expected))
            if how.logits:
                loss = loss + how.logits * logits_loss(s, t, how.temperature)
            if how.relations:
                loss = loss + how.relations * relations_loss(s, t, how.temperature)
        if self.places:
            seen = [
                feature_loss(self._of_student.seen[p.student], p.of_teacher(self._of_teacher.seen[p.teacher]))
                for p in self.places
            ]
            loss = loss + how.features * torch.stack(seen).mean()
        if how.function is not None:
            loss = loss + how.function(output, expected)
        return loss

    def _rows(self, logits: Tensor) -> Tensor:
        """(n, classes): one row for each prediction."""
        dim = self.how.class_dim
        dim = (-1 if logits.dim() <= 3 else 1) if dim is None else dim
        return logits.movedim(dim, -1).flatten(0, -2)


def logits_of(output: Any) -> Tensor:
    """What predicts in an output: itself, its `logits`, or its first floating-point tensor.

    Raises:
        DmscaleError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    floating = [t for t in running.tensors_in(output) if t.is_floating_point()]
    if not floating:
        raise DmscaleError(
            f"an output of type {type(output).__name__} holds no tensor to distil; give a function instead"
        )
    return floating[0]
