"""A tag for each word of a sentence: entities, chunks, parts of speech.

    loss of an example     the mean of -log softmax(z_t)_y over its own scored tokens t
    scores                 f1, precision, recall of entities, all types together, by conlleval's
                           rules; strict_f1 by the tags' own scheme; token_accuracy, of words;
                           loss (nats a scored token, every token of all examples once)
    predicted              the tag of a word's first piece

A word's first piece has its tag, and its other pieces are read and not scored. Words that the
tokenizer makes no piece of, and those beyond the length, are neither learned nor scored.

Reads data.text, a list of words, and data.label, a list of as many tags, or files of one word a
line (data/iob.py). Tags of no scheme of chunks (data/tags.py) have token_accuracy and loss alone.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import DataError, ModelError
from fedlora.training import metrics
from fedlora.training.data.batches import (
    IGNORE,
    SYNTHETIC,
    Batch,
    Encoded,
    eval_batches,
    eval_order,
    flat,
    inputs_of,
    pad_of,
    synthetic,
)
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.labels import as_label, names_of
from fedlora.training.data.list_columns import classes, lists
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table
from fedlora.training.data.tags import OUTSIDE, beginnings, renamed, scheme_of, type_of
from fedlora.training.devices import on_host, sent
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.classes import label_options
from fedlora.training.tasks.outputs import at_once, mean_losses, own_losses, own_scores
from fedlora.training.tasks.parts import Parts, of_tags
from fedlora.training.tasks.texts import by_token, tell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenClassification:
    """See the top of this file."""

    name = "token-classification"
    predicts = "tags"
    auto = "AutoModelForTokenClassification"
    what = "token classifier"
    peft = "TOKEN_CLS"
    hub = "token-classification"
    headed = True
    pooled = answers = generates = pictured = shifted = False

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        words = lists(table, where, "data.text", data.text)
        read = [[as_label(x) for x in row] for row in lists(table, where, "data.label", data.label)]
        tags = [[renamed(tag, renames) for tag in row] for row in read]
        for line, some, those in zip(table.lines, words, tags, strict=True):
            _check_row(some, those, f"{where}, {table.unit} {line}", data)
        _tell_beginnings(tags, where)
        there = [tag for row in read for tag in row]
        texts = [json.dumps(row) if row else "" for row in words]
        return Columns(
            texts,
            target=[json.dumps(row) for row in tags],
            needed=[Needed(data.text, texts)],
            mapped=[*there, *filter(None, map(type_of, there))],
            classes=[renamed(as_label(x), renames) for x in classes(table, data.label)],
        )

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        found = names_of(rows, self.names(rows), data)
        if data.labels or rows.classes or OUTSIDE not in found:
            return found
        return (OUTSIDE, *(tag for tag in found if tag != OUTSIDE))

    def names(self, rows: Rows) -> Sequence[str]:
        return [tag for row in rows.target for tag in json.loads(row)]

    def mapped(self, rows: Rows) -> Sequence[str]:
        tags = self.names(rows)
        return [*tags, *filter(None, map(type_of, tags))]

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        return {data.text: rows.text, data.label: rows.target}

    def encode(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        """A sentence is cut at its end; one of which no word is scored is left out, counted."""
        index = {tag: i for i, tag in enumerate(labels)}
        words = [json.loads(text) for text in rows.text]
        found, firsts = _pieces(words, tokenizer, longest)
        kept = [i for i, places in enumerate(firsts) if places]
        left = "have no word that is scored: the tokenizer makes no piece of any"
        tell(len(rows), len(kept), {left: len(rows) - len(kept)})
        _tell_words(words, found, firsts, longest)
        marks = []
        for i in kept:
            tags, row = json.loads(rows.target[i]), [IGNORE] * len(found["input_ids"][i])
            for word, place in firsts[i].items():
                row[place] = index[tags[word]]
            marks.append(row)
        ids, starts = flat([found["input_ids"][i] for i in kept])
        types = None
        if "token_type_ids" in found:
            types = flat([found["token_type_ids"][i] for i in kept])[0]
        numbers = torch.tensor(kept, dtype=torch.long)
        pad = pad_of(tokenizer)
        return Encoded(ids, starts, numbers, pad, marks=flat(marks)[0], types=types)

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        rows = synthetic(tokenizer, len(labels), ends, lengths=lengths)
        place = torch.cat([torch.arange(int(n)) for n in rows.lengths])
        marks = (rows.ids % len(labels)).where(place % 3 != 1, IGNORE)  # of each word that is cut
        return replace(rows, classes=None, marks=marks)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        logits = net.logits(inputs_of(batch))
        smooth = net.config.train.label_smoothing
        return mean_losses(logits, sent(batch["labels"], logits.device), smooth)

    def defined(self, net: Net, batch: Batch) -> Tensor:
        smooth = net.config.train.label_smoothing
        return by_token(net.logits(inputs_of(batch)), batch["labels"], smooth)

    def scored(self, encoded: Encoded) -> Tensor:
        assert encoded.marks is not None
        before = torch.nn.functional.pad((encoded.marks != IGNORE).long().cumsum(0), (1, 0))
        return before[encoded.starts[1:]] - before[encoded.starts[:-1]]

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        wanted, said, loss = _tagged(net, rows, config)
        found = {"loss": loss}
        found |= metrics.tagged(wanted, said, net.labels, scheme_of(net.labels, wanted))
        return found | own_scores(config, said, wanted)

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        wanted, said, _ = _tagged(net, rows, config)
        return of_tags(said, wanted, net.labels)

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        return {"most frequent tag of each word": lambda: _by_word(corpus)}

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return label_options(labels)

    def script(self, data: DataConfig, end: int | None) -> str:
        return """
