"""What users get wrong, or what their models are: a clear error or it simply works, and the model is as it was."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, assert_same, difference, fingerprint, kinds, non_trivial, outputs
from torch import nn

import dmscale
from dmscale import BudgetError, DmscaleError, TraceError, certify
from dmscale.clone import clone

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net(name="mlp"):
    model, inputs = NETS[name]()
    return non_trivial(model), inputs


def refused(model, inputs, error=TraceError):
    """The message with which `trace` refuses; the model must be as it was."""
    before, mode = fingerprint(model), model.training
    with pytest.raises(error) as caught:
        dmscale.trace(model, inputs)
    assert_same(before, fingerprint(model))
    assert model.training == mode
    return str(caught.value)


def works(model, inputs, tolerance=1e-4, budget="60% macs"):
    """Trace, gate, export, one search; the space."""
    before = fingerprint(model)
    space = dmscale.trace(model, inputs)
    for structure in (space.sample(seed=0), space.uniform(0.5)):
        small = space.export(structure)
        assert difference(outputs(small, inputs), outputs(space.gate(structure), inputs)) <= tolerance
    search = dmscale.Search(space, budget, 6)
    assert_same(before, fingerprint(model))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    search.attach(optimizer)
    while not search.done:
        sum(t.float().square().mean() for t in _floats(search.model, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(before, fingerprint(model), values=False)
    search.export()
    return space


def _floats(model, inputs):
    from nets import floats_of, run

    return floats_of(run(model, inputs))


# -- the forward on the example ---------------------------------------------------------------------------------------


class FailsInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(15, 4)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_forward_that_fails_names_the_module():
    message = refused(FailsInside(), torch.randn(2, 8))
    assert "FailsInside.forward failed on example_inputs in module 'blocks.1'" in message
    assert "15" in message and "Check that model(*example_inputs) runs" in message


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(2, 9), (torch.randn(2, 8), torch.randn(2, 8)), {"y": torch.randn(2, 8)}, torch.zeros(2, 8, dtype=torch.long)],
    ids=["shape", "two", "name", "integers"],
)  # fmt: skip
def test_inputs_that_the_forward_cannot_take(inputs):
    message = refused(net()[0], inputs)
    assert "forward failed on example_inputs" in message


@pytest.mark.parametrize(
    "inputs, says",
    [
        ("image.png", "is a str; give a tensor, a tuple"), (3, "is a int"), (None, "is a NoneType"), ((), "hold no tensor"),
        ({}, "hold no tensor"), ((1, 2), "hold no tensor"), ({"x": "a"}, "hold no tensor"),
    ],
)  # fmt: skip
def test_inputs_of_the_wrong_kind(inputs, says):
    assert says in refused(net()[0], inputs)


def test_a_model_of_the_wrong_kind():
    for model in ("resnet50", nn.Linear, lambda x: x, None):
        with pytest.raises(TraceError, match="torch.nn.Module"):
            dmscale.trace(model, torch.randn(2, 8))


def test_a_list_is_a_tuple_of_arguments():
    model, x = net()
    assert kinds(dmscale.trace(model, [x])) == kinds(dmscale.trace(model, x))


def test_a_model_that_cannot_be_copied():
    model, x = net()
    model.lock = threading.Lock()
    lock = model.lock
    with pytest.raises(TraceError, match="Sequential cannot be deep-copied.*lock.*out of the module"):
        dmscale.trace(model, x)
    assert model.lock is lock


def test_an_example_on_another_device():
    message = refused(net()[0], torch.randn(6, 8, device="meta"))
    assert "the model is on cpu and example_inputs on meta" in message and ".to('cpu')" in message


@pytest.mark.gpu
@needs_cuda
def test_an_example_on_the_cpu_for_a_model_on_the_gpu():
    model, x = net()
    message = refused(model.cuda(), x)
    assert "the model is on cuda:0 and example_inputs on cpu" in message


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["residual_conv", "gqa_by_expand", "branch_on_value", "buffers", "unet"])
def test_a_model_on_a_gpu_works(name):
    model, inputs = net(name)
    space = works(model.cuda(), inputs.cuda(), tolerance=1e-3, budget="70% macs")
    small = space.export(space.uniform(0.5))
    assert all(t.is_cuda for t in small.state_dict().values())


# -- networks in which nothing is free --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [nn.Linear(8, 4), nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))],
)
def test_without_a_free_dimension_a_budget_is_refused_with_the_reasons(model):
    space = dmscale.trace(model.eval(), torch.randn(2, 8))
    assert space.dimensions == {}
    assert str(space)  # the empty table can be shown
    assert space.cost().params == sum(p.numel() for p in model.parameters())
    assert torch.equal(space.export(space.full())(torch.ones(2, 8)), model(torch.ones(2, 8)))
    if space.cost().macs:
        with pytest.raises(BudgetError, match="nothing in this model can shrink.*output"):
            dmscale.Search(space, "50% macs", 10)


def test_a_glob_that_matches_nothing_is_named():
    model, x = net("unet")
    for argument in ("freeze", "only"):
        with pytest.raises(DmscaleError, match=rf"{argument}='midle\*' matches no dimension; did you mean 'middle.0'"):
            dmscale.trace(model, x, **{argument: "midle*"})


def test_what_the_user_freezes_stays_and_is_listed():
    model, x = net("unet")
    space = dmscale.trace(model, x, freeze=["middle.0", "down*"])
    assert space.frozen["middle.0"] == space.frozen["down1.0"] == space.frozen["down2.0"] == "frozen by freeze="
    assert not {"middle.0", "down1.0", "down2.0"} & set(space.dimensions) and space.dimensions
    assert set(dmscale.trace(model, x, only="mix*").dimensions) == {"mix1.0", "mix2.0"}


def test_a_structure_of_another_space_is_refused():
    first, x = net("unet")
    second, y = net("residual_conv")
    space = dmscale.trace(second, y)
    with pytest.raises(DmscaleError, match="of another space: it lacks.*it has"):
        space.export(dmscale.trace(first, x).full())
    with pytest.raises(DmscaleError, match="'3 dept' is no dimension of this space; did you mean '3 depth'"):
        space.structure({"3 dept": 2})
    for share in (0, 1.5, -1):
        with pytest.raises(DmscaleError, match=r"not in \(0, 1\]"):
            space.uniform(share)


def test_a_structure_of_another_space_is_refused_by_whatever_takes_one():
    def chain(width):
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, 4))

    x = torch.randn(2, 8)
    space, other = dmscale.trace(chain(32), x), dmscale.trace(chain(16), x).uniform(0.5)
    contradicts = dmscale.Structure({"0": 5, "2": 12}, {"0": (1, 2), "2": tuple(range(12))}, {"0": 32, "2": 12})
    for use in (
        space.cost, space.gate, space.build, space.export, lambda s: space.fit(s, "50% macs"),
        lambda s: space.cost_of_many([space.full(), s]),
    ):  # fmt: skip
        with pytest.raises(DmscaleError, match="another space: it keeps 8 of 16 of '0', whose size is 32 here"):
            use(other)
        with pytest.raises(DmscaleError, match="contradicts itself: it keeps 5 of '0' and lists 2 indices"):
            use(contradicts)
        with pytest.raises(DmscaleError, match=r"expected a Structure, got \{'0': 8\}"):
            use({"0": 8})
    assert len(space.cost_of_many([])) == 0


@pytest.mark.parametrize(
    "sizes, scores, says",
    [
        ({"0": float("nan")}, None, "size of '0' is nan"),
        ({"0": "8"}, None, "size of '0' is '8'"),
        ({"0": 8}, {"0": [1.0, 2.0]}, r"scores of '0' have shape \(2,\); give one an element: \(16,\)"),
        ({"0": 8}, {"0": torch.full((16,), float("nan"))}, "scores of '0' hold NaN"),
        ({"0": 8}, {"0": ["a"] * 16}, "scores of '0' are no numbers"),
        ({"0": 8}, {"layer": [1.0] * 16}, "scores of 'layer': no dimension has such a member"),
    ],
)
def test_sizes_and_scores_that_make_no_structure_are_named(sizes, scores, says):
    space = dmscale.trace(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))
    with pytest.raises(DmscaleError, match=says):
        space.structure(sizes, scores)
    if scores is not None:
        with pytest.raises(DmscaleError, match=says):
            space.fit(space.full(), "50% macs", scores)


def test_scores_may_be_of_any_container_and_type():
    space = dmscale.trace(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))
    scores = torch.arange(16.0)
    for given in (scores, scores.bfloat16(), scores.clone().requires_grad_(), scores.tolist(), scores.numpy()):
        assert space.structure({"0": 2}, {"0": given}).kept["0"] == (14, 15)


def test_a_share_and_a_budget_are_not_confused():
    space = dmscale.trace(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))
    with pytest.raises(DmscaleError, match="for a budget use uniform_at"):
        space.uniform("50% macs")
    with pytest.raises(BudgetError, match=r"for a share of every width use uniform\(0.5\)"):
        space.uniform_at(0.5)


def test_dimensions_are_frozen_later_by_name_or_glob():
    def chain():
        return dmscale.trace(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)),
            torch.randn(2, 8),
        )

    for names in ("0", ["0"], "[01]", ("0", "4")):  # the last is frozen already
        space = chain()
        space.freeze(names, "by hand")
        assert set(space.dimensions) == {"2"} and space.frozen["0"] == "by hand"
    space = chain()
    for wrong, says in [("00", "freeze='00' matches no dimension"), (["0", 3], "freeze holds 3")]:
        with pytest.raises(DmscaleError, match=says):
            space.freeze(wrong, "by hand")
        assert set(space.dimensions) == {"0", "2"}  # nothing is frozen then
    with pytest.raises(DmscaleError, match="reason is ''"):
        space.freeze("0", "")


@pytest.mark.parametrize(
    "asked, says",
    [
        (dict(multiple=0), "multiple=0: give a whole number"),
        (dict(minimum=-1), "minimum=-1: give a whole number"),
        (dict(multiple=8.0), "multiple=8.0"),
        (dict(multiple=True), "multiple=True"),
        (dict(minimum="8"), "minimum='8'"),
        (dict(multiple=None), "multiple=None"),
        (dict(minimum={"0": -2}), r"minimum=\{'0': -2\}"),
        (dict(multiple={"lyer": 8}), "multiple='lyer' matches no dimension; did you mean 'layer'"),
        (dict(minimum={"lyer": 8}), "minimum='lyer' matches no dimension; did you mean 'layer'"),
        (dict(freeze=5), "freeze holds 5"),
        (dict(only=["layer", 3]), "only holds 3"),
    ],
)
def test_a_wrong_argument_of_trace_is_named(asked, says):
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(8, 16))
    model.add_module("head", nn.Linear(16, 4))
    with pytest.raises(DmscaleError, match=says):
        dmscale.trace(model, torch.randn(2, 8), **asked)


def test_a_bound_on_what_it_has_no_effect_on_is_refused():
    model, x = net("residual_stack")
    with pytest.raises(DmscaleError, match="minimum='blocks depth' matches depth only; it bounds width and heads"):
        dmscale.trace(model, x, minimum={"blocks depth": 2})
    assert dmscale.trace(model, x, minimum={"blocks*": 2}).dimensions["blocks.1.up"].minimum == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dmscale": 1}', "null"])
def test_what_is_no_structure_is_refused(text):
    with pytest.raises(DmscaleError, match="not a structure"):
        dmscale.Structure.from_json(text)


def test_a_structure_of_a_newer_version_is_refused():
    with pytest.raises(DmscaleError, match="version 99.*update"):
        dmscale.Structure.from_json('{"dmscale": 99, "dimensions": {}, "kept": {}}')


# -- models that are unusual but right --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual_conv", "mlp", "unet", "conv_gru"])
def test_a_batch_of_one_under_batchnorm_traces(name):
    """`trace` and `export` run in evaluation mode, also for a model in training mode."""
    model, inputs = net(name)
    inputs = inputs[:1]
    before = fingerprint(model.train())
    space = dmscale.trace(model, inputs)
    structure = space.uniform(0.5)
    small = space.export(structure)
    assert_same(before, fingerprint(model))
    assert small.training and all(m.training for m in small.modules())
    assert difference(outputs(small.eval(), inputs), outputs(space.gate(structure).eval(), inputs)) <= 1e-4


@pytest.mark.parametrize("name", ["shared_parameter", "tied_embeddings", "called_twice"])
def test_a_shared_parameter_stays_shared(name):
    model, inputs = net(name)
    works(model, inputs, budget="70% params")
    space = dmscale.trace(model, inputs)
    small = space.export(space.uniform(0.5))
    shared = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    again = {n for n, _ in small.named_parameters(remove_duplicate=False)} - {n for n, _ in small.named_parameters()}
    assert shared == again and (shared or name == "called_twice")
    assert space.cost(space.uniform(0.5)).params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["residual_conv", "residual_stack", "gqa_by_expand", "group_norm", "own_rms_norm"])
def test_half_precision_works(name, dtype):
    """The exported model equals the gated one to some units in the last place, and keeps its dtype."""
    model, inputs = net(name)
    wide = dmscale.trace(copy.deepcopy(model), inputs)
    model, inputs = model.to(dtype), inputs.to(dtype)
    before = fingerprint(model)
    space = dmscale.trace(model, inputs)
    assert space.dimensions.keys() == wide.dimensions.keys()  # nothing is frozen for its rounding
    for structure in (space.sample(seed=0), space.uniform(0.5)):
        small = space.export(structure)
        assert {p.dtype for p in small.parameters()} == {dtype}
        error = difference(
            [t.float() for t in outputs(small, inputs)], [t.float() for t in outputs(space.gate(structure), inputs)]
        )
        assert error <= 16 * torch.finfo(dtype).eps
    assert space.cost().bytes == 2 * space.cost().params
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_export_does_not_hide_behind_the_rounding_of_half_precision(dtype, monkeypatch):
    model, inputs = net("residual_conv")
    space = dmscale.trace(model.to(dtype), inputs.to(dtype))
    build = space.build

    def wrong(structure, *args):
        small = build(structure, *args)
        with torch.no_grad():
            next(small.parameters()).mul_(1.02)
        return small

    monkeypatch.setattr(space, "build", wrong)
    structure = space.uniform(0.5)
    assert certify.compare(space.gate(structure), wrong(structure), inputs.to(dtype)) <= certify.tolerance(model)
    with pytest.raises(dmscale.ExportError, match="differs from the gated one.*allowed 1e-04.*report"):
        space.export(structure)


def test_a_search_in_half_precision():
    model, inputs = net("residual_stack")
    works(model.bfloat16(), inputs.bfloat16(), tolerance=0.1)


def test_autocast_works():
    model, inputs = net("residual_conv")
    with torch.autocast("cpu", torch.bfloat16):
        works(model, inputs, tolerance=0.2)


def test_double_precision_works():
    model, inputs = net("gqa_native")
    works(model.double(), inputs.double(), tolerance=1e-7)  # masks are of float32


def test_frozen_parameters_stay_frozen():
    model, inputs = net("residual_stack")
    model.stem.requires_grad_(False)
    space = works(model, inputs)
    small = space.export(space.uniform(0.5))
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {"stem.weight", "stem.bias"}


def test_a_model_without_elements_is_traced():
    """On the meta device there is nothing to compare; costs and structures are exact all the same."""
    model, inputs = net("residual_stack")
    expected = dmscale.trace(model, inputs)
    space = dmscale.trace(copy.deepcopy(model).to("meta"), inputs.to("meta"))
    assert kinds(space) == kinds(expected)
    assert space.cost() == expected.cost()
    structure = space.sample(seed=1)
    assert space.cost(structure) == expected.cost(expected.sample(seed=1))
    small = space.export(structure)
    assert sum(p.numel() for p in small.parameters()) == space.cost(structure).params


def test_a_model_without_elements_takes_an_example_with_elements():
    """Ids, say, at which a forward looks."""
    model, inputs = net("residual_stack")
    empty = copy.deepcopy(model).to("meta")
    assert kinds(dmscale.trace(empty, inputs)) == kinds(dmscale.trace(empty, inputs.to("meta")))


def test_a_model_without_elements_whose_forward_looks_at_them_is_refused():
    message = refused(Looks().to("meta"), torch.randn(3, 8))
    assert "Looks.forward failed" in message and "on 'meta' a forward has no values to look at" in message


class Looks(nn.Module):
    """Does something else where its input is large."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.up(x)
        return self.down(y if y.max() < 100 else y / 100)


