"""The clients' first gradients G_i of W0, pooled: the step that a start by gradient imitates.

Fed-SB begins with the leading singular directions of M (d, k), the first AdamW step but for its
size:

    needs().first_gradient = "pooled"    M = sign(sum_i p_i G_i), as the authors', who pool the rows
    needs().first_gradient = "clients"   M = sum_i p_i sign(G_i), the mean of the clients' own steps

"pooled": each client sends its G_i once, and M is decomposed here: exactly up to 1024, above by
subspace iteration. Up d k, down nothing.

"clients": without sending a G_i, by a randomised range finder with one power pass (Halko,
Martinsson and Tropp, 2011, https://arxiv.org/abs/0909.4061). Each phase is linear in M, so means
add up:

    1  all draw the same Omega (k, w)      client: sign(G_i) Omega        Y = M Omega
    2  server: Q = orth(Y) (d, w)          client: Q^T sign(G_i)          Z = Q^T M
    3  server: V = orth(Z^T)^T (w, k)      client: sign(G_i) V^T          Y = M V^T
    4  as 2                                                               M ~ Q Z

Up 2 w (d + k), down w (2 d + k), with w = rank + OVERSAMPLING.

This is the server's half; `client/first_gradient.py` has the clients' answers.
Under DP this is refused: neither is privatised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import FedLoraError, RoundError, StrategyError, UpdateError
from fedlora.federation.server.bounds import within
from fedlora.federation.server.exchange import Limits, check_count, exchange, tag_of
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, message
from fedlora.federation.wire.codes import Refusal
from fedlora.federation.wire.messages import (
    Shapes,
    arrays_of,
    count_bytes,
    metrics_of,
    pack_factors,
    unpack_factors,
)
from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.lora.lowrank import principal, svd
from fedlora.lora.start_quality import Quality, nothing_learned, quality
from fedlora.strategies.base import Client, Round, Upload, mean, seeded, top_ranks

OVERSAMPLING = 8


WARM_UP = 0.02
"""The authors' share of a run's steps in which the rate grows from 0 to train.lr."""


@dataclass(frozen=True)
class Survey:
    """What was found."""

    mean: Adapter
    """M as one pair a module, of rank w at least, its A with orthonormal rows."""
    quality: Mapping[str, Quality]
    """Of the leading ranks of M."""
    steps: float
    """The steps a client makes in the run, on average."""


def survey(
    setting: Setting, session: Session, run: Saved, grid: Grid, clients: Sequence[Client]
) -> Survey:
    """All phases, over all clients.

    Raises:
        StrategyError: no gradient reaches any module, so there is nothing to begin from.
    """
    ranks, shapes = top_ranks(clients), setting.model.shapes
    widths = {m: min(r + OVERSAMPLING, shapes[m].d, shapes[m].k) for m, r in ranks.items()}
    asked = _Asked(setting, session, run, grid, clients, widths)
    pooled = setting.strategy.needs().first_gradient == "pooled"
    mean, total = _pooled(asked) if pooled else _by_clients(asked)
    found = {m: quality(_sizes(p), ranks[m], total[m]) for m, p in mean.items()}
    if nothing_learned(found):
        raise StrategyError(
            "the clients' first gradients are zero in every adapted module, so there is nothing to "
            "begin from: the loss does not depend on them. Train a head that begins elsewhere "
            "(model.pooling = 'default'), or use strategy.fedsb.init-from = 'svd-w0'"
        )
    return Survey(mean, found, asked.steps)


def pooled_gradient(
    setting: Setting, session: Session, run: Saved, grid: Grid, clients: Sequence[Client]
) -> tuple[dict[str, Tensor], int]:
    """sum_i p_i G_i (d, k) by module, and of how many clients it is."""
    widths = dict.fromkeys(setting.model.shapes, 1)  # nothing is sketched
    asked = _Asked(setting, session, run, grid, clients, widths)
    return asked.phase(Factors(), "gradient"), asked.answered


def first_rate(config: Config, steps: float) -> float:
    """The learning rate of the first of a run's steps, where it grows over the authors' WARM_UP."""
    return config.train.lr / max(1.0, WARM_UP * steps)


def _sizes(p: Pair) -> Tensor:
    """The singular values of a pair, largest first."""
    return svd(p)[1]


def _pooled(asked: "_Asked") -> tuple[dict[str, Pair], dict[str, float]]:
    found, total = {}, {}
    seed = asked.setting.config.run.seed
    for m, G in asked.phase(Factors(), "gradient").items():
        M = G.sign().double()  # in float32 rounding looks like directions
        U, S, Vh = principal(M, asked.widths[m], seeded(seed, 0, 0, f"first step/{m}"))
        found[m], total[m] = Pair(Vh, U * S), float(M.square().sum())
    return found, total


def _by_clients(asked: "_Asked") -> tuple[dict[str, Pair], dict[str, float]]:
    Y = asked.phase(Factors(), "signs")
    total = {m: float(y.square().sum()) / y.shape[1] for m, y in Y.items()}  # E|M g|^2 = |M|^2
    Z = asked.phase(Factors(B=_orthonormal(Y)), "signs")
    V = {m: x.T.contiguous() for m, x in _orthonormal({m: z.T for m, z in Z.items()}).items()}
    Q = _orthonormal(asked.phase(Factors(A=V), "signs"))
    Z = asked.phase(Factors(B=Q), "signs")
    pairs = {m: Pair(Z[m], Q[m]) for m in Q}
    # an estimate of |M|^2 may fall below what was found of it
    return pairs, {m: max(total[m], float(Z[m].square().sum())) for m in pairs}


def _orthonormal(Y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {m: torch.linalg.qr(y.double())[0].float() for m, y in Y.items()}


class _Asked:
    """Who is asked, of which modules, and what they said of their rows."""

    def __init__(
        self,
        setting: Setting,
        session: Session,
        run: Saved,
        grid: Grid,
        clients: Sequence[Client],
        widths: Mapping[str, int],
    ) -> None:
        self.setting, self.session, self.run, self.grid = setting, session, run, grid
        self.clients, self.widths = clients, widths
        self.steps, self.answered = 0.0, 0

    def phase(self, send: Factors, what: str) -> dict[str, Tensor]:
        """One answer of each client, averaged by their examples, by module.

        Raises:
            RoundError: nobody answered.
        """
        setting, session, run = self.setting, self.session, self.run
        round = Round(0, setting.config.run.seed)
        widths = self.widths
        asked: dict[str, Any] = {
            "modules": list(widths), "widths": list(widths.values()), "what": what,
        }  # fmt: skip
        messages = []
        for c in self.clients:
            made = message(setting, session, run, c, round, "train.gradient", bare=True)
            made.content["send"] = pack_factors(send, "float32")
            made.content["sketch"] = ConfigRecord(asked)
            messages.append(made)
            self._count(c.id, count_bytes(made.content), 0)
        shapes = {("A", m): self._shape(m, send, what) for m in widths}
        reasons: list[str] = []
        uploads, of_node = [], {session.nodes[c.id]: c for c in self.clients}
        for node, reply in exchange(self.grid, messages, setting.config.round.deadline):
            try:
                tag_of(reply, of_node[node], round, run.token, "gradient")
                self._count(of_node[node].id, 0, count_bytes(reply.content))
                uploads.append(_read(setting, reply, of_node[node], shapes))
            except FedLoraError as e:
                reasons.append(Refusal.of(e).reason)
                session.observer.client_failed(of_node[node].id, reasons[-1])
        uploads = within(setting, session, uploads)
        if not uploads:
            raise RoundError(
                "no client sent its first gradient; nothing was begun"
                + (f". The first said: {reasons[0]}" if reasons else "")
            )
        uploads.sort(key=lambda u: u.client.id)
        self.steps, self.answered = self._steps(uploads), len(uploads)
        return dict(mean(uploads, Factors()).A)

    def _count(self, client: int, down: int, up: int) -> None:
        before = self.session.beforehand.get(client, (0, 0))
        self.session.beforehand[client] = before[0] + down, before[1] + up

    def _shape(self, m: str, send: Factors, what: str) -> tuple[int, int]:
        size, w = self.setting.model.shapes[m], self.widths[m]
        if what == "gradient":
            return size.d, size.k
        return (w, size.k) if send.B else (size.d, w)

    def _steps(self, uploads: Sequence[Upload]) -> float:
        train = self.setting.config.train
        rows = sum(u.num_examples for u in uploads) / len(uploads)
        each = train.steps or train.epochs * max(1.0, rows / train.step_size)
        each = min(each, train.max_steps or each)
        return self.setting.config.run.rounds * each


def _read(setting: Setting, reply: Message, client: Client, shapes: Shapes) -> Upload:
    """A client's sketch, decoded and checked.

    Raises:
        UpdateError, WireError: what is wrong with it.
    """
    try:
        n = metrics_of(reply.content, "metrics")["num-examples"]
        record = arrays_of(reply.content, "sent")
    except KeyError as e:
        raise UpdateError(f"the reply lacks {e}") from None
    check_count(n, Limits.of(setting.config))
    sent = unpack_factors(record, {}, shapes, "float32")
    return Upload(client, sent, int(n))  # type: ignore[arg-type]