words = ["Anna", "lives", "in", "Vienna", "."]
if tokenizer(["a", "b"], is_split_into_words=True)["input_ids"] != tokenizer("a b")["input_ids"]:
    words[1:] = [" " + word for word in words[1:]]  # a tokenizer that reads the spaces as well
batch = tokenizer(words, is_split_into_words=True, truncation=True, return_tensors="pt")
places = batch.word_ids()
for i, word in enumerate(words):
    if i in places:  # a word's first piece has its tag
        print(word.strip(), LABELS[int(logits(batch)[0, places.index(i)].argmax())])
"""


def _tagged(
    net: Net, rows: Encoded, config: Config
) -> tuple[list[list[str]], list[list[str]], float]:
    """The tags of each row's scored words, those that are said, and the loss."""
    own, wanted, said = list[Tensor](), list[list[str]](), list[list[str]]()
    loss = torch.zeros((), dtype=torch.float64)
    for batch in eval_batches(rows, at_once(config)):
        labels = batch.pop("labels")
        logits = on_host(net.logits(batch))
        if config.train.loss:
            own.append(own_losses(config.train.loss, logits, labels))
        places = labels.flatten() != IGNORE
        z, y = logits.flatten(0, 1)[places], labels.flatten()[places]
        loss += cross_entropy(z.double(), y, reduction="sum")
        counts = (labels != IGNORE).sum(1).tolist()
        wanted += [[net.labels[i] for i in row.tolist()] for row in y.split(counts)]
        said += [[net.labels[i] for i in row.tolist()] for row in z.argmax(1).split(counts)]
    back = eval_order(rows).argsort().tolist()
    wanted, said = [wanted[i] for i in back], [said[i] for i in back]
    mean = torch.cat(own).double().mean() if own else loss / max(sum(map(len, wanted)), 1)
    return wanted, said, mean.item()


# -- words and pieces -----------------------------------------------------------------------------


