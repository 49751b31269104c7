"""One question each; `python -m benchmarks.NAME` prints a table in Markdown."""
