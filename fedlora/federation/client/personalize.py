"""Each client's own model: the federation's, tuned on its own rows, and one trained alone.

    final          the federation's model, on the client's own test rows
    personalized   the same after personalize.epochs more on its own training rows
    alone          W0 trained on its own rows only, with the budget of the whole run

All three are scored on rows that the client never trained on. Nothing of the training leaves the
client, only the scores do. The personalised factors stay in its memory, as personal.safetensors.
"""

from pathlib import Path

from fedlora.config.reader import Config
from fedlora.federation.wire.job import Job
from fedlora.lora.tree_file import save
from fedlora.strategies.base import Client
from fedlora.training.data.batches import Encoded
from fedlora.training.evaluate import evaluate
from fedlora.training.model.layers import taken_out
from fedlora.training.model.model import Model
from fedlora.training.train import fit

Scores = dict[str, float] | None


def personalized(
    model: Model,
    rows: Encoded,
    test: Encoded,
    config: Config,
    job: Job,
    trainable: frozenset[str],
    directory: Path,
) -> Scores:
    """Scores of the loaded model, tuned as the strategy's clients train but at a constant rate.

    The tuned factors are written to `directory`.
    """
    p, train = config.personalize, config.train
    changes = {"epochs": p.epochs, "steps": 0, "max_steps": 0, "lr": p.lr or train.lr}
    train = train.model_copy(update={**changes, "lr_schedule": "constant", "lr_per": "round"})
    config = config.model_copy(update={"train": train})
    fit(model, rows, trainable, config, job.round, job.client)
    save(directory / "personal.safetensors", model.read())
    return evaluate(model, test, config)


def alone(
    model: Model, rows: Encoded, test: Encoded, config: Config, job: Job, token: str
) -> Scores:
    """Scores after training W0 on these rows only, for the average client's number of rounds."""
    me = Client(job.client, model.layers(job.ranks))
    first = model.init_factors(me, config.run.seed)
    model.rebase(f"{token}/alone/{job.client}", [], taken_out(config, first, model.weights()))
    model.load(first)
    turns = (config.clients.per_round or config.clients.count) / config.clients.count
    rounds = max(1, int(config.run.rounds * turns + 0.5))
    for n in range(rounds):
        number = 1 + n * config.run.rounds // rounds  # the schedule over the whole run
        fit(model, rows, frozenset({"A", "B", "other"}), config, number, job.client)
    return evaluate(model, test, config)
