"""Clients that mean harm, for experiments: what they send is within what is refused by default.

    flipped   what training changed, turned round and three times as long, head and all, and a
              claim of 1,600 examples
    labels    trained on wrong labels: each row has the class that as many classes from the end
              have, the last in place of the first

Both train and measure as an honest client does, and so send a certificate that matches. One client
of a simulation is hostile, in every round.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import Context, Message

from fedlora.federation.client.handlers import train
from fedlora.federation.client.job import ClientJob, number_of
from fedlora.lora.adapter import COLUMNS, Factors
from fedlora.training.data.batches import Encoded
from fedlora.training.model.model import Model
from fedlora.training.train import Fit

ATTACKER = 1
"""Whose client it is."""
TIMES = -3.0
CLAIM = 1600
App = Callable[[Message, Context], Message]


class Flipped(ClientJob):
    """Turns round what it learned."""

    def trainer(self) -> Callable[..., Fit]:
        honest = super().trainer()

        def fit(model: Model, *args: Any) -> Fit:
            before = model.read()
            found = honest(model, *args)
            model.load(beyond(before, model.read(), TIMES), self.download.block)
            return found

        return fit

    def reply(self, records: Mapping[str, Any], keeps: bool = False) -> Any:
        records["metrics"]["num-examples"] = CLAIM
        return super().reply(records, keeps)


class Mislabelled(ClientJob):
    """Trains on wrong labels."""

    def rows(self, part: str) -> Encoded:
        found = super().rows(part)
        if part != "train" or found.classes is None:
            return found
        return replace(found, classes=len(self.job.labels) - 1 - found.classes)


ATTACKS: Mapping[str, type[ClientJob]] = {"flipped": Flipped, "labels": Mislabelled}


def beyond(before: Factors, after: Factors, times: float) -> Factors:
    """The factors that lie so many times as far from `before` as those after training do."""
    columns: dict[str, Any] = {
        c: {n: x.lerp(getattr(after, c)[n], times) for n, x in getattr(before, c).items()}
        for c in COLUMNS
    }
    return Factors(before.scale, **columns)


def hostile(app: Any, attack: str) -> App:
    """The same app, but client ATTACKER trains as the attack says."""
    job = ATTACKS[attack]

    def answer(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind == "train" and number_of(context) == ATTACKER:
            return Message(train(message, context, job), reply_to=message)
        found: Message = app(message, context)
        return found

    return answer
