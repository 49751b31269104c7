"""Checkpoints are whole or not there; a killed search ends as one that was left alone."""

from __future__ import annotations

import errno
import json
import pathlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dmscale
from benchmarks import resume
from dmscale import CheckpointError, SearchError, checkpoint
from dmscale.batches import Batches
from dmscale.methods import METHODS

STEPS = 12


def searching(net="mlp", budget="50% macs", steps=STEPS, seed=0, **options):
    torch.manual_seed(seed)
    model, inputs = NETS[net]()
    search = dmscale.Search(dmscale.trace(model, inputs, verify=False), budget, steps, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    search.attach(optimizer)
    return search, optimizer


def train(search, optimizer, until=STEPS):
    """Batches come from the global generator."""
    x = search.space.example_inputs
    while search.step < until:
        out = search.model(torch.randn(16, *x.shape[1:]))
        (out - torch.randn(out.shape)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(search):
    """All that a search has found, to be compared to the bit."""
    tensors = [search.pruned.detach(), search.importance, *search.space.model.state_dict().values()]
    return [t.clone() for t in tensors], search.step, list(search.history), search.structure


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0]))
    assert a[1:] == b[1:]


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_killed_search_ends_as_one_left_alone(tmp_path):
    """Two processes are killed with SIGKILL at random moments, the third goes on to the end."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "killed").mkdir()
    expected = json.loads(json.dumps(resume.run(tmp_path / "alone", steps=30)))
    found, kills = resume.survive(tmp_path / "killed", kills=2, seed=1, longest=0.3, steps=30)
    assert found == expected
    assert [k["from"] for k in kills] == sorted(k["from"] for k in kills)
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize("stop", [0, 1, 7, STEPS])
def test_load_restores_everything(stop, tmp_path):
    whole, optimizer = searching()
    torch.manual_seed(1)
    train(whole, optimizer)

    first, optimizer = searching()
    torch.manual_seed(1)
    train(first, optimizer, stop)
    first.save(tmp_path / "a" / "b.ckpt", optimizer, extra={"epoch": 3, "order": torch.arange(4)})
    drawn = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]

    again, optimizer = searching(seed=5)  # other weights, other generators
    torch.rand(100)
    extra = again.load(tmp_path / "a" / "b.ckpt", optimizer)
    assert extra["epoch"] == 3 and torch.equal(extra["order"], torch.arange(4))
    assert [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()] == drawn
    again.load(tmp_path / "a" / "b.ckpt", optimizer)
    train(again, optimizer)
    assert_same(everything(again), everything(whole))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("back_to", [0, 1, 7])
def test_a_search_that_has_gone_on_may_go_back(back_to, method, tmp_path):
    search, optimizer = searching(method=method)
    torch.manual_seed(1)
    train(search, optimizer, back_to)
    search.save(tmp_path / "s.ckpt", optimizer)
    train(search, optimizer)
    expected = everything(search)
    search.load(tmp_path / "s.ckpt", optimizer)
    train(search, optimizer)
    assert_same(everything(search), expected)


def test_weights_and_optimizer_may_be_left_out(tmp_path):
    search, optimizer = searching()
    train(search, optimizer, 5)
    search.save(tmp_path / "s.ckpt", model=False)
    other, optimizer = searching(seed=5)
    weights = [p.detach().clone() for p in other.space.model.parameters()]
    other.load(tmp_path / "s.ckpt")
    assert other.step == 5 and torch.equal(other.importance, search.importance)
    assert all(torch.equal(a, b) for a, b in zip(weights, other.space.model.parameters()))
    with pytest.raises(CheckpointError, match="holds no state of an optimizer"):
        other.load(tmp_path / "s.ckpt", optimizer)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 30, 3000])
@pytest.mark.parametrize("where", ["write", "sync", "replace"])
def test_a_full_disk_leaves_the_earlier_checkpoint(where, after, tmp_path, monkeypatch):
    search, optimizer = searching()
    path = tmp_path / "s.ckpt"
    search.save(path, optimizer)
    before = path.read_bytes()
    train(search, optimizer, 3)
    state = everything(search)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    if where == "write":
        original = checkpoint._Hashing.write
        written = []

        def write(self, data):
            written.append(len(bytes(data)))
            return fail() if sum(written) > after else original(self, data)

        monkeypatch.setattr(checkpoint._Hashing, "write", write)
    else:
        monkeypatch.setattr(checkpoint.os, {"sync": "fsync", "replace": "replace"}[where], fail)
    with pytest.raises(CheckpointError, match=r"s\.ckpt could not be written.*No space left.*earlier.*untouched"):
        search.save(path, optimizer)
    with pytest.raises(CheckpointError, match="no file was left"):
        search.save(tmp_path / "new.ckpt", optimizer)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.ckpt"]
    assert_same(everything(search), state)
    search.save(path, optimizer)  # once there is room again
    other, optimizer = searching(seed=5)
    other.load(path, optimizer)
    assert other.step == 3


def damages(data):
    """Name -> bytes of a checkpoint that something happened to."""
    middle = len(data) // 2
    return {
        "truncated": data[:-100],
        "truncated to its header": data[:40],
        "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
        "something else": b"PK" + data,
    }


@pytest.mark.parametrize("damage", damages(bytes(200)))
def test_a_damaged_checkpoint_changes_nothing(damage, tmp_path):
    search, optimizer = searching()
    train(search, optimizer, 4)
    path = tmp_path / "s.ckpt"
    search.save(path, optimizer)
    path.write_bytes(damages(path.read_bytes())[damage])
    before, drawn = everything(search), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"s\.ckpt.* is (damaged|no checkpoint of dmscale)"):
        search.load(path, optimizer)
    assert_same(everything(search), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    with pytest.raises(CheckpointError, match="cannot be read"):
        search.load(tmp_path / "absent.ckpt")


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    search, optimizer = searching()
    train(search, optimizer, 4)
    path = tmp_path / "s.ckpt"
    search.save(path, optimizer)
    search.save(tmp_path / "bare.ckpt", model=False)
    for other, message in (
        (searching("conv_chain"), "weights in .* are of another Sequential: .*differ in name or shape"),
        (searching(budget="60% macs"), "is of a search for .*give the same budget"),
        (searching(steps=STEPS + 1), f"steps={STEPS},"),
    ):
        before = everything(other[0])
        with pytest.raises((CheckpointError, SearchError), match=message):
            other[0].load(path, other[1])
        assert_same(everything(other[0]), before)
    with pytest.raises((CheckpointError, SearchError), match="another search space|is of a search for"):
        searching("conv_chain")[0].load(tmp_path / "bare.ckpt")
    unattached = torch.optim.AdamW(search.space.model.parameters())
    with pytest.raises(CheckpointError, match="attach the search before loading"):
        search.load(path, unattached)


def mlp_search(budget="50% macs", inputs=4, bounds=None, **options):
    """A search that differs from the plain one in what is said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    space = dmscale.trace(model, torch.randn(inputs, 8), verify=False, **(bounds or {}))
    return dmscale.Search(space, budget, STEPS, **options)


