"""The page's head and tables: a run's records turned into text, ready to be placed.

Plain values in, plain values out; the template of `report_page` decides nothing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedlora.config.origins import origin
from fedlora.reports.outcome import Metric, Record, finite, judged_by
from fedlora.reports.run_files import (
    WAYS,
    RunFiles,
    breaks_certificate,
    breaks_promise,
    by_size,
    certificates,
    client_seconds,
    excess,
    held,
)
from fedlora.reports.units import count, duration, number, percent, size, tiny

COLUMNS = {
    "loss": ("test loss", False),
    "accuracy": ("accuracy", True),
    "macro_f1": ("macro F1", True),
    "perplexity": ("perplexity", False),
    "exact_match": ("exact match", True),
    "micro_f1": ("micro F1", True),
    "f1": ("F1", True),
    "strict_f1": ("strict F1", True),
    "precision": ("precision", True),
    "recall": ("recall", True),
    "token_accuracy": ("token accuracy", True),
    "pearson": ("Pearson", False),
    "spearman": ("Spearman", False),
    "mae": ("mean error", False),
    "rouge_1": ("ROUGE-1", True),
    "rouge_2": ("ROUGE-2", True),
    "rouge_l": ("ROUGE-L", True),
    "bleu": ("BLEU", False),
    "chrf": ("chrF", False),
    "ter": ("TER", False),
    "mcc": ("Matthews correlation", False),
    "kappa": ("Cohen's kappa", False),
    "balanced_accuracy": ("balanced accuracy", True),
    "weighted_f1": ("weighted F1", True),
    "r2": ("R2", False),
    "rmse": ("root mean square", False),
    "margin": ("margin", False),
}
"""The metrics of an evaluation: title, and whether it is a share."""


class TableCell(NamedTuple):
    """One entry of a table."""

    text: str
    title: str = ""
    """The exact value, where the text is rounded."""
    tone: str = ""
    """A class of the page's style: "good", "warn", "bad"."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table. A column that says nothing in any row is left out of it."""

    head: list[str]
    rows: list[list[TableCell]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, TableCell]]) -> "Grid":
        said = [h for h in (rows[0] if rows else ()) if any(row[h].text != "-" for row in rows)]
        return cls(said, [[row[h] for h in said] for row in rows])


class Tile(NamedTuple):
    """One of the large numbers on top."""

    title: str
    value: str
    detail: str = ""
    tone: str = ""


class Bar(NamedTuple):
    """One line of the comparison with the baselines."""

    name: str
    value: str
    width: float
    """Of the longest, in percent."""
    ours: bool = False


# -- the head of the page -------------------------------------------------------------------------


def status(run: RunFiles) -> TableCell:
    """Did it end, stop with a reason, or is it still going?"""
    if run.summary["stopped"]:
        return TableCell("stopped early", tone="bad")
    if run.complete:
        return TableCell("finished", tone="warn" if run.summary["warnings"] else "good")
    planned = run.config.get("run.rounds")
    of = f" of {planned}" if planned else ""
    return TableCell(f"not finished: round {run.summary['rounds']}{of}", tone="warn")


def tiles(run: RunFiles) -> Iterator[Tile]:
    """The figures a reader asks for first. Those that the run cannot answer are left out."""
    s, metric = run.summary, run.metric
    final, best = finite(s["final"], metric.key), s["best"]
    if s["final"] and metric.key in s["final"]:
        found = f"best {metric.text(best.get(metric.key))} in round {best['round']}" if best else ""
        when = "final" if run.complete else "latest"
        yield Tile(f"{when} {metric.title}", metric.text(s["final"][metric.key]), found)
    if picked := s.get("chosen"):
        by = "best by validation rows" if picked["result"] == picked.get("best_round") else "last"
        yield Tile("the model is of", f"round {picked['result']}", picked.get("ended") or by)
    if final is not None and (strongest := strongest_baseline(run)):
        name, value = strongest
        tone = "good" if metric.better(final, value) else "bad"
        clear = abs(final - value) > (standard_error(run) or 0.0)
        than = f"points, {name}" if metric.share else name
        yield Tile("against baseline", gap(metric, final, value), than, tone if clear else "")
    if worst := run.worst_client():
        who = f"client {worst['client']}, rank {worst.get('rank', '?')}"
        yield Tile("worst client", metric.text(worst["final"][metric.key]), who)
    if s["max_deviation"] is not None:
        broken = any(breaks_promise(r.get("proof") or {}) for r in run.rounds)
        tone = "bad" if broken else ""
        yield Tile("largest deviation", tiny(s["max_deviation"]), f"promise: {s['promise']}", tone)
    if certificates(run.rounds):
        broken = any(breaks_certificate(c, s["promise"]) for _, c in certificates(run.rounds))
        largest = "none" if s["max_certificate"] is None else tiny(s["max_certificate"])
        detail = ", ".join(remarks(run)) or "within rounding"
        yield Tile("certificate", largest, detail, "bad" if broken else "")
    if any(s["bytes"].values()):
        sent = f"{size(s['bytes'].get('down'))} down, {size(s['bytes'].get('up'))} up"
        yield Tile("traffic", size(sum(s["bytes"].values())), sent)
    each = s["seconds"] / len(run.trained) if run.trained and s["seconds"] else None
    yield Tile("time", duration(s["seconds"]), f"{duration(each)} a round" if each else "")
    asked = sum(len(r.get("cohort") or ()) for r in run.rounds)
    failed = s["failures"]
    yield Tile("failures", str(failed), f"of {count(asked, 'request')}", "bad" if failed else "")


