"""What the records of a run's directory hold, by key: checked as they are read back.

A key that is not named here may hold anything; one that is may be missing, unless it is `Required`.
Older runs lack some, and null is a number that was none.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fedlora.config.fields import said
from fedlora.errors import FedLoraError

Count = Annotated[int, Field(ge=0, le=2**63)]
Number = float | None
"""Not a number and infinity are results too."""
Numbers = dict[str, Number]
ByClient = Annotated[str, Field(pattern=r"^-?\d{1,9}$")]
Counts = dict[str, Count]
Promise = Literal["exact", "approximate", "shared", ""]


def _rows(scores: Mapping[str, float | None]) -> Mapping[str, float | None]:
    if (scores.get("examples") or 0) < 0:
        raise ValueError("examples must be no less than 0")
    return scores


Scores = Annotated[Numbers, AfterValidator(_rows)] | None


class ProofRecord(TypedDict, total=False):
    """How far a round's sum is from the clients' whole updates."""

    promise: Promise
    deviation: Number
    bound: Number
    model_deviation: Number
    model_bound: Number
    worst_layer: str | None
    layers: Numbers


class CertificateRecord(TypedDict, total=False):
    """What the clients' models measured, held against the server's."""

    deviation: Required[Number]
    excess: Number
    worst: str | None
    layers: Numbers | None
    start: dict[ByClient, Number] | None
    start_excess: Number
    heard: dict[ByClient, Number] | None
    not_certified: list[str] | None


class ClientRoundRecord(TypedDict, total=False):
    """One client in one round."""

    rank: int | None
    examples: Count | None
    counted: Count | None
    seconds: Number
    train_loss: Number
    before: Scores
    after: Scores
    during: Numbers | None
    bytes_down: Count | None
    bytes_up: Count | None


class FailureRecord(TypedDict, total=False):
    """Something that did not count, and why."""

    client: int | None
    reason: str


class VirtualRecord(TypedDict, total=False):
    """What a round took on the virtual clock."""

    clock: Number
    waiting: Number


class SecureRecord(TypedDict, total=False):
    """A masked sum."""

    summed: Required[Count]


class CappedRecord(TypedDict, total=False):
    """A claim of examples that was above the bound, and what it counted as."""

    examples: Count
    counted: Count


class BoundsRecord(TypedDict, total=False):
    """On whom the bounds acted."""

    refused: list[int]
    capped: dict[ByClient, CappedRecord]


class StartRecord(TypedDict, total=False):
    """How good a start is that was made from data, weights or a gradient."""

    made_from: str
    lines: list[str]
    modules: dict[str, Numbers]


class RoundRecord(TypedDict, total=False):
    """A line of rounds.jsonl."""

    round: Required[Annotated[int, Field(ge=0, le=2**31)]]
    strategy: str
    train_loss: Number
    evaluation: Scores
    validation: Scores
    cohort: list[int] | None
    accepted: list[int] | None
    failures: list[FailureRecord] | None
    clients: dict[ByClient, ClientRoundRecord] | None
    bytes: Counts | None
    seconds: Numbers | None
    proof: ProofRecord | None
    certificate: CertificateRecord | None
    virtual: VirtualRecord | None
    secure: SecureRecord | None
    bounds: BoundsRecord | None
    start: StartRecord | None
    again: str | None
    loss_not_finite: list[int] | None


class ClientRecord(TypedDict, total=False):
    """A line of clients.jsonl."""

    client: Required[Annotated[int, Field(ge=-(2**31), le=2**31)]]
    rank: int | None
    train_examples: Count | None
    test_examples: Count | None
    untokenised: Count | None
    labels: Counts | None
    first: Scores
    final: Scores
    personal: Scores
    bytes_down: Count | None
    bytes_up: Count | None
    rounds: Count | None
    failures: Count | None


class LeftRecord(TypedDict):
    """Rows that were left out for one reason."""

    why: str
    rows: Count
    first: list[int]


class SourceRecord(TypedDict):
    """A source's rows."""

    path: str
    unit: str
    read: Count
    left: list[LeftRecord]
    notes: list[str]


