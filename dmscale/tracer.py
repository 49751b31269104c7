"""The dispatch mode that infers axes: it sees every ATen operator that runs and applies that operator's rule.

`Tracer` knows operators and tensors, not models (`tracing.py` brings the model to it), so it can be tried on any function:

    with Tracer() as tracer:
        x = tracer.watch(torch.ones(2, 8), "x")
        y = x.view(2, 4, 2).flatten()
    tracer.dims(y)
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import axes, kernels
from .axes import Axis, Conflict, Dim
from .calls import SCALINGS, Counting, FunctionCall
from .numbering import NOTHING, PICKS, Said, freeze_numbers, heard
from .rules import RULES
from .rules.registry import Rule
from .sizes import Attribute, Decision, Equation, Expression, Extent, Operation, SizedInt, listening

aten = torch.ops.aten
Tensor = torch.Tensor


@dataclass(eq=False, slots=True)
class Value:
    """What is known of one tensor.

    dims: its dimensions as axes.
    params: names of the parameters that it was made of since the last contraction.
    data: whether it depends on the model's input (a weight does not).
    origin: equal for tensors that hold the same elements (views, copies, casts).
    square: origin of the tensor that it is the square of.
    repeated: dimensions along which it was repeated (`expand`, `repeat`): its elements differ only beside them.
    product: the product of two activations that it was computed from, element by element or by a softmax.
    zeroed: whether it is zero where those parameters are.
    said: what it says about elements of axes by their number.
    dtype: of its elements.
    """

    dims: tuple[Dim, ...]
    params: frozenset[str] = frozenset()
    data: bool = False
    origin: int = 0
    square: int | None = None
    repeated: tuple[Dim, ...] = ()
    product: Product | None = None
    zeroed: bool = True
    said: Said = NOTHING
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Product:
    """A product of two activations; `over`, the dimension that a softmax of it was taken over, makes it attention."""

    operands: tuple[tuple[Value, int], ...]  # with the bytes of an element
    over: Dim | None = None


@dataclass(frozen=True, eq=False)
class Cached:
    """A key or value operand of attention: `element` bytes for each element of `dims`, those of `repeated` aside."""

    op: int
    path: str
    element: int
    dims: tuple[Dim, ...]
    repeated: tuple[Dim, ...]


class Operand(NamedTuple):
    """A tensor argument of an `Instance`: its dimensions as axes, and its strides."""

    dims: tuple[Dim, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The order of its strides, slowest first."""
        return tuple(sorted(range(len(self.strides)), key=lambda i: (-self.strides[i], i)))


@dataclass(eq=False, slots=True)
class Instance:
    """One contraction as it ran: all that is needed to run it again alone, at other sizes.

    start, end: it stands for the operators `start` < op <= `end`; a fused attention for several.
    function: what was called, an ATen overload or a function of `torch.nn.functional`.
    args, kwargs: its arguments, every tensor replaced by an `Operand`.
    dims: the dimensions of its result.
    """

    start: int
    end: int
    path: str
    operator: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: tuple[Dim, ...]


@dataclass(eq=False, slots=True)
class Term:
    """One contraction: the product of the sizes of `dims` is its number of MACs."""

    op: int
    path: str
    operator: str
    dims: tuple[Dim, ...]


class Activation(NamedTuple):
    """A result that depends on the model's input and is no view: operator `op` wrote `element` bytes an element."""

    op: int
    element: int
    dims: tuple[Dim, ...]
    path: str


@dataclass(eq=False, slots=True)
class Contraction:
    """`dim` was summed over by the operator number `op` in module `path`.

    operands: the tensors that met there, each with its own dimension that was summed over.
    """

    op: int
    path: str
    operator: str
    dim: Dim
    operands: tuple[tuple[Value, Dim], ...]


@dataclass(frozen=True, eq=False)
class Lookup:
    """Elements of `dim` of the tensor `source` were found by numbers that had been chosen, by operator number `op`."""

    op: int
    path: str
    dim: Dim
    source: Value


@dataclass(frozen=True, eq=False)
class Normalisation:
    """The result depends on the number of elements of `dims` (mean, variance, softmax ...), `kind` says how."""

    op: int
    path: str
    operator: str
    kind: str
    dims: tuple[Dim, ...]
    source: Value
    weight: str | None = None
    bias: str | None = None
    group: Dim = ()


@dataclass(frozen=True, eq=False)
class Scale:
    """The operator number `op` multiplied with a constant times `size of dim ** power`: attention, by 1 / sqrt(head_dim)."""

    op: int
    path: str
    dim: Dim
    power: float


@dataclass(frozen=True, eq=False)
class Unmeasured:
    """A `Scale` by a size of which no axis is known yet; it stays `fixed` where none will be."""

    op: int
    path: str
    size: Expression
    power: float
    fixed: Equation


READ = "its elements are read by Python"


class Position(NamedTuple):
    """Element `number` of `dim` was taken by it, in module `path`; None if only the size of `dim` was given, as a plain number.

    `reason` fixes the axis where no module goes with each element.  `made` are the parameters that what was stacked there was
    made of.
    """

    dim: Dim
    path: str
    number: int | None
    reason: str
    made: frozenset[str] = frozenset()


class Step(NamedTuple):
    """What one operator took and gave, as origins; one that `writes` into its arguments is not to be left out."""

    operator: str
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    writes: bool = False


@dataclass(frozen=True, eq=False)
class Addition:
    """The sum of two tensors, by the operator number `op`."""

    op: int
    operands: tuple[Value, Value]
    result: Value


