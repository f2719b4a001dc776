"""train.packing: examples in shared rows have the loss and the gradient that they have alone."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import ModelError, TrainingCheckError
from fedlora.training import cache, packing_check, train
from fedlora.training.data.batches import collate, tokens_in
from fedlora.training.data.packing import layout, packed, packed_tokens
from fedlora.training.loss_check import check_losses
from fedlora.training.parts_check import Still
from fedlora.training.tasks import causal_lm
from fedlora.training.training_check import check_training
from tests.conftest import LABELS, WORDS
from tests.support.architectures import write
from tests.support.private_setting import Setting, norm
from tests.support.task_rows import task_settings

Settings = Callable[..., dict[str, object]]
PACKED = {"train.packing": True, "model.dropout": 0.0}


@pytest.mark.parametrize("seed", range(20))
def test_no_two_examples_share_a_place_and_no_row_is_wider_than_the_longest(seed):
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (1 + seed,), generator=chance).tolist()
    width = max(lengths) + seed % 3
    rows, firsts, n = layout(lengths, width)
    taken = [
        (row, first + k)
        for row, first, length in zip(rows, firsts, lengths, strict=True)
        for k in range(length)
    ]
    assert len({*taken}) == sum(lengths)
    assert max(place for _, place in taken) < width
    assert {*rows} == {*range(n)}
    assert sum(lengths) / width <= n <= len(lengths)
    half = [
        row
        for row in range(n)
        if sum(x for x, r in zip(lengths, rows, strict=True) if r == row) * 2 <= width
    ]
    assert len(half) <= 1  # two such rows would be one


@pytest.mark.parametrize("left", [False, True])
def test_a_pack_holds_each_examples_tokens_in_a_row_from_position_0_on(left):
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    if left:
        ids, mask = (
            torch.stack([x[i].roll(n) for i, n in enumerate((2, 3, 0))]) for x in (ids, mask)
        )
    found, places = packed({"input_ids": ids, "attention_mask": mask})
    assert found["input_ids"].tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    there = found["input_ids"].flatten()[places]
    assert torch.equal(there[mask.bool()], ids[mask.bool()])
    assert packed_tokens({"input_ids": ids, "attention_mask": mask}) == 10


def uneven(settings: Settings, tmp_path: Path, case: str = "causal-lm", **more: object) -> Setting:
    """Rows of which some are a third as long as others."""
    given = task_settings(settings, case, tmp_path, **PACKED, **more)
    path, chance = tmp_path / "uneven.jsonl", random.Random(3)
    rows = []
    for _ in range(120):
        text = " ".join(chance.choice(WORDS) for _ in range(chance.choice((2, 3, 4, 11))))
        said = {"role": "assistant", "content": chance.choice(LABELS)}
        chat = [{"role": "user", "content": text}, said]
        rows.append({"text": text, "response": f" {said['content']}", "messages": chat})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Setting({**given, "data.path": str(path), "clients.count": 2})


def both(s: Setting, numbers: list[int]) -> tuple[Any, Any]:
    """The losses and the gradient of one step, packed and not."""
    batch, found = collate(s.rows, torch.tensor(numbers)), []
    for pack in (True, False):
        changes = {"packing": pack, "grad_clip": 0.0}
        config = s.config.model_copy(update={"train": s.config.train.model_copy(update=changes)})
        s.model.config = config
        (step,) = train.steps(s.model, [batch], s.live, Still(s.params), config)
        found.append((step, {p: p.grad.clone() for p in s.params if p.grad is not None}))
        Still(s.params).zero_grad()
    s.model.config = s.config
    return found[0], found[1]


@pytest.mark.parametrize("case", ["causal-lm", "chat"])
def test_in_shared_rows_losses_and_gradients_are_those_of_rows_apart(settings, tmp_path, case):
    """In float64, of uneven lengths; with all else of a step that reads rows: parts, smoothing."""
    more = {"train.label-smoothing": 0.1, "train.batch-size": 6,
            "train.gradient-accumulation-steps": 2}  # fmt: skip
    s = uneven(settings, tmp_path, case, **more)
    (step, gradient), (apart, want) = both(s, [*range(11)])
    assert step.losses.tolist() == pytest.approx(apart.losses.tolist(), rel=1e-6)
    assert norm({p: gradient[p] - want[p] for p in want}) < 1e-6 * norm(want)
    assert step.tokens < apart.tokens
    batch = collate(s.rows, torch.arange(11))
    slowly = s.model.task.defined(s.model, batch)
    assert step.losses.tolist() == pytest.approx(slowly.tolist(), rel=1e-6)
    assert packed_tokens(batch) < tokens_in(batch)
    check_losses(s.model, batch, s.config)


def test_a_client_ends_where_it_would_have_without_and_computes_fewer_tokens(settings, tmp_path):
    s = uneven(settings, tmp_path, **{"train.steps": 3, "train.batch-size": 32})
    s.model.peft.float()
    check_training(s.model, s.rows, s.columns, s.config, 1, 0)
    home, found = s.model.read(), list[Any]()
    for pack in (True, False):
        given = s.config.train.model_copy(update={"packing": pack})
        s.model.config = config = s.config.model_copy(update={"train": given})
        s.model.load(home)
        fit = train.fit(s.model, s.rows, s.columns, config, 1, 0)
        found.append((fit, s.model.read().B))
    (fit, B), (apart, want) = found
    assert fit.loss == pytest.approx(apart.loss, rel=1e-5)
    assert fit.tokens < apart.tokens
    for m, x in want.items():
        torch.testing.assert_close(B[m], x, rtol=1e-3, atol=1e-4)


def model_of(settings: Settings, name: str, tmp_path: Path, **more: object) -> Any:
    given = settings("gpt2", **PACKED, **more)
    if name != "gpt2":
        given |= {"model.path": str(write(name, tmp_path / name)),
                  "lora.target-modules": "all-linear"}  # fmt: skip
    return cache.model(Config.read(given), ())


@pytest.mark.parametrize("more", [{}, {"model.attention": "eager"}, {"model.dtype": "bfloat16"}])
def test_a_model_that_keeps_rows_apart_is_taken(settings, tmp_path, more):
    assert model_of(settings, "llama", tmp_path, **more)


@pytest.mark.parametrize(
    ("name", "why"), [("opt", "hangs on its neighbours"), ("bloom", "takes no positions")]
)
def test_a_model_that_mixes_what_lies_in_a_row_is_refused_as_it_is_loaded(
    settings, tmp_path, name, why
):
    """OPT reads a mask that says nothing of examples; Bloom has no positions to begin anew."""
    with pytest.raises(ModelError, match=why):
        model_of(settings, name, tmp_path)


def run_on(inputs: Any) -> tuple[Any, Tensor]:
    """The slip: positions that run on through a row, so that examples see those before them."""
    found, places = packed(inputs)
    ids = found["position_ids"]
    found["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids).clone()
    return found, places


def test_positions_that_run_on_are_seen_by_the_probe_and_by_the_training_check(
    settings, tmp_path, monkeypatch
):
    s = uneven(settings, tmp_path)
    s.model.peft.float()
    batch = collate(s.rows, torch.arange(6))
    packing_check.check_packing(s.model)
    monkeypatch.setattr(causal_lm, "packed", run_on)
    with pytest.raises(ModelError, match="does not keep examples of one row apart"):
        packing_check.check_packing(s.model)
    with pytest.raises(TrainingCheckError, match="an example's loss is not what model"):
        check_losses(s.model, batch, s.config)
