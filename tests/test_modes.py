"""What a model does in training mode only follows too: noise, moving averages, codebooks, momentum encoders, queues.

Gated equals exported in both modes, at every structure; a search trains the model, and what it exports trains on.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nets import difference, non_trivial
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dmscale
from dmscale import modes
from dmscale.modes import differs_in_training


class NoiseOfASize(nn.Module):
    """An attribute that training alone reads."""

    def __init__(self):
        super().__init__()
        self.width, self.first, self.last = 16, nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x)
        if self.training:
            h = h * torch.ones(h.size(0), self.width)
        return self.last(h.relu())


class Centred(nn.Module):
    """A buffer that training alone reads and writes, as DINO's centre."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.register_buffer("centre", torch.rand(16))

    def forward(self, x):
        h = self.first(x)
        if self.training:
            self.centre.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            h = h - self.centre
        return self.last(h.relu())


class Codebook(nn.Module):
    """A vector quantiser whose codes are moving averages."""

    def __init__(self, codes=10, width=8):
        super().__init__()
        self.codes, self.first, self.last = codes, nn.Linear(5, width), nn.Linear(width, 5)
        self.register_buffer("book", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.book.clone())

    def forward(self, x):
        z = self.first(x)
        chosen = torch.cdist(z, self.book).argmin(1)
        q = F.embedding(chosen, self.book)
        if self.training:
            with torch.no_grad():
                one_hot = F.one_hot(chosen, self.codes).type(z.dtype)
                self.counts.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(one_hot.t() @ z, alpha=0.1)
                self.book.copy_(self.sums / self.counts.unsqueeze(1))
        return self.last(z + (q - z).detach())


class AssignedCodebook(Codebook):
    """The same, with parameters that the forward replaces, as it is often written."""

    def __init__(self):
        super().__init__()
        self.embedding, self.average = nn.Embedding(10, 8), nn.Parameter(torch.randn(10, 8))

    def forward(self, x):
        z, book = self.first(x), self.embedding.weight
        distances = (z**2).sum(1, keepdim=True) + (book**2).sum(1) - 2 * z @ book.t()
        one_hot = F.one_hot(distances.argmin(1), self.codes).type(z.dtype)
        q = one_hot @ book
        if self.training:
            self.counts = self.counts * 0.9 + 0.1 * one_hot.sum(0)
            self.average = nn.Parameter(self.average * 0.9 + 0.1 * one_hot.t() @ z)
            self.embedding.weight = nn.Parameter(self.average / self.counts.unsqueeze(1))
        return self.last(z + (q - z).detach())


class Queue(nn.Module):
    """Keys of earlier batches, written to a part of a buffer in place."""

    def __init__(self, width=8, length=12):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, width))
        self.register_buffer("queue", F.normalize(torch.randn(width, length), dim=0))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))
        self.length = length

    def forward(self, x):
        q = F.normalize(self.encoder(x), dim=1)
        scores = q @ self.queue.clone().detach()
        if self.training:
            at = int(self.at)
            self.queue[:, at : at + len(q)] = q.detach().T
            self.at[0] = (at + len(q)) % self.length
        return scores


class Sampled(nn.Module):
    """A linear layer of random weights, by the local reparametrisation; the noise is one, so that two can be compared."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.mean, self.rho = nn.Parameter(torch.randn(fan_out, fan_in)), nn.Parameter(torch.randn(fan_out, fan_in) - 1)

    def forward(self, x):
        mean, variance = F.linear(x, self.mean), F.linear(x**2, F.softplus(self.rho) ** 2)
        return mean + variance.sqrt() * (1.0 if self.training else 0.0)


class Noisy(nn.Module):
    """A linear layer with noise on its weights in training (NoisyNet)."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.randn(fan_out, fan_in)), nn.Parameter(torch.rand(fan_out, fan_in))
        self.register_buffer("noise_in", torch.randn(fan_in))
        self.register_buffer("noise_out", torch.randn(fan_out))

    def forward(self, x):
        noise = torch.outer(self.noise_out, self.noise_in)
        return F.linear(x, self.mean + self.scale * noise if self.training else self.mean)


