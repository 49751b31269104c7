"""The commands as a user runs them."""

import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import dmscale
from dmscale.cli import app
from dmscale.errors import DmscaleError

NET = """
import torch
from torch import nn

def net():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )
    return model, torch.randn(1, 1, 8, 8)
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    yield f"{path}:net"
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def dmscale_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_every_command():
    result = dmscale_command("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("demo", "trace", "scale"))


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert dmscale_command("--version").output.strip() == f"dmscale {version('dmscale')}"


def test_python_m_dmscale_runs():
    out = subprocess.run([sys.executable, "-m", "dmscale", "--version"], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith("dmscale ")


def test_an_error_is_one_message_and_exit_code_2():
    result = dmscale_command("trace", "timm:resnt10t")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: timm:resnt10t") and "resnet10t" in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_markup_in_a_message_is_shown_as_written():
    assert "[red]x" in dmscale_command("trace", "[red]x").stderr


def test_debug_shows_the_error_itself():
    result = dmscale_command("--debug", "trace", "timm:resnt10t")
    assert isinstance(result.exception, DmscaleError) and result.exit_code == 1


def test_trace_prints_what_the_library_finds(net):
    result = dmscale_command("trace", net)
    assert result.exit_code == 0, result.output
    model, x = namespace_of(NET)["net"]()
    for name in dmscale.trace(model, x).dimensions:
        assert name in result.output


def test_trace_json_is_the_space(net):
    result = dmscale_command("trace", net, "--json")
    model, x = namespace_of(NET)["net"]()
    assert json.loads(result.stdout) == json.loads(json.dumps(dmscale.trace(model, x).to_dict()))


def test_trace_takes_the_input_size(net):
    def macs(*options):
        return cost_of(json.loads(dmscale_command("trace", net, "--json", *options).stdout))

    assert macs("--input", "1x1x16x16") > 3 * macs()


def test_trace_says_which_input_the_model_does_not_take(net):
    result = dmscale_command("trace", net, "--input", "1x5")
    assert result.exit_code == 2 and f"{net} with --input 1x5: " in result.stderr.replace("\n", " ")


def test_what_the_user_left_out_is_one_row_of_the_table():
    model = torch.nn.Sequential(*(torch.nn.Linear(4 + i, 5 + i) for i in range(5)))
    table = str(dmscale.trace(model, torch.randn(2, 4), only="3"))
    assert "1 dimension, 4 frozen" in table and "0 and 2 more" in table and table.count("not named in only=") == 2
    assert "Nothing can shrink" in str(dmscale.trace(torch.nn.Linear(3, 2), torch.randn(1, 3)))


def test_freeze_and_only_choose_dimensions(net):
    def names(*options):
        return set(json.loads(dmscale_command("trace", net, "--json", *options).stdout)["dimensions"])

    every = names()
    assert len(every) == 2
    first = sorted(every)[0]
    assert names("--freeze", first) == every - {first}
    assert names("--only", first) == {first}


def test_scale_writes_a_smaller_network_on_budget(net, tmp_path):
    out = tmp_path / "out"
    result = dmscale_command(
        "scale", net, "--data", "digits", "--budget", "50% macs", "--out", out,
        "--steps", 30, "--epochs", 1, "--lr", 3e-3, "--batch-size", 32, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert report["scaled"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert report["scaled"]["params"] < report["dense"]["params"]
    assert report["scaled"]["accuracy"] > report["dense"]["accuracy"]  # the dense one was never trained

    structure = dmscale.Structure.from_json((out / "structure.json").read_text())
    model, x = namespace_of(NET)["net"]()
    space = dmscale.trace(model, x)
    assert space.cost(structure).macs == report["scaled"]["macs"]
    small = dmscale.load(out / "small.safetensors", lambda: model)
    assert sum(p.numel() for p in small.parameters()) == report["scaled"]["params"]
    assert small.eval()(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    "pipeline", [["--from-scratch"], ["--structure-only"], ["--expand-width", 2, "--method", "dms"]]
)
def test_scale_runs_every_pipeline(net, tmp_path, pipeline):
    result = dmscale_command(
        "scale", net, "--data", "digits", "--budget", "60% macs", "--out", tmp_path / "out", "--steps", 8, "--epochs", 0,
        "--device", "cpu", *pipeline,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0.5 <= report["scaled"]["macs"] / report["dense"]["macs"] <= 0.6  # shares are of the network as it was given


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"--budget": "1% nonsense"}, "nonsense"),
        ({"--data": "digitz"}, "neither digits"),
        ({"--weights": "none.pt"}, "no file none.pt"),
        ({"--device": "abacus"}, "abacus"),
        ({"--input": "1x3x8x8"}, "cannot be called"),
        ({"--out": __file__}, "is a file; name a folder"),
        ({"--out": f"{__file__}/out"}, "cannot be made: Not a directory"),
        ({"--method": "dsm"}, "method='dsm' is none of knapsack, dms"),
        ({"--freeze": "zz"}, "freeze='zz' matches no dimension; there are '0'"),
    ],
)
def test_scale_refuses_before_training(net, tmp_path, changed, says):
    options = {
        "--data": "digits",
        "--budget": "50% macs",
        "--out": tmp_path / "out",
        "--steps": 10**6,
    } | changed
    result = dmscale_command("scale", net, *(part for pair in options.items() for part in pair))
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "report.json").exists()


LOADERS = """
import torch

