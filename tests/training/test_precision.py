"""Precision: what "auto" comes to, and that no cast outlives the weight it is of."""

from collections.abc import Callable

import pytest
import torch

from fedlora.privacy.per_example import kept_apart
from fedlora.training.data.batches import collate
from fedlora.training.devices import HOST
from fedlora.training.optimizers import build_optimizer
from fedlora.training.precision import WITHOUT_BFLOAT16, autocast, described, lacking, resolved
from fedlora.training.train import example_losses, steps, training
from tests.support.private_setting import Setting
from tests.support.tiny_federation import python

Settings = Callable[..., dict[str, object]]


def test_a_weight_that_moves_within_a_block_is_cast_anew() -> None:
    layer, x = torch.nn.Linear(8, 5), torch.ones(3, 8)
    with autocast("bfloat16", HOST):
        before = layer(x).float()
        with torch.no_grad():
            layer.weight.mul_(2)
        after = layer(x).float()
    torch.testing.assert_close(after - layer.bias, 2 * (before - layer.bias), rtol=2e-2, atol=2e-2)


def test_the_counterexample_autocast_as_it_comes_keeps_the_first_weight() -> None:
    layer, x = torch.nn.Linear(8, 5), torch.ones(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_every_step_of_the_loop_computes_with_the_weights_of_the_step_before(
    settings: Settings, kind: str, precision: str
) -> None:
    s = Setting(settings(kind, **{"model.dropout": 0.0}), torch.float32)
    rows = torch.arange(4)
    batch = collate(s.rows, rows)
    optimizer = build_optimizer(s.live, s.config.train, 0.05)
    with training(s.model, s.config, 1, 0):
        for step in steps(s.model, [batch] * 4, s.live, optimizer, s.config):
            last = step.losses
            s.model.peft.eval()
            with torch.no_grad():
                now = example_losses(s.model, batch, precision)
            s.model.peft.train()
            assert not torch.equal(now, last), "the step changed nothing that is seen"
    with torch.no_grad():
        fresh = example_losses(s.model, batch, precision)
    assert torch.equal(fresh, now)


def test_per_example_products_follow_the_live_weights_even_under_a_cache(
    settings: Settings,
) -> None:
    """They cast for themselves, where autocast is off: nothing of them is in its cache."""
    s = Setting(settings("bert", **{"model.dropout": 0.0}), torch.float32)
    batch = collate(s.rows, torch.arange(3))
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    with (
        torch.autocast("cpu", torch.bfloat16),
        kept_apart(s.model.peft, s.model.active, frozenset(s.params)),
    ):
        before = s.model.logits(inputs)
        with torch.no_grad():
            for p in s.params:
                p.mul_(3)
        assert not torch.equal(s.model.logits(inputs), before)


def test_what_is_forced_is_what_is_used(precision: str) -> None:
    assert resolved(precision) == precision
    with autocast(precision, HOST):
        assert torch.is_autocast_enabled("cpu") is (precision == "bfloat16")
        assert not torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled()
    assert described(precision) == f"precision: {precision}"


def test_float32_is_float32_within_another_block() -> None:
    with torch.autocast("cpu", torch.bfloat16), autocast("float32", HOST):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize("value", WITHOUT_BFLOAT16)
def test_auto_is_float32_where_onednn_may_not_use_bfloat16(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert resolved("auto") == "bfloat16"
    monkeypatch.setenv(variable, value.lower())
    assert resolved("auto") == "float32"
    assert variable in described("auto")


def test_auto_is_float32_on_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolved("auto") == "float32"
    assert "neither" in str(lacking())


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_auto_is_float32_where_torch_is_held_below_avx512(capability: str) -> None:
    code = (
        "import os; os.environ['ATEN_CPU_CAPABILITY'] = '" + capability + "'\n"
        "from fedlora.training.precision import resolved; print(resolved('auto'))"
    )
    assert python(code).stdout.strip() == "float32"
