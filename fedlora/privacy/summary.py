"""What a run's records say of its privacy: the terms of the promise, and epsilon by client."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.config.reader import Config
from fedlora.privacy.accounting import NO_PRIVACY, in_words


def summary(config: Config, rounds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary's entry: {} without DP. `rounds` are the lines of rounds.jsonl."""
    p = config.privacy
    if not p.on:
        return {}
    found: dict[str, Any] = {
        "unit": _unit(config),
        "adjacency": "add or remove one unit",
        "budget": f"epsilon = {p.epsilon:g}" if p.epsilon else "none: epsilon is counted only",
        "delta": p.delta,
        "clip_norm": p.clip_norm,
        "accountant": "PRV, its upper bound (Opacus)",
        "noise": "AES-CTR keyed by the system"
        if not p.insecure_reproducible_noise
        else "REPRODUCIBLE FROM run.seed: THERE IS NO PRIVACY",
        "losses_counts_scores": "sent WITHOUT NOISE, outside of the promise"
        if p.release_metrics
        else "kept on the clients",
        "promise": "docs/privacy/index.md",
    }
    last: dict[str, Mapping[str, Any]] = {}
    for line in rounds:
        if "privacy" in line:
            found |= {key: line["privacy"][key] for key in ("epsilon", "sigma", "q")}
        clients = (line.get("clients") or {}).items()
        if p.by_example:  # else the server has noised, and no client's word is asked
            last |= {str(i): facts["privacy"] for i, facts in clients if facts.get("privacy")}
    for key in ("epsilon", "sigma", "q") if last else ():
        found[key] = {i: facts.get(key) for i, facts in last.items()}
    deltas = {i: facts["delta"] for i, facts in last.items() if "delta" in facts}
    if {*deltas.values()} - {p.delta}:  # a node counts at its own
        found["delta"] = deltas
    spent = found.get("epsilon")
    by_client = isinstance(spent, Mapping)
    if spent is not None:
        found["epsilon"] = {i: _said(e) for i, e in spent.items()} if by_client else _said(spent)
    return found


def _unit(config: Config) -> str:
    if not config.privacy.by_example:
        return "one client with all its examples"
    if column := config.data.unit_column:
        return f"all examples of one client with one value of {column}"
    return "one example of one client"


def _said(epsilon: float | None) -> float | str:
    """None: a client did not tell it."""
    if epsilon is None:
        return "not told"
    return epsilon if epsilon <= NO_PRIVACY else in_words(epsilon)
