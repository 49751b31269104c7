"""What a structure costs, as a polynomial of the dimension sizes.

Every contraction of the trace contributes the product of its axis sizes, every parameter the product of its own; what
stands inside a removable block carries that block's gate as one more factor.  So a cost is a sum of monomials, and one
formula serves a single structure, ten thousand of them, and differentiable soft sizes.

A MAC is one multiply-accumulate of a contraction: convolutions, matrix products, both products of attention.
Normalisations, activations and additions are not counted, as in `torch.utils.flop_counter` (which counts two FLOPs a MAC).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .polynomial import Poly


@dataclass(frozen=True)
class Cost:
    """macs: multiply-accumulates of one forward on the example inputs.  params: number of parameters.
    bytes: of the parameters in their own dtype.  activations: bytes that one forward writes, views excluded.
    uncounted: operators whose MACs are not known, as 'operator in module'.
    """

    macs: int
    params: int
    bytes: int
    activations: int
    uncounted: tuple[str, ...] = ()

    def __getitem__(self, metric: str) -> int:
        return getattr(self, metric)


METRICS = ("macs", "params", "bytes", "activations")
UNITS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "activations": "bytes of activations"}


class Monomials:
    """A polynomial laid out for evaluation: `coefficients` (M,) and, for each monomial, `index` (M, K) of its variables.

    The variable behind the last one is the constant one, with which short monomials are filled.
    """

    def __init__(self, poly: Poly, variables: Mapping[Hashable, int]):
        width = max((len(m) for m in poly.terms), default=0)
        one = len(variables)
        # in an order of their own, so that rounding at real sizes is the same in every run
        terms: dict[tuple[int, ...], int] = {}
        for m, c in poly.terms.items():
            row = (*sorted(variables[v] for v in m), *[one] * (width - len(m)))
            terms[row] = terms.get(row, 0) + c
        self.coefficients = np.array([terms[row] for row in sorted(terms)], dtype=np.int64)
        self.index = np.array(sorted(terms), dtype=np.int64).reshape(len(terms), width)
        self._tensors: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def count(self, values: np.ndarray) -> np.ndarray:
        """Exact value at `values` (S, V + 1) of int64: one number for each of S structures, (S,)."""
        out = np.broadcast_to(self.coefficients, (len(values), len(self.coefficients))).copy()
        for column in self.index.T:
            out *= values[:, column]
        return out.sum(1)

    def real(self, values: np.ndarray) -> np.ndarray:
        """Values at real sizes (S, V + 1) of float64: (S,)."""
        out = np.broadcast_to(self.coefficients.astype(np.float64), (len(values), len(self.coefficients))).copy()
        for column in self.index.T:
            out *= values[:, column]
        return out.sum(1)

    def soft(self, values: torch.Tensor) -> torch.Tensor:
        """Differentiable value at `values` (V + 1,): a scalar of the same dtype."""
        if values.device not in self._tensors:
            laid_out = torch.from_numpy(self.coefficients), torch.from_numpy(self.index)
            self._tensors[values.device] = laid_out[0].to(values.device), laid_out[1].to(values.device)
        coefficients, index = self._tensors[values.device]
        out = coefficients.to(values.dtype)
        for k in range(index.shape[1]):
            out = out * values[index[:, k]]
        return out.sum()


class CostModel:
    """The four costs of a search space over one vector of variables: the sizes of free axes, the gates of blocks.

    Args:
        variables: axis atoms and blocks, in the order of the vector.
        polynomials: metric -> polynomial in them.
        uncounted: operators whose MACs are not known.
    """

    def __init__(self, variables: Sequence[Hashable], polynomials: Mapping[str, Poly], uncounted: Sequence[str] = ()):
        self.variables = {v: i for i, v in enumerate(variables)}
        self.metrics = {metric: Monomials(poly, self.variables) for metric, poly in polynomials.items()}
        self.uncounted = tuple(uncounted)

    def exact(self, values: Sequence[int] | np.ndarray) -> Cost:
        """The cost at one vector of sizes."""
        row = np.append(np.asarray(values, dtype=np.int64), 1)[None]
        return Cost(**{m: int(p.count(row)[0]) for m, p in self.metrics.items()}, uncounted=self.uncounted)

    def many(self, values: np.ndarray, metric: str, chunk: int = 4096) -> np.ndarray:
        """One metric at many vectors (S, V): (S,) of int64."""
        one = np.ones((len(values), 1), dtype=np.int64)
        values = np.concatenate([values.astype(np.int64), one], 1)
        parts = [self.metrics[metric].count(values[i : i + chunk]) for i in range(0, len(values), chunk)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def soft(self, values: torch.Tensor, metric: str) -> torch.Tensor:
        """One metric at a vector of soft sizes (V,): a differentiable scalar."""
        return self.metrics[metric].soft(torch.cat([values, values.new_ones(1)]))


def product(polynomials: Sequence[Any]) -> Poly:
    """The product of polynomials."""
    out = Poly.of(1)
    for p in polynomials:
        out = out * p
    return out