def _pieces(
    words: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[Any, list[dict[int, int]]]:
    """The tokenizer's encoding of sentences, and of each the places of its words' first pieces.

    Pieces are those of running text: a tokenizer that reads spaces (byte-level BPE) is given them.

    Raises:
        ModelError: it does not say which word a piece is of.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"model.task = 'token-classification': {type(tokenizer).__name__} does not say which "
            "word a token is a piece of; use a model with a fast tokenizer (a tokenizer.json)"
        )
    if not words:
        return {"input_ids": []}, []
    apart = tokenizer(["a", "b"], is_split_into_words=True)["input_ids"]
    space = " " if apart != tokenizer("a b")["input_ids"] else ""
    given = [[*row[:1], *(space + word for word in row[1:])] for row in words]
    found = tokenizer(given, is_split_into_words=True, truncation=True, max_length=longest)
    firsts = list[dict[int, int]]()
    for i in range(len(given)):
        places = dict[int, int]()
        for place, word in enumerate(found.word_ids(i)):
            if word is not None:
                places.setdefault(word, place)
        firsts.append(places)
    return found, firsts


def _tell_words(
    words: Sequence[Sequence[str]], found: Any, firsts: Sequence[Mapping[int, int]], longest: int
) -> None:
    """Log how many words are not scored, and why."""
    beyond = empty = 0
    for row, ids, places in zip(words, found["input_ids"], firsts, strict=True):
        last = max(places, default=-1) if len(ids) >= longest else len(row) - 1
        beyond += len(row) - 1 - last
        empty += last + 1 - len(places)
    total = sum(map(len, words))
    if beyond:
        log.warning(
            "%d of %d words are beyond the %d tokens of an example, and neither learned nor "
            "scored: raise data.max-length, or cut sentences", beyond, total, longest,
        )  # fmt: skip
    if empty:
        text = "of %d of %d words the tokenizer makes no piece: they are neither learned nor scored"
        log.warning(text, empty, total)


# -- rows -----------------------------------------------------------------------------------------


def _check_row(words: Sequence[str], tags: Sequence[str], where: str, data: DataConfig) -> None:
    if len(words) != len(tags):
        raise DataError(
            f'{where}: {len(words)} words in "{data.text}" and {len(tags)} tags in '
            f'"{data.label}", must be one a word'
        )
    if "" in tags:
        word = words[tags.index("")]
        raise DataError(f'{where}: the word {word[:40]!r} has no tag in "{data.label}"')


def _tell_beginnings(tags: Iterable[Sequence[str]], where: str) -> None:
    """Log the chunks of IOB2 that begin with an I."""
    tags = list(tags)
    names = {tag for row in tags for tag in row}
    if scheme_of(names, tags) == "IOB2" and (odd := beginnings(tags)[1]):
        log.warning(
            "%s: %d entities begin with a tag I-X and not B-X, as IOB2 has it: f1 counts them, "
            "strict_f1 does not", where, odd,
        )  # fmt: skip


def _by_word(corpus: Corpus) -> Scores:
    """Scores of saying of each word what it most often is in training, by case; else O.

    Of tags equally frequent, the first by name; without an O, the most frequent of all.
    """
    count, every = dict[str, Counter[str]](), Counter[str]()
    for client in corpus.clients:
        for text, row in zip(client.train.text, client.train.target, strict=True):
            for word, tag in zip(json.loads(text), json.loads(row), strict=True):
                count.setdefault(word, Counter())[tag] += 1
                every[tag] += 1

    def first(tags: Counter[str]) -> str:
        return min(tags, key=lambda tag: (-tags[tag], tag))

    other = OUTSIDE if OUTSIDE in corpus.labels else first(every)
    known = {word: first(tags) for word, tags in count.items()}
    said = [[known.get(word, other) for word in json.loads(text)] for text in corpus.test.text]
    wanted = [json.loads(row) for row in corpus.test.target]
    return metrics.tagged(wanted, said, corpus.labels, scheme_of(corpus.labels, wanted))
