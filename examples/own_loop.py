"""Your own training loop, searched: a small residual CNN on scikit-learn's 8x8 digits, brought to 30% of its MACs.

    python examples/own_loop.py

Half a minute on one CPU core.  The five lines that belong to dmscale are marked with `# <-`; everything else is the
loop that one would write anyway.  It prints the accuracy of the dense network, of the smaller one as the search
leaves it, and after fine-tuning.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, relu

import dmscale


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = relu(self.norm1(self.conv1(x)))
        return relu(x + self.norm2(self.conv2(y)))


def network(width: int = 16, blocks: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),  # (B, width, 8, 8)
        nn.Sequential(*(Block(width) for _ in range(blocks))),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),  # (B, 2 width, 4, 4)
        nn.Sequential(*(Block(2 * width) for _ in range(blocks))),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def batches(x: torch.Tensor, y: torch.Tensor, steps: int, size: int = 64):
    for _ in range(steps):
        chosen = torch.randint(len(x), (size,))
        yield x[chosen], y[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for images, labels in batches(x, y, steps):
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16
    x, x_test, y, y_test = train_test_split(images, torch.tensor(digits), test_size=0.4, random_state=0)

    model = network()
    train(model, x, y, steps=150, lr=4e-3)
    print(f"dense       {accuracy(model, x_test, y_test):.1%}")

    space = dmscale.trace(model, x[:1])  # <- 1: costs are those of one image
    print(space)

    search = dmscale.Search(space, budget="30% macs", steps=150)  # <- 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    search.attach(optimizer)  # <- 3
    search.model.train()
    for images, labels in batches(x, y, steps=150):
        cross_entropy(search.model(images), labels).backward()  # <- 4: search.model where model stood
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    small = search.export(recalibrate=[x])  # <- 5: a plain nn.Sequential, verified; BatchNorm measured anew
    cost, full = space.cost(search.structure), space.cost()
    print(search.structure)
    print(f"exported    {accuracy(small, x_test, y_test):.1%}")
    print(f"MACs        {cost.macs:,} of {full.macs:,} ({cost.macs / full.macs:.2%})")
    print(f"parameters  {cost.params:,} of {full.params:,} ({cost.params / full.params:.2%})")

    train(small, x, y, steps=150, lr=2e-3)
    print(f"fine-tuned  {accuracy(small, x_test, y_test):.1%}")


if __name__ == "__main__":
    main()
