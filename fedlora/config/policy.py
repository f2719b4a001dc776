"""A node's policy, node.toml: what its operator allows, whatever a server asks.

    flower-supernode --node-config 'partition-id=0 policy="/etc/fedlora/node.toml"'

It is never sent. A section or key that is none is an error, and so is a value that none can be: a
limit that is misspelt would be no limit. Paths in it are relative to the file. What each key does
is in docs/deploy/node-policy.md; what of a run's config passes is in federation/client/admit.py.
"""

import difflib
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fedlora.config.fields import Names, Renames, Section, said
from fedlora.config.sections import DataConfig
from fedlora.config.sites import SEPARATOR
from fedlora.config.toml_file import read_toml
from fedlora.errors import NodeFileError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
KINDS = ("query", "train", "evaluate", "gradient", "collect", "secagg")
"""Of messages; the five stages of a secure aggregation are one."""
ROWS = DataConfig()
"""How rows are read where nothing is said: as a run's own."""
Clock = Annotated[str, Field(pattern=r"^(([01]\d|2[0-3]):[0-5]\d)?$")]


class TrustPolicy(Section):
    code: Names = ()
    """Functions of the operator's own that a run may name, "py:package.module:function"."""
    remote_code: bool = False
    """May a run use code that comes with a model?"""


class ModelSource(Section):
    """Where this node has a model that a run names."""

    path: str = ""
    """A directory, a hub id or "pkg:"; empty: what the run names it by."""
    revision: str = ""
    """Of a hub id. A run that names another is refused."""


class ModelPolicy(Section):
    rank: Annotated[int, Field(ge=0, lt=65_536)] = 0
    """This node's adapter rank, as the server is told; 0: as the run has it."""
    layers: Annotated[int, Field(ge=0, lt=65_536)] = 0
    """The most layers that it has memory to train, as the server is told; 0: all."""
    allowed: dict[str, ModelSource] = Field(default_factory=dict)
    """By model.path of the run: a table, which may be empty. No other model is loaded."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """By model.adapter of the run: this node's own directory with that adapter. A run that starts
    from another is refused."""


class DataPolicy(Section):
    path: str = ""
    """This node's rows: a file, or a directory with train.jsonl and perhaps test.jsonl in it."""
    shared: Names = ()
    """For trials, in place of path: data.path, data.test-path or data.clients of a run, in the
    run's words, of which this node takes its part."""
    text: str = ROWS.text
    text_pair: str = ROWS.text_pair
    image: str = ROWS.image
    label: str = ROWS.label
    label_separator: str = ROWS.label_separator
    prompt: str = ROWS.prompt
    response: str = ROWS.response
    rejected: str = ROWS.rejected
    messages: str = ROWS.messages
    map: Renames = ROWS.map
    separator: Annotated[str, Field(pattern=SEPARATOR)] = ROWS.separator
    encoding: str = ROWS.encoding
    line_pattern: str = ROWS.line_pattern
    limit: Annotated[int, Field(ge=0)] = ROWS.limit
    dedupe: bool = ROWS.dedupe
    client_test_fraction: Annotated[float, Field(ge=0, lt=1)] = ROWS.client_test_fraction
    client_validation_fraction: Annotated[float, Field(ge=0, lt=1)] = (
        ROWS.client_validation_fraction
    )
    smallest: Annotated[int, Field(gt=0)] = 1
    """With fewer training rows nothing is trained, scored or sent."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataPolicy":
        if bool(self.path) == bool(self.shared):
            raise ValueError("name path, this node's rows, or for a trial shared")
        return self


class PrivacyPolicy(Section):
    level: Literal["none", "example", "client"] = "none"
    """Differential privacy that a run must have. none: it may have any, or none."""
    max_epsilon: Annotated[float, Field(ge=0, le=200)] = 0.0
    """Spent on these rows by all runs together; a run without privacy is refused. 0: no limit."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """What epsilon is counted at on this node, whatever the run's is; below 1 over its rows."""
    max_delta: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The largest privacy.delta of a run. 0: no limit."""
    unit: str = ""
    """A column: all rows of one value, a person's, are one unit. Empty: each row is."""
    withdrawn: Names = ()
    """Values of that column whose rows are left out from the next message on, for good."""
    ledger: str = ""
    """Directory of the ledger; empty: with the memory."""
    keeper: str = ""
    """The socket of `fedlora node keeper`, which alone writes ledger and record. Empty: the node's
    own processes do."""
    metrics: Literal["never", "without-dp", "always"] = "without-dp"
    """When may counts, losses, scores and timings of this node be told? always: under DP, too, to a
    run that sets privacy.release-metrics."""

    @model_validator(mode="after")
    def _of_a_column(self) -> "PrivacyPolicy":
        if self.withdrawn and not self.unit:
            raise ValueError("withdrawn: say in `unit` which column has these values")
        return self


