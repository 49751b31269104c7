"""Saving and loading: round trips, errors that name the misfit, files that are whole or absent, no need of dmscale."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import NETS, non_trivial, outputs
from torch import nn

import dmscale
from dmscale import DmscaleError, ExportError, storage


def factory(name):
    def make():
        return NETS[name]()[0]

    return make


def exported(name, seed=1):
    """(space, structure, exported model)."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    over = dmscale.trace(non_trivial(model), inputs)
    structure = over.sample(seed=seed)
    return over, structure, over.export(structure)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [1, 4])
def test_a_saved_model_loads_into_a_fresh_one(name, seed, tmp_path):
    """Another instance, with weights of its own, becomes the saved one; a plan of widths, heads and depth at once."""
    over, structure, small = exported(name, seed)
    path = tmp_path / "small.safetensors"
    dmscale.save(small, path, structure)
    torch.manual_seed(99)
    again = dmscale.load(path, factory(name)).eval()
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(again, over.example_inputs), outputs(small, over.example_inputs))
    )
    for (n, a), (m, b) in zip(again.state_dict().items(), small.state_dict().items()):
        assert n == m and torch.equal(a, b)
    assert storage.structure_of(path) == structure
    shared = [n for n, _ in small.named_parameters(remove_duplicate=False)]
    assert [n for n, _ in again.named_parameters(remove_duplicate=False)] == shared
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())  # ties are kept


def test_a_loaded_model_trains_and_saves_again(tmp_path):
    over, _, small = exported("residual_stack")
    dmscale.save(small, tmp_path / "a.safetensors")
    again = dmscale.load(tmp_path / "a.safetensors", factory("residual_stack"))
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again(over.example_inputs).square().mean().backward()
    optimizer.step()
    dmscale.save(again, tmp_path / "b.safetensors")
    third = dmscale.load(tmp_path / "b.safetensors", factory("residual_stack"))
    assert all(torch.equal(a, b) for a, b in zip(third.state_dict().values(), again.state_dict().values()))
    assert storage.structure_of(tmp_path / "b.safetensors") is None


def test_a_model_that_was_never_cut_is_saved_as_well(tmp_path):
    model = factory("unet")()
    dmscale.save(model, tmp_path / "full.safetensors")
    again = dmscale.load(tmp_path / "full.safetensors", factory("unet"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_half_precision_and_strided_weights_survive(tmp_path):
    torch.manual_seed(0)
    model, inputs = NETS["residual_conv"]()
    model = non_trivial(model).bfloat16().to(memory_format=torch.channels_last)
    over = dmscale.trace(model, inputs.bfloat16())
    small = over.export(over.uniform(0.5))
    dmscale.save(small, tmp_path / "half.safetensors")
    again = dmscale.load(tmp_path / "half.safetensors", lambda: factory("residual_conv")().bfloat16())
    assert {t.dtype for t in again.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), small.state_dict().values()))


# -- misfits ----------------------------------------------------------------------------------------------------------


def test_a_smaller_factory_is_named_with_both_shapes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    over = dmscale.trace(model, torch.randn(2, 8))
    dmscale.save(over.export(over.uniform(0.5)), tmp_path / "small.safetensors")
    with pytest.raises(ExportError) as caught:
        dmscale.load(
            tmp_path / "small.safetensors", lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
        )
    message = str(caught.value)
    assert "'0.weight' has shape (16, 8) in the file, (12, 8) in the factory's model" in message
    assert "'2.weight' has shape (4, 16) in the file, (4, 12)" in message  # all of them, not the first alone
    assert "small.safetensors" in message


def test_missing_and_extra_tensors_are_named(tmp_path):
    _, _, small = exported("mlp")
    dmscale.save(small, tmp_path / "small.safetensors")
    with pytest.raises(ExportError) as caught:
        dmscale.load(
            tmp_path / "small.safetensors",
            lambda: nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4), nn.ReLU(), nn.ReLU()),
        )
    message = str(caught.value)
    assert "'3.weight' is in the file, not in the model" in message
    assert "'1.running_mean' is in the file, not in the model" in message
    with pytest.raises(ExportError, match="'4.weight' is in the model, not in the file"):
        dmscale.load(tmp_path / "small.safetensors", lambda: nn.Sequential(*factory("mlp")(), nn.Linear(4, 4)))


def test_a_factory_of_another_architecture_is_named(tmp_path):
    over, _, _ = exported("residual_stack")
    small = over.export(over.structure({"blocks depth": 2, "blocks.1.up": 7}))
    dmscale.save(small, tmp_path / "small.safetensors")
    for wrong in ("mlp", "unet", "tied_embeddings"):
        with pytest.raises(ExportError, match="blocks"):
            dmscale.load(tmp_path / "small.safetensors", factory(wrong))


