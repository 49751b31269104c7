"""Transformers models of the zoo that need something that no other test has, generation, and their settings."""

from __future__ import annotations

import pytest
import torch
from nets import assert_same, counted_macs, difference, fingerprint, non_trivial, outputs
from torch import nn

import dmscale

transformers = pytest.importorskip("transformers")

from benchmarks.zoo.language import ENTRIES  # noqa: E402

BUILD = {entry.name.removeprefix("hf:"): entry.build for entry in ENTRIES}


def built(name, **settings):
    torch.manual_seed(0)
    model, inputs = BUILD[name]()
    for field, value in settings.items():
        setattr(model.config, field, value)
    return non_trivial(model), inputs


def test_the_zoo_is_large_and_its_names_differ():
    assert len(BUILD) == len(ENTRIES) >= 100


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",  # its layers alternate by a list in the config, which the forward reads by number
        "cohere",  # LayerNorm written out, without a bias
        "deberta",  # and with one
        "nemotron",  # a normalisation whose weight is 1 + w
        "electra",  # removable blocks behind a projection that nothing normalises
        "mixtral",  # experts in one tensor, by a kernel that takes multiples of 16 bytes
    ],
)
def test_all_is_free_and_every_structure_exact(name):
    if name == "deberta":
        from transformers.models.deberta import modeling_deberta

        if isinstance(modeling_deberta.scaled_size_sqrt, torch.jit.ScriptFunction):
            pytest.skip("this transformers hides sizes in TorchScript: its head size is frozen by the trial")
    model, inputs = built(name)
    before = fingerprint(model)
    space = dmscale.trace(model, inputs)
    assert not [why for why in space.frozen.values() if "trial" in why]
    assert "model.layers depth" in space.dimensions or any("depth" in n for n in space.dimensions)
    least = space.structure({n: d.lowest for n, d in space.dimensions.items()})
    assert space.cost(least).params < 0.1 * space.cost().params
    for structure in (space.sample(0), space.sample(2), space.uniform(0.5, depth=True)):
        small = space.build(structure)
        assert difference(outputs(small, inputs), outputs(space.gate(structure), inputs)) <= 1e-4
        assert space.cost(structure).macs == counted_macs(small, inputs)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3"])
def test_experts_go_with_their_rows_of_the_router(name, tmp_path):
    """Routers by softmax before and after the choice, one by one, with biases, in groups; all layers alike, or not."""
    model, inputs = built(name)
    before = fingerprint(model)
    space = dmscale.trace(model, inputs, only="* experts*")
    layers = list(space.dimensions.values())
    assert all(len(d.axes) == 1 for d in layers)  # each layer has a number of its own
    assert len(layers) == (2 if name == "deepseek_v3" else 3)
    assert all((d.kind, d.size, d.lowest) == ("width", 4, 2) for d in layers), space.dimensions
    for structure in (space.sample(0), space.structure({d.name: 2 + i for i, d in enumerate(layers)})):
        small = space.export(structure)
        assert difference(outputs(small, inputs), outputs(space.gate(structure), inputs)) <= 1e-4
        assert space.cost(structure).macs == counted_macs(small, inputs)
    small = space.export(space.structure({d.name: 3 for d in layers}))
    assert small.config.num_local_experts == (6 if name == "deepseek_v3" else 3)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert difference(outputs(again, inputs), outputs(small, inputs)) <= 1e-6
    assert_same(before, fingerprint(model))


def test_entries_of_a_layer_list_go_with_their_layers():
    model, inputs = built("gemma2")
    space = dmscale.trace(model, inputs, only=("*depth",))
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    for kept in ((0, 2), (1, 2), (1,)):
        chosen = space.structure(
            {"model.layers depth": len(kept)}, {"model.layers depth": [i in kept for i in range(3)]}
        )
        small = space.export(chosen)
        assert small.config.layer_types == small.model.config.layer_types == [kinds[i] for i in kept]
        assert small.config.num_hidden_layers == len(small.model.layers) == len(kept)
    assert model.config.layer_types == kinds and model.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_generation_gives_the_same_tokens_with_a_cache_as_without(name):
    model, inputs = built(name)
    space = dmscale.trace(model, inputs)
    (depth,) = (n for n, d in space.dimensions.items() if d.kind == "depth")
    heads = {n: d.size - 1 for n, d in space.dimensions.items() if d.kind == "heads"}
    scores = {depth: [0.0, 1.0, 1.0]}  # the first goes: all others get new numbers
    small = space.export(space.structure({depth: 2, **heads}, scores))
    prompt = inputs["input_ids"][:1, :4]
    found = [
        small.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0)
        for cache in (True, False)
    ]
    assert found[0].shape == (1, 12) and torch.equal(*found)
    assert torch.equal(found[0], _greedy(small, prompt, 8))


