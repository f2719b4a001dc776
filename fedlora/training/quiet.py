"""Silences, by name, what the libraries under fedlora print that no user can act on.

Imports none of them, so that it may be called before they are: some read their settings once.
"""

import logging
import os
import re
import sys
import warnings

_WARNINGS = (
    # peft 0.21 reads a property that transformers 5 renamed.
    (r".*is_gradient_checkpointing.* is deprecated", FutureWarning),
    # One model holds the adapter of one client after another; that is the design.
    (r"You are trying to modify a model with PEFT for a second time", UserWarning),
    # Tied embeddings of which one is trained: exports untie them (training/model/ties.py).
    (r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", UserWarning),
    (r"Already found a `peft_config` attribute in the model", UserWarning),
    # flwr-datasets says it at each draw that it repeats; the draw that fails for good raises.
    (r"The specified min_partition_size .* was not satisfied", UserWarning),
    # ray, of an environment variable that a simulation on processors does not use.
    (r"Tip: In future versions of Ray", FutureWarning),
)
"""Warnings that a user cannot act on, by the start of their text."""

_LOGGERS = ("transformers.modeling_utils", "transformers.utils.loading_report", "flwr")


def quiet_libraries() -> None:
    """Silence, by name, what the libraries print that a user of fedlora cannot act on.

    Progress bars of transformers, datasets and huggingface_hub; transformers' report that the
    classifier it was asked to add is new; Flower's notes below warnings; the warnings listed in
    `_WARNINGS`. All else still speaks, and so does a bar that the user's environment turns on.
    Works before the libraries are imported and after. Not for a deployed node: there Flower's own
    log is what its operator reads.
    """
    for variable, module, function in _BARS:
        silenced = os.environ.setdefault(variable, "1").upper() in {"1", "TRUE", "YES", "ON"}
        if silenced and module in sys.modules:
            getattr(sys.modules[module], function)()
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _worth_reading not in logger.filters:
            logger.addFilter(_worth_reading)


_BARS = (
    ("HF_HUB_DISABLE_PROGRESS_BARS", "huggingface_hub.utils", "disable_progress_bars"),
    ("HF_HUB_DISABLE_PROGRESS_BARS", "transformers.utils.logging", "disable_progress_bar"),
    ("HF_DATASETS_DISABLE_PROGRESS_BARS", "datasets.utils.logging", "disable_progress_bar"),
)
"""Read by the libraries at import; the function is for one that was imported before."""


def _worth_reading(record: logging.LogRecord) -> bool:
    """Not Flower's everyday notes; not a load report of what the task leaves out and adds.

    What a checkpoint lacks is trained with the head, or refused: training/model/.
    """
    if record.name == "flwr":
        return record.levelno >= logging.WARNING
    text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
    if "LOAD REPORT" not in text:
        return True
    rows = re.findall(r"^\S+\s*\|\s*([A-Z]+)\b", text, re.MULTILINE)
    return not all(status in ("UNEXPECTED", "MISSING") for status in rows)
