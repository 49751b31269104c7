"""A timm network in one call: `test_efficientnet` on scikit-learn's digits, at a quarter of its MACs.

    pip install 'dmscale[timm]'
    python examples/timm_cnn.py

Under a minute on one CPU core.  It trains the dense network, lets `dmscale.scale` search and fine-tune, saves the
result and loads it back through the factory that made the full one.  `--quick` takes a tenth of the steps.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import dmscale
from dmscale.sources import load_model


def make_model() -> nn.Module:
    """As `timm.create_model("test_efficientnet", in_chans=1, num_classes=10)`, and no download."""
    return load_model("timm:test_efficientnet", shape=(1, 1, 32, 32), classes=10).model


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, to see that it runs")
    epochs, steps, finetune_steps = (1, 10, 15) if parser.parse_args().quick else (6, 100, 150)
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = interpolate(torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, (32, 32), mode="bilinear")
    x, x_test, y, y_test = train_test_split(images, torch.tensor(digits), test_size=0.4, random_state=0)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, drop_last=True)

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * len(loader))
    for _ in range(epochs):
        for inputs, labels in loader:
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    dense = accuracy(model, x_test, y_test)

    model.train()
    result = dmscale.scale(
        model, x[:1], loader, cross_entropy, budget="25% macs", steps=steps, finetune_steps=finetune_steps
    )

    cost, full = result.cost, result.space.cost()
    print(f"dense   {dense:.1%}  {full.macs:,} MACs  {full.params:,} parameters")
    print(f"scaled  {accuracy(result.model, x_test, y_test):.1%}  {cost.macs:,} MACs  {cost.params:,} parameters")
    print(result.structure)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        dmscale.save(result.model, path, result.structure)
        loaded = dmscale.load(path, make_model).eval()
    torch.testing.assert_close(loaded.state_dict(), result.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded(x_test[:8]), result.model.eval()(x_test[:8]))  # equal but for rounding


if __name__ == "__main__":
    main()