@pytest.mark.parametrize(
    "was, has, says",
    [
        (dict(budget=None, budgets=["80% macs", "50% macs"]), dict(budget=None, budgets=["70% macs", "50% macs"]), "921.* 806"),
        (dict(budget=None, budgets=["80% macs", "50% macs"]), {}, "is of a search for .*give the same budget"),
        (dict(budget=dict(macs=512)), dict(budget=dict(macs=512), inputs=8), "costs .*1152.* costs .*2304.*example inputs"),
        ({}, dict(bounds=dict(multiple=8)), "keeps 1 or more by 1 of '0', this one 8 or more by 8.*minimum and multiple"),
        ({}, dict(bounds=dict(minimum=2)), "keeps 1 or more by 1 of '0', this one 2 or more by 1"),
        ({}, dict(momentum=0.9, warmup=0.1), "momentum=0.99, warmup=0.05, this one has momentum=0.9, warmup=0.1"),
        ({}, dict(decay=0.7), "decay=0.8, this one has decay=0.7"),
        ({}, dict(train_weights=False), "train_weights=True, this one has train_weights=False"),
        ({}, dict(seed=1), "seed=0, this one has seed=1"),
        ({}, dict(importance="index"), "importance='taylor', this one has .*importance='index'"),
        ({}, dict(importance=mlp_search), "this one has .*importance='mlp_search'"),
        (dict(method="dms"), dict(method="dms", mode="lagrangian"), "mode='penalty', this one has mode='lagrangian'"),
        (dict(method="dms"), dict(method="dms", lr=1.0, hard=True), "hard=False, lr=.*, this one has hard=True, lr=1.0"),
        (dict(method="gumbel"), dict(method="gumbel", penalty=2.0, adapt=False), "adapt=True, penalty=1.0, this one has adapt=F"),
    ],
)  # fmt: skip
def test_a_search_on_other_terms_is_refused_and_told_which(was, has, says, tmp_path):
    mlp_search(**was).save(tmp_path / "s.ckpt")
    mlp_search(**was).load(tmp_path / "s.ckpt")
    other = mlp_search(**has)
    before = [p.clone() for p in other.space.model.parameters()]
    with pytest.raises(CheckpointError, match=says):
        other.load(tmp_path / "s.ckpt")
    assert other.step == 0 and all(torch.equal(a, b) for a, b in zip(before, other.space.model.parameters()))


