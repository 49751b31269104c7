"""Where Python sizes arrive: which argument of which torch function says the size of which axis.

ATen operators receive plain ints, so sizes are read one level higher, where Python calls torch: a `TorchFunctionMode`
sees `x.shape`, `view`, `split`, slices and `groups=` with the very int objects that the model passed.  A size that
arrives anywhere else is a plain number, and what it was computed from must stay as it is.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from . import axes, direct, recurrent
from .axes import Dim
from .calls import GIVEN_SCALE, SCALINGS, FunctionCall, counted_as, is_counted, root, scaling, transform
from .carried import CARRIERS, Carried
from .numbering import Said, freeze_numbers
from .sizes import Equation, Expression, Extent, Operation, SizedFloat, SizedInt, power, square_root
from .tracer import READ, Scale, Tracer, Unmeasured, _constant, _tensors, operands_of, shape_of

Tensor = torch.Tensor
_TO_PYTHON = {"tolist", "numpy", "__array__"}  # what becomes of the elements no operator shows
_SHAPE = torch.Tensor.shape  # the getset descriptor behind `x.shape`
_DATA = torch.Tensor.data


class Arrivals(TorchFunctionMode):
    """Hands out sizes that remember their axes and notes where sizes arrive."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer
        self.carried = Carried()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if transform() is not None:
            return _hidden(self.tracer, func, args, kwargs)
        route = _route(func)
        how = route.how
        if how == "call":
            if self.carried and (size := self.carried.under_root(route.name, args)) is not None:
                return self._counted("root", func, route, args, kwargs, size)
            if self.carried or route.name in CARRIERS:
                args, out = self.carried.pass_on(route.name, func, args, kwargs)
                if out is not None:
                    return out
            if route.counts:
                counted = counted_as(route.name, args)
                if counted is not None:
                    return self._counted(counted, func, route, args, kwargs)
            return self._call(func, route, args, kwargs)
        if how == "shape":
            return shape_of(self.tracer, args[0])
        if how == "property":
            return func(*args, **kwargs)
        if how == "data":
            _replaced(self.tracer, *args)
            return func(*args)
        if how == "size":
            shape = shape_of(self.tracer, args[0])
            position = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if position is None else shape[position]
        return _numel(self.tracer, args[0])

    def of_layer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What `func` gives where a layer that is nothing else calls it: no gate will look for such a call, but it counts."""
        route = _route(func)
        if route.counts and (counted := counted_as(route.name, args)) is not None:
            self.tracer.counting.pass_over(counted)
        return self._call(func, route, args, {})

    def _counted(
        self, counted: str, func: Any, route: _Route, args: Any, kwargs: Any, under: SizedInt | None = None
    ) -> Any:
        """A call that a gate may have to find again; `under` is the size whose root it takes, as of a tensor."""
        tracer = self.tracer
        if counted == "batch_norm" and len(args) > 5 and not args[5]:  # no gate looks for one in evaluation
            tracer.counting.count(counted)
            return self._call(func, route, args, kwargs)
        number, start = tracer.counting.count(counted), tracer.op
        operands = tuple([tracer.value(t) for t in _tensors((*args, *kwargs.values()) if kwargs else args, [])])
        out = self._call(func, route, args, kwargs)
        if number is not None and tracer.op > start:
            first = out if isinstance(out, Tensor) else next(iter(_tensors([out], [])), None)
            result = None if first is None else tracer.value(first)
            call = FunctionCall(tracer.path, counted, number, start, tracer.op, operands, result)
            tracer.record.functions.append(call)
        factor = scaling(route.name, args) if counted in SCALINGS else None
        if isinstance(factor, SizedFloat):
            plain = not kwargs or counted == "tensor"  # which says of what kind and where
            power = SCALINGS[counted] * factor.power
            if not (number is not None and plain and _scaled(tracer, factor.size, power, factor.fixed)):
                factor.escape(counted)
        if isinstance(factor, SizedInt):
            plain = not kwargs and isinstance(out, Tensor) and out.is_floating_point()
            if not (number is not None and plain and _scaled(tracer, factor, SCALINGS[counted])):
                _fix(tracer, [factor])
        if under is not None and (number is None or not _scaled(tracer, under, root(route.name, args) or 0)):
            under.escape(route.name)
        return out

    def _call(self, func: Any, route: _Route, args: Any, kwargs: Any) -> Any:
        tracer, handler = self.tracer, route.handler
        if transform() is not None:
            return _hidden(tracer, func, args, kwargs)
        if route.plan is not None:
            out = direct.result(tracer, func, route.plan, args, kwargs)
            if out is not None:  # its arguments were tensors and plain numbers, but for those of the handler
                if handler is not None:
                    handler(tracer, out, *args, **kwargs)
                return out
        if func is F.scaled_dot_product_attention:
            return _attention(tracer, *args, **kwargs)
        if func is F.one_hot:
            return _one_hot(tracer, *args, **kwargs)
        name = route.name
        if name in _TO_PYTHON:
            tracer._operator = name
            for dim, size in zip(tracer.dims(args[0]), args[0].shape):
                if size > 1:
                    tracer.one_by_one(dim, range(size), READ)
            freeze_numbers(tracer, [tracer.value(args[0])])
        if handler is None:
            if recurrent.is_layer(name, args, kwargs):
                out = recurrent.layer(tracer, name, *args)
            else:
                out = func(*args, **kwargs)
            if func is torch._VF.lstm:
                recurrent.keep_apart(tracer, *out[1:])
            sized = _sized(args, kwargs)
            if sized and counted_as(name, args) not in SCALINGS:
                _fix(tracer, sized)
            return out
        makes = handler in (_created, _eye, _unpacked, _noise, _sparse_product)
        makes = makes or (handler is _numbered and _counts_to(tracer, args, kwargs))
        tracer.making_sized = makes or (
            handler is _padded and (_is_round(*args, **kwargs) or bool(_sized(args, kwargs)))
        )
        try:
            out = func(*args, **kwargs)
        finally:
            tracer.making_sized = False
        handler(tracer, out, *args, **kwargs)
        return out


def _hidden(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """A call inside a transform, whose tensors have dimensions that only the operators below show: its sizes stay."""
    route = _route(func)
    if route.how == "call" and route.counts and (counted := counted_as(route.name, args)) is not None:
        tracer.counting.count(counted)
    sized = _sized(args, kwargs)
    if sized:
        _fix(tracer, sized)
    return func(*args, **kwargs)


_Handler = Callable[..., None]
_HANDLERS: dict[str, _Handler] = {}


class _Route(NamedTuple):
    """What to do with a torch function.

    how: what is asked of a tensor, or "call".
    handler: of the sizes that arrive.
    counts: whether its calls may be counted.
    plan: the operator that it is, if it is one (`direct.py`).
    """

    how: str
    name: str
    handler: _Handler | None
    counts: bool
    plan: direct.Plan | None


@functools.lru_cache(maxsize=4096)
def _route(func: Any) -> _Route:
    name = getattr(func, "__name__", "")
    if getattr(func, "__self__", None) is _SHAPE:
        how = "shape"
    elif name == "__set__" and getattr(func, "__self__", None) is _DATA:
        how = "data"
    elif func is torch.Tensor.size:
        how = "size"
    elif func is torch.Tensor.numel or func is torch.Tensor.nelement:
        how = "numel"
    else:
        how = "property" if name == "__get__" else "call"
    return _Route(how, name, _HANDLERS.get(name), is_counted(name), direct.OPERATORS.get(func))


def _scaled(tracer: Tracer, size: SizedInt, power: float, fixed: Equation | None = None) -> bool:
    """A tensor is a constant times `size` to a power: for a gate to follow, not to be `fixed`.

    False where the size is one of axes that stay.
    """
    dim = _measured(tracer, size.expression)
    if dim is None:  # an attribute may say later what it is the size of
        fixed = fixed or size.escape("factor")
        if fixed is not None:
            tracer.record.unmeasured.append(Unmeasured(tracer.op, tracer.path, size.expression, power, fixed))
        return fixed is not None
    if not axes.is_free(dim):
        return False
    tracer.record.scales.append(Scale(tracer.op, tracer.path, dim, power))
    if fixed is not None:
        tracer.release(fixed)
    return True


def measure(tracer: Tracer) -> None:
    """Find the axes of the sizes that tensors were multiplied with before it was known what they are the sizes of."""
    for scale in tracer.record.unmeasured:
        dim = _measured(tracer, scale.size)
        if dim is not None and axes.is_free(dim):
            tracer.record.scales.append(Scale(scale.op, scale.path, dim, scale.power))
            tracer.release(scale.fixed)
    tracer.record.unmeasured.clear()


def _measured(tracer: Tracer, expression: Expression) -> Dim | None:
    """The dimension whose size `expression` is, but for a constant factor; None if that is not known."""
    if isinstance(expression, int):
        return ()
    if isinstance(expression, Extent):
        return expression.dim
    found = [e.dim for e in tracer.record.equations if e.expression == expression and axes.is_free(e.dim)]
    if found or not isinstance(expression, Operation):
        return found[-1] if found else None
    left, right = _measured(tracer, expression.left), _measured(tracer, expression.right)
    return (*left, *right) if left is not None and right is not None and expression.symbol == "*" else None


def _fix(tracer: Tracer, sized: Sequence[SizedInt | SizedFloat]) -> None:
    """Sizes arrived where nothing says what they are sizes of."""
    for value in sized:
        if isinstance(value, SizedFloat):
            value.escape(tracer._operator)
        else:
            tracer.equate(value, _constant(int(value)))


def _replaced(tracer: Tracer, x: Tensor, other: Tensor) -> None:
    """`x.data = other`: no operator shows that `x` is written to, and has the axes of `other`."""
    tracer.writes(x)
    dims, given = tracer.dims(x), tracer.dims(other)
    try:
        if len(dims) != len(given):
            raise axes.Conflict(f"{list(x.shape)} replaced by {list(other.shape)}")
        for own, new in zip(dims, given):
            axes.unify(own, new)
    except axes.Conflict as conflict:
        tracer.freeze_dims([*dims, *given], str(conflict))


def _numel(tracer: Tracer, x: Tensor) -> int:
    dims = tuple(a for dim in tracer.dims(x) for a in dim)
    return SizedInt(x.numel(), Extent(dims)) if axes.is_free(dims) else x.numel()


def _sized(args: Any, kwargs: Any) -> list[SizedInt | SizedFloat]:
    out: list[SizedInt | SizedFloat] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, (SizedInt, SizedFloat)):
            out.append(x)
        elif isinstance(x, (tuple, list)):
            out += [y for y in x if isinstance(y, (SizedInt, SizedFloat))]
    return out


@contextlib.contextmanager
def transparent_functional() -> Iterator[None]:
    """Let the Python bodies of `torch.nn.functional` run under a function mode, and `math.sqrt` remember sizes.

    A mode receives such a function as one call and cannot see the `view`s inside (attention, layer_norm, einsum).  While
    tracing, these modules are told that nothing overrides them, so the calls inside reach the mode one by one; and so is
    `torch._assert`, whose conditions would go through the mode as well.
    """
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    modules = (torch.nn.functional, torch.functional)
    places = [(m, n) for m in modules for n in names if hasattr(m, n)]
    saved = [(m, n, getattr(m, n)) for m, n in (*places, (torch.overrides, "has_torch_function"))]
    fast = torch.backends.mha.get_fastpath_enabled()
    for m, n, _ in saved:
        setattr(m, n, lambda *args: False)
    torch.backends.mha.set_fastpath_enabled(False)
    root, to_the = math.sqrt, math.pow
    math.sqrt, math.pow = square_root, power  # they would take the float of a size and forget the size
    try:
        yield
    finally:
        math.sqrt, math.pow = root, to_the
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, n, function in saved:
            setattr(m, n, function)


def _attention(
    tracer: Tracer, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention, (..., heads, L, d) x (..., heads, S, d), as the matrix products that it is.

    Fused kernels hide both products; this is PyTorch's documented reference, so that one set of rules serves.
    """
    start = tracer.op
    given = (query, key, value, attn_mask, dropout_p, is_causal)
    as_called = operands_of(tracer, given), {"scale": scale, "enable_gqa": enable_gqa}
    by_size = "attention scale" if scale is None else ""
    if scale is None:
        scale = 1 / math.sqrt(query.size(-1))
    elif isinstance(scale, SizedFloat):
        if _is_usual(tracer, scale, query):
            by_size = GIVEN_SCALE
        else:
            scale.escape("scale")
        scale = float(scale)
    if enable_gqa:
        repeats = query.size(-3) // key.size(-3)
        key, value = (
            t.unsqueeze(-3).expand(*t.shape[:-2], repeats, *t.shape[-2:]).flatten(-4, -3) for t in (key, value)
        )
    run = functools.partial(direct.call, tracer)
    scores = run(torch.Tensor.mul, run(torch.matmul, query, run(torch.transpose, key, -2, -1)), scale)
    if by_size:  # sliced to fewer head dims the kernel scales by the new size
        tracer._operator = "scaled_dot_product_attention"
        tracer.normalised(by_size, [tracer.dims(query)[-1]], query)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        mask_bool = attn_mask.dtype == torch.bool
        scores = torch.where(attn_mask, scores, float("-inf")) if mask_bool else scores + attn_mask
    out = run(torch.matmul, run(torch.softmax, scores, -1).to(value.dtype), value)
    tracer.fuse(start, F.scaled_dot_product_attention, *as_called, out)
    return out


