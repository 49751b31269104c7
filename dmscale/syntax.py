"""The source of functions as a syntax tree: what no run of a forward shows is read there."""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import textwrap
import types


def syntax(function: types.FunctionType) -> ast.AST | None:
    """The syntax of a function; None where its source is not at hand."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 : _last_line(code)]
    for source in (lambda: "".join(lines), lambda: inspect.getsource(function)):  # which splits the file into tokens
        with contextlib.suppress(OSError, SyntaxError):
            if (tree := ast.parse(textwrap.dedent(source()))).body:
                return tree
    return None


def _last_line(code: types.CodeType) -> int:
    """The last line that anything in it was made from."""
    inner = [_last_line(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return max([*inner, *(line or 0 for _, _, line in code.co_lines())])
