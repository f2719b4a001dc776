"""The numbers that a client measures of its model, for the certificate of what it sends."""

from typing import Any

from fedlora.config.reader import Config
from fedlora.errors import PrivacyError
from fedlora.federation.wire.job import Job
from fedlora.strategies.base import Download, Strategy
from fedlora.strategies.forms import guarantee
from fedlora.training.certificate import Numbers, key_of, measure_as, names_of
from fedlora.training.model.model import Model


def numbers(
    model: Model,
    strategy: Strategy[Any],
    download: Download,
    config: Config,
    job: Job,
    probes: str = "",
) -> Numbers:
    """The numbers of the model as it is now, in the order of `names_of`.

    probes: the key of their signs, where it is not the run's own.

    Raises:
        PrivacyError: the server asks for those of a part that stays here.
    """
    if (guarantee(model.form, strategy) == "shared") != bool(job.cuts):
        raise PrivacyError.public(
            f"strategy.name = {config.strategy.name!r}: the server asks for numbers of a part that "
            "stays on this client"
        )
    key = probes or key_of(config.run.seed, job.round, bool(config.round.buffer))
    whole = "other" in download.trainable and not job.cuts
    others = [*model.live()["other"]] if whole else []
    found = measure_as(model, key, job.ranks, others, job.cuts)
    return {name: found[name] for name in names_of(job.ranks, others, job.cuts)}
