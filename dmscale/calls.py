"""Gates at one call of a torch function, where no module of its own does what must be gated.

A mean over channels written in a forward, a softmax over a head dimension, attention that scales by the size of its heads:
what these compute depends on how many elements there are, and no layer stands around them that a hook could be put on.
During a trace every call of such a function is numbered within the module that makes it.  In a gated model that module runs
under a `TorchFunctionMode` which gives the numbered calls their kept-count form, with mask m over N elements, k kept:

    mean      sum(m x) / k                       variance   sum(m (x - mean)^2) / (k - correction)
    softmax   m exp(x) / sum(m exp(x))           attention  q sqrt(N / k), so that the default scale becomes 1 / sqrt(k)
    largest   of the kept, one or several        sums, norms and products   of m x
    loss      mean of m loss(x, y) over k        distance   of m x and m y
    x c N^p   times (k / N)^p
    batch norm of a weight   of m (x - mean of the kept) sqrt(N / k), times sqrt(k / N), as in `gates.py`

A function with a Python body (`F.normalize`, `torch.norm`) is one call in a gated model, while a trace sees through it: what
its body calls is not numbered, unless it is the function itself by another name.
"""

from __future__ import annotations

import bisect
import contextlib
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import axes, running
from .axes import Dim
from .sizes import SizedInt

if TYPE_CHECKING:
    from .tracer import Record, Value

_PRODUCTS = ("matmul", "bmm", "einsum")
NAMES = {
    "mean": "mean", "var": "var", "std": "std", "var_mean": "var_mean", "std_mean": "std_mean", "softmax": "softmax",
    "gumbel_softmax": "softmax",
    "log_softmax": "log_softmax", "amax": "amax", "amin": "amin", "scaled_dot_product_attention": "attention",
    "sum": "sum", "nansum": "sum", "norm": "norm", "linalg_vector_norm": "norm", "vector_norm": "norm",
    "linalg_norm": "norm", "normalize": "norm",
    "batch_norm": "batch_norm", "layer_norm": "layer_norm", "rms_norm": "rms_norm",
    "group_norm": "group_norm", "max": "max", "min": "min", "topk": "topk",
    "mse_loss": "loss", "l1_loss": "loss", "smooth_l1_loss": "loss", "huber_loss": "loss", "logsumexp": "logsumexp",
    "cdist": "distance", "dist": "distance", "pairwise_distance": "distance", "cosine_similarity": "distance",
    "all": "all", "any": "any", "prod": "prod", "count_nonzero": "count_nonzero",
    "argmax": "argmax", "argmin": "argmin", "matmul": "matmul", "__matmul__": "matmul", "bmm": "bmm", "einsum": "einsum",
}  # fmt: skip
"""Name of a torch function or method -> what its calls are counted as."""

SCALINGS = {"mul": 1, "div": -1, "mul_": 1, "div_": -1, "tensor": 1}
"""What is counted where the second factor is a plain number, or a tensor is made of one -> the sign of its power."""
_WHOLE = (int, SizedInt)
_SCALED = {
    "mul": "mul", "div": "div", "true_divide": "div", "mul_": "mul_", "div_": "div_", "__imul__": "mul_", "__itruediv__": "div_",
    "__rmul__": "mul", "__rdiv__": "mul", "__rtruediv__": "mul",
    "tensor": "tensor", "full": "tensor",
}  # fmt: skip

GIVEN_SCALE = "attention scale, given"
"""The kind of normalisation that attention is whose scale the forward works out from the size of a head."""

# Python bodies: one call outside a trace, many inside
_COMPOSITE = ("torch.functional", "torch.nn.functional", f"{__package__}.plainly")


_ROOTS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "pow": None, "__pow__": None}
"""Functions that may take the root of a tensor of one number -> the power; None where they are told it."""


def root(name: str, args: Sequence[Any]) -> float | None:
    """The power that a call of the function `name` gives of a tensor of one number; None if it does nothing like it."""
    if name not in _ROOTS or not args or not isinstance(args[0], Tensor) or args[0].numel() != 1:
        return None
    power = _ROOTS[name]
    told: Any = args[1] if power is None and len(args) == 2 else None
    return float(told) if type(told) in (int, float) else power


