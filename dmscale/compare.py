"""Strategies side by side: the same space, budget, data, recipe and number of optimizer steps for all.

Every run, of one strategy with one seed, starts from the same weights.  A strategy that trains takes `search_steps` and
leaves `recovery_steps`; one that does not gets both for recovery, over the same batches in the same order.  Recovery is
one recipe: BatchNorm measured anew, then a cosine from `lr`.

A run has a folder: `config.json`, `structure.json`, `curves.csv`, `weights.safetensors`, `result.json`.  Files are
written whole or not at all, `result.json` last; a run that has one is not repeated, so a killed comparison resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import budget as budgets
from . import recovery, running, storage
from .batches import generators_of
from .comparison import Comparison, Row, judge
from .cost import METRICS
from .distill import Distill, Distiller, frozen_copy
from .errors import DmscaleError, did_you_mean
from .latency import compare_latency
from .optional import MissingPackageError
from .progress import progress_bar
from .space import SearchSpace, trace
from .strategies import Found, Strategy, Task, select
from .structure import Structure

ALWAYS = ("uniform", "random")
"""In every comparison, asked for or not: what any method must beat."""

_WARM = 0.05  # of the recovery: the learning rate rises
RECALIBRATION = 20  # batches of BatchNorm statistics
OF_CALIBRATION = 7919  # what the calibration stream's seed is away from the run's

Optimizers = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Recipe:
    """What is the same for all strategies: the criterion, the optimizer, the rates and the steps."""

    criterion: Callable[[Any, Any], Tensor]
    optimizer: Optimizers
    lr: float
    search_lr: float
    search_steps: int
    recovery_steps: int
    distill: Distill | None = None

    @property
    def total_steps(self) -> int:
        return self.search_steps + self.recovery_steps


def compare(
    model: nn.Module | Callable[[], nn.Module],
    example_inputs: Any,
    train: Iterable[Any] | Callable[[int], Iterable[Any]],
    criterion: Callable[[Any, Any], Tensor],
    evaluate: Callable[[nn.Module], float],
    *,
    budget: Any,
    out: str | os.PathLike[str],
    strategies: str | Iterable[str] = "all",
    seeds: int | Iterable[int] = 3,
    search_steps: int = 200,
    recovery_steps: int = 200,
    lr: float = 1e-3,
    search_lr: float | None = None,
    weight_decay: float = 0.01,
    optimizer: Optimizers | None = None,
    metric: str = "accuracy",
    higher_is_better: bool = True,
    distill: Any = None,
    extra: Sequence[Strategy] = (),
    redo: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
    freeze: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    minimum: int | Mapping[str, int] = 1,
    multiple: int | Mapping[str, int] = 1,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Which strategy wins on this model, on equal footing.

    Args:
        model: the dense network, trained, or a function that returns it.  It is put back to its weights after each run.
        example_inputs: what one forward takes, on the model's device; costs and latency are those of this forward.
        train: batches of (inputs, targets), or seed -> such batches, which makes the order depend on the seed alone.
        criterion: criterion(output, targets) -> scalar loss.
        evaluate: evaluate(model) -> the metric, on data that no strategy sees.
        budget: "50% macs", dict(macs=0.5, params=6e6), or a `Budget`.
        out: folder for the runs and the table; what it holds already is not repeated.
        strategies: "all", "a,b", or names; `uniform` and `random` are always among them.
        seeds: how many (0, 1, ...) or which.
        search_steps: optimizer steps of a strategy that trains; the others get them added to their recovery.
        recovery_steps: optimizer steps that all take after the cut.
        lr: of the recovery, a cosine; `search_lr` of the weights in a search, constant, the same by default.
        optimizer: (parameters, lr) -> optimizer; by default AdamW with `weight_decay`.
        distill: what every recovery learns from the dense network beside the targets, as in `recover`: "logits", "features"
            (through the kept indices), ...  Nothing by default.  A model of an external tool, whose channels are not known
            to be the dense network's, is taught without the features.
        metric, higher_is_better: its name and sense.
        extra: strategies beside the registered ones, external tools for example.
        redo: names of strategies whose finished runs are thrown away first.
        settings: what the caller wants noted, and held fixed, in `config.json` (data set, model, sizes).
        freeze, only, minimum, multiple: as in `trace`.
        progress: whether to show a bar on a terminal.
        report: takes a line of text after every run.
    Raises:
        TraceError, BudgetError: before any training.
        DmscaleError: an unknown strategy (in `redo`, one that is not compared), no seed, no step, or `out` holds runs of other
            settings.
    A strategy that fails does not stop the others: its row says why, and its `error.txt` has the traceback.
    """
    chosen = select(strategies, extra)
    chosen += [s for s in select(ALWAYS) if s not in chosen]
    again = list(redo)
    if unknown := [name for name in again if name not in {s.name for s in chosen}]:
        raise DmscaleError(
            f"redo={unknown[0]!r} is none of the strategies compared{did_you_mean(unknown[0], [s.name for s in chosen])}"
        )
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or search_steps < 1 or recovery_steps < 0:
        raise DmscaleError(
            "a comparison needs at least one seed, one search step and no negative number of recovery steps"
        )
    dense = model if isinstance(model, nn.Module) else model()
    space = trace(dense, example_inputs, freeze=freeze, only=only, minimum=minimum, multiple=multiple)
    wanted = budgets.parse(budget, space)
    recipe = Recipe(
        criterion, optimizer or (lambda p, rate: torch.optim.AdamW(p, rate, weight_decay=weight_decay)), lr,
        lr if search_lr is None else search_lr, search_steps, recovery_steps, Distill.parse(distill),
    )  # fmt: skip
    fixed = {
        "model": type(dense).__name__, "budget": str(budget), "targets": {m: float(t) for m, t in wanted.targets.items()},
        "metric": metric, "search_steps": search_steps, "recovery_steps": recovery_steps, "total_steps": recipe.total_steps,
        "lr": lr, "search_lr": recipe.search_lr, "weight_decay": weight_decay if optimizer is None else None,
        "dense_cost": {m: int(space.cost()[m]) for m in METRICS}, **(settings or {}),
        **({"distill": str(recipe.distill)} if recipe.distill else {}),
    }  # fmt: skip
    folder = Path(out)
    for name in again:
        shutil.rmtree(folder / name, ignore_errors=True)
    runner = _Runner(space, wanted, train, evaluate, recipe, fixed, folder)
    runner.check()
    baseline = runner.dense()
    with progress_bar(progress) as bar:
        shown = bar.add_task("", total=len(numbers) * len(chosen) * recipe.total_steps)
        for done, (seed, strategy) in enumerate(itertools.product(numbers, chosen)):
            bar.update(shown, description=f"{strategy.name}, seed {seed}", completed=done * recipe.total_steps)
            line = runner.run(strategy, seed, lambda: bar.advance(shown))
            if line:
                report(line)
    rows = [runner.row(s, numbers) for s in chosen]
    result = Comparison(judge(rows, higher_is_better), metric, higher_is_better, baseline, fixed)
    _write(folder / "table.json", json.dumps(result.to_dict(), indent=1) + "\n")
    _write(folder / "table.md", result.markdown())
    try:
        if any(r.values for r in result.rows):
            result.plot(folder / "comparison.png")
    except MissingPackageError as error:
        report(str(error))
    return result


