"""Federated LoRA fine-tuning of Hugging Face models on Flower, with an aggregation to trust.

>>> import fedlora
>>> "fedex" in fedlora.list_strategies()
True

Every name is imported when it is first asked for: `import fedlora` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedlora.moved import keep_old_names
from fedlora.version import __version__

PUBLIC = {
    "Config": "fedlora.config.reader",
    "FedLoraError": "fedlora.errors",
    "Federation": "fedlora.launch.federation",
    "Observer": "fedlora.reports.console",
    "Run": "fedlora.launch.run",
    "Strategy": "fedlora.strategies.base",
    "check": "fedlora.launch.doctor",
    "export": "fedlora.launch.run",
    "list_strategies": "fedlora.strategies",
    "load_config": "fedlora.launch.experiment_file",
    "make_client_app": "fedlora.launch.client_app",
    "open_run": "fedlora.launch.run",
    "register_strategy": "fedlora.strategies",
    "register_task": "fedlora.training.tasks",
    "simulate": "fedlora.launch.simulate.run",
}
"""Each public name and the module that it is in."""

if TYPE_CHECKING:  # for editors and type checkers
    from fedlora.config.reader import Config
    from fedlora.errors import FedLoraError
    from fedlora.launch.client_app import make_client_app
    from fedlora.launch.doctor import check
    from fedlora.launch.experiment_file import load_config
    from fedlora.launch.federation import Federation
    from fedlora.launch.run import Run, export, open_run
    from fedlora.launch.simulate.run import simulate
    from fedlora.reports.console import Observer
    from fedlora.strategies import list_strategies, register_strategy
    from fedlora.strategies.base import Strategy
    from fedlora.training.tasks import register_task

__all__ = [
    "Config",
    "FedLoraError",
    "Federation",
    "Observer",
    "Run",
    "Strategy",
    "__version__",
    "check",
    "export",
    "list_strategies",
    "load_config",
    "make_client_app",
    "open_run",
    "register_strategy",
    "register_task",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


keep_old_names()
