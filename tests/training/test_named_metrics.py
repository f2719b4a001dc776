"""Metrics by name: the library's own on the whole set, and a clear line where one cannot be."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics

from fedlora import Config, check, simulate
from fedlora.config.metric_names import FURTHER, OWN
from fedlora.config.sections import EvaluateConfig
from fedlora.config.task_names import KINDS
from fedlora.errors import ConfigError, DataError
from fedlora.preflight import tasks
from fedlora.training import cache
from fedlora.training.data.batches import collate
from fedlora.training.evaluate import evaluate
from fedlora.training.named_metrics import check as check_metrics
from fedlora.training.named_metrics import check_texts, further
from fedlora.training.tasks import TASKS
from tests.support.private_setting import Setting
from tests.support.task_rows import MADE, task_settings

Settings = Callable[..., dict[str, object]]
Array = np.ndarray[Any, Any]
HOW = EvaluateConfig()


def of_classes(z: Array, y: Array) -> dict[str, float]:
    said = z.argmax(1)
    table = metrics.confusion_matrix(y, said)
    n, rows, columns = table.sum(), table.sum(1), table.sum(0)
    chance = (rows * columns).sum() / n**2
    f1 = [2 * table[i, i] / max(rows[i] + columns[i], 1) for i in range(len(table))]
    spread = math.sqrt(float((n**2 - (columns**2).sum()) * (n**2 - (rows**2).sum())))
    return {
        "mcc": float(n * table.trace() - (rows * columns).sum()) / spread if spread else 0.0,
        "kappa": float((table.trace() / n - chance) / (1 - chance)),
        "balanced_accuracy": float(np.mean([table[i, i] / rows[i] for i in range(len(rows))])),
        "micro_f1": float((said == y).mean()),
        "weighted_f1": float((np.array(f1) * rows).sum() / n),
    }


def of_labels(z: Array, y: Array) -> dict[str, float]:
    said, wanted = z > 0, y > 0
    hits, count = (said & wanted).sum(0), wanted.sum(0)
    f1 = 2 * hits / np.maximum(said.sum(0) + count, 1)
    return {"weighted_f1": float((f1 * count).sum() / count.sum())}


def of_numbers(z: Array, y: Array) -> dict[str, float]:
    gap = ((z[:, 0] - y) ** 2).mean()
    return {"rmse": float(gap**0.5), "r2": float(1 - gap / y.var())}


SLOWLY: dict[str, Callable[[Array, Array], dict[str, float]]] = {
    "classification": of_classes, "multi-label": of_labels, "regression": of_numbers,
}  # fmt: skip
"""By their definitions, of a whole set's outputs and labels."""


@pytest.mark.parametrize("case", SLOWLY)
def test_a_named_score_is_the_definitions_on_the_whole_set_in_batches_of_any_size(
    settings: Settings, case: str, tmp_path: Path
) -> None:
    names = [x for x in FURTHER[KINDS[MADE[case][0]].predicts] if x != "f1"]
    given = task_settings(settings, case, tmp_path, **{"evaluate.metrics": names})
    s = Setting(given, torch.float32)
    ones = [collate(s.rows, torch.tensor([i])) for i in range(len(s.rows))]
    with torch.no_grad():
        z = [
            s.model.logits({k: x for k, x in one.items() if k != "labels"}).numpy() for one in ones
        ]
    want = SLOWLY[case](np.concatenate(z), np.concatenate([one["labels"].numpy() for one in ones]))
    assert {*want} == {*names}
    for size in (1, 7, 64):
        how = s.config.evaluate.model_copy(update={"batch_size": size})
        found = evaluate(s.model, s.rows, s.config.model_copy(update={"evaluate": how}))
        assert found is not None
        assert {name: found[name] for name in names} == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_f1_is_of_the_second_of_two_labels() -> None:
    said, wanted = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    logits = torch.nn.functional.one_hot(said, 2).float()
    assert further(["f1"], "classes", logits, wanted, HOW) == {"f1": pytest.approx(2 / 3)}
    none = torch.zeros(0, dtype=torch.long)
    assert math.isnan(further(["f1"], "classes", torch.zeros(0, 2), none, HOW)["f1"])


