"""A node's own record of what it was asked, what it refused and all that left it: audit.jsonl.

    {"what": "asked",    "kind": "train", "run": 7, "round": 3, "policy": "9f2c..."}
    {"what": "left",     "kind": "train", "bytes": 40312, "records": ["sent", ...], "epsilon": 0.4}
    {"what": "refused",  "kind": "train", "error": "PolicyError", "reasons": ["train.steps: ..."]}

One line a time, appended, and on the disk before a reply leaves: what cannot be put on record is
not sent. Where the policy names a keeper, that process writes it, and no other can. A message that
was asked and has no second line was lost with its process. Reasons hold values of the policy and of
what was asked, never a word of a row. Whoever may write the file can change it: it is the node's
own book, and no proof to others.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.config.policy import Policy
from fedlora.errors import BundleError, FedLoraError, PolicyError, PrivacyError
from fedlora.federation.wire.codes import cleaned
from fedlora.privacy.keeper_socket import ask

LOG = logging.getLogger("fedlora.node")

MOST_REASONS = 20


def put(policy: Policy, what: str, /, **more: Any) -> None:
    """One line more, by the policy's keeper where there is one, on the disk when this returns.

    Raises:
        OSError: it could not be written.
        PrivacyError: the keeper does not answer.
    """
    if policy.privacy.keeper:
        ask(Path(policy.privacy.keeper), "append", {"what": what, "more": more})
    else:
        append(policy.audit, what, **more)


def append(path: Path, what: str, /, **more: Any) -> None:
    """One line more, on the disk when this returns.

    Raises:
        OSError: it could not be written.
    """
    line = json.dumps({"time": _now(), "what": what, **more}, sort_keys=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    file = os.open(path, flags, 0o600)
    try:
        data = (b"" if _ends(file) else b"\n") + line.encode()
        if os.write(file, data) < len(data):  # the rest would find no room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
    finally:
        os.close(file)


def _ends(file: int) -> bool:
    """Does the last line end? One that a crash cut short would swallow the next."""
    size = os.lseek(file, 0, os.SEEK_END)
    if not size:
        return True
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) == b"\n"


def refusal(policy: Policy, error: Exception, **about: Any) -> None:
    """A line that says why nothing left; where it cannot be written, the node's log has it."""
    reasons = error.reasons if isinstance(error, PolicyError) else ()
    if isinstance(error, BundleError) or (isinstance(error, FedLoraError) and error.may_leave):
        reasons = reasons or (str(error),)
    what = "refused" if isinstance(error, PolicyError | BundleError) else "failed"
    kept = {"error": type(error).__name__, "reasons": shown(reasons)}
    try:
        put(policy, what, **about, **kept)
    except (OSError, PrivacyError) as e:
        LOG.error("%s cannot be written (%s): %s %s", policy.audit, e, about, kept)


def read(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines that are whole; none where there is no file."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a crash, or damaged
            continue
        if isinstance(found, dict):
            yield found


def digest(path: Path) -> str:
    """Of a policy's file: a line that has another is of another policy."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def shown(reasons: Sequence[str]) -> list[str]:
    """Reasons as they are put on record: one line each, cut, and not too many."""
    return [cleaned(reason) for reason in [*reasons][:MOST_REASONS]]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
