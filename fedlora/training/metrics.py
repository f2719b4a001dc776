"""Scores of predictions: accuracy, F1 and loss; entities; correlations; perplexity; exact match.

Edge cases: no rows score nan, which no comparison can mistake for a result.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.training.data.tags import as_iobes, marks_chunks


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


def several(said: Any, wanted: Any) -> dict[str, float]:
    """accuracy (rows of which every label is right), micro_f1 and macro_f1, of (n, labels) of 0, 1.

    A label that no row has and none is given counts 0 in macro_f1, as scikit-learn's does.
    """
    from sklearn.metrics import accuracy_score, f1_score  # a second to import

    if not len(wanted):
        return dict.fromkeys(("accuracy", "micro_f1", "macro_f1"), math.nan)
    found = {f"{how}_f1": float(f1_score(wanted, said, average=how, zero_division=0))
             for how in ("micro", "macro")}  # fmt: skip
    return {"accuracy": float(accuracy_score(wanted, said)), **found}


def numbers(said: Tensor, wanted: Tensor) -> dict[str, float]:
    """loss (mean square), mae, pearson and spearman of predicted numbers, each (n,) in float64.

    A correlation is nan where all of either are equal, or one is no finite number.
    """
    from scipy.stats import pearsonr, spearmanr  # a second to import

    gap = said - wanted
    found = {"loss": gap.square().mean().item(), "mae": gap.abs().mean().item()}
    varied = len(said) > 1 and bool(said.isfinite().all())
    varied = varied and all(bool(x.max() > x.min()) for x in (said, wanted))
    for name, of in (("pearson", pearsonr), ("spearman", spearmanr)):
        found[name] = float(of(said.numpy(), wanted.numpy()).statistic) if varied else math.nan
    return found


def tagged(
    wanted: Sequence[Sequence[str]],
    said: Sequence[Sequence[str]],
    tags: Sequence[str],
    scheme: str = "",
) -> dict[str, float]:
    """token_accuracy of tags, and where they mark chunks f1, precision and recall of those.

    By seqeval's default, conlleval's rules, over all types; and with a scheme ("IOB2") strict_f1 by
    its strict mode. conlleval does not know BILOU's letters: L and U are E and S there. Where there
    is no chunk and none is said, these are 0, as seqeval has it.
    """
    pairs = [pair for rows in zip(wanted, said, strict=True) for pair in zip(*rows, strict=True)]
    right = sum(one == other for one, other in pairs)
    found = {"token_accuracy": right / len(pairs) if pairs else math.nan}
    if not marks_chunks(tags):
        return found
    from seqeval import scheme as schemes
    from seqeval.metrics import sequence_labeling, v1

    how = {"average": "micro", "zero_division": 0}
    both = [[[as_iobes(x) for x in row] for row in rows] for rows in (wanted, said)]
    with warnings.catch_warnings():  # of a letter that it does not know
        warnings.filterwarnings("ignore", ".* seems not to be NE tag", UserWarning)
        of = sequence_labeling.precision_recall_fscore_support(*both, **how)
    found |= dict(zip(("precision", "recall", "f1"), map(float, of), strict=False))
    if scheme:
        strict = v1.precision_recall_fscore_support(
            wanted, said, scheme=getattr(schemes, scheme), **how
        )
        found["strict_f1"] = float(strict[2])
    return found


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
