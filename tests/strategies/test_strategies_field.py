"""The rest of the field against its equations, in float64: one section a strategy."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora.adapter import Factors, Pair
from fedlora.lora.lowrank import stack
from fedlora.strategies.base import Client, Round, Upload, shares
from fedlora.strategies.fed_plora import FedPLoRA
from fedlora.strategies.fed_plora import selection as plora_selection
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedsvd import FedSVD
from fedlora.strategies.flexlora import FlexLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.frlora import FRLoRA
from fedlora.strategies.hetlora import HetLoRA
from fedlora.strategies.lora_a2 import LoRAA2, selection
from fedlora.strategies.lora_fair import LoRAFair, cosine, cosine_columns, ridge
from fedlora.strategies.raflora import RaFLoRA
from fedlora.strategies.ravan import Ravan, heads, spread
from fedlora.strategies.rolora import RoLoRA
from tests.support.strategy_federation import (
    EQUAL,
    EVEN,
    EVEN_MIXED,
    MIXED,
    MODULES,
    RESCALED,
    SEED,
    SQUARE,
    Played,
    Site,
    base_change,
    deviation,
    make_clients,
    make_start,
    model_change,
    noise,
    perturb,
    play,
    visit,
)

ALL = (0, 1, 2, 3)


def last(strategy: Any, clients: Sequence, rounds: int = 2) -> Played:
    *_, played = play(strategy, clients, [ALL] * rounds)
    return played


def zero(x: Tensor, atol: float = 1e-11) -> None:
    assert_close(x, torch.zeros_like(x), rtol=0, atol=atol)


def true_mean(uploads: Sequence[Upload], m: str) -> Tensor:
    """sum_i p_i s_i B_i A_i over the clients that hold the module, dense."""
    held = [u for u in uploads if m in u.client.layers]
    deltas = [u.sent.adapter()[m].delta() for u in held]
    return sum((p * x for p, x in zip(shares(held), deltas, strict=True)), torch.zeros(()))


# -- hetlora -----------------------------------------------------------------------------------


def test_hetlora_of_equal_ranks_is_fedavg_weighted_by_the_norm_of_the_updates() -> None:
    played = last(HetLoRA(gamma=1.0), RESCALED)
    for m in MODULES:
        pairs = [u.sent.adapter()[m] for u in played.uploads]
        w = torch.stack([x.delta().norm() for x in pairs])
        w, s = w / w.sum(), played.after.factors.scale[m]
        A = sum(wi * x.A for wi, x in zip(w, pairs, strict=True))
        B = sum(wi * x.B * x.scale / s for wi, x in zip(w, pairs, strict=True))
        zero(played.after.factors.A[m] - A)
        zero(played.after.factors.B[m] - B)


@pytest.mark.parametrize("normalize", ["none", "hits"])
def test_hetlora_shrinks_the_ranks_that_few_hold_unless_it_counts_hits(normalize: str) -> None:
    strategy = HetLoRA(gamma=1.0, normalize=normalize)  # type: ignore[arg-type]
    *_, played = play(strategy, MIXED, [ALL, (0, 1)])
    narrow, top = (MIXED[i].layers[SQUARE].rank for i in (0, 1))
    w = [float(u.sent.adapter()[SQUARE].delta().norm()) for u in played.uploads]
    share = w[1] / sum(w) if normalize == "none" else 1.0
    alone = played.uploads[1].sent.A[SQUARE][narrow:top]
    zero(played.after.factors.A[SQUARE][narrow:top] - share * alone)


def test_hetlora_keeps_the_ranks_that_no_one_in_the_cohort_holds() -> None:
    *_, played = play(HetLoRA(gamma=1.0), MIXED, [ALL, (0, 2)])
    top = max(MIXED[i].layers[SQUARE].rank for i in (0, 2))
    before, after = (x.factors.A[SQUARE][top:] for x in (played.before, played.after))
    assert len(after)
    assert torch.equal(before, after)


def test_a_rank_that_every_hetlora_client_pruned_leaves_the_model_and_can_come_back() -> None:
    strategy, clients = HetLoRA(gamma=0.7, rounding="down"), make_clients([5, 5])
    *_, played = play(strategy, clients, [(0, 1)])
    sent = [strategy.download(played.after, c, Round(2, SEED)).send for c in clients]
    shrunk = [replace(x, B={m: B / 2 for m, B in x.B.items()}) for x in sent]
    uploads = [Upload(c, x, 1) for c, x in zip(clients, shrunk, strict=True)]
    after = strategy.aggregate(played.after, uploads, Round(2, SEED)).factors
    assert not after.B[SQUARE][:, 3:].any()
    assert after.A[SQUARE][3:].norm(dim=1).min() > 0.1
    assert after.B[SQUARE][:, :3].any()


def test_a_hetlora_client_sheds_the_ranks_whose_product_shrank_and_no_others() -> None:
    strategy, clients = HetLoRA(gamma=0.7, rounding="down"), make_clients([5, 5])
    *_, played = play(strategy, clients, [(0, 1)])
    state, round = played.after, Round(2, SEED)
    sent = [strategy.download(state, c, round).send for c in clients]
    keep = strategy.keep(5)
    assert keep == 3
    shrunk = {
        m: torch.cat([A[:keep], A[keep:] / 2]) if m == SQUARE else 2 * A
        for m, A in sent[0].A.items()
    }
    grown = {m: 2 * A for m, A in sent[1].A.items()}
    uploads = [
        Upload(clients[0], replace(sent[0], A=shrunk), 3),
        Upload(clients[1], replace(sent[1], A=grown), 4),
    ]
    after = strategy.aggregate(state, uploads, round)
    one, two = (strategy.download(after, c, Round(3, SEED)) for c in clients)
    assert one.send.A[SQUARE].shape[0] == keep
    assert one.penalty is not None
    assert one.penalty.keep[SQUARE] == strategy.keep(keep) == 2
    assert two.send.A[SQUARE].shape[0] == 5
    assert all(A.shape[0] > keep for m, A in one.send.A.items() if m != SQUARE)


def shrinking(strategy: HetLoRA, rank: int, rounds: int) -> list[int]:
    """The ranks a client has left, where the product of its tail shrinks in every round."""
    (client,) = make_clients([rank])[:1]
    start = make_start([client])
    state = strategy.init(replace(start, factors=replace(start.factors, B={
        m: noise(B.shape, 0, 0, m) for m, B in start.factors.B.items()
    })))  # fmt: skip
    left = []
    for number in range(1, rounds + 1):
        sent = strategy.download(state, client, Round(number, SEED)).send
        half = replace(sent, B={m: B / 2 for m, B in sent.B.items()})
        state = strategy.aggregate(state, [Upload(client, half, 1)], Round(number, SEED))
        left.append(state.ranks[client.id][SQUARE])
    return left


@pytest.mark.parametrize("gamma", [0.99, 0.9, 0.7])
def test_a_hetlora_client_keeps_gamma_to_the_n_of_its_ranks(gamma: float) -> None:
    """By the slow definition: the rank is real, and its ceiling is in use."""
    rho, want = float(make_clients([16])[0].layers[SQUARE].rank), []
    for _ in range(10):
        rho = max(1.0, gamma * rho)
        want.append(int(np.ceil(rho)))
    assert shrinking(HetLoRA(gamma=gamma), 16, 10) == want


def test_hetlora_at_its_defaults_does_not_shed_a_rank_at_each_pruning() -> None:
    """.99 is a hundredth of the ranks, not one of them: rounding down had lost 10 of 16."""
    rank = make_clients([16])[0].layers[SQUARE].rank
    assert shrinking(HetLoRA(), 16, 10)[-1] >= 0.9 * rank
    assert shrinking(HetLoRA(rounding="down"), 16, 10)[-1] == rank - 10


def test_a_hetlora_client_never_sheds_its_last_rank() -> None:
    assert [HetLoRA().keep(r) for r in (1, 2, 8, 100, 200)] == [1, 1, 7, 99, 198]
    assert shrinking(HetLoRA(gamma=0.1), 3, 4)[-1] == 1


def test_hetlora_without_pruning_asks_for_no_penalty() -> None:
    client, state = EQUAL[0], HetLoRA().init(make_start(EQUAL))
    assert HetLoRA(gamma=1.0).download(state, client, Round(1, SEED)).penalty is None
    assert HetLoRA(penalty=0.0).download(state, client, Round(1, SEED)).penalty is None
    penalty = HetLoRA().download(state, client, Round(1, SEED)).penalty
    assert penalty is not None
    assert penalty.keep == {m: x.rank - 1 for m, x in client.layers.items()}


# -- flexlora and raflora ----------------------------------------------------------------------


def test_flexlora_holds_the_exact_mean_of_any_ranks() -> None:
    assert deviation(FlexLoRA(), last(FlexLoRA(), MIXED)) < 1e-12


def test_flexlora_cut_at_max_rank_errs_by_the_singular_values_it_drops() -> None:
    strategy = FlexLoRA(max_rank=8)
    played = last(strategy, MIXED)
    for m in MODULES:
        true = true_mean(played.uploads, m)
        gap = (played.after.mean[m].delta() - true).norm()
        assert_close(gap, torch.linalg.svdvals(true)[8:].norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("strategy", [FlexLoRA(), RaFLoRA(), FLoRIST()], ids=["flex", "ra", "ist"])
def test_a_client_gets_the_best_approximation_of_its_rank(strategy: Any) -> None:
    played = last(strategy, MIXED)
    for client in MIXED:
        send = strategy.download(played.after, client, Round(3, SEED)).send
        for m, pair in send.adapter().items():
            layer, whole = client.layers[m], played.after.mean[m].delta()
            assert (pair.rank, pair.scale) == (layer.rank, layer.scale)
            dropped = torch.linalg.svdvals(whole)[layer.rank :].norm()
            assert_close((pair.delta() - whole).norm(), dropped, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("strategy", [FlexLoRA(), RaFLoRA(), FLoRIST()], ids=["flex", "ra", "ist"])
def test_a_client_of_a_rank_above_the_models_can_learn_in_every_direction(strategy: Any) -> None:
    *_, played = play(strategy, MIXED, [(0,)])  # the narrowest client alone: rank 2
    wide = MIXED[1]
    send = strategy.download(played.after, wide, Round(2, SEED)).send
    for m, pair in send.adapter().items():
        assert pair.rank == wide.layers[m].rank
        assert (pair.A.norm(dim=1) + pair.B.norm(dim=0)).min() > 0.5
        zero(pair.delta() - played.after.mean[m].delta())


def test_raflora_of_equal_ranks_is_flexlora() -> None:
    ours, theirs = last(RaFLoRA(), RESCALED), last(FlexLoRA(), RESCALED)
    for m in MODULES:
        zero(ours.after.mean[m].delta() - theirs.after.mean[m].delta())


def test_raflora_weighs_each_block_of_ranks_over_the_clients_that_hold_it() -> None:
    played = last(RaFLoRA(), MIXED)
    for m in MODULES:
        held = [u for u in played.uploads if m in u.client.layers]
        bounds = sorted({0, *(c.layers[m].rank for c in MIXED if m in c.layers)})
        want = torch.zeros(MODULES[m], dtype=torch.float64)
        for low, high in pairwise(bounds):
            inside = [u for u in held if u.client.layers[m].rank >= high]
            for p, u in zip(shares(inside), inside, strict=True):
                x = u.sent.adapter()[m]
                want += p * x.scale * x.B[:, low:high] @ x.A[low:high]
        zero(played.after.mean[m].delta() - want)


def test_raflora_keeps_the_ranks_above_all_of_the_cohorts() -> None:
    *_, played = play(RaFLoRA(), MIXED, [ALL, (0,)])
    r, top = MIXED[0].layers[SQUARE].rank, MIXED[1].layers[SQUARE].rank
    old = played.before.mean[SQUARE]
    above = old.B[:, r:top] @ old.A[r:top]
    want = played.uploads[0].sent.adapter()[SQUARE].delta() + above
    zero(played.after.mean[SQUARE].delta() - want)
    assert above.norm() > 0.1


@pytest.mark.parametrize(
    "strategy", [FlexLoRA(max_rank=3), RaFLoRA(max_rank=3)], ids=["flex", "ra"]
)
def test_a_max_rank_below_a_clients_is_refused(strategy: Any) -> None:
    assert any(
        "max-rank = 3: use at least the highest rank, 5" in p for p in strategy.problems(EQUAL)
    )


# -- florist -----------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_florist_keeps_the_least_rank_that_holds_the_energy(energy: float) -> None:
    strategy = FLoRIST(energy=energy)
    played = last(strategy, MIXED, rounds=1)
    for m in MODULES:
        S2 = torch.linalg.svdvals(true_mean(played.uploads, m)).square()
        t = played.after.mean[m].rank
        assert S2[:t].sum() >= energy * S2.sum() > S2[: t - 1].sum()
    assert deviation(strategy, played) <= (1 - energy) ** 0.5


def test_a_florist_client_starts_from_the_whole_adapter() -> None:
    strategy = FLoRIST()
    for played in play(strategy, MIXED, [ALL, ALL]):
        whole = model_change(strategy.effective(played.before))
        for v in played.visits:
            for m in v.upload.client.layers:
                zero(v.start_model[m] - whole[m])


# -- lora-fair ---------------------------------------------------------------------------------


def distances(strategy: Any, rounds: int = 1) -> dict[str, float]:
    played = last(strategy, RESCALED, rounds)
    return {
        m: float((played.after.adapter()[m].delta() - true_mean(played.uploads, m)).norm())
        for m in MODULES
    }


def test_lora_fair_comes_nearer_to_the_mean_than_fedavg() -> None:
    fair, plain = distances(LoRAFair()), distances(FedAvg())
    assert all(fair[m] < 0.99 * plain[m] for m in MODULES)


def test_lora_fair_at_lambda_zero_misses_only_what_abar_cannot_reach() -> None:
    played = last(LoRAFair(lambda_rel=0.0), RESCALED)
    for m in MODULES:
        true, A = true_mean(played.uploads, m), played.after.A[m]
        unreached = true - true @ torch.linalg.pinv(A) @ A
        zero(true - played.after.adapter()[m].delta() - unreached, 1e-9)


def test_lora_fair_at_a_large_lambda_is_fedavg() -> None:
    fair, plain = last(LoRAFair(lambda_rel=1e12), EQUAL, 1), last(FedAvg(), EQUAL, 1)
    for m in MODULES:
        zero(fair.after.B[m] - plain.after.B[m], 1e-9)


def test_the_ridge_correction_has_no_gradient_left() -> None:
    d, k, r = 9, 11, 4
    A, B, dW = noise((r, k), 0, 0, "A"), noise((d, r), 0, 0, "B"), noise((d, k), 0, 0, "W")
    G, lam = A @ A.T, 0.3
    D = ridge(dW @ A.T, B, G, lam).requires_grad_()
    loss = (dW - (B + D) @ A).square().sum() + lam * G.trace() / r * D.square().sum()
    (gradient,) = torch.autograd.grad(loss, D)
    zero(gradient)


def test_the_cosine_correction_has_no_gradient_left_and_sees_no_magnitude() -> None:
    d, k, r, lam = 9, 11, 4, 0.01
    A, B, dW = noise((r, k), 0, 0, "A"), noise((d, r), 0, 0, "B"), noise((d, k), 0, 0, "W")
    D = cosine(dW @ A.T, B, A @ A.T, dW.norm(), lam)
    unit = (B @ A).norm()

    def loss(D: Tensor) -> Tensor:
        X = (B + D) @ A
        return 1 - (X * dW).sum() / (X.norm() * dW.norm()) + lam * (D / unit).square().sum()

    (gradient,) = torch.autograd.grad(loss(D.requires_grad_()), D)
    assert gradient.norm() * unit < 1e-6
    assert loss(D) < loss(torch.zeros_like(D))
    zero(cosine(7 * dW @ A.T, B, A @ A.T, 7 * dW.norm(), lam) - D.detach(), 1e-9)


def test_lora_fair_by_cosine_turns_towards_the_mean() -> None:
    fair, plain = last(LoRAFair(mode="cosine"), RESCALED, 1), last(FedAvg(), RESCALED, 1)
    for m in MODULES:
        true = true_mean(plain.uploads, m).flatten()
        ours, theirs = (x.after.adapter()[m].delta().flatten() for x in (fair, plain))
        assert torch.cosine_similarity(ours, true, 0) > torch.cosine_similarity(theirs, true, 0)


def mean_cosine(X: Tensor, dW: Tensor) -> Tensor:
    """Of the columns, dense: what the factored form must equal."""
    return torch.nn.functional.cosine_similarity(X, dW, dim=0).mean()


def test_the_correction_by_columns_has_no_gradient_left_in_the_dense_loss() -> None:
    d, k, r, lam = 9, 11, 4, 0.01
    A, B = noise((r, k), 0, 0, "A"), noise((d, r), 0, 0, "B")
    near = [
        Pair(A + 0.5 * noise((r, k), 0, i, "A"), B + 0.5 * noise((d, r), 0, i, "B"), 0.5)
        for i in range(1, 4)
    ]
    whole = stack(near, [0.5, 0.3, 0.2])
    D = cosine_columns(whole, A, B, lam)
    unit = (B @ A).norm()

    def loss(D: Tensor) -> Tensor:
        return 1 - mean_cosine((B + D) @ A, whole.delta()) + lam * (D / unit).square().sum()

    (gradient,) = torch.autograd.grad(loss(D.requires_grad_()), D)
    assert gradient.norm() * unit < 1e-9
    assert loss(D) < loss(torch.zeros_like(D))
    other = cosine(whole.delta() @ A.T, B, A @ A.T, whole.delta().norm(), lam)
    assert loss(D) < loss(other) - 1e-4  # the cosine of the whole matrix is another question


def test_the_correction_by_columns_leaves_out_columns_without_a_direction() -> None:
    A, B = noise((3, 7), 0, 0, "A"), noise((5, 3), 0, 0, "B")
    V = noise((4, 7), 0, 0, "V")
    V[:, 2] = 0
    D = cosine_columns(Pair(V, noise((5, 4), 0, 0, "U")), A, B, 0.01)
    assert D.isfinite().all()
    assert D.any()
    zero(cosine_columns(Pair(0 * V, noise((5, 4), 0, 0, "U")), A, B, 0.01))
    zero(cosine_columns(Pair(V, noise((5, 4), 0, 0, "U")), A, 0 * B, 0.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_correction_by_columns_is_found_though_a_column_of_the_mean_is_zero(
    dtype: torch.dtype,
) -> None:
    """It has no cosine there, and must keep the others from theirs no more than a NaN."""
    b = noise((6, 1), 0, 0, "B").to(dtype)
    A, B = noise((2, 9), 0, 0, "A").to(dtype), torch.cat([b, b], 1)
    A[:, 4] = torch.tensor([1.0, -1.0])  # so that column 4 of B A is zero
    whole = Pair(noise((4, 9), 0, 0, "V").to(dtype), noise((6, 4), 0, 0, "U").to(dtype))
    D = cosine_columns(whole, A, B, 0.01).double()

    def loss(D: Tensor) -> Tensor:
        size = (D / (B @ A).norm()).square().sum()
        return 1 - mean_cosine((B.double() + D) @ A.double(), whole.delta().double()) + 0.01 * size

    assert D.isfinite().all()
    assert loss(D) < loss(0 * D) - 0.1


@pytest.mark.parametrize("mode", ["ridge", "cosine", "cosine-columns"])
def test_lora_fair_corrects_nothing_where_fedavg_is_exact(mode: str) -> None:
    strategy = LoRAFair(mode=mode)  # type: ignore[arg-type]
    played = last(strategy, EQUAL, 1)
    shared = played.uploads[0].sent.A
    uploads = [replace(u, sent=replace(u.sent, A=shared)) for u in played.uploads]
    after, plain = (s.aggregate(played.before, uploads, played.round) for s in (strategy, FedAvg()))
    for m in MODULES:
        zero(after.B[m] - plain.B[m], 1e-9)


# -- rolora and lora-a2 ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [RoLoRA(), LoRAA2()], ids=["rolora", "lora-a2"])
def test_one_factor_trains_and_travels_at_a_time_b_first(strategy: Any) -> None:
    for played in play(strategy, EQUAL, [ALL] * 4):
        moves, stays = ("B", "A") if played.round.number % 2 else ("A", "B")
        before, after = (strategy.effective(x).factors for x in (played.before, played.after))
        for m in MODULES:
            assert torch.equal(getattr(before, stays)[m], getattr(after, stays)[m])
            assert not torch.equal(getattr(before, moves)[m], getattr(after, moves)[m])
        for v in played.visits:
            assert v.sent_up[stays] == 0 < v.sent_up[moves]


def test_lora_a2_with_all_ranks_is_rolora() -> None:
    ours, theirs = last(LoRAA2(), EQUAL, 3), last(RoLoRA(), EQUAL, 3)
    for m in MODULES:
        zero(ours.after.factors.A[m] - theirs.after.A[m])
        zero(ours.after.factors.B[m] - theirs.after.B[m])


def test_lora_a2_tries_every_rank_and_then_takes_those_that_move_most() -> None:
    clients, m = make_clients([2, 6]), SQUARE
    tried: set[int] = set()
    for played in play(LoRAA2(choice="server"), clients, [(0, 1)] * 5):
        I = selection(played.before, clients[0], played.round, m).tolist()
        scores = played.before.scores.get(0, {}).get(m)
        if len(tried) < 6:
            assert not tried & set(I)
        else:
            assert sorted(I) == sorted(scores.topk(2).indices.tolist())
        tried |= set(I)
    assert tried == set(range(6))


def test_a_lora_a2_score_is_the_norm_of_what_the_rank_changed() -> None:
    *_, played = play(LoRAA2(choice="server"), make_clients([2, 6]), [(0, 1)] * 2)
    u, m = played.uploads[0], SQUARE
    whole = played.before.factors.adapter()[m]
    for j, row in zip(
        selection(played.before, u.client, played.round, m), u.sent.A[m], strict=True
    ):
        moved = whole.scale * torch.outer(whole.B[:, j], row - whole.A[j])
        assert_close(played.after.scores[0][m][j].double(), moved.norm(), rtol=1e-6, atol=1e-9)


def by_hand(state: Any, client: Client, round: Round, trained: Factors) -> dict[str, list[int]]:
    """The paper's choice in plain NumPy: every rank's part of dW, the largest over all modules."""
    scores = []
    for m, layer in client.layers.items():
        A, B, s = (getattr(state.factors, x)[m] for x in ("A", "B", "scale"))
        for j in range(len(A)):
            before = s * np.outer(B[:, j].numpy(), A[j].numpy())
            if round.number % 2:
                after = s * np.outer(trained.B[m][:, j].numpy(), A[j].numpy())
            else:
                after = s * np.outer(B[:, j].numpy(), trained.A[m][j].numpy())
            scores.append((-np.linalg.norm(after - before), m, j))
        del layer
    budget = sum(x.rank for x in client.layers.values())
    found: dict[str, list[int]] = {}
    for _, m, j in sorted(scores)[:budget]:
        found.setdefault(m, []).append(j)
    return {m: sorted(js) for m, js in found.items()}


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_lora_a2_client_sends_what_the_papers_score_chooses_over_all_modules(
    rounds: int,
) -> None:
    """Its upload is the update of all ranks, masked."""
    strategy, clients = LoRAA2(), make_clients([2, 6])
    *_, played = play(strategy, clients, [(0, 1)] * rounds)
    narrow, state = clients[0], played.before
    download = strategy.download(state, narrow, played.round)
    trained = perturb(download.send, download, narrow, played.round)
    want = by_hand(state, narrow, played.round, trained)
    column = "B" if played.round.number % 2 else "A"
    u = played.uploads[0]
    for m in MODULES:
        old = getattr(state.factors, column)[m].numpy()
        new, sent = (getattr(x, column)[m].numpy() for x in (trained, u.sent))
        mask = np.isin(np.arange(len(state.factors.A[m])), want.get(m, []))
        mask = mask[None, :] if column == "B" else mask[:, None]
        zero(torch.from_numpy(sent - np.where(mask, new, old)))
    assert played.visits[0].sent_up[column] < played.visits[1].sent_up[column]


def test_lora_a2s_choice_spends_a_clients_ranks_where_they_move_most() -> None:
    """The counterexample to a fixed number a module: all of the budget can go to one."""
    start = make_start(make_clients([6]))
    begun = start.factors
    grown = {m: B + (1.0 if m == SQUARE else 1e-3) for m, B in begun.B.items()}
    ranks = dict(zip(MODULES, (2, 1, 1), strict=True))
    layers = {m: replace(x, rank=ranks[m]) for m, x in start.clients[0].layers.items()}
    client = replace(start.clients[0], layers=layers)
    chosen = LoRAA2().choose(begun, replace(begun, B=grown), client, Round(1, 0))
    assert {m: len(x) for m, x in chosen.items()} == {SQUARE: 4}


def test_a_rank_that_lora_a2_met_while_its_b_was_zero_is_met_again() -> None:
    """In a round that trains A it cannot move; a score of 0 for that would end it for good."""
    clients, m = make_clients([2, 6])[:1], SQUARE
    for choice, again in (("server", True), ("server-0.1", False)):
        strategy = LoRAA2(choice=choice)
        start = make_start(make_clients([2, 6]))
        state = strategy.init(start)
        met: list[set[int]] = []
        for number in range(1, 9):
            round = Round(number, SEED)
            (v,) = [visit(strategy, state, clients[0], Site(), round)]
            met.append(set(strategy._mine(state, clients[0], round, m).tolist()))
            state = strategy.aggregate(state, [v.upload], round)
        moving = [x for number, x in enumerate(met, start=1) if number % 2]
        assert (set().union(*moving) == set(range(6))) == again, choice


# -- fedsvd ------------------------------------------------------------------------------------


def test_fedsvd_refactors_without_moving_the_model_and_leaves_a_orthonormal() -> None:
    strategy = FedSVD()
    played = last(strategy, EQUAL)
    again = strategy.aggregate(played.after, [], Round(3, SEED))
    for m in MODULES:
        zero(again.adapter()[m].delta() - played.after.adapter()[m].delta())
        A = played.after.A[m]
        zero(A @ A.T - torch.eye(len(A), dtype=A.dtype))
        S = played.after.B[m].norm(dim=0)
        assert torch.equal(S, S.sort(descending=True).values)  # the leading ranks are the strongest


def test_fedsvd_never_leaves_the_rows_of_the_first_a() -> None:
    A0 = make_start(EQUAL).factors.A
    played = last(FedSVD(), EQUAL, 3)
    for m in MODULES:
        onto = torch.linalg.pinv(A0[m]) @ A0[m]
        zero(played.after.A[m] - played.after.A[m] @ onto)


# -- fed-plora ---------------------------------------------------------------------------------


def test_a_fed_plora_client_starts_from_the_whole_model_at_one_scale() -> None:
    strategy = FedPLoRA()
    for played in play(strategy, MIXED, [ALL, ALL]):
        whole = model_change(strategy.effective(played.before))
        for v in played.visits:
            assert v.upload.sent.scale.items() <= played.before.scale.items()
            for m in v.upload.client.layers:
                zero(v.start_model[m] - whole[m])


def test_fed_plora_averages_a_rank_over_the_clients_that_trained_it() -> None:
    played = last(FedPLoRA(), MIXED)
    m = SQUARE
    drawn = {
        u: plora_selection(played.before, u.client, played.round, m).tolist()
        for u in played.uploads
    }
    for j in range(len(played.before.A[m])):
        held = [u for u, I in drawn.items() if j in I]
        rows = [u.sent.A[m][drawn[u].index(j)] for u in held]
        want = sum((p * row for p, row in zip(shares(held), rows, strict=True)), torch.zeros(()))
        zero(played.after.A[m][j] - (want if held else played.before.A[m][j]))


def test_fed_plora_with_all_ranks_is_fedavg() -> None:
    ours, theirs = last(FedPLoRA(), EQUAL), last(FedAvg(), EQUAL)
    for m in MODULES:
        zero(ours.after.A[m] - theirs.after.A[m])
        zero(ours.after.B[m] - theirs.after.B[m])


# -- frlora ------------------------------------------------------------------------------------


def test_frlora_begins_as_w0_with_its_principal_part_in_the_adapter() -> None:
    start = make_start(EQUAL)
    state = FRLoRA().init(start)
    change = model_change(FRLoRA().effective(state))
    for m, W0 in start.weights.items():
        zero(change[m], 1e-10)
        U, S, Vh = torch.linalg.svd(W0)
        r = EQUAL[0].layers[m].rank
        zero(state.factors.adapter()[m].delta() - (U[:, :r] * S[:r]) @ Vh[:r], 1e-10)


def test_frlora_adds_each_rounds_change_to_the_base_and_starts_again() -> None:
    strategy, first = FRLoRA(), FRLoRA().init(make_start(EQUAL)).factors
    for played in play(strategy, EQUAL, [ALL, ALL]):
        plain = FedAvg().aggregate(played.before.factors, played.uploads, played.round)
        old, new = (model_change(strategy.effective(x)) for x in (played.before, played.after))
        for m in MODULES:
            step = plain.adapter()[m].delta() - first.adapter()[m].delta()
            zero(new[m] - old[m] - step, 1e-10)
            assert torch.equal(played.after.factors.A[m], first.A[m])
            assert torch.equal(played.after.factors.B[m], first.B[m])


def test_frlora_is_not_bound_to_one_adapters_rank() -> None:
    played = last(FRLoRA(), EQUAL, 3)
    r = EQUAL[0].layers[SQUARE].rank
    change = model_change(FRLoRA().effective(played.after))[SQUARE]
    assert torch.linalg.matrix_rank(change, atol=1e-8, rtol=0) > 2 * r


def test_frlora_takes_the_principal_part_out_of_the_base_once() -> None:
    state = FRLoRA().init(make_start(EQUAL))
    (taken,) = state.base.versions
    for m, change in base_change([taken]).items():
        zero(change + state.factors.adapter()[m].delta())


def test_fedsvd_with_a_frozen_head_leaves_it_as_it_was() -> None:
    frozen, trained = FedSVD(head="frozen"), FedSVD()
    for strategy, still in ((frozen, True), (trained, False)):
        played = last(strategy, EQUAL)
        first = make_start(EQUAL).factors.other
        same = [torch.equal(first[name], x) for name, x in played.after.other.items()]
        assert same
        assert all(x == still for x in same)
        assert all(bool(u.sent.other) != still for u in played.uploads)


# -- ravan -------------------------------------------------------------------------------------


CHOICES = ("random", "weight", "leading")


def heads_by_hand(strategy: Ravan, played: Played, m: str) -> Any:
    """Each head's mean over the clients that trained it, in plain NumPy."""
    old = played.before.R[m].numpy()
    total, weight = np.zeros_like(old), np.zeros(len(old))
    for u in played.uploads:
        mine = strategy.chosen(played.before, u.client, played.round, m).tolist()
        ratio = u.sent.scale[m] / played.before.scale[m]
        for j, H in zip(mine, u.sent.R[m].numpy(), strict=True):
            total[j] += u.num_examples * ratio * H
            weight[j] += u.num_examples
    there = weight > 0
    return np.where(there[:, None, None], total / np.where(there, weight, 1)[:, None, None], old)


