"""Sizes that a forward carries in a tensor of integers: `n = torch.IntTensor([self.channels])`, and `x[:, : n[0]]` later (WN)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import running
from .calls import root
from .sizes import SizedInt

CARRIERS = {"tensor": 0, "as_tensor": 0, "new_tensor": 1, "full": 1}
"""Torch functions that make a tensor of numbers -> which argument these are."""

_SAME = frozenset({"to", "type", "float", "double", "half", "bfloat16", "cuda", "cpu", "clone", "detach"})
"""What gives a tensor of the same numbers."""


class Carried:
    """The tensors of a trace that were made of sizes, and what each element is."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[Tensor, Any]] = {}  # by id, with the tensor itself, so that it stays the only one

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def pass_on(
        self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, Any]:
        """The arguments of a torch function with sizes for tensors that carry them, and its result where it only carries them.

        A tensor that goes anywhere else is one of plain numbers, and what it was made of has to stay.
        """
        first = args[0] if args else None
        numbers: Any = args[CARRIERS[name]] if name in CARRIERS and len(args) > CARRIERS[name] else None
        if _are_sizes(numbers) and not (name == "full" and first):
            plain = [int(n) for n in numbers] if isinstance(numbers, list) else int(numbers)
            made = function(*args[: CARRIERS[name]], plain, *args[CARRIERS[name] + 1 :], **kwargs)
            return args, self._carry(made, numbers)
        if name in _SAME and self._of(first) is not None:
            return args, self._carry(function(*args, **kwargs), self._of(first))
        if name == "item" and (size := self._number(first)) is not None:
            return args, size
        if name == "__getitem__":
            index = args[1]
            sizes = self._of(first)
            if isinstance(sizes, list) and type(index) is int:
                return args, self._carry(function(*args), sizes[index])
            args = first, self._sized(index)
        for tensor in running.tensors_in((args, kwargs)):
            for size in _flat(self._of(tensor)):
                if isinstance(size, SizedInt):
                    size.escape(name)
        return args, None

    def under_root(self, name: str, args: tuple) -> SizedInt | None:
        """The size of which a call takes a root, as of a tensor; None if it does not."""
        size = self._number(args[0]) if args else None
        return size if isinstance(size, SizedInt) and root(name, args) is not None else None

    def _carry(self, tensor: Tensor, sizes: Any) -> Tensor:
        if _are_sizes(sizes):
            self._sizes[id(tensor)] = tensor, sizes
        return tensor

    def _of(self, value: Any) -> Any:
        """What a tensor was made of; None for any other value."""
        found = self._sizes.get(id(value))
        return None if found is None else found[1]

    def _sized(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(map(self._sized, index))
        if not isinstance(index, slice):
            return index
        start, stop = (end if self._number(end) is None else self._number(end) for end in (index.start, index.stop))
        return slice(start, stop, index.step)

    def _number(self, value: Any) -> Any:
        """What the only element of a tensor is; None if it has more, or is none of these."""
        sizes = _flat(self._of(value))
        return sizes[0] if len(sizes) == 1 else None


def _flat(sizes: Any) -> list[Any]:
    return sizes if isinstance(sizes, list) else [sizes]


def _are_sizes(numbers: Any) -> bool:
    """Whether it is a size, or a list of numbers of which at least one is."""
    found = _flat(numbers)
    return any([isinstance(n, SizedInt) for n in found]) and all([isinstance(n, int) for n in found])


class _Constructor(type):
    """Stands for `torch.IntTensor`, which reads the numbers of a list where nothing sees them."""

    original: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], list) and _are_sizes(args[0]):
            return torch.tensor(args[0], dtype=cls.original.dtype)
        return cls.original(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)


@contextlib.contextmanager
def constructors() -> Iterator[None]:
    """Inside, `torch.IntTensor([size])` is `torch.tensor([size])`, and so are its like."""
    originals = {name: getattr(torch, name) for name in ("IntTensor", "LongTensor", "FloatTensor")}
    for name, original in originals.items():
        setattr(torch, name, _Constructor(name, (), {"original": original}))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
