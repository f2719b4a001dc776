"""What became of a message, as values: a code on the wire, a kind in the server's records.

    an error on a client  -- code_of -->  Code, in the error reply  -- kind_of -->  FailureKind

The words of an error travel beside its code, for a person to read. What a client says is data:
`Refusal` is the one way by which a reason enters the server's records, its terminal and its
reports, on one line and cut, and nothing is decided by it. A client may lie about its code too;
what that can buy it is in `Received.spent`.

No torch here: client/dispatch.py answers without it.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from flwr.common.constant import ErrorCode

from fedlora.errors import (
    BudgetSpent,
    BundleError,
    ClientError,
    FedLoraError,
    LostBaseError,
    PolicyError,
    TrainingCheckError,
)

LONGEST = 500
"""Characters of a reason."""


class Code(IntEnum):
    """The code of an error reply. Above Flower's own, as for a node that went away."""

    FAILED = 101
    """An error that fedlora raises for a user; and any code that nobody knows."""
    BUG = 102
    """Anything else that a client's code raised."""
    WORKER_LOST = 103
    """Who had the message in hand is gone, or took too long."""
    BUDGET_SPENT = 104
    UNTRAINABLE = 105
    """The model does not train on this client as it must."""
    OTHER_CODE = 106
    """The server's app is not the code that the node has installed; nothing of it was run."""
    NOT_ALLOWED = 107
    """The node's own policy does not allow what is asked."""
    LACKS_BASE = 108
    """Its memory of what moved the base is gone or damaged. It wants all of that again."""


class FailureKind(StrEnum):
    """Why a client's answer does not count: the "kind" of an entry in a round's failures."""

    BUDGET = "budget"
    """It says that its privacy budget is spent."""
    UNTRAINED = "untrained"
    """It says that its model does not train as it must."""
    FAILED = "failed"
    """It says that something else went wrong."""
    BAD = "bad"
    """What it sent is not what was asked for. The only kind that counts as an offence."""
    OUT_OF_BOUNDS = "bounds"
    """Its change is far longer than the others': it may lie, or its rows may be unlike theirs."""
    LATE = "late"
    LOST = "lost"
    """Its worker or its node is gone."""
    ONLY_OF_ITS_RANKS = "alone"
    """The server left it out of a secure aggregation: what it sends would be no sum."""
    LACKS_BASE = "base"
    """It lacks what moved the base, and was not sent it again in time."""
    OTHER_CODE = "code"
    """Its node runs its own fedlora alone, and the server's app is another."""
    POLICY = "policy"
    """Its node's own policy does not allow what was asked."""


KINDS = {
    Code.BUDGET_SPENT: FailureKind.BUDGET,
    Code.UNTRAINABLE: FailureKind.UNTRAINED,
    Code.OTHER_CODE: FailureKind.OTHER_CODE,
    Code.NOT_ALLOWED: FailureKind.POLICY,
    Code.LACKS_BASE: FailureKind.LACKS_BASE,
    Code.WORKER_LOST: FailureKind.LOST,
    ErrorCode.MESSAGE_UNAVAILABLE: FailureKind.LOST,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: FailureKind.LOST,
    ErrorCode.NODE_UNAVAILABLE: FailureKind.LOST,
    ErrorCode.CLIENT_APP_CRASHED: FailureKind.LOST,
}


OF_ERRORS = {
    BudgetSpent: Code.BUDGET_SPENT,
    TrainingCheckError: Code.UNTRAINABLE,
    BundleError: Code.OTHER_CODE,
    PolicyError: Code.NOT_ALLOWED,
    LostBaseError: Code.LACKS_BASE,
}
"""The errors that have a code of their own."""


def code_of(error: Exception) -> Code:
    """The code of the error reply that an error on a client becomes."""
    for kind, code in OF_ERRORS.items():
        if isinstance(error, kind):
            return code
    return Code.FAILED if isinstance(error, FedLoraError) else Code.BUG


def kind_of(code: int) -> FailureKind:
    """The kind of failure that an error reply of this code is, whatever sent it."""
    return KINDS.get(code, FailureKind.FAILED)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a client's answer does not count: a kind to decide by, a reason for people to read.

    reason: whatever it was given as, it is one line of at most LONGEST characters.
    """

    kind: FailureKind
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", cleaned(self.reason))

    @classmethod
    def of(cls, error: Exception) -> "Refusal":
        """The refusal of an answer that raised this error when it was read."""
        if isinstance(error, ClientError):
            return cls(kind_of(error.code), str(error))
        return cls(FailureKind.BAD, str(error))


def cleaned(text: str) -> str:
    """The text cut at LONGEST characters, with all that does not print escaped.

    So no newline, escape sequence or change of direction in it can pass for another line. A text
    that is clean is left as it is.
    """
    head = text[: LONGEST + 1]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in head)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."