def remarks(run: RunFiles) -> list[str]:
    """What is to be said beside the largest deviation of the certificates, if anything."""
    found = [c for _, c in certificates(run.rounds)]
    known = sum(held(c) for c in found)
    told = ["above rounding"] if any(excess(c) > 1 for c in found) else []
    if not known:
        return [*told, "not certified"]
    return [*told, f"of {known} of {len(found)} rounds"] if known < len(found) else told


def chosen(run: RunFiles) -> Iterator[tuple[str, str]]:
    """What was chosen by validation rows: which round's model the result is, and why it ended."""
    found = run.summary.get("chosen")
    if not found:
        return
    if "best_round" in found:
        metric = found.get("metric") or "score"
        told = f"round {found['best_round']}, {metric} {number(found.get('value'))}"
        yield "best by validation rows", told
    yield "the model is of", f"round {found['result']} of {found.get('last_round')}"
    if found.get("ended"):
        yield "ended", found["ended"]


def strongest_baseline(run: RunFiles) -> tuple[str, float] | None:
    """The baseline to beat, by the run's metric."""
    known = run.baselines()
    if not known:
        return None
    name = (max if run.metric.more else min)(known, key=known.__getitem__)
    return name, known[name]


def gap(metric: Metric, final: float, baseline: float) -> str:
    """+2.1, in points of a percentage; for a metric that is no share, the difference itself."""
    return f"{100 * (final - baseline):+.1f}" if metric.share else f"{final - baseline:+.4g}"


def bars(run: RunFiles) -> list[Bar]:
    """The final model between its baselines, best first."""
    metric = run.metric
    final = finite(run.summary["final"], metric.key)
    values = {(name, False): value for name, value in run.baselines().items()}
    if final is None or not values:
        return []
    values[f"{run.summary['strategy']}, final model", True] = final
    longest = max(*values.values(), 1.0 if metric.share else 0.0) or 1.0
    ordered = sorted(values.items(), key=lambda item: item[1], reverse=metric.more)
    return [
        Bar(name, metric.text(value), round(100 * value / longest, 2), ours)
        for (name, ours), value in ordered
    ]


def standard_error(run: RunFiles) -> float | None:
    """Of the final score, where it is a share of so many test rows: sqrt(p (1 - p) / n)."""
    final, rows = (
        finite(run.summary["final"], run.metric.key),
        finite(run.summary["final"], "examples"),
    )
    if final is None or not rows or not run.metric.share:
        return None
    return math.sqrt(max(final * (1 - final), 0.0) / rows)


def verdict(run: RunFiles) -> str:
    """Was the federation worth it? With how sure the test is of that."""
    final, strongest = finite(run.summary["final"], run.metric.key), strongest_baseline(run)
    if final is None or strongest is None:
        return ""
    name, value = strongest
    way = "better than" if run.metric.better(final, value) else "not better than"
    apart = f"{gap(run.metric, final, value)} {'points' if run.metric.share else run.metric.title}"
    said = f"The final model is {way} the strongest baseline, {name} ({apart})."
    if (error := standard_error(run)) is not None:
        rows = run.summary["final"]["examples"]
        said += f" On {rows} test rows, a score has a standard error of {100 * error:.1f} points."
    return said


# -- tables ---------------------------------------------------------------------------------------


def rounds(run: RunFiles) -> Grid:
    return Grid.of([_round(r, _metrics(run), run.summary["promise"]) for r in run.rounds])


