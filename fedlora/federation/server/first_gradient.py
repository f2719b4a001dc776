"""sum_i p_i sign(G_i) of the clients' first gradients G_i of W0, found without sending a G_i.

The mean of the clients' first AdamW steps is -eta times this matrix M (d, k). Fed-SB begins with
its leading singular directions. Two phases of a randomised range finder (Halko, Martinsson and
Tropp, 2011, https://arxiv.org/abs/0909.4061) each send a thin matrix, and both are linear in M:

    1  all draw the same Omega (k, w)      client: Y_i = sign(G_i) Omega       Y = sum_i p_i Y_i
    2  server: Q = orth(Y) (d, w)          client: Z_i = Q^T sign(G_i)         Z = sum_i p_i Z_i
       M ~ Q Z

This is the server's half; `client/first_gradient.py` has the clients' answers to both phases.

Costs once, a layer and client: up w (d + k), down w d, with w = rank + OVERSAMPLING.

Under DP this is refused: the sketches are not privatised.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedlora.errors import FedLoraError, RoundError, UpdateError
from fedlora.federation.server.bounds import within
from fedlora.federation.server.exchange import Limits, check_count, error_of, exchange
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, client, message
from fedlora.federation.wire.codes import Refusal
from fedlora.federation.wire.messages import (
    Shapes,
    arrays_of,
    configs_of,
    metrics_of,
    pack_factors,
    unpack_factors,
)
from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.strategies.base import Client, Round, Upload, mean, top_ranks

OVERSAMPLING = 8


def survey(
    setting: Setting, session: Session, run: Saved, grid: Grid, clients: Sequence[Client]
) -> Adapter:
    """Both phases, over all clients; M as one pair a module, of rank w."""
    ranks = top_ranks(clients)
    shapes = setting.model.shapes
    widths = {m: min(r + OVERSAMPLING, shapes[m].d, shapes[m].k) for m, r in ranks.items()}
    Y = _phase(setting, session, run, grid, clients, Factors(), widths)
    Q = {m: torch.linalg.qr(y.double())[0].float() for m, y in Y.items()}  # (d, w)
    Z = _phase(setting, session, run, grid, clients, Factors(B=Q), widths)
    return {m: Pair(Z[m], Q[m]) for m in Q}


def _phase(
    setting: Setting,
    session: Session,
    run: Saved,
    grid: Grid,
    clients: Sequence[Client],
    send: Factors,
    widths: Mapping[str, int],
) -> dict[str, Tensor]:
    round = Round(0, setting.config.run.seed)
    sketch_: dict[str, Any] = {"modules": list(widths), "widths": list(widths.values())}
    messages = []
    for c in clients:
        made = message(setting, session, run, c, round, "train.gradient", bare=True)
        made.content["send"] = pack_factors(send, "float32")
        made.content["sketch"] = ConfigRecord(sketch_)
        messages.append(made)
    sizes = setting.model.shapes
    shapes = {("A", m): (w, sizes[m].k) if send.B else (sizes[m].d, w) for m, w in widths.items()}
    uploads = []
    for _, reply in exchange(grid, messages, setting.config.round.deadline):
        try:
            uploads.append(_read(setting, run, reply, {c.id for c in clients}, shapes))
        except FedLoraError as e:
            session.observer.client_failed(None, Refusal.of(e).reason)
    uploads = within(setting, session, uploads)
    if not uploads:
        raise RoundError("no client sent its first gradient; nothing was begun")
    uploads.sort(key=lambda u: u.client.id)
    return dict(mean(uploads, Factors()).A)


def _read(setting: Setting, run: Saved, reply: Message, asked: set[int], shapes: Shapes) -> Upload:
    """A client's sketch, decoded and checked.

    Raises:
        UpdateError, WireError: what is wrong with it.
    """
    if error := error_of(reply):
        raise error
    try:
        i = configs_of(reply.content, "reply")["client"]
        n = metrics_of(reply.content, "metrics")["num-examples"]
        record = arrays_of(reply.content, "sent")
    except KeyError as e:
        raise UpdateError(f"the reply lacks {e}") from None
    if i not in asked:
        raise UpdateError(f"the reply is of client {i!r}, which was not asked")
    check_count(n, Limits.of(setting.config))
    sent = unpack_factors(record, {}, shapes, "float32")
    return Upload(client(setting, run, int(i)), sent, int(n))  # type: ignore[arg-type]
