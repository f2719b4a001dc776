"""The aggregation proof: do the clients get the model that the strategy promises?

Each round, on seeded random inputs x (k, n) of every adapted module, the server computes

    target(x) = sum_i p_i s_i B_i A_i x           from the uploads, as they came off the wire
    used(x)   = (model after the round) x - (base before the round) x

where the model after the round is what a client will make of its next download: encoded, decoded,
put together by the client's half, base changes included. The relative deviation of the two goes
into the log; a strategy that promises to be exact stops the run when it is not. A few
matrix-vector products a round, in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import ProofError
from fedlora.federation.wire.messages import ROUNDING, pack_download, unpack_download
from fedlora.lora.adapter import Adapter, Factors, Pair, apply, together
from fedlora.strategies.base import (
    Client,
    Download,
    Promise,
    Round,
    Strategy,
    Version,
    seeded,
    whole_download,
)

WEIGHTS = {"float32": 0.0, "bfloat16": 1e-2, "float16": 2e-3}
"""What a base of this dtype may round of its own output, |W x|, when a change goes into it."""


def probes(client_layers: Sequence[Client], n: int, seed: int, round: int) -> dict[str, Tensor]:
    """x (k, n) for every module any client adapts, unit columns, anew each round."""
    widths = {m: layer.k for c in client_layers for m, layer in c.layers.items()}
    generator = seeded(seed, round, 0, "proof")
    xs = {}
    for m, k in widths.items():
        x = torch.randn(k, n, generator=generator, dtype=torch.float64)
        xs[m] = x / x.norm(dim=0)
    return xs


@dataclass
class Target:
    """sum_i p_i s_i B_i A_i x, gathered one upload at a time.

    Under the promise "shared" the pairs are (I, A_i), and a row is averaged over those that
    have it; else every module is averaged over the clients that hold it.
    """

    x: Mapping[str, Tensor]
    total: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    floor: Mapping[str, float] = field(default_factory=dict)
    """What a deviation is relative to, where |delta_i x| is smaller."""

    def add(self, trained: Adapter, n: int) -> None:
        self.add_outputs({m: _double(pair)(self.x[m]) for m, pair in trained.items()}, n)

    def add_outputs(self, outputs: Mapping[str, Tensor], n: int) -> None:
        """One client's delta_i x (d, n) by module, however they were found."""
        for m, y in outputs.items():
            rows = torch.full((y.shape[0], 1), float(n), dtype=torch.float64)
            self.total[m] = _padded_sum(self.total.get(m), n * y)
            self.weight[m] = _padded_sum(self.weight.get(m), rows)
            self.size[m] = self.size.get(m, 0.0) + n * float(y.norm())

    def mean(self, m: str) -> Tensor:
        return self.total[m] / self.weight[m]

    def scale(self, m: str) -> float:
        """sum_i p_i |delta_i x|: what rounding is relative to, also where the mean cancels."""
        return max(self.size[m] / float(self.weight[m].max()), self.floor.get(m, 0.0))


@dataclass(frozen=True, slots=True)
class Proof:
    """One round's verdict; `record` is what the log keeps."""

    promise: Promise
    deviation: float
    bound: float
    norm: float
    layers: Mapping[str, float]
    profiles: int
    model_deviation: float | None = None
    model_bound: float = 0.0
    """What the model itself may deviate by: more, where its weights round what goes into them."""

    @property
    def worst(self) -> str:
        return max(self.layers, key=lambda m: self.layers[m], default="")

    def record(self) -> dict[str, Any]:
        return {
            "promise": self.promise,
            "deviation": self.deviation,
            "bound": self.bound,
            "norm": self.norm,
            "model_deviation": self.model_deviation,
            "model_bound": max(self.bound, self.model_bound),
            "worst_layer": self.worst,
            "profiles": self.profiles,
            "layers": dict(self.layers),
        }

    def enforce(self, strategy: str, round: int) -> None:
        """Raises ProofError where an exact strategy, or the model built from it, is not exact."""
        if self.promise == "approximate":
            return
        for what, value, bound in (
            ("the download", self.deviation, self.bound),
            ("the model", self.model_deviation, max(self.bound, self.model_bound)),
        ):
            if value is not None and not value <= bound:
                raise ProofError(
                    f"round {round}: {strategy} promises an exact aggregation, but {what} "
                    f"deviates from sum p_i s_i B_i A_i by {value:.2e} (bound {bound:.0e}), "
                    f"most in {self.worst}. The state before this round is in the checkpoint; "
                    "nothing of this round was kept. proof.enforce = false goes on regardless."
                )


