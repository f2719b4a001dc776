"""The server's app under the name that pyproject.toml gives Flower."""

from fedlora.launch.server_app import app

__all__ = ["app"]