@pytest.mark.parametrize("choice", CHOICES)
def test_ravans_mean_of_a_head_is_over_the_clients_that_trained_it(choice: Any) -> None:
    strategy = Ravan(choice=choice, average="trained")
    *_, played = play(strategy, EVEN_MIXED, [ALL, ALL, (0, 1)])
    for m in MODULES:
        want = heads_by_hand(strategy, played, m)
        zero(played.after.R[m] - torch.from_numpy(want))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("average", ["all", "trained"])
def test_ravan_is_exact_however_heads_are_chosen_unless_its_mean_is_the_papers(
    choice: Any, average: Any
) -> None:
    strategy = Ravan(choice=choice, average=average)
    gaps = [deviation(strategy, x) for x in play(strategy, EVEN_MIXED, [ALL, (0, 1), ALL])]
    assert (max(gaps) < 1e-12) == (average == "all") == (strategy.promise == "exact")
    assert max(deviation(strategy, x) for x in play(strategy, EVEN, [ALL, (0, 1)])) < 1e-12


def test_a_narrow_ravan_client_gets_to_train_every_head_but_by_the_leading_choice() -> None:
    client = min(EVEN_MIXED, key=lambda c: c.layers[SQUARE].rank)
    met: dict[str, set[int]] = {choice: set() for choice in CHOICES}
    for choice in CHOICES:
        strategy = Ravan(choice=choice)
        for played in play(strategy, EVEN_MIXED, [ALL] * 12):
            mine = strategy.chosen(played.before, client, played.round, SQUARE)
            assert len(mine) == client.layers[SQUARE].rank // 4
            met[choice] |= set(mine.tolist())
    every = set(range(len(played.after.R[SQUARE])))
    assert met["random"] == every > met["leading"]