def prove(
    strategy: Strategy[Any],
    state: Any,
    before: int,
    clients: Sequence[Client],
    target: Target,
    round: Round,
    dtype: str,
    fold_absent: bool = True,
) -> Proof:
    """Compare the target with what each kind of client will use after `state`'s next download.

    `before` is the base version the uploads were trained on. Clients of equal layers are one kind.
    For a strategy that is not exact, the deviation is that of the global model, `effective`.
    """
    used: list[dict[str, Tensor]] = []
    if strategy.promise == "approximate":
        effective = strategy.effective(state)
        new = [v for v in effective.base if v.number > before]
        used.append(outputs(target, new, effective.factors.adapter(), {}))
    else:
        for client in kinds(clients):
            there = replace(client, has_memory=False, base_version=before)
            after = Round(round.number + 1, round.seed)
            sent = whole_download(strategy, state, there, after, fold_absent)
            came = unpack_download(pack_download(sent, dtype))
            made = _used_by(strategy, came, there, target, round)
            used.append(made if fold_absent else {m: made[m] for m in client.layers if m in made})
    layers, total, norm = compare(used, target)
    return Proof(strategy.promise, total, ROUNDING[dtype], norm, layers, len(used))


def kinds(clients: Sequence[Client]) -> list[Client]:
    """One client of each set of layers and ranks."""
    return list({tuple((m, x.rank) for m, x in c.layers.items()): c for c in clients}.values())


def outputs(
    target: Target, base: Sequence[Version], adapter: Adapter, fold: Adapter
) -> dict[str, Tensor]:
    """What base changes, fold and adapter together make of the probes, by module."""
    result = {}
    for m in target.total:
        x = target.x[m]
        y = torch.zeros_like(target.total[m])
        for v in base:
            if m in v.delta:
                delta = together(v.delta[m])
                y = y + apply(_double(delta) if isinstance(delta, Pair) else delta.double(), x)
        for pairs in (fold, adapter):
            if m in pairs:
                y = y + _double(pairs[m])(x)
        result[m] = y
    return result


def model_deviation(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], target: Target
) -> float:
    """The same comparison through the model's own layers, in its own precision.

    before, after: W x of the base the clients trained on, and the adapted layer's output now.
    Relative to |W x| too, since float32 weights cannot hold a change more exactly than that.
    """
    worst = 0.0
    for m in target.total:
        gap = after[m] - before[m] - target.mean(m)
        size = max(float(before[m].norm()), target.scale(m), 1e-30)
        worst = max(worst, float(gap.norm()) / size)
    return worst


def _used_by(
    strategy: Strategy[Any], came: Download, client: Client, target: Target, round: Round
) -> dict[str, Tensor]:
    after = Round(round.number + 1, round.seed)
    factors = strategy.start(came, Factors(), client, after)
    if strategy.promise == "shared":
        shared = {
            m: Pair(A, torch.eye(target.total[m].shape[0], A.shape[0], dtype=A.dtype))
            for m, A in factors.A.items()
            if m in target.total
        }
        return {m: y[: factors.A[m].shape[0]] for m, y in outputs(target, (), shared, {}).items()}
    return outputs(target, came.base, factors.adapter(), came.fold)


def compare(
    used: Sequence[Mapping[str, Tensor]], target: Target
) -> tuple[dict[str, float], float, float]:
    """The worst relative deviation by module, over all modules, and the target's norm."""
    layers: dict[str, float] = {}
    worst = norm = 0.0
    for outcome in used:
        gap2 = size2 = norm2 = 0.0
        for m, y in outcome.items():
            want = target.mean(m)[: y.shape[0]]
            gap, size = float((y - want).norm()), max(target.scale(m), float(want.norm()))
            layers[m] = max(layers.get(m, 0.0), gap / size if size > 0 else gap)
            gap2, size2, norm2 = gap2 + gap**2, size2 + size**2, norm2 + float(want.norm()) ** 2
        ratio = (gap2**0.5 / size2**0.5) if size2 > 0 else gap2**0.5
        if not ratio <= worst:  # NaN must not look like zero
            worst = ratio
        norm = norm2**0.5
    return layers, worst, norm


def _double(pair: Pair) -> Pair:
    return Pair(pair.A.double(), pair.B.double(), pair.scale)


def _padded_sum(total: Tensor | None, x: Tensor) -> Tensor:
    if total is None:
        return x.clone()
    if total.shape[0] < x.shape[0]:
        total, x = x.clone(), total
    total[: x.shape[0]] += x
    return total
