"""Modules that import our apps: Flower loads an app only from a module inside its bundle.

A deployed node loads none: it compares a bundle's client_app/ with `app_files`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedlora.training.user_code import named

if TYPE_CHECKING:  # a node's process for one message imports this, and nothing heavy
    from fedlora.config.reader import Config

ABOUT = '"""The {kind} half of fedlora as a Flower app."""\n'
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


def shim(kind: str, config: "Config") -> str:
    """The module's text; a client's names the code that the config does."""
    code = [value for _, value in named(config)]
    return OWN.format(code=code) if code and kind == "client" else SHIM.format(kind=kind)


def app_files(kind: str) -> Mapping[str, str]:
    """Name to text of a bundle's server_app/ or client_app/, which name no code of a user."""
    return {
        f"{kind}_app/__init__.py": ABOUT.format(kind=kind),
        f"{kind}_app/app.py": SHIM.format(kind=kind),
    }