@dataclass(eq=False, slots=True)
class Call:
    """One call of a module: operators `start` to `end`, its first tensor in and out.

    argument: position or name of the argument that is the first tensor.
    form: of the output, as in `branches.zero`; None where it holds what has no such form.
    others: origins of its other outputs.
    given: where it took more than a tensor, (position or name, value) of each argument that is one.
    parts: where it gave several tensors that it had not been given, (place, value) of each in its tuple or list.
    """

    path: str
    start: int
    source: Value | None
    end: int = 0
    result: Value | None = None
    passes_the_rest: bool = True  # other outputs are inputs handed on, so that the call can be left out
    argument: int | str | None = None
    form: Any = None
    others: tuple[int, ...] = ()
    given: tuple[tuple[int | str, Value], ...] = ()
    parts: tuple[tuple[int, Value], ...] = ()


@dataclass
class Apart:
    """What a part of a run that was noted apart did: whether anything that gates and blocks are found by, and what it touched."""

    tells: bool = False
    touched: set[Dim] = field(default_factory=set)


_op = operator.attrgetter("op")


@dataclass
class Record:
    """Everything that a trace notes beside the axes themselves."""

    terms: list[Term] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    cached: list[Cached] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    normalisations: list[Normalisation] = field(default_factory=list)
    produced: list[tuple[int, str, Dim]] = field(default_factory=list)  # op, module, axes that a weight made
    batched: list[Dim] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    functions: list[FunctionCall] = field(default_factory=list)  # torch functions that can be gated, in order
    additions: list[Addition] = field(default_factory=list)
    taken: list[tuple[int, Attribute, int]] = field(default_factory=list)  # op before it, list, which entry
    biases: list[tuple[int, str]] = field(default_factory=list)  # op, the parameter that it adds as it is
    activations: list[Activation] = field(default_factory=list)
    unknown: dict[str, dict[str, None]] = field(default_factory=dict)  # operator without a rule -> module paths
    conflicts: list[str] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)
    multiples: list[tuple[Dim, int]] = field(default_factory=list)  # dim, what its size must be a multiple of
    least: list[tuple[Dim, int]] = field(default_factory=list)  # dim, the smallest size that it may have
    lookups: list[Lookup] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    unmeasured: list[Unmeasured] = field(default_factory=list)
    by_products: dict[str, tuple[tuple[Dim, ...], ...]] = field(default_factory=dict)  # outputs whose axes may shrink
    read: dict[str, int] = field(default_factory=dict)  # parameter -> the first operator that took it
    written: set[str] = field(default_factory=set)  # parameters and buffers that a forward writes to
    magnitudes: dict[str, str] = field(default_factory=dict)  # parameter divided by its norm -> what it is times
    not_alone: list[Dim] = field(default_factory=list)  # with one element left these dimensions would be gone
    steps: dict[int, Step] = field(default_factory=dict)  # by operator number
    modified: dict[int, list[int]] = field(default_factory=dict)  # origin -> the operators that write to such a tensor
    results: set[int] = field(default_factory=set)  # origins of what the model returns
    decisions: dict[Decision, None] = field(default_factory=dict)  # what was asked of sizes
    by_values: dict[Axis, str] = field(default_factory=dict)  # an axis as long as values say -> the module that made it

    _by_path: dict[str, tuple[int, dict[str, list[Any]]]] = field(default_factory=dict, repr=False)

    def of(self, kind: str, path: str) -> list[Any]:
        """Those of `calls`, `contractions` or `normalisations` that module `path` has made, in order."""
        noted = getattr(self, kind)
        length, found = self._by_path.get(kind, (-1, {}))
        if length != len(noted):
            found = {}
            for n in noted:
                found.setdefault(n.path, []).append(n)
            self._by_path[kind] = len(noted), found
        return found.get(path, [])

    def within(self, noted: list[Any], start: int, end: int) -> list[Any]:
        """Those of a list in the order of operators that ran behind operator `start`, up to `end`."""
        first = bisect.bisect_right(noted, start, key=_op)
        return noted[first : bisect.bisect_right(noted, end, first, key=_op)]

    def touched(self, terms: int = 0, activations: int = 0) -> set[Dim]:
        """The dimensions of what operators contracted or computed, behind so many of each."""
        computed = [*(t.dims for t in self.terms[terms:]), *(a.dims for a in self.activations[activations:])]
        return {dim for dims in computed for dim in dims}

    @contextlib.contextmanager
    def free_of_cost(self, functions: bool = True) -> Iterator[set[Dim]]:
        """What runs inside adds to no cost, nor to the calls of functions; gives the dimensions that it touched, afterwards."""
        costs: list[list[Any]] = [self.terms, self.activations, self.calls, self.instances, self.cached]
        costs += [self.functions] if functions else []
        before = [len(noted) for noted in costs]
        touched: set[Dim] = set()
        yield touched
        touched |= self.touched(*before[:2])
        for noted, length in zip(costs, before):
            del noted[length:]

    @contextlib.contextmanager
    def apart(self) -> Iterator[Apart]:
        """What runs inside, in the midst of a run, adds to no cost, and to nothing that gates and blocks are found by."""
        found: list[list[Any]] = [
            self.contractions, self.normalisations, self.additions, self.lookups, self.scales, self.unmeasured, self.calls,
            self.functions,
        ]  # fmt: skip
        before = [len(noted) for noted in found]
        beside = Apart()
        with self.free_of_cost(functions=False) as beside.touched:
            yield beside
            new = [n for noted, length in zip(found, before) for n in noted[length:]]
            # a product with a plain number is no more than a number
            beside.tells = not all(isinstance(n, FunctionCall) and n.name in SCALINGS for n in new)
            for noted, length in zip(found, before):
                del noted[length:]

    def matters(self) -> set[int]:
        """Origins of everything that a result, a tensor that is written to, or what Python reads depends on."""
        return self._needed(self.results, lambda step: step.writes)

    def _needed(self, results: set[int], also: Callable[[Step], bool]) -> set[int]:
        """Origins of what `results` depend on, and what steps of which `also` is true take."""
        found = set(results)
        for step in reversed(self.steps.values()):
            if also(step) or not found.isdisjoint(step.gives):
                found.update(step.takes)
        return found

    def deciding(self) -> set[Axis]:
        """The axes of what was computed for values that Python read, and for nothing else.

        What follows from such a value no run shows: an early exit returns that very tensor.
        """
        if not self.results or all(step.gives for step in self.steps.values()):
            return set()
        read = self._needed(set(), lambda step: not step.gives)
        used = self._needed(self.results, lambda step: step.writes and bool(step.gives))
        beside: set[Axis] = set()
        needed: set[Axis] = set()
        for a in self.activations:
            gives = set(self.steps[a.op].gives) if a.op in self.steps else set()
            where = needed if gives & used else beside if gives & read else None
            if where is not None:
                where.update(atom for dim in a.dims for atom in axes.atoms(dim))
        return beside - needed


