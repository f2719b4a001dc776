"""Write the table of rates of docs/extend/forms.md from the rows of the forms' search,
benchmarks/results/form_rates.jsonl: `python docs/write_form_rates.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import form_rates, short_runs
from benchmarks.form_rates import ON_MORE, rate_of
from benchmarks.rates import SEED
from fedlora.strategies.defaults import OF_FORMS
from fedlora.strategies.forms import FORMS

PAGE = Path(__file__).parent / "extend" / "forms.md"
HEADINGS = (
    "| form | clients.ranks | rate | two modules | twelve | with ffa "
    "| others, above the trained head |"
)
NEXT = "## Forms that PEFT does not have\n"
Rows = Sequence[Mapping[str, Any]]
MARK = "(!)"


def score(rows: Rows, stage: str, name: str, lr: float | None, seed: int, form: str) -> float:
    """The accuracy of the one run that this names; of clients' own models where it has that."""
    key = (stage, name, lr, seed, form)
    (found,) = (
        r.get("own", r["accuracy"]) for r in rows
        if (r["stage"], r["strategy"], r["lr"], r["seed"], r["factor"]) == key
    )  # fmt: skip
    return float(found)


def gains(rows: Rows, name: str, form: str, lr: float) -> list[float]:
    """Of a pair, on each of its seeds, points above the trained head."""
    return [
        100 * (score(rows, "pair", name, lr, s, form) - score(rows, "search", "head", None, s, ""))
        for s in form_rates.SEEDS
    ]


def section(rows: Rows) -> str:
    """The table and what stands under it, with an empty line at its end."""
    alone = score(rows, "search", "head", None, SEED, "")
    lines = [HEADINGS, "|---|---|---|---|---|---|---|"]
    not_above = []
    for form, size in form_rates.SIZES.items():
        best = {name: rate_of(rows, name, form) for name in form_rates.searched(form)}
        found = {n: score(rows, "search", n, lr, SEED, form) for n, lr in best.items() if lr}
        twelve = score(rows, "search", "fedavg", best["fedavg"], SEED, form + ON_MORE)
        lr = best["fedavg"] or 0.0
        others = []
        for name in form_rates.pairs(form):
            each = gains(rows, name, form, lr)
            others.append(f"{name} {' and '.join(f'{x:+.1f}' for x in each)}")
            not_above += [f"{name} with `{form}`"] if min(each) <= 0 else []
        mark = f" {MARK}" if max(found["fedavg"], twelve) <= alone else ""
        ffa = f"{best['ffa']:g}: {100 * found['ffa']:.1f}" if "ffa" in found else "-"
        cells = [f"`{form}`", f"{size if FORMS[form].size else '-'}", f"{lr:g}"]
        cells += [f"{100 * found['fedavg']:.1f}", f"{100 * twelve:.1f}{mark}", ffa]
        lines.append(f"| {' | '.join([*cells, ', '.join(others) or '-'])} |")
    gained = "Not above it, so nothing was gained in these settings."
    lines += ["", f"A head trained alone: {100 * alone:.1f}. {MARK} {gained}"]
    if not_above:
        lines += ["", f"Not above the trained head on both seeds: {', '.join(not_above)}."]
    return "\n".join(lines) + "\n\n"


def declared(rows: Rows) -> dict[str, float]:
    """By form, what the search found with fedavg."""
    found = {form: rate_of(rows, "fedavg", form) for form in form_rates.SIZES}
    return {form: lr for form, lr in found.items() if lr}


def written(text: str, rows: Rows) -> str:
    """The page with its table in the place of the one it had, before NEXT."""
    before, _, after = text.partition(NEXT)
    return before.partition(HEADINGS)[0] + section(rows) + NEXT + after


if __name__ == "__main__":
    found = short_runs.read(form_rates.RESULTS)
    PAGE.write_text(written(PAGE.read_text(), found))
    print(*(f"{k}: {v}, declared {OF_FORMS.get(k)}" for k, v in declared(found).items()), sep="\n")