def _is_usual(tracer: Tracer, scale: SizedFloat, query: Tensor) -> bool:
    """Whether a scale of attention is a constant by the root of the size of a head, which is not to be fixed by it then."""
    dim, expression = tracer.dims(query)[-1], scale.size.expression
    known = [e.dim for e in tracer.record.equations if e.expression == expression]
    if isinstance(expression, Extent):
        known.append(expression.dim)
    if scale.power != -0.5 or not any(axes.same(dim, other) for other in known):
        return False
    tracer.release(scale.fixed)
    return True


def _one_hot(tracer: Tracer, tensor: Tensor, num_classes: int = -1) -> Tensor:
    """One-hot vectors as the comparison that they are: `tensor` (...) with all numbers, (..., num_classes)."""
    if not isinstance(num_classes, SizedInt) and not tracer.has_list_of(num_classes):
        return F.one_hot(tensor, num_classes)
    tracer.making_sized = True
    try:
        every = torch.arange(int(num_classes), device=tensor.device)
    finally:
        tracer.making_sized = False
    _numbered(tracer, every, num_classes)
    return (tensor.unsqueeze(-1) == every).long()


def _counts_to(tracer: Tracer, args: Any, kwargs: Any) -> bool:
    """Whether the arguments of an `arange` ask for the numbers below one size, or the length of a list."""
    if len(args) != 1 or kwargs.keys() & {"start", "end", "step"}:
        return False
    return isinstance(args[0], SizedInt) or tracer.has_list_of(args[0])


