"""Tags of words: which pieces carry them, which files they come in, and scores by seqeval."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedlora import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import DataError, ModelError
from fedlora.training import cache, metrics
from fedlora.training.data.batches import IGNORE, Encoded
from fedlora.training.data.iob import read_iob
from fedlora.training.data.rows import Rows
from fedlora.training.data.tags import beginnings, scheme_of
from fedlora.training.evaluate import evaluate
from fedlora.training.tasks import task_of
from fedlora.training.train import fit
from tests.support.by_task import load
from tests.support.private_setting import Setting
from tests.support.task_rows import task_settings

seqeval = pytest.importorskip("seqeval.metrics")
from seqeval import scheme as schemes  # noqa: E402
from seqeval.metrics import v1  # noqa: E402

Settings = Callable[..., dict[str, object]]
TASK = task_of("token-classification")
LABELS = ("O", "B-x", "I-x")


def rows_of(*sentences: tuple[str, str]) -> Rows:
    """Of words and tags between spaces."""
    texts, tags = (
        [json.dumps(x.split()) for x in column] for column in zip(*sentences, strict=True)
    )
    return Rows(text=tuple(texts), target=tuple(tags), number=tuple(range(len(texts))))


def encoded(tiny: dict[str, str], *sentences: tuple[str, str], longest: int = 64) -> Encoded:
    tokenizer = AutoTokenizer.from_pretrained(tiny["bert"])
    return TASK.encode(rows_of(*sentences), tokenizer, LABELS, DataConfig(), longest)


def corpus_of(path: Path, **changes: Any) -> Any:
    how = {"test_size": 2, "partition": "iid", "client_test_fraction": 0.0, "text": "text"}
    return load(DataConfig(path=str(path), **(how | changes)), "token-classification", 1, 0)


# -- words and pieces -----------------------------------------------------------------------------


def test_a_words_first_piece_has_its_tag_and_the_others_are_not_scored(
    tiny: dict[str, str],
) -> None:
    found = encoded(tiny, ("red cat-dog is", "O B-x I-x"))
    assert found.marks is not None
    assert len(found.ids) == 5  # cat, - and dog are one word
    assert found.marks.tolist() == [0, 1, IGNORE, IGNORE, 2]
    assert TASK.scored(found).tolist() == [3]


def test_words_without_a_piece_and_beyond_the_length_are_counted_and_not_scored(
    tiny: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(("red cat dog is two", "O B-x I-x O O"), ("a b", "O O"))
    odd = Rows(text=('["red", " ", "cat"]', *rows.text), target=('["O", "O", "B-x"]', *rows.target))
    tokenizer = AutoTokenizer.from_pretrained(tiny["bert"])
    with caplog.at_level(logging.WARNING):
        found = TASK.encode(odd, tokenizer, LABELS, DataConfig(), 3)
    assert TASK.scored(found).tolist() == [2, 3, 2]
    assert "2 of 10 words are beyond the 3 tokens of an example" in caplog.text
    assert "of 1 of 10 words the tokenizer makes no piece" in caplog.text


def test_a_sentence_of_which_nothing_is_scored_is_left_out(
    tiny: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = Rows(text=('[" "]', '["red"]'), target=('["O"]', '["B-x"]'))
    tokenizer = AutoTokenizer.from_pretrained(tiny["bert"])
    found = TASK.encode(rows, tokenizer, LABELS, DataConfig(), 9)
    assert found.rows.tolist() == [1]
    assert "1 of 2 rows have no word that is scored" in caplog.text
    with pytest.raises(DataError, match="1 of 1 rows have no word"):
        TASK.encode(rows.select([0]), tokenizer, LABELS, DataConfig(), 9)


def test_a_tokenizer_that_reads_spaces_makes_the_pieces_of_running_text() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    bpe = Tokenizer(models.BPE(vocab, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="!")
    found = TASK.encode(rows_of(("ab c d", "B-x O I-x")), tokenizer, LABELS, DataConfig(), 64)
    assert found.ids.tolist() == tokenizer("ab c d")["input_ids"]
    assert found.marks is not None
    assert found.marks.tolist() == [1, IGNORE, 0, IGNORE, 2, IGNORE]


def test_a_tokenizer_that_knows_no_words_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow does not say which word .*fast tokenizer"):
        TASK.encode(rows_of(("a", "O")), Slow(), LABELS, DataConfig(), 9)  # type: ignore[arg-type]


# -- scores ---------------------------------------------------------------------------------------


def by_hand(s: Setting) -> tuple[list[list[str]], list[list[str]]]:
    """The tags of all training rows and what the model says, a sentence and a word at a time."""
    rows = cache.corpus(s.config).client(0).train
    wanted, said = [], []
    for text, tags in zip(rows.text, rows.target, strict=True):
        ids: list[int] = []
        first = []
        for word in json.loads(text):
            first.append(len(ids))
            pieces = re.findall(r"\w+|[^\w\s]+", word)
            ids += s.model.tokenizer.convert_tokens_to_ids(pieces)
        with torch.no_grad():
            z = s.model.peft(input_ids=torch.tensor([ids])).logits[0]
        wanted.append(json.loads(tags))
        said.append([s.labels[int(z[at].argmax())] for at in first])
    return wanted, said


@pytest.fixture
def setting(settings: Settings, tmp_path: Path) -> Setting:
    s = Setting(task_settings(settings, "tokens", tmp_path, **{"train.steps": 4}), torch.float32)
    fit(s.model, s.rows, s.columns, s.config, 1, 0)
    return s


def test_scores_are_seqevals_on_the_whole_set_in_any_batches_and_order(setting: Setting) -> None:
    s = setting
    wanted, said = by_hand(s)
    want = {
        "f1": seqeval.f1_score(wanted, said),
        "precision": seqeval.precision_score(wanted, said),
        "recall": seqeval.recall_score(wanted, said),
        "token_accuracy": seqeval.accuracy_score(wanted, said),
        "strict_f1": seqeval.f1_score(wanted, said, mode="strict", scheme=schemes.IOB2),
    }
    assert all(0 < value < 1 for value in want.values()), want
    assert abs(want["strict_f1"] - want["f1"]) > 1e-3
    shuffled = s.rows.select(torch.randperm(len(s.rows), generator=torch.Generator()))
    for size, rows in ((1, s.rows), (5, s.rows), (64, shuffled)):
        how = s.config.evaluate.model_copy(update={"batch_size": size})
        found = evaluate(s.model, rows, s.config.model_copy(update={"evaluate": how}))
        assert found is not None
        assert found.pop("loss") > 0
        assert found == pytest.approx(want, abs=1e-9)


def test_scoring_every_piece_would_be_seen(setting: Setting) -> None:
    s = setting
    wanted, said = by_hand(s)
    marks = s.rows.marks
    assert marks is not None
    for place in range(1, len(marks)):  # the slip: a piece has the tag of the piece before it
        if marks[place] == IGNORE:
            marks[place] = marks[place - 1]
    found = evaluate(s.model, s.rows, s.config)
    assert found is not None
    assert abs(found["f1"] - seqeval.f1_score(wanted, said)) > 1e-3


def test_the_loss_counts_every_scored_token_once(setting: Setting) -> None:
    s = setting
    found = evaluate(s.model, s.rows, s.config)
    with torch.no_grad():
        each = s.losses(list(range(len(s.rows)))).double()
    counts = TASK.scored(s.rows)
    assert found is not None
    assert found["loss"] == pytest.approx(float((each * counts).sum() / counts.sum()), rel=1e-5)
    assert abs(found["loss"] - float(each.mean())) > 1e-6


@pytest.mark.parametrize(("scheme", "sentences"), [
    ("IOB2", ["B-x I-x B-x O", "O B-y"]),
    ("IOB1", ["I-x I-x B-x O", "O I-y"]),
    ("IOE2", ["I-x E-x E-x O", "O E-y"]),
    ("IOBES", ["B-x E-x S-x O", "O S-y"]),
    ("BILOU", ["B-x L-x U-x O", "O U-y"]),
    ("IOB2", ["B I B O"]),
    ("", ["B-x U-x S-x"]),
])  # fmt: skip
def test_the_scheme_is_found_and_right_tags_are_right_by_both_modes(
    scheme: str, sentences: list[str]
) -> None:
    tags = [sentence.split() for sentence in sentences]
    names = sorted({tag for row in tags for tag in row})
    assert scheme_of(names, tags) == scheme
    found = metrics.tagged(tags, tags, names, scheme)
    assert {*found.values()} == {1.0}
    assert ("strict_f1" in found) == bool(scheme)


def test_where_the_modes_differ_each_is_seqevals() -> None:
    wanted = [["B-x", "I-x", "O", "B-x"], ["O", "O"]]
    said = [["I-x", "I-x", "O", "B-x"], ["O", "O"]]
    found = metrics.tagged(wanted, said, LABELS, "IOB2")
    assert found["f1"] == 1.0
    strict = v1.precision_recall_fscore_support(wanted, said, average="micro", scheme=schemes.IOB2)
    assert found["strict_f1"] == strict[2] < 1


def test_a_chunk_of_bilou_ends_where_it_says() -> None:
    wanted = [["B-x", "L-x", "U-x"]]
    found = metrics.tagged(wanted, [["B-x", "L-x", "O"]], ["B-x", "L-x", "U-x", "O"], "BILOU")
    assert found["f1"] == found["strict_f1"] == pytest.approx(2 / 3)


def test_without_an_entity_scores_are_0_and_parts_of_speech_have_accuracy_alone() -> None:
    none = metrics.tagged([["O"]], [["O"]], LABELS, "IOB2")
    assert none == {"token_accuracy": 1.0, "f1": 0, "precision": 0, "recall": 0, "strict_f1": 0}
    speech = [["NOUN", "VERB", "I"]]
    assert metrics.tagged(speech, [["NOUN", "NOUN", "I"]], speech[0]) == {
        "token_accuracy": pytest.approx(2 / 3)
    }


def test_the_usage_of_an_export_prints_each_word_with_the_models_tag(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    s = setting
    words = ["red", "is-the", "cat"]
    anna = '["Anna", "lives", "in", "Vienna", "."]'
    script = TASK.script(DataConfig(), None).replace(anna, repr(words))
    names = {"tokenizer": s.model.tokenizer, "LABELS": s.labels, "logits": s.model.logits}
    with torch.no_grad():
        exec(script, names)
        ids = s.model.tokenizer.convert_tokens_to_ids(["red", "is", "-", "the", "cat"])
        z = s.model.peft(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    want = [f"{word} {s.labels[z[at]]}" for word, at in zip(words, (0, 1, 4), strict=True)]
    assert capsys.readouterr().out.splitlines() == want


# -- rows -----------------------------------------------------------------------------------------

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC

# id 7 domain=en
Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
  \t
# NN B-NP O
1996-08-22 CD I-NP O

Paris NNP B-NP B-LOC
London NNP B-NP B-LOC
"""


