"""fedlora's client."""

from fedlora.launch.client_app import app

__all__ = ["app"]