def test_every_task_says_what_it_predicts() -> None:
    for name, cls in TASKS.items():
        assert KINDS[name].predicts == getattr(cls, "predicts", "")
        assert KINDS[name].predicts in {"", *OWN}


# -- answers --------------------------------------------------------------------------------------

WORDS = "the red dog of a blue bird up in two trees and one cat sat down left".split()  # noqa: SIM905


def pairs(n: int) -> tuple[list[str], list[str]]:
    chance = random.Random(3)
    wanted = [" ".join(chance.choices(WORDS, k=chance.randint(4, 9))) for _ in range(n)]
    said = [" ".join(w if chance.random() < 0.7 else "what" for w in x.split()) for x in wanted]
    return said, wanted


def longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        last = row[:]
        for j, y in enumerate(b):
            row[j + 1] = last[j] + 1 if x == y else max(row[j], last[j + 1])
    return row[-1]


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    """Against a slow one, the mean over rows; a row by itself counts as much as beside others."""
    pytest.importorskip("rouge_score")
    said, wanted = pairs(20)
    said[3] = ""
    want = []
    for a, b in zip(said, wanted, strict=True):
        common = longest_common(a.split(), b.split())
        want.append(2 * common / (len(a.split()) + len(b.split())))
    names = ["rouge_l", "rouge_1"]
    found = further(names, "answers", said, wanted, HOW)
    assert found["rouge_l"] == pytest.approx(np.mean(want))
    alone = [further(names, "answers", [a], [b], HOW) for a, b in zip(said, wanted, strict=True)]
    assert found["rouge_1"] == pytest.approx(np.mean([x["rouge_1"] for x in alone]))


def test_bleu_chrf_and_ter_are_of_the_whole_set_and_not_a_mean_over_rows() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    said, wanted = pairs(20)
    found = further(["bleu", "chrf", "ter"], "answers", said, wanted, HOW)
    assert found == {
        "bleu": pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score),
        "chrf": pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score),
        "ter": pytest.approx(sacrebleu.corpus_ter(said, [wanted]).score),
    }
    rows = zip(said, wanted, strict=True)
    mean = np.mean([sacrebleu.corpus_bleu([a], [[b]]).score for a, b in rows])
    assert abs(found["bleu"] - mean) > 1


CHINESE = ["\u732b\u5750\u5728\u57ab\u5b50\u4e0a", "\u72d7\u8dd1\u4e86"]


def test_two_equal_texts_are_never_scored_as_unequal() -> None:
    """rouge-score gives 0 for two equal Chinese sentences, and BLEU for equal short ones: they are
    refused, and another tokeniser scores them as equal."""
    score = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = score.RougeScorer(["rougeL"])
    assert scorer.score(CHINESE[0], CHINESE[0])["rougeL"].fmeasure == 0
    with pytest.raises(DataError, match=r"ROUGE finds no token in 2 of 2 responses.*'characters'"):
        further(["rouge_l"], "answers", CHINESE, CHINESE, HOW)
    other = HOW.model_copy(update={"rouge_tokenizer": "characters", "bleu_tokenizer": "char"})
    assert further(["rouge_l"], "answers", CHINESE, CHINESE, other) == {"rouge_l": 1.0}
    mixed = ["a dog", *CHINESE[:1]]
    with pytest.raises(DataError, match="in 1 of 2 responses"):
        check_texts(["rouge_1"], mixed, HOW)
    pytest.importorskip("sacrebleu")
    with pytest.raises(DataError, match="BLEU scores the responses themselves 0 of 100"):
        further(["bleu"], "answers", CHINESE, CHINESE, HOW)
    assert further(["bleu", "chrf"], "answers", CHINESE, CHINESE, other) == {
        "bleu": pytest.approx(100), "chrf": pytest.approx(100)}  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "want"), [("english", 0), ("stems", 1), ("words", 0), ("characters", 8 / 9)]
)
def test_the_tokeniser_is_the_one_that_is_named(tokenizer: str, want: float) -> None:
    pytest.importorskip("rouge_score")
    how = HOW.model_copy(update={"rouge_tokenizer": tokenizer})
    found = further(["rouge_1"], "answers", ["Walks"], ["walk"], how)
    assert found["rouge_1"] == pytest.approx(want)


