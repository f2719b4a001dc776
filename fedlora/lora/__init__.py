"""Adapter factors and their algebra: tensors alone."""
