"""python -m benchmarks.zoo.unseen [--draw 300] [--seed 0] [--out docs] [--jobs 1]

Models that nobody has chosen: does one that the zoo does not list have the same chance as one that it does?

- timm: names drawn at random from all that the zoo does not list, those of up to `MOST` parameters.
- transformers: every kind of model that the zoo does not list and that its automatic classes know for text, images or sound,
  in one and the same small configuration (`SMALL`), where it builds and runs with that.

What does not build or run by itself is left out, and counted.  Each of the others is measured as in the zoo; the page is
docs/unseen.md.
"""

from __future__ import annotations

import argparse
import random
import resource
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmscale.progress import progress_bar
from dmscale.sources import allow_missing_torchvision_operators

from . import Entry, entries, pages, runner, vision
from .language import ids, lively, waveform
from .measure import STRUCTURES, measure, said

MOST = 32_000_000
"""Parameters of a model that is measured."""
MEMORY = 12 * 2**30
"""Bytes that one model may take: some build what a small configuration does not reach."""
LIMIT = 150.0
"""Seconds that one may take."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers",
                     "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 6),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim", "ffn_dim"), 80),
    "decoder_ffn_dim": 72, "num_key_value_heads": 3, "head_dim": 8, "d_kv": 8, "rotary_dim": 8, "vocab_size": 60,
    "max_position_embeddings": 64, "n_positions": 64, "image_size": 32, "patch_size": 8, "sliding_window": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 40, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "decoder_start_token_id": 2, "use_cache": False,
}  # fmt: skip
"""Name that configurations of transformers have for it -> a small size."""

Built = tuple[nn.Module, Any]


def timm_entries(draw: int, seed: int) -> list[Entry]:
    """`draw` names of timm that the zoo does not list."""
    import timm

    listed = {name for name, _, _ in vision.TIMM.values()} | set(vision.MORE_TIMM)
    names = [n for n in timm.list_models() if n not in listed]
    drawn = random.Random(seed).sample(names, min(draw, len(names)))
    return [Entry(f"timm:{name}", "timm", partial(_timm, name)) for name in sorted(drawn)]


def transformers_entries() -> list[Entry]:
    """The kinds of models that the zoo does not list, each by the first automatic class that knows it."""
    from transformers.models.auto import modeling_auto as auto

    listed = {e.name.partition(":")[2].replace("-", "_") for e in entries() if e.name.startswith("hf:")}
    tasks: list[tuple[Any, list[Callable[[], Any]]]] = [
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, [_text, _texts]),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, [_text]),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, [_texts]),
        (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, [_image, partial(_image, 224)]),
        (auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, [_sound]),
    ]
    found: dict[str, Entry] = {}
    for names, inputs in tasks:
        for kind, classes in names.items():
            if kind.replace("-", "_") not in listed and kind not in found:
                first = classes if isinstance(classes, str) else classes[0]
                found[kind] = Entry(f"hf:{kind}", "transformers", partial(_transformers, kind, first, inputs))
    return [found[kind] for kind in sorted(found)]


def _text() -> Any:
    return {"input_ids": ids()}


def _texts() -> Any:
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def _image(size: int = 32) -> Any:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _sound() -> Any:
    return waveform(1600)


class LeftOut(Exception):
    """A model that does not build or run by itself, or is too large."""


def _timm(name: str) -> Built:
    """The model, with the smallest pictures that it takes: what is not made for one size takes small ones."""
    import timm

    with torch.device("meta"):
        _check_size(timm.create_model(name))
    model = timm.create_model(name).eval()
    colours, side = model.default_cfg["input_size"][0], model.default_cfg["input_size"][-1]
    makers = [lambda n=n: torch.randn(2, colours, n, n) for n in (64, 96, 128) if n < side]
    return model, _first_that_runs(model, [*makers, lambda: torch.randn(2, colours, side, side)])


def _transformers(kind: str, name: str, inputs: Sequence[Callable[[], Any]]) -> Built:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = _small(CONFIG_MAPPING[kind])
    model = lively(getattr(transformers, name)(config).eval())
    _check_size(model)
    return model, _first_that_runs(model, inputs)


def _small(cls: Any) -> Any:
    """A configuration with everything in it small that is called as in `SMALL`."""
    usual, other_names = cls(), getattr(cls, "attribute_map", {})
    sizes = {n: v for n, v in SMALL.items() if isinstance(getattr(usual, other_names.get(n, n), None), int)}
    sizes = {n: v for n, v in sizes.items() if other_names.get(n) not in sizes}  # once, by its own name
    try:
        return cls(**sizes)
    except Exception:  # some work it out themselves
        return cls(**{n: v for n, v in sizes.items() if n != "head_dim"})


def _check_size(model: nn.Module) -> None:
    if (parameters := sum(p.numel() for p in model.parameters())) > MOST:
        raise LeftOut(f"{parameters / 1e6:.0f} M parameters")


def _first_that_runs(model: nn.Module, makers: Sequence[Callable[[], Any]]) -> Any:
    for maker in makers:
        inputs = maker()
        try:
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, dict) else model(inputs)
            return inputs
        except Exception as failure:
            why = failure
    raise LeftOut(f"its forward fails: {said(why)}")


def _measured(entry: Entry) -> Iterator[Mapping[str, Any]]:
    """The row of an entry; while it is being built, that of one that is left out."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    row = {"name": entry.name, "family": entry.family, "built": False}
    yield row
    torch.manual_seed(0)
    try:
        built = entry.build()
    except LeftOut as reason:
        yield {**row, "status": "skipped", "problem": str(reason)}
        return
    except Exception as failure:
        yield {**row, "status": "skipped", "problem": f"does not build: {said(failure)}"}
        return
    yield {**row, "built": True}
    yield {**measure(Entry(entry.name, entry.family, lambda: built)).to_dict(), "built": True}