class WithHooks(nn.Module):
    """Hooks, a weight norm and an attribute that is a tensor: what a user's model may carry already."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.seen = []
        self.constant = torch.randn(1)
        self.stem.register_forward_hook(lambda module, args, out: out * 2)

    def forward(self, x):
        return self.head(self.stem(x).relu()) + self.constant


def test_the_users_own_hooks_stay_and_run():
    works(WithHooks(), torch.randn(3, 8))


class HoldsHandles(nn.Module):
    """Keeps the handles of its hooks, that of a module which comes later among them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.calls = nn.Linear(8, 16), nn.Linear(16, 4), []
        self.stem.handles = [
            self.stem.register_forward_hook(lambda module, args, out: self.calls.append("stem")),
            self.head.register_forward_hook(lambda module, args, out: self.calls.append("head"), always_call=True),
            self.head.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True),
        ]

    def forward(self, x):
        return self.head(self.stem(x).relu())


def test_handles_of_hooks_that_a_module_keeps_are_those_of_its_copy():
    model, x = HoldsHandles(), torch.randn(3, 8)
    assert kinds(works(model, x)) == {("width", 16): 1}
    once = clone(model)
    twice = copy.deepcopy(clone(once))
    for handle in twice.stem.handles:
        handle.remove()
    for net, hooks in ((twice, 0), (once, 3 + 2), (model, 3 + 2)):  # two are noted again: how they are to be called
        places = [d for m in (net.stem, net.head) for n, d in vars(m).items() if n.startswith("_forward")]
        assert sum(map(len, places)) == hooks


