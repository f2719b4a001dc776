"""What a report shows of the test rows: counted again by other libraries, and by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import classification_report
from sklearn import metrics

from fedlora import simulate
from fedlora.reports.run_files import read
from fedlora.training import cache
from fedlora.training.data.batches import collate, eval_order
from fedlora.training.evaluate import evaluate, parts
from fedlora.training.tasks.parts import (
    LONGEST,
    POINTS,
    SAMPLES,
    of_answers,
    of_classes,
    of_labels,
    of_margins,
    of_numbers,
    of_tags,
)
from tests.support.private_setting import Setting
from tests.support.task_rows import MADE, task_settings

Settings = Callable[..., dict[str, object]]
ANSWERED = {"evaluate.generate-tokens": -1}


def logits_and_labels(s: Setting) -> tuple[Any, Any]:
    """Of all rows in one batch, by the model itself."""
    batch = collate(s.rows, torch.arange(len(s.rows)))
    labels = batch.pop("labels")
    with torch.no_grad():
        return s.model.peft(**batch).logits.numpy(), labels.numpy()


def of(settings: Settings, case: str, tmp_path: Path) -> tuple[Setting, Any]:
    s = Setting(task_settings(settings, case, tmp_path, **ANSWERED))
    return s, json.loads(json.dumps(parts(s.model, s.rows, s.config)))


@pytest.mark.parametrize("case", ["classification", "pictures"])
def test_the_confusion_matrix_is_scikit_learns(
    settings: Settings, case: str, tmp_path: Path
) -> None:
    s, found = of(settings, case, tmp_path)
    z, y = logits_and_labels(s)
    matrix = metrics.confusion_matrix(y, z.argmax(1), labels=range(len(s.labels)))
    assert found["confusion"] == {"labels": [*s.labels], "counts": matrix.tolist()}
    rows, columns = matrix.sum(1), matrix.sum(0)
    want = np.stack([rows, columns, matrix.diagonal()], 1).tolist()
    assert found["counts"] == dict(zip(s.labels, want, strict=True))


def test_a_matrix_has_a_line_for_what_rows_have_and_a_column_for_what_is_said() -> None:
    found = of_classes(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), ["a", "b", "c"])
    assert found["confusion"]["counts"] == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert found["counts"] == {"a": [1, 2, 1], "b": [1, 1, 1], "c": [1, 0, 0]}


def test_many_labels_have_their_counts_and_no_matrix() -> None:
    y = torch.arange(100)
    found = of_classes(y, y, [f"l{i}" for i in range(100)])
    assert "confusion" not in found
    assert found["counts"]["l99"] == [1, 1, 1]


def test_the_counts_of_several_labels_give_scikit_learns_scores(
    settings: Settings, tmp_path: Path
) -> None:
    s, found = of(settings, "multi-label", tmp_path)
    z, y = logits_and_labels(s)
    p, r, _, rows = metrics.precision_recall_fscore_support(y, z > 0, zero_division=0)
    for i, label in enumerate(s.labels):
        there, said, both = found["counts"][label]
        assert there == rows[i]
        assert both == pytest.approx(p[i] * said) == pytest.approx(r[i] * there)
    by_hand = of_labels(torch.tensor([[1, 1]]) > 0, torch.tensor([[0, 1]]) > 0, ["a", "b"])
    assert by_hand == {"counts": {"a": [0, 1, 0], "b": [1, 1, 1]}}


def test_the_counts_of_entities_are_seqevals_by_type(settings: Settings, tmp_path: Path) -> None:
    s, found = of(settings, "tokens", tmp_path)
    z, y = logits_and_labels(s)
    names = np.array(s.labels)
    wanted = [names[b[b >= 0]].tolist() for b in y]
    said = [names[a.argmax(1)[b >= 0]].tolist() for a, b in zip(z, y, strict=True)]
    report = classification_report(wanted, said, output_dict=True, zero_division=0)
    kinds = {k: v for k, v in report.items() if " " not in k}
    assert {*kinds} == {*found["counts"]}
    assert sum(there for there, _, _ in found["counts"].values()) > 0
    for kind, (there, told, both) in found["counts"].items():
        assert there == kinds[kind]["support"]
        assert both == pytest.approx(kinds[kind]["precision"] * told)
        assert both == pytest.approx(kinds[kind]["recall"] * there)


def test_an_entity_counts_where_its_type_and_its_ends_are_right() -> None:
    wanted = [["B-A", "I-A", "O"], ["B-B", "O", "O"]]
    said = [["B-A", "O", "O"], ["B-B", "O", "B-A"]]
    tags = ["O", "B-A", "I-A", "B-B"]
    assert of_tags(said, wanted, tags) == {"counts": {"A": [1, 2, 0], "B": [1, 1, 1]}}
    plain = of_tags([["N", "V"]], [["N", "N"]], ["N", "V"])
    assert plain["counts"] == {"N": [2, 1, 1], "V": [0, 1, 0]}


def test_numbers_are_the_models_beside_the_rows(settings: Settings, tmp_path: Path) -> None:
    s, found = of(settings, "regression", tmp_path)
    z, y = logits_and_labels(s)
    order = eval_order(s.rows).numpy()
    np.testing.assert_allclose(found["numbers"]["said"], z[order, 0], rtol=1e-5, atol=1e-6)
    assert found["numbers"]["wanted"] == y[order].tolist()


def test_of_many_rows_some_are_shown_evenly_apart() -> None:
    x = torch.arange(3 * POINTS).double()
    found = of_numbers(x, x)["numbers"]
    assert found["said"] == found["wanted"] == [3.0 * i for i in range(POINTS)]
    assert of_margins(x)["margins"] == found["said"]


def test_margins_are_those_of_the_scores(settings: Settings, tmp_path: Path) -> None:
    s, found = of(settings, "preference", tmp_path)
    scores = evaluate(s.model, s.rows, s.config)
    assert scores is not None
    assert np.mean(found["margins"]) == pytest.approx(scores["margin"])
    assert np.mean(np.array(found["margins"]) > 0) == pytest.approx(scores["accuracy"])


@pytest.mark.parametrize("case", [c for c in MADE if MADE[c][0] in ("causal-lm", "seq2seq")])
def test_samples_are_the_first_rows_their_references_and_their_answers(
    settings: Settings, case: str, tmp_path: Path
) -> None:
    s, found = of(settings, case, tmp_path)
    whole = cache.corpus(s.config).client(0).train
    numbers = s.rows.rows[:SAMPLES].tolist()
    assert len(found["samples"]) == SAMPLES
    for row, n in zip(found["samples"], numbers, strict=True):
        assert whole.text[n].strip() in row["given"] or s.config.data.messages
        if whole.response:
            assert row["wanted"].split() == whole.response[n].split()
        assert isinstance(row["said"], str)


def test_no_answers_are_generated_where_none_are_asked_for(
    settings: Settings, tmp_path: Path
) -> None:
    s = Setting(task_settings(settings, "causal-lm", tmp_path, **{"evaluate.generate-tokens": 0}))
    assert parts(s.model, s.rows, s.config) == {}


def test_a_long_text_is_cut() -> None:
    (row,) = of_answers(["x" * 3000], ["b"], ["c"])["samples"]
    assert row == {"given": "x" * LONGEST + " [...]", "wanted": "b", "said": "c"}


def test_a_run_keeps_them_of_its_central_test_rows_alone(
    settings: Settings, tmp_path: Path
) -> None:
    run = simulate(task_settings(settings, "seq2seq", tmp_path, **ANSWERED, **{"run.rounds": 1}))
    files = read(run.directory)
    test = cache.corpus(run.config).test
    for found in (files.parts, files.parts_before):
        assert 0 < len(found["samples"]) <= SAMPLES
        for row in found["samples"]:
            assert any(row["given"].split() == text.split() for text in test.text)
            assert any(row["wanted"].split() == text.split() for text in test.response)


def test_answers_to_be_read_are_of_validation_rows_where_the_server_has_some(
    settings: Settings, tmp_path: Path
) -> None:
    """No test row is among them, and the report says which rows they are."""
    more = {**ANSWERED, "run.rounds": 1, "data.validation-size": 8}
    run = simulate(task_settings(settings, "causal-lm", tmp_path, **more))
    files, held = read(run.directory), cache.corpus(run.config).validation
    for found in (files.parts, files.parts_before):
        assert found["of"] == "validation"
        assert len(found["samples"]) == SAMPLES
        asked = {text.strip() for text in held.text}
        assert all(row["given"].strip() in asked for row in found["samples"])
    assert "these are the first validation rows" in (run.directory / "report.html").read_text()
