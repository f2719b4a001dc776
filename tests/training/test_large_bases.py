"""What large bases ask for: few bits, small optimiser states, other kernels; and beside DP."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.privacy.per_example import kept_apart
from fedlora.training.data.batches import collate
from fedlora.training.devices import HOST, prepare
from fedlora.training.footprint import footprint
from fedlora.training.model import loading, quantized
from fedlora.training.model.model import Model
from fedlora.training.model.quantized import bytes_of, is_stored
from fedlora.training.optimizers import BLOCK, PAGED, SMALL, build_optimizer, state_bytes
from fedlora.training.precision import autocast, scaler
from fedlora.training.train import steps, training
from tests.support.private_setting import Setting, norm
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
PACKAGE = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8": "torchao"}
STORED = ("8bit", "4bit", "int8")
PRIVATE = {"privacy.epsilon": 8.0, "privacy.insecure-reproducible-noise": True}


# -- bases in few bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED)
def test_what_a_stored_base_says_of_itself(settings: Settings, stored: str) -> None:
    """Weights near the plain base's, fewer bytes, a fingerprint of its own, the same each time."""
    pytest.importorskip(PACKAGE[stored])
    plain = Model(Config.read(settings("llama")))
    model, again = (
        Model(Config.read(settings("llama", **{"model.quantization": stored}))) for _ in range(2)
    )
    assert model.fingerprint == again.fingerprint != plain.fingerprint
    for m, W in model.weights().items():
        assert is_stored(model.adapted[m].get_base_layer().weight)
        gap = (W.float() - plain.weights()[m]).norm() / plain.weights()[m].norm()
        assert 0 < gap < (0.2 if stored == "4bit" else 0.02)
    size, whole = (footprint(x, x.config).frozen for x in (model, plain))
    assert size < whole


class Packing(nn.Linear):
    """As bitsandbytes' 4-bit layer on a processor with bfloat16 units."""

    support_avx512bf16_for_cpu = True


def test_a_4_bit_layer_is_told_to_hold_what_it_was_loaded_with() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(Packing(2, 4)))
    quantized.keep_as_loaded(model)
    assert not model[1][0].support_avx512bf16_for_cpu
    assert not hasattr(model[0], quantized.PACKS)


