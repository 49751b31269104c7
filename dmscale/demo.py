"""`dmscale demo`: two small networks, handwritten digits, and the question whether searching pays.

A residual CNN and a vision transformer are trained on the 1797 scans of digits inside scikit-learn (8x8
pixels; 60% to train on, 40% to test on, the same split always), then brought to a quarter and to a tenth of
their MACs:

- **dmscale** searches the structure while the weights train on, then fine-tunes what it exported;
- **uniform** keeps the same share of every width and head count, **uniform+depth** of every stack of blocks
  too, **random** a random one: the structure is there at once, so they fine-tune for the steps that dmscale
  searched as well.  All start from the same dense weights and take the same number of steps.

The networks are ordinary modules, written as a user would write them: nothing in them knows dmscale.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .errors import DmscaleError
from .latency import compare_latency
from .optional import MissingPackageError, require
from .report import Row, comparison_markdown, comparison_table, plot_comparison, plot_history

METHODS = ("dmscale", "uniform", "uniform+depth", "random")
LATENCY_BATCH = 64  # images; one alone would time Python, not the network


# ------------------------------------------------------------------------------------- the networks


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResidualCNN(nn.Module):
    """Residual blocks at 8x8, more of them at 4x4, mean over the image, ten classes."""

    def __init__(self, channels: tuple[int, int] = (8, 16), blocks: int = 3) -> None:
        super().__init__()
        first, second = channels
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.stage1 = nn.Sequential(*(ResidualBlock(first) for _ in range(blocks)))
        self.down = nn.Sequential(
            nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(second), nn.ReLU()
        )
        self.stage2 = nn.Sequential(*(ResidualBlock(second) for _ in range(blocks)))
        self.head = nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, T, head_dim)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)  # (B, heads, T, T)
        x = (weights @ v).transpose(1, 2).reshape(B, T, self.num_heads * self.head_dim)
        return self.proj(x)


class EncoderBlock(nn.Module):
    """Attention and an MLP, each after a LayerNorm and beside an identity."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Sixteen patches of 2x2 pixels, pre-norm encoder blocks, mean over the patches, ten classes."""

    def __init__(self, dim: int = 40, blocks: int = 4, num_heads: int = 5, head_dim: int = 8, hidden: int = 80) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, stride=2)
        # Of the size of the patches: at the usual 0.02 it takes hundreds of steps until positions are seen.
        self.position = nn.Parameter(0.5 * torch.randn(1, 16, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, num_heads, head_dim, hidden) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position  # (B, T, dim)
        return self.head(self.norm(self.blocks(x)).mean(1))


# -------------------------------------------------------------------------------------- the recipes


@dataclass(frozen=True)
class Recipe:
    """How one network is made and trained.

    Steps are batches.  dmscale takes `search_steps` and then `finetune_steps`; the other methods fine-tune for
    the sum.  AdamW throughout: `learning_rate` for the dense network and `finetune_rate` for fine-tuning rise
    for a tenth of the steps and fall as a cosine, `search_rate` is constant.
    """

    network: Callable[[], nn.Module]
    train_steps: int
    search_steps: int
    finetune_steps: int
    learning_rate: float = 3e-3
    search_rate: float = 3e-3
    finetune_rate: float = 1e-2
    weight_decay: float = 0.05
    batch_size: int = 64

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        fields = asdict(self)
        fields["network"] = getattr(self.network, "__name__", str(self.network))
        return fields


RECIPES: Mapping[str, Recipe] = {
    "cnn": Recipe(ResidualCNN, train_steps=500, search_steps=120, finetune_steps=240, search_rate=1e-2),
    "vit": Recipe(VisionTransformer, train_steps=600, search_steps=120, finetune_steps=240),
}


# ----------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Digits:
    """Scans (N, 1, 8, 8) of mean 0 and deviation 1, and their digits (N,); `empty` is blank paper."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    empty: float


def load_digits() -> Digits:
    """1078 scans to train on and 719 to test on, every digit in proportion; the split never changes."""
    from sklearn.datasets import load_digits as load  # slow to import

    images, labels = load(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for digit in range(10):
        scans = (y == digit).nonzero()[:, 0]
        scans = scans[torch.randperm(len(scans), generator=generator)]
        cut = round(0.6 * len(scans))
        train.append(scans[:cut])
        test.append(scans[cut:])
    return _normalised(x, y, torch.cat(train), torch.cat(test))


def _normalised(x: Tensor, y: Tensor, train: Tensor, test: Tensor) -> Digits:
    mean, deviation = x[train].mean(), x[train].std()
    x = (x - mean) / deviation
    return Digits((x[train], y[train]), (x[test], y[test]), float(-mean / deviation))


def batches(data: Digits, steps: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` random batches of the training scans, each moved, turned and zoomed a little."""
    images, labels = data.train
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        yield jitter(images[chosen], generator, data.empty), labels[chosen]


def jitter(
    images: Tensor,
    generator: torch.Generator,
    empty: float = 0.0,
    shift: float = 0.5,
    degrees: float = 10.0,
    zoom: float = 0.1,
) -> Tensor:
    """The images (N, 1, H, W), each with its own random move (up to `shift` pixels), turn and zoom.

    What comes in at the border is `empty`.
    """
    N, _, H, W = images.shape
    draw = [2 * torch.rand(N, generator=generator) - 1 for _ in range(4)]
    angle, scale = draw[0] * math.radians(degrees), 1 + draw[1] * zoom
    cos, sin = scale * angle.cos(), scale * angle.sin()
    dx, dy = draw[2] * 2 * shift / W, draw[3] * 2 * shift / H  # affine_grid measures in half images
    maps = torch.stack([cos, -sin, dx, sin, cos, dy], 1).view(N, 2, 3)
    grid = F.affine_grid(maps, [N, 1, H, W], align_corners=False)
    return F.grid_sample(images - empty, grid, align_corners=False) + empty


# -------------------------------------------------------------------------------- training, methods


@dataclass(frozen=True)
class Job:
    """What all methods of one network and one seed share.

    tick: called after every step.
    describe: called with what is done next.
    """

    name: str
    recipe: Recipe
    data: Digits
    seed: int
    tick: Callable[[], None] = lambda: None
    describe: Callable[[str], None] = lambda what: None

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=self.recipe.weight_decay)

    def batches(self, steps: int, stage: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a stage (0 dense, 1 search, 2 fine-tuning) are the same for every method."""
        return batches(self.data, steps, self.recipe.batch_size, seed=3 * self.seed + stage)


def train(model: nn.Module, job: Job, steps: int, rate: float, stage: int) -> None:
    """Train `model` in place; the learning rate rises for a tenth of the steps and falls as a cosine."""
    optimizer = job.optimizer(model, rate)
    model.train()
    for step, (x, y) in enumerate(job.batches(steps, stage)):
        share = min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        job.tick()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Percent of the test scans that `model` reads right."""
    images, labels = data.test
    model.eval()
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def search_and_tune(dense: nn.Module, budget: float, job: Job) -> tuple[nn.Module, Any, list[dict[str, Any]]]:
    """The network that the search finds at `budget` (share of MACs), fine-tuned, with structure and history.

    This is the loop that a user writes; `dense` is left as it is.
    """
    import dmscale

    recipe = job.recipe
    network = copy.deepcopy(dense).train()
    space = dmscale.trace(network, job.data.test[0][:1])
    search = dmscale.Search(space, budget=_budget(budget), steps=recipe.search_steps)
    optimizer = job.optimizer(network, recipe.search_rate)
    search.attach(optimizer)
    for x, y in job.batches(recipe.search_steps, stage=1):
        F.cross_entropy(search.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        job.tick()
        if search.done:
            break
    small = search.export()
    train(small, job, recipe.finetune_steps, recipe.finetune_rate, stage=2)
    return small, search.structure, search.history


def scale_at_once(dense: nn.Module, method: str, budget: float, job: Job) -> tuple[nn.Module, Any]:
    """The uniformly or randomly scaled network at `budget` (share of MACs), fine-tuned; its structure."""
    import dmscale

    recipe = job.recipe
    space = dmscale.trace(dense, job.data.test[0][:1])
    if method == "random":
        structure = space.sample_at(_budget(budget), seed=job.seed)
    else:
        structure = space.uniform_at(_budget(budget), depth=method == "uniform+depth")
    small = space.export(structure)
    train(small, job, recipe.search_steps + recipe.finetune_steps, recipe.finetune_rate, stage=2)
    return small, structure


def _budget(share: float) -> str:
    return f"{100 * share:g}% macs"


# -------------------------------------------------------------------------------------- the whole


@dataclass
class _Result:
    """One network of one seed: what it is, and what was measured of it."""

    method: str
    budget: float | None
    model: nn.Module
    accuracy: float
    macs: int
    params: int
    latency: float = float("nan")


def run(
    out: Path,
    seeds: int = 1,
    first_seed: int = 0,
    models: tuple[str, ...] = ("cnn", "vit"),
    budgets: tuple[float, ...] = (0.25, 0.10),
    console: Console | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
    workers: int | None = None,
) -> dict[str, Any]:
    """Run the demo, print its table, and write everything to the folder `out`.

    `seeds` is how many seeds are run, from `first_seed` on; `models` are names in `recipes`; `budgets` are
    shares of the dense MACs.  `workers` processes of one thread each train the networks side by side, by default
    as many as there are cores: networks as small as these gain nothing from a second thread.  Returns what
    `table.json` holds: "rows" (see `report.Row`), the recipes, the seconds.  The same seeds give the same table
    on one machine's CPU, but for the measured times.

    Written: `table.md`, `table.json`, `comparison.png`, and for every network and seed in `NETWORK/seed-N/`
    the weights `dense.safetensors`; in its `macs-25/` and so on `dmscale.safetensors`, `uniform.safetensors`,
    `uniform-depth.safetensors`, `random.safetensors`, the structure of each as JSON, and of the search
    `history.json` and `search.png`.

    Raises:
        DmscaleError: an unknown model, a budget outside (0, 1), no seed, or `out` is a file.
    """
    _check(out, seeds, models, budgets, recipes)
    console = console or Console()
    started = time.perf_counter()
    pictures = _can_draw(console)
    data = load_digits()
    jobs = [(name, seed) for seed in range(first_seed, first_seed + seeds) for name in models]
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        bars = {job: progress.add_task(job[0], total=_steps_of(recipes[job[0]], len(budgets))) for job in jobs}

        def show(job: tuple[str, int], steps: int, what: str) -> None:
            progress.update(bars[job], advance=steps, description=f"{job[0]}, seed {job[1]}: {what:<22}")

        tasks = [(recipes[name], name, seed, budgets, out / name / f"seed-{seed}", pictures) for name, seed in jobs]
        found = dict(zip(jobs, _run_all(tasks, workers, show)))
    _measure_latency(found, data)
    results = {name: [found[job] for job in jobs if job[0] == name] for name in models}

    rows = [row for name in models for row in _rows(name, results[name])]
    caption = _caption(models, recipes, seeds)
    report = {
        "rows": [row.to_dict() for row in rows],
        "caption": caption,
        "seeds": list(range(first_seed, first_seed + seeds)),
        "recipes": {name: recipes[name].to_dict() for name in models},
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    (out / "table.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "table.md").write_text(comparison_markdown(rows, caption))
    if pictures:
        plot_comparison(rows, out / "comparison.png", "Handwritten digits")
    console.print(comparison_table(rows, "Handwritten digits, 8x8 pixels", caption))
    console.print(f"{report['seconds']:.0f} s. Written to {out}", highlight=False, markup=False, soft_wrap=True)
    return report


def _check(
    out: Path,
    seeds: int,
    models: tuple[str, ...],
    budgets: tuple[float, ...],
    recipes: Mapping[str, Recipe],
) -> None:
    """All that can be wrong with the arguments, in one message, before anything is trained."""
    problems = [f"model {name!r} is not one of {', '.join(recipes)}" for name in models if name not in recipes]
    problems += [
        f"budget {share!r} is not a share of the MACs between 0 and 1" for share in budgets if not 0 < share < 1
    ]
    if seeds < 1:
        problems.append(f"seeds is {seeds}; at least 1 is needed")
    if not models:
        problems.append("models is empty; name at least one")
    if out.exists() and not out.is_dir():
        problems.append(f"out is {out}, a file; name a folder")
    if problems:
        raise DmscaleError("; ".join(problems))


def _steps_of(recipe: Recipe, num_budgets: int) -> int:
    return recipe.train_steps + num_budgets * len(METHODS) * (recipe.search_steps + recipe.finetune_steps)


Show = Callable[[tuple[str, int], int, str], None]


def _run_all(tasks: Sequence[tuple[Any, ...]], workers: int, show: Show) -> Iterator[list[_Result]]:
    """The results of every task, in order; here if one worker is wanted, else in processes of their own."""
    if workers == 1:
        for task in tasks:
            yield _one_seed(*(*task, show))
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(workers, context) as pool:
        queue = manager.Queue()
        running = [pool.submit(_one_seed, *(*task, queue)) for task in tasks]
        for future in running:
            while not future.done():
                with contextlib.suppress(Empty):
                    show(*queue.get(timeout=0.2))
            yield future.result()


def _one_seed(
    recipe: Recipe, name: str, seed: int, budgets: tuple[float, ...], folder: Path, pictures: bool, show: Any
) -> list[_Result]:
    """Train one dense network, scale it in every way, write all to `folder`; on one thread, and `show` is told of it."""
    import dmscale

    tell = show if callable(show) else lambda *news: show.put(news)
    done = _Ticker(lambda steps, what: tell((name, seed), steps, what))
    data = load_digits()
    job = Job(name, recipe, data, seed, done.tick, done.describe)
    with _one_thread(), torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        job.describe("dense")
        torch.manual_seed(seed)
        dense = recipe.network()
        train(dense, job, recipe.train_steps, recipe.learning_rate, stage=0)
        space = dmscale.trace(dense, data.test[0][:1])
        kinds = {key: dimension.kind for key, dimension in space.dimensions.items()}
        folder.mkdir(parents=True, exist_ok=True)
        dmscale.save(dense, folder / "dense.safetensors")
        results = [_result("dense", None, dense, space.cost(), data)]
        for budget in budgets:
            place = folder / f"macs-{100 * budget:g}"
            place.mkdir(exist_ok=True)
            for method in METHODS:
                file = method.lower().replace("+", "-")
                job.describe(f"{method} at {budget:.0%}")
                torch.manual_seed(seed)
                if method == "dmscale":
                    small, structure, history = search_and_tune(dense, budget, job)
                    (place / "history.json").write_text(json.dumps(history) + "\n")
                    title = f"{name}, seed {seed}: search to {budget:.0%} of the MACs"
                    if pictures:
                        plot_history(history, place / "search.png", title, kinds)
                else:
                    small, structure = scale_at_once(dense, method, budget, job)
                dmscale.save(small, place / f"{file}.safetensors")
                (place / f"{file}.structure.json").write_text(structure.to_json())
                results.append(_result(method, budget, small, space.cost(structure), data))
        job.describe("done")
    return results


class _Ticker:
    """Counts steps and tells of them ten at a time, so that no process waits for the one that draws the bars."""

    def __init__(self, tell: Callable[[int, str], None]):
        self._tell, self._steps, self._what = tell, 0, ""

    def tick(self) -> None:
        self._steps += 1
        if self._steps == 10:
            self.describe(self._what)

    def describe(self, what: str) -> None:
        self._tell(self._steps, what)
        self._steps, self._what = 0, what


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure_latency(found: Mapping[tuple[str, int], list[_Result]], data: Digits) -> None:
    """Once nothing else runs."""
    for results in found.values():
        times = compare_latency([result.model for result in results], data.test[0][:LATENCY_BATCH])
        for result, milliseconds in zip(results, times):
            result.latency = milliseconds


def _result(method: str, budget: float | None, model: nn.Module, cost: Any, data: Digits) -> _Result:
    return _Result(method, budget, model, accuracy(model, data), int(cost.macs), int(cost.params))


def _rows(name: str, seeds: list[list[_Result]]) -> list[Row]:
    """The results of one network, those of all seeds in one row."""
    rows = []
    for same in zip(*seeds):
        rows.append(
            Row(
                model=name,
                method=same[0].method,
                budget=same[0].budget,
                accuracies=tuple(result.accuracy for result in same),
                macs=sum(result.macs for result in same) / len(same),
                params=sum(result.params for result in same) / len(same),
                latency=sum(result.latency for result in same) / len(same),
            )
        )
    return rows


def _caption(models: tuple[str, ...], recipes: Mapping[str, Recipe], seeds: int) -> str:
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    lines = [f"Accuracy on 719 test scans (one scan is 0.14 points), {spread}; diff is to dense."]
    for name in models:
        r = recipes[name]
        lines.append(
            f"{name}: dense {r.train_steps} steps of {r.batch_size} scans; then dmscale {r.search_steps} of"
            f" search and {r.finetune_steps} of fine-tuning, the others"
            f" {r.search_steps + r.finetune_steps} of fine-tuning."
        )
    threads = torch.get_num_threads()
    lines.append(f"MACs of one scan; latency of {LATENCY_BATCH} scans on {threads} thread{'s' * (threads != 1)}.")
    return " ".join(lines)


def _can_draw(console: Console) -> bool:
    """Whether matplotlib is there; if not, a note on `console` says so: the demo works without pictures."""
    try:
        require("matplotlib", "plot", "drawing the pictures")
    except MissingPackageError as error:
        console.print(f"No pictures: {error}", highlight=False, markup=False, soft_wrap=True)
        return False
    return True