class _Runner:
    """The runs of one comparison."""

    def __init__(
        self,
        space: SearchSpace,
        budget: budgets.Budget,
        train: Any,
        evaluate: Callable[[nn.Module], float],
        recipe: Recipe,
        fixed: Mapping[str, Any],
        folder: Path,
    ):
        self.space, self.budget, self.train, self.evaluate = space, budget, train, evaluate
        self.recipe, self.fixed, self.folder = recipe, fixed, folder
        self.device = next((p.device for p in space.model.parameters()), torch.device("cpu"))
        self._weights = [t.detach().clone() for t in self._tensors()]
        self._training = [(m, m.training) for m in space.model.modules()]

    def _tensors(self) -> list[Tensor]:
        return [*self.space.model.parameters(), *self.space.model.buffers()]

    def _restore(self) -> None:
        """The model as it was given."""
        with torch.no_grad():
            for t, before in zip(self._tensors(), self._weights):
                t.copy_(before)
        for p in self.space.model.parameters():
            p.grad = None
        for m, training in self._training:
            m.training = training

    def check(self) -> None:
        """Refuse a folder that holds runs of other settings.

        Raises:
            DmscaleError: it does; what differs is named.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise DmscaleError(f"out is {self.folder}, a file; name a folder")
        path = self.folder / "settings.json"
        if path.exists():
            before, now = json.loads(path.read_text()), json.loads(json.dumps(dict(self.fixed)))
            differing = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            if differing:
                told = "; ".join(f"{k}: {before.get(k)} there, {now.get(k)} now" for k in differing[:5])
                raise DmscaleError(
                    f"{self.folder} holds runs of other settings ({told}); name another folder, or remove it"
                )
        _write(path, json.dumps(dict(self.fixed), indent=1) + "\n")

    def dense(self) -> float:
        """The metric of the full model, evaluated once."""
        path = self.folder / "dense.json"
        if not path.exists():
            value = float(self.evaluate(self.space.model))
            self._restore()
            _write(path, json.dumps({self.fixed["metric"]: value}) + "\n")
        return float(json.loads(path.read_text())[self.fixed["metric"]])

    def place(self, name: str, seed: int) -> Path:
        return self.folder / name / f"seed-{seed}"

    def run(self, strategy: Strategy, seed: int, tick: Callable[[], None]) -> str:
        """One run, unless it is finished already; a line about it, empty for one that was finished."""
        place = self.place(strategy.name, seed)
        if (place / "result.json").exists():
            return ""
        place.mkdir(parents=True, exist_ok=True)
        config = {
            **self.fixed,
            "strategy": strategy.name,
            "about": strategy.about,
            "seed": seed,
            **_versions(self.device),
        }
        _write(place / "config.json", json.dumps(config, indent=1) + "\n")
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                result = self._one(strategy, seed, place, tick)
        except Exception as error:  # one strategy that fails must not end a night of runs
            _write(place / "error.txt", traceback.format_exc())
            return f"{strategy.name}, seed {seed}: FAILED, {type(error).__name__}: {error}"
        finally:
            self._restore()
        (place / "error.txt").unlink(missing_ok=True)
        _write(place / "result.json", json.dumps(result, indent=1) + "\n")
        share, seconds = result["macs"] / self.fixed["dense_cost"]["macs"], result["search_s"] + result["recovery_s"]
        return (
            f"{strategy.name}, seed {seed}: {self.fixed['metric']} {result['value']:.4g} "
            f"(before recovery {result['before']:.4g}), MACs {share:.1%}, {seconds:.0f} s"
        )

    def _one(self, strategy: Strategy, seed: int, place: Path, tick: Callable[[], None]) -> dict[str, Any]:
        recipe, stream = self.recipe, Stream(self.train, seed, self.device)
        curves = _Curves(tick, recipe.total_steps)
        task = Task(
            self.space, self.budget, stream,
            lambda n: list(itertools.islice(Stream(self.train, seed + OF_CALIBRATION, self.device), n)),
            recipe.criterion, lambda p: recipe.optimizer(p, recipe.search_lr), recipe.search_steps, seed, curves.tick,
        )  # fmt: skip
        start = time.perf_counter()
        found = strategy.find(task)
        search_seconds = time.perf_counter() - start
        small, cost = self._model_of(found)
        recovery.recalibrate(small, task.calibration(RECALIBRATION))
        before = float(self.evaluate(small))
        curves.phase = "recovery"
        start = time.perf_counter()
        with self._taught(small, found.structure) as distiller:
            recover(small, stream, recipe, recipe.total_steps - found.steps, curves.tick, distiller)
        recovery_seconds = time.perf_counter() - start
        value = float(self.evaluate(small))
        if not math.isfinite(value):
            raise DmscaleError(f"the metric is {value} after recovery; is the learning rate {recipe.lr} too high?")
        self._restore()
        latency = compare_latency([self.space.model, small], self.space.example_inputs, repeats=50)
        storage.save(small, place / "weights.safetensors", found.structure)
        if found.structure is not None:
            _write(place / "structure.json", found.structure.to_json())
        if found.history:
            _write(place / "history.json", json.dumps(list(found.history)) + "\n")
        _write(place / "curves.csv", curves.text())
        return {
            "value": value, "before": before, **cost, "latency_ms": latency[1], "dense_latency_ms": latency[0],
            "search_s": search_seconds, "recovery_s": recovery_seconds, "search_steps": found.steps,
            "recovery_steps": recipe.total_steps - found.steps,
        }  # fmt: skip

    def _taught(self, small: nn.Module, structure: Structure | None) -> contextlib.AbstractContextManager[Any]:
        """The distillation of one recovery, from the dense network with the weights that it was given with.

        Raises:
            DmscaleError: the features are all there is to learn, and which they are is not known.
        """
        how = self.recipe.distill
        if how is None:
            return contextlib.nullcontext()
        if structure is None:
            how = dataclasses.replace(how, features=0.0)
            if not (how.logits or how.relations or how.function):
                raise DmscaleError("features alone cannot be learnt by the model of an external tool; add logits")
        self._restore()
        return Distiller(how, frozen_copy(self.space.model), small, self.space, structure)

    def _model_of(self, found: Found) -> tuple[nn.Module, dict[str, int]]:
        """The smaller model with its cost; an external tool's is traced anew and must be on budget too."""
        if found.structure is not None:
            cost = self.space.cost(found.structure)
            small = self.space.export(found.structure)
        elif found.model is not None:
            small = found.model
            cost = trace(small, self.space.example_inputs, verify=False).cost()
        else:
            raise DmscaleError("a strategy must return a structure or a model; this one returned neither")
        if not budgets.satisfied(cost, self.budget):
            raise DmscaleError(
                f"the model found costs {cost.macs} MACs and {cost.params} parameters, over {self.budget}"
            )
        return small, {m: int(cost[m]) for m in METRICS}

    def row(self, strategy: Strategy, seeds: Sequence[int]) -> Row:
        """The finished runs of a strategy; its first error where there is none."""
        places = [self.place(strategy.name, s) for s in seeds]
        done = [json.loads((p / "result.json").read_text()) for p in places if (p / "result.json").exists()]
        if not done:
            errors = [
                (p / "error.txt").read_text().strip().splitlines()[-1] for p in places if (p / "error.txt").exists()
            ]
            return Row(strategy.name, problem=errors[0].removeprefix("dmscale.errors.") if errors else "not run")
        full = self.fixed["dense_cost"]

        def mean(values: Iterable[float]) -> float:
            return statistics.fmean(values)

        return Row(
            strategy.name, tuple(r["value"] for r in done), tuple(r["before"] for r in done),
            mean(r["macs"] / full["macs"] for r in done), mean(r["params"] / full["params"] for r in done),
            statistics.median(r["latency_ms"] for r in done),
            statistics.median(r["dense_latency_ms"] / r["latency_ms"] for r in done),
            mean(r["search_s"] / (r["search_s"] + r["recovery_s"]) for r in done),
        )  # fmt: skip


