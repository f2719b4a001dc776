"""Token ids, prompt masks and batches."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedlora.config.sections import ModelConfig
from fedlora.errors import DataError
from fedlora.training.data.batches import (
    IGNORE,
    POOL,
    Batch,
    Encoded,
    batches,
    collate,
    eval_batches,
    eval_order,
    prompt_batches,
    steps_in,
)
from fedlora.training.data.corpus import Rows
from fedlora.training.model.loading import load_tokenizer
from tests.support.by_task import encode

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[EOS]", "[BOS]", "[UNK]", "<user>", "<model>"]
TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}"
    "{% else %}<model>{{ m.content }}[EOS]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
ASKED = Rows(text=("w0 w1", "w2"), response=("w3", "w4 w5"))


def words(*, around: str = "$A", **options: str) -> PreTrainedTokenizerFast:
    """A token a word and a token a space, so that the seam of prompt and response shows."""
    vocabulary = {w: i for i, w in enumerate([*SPECIAL, " ", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        around, special_tokens=[("[BOS]", 2), ("[EOS]", 1)]
    )
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]", **options}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=["<user>", "<model>"], **names
    )


def said(tokenizer: PreTrainedTokenizerFast, batch: Batch) -> list[tuple[str, str]]:
    """What each example is and what of it is scored, in words; an underline for a space."""

    def text(ids: torch.Tensor) -> str:
        return "|".join(tokenizer.convert_ids_to_tokens(ids.tolist())).replace(" ", "_")

    return [
        (text(ids[mask.bool()]), text(labels[labels != IGNORE]))
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


def causal(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, **options: object
) -> list[tuple[str, str]]:
    encoded = encode(rows, tokenizer, (), **{"max_length": 50, **options})
    return said(tokenizer, collate(encoded, torch.arange(len(encoded))))


def numbered(*lengths: int) -> Encoded:
    """Examples of these lengths: number i is i + 1, repeated."""
    ids = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)] or [torch.zeros(0)])
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = torch.arange(len(lengths))
    return Encoded(ids.to(torch.int32), starts, rows, pad=0, classes=rows)


def numbers(batch: Batch) -> list[int]:
    return batch["labels"].tolist()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- classification ----------------------------------------------------------------------------


def test_a_classification_batch_is_padded_masked_and_labelled():
    rows = Rows(("w0", "w1 w2", "w3 w4 w5"), ("b", "a", "b"))
    encoded = encode(rows, words(), ("a", "b"), max_length=4)
    batch = collate(encoded, torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[10, 6, 11, 6], [7, 0, 0, 0]]  # "w5" is cut off
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 1]


def test_a_batch_is_what_the_tokenizer_itself_would_pad():
    tokenizer = words(around="[BOS] $A [EOS]")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = Rows(("w0", "w1 w2", "w3 w4 w5 w6"), ("a", "a", "a"))
    batch = collate(encode(rows, tokenizer, ("a",), 6), torch.arange(3))
    expected = tokenizer(
        list(rows.text), padding=True, truncation=True, max_length=6, return_tensors="pt"
    )
    assert batch.keys() == {*expected.keys(), "labels"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
        assert batch[name].dtype == tensor.dtype


def test_no_rows_and_an_empty_batch_have_shape_0_0():
    for encoded in (encode(Rows(), words(), ("a",), 9), encode(Rows(), words(), (), 9)):
        assert len(encoded) == 0
        assert list(batches(encoded, 4, generator(), steps=5)) == []
        assert list(eval_batches(encoded, 4)) == []
    batch = collate(numbered(2, 3), torch.zeros(0, dtype=torch.long))
    assert batch["input_ids"].shape == (0, 0)
    assert batch["labels"].shape == (0,)


# -- causal-lm ---------------------------------------------------------------------------------


def test_the_loss_is_on_the_response_and_its_end_alone():
    assert causal(ASKED, words()) == [
        ("w0|_|w1|_|w3|[EOS]", "_|w3|[EOS]"),
        ("w2|_|w4|_|w5|[EOS]", "_|w4|_|w5|[EOS]"),
    ]


@pytest.mark.parametrize(
    ("prompt", "response", "scored"),
    [
        ("w0", "w1", "_|w1|[EOS]"),
        ("w0 ", "w1", "w1|[EOS]"),
        ("w0", " w1", "_|w1|[EOS]"),
        ("", "w1 w2", "w1|_|w2|[EOS]"),
    ],
)
def test_one_space_is_at_the_seam_whoever_wrote_it(prompt, response, scored):
    assert causal(Rows(text=(prompt,), response=(response,)), words())[0][1] == scored


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_is_never_ended():
    tokenizer = words(around="[BOS] $A [EOS]", bos_token="[BOS]")
    assert causal(ASKED, tokenizer)[0] == ("[BOS]|w0|_|w1|_|w3|[EOS]", "_|w3|[EOS]")


def test_padding_is_not_scored_even_where_eos_is_the_pad_token():
    tokenizer = words(pad_token="[EOS]")
    rows = Rows(text=("w0 w1 w2", "w2"), response=("w3", "w4"))
    batch = collate(encode(rows, tokenizer, (), 50), torch.arange(2))
    assert batch["input_ids"][1].tolist() == [9, 6, 11, 1, 1, 1, 1, 1]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert batch["labels"][1].tolist() == [IGNORE, 6, 11, 1, *[IGNORE] * 4]


def test_without_a_pad_token_the_end_token_pads():
    assert encode(ASKED, words(pad_token=None), (), 50).pad == 1


def test_a_long_response_is_cut_and_a_long_prompt_left_out_and_counted(caplog):
    rows = Rows(text=("w0", "w0 w1 w2", "w5"), response=("w1 w2 w3 w4", "w1", "w6"))
    with caplog.at_level(logging.WARNING):
        encoded = encode(rows, words(), (), max_length=5)
    assert "1 of 3 rows have a prompt of data.max-length = 5 tokens or more" in caplog.text
    assert encoded.rows.tolist() == [0, 2]
    found = said(words(), collate(encoded, torch.arange(2)))
    assert found == [("w0|_|w1|_|w2", "_|w1|_|w2"), ("w5|_|w6|[EOS]", "_|w6|[EOS]")]


def test_every_row_kept_has_a_token_that_is_scored():
    rows = Rows(text=tuple("w1 " * n + "w2" for n in range(9)), response=("w3 w4",) * 9)
    for labels in (b["labels"] for b in batches(encode(rows, words(), (), 8), 3, generator())):
        assert ((labels != IGNORE).sum(1) > 0).all()


def test_no_room_for_any_response_is_an_error():
    with pytest.raises(DataError, match=r"2 of 2 rows have a prompt of data\.max-length = 1"):
        encode(ASKED, words(), (), max_length=1)


def test_a_chat_template_writes_the_turns_and_the_loss_is_on_the_model_s():
    tokenizer = words(around="[BOS] $A", bos_token="[BOS]", chat_template=TURNS)
    assert causal(ASKED, tokenizer, chat_template=True) == [
        ("<user>|w0|_|w1|<model>|w3|[EOS]", "w3|[EOS]"),
        ("<user>|w2|<model>|w4|_|w5|[EOS]", "w4|_|w5|[EOS]"),
    ]


@pytest.mark.parametrize(
    ("template", "rows", "says"),
    [
        (None, ASKED, "tokenizer has none"),
        (TURNS, Rows(text=("",), response=("w0",)), r"needs data\.prompt"),
        (TURNS.replace("else %}<model>", "else %}"), ASKED, "does not continue its own"),
    ],
)
def test_a_chat_template_that_cannot_be_used_says_why(template, rows, says):
    with pytest.raises(DataError, match=says):
        causal(rows, words(chat_template=template), chat_template=True)


def test_prompts_to_generate_from_are_those_trained_on_padded_on_the_left():
    tokenizer = words()
    encoded = encode(ASKED, tokenizer, (), 50)
    [(order, batch)] = prompt_batches(encoded, 4)
    assert order.tolist() == [0, 1]
    assert batch["input_ids"].tolist() == [[7, 6, 8], [0, 0, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


# -- batches -----------------------------------------------------------------------------------

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=120)


@given(lengths, st.integers(1, 9), st.integers(0, 99))
def test_an_epoch_has_every_example_exactly_once_and_whole(lengths, size, seed):
    encoded = numbered(*lengths)
    found = list(batches(encoded, size, generator(seed)))
    seen = [n for batch in found for n in numbers(batch)]
    assert sorted(seen) == list(range(len(lengths)))
    assert sorted(len(numbers(batch)) for batch in found)[1:] == [size] * (len(found) - 1)
    for batch in found:
        for ids, mask, n in zip(
            batch["input_ids"], batch["attention_mask"], numbers(batch), strict=True
        ):
            assert ids[mask.bool()].tolist() == [n + 1] * lengths[n]
            assert not ids[~mask.bool()].any()


@given(lengths, st.integers(1, 9), st.integers(1, 40))
def test_steps_run_through_whole_epochs_before_any_example_comes_again(lengths, size, steps):
    encoded = numbered(*lengths)
    found = list(batches(encoded, size, generator(), steps=steps))
    assert len(found) == steps
    an_epoch = steps_in(len(lengths), size)
    for i in range(0, steps, an_epoch):
        seen = [n for batch in found[i : i + an_epoch] for n in numbers(batch)]
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("rows", "size", "steps", "epochs", "expected"),
    [
        (10, 4, 0, 1.0, 3),
        (10, 4, 0, 2.5, 8),
        (10, 4, 0, 0.1, 1),
        (10, 4, 7, 1.0, 7),
        (0, 4, 7, 1.0, 0),
    ],
)
def test_the_number_of_steps_is_known_before(rows, size, steps, epochs, expected):
    assert steps_in(rows, size, steps, epochs) == expected
    encoded = numbered(*[3] * rows)
    assert len(list(batches(encoded, size, generator(), steps, epochs))) == expected


def test_the_generator_decides_the_order_and_epochs_differ():
    def order(seed: int) -> list[int]:
        found = batches(numbered(*[2, 5, 3, 9] * 10), 4, generator(seed), epochs=2)
        return [n for batch in found for n in numbers(batch)]

    state = torch.get_rng_state()
    assert order(1) == order(1) != order(2)
    assert order(1)[:40] != order(1)[40:]
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_like_length_have_little_padding():
    lengths = torch.randint(5, 50, (800,), generator=generator()).tolist()
    found = batches(numbered(*lengths), 10, generator())
    padding = 1 - sum(lengths) / sum(batch["input_ids"].numel() for batch in found)
    assert padding < 0.15  # 0.44 where batches are drawn without regard to length


def test_batches_come_in_no_order_of_length():
    encoded = numbered(*range(1, 10 * POOL + 1))
    widths = [batch["input_ids"].shape[1] for batch in batches(encoded, 10, generator())]
    assert sorted(widths) == list(range(10, 10 * POOL + 1, 10))
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


@given(lengths, st.integers(1, 9))
def test_evaluation_takes_all_once_and_finds_the_way_back(lengths, size):
    encoded = numbered(*lengths)
    found = list(eval_batches(encoded, size))
    seen = torch.tensor([n for batch in found for n in numbers(batch)])
    order = eval_order(encoded)
    assert torch.equal(seen, order)
    assert seen[order.argsort()].tolist() == list(range(len(lengths)))
    widths = [batch["input_ids"].shape[1] for batch in found]
    assert widths == sorted(widths, reverse=True)


def test_a_long_text_is_cut_at_its_end_whatever_side_the_tokenizers_file_says(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    made = PreTrainedTokenizerFast.from_pretrained(tiny["bert"], truncation_side="left")
    made.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path), task="classification"))
    rows = Rows(("red green blue",), ("a",))
    ids = encode(rows, loaded, ("a", "b"), max_length=2).ids.tolist()
    assert loaded.convert_ids_to_tokens(ids) == ["red", "green"]
