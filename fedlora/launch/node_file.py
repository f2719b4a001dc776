"""The argument that all commands of `fedlora node` have."""

from pathlib import Path
from typing import Annotated

import typer

NodeFile = Annotated[Path, typer.Argument(help="The node's node.toml.", show_default=False)]
