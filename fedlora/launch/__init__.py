"""Starts federations: on this machine, on several, many to compare, or to attack them."""
