"""What is trained begins with what generation is sent, and ends where generation stops."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as tried
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedlora.config.reader import Config
from fedlora.errors import DataError
from fedlora.launch.doctor.the_run import experiment
from fedlora.training import cache
from fedlora.training.data.corpus import Rows
from fedlora.training.data.seam import Pieces, end_mark, pieces
from fedlora.training.evaluate import generation
from fedlora.training.tasks.causal_lm import answered
from tests.support.by_task import encode

CORPUS = [
    "Question: is it so? Answer: yes", "Answer: no\nAnswer: yes and no", "2++3 = 5, 2+3 = 5",
    "the theory of the thing: then, there", "i++; j++ ; k += 1", "naive caf\u00e9 \u4f60\u597d",
] * 4  # fmt: skip
CHARACTERS = "ehtyns A:+23\n.\u00e9"
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
KINDS = (
    "byte-bpe", "bpe", "bpe-no-prefix", "bpe-old-llama", "unigram", "unigram-no-prefix",
    "wordpiece",
)  # fmt: skip


@functools.cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of this kind that was trained on the corpus."""
    size: dict[str, Any] = {"vocab_size": 330, "special_tokens": SPECIAL, "show_progress": False}
    scheme = "never" if "no-prefix" in kind else "first"
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if kind == "byte-bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        size["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(**size)
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**size)
    elif kind.startswith("unigram"):
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = metaspace
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **size)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        if kind == "bpe-old-llama":
            prepend = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            made.normalizer = normalizers.Sequence(prepend)
            strip = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            made.decoder = decoders.Sequence(strip)
        else:
            made.pre_tokenizer = metaspace
            made.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.BpeTrainer(**size)
    made.train_from_iterator(CORPUS, trainer)
    return made


def tokenizer(kind: str, **options: Any) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained(kind), **{**names, **options})


def one(made: PreTrainedTokenizerFast, prompt: str, response: str, chat: bool = False) -> Pieces:
    (found,) = pieces(Rows(text=(prompt,), response=(response,)), made, chat)
    return found


def read(made: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(made.decode(ids, clean_up_tokenization_spaces=False))


texts = st.text(alphabet=CHARACTERS, min_size=1, max_size=9)


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=texts, response=texts)
@example("Answer: ", "yes")
@example("Answer:", "yes")
@example("2+", "+3")
@example("th", "e")
@example("Answer:\n", "\nyes")
@tried(max_examples=60, deadline=None)
def test_training_conditions_on_the_very_ids_that_generation_is_sent(
    kind: str, prompt: str, response: str
) -> None:
    made = tokenizer(kind)
    found = one(made, prompt, response)
    assert found.prompt == made(prompt)["input_ids"]
    if not found.response:  # this tokenizer cannot: the row is left out, and counted
        assert found.straddled
        return
    assert found.response[-1] == made.eos_token_id
    joined = not (prompt[-1].isspace() or response[0].isspace())
    whole = read(made, made(f"{prompt} {response}" if joined else prompt + response)["input_ids"])
    assert read(made, found.prompt + found.response[:-1]) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "response"), [("Answer: ", "yes"), ("Answer:", "yes"), ("Answer:\n", "no")]
)
def test_a_seam_that_people_write_can_be_trained_with_every_tokenizer(
    kind: str, prompt: str, response: str
) -> None:
    """And no space mark is put where the text has none."""
    made = tokenizer(kind)
    found = one(made, prompt, response)
    tokens = made.convert_ids_to_tokens(found.response[:-1])
    marks = sum(t.count("\u2581") + t.count("\u0120") for t in tokens)
    assert marks <= (prompt == "Answer:")
    assert "".join(tokens).strip("\u2581\u0120").replace("##", "") == response


def test_a_token_that_would_lie_on_both_sides_of_the_seam_is_split_and_counted() -> None:
    made = tokenizer("byte-bpe")
    assert "++" in made.get_vocab()
    found = encode(Rows(text=("x: 2+", "x: 2"), response=(" +3", " 3")), made, (), 99)
    assert found.straddled == 0
    template = "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
    made = tokenizer("byte-bpe", chat_template=template)
    found = encode(Rows(text=("x: 2+", "x: 2"), response=("+3", "+3")), made, (), 99, True)
    assert found.straddled == 1
    first = found.ids[found.starts[0] : found.starts[1]].tolist()
    assert made.convert_ids_to_tokens(first)[-4:] == ["+", "+", "3", "</s>"]


# -- the end ---------------------------------------------------------------------------------------

TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("behind", "mark"),
    [("", "</s>"), ("\n", "</s>"), ("<|end|>\n", "<|end|>"), ("</s>", "</s>"),
     ("<|end|>\n</s>", "<|end|>"), ("<|end_of_bot|>\n", "<|end_of_bot|>"), ("</b>", "</b>")],
)  # fmt: skip
def test_a_response_ends_with_the_mark_that_generation_stops_at(behind: str, mark: str) -> None:
    """Which the template writes, or, where it writes none, is the tokenizer's own."""
    special = ["<|end|>", "<|end_of_bot|>", "</b>"]
    made = tokenizer(
        "byte-bpe", extra_special_tokens=special, chat_template=TURNS.replace("END", behind)
    )
    found = one(made, "is it so?", "yes", chat=True)
    sent = made.apply_chat_template(
        [{"role": "user", "content": "is it so?"}], add_generation_prompt=True, return_dict=False
    )
    assert found.prompt == sent
    tokens = made.convert_ids_to_tokens(found.response)
    assert tokens[-1] == mark
    assert tokens.count(mark) == 1
    assert end_mark(made, True) == found.response[-1]
    assert end_mark(made) == made.eos_token_id