def test_inference_and_no_grad_contexts_do_not_disturb():
    model, inputs = net("residual_conv")
    with torch.no_grad():
        space = dmscale.trace(model, inputs)
    search = dmscale.Search(space, "60% macs", 2)
    F.mse_loss(search.model.train()(inputs), torch.zeros(4, 5)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_random_numbers_are_left_alone(training):
    """Dropout in the model, and the trial of every dimension, must not move the user's generator."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4)).train(training)
    state = torch.random.get_rng_state()
    space = dmscale.trace(model, torch.ones(3, 8))
    space.export(space.sample(seed=1))
    space.export(space.uniform(0.5))
    assert torch.equal(state, torch.random.get_rng_state())


# -- models with a state of their own ---------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Two hidden layers; what happens between them is up to `inner`."""

    def __init__(self):
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.hidden(self.inner(self.stem(x).relu())).relu())

    def inner(self, h):
        return h


class Remembers(Trunk):
    """Counts its calls, keeps tensors in attributes and lists, moves and replaces buffers."""

    def __init__(self):
        super().__init__()
        self.calls, self.history, self.last, self.running = 0, [], None, torch.ones(3)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("moved", torch.zeros(16))

    def inner(self, h):
        self.calls += 1
        self.history.append(h.shape)
        self.running.mul_(0.5)
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.moved = 0.9 * self.moved + 0.1 * h.detach().mean(0)
        h = h if self.last is None else h + self.last
        self.last = h.detach()
        return h + self.mean + self.moved * self.running.sum()


