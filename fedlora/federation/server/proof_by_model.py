"""The aggregation proof of a form whose change is not s B A: by the model's own layers.

    target(x) = sum_i p_i f_i(x)      each upload loaded, and asked what it adds to a layer's output
    used(x)   = f(x)                  of what clients will make of the next download

In float64, through PEFT's own code, so a form needs no algebra here to be checked. Costs a copy of
each adapted module for every upload, one at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.server.proof import Proof, Target, compare, kinds
from fedlora.federation.wire.messages import ROUNDING, pack_download, unpack_download
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import (
    Client,
    Promise,
    Round,
    Strategy,
    Upload,
    as_factors,
    whole_download,
)
from fedlora.strategies.forms import Form
from fedlora.training.model.model import Model

SMALL = 1e-2
"""A change below this part of a layer's output is compared with that part: numbers near 1, as
IA3's are, hold a smaller change no more exactly in float32."""


def measures(form: Form, guarantee: Promise) -> bool:
    """Is this run's aggregation proved here? Not where the change is s B A, nor where clients
    keep a part, so that there is no one model."""
    plain = form.kind == "factors" and form.law == "multilinear"
    return not plain and guarantee != "shared"


def target(model: Model, columns: int, round: Round) -> Target:
    """An empty target over all adapted modules, with what counts as small in each."""
    generator = round.generator(0, "proof")
    x = {
        m: torch.randn(s.k, columns, generator=generator, dtype=torch.float64)
        for m, s in model.shapes.items()
    }
    x = {m: inputs / inputs.norm(dim=0) for m, inputs in x.items()}
    weights = model.weights()
    floor = {m: SMALL * float((weights[m].double() @ inputs).norm()) for m, inputs in x.items()}
    return Target(x, floor=floor)


def ended(strategy: Strategy[Any], state: Any, upload: Upload, round: Round) -> Factors:
    """All that the client held after its training."""
    before = strategy.effective(state).factors.other
    trained = strategy.trained(state, upload, round)
    return as_factors(trained, {**before, **upload.sent.other})


def add(
    model: Model, strategy: Strategy[Any], state: Any, target: Target, upload: Upload, round: Round
) -> None:
    """Add what an upload's model computes to the target."""
    model.load(ended(strategy, state, upload, round))
    target.add_outputs(model.change(target.x), upload.num_examples)


def prove(
    model: Model,
    strategy: Strategy[Any],
    guarantee: Promise,
    state: Any,
    clients: Sequence[Client],
    target: Target,
    round: Round,
    dtype: str,
) -> Proof:
    """Compare the target with what clients will use after `state`'s next download.

    Where the promise is not exactness, with what the model is.
    """
    used: list[Mapping[str, Tensor]] = []
    if guarantee == "exact":
        after = Round(round.number + 1, round.seed)
        for client in kinds(clients):
            new = replace(client, has_memory=False)
            sent = whole_download(strategy, state, new, after, fold_absent=False)
            came = unpack_download(pack_download(sent, dtype))
            model.load(strategy.start(came, Factors(), new, after))
            used.append(model.change(target.x))
    else:
        model.load(strategy.effective(state).factors)
        used.append(model.change(target.x))
    layers, total, norm = compare(used, target)
    return Proof(guarantee, total, ROUNDING[dtype], norm, layers, len(used))
