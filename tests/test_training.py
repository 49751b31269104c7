"""A search inside everything that people train with: mixed precision, accumulation, compilation, checkpointing, two processes.

The yardstick is always the plain search of the same seed: what changes the arithmetic of a step must not change what is
found beyond rounding, and what does not change it must not change a bit.
"""

from __future__ import annotations

import functools
import gc
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from test_latency import FakeMeter
from test_search import assert_on_budget
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dmscale
from dmscale import SearchError

STEPS, WARM = 12, 3


def problem(net="residual_stack", batch=8, seed=0):
    """(space, a batch for each step) of one of the small networks; all but `residual_conv` and `mlp` have no BatchNorm."""
    torch.manual_seed(seed)
    model, inputs = NETS[net]()
    out = model.train()(inputs)
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, *inputs.shape[1:]), (batch, *out.shape[1:])
    batches = [tuple(torch.randn(shape, generator=g) for shape in shapes) for _ in range(STEPS)]
    return dmscale.trace(model, inputs, verify=False), batches


def sgd(parameters):
    """Without momentum: DDP gives zeros where a removed block got no gradient, and momentum would move that block on."""
    return torch.optim.SGD(parameters, 1e-2)


def make_search(space, **options):
    """A quarter of the steps is warm-up: the masks are ones there, so that nothing but rounding can differ."""
    return dmscale.Search(space, "50% macs", STEPS, warmup=WARM / STEPS, **options)


def searching(net="residual_stack", make=sgd, **options):
    """(search, its optimizer, batches)."""
    space, batches = problem(net)
    search = make_search(space, **options)
    optimizer = make(space.model.parameters())
    search.attach(optimizer)
    return search, optimizer, batches