def test_a_forward_that_changes_its_module_leaves_the_users_alone():
    """Trace, trial, gate and verification run on copies; an exported model begins where the user's stands."""
    model, x = non_trivial(Remembers()), torch.randn(3, 8)
    before, running = fingerprint(model), model.running.clone()
    space = dmscale.trace(model, x)
    assert kinds(space) == {("width", 16): 1, ("width", 12): 1}
    for structure in (space.sample(seed=0), space.uniform(0.5)):
        small = space.export(structure)
        assert (small.calls, small.history, small.last) == (0, [], None) and torch.equal(small.running, running)
        assert_same(before, fingerprint(model))
        assert (model.calls, model.history, model.last) == (0, [], None) and torch.equal(model.running, running)
        gated = dmscale.trace(copy.deepcopy(model), x).gate(structure)
        for _ in range(2):  # state of their own, alike
            assert difference(outputs(small, x), outputs(gated, x)) <= 1e-4
            gated.running, small.running = running.clone(), running.clone()


# -- shapes and branches that depend on data --------------------------------------------------------------------------


class PicksRows(Trunk):
    def inner(self, h):
        return h[(h.sum(1) > 0).nonzero()[:, 0]]


class PicksColumns(Trunk):
    def inner(self, h):
        columns = (h.sum(0) > 0).nonzero()[:, 0]
        return torch.zeros_like(h).index_copy(1, columns, h[:, columns])


