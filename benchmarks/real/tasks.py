"""The tasks: a trained dense network, its data, its metric and the recipe that all strategies share.

Every task has a `small` size, at most four minutes a strategy and seed on two CPU cores, and a `full` one.  Evaluation is on
the test split.  With `validation` a part of the training data is held out instead, and the test split is not touched:
settings must be chosen there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmscale.compare import Recipe, Stream, recover
from dmscale.evaluate import accuracy, call, classification_loss
from dmscale.running import evaluating

from . import data, nets

SIZES = ("small", "full")


@dataclass
class Problem:
    """One network on one data set.

    name: also of the folder.  model: the trained dense network.  train: seed -> batches.
    recipe: arguments of `dmscale.compare` that say how all strategies train.
    budgets: those of its tables, the headline first.
    settings: what identifies data and sizes, for `config.json`.
    """

    name: str
    model: Callable[[], nn.Module]
    example: Any
    train: Callable[[int], Iterable[Any]]
    evaluate: Callable[[nn.Module], float]
    criterion: Callable[[Any, Any], Tensor] = classification_loss
    metric: str = "accuracy %"
    higher_is_better: bool = True
    budgets: tuple[str, ...] = ("25% macs", "50% macs")
    recipe: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What the command asks of every task: size, device, whether to hold out, where dense networks are kept."""

    size: str
    device: torch.device
    validation: bool
    cache: Path

    @property
    def small(self) -> bool:
        return self.size == "small"

    def settings(self, **own: Any) -> dict[str, Any]:
        return {"size": self.size, "split": "validation" if self.validation else "test", **own}


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """What CIFAR ResNets are trained with."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """For thin nets and transformers."""
    return torch.optim.AdamW(parameters, lr, weight_decay=0.05)


def percent(batches: Callable[[], Iterator[Any]]) -> Callable[[nn.Module], float]:
    """Accuracy in percent."""
    return lambda model: 100 * accuracy(model, batches())


def trained(
    setup: Setup, name: str, make: Callable[[], nn.Module], train: Callable[[int], Iterable[Any]], steps: int, lr: float,
    optimizer: Any = adamw, criterion: Any = classification_loss,
) -> Callable[[], nn.Module]:  # fmt: skip
    """A function that gives the dense network, trained once from scratch and kept in the cache."""

    def model() -> nn.Module:
        path = setup.cache / f"{name}.pt"
        torch.manual_seed(0)
        net = make().to(setup.device)
        if path.exists():
            net.load_state_dict(torch.load(path, map_location=setup.device, weights_only=True))
            return net.eval()
        print(f"training the dense {name}, {steps} steps, once", flush=True)
        done = 0

        def tick(loss: Tensor) -> None:
            nonlocal done
            done += 1
            if done % max(1, steps // 10) == 0:
                print(f"  {done} of {steps}, loss {float(loss):.3f}", flush=True)

        recover(net, Stream(train, 12345, setup.device), Recipe(criterion, optimizer, lr, lr, 1, steps), steps, tick)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        torch.save(net.state_dict(), temporary)
        temporary.replace(path)
        return net

    return model


# -- pictures ---------------------------------------------------------------------------------------------------------


def cifar10(setup: Setup) -> list[Problem]:
    """Pretrained ResNets.  Small: ResNet-20, one shard of the training set, an epoch of it for the search, one to recover.

    Held out for validation: the last 5,000 training images.  The pretrained weights have seen all training images, so
    that split is easier than the test split; it is for comparing settings only.
    """
    shards = (0,) if setup.small else (0, 1, 2, 3, 4)
    x, y = data.cifar10("train", shards)
    tx, ty = data.cifar10("test")
    if setup.validation:
        vx, vy = data.cifar10("train", (4,))
        tx, ty = vx[5000:], vy[5000:]
        if not setup.small:
            x, y = x[:45_000], y[:45_000]
    look = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    x, y, tx, ty = (t.to(setup.device) for t in (x, y, tx, ty))
    train = data.Pictures(x, y, batch=128, pad=4, flip=True, **look)
    test = data.Pictures(tx, ty, batch=128, **look)
    epoch = len(train)
    recipe = {
        "search_steps": epoch,
        "recovery_steps": epoch if setup.small else 5 * epoch,
        "lr": 0.02,
    }
    return [
        Problem(
            f"cifar10-resnet{depth}", lambda depth=depth: nets.cifar_resnet(depth).to(setup.device).eval(),
            torch.zeros(1, 3, 32, 32, device=setup.device), lambda seed: train, percent(test.plain),
            recipe={**recipe, "optimizer": sgd}, settings=setup.settings(images=len(x), optimizer="sgd nesterov 0.9, wd 5e-4"),
        )
        for depth in ((20,) if setup.small else (20, 56))
    ]  # fmt: skip


def fashion(setup: Setup) -> list[Problem]:
    """A thin MobileNetV2 and a small ViT, trained from scratch on the same images first."""
    shards = (0, 1) if setup.small else (0, 1, 2, 3, 4, 5)
    x, y = data.fashion_mnist("train", shards)
    tx, ty = data.fashion_mnist("test")
    if setup.validation:
        x, y, tx, ty = x[:-5000], y[:-5000], x[-5000:], y[-5000:]
    look = {"mean": (0.2860,), "std": (0.3530,)}
    x, y, tx, ty = (t.to(setup.device) for t in (x, y, tx, ty))
    train = data.Pictures(x, y, batch=128, pad=2, flip=True, **look)
    test = data.Pictures(tx, ty, batch=128, **look)
    steps = (
        {"search_steps": 150, "recovery_steps": 150}
        if setup.small
        else {"search_steps": 468, "recovery_steps": 468 * 5}
    )
    dense_steps = 1000 if setup.small else 468 * 30
    tag = f"{setup.size}{'-validation' if setup.validation else ''}"
    problems = []
    for name, make, lr in (("mobilenet", nets.ThinMobileNet, 3e-3), ("vit", nets.SmallViT, 1e-3)):
        problems.append(
            Problem(
                f"fashion-{name}", trained(setup, f"fashion-{name}-{tag}", make, lambda seed: train, dense_steps, lr),
                torch.zeros(1, 1, 28, 28, device=setup.device), lambda seed: train, percent(test.plain),
                recipe={**steps, "lr": lr, "optimizer": adamw},
                settings=setup.settings(images=len(x), dense_steps=dense_steps, optimizer="adamw, wd 0.05"),
            )
        )  # fmt: skip
    return problems


def dice(batches: Callable[[], Iterator[Any]]) -> Callable[[nn.Module], float]:
    """Dice coefficient of the foreground in percent, over all pixels."""

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        both = either = 0
        with evaluating(model):
            for x, y in batches():
                guess = call(model, x).argmax(1)
                both += int((guess * y).sum())
                either += int(guess.sum() + y.sum())
        return 100 * 2 * both / max(either, 1)

    return evaluate


def dice_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus one minus soft dice: (B, 2, H, W) scores, (B, H, W) zero or one."""
    p = output.softmax(1)[:, 1]
    overlap = (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return F.cross_entropy(output, target) + 1 - overlap


def nuclei(setup: Setup) -> list[Problem]:
    """A U-Net on cell nuclei; the last 66 images are the test split, 40 before them are held out for validation."""
    x, y = data.nuclei()
    if setup.small:  # a quarter of the pixels
        x, y = x[:, :, ::2, ::2].contiguous(), y[:, ::2, ::2].contiguous()
    tx, ty, x, y = (x[268:], y[268:], x[:268], y[:268])
    if setup.validation:
        tx, ty, x, y = (x[228:], y[228:], x[:228], y[:228])
    look = {"mean": (0.0493,), "std": (0.0691,)}
    x, y, tx, ty = (t.to(setup.device) for t in (x, y, tx, ty))
    train = data.Pictures(x, y, batch=8, turn=True, **look)
    test = data.Pictures(tx, ty, batch=8, **look)
    steps, dense_steps, width = (100, 400, 8) if setup.small else (600, 4000, 24)
    tag = f"{setup.size}{'-validation' if setup.validation else ''}"
    make = lambda: nets.UNet(width)  # noqa: E731
    return [
        Problem(
            "nuclei-unet", trained(setup, f"nuclei-unet-{tag}", make, lambda seed: train, dense_steps, 3e-3, criterion=dice_loss),
            torch.zeros(1, 1, *x.shape[-2:], device=setup.device), lambda seed: train, dice(lambda: test.plain(11)),
            criterion=dice_loss, metric="dice %",
            recipe={"search_steps": steps, "recovery_steps": steps, "lr": 2e-3, "optimizer": adamw},
            settings=setup.settings(images=len(x), width=width, dense_steps=dense_steps, optimizer="adamw, wd 0.05"),
        )
    ]  # fmt: skip


# -- language ---------------------------------------------------------------------------------------------------------


def perplexity(batches: Callable[[], Iterator[Any]]) -> Callable[[nn.Module], float]:
    """exp of the mean loss a token."""

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        total = count = 0.0
        with evaluating(model):
            for inputs, targets in batches():
                total += float(classification_loss(call(model, inputs), targets)) * targets.numel()
                count += targets.numel()
        return math.exp(min(total / max(count, 1), 50.0))

    return evaluate


def _language(
    setup: Setup, name: str, model: Callable[[], nn.Module], train: data.Tokens, test: data.Tokens, steps: int, lr: float,
    **settings: Any,
) -> Problem:  # fmt: skip
    on = setup.device
    train, test = replace(train, tokens=train.tokens.to(on)), replace(test, tokens=test.tokens.to(on))
    return Problem(
        name, model, {"input_ids": torch.zeros(1, train.length, dtype=torch.long, device=on)}, lambda seed: train,
        perplexity(test.plain), metric="perplexity", higher_is_better=False, budgets=("25% params", "50% params", "80% params"),
        recipe={"search_steps": steps, "recovery_steps": steps, "lr": lr, "optimizer": adamw},
        settings=setup.settings(
            tokens=len(train.tokens), length=train.length, batch=train.batch, optimizer="adamw, wd 0.05", **settings
        ),
    )  # fmt: skip


def _byte_llama(setup: Setup, name: str, train: Tensor, test: Tensor) -> list[Problem]:
    """A byte-level Llama with two query heads a key/value head, trained from scratch."""
    layers, hidden, heads, ffn = (4, 96, 6, 256) if setup.small else (8, 384, 12, 1024)
    length, batch = (64, 32) if setup.small else (256, 64)
    steps, dense_steps, lr = (150, 1000, 2e-3) if setup.small else (1000, 8000, 1e-3)
    tag = f"{name}-{setup.size}{'-validation' if setup.validation else ''}"
    make = lambda: nets.llama(layers, hidden, heads, heads // 2, ffn, 256, length)  # noqa: E731
    batches = data.Tokens(train, length, batch)
    dense = trained(setup, tag, make, lambda seed: replace(batches, tokens=train.to(setup.device)), dense_steps, lr)
    held = data.Tokens(test, length, batch)
    return [
        _language(setup, name, dense, batches, held, steps, lr, layers=layers, hidden=hidden, dense_steps=dense_steps)
    ]


def shakespeare(setup: Setup) -> list[Problem]:
    """Byte-level Llama on Tiny Shakespeare; the last tenth is the test split, the tenth before it for validation."""
    train, test = data.shakespeare()
    if setup.validation:
        cut = int(0.9 * len(train))
        train, test = train[:cut], train[cut:]
    return _byte_llama(setup, "shakespeare-llama", train, test)


def wikitext(setup: Setup) -> list[Problem]:
    """Byte-level Llama on WikiText-2, with its own validation and test splits (small: a fifth of each)."""
    train, valid, test = data.wikitext2()
    held = valid if setup.validation else test
    share = 5 if setup.small else 1
    return _byte_llama(setup, "wikitext-llama", train[: len(train) // share], held[: len(held) // share])


def stories(setup: Setup) -> list[Problem]:
    """The pretrained stories260K; the last tenth of the stories is the test split."""
    train, test = data.stories(setup.cache)
    if setup.validation:
        cut = int(0.9 * len(train))
        train, test = train[:cut], train[cut:]
    length, batch = (128, 16) if setup.small else (256, 32)
    steps = 150 if setup.small else 1500
    return [
        _language(
            setup, "stories-260k", lambda: nets.stories260k().to(setup.device).eval(), data.Tokens(train, length, batch),
            data.Tokens(test, length, batch), steps, 1e-3,
        )
    ]  # fmt: skip


TASKS: dict[str, Callable[[Setup], list[Problem]]] = {
    "cifar10": cifar10, "fashion": fashion, "shakespeare": shakespeare, "stories": stories, "nuclei": nuclei,
    "wikitext": wikitext,
}  # fmt: skip
"""Name -> its problems.  The small table leaves `wikitext` out: it asks what `shakespeare` asks, on more text."""
