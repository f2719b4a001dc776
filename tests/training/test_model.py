"""The model in memory: bases that move and come back bit for bit, adapters at their own scales."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.federation.server.proof import WEIGHTS
from fedlora.lora.adapter import Factors, Pair, clone, dense
from fedlora.lora.lowrank import accumulate
from fedlora.strategies.base import Client, Version, seeded
from fedlora.strategies.base_log import BaseLog
from fedlora.training.model import loftq
from fedlora.training.model.layers import taken_out
from fedlora.training.model.loading import PREFIX
from fedlora.training.model.model import Model

Settings = Callable[..., dict[str, object]]
MODELS = ("bert", "gpt2", "llama")


def build(settings: Settings, kind: str, **changes: object) -> Model:
    return Model(Config.read(settings(kind, **changes)), ("x", "y", "z") if kind == "bert" else ())


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def pairs(model: Model, r: int, seed: int) -> dict[str, Pair]:
    return {
        m: Pair(drawn(r, s.k, seed=seed), drawn(s.d, r, seed=seed + 1), 1 / (seed + 2))
        for m, s in model.shapes.items()
    }


def factors(model: Model, ranks: int, seed: int, core: bool = False) -> Factors:
    own = pairs(model, ranks, seed)
    live = model.trainable(frozenset({"other"})).get("other", {})
    head = {n: drawn(*x.shape, seed=seed) for n, x in live.items()}
    return Factors(
        {m: p.scale for m, p in own.items()},
        {m: p.A for m, p in own.items()},
        {m: p.B for m, p in own.items()},
        {m: drawn(ranks, ranks, seed=seed + 2) for m in own} if core else {},
        head,
    )


def base_bits(model: Model) -> dict[str, Tensor]:
    return {
        m: model.peft.get_submodule(PREFIX + m).get_base_layer().weight.detach().clone()
        for m in model.shapes
    }


def assert_bits(x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    assert x.keys() == y.keys()
    for m in x:
        assert torch.equal(x[m], y[m]), m


def versions(model: Model, n: int) -> list[Version]:
    return [Version(i, pairs(model, 1 + i % 3, 10 * i)) for i in range(1, n + 1)]


@pytest.mark.parametrize("kind", MODELS)
def test_the_layers_found_are_not_all_square(settings: Settings, kind: str) -> None:
    """Or a transposed weight would pass every test here."""
    shapes = build(settings, kind).shapes.values()
    assert any(s.d != s.k for s in shapes)
    assert all(s.fan_in_fan_out == (kind == "gpt2") for s in shapes)


@pytest.mark.parametrize("kind", MODELS)
def test_w0_is_given_as_d_by_k_and_stays_w0_when_the_base_moves(
    settings: Settings, kind: str
) -> None:
    model = build(settings, kind)
    before = {m: W.clone() for m, W in model.weights().items()}
    assert {m: tuple(W.shape) for m, W in before.items()} == {
        m: (s.d, s.k) for m, s in model.shapes.items()
    }
    model.rebase("run", versions(model, 2))
    assert_bits(before, model.weights())


@pytest.mark.parametrize("kind", MODELS)
def test_a_fold_is_gone_to_the_last_bit_when_it_is_over(settings: Settings, kind: str) -> None:
    model = build(settings, kind)
    model.rebase("run", versions(model, 2))
    before = base_bits(model)
    with model.folded(pairs(model, 2, 99)):
        assert not any(torch.equal(x, before[m]) for m, x in base_bits(model).items())
    assert_bits(base_bits(model), before)
    with pytest.raises(RuntimeError, match="training failed"), model.folded(pairs(model, 2, 98)):
        raise RuntimeError("training failed")
    assert_bits(base_bits(model), before)


def test_a_fold_that_does_not_fit_leaves_nothing_behind(settings: Settings) -> None:
    model = build(settings, "gpt2")
    before = base_bits(model)
    bad = pairs(model, 2, 99)
    last = list(bad)[-1]
    bad[last] = Pair(drawn(2, 3), drawn(4, 2))
    with pytest.raises(ModelError, match="must be"), model.folded(bad):
        pass
    assert_bits(base_bits(model), before)


@pytest.mark.parametrize("kind", MODELS)
def test_step_by_step_or_at_once_the_base_has_the_same_bits(settings: Settings, kind: str) -> None:
    log = versions(build(settings, kind), 5)
    stepwise, at_once, returned = (build(settings, kind) for _ in range(3))
    for n in range(1, 6):
        stepwise.rebase("run", log[:n])
    at_once.rebase("run", log)
    returned.rebase("another run", versions(returned, 3)[::-1][:1])
    returned.rebase("run", log)
    returned.rebase("run", log[:2])  # back, as a resumed server is
    returned.rebase("run", log)
    assert_bits(base_bits(stepwise), base_bits(at_once))
    assert_bits(base_bits(stepwise), base_bits(returned))
    stepwise.rebase("run", [])
    assert_bits(base_bits(stepwise), base_bits(build(settings, kind)))


def three_ways(settings: Settings, **changes: object) -> list[Model]:
    """Models that were there in every round, in the 3rd and the last, and in the last alone."""
    steady, away, joining = (build(settings, "gpt2", **changes) for _ in range(3))
    log, seen = BaseLog(), []
    for n in range(1, 31):
        log = log.add(pairs(steady, 2, n))
        seen += log.since(n - 1)
        steady.rebase("run", seen)
        if n in (3, 30):
            away.rebase("run", [*seen[:3], *log.since(3)] if n == 30 else seen)
    joining.rebase("run", log.versions)
    assert any(v.snapshot for v in log.versions)
    return [steady, away, joining]


def test_a_snapshot_leads_to_the_bits_of_what_it_stands_for(settings: Settings) -> None:
    steady, away, joining = three_ways(settings)
    assert_bits(base_bits(steady), base_bits(away))
    assert_bits(base_bits(steady), base_bits(joining))


def test_a_rebase_that_failed_half_way_is_not_built_upon(settings: Settings) -> None:
    model = build(settings, "gpt2")
    log = versions(model, 3)
    bad = dict(log[1].delta)
    last = list(bad)[-1]
    bad[last] = torch.empty(*bad[last].shape, device="meta")  # of the right size, and no numbers
    with pytest.raises(RuntimeError):
        model.rebase("run", [log[0], Version(2, bad)])
    model.rebase("run", log)
    whole = build(settings, "gpt2")
    whole.rebase("run", log)
    assert_bits(base_bits(model), base_bits(whole))


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_computes_w0_and_all_that_was_added(
    settings: Settings, kind: str, core: bool
) -> None:
    model = build(settings, kind)
    log, fold, mine = versions(model, 2), pairs(model, 2, 50), factors(model, 3, 70, core)
    model.rebase("run", log)
    with model.folded(fold):
        model.load(mine)
        for m, s in model.shapes.items():
            W = model.weights()[m].double()
            for v in log:
                W = W + dense(v.delta[m]).double()
            p = fold[m]
            W = W + p.scale * p.B.double() @ p.A.double()
            R = mine.R[m].double() if core else torch.eye(3, dtype=torch.float64)
            W = W + mine.scale[m] * mine.B[m].double() @ R @ mine.A[m].double()
            x = drawn(4, s.k, seed=5)
            layer = model.peft.get_submodule(PREFIX + m)
            with torch.no_grad():
                got = layer(x[None])[0]
                bias = layer.get_base_layer().bias
            want = x.double() @ W.T + (0 if bias is None else bias.detach().double())
            gap = (got.double() - want).norm() / want.norm()
            assert gap < 1e-5, (m, float(gap))


@pytest.mark.parametrize(("rslora", "power"), [(False, 1.0), (True, 0.5)])
def test_the_scale_is_alpha_over_r_or_over_its_root(
    settings: Settings, rslora: bool, power: float
) -> None:
    model = build(settings, "bert", **{"lora.use-rslora": rslora, "lora.alpha": 6.0})
    m = next(iter(model.shapes))
    for r in (1, 3, 5):
        assert model.layers({m: r})[m].scale == pytest.approx(6.0 / r**power)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_loaded_is_read_back(settings: Settings, kind: str) -> None:
    model = build(settings, kind)
    for ranks, core in ((3, False), (2, True), (3, True), (3, False)):
        given = factors(model, ranks, 7 + ranks, core)
        model.load(given)
        for (c, n, x), (d, o, y) in zip(given.items(), model.read().items(), strict=True):
            assert (c, n) == (d, o)
            assert torch.equal(x, y)
        assert model.read().scale == given.scale


def test_what_was_read_does_not_change_when_training_goes_on(settings: Settings) -> None:
    model = build(settings, "bert")
    model.load(factors(model, 2, 3, core=True))
    read = model.read()
    kept = clone(read)
    for column in model.trainable(frozenset({"A", "B", "R", "other"})).values():
        for p in column.values():
            p.data.add_(1.0)
    for (_, _, x), (_, _, y) in zip(read.items(), kept.items(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_first_factors_depend_on_the_seed_and_the_ranks_alone(
    settings: Settings, rank: int
) -> None:
    def client(model: Model, r: int) -> Client:
        return Client(-1, model.layers(dict.fromkeys(model.shapes, r)))

    fresh, used = build(settings, "bert"), build(settings, "bert")
    torch.rand(11)
    used.load(factors(used, rank, 3, core=True))
    used.init_factors(client(used, rank), 8)
    used.load(factors(used, rank, 4))
    before = torch.random.get_rng_state()
    one, two = (m.init_factors(client(m, rank), 7) for m in (fresh, used))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not one.R
    assert [k[:2] for k in one.items()] == [k[:2] for k in two.items()]
    for (c, n, x), (_, _, y) in zip(one.items(), two.items(), strict=True):
        assert torch.equal(x, y), (c, n)
        assert (x == 0).all() == (c == "B" or n.endswith("bias"))
    other = fresh.init_factors(client(fresh, rank), 8)
    assert not any(torch.equal(one.A[m], other.A[m]) for m in one.A)


def test_only_what_is_asked_for_gets_gradients(settings: Settings) -> None:
    model = build(settings, "bert")
    model.load(factors(model, 2, 3, core=True))
    live = model.trainable(frozenset({"R", "other"}))
    wanted = {id(p) for column in live.values() for p in column.values()}
    assert set(live) == {"R", "other"}
    assert {id(p) for p in model.peft.parameters() if p.requires_grad} <= wanted
    assert all(p.requires_grad for column in live.values() for p in column.values())


def test_outside_its_blocks_a_core_gets_no_gradient(settings: Settings) -> None:
    model = build(settings, "llama")
    model.load(factors(model, 4, 3, core=True), block=2)
    live = model.trainable(frozenset({"R"}))["R"]
    m = next(iter(live))
    live[m].sum().backward()  # type: ignore[no-untyped-call]
    inside = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert torch.equal(live[m].grad, inside)


def test_a_scaled_cores_blocks_and_their_numbers_get_the_products_gradients(
    settings: Settings,
) -> None:
    """R = diag(t_1 H_1, t_2 H_2), against autograd on R itself and the chain rule."""
    model = build(settings, "llama")
    given = factors(model, 4, 3, core=True)
    inside = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    given = replace(given, R={m: R * inside for m, R in given.R.items()})
    model.load(given, block=2, scaled=True)
    m = next(iter(given.R))
    assert torch.equal(model.read().R[m], given.R[m])  # the numbers begin as 1
    live = model.trainable(frozenset({"R"}))["R"]
    H, t = live[m], live[f"{m}, scales"]
    t.data = torch.tensor([0.5, -3.0])
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6).long()}

    def loss() -> Tensor:
        return model.logits(batch).square().sum()

    loss().backward()  # type: ignore[no-untyped-call]
    found, R = (H.grad, t.grad), model.read().R[m]
    assert torch.equal(R, torch.block_diag(0.5 * H[:2, :2], -3 * H[2:, 2:]))
    model.load(replace(given, R={**given.R, m: R}))  # nothing of it held back
    whole = model.trainable(frozenset({"R"}))["R"]
    loss().backward()  # type: ignore[no-untyped-call]
    G = whole[m].grad
    assert G is not None
    blocks = [(slice(0, 2),) * 2, (slice(2, 4),) * 2]
    want_t = torch.stack([(G[b] * given.R[m][b]).sum() for b in blocks])
    want_H = torch.block_diag(0.5 * G[blocks[0]], -3 * G[blocks[1]])
    torch.testing.assert_close(found[0], want_H)
    torch.testing.assert_close(found[1], want_t)


def test_a_target_that_matches_nothing_lists_what_there_is(settings: Settings) -> None:
    with pytest.raises(
        ModelError, match=r"q_proj matches no linear module.* it has .*query, value"
    ):
        build(settings, "bert", **{"lora.target-modules": "query,q_proj"})


def test_all_linear_leaves_head_and_output_out(settings: Settings) -> None:
    bert = build(settings, "bert", **{"lora.target-modules": "all-linear"}).shapes
    assert "classifier" not in bert
    assert {"bert.pooler.dense", "bert.encoder.layer.1.output.dense"} <= bert.keys()
    llama = build(settings, "llama", **{"lora.target-modules": "all-linear"}).shapes
    assert "lm_head" not in llama
    assert len(llama) == 2 * 7


@pytest.mark.parametrize(("layers", "depth"), [("1", 1), ("-1", 1), ("0", 0), ("-2", 0)])
def test_layers_may_be_chosen_from_either_end(settings: Settings, layers: str, depth: int) -> None:
    shapes = build(settings, "bert", **{"lora.layers": layers}).shapes
    assert len(shapes) == 3
    assert all(f"layer.{depth}." in m for m in shapes)


@pytest.mark.parametrize("layers", ["2", "-3", "x"])
def test_a_layer_that_is_not_there_is_refused(settings: Settings, layers: str) -> None:
    with pytest.raises(ModelError, match=r"lora\.layers = .*from -2 to 1"):
        build(settings, "bert", **{"lora.layers": layers})


def test_heads_are_those_of_the_task_and_those_asked_for(settings: Settings) -> None:
    def others(kind: str, **changes: object) -> set[str]:
        model = build(settings, kind, **changes)
        return set(model.trainable(frozenset({"other"})).get("other", {}))

    assert others("bert") == {"classifier.weight", "classifier.bias"}
    assert others("llama") == set()
    more = others("bert", **{"lora.modules-to-save": "pooler.dense"})
    assert more == {*others("bert"), "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    with pytest.raises(ModelError, match="modules-to-save: nothing matches no module"):
        build(settings, "bert", **{"lora.modules-to-save": "nothing"})


def test_a_tensor_the_model_does_not_train_is_refused(settings: Settings) -> None:
    model = build(settings, "bert")
    with pytest.raises(ModelError, match=r"foreign: this model trains no such tensor"):
        model.load(Factors(other={"foreign": torch.zeros(1)}))


def test_without_factors_the_adapter_adds_nothing(settings: Settings) -> None:
    model = build(settings, "gpt2")
    model.load(factors(model, 1, 3))
    model.load(Factors())
    x = drawn(1, 3, 24)
    m = next(iter(model.shapes))
    layer = model.peft.get_submodule(PREFIX + m)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_the_fingerprint_is_of_the_untouched_base(settings: Settings, tiny: dict[str, str]) -> None:
    model = build(settings, "llama")
    before = model.fingerprint
    model.rebase("run", versions(model, 1))
    model.load(factors(model, 2, 1))
    assert model.fingerprint == before == build(settings, "llama").fingerprint
    assert before != build(settings, "gpt2").fingerprint


def test_sixty_four_clients_cost_no_memory(settings: Settings) -> None:
    """One base and a few rank profiles, however many clients come by."""
    model = build(settings, "bert")
    process = psutil.Process(os.getpid())

    def visit(i: int) -> None:
        ranks = 1 + i % 12
        with model.folded(pairs(model, 1, i)):
            model.load(factors(model, ranks, i))

    for i in range(24):
        visit(i)
    parameters = sum(p.numel() for p in model.peft.parameters())
    before = process.memory_info().rss
    for i in range(24, 64 + 24):
        visit(i)
    assert process.memory_info().rss - before < 20e6
    assert sum(p.numel() for p in model.peft.parameters()) <= 1.1 * parameters
    assert len(model.peft.peft_config) <= 9


def test_accumulate_is_the_sum_in_order() -> None:
    g = seeded(0, 0, 0, "x")
    x, pair = torch.randn(5, 7, generator=g), Pair(drawn(2, 7), drawn(5, 2), 0.5)
    assert torch.equal(accumulate(None, pair), pair.delta())
    assert torch.equal(accumulate(x, pair), x + pair.delta())


def test_a_model_that_is_not_there_is_named(settings: Settings, tmp_path: Path) -> None:
    given: dict[str, Any] = settings("bert", **{"model.path": str(tmp_path / "nowhere")})
    with pytest.raises(Exception, match="nowhere"):
        Model(Config.read(given), ("x",))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_init_that_moves_the_base_moves_it_once_and_starts_from_w0(
    settings: Settings, kind: str, init: str
) -> None:
    """Whatever ranks come and go: a profile that is attached takes nothing out of the base."""
    plain, model = build(settings, kind), build(settings, kind, **{"lora.init": init})
    untouched = base_bits(plain)
    for r in (2, 3, 5):
        model.load(factors(model, r, r))
    assert_bits(base_bits(model), untouched)
    me = Client(-1, model.layers(dict.fromkeys(model.shapes, 4)))
    first = model.init_factors(me, 7)
    assert_bits(
        dict(first.A), dict(build(settings, kind, **{"lora.init": init}).init_factors(me, 7).A)
    )
    model.rebase("run", [], taken_out(model.config, first, model.weights()))
    for r in (2, 3, 5, 4):
        model.load(factors(model, r, r) if r != 4 else first)
    for m, W in plain.weights().items():
        A, B = first.A[m].double(), first.B[m].double()
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        if init == "pissa":  # the leading part of W0, wherever a sign fell
            best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
            assert torch.allclose(first.scale[m] * B @ A, best, atol=1e-5)
        moved = base_bits(model)[m]
        moved = moved.T if model.shapes[m].fan_in_fan_out else moved
        whole = moved.double() + first.scale[m] * B @ A
        assert torch.allclose(whole, W.double(), atol=1e-6)
        assert float((moved - W).norm()) > 0.1 * float(W.norm())  # it was moved
        assert torch.equal(model.weights()[m], W)
    log = versions(model, 2)
    model.rebase("run", log, taken_out(model.config, first, model.weights()))
    model.rebase("other", [])
    assert_bits(base_bits(model), untouched)


@pytest.mark.parametrize("kind", MODELS)
def test_beside_the_base_changes_add_up_and_the_weights_stay(settings: Settings, kind: str) -> None:
    model = build(settings, kind, **{"model.merge": "keep-as-adapter"})
    into = build(settings, kind, **{"model.merge": "into-base"})
    untouched = base_bits(model)
    start, log, fold, mine = pairs(model, 2, 40), versions(model, 3), pairs(model, 1, 50), None
    mine = factors(model, 3, 70)
    x = {m: drawn(s.k, 4, seed=5).double() for m, s in model.shapes.items()}
    made = []
    for each in (model, into):
        each.rebase("run", log[:2], start)
        each.rebase("run", log, start)
        with each.folded(fold):
            each.load(mine)
            made.append(each.probe(x))
    for m in x:
        assert float((made[0][m] - made[1][m]).norm() / made[1][m].norm()) < 1e-6
    assert_bits(base_bits(model), untouched)
    model.rebase("other", [])
    model.load(Factors())
    into.rebase("other", [])
    into.load(Factors())
    for m, y in model.probe(x).items():
        assert torch.equal(y, into.probe(x)[m]), m


def test_beside_the_base_all_ways_to_a_version_give_the_same_bits(settings: Settings) -> None:
    beside = {"model.merge": "keep-as-adapter"}
    steady, away, joining = three_ways(settings, **beside)
    x = {m: drawn(s.k, 4, seed=5) for m, s in steady.shapes.items()}
    for model in (away, joining):
        for m, y in steady.probe(x).items():
            assert torch.equal(model.probe(x)[m], y), m


def test_a_bfloat16_base_rounds_what_goes_into_it_and_not_what_stays_beside(
    settings: Settings,
) -> None:
    found = {}
    for merge in ("into-base", "auto"):
        model = build(settings, "llama", **{"model.merge": merge, "model.dtype": "bfloat16"})
        x = {m: drawn(s.k, 4, seed=5).double() for m, s in model.shapes.items()}
        model.load(Factors())
        before = model.probe(x)
        change = {m: Pair(0.1 * p.A, 0.1 * p.B, p.scale) for m, p in pairs(model, 2, 9).items()}
        model.rebase("run", [Version(1, change)])
        after = model.probe(x)
        found[merge] = max(
            float(
                (after[m] - before[m] - dense(change[m]).double() @ x[m]).norm() / before[m].norm()
            )
            for m in x
        )
    assert found["auto"] < 1e-7
    assert 1e-4 < found["into-base"] < WEIGHTS["bfloat16"]


def test_loftq_begins_on_four_bits_and_near_w0(settings: Settings) -> None:
    """Its base is NF4 on every client; with the adapter it is nearer to W0, the higher the rank."""
    plain, model = build(settings, "gpt2"), build(settings, "gpt2", **{"lora.init": "loftq"})
    gaps = {}
    for rank in (2, 8):
        me = Client(-1, model.layers(dict.fromkeys(model.shapes, rank)))
        first = model.init_factors(me, 7)
        model.rebase(f"run {rank}", [], taken_out(model.config, first, model.weights()))
        for m, W in plain.weights().items():
            Q = base_bits(model)[m]
            Q = Q.T if model.shapes[m].fan_in_fan_out else Q
            whole = Q.double() + first.scale[m] * first.B[m].double() @ first.A[m].double()
            assert torch.allclose(Q, loftq.nf4(W), atol=1e-7)
            blocks = loftq.nf4(W).reshape(-1, loftq.BLOCK)
            assert max(len(b.unique()) for b in blocks) <= 16
            best = torch.linalg.svdvals((W - Q).double())[rank:].norm()
            assert torch.allclose((W.double() - whole).norm(), best, rtol=1e-4)
            gaps[rank, m] = float(best)
    assert all(gaps[8, m] < 0.9 * gaps[2, m] for m in model.shapes)


def test_four_bits_are_bitsandbytes_own() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    stored, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=False)
    assert torch.allclose(loftq.nf4(W), functional.dequantize_4bit(stored, state), atol=1e-6)
