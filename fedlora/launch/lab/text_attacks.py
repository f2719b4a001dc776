"""The lab's attacks on text: membership and extraction from language models, inversion by descent.

What each is, and its source, stands in `language.py` and `optimised.py`; here it meets an
experiment.
"""

import math
from pathlib import Path

import torch

from fedlora.config.reader import Config
from fedlora.launch.lab.attacks import at_once, encoder_of, one_step, open_layer, rows_of
from fedlora.launch.lab.language import (
    exposure,
    loss_scores,
    min_k_scores,
    reference_scores,
    secrets,
    token_log_probabilities,
)
from fedlora.launch.lab.membership import half_width, telling
from fedlora.launch.lab.optimised import optimise
from fedlora.launch.lab.plan import Lab, Row
from fedlora.launch.lab.seat import Seat, joined, train
from fedlora.strategies.base import seeded
from fedlora.training.data.batches import Encoded
from fedlora.training.train import threads

COPIES = (1, 4, 16)
"""Of each secret among the rows."""
SECRET = 4
"""Tokens of one."""


def language(lab: Lab, epsilon: float) -> Row:
    """Loss, min-k and reference on a causal language model that learnt half of a small pool."""
    config = lab.language(epsilon)
    rows = rows_of(lab, lab.size.pool, config)
    half = len(rows) // 2
    seat, config = Seat(config, 1), at_once(config, half, lab.size.memorise)
    members, others = rows.select(torch.arange(half)), rows.select(torch.arange(half, len(rows)))
    before, after = _trained(seat, config, members, [members, others])
    row: Row = {"model": Path(config.model.path).name}
    scores = {
        "loss": [loss_scores(x) for x in after],
        "min-k": [min_k_scores(x) for x in after],
        "reference": [reference_scores(x, y) for x, y in zip(after, before, strict=True)],
    }
    for name, (mine, rest) in scores.items():
        row[f"{name} AUC"], row[f"{name} TPR at 5 %"] = telling(mine, rest)
    return {**row, "+-": half_width(float(row["loss AUC"]), half, len(rows) - half)}


def extraction(lab: Lab, epsilon: float) -> Row:
    """Exposure, in bits, of secrets that stood once or several times among a model's rows."""
    config = lab.language(epsilon)
    rows = rows_of(lab, lab.size.pool // 2, config)
    generator = seeded(config.run.seed, 0, 0, "secrets")
    drawn = secrets(rows, len(COPIES) + lab.size.candidates, SECRET, generator)
    planted = torch.arange(len(COPIES)).repeat_interleave(torch.tensor(COPIES))
    every = joined([rows, drawn.select(planted)])
    seat, config = Seat(config, 1), at_once(config, len(every), lab.size.memorise)
    _, (found,) = _trained(seat, config, every, [drawn])
    losses = -loss_scores(found)
    mine, others = losses[: len(COPIES)], losses[len(COPIES) :]
    row: Row = {"model": Path(config.model.path).name}
    for n, loss in zip(COPIES, mine.tolist(), strict=True):
        row[f"bits, {n} copies"] = exposure(loss, others)
    return {**row, "most": exposure(-1.0, others), "knows nothing": 1 / math.log(2)}


def _trained(seat: Seat, config: Config, rows: Encoded, judged: list[Encoded]):  # type: ignore[no-untyped-def]
    """Token log-probabilities of the judged rows, before and after training on `rows`."""
    with threads(config.train.threads), seat.received(0) as (came, _):
        before = [token_log_probabilities(seat.model, x) for x in judged]
        train(seat.model, rows, came.trainable, config, 1, 0)
        return before, [token_log_probabilities(seat.model, x) for x in judged]


def optimised(lab: Lab, rank: int) -> Row:
    """Part of one sentence's tokens that descent on inputs reads from one upload, by budget.

    The same step as of the span test: the first query layer, one example, one SGD step.
    """
    strategy = lab.strategies[0]
    config = open_layer(lab.at(strategy, 0.0), rank)
    rows = rows_of(lab, 10_000)
    order = (rows.lengths - lab.size.tokens).abs().argsort(stable=True)
    with threads(config.train.threads):
        seat = Seat(config, 1)
        encoder = encoder_of(seat.model)
        if encoder is None:
            return {}
        seat.warm([rows.select(order[3:35])])
        sentence = rows.select(order[:1])
        ids = sentence.ids.long()
        ends = {0: int(ids[0]), len(ids) - 1: int(ids[-1])}
        assert sentence.classes is not None
        row: Row = {"strategy": strategy, "tokens": len(ids)}
        for epsilon in lab.epsilons:
            step = one_step(lab, strategy, epsilon, config, len(rows) // 3)
            change = seat.change(0, seat.send(0, sentence, step)[0])
            with seat.received(0):
                label, steps = int(sentence.classes[0]), lab.size.descent
                args = (seat.model, encoder.word_embeddings, change, ends, len(ids), label)
                found = optimise(*args, steps=steps)
            right = (found == ids)[1:-1].double().mean()
            row[f"epsilon {epsilon:g}" if epsilon else "no DP"] = float(right)
    return row