@pytest.mark.parametrize("slip", [False, True])
def test_an_evaluation_leaves_a_4_bit_base_as_it_is_on_processors_with_bfloat16_units(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, slip: bool
) -> None:
    """On any processor. The slip: bitsandbytes packs weights anew, which these widths refuse."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    if slip:
        monkeypatch.setattr(loading, "keep_as_loaded", lambda _: None)
    s = Setting(settings("llama", **{"model.quantization": "4bit"}), torch.float32)
    before = {m: W.clone() for m, W in s.model.weights().items()}
    s.model.peft.eval()
    with torch.no_grad():
        if slip:
            with pytest.raises(Exception, match="must be divisible"):
                s.losses([0, 1])
            return
        s.losses([0, 1])
    assert all(torch.equal(W, before[m]) for m, W in s.model.weights().items())
    s.losses([0, 1]).sum().backward()
    assert all(p.grad is not None for p in s.params)


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED)
def test_a_mean_pooled_classifier_trains_on_a_stored_base(settings: Settings, stored: str) -> None:
    pytest.importorskip(PACKAGE[stored])
    low = {"model.quantization": stored, "model.pooling": "mean"}
    ran = federate(settings("bert", **quick("fedavg", **low)))
    assert not any(r["failures"] for r in ran.rounds[1:])
    assert ran.rounds[-1]["certificate"]["excess"] < 1


@pytest.mark.parametrize("stored", ["4bit", "int8"])
def test_examples_have_gradients_of_their_own_on_a_stored_base(
    settings: Settings, stored: str
) -> None:
    pytest.importorskip(PACKAGE[stored])
    s = Setting(settings("llama", **{"model.quantization": stored}), torch.float32)
    together = s.losses([0, 1, 2]).sum()
    with kept_apart(s.model.peft, s.model.active, frozenset(s.params)) as sink:
        together = s.losses([0, 1, 2]).sum()
        together.backward()
        found = sink.take(3)
    for i, alone in enumerate(s.one_by_one([0, 1, 2])):
        gap = norm({p: found[p].dense()[i] - alone[p] for p in s.params})
        assert gap < 1e-4 * norm(alone)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["4bit", "int8"])
def test_example_level_privacy_runs_on_a_stored_base(settings: Settings, stored: str) -> None:
    pytest.importorskip(PACKAGE[stored])
    low = {"model.quantization": stored, **PRIVATE, "clients.ranks": "3"}
    ran = federate(settings("llama", **quick("fedavg", **low)))
    assert not any(r["failures"] for r in ran.rounds[1:])


# -- optimisers -----------------------------------------------------------------------------------

PAGED_ONES = ("paged_adamw_32bit", "paged_adamw_8bit")


def live_of(*sizes: tuple[int, ...]) -> dict[str, dict[str, nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(size, generator=g)) for size in sizes]
    return {"A": {str(i): p for i, p in enumerate(made)}}


def stepped(settings: Settings, optimizer: str, n: int) -> tuple[list[nn.Parameter], Any]:
    train = Config.read(settings(**{"train.optimizer": optimizer, "train.weight-decay": 0.1})).train
    live = live_of((80, 100), (7, 5))
    params = [*live["A"].values()]
    made = build_optimizer(live, train, 0.01)
    g = torch.Generator().manual_seed(1)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        made.step()
    return params, made


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", *PAGED_ONES])
def test_bitsandbytes_adamw_is_torchs_but_for_the_bits_of_its_states(
    settings: Settings, optimizer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    start = [p.detach() for p in live_of((80, 100), (7, 5))["A"].values()]
    want, _ = stepped(settings, "adamw", 10)
    found, made = stepped(settings, optimizer, 10)
    again, _ = stepped(settings, optimizer, 10)
    low = optimizer.endswith("8bit")
    for i, (p, q) in enumerate(zip(found, want, strict=True)):
        gap = float((p - q).detach().norm() / (q - start[i]).detach().norm())
        assert (0.001 < gap < 0.05) if low and p.numel() >= SMALL else gap < 1e-4
        assert torch.equal(p, again[i])
    states = [v.dtype for k, v in made.state[found[0]].items() if k.startswith("state")]
    assert states == [torch.uint8 if low else torch.float32] * 2


def test_what_states_take_is_what_they_take(settings: Settings) -> None:
    pytest.importorskip("bitsandbytes")
    for optimizer in ("adamw", "adamw_8bit"):
        train = Config.read(settings(**{"train.optimizer": optimizer})).train
        params, made = stepped(settings, optimizer, 1)
        for p in params:
            own = {k: v for k, v in made.state[p].items() if k.startswith(("state", "exp", "absm"))}
            taken = sum(bytes_of(v) for v in own.values())
            assert state_bytes(p.numel(), train) == taken


def test_paged_states_are_not_on_the_device(settings: Settings) -> None:
    for optimizer, each in zip(PAGED_ONES, (8, 2), strict=True):
        train = Config.read(settings(**{"train.optimizer": optimizer})).train
        assert state_bytes(PAGED, train) == 0
        assert state_bytes(BLOCK * SMALL // 16, train) == pytest.approx(each * BLOCK * SMALL // 16,
                                                                        rel=0.02)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_a_federation_with_states_in_8_bits(settings: Settings, private: bool) -> None:
    """Under DP as well: an optimiser sees noised sums alone."""
    pytest.importorskip("bitsandbytes")
    given = {"train.optimizer": "adamw_8bit", "train.steps": 2, **(PRIVATE if private else {})}
    rank = {"clients.ranks": "3"} if private else {}
    runs = [
        federate(settings("llama", **quick("fedavg", **given, **rank, **{"run.name": name})))
        for name in ("one", "two")
    ]
    assert runs[0].adapter == runs[1].adapter
    assert not any(r["failures"] for r in runs[0].rounds[1:])


# -- float16 --------------------------------------------------------------------------------------


def test_float16_keeps_gradients_that_would_be_0_and_leaves_out_a_step_that_overflows(
    settings: Settings,
) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scale = scaler("float16", HOST)

    def step(size: float) -> Tensor:
        """A step whose gradient is of this size."""
        optimizer.zero_grad()
        with autocast("float16", HOST):
            loss = (torch.ones(1, 3) @ p).float().sum() * size
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        found = p.grad.clone()  # type: ignore[union-attr]
        scale.step(optimizer)
        scale.update()
        return found

    assert torch.allclose(step(1e-9), torch.full((3, 2), 1e-9), rtol=1e-2)
    with autocast("float16", HOST):
        loss = (torch.ones(1, 3) @ p).float().sum() * 1e-9
    assert not torch.autograd.grad(loss, p)[0].any(), "which without a scale is 0"
    before = p.detach().clone()
    step(1.0)
    assert torch.equal(p, before)
    assert scale.get_scale() == 2.0**15
    assert scaler("bfloat16", HOST).get_scale() == 1.0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_float16_trains_to_nearly_what_float32_does(settings: Settings, kind: str) -> None:
    found = {}
    for precision in ("float32", "float16", "bfloat16"):
        s = Setting(settings(kind, **{"model.dropout": 0.0}), torch.float32)
        given = s.config.train.model_copy(update={"precision": precision, "microbatch": 3})
        config = s.config.model_copy(update={"train": given})
        batch = collate(s.rows, torch.arange(8))
        made = build_optimizer(s.live, given, 0.01)
        start = [p.detach().clone() for p in s.params]
        with training(s.model, config, 1, 0):
            for step in steps(s.model, [batch] * 3, s.live, made, config):
                loss = float(step.loss)
        found[precision] = loss, [p.detach() - x for p, x in zip(s.params, start, strict=True)]
    want, moved = found["float32"]
    apart = {}
    for precision in ("float16", "bfloat16"):
        loss, mine = found[precision]
        assert loss == pytest.approx(want, rel=0.02)
        gap = sum(float((x - y).square().sum()) for x, y in zip(mine, moved, strict=True))
        apart[precision] = (gap / sum(float(x.square().sum()) for x in moved)) ** 0.5
    assert 0 < apart["float16"] < apart["bfloat16"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "pretend:1"])
def test_a_federation_in_float16(settings: Settings, cards: object, device: str) -> None:
    given = {"train.precision": "float16", "train.steps": 2, "simulate.devices": device}
    ran = federate(settings("llama", **quick("fedex", **given)))
    assert not any(r["failures"] for r in ran.rounds[1:])
    assert ran.rounds[-1]["certificate"]["excess"] < 1


# -- other kernels --------------------------------------------------------------------------------


def test_liger_gets_the_base_and_leaves_the_loss_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[object, object]] = []
    kernel = "transformers.integrations.liger.apply_liger_kernel"
    monkeypatch.setattr(kernel, lambda *args: given.append(args))
    model = Model(Config.read(settings("llama", **{"model.liger": True})))
    ((base, kernels),) = given
    assert base is model.peft.get_base_model()
    assert kernels == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    Model(Config.read(settings("llama")))
    assert len(given) == 1


def test_flash_attention_is_transformers_own_switch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    real = loading._whole

    def whole(cls: object, path: str, options: dict[str, object], *rest: object) -> object:
        given.append(options.pop("attn_implementation"))
        return real(cls, path, options, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "_whole", whole)
    Model(Config.read(settings("llama", **{"model.attention": "flash_attention_2"})))
    assert given == ["flash_attention_2"]


@pytest.mark.parametrize("on", [True, False])
def test_flash_attention_is_deterministic_where_training_is(
    cards: object, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "unset")
    prepare(torch.device("pretend:1"), on)
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == str(int(on))