def recover(
    model: nn.Module, stream: Iterator[Any], recipe: Recipe, steps: int, tick: Callable[[Tensor], None],
    distiller: Distiller | None = None,
) -> None:  # fmt: skip
    """Train `model` in place: the rate rises to `recipe.lr` in the first steps and falls as a cosine.

    Raises:
        DmscaleError: the loss is not finite.
    """
    optimizer = recipe.optimizer([p for p in model.parameters() if p.requires_grad], recipe.lr)
    model.train()
    for step in range(steps):
        rate = min(1.0, (step + 1) / max(_WARM * steps, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        loss = recovery.loss_of(model, next(stream), recipe.criterion, distiller)
        if step % 20 == 0 and not math.isfinite(loss.item()):
            raise DmscaleError(f"the loss is {loss.item()} at recovery step {step}; lower lr={recipe.lr}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tick(loss)
    model.eval()


class Stream:
    """Endless batches on a device, in an order that depends on the seed alone.

    Shuffling and augmentation that draw on PyTorch's generator, or on one of the loader's own, get one of their own here, so
    what a strategy draws meanwhile (dropout, its own choices, another stream of the same loader) does not change the data.
    """

    def __init__(self, train: Any, seed: int, device: torch.device):
        self._device = device
        self._state = torch.Generator().manual_seed(seed).get_state()
        self._loader: Iterable[Any] = train(seed) if callable(train) else train
        self._generators = [] if callable(train) else generators_of(self._loader)
        self._own = [torch.Generator(g.device).manual_seed(seed).get_state() for g in self._generators]
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Any, Any]:
        """The next batch.

        Raises:
            DmscaleError: the loader is empty, or gives no pairs.
        """
        outside, of_loader = torch.random.get_rng_state(), [g.get_state() for g in self._generators]
        self._set(self._state, self._own)
        try:
            batch = self._draw()
        finally:
            self._state, self._own = torch.random.get_rng_state(), [g.get_state() for g in self._generators]
            self._set(outside, of_loader)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DmscaleError(f"the training data gave a {type(batch).__name__}; expected pairs (inputs, targets)")
        return tuple(running.map_tensors(lambda t: t.to(self._device, non_blocking=True), tuple(batch)))

    def _set(self, state: Tensor, own: Sequence[Tensor]) -> None:
        torch.random.set_rng_state(state)
        for generator, at in zip(self._generators, own):
            generator.set_state(at)

    def _draw(self) -> Any:
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            raise DmscaleError(
                "the training data is empty, or can be run through only once; give a list or a DataLoader"
            )
        return batch


class _Curves:
    """The loss of a run, some two hundred rows."""

    def __init__(self, tick: Callable[[], None], steps: int):
        self._tick, self._every = tick, max(1, steps // 200)
        self.phase, self._step = "search", 0
        self._rows = ["step,phase,loss"]

    def tick(self, loss: Tensor) -> None:
        self._step += 1
        if self._step % self._every == 0:
            self._rows.append(f"{self._step},{self.phase},{loss.item():.6g}")
        self._tick()

    def text(self) -> str:
        return "\n".join(self._rows) + "\n"


def _versions(device: torch.device) -> dict[str, Any]:
    from . import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "dmscale": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "device": f"{device.type}: {name}", "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()) + " UTC",
    }  # fmt: skip


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(text)
    os.replace(temporary, path)
