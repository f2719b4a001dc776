"""Scores of predictions: accuracy, macro F1 and loss; perplexity and exact match.

Edge cases: no rows score nan, which no comparison can mistake for a result.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def classification(logits: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """accuracy, macro_f1 and the mean cross entropy in nats, of logits (n, classes)."""
    loss = cross_entropy(logits.double(), labels).item() if len(labels) else math.nan
    return {**scores(logits.argmax(dim=-1), labels, classes), "loss": loss}


def scores(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """accuracy and macro_f1 of predicted classes (n,).

    macro_f1 is the plain mean of F1 = 2 hits / (predicted + true) over the classes that occur
    among the labels or the predictions (as scikit-learn has it), so that a client is not marked
    down for classes it never sees.
    """
    if not len(labels):
        return {"accuracy": math.nan, "macro_f1": math.nan}
    true = torch.bincount(labels, minlength=classes)
    said = torch.bincount(predicted, minlength=classes)
    hits = torch.bincount(labels[predicted == labels], minlength=classes)
    occurs = true + said > 0
    f1 = 2 * hits[occurs].double() / (true + said)[occurs]
    return {"accuracy": hits.sum().item() / len(labels), "macro_f1": f1.mean().item()}


def language(losses: Tensor, tokens: Tensor) -> dict[str, float]:
    """loss in nats a token, and perplexity, its exponential; inf where that overflows.

    losses (n,) is each example's mean over its own scored tokens, and tokens (n,) their number:
    every token counts once, whichever example it is in.
    """
    total = tokens.sum().item()
    if not total:
        return {"loss": math.nan, "perplexity": math.nan}
    loss = (losses.double() * tokens).sum() / total
    return {"loss": loss.item(), "perplexity": loss.exp().item()}


def exact_match(answers: Sequence[str], responses: Sequence[str]) -> float:
    """The share of answers equal to their response, whitespace apart; case counts."""
    if not responses:
        return math.nan
    pairs = zip(answers, responses, strict=True)
    return sum(a.split() == r.split() for a, r in pairs) / len(responses)
