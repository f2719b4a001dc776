"""The bugs of public code, planted one by one: the exactness check must see every one of them.

A check that cannot fail proves nothing. Each mutant below was found in a reference repository or
is one keystroke away from the code here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import tests.strategies.test_contract as contract
from fedlora.lora import lowrank
from fedlora.lora.adapter import Factors, Pair
from fedlora.strategies import (
    base,
    fedex,
    fedsa,
    fedsb,
    fedsvd,
    ffa,
    flexlora,
    flora,
    florist,
    lora_a2,
    mixed,
    raflora,
    ravan,
    rolora,
)
from fedlora.strategies.base import Client, Round, Upload
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.fedex import FedEx
from fedlora.strategies.fedsa import FedSA
from fedlora.strategies.fedsb import FedSB
from fedlora.strategies.fedsvd import FedSVD
from fedlora.strategies.ffa import FFA
from fedlora.strategies.flexlora import FlexLoRA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategies.lora_a2 import LoRAA2
from fedlora.strategies.ravan import Ravan
from fedlora.strategies.rolora import RoLoRA
from tests.support.strategy_federation import (
    EQUAL,
    EVEN,
    MIXED,
    MODULES,
    RESCALED,
    SEED,
    SQUARE,
    Played,
    deviation,
    play,
)

Patch = pytest.MonkeyPatch


def worst(strategy: Any, clients: Sequence[Client]) -> float:
    """The largest deviation from (E), or inf where the planted bug stops the round."""
    try:
        return max(
            deviation(strategy, played) for played in play(strategy, clients, [(0, 1, 2, 3)] * 2)
        )
    except (RuntimeError, ValueError, IndexError):
        return float("inf")


def only_square(clients: Sequence[Client]) -> list[Client]:
    """Where a transposed factor raises nothing."""
    return [replace(c, layers={SQUARE: c.layers[SQUARE]}) for c in clients]


# -- the mutants -------------------------------------------------------------------------------


def transposed_residual(patch: Patch) -> None:
    """FedEx-LoRA's reference adds the residual transposed to nn.Linear."""

    def planted(pairs: Any, weights: Any) -> tuple[Pair, Pair]:
        mean, missed = lowrank.mean_and_residual(pairs, weights)
        right = missed.pair()
        return mean, Pair(right.B.T, right.A.T)

    patch.setattr(fedex, "mean_and_residual", planted)


def residual_without_scale(patch: Patch) -> None:
    """FedLLM-Factory forgets alpha / r in the residual."""

    def planted(pairs: Any, weights: Any) -> tuple[Pair, Pair]:
        bare = [replace(p, scale=1.0) for p in pairs]
        mean, _ = lowrank.mean_and_residual(pairs, weights)
        return mean, lowrank.mean_and_residual(bare, weights)[1]

    patch.setattr(fedex, "mean_and_residual", planted)


def residual_with_uniform_weights(patch: Patch) -> None:
    """FedLLM-Factory has p_i in one term and 1/m in the other."""

    def planted(pairs: Any, weights: Any) -> tuple[Pair, Pair]:
        mean, _ = lowrank.mean_and_residual(pairs, weights)
        return mean, lowrank.mean_and_residual(pairs, [1 / len(pairs)] * len(pairs))[1]

    patch.setattr(fedex, "mean_and_residual", planted)


def residual_never_added(patch: Patch) -> None:
    patch.setattr(BaseLog, "add", lambda self, _: self)


def residual_replaces_the_last(patch: Patch) -> None:
    """Only the newest base change is kept: right after one round, wrong after two."""
    patch.setattr(BaseLog, "add", lambda self, delta: BaseLog((one(self, delta),)))


def one(log: BaseLog, delta: Any) -> base.Version:
    return base.Version(log.number + 1, delta)


def stack_without_scale(patch: Patch) -> None:
    """FLoRA's reference relies on alpha = 2 r for all; FedLLM-Factory drops the scale."""

    def planted(pairs: Any, weights: Any) -> Pair:
        return lowrank.stack([replace(p, scale=1.0) for p in pairs], weights)

    patch.setattr(flora, "weighted", planted)


def stack_without_weights(patch: Patch) -> None:
    patch.setattr(flora, "weighted", lambda pairs, _: lowrank.stack(pairs))


