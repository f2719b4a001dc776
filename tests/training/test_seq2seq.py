"""Encoder-decoders: what the decoder is given, what is cut, what is adapted, and greedy answers."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fedlora import Config, check
from fedlora.config.sections import DataConfig
from fedlora.errors import ModelError
from fedlora.launch.doctor.the_rows import unanswerable
from fedlora.launch.export_targets import problems
from fedlora.training import cache
from fedlora.training.calibration import moments
from fedlora.training.data.batches import IGNORE, alone, collate
from fedlora.training.data.rows import Rows
from fedlora.training.model.decoder import as_read, begin_of
from fedlora.training.model.layers import find_layers
from fedlora.training.model.loading import load_base
from fedlora.training.model.model import PREFIX
from fedlora.training.model.prefix_cache import Prefix
from fedlora.training.tasks import answers, task_of
from fedlora.training.tasks.seq2seq import answered
from fedlora.training.train import example_losses
from tests.support.architectures import write
from tests.support.private_setting import Setting
from tests.support.task_rows import task_settings

Settings = Callable[..., dict[str, object]]
TASK = task_of("seq2seq")
BOTH = pytest.mark.parametrize("case", ["seq2seq", "bart"])


def setting(settings: Settings, case: str, tmp_path: Path, **changes: object) -> Setting:
    given = task_settings(settings, case, tmp_path, **changes)
    return Setting(given, torch.float32)


def rows_of(*pairs: tuple[str, str]) -> Rows:
    texts, responses = zip(*pairs, strict=True)
    return Rows(text=texts, response=responses, number=tuple(range(len(pairs))))


def encoded(tokenizer: Any, *pairs: tuple[str, str], longest: int = 64) -> Any:
    return TASK.encode(rows_of(*pairs), tokenizer, (), DataConfig(), longest)


# -- what the decoder is given --------------------------------------------------------------------


@BOTH
def test_an_examples_loss_is_the_one_that_transformers_gives_it(
    settings: Settings, tmp_path: Path, case: str
) -> None:
    """Which shifts the labels itself: with labels given in place of what goes in, others come."""
    s = setting(settings, case, tmp_path)
    some = [0, 3, 5, 8]
    batch = collate(s.rows, torch.tensor(some))
    slipped = dict(batch)
    slipped["decoder_input_ids"] = batch["labels"].clamp(min=0)
    with torch.no_grad():
        ours, wrong = example_losses(s.model, batch), example_losses(s.model, slipped)
        for i, (loss, other) in enumerate(zip(ours, wrong, strict=True)):
            one = alone(batch, i)
            texts = {key: one[key] for key in ("input_ids", "attention_mask", "labels")}
            want = s.model.peft(**texts).loss
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
            assert abs(other - want) > 1e-3


@pytest.mark.parametrize(("case", "first"), [("seq2seq", 0), ("bart", 2)])
def test_a_decoder_begins_as_the_models_own_shift_has_it(
    settings: Settings, tmp_path: Path, case: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5's with the padding, BART's with the end mark; of a class without a shift, by the config;
    of one that puts in two tokens, or that says nothing, not at all."""
    s = setting(settings, case, tmp_path)
    base: Any = s.model.peft.get_base_model()
    assert begin_of(s.model) == first
    assert as_read(s.model, s.rows).other is s.rows.other
    twice = lambda labels: base.prepare_decoder_input_ids_from_labels(  # noqa: E731
        torch.nn.functional.pad(labels, (1, -1), value=5)
    )
    monkeypatch.setattr(s.model.peft, "get_base_model", lambda: Shifting(twice))
    with pytest.raises(ModelError, match="not given a response's tokens one place later"):
        begin_of(s.model)
    plain = Shifting(None)
    plain.config = base.config
    monkeypatch.setattr(s.model.peft, "get_base_model", lambda: plain)
    assert begin_of(s.model) == first
    plain.config = type("Bare", (), {"decoder_start_token_id": None})()
    with pytest.raises(ModelError, match=r"config\.json has no decoder_start_token_id"):
        begin_of(s.model)


class Shifting:
    """A model with this shift of labels, or without one."""

    config: Any

    def __init__(self, shift: Any) -> None:
        if shift:
            self.prepare_decoder_input_ids_from_labels = shift


def test_t5_reads_a_text_alike_whichever_side_its_padding_is_on(
    settings: Settings, tmp_path: Path
) -> None:
    s = setting(settings, "seq2seq", tmp_path)
    some = torch.tensor([0, 3, 5, 8])
    right, left = (collate(replace(s.rows, left=x), some) for x in (False, True))
    assert not torch.equal(right["input_ids"], left["input_ids"])
    assert torch.equal(right["labels"], left["labels"]), "a decoder's padding is always behind"
    with torch.no_grad():
        ours, other = (example_losses(s.model, x) for x in (right, left))
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


