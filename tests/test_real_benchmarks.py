"""The benchmarks on real data: their data is what it says, and peers stand on equal footing; skipped without the data."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, fingerprint
from torch import nn

import dmscale
from benchmarks import spans, supernet
from benchmarks.real import data, variants
from benchmarks.real import nets as networks
from benchmarks.real.__main__ import MAIN
from benchmarks.real.tasks import Problem, adamw, dice, dice_loss, perplexity
from dmscale import budget as budgets
from dmscale import demo
from dmscale.demo import ResidualCNN
from dmscale.evaluate import accuracy
from dmscale.strategies import REGISTRY, Task

HAVE_DATA = Path(os.environ.get("DMSCALE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data").is_dir()
needs_data = pytest.mark.skipif(not HAVE_DATA, reason="no DMSCALE_DATA")


def test_pictures_are_shuffled_cropped_and_normalised():
    images = torch.arange(1, 7, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 4, 4) * 40
    pictures = data.Pictures(images, torch.arange(6), (0.0,), (1.0,), batch=2, pad=1, flip=True)
    epoch = list(pictures)
    assert len(epoch) == 3 and sorted(torch.cat([y for _, y in epoch]).tolist()) == list(range(6))
    for x, y in epoch:
        for image, target in zip(x, y):
            inside = image[image > 0]
            assert image.shape == (1, 4, 4) and inside.numel() >= 9
            torch.testing.assert_close(inside, torch.full_like(inside, (int(target) + 1) * 40 / 255))
    ((x, y),) = pictures.plain()
    assert torch.equal(y, torch.arange(6)) and bool((x[5] == 240 / 255).all())


def test_turning_moves_image_and_mask_alike():
    images = torch.randint(0, 255, (4, 1, 8, 8), dtype=torch.uint8)
    pictures = data.Pictures(images, (images[:, 0] > 99).long(), (0.0,), (1.0,), batch=4, turn=True)
    for x, y in itertools.chain(*(list(pictures) for _ in range(5))):
        assert torch.equal((x[:, 0] * 255).round() > 99, y.bool())


def test_windows_of_text_are_followed_by_their_targets():
    text = data.Tokens(torch.arange(100), length=7, batch=3)
    for inputs, targets in [*text, *text.plain()]:
        assert torch.equal(inputs["input_ids"] + 1, targets)
    assert sum(len(y) for _, y in text.plain()) == 14


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary():
    class Flat(nn.Module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, 11)

    text = data.Tokens(torch.arange(100) % 11, length=7, batch=3)
    assert perplexity(text.plain)(Flat()) == pytest.approx(11)


def test_dice_counts_pixels():
    target = torch.tensor([[[1, 1], [0, 0]]])
    scores = F.one_hot(torch.tensor([[[1, 0], [1, 0]]]), 2).permute(0, 3, 1, 2) * 50.0
    assert dice(lambda: iter([(scores, target)]))(nn.Identity()) == pytest.approx(50)
    right = F.one_hot(target, 2).permute(0, 3, 1, 2) * 50.0
    assert float(dice_loss(right, target)) == pytest.approx(0, abs=1e-6) and float(dice_loss(scores, target)) > 1


def peers_task(model, budget):
    """A task on random pictures and labels."""
    x = torch.randn(8, 1, 8, 8)
    batch = (x, torch.randint(0, 10, (8,)))
    space = dmscale.trace(model, x[:1])
    return Task(
        space, budgets.parse(budget, space), itertools.repeat(batch), lambda n: [batch] * n, F.cross_entropy,
        lambda p: torch.optim.SGD(p, 0.1), 2,
    )  # fmt: skip


def meets_the_budget_and_leaves_the_model_alone(strategy, at_least):
    """The smaller model of an external strategy at half the MACs; `at_least` this share of these is used."""
    model = ResidualCNN((8, 12), 2).eval()
    task, before = peers_task(model, "50% macs"), fingerprint(model)
    small = strategy.find(task).model
    assert_same(before, fingerprint(model))
    assert all(p.grad is None for p in model.parameters())
    x = torch.randn(8, 1, 8, 8)
    macs, target = dmscale.trace(small, x[:1], verify=False).cost().macs, task.space.cost().macs / 2
    assert at_least * target <= macs <= target
    assert small(x).shape == (8, 10)
    return small


@pytest.mark.parametrize("which", [0, 1])
def test_torch_pruning_is_brought_to_the_budget_and_leaves_the_model_alone(which):
    pytest.importorskip("torch_pruning")
    from benchmarks.peers.torch_pruning_ import STRATEGIES

    meets_the_budget_and_leaves_the_model_alone(STRATEGIES[which], at_least=0.85)


@pytest.mark.slow
def test_fastnas_is_brought_to_the_budget_leaves_the_model_alone_and_gives_a_plain_one():
    pytest.importorskip("modelopt")
    from benchmarks.peers.modelopt_ import STRATEGIES

    # untrained, no layer matters much, and FastNAS goes far below
    small = meets_the_budget_and_leaves_the_model_alone(STRATEGIES[0], at_least=0.1)
    plain = {name for m in ResidualCNN((8, 12), 2).modules() for name in vars(m)}
    assert {name for m in small.modules() for name in vars(m)} <= plain
    assert not any(type(m).__module__.startswith("modelopt") for m in small.modules())
    for budget, told in (("1% macs", "does not reach"), ("50% params", "searches for MACs")):
        with pytest.raises(dmscale.DmscaleError, match=told):
            STRATEGIES[0].find(peers_task(ResidualCNN((8, 12), 2).eval(), budget))


@needs_data
def test_the_pretrained_resnet_reads_cifar10():
    images, targets = data.cifar10("test")
    assert images.shape == (10_000, 3, 32, 32) and torch.bincount(targets).tolist() == [1000] * 10
    test = data.Pictures(images[:500], targets[:500], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), batch=100)
    assert accuracy(networks.cifar_resnet(20), test.plain()) > 0.88


@needs_data
def test_stories_are_encoded_and_the_pretrained_llama_follows_them():
    pytest.importorskip("transformers")
    encode = data.story_encoder()
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine."
    tokens = encode(text)
    pieces = json.loads(data.file("weights/stories260k_vocab.json").read_text())["pieces"]
    assert tokens[0] == 1 and "".join(pieces[t] for t in tokens[1:]) == " " + text
    story = torch.tensor(tokens)
    model = networks.stories260k().eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(input_ids=story[None, :-1]).logits[0], story[1:]))
    assert loss < 1.5  # ln 512 = 6.2 for one that knows nothing


@needs_data
def test_masks_of_nuclei_fit_their_images():
    images, masks = data.nuclei()
    assert images.shape == (334, 1, 256, 256) and float(masks.float().mean()) == pytest.approx(0.077, abs=0.002)
    bright = images[:, 0].float()
    assert bright[masks == 1].mean() > 3 * bright[masks == 0].mean()


def test_every_name_of_a_group_is_a_strategy():
    """A name that is unknown would be left out as a library that is not installed is."""
    peers = {"torch-pruning-taylor"}
    known = {*REGISTRY, *variants.VARIANTS, *peers}
    for group in (*variants.GROUPS.values(), MAIN):
        assert set(group) <= known


def test_every_row_of_the_supernet_ablation_ends_at_the_same_macs_and_is_kept(tmp_path, monkeypatch, capsys):
    """The whole command on noise; rows are the base, the pretrained network and one supernet."""
    pictures = data.Pictures(
        torch.randint(0, 255, (16, 1, 12, 12), dtype=torch.uint8), torch.arange(16) % 10, (0.5,), (0.5,), batch=8
    )
    problem = Problem(
        "noise", networks.ThinMobileNet, torch.zeros(1, 1, 12, 12), lambda seed: pictures,
        lambda model: 100 * accuracy(model, pictures.plain()),
        recipe={"search_steps": 3, "lr": 1e-3, "optimizer": adamw}, settings={"dense_steps": 10},
    )  # fmt: skip
    rows = {name: supernet.ROWS[name] for name in ("uniform", "pretrained", "supernet-2")}
    monkeypatch.setattr(supernet, "fashion", lambda setup: [problem])
    monkeypatch.setattr(supernet, "ROWS", rows)
    supernet.main(1, 2, "knapsack", 0.25, tmp_path)
    printed = capsys.readouterr().out

    target = dmscale.trace(networks.ThinMobileNet(), problem.example, verify=False).cost().macs / 4
    base, pretrained, larger = (json.loads(p.read_text()) for n in rows for p in tmp_path.glob(f"*/{n}*/seed-0.json"))
    for result in (base, pretrained, larger):
        assert 0.995 * target <= result["macs"] <= target
        assert result["retraining"] == pytest.approx(2 / 4, rel=0.005)
    assert base["search"] == base["pretraining"] == 0 and "inherited" not in base
    assert (pretrained["pretraining"], pretrained["search"]) == (10, 3)
    assert larger["pretraining"] == 0 and larger["search"] == pytest.approx(3 * 2, rel=0.05)
    assert all(row.about in printed for row in rows.values())

    monkeypatch.setattr(supernet, "run", None)  # what is there is not run again
    supernet.main(1, 2, "knapsack", 0.25, tmp_path)
    assert printed.endswith(capsys.readouterr().out.split("%", 1)[1])


def test_a_network_drawn_anew_keeps_nothing_of_its_weights():
    a, b = (supernet.drawn_anew(networks.ThinMobileNet(), seed=1) for _ in range(2))
    before = {name: t.clone() for name, t in a.state_dict().items()}
    with torch.no_grad():
        for p in a.parameters():
            p.add_(1)
    a.train()(torch.randn(8, 1, 28, 28))  # statistics move too
    for net in (supernet.drawn_anew(a, seed=1), b):
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_the_spans_of_levels_are_compared_on_scans_that_training_has_not_seen():
    seen, kept = spans.held_out(0).train, spans.held_out(0).test
    assert len(seen[0]) + len(kept[0]) == len(demo.load_digits().train[0])
    assert not {tuple(x.flatten().tolist()) for x in seen[0]} & {tuple(x.flatten().tolist()) for x in kept[0]}
    lines = spans.table([0], steps=2).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["uniform", *(f"{n} steps" for n in spans.SPANS)]
    assert all(0 <= float(cell.split("±")[0]) <= 100 for line in lines[2:] for cell in line.split("|")[2:-1])
