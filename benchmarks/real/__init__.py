"""Strategies compared on real data: `python -m benchmarks.real --help`."""