class FurtherMaximum(nn.Module):
    """The largest of a width, and in training a second one, as of noisy scores of experts."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x)
        top = h.max(-1, keepdim=True).values
        if self.training:
            top = top + (h * 2 + 1).max(-1, keepdim=True).values
        return self.last(h) + top


def between(layer):
    return lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), layer(16, 12), nn.ReLU(), nn.Linear(12, 3))


MODELS = {
    "a number of training": NoiseOfASize, "a centre": Centred, "a codebook": Codebook, "an assigned codebook": AssignedCodebook,
    "a queue": Queue, "a further maximum": FurtherMaximum, "random weights": between(Sampled), "noisy weights": between(Noisy),
    "power iterations": between(lambda *sizes: parametrizations.spectral_norm(nn.Linear(*sizes))),
}  # fmt: skip


def helped(cls):
    """A class of which the forward calls a helper that does everything."""
    return type(f"Helped{cls.__name__}", (cls,), {"helper": cls.forward, "forward": lambda self, x: self.helper(x)})


MODELS |= {f"{name}, in a helper": helped(cls) for name, cls in MODELS.items() if isinstance(cls, type)}
MODELS["noisy weights, in a helper"] = between(helped(Noisy))


def outcome(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Two outputs in a row on a copy: the second shows what the first has written."""
    model = copy.deepcopy(model).train(training)
    with torch.no_grad():
        return [model(x), model(x)]


