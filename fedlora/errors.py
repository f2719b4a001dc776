"""The errors fedlora raises for a user to read. Anything else that escapes is a bug."""

from collections.abc import Sequence
from typing import Any, Self


class FedLoraError(Exception):
    """Base of every error below, so a caller can catch them all.

    >>> from fedlora import FedLoraError, load_config
    >>> try:
    ...     load_config("quickstart", {"run.round": 3})
    ... except FedLoraError as e:
    ...     print(e)
    1 problem in the run config:
      run.round: no such key; did you mean "run.rounds"?
    ...
    """

    may_leave: bool = False
    """May the text leave a node for its server? Then nothing of a row, or of a path that the server
    did not send, is in it: federation/client/told.py."""

    @classmethod
    def public(cls, *args: Any) -> Self:
        """The error of these words, which may leave the node that it is raised on."""
        error = cls(*args)
        error.may_leave = True
        return error


class ConfigError(FedLoraError, ValueError):
    """The run config cannot be used. Lists every problem found, not only the first."""

    of = "the run config"
    advice = "Fix the file you passed, or override with --set key=value."

    def __init__(self, problems: list[str], where: str = "") -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{count} in {self.of}:\n{lines}\n{where or self.advice}".rstrip())


class NodeFileError(ConfigError):
    """What a node's operator wrote of the node cannot be used: its policy, its list of members."""

    of = "this node's own settings"
    advice = ""


class CommandError(ConfigError):
    """A command names what is not there, or a place where it cannot write."""

    of = "the command"
    advice = ""


class DataError(FedLoraError, ValueError):
    """The data cannot be read or split as the config asks."""


class ModelError(FedLoraError, ValueError):
    """The model cannot be loaded or adapted as the config asks."""


class StrategyError(FedLoraError, ValueError):
    """The strategy cannot do what the config asks. Says why, and what to use."""


class UpdateError(FedLoraError, ValueError):
    """One client's update cannot be used. It is left out; the round goes on."""


class ClientError(UpdateError):
    """A client answered with an error reply. `code` says why: federation/wire/codes.py."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        super().__init__(reason)


class ProofError(FedLoraError):
    """An aggregation that promises to be exact was not. The run stops before it spreads."""


class RoundError(FedLoraError):
    """Too few clients answered. The last checkpoint is intact."""


class NotFiniteError(RoundError):
    """The model after a round holds NaN or Inf. Nothing of the round was committed."""


class ClientMemoryError(FedLoraError):
    """A client's own memory of earlier rounds is gone or belongs to another run."""


class LostBaseError(ClientMemoryError):
    """A client lacks what moved its base so far. The server has it, and sends it again."""


class CheckpointError(FedLoraError):
    """A checkpoint cannot be read, or belongs to another configuration."""


class FormatError(CheckpointError):
    """A file is whole, but holds names unknown to this fedlora: see lora/tree_format.py."""


class WireError(FedLoraError, ValueError):
    """A message does not decode. Raised before anything of the declared size is allocated.

    Its words are of the message alone, so whoever sent that may read them.
    """

    may_leave = True


class TrainingCheckError(FedLoraError):
    """A model does not train as it must: see training/training_check.py."""

    may_leave = True

    def __init__(self, what: str, measured: str = "") -> None:
        """`what` has nothing of any row in it; `measured` are figures, which may."""
        self.what, self.measured = what, measured
        super().__init__(f"{what} ({measured})" if measured else what)


class DeviceMemoryError(FedLoraError):
    """A device's memory does not suffice for a client's round."""


class PrivacyError(FedLoraError):
    """A privacy promise cannot be kept. Nothing is released."""


class BudgetSpent(PrivacyError):  # noqa: N818  it ends a run, in good order
    """A privacy budget allows no more, and only a larger one would. Nothing is released."""


class DeployError(FedLoraError):
    """A deployment cannot be made, started or reached. Says what to do."""


class BundleError(FedLoraError):
    """The app that a server sent is not the code that this node has. Nothing of it was run.

    Its words are of both sides' code alone, so the server may read them.
    """

    may_leave = True


class PolicyError(FedLoraError):
    """A node's own policy does not allow what is asked. Nothing was read, or nothing more.

    Its words name keys and limits that everybody knows, and no value of the policy: those are in
    `reasons`, which stay on the node.
    """

    may_leave = True

    def __init__(self, what: str, reasons: Sequence[str] = ()) -> None:
        self.reasons = (*reasons,) or (what,)
        super().__init__(what)


class CompareError(FedLoraError):
    """Cells of a comparison began and died."""