@BOTH
def test_an_example_is_taken_out_of_a_batch_by_the_padding_of_each_half(
    settings: Settings, tmp_path: Path, case: str
) -> None:
    """Also where both halves are padded to one width."""
    s = setting(settings, case, tmp_path)
    for width in (0, 40):
        batch = collate(s.rows, torch.tensor([0, 3, 5, 8]), width)
        for i, n in enumerate([0, 3, 5, 8]):
            one = alone(batch, i)
            assert one["input_ids"].shape[1] == int(s.rows.lengths[n])
            assert one["labels"].shape == one["decoder_input_ids"].shape
            assert (one["labels"] != IGNORE).all()
            assert int(TASK.scored(s.rows)[n]) == one["labels"].shape[1]


# -- tokens ---------------------------------------------------------------------------------------


def test_a_response_ends_in_the_end_mark_once(tmp_path: Path, tiny: dict[str, str]) -> None:
    """Whether the tokenizer puts it there or not."""
    ending = AutoTokenizer.from_pretrained(write("t5", tmp_path / "t5"))
    for tokenizer in (ending, AutoTokenizer.from_pretrained(tiny["bert"])):
        found = encoded(tokenizer, ("red is", "colour two"), ("dog", "animal"))
        spans = found.other.ids.split(found.other.lengths.tolist())
        assert [x.tolist().count(2) for x in spans] == [1, 1]
        assert [int(x[-1]) for x in spans] == [2, 2]


def test_what_is_longer_than_a_length_is_cut_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A text before its end mark; a response with its end, which is then not learned."""
    tokenizer = AutoTokenizer.from_pretrained(write("t5", tmp_path / "t5"))
    with caplog.at_level(logging.WARNING):
        found = encoded(tokenizer, ("red is the dog", "two"), ("dog", "one two up down"), longest=3)
    assert "1 of 2 responses have more than data.max-length = 3 tokens" in caplog.text
    ids = [x.tolist() for x in found.ids.split(found.lengths.tolist())]
    written = [x.tolist() for x in found.other.ids.split(found.other.lengths.tolist())]
    assert [len(x) for x in ids] == [3, 2]
    assert ids[0][-1] == 2
    assert [len(x) for x in written] == [2, 3]
    assert [2 in x for x in written] == [True, False]


# -- what is adapted, and what is kept ------------------------------------------------------------


@BOTH
def test_auto_adapts_both_halves_and_what_the_decoder_reads_of_the_encoder(
    settings: Settings, tmp_path: Path, case: str
) -> None:
    given = task_settings(settings, case, tmp_path) | {"lora.target-modules": "auto"}
    config = Config.read(given)
    found = [*find_layers(load_base(config.model, (), 0), config)]
    across = "EncDecAttention" if case == "seq2seq" else "encoder_attn"
    halves = [[m for m in found if f"{half}." in m] for half in ("encoder", "decoder")]
    assert all(halves)
    assert sum(map(len, halves)) == len(found)
    assert [m for m in halves[1] if across in m]
    assert [m for m in halves[1] if across not in m]


def test_states_of_a_decoder_are_not_kept_by_the_text_of_the_encoder(
    settings: Settings, tmp_path: Path
) -> None:
    given = task_settings(settings, "bart", tmp_path) | {
        "lora.target-modules": "decoder.layers.1.fc1", "train.prefix-cache": 8,
        "model.dropout": 0.0}  # fmt: skip
    config = Config.read(given)
    base = load_base(config.model, (), 0)
    assert Prefix.of(base, find_layers(base, config), config) is None


def test_calibration_sees_the_tokens_of_each_half_and_no_padding(
    settings: Settings, tmp_path: Path
) -> None:
    s = setting(settings, "bart", tmp_path)
    names = [m for m in s.model.shapes if ".1." in m and not m.endswith("fc1")]
    some = s.rows.select(torch.tensor([0, 3, 5, 8]))
    found = moments(s.model, some, 4, names, False)
    seen: dict[str, list[torch.Tensor]] = {m: [] for m in names}
    hooks = [
        s.model.peft.get_submodule(PREFIX + m).register_forward_pre_hook(
            lambda _, x, m=m: seen[m].append(x[0].flatten(0, 1).double())
        )
        for m in names
    ]
    with torch.no_grad(), s.model.peft.disable_adapter():
        for i in range(4):
            one = alone(collate(some, torch.tensor([i])), 0)
            s.model.logits({key: x for key, x in one.items() if key != "labels"})
    for hook in hooks:
        hook.remove()
    counts = {int(some.lengths.sum()), int(TASK.scored(some).sum())}
    assert {n for n, _, _ in found.values()} == counts
    for m in names:
        x = torch.cat(seen[m])
        assert found[m][0] == len(x)
        torch.testing.assert_close(found[m][2], x.T @ x, rtol=1e-5, atol=1e-6)


# -- answers --------------------------------------------------------------------------------------


@BOTH
def test_an_answer_is_the_most_likely_token_each_time(
    settings: Settings, tmp_path: Path, case: str
) -> None:
    """As written out with the model's forward pass alone, until the end mark or the longest
    response; in batches of any size."""
    s = setting(settings, case, tmp_path)
    rows = s.rows.select(torch.arange(9))
    assert rows.other is not None
    most = int(rows.other.lengths.max())
    want = []
    for i in range(9):
        one = collate(rows, torch.tensor([i]))
        written = [begin_of(s.model)]
        while len(written) <= most and 2 not in written[1:]:
            ids = torch.tensor([written])
            texts = {key: one[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                z = s.model.logits({**texts, "decoder_input_ids": ids})
            written.append(int(z[0, -1].argmax()))
        want.append(s.model.tokenizer.decode(written[1:], skip_special_tokens=True))
    for size in (2, 9):
        how = s.config.evaluate.model_copy(update={"batch_size": size, "generate_tokens": -1})
        found, said = answered(s.model, rows, s.config.model_copy(update={"evaluate": how}))
        assert found == want
    corpus = cache.client_rows(0, s.config, ()).train
    assert said == [corpus.response[int(n)] for n in rows.rows]


@pytest.mark.parametrize(("asked", "lost"), [(-1, 1), (3, 1), (2, 2), (1, 3)])
def test_a_response_that_no_answer_can_match_is_told(
    settings: Settings, tmp_path: Path, asked: int, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The end mark, 9, need not be written; a response that was cut has none."""
    answers._tell.cache_clear()
    given = task_settings(settings, "seq2seq", tmp_path, **{"evaluate.generate-tokens": asked})
    responses = [[5, 9], [5, 6, 9], [5, 6, 7, 9], [5, 6, 7, 8]]
    with caplog.at_level(logging.WARNING):
        most = answers.most_tokens(responses, 9, Config.read(given))
    assert most == (4 if asked < 0 else asked)
    assert f"{lost} of 4 responses are longer than evaluate.generate-tokens" in caplog.text
    caplog.clear()
    assert answers.most_tokens(responses[:1], 9, Config.read(given)) == (2 if asked < 0 else asked)
    assert not caplog.text