@pytest.mark.parametrize("name", MODELS)
def test_gated_equals_exported_in_both_modes(name):
    torch.manual_seed(0)
    model, x = non_trivial(MODELS[name]()).eval(), torch.randn(4, 5)
    space = dmscale.trace(model, x)
    assert space.dimensions and not space.trace.notes
    for seed in range(4):
        structure = space.sample(seed)
        small = space.export(structure)
        for training in (False, True):
            if name == "power iterations" and training:
                small.train()(x)  # it iterates from other vectors
                continue
            got, expected = outcome(small, x, training), outcome(space.gate(structure), x, training)
            assert difference(got, expected) <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_search_trains_what_writes_in_training(name):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(4, 5)
    search = dmscale.Search(dmscale.trace(model, x), "60% params", steps=6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    search.attach(optimizer)
    search.model.train()
    for _ in range(6):
        search.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small = search.export().train()
    small(x).square().mean().backward()
    gradients = [p.grad for p in small.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("layer", [nn.Linear, partial(nn.Conv1d, kernel_size=1)])
def test_an_export_of_a_model_in_training_mode_does_not_iterate(layer):
    """To look at the weight of a layer with spectral norm is to iterate once more, in training mode."""
    torch.manual_seed(0)
    norm = parametrizations.spectral_norm
    model = nn.Sequential(norm(layer(5, 16)), nn.ReLU(), norm(layer(16, 12)), nn.ReLU(), layer(12, 3)).train()
    space = dmscale.trace(model, torch.randn(4, 5) if layer is nn.Linear else torch.randn(4, 5, 6))
    assert len(space.dimensions) == 2
    before = {name: b.clone() for name, b in model.named_buffers()}
    small = space.export(space.full())
    assert all(torch.equal(b, before[name]) for m in (model, small) for name, b in m.named_buffers())
    for seed in range(4):
        space.export(space.sample(seed))


class Momentum(nn.Module):
    """Two encoders of which one follows the other, in training: they have one shape."""

    def __init__(self, always=False):
        super().__init__()
        self.query, self.key = (nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.always = always

    def forward(self, a, b):
        if self.training or self.always:
            with torch.no_grad():
                for p, q in zip(self.query.parameters(), self.key.parameters()):
                    q.mul_(0.9).add_(p, alpha=0.1)
        return F.cosine_similarity(self.query(a), self.key(b))


def test_an_encoder_that_follows_another_one_keeps_its_shape():
    torch.manual_seed(0)
    inputs = torch.randn(4, 5), torch.randn(4, 5)
    space = dmscale.trace(Momentum(), inputs)
    for seed in range(4):
        small = space.export(space.sample(seed)).train()
        small(*inputs)
        assert [p.shape for p in small.query.parameters()] == [p.shape for p in small.key.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_parameters_that_a_forward_writes_to_are_not_the_users(training):
    torch.manual_seed(0)
    model, inputs = Momentum(always=True).train(training), (torch.randn(4, 5), torch.randn(4, 5))
    before = copy.deepcopy(model.state_dict())
    space = dmscale.trace(model, inputs)
    space.export(space.sample(0))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# -- which models take a second run -----------------------------------------------------------------------------------


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.checkpointing = 0.1, False


class AsksForANumber(Asks):
    def forward(self, x):
        return F.dropout(x, self.p if self.training else 0.0, self.training)


class AsksAndMore(Asks):
    def forward(self, x):
        if self.checkpointing and self.training:
            return x * 2
        return x


class AsksInAHelper(Asks):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        return x + torch.ones(self.p) if self.training else x


class AsksForARate(Asks):
    def forward(self, x):
        return x if not self.training or self.p <= 0.0 else x * 2


def twice(x, p, training=False):
    return x * 2 if training and p > 0 else x


def handed_on(x, mode, rate=0.1):
    return twice(x, rate, training=mode)


class HandsItOn(Asks):
    def forward(self, x):
        return handed_on(x, self.training, self.p)


class HandsItToAMethod(Asks):
    def forward(self, x):
        return self.inner(x, self.training)

    def inner(self, x, mode):
        return x * 2 if mode else x


class HandsItOnToTrain(Asks):
    """As where heads are made anew: which mode it is makes no difference to the forward."""

    def reset(self):
        self.inner = nn.Identity().train(self.training)
        self.other.train(self.inner.training)

    def forward(self, x):
        return x


class HandsItOnAndAsks(HandsItOnToTrain):
    def forward(self, x):
        self.inner.train(self.training)
        return x * 2 if self.training else x


def without(asks):
    asks.p = 0.0
    return asks


@pytest.mark.parametrize(
    ("model", "differs"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()), False), (AsksForANumber(), False),
        (AsksAndMore(), False), (AsksInAHelper(), True), (Centred(), True), (between(Noisy)(), True),
        (AsksForARate(), True), (without(AsksForARate()), False), (HandsItOn(), True), (without(HandsItOn()), False),
        (HandsItToAMethod(), True), (HandsItOnToTrain(), False), (HandsItOnAndAsks(), True),
    ],
)  # fmt: skip
def test_a_branch_on_training_that_may_be_taken_asks_for_a_second_run(model, differs):
    assert differs_in_training(model.modules()) == differs


def test_a_mode_that_is_handed_on_to_train_is_known_without_the_source(monkeypatch):
    monkeypatch.setattr(modes, "syntax", lambda function: None)  # what has none is taken to differ
    assert not differs_in_training([HandsItOnToTrain()]) and differs_in_training([HandsItOnAndAsks()])


def test_what_else_a_branch_asks_for_is_asked_of_the_module():
    model = AsksAndMore()
    model.checkpointing = True
    assert differs_in_training([model])


def test_what_has_no_source_is_taken_to_differ():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x if self.training else -x", namespace)
    assert differs_in_training([namespace["Made"]()])


class Kept(nn.Module):
    """Biases that evaluation keeps, as LeViT does, and whatever else its helper does in training."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.last, self.kept, self.forwards = nn.Linear(5, width), nn.Linear(width, 3), {}, 0
        self.table = nn.Parameter(torch.randn(10, width))
        self.register_buffer("rows", torch.tensor([3, 1, 3, 7]))

    def forward(self, x):
        Kept.forwards += 1
        return self.last(self.first(x) + self.biases(x))

    def biases(self, x):
        if self.training:
            return self.table[self.rows]
        if "of" not in self.kept:
            self.kept["of"] = self.table[self.rows]
        return self.kept["of"]


class KeptOfAnother(Kept):
    """In training it gives what has other axes."""

    def __init__(self):
        super().__init__()
        self.aside = nn.Linear(5, 16)

    def biases(self, x):
        return self.aside(x) if self.training else self.table[self.rows]


class KeptInTraining(Kept):
    """Training leaves something behind that the forward takes."""

    def __init__(self):
        super().__init__()
        self.more = None

    def forward(self, x):
        biases = self.biases(x)
        return super().forward(x) + (0 if self.more is None else self.more.sum() * biases.mean())

    def biases(self, x):
        if self.training:
            self.more = x * torch.ones(5)
        return self.table[self.rows]


class KeptByAnother(Kept):
    """It is the mode of another module that it asks for."""

    def biases(self, x):
        return self.table[self.rows] * self.first.weight.sum(1) if self.last.training else self.table[self.rows]


class KeptUnderAName(Kept):
    """What it gives is of no known form."""

    def forward(self, x):
        Kept.forwards += 1
        return self.last(self.first(x) + self.named(x)["of"])

    def named(self, x):
        return {"of": self.table[self.rows] if self.training else self.table[self.rows] * 1}


class KeptTwice(Kept):
    """A helper calls another one, which is called in training only."""

    def biases(self, x):
        return self.again() if self.training else self.table[self.rows]

    def again(self):
        return self.table[self.rows] if self.training else self.table[:4]


class KeptBeforeMeans(Kept):
    """A mean in training comes before that of evaluation, which a gate finds by its number."""

    def forward(self, x):
        Kept.forwards += 1
        h = self.first(x)
        return self.last(h + self.biases(h)) + h.mean(-1, keepdim=True)

    def biases(self, h):
        return self.table[self.rows] * (h.mean(0) / h.mean(0)) if self.training else self.table[self.rows]


class KeptInPart(Kept):
    """Stochastic depth: products with plain numbers, in training alone."""

    def biases(self, x):
        return self.table[self.rows].div(0.5).mul(0.5) if self.training else self.table[self.rows]


@pytest.mark.parametrize(
    ("cls", "runs"),
    [(Kept, 1), (KeptTwice, 1), (KeptInPart, 1), (KeptBeforeMeans, 2), (KeptOfAnother, 2), (KeptInTraining, 2),
     (KeptByAnother, 2), (KeptUnderAName, 2)],
)  # fmt: skip
def test_a_helper_alone_runs_in_both_modes_where_that_tells_all(cls, runs):
    torch.manual_seed(0)
    model, x = non_trivial(cls()).eval(), torch.randn(4, 5)
    state = {k: v for k, v in vars(model).items() if k != "kept"}
    Kept.forwards = 0
    space = dmscale.trace(model, x, verify=False)
    assert Kept.forwards == runs and {k: v for k, v in vars(model).items() if k != "kept"} == state
    assert "first" in space.dimensions or cls in (KeptOfAnother, KeptBeforeMeans)
    for seed in range(4):
        structure = space.sample(seed)
        for training in (False, True):
            small, gated = outcome(space.export(structure), x, training), outcome(space.gate(structure), x, training)
            assert difference(small, gated) <= 1e-4


class SoftmaxBefore(nn.Module):
    """A softmax over other axes comes first in training: which call is the first depends on the mode."""

    def __init__(self):
        super().__init__()
        self.first, self.aside, self.last = nn.Linear(5, 16), nn.Linear(5, 12), nn.Linear(16, 3)

    def forward(self, x):
        h, aside = self.first(x), self.aside(x)
        if self.training:
            h = h * aside.softmax(-1).sum(-1, keepdim=True)
        return self.last(h.softmax(-1)) + aside[:, :3]


def test_a_call_that_is_another_one_in_training_is_not_gated():
    torch.manual_seed(0)
    model, x = SoftmaxBefore().eval(), torch.randn(4, 5)
    space = dmscale.trace(model, x)
    assert "first" not in space.dimensions
    for seed in range(2):
        space.export(space.sample(seed))
