"""Modules under their names of version 0.1: each still imports, and says where it is now.

    python -m fedlora.deploy.worker         as scripts that were generated before still say
    from fedlora.server import FederatedLora

Both work until 0.3, with a DeprecationWarning.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

SERVER, DEPLOY = "fedlora.federation.server", "fedlora.launch.deploy"
MOVED = {
    "adapter": "fedlora.lora.adapter",
    "buffered": f"{SERVER}.asynchronous",
    "certificate": "fedlora.training.certificate",
    "codes": "fedlora.federation.wire.codes",
    "deploy": DEPLOY,
    "deploy.gate": f"{DEPLOY}.gate",
    "deploy.node": f"{DEPLOY}.node",
    "deploy.supervise": f"{DEPLOY}.supervise",
    "deploy.worker": f"{DEPLOY}.worker",
    "devices": f"{SERVER}.devices",
    "honesty": f"{SERVER}.honesty",
    "lowrank": "fedlora.lora.lowrank",
    "prefix": "fedlora.training.model.prefix_cache",
    "ranks": f"{SERVER}.ranks",
    "robust": "fedlora.strategies.robust",
    "sections": "fedlora.config.sections",
    "secure": "fedlora.federation.secure",
    "server": "fedlora.launch.federation",
    "server_opt": "fedlora.strategies.server_optimizers",
}


class _Moved:
    """A finder and loader of what MOVED names; Python asks it before it looks for files."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package != "fedlora" or rest not in MOVED:
            return None
        now = importlib.util.find_spec(MOVED[rest])
        origin = now and now.origin
        return ModuleSpec(name, self, origin=origin, is_package=rest == "deploy")  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(_now(name))

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`."""
        now = _now(name)
        spec = importlib.util.find_spec(now)
        loader = spec.loader if spec else None
        return loader.get_code(now) if isinstance(loader, InspectLoader) else None


def _now(name: str) -> str:
    now = MOVED[name.partition(".")[2]]
    warnings.warn(f"{name} is now {now}; the old name goes in 0.3", DeprecationWarning, 4)
    return now


def attribute_of(package: str, module: str, name: str, today: str = "") -> Any:
    """What `package` called `name` in version 0.1: `today` in `module`, or there by the same name.

    Raises:
        AttributeError: it never held that.
    """
    if _is_module(package, name):  # which `from package import name` then imports, and nothing else
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    today = today or name
    found = None if name.startswith("__") else vars(importlib.import_module(module)).get(today)
    if found is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    warnings.warn(f"{package}.{name} is now {module}.{today}", DeprecationWarning, 3)
    return found


def _is_module(package: str, name: str) -> bool:
    """Is there a module of this name in the package?"""
    inside = "__path__" in vars(sys.modules[package]) and not name.startswith("__")
    return inside and importlib.util.find_spec(f"{package}.{name}") is not None


def keep_old_names() -> None:
    """Make the old names importable, once."""
    if not any(isinstance(f, _Moved) for f in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
