"""Per-example gradients against the slow way, and what they refuse."""

import copy
import math

import pytest
import torch
from torch import nn

from fedlora.errors import PrivacyError
from fedlora.privacy.chance import Chance
from fedlora.privacy.mechanism import ClippedSum, poisson
from fedlora.privacy.microbatch import microbatches
from fedlora.privacy.per_example import Dense, Outer, Sink, clipping, kept_apart
from fedlora.privacy.probe import check_apart
from fedlora.training.train import example_losses
from tests.support.private_setting import Build, Setting, norm

BATCH = [0, 3, 5, 8, 11]  # of different lengths, so padded
MOST = 64


def gathered(s: Setting, numbers: list[int]) -> dict[nn.Parameter, torch.Tensor]:
    with kept_apart(s.model.peft, s.model.active, frozenset(s.params), s.model.masks) as sink:
        s.losses(numbers).sum().backward()
        found = sink.take(len(numbers))
        assert all(p.grad is None for p in s.model.peft.parameters())
    return {p: g.dense() for p, g in found.items()}


def agree(s: Setting, tolerance: float = 1e-12) -> None:
    found, want = gathered(s, BATCH), s.one_by_one(BATCH)
    assert set(found) == set(s.params)
    for i, alone in enumerate(want):
        size = norm(alone)
        assert size > 0
        for p in s.params:
            assert float((found[p][i] - alone[p]).abs().max()) <= tolerance * max(size, 1)


KINDS = ("bert", "gpt2", "llama")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["fedex", "ffa", "fedsb", "ravan"])
def test_per_example_gradients_are_those_of_batches_of_one(
    settings: Build, kind: str, strategy: str
) -> None:
    given = {"strategy.name": strategy}
    if strategy == "ravan":
        given["strategy.ravan.head-rank"] = 3
    s = Setting(settings(kind, **given))
    agree(s, 2e-7 if kind == "llama" else 1e-12)  # LlamaRMSNorm computes in float32 whatever