def counted_as(name: str, args: Sequence[Any]) -> str | None:
    """What a call of the function `name` is counted as; None if it is not."""
    if name in _ROOTS:
        return None if root(name, args) is None else "root"
    if name in _SCALED:
        factor, counted = scaling(name, args), _SCALED[name]
        return counted if isinstance(factor, float) or (counted != "tensor" and type(factor) in _WHOLE) else None
    return NAMES.get(name)


def scaling(name: str, args: Sequence[Any]) -> Any:
    """The plain number that a call of the function `name` multiplies with, or makes a tensor of."""
    if name == "full":
        return args[1] if len(args) == 2 and not args[0] else None
    return args[name != "tensor"] if len(args) == 1 + (name != "tensor") else None


def is_counted(name: str) -> bool:
    """Whether there are calls of the function `name` that are counted."""
    return name in NAMES or name in _SCALED or name in _ROOTS


@dataclass(eq=False, slots=True)
class FunctionCall:
    """Call number `number` of functions counted as `name` in one call of module `path`; it ran operators start+1 to end.

    operands: its tensor arguments, in order, as they were.  result: its first output.
    """

    path: str
    name: str
    number: int
    start: int
    end: int
    operands: tuple[Value, ...]
    result: Value | None

    @property
    def key(self) -> tuple[str, str, int]:
        """What names the call, whichever time its module runs."""
        return self.path, self.name, self.number


@dataclass(frozen=True, eq=False)
class CallSite:
    """Gate call `number` of functions counted as `name` in module `module`: its tensor `operand` along `dims`.

    dims: (position in that tensor, axes).
    zero: of attention, whether the query is not zero yet where it is masked; of a top-k, whether nothing else is masked.
    power: of a product with a constant times a power of the size of the one dimension, or attention of such a scale: that power.
    modified: whether the forward writes to the result, of which a gate must not keep more than a copy then.
    """

    module: str
    name: str
    number: int
    operand: int
    dims: tuple[tuple[int, Dim], ...]
    zero: bool = False
    power: float = 0
    modified: bool = False


@dataclass
class Counting:
    """Numbers the calls of a trace: one counter for each module call that is open, innermost last."""

    open: list[dict[str, int]] = field(default_factory=list)

    def copy(self) -> Counting:
        """One that counts on from here by itself."""
        return Counting([dict(counter) for counter in self.open])

    def enter(self) -> None:
        """A module is called."""
        self.open.append({})

    def leave(self) -> None:
        """It has returned."""
        self.open.pop()

    def pass_over(self, name: str) -> None:
        """A layer that is one function calls it: one more for the modules that are open."""
        for counter in self.open:
            counter[name] = counter.get(name, 0) + 1

    def count(self, name: str) -> int | None:
        """The number of this call in the innermost module; None where it has none."""
        if not self.open or _inside_another(name):
            return None
        self.pass_over(name)
        return self.open[-1][name] - 1


def _inside_another(name: str) -> bool:
    """Whether the call comes from the body of a function of PyTorch's that is not itself counted as `name`."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name not in ("_call_impl", "forward"):
        if frame.f_globals.get("__name__") in _COMPOSITE and NAMES.get(frame.f_code.co_name) != name:
            return True
        frame = frame.f_back
    return False


def at(record: Record, op: int) -> FunctionCall | None:
    """The function call that ran operator number `op`."""
    i = bisect.bisect_left(record.functions, op, key=lambda f: f.end)
    found = record.functions[i] if i < len(record.functions) else None
    return found if found is not None and found.start < op <= found.end else None


def site(call: FunctionCall, dims: Sequence[Dim], source: Value | None = None) -> CallSite | None:
    """The gate of `call` along `dims`, in the operand that is `source` (any that has them by default); None if none does."""
    for i, operand in enumerate(call.operands):
        if source is not None and not _same(operand, source):
            continue
        found = [_position(operand, dim) for dim in dims]
        if all(p is not None for p in found) and len(set(found)) == len(found):
            return CallSite(call.path, call.name, call.number, i, tuple(zip(found, dims)))  # type: ignore[arg-type]
    return None


def _same(a: Value, b: Value) -> bool:
    return a is b or (len(a.dims) == len(b.dims) and all(axes.same(p, q) for p, q in zip(a.dims, b.dims)))


def _position(value: Value, dim: Dim) -> int | None:
    found = [i for i, d in enumerate(value.dims) if d is dim] or [
        i for i, d in enumerate(value.dims) if axes.same(d, dim)
    ]
    return found[0] if len(found) == 1 else None


# -- acting -----------------------------------------------------------------------------------------------------------

_OPEN: list[_Gated] = []  # the gated forwards that are running, outermost first


def unseen() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is counted: for what gates compute around the user's own calls."""
    return torch._C.DisableTorchFunction() if _OPEN else contextlib.nullcontext()  # type: ignore[return-value]


