"""A run's directory as values: what the server wrote, read back, of a whole or unfinished run.

    config.toml  rounds.jsonl  clients.jsonl  summary.json  summary-00002.json
    parts.json  parts-before.json

A run that was killed has rounds and nothing else. What its summary and clients would have said is
then worked out from the rounds, so a reader has one shape to deal with.
"""

import json
import math
import os
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.errors import FedLoraError
from fedlora.reports.line_digest import KEY, sealed, whole
from fedlora.reports.outcome import LOSS, PERPLEXITY, Metric, Record, finite, judge, judged_by
from fedlora.reports.record_types import (
    ClientRecord,
    PartsRecord,
    RoundRecord,
    SummaryRecord,
    checked,
    record_in,
)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run. Lists are ordered by round and by client."""

    directory: Path
    config: Mapping[str, Any]
    """Every key, dotted: "lora.alpha"."""
    rounds: tuple[Record, ...]
    """Round 0, where there is one, is the evaluation before any training."""
    clients: tuple[Record, ...]
    summary: Record
    """Every key of summary.json, the missing ones worked out from the rounds."""
    complete: bool
    """The run wrote its summary: it ended by itself, or stopped with a reason."""
    ends: tuple[Record, ...] = ()
    """The summaries of the ends before it was extended, in their order."""
    parts: Record = field(default_factory=dict)
    """What the final model makes of the central test rows; empty in an older run."""
    parts_before: Record = field(default_factory=dict)
    """The same of the model before round 1, of a task that generates answers."""

    @property
    def trained(self) -> tuple[Record, ...]:
        """The rounds in which clients trained."""
        return tuple(r for r in self.rounds if r["round"] > 0)

    @property
    def metric(self) -> Metric:
        """Accuracy where anything has one, else perplexity, else loss."""
        seen = [r.get("evaluation") for r in self.rounds]
        seen += [c.get(when) for c in self.clients for when in ("final", "first", "personal")]
        return judged_by(seen)

    @property
    def untuned(self) -> Record:
        """The scores before round 1; empty where there are none."""
        return next((r.get("evaluation") or {} for r in self.rounds if r["round"] == 0), {})

    def baselines(self) -> dict[str, float]:
        """The value of each baseline that has the run's metric, by name."""
        known = self.summary["baselines"].items()
        values = {name: finite(found, self.metric.key) for name, found in known}
        return {name: value for name, value in values.items() if value is not None}

    def worst_client(self) -> Record | None:
        """The client that the final model serves worst, by the run's metric."""
        key = self.metric.key
        scored = [c for c in self.clients if finite(c.get("final"), key) is not None]
        ordered = sorted(scored, key=lambda c: float(c["final"][key]))
        return (ordered[0] if self.metric.more else ordered[-1]) if ordered else None


def read(run_dir: Path) -> RunFiles:
    """The run in a directory, however far it came.

    A last line cut short by a kill is left out. Where a resumed run wrote a round again, the
    later record counts.

    Raises:
        FedLoraError: the directory holds no run, or a file of it is damaged.
    """
    run_dir = Path(run_dir)
    if not os.path.isfile(run_dir / "rounds.jsonl"):  # a name of any length
        raise FedLoraError(
            f"{run_dir}: no rounds.jsonl here, so this is not a run's directory; "
            "name one that a run wrote to, run.out/run.name, such as runs/quickstart"
        )
    rounds = {r["round"]: r for r in records(RoundRecord, run_dir / "rounds.jsonl")}
    ordered = tuple(rounds[number] for number in sorted(rounds))
    config = dict(_flat(_toml(run_dir / "config.toml")))
    summary = record_in(SummaryRecord, run_dir / "summary.json")
    clients = {c["client"]: c for c in _from_rounds(ordered)}
    clients |= {c["client"]: c for c in records(ClientRecord, run_dir / "clients.jsonl")}
    return RunFiles(
        directory=run_dir,
        config=config,
        rounds=ordered,
        clients=tuple(clients[client] for client in sorted(clients)),
        summary=_derived(run_dir, ordered, config)
        | {k: v for k, v in summary.items() if v is not None},
        complete=bool(summary),
        ends=tuple(
            record_in(SummaryRecord, path) for path in sorted(run_dir.glob("summary-*.json"))
        ),
        parts=record_in(PartsRecord, run_dir / "parts.json"),
        parts_before=record_in(PartsRecord, run_dir / "parts-before.json"),
    )


def breaks_promise(proof: Record) -> bool:
    """The proof's deviation is not within the bound, where its promise has one.

    A deviation that is not a number (null in the file) has not kept to it.
    """
    if proof.get("bound") is None or proof.get("promise") == "approximate":
        return False
    found = [(proof.get("deviation", 0.0), proof["bound"])]
    if proof.get("model_deviation") is not None:
        own = proof.get("model_bound")
        found.append((proof["model_deviation"], proof["bound"] if own is None else own))
    return any(value is None or not value <= bound for value, bound in found)


def certificates(rounds: Iterable[Record]) -> list[tuple[int, Record]]:
    """(round, certificate) of the rounds that have one."""
    return [(r["round"], r["certificate"]) for r in rounds if r.get("certificate")]


def held(certificate: Record) -> bool:
    """Whether the round's equation was checked; if not, its deviation of 0 means nothing."""
    return bool(certificate.get("layers"))