# Results that hold the very elements of their first argument: a residual branch may add such a copy.
_SAME_ELEMENTS = {
    op: None
    for packet in (
        aten.alias, aten.detach, aten.clone, aten._to_copy, aten.view, aten._unsafe_view, aten.permute, aten.transpose,
        aten.squeeze, aten.unsqueeze, aten.lift_fresh, aten.t, aten._reshape_alias,
    )
    for op in (getattr(packet, name) for name in packet.overloads())
}  # fmt: skip
_VIEWS = {*_SAME_ELEMENTS, *(getattr(p, n) for p in (
    aten.expand, aten.split, aten.split_with_sizes, aten.slice, aten.select, aten.unbind, aten.chunk,
    aten.diagonal) for n in p.overloads()
)}  # fmt: skip
_POINTWISE = [
    aten.copy_, aten.where, aten.masked_fill, aten.masked_fill_, aten.native_dropout, aten.fill_, aten.lerp,
    aten.addcmul, aten.addcdiv, aten.floor_divide, aten.zero_, aten.bernoulli_, aten.normal_, aten.uniform_,
    aten.rsub, aten.add_, aten.heaviside, aten.rrelu_with_noise, aten._prelu_kernel, aten.hardswish_, aten.hardswish,
    aten.exponential_, aten.geometric_, aten.cauchy_, aten.log_normal_, aten.random_,
    aten.complex, aten.polar, aten.fake_quantize_per_tensor_affine,
    # without the tag in torch 2.8
    aten.hardtanh_, aten.elu_, aten.celu_, aten.selu_, aten.hardsigmoid_, aten.leaky_relu, aten.leaky_relu_, aten.ldexp,
    aten._conj_physical,
]  # fmt: skip
POINTWISE = {getattr(packet, name) for packet in _POINTWISE for name in packet.overloads()}
_SOFTMAX = {getattr(p, n) for p in (aten._softmax, aten._safe_softmax, aten.softmax) for n in p.overloads()}
_REPEATING = {getattr(p, n) for p in (aten.expand, aten.repeat) for n in p.overloads()}
_TIMES = {aten.mul.Tensor, aten.mul_.Tensor}
"""Products are zero where one factor is; the masked factor of a rotary embedding is enough."""
_LEAVES_ZERO = {
    getattr(packet, name)
    for packet in (aten.exp, aten.sigmoid, aten._softmax, aten._log_softmax, aten.cos, aten.polar, aten.softplus, aten.rsub,
                   aten.log_sigmoid_forward, aten.hardsigmoid)
    for name in packet.overloads()
}  # fmt: skip
"""Operators that do not give zero for zero: a row of zero weights does not stay zero behind them."""
_SHIFTS = {
    getattr(p, n)
    for p in (aten.add, aten.add_, aten.sub, aten.sub_)
    for n in p.overloads()
    if n in ("Tensor", "Scalar")
}
_NAME = "_dmscale_value"
_NO_PARAMS: frozenset[str] = frozenset()
_PLAIN = frozenset({int, float, bool, str, type(None)})
"""Types that are no tensors: to ask that of a value takes longer than all else that is done with it."""


class _Kind(NamedTuple):
    """What is known of an operator before it runs, looked up once."""

    name: str
    pointwise: bool
    same_elements: bool
    view: bool
    repeats: bool
    picks: bool
    adds: bool
    times: bool
    leaves_zero: bool
    shifts: bool  # where its second argument is a number
    by_values: bool  # how long its result is
    mutable: bool
    fills: tuple[str, ...]  # names of the arguments that it puts its results into (`out=`)
    squares: bool  # where its exponent is two
    multiplies: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    return _Kind(
        func._overloadpacket.__name__,
        func in POINTWISE or torch.Tag.pointwise in func.tags,
        func in _SAME_ELEMENTS,
        func in _VIEWS or torch.Tag.inplace_view in func.tags,
        func in _REPEATING,
        func in PICKS,
        func in (aten.add.Tensor, aten.add_.Tensor),
        func in _TIMES,
        func in _LEAVES_ZERO,
        func in _SHIFTS,
        torch.Tag.dynamic_output_shape in func.tags,
        func._schema.is_mutable,
        tuple([a.name for a in func._schema.arguments if a.is_out]),
        func is aten.pow.Tensor_Scalar,
        func is aten.mul.Tensor,
    )