transform = torch._C._functorch.peek_interpreter_stack
"""The innermost transform of `torch.func` that is at work (`vmap`, `grad`), if any."""


def is_transformed() -> bool:
    """Whether a compiler or a transform of `torch.func` is at work: neither takes functions of autograd as gates have them."""
    return torch.compiler.is_compiling() or transform() is not None


def counting() -> bool:
    """Whether a gated forward that is running counts the calls of the moment."""
    return bool(_OPEN)


class GatedForward(running.StandIn):
    """Stands for the forward of a module that has call sites."""

    def __init__(self, module: nn.Module, masks: Any, sites: Sequence[CallSite]):
        super().__init__(module)
        self.masks = masks
        self.sites = {(s.name, s.number): s for s in sites}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Gated(self.sites, self.masks):
            return self.inner(*args, **kwargs)


class _Gated(TorchFunctionMode):
    """Counts calls as the trace did, and gives those that have a site their kept-count form."""

    def __init__(self, sites: Mapping[tuple[str, int], CallSite], masks: Any):
        super().__init__()
        self.sites, self.masks = sites, masks
        self.counter: Counter[str] = Counter()  # called without a type: a compiler cannot follow that

    def __enter__(self) -> _Gated:
        _OPEN.append(self)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        _OPEN.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = counted_as(getattr(func, "__name__", ""), args)
        with torch._C.DisableTorchFunction():  # what its body calls is not counted, here or by the forwards around
            if name is None:
                return func(*args, **kwargs)
            for mode in _OPEN:
                mode.counter[name] += 1
            for mode in _OPEN:
                found = mode.sites.get((name, mode.counter[name] - 1))
                if found is not None:
                    return _FORMS[name](func, args, kwargs, found, mode.masks)
            return func(*args, **kwargs)


def _along(x: Tensor, found: CallSite, masks: Any) -> Tensor:
    """The mask of a site, broadcast against `x`."""
    out = torch.ones((), device=x.device)
    for position, dim in found.dims:
        shape = [1] * x.dim()
        shape[position] = -1
        out = out * masks(dim).view(shape)
    return out


def _argument(args: Any, kwargs: Any, position: int, *names: str) -> Any:
    return next((kwargs[n] for n in names if n in kwargs), args[position] if len(args) > position else None)


def _dims_of(x: Tensor, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.dim()))
    return [d % x.dim() for d in (dim if isinstance(dim, (tuple, list)) else [dim])]


def _count(x: Tensor, m: Tensor, over: Sequence[int]) -> Tensor:
    """How many elements are kept in a reduction of `x` over `over`, (); soft where the mask is."""
    return m.sum() * (torch.Size(x.shape[i] for i in over if m.dim() == 0 or m.shape[i] == 1).numel())