def test_a_factory_may_return_the_inputs_too(tmp_path):
    """As the command line's own factories do."""
    _, _, small = exported("mlp")
    dmscale.save(small, tmp_path / "small.safetensors")
    again = dmscale.load(tmp_path / "small.safetensors", NETS["mlp"])
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), small.state_dict().values()))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (nn.Linear(2, 2), "model_factory is a Linear; give a function"),
        (None, "model_factory is a NoneType; give a function"),
        (lambda: None, "model_factory returns a NoneType; it must return a model or"),
        (lambda: ("a", "b"), "model_factory returns a tuple"),
    ],
)
def test_what_is_no_factory_is_named(wrong, says, tmp_path):
    _, _, small = exported("mlp")
    dmscale.save(small, tmp_path / "small.safetensors")
    with pytest.raises(DmscaleError, match=says):
        dmscale.load(tmp_path / "small.safetensors", wrong)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_what_is_no_file_of_ours_is_refused(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DmscaleError, match="x.safetensors cannot be read as safetensors"):
        dmscale.load(path, factory("mlp"))
    with pytest.raises(DmscaleError, match="missing.safetensors cannot be read"):
        dmscale.load(tmp_path / "missing.safetensors", factory("mlp"))


def test_safetensors_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(DmscaleError, match="was not written by dmscale.save"):
        dmscale.load(tmp_path / "x.safetensors", factory("mlp"))


def test_a_file_that_ends_early_is_refused(tmp_path):
    _, _, small = exported("mlp")
    path = tmp_path / "small.safetensors"
    dmscale.save(small, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DmscaleError, match="cannot be read as safetensors"):
        dmscale.load(path, factory("mlp"))


# -- whole or absent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", ["save_file", "replace"])
def test_a_write_that_fails_leaves_the_old_file(fails_at, tmp_path, monkeypatch):
    _, _, small = exported("mlp")
    path = tmp_path / "small.safetensors"
    dmscale.save(small, path)
    old = path.read_bytes()

    def fails(tensors, file, *rest):
        if fails_at == "save_file":
            Path(file).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "save_file", fails) if fails_at == "save_file" else monkeypatch.setattr(
        os, "replace", fails
    )
    with torch.no_grad():
        small[0].weight.zero_()
    with pytest.raises(OSError, match="no space left"):
        dmscale.save(small, path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing half-written is left beside it


def test_saving_makes_the_folder_and_replaces_a_file(tmp_path):
    path = tmp_path / "a" / "b" / "small.safetensors"
    for name in ("mlp", "unet"):
        _, _, small = exported(name)
        dmscale.save(small, path)
    again = dmscale.load(str(path), factory("unet"))
    assert torch.equal(again.head.weight, small.head.weight)


# -- without dmscale --------------------------------------------------------------------------------------------------

READER = """
import importlib.abc, pickle, sys, torch

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dmscale":
            raise ImportError("dmscale is not installed here")

sys.meta_path.insert(0, Blocked())
torch.set_num_threads(1)
folder = sys.argv[1]
x, expected = torch.load(folder + "/expected.pt", weights_only=True)
for small in (torch.load(folder + "/small.pt", weights_only=False), pickle.load(open(folder + "/small.pkl", "rb"))):
    with torch.no_grad():
        assert torch.equal(small(x), expected)
    small.train()(x).sum().backward()
assert not any(name.split(".")[0] == "dmscale" for name in sys.modules)
print("loaded", sum(p.numel() for p in small.parameters()))
"""


def encoder():
    layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 24), encoder, nn.Linear(24, 5)), torch.randn(2, 7, 6)


def convolutions():
    return NETS["conv_chain"]()


@pytest.mark.parametrize("make", [convolutions, encoder])
def test_an_exported_model_loads_where_dmscale_is_not_installed(make, tmp_path):
    """In another process, in which importing dmscale fails; with widths, heads and depth changed."""
    torch.manual_seed(0)
    model, x = make()
    over = dmscale.trace(non_trivial(model), x)
    structure = over.uniform(0.5, depth=True)
    small = over.export(structure).eval()
    torch.save(small, tmp_path / "small.pt")
    (tmp_path / "small.pkl").write_bytes(pickle.dumps(small))
    torch.save((x, outputs(small, x)[0]), tmp_path / "expected.pt")
    (tmp_path / "reader.py").write_text(READER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "reader.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded", str(over.cost(structure).params)]