def batches(labels):
    return [(torch.randn(4, 1, 8, 8), labels) for _ in range(3)]

good = torch.tensor([0, 3, 9, -100])
def generators(): return iter(batches(good)), batches(good)
def generator_at_the_end(): return batches(good), (b for b in batches(good))
def nothing(): return None, batches(good)
def empty(): return [], batches(good)
def empty_at_the_end(): return batches(good), []
def beyond(): return batches(torch.full((4,), 11)), batches(good)
def beyond_later(): return batches(good)[:1] + batches(torch.full((4,), 11)), batches(good)
def negative(): return batches(torch.full((4,), -1)), batches(good)
def numbers(): return batches(torch.randn(4)), batches(torch.randn(4))
def of_a_folder(path): return batches(good), batches(good)
class Stream:
    def __iter__(self): return iter(batches(good))
def stream(): return Stream(), batches(good)
"""


@pytest.mark.parametrize(
    "name, says",
    [
        ("generators", "its training loader is a list_iterator, which can be run through only once; return a list"),
        ("generator_at_the_end", "its validation loader is a generator, which can be run through only once"),
        ("nothing", "its training loader is a NoneType; return a list or a DataLoader"),
        ("empty", "training data of .*empty: there is no batch in it"),
        ("empty_at_the_end", "validation data of .*empty_at_the_end: there is no batch in it"),
        ("beyond", "the model has 10 outputs for 12 classes; --classes"),
        ("beyond_later", "the model has 10 outputs: Target 11 is out of bounds.*--classes"),
        ("negative", "there is a target -1; classes count from 0"),
        ("numbers", "targets are torch.float32, not class numbers"),
        ("stream", "--epochs: the training data of .* have no length"),
        ("of_a_folder", r"of_a_folder takes arguments \(path\) and is called without any"),
    ],
)
def test_loaders_that_cannot_serve_are_one_line(net, tmp_path, name, says):
    (tmp_path / "loaders.py").write_text(LOADERS)
    result = dmscale_command(
        "scale", net, "--data", f"{tmp_path / 'loaders.py'}:{name}", "--budget", "50% macs", "--out", tmp_path / "out",
        "--steps", 4, "--epochs", 0, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 2, result.output
    assert re.search(says, result.stderr) and result.stderr.count("\n") == 1


def test_help_says_what_is_chosen_and_from_what():
    from dmscale.methods import METHODS
    from dmscale.strategies import REGISTRY

    def words(*command):
        return set(
            re.findall(r"[\w-]+(?:\.\w+)*", CliRunner().invoke(app, [*command, "-h"], env={"COLUMNS": "200"}).output)
        )

    assert {"demo", "trace", "scale", "compare"} <= words()
    assert {*METHODS, "0.001", "200", "twice"} <= words("scale")
    assert set(REGISTRY) <= words("compare")


def test_compare_refuses_before_training(net, tmp_path):
    for changed, says in [
        (["--redo", "unifrom"], "redo='unifrom'.*did you mean 'uniform'"),
        (["--out", __file__], "a file"),
    ]:
        result = dmscale_command(
            "compare", net, "--data", "digits", "--budget", "50% macs", "--out", tmp_path / "out", "--strategies", "uniform",
            "--device", "cpu", *changed,
        )  # fmt: skip
        assert result.exit_code == 2 and re.search(says, result.stderr), result.output


def namespace_of(code):
    namespace = {}
    exec(code, namespace)
    return namespace


def cost_of(space):
    return space["cost"]["macs"]
