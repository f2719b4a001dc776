"""What the final model makes of the central test rows: tables and figures of parts.json."""

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedlora.reports.axes import BLUE, GREY, narrow
from fedlora.reports.run_files import RunFiles
from fedlora.reports.tables import Grid, TableCell
from fedlora.reports.units import percent

SAMPLES = ("text", "reference", "before round 1", "final model")
"""The columns of `samples`."""
LONG = 24
"""Characters of a label in a figure; the table has the whole."""


def scores(run: RunFiles) -> Grid:
    """Rows, precision, recall and F1 of each label, or of each type of entity.

    "-" where nothing can be said: the precision of what is never said, the recall of what no row
    has.
    """
    return Grid.of([
        {
            "label": TableCell(label),
            "in the rows": TableCell(str(there)),
            "said": TableCell(str(said)),
            "right": TableCell(str(both)),
            "precision": TableCell(percent(_share(both, said))),
            "recall": TableCell(percent(_share(both, there))),
            "F1": TableCell(percent(_share(2 * both, there + said))),
        }
        for label, (there, said, both) in run.parts.get("counts", {}).items()
    ])  # fmt: skip


def samples(run: RunFiles) -> Sequence[Sequence[str]]:
    """(text, reference, answer before training, answer of the final model) of the first rows."""
    before = {x["given"]: x["said"] for x in run.parts_before.get("samples", ())}
    return [
        (x["given"], x["wanted"], before.get(x["given"], "-"), x["said"])
        for x in run.parts.get("samples", ())
    ]


def told(run: RunFiles) -> Iterator[str]:
    """What stands above the tables."""
    if run.parts.get("counts"):
        yield (
            "Precision: of the rows said to have the label, those that have it. Recall: of those "
            "that have it, those said to. F1: the harmonic mean of both."
        )
    if run.parts.get("samples"):
        which = "test" if run.parts.get("of") is None else "validation"
        yield (
            f"Answers are written greedily, and these are the first {which} rows, not chosen ones."
        )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# -- figures --------------------------------------------------------------------------------------


def confusion(run: RunFiles) -> Figure | None:
    """How often which label is taken for which: a line a true label, shaded by its share."""
    found = run.parts.get("confusion")
    if not found or not found["labels"]:
        return None
    labels = [x if len(x) <= LONG else f"{x[: LONG - 2]}.." for x in found["labels"]]
    n = len(labels)
    figure, (ax,) = narrow(min(1.6 + 0.42 * n, 8.0))
    shares = [[x / (sum(row) or 1) for x in row] for row in found["counts"]]
    ax.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="#e3e8ef", linewidth=0.5)
    ax.invert_yaxis()
    middle = [0.5 + i for i in range(n)]
    small = 9 if n <= 12 else 6 if n <= 30 else 4
    for i, row in enumerate(found["counts"]):
        for j, count in enumerate(row):
            if count and n <= 30:
                colour = "white" if shares[i][j] > 0.55 else "#1f2937"
                at = middle[j], middle[i]
                ax.text(*at, f"{count}", color=colour, fontsize=small, ha="center", va="center")
    ax.set_xticks(middle, labels, rotation=0 if n <= 3 else 90, fontsize=small)
    ax.set_yticks(middle, labels, fontsize=small)
    ax.set_xlabel("said by the model")
    ax.set_ylabel("true label")
    ax.grid(visible=False)
    return figure


def residuals(run: RunFiles) -> Figure | None:
    """By how much each number is missed, over what the model says."""
    found = run.parts.get("numbers")
    both = zip(found["said"], found["wanted"], strict=True) if found else ()
    at = [(said, wanted - said) for said, wanted in both if None not in (said, wanted)]
    if not at:
        return None
    figure, (ax,) = narrow(3.4)
    x, y = zip(*at, strict=True)
    ax.axhline(0, color=GREY, linewidth=1.2)
    ax.scatter(x, y, s=14 if len(at) <= 200 else 6, c=BLUE, alpha=0.6, linewidths=0)
    ax.set_xlabel("what the model says")
    ax.set_ylabel("the row's number minus that")
    return figure


def margins(run: RunFiles) -> Figure | None:
    """How many test rows have which margin; right of 0 the chosen answer is preferred."""
    found = [x for x in run.parts.get("margins", ()) if x is not None]
    if not found:
        return None
    figure, (ax,) = narrow(3.0)
    ax.hist(found, bins=min(30, max(5, len(found) // 4)), color=BLUE)
    ax.axvline(0, color=GREY, linewidth=1.4, linestyle="--")
    ax.set_xlabel("margin")
    ax.set_ylabel("test rows")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
