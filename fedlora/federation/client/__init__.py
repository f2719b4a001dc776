"""A client's half of every message."""