def _round(r: Record, metrics: Sequence[str], promise: str) -> dict[str, TableCell]:
    found = r.get("evaluation") or {}
    proof = r.get("proof") or {}
    cohort, failures = r.get("cohort"), len(r.get("failures") or ())
    return {
        "round": TableCell(str(r["round"])),
        "train loss": TableCell(number(r.get("train_loss"))),
        **{COLUMNS.get(key, (key,))[0]: TableCell(score(key, found.get(key))) for key in metrics},
        "validation": TableCell(_validation(r.get("validation"))),
        "clients": TableCell(f"{len(r.get('accepted') or ())}/{len(cohort)}" if cohort else "-"),
        "time": TableCell(duration((r.get("seconds") or {}).get("total"))),
        **{way: _size((r.get("bytes") or {}).get(way)) for way in WAYS},
        "deviation": TableCell(
            tiny(proof.get("deviation")), tone="bad" if breaks_promise(proof) else ""
        ),
        "certificate": _certified(r.get("certificate") or {}, promise),
        "failures": TableCell(str(failures), tone="bad" if failures else "")
        if cohort
        else TableCell("-"),
    }


def _validation(scores: Record | None) -> str:
    """The score on the validation rows, by what a run is judged by."""
    metric = judged_by([scores])
    return metric.text(finite(scores, metric.key))


def _certified(certificate: Record, promise: str) -> TableCell:
    """The deviation by the certificate; what stands against it on hovering."""
    if not certificate:
        return TableCell("-")
    silent = "; ".join(str(text) for text in certificate.get("not_certified") or ())
    tone = "bad" if breaks_certificate(certificate, promise) else ""
    text = relative(certificate["deviation"]) if held(certificate) else "not certified"
    return TableCell(text, silent, tone)


def relative(deviation: float | None) -> str:
    """A deviation as text. What is null in the file was no finite number."""
    return "not a number" if by_size(deviation) == math.inf else tiny(deviation)


def clients(run: RunFiles) -> Grid:
    seconds, metric, worst = client_seconds(run), run.metric, run.worst_client()
    return Grid.of([_client(c, metric, c is worst, seconds.get(c["client"])) for c in run.clients])


def _client(c: Record, metric: Metric, worst: bool, seconds: float | None) -> dict[str, TableCell]:
    labels = c.get("labels") or {}
    listed = ", ".join(f"{label}: {n}" for label, n in labels.items())
    scores = {
        title: TableCell(metric.text((c.get(when) or {}).get(metric.key)))
        for when, title in (("first", "first received"), ("personal", "own training"))
    }
    final = TableCell(
        metric.text((c.get("final") or {}).get(metric.key)), tone="bad" if worst else ""
    )
    return {
        "client": TableCell(str(c["client"])),
        "rank": _plain(c.get("rank")),
        "train examples": _plain(c.get("train_examples")),
        "test rows": _plain(c.get("test_examples")),
        "labels": TableCell(str(len(labels)), listed) if labels else TableCell("-"),
        "first received": scores["first received"],
        "final model": final,
        "own training": scores["own training"],
        "time a round": TableCell(duration(seconds)),
        "down": _size(c.get("bytes_down")),
        "up": _size(c.get("bytes_up")),
        "rounds": _plain(c.get("rounds")),
        "failures": TableCell(str(c.get("failures") or 0), tone="bad" if c.get("failures") else ""),
        "node": _plain(c.get("node")),
    }


def failures(run: RunFiles) -> list[tuple[str, str, str]]:
    """(round, client, reason) of everything that did not count."""
    return [
        (str(r["round"]), str(f.get("client", "?")), str(f.get("reason", "")))
        for r in run.rounds
        for f in r.get("failures") or ()
    ]


def score(key: str, value: Any) -> str:
    """A metric as text: a share as a percentage."""
    return percent(value) if key in COLUMNS and COLUMNS[key][1] else number(value)


def _metrics(run: RunFiles) -> list[str]:
    """The keys of the central evaluations, the known ones first."""
    found = {key: None for r in run.rounds for key in r.get("evaluation") or ()}
    scalar = [k for k in found if k not in COLUMNS and k != "examples"]
    return [k for k in COLUMNS if k in found] + scalar


def _size(n: int | None) -> TableCell:
    return TableCell(size(n), "" if n is None else f"{n} bytes")


def _plain(value: Any) -> TableCell:
    return TableCell("-" if value is None else str(value))


def rate(run: RunFiles) -> str:
    """ "0.02, from fedsb's defaults"; the rate alone where the config set it."""
    if (lr := run.config.get("train.lr")) is None:
        return ""
    said = origin(run.config.get("run.defaults", ""), "train.lr", lr)
    return ", ".join(filter(None, (f"{lr:g}", said)))


def scale_and_start(run: RunFiles) -> str:
    """'lora.alpha 16, lora.init "default"'; empty where a run's config says neither."""
    alpha, init = run.config.get("lora.alpha"), run.config.get("lora.init")
    return "" if alpha is None or init is None else f'lora.alpha {alpha:g}, lora.init "{init}"'