@torch.no_grad()
def _greedy(model, tokens, steps):
    for _ in range(steps):
        tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_settings_of_a_uniform_export_describe_it(name, tmp_path):
    model, inputs = built(name)
    before = dict(vars(model.config))
    space = dmscale.trace(
        model, inputs, freeze=("*head_dim*",) if name == "gpt2" else ("*head_dim*", "*heads per group*")
    )
    wanted = {n: d.size // 2 if d.size > 3 else d.size - 1 for n, d in space.dimensions.items()}
    small = space.export(space.structure(wanted))
    assert vars(model.config) == before
    assert small.config.num_hidden_layers == 2
    assert small.config.hidden_size == small.get_input_embeddings().weight.shape[1] == 24
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert difference(outputs(again, inputs), outputs(small, inputs)) <= 1e-6
    factory = BUILD[name]
    dmscale.save(small, tmp_path / "small.safetensors")
    loaded = dmscale.load(tmp_path / "small.safetensors", lambda: factory()[0]).eval()
    assert loaded.config.hidden_size == 24 and loaded.config.num_hidden_layers == 2


class Settings:
    def __init__(self, width=12, hidden=20, layers=3):
        self.width, self.hidden, self.layers = width, hidden, layers


class Inner(nn.Module):
    """Keeps the settings, or not."""

    def __init__(self, config, keeps):
        super().__init__()
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)
        if keeps:
            self.config = config

    def forward(self, x):
        return self.down(self.up(x).relu())


class Around(nn.Module):
    def __init__(self, config, keeps):
        super().__init__()
        self.inner = Inner(config, keeps)

    def forward(self, x):
        return x + self.inner(x)


class FirstKeeps(nn.Module):
    """The first layer is of another kind than those behind it."""

    config_class = Settings

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first, self.last = nn.Linear(5, config.width), nn.Linear(config.width, 3)
        self.layers = nn.ModuleList(Around(config, keeps=i == 0) for i in range(config.layers))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@pytest.mark.parametrize("kept", [(1, 2), (0, 2)])
def test_settings_are_found_where_they_are_once_blocks_have_moved_up(kept):
    torch.manual_seed(0)
    model = FirstKeeps(Settings())
    space = dmscale.trace(model, torch.randn(2, 5))
    sizes = {n: d.size // 2 for n, d in space.dimensions.items() if d.kind == "width"}
    scores = {"layers depth": [float(i in kept) for i in range(3)]}
    small = space.export(space.structure({**sizes, "layers depth": 2}, scores))
    assert vars(small.config) == {"width": 6, "hidden": 10, "layers": 2}
    found = [vars(layer.inner).get("config") for layer in small.layers]
    assert [None if c is None else vars(c) for c in found] == [vars(small.config) if i == 0 else None for i in kept]
    assert vars(model.config) == {"width": 12, "hidden": 20, "layers": 3}


def test_settings_that_cannot_say_what_a_model_is_keep_their_values(tmp_path):
    model, inputs = built("llama")
    space = dmscale.trace(model, inputs)
    (head_dim,) = (n for n in space.dimensions if n.endswith("head_dim"))
    small = space.export(space.structure({head_dim: 2, "model.layers.0.mlp width": 40}))
    # four of eight rotary frequencies are not those of a head of four, and the layers differ in their inner width
    assert small.config.head_dim == 8 and small.config.intermediate_size == 80
    small.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        type(small).from_pretrained(tmp_path)