def test_doctor_counts_responses_that_are_longer_than_an_answer_may_be(
    settings: Settings, tmp_path: Path
) -> None:
    for asked, told in ((2, 1), (-1, 0), (30, 0)):
        s = setting(settings, "seq2seq", tmp_path, **{"evaluate.generate-tokens": asked})
        found = [f.what for f in unanswerable(s.config, cache.corpus(s.config), s.model)]
        assert len(found) == told
        assert not told or "responses are longer than evaluate.generate-tokens = 2" in found[0]


# -- models of another kind -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "says"),
    [
        ("bart", "causal-lm", r"is an encoder-decoder \(bart\), .* set model\.task = 'seq2seq'"),
        ("t5", "preference", r"is an encoder-decoder \(t5\), .* set model\.task = 'seq2seq'"),
        ("bert", "seq2seq", "is a bert, of which transformers has no encoder-decoder that writes"),
        ("gpt2", "seq2seq", "is a gpt2, of which transformers has no encoder-decoder that writes"),
    ],
)
def test_a_model_of_another_kind_is_one_line_of_doctors(
    settings: Settings, tmp_path: Path, name: str, task: str, says: str
) -> None:
    case = "preference" if task == "preference" else "seq2seq"
    given = task_settings(settings, case, tmp_path)
    given |= {"model.path": str(write(name, tmp_path / name)), "model.task": task}
    (problem,) = check(given)
    assert re.search(says, problem)
    assert "\n" not in problem


def test_a_server_of_decoders_does_not_take_it(settings: Settings, tmp_path: Path) -> None:
    s = setting(settings, "bart", tmp_path)
    (why,) = problems("vllm", s.model, 3)
    assert "serves adapters of decoders, and this is an encoder-decoder" in why
    assert not [*problems("peft", s.model, 3)]


def test_an_export_answers_by_plain_transformers(settings: Settings, tmp_path: Path) -> None:
    """And by the script of its card, in its own directory."""
    from fedlora import export, simulate

    given = task_settings(settings, "bart", tmp_path, **{"run.rounds": 1, "train.steps": 2})
    run = simulate(given)
    export(run, tmp_path / "out", merged=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a response ends with the token `[EOS]`" in card
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in card
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(["red is the dog"], return_tensors="pt")
    ids = batch["input_ids"], batch["attention_mask"]
    out = model.generate(ids[0], attention_mask=ids[1], max_new_tokens=3, num_beams=1)
    assert out[0, 0] == 2
    assert 1 < len(out[0]) <= 4
    names: dict[str, Any] = {}
    loads, uses = [part.split("```")[0] for part in card.split("```python\n")[1:3]]
    loads = loads.replace('HERE = "."', f"HERE = {str(tmp_path / 'out')!r}")
    exec(compile(loads + uses.replace("print(", "said = ("), "card", "exec"), names)
    assert isinstance(names["said"], str)