def test_shapes_that_depend_on_data():
    """Rows may be picked by what they hold; channels that are picked so stay as they are."""
    x = torch.randn(6, 8)
    assert kinds(works(non_trivial(PicksRows()), x)) == {("width", 16): 1, ("width", 12): 1}
    space = works(non_trivial(PicksColumns()), x)
    assert kinds(space) == {("width", 12): 1} and space.frozen["stem"]


class FirstChannel(Trunk):
    def inner(self, h):
        return h * (h[:, :1] + h[:, 3].unsqueeze(1)).sigmoid()


def test_a_layer_whose_outputs_are_taken_by_number_is_listed():
    space = works(non_trivial(FirstChannel()), torch.randn(3, 8))
    assert kinds(space) == {("width", 12): 1} and "selected by index" in space.frozen["stem"]


class Controlled(Trunk):
    def forward(self, x, mode, extra=None, *, double=False, sizes=()):
        h = self.stem(x)
        h = {"relu": torch.relu, "tanh": torch.tanh}[mode](h) * (2 if double else 1)
        assert extra is None and len(sizes) in (0, 2)
        return self.head(self.hidden(h).relu())


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(3, 8), "tanh"), (torch.ones(3, 8), "relu", None),
        {"x": torch.ones(3, 8), "mode": "relu", "extra": None, "double": True, "sizes": (3, 8)},
    ],
)  # fmt: skip
def test_arguments_that_are_no_tensors(inputs):
    assert kinds(works(non_trivial(Controlled()), inputs)) == {("width", 16): 1, ("width", 12): 1}