class SecurePolicy(Section):
    require: bool = False
    """Answer in a secure aggregation only."""
    refuse: bool = False
    """Answer in none: in a sum no bound on a single client can be enforced."""
    fewest: Annotated[int, Field(ge=3)] = 3
    """Clients that a round asks."""
    threshold: Annotated[int, Field(ge=0)] = 0
    """The least secure.reconstruction-threshold: the fewest clients of a sum."""
    colluding: Annotated[int, Field(ge=0)] = 1
    """Clients that may help the server; the larger of this and a run's secure.colluding holds."""
    max_rounds: Annotated[int, Field(ge=0)] = 0
    """For which this node trains, of all runs together. 0: no limit."""
    members: str = ""
    """The file of the members' public keys, "members.toml"; empty: the server says whose each key
    is."""
    key: str = "member.key"
    """What this node signs with, where it has a list of members."""
    certificate: str = "member.cert"
    """The word of the members' authority on that key, where there is one; it is shown to them."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "SecurePolicy":
        if self.require and self.refuse:
            raise ValueError("require and refuse exclude each other")
        return self


class LimitsPolicy(Section):
    rank: Annotated[int, Field(gt=0)] = 256
    modules: Annotated[int, Field(gt=0)] = 2000
    """Adapted modules."""
    whole_modules: Names = ()
    """Of lora.modules-to-save: what may be trained, and sent, whole."""
    steps: Annotated[int, Field(gt=0)] = 10_000
    """Optimiser steps of one message."""
    seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Of one message."""
    batch: Annotated[int, Field(gt=0)] = 512
    upload_mb: Annotated[float, Field(gt=0)] = 2000.0
    """Of one reply, 1 MB = 10^6 bytes."""
    memory_mb: Annotated[float, Field(ge=0)] = 0.0
    """Of the process that trains; looked at between steps. 0: no limit."""
    threads: Annotated[int, Field(gt=0)] = 64
    devices: Annotated[str, Field(pattern=r"^[a-z]+(:\d+(,\d+)*)?$")] = "auto"
    """What it computes on, as simulate.devices."""
    kinds: Names = ("query", "train", "evaluate")
    """Of messages that it answers."""
    strategies: Names = ()
    """Names; empty: all that come with fedlora."""

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if strange := [kind for kind in value if kind not in KINDS]:
            raise ValueError(f"{strange[0]!r} is none of {', '.join(KINDS)}")
        return value


class HoursPolicy(Section):
    days: Names = ()
    """mon to sun; empty: all."""
    begin: Clock = ""
    """ "22:00", by this machine's clock; the day of a night is the one it begins on."""
    end: Clock = ""

    @model_validator(mode="after")
    def _whole(self) -> "HoursPolicy":
        if strange := [day for day in self.days if day not in DAYS]:
            raise ValueError(f"{strange[0]!r} is none of {', '.join(DAYS)}")
        if bool(self.begin) != bool(self.end):
            raise ValueError("begin and end: name both, or neither")
        return self

    def open_at(self, now: datetime) -> bool:
        """Does the node work at this time?"""
        clock, day = f"{now:%H:%M}", now
        if self.begin:
            if self.begin < self.end:
                within = self.begin <= clock < self.end
            else:
                within = clock >= self.begin or clock < self.end
                day = now - timedelta(days=clock < self.end)
            if not within:
                return False
        return not self.days or DAYS[day.weekday()] in self.days