def page(rows: Sequence[Mapping[str, Any]], seed: int) -> str:
    """docs/unseen.md."""
    tried = [r for r in rows if r["built"]]
    parts = [_INTRODUCTION.format(most=MOST // 10**6, seed=seed, structures=STRUCTURES), pages.summary(tried)]
    for family in dict.fromkeys(r["family"] for r in rows):
        among = [r for r in rows if r["family"] == family]
        out = Counter("too large" if "M parameters" in r["problem"] else "does not build or run in this configuration"
                      for r in among if not r["built"])  # fmt: skip
        left = ", ".join(f"{n} {why}" for why, n in out.most_common())
        parts.append(f"## {family}\n\n{len(among)} tried; left out: {left or 'none'}.\n")
        parts.append(pages.table([r for r in among if r["built"]]))
    return "\n".join(parts)


_INTRODUCTION = """# Models that nobody has chosen

Written by `python -m benchmarks.zoo.unseen`; do not edit.  The models of [the zoo](zoo.md) were there while the tracer was
written.  These were not: names of timm drawn at random (seed {seed}) from all that the zoo does not list, up to {most} million
parameters, and every kind of model of transformers that it does not list, in one small configuration that is the same for
all.  Each is measured as in the zoo, with {structures} random structures; what the columns say is written there.
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the page; 1 if one crashes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo.unseen", description="Models that nobody has chosen."
    )
    parser.add_argument("--draw", type=int, default=300, help="names of timm")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the page is written")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/unseen.jsonl"), help="rows so far, one JSON line each"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, one core each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    allow_missing_torchvision_operators()
    import transformers

    transformers.logging.set_verbosity_error()
    wanted = [*timm_entries(options.draw, options.seed), *transformers_entries()]
    results = runner.Results(options.results, runner.fingerprint(["measure.py", "unseen.py"]))
    todo = [e for e in wanted if e.name not in results.rows]
    with progress_bar() as bar:
        task = bar.add_task("unseen", total=len(todo))
        for row in runner.run(todo, _measured, LIMIT, options.jobs):  # type: ignore[arg-type]
            results.add(row)
            bar.console.print(
                f"{row['status'] if row['built'] else 'left out':8} {row['name']}: {row['problem']}", markup=False
            )
            bar.advance(task)
    rows = [results.rows[e.name] for e in wanted]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "unseen.md").write_text(page(rows, options.seed))
    tried = [r for r in rows if r["built"]]
    print(f"{sum(r['status'] == 'exact' for r in tried)} of {len(tried)} exact")
    return int(any(r["status"] in ("crashed", "timeout") for r in tried))


if __name__ == "__main__":
    raise SystemExit(main())