def train(search, optimizer, batches, run=None):
    """The plain loop."""
    for x, y in batches:
        F.mse_loss((search.model if run is None else run)(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        note(search)
    return search


def note(search):
    """Keep the importance gathered in the warm-up: afterwards one rounding may swap two elements of hard masks."""
    if search.step == WARM:
        search.early = search.importance.clone()


def plain(net="residual_stack", **options):
    """The search that others are compared with."""
    return train(*searching(net, **options))


def assert_like(found, expected, rounding=1e-5):
    """The same structure, and up to `rounding`, relative to the largest, the same importance from the warm-up."""
    assert found.structure == expected.structure
    assert_near(found.early, expected.early, rounding)


def assert_near(a, b, rounding):
    assert float((a - b).abs().max()) <= rounding * float(b.abs().max())


# -- several processes ------------------------------------------------------------------------------------------------


def _work():
    """Name -> what one of two ranks runs."""
    return {
        "ddp": lambda rank: _ddp(rank, lambda search, run: search.space.model),
        "ddp, optimizer of the wrapped model": lambda rank: _ddp(rank, lambda search, run: run),
        "ddp, accumulating": _ddp_accumulating,
        "fsdp2": lambda rank: _fsdp2(rank, False),
        "fsdp2, masks ignored": lambda rank: _fsdp2(rank, True),
    }


def _on_latency(rank):
    """Targets and structure of a search on ranks of which one is three times as slow, as each would measure."""
    space, batches = problem("mlp")
    space.measure_latency(meter=FakeMeter(launch=1e-3 + 2e-3 * rank), cache=False)
    search = dmscale.Search(space, "80% latency", STEPS)
    run = DistributedDataParallel(search.model)
    optimizer = sgd(space.model.parameters())
    search.attach(optimizer)
    for x, y in _halves(batches, rank):
        F.mse_loss(run(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(search.budget.targets), search.structure.to_json(), search.space.cost(search.structure)["latency"]


def _refusals(rank):
    """What is said of models that are sharded too early, and of one file for sharded weights."""
    from torch.distributed.fsdp import fully_shard

    space, _ = problem("mlp")
    search = make_search(space)
    fully_shard(search.model)
    with pytest.raises(dmscale.CheckpointError) as checkpoint:
        search.save("nowhere.ckpt")
    fully_shard(space.model)
    with pytest.raises(SearchError) as late:
        make_search(space)
    with pytest.raises(dmscale.TraceError) as early:
        dmscale.trace(space.model, space.example_inputs)
    return [str(e.value) for e in (early, late, checkpoint)]


def _rank(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        found = {name: work(rank) for name, work in _work().items()}
        found |= {name: _ddp_watching(rank, options) for name, options in WATCHING.items()}
        torch.save(found | {"latency": _on_latency(rank), "refusals": _refusals(rank)}, folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Name -> what each of two gloo ranks has found."""
    import torch.distributed.fsdp  # noqa: F401 (once, before the fork)

    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(_rank, (folder,), nprocs=2, start_method="fork")
    one, two = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return {name: (one[name], two[name]) for name in one}


@functools.cache
def single():
    """One process on the global batch."""
    return plain()


def _found(search):
    small = search.export()
    return {
        "structure": search.structure.to_json(),
        "pruned": search.pruned.detach(),
        "importance": search.importance,
        "early": search.early,
        "weights": small.state_dict(),
        "history": search.history,
    }


def _halves(batches, rank):
    return [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches]


def _ddp(rank, owner):
    space, batches = problem()
    search = make_search(space)
    run = DistributedDataParallel(search.model)
    optimizer = sgd(owner(search, run).parameters())
    search.attach(optimizer)
    return _found(train(search, optimizer, _halves(batches, rank), run))


def noise(search):
    """An importance that every rank would draw for itself."""
    rank = torch.distributed.get_rank()
    g = torch.Generator().manual_seed(100 * rank + search.step)
    return {m: torch.rand(n, generator=g) for m, n in zip(search.layout.members, search.layout.sizes)}


WATCHING = {
    "activation": dict(importance="activation"),
    "residual": dict(depth_importance="residual"),
    "similarity": dict(depth_importance="similarity"),
    "a function": dict(importance=noise),
}
"""Importances that are no gradients, which DDP would average."""


def _ddp_watching(rank, options):
    space, batches = problem()
    search = make_search(space, **options)
    run = DistributedDataParallel(search.model)
    optimizer = sgd(space.model.parameters())
    search.attach(optimizer)
    return _found(train(search, optimizer, _halves(batches, rank), run))


def _ddp_accumulating(rank):
    search, optimizer, batches = searching()
    run = DistributedDataParallel(search.model)
    for x, y in _halves(batches, rank):
        first, second = list(zip(x.chunk(2), y.chunk(2)))
        with run.no_sync():
            (F.mse_loss(run(first[0]), first[1]) / 2).backward()
        (F.mse_loss(run(second[0]), second[1]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        note(search)
    return _found(search)


def _fsdp2(rank, ignore):
    from torch.distributed.fsdp import fully_shard

    space, batches = problem()
    search = make_search(space)
    ignored = set(search.masks) if ignore else None
    for block in search.model.blocks:
        fully_shard(block, ignored_params=ignored)
    fully_shard(search.model, ignored_params=ignored)
    optimizer = sgd(search.model.parameters())
    search.attach(optimizer)
    return _found(train(search, optimizer, _halves(batches, rank)))


@pytest.mark.parametrize("name", _work())
def test_two_processes_find_what_one_finds_on_the_global_batch(name, ranks):
    """Both ranks agree to the bit, and with the single process up to rounding."""
    one, two = ranks[name]
    expected = single()
    assert one["structure"] == two["structure"] == expected.structure.to_json()
    assert one["history"] == two["history"]
    for key in ("pruned", "importance"):
        assert torch.equal(one[key], two[key]), key
    assert_near(one["early"], expected.early, 1e-5)
    for name, t in expected.export().state_dict().items():
        assert torch.equal(one["weights"][name], two["weights"][name]), name
        torch.testing.assert_close(one["weights"][name], t, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", WATCHING)
def test_two_processes_agree_on_what_is_no_gradient(name, ranks):
    one, two = ranks[name]
    assert one["structure"] == two["structure"] and one["history"] == two["history"]
    assert torch.equal(one["importance"], two["importance"])
    if name != "a function":  # halves of a batch have the mean of the whole
        assert_near(one["early"], plain(**WATCHING[name]).early, 1e-5)


def test_two_processes_agree_on_a_latency(ranks):
    """That of the first, whose measurement the other takes."""
    one, two = ranks["latency"]
    assert one == two
    space, _ = problem("mlp")
    space.measure_latency(meter=FakeMeter(launch=1e-3), cache=False)
    assert one[0] == {"latency": pytest.approx(0.8 * space.cost()["latency"])}


def test_what_cannot_be_done_with_shards_is_refused_with_the_remedy(ranks):
    early, late, checkpoint = ranks["refusals"][0]
    assert early == late and "sharded already" in early and "then fully_shard(search.model)" in early
    assert "model=False" in checkpoint


# -- mixed precision --------------------------------------------------------------------------------------------------


def _scaled(make, scale=2.0**12, bad=(), clip=None, net="residual_stack", dtype=None, clear=None):
    """A search under a GradScaler; steps in `bad` have a loss that overflows.  Tells which steps were taken."""
    search, optimizer, batches = searching(net, make)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    taken = []
    i = 0
    while not search.done:
        x, y = batches[search.step]
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.mse_loss(search.model(x).float(), y)
        scaler.scale(loss * (float("inf") if i in bad else 1)).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(search.space.model.parameters(), clip)
        before = search.step, search.pruned.detach().clone(), search.importance.clone()
        scaler.step(optimizer)
        scaler.update()
        clear(search.space.model) if clear else optimizer.zero_grad()
        taken.append(search.step > before[0])
        if not taken[-1]:
            assert torch.equal(search.pruned, before[1]) and torch.equal(search.importance, before[2])
        note(search)
        i += 1
    return search, taken


def fused(parameters):
    return torch.optim.SGD(parameters, 1e-2, fused=True)


@pytest.mark.parametrize("clip", [None, 1e6])
@pytest.mark.parametrize("make", [sgd, fused])
def test_a_gradient_scaler_does_not_show(make, clip):
    """Scales are powers of two, which round nothing; a fused optimizer is given scaled gradients and the scale."""
    search, taken = _scaled(make, clip=clip)
    assert all(taken)
    assert_like(search, single(), 0.0 if make is sgd else 1e-6)


@pytest.mark.parametrize("clip", [None, 1e6])
@pytest.mark.parametrize("make", [sgd, fused])
def test_a_step_that_overflows_is_left_out(make, clip):
    search, taken = _scaled(make, bad=(1, 5, 9), clip=clip)
    assert [i for i, t in enumerate(taken) if not t] == [1, 5, 9]
    assert_like(search, single(), 0.0 if make is sgd else 1e-6)


@pytest.mark.parametrize("to_none", [True, False])
def test_what_masks_hold_of_a_step_that_was_given_up_goes_with_the_gradients_of_the_weights(to_none):
    """The user's own model has no masks to clear."""
    search, taken = _scaled(sgd, bad=(1, 5, 9), clear=lambda model: model.zero_grad(set_to_none=to_none))
    assert [i for i, t in enumerate(taken) if not t] == [1, 5, 9]
    assert_like(search, single(), 0.0)


@pytest.mark.parametrize("net", ["residual_conv", "fused_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, net):
    search, _ = _scaled(sgd, dtype=dtype, net=net)
    expected = plain(net)
    assert_near(search.early.sqrt(), expected.early.sqrt(), 0.1)
    assert_on_budget(search)
    assert all(p.dtype == torch.float32 for p in search.export().parameters())


# -- gradients --------------------------------------------------------------------------------------------------------


def test_accumulation_gathers_the_importance_of_the_whole_batch():
    search, optimizer, batches = searching()
    for x, y in batches:
        for part, target in zip(x.chunk(4), y.chunk(4)):
            (F.mse_loss(search.model(part), target) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        note(search)
    assert_like(search, single())


def test_masks_gather_over_micro_batches_whatever_trains():
    """No weight holds a gradient where all are frozen: that must not read as if they had been cleared."""

    def frozen(parts):
        search, optimizer, batches = searching(train_weights=False)
        search.space.model.requires_grad_(False)
        for x, y in batches:
            for part, target in zip(x.chunk(parts), y.chunk(parts)):
                (F.mse_loss(search.model(part), target) / parts).backward()
            optimizer.step()
            search.space.model.zero_grad()
            note(search)
        return search

    assert_like(frozen(4), frozen(1))


def test_clipping_the_weights_leaves_importance_alone():
    """At a rate of zero clipping changes nothing else: a clipped search must gather the very same."""

    def still(parameters):
        return torch.optim.SGD(parameters, 0.0)

    search, optimizer, batches = searching(make=still)
    for x, y in batches:
        F.mse_loss(search.model(x), y).backward()
        nn.utils.clip_grad_norm_(search.space.model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        note(search)
    assert_like(search, plain(make=still), 0.0)


@pytest.mark.parametrize("net", ["residual_conv", "fused_attention", "own_rms_norm"])
def test_a_step_leaves_no_cycle_behind(net):
    """A cycle in a gate would hold the activations of some steps until the garbage is collected."""
    search, optimizer, batches = searching(net)
    train(search, optimizer, batches[:2])
    (x, y), *_ = batches
    gc.collect()
    gc.disable()
    try:
        F.mse_loss(search.model(x), y).backward()
        assert gc.collect() == 0
    finally:
        gc.enable()


# -- other ways to run the forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["residual_conv", "fused_attention"])
def test_a_compiled_model_is_one_graph_and_finds_the_same(net):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    search, optimizer, batches = searching(net)
    train(search, optimizer, batches, torch.compile(search.model, backend=backend, fullgraph=True))
    assert len(graphs) == 1  # not compiled anew when masks change or blocks are decided
    assert_like(search, plain(net))


class OwnNorm(nn.Module):
    """A mean over a width in a forward, which is gated at the call."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h / h.square().mean(-1, keepdim=True).sqrt())


def test_a_compiled_model_with_gated_calls_is_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = OwnNorm(), torch.randn(4, 6)
    search = dmscale.Search(dmscale.trace(model, x), "50% macs", STEPS)
    assert search.space.sites.calls
    out = torch.compile(search.model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(out, search.model(x))


def test_compilation_through_autograd_and_with_graph_breaks():
    torch.compiler.reset()
    search, optimizer, batches = searching("mlp")
    search.model[2].register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    train(search, optimizer, batches, torch.compile(search.model, backend="aot_eager"))
    assert_like(search, plain("mlp"))


class Checkpointed(nn.Module):
    """The residual stack, its blocks recomputed in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.net, _ = NETS["residual_stack"]()
        self.reentrant = reentrant

    def forward(self, x):
        x, seen = self.net.stem(x), []
        for block in self.net.blocks:
            if self.reentrant is None:
                x = block(x, seen)
            else:
                x = checkpoint(block, x, seen, use_reentrant=self.reentrant)
        return self.net.head(x)


@functools.cache
def checkpointed(reentrant):
    torch.manual_seed(0)
    model = Checkpointed(reentrant)
    search = make_search(dmscale.trace(model, torch.randn(3, 8)))
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    return train(search, optimizer, problem()[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_finds_the_same(reentrant):
    found, expected = checkpointed(reentrant), checkpointed(None)
    assert list(found.space.dimensions) == list(expected.space.dimensions)
    assert_like(found, expected)


def test_channels_last_stays():
    torch.manual_seed(0)
    model, inputs = NETS["residual_conv"]()
    model = model.to(memory_format=torch.channels_last)
    inputs = inputs.to(memory_format=torch.channels_last)
    search = make_search(dmscale.trace(model, inputs))
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    batches = [(x.to(memory_format=torch.channels_last), y) for x, y in problem("residual_conv")[1]]
    train(search, optimizer, batches)
    assert_like(search, plain("residual_conv"))
    small = search.export()
    layouts = [p.is_contiguous(memory_format=torch.channels_last) for p in small.parameters() if p.dim() == 4]
    assert layouts and all(layouts)


# -- optimizers and schedules -----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw, for each": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "adamw, rate in a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_carries_the_structure(name):
    search = train(*searching("residual_conv", OPTIMIZERS[name]))
    assert_on_budget(search)
    moved = search.pruned.detach()
    assert float(moved.max() - moved.min()) > 0.02  # told dimensions apart


def test_a_closure_is_read_after_it_has_run():
    search, optimizer, batches = searching()
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.mse_loss(search.model(x), y)
            loss.backward()
            return loss

        assert float(optimizer.step(closure)) > 0
        note(search)
    assert_like(search, single(), 0.0)


def test_optimizers_that_cannot_carry_the_structure_are_refused():
    space, _ = problem()
    search = make_search(space)
    with pytest.raises(SearchError, match="LBFGS evaluates the loss several times.*SGD or Adam"):
        search.attach(torch.optim.LBFGS(space.model.parameters()))
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(SearchError, match="Muon.*AdamW beside Muon"):
            search.attach(torch.optim.Muon([p for p in space.model.parameters() if p.dim() == 2]))
    search.attach(sgd(space.model.parameters()))


def test_a_wrapper_of_an_optimizer_runs_the_search_from_its_first_step_on():
    """As timm's Lookahead, which is no initialised optimizer: PyTorch lets its class run hooks when it first clears gradients."""

    class Ahead(torch.optim.Optimizer):
        def __init__(self, inside):
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
            self.inside, self.defaults = inside, inside.defaults
            self.param_groups, self.state = inside.param_groups, inside.state

        @torch.no_grad()
        def step(self, closure=None):
            return self.inside.step(closure)

    space, batches = problem()
    search = make_search(space)
    optimizer = Ahead(sgd(space.model.parameters()))
    search.attach(optimizer)
    for x, y in batches:
        F.mse_loss(search.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert search.done


def test_a_wrapper_that_runs_no_hooks_is_refused_with_the_remedy():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inside):
            self.inside, self.param_groups = inside, inside.param_groups

    space, _ = problem()
    search = make_search(space)
    optimizer = sgd(space.model.parameters())
    with pytest.raises(SearchError, match="Wrapper runs no hooks.*the optimizer inside"):
        search.attach(Wrapper(optimizer))
    search.attach(optimizer)


def test_an_optimizer_of_all_parameters_of_the_search_model():
    """As trainers build it, masks and names included."""

    def adamw(parameters):
        return torch.optim.AdamW(parameters, 1e-3)

    space, batches = problem()
    search = make_search(space)
    optimizer = adamw(search.model.named_parameters())
    search.attach(optimizer)
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    assert len(set(names)) == len(names)
    train(search, optimizer, batches)
    assert_like(search, plain(make=adamw), 0.0)


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-2, total_steps=STEPS + 1),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
}


@pytest.mark.parametrize("name, after", [("one cycle", True), ("one cycle", False), ("warm restarts", True)])
def test_groups_and_schedules_keep_to_the_weights(name, after):
    """The rate of the structure is its own, whenever the schedule was made; groups keep their settings."""
    space, batches = problem()
    vectors = [p for p in space.model.parameters() if p.dim() == 1]
    matrices = [p for p in space.model.parameters() if p.dim() > 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, lr=1e-4)]
    optimizer = torch.optim.SGD(groups, 1e-2, momentum=0.9)
    search = make_search(space)
    schedule = None if after else SCHEDULES[name](optimizer)
    search.attach(optimizer)
    schedule = schedule or SCHEDULES[name](optimizer)
    rates = set()
    optimizer.register_step_pre_hook(lambda o, *_: rates.add(o.param_groups[-1]["lr"]))
    for batch in batches:
        train(search, optimizer, [batch])
        schedule.step()
    assert rates == {search.method.lr}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0, 0]
    assert_on_budget(search)
