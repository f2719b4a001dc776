"""Modules that import our apps: Flower loads an app only from a module inside its bundle."""

from fedlora.config.reader import Config
from fedlora.training.user_code import named

SHIM = """\"\"\"fedlora's {kind}.\"\"\"

from fedlora.launch.{kind}_app import app

__all__ = ["app"]
"""
"""kind: server or client."""

OWN = """\"\"\"fedlora's client, which may run this code.\"\"\"

from fedlora.launch.client_app import client_app

app = client_app({code!r})

__all__ = ["app"]
"""


def shim(kind: str, config: Config) -> str:
    """The module's text; a client's names the code that the config does."""
    code = [value for _, value in named(config)]
    return OWN.format(code=code) if code and kind == "client" else SHIM.format(kind=kind)
