"""Models and data by name: what each specification gives, and what each misspelling says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmscale.data import load_data
from dmscale.errors import DmscaleError
from dmscale.evaluate import accuracy, call, check_fit, class_scores, classification_loss
from dmscale.optional import MissingPackageError, require
from dmscale.sources import Source, SourceError, load_model, parse_shape

FACTORY = """
import torch
from helper import WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, WIDTH), torch.nn.Linear(WIDTH, 3)
    def forward(self, x, scale=1.0):
        return self.b(self.a(x).relu()) * scale

def net():
    return Net(), torch.randn(1, 4)
def named():
    return Net(), {"x": torch.randn(1, 4), "scale": torch.ones(1)}
def alone():
    return Net()
def wrong():
    return 3
def inputs_wrong():
    return Net(), [torch.randn(1, 4)]
made = Net()
def sized(width, depth=2):
    return Net()
def broken():
    raise KeyError("no such width")
def data():
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    return [batch, batch], [batch]
def half():
    return [1]
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "helper.py").write_text("WIDTH = 6")
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    yield path
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
    sys.modules.pop("helper", None)


def runs(source):
    source.model.eval()
    with torch.no_grad():
        return class_scores(call(source.model, source.inputs))


def test_parse_shape():
    assert parse_shape("1x3x32x32") == (1, 3, 32, 32)
    assert parse_shape("1,128") == (1, 128)
    for wrong in ("", "3x", "1x-3", "axb", "0x3"):
        with pytest.raises(SourceError, match="1x3x224x224"):
            parse_shape(wrong)


@pytest.mark.parametrize(
    "spec, shape, classes, inputs",
    [
        ("timm:resnet10t", None, None, (1, 3, 176, 176)),
        ("timm:resnet10t", (1, 1, 32, 32), 7, (1, 1, 32, 32)),
        ("timm:test_vit", (1, 3, 64, 64), 7, (1, 3, 64, 64)),
        ("torchvision:squeezenet1_1", None, 7, (1, 3, 224, 224)),
        ("torchvision:lraspp_mobilenet_v3_large", (1, 3, 64, 64), 7, (1, 3, 64, 64)),
    ],
)
def test_image_models_run_on_their_example_inputs(spec, shape, classes, inputs):
    source = load_model(spec, shape=shape, classes=classes)
    assert source.inputs.shape == inputs
    assert runs(source).shape[-1] == (classes or 1000)


def test_torchvision_transformers_are_built_for_the_input_size():
    with torch.device("meta"):  # its weights would take seconds to make
        source = load_model("torchvision:vit_b_32", shape=(1, 3, 64, 64))
    assert source.model.image_size == 64


def test_timm_normalisation_is_the_models_own():
    assert load_model("timm:test_vit").mean == (0.5, 0.5, 0.5)
    assert load_model("timm:resnet10t").mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "spec, says",
    [
        ("timm:resnt10t", "did you mean .*resnet10t"),
        ("timm:zzzzqqq", "list_models"),
        ("torchvision:resnet", "did you mean .*resnet18"),
        ("resnet18", "did you mean timm:resnet18"),
        ("timm:", "a model is missing behind timm:"),
        ("torchvision", "a model is missing behind torchvision:"),
        ("nets.py", "name the function .* as nets.py:make"),
        ("nowhere.py:net", "no file nowhere.py"),
        ("hf:nowhere", "there is no nowhere.*not downloaded"),
        ("small.safetensors", "with --weights FILE"),
        ("model.pt", "a pickled module a file.py:factory that loads it"),
        ("tests", "did you mean hf:tests"),
    ],
)
def test_a_misspelt_model_says_what_to_write(spec, says):
    with pytest.raises(SourceError, match=says) as caught:
        load_model(spec)
    assert spec in str(caught.value)


GPT = dict(model_type="gpt2", n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
VIT = dict(
    model_type="vit", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32,
    image_size=32, patch_size=8,
)  # fmt: skip
T5 = dict(model_type="t5", num_layers=1, d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=50)


@pytest.mark.parametrize(
    "config, architecture, name, shape, outputs",
    [
        (GPT, "GPT2LMHeadModel", "input_ids", (1, 32), (1, 32, 50)),
        (GPT, None, "input_ids", (1, 32), (1, 32, 16)),
        (VIT, "ViTForImageClassification", "pixel_values", (1, 3, 32, 32), (1, 4)),
        (T5, "T5ForConditionalGeneration", "input_ids", (1, 128), (1, 128, 50)),
    ],
)
def test_transformers_configurations(tmp_path, config, architecture, name, shape, outputs):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | ({"architectures": [architecture]} if architecture else {})))
    source = load_model(f"hf:{file}", classes=4)
    assert type(source.model).__name__ == architecture or architecture is None
    assert source.inputs[name].shape == shape
    assert runs(source).shape == outputs


def test_a_transformers_folder_brings_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VIT | {"architectures": ["ViTForImageClassification"]}))
    first = load_model(f"hf:{tmp_path}").model
    first.save_pretrained(tmp_path)
    again = load_model(f"hf:{tmp_path}").model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("config", [{}, GPT | {"architectures": ["GPT2Model"], "n_head": 3}])
