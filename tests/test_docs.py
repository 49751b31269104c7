"""Every line of Python in README.md and docs/ runs as written, in order, and prints the text that follows it."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dmscale.cli import app
from dmscale.methods import METHODS
from dmscale.rules import RULES
from dmscale.strategies import REGISTRY

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/usage.md", "docs/architecture.md"]
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def make_model():
    """What the pages call `model`: two convolutions and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_code_in_the_docs_runs_and_prints_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for operator, made in list(RULES.items()):  # a page may register rules: put back what was there
        monkeypatch.setitem(RULES, operator, made)
    before = set(RULES)
    torch.manual_seed(0)
    model = make_model()
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(25)]
    names = {
        "model": model, "make_model": make_model, "example_inputs": batches[0][0][:1], "loader": batches,
        "criterion": nn.functional.cross_entropy, "dmscale": __import__("dmscale"), "torch": torch,
    }  # fmt: skip
    text = (ROOT / page).read_text()
    blocks = list(_BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    try:
        for block in blocks:
            code, expected = block.groups()
            at = text[: block.start(1)].count("\n")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * at + code, str(ROOT / page), "exec"), names)  # errors show the page's own lines
            if expected is not None:
                assert lines(printed.getvalue()) == lines(expected)
    finally:
        for operator in set(RULES) - before:
            del RULES[operator]


def test_the_commands_of_the_page_on_the_command_line_run(tmp_path, monkeypatch):
    """With its own factory and loader, in order; then what they wrote is loaded as it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = (ROOT / "docs/cli.md").read_text()
    factory, loader, load = (block.group(1) for block in _BLOCK.finditer(text))
    Path("nets.py").write_text(factory + loader)
    commands = re.findall(r"^    dmscale (.*nets.py.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, (command, done.output)
    names = {}
    exec(factory, names)
    exec(load, names)
    report = json.loads(Path("runs/small/report.json").read_text())
    assert sum(p.numel() for p in names["small"].parameters()) == report["scaled"]["params"]


def test_the_page_on_the_command_line_names_every_strategy_and_method():
    text = (ROOT / "docs/cli.md").read_text()
    about = [(name, s.about) for name, s in REGISTRY.items()] + list(METHODS.items())
    for name, line in about:
        assert f"| `{name}` | {line.replace('|', '&#124;')} |" in text


@pytest.mark.parametrize("page", [*PAGES, "docs/cli.md", "docs/findings.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_between_pages_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text()):
        found = (ROOT / page).parent / target if target else ROOT / page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, anchor


@pytest.mark.slow
def test_the_example_of_a_loop_ends_below_its_budget(capsys):
    with torch.random.fork_rng([]):
        runpy.run_path(str(ROOT / "examples" / "own_loop.py"), run_name="__main__")
    share = float(re.search(r"MACs .*\(([\d.]+)%\)", capsys.readouterr().out)[1])
    assert 29.85 <= share <= 30


@pytest.mark.slow
def test_the_example_with_timm_ends_below_its_budget():
    """In a process of its own: here torchvision has been made to import already."""
    command = [sys.executable, str(ROOT / "examples" / "timm_cnn.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    dense, scaled = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) MACs", done.stdout))
    assert 0.24 <= scaled / dense <= 0.25