# -- handlers: tracer, out, then the function's own arguments ---------------------------------------------------------


def _on(*names: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _sizes(args: Sequence[Any]) -> list[int | Tensor]:
    """The sizes among the arguments of a view; one may be an element of a tensor, and keeps its place."""
    out: list[Any] = []
    for a in args:
        out += a if isinstance(a, (tuple, list)) else [a]
    return [a for a in out if isinstance(a, (int, Tensor))]


def _equate_all(tracer: Tracer, sizes: Sequence[int | Tensor], dims: Sequence[Dim]) -> None:
    for n, dim in zip(reversed(sizes), reversed(dims)):
        if isinstance(n, Tensor):
            tracer.equate(axes.size(dim), dim)
        elif int(n) >= 0:
            tracer.equate(n, dim)


@_on("view", "reshape", "expand", "broadcast_to", "_unsafe_view")
def _shaped(tracer: Tracer, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    _equate_all(tracer, _sizes((*args, *kwargs.values())), tracer.dims(out))


@_on("reshape_as", "view_as", "expand_as")
def _shaped_as(tracer: Tracer, out: Tensor, x: Tensor, other: Tensor) -> None:
    """Each size is that of the other tensor, as in `x.reshape(other.shape)`."""
    sizes = [SizedInt(n, Extent(dim)) if axes.is_free(dim) else n for n, dim in zip(other.shape, tracer.dims(other))]
    _equate_all(tracer, sizes, tracer.dims(out))


@_on("unflatten")
def _unflatten(tracer: Tracer, out: Tensor, x: Tensor, dim: int, sizes: Sequence[int]) -> None:
    dim %= x.dim()
    _equate_all(tracer, list(sizes), tracer.dims(out)[dim : dim + len(sizes)])


@_on("repeat", "tile")
def _repeat(tracer: Tracer, out: Tensor, x: Tensor, *counts: Any, **kwargs: Any) -> None:
    numbers = _sizes((*counts, *kwargs.values()))
    own = [1] * (len(numbers) - x.dim()) + [int(n) for n in x.shape]
    for n, dim, once in zip(reversed(numbers), reversed(tracer.dims(out)), reversed(own)):
        count = axes.size(dim) // max(once, 1) if isinstance(n, Tensor) else n
        tracer.equate(count, _leading(dim, int(count)))


@_on("repeat_interleave")
def _repeat_interleave(tracer: Tracer, out: Tensor, x: Tensor, repeats: Any, dim: Any = None, **kwargs: Any) -> None:
    if isinstance(repeats, int) and dim is not None:
        tracer.equate(repeats, _trailing(tracer.dims(out)[dim], int(repeats)))


def _leading(dim: Dim, n: int) -> Dim:
    """The factors of `dim` that make up its first `n`; a constant where there is no such boundary."""
    got: list[axes.Axis] = []
    for a in axes.factors(dim):
        if axes.size(tuple(got)) >= n:
            break
        got.append(a)
    return tuple(got) if axes.size(tuple(got)) == n else _constant(n)


def _trailing(dim: Dim, n: int) -> Dim:
    got: list[axes.Axis] = []
    for a in reversed(axes.factors(dim)):
        if axes.size(tuple(got)) >= n:
            break
        got.insert(0, a)
    return tuple(got) if axes.size(tuple(got)) == n else _constant(n)


@_on("split", "split_with_sizes", "unsafe_split")
def _split(tracer: Tracer, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> None:
    pieces = [tracer.dims(o)[dim] for o in out]
    listed = list(sizes) if isinstance(sizes, (tuple, list)) else [sizes] * len(pieces)
    for n, piece in zip(listed, pieces):
        tracer.equate(n, piece if int(n) == axes.size(piece) else _constant(int(n)))


@_on("chunk", "unsafe_chunk")
def _chunk(tracer: Tracer, out: Sequence[Tensor], x: Tensor, chunks: int, dim: int = 0) -> None:
    first, *others = [tracer.dims(o)[dim] for o in out]
    whole = axes.size(first)
    for piece in others:  # equal pieces stay equal; with a last one that is smaller, all keep the same share
        n = axes.size(piece)
        share = Extent(first) if n == whole else Operation("//", Operation("*", Extent(first), n), whole)
        tracer.equate(SizedInt(n, share), piece)


@_on("tensor_split")
def _tensor_split(
    tracer: Tracer, out: Sequence[Tensor], x: Tensor, indices_or_sections: Any = None, dim: int = 0, **named: Any
) -> None:
    """Equal sections stay equal; unequal ones are not always as unequal.  Indices are the sizes of all before them."""
    where = next(iter(named.values())) if indices_or_sections is None else indices_or_sections
    pieces = [tracer.dims(o)[dim] for o in out]
    if isinstance(where, Tensor):
        tracer.freeze_dims(pieces, "cut at indices from a tensor")
    elif isinstance(where, (tuple, list)):
        for i, n in enumerate(where):
            before = axes.concat(pieces[: i + 1])
            tracer.equate(n, before if int(n) == axes.size(before) else _constant(int(n)))
    elif len({axes.size(piece) for piece in pieces}) == 1:
        _chunk(tracer, out, x, len(pieces), dim)
    else:
        tracer.freeze_dims(pieces, "cut into unequal sections")


@_on("feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_")
def _noise(tracer: Tracer, out: Tensor, x: Tensor, *args: Any) -> None:
    """A factor for each channel, made inside of sizes that no Python code passes, has the axes of what it is multiplied with."""


@_on("_sparse_mm")
def _sparse_product(tracer: Tracer, out: Tensor, a: Tensor, b: Tensor) -> None:
    """A product is added to zeros, which PyTorch makes for it: their axes are those of the product."""


@_on("hsplit", "vsplit", "dsplit")
def _split_along(tracer: Tracer, out: Sequence[Tensor], x: Tensor, where: Any = None, **named: Any) -> None:
    cut = {i for i, n in enumerate(x.shape) if n != out[0].shape[i]}
    _tensor_split(tracer, out, x, where, cut.pop() if cut else 0, **named)


@_on("narrow")
def _narrow(tracer: Tracer, out: Tensor, x: Tensor, dim: int, start: int, length: int) -> None:
    _slice_arrives(tracer, tracer.dims(x)[dim], x.size(dim), start, start + length)


@_on("__getitem__")
def _getitem(tracer: Tracer, out: Tensor, x: Tensor, index: Any) -> None:
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index):
        for i in index:
            if isinstance(i, slice):
                for end in (i.start, i.stop):
                    if isinstance(end, SizedInt):
                        tracer.equate(end, _constant(int(end)))
        return
    named = [i for i in index if i is not None and i is not Ellipsis]
    position = 0
    for i in index:
        if i is None:
            continue
        if i is Ellipsis:
            position += x.dim() - len(named)
            continue
        if isinstance(i, slice) and i.step in (None, 1):
            _slice_arrives(tracer, tracer.dims(x)[position], x.size(position), i.start, i.stop)
        elif isinstance(i, SizedInt):
            tracer.equate(i, _constant(int(i)))
        position += 1


def _slice_arrives(tracer: Tracer, dim: Dim, total: int, start: int | None, stop: int | None) -> None:
    """The ends of a slice are the sizes of what lies before, in and behind it."""
    first, last, _ = slice(start, stop).indices(total)
    if last <= first or (first == 0 and last == total and not isinstance(stop, SizedInt)):
        return
    if last - first == 1 and tracer.has_list_of(total) and not isinstance(start, SizedInt):
        return  # an element for a module
    try:
        before, middle, behind = axes.cut(dim, [first, last - first, total - last])
    except axes.Conflict:
        return  # the operator's own rule has frozen it
    if start is not None and first > 0:
        if int(start) >= 0:
            tracer.equate(start, before)
        else:
            tracer.equate(-start, axes.concat([middle, behind]))
    if stop is not None and (last < total or int(stop) == total):
        if int(stop) >= 0:
            tracer.equate(stop, axes.concat([before, middle]))
        else:
            tracer.equate(-stop, behind)


@_on("conv1d", "conv2d", "conv3d")
def _convolution(
    tracer: Tracer, out: Tensor, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> None:  # fmt: skip
    if int(groups) > 1:
        tracer.equate(groups, _leading(tracer.dims(out)[1 if out.dim() == weight.dim() else 0], int(groups)))


@_on("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(
    tracer: Tracer, out: Tensor, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> None:  # fmt: skip
    _convolution(tracer, out, input, weight, groups=groups)


@_on("group_norm")
def _group_norm(tracer: Tracer, out: Tensor, x: Tensor, num_groups: int, *args: Any, **kwargs: Any) -> None:
    if int(num_groups) > 1:
        tracer.equate(num_groups, _leading(tracer.dims(x)[1], int(num_groups)))


@_on("layer_norm", "rms_norm")
def _layer_norm(tracer: Tracer, out: Tensor, x: Tensor, normalized_shape: Sequence[int], *args: Any, **kw: Any) -> None:
    _equate_all(tracer, list(normalized_shape), tracer.dims(x)[-len(normalized_shape) :])


@_on(
    "zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"
)  # fmt: skip
def _created(tracer: Tracer, out: Tensor, *args: Any, **kwargs: Any) -> None:
    sizes = next((list(a) for a in (*args, *kwargs.values()) if isinstance(a, (tuple, list))), None)
    if sizes is None:  # a number may be in a tensor: the batch that is left of a packed sequence
        sizes = [int(a) if _is_number(a) else a for a in args if isinstance(a, int) or _is_number(a)][: out.dim()]
    if len(sizes) == out.dim():
        _equate_all(tracer, sizes, tracer.dims(out))
    else:
        tracer.freeze_dims(tracer.dims(out), "a constant")


@_on("eye")
def _eye(tracer: Tracer, out: Tensor, n: int, m: int | None = None, **kwargs: Any) -> None:
    """Rows and columns are one axis: of an identity, those that stay are one again."""
    rows, columns = tracer.dims(out)
    if m is None or int(m) == int(n):
        axes.unify(rows, columns)
    else:
        tracer.freeze_dims([rows, columns], "a constant")
    _equate_all(tracer, [n, n if m is None else m], [rows, columns])


def _is_number(a: Any) -> bool:
    return isinstance(a, Tensor) and a.dim() == 0 and not a.is_meta and not a.is_floating_point()


@_on("_pad_packed_sequence")
def _unpacked(tracer: Tracer, out: Sequence[Tensor], data: Tensor, *args: Any, **kwargs: Any) -> None:
    """A packed sequence written into zeros, time step by time step: how many there are is fixed, the features are not."""
    tracer.freeze_dims(tracer.dims(out[0])[:2], "the length of sequences")


def _is_round(input: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> bool:
    """Whether what is padded is copied, in pieces, into a tensor that PyTorch makes for it inside."""
    return mode == "circular"


@_on("pad")
def _padded(
    tracer: Tracer, out: Tensor, input: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> None:  # fmt: skip
    """The numbers of elements that lengthen an axis at its ends; they follow where it is free, as the channels of a shortcut."""
    if _is_round(input, pad, mode):
        lengthened = [-1 - j for j, ends in enumerate(zip(pad[::2], pad[1::2])) if any(ends)]
        tracer.freeze_dims(
            [tracer.dims(t)[i] for t in (input, out) for i in lengthened], "padded with its own elements"
        )
        return
    for j, ends in enumerate(zip(pad[::2], pad[1::2])):
        dim = tracer.dims(out)[-1 - j]
        parts = (
            dim[0].root().sum
            if len(dim) == 1 and mode == "constant" and axes.is_free(tracer.dims(input)[-1 - j])
            else None
        )
        for n, end in zip(ends, (0, -1)):
            if parts is not None and int(n) > 1:
                tracer.equate(n, parts[end])
            elif isinstance(n, SizedInt):
                _fix(tracer, [n])


@_on("arange")
def _numbered(tracer: Tracer, out: Tensor, *args: Any, **kwargs: Any) -> None:
    """The numbers of all elements of an axis, if they go up to one size."""
    if _counts_to(tracer, args, kwargs):
        (dim,) = tracer.dims(out)
        tracer.equate(args[0], dim)
        tracer.value(out).said = Said(dim)
    else:
        _fix(tracer, _sized(args, kwargs))


@_on("histc")
def _histc(
    tracer: Tracer, out: Tensor, x: Tensor, bins: int = 100, min: float = 0, max: float = 0, **kwargs: Any
) -> None:
    tracer.equate(bins, tracer.dims(out)[0])
    if isinstance(max, int):
        tracer.equate(max + 1, tracer.dims(out)[0])


@_on("bincount")
def _bincount(tracer: Tracer, out: Tensor, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> None:
    tracer.equate(minlength, tracer.dims(out)[0])
