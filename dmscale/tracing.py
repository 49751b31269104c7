"""Bring a model to the tracer: run it once, and know the axes of every parameter.

The model runs on a copy of its module tree whose parameters live on the meta device, so a trace costs no arithmetic and
no memory.  Where a forward looks at values (`if x.max() > 1`), it runs once more on the real tensors.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from . import attachment, axes, calls, decisions, direct, experts, routing, running
from .arrivals import Arrivals, measure, transparent_functional
from .axes import Axis, Dim
from .carried import constructors
from .clone import alias, clone, on_meta
from .errors import TraceError
from .known import described, is_by_product, is_result, quiet
from .modes import BothModes
from .plainly import plainly
from .sizes import Attribute, Extent, SizedInt, is_copy_of_items, is_dict_of_settings, listed, with_entries
from .tracer import Call, Contraction, Normalisation, Record, Tracer, is_watched
from .tree import once, walk

_GEOMETRY = {
    "stride",
    "padding",
    "dilation",
    "kernel_size",
    "output_padding",
    "output_size",
}  # never the size of an axis
_UNSIZED = _GEOMETRY | vars(nn.Module()).keys()  # nor what every module holds
_NO_SIZES = {bool, float, str, type(None), types.FunctionType, type, set, collections.OrderedDict}


@dataclass
class Trace:
    """The axes of a model, and what else one run told.

    slots: parameter and buffer name -> its dimensions; tied ones appear once, under their first name.
    aliases: every other name of a tied tensor -> its first name.
    constants: name of a tensor that a module holds as a plain attribute -> its dimensions; it is sliced as buffers are.
    record: contractions, normalisations, size equations, module calls.
    on: "meta" or "values", how the model was run.
    cached: whether it made its key-value cache.
    unread: parameters that no operator took, in evaluation or in training mode.
    indexing: the atoms of all slots.
    experts: the axes of which each element has a module of its own.
    """

    slots: dict[str, tuple[Dim, ...]]
    aliases: dict[str, str]
    constants: dict[str, tuple[Dim, ...]]
    record: Record
    on: str
    cached: bool = False
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    atoms: axes.Atoms = field(default_factory=axes.Atoms, repr=False)  # nothing is unified any more
    indexing: set[Axis] = field(default_factory=set, repr=False)
    experts: dict[Axis, experts.Experts] = field(default_factory=dict, repr=False)


def read(model: nn.Module, example_inputs: Any, cached: bool = False) -> Trace:
    """Trace `model` on `example_inputs`; the model is left as it was.

    Args:
        model: any module.
        example_inputs: what it is called with.
        cached: whether it may make the key-value cache that it makes by default.
    Raises:
        TraceError: `model` is no module, its forward fails on the example, inputs and parameters are on different
            devices, or the parameters are sharded over several processes.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TraceError(f"model is {what}; give an instance of torch.nn.Module")
    modules = walk(model)
    _check_model(model, modules)
    args, kwargs = running.arguments(example_inputs)
    _check_inputs(modules, args, kwargs)
    failure: Exception | None = None
    with _heap_aside() as aside:
        for kind in ("meta", "values"):
            try:
                with uncollected(), _without_onednn(), plainly([module for _, module in modules]):
                    return _read(model, modules, args, kwargs, kind, cached)
            except TraceError:
                raise
            except Exception as error:
                failure = error
            if kind == "meta":
                traceback.clear_frames(failure.__traceback__)  # which hold all that has run
                empty_caches(aside)
                if running.is_empty(model):
                    break
    assert failure is not None
    raise failed_forward(model, failure) from failure


@contextlib.contextmanager
def _heap_aside() -> Iterator[bool]:
    """Inside, a garbage collection looks at what is made there alone, and takes no time; gives whether it is so.

    Not where the user has set objects aside, for processes to share: these must stay so.
    """
    aside = not gc.get_freeze_count()
    if aside:
        gc.freeze()
    try:
        yield aside
    finally:
        if aside:
            gc.unfreeze()


def empty_caches(aside: bool = False) -> bool:
    """Take the tensors that a meta run has left in caches out of these again; whether there were any.

    A forward may keep tables in a dict of its file, by their length: the next one would find a table without elements.

    Args:
        aside: whether all but what that run has made is set aside.
    """
    gc.collect()
    left: list[Any] = [t for t in gc.get_objects() if type(t) is Tensor and is_watched(t) and t.is_meta]
    if left and aside:
        gc.unfreeze()  # a cache may be older
    found = False
    for _ in range(2):  # several tables may be together under one key
        if not left:
            break
        holders = [h for h in gc.get_referrers(*left) if h is not left]
        among = {id(value) for value in left}
        found |= any([_drop(h, among) for h in holders])
        left = [h for h in holders if type(h) in (tuple, list)]
    return found