def test_ravan_by_weight_takes_the_largest_heads() -> None:
    strategy = Ravan(choice="weight")
    played = last(strategy, EVEN_MIXED)
    client = min(EVEN_MIXED, key=lambda c: c.layers[SQUARE].rank)
    sizes = np.linalg.norm(played.after.R[SQUARE].numpy().reshape(-1, 16), axis=1)
    mine = strategy.chosen(played.after, client, Round(3, SEED), SQUARE).tolist()
    assert mine == sorted(np.argsort(-sizes)[: len(mine)].tolist())


@pytest.mark.parametrize("clients", [EVEN, EVEN_MIXED], ids=["even", "mixed"])
def test_ravan_is_a_sum_of_heads_between_orthonormal_bases(clients: list) -> None:
    b, played = 4, last(Ravan(), clients)
    for m, pair in Ravan().effective(played.after).factors.adapter().items():
        A, B, H, s = (getattr(played.after, x)[m] for x in ("A", "B", "R", "scale"))
        parts = [s * B[:, j * b : j * b + b] @ H[j] @ A[j * b : j * b + b] for j in range(len(H))]
        zero(pair.delta() - sum(parts))
        zero(A @ A.T - torch.eye(len(A), dtype=A.dtype), 1e-5)
        zero(B.T @ B - torch.eye(len(A), dtype=A.dtype), 1e-5)