def sentences(corpus: Any) -> dict[str, str]:
    parts = [corpus.test, *(c.train for c in corpus.clients)]
    return {
        " ".join(json.loads(text)): " ".join(json.loads(tags))
        for part in parts
        for text, tags in zip(part.text, part.target, strict=True)
    }


WANT = {
    "EU rejects German": "B-ORG O B-MISC", "Peter Blackburn": "B-PER I-PER",
    "# 1996-08-22": "O O", "Paris London": "B-LOC B-LOC",
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.conll", "a.iob", "a.iob2", "a.bio"])
@pytest.mark.parametrize("tabs", [False, True])
def test_a_file_of_one_word_a_line_is_read_by_its_suffix(
    tmp_path: Path, name: str, tabs: bool
) -> None:
    text = "\r\n".join(re.sub(r"^(\S+) (\S+) (\S+) (\S+)$", r"\1\t\2\t\3\t\4", x) if tabs else x
                       for x in CONLL.splitlines())  # fmt: skip
    (tmp_path / name).write_bytes(text.encode())
    corpus = corpus_of(tmp_path / name)
    assert sentences(corpus) == WANT
    assert corpus.labels == ("O", "B-LOC", "B-MISC", "B-ORG", "B-PER", "I-PER")
    assert corpus.account.sources[0].unit == "line"
    assert corpus.account.warnings() == []


@pytest.mark.parametrize("mark", [" ", "\t"])
def test_a_space_of_another_kind_is_a_letter_of_its_word(mark: str) -> None:
    rows = [("5\u00a0000", "O"), ("\u3000", "O"), ("New\u2009York", "B-LOC")]
    text = "".join(f"{word}{mark}{tag}\n" for word, tag in rows)
    found = read_iob(f"{text} \u00a0\n{text}")
    assert found.words == [[word for word, _ in rows]] * 2
    assert found.tags == [[tag for _, tag in rows]] * 2


def test_splits_of_a_directory_and_sites_are_such_files_too(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.conll").write_text(CONLL)
    assert sentences(corpus_of(tmp_path)) == WANT


@pytest.mark.parametrize(("text", "message"), [
    ("EU NNP B-ORG\nis O\n", r"line 2: it has 2 columns, must be 3, .*'is O'"),
    ("EU\n", r"line 1: it has 1 columns, must be two or more"),
    ("New\tB-LOC\nYork\t\n\nis\tO\n", r"line 1: the word 'York' has no tag"),
    ("1 The DET _\n2 cat NOUN _\n\n1 So ADV _\n", r"numbers the words of each .*CoNLL-U"),
    ("0\tThe\tO\n1\tcat\tB-X\n", r"numbers the words of each sentence"),
])  # fmt: skip
def test_a_line_that_is_no_word_with_its_tag_is_named(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.iob").write_text(text)
    with pytest.raises(DataError, match=message):
        corpus_of(tmp_path / "a.iob")


def test_lists_of_numbered_classes_keep_their_names_in_order(tmp_path: Path) -> None:
    names = ["O", "B-PER", "I-PER", "B-AGE"]
    features = Features(
        {"tokens": Sequence(Value("string")), "ner": Sequence(ClassLabel(names=names))}
    )
    cells = {"tokens": [["Anna", str(n)] for n in range(9)], "ner": [[1, 0]] * 9}
    data = Dataset.from_dict(cells, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        corpus = corpus_of(path, text="tokens", label="ner")
        assert corpus.labels == tuple(names)
        assert {*sentences(corpus).values()} == {"B-PER O"}
    some = corpus_of(tmp_path / "saved", text="tokens", label="ner", map=("PER=person",))
    assert some.labels == ("O", "B-person", "I-person", "B-AGE")
    none = corpus_of(tmp_path / "saved", text="tokens", label="ner", map=("PER=O",))
    assert none.labels == ("O", "B-AGE")


def test_the_map_renames_types_and_whole_tags(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(CONLL)
    corpus = corpus_of(tmp_path / "a.conll", map=("PER=person", "B-MISC=O"))
    assert sentences(corpus)["Peter Blackburn"] == "B-person I-person"
    assert sentences(corpus)["EU rejects German"] == "B-ORG O O"
    emptied = corpus_of(tmp_path / "a.conll", map=("PER=person", "B-MISC="))
    assert sentences(emptied) == sentences(corpus)
    with pytest.raises(DataError, match=r'data\.map: "PRE" is no value'):
        corpus_of(tmp_path / "a.conll", map=("PRE=person",))


def test_words_and_tags_of_different_numbers_are_named(tmp_path: Path) -> None:
    rows = [{"text": ["a", "b"], "label": ["O", "O"]}, {"text": ["a", "b"], "label": ["O"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r'line 2: 2 words in "text" and 1 tags in "label"'):
        corpus_of(tmp_path / "a.jsonl")


def test_entities_that_begin_with_an_i_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.conll").write_text(CONLL.replace("B-PER", "I-PER"))
    corpus_of(tmp_path / "a.conll", labels=("O", "B-LOC", "B-MISC", "B-ORG", "B-PER", "I-PER"))
    assert "1 entities begin with a tag I-X" in caplog.text
    assert beginnings([["I-x", "I-y", "O", "B-y", "B-y"]]) == (1, 2)


def test_a_prefix_that_is_remembered_gives_each_token_the_same_loss(
    settings: Settings, tmp_path: Path
) -> None:
    found = []
    for cached in (0, 64):
        more = {"lora.layers": "1", "train.prefix-cache": cached}
        s = Setting(task_settings(settings, "tokens", tmp_path, **more), torch.float32)
        found.append(torch.cat([s.losses([0, 3, 7]), s.losses([0, 3, 7])]).detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_run_without_seqeval_is_refused_in_one_line(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.preflight import problems, tasks

    config = Config.read(task_settings(settings, "tokens", tmp_path))
    assert list(problems(config)) == []
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    (found,) = problems(config)
    assert found.endswith("pip install 'fedlora[metrics]'")
