"""A search inside everything that people train with: mixed precision, accumulation, compilation, checkpointing, two processes.

The yardstick is always the plain search of the same seed: what changes the arithmetic of a step must not change what is
found beyond rounding, and what does not change it must not change a bit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, difference, outputs
from test_search import assert_on_budget
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
        F.mse_loss((run or search.model)(x), y).backward()
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


def _in_two_processes(work, folder, *args):
    """What `work(rank, *args)` returns on each of two gloo ranks."""
    torch.multiprocessing.start_processes(_rank, (work, folder, args), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(rank, work, folder, args):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(work(rank, *args), folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _found(search):
    small = search.export()
    return {
        "structure": search.structure.to_json(), "pruned": search.pruned.detach(), "importance": search.importance, "early": search.early,
        "weights": small.state_dict(), "history": search.history,
    }  # fmt: skip


def _halves(batches, rank):
    return [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches]


def _ddp(rank, net, from_search_model):
    space, batches = problem(net)
    search = make_search(space)
    run = DistributedDataParallel(search.model)
    optimizer = sgd((run if from_search_model else space.model).parameters())
    search.attach(optimizer)
    return _found(train(search, optimizer, _halves(batches, rank), run))


def _ddp_accumulating(rank, net):
    search, optimizer, batches = searching(net)
    run = DistributedDataParallel(search.model)
    for x, y in _halves(batches, rank):
        first, second = (list(zip(x.chunk(2), y.chunk(2))))
        with run.no_sync():
            (F.mse_loss(run(first[0]), first[1]) / 2).backward()
        (F.mse_loss(run(second[0]), second[1]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        note(search)
    return _found(search)


def _fsdp(rank, how):
    from torch.distributed.fsdp import fully_shard

    space, batches = problem()
    search = make_search(space)
    ignored = set(search.masks) if how == "masks ignored" else None
    for block in search.model.blocks:
        fully_shard(block, ignored_params=ignored)
    fully_shard(search.model, ignored_params=ignored)
    optimizer = sgd(search.model.parameters())
    search.attach(optimizer)
    return _found(train(search, optimizer, _halves(batches, rank)))


def assert_ranks_found(ranks, expected):
    """Both ranks agree to the bit, and with the single process on the global batch up to rounding."""
    one, two = ranks
    assert one["structure"] == two["structure"] == expected.structure.to_json()
    assert one["history"] == two["history"]
    for key in ("pruned", "importance"):
        assert torch.equal(one[key], two[key]), key
    assert_near(one["early"], expected.early, 1e-5)
    for name, t in expected.export().state_dict().items():
        assert torch.equal(one["weights"][name], two["weights"][name]), name
        torch.testing.assert_close(one["weights"][name], t, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("work, args", [(_ddp, (True,)), (_ddp, (False,)), (_ddp_accumulating, ())])
def test_ddp_finds_what_one_process_finds_on_the_global_batch(work, args, tmp_path):
    assert_ranks_found(_in_two_processes(work, tmp_path, "residual_stack", *args), plain())


@pytest.mark.parametrize("how", ["masks ignored", "everything"])
def test_fsdp2_finds_what_one_process_finds_on_the_global_batch(how, tmp_path):
    assert_ranks_found(_in_two_processes(_fsdp, tmp_path, how), plain())