@pytest.mark.parametrize("kind", KINDS)
def test_rslora_and_all_linear_layers_work(settings: Build, kind: str) -> None:
    given = {"lora.use-rslora": True, "lora.target-modules": "all-linear"}
    s = Setting(settings(kind, **given))
    agree(s, 2e-7 if kind == "llama" else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(settings: Build, kind: str) -> None:
    s = Setting(settings(kind, **{"train.gradient-checkpointing": True}))
    s.model.peft.train()  # checkpointing is off in eval mode; dropout would differ by batch
    for module in s.model.peft.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    agree(s, 2e-7 if kind == "llama" else 1e-12)


def test_a_head_over_every_token_works(settings: Build) -> None:
    s = Setting(settings("llama", **{"lora.modules-to-save": "lm_head"}))
    assert any("lm_head" in name for name in s.live["other"])
    agree(s, 2e-7)


def test_a_mean_pooled_head_works(settings: Build) -> None:
    agree(Setting(settings("bert", **{"model.pooling": "mean"})))


def test_bfloat16_autocast_gives_the_gradients_of_plain_autocast(settings: Build) -> None:
    s = Setting(settings("bert"), torch.float32)
    exact = s.one_by_one(BATCH)
    s.precision = "bfloat16"
    plain, found = s.one_by_one(BATCH), gathered(s, BATCH)
    for i, want in enumerate(exact):
        ours = norm({p: found[p][i] - want[p] for p in s.params}) / norm(want)
        theirs = norm({p: plain[i][p] - want[p] for p in s.params}) / norm(want)
        assert 0 < ours < max(2 * theirs, 0.02)


def test_a_layer_called_twice_has_one_gradient(settings: Build) -> None:
    """The norm is of the sum of both calls' gradients, not of each."""
    s = Setting(settings("bert"))
    layers = s.model.peft.base_model.model.bert.encoder.layer
    layers[1] = layers[0]
    s.params = tuple(p for p in s.params if any(p is q for q in s.model.peft.parameters()))
    agree(s)


def test_dropout_is_that_of_plain_training(settings: Build) -> None:
    s = Setting(settings("bert", **{"lora.dropout": 0.3}))
    s.model.peft.train()
    torch.manual_seed(5)
    plain = torch.autograd.grad(s.losses(BATCH).sum(), s.params)
    torch.manual_seed(5)
    found = gathered(s, BATCH)
    for p, want in zip(s.params, plain, strict=True):
        assert torch.allclose(found[p].sum(0), want, rtol=0, atol=1e-12)
    s.model.peft.eval()


def test_the_model_is_as_before_afterwards(settings: Build) -> None:
    s = Setting(settings("bert", **{"strategy.name": "fedsb"}))
    before = s.losses(BATCH)
    gathered(s, BATCH)
    assert torch.equal(s.losses(BATCH), before)
    s.losses(BATCH).sum().backward()
    assert all(p.grad is not None for p in s.params)
    for p in s.params:
        p.grad = None


# -- the sum and its sensitivity ---------------------------------------------------------------


def total(s: Setting, numbers: list[int], C: float, size: int = 2) -> torch.Tensor:
    clipped = ClippedSum(s.params, C)
    with kept_apart(s.model.peft, s.model.active, frozenset(s.params)) as sink:
        for part in microbatches(torch.tensor(numbers), s.rows.lengths, lambda _: size, MOST):
            example_losses(s.model, part.batch(s.rows), s.precision).sum().backward()
            clipped.add(sink.take(size), part.real)
    return torch.cat([g.flatten() for g in clipped.noised(0.0, Chance()).values()])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("part", [0.3, 1.0, 3.0])
def test_removing_any_example_moves_the_sum_by_at_most_c(
    settings: Build, kind: str, part: float
) -> None:
    s = Setting(settings(kind), torch.float32)
    C = part * sorted(norm(g) for g in s.one_by_one(BATCH))[2]
    whole = total(s, BATCH, C)
    moves = [float((whole - total(s, [j for j in BATCH if j != i], C)).norm()) for i in BATCH]
    assert max(moves) <= C * (1 + 1e-6)
    assert part > 2 or max(moves) > 0.99 * C


def test_a_long_document_moves_the_sum_no_more_than_a_short_one(settings: Build) -> None:
    """Per-example losses; a loss over all the batch's tokens would rescale every other example."""
    s = Setting(settings("llama", **{"data.response": "text", "data.prompt": ""}), torch.float32)
    longest = int(s.rows.lengths.argmax())
    others = [i for i in range(12) if i != longest]
    assert int(s.rows.lengths[longest]) > int(s.rows.lengths[others].min())
    C = 0.5 * min(norm(g) for g in s.one_by_one([longest, *others]))
    move = float((total(s, [longest, *others], C) - total(s, others, C)).norm())
    assert move <= C * (1 + 1e-6)


def test_micro_batches_change_the_sum_by_rounding_alone(settings: Build) -> None:
    s = Setting(settings("bert"))
    sums = [total(s, BATCH, 0.1, size) for size in (1, 2, 5)]
    assert max(float((x - sums[0]).abs().max()) for x in sums) < 1e-14


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e30])
def test_a_non_finite_example_counts_as_zero(settings: Build, poison: float) -> None:
    s = Setting(settings("bert"), torch.float32)
    clean = total(s, BATCH[1:], 0.1, 5)
    clipped = ClippedSum(s.params, 0.1)
    with kept_apart(s.model.peft, s.model.active, frozenset(s.params)) as sink:
        losses = s.losses(BATCH)
        (losses * torch.tensor([poison, 1, 1, 1, 1])).sum().backward()
        clipped.add(sink.take(len(BATCH)))
    found = torch.cat([g.flatten() for g in clipped.noised(0.0, Chance()).values()])
    assert torch.isfinite(found).all()
    moved = float((found - clean).norm())
    assert moved <= 0.1 * (1 + 1e-6) if poison == 1e30 else moved < 1e-6


def test_an_infinite_number_in_a_gradient_counts_as_zero_and_spoils_no_other() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    G = torch.tensor([[1.0, math.inf], [3.0, 4.0], [math.nan, 0.0]])
    clipped = ClippedSum((p,), 100.0)
    clipped.add({p: Dense(G)})
    assert clipped.total[p].tolist() == [3.0, 4.0]


def test_bf16_gradients_are_clipped_by_the_norm_of_what_is_summed(settings: Build) -> None:
    s = Setting(settings("bert"), torch.float32)
    s.precision = "bfloat16"
    with kept_apart(s.model.peft, s.model.active, frozenset(s.params)) as sink:
        s.losses(BATCH).sum().backward()
        found = sink.take(len(BATCH))
    C = 0.01
    finite, c = clipping(found, C)
    for i in range(len(BATCH)):
        one = torch.zeros_like(c)
        one[i] = c[i]
        part = {p: g.weighted_sum(one) for p, g in finite.items()}
        assert norm(part) <= C * (1 + 1e-7)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000, 1000), (1, 3_000_000), (4096, 16)])
def test_a_gradient_of_a_million_numbers_is_clipped_to_c(
    shape: tuple[int, int], precision: torch.dtype
) -> None:
    """As of a head over a vocabulary: a norm that is added up in float32 falls short, by 3e-4 of a
    million equal numbers, and what is clipped by it is as much longer than C."""
    p, C = nn.Parameter(torch.zeros(shape)), 1e-4
    for x in (0.37, 1.1e-3, 0.013):
        G = torch.full((1, *shape), x).to(precision)
        g, row = torch.full((1, shape[0]), x), torch.full((1, shape[1]), x)
        for gradient in (Dense(G), Outer(g.to(precision), row.to(precision))):
            clipped = ClippedSum((p,), C)
            clipped.add({p: gradient})
            length = math.sqrt(math.fsum(clipped.total[p].square().flatten().tolist()))
            assert C * (1 - 2e-6) <= length <= C
            if precision == torch.float32 and isinstance(gradient, Dense) and shape[1] == 1000:
                short = float(torch.linalg.vector_norm(G)) / (x * 1000)
                assert abs(short - 1) > 1e-5, "the counterexample"


