"""An experiment file: the tables of a run's config, and beside them those of commands of ours.

[compare]    how `fedlora compare` varies the run: launch/compare/experiment.py
[audit]      what `fedlora privacy audit` measures: launch/lab/study.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora import preflight
from fedlora.config.reader import Config

BESIDE = ("compare", "audit")


def load(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The run's config, with overrides on top; it can run.

    Raises:
        ConfigError: it cannot, with all that is wrong.
    """
    return preflight.load(path, overrides, BESIDE)


def parse(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The run's config, whether or not it can run: what a finished run was."""
    return Config.load(path, overrides, BESIDE)
