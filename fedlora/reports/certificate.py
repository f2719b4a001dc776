"""The certificates of a run in words: the second half of the page's "Aggregation proof"."""

import math
from collections.abc import Iterator, Sequence

from fedlora.reports.run_files import RunFiles, breaks_certificate, by_size, certificates, held
from fedlora.reports.tables import Grid, TableCell, relative
from fedlora.reports.units import count

LISTED = 12
"""So many clients are listed."""


def certificate(run: RunFiles) -> Iterator[str]:
    """What was measured, how far it was off, and whether that is rounding. Nothing without any."""
    found = certificates(run.rounds)
    if not found:
        return
    yield (
        "Each client measured its loaded model on seeded inputs, when it had begun and when it had "
        f"trained ({count(len(found), 'round')} so far), and the server held that against its own "
        "model. No code of the aggregation is in it. An excess is a gap over what rounding "
        "explains: above 1 it is no rounding."
    )
    yield from _round(run)
    yield from _start(run)
    yield _judged(run)


def _round(run: RunFiles) -> Iterator[str]:
    """The round's equation: the largest deviation, and the most over rounding."""
    found = [(n, c) for n, c in certificates(run.rounds) if held(c)]
    if not found:
        yield "Round: no round was certified."
        return
    far, c = max(found, key=lambda x: by_size(x[1]["deviation"]))
    above, most = max(found, key=lambda x: by_size(x[1].get("excess")))
    yield (
        "Round: the largest deviation of what the server's model moved by from the mean of what "
        f"the clients' moved by was {relative(c['deviation'])} of their change, in round {far}. "
        f"The largest excess was {_excess(most.get('excess'))}, in round {above}"
        + (f", in {most['worst']}." if most.get("worst") else ".")
    )


def _start(run: RunFiles) -> Iterator[str]:
    """The start's equation. Where nobody measured it, nothing."""
    found = [(n, c) for n, c in certificates(run.rounds) if c.get("start")]
    if not found:
        return
    far, client, round = _starts(run)[0]
    number, most = max(found, key=lambda x: by_size(x[1].get("start_excess")))
    if by_size(far) == by_size(most.get("start_excess")) == 0:
        yield "Start: every client began from exactly what it was sent."
        return
    yield (
        f"Start: client {client} began farthest from what it was sent, by {relative(far)} of the "
        f"size of the clients' change, in round {round}. The largest excess was "
        f"{_excess(most.get('start_excess'))}, in round {number}."
    )


def _excess(x: float | None) -> str:
    return "infinite" if by_size(x) == math.inf else f"{x:.2g}"


def _judged(run: RunFiles) -> str:
    """What the excesses mean under the run's promise."""
    promise, found = run.summary["promise"], certificates(run.rounds)
    if promise in ("", "approximate"):
        return (
            f"{run.summary['strategy']} does not promise to stay below 1: what a client begins "
            "without is what a sketch or a cut leaves out, and the rest is its way of averaging."
        )
    if broken := [n for n, c in found if breaks_certificate(c, promise)]:
        return f"That is a fault: ABOVE ROUNDING in round {spans(broken)}."
    known = any(held(c) or c.get("start") for _, c in found)
    return "Nothing of that was above rounding." if known else "Nothing of this run is certified."


def _starts(run: RunFiles) -> list[tuple[float | None, int, int]]:
    """(how far off, client, round) of each client's farthest start, the farthest first."""
    found: dict[int, tuple[float | None, int, int]] = {}
    for number, c in certificates(run.rounds):
        for client, off in (c.get("start") or {}).items():
            i = int(client)
            if i not in found or by_size(off) > by_size(found[i][0]):
                found[i] = (off, i, number)
    return sorted(found.values(), key=lambda x: (-by_size(x[0]), x[1]))


def starts(run: RunFiles) -> Grid:
    """The clients that began farthest from what they were sent, each in its worst round."""
    ranks = {c["client"]: c.get("rank") for c in run.clients}
    far = [x for x in _starts(run) if by_size(x[0]) > 0][:LISTED]
    return Grid.of(
        [
            {
                "client": TableCell(str(client)),
                "rank": TableCell(str(ranks.get(client) or "-")),
                "off by, of the clients' change": TableCell(relative(off)),
                "in round": TableCell(str(round)),
            }
            for off, client, round in far
        ]
    )


def silent(run: RunFiles) -> list[tuple[str, str]]:
    """(what is not certified, in which rounds), each text once."""
    found: dict[str, list[int]] = {}
    for number, c in certificates(run.rounds):
        for text in c.get("not_certified") or ():
            found.setdefault(str(text), []).append(number)
    return [(text, spans(numbers)) for text, numbers in found.items()]


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: 1-3, 5."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n <= found[-1][-1] + 1:
            found[-1].append(n)
        else:
            found.append([n])
    return ", ".join(f"{x[0]}-{x[-1]}" if len(x) > 1 else str(x[0]) for x in found)
