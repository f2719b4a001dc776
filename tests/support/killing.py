"""A process that kills itself with SIGKILL at a chosen point of a chosen round."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.federation.client import job, memory
from fedlora.federation.server import journal
from fedlora.lora import tree_file


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def obey(order: Path) -> None:
    """Be killed where the file says, {"point": ..., "round": ...}; once, for then it is gone."""
    if not order.exists():
        return
    asked = json.loads(order.read_text())

    def once() -> None:
        order.unlink()
        die()

    plant(asked["point"], asked["round"], once)


def wrap(owner: Any, name: str, before: Any = None, after: Any = None) -> None:
    """Have `before` and `after` called around every call, with its arguments."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        if before:
            before(*args)
        result = real(*args, **options)
        if after:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def plant(point: str, round: int, die: Callable[[], None] = die) -> None:
    """Arrange for this process to be killed at a point of a round."""
    seen: list[bool] = []

    def checkpoint_of(path: Path) -> bool:
        return "/checkpoint/" in str(path) and f"round-{round:05}" in path.name

    def second_client(*args: Any) -> None:
        seen.append(args[4] == round)
        if sum(seen) == 2:
            die()

    def half_written(_: dict[str, Any], path: Path) -> None:
        if checkpoint_of(path):
            path.write_bytes(b"half a checkpoint")
            die()

    def not_yet_renamed(_: str, path: Path) -> None:
        if checkpoint_of(path):
            die()

    def half_a_line(self: journal.Journal, number: int, *_: Any) -> None:
        if number == round:
            self.rounds.write_text(self.rounds.read_text()[:-40])
            die()

    match point:
        case "mid-client":
            wrap(job, "fit", before=second_client)
        case "memory-kept":
            remember = memory.ClientMemory
            wrap(remember, "remember", after=lambda self, n, _: die() if n == round else None)
        case "first-reply":
            wrap(
                job.ClientJob, "reply", before=lambda x, *_: die() if x.job.round == round else None
            )
        case "half-a-checkpoint":
            wrap(tree_file, "save_file", before=half_written)
        case "checkpoint-not-renamed":
            wrap(tree_file.os, "replace", before=not_yet_renamed)
        case "checkpoint-kept":
            wrap(tree_file, "save", after=lambda p, *_: die() if checkpoint_of(p) else None)
        case "half-a-line":
            wrap(journal.Journal, "commit", after=half_a_line)


ON_CARD = """
import importlib, json, sys
from tests.support import killing, pretend_device
from tests.support.tiny_federation import federate
given, point, round, before = json.loads(sys.argv[1])
with pretend_device.cards():
    if before:
        module, name = before.split(":")
        getattr(importlib.import_module(module), name)()
    killing.plant(point, round)
    federate(given)
"""


def kill_on_card(point: str, round: int, given: Mapping[str, object], before: str = "") -> None:
    """Run on pretend cards, in a fresh process, until it is killed there.

    A copy of this one would not do: torch refuses autograd in a copy of what has used a card.
    before: "module:function", called first.
    """
    from tests.support.tiny_federation import python

    done = python(ON_CARD, json.dumps([dict(given), point, round, before]), timeout=300)
    assert done.returncode == -signal.SIGKILL, f"never came to {point}: {done.stderr[-2000:]}"