def test_a_run_of_answers_has_the_scores_that_it_names(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    names = ["rouge_l", "chrf", f"py:{__name__}:longest"]
    given = task_settings(settings, "seq2seq", tmp_path, **{
        "evaluate.metrics": names, "run.rounds": 1, "train.steps": 1,
        "evaluate.generate-tokens": -1})  # fmt: skip
    run = simulate(given)
    final = run.summary["final"]
    assert 0 <= final["rouge_l"] <= 1
    assert 0 <= final["chrf"] <= 100
    assert final["longest"] >= 0
    assert "exact_match" in final


def longest(answers: list[str], _: list[str]) -> dict[str, float]:
    return {"longest": max(len(x.split()) for x in answers)}


# -- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "metric", "says"),
    [
        ("regression", "mcc", r"'mcc' is none of model\.task = 'regression', which has .*rmse"),
        ("classification", "rouge_l", r"'rouge_l' is none of model\.task = 'classification'"),
        ("preference", "bleu", r"'bleu' is none of model\.task = 'preference'"),
    ],
)
def test_a_metric_that_a_task_has_not_is_one_line(
    settings: Settings, tmp_path: Path, case: str, metric: str, says: str
) -> None:
    given = task_settings(settings, case, tmp_path, **{"evaluate.metrics": metric})
    with pytest.raises(ConfigError, match=says):
        simulate(given)


@pytest.mark.parametrize("value", ["acuracy", "py:a:b,py:c:d", "py:a"])
def test_what_is_no_metric_is_refused_with_those_that_are(settings: Settings, value: str) -> None:
    with pytest.raises(ConfigError, match=r"is no metric; must be of accuracy, |one \"py:"):
        Config.read(settings("bert", **{"evaluate.metrics": value}))


def test_a_metric_whose_package_is_absent_says_what_to_install(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But to a node, which writes no answers."""
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    given = task_settings(settings, "seq2seq", tmp_path, **{
        "evaluate.metrics": "rouge_l,chrf", "evaluate.generate-tokens": -1})  # fmt: skip
    config = Config.read(given)
    (line,) = [x for x in tasks.problems(config) if "evaluate.metrics" in x]
    assert "rouge_score and sacrebleu, which are not installed; pip install 'fedlora[met" in line
    node = config.data.model_copy(update={"node_path": "rows.jsonl"})
    assert not [*tasks.problems(config.model_copy(update={"data": node}))]


def test_a_metric_that_does_not_know_the_rows_ends_doctor_and_run_before_the_first_round(
    settings: Settings, tmp_path: Path
) -> None:
    given = task_settings(settings, "classification", tmp_path, **{"evaluate.metrics": "f1"})
    says = r"f1 is of two labels, and there are 3: name macro_f1"
    assert re.search(says, check(given)[0])
    with pytest.raises(DataError, match=says):
        simulate(given)
    pytest.importorskip("rouge_score")
    rows = tmp_path / "chinese.jsonl"
    rows.write_text("".join(json.dumps({"text": f"red {n}", "response": CHINESE[n % 2]}) + "\n"
                            for n in range(60)))  # fmt: skip
    given = task_settings(settings, "seq2seq", tmp_path, **{
        "evaluate.metrics": "rouge_l", "evaluate.generate-tokens": -1, "data.dedupe": False,
        "data.path": str(rows)})  # fmt: skip
    with pytest.raises(DataError, match="ROUGE finds no token in 30 of 30 responses"):
        simulate(given)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_metric_that_does_not_know_what_an_assistant_says_is_told_by_doctor_too(
    settings: Settings, tmp_path: Path
) -> None:
    pytest.importorskip("rouge_score")
    rows, turns = tmp_path / "chinese.jsonl", ("yes", CHINESE[0])
    rows.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"red {n}"}, {"role": "assistant", "content": turns[n % 2]},
        {"role": "user", "content": "what is"}, {"role": "assistant", "content": turns[n % 2]},
        {"role": "user", "content": "the"}]}) + "\n" for n in range(60)))  # fmt: skip
    more = {"evaluate.metrics": "rouge_l", "evaluate.generate-tokens": -1, "data.path": str(rows)}
    given = task_settings(settings, "chat", tmp_path, **more)
    config = Config.read(given)
    with pytest.raises(DataError, match=r"ROUGE finds no token in \d+ of 30 responses"):
        check_metrics(config, cache.corpus(config))
