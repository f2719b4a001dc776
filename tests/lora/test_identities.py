"""Each algorithm against its own equations and against PEFT, in float64."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.lora.adapter import Adapter, Factors, Pair, dense
from fedlora.lora.lowrank import compress, norm, stack
from fedlora.strategies.base import Round, shares
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex import FedEx
from fedlora.strategies.fedsa import FedSA
from fedlora.strategies.fedsb import FedSB
from fedlora.strategies.ffa import FFA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.fslora import FSLoRA, sketch
from tests.support.strategy_federation import (
    EQUAL,
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
    play,
    visit,
)

ALL = (0, 1, 2, 3)


def last(strategy: object, clients: Sequence, rounds: int = 2) -> Played:
    *_, played = play(strategy, clients, [ALL] * rounds)
    return played


def zero(x: Tensor) -> None:
    assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-11)


# -- fedavg ------------------------------------------------------------------------------------


def test_fedavg_errs_by_the_covariance_of_the_factors() -> None:
    played = last(FedAvg(), RESCALED)
    p = shares(played.uploads)
    for m in MODULES:
        pairs = [u.sent.adapter()[m] for u in played.uploads]
        s = played.after.scale[m]
        B = [x.B * x.scale / s for x in pairs]
        A_mean = sum(w * x.A for w, x in zip(p, pairs, strict=True))
        B_mean = sum(w * b for w, b in zip(p, B, strict=True))
        true = sum(w * x.delta() for w, x in zip(p, pairs, strict=True))
        covariance = s * sum(
            w * (b - B_mean) @ (x.A - A_mean) for w, b, x in zip(p, B, pairs, strict=True)
        )
        zero(true - played.after.adapter()[m].delta() - covariance)


def test_fedavg_is_not_exact() -> None:
    """The counterexample that gives the other strategies their reason."""
    assert deviation(FedAvg(), last(FedAvg(), EQUAL, rounds=1)) > 0.1


def test_fedavg_is_exact_where_the_clients_share_one_a() -> None:
    played = last(FedAvg(), EQUAL)
    shared = played.uploads[0].sent.A
    uploads = [replace(u, sent=replace(u.sent, A=shared)) for u in played.uploads]
    after = FedAvg().aggregate(played.before, uploads, played.round)
    visits = [replace(v, upload=u) for v, u in zip(played.visits, uploads, strict=True)]
    assert deviation(FedAvg(), Played(played.round, played.before, visits, after)) < 1e-12


# -- fedex -------------------------------------------------------------------------------------


def test_fedex_leaves_the_residual_of_the_mean_in_the_base() -> None:
    played = last(FedEx(), EQUAL, rounds=1)
    p = shares(played.uploads)
    (version,) = played.after.base.versions
    for m, missed in version.delta.items():
        true = sum(w * u.sent.adapter()[m].delta() for w, u in zip(p, played.uploads, strict=True))
        zero(dense(missed) + played.after.factors.adapter()[m].delta() - true)
        assert missed.rank == 3 * EQUAL[0].layers[m].rank  # (m - 1) r


@pytest.mark.parametrize("rank", [1, 4])
def test_truncated_fedex_errs_by_the_singular_values_it_cuts(rank: int) -> None:
    whole, cut = (last(s, EQUAL, rounds=1) for s in (FedEx(), FedEx(rank=rank)))
    for m in MODULES:
        exact, near = (base_change(x.after.base.versions)[m] for x in (whole, cut))
        dropped = torch.linalg.svdvals(exact)[rank:].norm()
        assert_close((exact - near).norm(), dropped, rtol=1e-9, atol=0)


def test_fedex_cut_at_a_rank_above_its_residual_is_exact() -> None:
    assert deviation(FedEx(rank=999), last(FedEx(rank=999), EQUAL)) < 1e-12
    assert FedEx(rank=999).promise == "approximate"
    assert deviation(FedEx(rank=2), last(FedEx(rank=2), EQUAL)) > 1e-3


def test_fedex_of_one_client_leaves_the_base_alone() -> None:
    *_, played = play(FedEx(), EQUAL, [(2,)])
    assert played.after.base.versions == ()


def test_fedex_and_flora_agree_on_the_model_of_the_same_updates() -> None:
    stacked = last(FLoRA(), EQUAL, rounds=1)
    ex = FedEx()
    state = ex.init(make_start(EQUAL))
    after = ex.aggregate(state, stacked.uploads, stacked.round)
    left, right = (model_change(x) for x in (ex.effective(after), FLoRA().effective(stacked.after)))
    for m in MODULES:
        zero(left[m] - right[m])


def test_a_narrow_fedex_client_is_completed_with_what_it_folded_in() -> None:
    played = last(FedEx(), MIXED)
    narrow = played.visits[0]
    for m, complete in FedEx().trained(played.before, narrow.upload, played.round).items():
        own = narrow.upload.sent.adapter()[m]
        whole = played.before.factors.adapter()[m]
        rest = Pair(whole.A[own.rank :], whole.B[:, own.rank :], whole.scale)
        zero(complete.delta() - own.delta() - rest.delta())
        assert complete.rank == whole.rank > own.rank


def test_a_narrow_fold_never_enters_the_shared_base() -> None:
    sites: dict[int, Site] = {}
    *_, played = play(FedEx(), MIXED, [ALL, ALL], sites)
    assert played.visits[0].sent_down["fold"] > 0
    for m, total in base_change(played.before.base.versions).items():
        assert torch.equal(sites[0].base[m], total)


# -- flora -------------------------------------------------------------------------------------


def test_flora_is_the_cat_combination_of_peft() -> None:
    pairs = {m: [seeded_pair(m, i, r) for i, r in enumerate((2, 3, 5))] for m in MODULES}
    weights = [0.5, 0.2, 0.3]
    for m, delta in peft_combination(pairs, weights, combination_type="cat").items():
        zero(stack(pairs[m], weights).delta() - delta)


def test_compress_is_the_svd_combination_of_peft() -> None:
    pairs = {m: [seeded_pair(m, i, r) for i, r in enumerate((2, 3, 5))] for m in MODULES}
    weights = [0.5, 0.2, 0.3]
    combined = peft_combination(pairs, weights, combination_type="svd", svd_rank=4)
    for m, delta in combined.items():
        gap = compress(stack(pairs[m], weights), 4).delta() - delta
        assert gap.norm() < 1e-6 * delta.norm()  # PEFT takes its SVD in float32


def test_a_stack_whose_scales_are_not_folded_is_another_model() -> None:
    pairs = [seeded_pair(SQUARE, i, r) for i, r in enumerate((2, 3, 5))]
    unfolded = [Pair(x.A, x.B, 1.0) for x in pairs]
    exact, wrong = stack(pairs).delta(), stack(unfolded).delta()
    assert (exact - wrong).norm() > 0.1 * exact.norm()


def test_a_fresh_flora_adapter_adds_nothing_and_differs_by_client_and_round() -> None:
    drawn = []
    for i, number in ((0, 1), (1, 1), (0, 2)):
        download = FLoRA().download(FLoRA().init(make_start(EQUAL)), EQUAL[i], Round(number, SEED))
        loaded = FLoRA().start(download, Factors(), EQUAL[i], Round(number, SEED))
        assert all(not B.any() for B in loaded.B.values())
        drawn.append(loaded.A[SQUARE])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= MODULES[SQUARE][1] ** -0.5


def test_flora_keeping_a_goes_on_with_the_a_that_the_client_trained() -> None:
    strategy, site = FLoRA(reinit="keep-A"), Site()
    *_, played = play(strategy, EQUAL, [(0,)], {0: site})
    trained = played.uploads[0].sent.A
    again = visit(strategy, played.after, EQUAL[0], site, Round(2, SEED))
    for m, A in trained.items():
        moved = noise(A.shape, 0, 2, f"A/{m}")
        zero(again.upload.sent.A[m] - A - 0.1 * moved)


# -- ffa ---------------------------------------------------------------------------------------


def test_ffa_never_moves_a_and_sends_it_once() -> None:
    rounds = list(play(FFA(), MIXED, [ALL, ALL, ALL]))
    A0 = make_start(MIXED).factors.A
    for number, played in enumerate(rounds, start=1):
        assert all(torch.equal(played.after.A[m], A0[m]) for m in MODULES)
        for v in played.visits:
            assert (v.sent_down["A"] > 0) == (number == 1)
            assert v.sent_up["A"] == 0


# -- fedsa -------------------------------------------------------------------------------------


def test_fedsa_keeps_b_and_the_head_bit_for_bit_on_the_client() -> None:
    site = Site()
    *_, played = play(FedSA(), EQUAL, [ALL], {0: site})
    kept = site.kept
    assert {c for c, n in played.visits[0].sent_up.items() if n} == {"A"}
    client = replace(EQUAL[0], has_memory=True)
    there = FedSA().download(played.after, client, Round(2, SEED))
    assert not there.send.B
    assert not there.send.other
    loaded = FedSA().start(there, kept, client, Round(2, SEED))
    assert all(torch.equal(loaded.B[m], kept.B[m]) for m in MODULES)
    assert torch.equal(loaded.other["head.weight"], kept.other["head.weight"])
    assert all(torch.equal(loaded.A[m], played.after.A[m]) for m in MODULES)


def test_two_fedsa_clients_end_with_models_of_their_own() -> None:
    sites = {i: Site() for i in range(4)}
    list(play(FedSA(), EQUAL, [ALL, ALL], sites))
    assert (sites[0].kept.B[SQUARE] - sites[1].kept.B[SQUARE]).norm() > 0.1


@pytest.mark.parametrize("clients", [EQUAL, RESCALED, MIXED], ids=["equal", "rescaled", "mixed"])
def test_finished_fedsa_is_the_mean_of_the_clients_models(clients: list) -> None:
    sites = {i: Site() for i in range(4)}
    *_, played = play(FedSA(), clients, [ALL, ALL], sites)
    asked = [replace(u, sent=sites[u.client.id].kept) for u in played.uploads]
    finished = FedSA().effective(FedSA().finish(played.after, asked)).factors
    for m in MODULES:
        held = [u for u in asked if m in u.client.layers]
        models = [
            Pair(played.after.A[m][: u.client.layers[m].rank], u.sent.B[m], u.sent.scale[m])
            for u in held
        ]
        mean = sum(p * x.delta() for p, x in zip(shares(held), models, strict=True))
        zero(finished.adapter()[m].delta() - mean)
    head = sum(p * u.sent.other["head.weight"] for p, u in zip(shares(asked), asked, strict=True))
    zero(finished.other["head.weight"] - head)


def test_unfinished_fedsa_is_a_alone() -> None:
    played = last(FedSA(), EQUAL)
    assert all(not B.any() for B in FedSA().effective(played.after).factors.B.values())


# -- fedsb -------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_from", ["orthogonal", "svd-w0"])
def test_fedsb_starts_from_w0_with_orthonormal_bases(init_from: str) -> None:
    state = FedSB(init_from=init_from).init(make_start(EQUAL))  # type: ignore[arg-type]
    for m in MODULES:
        eye = torch.eye(EQUAL[0].layers[m].rank, dtype=torch.float64)
        assert_close(state.A[m] @ state.A[m].T, eye, rtol=0, atol=1e-5)
        assert_close(state.B[m].T @ state.B[m], eye, rtol=0, atol=1e-5)
        assert not state.R[m].any()


def test_fedsb_svd_w0_spans_the_leading_directions_of_w0() -> None:
    start = make_start(EQUAL)
    state = FedSB(init_from="svd-w0").init(start)
    for m, W0 in start.weights.items():
        r = EQUAL[0].layers[m].rank
        core = state.B[m].T @ W0 @ state.A[m].T
        zero(core - torch.linalg.svdvals(W0)[:r].diag())


@pytest.mark.parametrize("sketch_rank", [2, 9])
def test_fedsb_update_approx_starts_one_step_from_w0(sketch_rank: int) -> None:
    strategy = FedSB(init_from="update-approx", eta=0.03)
    assert strategy.needs().first_gradient == "pooled"
    assert not FedSB().needs().first_gradient
    state = strategy.init(make_start(EQUAL))
    gradient: Adapter = {m: seeded_pair(m, 5, sketch_rank) for m in MODULES}
    begun = strategy.from_gradient(state, gradient)
    for m in MODULES:
        r = EQUAL[0].layers[m].rank
        step = compress(Pair(gradient[m].A, -0.03 * gradient[m].B, gradient[m].scale), r)
        zero(begun.adapter()[m].delta() - step.delta())
        eye = torch.eye(r, dtype=torch.float64)
        assert_close(begun.A[m] @ begun.A[m].T, eye, rtol=0, atol=1e-6)
        assert_close(begun.B[m].T @ begun.B[m], eye, rtol=0, atol=1e-6)


def of_ones(d: int, k: int) -> Tensor:
    return torch.ones(d, k, dtype=torch.float64)


def of_zeros(d: int, k: int) -> Tensor:
    return torch.zeros(d, k, dtype=torch.float64)


def of_one_row(d: int, k: int) -> Tensor:
    return torch.cat([torch.ones(1, k, dtype=torch.float64), of_zeros(d - 1, k)])


@pytest.mark.parametrize("init_from", ["update-approx", "svd-w0"])
@pytest.mark.parametrize(("made", "rank"), [(of_zeros, 0), (of_ones, 1), (of_one_row, 1)])
def test_a_direction_that_fedsbs_matrix_lacks_is_a_drawn_one_and_no_coordinate_axis(
    made: Callable[[int, int], Tensor], rank: int, init_from: Any
) -> None:
    """An SVD gives a zero matrix coordinate axes: one number in each row of A would then train."""
    whole = make_start(EQUAL)
    matrix = made(*MODULES[SQUARE])
    start = replace(whole, weights={**whole.weights, SQUARE: matrix})
    strategy = FedSB(init_from=init_from)
    state = strategy.init(start)
    if init_from == "update-approx":
        U, S, Vh = torch.linalg.svd(matrix)
        state = strategy.from_gradient(state, {SQUARE: Pair(Vh[:9], U[:, :9] * S[:9])})
    A, B, R = state.A[SQUARE], state.B[SQUARE], state.R[SQUARE]
    eye = torch.eye(len(A), dtype=torch.float64)
    assert_close(A @ A.T, eye, rtol=0, atol=1e-5)
    assert_close(B.T @ B, eye, rtol=0, atol=1e-5)
    assert int((A[rank:].abs() > 1e-3).sum(1).min()) > MODULES[SQUARE][1] / 2
    assert int((B[:, rank:].abs() > 1e-3).sum(0).min()) > MODULES[SQUARE][0] / 2
    assert int((R != 0).sum()) == (rank if init_from == "update-approx" else 0)
    sign = -1 if init_from == "update-approx" else 1  # a step goes down the gradient
    zero(sign * (B[:, :rank] * matrix.norm()) @ A[:rank] - matrix)


def test_fedsb_never_moves_its_bases_and_sends_them_once() -> None:
    rounds = list(play(FedSB(), RESCALED, [ALL, ALL]))
    for number, played in enumerate(rounds, start=1):
        for m in MODULES:
            assert torch.equal(played.after.A[m], played.before.A[m])
            assert torch.equal(played.after.B[m], played.before.B[m])
        for v in played.visits:
            assert (v.sent_down["A"] + v.sent_down["B"] > 0) == (number == 1)


# -- fslora ------------------------------------------------------------------------------------


def test_fslora_sketches_are_unbiased() -> None:
    r, k_i, s = 5, 2, 1.7
    A, B = noise((r, 7), 0, 0, "A"), noise((9, r), 0, 0, "B")
    subsets = list(itertools.combinations(range(r), k_i))
    sketched = [Pair(A[list(I)], B[:, list(I)], s * r / k_i).delta() for I in subsets]
    zero(sum(sketched) / len(subsets) - s * B @ A)


def test_a_sketchs_variance_falls_with_the_rank_as_the_theory_says() -> None:
    """Over all sets: (r / k - 1) (r sum_j |X_j|^2 - |X|^2) / (r - 1), X_j what rank j makes."""
    r, s = 5, 1.7
    A, B = noise((r, 7), 0, 0, "A"), noise((9, r), 0, 0, "B")
    whole = s * B @ A
    each = sum(float((s * torch.outer(B[:, j], A[j])).square().sum()) for j in range(r))
    met = []
    for k_i in range(1, r + 1):
        subsets = list(itertools.combinations(range(r), k_i))
        gaps = [Pair(A[list(I)], B[:, list(I)], s * r / k_i).delta() - whole for I in subsets]
        met.append(sum(float(x.square().sum()) for x in gaps) / len(subsets))
        want = (r / k_i - 1) * (r * each - float(whole.square().sum())) / (r - 1)
        assert met[-1] == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert met == sorted(met, reverse=True)
    assert met[-1] < 1e-9


def test_an_fslora_client_trains_the_sketched_model_and_its_gradients() -> None:
    state = FSLoRA().init(make_start(MIXED))
    round, client, m = Round(1, SEED), MIXED[0], SQUARE
    state = Factors(state.scale, state.A, {n: noise(B.shape, 0, 0, n) for n, B in state.B.items()})
    sent = FSLoRA().download(state, client, round).send
    I, r = sketch(state, client, round, m), state.A[m].shape[0]
    S = torch.zeros(r, dtype=torch.float64)
    S[I] = r / len(I)
    A, B = state.A[m].clone().requires_grad_(), state.B[m].clone().requires_grad_()
    a, b = sent.A[m].clone().requires_grad_(), sent.B[m].clone().requires_grad_()
    weights = noise((B.shape[0], A.shape[1]), 0, 0, "loss")
    whole = (weights * (state.scale[m] * (B * S) @ A)).sum()
    slice_ = (weights * Pair(a, b, sent.scale[m]).delta()).sum()
    zero(whole - slice_)
    whole.backward()
    slice_.backward()
    zero(A.grad[I] - a.grad)
    zero(B.grad[:, I] - b.grad)


@pytest.mark.parametrize("normalize", ["none", "hits"])
def test_fslora_leaves_undrawn_ranks_bit_for_bit(normalize: str) -> None:
    strategy = FSLoRA(normalize=normalize)  # type: ignore[arg-type]
    clients = make_clients([2, 6, 3, 2])
    for played in play(strategy, clients, [(0, 3), (0, 2)]):
        for m in MODULES:
            r = played.before.A[m].shape[0]
            drawn = [sketch(played.before, u.client, played.round, m) for u in played.uploads]
            untouched = sorted(set(range(r)) - set(torch.cat(drawn).tolist()))
            assert untouched
            assert torch.equal(played.after.A[m][untouched], played.before.A[m][untouched])
            assert torch.equal(played.after.B[m][:, untouched], played.before.B[m][:, untouched])


def test_fslora_adds_the_weighted_changes_of_its_slices() -> None:
    played = last(FSLoRA(), MIXED, rounds=1)
    m = SQUARE
    A = played.before.A[m].clone()
    for p, u in zip(shares(played.uploads), played.uploads, strict=True):
        I = sketch(played.before, u.client, played.round, m)
        A[I] += p * (u.sent.A[m] - played.before.A[m][I])
    zero(played.after.A[m] - A)


def test_fslora_hits_moves_a_rank_that_one_client_drew_all_the_way() -> None:
    played = last(FSLoRA(normalize="hits"), MIXED, rounds=1)
    m = SQUARE
    drawn = {u: sketch(played.before, u.client, played.round, m) for u in played.uploads}
    for j in range(played.before.A[m].shape[0]):
        held = [u for u, I in drawn.items() if j in I]
        rows = [u.sent.A[m][drawn[u].tolist().index(j)] for u in held]
        want = sum(p * row for p, row in zip(shares(held), rows, strict=True))
        zero(played.after.A[m][j] - (want if held else played.before.A[m][j]))


@pytest.mark.parametrize("normalize", ["none", "hits"])
def test_fslora_at_full_rank_is_fedavg(normalize: str) -> None:
    strategy = FSLoRA(normalize=normalize)  # type: ignore[arg-type]
    for ours, theirs in zip(
        play(strategy, EQUAL, [ALL, ALL]), play(FedAvg(), EQUAL, [ALL, ALL]), strict=True
    ):
        for m in MODULES:
            zero(ours.after.A[m] - theirs.after.A[m])
            zero(ours.after.B[m] - theirs.after.B[m])


# -- the pieces --------------------------------------------------------------------------------


def seeded_pair(m: str, i: int, rank: int) -> Pair:
    d, k = MODULES[m]
    return Pair(
        noise((rank, k), i, rank, f"A/{m}"), noise((d, rank), i, rank, f"B/{m}"), (i + 3) / rank
    )


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named = {m: m.replace(".", "_") for m in MODULES}
        for m, (d, k) in MODULES.items():
            self.add_module(self.named[m], nn.Linear(k, d, bias=False, dtype=torch.float64))


def peft_combination(
    pairs: dict[str, list[Pair]], weights: list[float], **options: object
) -> dict[str, Tensor]:
    """What PEFT's own add_weighted_adapter makes of the same adapters, dense, by module."""
    base = Base()
    model = None
    for i, first in enumerate(pairs[SQUARE]):
        config = LoraConfig(
            r=first.rank,
            lora_alpha=first.scale * first.rank,
            target_modules=list(base.named.values()),
        )
        if model is None:
            model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config)
    layers = {m: model.base_model.model.get_submodule(base.named[m]) for m in MODULES}
    for m, layer in layers.items():
        for i, p in enumerate(pairs[m]):
            layer.lora_A[str(i)].weight.data = p.A.clone()
            layer.lora_B[str(i)].weight.data = p.B.clone()
    names = [str(i) for i in range(len(weights))]
    model.add_weighted_adapter(names, weights, "combined", **options)
    return {m: layer.get_delta_weight("combined").detach() for m, layer in layers.items()}


def test_norm_through_r_by_r_products_is_the_dense_norm() -> None:
    x = seeded_pair(SQUARE, 0, 4)
    zero(norm(x) - x.delta().norm())