# -- refusals ----------------------------------------------------------------------------------


@pytest.fixture
def bert(settings: Build) -> Setting:
    return Setting(settings("bert"), torch.float32)


def refusal(s: Setting) -> str:
    with pytest.raises(PrivacyError) as e:
        gathered(s, BATCH)
    return str(e.value)


def test_batchnorm_is_refused(bert: Setting) -> None:
    bert.model.peft.base_model.model.bert.pooler.norm = nn.BatchNorm1d(4)
    assert "BatchNorm" in refusal(bert)


def test_dora_is_refused(settings: Build) -> None:
    s = Setting(settings("bert", **{"lora.form": "dora", "strategy.name": "fedavg"}), torch.float32)
    assert "per-example gradient" in refusal(s)


def test_a_trained_layer_that_is_not_linear_is_refused(settings: Build) -> None:
    given = {"lora.modules-to-save": "word_embeddings"}
    s = Setting(settings("bert", **given), torch.float32)
    assert "only LoRA factors and linear heads" in refusal(s)


def test_a_parameter_without_a_gradient_is_an_error_not_a_zero(bert: Setting) -> None:
    query = bert.model.peft.base_model.model.bert.encoder.layer[1].attention.self.query
    query.forward = query.base_layer.forward
    assert "no per-example gradient" in refusal(bert)


def test_rows_that_are_not_the_examples_are_an_error() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    for gradient in (Dense(torch.ones(3, 2)), Outer(torch.ones(3, 1), torch.ones(3, 2))):
        sink = Sink(frozenset([p]))
        sink.put(p, gradient)
        with pytest.raises(PrivacyError, match="3 rows for 2 examples"):
            sink.take(2)


def test_a_weight_used_outside_its_module_is_an_error(bert: Setting) -> None:
    weight = bert.params[0]
    losses = bert.losses
    bert.losses = lambda numbers: losses(numbers) + weight.square().sum()
    assert "outside of the module" in refusal(bert)


def test_a_model_that_mixes_examples_is_found_before_training(bert: Setting) -> None:
    check_apart(bert.model, bert.live)
    mixed = copy.copy(bert.model)  # not the model that passed
    dense = mixed.peft.base_model.model.bert.encoder.layer[0].output.dense
    handle = dense.register_forward_hook(lambda _, __, y: y + y.roll(1, 0))
    with pytest.raises(PrivacyError, match="does not keep the examples"):
        check_apart(mixed, bert.live)
    handle.remove()


class Centred(nn.Module):
    """Takes the mean of the batch away, in training alone, as no type of layer says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True) if self.training else x


class Running(nn.Module):
    """Scales by a statistic of the examples before, and mixes none of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.seen.clone()
        if self.training:
            self.seen.lerp_(x.detach().abs().mean(), 1e-3)
        return x * before


class Jittered(nn.Module):
    """Noise of its own, as some routers have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.1 * torch.rand_like(x)) if self.training else x


@pytest.mark.parametrize(
    ("layer", "says"),
    [(Centred, "does not keep the examples"), (Running, "keeps something of the examples")],
)
def test_what_a_layer_does_in_training_alone_is_found_before_training(
    bert: Setting, layer: type[nn.Module], says: str
) -> None:
    """As batch norms of a class of one's own do: in evaluation mode they are as good as any."""
    bert.model.peft.base_model.model.bert.encoder.layer[0].output.dropout = layer().eval()
    before = {name: x.clone() for name, x in bert.model.peft.named_buffers()}
    with pytest.raises(PrivacyError, match=says):
        check_apart(bert.model, bert.live)
    assert all(torch.equal(x, before[name]) for name, x in bert.model.peft.named_buffers())


def test_a_model_that_draws_chance_of_its_own_is_looked_at_in_evaluation_mode(
    bert: Setting,
) -> None:
    bert.model.peft.base_model.model.bert.encoder.layer[0].output.dropout = Jittered().eval()
    check_apart(bert.model, bert.live)


def test_the_probe_leaves_no_trace(bert: Setting) -> None:
    before = [p.detach().clone() for p in bert.params]
    check_apart(bert.model, bert.live)
    assert all(torch.equal(p, q) for p, q in zip(bert.params, before, strict=True))
    assert all(p.grad is None for p in bert.params)


def test_a_poisson_sample_of_rate_0_is_empty_and_of_rate_1_everything() -> None:
    assert len(poisson(9, 0.0, Chance())) == 0
    assert poisson(9, 1.0, Chance()).tolist() == list(range(9))
