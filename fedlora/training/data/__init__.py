"""Rows, from wherever they lie to batches."""
