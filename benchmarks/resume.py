"""Does a search that is killed end as one that is not?

    python -m benchmarks.resume

A search runs in a process of its own and saves a checkpoint after every step.  The process is killed (SIGKILL) at a random
moment, started again (as a fork of the benchmark, which has searched nothing itself), killed again ...; at the end structure,
scalars, importance and weights must equal, to the bit, those of a search that was left alone.  Batches and dropout are drawn from
the global generators, so that these must resume too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dmscale

STEPS = 150
_ROOT = Path(__file__).resolve().parents[1]


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, width) -> (batch, width)."""
        return x + self.down(nn.functional.dropout(self.up(self.norm(x)).relu(), 0.1, self.training))


def run(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Search, from the checkpoint in `folder` if there is one; what is found, as hexadecimal digests."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), *(Block(24, 16) for _ in range(3)), nn.Linear(24, 4))
    search = dmscale.Search(dmscale.trace(model, torch.randn(2, 8), verify=False), "50% macs", steps)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    search.attach(optimizer)
    search.model.train()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path = folder / "search.ckpt"
    if path.exists():
        schedule.load_state_dict(search.load(path, optimizer)["schedule"])
    print(f"step {search.step}", flush=True)
    while not search.done:
        x = torch.randn(16, 8)
        nn.functional.mse_loss(search.model(x), x[:, :4].square()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        search.save(path, optimizer, extra={"schedule": schedule.state_dict()})
    tensors = {"scalars": [search.pruned], "importance": [search.importance], "weights": model.state_dict().values()}
    found = {name: _digest(values) for name, values in tensors.items()}
    return found | {"structure": search.structure.to_json(), "history": search.history}


def _digest(tensors: Any) -> str:
    return hashlib.sha256(b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def _child(folder: Path, steps: int, forked: bool) -> tuple[Any, Any]:
    """(a process that searches from the checkpoint in `folder`, where it prints to)."""
    if forked:
        read, write = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=_printing, args=(folder, steps, read, write))
        process.start()
        os.close(write)
        return process, os.fdopen(read)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resume", "--run", str(folder), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT, env=environment)
    return popen, popen.stdout


def _printing(folder: Path, steps: int, read: int, write: int) -> None:
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = os.fdopen(1, "w")
    print(json.dumps(run(folder, steps)), flush=True)


def survive(
    folder: Path, kills: int, seed: int, longest: float, steps: int = STEPS, forked: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the search in processes that are killed; what it has found at last, and a note about each kill.

    Args:
        folder: where its checkpoint lives.
        kills: how often; fewer if the search ends before.
        seed: of the moments.
        longest: the longest time, in seconds, from the first step of a process to its end.
        steps: of the search.
        forked: whether processes are forks of this one, which has imported what they need and searched nothing itself.
    """
    rng, notes = random.Random(seed), []
    while True:
        child, printed = _child(folder, steps, forked)
        first = printed.readline()
        if len(notes) < kills:
            time.sleep(rng.uniform(0, longest))
            child.kill()  # nothing if it has ended
        rest = printed.read()
        printed.close()
        if forked:
            child.join()
        code = child.exitcode if forked else child.wait()
        if code == 0:
            return json.loads(rest), notes
        if code != -9:
            raise RuntimeError(f"the search failed with exit code {code} after {first!r}")
        notes.append({"from": int(first.split()[1]), "while writing": any(folder.glob("*.part"))})


def main(kills: int = 20, each: int = 4) -> None:
    """Print one row a search."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        expected, _ = survive(Path(folder), 0, 0, 0, forked=True)
        longest = time.perf_counter() - start
    print("| search | killed | resumed from step | killed while writing | same structure | same to the bit |")
    print("| ---: | ---: | --- | ---: | --- | --- |")
    done, trial = 0, 0
    while done < kills:
        with tempfile.TemporaryDirectory() as folder:
            found, notes = survive(Path(folder), min(each, kills - done), trial, longest / each, forked=True)
        done, trial = done + len(notes), trial + 1
        steps = ", ".join(str(n["from"]) for n in notes[1:]) or "-"
        print(
            f"| {trial} | {len(notes)} | {steps} | {sum(n['while writing'] for n in notes)} | "
            f"{found['structure'] == expected['structure']} | {found == expected} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="search in this folder and print what was found")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(run(arguments.run, arguments.steps)))
    else:
        main(arguments.kills)
