"""Types of config values: lists, written as text or as in TOML; and the base class of a section."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _names(value: Any) -> Any:
    """ "a, b" or ["a", "b"], [-2, -1]: Flower's flat config has no lists, TOML files have.

    A text of JSON, '["a, b", "c"]', is a list too: see `flat_list`.
    """
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            found = json.loads(value)
            if isinstance(found, list) and all(isinstance(x, str) for x in found):
                return tuple(found)
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, list):
        return value
    return tuple(str(v) if isinstance(v, int) else v for v in value)


def flat_list(values: Sequence[Any]) -> str:
    """A list as one text, for Flower's flat config: "a,b", or JSON where that would be misread."""
    texts = tuple(str(v) for v in values)
    plain = ",".join(texts)
    return plain if _names(plain) == texts else json.dumps(texts)


def _indices(value: Any) -> Any:
    """-1 as well, as `--set lora.layers=-1` reads it."""
    return (str(value),) if type(value) is int else _names(value)


def _ranks(value: Any) -> Any:
    """ "4,8,16", [4, 8, 16] or 8."""
    try:
        parts = (value,) if isinstance(value, int) else _names(value)
        ranks = tuple(int(part) if isinstance(part, str) else part for part in parts)
    except (ValueError, TypeError):
        ranks = ()
    if not ranks or any(type(r) is not int or r < 1 for r in ranks):
        raise ValueError('must be positive integers, as in "8" or "4,8,16"')
    return ranks


def amount(value: float) -> float:
    """A share below 1, or from there on a whole number."""
    if value >= 1 and value != int(value):
        raise ValueError("must be a whole number, or below 1 a share")
    return value


def share_of_steps(value: float) -> float:
    """0, or so large a share that no more than 52 numbers come of it."""
    if 0 < value < 0.02:
        raise ValueError("must be 0, or 0.02 to 1")
    return value


def _hexadecimal(values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(bytes.fromhex(x).hex() for x in values)
    except ValueError:
        raise ValueError("must be digests in hexadecimal, two characters a byte") from None


CODE = r"^(py:[^:]+:[^:]+)?$"
"""The name of a user's function, or nothing."""

Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Indices = Annotated[tuple[str, ...], BeforeValidator(_indices)]
Ranks = Annotated[tuple[int, ...], BeforeValidator(_ranks)]

Renames = Annotated[tuple[Annotated[str, Field(pattern=r"^[^=]+=")], ...], BeforeValidator(_names)]
"""Each "old=new"; "old=" for nothing."""

Digests = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_hexadecimal)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


PLAIN = {
    "tuple_type": "must be a list",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "extra_forbidden": "no such key",
    "missing": "must be given",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
}
"""What pydantic's types of error are called here, where its own words speak of Python."""


def said(error: Any) -> str:
    """What a value must be, of one error of pydantic's."""
    words = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return PLAIN.get(error["type"]) or words.replace("String should match", "must match")
