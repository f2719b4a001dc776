"""Checks delta: at 1 over the number of units, it would allow one unit to be published whole."""

from fedlora.config.reader import Config


def delta_problem(config: Config) -> str:
    """Why privacy.delta promises the clients nothing; empty where it does."""
    delta, N = config.privacy.delta, config.clients.count
    if delta < 1 / N:
        return ""
    return f"privacy.delta = {delta:g} must be below 1 / clients.count = {1 / N:.2g}"