def test_the_state_of_another_class_of_optimizers_is_refused(tmp_path):
    search, optimizer = searching()
    search.save(tmp_path / "s.ckpt", optimizer)
    model, inputs = NETS["mlp"]()
    other = dmscale.Search(dmscale.trace(model, inputs, verify=False), "50% macs", STEPS)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    other.attach(sgd)
    with pytest.raises(CheckpointError, match="is of the class AdamW, this one of SGD"):
        other.load(tmp_path / "s.ckpt", sgd)


def test_numbers_of_numpy_come_back_as_pythons(tmp_path):
    """In what the user adds and among the settings of an optimizer; what a module's state carries beside stays."""
    model, inputs = NETS["residual_conv"]()
    search = dmscale.Search(dmscale.trace(model, inputs, verify=False), "50% macs", STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), np.float64(1e-2))
    search.attach(optimizer)
    search.save(tmp_path / "s.ckpt", optimizer, extra={"best": np.float64(0.5), np.int64(3): [(np.bool_(True),)]})
    extra = search.load(tmp_path / "s.ckpt", optimizer)
    assert extra == {"best": 0.5, 3: [(True,)]}
    assert [type(v) for v in extra.values()] == [float, list] and type(extra[3][0][0]) is bool
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert checkpoint.read(tmp_path / "s.ckpt")["model"]._metadata == model.state_dict()._metadata


@pytest.mark.parametrize(
    "extra, where",
    [
        ({"order": np.arange(3)}, r"extra\['order'\] is a numpy.ndarray"),
        ({"state": [{"made": pathlib.Path("a")}]}, r"extra\['state'\]\[0\]\['made'\] is a pathlib"),
        ({"late": lambda: 0}, r"extra\['late'\] is a builtins.function"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(extra, where, tmp_path):
    search, optimizer = searching()
    path = tmp_path / "s.ckpt"
    search.save(path, optimizer)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"{where}.*was not written.*state_dict"):
        search.save(path, optimizer, extra=extra)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s.ckpt"]


# -- the place in a loader --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 9])
def test_a_stream_of_batches_goes_on_where_it_was(at, own):
    """Shuffled, with noise from the global generator, over several passes."""

    def stream():
        data = TensorDataset(torch.arange(8.0)[:, None], torch.arange(8))

        def noisy(rows):
            x, y = torch.utils.data.default_collate(rows)
            return x + torch.rand(()), y

        generator = torch.Generator().manual_seed(3) if own else None
        return Batches(DataLoader(data, 2, shuffle=True, collate_fn=noisy, generator=generator), torch.device("cpu"))

    torch.manual_seed(0)
    first = stream()
    for _ in range(at):
        next(first)
    state, generators = first.state_dict(), checkpoint.random_state()
    expected = [next(first) for _ in range(6)]

    torch.manual_seed(7)
    again = stream()
    again.load_state_dict(state)
    checkpoint.set_random_state(generators)
    for (x, y), (x2, y2) in zip(expected, [next(again) for _ in range(6)]):
        assert torch.equal(x, x2) and torch.equal(y, y2)


# -- everything in one call -------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run as a kill would."""


def scaled(folder, stop=None, **options):
    """`scale` on a shuffled loader; the criterion stops the run at its call number `stop`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 4))
    x = torch.randn(48, 8)
    loader = DataLoader(TensorDataset(x, x[:, :4].square()), 16, shuffle=True)
    calls = []

    def criterion(out, y):
        calls.append(1)
        if stop is not None and len(calls) == stop:
            raise Stop
        return F.mse_loss(out, y)

    settings = dict(budget="50% macs", steps=10, finetune_steps=10, progress=False, ema=0.9, distill="logits, features")
    return dmscale.scale(
        model, x[:2], loader, criterion, checkpoint=folder, checkpoint_every=3, **settings | options
    ), calls


def test_scale_resumes_in_search_and_recovery_to_the_bit(tmp_path):
    expected, calls = scaled(None)
    assert len(calls) == 20
    for stop in (5, 8, 8, 2):  # at step 5 of the search; at steps 1, 8 and 8 of the recovery
        with pytest.raises(Stop):
            scaled(tmp_path, stop)
    found, calls = scaled(tmp_path)
    assert len(calls) < 10
    assert found.structure == expected.structure and found.search.history == expected.search.history
    for a, b in zip(found.model.state_dict().values(), expected.model.state_dict().values()):
        assert torch.equal(a, b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.ckpt", "recovery.ckpt", "search.ckpt"]
    with pytest.raises(CheckpointError, match="is of a search for"):
        scaled(tmp_path, budget="60% macs")


def test_scale_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="could not be written.*No space left"):
        found, _ = scaled(tmp_path)
    expected, _ = scaled(None)
    assert found.structure == expected.structure
    assert list(tmp_path.iterdir()) == []
