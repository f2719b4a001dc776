"""One of our apps as a module of its own: Flower takes an app from one that lies in the bundle."""

SHIM = """\"\"\"fedlora's {kind}.\"\"\"

from fedlora.launch.{kind}_app import app

__all__ = ["app"]
"""
"""kind: server or client."""