def test_ravan_reaches_a_rank_that_fed_sb_would_pay_more_for() -> None:
    played = last(Ravan(), EVEN)
    m, r = "layers.1.down", 12
    rank = torch.linalg.matrix_rank(model_change(Ravan().effective(played.after))[m])
    sent = played.uploads[0].sent.R[m].numel()
    assert rank == r
    assert sent == r * 4 < r * r


def test_a_core_trained_outside_of_its_heads_is_not_sent_as_if_it_were_whole() -> None:
    R = {SQUARE: torch.ones(8, 8)}
    with pytest.raises(StrategyError, match="trained outside of its blocks"):
        Ravan().upload(Factors({SQUARE: 1.0}, R=R), Factors())


def test_spread_and_heads_are_each_others_inverse() -> None:
    H = noise((3, 4, 4), 0, 0, "H")
    assert torch.equal(heads(spread(H), 4), H)
    assert torch.equal(spread(H), torch.block_diag(*H))


def test_ravan_refuses_ranks_that_are_not_whole_heads() -> None:
    (problem,) = Ravan().problems(EQUAL)
    assert "head-rank = 4: must divide every client's rank, and they have [3, 4, 5]" in problem
    assert not list(Ravan().problems(EVEN_MIXED))


def test_the_stack_of_no_pairs_weights_is_their_sum() -> None:
    x = Pair(noise((2, 7), 0, 0, "A"), noise((5, 2), 0, 0, "B"), 3.0)
    zero(stack([x, x]).delta() - 2 * x.delta())
