"""Optional packages are imported where they are used; a missing one is an error that names its extra."""

import importlib
from types import ModuleType

from .errors import DmscaleError


class MissingPackageError(DmscaleError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """The imported `package`.

    `extra` is the name of dmscale's extra that installs it, `purpose` what the user wanted it for (both
    go into the message).  An installed package that fails to import keeps its own error: installing it again
    is not the remedy.

    Raises:
        MissingPackageError: the package is not installed.

    >>> require("json", "none", "reading JSON").loads("1")
    1
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package {package!r}, which is not installed: pip install 'dmscale[{extra}]'"
        ) from error