def excess(certificate: Record) -> float:
    """The largest of what was measured over what rounding explains; above 1 it is no rounding.

    What is not finite (null in the file) is infinite. 0 where nothing was measured.
    """
    measured = [certificate.get("excess")] if held(certificate) else []
    measured += [certificate.get("start_excess")] if certificate.get("start") else []
    return max((by_size(x) for x in measured), default=0.0)


def breaks_certificate(certificate: Record, promise: str) -> bool:
    """An excess above 1, where the strategy promises that there is none."""
    return promise not in ("", "approximate") and excess(certificate) > 1


def by_size(x: float | None) -> float:
    """For comparing: what is not a number (NaN, or null in the file) is larger than any."""
    return math.inf if x is None or math.isnan(x) else x


def _derived(run_dir: Path, rounds: tuple[Record, ...], config: Record) -> dict[str, Any]:
    """The summary that the rounds allow."""
    last: Record = rounds[-1] if rounds else {}
    evaluated = [r for r in rounds if r.get("evaluation")]
    proofs = [r["proof"] for r in rounds if r.get("proof")]
    return {
        "name": config.get("run.name", run_dir.resolve().name),
        "strategy": config.get("strategy.name", last.get("strategy", "")),
        "promise": proofs[-1].get("promise", "") if proofs else "",
        "rounds": last.get("round", 0),
        "seconds": sum(finite(r.get("seconds"), "total") or 0.0 for r in rounds),
        "model": config.get("model.path", ""),
        "data": config.get("data.path", ""),
        "rows": {},
        "seed": config.get("run.seed"),
        "final": evaluated[-1]["evaluation"] if evaluated else None,
        "best": _best(evaluated),
        "baselines": {},
        "bytes": {way: sum((r.get("bytes") or {}).get(way, 0) for r in rounds) for way in WAYS},
        "max_deviation": _largest(p["deviation"] for p in proofs if "deviation" in p),
        "max_certificate": _largest(c["deviation"] for _, c in certificates(rounds) if held(c)),
        "failures": sum(len(r.get("failures") or ()) for r in rounds),
        "stopped": "",
        "warnings": judge(rounds, {}, None),  # the rest is for the end
        "privacy": {},
    }


WAYS = ("down", "up")


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest value; a NaN among them, null in the file, is the answer, never passed over."""
    known = [math.nan if v is None else v for v in values]
    return next((v for v in known if math.isnan(v)), max(known, default=None))


def _best(evaluated: Iterable[Record]) -> Record | None:
    """The best evaluation by what the run is judged by, the first of equal ones.

    By the loss in place of perplexity: it is finite for longer.
    """
    every = list(evaluated)
    metric = judged_by([r["evaluation"] for r in every])
    metric = LOSS if metric is PERPLEXITY else metric
    best: tuple[float, Record] | None = None
    for r in every:
        score = finite(r["evaluation"], metric.key)
        if score is not None and (best is None or metric.better(score, best[0])):
            best = (score, {"round": r["round"], **r["evaluation"]})
    return best[1] if best else None


def _from_rounds(rounds: tuple[Record, ...]) -> Iterator[dict[str, Any]]:
    """The clients as the rounds saw them: what clients.jsonl would say, less data and node."""
    seen: dict[int, list[Record]] = {}
    for r in rounds:
        for client, found in (r.get("clients") or {}).items():
            seen.setdefault(int(client), []).append(found)
    failures = [f.get("client") for r in rounds for f in r.get("failures") or ()]
    failed = [client for client in failures if client is not None]
    for client in sorted({*seen, *failed}):
        mine = seen.get(client, [])
        yield {
            "client": client,
            "rank": mine[-1].get("rank") if mine else None,
            "train_examples": mine[-1].get("examples") if mine else None,
            "labels": {},
            "rounds": len(mine),
            "failures": failed.count(client),
            "bytes_down": sum(m.get("bytes_down") or 0 for m in mine),
            "bytes_up": sum(m.get("bytes_up") or 0 for m in mine),
            "first": mine[0].get("before") if mine else None,
            "final": None,
            "personal": mine[-1].get("after") if mine else None,
        }


def client_seconds(run: RunFiles) -> dict[int, float]:
    """Each client's median time to train in a round."""
    times: dict[int, list[float]] = {}
    for r in run.trained:
        for client, found in (r.get("clients") or {}).items():
            if (seconds := finite(found, "seconds")) is not None:
                times.setdefault(int(client), []).append(seconds)
    return {client: statistics.median(seconds) for client, seconds in times.items()}


def records(kind: type, path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, without their digests; none where there is no file.

    A last line that is no JSON was cut short by a kill, and is left out. Where lines have digests,
    such a line has no end: one with an end is damaged like any other.

    Raises:
        FedLoraError: another line is no JSON, is not what it was written as, or is no such record;
            names file, line and key.
    """
    if not path.is_file():
        return
    data = path.read_bytes()
    lines = [(n, x) for n, x in enumerate(data.split(b"\n"), 1) if x.strip()]
    digests = any(sealed(x) for _, x in lines)
    for number, line in lines:
        last = number == lines[-1][0] and not (digests and data.endswith(b"\n"))
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as e:  # not JSON, or not UTF-8
            if last:
                return
            raise FedLoraError(f"{path}, line {number}: not JSON: {e}") from None
        if digests and not whole(line):
            raise FedLoraError(
                f"{path}, line {number}: damaged: its digest is of another text. Restore the file "
                "from a copy, or remove the line, and the round is off the record"
            )
        record = checked(kind, found, f"{path}, line {number}")
        record.pop(KEY, None)
        yield record


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as e:
        raise FedLoraError(f"{path}: not TOML: {e}") from None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