def stack_with_weights_on_both_factors(patch: Patch) -> None:
    """FLoRA's FedIT baseline: p_0^2 B_0 A_0."""

    def planted(pairs: Any, weights: Any) -> Pair:
        scaled = [replace(p, A=p.A * w) for p, w in zip(pairs, weights, strict=True)]
        return lowrank.stack(scaled, weights)

    patch.setattr(flora, "weighted", planted)


def stack_of_the_last_client(patch: Patch) -> None:
    """FSLoRA's stacking baseline merges the last client only."""
    patch.setattr(flora, "weighted", lambda pairs, _: lowrank.stack(pairs[-1:]))


def stack_with_sqrt_weights(patch: Patch) -> None:
    """PEFT's "linear": the root of the weight on both factors of each client."""

    def planted(pairs: Any, weights: Any) -> Pair:
        roots = [w**0.5 for w in weights]
        return lowrank.stack([replace(p, A=p.A * p.scale**0.5) for p in pairs], roots)

    patch.setattr(flora, "weighted", planted)


def unweighted(patch: Patch) -> None:
    """A uniform mean, as in FedEx-LoRA's and Fed-SB's references."""
    for module, name in (
        (ffa, "mean_ranks"),
        (fedsa, "mean_ranks"),
        (fedsvd, "mean_ranks"),
        (fedsb, "mean"),
    ):
        right = getattr(module, name)

        def planted(uploads: Any, *args: Any, right: Any = right, **kw: Any) -> Factors:
            return right([replace(u, num_examples=1) for u in uploads], *args, **kw)

        patch.setattr(module, name, planted)


def scale_not_folded(patch: Patch) -> None:
    """Factors averaged as they come, whatever scale they were trained at."""
    for module, name in ((ffa, "mean_ranks"), (fedsb, "mean")):
        right = getattr(module, name)

        def planted(uploads: Any, before: Factors, right: Any = right, **kw: Any) -> Factors:
            same = [replace(u, sent=replace(u.sent, scale=before.scale)) for u in uploads]
            return right(same, before, **kw)

        patch.setattr(module, name, planted)


def core_scale_not_folded(patch: Patch) -> None:
    patch.setattr(FedSB, "aggregate", aggregate_with(lambda _, u, m: u.sent.R[m]))


def aggregate_with(core: Callable[..., Any]) -> Callable[..., Any]:
    def aggregate(_: FedSB, state: Factors, uploads: Any, __: Round) -> Factors:
        completed = [
            replace(
                u,
                sent=replace(u.sent, R={m: core(state, u, m) for m in u.sent.R}, scale=state.scale),
            )
            for u in uploads
        ]
        return base.mean(completed, state)

    return aggregate


def transposed_core(patch: Patch) -> None:
    patch.setattr(FedSB, "aggregate", aggregate_with(lambda state, u, m: fedsb.core(state, u, m).T))


def last_client_wins(patch: Patch) -> None:
    """FedSA-LoRA's reference trains one shared module through all clients in turn."""
    right = mixed.mean_ranks
    patch.setattr(fedsa, "mean_ranks", lambda us, s, **kw: right(list(us)[-1:], s, **kw))


def missing_ranks_as_zero(patch: Patch) -> None:
    """Zero-padding dilutes the ranks that few clients hold."""
    right = mixed.mean_ranks
    for module in (ffa, fedsa, rolora):
        patch.setattr(
            module, "mean_ranks", lambda us, s, **kw: right(us, s, **{**kw, "absent": "zero"})
        )


def tail_forgotten(patch: Patch) -> None:
    """A narrow client's fold left out of the average."""

    def planted(uploads: Any, _: Any) -> Any:
        pairs = [x for u in uploads for x in u.sent.adapter().items()]
        top = {m: max((x for n, x in pairs if n == m), key=lambda x: x.rank) for m, _ in pairs}

        def padded(u: Any) -> dict[str, Pair]:
            return {
                m: lowrank.pad(lowrank.rescale(x, top[m].scale), top[m].rank)
                for m, x in u.sent.adapter().items()
            }

        return mixed.by_module(uploads, padded)

    patch.setattr(fedex, "by_module", planted)


def root_of_s_on_one_side(patch: Patch) -> None:
    """FedLLM-Factory's FlexLoRA puts sqrt(S) on B only: the product is U sqrt(S) V."""

    def planted(pair: Pair, rank: int) -> Pair:
        U, S, Vh = lowrank.svd(pair)
        return Pair(Vh[:rank], U[:, :rank] * S[:rank].sqrt())

    for module in (flexlora, fedsvd, raflora):
        patch.setattr(module, "compress", planted)


