"""Reads a TOML file of the user's: what is wrong with it is one line that names it."""

import tomllib
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError


def read_toml(path: Path | str) -> tuple[dict[str, Any], str]:
    """The tables of a file in UTF-8, with or without a byte-order mark, and its text.

    Raises:
        ConfigError: it is not there, cannot be read, or is not TOML; names the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except UnicodeDecodeError as e:
        raise ConfigError([f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8"]) from None
    except (ValueError, RecursionError) as e:
        raise ConfigError([f"{path}: not TOML: {e}"]) from None
    except OSError as e:
        raise ConfigError([f"{path}: cannot be read: {e.strerror}"]) from None
