"""What a federated model must beat, on the same central test rows.

Each is fitted on all clients' training rows together, which no client of a federation could see.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.training.data.corpus import Corpus
from fedlora.training.metrics import scores


def majority(corpus: Corpus) -> dict[str, float]:
    """accuracy and macro_f1 of always saying the most frequent training label.

    Of labels equally frequent, the first by name.
    """
    labels = _train(corpus)[1]
    counts = Counter(labels)
    best = min(counts, key=lambda label: (-counts[label], label))
    return _scores(corpus, [best] * len(corpus.test))


def tfidf(corpus: Corpus) -> dict[str, float]:
    """accuracy and macro_f1 of logistic regression on TF-IDF weights of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")
    model = make_pipeline(words, LogisticRegression(C=30.0, max_iter=1000))
    texts, labels = _train(corpus)
    return _scores(corpus, _fitted(model, texts, labels, corpus.test.text))


def trained_head(corpus: Corpus, features: Callable[[Sequence[str]], Tensor]) -> dict[str, float]:
    """accuracy and macro_f1 of the frozen model under a trained linear head.

    `features` gives the frozen model's pooled outputs of texts, (n, width). The head is logistic
    regression on them, standardised, solved to its optimum: what gradient steps on a head alone
    could come to at best.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    texts, labels = _train(corpus)
    known, asked = (features(t).detach().cpu().double().numpy() for t in (texts, corpus.test.text))
    return _scores(corpus, _fitted(head, known, labels, asked))


def _fitted(model: Any, known: Any, labels: Sequence[str], asked: Any) -> Sequence[str]:
    """What the model, fitted to what is known, says of what is asked.

    On one thread: the solves are small, and on cores shared with clients more take five times as
    long.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):
        said: Sequence[str] = model.fit(known, labels).predict(asked)
    return said


def _train(corpus: Corpus) -> tuple[list[str], list[str]]:
    rows = [client.train for client in corpus.clients]
    return [t for r in rows for t in r.text], [label for r in rows for label in r.label]


def _scores(corpus: Corpus, predicted: Sequence[str]) -> dict[str, float]:
    index = {label: i for i, label in enumerate(corpus.labels)}
    said = torch.tensor([index[label] for label in predicted], dtype=torch.long)
    true = torch.tensor([index[label] for label in corpus.test.label], dtype=torch.long)
    return scores(said, true, len(corpus.labels))
