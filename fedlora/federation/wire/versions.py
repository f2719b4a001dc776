"""What a node and its server say of their versions before a run, and when they go together.

    fedlora    another major or minor version: the node is not taken in, since messages, checks and
               numbers may differ; another patch version: it is said, and the node takes part
    flwr       another major version: not taken in; any other difference is said

A node of an older fedlora, which says nothing of its versions, is said to be one. This is for
honest nodes: one that lies about its version is held to what it sends, like any other.
"""

import re
from collections.abc import Mapping
from typing import Any

import flwr

from fedlora.version import __version__

MUST_AGREE = {"fedlora": 2, "flwr": 1}
"""So many of the numbers of a version must be the same on both sides."""


def here() -> Mapping[str, str]:
    """The versions of this side."""
    return {"fedlora": __version__, "flwr": str(flwr.__version__)}


def differences(facts: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What keeps a node with these facts from taking part, and what is merely worth a word.

    >>> differences({**here(), "fedlora": "99.1.0"})[0][0][:26]
    'its fedlora is 99.1.0, the'
    """
    refused, said = list[str](), list[str]()
    for name, mine in here().items():
        told = facts.get(name)
        if told is None:
            said.append(f"it does not say its version of {name}, the server's is {mine}")
            continue
        if not isinstance(told, str) or not re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,29}", told):
            refused.append(f"its {name} is no version")
            continue
        if told == mine:
            continue
        n = MUST_AGREE[name]
        apart = told.split(".")[:n] != mine.split(".")[:n]
        text = f"its {name} is {told}, the server's is {mine}"
        (refused if apart else said).append(text + (": install one on both" if apart else ""))
    return refused, said
