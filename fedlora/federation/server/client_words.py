"""What a client tells of itself: the numbers beside its update, none of which is believed further.

A name is short and prints, a number is one that a model can have; what is not is refused, or left
out where it is a score or an epsilon.
"""

import math
from collections.abc import Mapping
from typing import Any

from fedlora.errors import UpdateError
from fedlora.reports.outcome import JUDGED_BY
from fedlora.strategies.base import Client, Round

MOST_METRICS, LONGEST_NAME = 200, 80
"""Of the numbers that a client tells of itself: how many, and the characters of a name."""
MOST_SCORE = 1e9
"""Of a score that is no share, and of a training loss: what is beyond is no number of a model's."""
SHARES = {m.key for m in JUDGED_BY if m.share} | {"exact_match", "macro_f1", "micro_f1"}
"""Scores between 0 and 1."""


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raises UpdateError where what a client tells of itself is not a few numbers by name."""
    if len(metrics) > MOST_METRICS:
        raise UpdateError(f"it sends {len(metrics)} metrics: must be {MOST_METRICS} at most")
    for name, value in metrics.items():
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise UpdateError(
                f"a metric's name, {name[:LONGEST_NAME]!r}, must be {LONGEST_NAME} printable "
                "characters at most"
            )
        if isinstance(value, list):
            raise UpdateError(f"{name} = {value[:3]!r}: must be one number")
        measured = name != "loss" and "." not in name
        if measured and not (math.isfinite(value) and value >= 0):
            raise UpdateError(f"{name} = {value!r}: must be a finite number, 0 or more")


def facts_of(
    client: Client, round: Round, keeps: bool, metrics: Mapping[str, Any], bytes_up: int
) -> dict[str, Any]:
    """The record of a client's round; what it did not report is None, its examples 1.

    microbatch: where its device ran out of memory, so that it equals others to rounding only.
    """
    return {
        "round": round.number,
        "rank": max(layer.rank for layer in client.layers.values()),
        "keeps": keeps,
        "examples": metrics.get("num-examples", 1),
        "steps": metrics.get("steps"),
        "train_loss": _loss(metrics.get("loss")),
        "seconds": metrics.get("seconds"),
        "train_seconds": metrics.get("train-seconds"),
        "privacy": part_of(metrics, "privacy."),
        "forward_seconds": metrics.get("forward-seconds"),
        "backward_seconds": metrics.get("backward-seconds"),
        "tokens": metrics.get("tokens"),
        **({"microbatch": halved} if (halved := _whole(metrics.get("microbatch"))) else {}),
        "bytes_up": bytes_up,
        **({"during": at} if (at := scores_of(metrics, "during.")) else {}),
        "before": scores_of(metrics, "before."),
        "after": scores_of(metrics, "after."),
    }


def _loss(x: float | None) -> float | None:
    """A training loss; one beyond all sense is NaN, as one that overflowed."""
    return x if x is None or abs(x) <= MOST_SCORE else math.nan


def _whole(x: Any) -> int:
    """A count that a client tells; 0 of anything else."""
    return x if isinstance(x, int) and not isinstance(x, bool) and x > 0 else 0


def part_of(metrics: Mapping[str, Any], prefix: str) -> dict[str, float] | None:
    """The finite metrics whose names begin with the prefix, without it; None where none do."""
    told = {k.removeprefix(prefix): float(v) for k, v in metrics.items() if k.startswith(prefix)}
    return {name: x for name, x in told.items() if math.isfinite(x)} or None


def scores_of(metrics: Mapping[str, Any], prefix: str) -> dict[str, float] | None:
    """The scores that a client tells under a prefix; what is no score is left out.

    A share is between 0 and 1, a number of rows is not negative, and no other is beyond MOST_SCORE.
    """
    told = part_of(metrics, prefix) or {}
    return {name: x for name, x in told.items() if _is_score(name, x)} or None


def _is_score(name: str, x: float) -> bool:
    if name in SHARES:
        return 0 <= x <= 1
    return (0 if name == "examples" else -MOST_SCORE) <= x <= MOST_SCORE
