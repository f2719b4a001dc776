"""Write docs/use/configuration.md and fedlora.schema.json from the config tree, and the table of
docs/extend/forms.md from the forms: `python docs/generate_configuration.py`.

Keys, types, ranges and defaults are the tree's own; what is said of a key is the string that
stands under its field, in fedlora/config/*sections.py or, for a strategy's
options, in the strategy's file.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fedlora.config import privacy_sections, run_section, sections, stop_section, train_section
from fedlora.config.json_schema import described, schema
from fedlora.config.reader import Config
from fedlora.config.sites import SiteConfig
from fedlora.config.strategies import strategy_section
from fedlora.strategies import STRATEGIES, forms

PAGE = Path(__file__).parent / "use" / "configuration.md"
SCHEMA = Path(__file__).parent / "use" / "fedlora.schema.json"
FORMS = Path(__file__).parent / "extend" / "forms.md"

HEAD = """# Configuration

Written by `docs/generate_configuration.py` from `fedlora/config/*sections.py`; `make docs`
writes it anew.

An experiment file is TOML, one table a section; every key has a default. A key is overridden with
`--set section.key=value`, or by `-c 'section.key=value'` of `flwr run`. Unknown keys and wrong
types are refused, all problems at once. `fedlora config FILE` prints every key, resolved, and a
run's directory keeps that as `config.toml`. [fedlora.schema.json](fedlora.schema.json), which
`fedlora schema` prints, has all of it for editors that complete and check TOML. Lists may be
written as TOML lists or as text, `ranks = [4, 8]` or `ranks = "4,8"`.
"""


def kind(field: Any) -> str:
    """What a key takes, in words: from the annotation and its bounds."""
    hint = field.annotation
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        if get_args(hint)[0] is SiteConfig:
            return "tables, or paths"
        return "whole numbers > 0" if get_args(hint)[0] is int else "names"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{signs[name]} {getattr(part, name)}"
        for part in field.metadata
        for name in signs
        if getattr(part, name, None) is not None
    ]
    words = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
    return " ".join([words[hint], ", ".join(limits)]).strip()


def table(section: str, model: Any, texts: dict[str, str]) -> Iterator[str]:
    flat = Config().flat()
    yield "| key | takes | default | |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        key = f"{section}.{name}".replace("_", "-")
        if key in flat:
            default = flat[key]
            text = str(default).lower() if isinstance(default, bool) else str(default)
            shown = f"`{text}`" if text else "empty"
            said = " ".join(texts.get(name, "").split()).replace("<", "&lt;").replace("|", "\\|")
            yield f"| `{name.replace('_', '-')}` | {kind(field)} | {shown} | {said} |"


def page() -> str:
    """The whole page."""
    texts = {}
    for module in (sections, train_section, stop_section, privacy_sections, run_section):
        texts |= described(inspect.getsource(module))
    lines = [HEAD]
    for section, field in Config.model_fields.items():
        model = strategy_section() if section == "strategy" else field.annotation
        mine = texts.get(model.__name__, {})  # type: ignore[union-attr]
        lines += [f"## [{section}]", ""]
        if mine.get(""):
            lines += [mine[""], ""]
        if section == "strategy":
            lines += strategies()
        else:
            lines += [*table(section, model, mine), ""]
    return "\n".join(lines).rstrip() + "\n"


def strategies() -> Iterator[str]:
    yield (
        "`name` is one of " + ", ".join(f"[`{n}`](../strategies/{n}.md)" for n in STRATEGIES) + "."
    )
    yield f'Default: `"{Config().strategy.name}"`. A strategy\'s options have a table of their'
    yield "own, `[strategy.fedex]`; those of strategies that a run does not use are left alone."
    yield ""
    for name, cls in STRATEGIES.items():
        section = strategy_section().model_fields.get(name.replace("-", "_"))
        if section is not None:
            texts = described(inspect.getsource(sys.modules[cls.__module__]))[cls.__name__]
            yield f"### [strategy.{name}]"
            yield ""
            yield f"What each does is on [its page](../strategies/{name}.md#options)."
            yield ""
            yield from table(f"strategy.{name}", section.annotation, texts)
            yield ""


def with_table(text: str) -> str:
    """The page of forms, its table replaced by what the code says."""
    table = forms.table()
    before, head, rest = text.partition(table.partition("\n")[0])
    if not head:
        raise SystemExit(f"{FORMS.name}: no table that begins with {table.partition(chr(10))[0]}")
    return before + table + rest[rest.index("\n\n") + 1 :]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    FORMS.write_text(with_table(FORMS.read_text(encoding="utf-8")), encoding="utf-8")
