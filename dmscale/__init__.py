"""dmscale: scale any PyTorch network to a resource budget by gradient.

space = dmscale.trace(model, example_inputs)
search = dmscale.Search(space, budget="50% macs", steps=2000)
search.attach(optimizer)                     # then train `search.model` as usual
small = search.export()                      # a plain, smaller model of the same class
"""

from .budget import Budget
from .compare import compare
from .comparison import Comparison
from .cost import Cost
from .errors import BudgetError, CheckpointError, DmscaleError, ExportError, SearchError, TraceError
from .expand import expand, expansion_origin
from .scale import Scaled, scale
from .search import Search
from .space import Dimension, SearchSpace, trace
from .storage import load, save
from .structure import Structure

__all__ = [
    "Budget", "BudgetError", "CheckpointError", "Comparison", "Cost", "Dimension", "DmscaleError", "ExportError", "Scaled",
    "Search", "SearchError", "SearchSpace", "Structure", "TraceError", "compare", "expand", "expansion_origin", "load", "save",
    "scale", "trace",
]  # fmt: skip
__version__ = "0.1.0"
