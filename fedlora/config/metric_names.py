"""The metrics that evaluate.metrics may name, by what a task predicts, and whose packages they are.

A task's own are computed whether they are named or not. What each means, and which function of
which library it is, is in fedlora/training/named_metrics.py.
"""

from collections.abc import Iterator, Mapping, Sequence

OWN: Mapping[str, Sequence[str]] = {
    "classes": ("loss", "accuracy", "macro_f1"),
    "labels": ("loss", "accuracy", "micro_f1", "macro_f1"),
    "numbers": ("loss", "mae", "pearson", "spearman"),
    "tags": ("loss", "f1", "precision", "recall", "strict_f1", "token_accuracy"),
    "answers": ("loss", "perplexity", "exact_match"),
}
"""What a task computes of what it predicts, by `TaskKind.predicts`."""

FURTHER: Mapping[str, Mapping[str, str]] = {
    "classes": dict.fromkeys(
        ("mcc", "f1", "micro_f1", "weighted_f1", "balanced_accuracy", "kappa"), "sklearn"
    ),
    "labels": {"weighted_f1": "sklearn"},
    "numbers": dict.fromkeys(("r2", "rmse"), "sklearn"),
    "answers": {
        **dict.fromkeys(("rouge_1", "rouge_2", "rouge_l"), "rouge_score"),
        **dict.fromkeys(("bleu", "chrf", "ter"), "sacrebleu"),
    },
}
"""What it computes where it is named, with the package that does."""

PREFIX = "py:"


def names_of(metrics: Sequence[str]) -> list[str]:
    """Those that are names, and no code of the user's."""
    return [name for name in metrics if not name.startswith(PREFIX)]


def code_of(metrics: Sequence[str]) -> str:
    """The user's function among them, "py:package.module:function"; "" where there is none."""
    return next((name for name in metrics if name.startswith(PREFIX)), "")


def known(value: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics of evaluate.metrics.

    Raises:
        ValueError: one is no metric, or there are two functions.
    """
    every = [name for found in (*OWN.values(), *FURTHER.values()) for name in found]
    for name in names_of(value):
        if name not in every:
            raise ValueError(
                f"{name!r} is no metric; must be of {', '.join(sorted({*every}))}, "
                'or "py:package.module:function"'
            )
    code = [name for name in value if name.startswith(PREFIX)]
    if len(code) > 1 or any(name.count(":") != 2 or "::" in f"{name}:" for name in code):
        raise ValueError('must hold one "py:package.module:function" at most')
    return value


def lacking(metrics: Sequence[str], predicts: str) -> list[str]:
    """Those of the names that a task has not, which predicts this."""
    there = {*OWN.get(predicts, ()), *FURTHER.get(predicts, ())}
    return [name for name in names_of(metrics) if name not in there]


def packages(metrics: Sequence[str], predicts: str) -> Iterator[str]:
    """The packages that make what is named."""
    further = FURTHER.get(predicts, {})
    yield from dict.fromkeys(further[name] for name in metrics if name in further)