class Tracer(TorchDispatchMode):
    """Runs operators and infers the axes of their results.

    On meta tensors, `meta=True`, real constants that meet a meta tensor are replaced by meta ones for the call.  `lists` tells
    of the modules that hold lists how many modules are in each.
    """

    kernel = staticmethod(kernels.run)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would put a function around each operator to say so; nothing is compiled during a trace

    def __init__(self, meta: bool = False, lists: Mapping[str, Collection[int]] | None = None):
        super().__init__()
        self.record = Record()
        self.meta = meta
        self.lists = lists or {}  # path of a module -> how many modules each list has that it is or holds
        self.op = 0
        self.path = ""  # of the innermost module that runs
        self.counting = Counting()
        # name of a parameter or buffer, the dict of its module that holds it, its key there, the tensor
        self.held: list[tuple[str, Mapping[str, Any], str, Tensor]] = []
        self.making_sized = False  # a factory is being called with sizes that `arrivals` will equate
        self._adopted: dict[int, tuple[Tensor, Value]] = {}
        self._names: dict[str, Value] = {}
        self._equated: set[Any] = set()
        self._contracting = False
        self._shifting = False
        self._named: dict[int, str] = {}  # origin of a parameter or buffer -> its name
        self._parts: dict[int, int] = {}  # origin of a view of some of its elements -> its origin
        self._square: int | None = None
        self._operator = ""
        self._origins = 0
        self._said: dict[int, Said] = {}  # by the result of the operator of the moment
        self._listening: contextlib.AbstractContextManager | None = None

    # -- tensors ------------------------------------------------------------------------------------------------------

    def watch(self, tensor: Tensor, name: str | None = None, frozen: str = "", data: bool = False) -> Tensor:
        """Give `tensor` axes of its own; `name` makes it a parameter, `frozen` fixes its axes for that reason."""
        if frozen:
            dims = tuple([axes.axis(n, frozen) for n in tensor.shape])
        else:
            dims = tuple([(Axis(n),) if n > 1 else axes.axis(n) for n in tensor.shape])
        origin = self._origins = self._origins + 1
        value = Value(dims, frozenset((name,)) if name else _NO_PARAMS, data, origin, dtype=tensor.dtype)
        setattr(tensor, _NAME, value)
        if name:
            self._names[name] = value
            self._named[origin] = name
        return tensor

    def value(self, tensor: Tensor) -> Value:
        """What is known of `tensor`; one never seen is a constant, and its axes are frozen."""
        value = tensor.__dict__.get(_NAME)
        if value is not None:
            return value
        if found := self._adopted.get(id(tensor)):
            value = found[1]
        if value is None:
            dims = tuple(axes.axis(n, "a constant") for n in tensor.shape)
            value = Value(dims, origin=self._new_origin(), dtype=tensor.dtype)
            self._adopted[id(tensor)] = (tensor, value)
        return value

    def dims(self, tensor: Tensor) -> tuple[Dim, ...]:
        """The dimensions of `tensor`."""
        return (tensor.__dict__.get(_NAME) or self.value(tensor)).dims

    def _store(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) in self._adopted:
            self._adopted[id(tensor)] = (tensor, value)
        else:
            setattr(tensor, _NAME, value)

    def _new_origin(self) -> int:
        self._origins += 1
        return self._origins

    # -- what rules call ----------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """The operator and module of the moment, for reasons."""
        return f"{self.path or 'the model'} ({self._operator})"

    def freeze(self, dim: Dim, reason: str) -> None:
        """Fix `dim`, for `reason`, here."""
        if axes.is_free(dim):
            axes.freeze(dim, f"{reason} in {self.where}")

    def freeze_dims(self, dims: Sequence[Dim], reason: str) -> None:
        """Fix several dimensions."""
        for dim in dims:
            if dim and axes.is_free(dim):
                self.freeze(dim, reason)

    def fresh(self, tensor: Tensor, reason: str) -> list[Dim]:
        """New frozen axes for a result."""
        return [axes.axis(n, reason) for n in tensor.shape]

    def spatial(self, out: Tensor, x: Tensor, lead: int, summed: Collection[int] = ()) -> list[Dim]:
        """Dimensions from `lead` on: the input's where the size stays (the spatial axes are fixed anyway), else new.

        Of those that are `summed` over one is left, and they are not fixed.
        """
        dims = self.dims(x)[lead:]
        self.freeze_dims([dim for i, dim in enumerate(dims) if i not in summed], "spatial")
        before, now = x.shape, out.shape
        return [dims[i - lead] if now[i] == before[i] else axes.axis(now[i], "spatial") for i in range(lead, len(now))]

    def broadcast(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> tuple[Dim, ...]:
        """Unify tensors as pointwise operators do; stretched dimensions of size one have no say."""
        out: list[Dim] = [()] * len(shape)
        for t in tensors:
            own = t.shape
            i = len(shape) - len(own)
            for n, dim in zip(own, self.dims(t)):
                if n != 1:
                    if not out[i]:
                        out[i] = dim
                    elif out[i] is not dim:
                        axes.unify(out[i], dim)
                        if self._meet_again(tensors):  # w + w.T: along neither its rows nor its columns alone
                            out[i] = (*dim,)
                i += 1
        return tuple(out)

    def _meet_again(self, tensors: Sequence[Tensor]) -> bool:
        """Whether two tensors were made of one parameter, and of no activation."""
        values = [self.value(t) for t in tensors]
        named = [name for v in values for name in v.params]
        return len(set(named)) < len(named) and not any([v.data for v in values])

    def count_macs(self, dims: Sequence[Dim]) -> None:
        """Note a contraction of that many MACs."""
        self._contracting = True
        self.record.terms.append(Term(self.op, self.path, self._operator, tuple(dims)))

    def fuse(self, start: int, function: Any, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
        """Note that the operators since number `start` are one call of `function` where the model is deployed."""
        instances = self.record.instances
        while instances and instances[-1].start >= start:
            instances.pop()
        instances.append(Instance(start, self.op, self.path, function.__name__, function, args, kwargs, self.dims(out)))

    def repeat(self, start: int, times: int) -> None:
        """Note that the operators since number `start` run `times` more: all that is counted, not what was unified."""
        record, length = self.record, self.op - start
        terms, written = (record.within(noted, start, self.op) for noted in (record.terms, record.activations))
        instances = [i for i in record.instances[-len(terms) :] if i.start >= start] if terms else []
        for shift in range(length, (times + 1) * length, length):
            record.terms += [Term(t.op + shift, t.path, t.operator, t.dims) for t in terms]
            record.activations += [Activation(op + shift, *rest) for op, *rest in written]
            record.instances += [
                Instance(i.start + shift, i.end + shift, i.path, i.operator, i.function, i.args, i.kwargs, i.dims)
                for i in instances
            ]
        self.op += times * length

    def contracted(self, dim: Dim, operands: Sequence[tuple[Value, Dim]]) -> None:
        """Note that `dim` was summed over; each operand comes with its own dimension that was."""
        self.record.contractions.append(Contraction(self.op, self.path, self._operator, dim, tuple(operands)))

    def produced(self, dim: Dim) -> None:
        """Note that the operator of the moment makes the axes of `dim` from a weight."""
        self.record.produced.append((self.op, self.path, dim))

    def batched(self, dim: Dim) -> None:
        """Note that two activations were multiplied for each element of `dim`: attention heads."""
        self.record.batched.append(dim)

    def normalised(
        self, kind: str, dims: Sequence[Dim], x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
        group: Dim = (),
    ) -> None:  # fmt: skip
        """Note that the result depends on how many elements `dims` have."""
        w, b = (next(iter(self.value(p).params), None) if p is not None else None for p in (weight, bias))
        if weight is not None and w is not None and self._names[w] is not self.value(weight):
            w = None  # made from a parameter (1 + w): scaling the parameter would not scale the result
        self.record.normalisations.append(
            Normalisation(self.op, self.path, self._operator, kind, tuple(dims), self.value(x), w, b, group)
        )

    def has_list_of(self, size: int) -> bool:
        """Whether the module of the moment is or holds a list of so many modules."""
        return size in self.lists.get(self.path, ())

    def one_by_one(self, dim: Dim, indices: Iterable[int], reason: str, made: Sequence[Tensor] = ()) -> None:
        """Note that elements of `dim` are taken by number, as modules of a list may be (`experts.py`); without one it is fixed.

        Args:
            reason: why it is fixed where no module goes with each element; "" where the gates see to that.
            made: the elements, where they are put together.
        """
        if not self.has_list_of(axes.size(dim)):
            if reason:
                self.freeze(dim, reason)
        elif axes.is_free(dim):
            params = [self.value(t).params for t in made]
            self.record.positions += [
                Position(
                    dim, self.path, i, reason and f"{reason} in {self.where}", params[i] if params else frozenset()
                )
                for i in indices
            ]

    def multiple_of(self, dim: Dim, step: int) -> None:
        """Note that a kernel takes `dim` only where its size is a multiple of `step`."""
        if step > 1 and axes.is_free(dim):
            self.record.multiples.append((dim, step))

    def at_least(self, dim: Dim, size: int) -> None:
        """Note that so many elements of `dim` are chosen: there must be as many."""
        if axes.is_free(dim):
            self.record.least.append((dim, size))

    def not_alone(self, dim: Dim) -> None:
        """Note that what happens to a `dim` of one element is not what happens to more of them: two stay."""
        if axes.is_free(dim):
            self.record.not_alone.append(dim)

    def writes(self, *tensors: Tensor | None) -> None:
        """Note that the model writes to these tensors, in training at least: nothing can stand for what is written to."""
        for t in tensors:
            if t is not None:
                origin = self.value(t).origin
                self.record.modified.setdefault(self._parts.get(origin, origin), []).append(self.op)
                if (name := self._named.get(self._parts.get(origin, origin))) is not None:
                    self.record.written.add(name)

    def note_replaced(self) -> None:
        """Note as written what modules do not hold any more, having put another tensor in its place, and what `out=` filled."""
        names = self._names
        self.record.written.update([
            name for name, held, key, t in self.held
            if held.get(key) is not t or t.__dict__.get(_NAME) is not names[name]
        ])  # fmt: skip

    def has_magnitude(self, v: Tensor, g: Tensor) -> None:
        """Note that `v` is divided by its norm and multiplied with `g`: zeros go into `g` rather, as 0 / 0 is none."""
        names = [next(iter(self.value(t).params), None) for t in (v, g)]
        if None not in names:
            self.record.magnitudes.update([names])  # type: ignore[list-item]

    def shifts(self) -> None:
        """Note that the operator of the moment does not give zero for zero."""
        self._shifting = True

    def looked_up(self, dim: Dim, x: Tensor) -> None:
        """Note that elements of `dim`, of `x`, are found by numbers that were chosen."""
        self.record.lookups.append(Lookup(self.op, self.path, dim, self.value(x)))

    def says(self, out: Tensor, said: Said) -> None:
        """Note what a result of the operator of the moment says about numbers of elements."""
        self._said[id(out)] = said

    def is_square(self, x: Tensor) -> bool:
        """Whether `x` is the elementwise square of another tensor."""
        return self.value(x).square is not None

    def equate(self, value: int, dim: Dim) -> None:
        """Note that a Python size equals the size of `dim`; literals for fixed axes say nothing new."""
        if not isinstance(value, SizedInt):
            if axes.is_free(dim) and self.has_list_of(value):  # which may have been asked for its length
                reason = f"its size is fixed in {self.where}"
                self.record.positions.append(Position(dim, self.path, None, reason))
            elif axes.is_free(dim):
                self.record.equations.append(Equation(int(value), dim, self.where))
            return
        expression = value.expression
        if isinstance(expression, Extent) and axes.same(expression.dim, dim):
            return  # most of what arrives: a batch or a width of `x.shape` where it came from
        known = (expression, tuple(axes.factors(dim)))
        if known not in self._equated:
            self._equated.add(known)
            self.record.equations.append(Equation(expression, dim, self.where))

    # -- running ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Tracer:
        self._listening = listening(self._found_equal, self._escaped, self._taken, self._decided, self.release)
        self._listening.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        assert self._listening is not None
        self._listening.__exit__(*exc)

    def _found_equal(self, a: SizedInt, b: SizedInt) -> None:
        zero: Expression = Operation("-", a.expression, b.expression)
        self.record.equations.append(Equation(zero, _constant(0), f"a comparison in {self.path or 'the model'}"))

    def _escaped(self, value: SizedInt, how: str) -> Equation:
        fixed = Equation(value.expression, _constant(int(value)), f"{self.path or 'the model'} ({how})")
        self.record.equations.append(fixed)
        return fixed

    def release(self, fixed: Equation) -> None:
        """Take back that the size of an equation is fixed: a gate follows it, or a trial shows what it decides."""
        self.record.equations[:] = [e for e in self.record.equations if e is not fixed]

    def _decided(self, decision: Decision) -> None:
        self.record.decisions[decision] = None

    def _taken(self, attribute: Attribute, index: int) -> None:
        self.record.taken.append((self.op, attribute, index))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, [])
        if kwargs:
            _tensors(kwargs.values(), tensors)
        real: dict[int, Tensor] = {}
        if self.meta:
            if not tensors and _makes_integers(func, args, kwargs):
                kwargs = {**kwargs, "device": "cpu"}  # integers keep their elements, see `clone.on_meta`
            on_meta = [t.is_meta for t in tensors]
            if True in on_meta and False in on_meta:
                args, kwargs = self._to_meta(args, real), self._to_meta(kwargs, real)
                tensors = _tensors((args, tuple(kwargs.values())), [])
        out = self.kernel(func, args, kwargs) if self.meta and tensors else func(*args, **kwargs)
        if isinstance(out, Tensor):
            outs = [out]
        else:
            outs = [o for o in out if isinstance(o, Tensor)] if isinstance(out, (tuple, list)) else []
        self.op += 1
        if not outs:
            takes = tuple(self.value(t).origin for t in tensors)
            self._operator = func._overloadpacket.__name__
            said = [self.value(t) for t in tensors]
            if len(said) == 1 and said[0].said.numbers is not None and type(out) is int:
                self.one_by_one(said[0].said.numbers, [out], READ)
            else:
                freeze_numbers(self, said)
            self.record.steps[self.op] = Step(func._overloadpacket.__name__, takes, (), True)  # Python reads the values
            return out
        self._infer(func, args, kwargs, tensors, out, outs)
        if real and isinstance(out, Tensor) and id(out) in real:  # an in-place operator on a real constant
            self._store(real[id(out)], self.value(out))
            return real[id(out)]
        return out

    def apply(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What the ATen overload `func` gives on meta tensors, inferred; None where its kernel alone can tell (`direct.py`)."""
        tensors = _tensors(args, [])
        out = kernels.told(func, args) if all([t.is_meta for t in tensors]) else None
        if out is not None:
            self.op += 1
            self._infer(func, args, {}, tensors, out, [out] if isinstance(out, Tensor) else list(out))
        return out

    def _to_meta(self, tree: Any, real: dict[int, Tensor]) -> Any:
        if isinstance(tree, Tensor):
            if tree.is_meta:
                return tree
            twin = torch.empty_strided(tree.shape, _strides(tree), dtype=tree.dtype, device="meta")
            setattr(twin, _NAME, self.value(tree))
            real[id(twin)] = tree
            return twin
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._to_meta(x, real) for x in tree)
        if isinstance(tree, dict):
            return {k: self._to_meta(v, real) for k, v in tree.items()}
        return tree

    def _infer(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], out: Any, outs: list[Tensor]) -> None:
        record, kind = self.record, _kind(func)
        self._operator = kind.name
        record.operators[kind.name] = record.operators.get(kind.name, 0) + 1
        if not tensors:
            reason = [] if self.making_sized else [f"made by {kind.name}"]
            for o in outs:
                dims = tuple(axes.axis(n, *reason) for n in o.shape)
                self._store(o, Value(dims, origin=self._new_origin(), dtype=o.dtype))
            return
        values = [t.__dict__.get(_NAME) or self.value(t) for t in tensors]
        data, silent, multiplied = 0, True, False
        for v in values:
            if len(v.params) == 1:  # a parameter, or made of one; of what is made of several each was read before
                for name in v.params:
                    record.read.setdefault(name, self.op)
            if v.data:
                data += 1
            if v.said is not NOTHING:
                silent = False
            if v.product is not None:
                multiplied = True
        self._contracting = self._shifting = False
        filled = [kwargs[name] for name in kind.fills if kwargs.get(name) is not None]
        if filled:
            self.writes(*filled)
            kwargs = {k: v for k, v in kwargs.items() if k not in kind.fills}
        elif kind.mutable:
            self.writes(tensors[0])
        if self._said:
            self._said.clear()
        found = self._apply_rule(func, kind, args, kwargs, tensors, out, outs)
        if filled:
            self._fill(filled, found)
        contracting = self._contracting
        if kind.by_values:
            known = [dim for v in values for dim in (*v.dims, v.said.numbers or ())]  # counts are of what is counted
            before = {a for dim in known for a in axes.atoms(dim)}
            new = {a for dims in found for dim in dims for a in axes.atoms(dim)} - before
            record.by_values.update(dict.fromkeys(new, self.path))
        first, zeroed = values[0], True
        params = _NO_PARAMS
        for v in values[:1] if kind.picks else values:  # numbers say where elements come from, not what they are
            if contracting and v.data:
                continue
            if not v.zeroed:
                zeroed = False
            if v.params and v.params is not params:
                params = params | v.params if params else v.params
        origin = first.origin if kind.same_elements else None
        square = None
        if (kind.squares and args[1] == 2) or (
            kind.multiplies and len(tensors) == 2 and first.origin == values[1].origin
        ):
            square = first.origin
        elif origin is not None:
            square = first.square
        adds = kind.adds and len(values) == 2
        if adds:
            record.biases += [(self.op, n) for v in values if not v.data for n in v.params if len(v.params) == 1]
        if kind.leaves_zero or self._shifting or (kind.shifts and type(args[1]) in (int, float) and args[1]):
            zeroed = False
        if contracting and data == len(values):
            zeroed = False  # of two activations: nothing that is added to their product makes it zero
        if kind.times:
            zeroed = any(v.zeroed for v in values if v.params)
        repeated = _repetitions(func, tensors[0], outs[0], found[0]) if kind.repeats else ()
        if first.repeated and (kind.view or len(tensors) == 1):
            repeated = (*first.repeated, *repeated)
        product = None
        if data > 1 if contracting else multiplied:
            product = self._attend(func, kind, args, tensors, values)
        said = None
        if self._said or not silent:
            said = heard(self, func, args, kwargs, values, [self._said.get(id(o)) for o in outs])
        given = []
        for i, (o, own_dims) in enumerate(zip(outs, found)):  # of the results that matter
            dims, numbers, own = tuple(own_dims), NOTHING if said is None else said[i], origin
            if own is None:
                own = self._origins = self._origins + 1
            made = Value(dims, params, data > 0, own, square, repeated, product, zeroed, numbers, o.dtype)
            if self._adopted:
                self._store(o, made)
            else:
                setattr(o, _NAME, made)
            given.append(own)
            if kind.view and not data and own != first.origin:
                self._parts[own] = self._parts.get(first.origin, first.origin)
            if adds:
                record.additions.append(Addition(self.op, (first, values[1]), made))
            if data and not kind.view:
                record.activations.append(Activation(self.op, o.element_size(), dims, self.path))
        if contracting:
            own, named = operands_of(self, args), operands_of(self, kwargs) if kwargs else {}
            record.instances.append(
                Instance(self.op - 1, self.op, self.path, kind.name, func, own, named, tuple(found[0]))
            )
        record.steps[self.op] = Step(kind.name, tuple([v.origin for v in values]), tuple(given), kind.mutable)

    def _attend(self, func: Any, kind: _Kind, args: Any, tensors: list[Tensor], values: list[Value]) -> Product | None:
        """Follow products of activations: with a softmax and a second product behind it, one was attention.

        Returns what the result is to be known as: a product of its own, or computed from the one that came in.
        """
        if not self._contracting:
            if func in _SOFTMAX and values[0].product is not None:
                dim = args[1]
                return Product(values[0].product.operands, values[0].dims[dim])
            if kind.view or kind.pointwise:
                return next((v.product for v in values if v.product is not None), None)
            return None
        last = self.record.contractions[-1] if self.record.contractions else None
        met = [v for v, _ in last.operands] if last is not None and last.op == self.op else []
        if len(met) != 2 or not all(v.data for v in met):
            return None
        bytes_of = {id(v): t.element_size() for t, v in zip(tensors, values)}
        elements = [(v, bytes_of.get(id(v), 4)) for v in met]
        for (weights, _), other in zip(elements, reversed(elements)):
            if weights.product is not None and weights.product.over is not None:
                for v, element in (_key_of(weights.product), other):
                    self.record.cached.append(Cached(self.op, self.path, element, v.dims, v.repeated))
                return None
        return Product(tuple(elements))

    def _apply_rule(
        self, func: Any, kind: _Kind, args: Any, kwargs: Any, tensors: list[Tensor], out: Any, outs: list[Tensor]
    ) -> list[Sequence[Dim]]:
        rule = RULES.get(func)
        try:
            if rule is not None:
                result = rule(self, out, *args, **kwargs)
                found = [result] if isinstance(out, Tensor) else list(result)
            elif kind.pointwise:
                if len(tensors) == len(outs) == 1 and tensors[0].shape == outs[0].shape:
                    return [self.dims(tensors[0])]
                found = [self.broadcast(tensors, o.shape) for o in outs]
            else:
                self._no_rule(tensors)
                return [self.fresh(o, f"no rule for {self._operator}") for o in outs]
            for o, dims in zip(outs, found):
                if tuple([axes.size(d) for d in dims]) != o.shape:
                    raise Conflict(f"the rule gave {[axes.size(d) for d in dims]} for {list(o.shape)}")
            return found
        except (Conflict, RecursionError) as error:
            self.record.conflicts.append(f"{self.where}: {error}")
            for t in tensors:
                self.freeze_dims(self.dims(t), f"conflict ({error})")
            freeze_numbers(self, [self.value(t) for t in tensors])
            if rule is not None and not self._contracting:
                self._count_apart(rule, args, kwargs, tensors, out)
            return [self.fresh(o, f"conflict in {self.where}") for o in outs]

    def _count_apart(self, rule: Rule, args: Any, kwargs: Any, tensors: list[Tensor], out: Any) -> None:
        """Count the MACs of what conflicts, on fixed axes that have met nothing."""
        own = [(t, self.value(t)) for t in tensors]
        for t, value in own:
            self._store(t, dataclasses.replace(value, dims=tuple(self.fresh(t, "a conflict"))))
        try:
            rule(self, out, *args, **kwargs)
        except (Conflict, RecursionError):
            pass  # it conflicts in itself: no contraction does
        finally:
            for t, value in own:
                self._store(t, value)

    def _fill(self, tensors: Sequence[Tensor], found: Sequence[Sequence[Dim]]) -> None:
        """The results were put into `tensors`, whose axes are those of the results."""
        for t, dims in zip(tensors, found):
            own = self.dims(t)
            if [axes.size(d) for d in own] != [axes.size(d) for d in dims]:
                continue  # it was made longer
            try:
                for a, b in zip(own, dims):
                    axes.unify(a, b)
            except Conflict as error:
                self.freeze_dims([*own, *dims], f"conflict ({error})")

    def _no_rule(self, tensors: list[Tensor]) -> None:
        self.record.unknown.setdefault(self._operator, {})[self.path] = None
        for t in tensors:
            self.freeze_dims(self.dims(t), "no rule for the operator")
        freeze_numbers(self, [self.value(t) for t in tensors])


def operands_of(tracer: Tracer, tree: Any) -> Any:
    """`tree`, the arguments of a call, with every tensor replaced by an `Operand`."""
    if isinstance(tree, Tensor):
        return Operand(tracer.dims(tree), tree.dtype, _strides(tree))
    if isinstance(tree, (tuple, list)):
        out: list[Any] = []
        for x in tree:
            kind = type(x)
            if kind is Tensor or kind is torch.nn.Parameter:
                x = Operand(tracer.dims(x), x.dtype, _strides(x))
            elif kind not in _PLAIN and not (kind is list and x and type(x[0]) is type(x[-1]) is int):
                x = operands_of(tracer, x)
            out.append(x)
        return type(tree)(out)
    if isinstance(tree, dict):
        return {k: operands_of(tracer, x) for k, x in tree.items()}
    return int(tree) if isinstance(tree, SizedInt) else tree


def _strides(t: Tensor) -> tuple[int, ...]:
    """Those of `t`; of one in a compressed sparse layout, which has none, those that its dense form has."""
    try:
        return t.stride()
    except RuntimeError:
        return torch.empty(t.shape, device="meta").stride()


def _repetitions(func: Any, x: Tensor, out: Tensor, dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """The axes that `expand` or `repeat` has put in: one along each dimension that it made longer."""
    lead = out.dim() - x.dim()
    longer = [dim for i, dim in enumerate(dims) if i < lead or x.shape[i - lead] != out.shape[i]]
    return tuple(dim[:1] for dim in longer)  # of `repeat`, (count, dimension), the count


def _key_of(product: Product) -> tuple[Value, int]:
    """Of both operands of a first product of attention the one that has the dimension under the softmax: the keys."""
    assert product.over is not None
    over = product.over
    has = [any(axes.same(over, dim) for dim in v.dims) for v, _ in product.operands]
    return product.operands[0] if has[0] and not has[1] else product.operands[1]


def _makes_integers(func: Any, args: Any, kwargs: Any) -> bool:
    dtype = kwargs.get("dtype")
    if str(kwargs.get("device")) != "meta":
        return False
    if dtype is None:
        return func._overloadpacket is aten.arange and all(isinstance(a, int) for a in args)
    return not (dtype.is_floating_point or dtype.is_complex)


def _constant(n: int) -> Dim:
    return (Axis(n, ["a constant"]),)


def _tensors(tree: Any, out: list[Tensor]) -> list[Tensor]:
    for x in tree:
        kind = type(x)
        if kind in _PLAIN:
            continue
        if kind is Tensor or kind is torch.nn.Parameter:
            out.append(x)
        elif isinstance(x, (tuple, list)):
            if not (kind is list and x and type(x[0]) is type(x[-1]) is int):  # strides or the like: its ends tell
                _tensors(x, out)
        elif isinstance(x, Tensor):
            out.append(x)
    return out


def is_watched(tensor: Tensor) -> bool:
    """Whether a tracer has seen `tensor`."""
    return _NAME in tensor.__dict__


def shape_of(tracer: Tracer, tensor: Tensor) -> torch.Size:
    """The shape of `tensor`, in ints that remember their axes where these may still change."""
    shape = tensor.size()
    dims = tracer.dims(tensor)
    return torch.Size(
        SizedInt(n, Extent(dim)) if n > 1 and axes.is_free(dim) else n for n, dim in zip(shape, dims)
    )  # fmt: skip
