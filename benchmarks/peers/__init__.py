"""Thin adapters of other libraries, so that they stand in the same table."""