def _drop(holder: Any, among: set[int]) -> bool:
    """Remove objects, by their ids, from a dict, or all from a function that remembers its results; whether it held any."""
    if callable(getattr(holder, "cache_clear", None)):
        holder.cache_clear()
        return True
    plain = type(holder) in (dict, collections.OrderedDict, collections.defaultdict)
    keys = [k for k, v in holder.items() if id(v) in among] if plain else []
    for key in keys:
        del holder[key]
    return bool(keys)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: a trace makes many small objects to keep, and every pass over them frees next to none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Without the kernels of oneDNN, one of which runs a recurrent layer whole; the public switch warns of other things."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def failed_forward(model: nn.Module, failure: Exception) -> TraceError:
    """The error that says that `model` does not run on the example inputs."""
    where = getattr(failure, "_dmscale_path", "")
    empty = running.is_empty(model)
    return TraceError(
        f"{type(model).__name__}.forward failed on example_inputs"
        + (f" in module '{where}'" if where else "")
        + f" ({type(failure).__name__}: {failure}). Check that model(*example_inputs) runs"
        + (", and on a device with elements: on 'meta' a forward has no values to look at." if empty else ".")
    )


def _check_model(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse what can be traced in another form only, with that form."""
    bare = True
    for path, module in modules:
        cls: Any = type(module)
        if wrapped := _refused(cls):
            where = f"module '{path}'" if path else "the model"
            raise TraceError(f"{where} {wrapped.format(kind=cls.__name__, inside=path or 'model')}")
        for name, p in module._parameters.items():
            if p is None:
                continue
            bare = False
            if type(p) is nn.Parameter and not p.is_inference():
                continue
            where, kind = f"module '{path}'" if path else "the model", cls.__name__
            if torch.nn.parameter.is_lazy(p):
                raise TraceError(
                    f"{where} ({kind}) is lazy and its {name} has no shape yet; call model(*example_inputs) once before"
                )
            if p.is_inference():
                raise TraceError(
                    f"{name} of {where} was made under torch.inference_mode and can neither be trained nor masked; build or "
                    "load the model outside of it"
                )
            attachment.refuse_sharded(model, TraceError)
    packed = [path for path, module in modules if hasattr(module, "_packed_params")] if bare else []
    if packed:
        raise TraceError(
            f"the weights of {type(model).__name__} are packed by quantisation (module '{packed[0]}'); trace the float model "
            "and quantise the smaller one"
        )


@functools.cache
def _refused(cls: Any) -> str | None:
    """What a module of such a class is, and the remedy, where none can be traced."""
    parallel = issubclass(cls, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if parallel or cls.__name__ == "FullyShardedDataParallel":
        return "is a {kind}; trace the module inside it ({inside}.module) and wrap search.model"
    if issubclass(cls, torch.jit.ScriptModule):
        return "is a TorchScript module, which cannot be resized; use the Python module it was made of"
    return None


def _check_inputs(modules: Sequence[tuple[str, nn.Module]], args: tuple, kwargs: dict) -> None:
    tensors = running.tensors_in((args, kwargs))
    if not any(t.numel() for t in tensors):
        raise TraceError(
            f"example_inputs hold no element (shape {tuple(tensors[0].shape)}); give at least one example, so that an export "
            "can be compared"
        )
    given = {t.device for t in tensors}
    held = (
        t for _, module in modules for h in (module._parameters, module._buffers) for t in h.values() if t is not None
    )
    first = next(held, None)
    if first is None or {first.device} == given or first.is_meta:  # a trace without elements takes those that there are
        return
    own = {first.device, *(t.device for t in held)}
    if len(own) == 1 and given:
        raise TraceError(
            f"the model is on {next(iter(own))} and example_inputs on {', '.join(sorted(map(str, given)))}; "
            f"move the inputs with .to('{next(iter(own))}')"
        )


def _read(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], args: tuple, kwargs: dict, kind: str, cached: bool
) -> Trace:
    meta = kind == "meta"
    twin = clone(model, on_meta if meta else alias, modules, to_run=True)
    places = walk(twin, again=True)
    modules = once(places)
    if any([module.training for _, module in modules]):
        twin.eval()
    twin = twin if cached else quiet(twin, modules)
    tracer = Tracer(meta, experts.lists(modules))
    slots, aliases, parameters = _watch_parameters(tracer, places)
    constants = _watch_constants(tracer, modules)
    _tag_sizes(modules, {**slots, **{name: slots[first] for name, first in aliases.items()}})
    examples = None if meta else routing.Examples(twin)  # without values none is chosen by them
    with BothModes(tracer, [module for _, module in modules]) as training:
        _run(tracer, twin, modules, args, kwargs, examples)
    for a in tracer.record.deciding():
        axes.freeze((a,), "only a branch of the forward depends on it, which may return it")
    trace = Trace(slots, aliases, constants, tracer.record, kind, cached)
    touched = tracer.record.touched() | training.touched | {p.dim for p in tracer.record.positions}
    if examples is not None and parameters - tracer.record.read.keys():
        touched |= _read_others(tracer, twin, examples, trace)
    if parameters - tracer.record.read.keys() or training.differs:
        touched |= _read_training(tracer, twin, args, kwargs, trace)
    for name in slots:
        if name not in tracer.record.read:
            if name in parameters:
                trace.unread.append(name)
            for dim in slots[name]:
                axes.freeze(dim, "the forward never reads it")
    trace.experts = experts.find(twin, tracer.record)
    tracer.record.equations += decisions.followed(tracer.record.decisions, tracer.record.equations)
    atoms = trace.atoms
    trace.indexing = {a for dims in slots.values() for dim in dims for a in atoms[dim]}
    # of a table of positions, the rows beyond the example's length are in no result
    for a in trace.indexing.difference([a for dim in touched for a in atoms[dim]]):
        if not a.reasons:
            axes.freeze((a,), "the forward never reads it")
    return trace


def _read_training(tracer: Tracer, twin: nn.Module, args: tuple, kwargs: dict, trace: Trace) -> set[Dim]:
    """Some of a model (auxiliary heads, moving averages, noise) runs in training mode only; it must follow too, at no cost.

    Returns the dimensions of what was computed then.
    """
    record = tracer.record
    met, normalised, called = len(record.contractions), len(record.normalisations), len(record.functions)
    twin.train()
    with record.free_of_cost(functions=False) as touched:  # a gate may be at one that only training calls
        try:
            _run(tracer, twin, walk(twin), args, kwargs)
        except Exception as error:  # a batch of one under BatchNorm, say: what only training reads stays frozen
            trace.notes.append(f"not traced in training mode ({type(error).__name__}: {error})")
    # what evaluation has noted of a module is not noted again: the call that it ran in is no longer known
    record.contractions[met:] = _new(record.contractions, met, lambda c: [c.dim, *(own for _, own in c.operands)])
    further = {f.key for f in record.functions[called:]} - {f.key for f in record.functions[:called]}
    new = _new(record.normalisations, normalised, lambda n: [*n.dims, n.group])
    for n in record.normalisations[normalised:]:
        call = calls.at(record, n.op)
        if n not in new and call is not None and call.key in further:  # a gate goes with the number of a call
            new.append(n)
    record.normalisations[normalised:] = sorted(new, key=lambda n: n.op)
    return touched


def _read_others(tracer: Tracer, twin: nn.Module, examples: routing.Examples, trace: Trace) -> set[Dim]:
    """Experts that the example does not reach follow those that it does.  Returns the dimensions of what was computed."""
    with tracer.record.free_of_cost() as touched, _following(tracer, walk(twin)):
        try:
            routing.call_others(tracer, twin, examples)
        except Exception as error:  # what it takes depends on which one it is: it stays as it is
            trace.notes.append(f"not all alternatives were traced ({type(error).__name__}: {error})")
    return touched


_Noted = TypeVar("_Noted", Contraction, Normalisation)


def _new(noted: list[_Noted], old: int, dims_of: Callable[[_Noted], list[Dim]]) -> list[_Noted]:
    """Those of `noted` behind number `old` that are unlike all before it: another module, operator, weight or other axes."""
    known: dict[Any, list[list[Dim]]] = {}
    for n in noted[:old]:
        known.setdefault(_made_of(n), []).append(dims_of(n))
    return [
        n for n in noted[old:]
        if not any(
            len(dims) == len(other) and all(map(axes.same, dims, other))
            for dims in [dims_of(n)] for other in known.get(_made_of(n), ())
        )
    ]  # fmt: skip


def _made_of(n: Contraction | Normalisation) -> tuple[Any, ...]:
    """Where it ran, and what of: training may add noise to a weight."""
    if isinstance(n, Normalisation):
        return n.path, n.operator
    return n.path, n.operator, frozenset(name for v, _ in n.operands if not v.data for name in v.params)


@contextlib.contextmanager
def _following(
    tracer: Tracer, modules: Sequence[tuple[str, nn.Module]], examples: routing.Examples | None = None
) -> Iterator[None]:
    """Everything that must be on while `modules` run."""
    generators = [] if tracer.meta else [d for d in range(torch.cuda.device_count())]
    arrivals = Arrivals(tracer)
    with (
        torch.random.fork_rng(generators), torch.no_grad(), _following_calls(tracer, modules, arrivals, examples),
        transparent_functional(), constructors(), running.uncompiled(), _unvalidated(), tracer, arrivals,
    ):  # fmt: skip
        yield


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Distributions take their arguments as they are: whether each is in its domain is a question to values, of no effect."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _run(
    tracer: Tracer, twin: nn.Module, modules: Sequence[tuple[str, nn.Module]], args: tuple, kwargs: dict,
    examples: routing.Examples | None = None,
) -> None:  # fmt: skip
    def own(t: Tensor) -> Tensor:
        mine = on_meta(t) if tracer.meta else t.detach().clone()
        return tracer.watch(mine, frozen="an axis of the model's input", data=True)

    args, kwargs = running.map_tensors(own, args), running.map_tensors(own, kwargs)
    try:
        with _following(tracer, modules, examples):
            out = twin(*args, **kwargs)
    except Exception as error:
        error._dmscale_path = tracer.path  # type: ignore[attr-defined]
        raise
    finally:
        tracer.note_replaced()
    measure(tracer)
    given = running.tensors_in(out)
    if not given:
        raise TraceError(
            f"{type(twin).__name__}.forward returns a {type(out).__name__} in which no tensor is found; return tensors, or a "
            "tuple, list, dict or dataclass of them"
        )
    for numbers in [tracer.value(t).said.numbers for t in given]:
        if numbers is not None:
            axes.freeze(numbers, "the numbers of its elements are an output of the model")
    tracer.record.results.update([tracer.value(t).origin for t in given])
    fields = dict(out.items()) if isinstance(out, Mapping) else {"": out}
    beside = {id(t) for key, value in fields.items() if is_by_product(out, key) for t in running.tensors_in(value)}
    for key, value in fields.items():
        tensors = tuple(tracer.dims(t) for t in running.tensors_in(value))
        again = bool(tensors) and all(id(t) in beside for t in running.tensors_in(value)) and not is_result(key)
        if is_by_product(out, key) or again:
            tracer.record.by_products[key] = tensors
            continue
        for dims in tensors:
            for dim in dims:
                axes.freeze(dim, "an axis of the model's output")


def _watch_parameters(
    tracer: Tracer, places: Sequence[tuple[str, nn.Module]]
) -> tuple[dict[str, tuple[Dim, ...]], dict[str, str], set[str]]:
    """The dimensions of parameters and buffers, the other names of those that are tied, and which are parameters.

    `places` are all modules of a model, each wherever it stands.
    """
    slots: dict[str, tuple[Dim, ...]] = {}
    aliases: dict[str, str] = {}
    parameters: set[str] | None = None
    first: dict[int, str] = {}
    for kind in ("_parameters", "_buffers"):
        for path, module in places:
            own = getattr(module, kind)
            for key, t in own.items():
                if t is None:
                    continue
                name = f"{path}.{key}" if path else key
                known = first.setdefault(id(t), name)
                if known is not name:
                    aliases[name] = known
                    continue
                slots[name] = tracer.dims(tracer.watch(t, name))
                tracer.held.append((name, own, key, t))
        if parameters is None:
            parameters = set(slots)
    assert parameters is not None
    return slots, aliases, parameters


def _watch_constants(tracer: Tracer, modules: Sequence[tuple[str, nn.Module]]) -> dict[str, tuple[Dim, ...]]:
    """The dimensions of the floating-point tensors that modules hold as plain attributes, each under its first name."""
    found: dict[str, tuple[Dim, ...]] = {}
    for path, module in modules:
        for key, t in module.__dict__.items():
            if type(t) is Tensor and t.dim() and (t.is_floating_point() or t.is_complex()) and not is_watched(t):
                found[f"{path}.{key}" if path else key] = tracer.dims(tracer.watch(t))
                tracer.value(t).zeroed = False  # no weight makes it
    return found


def _tag_sizes(modules: list[tuple[str, nn.Module]], slots: Mapping[str, tuple[Dim, ...]]) -> None:
    """Make every int that a module holds remember which one it is.

    What PyTorch's layers say of their parameters (`embedding_dim`) is the size of these, as an export keeps it.
    """
    for path, module in modules:
        cls: Any = type(module)
        held, said, private = module.__dict__, described(cls), []
        for key in held.keys() - _UNSIZED:
            value = held[key]
            kind = type(value)
            if kind in _NO_SIZES:
                continue
            if is_dict_of_settings(value):
                held[key] = with_entries(value, _tagged_entries(value, path, key))
                continue
            if key[:1] == "_" and (kind is not int or cls.__module__.startswith("torch.")):
                if kind is tuple:
                    private.append(key)
                continue
            if kind is int:
                if value > 1:
                    dim = _described(path, said[key], slots) if key in said else ()
                    expression = Extent(dim) if axes.size(dim) == value else Attribute(path, (key,), value)
                    held[key] = SizedInt(value, expression)
            elif kind in (tuple, list) and value and all([type(v) is int for v in value]):
                tagged = [SizedInt(v, Attribute(path, (key, i), v)) if v > 1 else v for i, v in enumerate(value)]
                held[key] = kind(tagged)
            elif isinstance(value, (dict, tuple)) and (numbers := _numbers(value)):
                sized = {k: SizedInt(v, Attribute(path, (key, k), v)) for k, v in numbers.items()}
                held[key] = with_entries(value, sized)
            elif kind is list and value and all(isinstance(v, (str, bool)) for v in value):
                held[key] = listed(value, Attribute(path, (key,)))
            elif is_settings(value):
                held[key] = _tagged_settings(value, path, key)
        for key in [key for key in private if is_copy_of_items(held, key)]:
            held[key] = tuple(held[key[1:]].items())


def _described(path: str, place: tuple[str, int], slots: Mapping[str, tuple[Dim, ...]]) -> Dim:
    parameter, position = place
    dims = slots.get(f"{path}.{parameter}" if path else parameter, ())
    return dims[position] if position < len(dims) else ()


def _numbers(value: dict | tuple) -> dict[str, int]:
    """Name -> number, of those that a dict or a named tuple of plain values holds by name."""
    named = value if type(value) is dict else dict(zip(getattr(value, "_fields", ()), value))
    plain = all(v is None or isinstance(v, (int, float, str)) for v in named.values())  # others may be handed on in it
    return {k: v for k, v in named.items() if plain and type(k) is str and type(v) is int and v > 1}


_PLAIN_OBJECTS = (object.__new__, types.SimpleNamespace.__new__)


def is_settings(value: Any) -> bool:
    """Whether `value` is a plain object that holds numbers for a module: a config."""
    return (
        type(value).__new__ in _PLAIN_OBJECTS  # enums, tuples and other values are not settings
        and hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType))
        and not callable(value)
        and any(type(v) is int for v in vars(value).values())
    )


def _tagged_settings(settings: Any, path: str, key: str) -> Any:
    cls: Any = type(settings)
    mine = cls.__new__(cls)
    mine.__dict__.update(settings.__dict__)
    mine.__dict__.update(_tagged_entries(settings.__dict__, path, key))
    return mine


def _tagged_entries(settings: Mapping[Any, Any], path: str, key: str) -> dict[str, Any]:
    """The numbers and lists of settings, each of which remembers which one it is."""
    tagged: dict[str, Any] = {}
    for name, value in settings.items():
        if type(name) is not str:
            continue
        if type(value) is int and value > 1:
            tagged[name] = SizedInt(value, Attribute(path, (key, name), value))
        elif type(value) is list and value and all(isinstance(v, (str, bool, int)) for v in value):
            entries = [
                SizedInt(v, Attribute(path, (key, name, i), v)) if type(v) is int and v > 1 else v
                for i, v in enumerate(value)
            ]
            tagged[name] = listed(entries, Attribute(path, (key, name)))
    return tagged


def _positions(args: tuple, kwargs: dict) -> dict[int, int | str]:
    """Tensor, by its id, -> position or name of the argument that it is."""
    named = {**dict(enumerate(args)), **kwargs}
    return {id(v): k for k, v in reversed(named.items()) if isinstance(v, Tensor)}


def _form(out: Any, first: Tensor, taken: Mapping[int, int | str]) -> Any:
    """The form of an output, as in `branches.zero`; None where it has parts that have none."""
    if out is first:
        return "x"
    if type(out) in (tuple, list) and all(part is None or isinstance(part, Tensor) for part in out):
        parts = ["x" if part is first else taken.get(id(part)) for part in out]
        return {type(out).__name__: [p if p in ("x", None) else {"argument": p} for p in parts]}
    return None


@contextlib.contextmanager
def _following_calls(
    tracer: Tracer, modules: Sequence[tuple[str, nn.Module]], arrivals: Arrivals, examples: routing.Examples | None
) -> Iterator[None]:
    """Know at every operator which module runs, and note what each module call takes and gives.

    `examples` notes one call of each list of alternatives.
    """
    open_calls: list[Call] = []
    handles = []
    slots = []  # modules whose calls come through `noted`
    short = tracer.meta and direct.is_open()

    def enter(path: str, args: tuple, kwargs: dict) -> None:
        first: Tensor | None
        argument: int | str | None = 0
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # most of them: spared the general way
            first = args[0]
        else:
            first = next(iter(running.tensors_in((args, kwargs))), None)
            argument = _positions(args, kwargs).get(id(first))
        source = None if first is None else tracer.value(first)
        call = Call(path, tracer.op, source, argument=argument)
        if len(args) + len(kwargs) > 1:
            named = {**dict(enumerate(args)), **kwargs}.items()
            call.given = tuple([(k, tracer.value(v)) for k, v in named if isinstance(v, Tensor)])
        open_calls.append(call)
        tracer.path = path
        tracer.counting.enter()

    def leave(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        call = open_calls.pop()
        tracer.path = open_calls[-1].path if open_calls else ""
        tracer.counting.leave()
        call.end = tracer.op
        if isinstance(out, Tensor):
            call.result, call.form = tracer.value(out), "x"
        elif tensors := running.tensors_in(out):
            taken = _positions(args, kwargs)
            call.result = tracer.value(tensors[0])
            call.form = _form(out, tensors[0], taken)
            call.others = tuple(tracer.value(t).origin for t in tensors[1:] if id(t) not in taken)
            given = {id(t) for t in running.tensors_in((args, kwargs))}
            call.passes_the_rest = all(id(t) in given for t in tensors[1:])
            if not call.passes_the_rest and call.form is not None:
                new = [(i, t) for i, t in enumerate(out) if t is not None and id(t) not in taken]
                call.parts = tuple([(i, tracer.value(t)) for i, t in new])
        tracer.record.calls.append(call)
        if examples is not None:
            examples.note(call.path, args, kwargs, out)

    def hook(path: str) -> Any:
        return lambda module, args, kwargs: enter(path, args, kwargs)

    def noted(path: str, module: nn.Module) -> Any:
        inner = module._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            enter(path, args, kwargs)
            out = inner(*args, **kwargs)
            leave(module, args, kwargs, out)
            return out

        return call

    def plain(path: str, module: nn.Module, plan: Callable[[Tensor], direct.Call | None]) -> Any:
        """The call of a layer that calls no other one, without PyTorch's way to the operator that it is."""

        def call_plain(*args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                return noted(path, module)(*args, **kwargs)
            (x,) = args
            with torch._C.DisableTorchFunction():
                found = plan(x)
                if found is not None:
                    function, given = found
                    mine = Call(path, tracer.op, tracer.value(x), argument=0, form="x")
                    around, tracer.path = tracer.path, path
                    out = x if function is None else arrivals.of_layer(function, given)
                    tracer.path = around
                    mine.end, mine.result = tracer.op, tracer.value(out)
                    tracer.record.calls.append(mine)
                    return out
            return noted(path, module)(x)

        return call_plain

    try:
        for path, module in modules:
            if module._forward_hooks or module._forward_pre_hooks:  # what these do belongs to the call, as it did
                handles.append(module.register_forward_pre_hook(hook(path), with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
            else:  # where PyTorch looks for a compiled call first; hooks would take a third of the time of a trace
                plan = direct.layer(module) if short else None
                call = noted(path, module) if plan is None else plain(path, module, plan)
                module.__dict__["_compiled_call_impl"] = call
                slots.append(module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in slots:
            del module.__dict__["_compiled_call_impl"]
