"""A causal LM's loss without its logits: the same losses and gradients, part by part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.strategies.base import Client
from fedlora.training import cache
from fedlora.training.data.batches import IGNORE
from fedlora.training.model.model import Model
from fedlora.training.output_head import OutputHead
from fedlora.training.train import example_losses
from tests.conftest import LABELS
from tests.support.architectures import DECODERS, write

Settings = Callable[..., dict[str, object]]

LABELLED = torch.tensor([[IGNORE, IGNORE, 7, 8, 9], [IGNORE, 4, 5, IGNORE, IGNORE]])
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": LABELLED,
}


def loaded(settings: Settings, path: Path, **changes: object) -> Model:
    given = settings("bert") | {
        "model.path": str(path), "model.task": "causal-lm", "data.prompt": "text",
        "lora.target-modules": "all-linear", "model.dropout": 0.0, **changes,
    }  # fmt: skip
    model = cache._load_model(Config.read(given), LABELS)
    first = model.init_factors(Client(0, model.layers(dict.fromkeys(model.shapes, 2))), 0)
    for B in first.B.values():
        torch.nn.init.normal_(B, generator=torch.Generator().manual_seed(len(B)))
    model.load(first)
    model.trainable(frozenset({"A", "B", "other"}))
    return model


def gradients(model: Model) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.peft.named_parameters() if p.grad is not None}
    model.peft.zero_grad(set_to_none=True)
    return found


def defined(model: Model) -> tuple[list[float], dict[str, Tensor]]:
    """Each example's loss from all logits, token by token in float64, and its gradients."""
    inputs = {key: x for key, x in BATCH.items() if key != "labels"}
    logits = model.peft(**inputs).logits.double()
    losses = []
    for row, label in zip(logits, LABELLED, strict=True):
        at = [t for t in range(1, len(label)) if label[t] != IGNORE]
        losses.append(torch.stack([row[t - 1].logsumexp(0) - row[t - 1, label[t]] for t in at]))
    means = [x.mean() for x in losses]
    torch.stack(means).sum().backward()
    return [x.item() for x in means], gradients(model)


@pytest.mark.parametrize("rows", [1, 2, 1000])
@pytest.mark.parametrize(
    "name",
    [n if n in ("gemma2", "gpt2") else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS],
)
def test_losses_and_gradients_are_those_of_all_logits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    """Of every architecture, also with a soft cap behind the product (Gemma 2)."""
    model = loaded(settings, write(name, tmp_path))
    head = OutputHead.of(model.peft.get_base_model())
    assert head, "this architecture would compute all logits"
    monkeypatch.setattr("fedlora.training.output_head.PART", rows * 4 * head.vocabulary)
    want, slopes = defined(model)
    given = example_losses(model, BATCH)
    given.sum().backward()
    found = gradients(model)
    assert torch.allclose(given.double(), torch.tensor(want, dtype=torch.float64), atol=1e-5)
    assert found.keys() == slopes.keys()
    for n, x in found.items():
        assert torch.allclose(x, slopes[n], atol=1e-5 + 1e-4 * float(slopes[n].abs().max())), n


def test_no_more_than_a_part_of_the_scored_tokens_has_logits_at_once(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(settings, write("llama", tmp_path))
    base: Any = model.peft.get_base_model()
    monkeypatch.setattr("fedlora.training.output_head.PART", 2 * 4 * base.config.vocab_size)
    seen: list[int] = []
    base.lm_head.register_forward_hook(lambda *call: seen.append(call[-1][..., 0].numel()))
    example_losses(model, BATCH).sum().backward()
    assert seen[0] == 0  # beside the states, none
    assert seen[1:4] == [2, 2, 1]  # five are scored
    assert sorted(seen[4:]) == [1, 2, 2]  # and computed again to differentiate


def test_a_head_that_trains_has_all_logits_and_its_gradient(
    settings: Settings, tmp_path: Path
) -> None:
    path = write("llama", tmp_path, tie_word_embeddings=False)
    model = loaded(settings, path, **{"lora.modules-to-save": "lm_head"})
    assert OutputHead.of(model.peft.get_base_model()) is None
    want, slopes = defined(model)
    given = example_losses(model, BATCH)
    given.sum().backward()
    found = gradients(model)
    assert any("lm_head" in n for n in found)
    assert torch.allclose(given.double(), torch.tensor(want, dtype=torch.float64), atol=1e-5)
    assert all(torch.allclose(x, slopes[n], atol=1e-5) for n, x in found.items())


def test_a_batch_without_a_scored_token_has_losses_of_zero(
    settings: Settings, tmp_path: Path
) -> None:
    model = loaded(settings, write("llama", tmp_path))
    losses = example_losses(model, {**BATCH, "labels": torch.full_like(LABELLED, IGNORE)})
    assert losses.tolist() == [0.0, 0.0]
    losses.sum().backward()
    assert all(not x.any() for x in gradients(model).values())


def test_a_head_that_fails_leaves_the_body_as_it_was(settings: Settings, tmp_path: Path) -> None:
    model = loaded(settings, write("llama", tmp_path))
    base: Any = model.peft.get_base_model()
    before = model.logits({k: x for k, x in BATCH.items() if k != "labels"})

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    hook = base.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(ModelError, match="stopped"):
        example_losses(model, BATCH)
    hook.remove()
    assert torch.equal(model.logits({k: x for k, x in BATCH.items() if k != "labels"}), before)
