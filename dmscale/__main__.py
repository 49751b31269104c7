"""`python -m dmscale` is the `dmscale` command."""

from .cli import app

app(prog_name="dmscale")