def test_what_a_tokenizer_cannot_write_is_no_end_mark() -> None:
    """A line's end behind the assistant's words is <unk> in sentencepiece without bytes."""
    made = tokenizer("bpe", chat_template=TURNS.replace("END", "\f"))
    assert (
        made.convert_ids_to_tokens(made("\f", add_special_tokens=False)["input_ids"])[-1] == "<unk>"
    )
    assert made.convert_ids_to_tokens(end_mark(made, True)) == "</s>"
    assert made.convert_ids_to_tokens(one(made, "is it so?", "yes", True).response)[-1] == "</s>"


def test_a_response_that_quotes_the_mark_is_not_cut_there() -> None:
    made = tokenizer(
        "byte-bpe", extra_special_tokens=["<|end|>"], chat_template=TURNS.replace("END", "<|end|>")
    )
    tokens = made.convert_ids_to_tokens(one(made, "say", "a<|end|>b", chat=True).response)
    assert tokens == ["a", "<|end|>", "b", "<|end|>"]


@pytest.mark.parametrize("behind", ["", " </s>", " </s> e"])
def test_a_prompt_that_ends_with_the_end_mark_keeps_it(behind: str) -> None:
    """What is taken off a text's end is what the tokenizer itself puts there, and no more."""
    made = tokenizer("byte-bpe")
    special = [(t, made.convert_tokens_to_ids(t)) for t in ("</s>", "e")]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A{behind}", special_tokens=special
    )
    for prompt in ("say</s>", "say", "</s>"):
        found = one(made, prompt, " yes")
        assert found.prompt == made(prompt, add_special_tokens=False)["input_ids"]
        assert read(made, found.response) == " yes</s>"
    assert read(made, one(made, "say", " yes</s>").response) == " yes</s>"


def test_a_tokenizer_without_an_end_has_none() -> None:
    made = tokenizer("byte-bpe", eos_token=None)
    assert end_mark(made) is None
    assert made.convert_ids_to_tokens(one(made, "2+", " 3").response)[-1] == "3"


def test_a_template_that_refuses_a_turn_is_an_error_that_says_so() -> None:
    made = tokenizer("byte-bpe", chat_template="{{ raise_exception('no assistants here') }}")
    with pytest.raises(DataError, match=r"refuses .*no assistants here"):
        one(made, "a", "b", chat=True)


# -- generation ------------------------------------------------------------------------------------

ODD = {"min_new_tokens": 5, "eos_token_id": [3, 5], "repetition_penalty": 9.0, "num_beams": 2,
       "suppress_tokens": [4], "no_repeat_ngram_size": 1, "max_length": 7}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_are_greedy_whatever_the_bases_own_generation_settings_are(
    tiny: dict[str, str], tmp_path: Path, kind: str, settings: Callable[..., dict[str, object]]
) -> None:
    """Against one token at a time of the largest logit, up to the mark that was trained."""
    base = shutil.copytree(tiny[kind], tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(ODD))
    given = settings(kind, **{"model.path": str(base), "evaluate.generate-tokens": 6})
    config = Config.read(given)
    model = cache._load_model(config, ())
    rows = encode(
        Rows(("red two", "the dog", "up"), response=("a", "b", "c")), model.tokenizer, (), 30
    )
    answers, _ = answered(model, rows, config)
    for prompt, answer in zip(("red two", "the dog", "up"), answers, strict=True):
        ids = model.tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 6:
            with torch.no_grad():
                ids.append(int(model.peft(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
        assert answer == model.tokenizer.decode(ids[start:], skip_special_tokens=True)
    mark = model.tokenizer.eos_token
    assert generation(model.tokenizer, config) == {"greedy": True, "tokens": 6, "stops_at": mark}


def test_doctor_says_where_the_model_learns_to_stop_and_counts_shared_tokens(
    tmp_path: Path, settings: Callable[..., dict[str, object]]
) -> None:
    tokenizer("byte-bpe").save_pretrained(str(tmp_path))
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=330,
            n_positions=64,
            n_embd=24,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(str(tmp_path))
    lines = [{"a": f"{i} Answer:", "b": "yes"} for i in range(90)]
    Path(tmp_path, "sums.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    given = {"model.path": str(tmp_path), "data.path": str(tmp_path / "sums.jsonl"),
             "data.prompt": "{a} ", "data.response": "b"}  # fmt: skip
    found = {f.what: f for f in experiment(Config.read({**settings("gpt2"), **given}))[0]}
    assert found["the model learns to stop at '</s>'"].level == "ok"
    (shared,) = [text for text in found if "a token would lie in both" in text]
    assert shared.startswith("90 of 90 rows")
    assert found[shared].level == "note"
    assert "without a space" in found[shared].do
