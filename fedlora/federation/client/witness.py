"""The client's side of the certificate: its model's numbers, of all that leaves with the update."""

from typing import TYPE_CHECKING

from fedlora.errors import PrivacyError
from fedlora.strategies.forms import promise
from fedlora.training.certificate import Numbers, key_of, measure_as, names_of
from fedlora.training.model.model import Model

if TYPE_CHECKING:
    from fedlora.federation.client.handlers import Desk


def numbers(desk: "Desk", model: Model) -> Numbers:
    """Of the model as it is now, in the order of `names_of`.

    Raises:
        PrivacyError: the server asks for those of a part that stays here.
    """
    job, config = desk.job, desk.config
    if (promise(model.form, desk.strategy) == "shared") != bool(job.cuts):
        raise PrivacyError(
            f"strategy.name = {config.strategy.name!r}: the server asks for numbers of a part that "
            "stays on this client"
        )
    key = key_of(config.run.seed, job.round, bool(config.round.buffer))
    whole = "other" in desk.download.trainable and not job.cuts
    others = [*model.live()["other"]] if whole else []
    found = measure_as(model, key, job.ranks, others, job.cuts)
    return {name: found[name] for name in names_of(job.ranks, others, job.cuts)}
