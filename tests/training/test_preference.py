"""Preference by DPO: the reference is the untouched model, whatever a strategy has moved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora import Config, Run, simulate
from fedlora.training import cache, references
from fedlora.training.data.batches import Encoded, collate
from fedlora.training.evaluate import evaluate
from tests.support.private_setting import Setting
from tests.support.task_rows import task_settings

Settings = Callable[..., dict[str, object]]


def by_transformers(path: str, rows: Encoded) -> torch.Tensor:
    """log p of each row's two answers by the checkpoint as it lies on disk, row by row, (n, 2)."""
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    found = []
    for i in range(len(rows)):
        batch, row = collate(rows, torch.tensor([i])), []
        for name in ("", "other_"):
            ids, labels = batch[f"{name}input_ids"], batch[f"{name}labels"][0]
            with torch.no_grad():
                z = model(input_ids=ids).logits[0].log_softmax(-1)
            at = [t for t in range(1, len(labels)) if labels[t] >= 0]
            row.append(float(sum(z[t - 1, labels[t]] for t in at)))
        found.append(row)
    return torch.tensor(found, dtype=torch.float64)


def ran(settings: Settings, tmp_path: Path, **changes: object) -> tuple[Config, Run]:
    given = task_settings(settings, "preference", tmp_path, **{"run.rounds": 3, **changes})
    return Config.read(given), simulate(given)


@pytest.mark.parametrize("changes", [
    {"strategy.name": "fedex"},
    {"strategy.name": "flora"},
    pytest.param({"strategy.name": "frlora", "clients.ranks": "3"}, marks=pytest.mark.slow),
    {"strategy.name": "fedavg", "clients.ranks": "3", "lora.init": "pissa"},
    pytest.param({"strategy.name": "fedex", "lora.init": "loftq", "clients.ranks": "3"},
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_a_rows_reference_is_the_untouched_checkpoints_after_rounds_that_moved_the_base(
    settings: Settings, tmp_path: Path, changes: dict[str, object]
) -> None:
    config, run = ran(settings, tmp_path, **changes)
    labels = cache.corpus(config).labels
    cache.encoded.cache_clear()
    for file in tmp_path.rglob("references-*"):
        file.unlink()  # computed once more, on the base as three rounds have left it
    model = cache.model(config, labels)
    for part, client in (("train", 0), ("central", -1)):
        rows = cache.encoded(part, client, config, labels)
        want = by_transformers(str(config.model.path), rows)
        assert rows.targets is not None
        torch.testing.assert_close(rows.targets.double(), want, rtol=0, atol=1e-5)
    with torch.no_grad(), model.peft.disable_adapter():  # "adapters off" is another model
        off = model.task.refer(model, collate(rows, torch.arange(len(rows)))).double()  # type: ignore[union-attr]
    assert (off - want).abs().max() > 1e-3, "nothing has moved: this test shows nothing"
    assert run.summary["final"]["margin"] > 0.01


def test_the_first_batch_has_margin_zero_and_loss_ln_2(settings: Settings, tmp_path: Path) -> None:
    s = Setting(task_settings(settings, "preference", tmp_path), torch.float32)
    with torch.no_grad():
        for m in s.model.held():
            s.model.sides(m)[1].zero_()  # B = 0, as round 1 begins
    losses = s.losses([0, 3, 5, 8])
    torch.testing.assert_close(losses, torch.full((4,), math.log(2)), rtol=0, atol=2e-6)
    found = evaluate(s.model, s.rows, s.config)
    assert found is not None
    assert abs(found["margin"]) < 2e-6


def test_nothing_is_dropped_in_the_references_pass_nor_in_training_unless_it_is_set(
    settings: Settings, tmp_path: Path
) -> None:
    given = task_settings(settings, "preference", tmp_path)
    even, dropping = (
        Setting({**given, **more}, torch.float32) for more in ({}, {"model.dropout": 0.4})
    )
    for s in (even, dropping):
        with torch.no_grad():
            for m in s.model.held():
                s.model.sides(m)[1].zero_()
        s.model.peft.train()
    ln_2 = torch.full((4,), math.log(2))
    torch.testing.assert_close(even.losses([0, 3, 5, 8]), ln_2, rtol=0, atol=2e-6)
    assert (dropping.losses([0, 3, 5, 8]) - ln_2).abs().min() > 1e-4
    torch.testing.assert_close(dropping.rows.targets, even.rows.targets, rtol=0, atol=1e-6)
    drops = AutoModelForCausalLM.from_pretrained(str(given["model.path"])).config.resid_pdrop
    assert drops > 0, "this model drops nothing by itself: this test shows nothing"


def test_references_are_computed_once_a_row_and_kept_for_who_goes_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = references._computed

    def counted(model: Any, task: Any, rows: Encoded, config: Config) -> torch.Tensor:
        computed.append(len(rows))
        return real(model, task, rows, config)

    monkeypatch.setattr(references, "_computed", counted)
    config, _ = ran(settings, tmp_path, **{"run.rounds": 1})
    assert sum(computed) == 90
    labels = cache.corpus(config).labels
    first = cache.encoded("train", 1, config, labels).targets
    cache.encoded.cache_clear()  # as another process
    again_ = cache.encoded("train", 1, config, labels).targets
    assert sum(computed) == 90
    assert torch.equal(first, again_)  # type: ignore[arg-type]
    (file,) = (tmp_path / "run" / "clients").glob("references-*")
    file.write_bytes(file.read_bytes()[:-5])
    cache.encoded.cache_clear()
    assert torch.equal(first, cache.encoded("train", 1, config, labels).targets)  # type: ignore[arg-type]
    assert sum(computed) > 90, "a damaged file is computed anew"


def test_the_untouched_base_is_put_back_bit_by_bit(settings: Settings, tmp_path: Path) -> None:
    config, _ = ran(settings, tmp_path, **{"strategy.name": "fedex", "run.rounds": 2})
    model = cache.model(config, ())
    before = {n: p.detach().clone() for n, p in model.peft.named_parameters()}
    with model.base.untouched():
        inside = {n: p.detach().clone() for n, p in model.peft.named_parameters()}
    after = dict(model.peft.named_parameters())
    assert all(torch.equal(x, after[n]) for n, x in before.items())
    assert any(not torch.equal(x, inside[n]) for n, x in before.items())


def test_rows_of_two_equal_answers_are_left_out(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    lines = [f"red w{i},one,{'one' if i % 3 == 0 else 'two'}" for i in range(60)]
    file.write_text("\n".join(["text,chosen,rejected", *lines]))
    given = task_settings(settings, "preference", tmp_path)
    more = {"data.test-size": 6, "data.client-test-fraction": 0.0}
    config = Config.read({**given, "data.path": str(file), **more})
    parts = [("central", -1), *(("train", i) for i in range(4))]
    encoded = [cache.encoded(part, i, config, ()) for part, i in parts]
    assert sum(map(len, encoded)) == 40
