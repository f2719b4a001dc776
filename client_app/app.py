"""The client's app under the name that pyproject.toml gives Flower."""

from fedlora.launch.client_app import app

__all__ = ["app"]