def _mean(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    x = args[0] if args else kwargs["input"]
    dim, keepdim = _argument(args, kwargs, 1, "dim", "axis"), bool(_argument(args, kwargs, 2, "keepdim"))
    x = x if kwargs.get("dtype") is None else x.to(kwargs["dtype"])
    over, m = _dims_of(x, dim), _along(x, found, masks)
    return ((x * m).sum(over, keepdim=keepdim) / _count(x, m, over)).to(x.dtype)


def _moments(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> tuple[Tensor, Tensor]:
    x = args[0] if args else kwargs["input"]
    dim = _argument(args, kwargs, 1, "dim", "axis")
    unbiased = _argument(args, kwargs, 2, "unbiased")
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    correction = kwargs.get("correction", 1 if unbiased is None else int(unbiased))
    correction = 1 if correction is None else correction
    keepdim = bool(_argument(args, kwargs, 3, "keepdim"))
    over, m = _dims_of(x, dim), _along(x, found, masks)
    count = _count(x, m, over)
    mean = (x * m).sum(over, keepdim=True) / count
    variance = ((x - mean).square() * m).sum(over, keepdim=True) / (count - correction)
    if not keepdim:
        mean, variance = (t.squeeze(over) for t in (mean, variance))
    return variance.to(x.dtype), mean.to(x.dtype)


def _variance(*call: Any) -> Tensor:
    return _moments(*call)[0]


def _root(variance: Tensor) -> Tensor:
    """The root of a variance, whose gradient is zero where that is, as that of `torch.std` is."""
    positive = variance > 0
    return torch.where(positive, variance, 1).sqrt() * positive


def _deviation(*call: Any) -> Tensor:
    return _root(_moments(*call)[0])


def _deviation_and_mean(*call: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _moments(*call)
    return _root(variance), mean


def _softmax(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    if func.__name__ == "gumbel_softmax":
        logits = _in_logs(args[0] if args else kwargs["logits"], found, masks)
        return func(logits, *args[1:], **{k: v for k, v in kwargs.items() if k != "logits"})
    x = args[0] if args else kwargs["input"]
    dim, dtype = _argument(args, kwargs, 1, "dim"), kwargs.get("dtype")
    x = x if dtype is None else x.to(dtype)
    m = _along(x, found, masks)
    kept = torch.where(m > 0, x, torch.finfo(x.dtype).min)
    e = (x - kept.amax(dim, keepdim=True).detach()).clamp(max=60).exp() * m  # clamp: what is removed may be larger
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


def _in_logs(x: Tensor, found: CallSite, masks: Any) -> Tensor:
    """x + log m; what is removed is far below all else, and finite: two of them can be added, and one be multiplied with zero."""
    m = _along(x, found, masks)
    return torch.where(m > 0, x + m.clamp(min=torch.finfo(m.dtype).tiny).log(), torch.finfo(x.dtype).min / 4).to(
        x.dtype
    )


def _log_softmax(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    x = args[0] if args else kwargs["input"]
    dim, dtype = _argument(args, kwargs, 1, "dim"), kwargs.get("dtype")
    x = _in_logs(x if dtype is None else x.to(dtype), found, masks)
    return x - x.logsumexp(dim, keepdim=True)


def _logsumexp(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    x = _in_logs(args[0] if args else kwargs["input"], found, masks)
    return func(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})


def _loss(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given, reduction = bound.arguments, bound.arguments["reduction"]
    if given.get("size_average") is not None or given.get("reduce") is not None:  # as it was said before `reduction`
        reduction = nn.modules.loss._Loss(given.get("size_average"), given.get("reduce")).reduction
        given.update(size_average=None, reduce=None)
    given["reduction"] = "none"
    each = func(*bound.args, **bound.kwargs)
    m = _along(each, found, masks)
    total = (each * m).sum()
    return (total / _count(each, m, range(each.dim())) if reduction == "mean" else total).to(each.dtype)


def _distance(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    """What is zero in both does not matter; they may be of other ranks, and are paired from the end."""
    rank = running.tensors_in((args, kwargs))[found.operand].dim()
    found = replace(found, dims=tuple([(position - rank, dim) for position, dim in found.dims]))
    for operand in (0, 1):
        args, kwargs = _with_masked((tuple(args), dict(kwargs)), found, masks, [operand])
    return func(*args, **kwargs)


def _extreme(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    largest = "min" not in func.__name__
    if func.__name__ == "topk":
        given = _argument(args, kwargs, 3, "largest")
        largest = given is None or given
    m = _along(x, found, masks)
    x = torch.where(m > 0, x, _worst(x.dtype, largest))
    out = func(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
    if found.zero and func.__name__ == "topk":  # the only place where the mask can collect a gradient
        dim = _argument(args, kwargs, 2, "dim")
        chosen = m.to(x.dtype).expand(x.shape).gather(-1 if dim is None else dim, out[1])
        return type(out)((out[0] * chosen, out[1]))
    return out


def _normalised(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    """A layer or root mean square normalisation, over what is kept."""
    x, weight = args[0] if args else kwargs["input"], _argument(args, kwargs, 2, "weight")
    centred = found.name == "layer_norm"
    bias = _argument(args, kwargs, 3, "bias") if centred else None
    eps = _argument(args, kwargs, 4 if centred else 3, "eps")
    if eps is None:
        eps = 1e-5 if centred else torch.finfo(x.dtype).eps
    over = list(range(x.dim() - len(_argument(args, kwargs, 1, "normalized_shape")), x.dim()))
    y, m = x.to(PRECISE.get(x.dtype, x.dtype)), _along(x, found, masks)
    count = _count(y, m, over)
    if centred:
        y = y - (y * m).sum(over, keepdim=True) / count
    y = y * m
    y = y * torch.rsqrt(y.square().sum(over, keepdim=True) / count + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _normalised_in_groups(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    """A normalisation of each group of channels, over those that are kept; every group keeps as many, or is gone."""
    x, groups = args[0] if args else kwargs["input"], int(_argument(args, kwargs, 1, "num_groups"))
    weight, bias, eps = (_argument(args, kwargs, i, name) for i, name in ((2, "weight"), (3, "bias"), (4, "eps")))
    grouped, beside = (groups, x.shape[1] // groups), [1] * (x.dim() - 2)
    y = x.to(PRECISE.get(x.dtype, x.dtype)).unflatten(1, grouped)
    m = _along(x, found, masks).view(1, *grouped, *beside)
    over = list(range(2, y.dim()))
    count = m.sum(2, keepdim=True).clamp(min=1) * x.shape[2:].numel()
    y = (y - (y * m).sum(over, keepdim=True) / count) * m
    y = y * torch.rsqrt(y.square().sum(over, keepdim=True) / count + (1e-5 if eps is None else eps))
    y = y.flatten(1, 2)
    y = y if weight is None else y * weight.view(-1, *beside)
    return (y if bias is None else y + bias.view(-1, *beside)).to(x.dtype)


_NEUTRAL = {"all": 1, "any": 0, "prod": 1, "count_nonzero": 0}
"""Name of a reduction -> an element that has no say in it."""


def _without(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    x = torch.where(
        _along(x, found, masks) > 0, x, torch.full((), _NEUTRAL[found.name], dtype=x.dtype, device=x.device)
    )
    return func(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})


def _worst(dtype: torch.dtype, largest: bool) -> float:
    """What is chosen last of all elements."""
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def _attention(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    query = args[0] if args else kwargs["query"]
    kwargs = {k: v for k, v in kwargs.items() if k != "query"}
    (_, dim), *_ = found.dims
    if found.zero:
        query = query * _along(query, found, masks).to(query.dtype)
    if _argument(args, kwargs, 6, "scale") is None:
        scale, kept = masks.share(dim, -0.5), masks.count(dim)
        query = Scaled.apply(query, scale, kept is not None)
        if kept is not None and kept < axes.size(dim):  # the operator scales: no other query is made and kept
            kwargs["scale"] = (axes.size(dim) / kept / query.shape[-1]) ** 0.5
    elif found.power:
        query = query * masks.share(dim, found.power).to(query.dtype)
    return func(query, *args[1:], **kwargs)


def _rescaled(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    """A constant times n ** power is the factor: of k kept elements it is that of all N times (k / N) ** power."""
    ((_, dim),) = found.dims
    out = Scaled.apply(func(*args, **kwargs), masks.share(dim, found.power), masks.is_whole(dim))
    return out.clone() if found.modified else out


def _rescaled_in_place(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    """The same, of a tensor that the forward writes the product to."""
    ((_, dim),) = found.dims
    out = func(*args, **kwargs)
    return out.mul_(masks.share(dim, found.power).to(out.dtype))


class Scaled(torch.autograd.Function):
    """y * s for a scalar s > 0, saving its result (which the consumer saves too) in place of y.

    y alone where s is `done`: it is one, or whoever takes y multiplies with it; s gets its gradient still.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, done: bool) -> Tensor:
        out = y if done else y * scale.to(y.dtype)
        ctx.save_for_backward(out, scale)
        ctx.done = done
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        out, scale = ctx.saved_tensors
        return grad if ctx.done else grad * scale.to(grad.dtype), inner(grad, out).to(scale.dtype) / scale, None


PRECISE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""What is summed in another dtype than its own."""


def slope(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a real factor of `x` at each of its elements: grad * x, of complex numbers Re(grad conj(x))."""
    return (grad * x.conj()).real if x.is_complex() else grad * x


def inner(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a scalar factor of `x`, (), in float32 at least."""
    plain = x.dtype in (torch.float32, torch.float64) and grad.dtype == x.dtype
    if plain and grad.is_contiguous() and x.is_contiguous() and not torch.is_autocast_enabled(x.device.type):
        return torch.dot(grad.view(-1), x.view(-1))  # no tensor of the size of x
    return slope(grad, x).sum(dtype=PRECISE.get(x.dtype))


def _standardised(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    """A batch norm with the statistics of its input (1, C, ...): a weight standardised over its inputs."""
    x = args[0] if args else kwargs["input"]
    over, m = [i for i in range(x.dim()) if i != 1], _along(x, found, masks)
    places = torch.Size(x.shape[i] for i in over).numel()
    count = _count(x, m, over)
    centred = (x - (x * m).sum(over, keepdim=True) / count) * m * torch.sqrt(places / count)
    bias = _argument(args, kwargs, 4, "bias")
    if bias is not None:
        args, kwargs = args[:4] + (None,) * (len(args) > 4) + args[5:], {**kwargs}
        kwargs.pop("bias", None)
    rest = {k: v for k, v in kwargs.items() if k != "input"}
    out = func(centred.to(x.dtype), *args[1:], **rest) * torch.sqrt(count / places).to(x.dtype)
    return out if bias is None else out + bias.view(-1, *[1] * (x.dim() - 2)) * m.to(x.dtype)


def _masked(func: Any, args: Any, kwargs: Any, found: CallSite, masks: Any) -> Tensor:
    args, kwargs = _with_masked((tuple(args), dict(kwargs)), found, masks, [found.operand])
    return func(*args, **kwargs)


def _with_masked(node: Any, found: CallSite, masks: Any, before: list[int]) -> Any:
    """A call's arguments with the operand of a site masked; `before` counts the tensors that come first."""
    if isinstance(node, Tensor):
        before[0] -= 1
        return node * _along(node, found, masks).to(node.dtype) if before[0] == -1 else node
    if isinstance(node, dict):
        return {k: _with_masked(v, found, masks, before) for k, v in node.items()}
    return type(node)(_with_masked(n, found, masks, before) for n in node) if isinstance(node, (tuple, list)) else node


_FORMS: dict[str, Callable[..., Any]] = {
    "mean": _mean, "var": _variance, "std": _deviation, "var_mean": _moments, "std_mean": _deviation_and_mean,
    "softmax": _softmax, "log_softmax": _log_softmax, "amax": _extreme, "amin": _extreme, "max": _extreme, "min": _extreme,
    **dict.fromkeys(_NEUTRAL, _without), "topk": _extreme, "argmax": _extreme, "argmin": _extreme, "batch_norm": _standardised,
    "layer_norm": _normalised, "rms_norm": _normalised, "group_norm": _normalised_in_groups,
    "loss": _loss, "logsumexp": _logsumexp, "distance": _distance,
    "sum": _masked, "norm": _masked, "attention": _attention, **dict.fromkeys(_PRODUCTS, _masked),
    "mul": _rescaled, "div": _rescaled, "tensor": _rescaled, "root": _rescaled,
    "mul_": _rescaled_in_place, "div_": _rescaled_in_place,
}  # fmt: skip
