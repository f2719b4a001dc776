"""Where losia and smt train with choice = "gradient": asked of the clients once, before round 0.

    client   G_i (d, k), its first gradient of W0 in each adapted module: first_gradient.py
    server   G = sum_i p_i G_i, and the form's places of W0 and G
    all      have them as lora.places from then on, a key of the run's config like any other

So every machine makes its model with the same places, which are in the model's fingerprint, and a
resumed run, an export and a newcomer have them from the config; a fresh run asks anew, whatever its
config has of an earlier one. Up d k a module and client, once, all of which the server holds at
once; down a few numbers a module with every message. Under DP and secure aggregation it is refused:
a gradient is sent as it is.
"""

from collections.abc import Mapping
from dataclasses import replace

from flwr.serverapp import Grid
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.federation.server.certifier import Certifier
from fedlora.federation.server.first_gradient import pooled_gradient
from fedlora.federation.server.journal import Journal, Saved
from fedlora.federation.server.planning import Planner
from fedlora.federation.server.run import Session, Setting, clients
from fedlora.training import cache
from fedlora.training.begun_with import begun_with
from fedlora.training.model.model import Model


def with_places(setting: Setting, session: Session, run: Saved, grid: Grid) -> Setting:
    """The setting with the places that the clients' first gradients choose; itself, of others.

    Raises:
        StrategyError: no gradient reaches any module.
        RoundError: no client sent one.
    """
    config, model = setting.config, setting.model
    if not config.lora.by_gradient:
        return setting
    G, count = pooled_gradient(setting, session, run, grid, clients(setting, run))
    if not any(bool(g.any()) for g in G.values()):
        raise StrategyError(
            f"lora.form = {config.lora.form!r}: the clients' first gradients are zero in every "
            "adapted module, so there is nothing to choose by; use choice=weight in lora.options"
        )
    lora = config.lora.model_copy(update={"places": chosen(model, G)})
    config = config.model_copy(update={"lora": lora})
    cache.placed(model, config, setting.labels)  # in place: there may be no room for another
    told = {"lora.places": config.flat()["lora.places"]}
    made = replace(
        setting,
        config=config,
        planner=Planner(config, model),
        journal=Journal(config),
        changes={**setting.changes, **told},
    )
    made.journal.keep_config()
    made.journal.keep_begun_with(begun_with(model, made.corpus))
    session.certifier = Certifier(config, model, made.guarantee)
    session.observer.note(
        f"lora.form = {config.lora.form!r}: trains at places chosen by the first gradients of "
        f"{count} clients"
    )
    return made


def chosen(model: Model, G: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The form's places as lora.places has them, of W0 and its gradient by module, (d, k)."""
    W, found = model.weights(), []
    for m, g in G.items():
        places = model.adapted[m].own.places(W[m].double(), g.double(), model.rank)
        found.append(f"{m}={' '.join(map(str, places.tolist()))}")
    return tuple(found)
