"""What a federated model must beat, on the same central test rows.

Each is fitted on all clients' training rows together, which no client of a federation could see.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora.data import Corpus
from fedlora.metrics import scores


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

    texts, labels = _train(corpus)
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")
    model = make_pipeline(words, LogisticRegression(C=30.0, max_iter=1000))
    return _scores(corpus, model.fit(texts, labels).predict(corpus.test.text))


def trained_head(corpus: Corpus, features: Callable[[Sequence[str]], Tensor]) -> dict[str, float]:
    """accuracy and macro_f1 of the frozen model under the best linear head.

    `features` gives the frozen model's pooled output for texts, (n, width). The head is fitted to
    convergence (logistic regression on standardised features), so no head trained by gradient
    steps on the same features has a lower regularised loss.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    texts, labels = _train(corpus)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    head.fit(_array(features(texts)), labels)
    return _scores(corpus, head.predict(_array(features(corpus.test.text))))


def _train(corpus: Corpus) -> tuple[list[str], list[str]]:
    rows = [client.train for client in corpus.clients]
    return [t for r in rows for t in r.text], [label for r in rows for label in r.label]


def _array(features: Tensor) -> "np.typing.NDArray[np.float64]":
    return features.detach().to("cpu", torch.float64).numpy()


def _scores(corpus: Corpus, predicted: Sequence[str]) -> dict[str, float]:
    index = {label: i for i, label in enumerate(corpus.labels)}
    said = torch.tensor([index[label] for label in predicted], dtype=torch.long)
    true = torch.tensor([index[label] for label in corpus.test.label], dtype=torch.long)
    return scores(said, true, len(corpus.labels))
