"""Scores that evaluate.metrics names, by the library's own function of the whole set of rows.

    classes   mcc, balanced_accuracy, kappa      sklearn.metrics.matthews_corrcoef,
                                                 balanced_accuracy_score, cohen_kappa_score
              f1                                 f1_score of the second of two labels
              micro_f1, weighted_f1              f1_score with that average
    labels    weighted_f1                        f1_score with that average
    numbers   r2, rmse                           r2_score, root_mean_squared_error
    answers   rouge_1, rouge_2, rouge_l          rouge_score's F measure, the mean over rows, 0 to 1
              bleu, chrf, ter                    sacrebleu's corpus score, 0 to 100; of ter less is
                                                 better, and more than 100 can be

A metric of answers must be able to tell a right one. rouge-score gives 0 for two equal texts in
which its tokeniser finds no token, and BLEU for equal texts without four tokens in a row: so the
responses themselves are scored first, and refused where a metric does not know them.

Edge cases: no rows score nan; sklearn's own words on classes that a few rows lack are not repeated.
"""

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedlora.config.metric_names import FURTHER, names_of
from fedlora.config.reader import Config
from fedlora.config.sections import EvaluateConfig
from fedlora.config.task_names import kind_of
from fedlora.errors import DataError
from fedlora.training.data.chat import last_words
from fedlora.training.data.corpus import Corpus

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""rouge-score's names."""


def check(config: Config, corpus: Corpus) -> None:
    """Nothing, where what evaluate.metrics names can be said of these rows.

    Raises:
        DataError: f1 of another number of labels than two, or a metric of answers that does not
            know the central test's responses.
    """
    names, how = names_of(config.evaluate.metrics), config.evaluate
    predicts = kind_of(config.model.task).predicts
    if predicts == "classes" and "f1" in names and len(corpus.labels) != 2:
        raise DataError(
            f"evaluate.metrics: f1 is of two labels, and there are {len(corpus.labels)}: name "
            "macro_f1, micro_f1 or weighted_f1"
        )
    responses: Sequence[str] = corpus.test.response
    if config.data.messages and predicts == "answers":
        responses = [words for text in corpus.test.text if (words := last_words(text))]
    if predicts == "answers" and any(responses):
        check_texts(names, responses, how)


def further(
    names: Sequence[str], predicts: str, predicted: Any, wanted: Any, how: EvaluateConfig
) -> dict[str, float]:
    """The scores of these names that a task does not compute itself.

    predicts: as of `metric_names.OWN`. predicted, wanted: logits (n, names) and classes (n,);
    logits and targets (n, labels); numbers (n, 1) and (n,); answers and responses, n texts each.

    Raises:
        DataError: a metric of answers does not know the responses.
    """
    asked = [name for name in names if name in FURTHER.get(predicts, {})]
    if not asked:
        return {}
    if not len(wanted):
        return dict.fromkeys(asked, math.nan)
    if predicts == "answers":
        check_texts(asked, wanted, how)
        return _texts(asked, predicted, wanted, how)
    of = {"classes": _classes, "labels": _labels, "numbers": _numbers}[predicts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: float(of(name, predicted.double(), wanted)) for name in asked}


def _classes(name: str, logits: Tensor, wanted: Tensor) -> Any:
    from sklearn import metrics  # a second to import

    y, said = wanted.numpy(), logits.argmax(1).numpy()
    if name == "f1":
        return metrics.f1_score(y, said, labels=[1], average=None, zero_division=0)[0]
    if name.endswith("_f1"):
        return metrics.f1_score(y, said, average=name.removesuffix("_f1"), zero_division=0)
    of = {"mcc": metrics.matthews_corrcoef, "kappa": metrics.cohen_kappa_score,
          "balanced_accuracy": metrics.balanced_accuracy_score}  # fmt: skip
    return of[name](y, said)


def _labels(name: str, logits: Tensor, targets: Tensor) -> Any:
    from sklearn import metrics

    y, said = targets.numpy() > 0, (logits > 0).numpy()
    return metrics.f1_score(y, said, average=name.removesuffix("_f1"), zero_division=0)


def _numbers(name: str, said: Tensor, wanted: Tensor) -> Any:
    from sklearn import metrics

    of = {"r2": metrics.r2_score, "rmse": metrics.root_mean_squared_error}
    if not bool(said.isfinite().all()):
        return math.nan
    return of[name](wanted.double().numpy(), said[:, 0].numpy())


# -- answers --------------------------------------------------------------------------------------


def _texts(
    names: Sequence[str], answers: Sequence[str], responses: Sequence[str], how: EvaluateConfig
) -> dict[str, float]:
    found = dict[str, float]()
    if rouge := [name for name in names if name in ROUGE]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([ROUGE[name] for name in rouge], tokenizer=tokens(how))
        rows = [scorer.score(*pair) for pair in zip(responses, answers, strict=True)]
        for name in rouge:
            found[name] = sum(row[ROUGE[name]].fmeasure for row in rows) / len(rows)
    return found | {
        name: _corpus(name, answers, responses, how) for name in names if name not in ROUGE
    }


def _corpus(
    name: str, answers: Sequence[str], responses: Sequence[str], how: EvaluateConfig
) -> float:
    """sacrebleu's score of all of them together."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    of = {"chrf": CHRF, "ter": TER}
    scorer = BLEU(tokenize=how.bleu_tokenizer) if name == "bleu" else of[name]()
    return float(scorer.corpus_score([*answers], [[*responses]]).score)


class Split:
    """A tokeniser for rouge-score: a text's pieces, in small letters."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)

    def tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(text.lower())


def tokens(how: EvaluateConfig) -> Any:
    """The tokeniser that evaluate.rouge-tokenizer names."""
    from rouge_score.tokenizers import DefaultTokenizer

    if how.rouge_tokenizer in ("english", "stems"):
        return DefaultTokenizer(use_stemmer=how.rouge_tokenizer == "stems")
    return Split(r"\w+" if how.rouge_tokenizer == "words" else r"\S")


def check_texts(names: Sequence[str], responses: Sequence[str], how: EvaluateConfig) -> None:
    """Nothing, where these metrics know these responses.

    Raises:
        DataError: one of them would not score a right answer as right; says which and what to set.
    """
    if any(name in ROUGE for name in names):
        split = tokens(how)
        if bare := [x for x in responses if not split.tokenize(x)]:
            raise DataError(
                f"evaluate.metrics: ROUGE finds no token in {len(bare)} of {len(responses)} "
                f"responses, such as {bare[0][:40]!r}, and would score their right answers 0; set "
                "evaluate.rouge-tokenizer to 'words' or 'characters' (it is "
                f"{how.rouge_tokenizer!r})"
            )
    best = _corpus("bleu", responses, responses, how) if "bleu" in names and responses else 100
    if best < 99.9:
        raise DataError(
            f"evaluate.metrics: BLEU scores the responses themselves {best:.0f} of 100, since it "
            "compares four tokens in a row and finds none; use 'chrf', or set "
            f"evaluate.bleu-tokenizer to 'char' or 'zh' (it is {how.bleu_tokenizer!r})"
        )
