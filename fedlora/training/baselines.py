"""What a federated model must beat, on the same central test rows.

Each is fitted on all clients' training rows together, which no client of a federation could see.
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.training.data.corpus import Corpus
from fedlora.training.data.rows import Rows
from fedlora.training.devices import wide_on_host
from fedlora.training.metrics import numbers, scores, several


def majority(corpus: Corpus) -> dict[str, float]:
    """accuracy and macro_f1 of always saying the most frequent training label.

    Of labels equally frequent, the first by name.
    """
    labels = _all(corpus).label
    counts = Counter(labels)
    best = min(counts, key=lambda label: (-counts[label], label))
    return _scores(corpus, [best] * len(corpus.test))


def tfidf(corpus: Corpus) -> dict[str, float]:
    """accuracy and macro_f1 of logistic regression on TF-IDF weights of words and word pairs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(_tfidf(), LogisticRegression(C=30.0, max_iter=1000))
    known = _all(corpus)
    return _scores(corpus, _fitted(model, texts(known), known.label, texts(corpus.test)))


def trained_head(corpus: Corpus, features: Callable[[Rows], Tensor]) -> dict[str, float]:
    """accuracy and macro_f1 of the frozen model under a trained linear head.

    `features` gives the frozen model's pooled outputs of rows, (n, width). The head is logistic
    regression on them, standardised, solved to its optimum: what gradient steps on a head alone
    could come to at best.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    known, asked = (_numbers(features(rows)) for rows in (_all(corpus), corpus.test))
    return _scores(corpus, _fitted(head, known, _all(corpus).label, asked))


def regression(
    corpus: Corpus, features: Callable[[Rows], Tensor] | None
) -> dict[str, Callable[[], dict[str, float]]]:
    """The mean of the training numbers, ridge regression on TF-IDF weights, and on features."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = _all(corpus), corpus.test
    known, wanted = ([float(x) for x in rows.target] for rows in (train, test))

    def scored(said: Any) -> dict[str, float]:
        found = torch.as_tensor(said, dtype=torch.float64)
        return numbers(found, torch.tensor(wanted, dtype=torch.float64))

    def words() -> dict[str, float]:
        model = make_pipeline(_tfidf(), Ridge(alpha=1.0))
        return scored(_fitted(model, texts(train), known, texts(test)))

    mean = sum(known) / max(len(known), 1)
    found = {"training mean": lambda: scored([mean] * len(wanted)), "TF-IDF + ridge": words}
    if features is not None:
        head = make_pipeline(StandardScaler(), Ridge(alpha=100.0))
        given = features
        found["trained head only"] = lambda: scored(
            _fitted(head, _numbers(given(train)), known, _numbers(given(test)))
        )
    return found


def multi_label(
    corpus: Corpus, features: Callable[[Rows], Tensor] | None
) -> dict[str, Callable[[], dict[str, float]]]:
    """Each label by its own majority, and by logistic regression on TF-IDF weights and features."""
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = _all(corpus), corpus.test
    known, wanted = (_marked(rows, corpus.labels) for rows in (train, test))

    def each(steps: list[Any], C: float, x: Any, asked: Any) -> dict[str, float]:
        one = OneVsRestClassifier(LogisticRegression(C=C, max_iter=1000))
        with warnings.catch_warnings():  # a label that all rows have, or none
            warnings.filterwarnings("ignore", r"Label .* is present", UserWarning)
            return several(_fitted(make_pipeline(*steps, one), x, known, asked), wanted)

    most = DummyClassifier(strategy="constant", constant=known.mean(0) > 0.5)
    found = {
        "majority of each label": lambda: several(_fitted(most, known, known, wanted), wanted),
        "TF-IDF + logistic regression": lambda: each([_tfidf()], 30.0, texts(train), texts(test)),
    }
    if features is not None:
        given = features
        found["trained head only"] = lambda: each(
            [StandardScaler()], 0.01, _numbers(given(train)), _numbers(given(test))
        )
    return found


def texts(rows: Rows) -> list[str]:
    """A row's text, or both of a pair as one."""
    return [" ".join(pair) for pair in zip(*filter(None, (rows.text, rows.second)), strict=True)]


def _tfidf() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")


def _numbers(x: Tensor) -> Any:
    return wide_on_host(x).numpy()


def _all(corpus: Corpus) -> Rows:
    """All clients' training rows together."""
    return Rows.joined([client.train for client in corpus.clients])


def _marked(rows: Rows, labels: Sequence[str]) -> Any:
    """(rows, labels): 1 where a row has the label."""
    named = [set(json.loads(row)) for row in rows.target]
    return np.array([[name in row for name in labels] for row in named], dtype=int)


def _fitted(model: Any, known: Any, labels: Any, asked: Any) -> Any:
    """What the model, fitted to what is known, says of what is asked.

    On one thread: the solves are small, and on cores shared with clients more take five times as
    long.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):
        return model.fit(known, labels).predict(asked)


def _scores(corpus: Corpus, predicted: Sequence[str]) -> dict[str, float]:
    index = {label: i for i, label in enumerate(corpus.labels)}
    said = torch.tensor([index[label] for label in predicted], dtype=torch.long)
    true = torch.tensor([index[label] for label in corpus.test.label], dtype=torch.long)
    return scores(said, true, len(corpus.labels))