def test_a_broken_configuration_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=f"hf:{tmp_path} could not be built"):
        load_model(f"hf:{tmp_path}")


def test_factories(factory):
    assert runs(load_model(f"{factory}:net")).shape == (1, 3)
    assert runs(load_model(f"{factory}:named")).shape == (1, 3)
    assert load_model(f"{factory}:alone", shape=(2, 4)).inputs.shape == (2, 4)


@pytest.mark.parametrize(
    "name, says",
    [
        ("nett", "no function 'nett'; it has Net, net, named"),
        ("torch", "no function 'torch'"),
        ("alone", "--input"),
        ("wrong", "returns int"),
        ("inputs_wrong", "the inputs are a list"),
        ("broken", "could not be built: KeyError"),
        ("made", "made is a Net itself; name a function that makes it"),
        ("sized", r"sized takes arguments \(width\) and is called without any"),
    ],
)
def test_a_wrong_factory_says_what_to_change(factory, name, says):
    with pytest.raises(SourceError, match=says):
        load_model(f"{factory}:{name}")


def test_classes_are_refused_where_they_have_no_effect(factory):
    with pytest.raises(SourceError, match="--classes"):
        load_model(f"{factory}:net", classes=3)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "checkpoint"])
def test_weights_are_loaded(factory, tmp_path, suffix):
    state = {key: torch.full_like(value, 2.0) for key, value in runs_state(f"{factory}:net").items()}
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state if suffix == "pt" else {"model": state, "epoch": 3}, file)
    loaded = load_model(f"{factory}:net", weights=file).model.state_dict()
    assert all((value == 2.0).all() for value in loaded.values())


def runs_state(spec):
    return load_model(spec).model.state_dict()


def test_weights_that_do_not_fit_or_cannot_be_read(factory, tmp_path):
    spec = f"{factory}:net"
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pt").write_text("not a state dict")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, says in [
        ("other.safetensors", "do not fit"),
        ("text.pt", "cannot be read"),
        ("list.pt", "do not fit"),
        ("none.pt", "no file"),
    ]:
        with pytest.raises(SourceError, match=says):
            load_model(spec, weights=tmp_path / name)


