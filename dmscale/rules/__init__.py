"""Rules of operators: how the axes of the outputs follow from those of the inputs.  See `registry`."""

from . import indexing, reductions, regular, spatial, structural
from .registry import RULES, Equation, contract, equation, rule

__all__ = [
    "RULES",
    "Equation",
    "contract",
    "equation",
    "indexing",
    "reductions",
    "regular",
    "rule",
    "spatial",
    "structural",
]
