"""The demo, with runs of a few steps: what it writes can be used, and the same seed gives the same table."""

import io
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import dmscale
from dmscale import demo
from dmscale.errors import DmscaleError

TINY = {
    "cnn": replace(demo.RECIPES["cnn"], train_steps=6, search_steps=8, finetune_steps=4, batch_size=16),
    "vit": replace(demo.RECIPES["vit"], train_steps=6, search_steps=8, finetune_steps=4, batch_size=16),
}


def quiet():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of both networks at one budget, and what it printed."""
    out, console = tmp_path_factory.mktemp("demo"), quiet()
    report = demo.run(out, budgets=(0.25,), recipes=TINY, console=console, workers=2)
    return out, report, console.file.getvalue()


def test_the_named_files_are_written(finished):
    out, _, _ = finished
    files = ["table.md", "table.json", "comparison.png"]
    for name in ("cnn", "vit"):
        at = f"{name}/seed-0"
        files.append(f"{at}/dense.safetensors")
        files += [f"{at}/macs-25/{file}" for file in ("history.json", "search.png")]
        for method in ("dmscale", "uniform", "uniform-depth", "random"):
            files += [f"{at}/macs-25/{method}.{end}" for end in ("safetensors", "structure.json")]
    assert sorted(files) == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("method", demo.METHODS)
def test_the_written_weights_load_and_reach_the_accuracy_of_the_table(finished, name, method):
    out, report, _ = finished
    path = out / name / "seed-0" / "macs-25" / f"{method.lower().replace('+', '-')}.safetensors"
    model = dmscale.load(path, TINY[name].network)
    row = next(r for r in report["rows"] if (r["model"], r["method"]) == (name, method))
    assert type(model) is TINY[name].network
    assert demo.accuracy(model, demo.load_digits()) == row["accuracies"][0]
    assert sum(p.numel() for p in model.parameters()) == row["params"]


def test_every_budget_is_met(finished):
    _, report, _ = finished
    for name in ("cnn", "vit"):
        rows = [row for row in report["rows"] if row["model"] == name]
        dense = next(row["macs"] for row in rows if row["budget"] is None)
        assert all(0.245 * dense <= row["macs"] <= 0.25 * dense for row in rows if row["budget"])


def test_structure_and_history_are_those_of_the_search(finished):
    out, _, _ = finished
    folder = out / "cnn" / "seed-0" / "macs-25"
    structure = dmscale.Structure.from_json((folder / "dmscale.structure.json").read_text())
    history = json.loads((folder / "history.json").read_text())
    assert set(history[0]["sizes"]) == set(structure.sizes)
    assert [entry["step"] for entry in history] == sorted({entry["step"] for entry in history})


def test_the_table_is_returned_printed_and_written(finished):
    out, report, printed = finished
    assert json.loads((out / "table.json").read_text()) == report
    table = (out / "table.md").read_text()
    for row in report["rows"]:
        assert f"{row['mean']:.2f}" in table and f"{row['mean']:.2f}" in printed
    assert "8 of search" in " ".join(printed.split()) and "12 of fine-tuning" in " ".join(printed.split())


def test_the_same_seed_gives_the_same_table(tmp_path):
    def table(folder, **options):
        report = demo.run(folder, models=("cnn",), budgets=(0.25,), recipes=TINY, console=quiet(), workers=1, **options)
        return [{key: row[key] for key in row if key != "latency"} for row in report["rows"]]

    first = table(tmp_path / "a", first_seed=3)
    torch.manual_seed(7)  # whatever the caller's random numbers are
    expected = torch.random.get_rng_state()
    assert table(tmp_path / "b", first_seed=3) == first
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert table(tmp_path / "c", first_seed=4) != first


def test_two_seeds_are_the_two_single_ones(tmp_path):
    recipes = {"cnn": replace(TINY["cnn"], train_steps=2, search_steps=4, finetune_steps=1)}
    options = {"models": ("cnn",), "budgets": (0.5,), "recipes": recipes, "console": quiet(), "workers": 1}
    both = demo.run(tmp_path / "both", seeds=2, **options)
    each = [demo.run(tmp_path / str(seed), first_seed=seed, **options) for seed in (0, 1)]
    for k, row in enumerate(both["rows"]):
        assert row["accuracies"] == [report["rows"][k]["accuracies"][0] for report in each]
        assert row["spread"] is not None and each[0]["rows"][k]["spread"] is None


def test_without_matplotlib_the_demo_says_so_and_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recipes = {"cnn": replace(TINY["cnn"], train_steps=1, search_steps=4, finetune_steps=1)}
    console = quiet()
    demo.run(tmp_path, models=("cnn",), budgets=(0.5,), recipes=recipes, console=console)
    assert "dmscale[plot]" in console.file.getvalue()
    assert (tmp_path / "table.md").is_file() and not list(tmp_path.rglob("*.png"))


def test_all_wrong_arguments_are_named_at_once_before_training(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DmscaleError) as error:
        demo.run(file, seeds=0, models=("cnn", "rnn"), budgets=(0.25, 1.5), console=quiet())
    assert all(word in str(error.value) for word in ("rnn", "1.5", "seeds is 0", str(file)))


def test_the_split_is_fixed_and_stratified():
    data = demo.load_digits()
    assert len(data.train[1]) == 1078 and len(data.test[1]) == 719
    shares = [torch.bincount(labels) / len(labels) for _, labels in (data.train, data.test)]
    assert torch.allclose(*shares, atol=0.002)
    assert torch.equal(data.test[0], demo.load_digits().test[0])
    assert abs(float(data.train[0].mean())) < 1e-5 and float(data.train[0].std()) == pytest.approx(1)


def test_batches_go_through_all_scans_and_repeat_with_the_seed():
    data = demo.load_digits()
    first, again, other = (list(demo.batches(data, 16, 64, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for one, two in zip(first, again) for a, b in zip(one, two))
    assert not torch.equal(first[0][0], other[0][0])
    seen = torch.cat([labels for _, labels in first]).bincount()  # 1024 of the 1078, none twice
    assert bool((seen <= data.train[1].bincount()).all())


def test_jitter_without_size_changes_nothing_and_a_shift_is_one_in_pixels():
    images = torch.randn(4, 1, 8, 8)
    still = demo.jitter(images, torch.Generator(), shift=0, degrees=0, zoom=0)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)

    ramp = torch.arange(8.0).expand(64, 1, 8, 8)
    moved = demo.jitter(ramp, torch.Generator().manual_seed(0), shift=1, degrees=0, zoom=0)
    steps = (moved - ramp)[:, 0, 1:-1, 1:-1].flatten(1)  # away from the border, a ramp only rises or falls
    assert float(steps.std(1).max()) < 1e-4
    assert 0.8 < float(steps.abs().max()) <= 1


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_heads_widths_and_depth_of_the_networks_are_free(name):
    space = dmscale.trace(demo.RECIPES[name].network(), torch.zeros(2, 1, 8, 8))
    kinds = [dimension.kind for dimension in space.dimensions.values()]
    assert kinds.count("depth") == {"cnn": 2, "vit": 1}[name]
    assert kinds.count("heads") == {"cnn": 0, "vit": 4}[name]
    assert "residual width" in space.dimensions
    assert math.prod(d.size for d in space.dimensions.values()) > 1e6


def test_the_caption_counts_one_thread_as_one():
    before = torch.get_num_threads()
    try:
        for threads, says in [(1, "on 1 thread."), (2, "on 2 threads.")]:
            torch.set_num_threads(threads)
            assert demo._caption((), {}, 1).endswith(says)
    finally:
        torch.set_num_threads(before)
