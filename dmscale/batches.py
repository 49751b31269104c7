"""An endless stream of batches from a loader, which can be found again after a crash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from . import checkpoint, running
from .errors import DmscaleError

_END = object()


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader has for its own, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)]
    return list({id(g): g for g in found}.values())


class Batches:
    """Runs through a loader again and again; gives pairs (inputs, targets) on `device`.

    Its state is where the generators of random numbers stood when the present pass began, and how many batches the pass has
    given: a resumed stream begins the same pass and skips those.  The loader must draw its order from the global generators
    or from a `generator` of its own (as `DataLoader` does), or have a fixed one.

    Args:
        loader: iterable of pairs, more than once.
        device: where batches are moved to.
    Raises:
        DmscaleError: when read, if the loader is empty or gives something else than pairs.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device):
        self.loader, self.device = loader, device
        self._pass: Iterator[Any] | None = None
        self._begun: dict[str, Any] = {}
        self._position = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self._pass is None:
            self._begin()
        assert self._pass is not None
        batch = next(self._pass, _END)
        if batch is _END:
            if self._position == 0:
                raise DmscaleError(
                    "the loader gave no batch; a generator can be run through only once, give a list or DataLoader"
                )
            self._pass = None
            return next(self)
        self._position += 1
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DmscaleError(f"the loader gave a {type(batch).__name__}; expected pairs (inputs, targets)")
        return tuple(running.map_tensors(lambda t: t.to(self.device, non_blocking=True), tuple(batch)))  # type: ignore[return-value]

    def _begin(self) -> None:
        own = [g.get_state() for g in generators_of(self.loader)]
        self._begun = {"random": checkpoint.random_state(), "own": own}
        self._pass, self._position = iter(self.loader), 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data: where the stream is."""
        return {"begun": self._begun, "position": self._position} if self._pass is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was; this moves the global generators, so set these afterwards."""
        self._pass = None
        if state:
            checkpoint.set_random_state(state["begun"]["random"])
            for generator, own in zip(generators_of(self.loader), state["begun"]["own"]):
                generator.set_state(own)
            self._begin()
            for _ in range(state["position"]):
                next(self)