class ReadsValues(Trunk):
    def inner(self, h):
        return h * float(h.detach().numpy().mean())


def test_what_python_makes_of_the_elements_cannot_be_followed():
    space = works(non_trivial(ReadsValues()), torch.randn(3, 8))
    assert kinds(space) == {("width", 12): 1}
    assert "read by Python in the model (numpy)" in space.frozen["stem"]


# -- operators of one's own -------------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class OwnFunction(Trunk):
    def inner(self, h):
        return Square.apply(h)


def test_an_autograd_function_is_what_it_runs():
    assert kinds(works(non_trivial(OwnFunction()), torch.randn(3, 8))) == {("width", 16): 1, ("width", 12): 1}


@torch.library.custom_op("dmscale_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("dmscale_tests::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@thrice.register_fake
def _(x):
    return torch.empty_like(x)


for _operator, _factor in ((twice, 2), (thrice, 3)):
    _operator.register_autograd(lambda ctx, grad, factor=_factor: grad * factor)


class OwnOperator(Trunk):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def inner(self, h):
        return getattr(torch.ops.dmscale_tests, self.operator)(h)


@pytest.mark.parametrize("operator", ["twice", "thrice"])
def test_a_registered_operator_freezes_what_passes_through_it(operator):
    """With and without an implementation for tensors that have no elements; a rule for it frees the axis."""
    space = works(non_trivial(OwnOperator(operator)), torch.randn(3, 8))
    assert kinds(space) == {("width", 12): 1}
    assert space.frozen["stem"] == f"no rule for the operator in the model ({operator})"
    assert "register a rule" in str(space)


def test_a_rule_for_a_registered_operator_frees_the_axis(monkeypatch):
    from dmscale.rules import RULES

    monkeypatch.setitem(RULES, torch.ops.dmscale_tests.thrice.default, lambda trace, out, x: trace.dims(x))
    space = works(non_trivial(OwnOperator("thrice")), torch.randn(3, 8))
    assert kinds(space) == {("width", 16): 1, ("width", 12): 1}


# -- weights of other kinds -------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """Weights as integers with a scale for each row, as buffers."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_weights_of_integers_shrink():
    model = Trunk()
    model.hidden = Int8Linear(model.hidden)
    space = works(model, torch.randn(3, 8))
    assert kinds(space) == {("width", 16): 1, ("width", 12): 1}
    small = space.export(space.uniform(0.5))
    assert small.hidden.weight.shape == (6, 8) and small.hidden.weight.dtype == torch.int8


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_are_refused_with_the_remedy():
    quantised = torch.ao.quantization.quantize_dynamic(Trunk().eval(), {nn.Linear}, torch.qint8)
    with pytest.raises(TraceError, match="packed by quantisation.*'stem'.*trace the float model"):
        dmscale.trace(quantised, torch.randn(3, 8))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.hidden = (nn.Linear(n, m, dtype=torch.complex64) for n, m in ((8, 16), (16, 12)))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        z = torch.fft.fft(x, dim=0) * torch.exp(1j * x)
        return self.head(self.hidden(self.stem(z)).abs())


def test_complex_weights_shrink():
    space = works(non_trivial(Complex()), torch.randn(3, 8))
    assert kinds(space) == {("width", 16): 1, ("width", 12): 1}
    structure = space.uniform(0.5)
    assert space.cost(structure).bytes == sum(
        p.numel() * p.element_size() for p in space.export(structure).parameters()
    )


class Empty(Trunk):
    """A parameter and a layer without elements, joined to what has some."""

    def __init__(self):
        super().__init__()
        self.rows, self.none = nn.Parameter(torch.zeros(0, 16)), nn.Linear(16, 0)

    def inner(self, h):
        h = torch.cat([h, self.rows])
        return torch.cat([h, self.none(h)], 1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_dimensions_of_size_zero_stay():
    assert kinds(works(Empty(), torch.randn(3, 8))) == {("width", 16): 1, ("width", 12): 1}


def test_an_example_without_elements_is_refused():
    assert "hold no element (shape (0, 8)); give at least one example" in refused(net()[0], torch.randn(0, 8))


def test_layers_without_a_shape_are_refused():
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(TraceError, match=r"module '0' \(LazyLinear\) is lazy.*call model\(\*example_inputs\) once"):
        dmscale.trace(model, torch.randn(3, 8))
    model(torch.randn(3, 8))
    assert kinds(works(model, torch.randn(3, 8))) == {("width", 16): 1}


def test_tensors_of_inference_mode():
    """As inputs they do; as weights they can neither be trained nor masked; around a trace the mode does not matter."""
    with torch.inference_mode():
        x, model = torch.randn(3, 8), Trunk()
    works(Trunk(), x.clone())
    space = dmscale.trace(Trunk(), x)
    assert kinds(space) == {("width", 16): 1, ("width", 12): 1}
    assert "weight of module 'stem' was made under torch.inference_mode" in refused(model, x)
    plain = Trunk()
    with torch.inference_mode():
        inside = dmscale.trace(plain, x)
        assert not any(p.is_inference() for p in inside.export(inside.uniform(0.5)).parameters())
    assert kinds(inside) == kinds(space)


# -- models in the hands of others ------------------------------------------------------------------------------------


def test_of_a_compiled_model_the_module_inside_is_traced():
    model, x = non_trivial(Trunk()), torch.randn(3, 8)
    space = dmscale.trace(torch.compile(model, backend="eager"), x)
    assert space.model is model and kinds(space) == {("width", 16): 1, ("width", 12): 1}
    assert type(space.export(space.uniform(0.5))) is Trunk


@pytest.mark.parametrize("what", ["a part", "in place"])
def test_a_model_that_is_compiled_in_part_or_in_place(what):
    model, x = non_trivial(Trunk()), torch.randn(3, 8)
    if what == "a part":
        model.hidden = torch.compile(model.hidden, backend="eager")
    else:
        model.compile(backend="eager")
    space = dmscale.trace(model, x)
    assert kinds(space) == {("width", 16): 1, ("width", 12): 1}
    structure = space.uniform(0.5)
    assert difference(outputs(space.export(structure), x), outputs(space.gate(structure), x)) <= 1e-4
    assert (model._compiled_call_impl is not None) == (what == "in place")


def test_wrappers_of_parallel_training_are_refused_with_the_remedy():
    assert "the model is a DataParallel; trace the module inside it (model.module)" in refused(
        nn.DataParallel(Trunk()), torch.randn(3, 8)
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Trunk())
        assert "is a DistributedDataParallel; trace the module inside it" in refused(wrapped, torch.randn(3, 8))
        space = dmscale.trace(wrapped.module, torch.randn(3, 8))
        gated = nn.parallel.DistributedDataParallel(dmscale.Search(space, "60% macs", 2).model)
        gated(torch.randn(3, 8)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_with_the_remedy():
    x = torch.randn(3, 8)
    inside = Trunk()
    inside.hidden = torch.jit.trace(inside.hidden, torch.randn(3, 16))
    for model, where in ((torch.jit.trace(Trunk(), x), "the model"), (inside, "module 'hidden'")):
        with pytest.raises(TraceError, match=f"{where} is a TorchScript module.*use the Python module"):
            dmscale.trace(model, x)


def test_a_graph_module_works():
    assert kinds(works(torch.fx.symbolic_trace(Trunk()), torch.randn(3, 8))) == {("width", 16): 1, ("width", 12): 1}


class Opaque(Trunk):
    def forward(self, x):
        return type("Result", (), {"scores": super().forward(x)})()


class CopiesItself(nn.Module):
    """Says itself how it is pickled, and holds a tensor that was computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)
        self.scale = self.up.weight.norm()

    def __getstate__(self) -> dict:
        return dict(self.__dict__)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x / self.scale).relu())


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_module_has_computed_from_parameters_is_copied_with_it(inside: bool) -> None:
    torch.manual_seed(0)
    model = CopiesItself()
    model = nn.Sequential(nn.Linear(6, 6), model) if inside else model
    space = dmscale.trace(model.eval(), torch.randn(3, 6))
    assert any(name.endswith("up") for name in space.dimensions)
    space.export(space.uniform(0.5))


def test_an_output_in_which_no_tensor_is_found_is_refused():
    message = refused(Opaque(), torch.randn(3, 8))
    assert "Opaque.forward returns a Result in which no tensor is found; return tensors" in message


@pytest.mark.parametrize(
    "short", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_short_memory_is_no_fault_of_a_dimension(monkeypatch, short):
    model, inputs = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(2, 8)
    space = dmscale.trace(model, inputs, verify=False)

    def compare(*args):
        raise short

    monkeypatch.setattr(certify, "compare", compare)
    with pytest.raises(TraceError, match="no memory for the trial of Sequential.*verify=False"):
        dmscale.trace(model, inputs)
    with pytest.raises(dmscale.ExportError, match="no memory to run Sequential gated and exported.*verify=False"):
        space.export(space.uniform(0.5))
    assert space.export(space.uniform(0.5), verify=False)[0].out_features == 16


def half_turned(x):
    return torch.cat((-x[..., 1::2], x[..., ::2]), -1)


def test_a_module_may_hold_a_static_method():
    """`self.turn = staticmethod(turn)`, which Python calls and does not copy (rotary embeddings)."""

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.turn = nn.Linear(4, 8), nn.Linear(8, 2), staticmethod(half_turned)

        def forward(self, x):
            return self.last(self.turn(self.first(x)))

    space = dmscale.trace(Turns().eval(), torch.randn(3, 4))
    small = space.export(space.uniform(0.5))
    assert small(torch.randn(3, 4)).shape == (3, 2) and type(small.turn) is staticmethod


class Elsewhere(nn.Module):
    """Holds parameters where no copy is given others, as tensors in a dict of its own class (TensorDictParams)."""

    class Held:
        def __init__(self, **tensors):
            self.tensors = tensors

        def __deepcopy__(self, memo):
            return type(self)(**{k: nn.Parameter(t.detach().clone()) for k, t in self.tensors.items()})

    def __init__(self):
        super().__init__()
        self.held = self.Held(weight=nn.Parameter(torch.randn(8, 4)))

    @property
    def _parameters(self):
        return self.held.tensors if "held" in self.__dict__ else {}

    @_parameters.setter
    def _parameters(self, value):
        pass

    def forward(self, x):
        return F.linear(x, self.held.tensors["weight"])


def test_parameters_that_no_copy_can_be_given_stay():
    space = dmscale.trace(nn.Sequential(Elsewhere(), nn.Linear(8, 16), nn.Linear(16, 2)).eval(), torch.randn(3, 4))
    assert list(space.dimensions) == ["1"], space.frozen
    assert any("does not hold 0.weight" in reason for reason in space.frozen.values()), space.frozen
