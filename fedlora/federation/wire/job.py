"""The job: what the server tells a client with every message, beside the download."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedlora.config.possible import is_path_name
from fedlora.errors import WireError
from fedlora.federation.wire.messages import configs_of, whole

MOST = 65_536
"""Above every rank."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the server tells a client with every message, beside the download."""

    round: int
    token: str
    """Names the run: it keeps another run's memory and replies out."""
    incarnation: str
    """Names this start of the server: base changes held in memory are trusted within it only."""
    client: int
    ranks: Mapping[str, int]
    memory_round: int
    base_number: int
    fingerprint: str
    labels: tuple[str, ...]
    last_round: int = 0
    """The last round in which this client's reply was accepted."""
    cuts: tuple[int, ...] = ()
    """Where A alone is shared, all clients' ranks: see `certificate.names_of`."""
    code: str = ""
    """A digest of the user's own code, where the config names any: see `user_code.identity`."""
    config: str = ""
    """A digest of the server's config: see `Config.identity`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys that the server's config has otherwise than the run's."""
    microbatch: int = 0
    """What this client has halved train.microbatch to, in an earlier round; 0: it has not."""
    ledger: int = 0
    """The number of the client's privacy ledger, as it last said it; 0: it has not."""
    charges: int = 0
    """How many charges of this run that ledger had, by the last reply that was accepted."""
    since: int = 0
    """When this start of the server began, in seconds since 1970; with secure aggregation alone."""

    def record(self) -> ConfigRecord:
        return ConfigRecord(
            {
                "round": self.round,
                "token": self.token,
                "incarnation": self.incarnation,
                "client": self.client,
                "modules": list(self.ranks),
                "ranks": list(self.ranks.values()),
                "memory-round": self.memory_round,
                "base-number": self.base_number,
                "fingerprint": self.fingerprint,
                "labels": list(self.labels),
                "last-round": self.last_round,
                "cuts": list(self.cuts),
                "config": self.config,
                **({"code": self.code} if self.code else {}),
                **({"microbatch": self.microbatch} if self.microbatch else {}),
                **({"ledger": self.ledger, "charges": self.charges} if self.charges else {}),
                **({"since": self.since} if self.since else {}),
                **({"changes": json.dumps(dict(self.changes))} if self.changes else {}),
            }
        )

    @classmethod
    def read(cls, record: ConfigRecord) -> "Job":
        """The job of a record.

        Raises:
            WireError: a name or number in it is none that a path may be made of.
        """
        x: Mapping[str, Any] = record
        for key in ("token", "incarnation"):
            if not is_path_name(x[key]):
                raise WireError(
                    f"the job's {key}: must be 1 to 128 letters, digits, -, _ and ., the first no "
                    "dot"
                )
        numbers = ("round", "client", "memory-round", "base-number", "last-round")
        round, client, memory_round, base_number, last_round = (whole(x, key) for key in numbers)
        return cls(
            round,
            x["token"],
            x["incarnation"],
            client,
            dict(zip(x["modules"], x["ranks"], strict=True)),
            memory_round,
            base_number,
            x["fingerprint"],
            tuple(x["labels"]),
            last_round,
            tuple(whole({"cuts": c}, "cuts", MOST) for c in x["cuts"]),
            x.get("code", ""),
            x["config"],
            _changes(x.get("changes", "{}")),
            *_later(x),
        )


def job_of(content: RecordDict) -> Job:
    """The job that a message brings.

    Raises:
        WireError: it brings none, or one that does not decode.
    """
    try:
        return Job.read(configs_of(content, "job"))
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise WireError(f"the message has no job that can be read: {e!r}") from None


def _changes(text: str) -> Mapping[str, Any]:
    """Keys of the run's config, by what a strategy gave them.

    Raises:
        WireError: they are none.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise WireError("the job's changes: must be an object of the config's keys")
    return found


def _later(x: Mapping[str, Any]) -> Iterator[int]:
    """The numbers of a job that an earlier one has not, each 0 where it is not said."""
    for key in ("microbatch", "ledger", "charges"):
        yield whole(x, key) if key in x else 0
    if type(since := x.get("since", 0)) is not int or not 0 <= since < 2**53:
        raise WireError("the job's since: must be whole seconds since 1970")
    yield since
