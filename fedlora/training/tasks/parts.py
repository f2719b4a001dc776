"""What a report shows of the central test rows beyond the scores: plain values, ready for JSON.

counts       {name: [rows that have it, rows said to, both]} of labels, or of entities by type
confusion    {"labels": [...], "counts": [[...]]}, a line a label that rows have, a column a
             label that is said; of MATRIX labels at most
numbers      {"wanted": [...], "said": [...]} of rows evenly apart, POINTS at most
margins      as many margins of preference
samples      [{"given", "wanted", "said"}] of the first rows, SAMPLES at most: texts, LONGEST
             characters at most
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.training.data.tags import as_iobes, marks_chunks

Parts = Mapping[str, Any]

MATRIX, POINTS, SAMPLES, LONGEST = 60, 1000, 5, 2000


def of_classes(said: Tensor, wanted: Tensor, labels: Sequence[str]) -> Parts:
    """counts and confusion of predicted and true classes, each (n,)."""
    n = len(labels)
    matrix = torch.bincount(wanted * n + said, minlength=n * n).view(n, n)
    both = zip(matrix.sum(1).tolist(), matrix.sum(0).tolist(), matrix.diag().tolist(), strict=True)
    found: dict[str, Any] = {"counts": _counts(labels, both)}
    if n <= MATRIX:
        found["confusion"] = {"labels": [*labels], "counts": matrix.tolist()}
    return found


def of_labels(said: Tensor, wanted: Tensor, labels: Sequence[str]) -> Parts:
    """counts of any number of labels a row, each (n, labels) of true and false."""
    sums = ((x.sum(0).tolist()) for x in (wanted, said, wanted & said))
    return {"counts": _counts(labels, zip(*sums, strict=True))}


def of_tags(
    said: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]], tags: Sequence[str]
) -> Parts:
    """counts of entities by type, by seqeval's default rules; of tags that mark no chunks, of the
    words of each tag."""
    if not marks_chunks(tags):
        pairs = [
            pair for rows in zip(said, wanted, strict=True) for pair in zip(*rows, strict=True)
        ]
        index = {tag: i for i, tag in enumerate(tags)}
        numbers = torch.tensor([[index[x] for x in pair] for pair in pairs]).view(-1, 2)
        return of_classes(numbers[:, 0], numbers[:, 1], tags)
    from seqeval.metrics.sequence_labeling import get_entities

    with warnings.catch_warnings():  # of a letter that it does not know
        warnings.filterwarnings("ignore", ".* seems not to be NE tag", UserWarning)
        there, told = (
            {(i, *x) for i, row in enumerate(rows) for x in get_entities([*map(as_iobes, row)])}
            for rows in (wanted, said)
        )
    of = [Counter(kind for _, kind, *_ in found) for found in (there, told, there & told)]
    kinds = sorted({*of[0], *of[1]})
    return {"counts": {kind: [x[kind] for x in of] for kind in kinds}}


def of_numbers(said: Tensor, wanted: Tensor) -> Parts:
    """numbers, of predicted and true ones, each (n,)."""
    at = _spread(len(said))
    return {"numbers": {"wanted": wanted[at].tolist(), "said": said[at].tolist()}}


def of_margins(margins: Tensor) -> Parts:
    """margins, of all rows' (n,)."""
    return {"margins": margins[_spread(len(margins))].tolist()}


def of_answers(given: Sequence[str], wanted: Sequence[str], said: Sequence[str]) -> Parts:
    """samples, of texts, what should follow them, and what was written."""
    rows = zip(given, wanted, said, strict=True)
    names = ("given", "wanted", "said")
    cut = ([x if len(x) <= LONGEST else f"{x[:LONGEST]} [...]" for x in row] for row in rows)
    return {"samples": [dict(zip(names, row, strict=True)) for row in cut]}


def first(n: int) -> Tensor:
    """The numbers of the rows that are shown as samples."""
    return torch.arange(min(n, SAMPLES))


def _spread(n: int) -> Tensor:
    """The numbers of POINTS rows at most, evenly apart."""
    return torch.arange(n) if n <= POINTS else torch.arange(POINTS) * n // POINTS


def _counts(labels: Sequence[str], of: Any) -> dict[str, list[int]]:
    return {label: [*map(int, x)] for label, x in zip(labels, of, strict=True)}
