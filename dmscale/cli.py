"""The command line: `dmscale demo`, `dmscale trace MODEL`, `dmscale scale MODEL --data D --budget B`,
`dmscale compare MODEL --data D --budget B`.

Every error of dmscale is one red message and exit code 2; `dmscale --debug ...` shows its traceback.
"""

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from typer.core import TyperGroup

import dmscale

from .checkpoint import preserving_random_state
from .data import OnDevice, load_data, to_device
from .errors import DmscaleError, TraceError
from .evaluate import accuracy, check_fit, classification_loss
from .latency import compare_latency
from .methods import METHODS
from .sources import SourceError, load_model, parse_shape
from .strategies import REGISTRY
from .tables import number


class _CleanErrors(TyperGroup):
    """Shows an error of dmscale as its message alone: the user's input is wrong, not our code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DmscaleError as error:
            if ctx.params.get("debug"):
                raise
            Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_CleanErrors,
    help="Scale any PyTorch network to a resource budget by gradient search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelSpec = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, hf:PATH_OR_CONFIG or file.py:factory"),
]
InputShape = Annotated[
    str | None,
    typer.Option("--input", help="Shape of the example input, as 1x3x224x224; by default the model's own."),
]
Classes = Annotated[int | None, typer.Option(min=1, help="Size of the model's classification head.")]
Weights = Annotated[Path | None, typer.Option(help="Local state dict: safetensors or a torch file.")]
Freeze = Annotated[list[str] | None, typer.Option(help="Dimensions to leave as they are (a pattern; repeatable).")]
Only = Annotated[list[str] | None, typer.Option(help="Dimensions to scale, no others (a pattern; repeatable).")]
BatchSize = Annotated[int, typer.Option(min=2, help="Of digits and of folders of images.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, data order and search.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dmscale {dmscale.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Scale any PyTorch network to a resource budget by gradient search."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to repeat it with.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="One model and one budget.")] = False,
) -> None:
    """Search small networks on embedded data: a minute or two on two CPU cores."""
    from . import demo as demonstration

    smaller: dict[str, Any] = {"models": ("cnn",), "budgets": (0.25,)} if quick else {}
    _make_folder(out)
    demonstration.run(out=out, seeds=seeds, first_seed=seed, console=Console(), **smaller)


@app.command()
def trace(
    model: ModelSpec,
    input: InputShape = None,
    classes: Classes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    freeze: Freeze = None,
    only: Only = None,
) -> None:
    """Show what in MODEL can be made smaller, its share of the cost, and what is frozen and why."""
    source = load_model(model, shape=parse_shape(input) if input else None, classes=classes)
    try:
        space = dmscale.trace(source.model, source.inputs, freeze=freeze or (), only=only or ())
    except TraceError as error:
        given = f"--input {input}" if input else "the inputs that its source gives"
        raise SourceError(f"{model} with {given}: {error}") from error
    if as_json:
        print(json.dumps(space.to_dict(), indent=2))
    else:
        Console().print(space)


@app.command()
def scale(
    model: ModelSpec,
    data: Annotated[str, typer.Option(help="digits, a folder of images, or file.py:loader.")],
    budget: Annotated[str, typer.Option(help='What to reach, as "50% macs" or "6M params".')],
    out: Annotated[Path, typer.Option(help="Folder for the smaller model and the report.")],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the search; by default two passes over the training data, at least 200."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Epochs of fine-tuning after it; by default twice as many steps as the search."),
    ] = None,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of the weights, in search and fine-tuning.")] = 1e-3,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    input: InputShape = None,
    classes: Classes = None,
    weights: Weights = None,
    freeze: Freeze = None,
    only: Only = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Fine-tune from the weights before the search, cut to the structure.")
    ] = False,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Search without moving a weight, and do not fine-tune.")
    ] = False,
    expand_width: Annotated[
        float | None,
        typer.Option(min=1, help="Search a version that is this much wider, down to shares of MODEL's cost."),
    ] = None,
    expand_depth: Annotated[float | None, typer.Option(min=1, help="The same with more blocks.")] = None,
    distill: Annotated[
        str | None, typer.Option(help="Learn from MODEL as it is: logits, relations, features, with commas.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"Of the search: {', '.join(METHODS)}; by default {next(iter(METHODS))}.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
) -> None:
    """Search MODEL down to a budget, fine-tune the smaller network and save it."""
    torch.manual_seed(seed)
    place = _device(device)
    source = load_model(model, shape=parse_shape(input) if input else None, classes=classes, weights=weights)
    batches = load_data(data, source, batch_size=batch_size, seed=seed)
    train, val = OnDevice(batches.train, place), OnDevice(batches.val, place)
    network, inputs = source.model.to(place), to_device(source.inputs, place)
    _check_data(model, data, network, train, val, batches.num_classes)
    if weights is None and model.startswith(("timm:", "torchvision:")):
        print("The dense model has random weights, its accuracy is chance; --weights brings trained ones.")
    _make_folder(out)

    dense = copy.deepcopy(network)  # the search trains the network's own weights
    chosen: dict[str, Any] = {
        "steps": steps,
        "finetune_steps": None if epochs is None else epochs * _length(train, data),
        "lr": lr,
        "freeze": freeze,
        "only": only,
        "inherit": False if from_scratch else None,
        "train_weights": False if structure_only else None,
        "expand": {k: v for k, v in (("width", expand_width), ("depth", expand_depth)) if v is not None} or None,
        "distill": distill,
        "method": method,
    }
    result = dmscale.scale(
        network,
        inputs,
        train,
        classification_loss,
        budget=budget,
        seed=seed,
        progress=True,
        **{name: value for name, value in chosen.items() if value is not None},
    )

    rows = {}
    times = compare_latency([dense, result.model], inputs)
    full = dmscale.trace(
        dense, inputs, verify=False
    ).cost()  # with --expand-width the space is that of a larger network
    networks = (("dense", dense, full), ("scaled", result.model, result.cost))
    for (name, net, cost), milliseconds in zip(networks, times):
        rows[name] = {
            "accuracy": accuracy(net, val),
            "macs": int(cost.macs),
            "params": int(cost.params),
            "bytes": int(cost.bytes),
            "latency_ms": milliseconds,
        }
    dmscale.save(result.model, out / "small.safetensors")
    (out / "structure.json").write_text(result.structure.to_json())
    report: dict[str, Any] = {"model": model, "weights": weights and str(weights), "data": data}
    report |= {"budget": budget, "seed": seed, "batch_size": batch_size, "device": str(place), **chosen}
    report |= {"torch": torch.__version__, "dmscale": dmscale.__version__}
    (out / "report.json").write_text(json.dumps({**report, **rows}, indent=2) + "\n")
    _print_rows(rows, out)


@app.command()
def compare(
    model: ModelSpec,
    data: Annotated[str, typer.Option(help="digits, a folder of images, or file.py:loader.")],
    budget: Annotated[str, typer.Option(help='What to reach, as "50% macs" or "6M params".')],
    out: Annotated[Path, typer.Option(help="Folder for the runs and the table; what is there is not repeated.")],
    strategies: Annotated[str, typer.Option(help=f"all, or names with commas: {', '.join(REGISTRY)}.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    search_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a search.")] = 200,
    recovery_steps: Annotated[int, typer.Option(min=0, help="Optimizer steps after it, for all.")] = 200,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of search and recovery.")] = 1e-3,
    batch_size: BatchSize = 64,
    distill: Annotated[
        str | None, typer.Option(help="Every recovery learns from MODEL too: logits, relations, features, with commas.")
    ] = None,
    redo: Annotated[str, typer.Option(help="Strategies whose finished runs are thrown away first.")] = "",
    input: InputShape = None,
    classes: Classes = None,
    weights: Weights = None,
    freeze: Freeze = None,
    only: Only = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
) -> None:
    """Compare strategies on MODEL: the same space, budget, data, steps and recovery for all, with random ones beside."""
    place = _device(device)
    torch.manual_seed(0)  # of a model without weights
    source = load_model(model, shape=parse_shape(input) if input else None, classes=classes, weights=weights)
    network, inputs = source.model.to(place), to_device(source.inputs, place)
    batches = load_data(data, source, batch_size=batch_size)
    val = OnDevice(batches.val, place)
    _check_data(model, data, network, OnDevice(batches.train, place), val, batches.num_classes)
    if weights is None and model.startswith(("timm:", "torchvision:")):
        print(
            "The dense model has random weights, so this compares structures to train; --weights brings trained ones."
        )
    _make_folder(out)
    console = Console()
    result = dmscale.compare(
        network,
        inputs,
        lambda seed: load_data(data, source, batch_size=batch_size, seed=seed).train,
        classification_loss,
        lambda net: 100 * accuracy(net, val),
        budget=budget,
        out=out,
        strategies=strategies,
        seeds=seeds,
        search_steps=search_steps,
        recovery_steps=recovery_steps,
        lr=lr,
        distill=distill,
        metric="accuracy %",
        redo=[name for name in redo.split(",") if name],
        settings={"source": model, "data": data, "weights": weights and str(weights), "batch_size": batch_size},
        freeze=freeze or (),
        only=only or (),
        report=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    console.print(result)
    written = "table.md, table.json, comparison.png, and a folder for each run"
    console.print(f"Written to {escape(str(out))}: {written}", soft_wrap=True)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file; name a folder" if out.is_file() else f"cannot be made: {error.strerror}"
        raise SourceError(f"--out {out} {what}") from error


def _check_data(model: str, data: str, net: nn.Module, train: OnDevice, val: OnDevice, classes: int | None) -> None:
    """One batch of each part through the model; of data of ours the training part is as the other."""
    parts = {"validation": val} if classes is not None else {"training": train, "validation": val}
    for part, batches in parts.items():
        try:
            with preserving_random_state():
                check_fit(net, batches, classes)
        except DmscaleError as error:
            raise SourceError(f"{model} on the {part} data of {data}: {error}") from error


def _length(train: OnDevice, data: str) -> int:
    try:
        return len(train)
    except TypeError as error:
        raise SourceError(f"--epochs: the training data of {data} have no length; give a loader with one") from error


def _device(name: str | None) -> torch.device:
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SourceError(f"--device {name} cannot be used here: {error}") from error
    return place


def _print_rows(rows: dict[str, dict[str, Any]], out: Path) -> None:
    table = Table("", "dense", "scaled", "share")
    for label, key, shown in (
        ("accuracy", "accuracy", lambda x: f"{x:.2%}"),
        ("MACs", "macs", number),
        ("parameters", "params", number),
        ("latency (ms)", "latency_ms", lambda x: f"{x:.2f}"),
    ):
        dense, scaled = rows["dense"][key], rows["scaled"][key]
        table.add_row(label, shown(dense), shown(scaled), "" if key == "accuracy" else f"{scaled / dense:.1%}")
    console = Console()
    console.print(table)
    console.print(f"Written to {escape(str(out))}: small.safetensors, structure.json, report.json", soft_wrap=True)
