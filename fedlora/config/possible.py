"""What no key can be, whatever its type: what files, paths and 64-bit numbers cannot hold."""

import re
from typing import Any

PATHS = (
    "run.name", "run.out", "model.path", "data.path", "data.test-path", "data.validation-path",
    "data.node-path", "output.client-memory", "lora.calibration",
)  # fmt: skip
PATH_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes that file systems take."""


def impossible(key: str, value: Any) -> str:
    """What is wrong with such a value of a key; empty where nothing is."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{key} = {_power(value)}: must be a number of 64 bits"
    if not isinstance(value, str):
        return ""
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        return f"{key} = {value[:80]!a}: must be text, in UTF-8 and without the character 0"
    if key == "run.name" and not is_one_name(value):
        return (
            f"{key} = {value[:80]!a}: must be the name of one directory below run.out, without /, "
            "\\, control characters or a leading dot"
        )
    if key in PATHS:
        names = [len(part.encode()) for part in value.split("/")]
        if max(names) > LONGEST_NAME or sum(names) > LONGEST_PATH:
            return (
                f"{key} = {value[:80]!r}...: too long for a path, whose names have at most "
                f"{LONGEST_NAME} bytes"
            )
    return ""


def is_path_name(text: object) -> bool:
    """Is it a name that another machine may choose for a file or directory of this one?

    Letters, digits, "-", "_" and "." of ASCII, 1 to 128 of them, the first no dot.
    """
    return isinstance(text, str) and PATH_NAME.fullmatch(text) is not None


def is_one_name(text: str) -> bool:
    """Is it the name of one directory, whatever its letters are, and of none above it?"""
    whole = bool(text) and not text.startswith(".")
    return whole and not any(c in "/\\" or not c.isprintable() for c in text)


def _power(value: int) -> str:
    """A large integer in a few characters, by the power of two below it."""
    return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1} or more"
