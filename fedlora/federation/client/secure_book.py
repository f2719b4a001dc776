"""What a node remembers of its part in secure aggregations: how many rounds, and since when.

    <the ledger's directory>/secure-rounds.json    {"rounds": 12, "recovered": 1770000000}

A disk that is lost takes with it which rounds were masked. So once its operator has typed `fedlora
node recover`, a node answers no start of the server that may be from before: it would mask one
round twice. When a start began the server says, in what all members agree on.

A round is on the disk before a client trains for it. Where the policy names a keeper, that
process has the file, and looks at its own clock and its own policy.

Formal guarantee
    Of a start of the server that this node answered before it was recovered, whatever it said of
    its beginning, no message is answered after: it said AHEAD seconds after that moment at most, or
    was refused then. For `secure.max-rounds` rounds at most has this node trained since the file
    began. A crash costs a round and never gives one.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from filelock import FileLock

from fedlora.config.policy import Policy
from fedlora.errors import PrivacyError
from fedlora.federation.client.admit import check
from fedlora.lora.tree_file import write_atomically
from fedlora.privacy.keeper_socket import ask

AHEAD = 60
"""Seconds by which a server's clock may be ahead of the node's."""
NAME = "secure-rounds.json"
Step = Literal["begin", "count", "stage"]
"""Of a secure round: its setup; training is about to begin; any stage."""
STEPS = get_args(Step)


@dataclass(frozen=True, slots=True)
class SecureState:
    rounds: int = 0
    """For which training was about to begin, over all runs."""
    recovered: int = 0
    """When the operator last recovered this node, in seconds since 1970; 0: never."""

    def against(self, since: int, now: float, limit: int) -> tuple[str, str] | None:
        """What of a secure round is not to be, and why: of a server that began at `since`."""
        if since > now + AHEAD:
            when = f"{since - now:.0f} s ahead of this node's clock"
            return "a secure round of a server that dates its start ahead", when
        if self.recovered and since <= self.recovered + AHEAD:
            began = f"began at {since}" if since else "does not say when it began"
            return (
                "a secure round of a start of the server from before this node was recovered, or "
                f"within {AHEAD} s of it (the run goes on once its server has been started again)",
                f"it {began}, this node was recovered at {self.recovered}",
            )
        if limit and self.rounds >= limit:
            return "another secure round", f"{self.rounds} so far, secure.max-rounds = {limit}"
        return None


class SecureBook:
    """The file of a node, below the directory that its ledger is in."""

    def __init__(self, root: Path) -> None:
        self.path = root / NAME

    def read(self) -> SecureState | None:
        """None where there is no file.

        Raises:
            PrivacyError: it is damaged.
        """
        try:
            found = json.loads(self.path.read_bytes())
            state = SecureState(found["rounds"], found["recovered"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            state = None
        if state is None or any(type(x) is not int or x < 0 for x in asdict(state).values()):
            raise PrivacyError.public(
                f"this node's count of its secure rounds ({NAME}) is damaged: its operator "
                "restores it, or types fedlora node recover node.toml --spent EPSILON "
                "--secure-rounds N"
            )
        return state

    def begin(self) -> None:
        """With no round so far, where there is no file: once in a node's life."""
        with self.held():
            if not self.path.exists():
                self._write(SecureState())

    def recover(self, rounds: int | None, now: float | None = None) -> None:
        """From now on, no start of a server from before; with so many rounds, where it is said.

        Raises:
            PrivacyError: the file is damaged, and no number was said.
        """
        with self.held():
            if rounds is None:
                found = self.read() or SecureState()
            else:
                found = SecureState(rounds, self._recovered())
            at = max(found.recovered, int(time.time() if now is None else now))
            self._write(replace(found, recovered=at))

    def enter(self, since: int, limit: int, step: Step = "stage") -> int:
        """How many rounds there are; with one more, on the disk, where the step is "count".

        The limit is looked at where a round begins and where it is counted.

        Raises:
            PolicyError: there is to be none more, or none of a server that began at `since`.
            PrivacyError: the file is damaged, or there is none where there is a limit.
        """
        with self.held():
            found = self.read()
            if found is None and limit:
                raise PrivacyError.public(
                    "this node has no count of its secure rounds, and its policy limits them "
                    "(secure.max-rounds): its operator restores it, or types fedlora node recover "
                    "node.toml --spent EPSILON --secure-rounds N"
                )
            state = found or SecureState()
            if reason := state.against(since, time.time(), 0 if step == "stage" else limit):
                check([reason])
            if step == "count":
                state = replace(state, rounds=state.rounds + 1)
                self._write(state)
        return state.rounds

    def _recovered(self) -> int:
        try:
            return (self.read() or SecureState()).recovered
        except PrivacyError:
            return 0

    def _write(self, state: SecureState) -> None:
        write_atomically(self.path, json.dumps(asdict(state)).encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which nobody else writes to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            yield


def enter(policy: Policy, since: int, step: Step = "stage") -> None:
    """Nothing, where the node may take this step in a secure round of a server begun at `since`.

    Raises:
        PolicyError, PrivacyError: see `SecureBook.enter`; or the keeper does not answer.
    """
    if policy.privacy.keeper:
        ask(Path(policy.privacy.keeper), "secure", {"since": since, "step": step})
    else:
        SecureBook(policy.ledger).enter(since, policy.secure.max_rounds, step)
