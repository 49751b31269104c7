"""A pretended device: tensors that compute on the CPU and refuse to meet those that are there, as on a GPU.

    with Elsewhere():
        move(model)

There is no float64 on it, as on Apple's GPUs.  C++ takes such a tensor for one on the meta device, and Python for one on
`DEVICE`.  A tensor of zero dimensions may come from the CPU, and so may indices and what is copied, as on CUDA; everything else
raises.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("xpu:0")
_META = torch.device("meta")
_CROSS = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_")


class There(torch.Tensor):
    """A tensor on `DEVICE`; `here` is what it holds."""

    @staticmethod
    def __new__(cls, here):
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device="meta",
        )
        out.here = here
        return out

    @property
    def device(self):
        return DEVICE

    @property
    def is_meta(self):
        return False

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    def tolist(self):
        return self.here.tolist()

    def __repr__(self, **kwargs):
        return f"There({self.here})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = There(self.here.clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _tensors(tree):
    found = []
    tree_map(lambda t: found.append(t) if isinstance(t, torch.Tensor) else None, tree)
    return found


def _run(func, args, kwargs):
    tensors = _tensors((args, kwargs))
    there = [t for t in tensors if isinstance(t, There)]
    name = func._schema.name.removeprefix("aten::")
    strays = [t for t in tensors if not isinstance(t, There) and t.dim() > 0]
    if there and strays and name not in _CROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu, in {name}")
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wraps = bool(there) if target is None else target == _META
    owner = {id(t.here): t for t in there}
    out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    return tree_map(lambda t: _placed(t, owner, wraps), out)


def _placed(t, owner, wraps):
    if not isinstance(t, torch.Tensor):
        return t
    found = owner.get(id(t))  # what was written in place
    if wraps and t.dtype is torch.float64:
        raise TypeError(f"{DEVICE} has no float64")
    return found if found is not None else _there(t) if wraps else t


def _here(t):
    return t.here if isinstance(t, There) else t


def _there(t):
    return t if isinstance(t, There) else There(t)


class _Made(TorchDispatchMode):
    """Tensors that are made there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Named(TorchFunctionMode):
    """The device by its name in Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def meta(x):
            return _META if isinstance(x, torch.device) and x == DEVICE else x

        return func(*tree_map(meta, args), **tree_map(meta, kwargs or {}))


class Elsewhere:
    """Inside, `DEVICE` exists; models must have been traced before."""

    def __init__(self):
        waits = mock.patch.object(torch.accelerator, "synchronize", lambda device=None: None)
        self.modes = [_Made(), _Named(), waits]

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *exc):
        for mode in reversed(self.modes):
            mode.__exit__(*exc)


def move(x):
    """A module (in place), or the tensors of a tree, to `DEVICE`."""
    if not isinstance(x, nn.Module):
        return tree_map(lambda t: _there(t) if isinstance(t, torch.Tensor) else t, x)
    moved = {}
    for module in x.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None and id(t) not in moved:
                    new = There(t.detach().clone())
                    moved[id(t)] = t, nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
                held[name] = t if t is None else moved[id(t)][1]
    return x