def alpha_hard_coded(patch: Patch) -> None:
    """FlexLoRA's reference takes alpha = 16 whatever was set."""

    def planted(pairs: Any, weights: Any) -> Pair:
        return lowrank.stack([replace(p, scale=16 / p.rank) for p in pairs], weights)

    patch.setattr(flexlora, "stack", planted)


def scale_lost_in_refactoring(patch: Patch) -> None:
    patch.setattr(fedsvd, "rescale", lambda pair, scale: replace(pair, scale=scale))


def both_factors_trained(patch: Patch) -> None:
    """FedEx-LoRA's FFA baseline freezes A before PEFT wraps it, so nothing is frozen."""
    for cls in (RoLoRA, LoRAA2):
        right = cls.download

        def planted(self: Any, *args: Any, right: Any = right) -> Any:
            return replace(right(self, *args), trainable=frozenset({"A", "B", "other"}))

        patch.setattr(cls, "download", planted)


def ranks_of_another_client(patch: Patch) -> None:
    """What one client trained is put where another's would go."""
    right = lora_a2.selection

    def planted(state: Any, client: Client, round: Round, m: str) -> Any:
        return right(state, replace(client, id=client.id + 1), round, m)

    patch.setattr(LoRAA2, "aggregate", with_selection(planted))


def with_selection(selection: Callable[..., Any]) -> Callable[..., Any]:
    def aggregate(_: LoRAA2, state: Any, uploads: Any, round: Round) -> Any:
        rows = lambda u, m: selection(state, u.client, round, m)  # noqa: E731
        factors = mixed.mean_ranks(uploads, state.factors, absent="unchanged", rows=rows)
        return replace(state, factors=factors)

    return aggregate


def fold_forgotten(patch: Patch) -> None:
    """FLoRIST without the ranks that a narrow client folded in."""
    patch.setattr(florist, "tail", lambda pair, _: lowrank.tail(pair, pair.rank))
    patch.setattr(FLoRIST, "trained", whole_client)


def whole_client(_: FLoRIST, state: Any, upload: Any, __: Round) -> Any:
    pairs = upload.sent.adapter()
    return {m: lowrank.stack([x, lowrank.tail(state.mean[m], x.rank)]) for m, x in pairs.items()}


def heads_mixed_up(patch: Patch) -> None:
    patch.setattr(ravan, "mean", lambda us, s: base.mean((flipped(u) for u in us), s))


def flipped(u: Any) -> Any:
    return replace(u, sent=replace(u.sent, R={m: H.flip(0) for m, H in u.sent.R.items()}))


MUTANTS: list[tuple[Callable[[Patch], None], Any, Sequence[Client]]] = [
    (transposed_residual, FedEx(), only_square(EQUAL)),
    (residual_without_scale, FedEx(), EQUAL),
    (residual_with_uniform_weights, FedEx(), EQUAL),
    (residual_never_added, FedEx(), EQUAL),
    (residual_never_added, FLoRA(), EQUAL),
    (residual_replaces_the_last, FedEx(), EQUAL),
    (residual_replaces_the_last, FLoRA(), MIXED),
    (tail_forgotten, FedEx(), MIXED),
    (stack_without_scale, FLoRA(), EQUAL),
    (stack_without_weights, FLoRA(), EQUAL),
    (stack_with_weights_on_both_factors, FLoRA(), EQUAL),
    (stack_of_the_last_client, FLoRA(), MIXED),
    (stack_with_sqrt_weights, FLoRA(), RESCALED),
    (unweighted, FFA(), EQUAL),
    (unweighted, FedSB(), EQUAL),
    (unweighted, FedSA(), EQUAL),
    (scale_not_folded, FFA(), RESCALED),
    (core_scale_not_folded, FedSB(), RESCALED),
    (transposed_core, FedSB(), EQUAL),
    (missing_ranks_as_zero, FFA(), MIXED),
    (missing_ranks_as_zero, FedSA(), MIXED),
    (last_client_wins, FedSA(), EQUAL),
    (root_of_s_on_one_side, FlexLoRA(), EQUAL),
    (root_of_s_on_one_side, FedSVD(), EQUAL),
    (alpha_hard_coded, FlexLoRA(), RESCALED),
    (scale_lost_in_refactoring, FedSVD(), EQUAL),
    (unweighted, FedSVD(), EQUAL),
    (both_factors_trained, RoLoRA(), EQUAL),
    (both_factors_trained, LoRAA2(), EQUAL),
    (ranks_of_another_client, LoRAA2(choice="server"), MIXED),
    (missing_ranks_as_zero, RoLoRA(), MIXED),
    (fold_forgotten, FLoRIST(energy=1.0), MIXED),
    (heads_mixed_up, Ravan(), EVEN),
]


