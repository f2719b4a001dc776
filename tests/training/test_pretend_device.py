"""The pretend accelerator computes real numbers, and refuses what a card refuses."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.long import few
from tests.support.pretend_device import CARDS, CAST, READ, Card

Cards = list[Card]
ONE, TWO = "pretend:0", "pretend:1"


def left_behind() -> Any:
    """An optimiser's state that a checkpoint put on the host."""
    p = nn.Parameter(torch.ones(3, device=ONE))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    for _ in range(2):
        p.square().sum().backward()
        optimizer.step()
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].cpu()


SLIPS: dict[str, Callable[[], Any]] = {
    "an operand on the host": lambda: torch.ones(3, device=ONE) + torch.ones(3),
    "an operand on the other card": lambda: torch.ones(3, device=ONE) + torch.ones(3, device=TWO),
    "a factor on the host": lambda: nn.Linear(4, 3)(torch.ones(2, 4, device=ONE)),
    "a number in a list on the host": lambda: torch.stack(
        [torch.ones((), device=ONE), torch.ones(())]
    ),
    "an array of a tensor on a card": lambda: torch.ones(3, device=ONE).numpy(),
    "a host's generator for a draw": lambda: torch.rand(
        3, device=ONE, generator=torch.Generator()
    ),
    "a host's generator in place": lambda: torch.ones(3, device=ONE).normal_(
        generator=torch.Generator()
    ),
    "an optimiser's state left behind": left_behind,
    "a delta added to the base": lambda: torch.ones(3, 3, device=ONE).add_(torch.ones(3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("slip", few(SLIPS, *[*SLIPS][::2]))
def test_what_a_card_refuses_is_refused(cards: Cards, slip: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"device|host"):
        SLIPS[slip]()


def test_what_a_card_allows_is_allowed(cards: Cards) -> None:
    x = torch.arange(6.0, device=ONE).view(2, 3)
    assert (x * torch.tensor(2.0)).sum().item() == 30  # a number of the host's
    assert x[torch.tensor([1])].tolist() == [[3, 4, 5]]  # indices of the host's
    y = torch.zeros(2, 3, device=TWO)
    y.copy_(x)
    assert torch.equal(y.cpu(), x.cpu())
    assert x.device != y.device


def test_bytes_are_counted_for_as_long_as_any_tensor_has_them(cards: Cards) -> None:
    card, before = cards[1], cards[1].used
    x = torch.zeros(1000, device=TWO)
    view = x[:10]
    assert card.used - before == 4000
    del x
    assert card.used - before == 4000, "the view has them"
    del view
    assert card.used == before
    w = torch.zeros(1000, device=TWO, requires_grad=True)
    doubled = w * 2
    loss = (doubled * doubled).sum()
    del doubled
    assert card.used - before == 8004, "autograd has them"
    del loss
    assert card.used - before == 4000
    assert card.peak - before >= 12000
    assert cards[0].used == 0


def test_more_than_the_limit_raises_what_torch_raises(cards: Cards) -> None:
    cards[0].limit = 10_000
    with pytest.raises(torch.OutOfMemoryError, match="pretend:0 out of memory"):
        torch.zeros(5000, device=ONE)
    torch.zeros(5000, device=TWO)
    assert torch.zeros(1000, device=ONE).sum().item() == 0


def test_each_card_draws_from_a_generator_of_its_own(cards: Cards) -> None:
    torch.manual_seed(3)
    drawn = [torch.rand(4, device=d).cpu() for d in ("cpu", ONE, TWO)]
    assert not torch.equal(drawn[0], drawn[1]), "the host has other numbers"
    assert torch.equal(drawn[1], drawn[2]), "cards of one type have the same of one seed"
    torch.rand(4, device=ONE)
    assert not torch.equal(cards[0].generator.get_state(), cards[1].generator.get_state())
    state = cards[0].generator.get_state()
    with torch.random.fork_rng(devices=[0], device_type="pretend"):
        torch.dropout(torch.ones(9, device=ONE), 0.5, train=True)
        assert not torch.equal(cards[0].generator.get_state(), state)
    assert torch.equal(cards[0].generator.get_state(), state)
    torch.default_generator.manual_seed(3)
    assert torch.equal(cards[0].generator.get_state(), state), "the host's seed is the host's"


@pytest.mark.parametrize("low", [False, True])
def test_a_model_trains_to_the_bits_of_the_host(cards: Cards, low: bool) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    ids = torch.arange(20).view(2, 10)

    def trained(device: str) -> list[torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            small = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = BertConfig(
                vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=24, attn_implementation="eager", **small,
            )  # fmt: skip
            model = BertForSequenceClassification(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(ids.to(device).device.type, torch.bfloat16, enabled=low):
                loss = model(ids.to(device), labels=torch.tensor([0, 1], device=device)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return [p.detach().cpu() for p in model.parameters()]

    CAST.clear()
    for a, b in zip(trained("cpu"), trained(TWO), strict=True):
        assert torch.equal(a, b)
    assert bool(CAST[torch.bfloat16]) is low


def test_what_waits_for_a_card_is_counted(cards: Cards) -> None:
    READ.clear()
    x = torch.ones(3, device=ONE).sum()
    assert not READ
    float(x)
    x.cpu()
    assert READ["item"] == 1
    assert READ["to host"] == 1


def test_a_machine_has_them_within_the_context_only(cards: Cards) -> None:
    from tests.support.pretend_device import Module

    assert torch.accelerator.device_count() == 2
    Module.present = False
    assert not torch.accelerator.device_count()


def test_nothing_is_left_when_a_model_goes(cards: Cards) -> None:
    model = nn.Linear(50, 50).to(ONE)
    gone = weakref.ref(model)
    model(torch.ones(2, 50, device=ONE)).sum().backward()
    assert CARDS[0].used
    del model
    gc.collect()
    assert gone() is None
    assert CARDS[0].used == 0


def test_what_an_earlier_test_left_is_in_no_later_count(cards: Cards) -> None:
    """As the trace of a failed test holds its tensors, and lets go of them whenever it likes."""
    left = torch.ones(1000, device=ONE)
    assert CARDS[0].used == 4000
    CARDS[0].count_anew()
    assert (CARDS[0].used, CARDS[0].peak) == (0, 0)
    mine = torch.ones(50, device=ONE)
    del left
    gc.collect()
    assert CARDS[0].used == 200, "what goes of the earlier is not taken from this"
    view = mine[10:]
    assert CARDS[0].used == 200
    del mine, view
    gc.collect()
    assert CARDS[0].used == 0
