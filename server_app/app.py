"""fedlora's server."""

from fedlora.launch.server_app import app

__all__ = ["app"]
