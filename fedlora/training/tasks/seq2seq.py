"""What to write of a text that was read whole: an encoder-decoder, such as T5 and BART.

    loss of an example     the mean of -log p(token | the text, the response's tokens before it)
                           over the response's tokens, its end mark included
    scores                 loss (nats a token, every token of all examples once) and perplexity;
                           exact_match of greedy answers

The decoder is given each token of the response one place later, behind the token that the model's
own shift puts first (model/decoder.py). Padding is neither attended to nor scored.

Reads data.prompt, the text for the encoder, and data.response; data.label where the data has it,
for splits alone. A text of more than data.max-length tokens is cut at its end, before the
tokenizer's own end mark; a longer response is cut too, and its end is then not learned.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
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
    synthetic,
)
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.rows import Rows
from fedlora.training.data.seam import end_mark, put_behind
from fedlora.training.data.tables import Table, column, prompts
from fedlora.training.devices import moved, on_host, sent
from fedlora.training.tasks.answers import greedy, judged, most_tokens, texts
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.outputs import at_once, mean_losses, own_losses
from fedlora.training.tasks.parts import Parts, first, of_answers
from fedlora.training.tasks.texts import by_token, encoded_texts, labels_for_splits, tell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seq2Seq:
    """See the top of this file."""

    name = "seq2seq"
    predicts = "answers"
    auto = "AutoModelForSeq2SeqLM"
    what = "encoder-decoder that writes text"
    peft = "SEQ_2_SEQ_LM"
    hub = "text2text-generation"
    headed = pictured = pooled = shifted = False
    answers = generates = True

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        label = labels_for_splits(table, where, data)
        text = prompts(table, where, data.prompt)
        read = column(table, where, "data.response", data.response)
        response = [renames.get(x, x) for x in read]
        needed = [Needed(data.prompt, text), Needed(data.response, response)]
        return Columns(text, label, response, needed=needed, mapped=read)

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        return ()

    def names(self, rows: Rows) -> Sequence[str]:
        return ()

    def mapped(self, rows: Rows) -> Sequence[str]:
        return rows.response

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        return {data.prompt: rows.text, data.label: rows.label, data.response: rows.response}

    def encode(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        found, kept = encoded_texts(rows, tokenizer, longest)
        ids = _responses([rows.response[i] for i in kept], tokenizer)
        some = [n for n, x in enumerate(ids) if x]
        tell(len(kept), len(some), {"have a response without a token": len(kept) - len(some)})
        if cut := sum(len(ids[n]) > longest for n in some):
            log.warning(
                "%d of %d responses have more than data.max-length = %d tokens: they are cut, and "
                "their end is not learned", cut, len(some), longest,
            )  # fmt: skip
        tokens, starts = flat([ids[n][:longest] for n in some])
        read = replace(found, types=None).select(torch.tensor(some, dtype=torch.long))
        return replace(read, other=Encoded(tokens, starts, read.rows, read.pad))

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        read, written = (
            replace(synthetic(tokenizer, 0, ends, seed, lengths), prompts=None) for seed in (0, 1)
        )
        return replace(read, other=written)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        logits, smooth = net.logits(inputs_of(batch)), net.config.train.label_smoothing
        return mean_losses(logits, sent(batch["labels"], logits.device), smooth)

    def defined(self, net: Net, batch: Batch) -> Tensor:
        smooth = net.config.train.label_smoothing
        return by_token(net.logits(inputs_of(batch)), batch["labels"], smooth)

    def scored(self, encoded: Encoded) -> Tensor:
        assert encoded.other is not None
        return encoded.other.lengths

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        losses, tokens = [], []
        for batch in eval_batches(rows, at_once(config)):
            losses.append(_losses(net, batch))
            tokens.append((batch["labels"] != IGNORE).sum(1))
        found = metrics.language(on_host(torch.cat(losses)), torch.cat(tokens))
        if generate and config.evaluate.generate_tokens:
            found |= judged(*answered(net, rows, config), config)
        return found

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        if not config.evaluate.generate_tokens:
            return {}
        some = rows.select(first(len(rows)))
        given = texts(net, [x.tolist() for x in some.ids.split(some.lengths.tolist())])
        said, wanted = answered(net, some, config)
        return of_answers(given, wanted, said)

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        return {}

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return {}

    def script(self, data: DataConfig, end: int | None) -> str:
        return f"""
batch = tokenizer(["a text"], return_tensors="pt")
how = dict(do_sample=False, num_beams=1, max_new_tokens=32, eos_token_id={end!r})
found = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **how)
print(tokenizer.decode(found[0], skip_special_tokens=True))
"""


def _responses(given: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of responses as the tokenizer writes a target, each with an end mark."""
    if not given:
        return []
    found: list[list[int]] = tokenizer(text_target=list(given), verbose=False)["input_ids"]
    mark = end_mark(tokenizer)
    if mark is None or mark in put_behind(tokenizer):
        return found
    return [[*ids, mark] for ids in found]


def _losses(net: Net, batch: Batch) -> Tensor:
    """Each example's loss, as it is trained."""
    logits = net.logits(inputs_of(batch))
    labels = sent(batch["labels"], logits.device)
    own = net.config.train.loss
    return own_losses(own, logits, labels) if own else mean_losses(logits, labels)


def answered(net: Net, rows: Encoded, config: Config) -> tuple[list[str], list[str]]:
    """What the model writes of each text, greedily, and what it should.

    The decoder begins as in training; where all responses begin with the token that the base's own
    settings force to be first (BART's), so do the answers.
    """
    assert rows.other is not None
    assert rows.other.marks is not None
    responses = [x.tolist() for x in rows.other.marks.split(rows.other.lengths.tolist())]
    base: Any = net.peft.get_base_model()
    first = getattr(base.generation_config, "forced_bos_token_id", None)
    forced = {x[0] for x in responses} == {first}
    most = most_tokens(responses, end_mark(net.tokenizer), config)
    base.generation_config = net.peft.generation_config = greedy(
        net.tokenizer,
        config,
        most,
        decoder_start_token_id=int(rows.other.ids[0]),
        forced_bos_token_id=first if forced else None,
    )
    answers: list[str] = []
    for batch in eval_batches(rows, at_once(config)):
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        out: Tensor = on_host(net.peft.generate(**moved(given, net.device)))
        answers += texts(net, out[:, 1:])
    order = eval_order(rows).argsort().tolist()
    return [answers[i] for i in order], texts(net, responses)