class Policy(Section):
    """All of a node.toml."""

    directory: str = "."
    """What this node may write to: its memory/, its ledger and audit.jsonl."""
    trust: TrustPolicy = TrustPolicy()
    model: ModelPolicy = ModelPolicy()
    data: DataPolicy
    privacy: PrivacyPolicy = PrivacyPolicy()
    secure: SecurePolicy = SecurePolicy()
    limits: LimitsPolicy = LimitsPolicy()
    hours: HoursPolicy = HoursPolicy()

    @property
    def memory(self) -> Path:
        return Path(self.directory, "memory")

    @property
    def ledger(self) -> Path:
        return Path(self.privacy.ledger) if self.privacy.ledger else self.memory

    @property
    def audit(self) -> Path:
        return Path(self.directory, "audit.jsonl")

    @classmethod
    def of(cls, node_config: Mapping[str, object]) -> "Policy | None":
        """The policy that a node's own config names, as it is now; None where it names none.

        Raises:
            NodeFileError: it cannot be read, or is none.
        """
        path = node_config.get("policy")
        return cls.load(str(path)) if path else None

    @classmethod
    def load(cls, path: Path | str) -> "Policy":
        """A node.toml, its paths made absolute.

        Raises:
            NodeFileError: it is not there, or holds what is no policy; names every problem.
        """
        tree, _ = read_toml(path)
        try:
            read = cls(**_fields(tree))
        except ValidationError as e:
            problems = [_problem(error) for error in e.errors()]
            raise NodeFileError(problems, f"Fix {path}, this node's policy.") from None
        return read._beside(Path(path).resolve().parent)

    def _beside(self, home: Path) -> "Policy":
        """This policy with what is relative in it taken from there."""

        def there(text: str) -> str:
            return str(home / text) if text and not re.match(r"(pkg|py):", text) else text

        models = {
            name: m.model_copy(update={"path": there(m.path)}) if _is_path(m.path) else m
            for name, m in self.model.allowed.items()
        }
        adapters = {name: there(path) for name, path in self.model.adapters.items()}
        return self.model_copy(
            update={
                "directory": there(self.directory),
                "data": self.data.model_copy(update={"path": there(self.data.path)}),
                "privacy": self.privacy.model_copy(
                    update={
                        "ledger": there(self.privacy.ledger),
                        "keeper": there(self.privacy.keeper),
                    }
                ),
                "secure": self.secure.model_copy(
                    update={
                        "members": there(self.secure.members),
                        "key": there(self.secure.key),
                        "certificate": there(self.secure.certificate),
                    }
                ),
                "model": self.model.model_copy(update={"allowed": models, "adapters": adapters}),
            }
        )


def _is_path(text: str) -> bool:
    """A path of this machine, and no hub id?"""
    return text.startswith(("/", "./", "../"))


def _fields(tree: Any, keep: tuple[str, ...] = ("allowed", "adapters")) -> Any:
    """The tables with keys as Python spells them; names of models stay as they are."""
    if not isinstance(tree, dict):
        return tree
    found: dict[str, Any] = {}
    for key, value in tree.items():
        spelt = f"{key} " if "_" in key else key.replace("-", "_")  # max_epsilon is no key
        below = key in keep and isinstance(value, dict)
        found[spelt] = (
            {name: _fields(table) for name, table in value.items()} if below else _fields(value)
        )
    return found


def keys() -> tuple[str, ...]:
    """Every key of a node.toml, dotted; "model.allowed" stands for a table of tables."""
    found = []
    for name, field in Policy.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found += [f"{name}.{key}".replace("_", "-") for key in section.model_fields]
        else:
            found.append(name)
    return tuple(found)


def _problem(error: Any) -> str:
    spelt = ".".join(str(part).rstrip() for part in error["loc"])
    key = ".".join(str(part).rstrip().replace("_", "-") for part in error["loc"])
    if error["type"] == "extra_forbidden":
        shown = spelt if str(error["loc"][-1]).endswith(" ") else key
        near = difflib.get_close_matches(key, keys(), n=1)
        return f"{shown[:80]}: no such key" + (f'; did you mean "{near[0]}"?' if near else "")
    if error["type"] == "missing":
        return f"{key}: must be set"
    message = said(error)
    value = "" if isinstance(error["input"], dict) else f" = {error['input']!r}"[:80]
    return f"{key}{value}: {message}"