@pytest.mark.parametrize(
    ("plant", "strategy", "clients"),
    MUTANTS,
    ids=[f"{plant.__name__}-{type(s).__name__}" for plant, s, _ in MUTANTS],
)
def test_the_exactness_check_sees_the_planted_bug(
    plant: Callable[[Patch], None],
    strategy: Any,
    clients: Sequence[Client],
    monkeypatch: Patch,
) -> None:
    assert worst(strategy, clients) < 1e-12
    plant(monkeypatch)
    assert worst(strategy, clients) > 1e-3


# -- where nothing exact is promised, the contract's tests have to see it -----------------------


@dataclass(frozen=True, eq=False)
class Planted:
    """A strategy whose server hears something else than was sent."""

    inner: Any
    hears: Callable[[Upload], Upload]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def aggregate(self, state: Any, uploads: Iterable[Upload], round: Round) -> Any:
        return self.inner.aggregate(state, map(self.hears, uploads), round)


def without_scale(u: Upload) -> Upload:
    return replace(u, sent=replace(u.sent, scale=dict.fromkeys(u.sent.scale, 1.0)))


def without_weight(u: Upload) -> Upload:
    return replace(u, num_examples=min(1, u.num_examples))


LOOSE = {key: run for key, run in contract.RUNS.items() if run[0].promise == "approximate"}
WEIGHED = {key: run for key, run in LOOSE.items() if key in contract.BY_EXAMPLES}
ALIVE = []  # the contract remembers what was played by the strategy's id


@pytest.mark.parametrize(("strategy", "clients"), LOOSE.values(), ids=LOOSE)
def test_the_contract_sees_a_dropped_scale(strategy: Any, clients: list[Client]) -> None:
    ALIVE.append(Planted(strategy, without_scale))
    with pytest.raises(AssertionError):
        contract.test_the_same_update_at_another_scale_counts_the_same(ALIVE[-1], clients)


@pytest.mark.parametrize(("strategy", "clients"), WEIGHED.values(), ids=WEIGHED)
def test_the_contract_sees_equal_weights(strategy: Any, clients: list[Client]) -> None:
    ALIVE.append(Planted(strategy, without_weight))
    with pytest.raises(AssertionError):
        contract.test_an_update_of_thrice_the_examples_counts_as_three(ALIVE[-1], clients)


def test_sqrt_of_s_on_one_side_is_not_the_best_approximation() -> None:
    """FedLLM-Factory's FlexLoRA puts sqrt(S) on B only: the product is U sqrt(S) V."""
    d, k = MODULES["layers.1.down"]
    g = torch.Generator().manual_seed(0)
    pair = Pair(torch.randn(5, k, generator=g).double(), torch.randn(d, 5, generator=g).double())
    U, S, Vh = lowrank.svd(pair)
    right, wrong = lowrank.compress(pair, 3), Pair(Vh[:3], U[:, :3] * S[:3].sqrt())
    best = S[3:].norm()
    assert abs((right.delta() - pair.delta()).norm() - best) < 1e-9
    assert (wrong.delta() - pair.delta()).norm() > 1.1 * best


def test_sketches_drawn_apart_for_a_and_b_are_another_model() -> None:
    """FSLoRA's reference draws the index set once for each parameter, not for each layer."""
    (played,) = play(FSLoRA(), MIXED)
    u = played.uploads[0]
    flipped = replace(u.sent, B={m: B.flip(1) for m, B in u.sent.B.items()})
    true, wrong = u.sent.adapter()[SQUARE].delta(), flipped.adapter()[SQUARE].delta()
    assert (true - wrong).norm() > 0.1 * true.norm()


def test_the_check_passes_only_on_the_state_that_belongs_to_the_round() -> None:
    first, second = play(FLoRA(), EQUAL, [(0, 1, 2, 3)] * 2)
    stale = Played(Round(2, SEED), second.before, second.visits, first.after)
    assert deviation(FLoRA(), stale) > 1e-3
