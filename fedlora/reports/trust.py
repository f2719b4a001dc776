"""What a run proves, gives away and guards, in words: the page's sections on trust."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.reports.outcome import Record
from fedlora.reports.run_files import RunFiles, breaks_promise, by_size, certificates
from fedlora.reports.tables import Grid, TableCell, failures, relative
from fedlora.reports.units import count, percent, tiny

PROMISES = {
    "exact": (
        "{strategy} promises that this is exactly what a round's model is: the model before it "
        "plus every client's whole update, weighted by its examples. A run that misses it stops.",
        "what the clients make of their next download, wire dtype included",
    ),
    "approximate": (
        "{strategy} does not promise this, the model before the round plus every client's whole "
        "update weighted by its examples. How far it stays from it is part of the method.",
        "the model after it",
    ),
    "shared": (
        "{strategy} promises this of what the clients share. Each keeps the rest to itself, so "
        "there is no one model to compare with the mean of their whole updates.",
        "what the clients make of their next download, wire dtype included",
    ),
}
"""By promise: what it means, said of the formula the page prints above; what is compared."""


def proof(run: RunFiles) -> list[str]:
    """What was promised, what was measured, and whether it held."""
    rounds = [r for r in run.rounds if r.get("proof")]
    if not rounds:
        if certificates(run.rounds):
            return ["No round has this proof: for this strategy it cannot be told from sums alone."]
        return ["No round of this run was aggregated, so nothing was measured."]
    meaning, compared = PROMISES[run.summary["promise"] or "approximate"]
    worst = max(rounds, key=lambda r: by_size(r["proof"].get("deviation")))
    found = worst["proof"]
    where = f", most of all in {found['worst_layer']}" if found.get("worst_layer") else ""
    told = [
        meaning.format(strategy=run.summary["strategy"]),
        f"After every round ({len(rounds)} so far) the server computed the sum again, on seeded "
        f"random inputs, and compared it with {compared}. The largest relative deviation was "
        f"{relative(found.get('deviation'))}, in round {worst['round']}{where}.",
    ]
    judged = _judged(run, [r["proof"] for r in rounds], by_size(found.get("deviation")))
    return [*told, *judged, *_capped(run)]


def _judged(run: RunFiles, proofs: list[Record], worst: float) -> Iterator[str]:
    """What the largest deviation means under the run's promise."""
    if 0.001 <= worst < math.inf:
        yield f"That is {percent(worst)} of the size of the clients' updates."
    bound = proofs[-1].get("bound")
    if bound is not None and run.summary["promise"] != "approximate":
        broken = [str(r["round"]) for r in run.rounds if breaks_promise(r.get("proof") or {})]
        held = f"EXCEEDED in round {', '.join(broken)}" if broken else "kept in every round"
        yield f"The bound, {tiny(bound)}, was {held}."
    models = [p["model_deviation"] for p in proofs if p.get("model_deviation") is not None]
    if models:
        yield f"Measured through the loaded model itself, the largest was {tiny(max(models))}."


def _capped(run: RunFiles) -> Iterator[str]:
    """Whose claims of examples were too large, and in which rounds: its weight is another then."""
    rounds: dict[str, list[str]] = {}
    for r in run.rounds:
        for client in (r.get("bounds") or {}).get("capped") or {}:
            rounds.setdefault(client, []).append(str(r["round"]))
    times = run.config.get("round.count-bound", 4.0)
    for client, found in rounds.items():
        yield (
            f"A claim was above round.count-bound: client {client} counted as {times:g} times the "
            f"round's median in rounds {', '.join(found)}, not as the examples that it claims, and "
            "p_i is over the counts as they counted."
        )


def layers(run: RunFiles) -> Grid:
    """The modules of the largest deviation over all rounds."""
    largest: dict[str, float] = {}
    for r in run.rounds:
        for module, deviation in ((r.get("proof") or {}).get("layers") or {}).items():
            largest[module] = max(largest.get(module, 0.0), by_size(deviation))
    ordered = sorted(largest.items(), key=lambda item: -item[1])[:12]
    return Grid.of(
        [{"module": TableCell(m), "largest deviation": TableCell(relative(d))} for m, d in ordered]
    )


def modules(run: RunFiles) -> list[str]:
    """The adapted modules, as the proofs name them."""
    return sorted({m for r in run.rounds for m in (r.get("proof") or {}).get("layers") or {}})


def left(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Everything that the clients' machines sent."""
    records = [found for r in run.trained for found in (r.get("clients") or {}).values()]
    masked = [r["secure"]["summed"] for r in run.trained if r.get("secure")]
    if records:
        sent = run.summary.get("sent")
        which = f"the factors {', '.join(sent)}" if sent else "the factors its strategy sends"
        if found := modules(run):
            which += f", of {count(len(found), 'module')}"
        if masked:
            yield "Trained factors", f"{which}, each round, masked: known is their sum alone"
            yield "Counts and losses", "masked as well: known is their sum over the clients"
            yield "Clients in a sum", f"{min(masked)} or more; docs/privacy/index.md: against whom"
            yield "Bound on one client", "none: of a sum, only the whole could be checked"
        else:
            yield "Trained factors", f"{which}, each round"
            yield "Example counts", "how many rows the client trained on, each round"
    if any(c.get("start") for _, c in certificates(run.rounds)):
        when = "; of the changes the sum alone is known" if masked else " and at its end"
        shared = run.summary["promise"] == "shared"
        what = "block of rows of A" if shared else "module and other tensor"
        yield "Certificate", f"8 numbers of each {what}, at each round's start{when}"
    if any(found.get("train_loss") is not None for found in records):
        yield "Training losses", "their mean over the client's steps, each round"
    scored = [found.get(when) or {} for found in records for when in ("before", "after")]
    scored += [c.get("final") or {} for c in run.clients]
    if keys := list({key: None for found in scored for key in found}):
        yield "Evaluation metrics", f"{', '.join(keys)}, on the client's own test rows"
    if any(found.get("during") for found in records):
        yield "Losses while training", "on the client's own validation rows, by evaluate.steps"
    if any(found.get("seconds") is not None for found in records):
        yield "Timings", "seconds of work and of training, and the number of steps"
    if records:
        yield "About the node", "its id, client number, rank, cores, whether it computes bfloat16"
    if failures(run):
        yield "Reasons of failure", "the text of each error, as listed under Failures"


def privacy(run: RunFiles) -> tuple[list[tuple[str, str]], Grid]:
    """The privacy ledger: what holds for the run, and what holds for each client.

    Any value of summary["privacy"] that is a mapping by client id becomes a column, and so does
    any entry of a mapping "clients"; everything else is a line of its own.
    """
    facts: list[tuple[str, str]] = []
    by_client: dict[str, dict[str, TableCell]] = {}
    for key, value in run.summary["privacy"].items():
        if not isinstance(value, Mapping):
            facts.append((_words(key), _fact(value)))
            continue
        for client, found in value.items():
            columns = found if isinstance(found, Mapping) else {key: found}
            if str(client).lstrip("-").isdigit():
                row = by_client.setdefault(str(client), {})
                row |= {_words(k): TableCell(_fact(v)) for k, v in columns.items()}
            else:
                facts.append((_words(f"{key} {client}"), _fact(found)))
    heads = {head: None for row in by_client.values() for head in row}
    ordered = sorted(by_client.items(), key=lambda item: int(item[0]))
    return facts, Grid.of(
        [
            {"client": TableCell(c)} | {h: row.get(h, TableCell("-")) for h in heads}
            for c, row in ordered
        ]
    )


def _words(key: str) -> str:
    return key.replace("_", " ").replace("-", " ")


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)