@pytest.mark.filterwarnings("error::UserWarning")
def test_weights_of_the_wrong_kind_or_model_are_one_line(factory, tmp_path):
    class Net(torch.nn.Linear):
        pass

    save_file({f"k{i}": torch.zeros(2) for i in range(20)} | {"a.bias": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name, says in [
        ("other.safetensors", "a.weight is missing; b.weight is missing; .*; and 19 more"),
        ("module.pt", r"a whole pickled module say.*torch.save\(model.state_dict\(\)"),
        ("script.pt", "is a TorchScript archive; save the state_dict"),
    ]:
        with pytest.raises(SourceError, match=says) as caught:
            load_model(f"{factory}:net", weights=tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingPackageError, match=r"timm:x needs .*pip install 'dmscale\[timm\]'"):
        require("not_a_package_at_all", "timm", "timm:x")
    with pytest.raises(DmscaleError):
        require("not_a_package_at_all.part", "timm", "timm:x")


def test_an_installed_package_that_fails_to_import_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import its_missing_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="its_missing_dependency"):
        require("half_installed", "timm", "timm:x")


def test_torchvision_imports_in_a_fresh_interpreter():
    code = (
        "from dmscale.sources import allow_missing_torchvision_operators as allow; allow(); allow();"
        "import torchvision, torch; print(hasattr(torch.ops.torchvision, 'nms'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


def test_a_transformers_model_is_built_in_a_fresh_interpreter(tmp_path):
    """Where torchvision does not import, every model of transformers failed with "Could not import module"."""
    (tmp_path / "config.json").write_text(json.dumps(GPT | {"architectures": ["GPT2LMHeadModel"]}))
    code = f"from dmscale.sources import load_model; print(type(load_model('hf:{tmp_path}').model).__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "GPT2LMHeadModel", out.stderr


# Data


def image_source(channels=3, size=16, **kw):
    return Source(torch.nn.Flatten(), torch.randn(1, channels, size, size), **kw)


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_have_the_models_size_and_every_class(channels):
    data = load_data("digits", image_source(channels), batch_size=50)
    x, y = next(iter(data.train))
    assert x.shape == (50, channels, 16, 16) and x.dtype == torch.float32
    assert data.num_classes == 10 and set(torch.cat([y for _, y in data.val]).tolist()) == set(range(10))
    assert len(data.train.dataset) + len(data.val.dataset) == 1797


def test_the_seed_orders_training_and_leaves_the_split():
    def targets(seed):
        data = load_data("digits", image_source(), seed=seed)
        return [torch.cat([y for _, y in part]).tolist() for part in (data.train, data.val)]

    (train, val), again, (other_train, other_val) = targets(0), targets(0), targets(1)
    assert [train, val] == again and val == other_val and train != other_train


def write_images(root, names, count, value):
    from PIL import Image

    for name in names:
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.full((20, 30, 3), value[name], dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")


def test_image_folders_with_and_without_a_split(tmp_path):
    value = {"cat": 0, "dog": 255}
    write_images(tmp_path / "flat", value, 10, value)
    write_images(tmp_path / "split" / "train", value, 4, value)
    write_images(tmp_path / "split" / "val", value, 2, value)
    for name, sizes in (("flat", (18, 2)), ("split", (8, 4))):
        source = image_source(mean=(0.5,) * 3, std=(0.5,) * 3)
        data = load_data(str(tmp_path / name), source, batch_size=2, workers=0)
        assert (len(data.train.dataset), len(data.val.dataset), data.num_classes) == (*sizes, 2)
        for part in (data.train, data.val):
            for x, y in part:
                assert x.shape[1:] == (3, 16, 16)
                # Black cats are -1 after normalisation, white dogs 1: pixels and labels belong together.
                assert torch.allclose(x.mean((1, 2, 3)), y * 2.0 - 1)


def test_validation_images_are_cut_from_the_centre(tmp_path):
    from PIL import Image

    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = 255  # only the central square is white
    for name in "ab":
        (tmp_path / name).mkdir()
        for k in range(10):
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    source = image_source(mean=(0.0,) * 3, std=(1.0,) * 3)
    x, _ = next(iter(load_data(str(tmp_path), source, workers=0).val))
    assert (x == 1).all()


def test_folders_that_cannot_serve_say_why(tmp_path):
    value = {"cat": 0, "dog": 255, "emu": 9}
    write_images(tmp_path / "one", ["cat"], 10, value)
    write_images(tmp_path / "split" / "train", ["cat", "dog"], 2, value)
    write_images(tmp_path / "split" / "val", ["cat", "emu"], 2, value)
    write_images(tmp_path / "bad", ["cat", "dog"], 10, value)
    for file in (tmp_path / "bad").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(SourceError, match="1 classes with 9 training"):
        load_data(str(tmp_path / "one"), image_source())
    with pytest.raises(SourceError, match="emu"):
        load_data(str(tmp_path / "split"), image_source())
    with pytest.raises(SourceError, match="have 1 or 3"):
        load_data(str(tmp_path / "bad"), image_source(channels=4))
    with pytest.raises(SourceError, match="not an image"):
        next(iter(load_data(str(tmp_path / "bad"), image_source(), workers=0).train))
    with pytest.raises(SourceError, match="neither digits"):
        load_data("digit", image_source())


def test_data_of_the_users_own(factory):
    source = load_model(f"{factory}:net")
    data = load_data(f"{factory}:data", source)
    check_fit(source.model, data.val, data.num_classes)
    assert len(data.train) == 2
    with pytest.raises(SourceError, match="train_loader, val_loader"):
        load_data(f"{factory}:half", source)
    with pytest.raises(SourceError, match="takes no images"):
        load_data("digits", source)


# Loss and accuracy


@pytest.mark.parametrize("shape, target", [((6, 5), (6,)), ((2, 7, 5), (2, 7)), ((2, 5, 5, 5), (2, 5, 5))])
def test_loss_and_accuracy_agree_with_a_perfect_and_a_wrong_answer(shape, target):
    labels = torch.randint(5, target)
    right = torch.nn.functional.one_hot(labels, 5).float() * 50
    right = right.movedim(-1, 1) if len(shape) == 4 else right
    assert right.shape == shape

    class Answer(torch.nn.Module):
        def forward(self, x):
            return {"logits": x}

    assert classification_loss((right,), labels) < 1e-3 < 10 < classification_loss(-right, labels)
    assert accuracy(Answer(), [((right,), labels)]) == 1 and accuracy(Answer(), [(-right, labels)]) == 0


def test_evaluation_restores_each_modules_mode():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    model[0].eval()
    accuracy(model, [(torch.randn(2, 4), torch.tensor([0, 1]))])
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_batches_that_do_not_fit_are_refused():
    model = torch.nn.Linear(4, 3)
    for batch, says in [
        ((torch.randn(2, 5), torch.tensor([0, 1])), "cannot be called"),
        ((torch.randn(2, 4), torch.tensor([0, 3])), "3 outputs for 4 classes"),
        ((torch.randn(2, 4), torch.tensor([0, 1, 2])), "do not fit targets"),
        (torch.randn(2, 4), "expected batches"),
    ]:
        with pytest.raises(DmscaleError, match=says):
            check_fit(model, [batch], None)
    for targets, says in [(torch.randn(2), "torch.float32, not class numbers"), (torch.tensor([0, -1]), "a target -1")]:
        with pytest.raises(DmscaleError, match=says):
            check_fit(model, [(torch.randn(2, 4), targets)], None)
    with pytest.raises(DmscaleError, match="no batch"):
        check_fit(model, [], None)
    check_fit(model, [(torch.randn(2, 4), torch.tensor([2, -100]))], None)
