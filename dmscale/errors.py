"""What dmscale raises.  Every message names the module or dimension, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class DmscaleError(ValueError):
    """Base of all errors of dmscale: the input cannot be served as asked."""


class TraceError(DmscaleError):
    """The model could not be run or read on the example inputs."""


class ExportError(DmscaleError):
    """A structure could not be turned into a plain model that equals the gated one."""


class BudgetError(DmscaleError):
    """A budget is misspelt, contradictory or out of reach."""


class SearchError(DmscaleError):
    """A search was used wrongly, or the training diverged."""


class CheckpointError(DmscaleError):
    """A checkpoint could not be written, is damaged, or does not fit."""


def did_you_mean(name: str, names: Iterable[str], most: int = 3) -> str:
    """The end of a message about a name that is none of `names`: those that are close, or nothing.

    >>> did_you_mean("witdh", ["width", "depth"], 1)
    "; did you mean 'width'?"
    """
    close = difflib.get_close_matches(name, list(names), most, 0.4)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
