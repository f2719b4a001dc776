"""Do the certificate's numbers, or the training check, say whether a row was there?

A game of many trials: a client's rows are the same in each, with or without one row more by a fair
coin; it trains one round under the run's noise; the attacker gets the fields alone, learns a
direction from half of the trials, and guesses the other half.

    clear      the numbers at the end less those at the start, as they travel beside an update
    masked     the same fields of three clients' sum, as secure aggregation opens it
    check      what the training check says, which under example-level DP sees made-up rows
    planted    the numbers of a model that was trained without the noise: must be seen

    advantage = P[guess "with" | with] - P[guess "with" | without]

Under DP the numbers follow from what was sent and what was released, so they may say what that
says: at most (e^eps - 1) / (e^eps + 1) + delta, of one round's epsilon. Here that is smaller than
what so many trials can tell, and the advantage must be what chance explains.
"""

import math
from dataclasses import dataclass

import torch
from scipy.stats import fisher_exact
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.launch.lab.seat import Seat, joined, train
from fedlora.privacy.rehearsal import check_before_training
from fedlora.training.certificate import measure
from fedlora.training.data.batches import Encoded
from fedlora.training.train import threads

CHANCE = 1e-3
"""How often an attack that learns nothing may be said to learn something."""
CHECKS = 20
"""Trials of the training check, whose answer has no noise in it."""
FIELDS = ("clear", "masked", "check", "planted")


@dataclass(frozen=True, slots=True)
class Advantage:
    """Of guesses, with half of a 99 % interval, and how likely so much is by chance."""

    value: float
    half: float
    p: float
    """By Fisher's exact test, of both sides: an interval of few guesses is too short."""

    @property
    def seen(self) -> bool:
        """Is it more than chance, but for one attack of a thousand?"""
        return self.p < CHANCE


def advantage(found: Tensor, is_in: Tensor) -> Advantage:
    """Of trials' fields (t, n): a direction is learnt from the first half, the second is guessed.

    The direction is the difference of the means over the spread of each field.
    """
    half = len(found) // 2
    known, mine = found[:half], is_in[:half]
    inside, outside = known[mine].mean(0), known[~mine].mean(0)
    spread = torch.cat([known[mine] - inside, known[~mine] - outside]).std(0)
    w = (inside - outside) / spread.square().clamp(min=1e-30)
    guesses = (found[half:] - (inside + outside) / 2) @ w > 0
    return of_guesses(guesses, is_in[half:])


def of_guesses(guesses: Tensor, is_in: Tensor) -> Advantage:
    """By guesses (t,), with Agresti and Caffo's interval, which holds for rates of 0 and 1 too."""
    rates, variance = [], 0.0
    for these in (guesses[is_in], guesses[~is_in]):
        n = len(these)
        p = (int(these.sum()) + 1) / (n + 2)
        rates.append(float(these.double().mean()) if n else 0.5)
        variance += p * (1 - p) / (n + 2)
    counts = [
        [int(these.sum()), int((~these).sum())] for these in (guesses[is_in], guesses[~is_in])
    ]
    p = float(fisher_exact(counts).pvalue)
    return Advantage(rates[0] - rates[1], 2.576 * math.sqrt(variance), p)


def played(
    seat: Seat, config: Config, fields: str, rows: Encoded, more: Encoded, trials: int
) -> Advantage:
    """The attacker's advantage on these fields; `more` is the row that is there or not."""
    generator = torch.Generator().manual_seed(config.run.seed)
    is_in = torch.rand(trials, generator=generator) < 0.5
    both = {True: joined([rows, more]), False: rows}
    with threads(config.train.threads):
        if fields == "check":
            said = [_check(seat, config, both[with_it]) for with_it in is_in[:CHECKS].tolist()]
            return of_guesses(torch.tensor([bool(x) for x in said]), is_in[:CHECKS])
        others = 2 if fields == "masked" else 0
        found = []
        for with_it in is_in.tolist():
            change = _change(seat, config, both[with_it], 0)
            for other in range(others):
                change += _change(seat, config, rows, 1 + other)
            found.append(change)
    return advantage(torch.stack(found), is_in)


def _change(seat: Seat, config: Config, rows: Encoded, client: int) -> Tensor:
    """The change of a client's numbers over one round."""
    with seat.received(client) as (came, _):
        names = [*seat.layers], [*seat.model.live()["other"]] if "other" in came.trainable else []
        key = f"lab/{seat.number}"
        before = measure(seat.model, key, *names)
        train(seat.model, rows, came.trainable, config, seat.number, client)
        after = measure(seat.model, key, *names)
    return torch.cat([after[name] - before[name] for name in before])


def _check(seat: Seat, config: Config, rows: Encoded) -> str:
    """What the training check says; empty where it passes."""
    with seat.received(0) as (came, _):
        try:
            check_before_training(seat.model, rows, came, config, seat.number, 0)
        except TrainingCheckError as e:
            return e.what
    return ""