class RowsRecord(TypedDict, total=False):
    """What became of every row."""

    sources: list[SourceRecord]
    labels: list[str]
    test: Counts
    train: list[Counts]
    held: list[Counts]
    validation: Counts
    validated: list[Counts]


class GenerationRecord(TypedDict):
    """How answers were generated."""

    tokens: int
    """At most; -1: as many as the longest response has."""
    stops_at: str | int | None


class BestRecord(TypedDict, total=False):
    """The best round's scores. Its other keys are those of an evaluation."""

    round: Required[int]
    accuracy: Number
    loss: Number
    perplexity: Number


class ChosenRecord(TypedDict, total=False):
    """What was chosen by validation rows: [stop]."""

    metric: str
    best_round: int
    value: Number
    result: Required[int]
    """The round whose model the run's is."""
    last_round: int
    ended: str


class SummaryRecord(TypedDict, total=False):
    """summary.json."""

    name: str | None
    strategy: str | None
    promise: Promise | None
    rounds: Count | None
    seconds: Number
    model: str | None
    data: str | None
    rows: RowsRecord | None
    seed: int | None
    final: Scores
    validation: Scores
    chosen: ChosenRecord | None
    best: BestRecord | None
    generation: GenerationRecord | None
    baselines: dict[str, Numbers] | None
    bytes: Counts | None
    max_deviation: Number
    max_certificate: Number
    failures: Count | None
    clients: dict[str, Scores] | None
    virtual_seconds: Number
    sent: list[str] | None
    privacy: dict[str, Any] | None
    stopped: str | None
    warnings: list[str] | None


class Matrix(TypedDict):
    """A line a label that rows have, a column a label that is said."""

    labels: list[str]
    counts: list[list[Count]]


def _square(found: Matrix) -> Matrix:
    n = len(found["labels"])
    if {len(found["counts"]), *map(len, found["counts"])} != {n}:
        raise ValueError(f"counts must be {n} lines of {n}, a label each")
    return found


ConfusionRecord = Annotated[Matrix, AfterValidator(_square)]


class PairedNumbers(TypedDict):
    """Numbers of rows and of the model."""

    wanted: list[Number]
    said: list[Number]


def _as_many(found: PairedNumbers) -> PairedNumbers:
    if len(found["wanted"]) != len(found["said"]):
        raise ValueError("wanted and said must be as many")
    return found


PointsRecord = Annotated[PairedNumbers, AfterValidator(_as_many)]


class SampleRecord(TypedDict):
    """A text, what should follow, and what the model wrote."""

    given: str
    wanted: str
    said: str


class PartsRecord(TypedDict, total=False):
    """parts.json, parts-before.json: of the central test rows, training/tasks/parts.py."""

    counts: dict[str, Annotated[list[Count], Field(min_length=3, max_length=3)]]
    """By label or type of entity: rows that have it, rows said to, both."""
    confusion: ConfusionRecord
    numbers: PointsRecord
    margins: list[Number]
    samples: list[SampleRecord]
    of: Literal["validation"]
    """Of the central validation rows instead, where a task writes answers and there are such."""


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked(kind: type, found: Any, where: str) -> dict[str, Any]:
    """The record as it was read.

    Raises:
        FedLoraError: it is no such record; with `where`, the key, and what it must be.
    """
    try:
        _adapter(kind).validate_python(found, strict=True)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = said(first)
        held = f", is {first['input']!r:.60}" if first["type"] != "missing" else ""
        raise FedLoraError(f"{where}: {key + ': ' if key else ''}{message}{held}") from None
    record: dict[str, Any] = found
    return record


def record_in(kind: type, path: Path) -> Mapping[str, Any]:
    """The record in a JSON file; empty where there is no file.

    Raises:
        FedLoraError: the file holds something else; names it, and the key.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # not JSON, or not UTF-8
        raise FedLoraError(f"{path}: not JSON: {e}") from None
    return checked(kind, found, str(path))
