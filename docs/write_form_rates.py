"""Write the table of rates of docs/extend/forms.md from the rows of the forms' search,
benchmarks/results/form_rates.jsonl: `python docs/write_form_rates.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import form_rates, short_runs
from benchmarks.form_rates import on_all, rate_of
from benchmarks.rates import SEED, best_of
from fedlora.strategies.defaults import OF_FORMS
from fedlora.strategies.forms import FORMS

PAGE = Path(__file__).parent / "extend" / "forms.md"
HEADINGS = (
    "| form | clients.ranks | best on two modules | with ffa | rate: on all linear modules "
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
    """Of a pair, on each of its seeds that was run, points above the trained head."""
    there = {r["seed"] for r in rows if (r["stage"], r["strategy"], r["lr"], r["factor"])
             == ("pair", name, lr, form)}  # fmt: skip
    return [
        100 * (score(rows, "pair", name, lr, s, form) - score(rows, "search", "head", None, s, ""))
        for s in sorted(there)
    ]


def section(rows: Rows) -> str:
    """The table and what stands under it, with an empty line at its end."""
    alone = score(rows, "search", "head", None, SEED, "")
    lines = [HEADINGS, "|---|---|---|---|---|---|"]
    not_above = []
    ended = declared(rows)
    for form, size in form_rates.SIZES.items():
        best = {}
        for name in form_rates.searched(form):
            if lr := best_of(rows, name, form):
                at = score(rows, "search", name, lr, SEED, form)
                best[name] = f"{lr:g}: {100 * at:.1f}" + ("" if at > alone else f" {MARK}")
        others, rate = [], "-"
        if lr := ended.get(form):
            rate = f"{lr:g}: {100 * on_all(rows, 'fedavg', form)[lr]:.1f}"
            for name in form_rates.pairs(form):
                if each := gains(rows, name, form, lr):
                    others.append(f"{name} {' and '.join(f'{x:+.1f}' for x in each)}")
                    not_above += [f"{name} with `{form}`"] if min(each) <= 0 else []
        cells = [f"`{form}`", f"{size if FORMS[form].size else '-'}", best.get("fedavg", "-"),
                 best.get("ffa", "-"), rate, ", ".join(others) or "-"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"A head trained alone: {100 * alone:.1f}. {MARK} At no rate above it."]
    if not_above:
        lines += ["", f"Not above the trained head on both seeds: {', '.join(not_above)}."]
    return "\n".join(lines) + "\n\n"


def declared(rows: Rows) -> dict[str, float]:
    """By form, what the search found with fedavg; of LoRA's factors a form trains as with lora."""
    known = [f for f in form_rates.SIZES if FORMS[f].kind != "factors"
             and all(rate_of(rows, name, f) for name in form_rates.searched(f))]  # fmt: skip
    return {form: lr for form in known if (lr := rate_of(rows, "fedavg", form))}


def written(text: str, rows: Rows) -> str:
    """The page with its table in the place of the one it had, before NEXT."""
    before, _, after = text.partition(NEXT)
    return before.partition(HEADINGS)[0] + section(rows) + NEXT + after


if __name__ == "__main__":
    found = short_runs.read(form_rates.RESULTS)
    PAGE.write_text(written(PAGE.read_text(), found))
    print(*(f"{k}: {v}, declared {OF_FORMS.get(k)}" for k, v in declared(found).items()), sep="\n")
