"""The loss on rows held aside while a client trains: evaluate.steps.

    shares 0, s, 2s, ..., 1 of a round's steps, each after the step that completes it

Nothing is drawn and nothing changed: the steps are those that would be taken without.
"""

import math
import time

from fedlora.config.reader import Config
from fedlora.training.data.batches import Encoded
from fedlora.training.evaluate import evaluate
from fedlora.training.model.model import Model


def shares(each: float) -> list[float]:
    """From 0 to 1, so far apart; the last two may be closer."""
    found = [k * each for k in range(math.floor(1 / each + 1e-9) + 1)]
    return found if found[-1] > 1 - 1e-9 else [*found, 1.0]


class HeldAside:
    """What the training of one round is followed by; without rows nothing."""

    def __init__(self, model: Model, rows: Encoded | None, config: Config, steps: int) -> None:
        self.model, self.rows, self.config = model, rows, config
        there = rows is not None and len(rows) and config.evaluate.steps
        at = shares(config.evaluate.steps) if there else []
        self._due = {f"{x:.4g}": math.ceil(x * steps - 1e-9) for x in at}
        self.losses: dict[str, float] = {}
        """By the share."""
        self.seconds = 0.0
        """That it took, and no step did."""

    def after(self, step: int) -> None:
        """The loss, where one is due after so many steps; the model is in train mode again."""
        due = [share for share, last in self._due.items() if last == step]
        if not due or self.rows is None:
            return
        begun, training = time.perf_counter(), self.model.peft.training
        scores = evaluate(self.model, self.rows, self.config) or {}
        self.model.peft.train(training)
        self.losses |= dict.fromkeys(due, scores.get("loss", math.nan))
        self.seconds += time.perf_counter() - begun
