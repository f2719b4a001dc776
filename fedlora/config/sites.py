"""Sites: one source of rows a client, each with columns, labels and encoding of its own.

    [[data.clients]]              in a file: a table a site
    path = "north.csv"
    label = "diagnosis"

    data.clients = "sites/*.csv"  one name, a list of names, or a text: a client for each file

In Flower's flat config it is one text, a JSON list of the tables.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fedlora.config.fields import Renames, Section

SEPARATOR = r"^(tab|[^\"\r\n])?$"


class SiteConfig(Section):
    """One site of data.clients. What is empty is as data.* has it."""

    path: Annotated[str, Field(min_length=1)]
    """A file, as data.path; or a directory or a pattern ("sites/*.csv"): each file a client."""
    text: str = ""
    text_pair: str = ""
    image: str = ""
    label: str = ""
    label_separator: str = ""
    prompt: str = ""
    response: str = ""
    rejected: str = ""
    messages: str = ""
    map: Renames = ()
    separator: Annotated[str, Field(pattern=SEPARATOR)] = ""
    encoding: str = ""
    rank: Annotated[int, Field(ge=0)] = 0
    """Its adapter's; 0: as clients.ranks has it."""


COLUMNS = (
    "text", "text_pair", "image", "label", "label_separator", "prompt", "response", "rejected",
    "messages", "map", "separator", "encoding",
)  # fmt: skip
"""The keys of a site that stand in for those of the same name in data: on a node as well."""


def _sites(value: Any) -> Any:
    """One path, several, or tables, each also as a text; the tables of all."""
    if isinstance(value, str):
        if not value.startswith("["):
            value = [part.strip() for part in value.split(",") if part.strip()]
        else:
            try:
                value = json.loads(value)
            except ValueError as e:
                raise ValueError(f"must be a path, or a JSON list of tables: {e}") from None
    if not isinstance(value, list | tuple):
        return value
    return tuple({"path": site} if isinstance(site, str) else site for site in value)


def flat_sites(sites: Sequence[Mapping[str, Any]]) -> str:
    """Tables of sites as one text: what `Sites` reads."""
    return json.dumps([{key: value for key, value in site.items() if value} for site in sites])


Sites = Annotated[tuple[SiteConfig, ...], BeforeValidator(_sites)]
