"""The config as a JSON Schema (draft 2020-12), for editors that complete and check TOML files.

    fedlora schema > fedlora.schema.json
    #:schema ./fedlora.schema.json          in an experiment's first lines, for taplo's editors

It knows keys, types, ranges, choices, defaults and what is said of each. What does not go together
it does not know: `fedlora doctor` does.
"""

import ast
import inspect
import sys
from typing import Any

from pydantic import BaseModel

from fedlora.config import (
    privacy_sections,
    run_section,
    sections,
    sites,
    stop_section,
    train_section,
)
from fedlora.config.reader import Config
from fedlora.config.strategies import strategy_section
from fedlora.config.task_names import KINDS, offered
from fedlora.strategies import list_strategies

Schema = dict[str, Any]
BESIDE = {
    "compare": "What fedlora compare varies.",
    "audit": "What fedlora privacy audit measures.",
}
"""Tables of an experiment's file that are no part of the config."""


def schema() -> Schema:
    """The schema of an experiment file."""
    said: dict[str, dict[str, str]] = {}
    for module in (sections, train_section, stop_section, privacy_sections, run_section, sites):
        said |= described(inspect.getsource(module))
    tables: Schema = {}
    for name, field in Config.model_fields.items():
        model: Any = strategy_section() if name == "strategy" else field.annotation
        tables[name] = _table(model, said.get(model.__name__, {}))
    _strategies(tables["strategy"])
    tables["model"]["properties"]["task"] |= {"enum": [*KINDS, *(p.name for p in offered())]}
    for name, text in BESIDE.items():
        tables[name] = {"type": "object", "description": text}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An experiment of fedlora",
        "type": "object",
        "additionalProperties": False,
        "properties": tables,
    }


def described(source: str) -> dict[str, dict[str, str]]:
    """By class and field, the string literal under the field; by class and "", its docstring."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found[node.name] = {"": ast.get_docstring(node) or ""}
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[field.target.id] = inspect.cleandoc(str(below.value.value))
    return found


def _strategies(table: Schema) -> None:
    """The names of the strategies, and what is said of each one's options."""
    options = table["properties"]
    options["name"] |= {"enum": [*list_strategies()]}
    for name, cls in list_strategies().items():
        if name in options:
            source = inspect.getsource(sys.modules[cls.__module__])
            _describe(options[name], described(source).get(cls.__name__, {}))


def _table(model: type[BaseModel], texts: dict[str, str]) -> Schema:
    """A section, or a strategy's options, with keys as a file spells them."""
    found = model.model_json_schema()
    made: Schema = _resolved(found, found.get("$defs", {}))
    _describe(made, texts)
    return made


def _describe(table: Schema, texts: dict[str, str]) -> None:
    for key, node in table.get("properties", {}).items():
        if text := " ".join(texts.get(key.replace("-", "_"), "").split()):
            node["description"] = text
    if texts.get(""):
        table["description"] = " ".join(texts[""].split())


def _resolved(node: Any, defs: Schema) -> Any:
    """The node with what it refers to in its place, and keys as a file spells them."""
    if isinstance(node, list):
        return [_resolved(x, defs) for x in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _resolved(defs[node["$ref"].rpartition("/")[2]], defs)
    made = {k: _resolved(x, defs) for k, x in node.items() if k not in ("$defs", "title")}
    if "properties" in made:
        made["properties"] = {k.replace("_", "-"): x for k, x in made["properties"].items()}
        made["additionalProperties"] = False
        made.pop("required", None)
    return _as_text_too(made) if made.get("type") == "array" else made


def _as_text_too(node: Schema) -> Schema:
    """A list may also be one text, "a,b", or one number; its names may be numbers."""
    kept: Schema = {k: node.pop(k) for k in ("default", "description") if k in node}
    if node.get("items", {}).get("type") in ("integer", "string"):
        node["items"] = {"type": ["integer", "string"]}
    return {"anyOf": [node, {"type": ["string", "integer"]}], **kept}
