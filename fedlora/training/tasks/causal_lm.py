"""The next token of a text: all of it, or of a response behind its prompt.

    loss of an example     the mean of -log p(token | those before) over its own scored tokens
    scores                 loss (nats a token, every token of all examples once) and perplexity;
                           exact_match of greedy answers where there are prompts

An example's loss is a mean over its own tokens, so that what one adds to a step never depends on
another's length: in training every example counts once, in the scores every token.

A row is a prompt and a response (data/seam.py); the loss is on the response alone, its end mark
included. With no prompt and no bos the first token is context only. Reads data.response and
data.prompt, or data.messages, conversations of which every turn of the assistant is scored
(data/chat.py); data.label where the data has it, for splits alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
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
    flat,
    inputs_of,
    pad_of,
    prompt_batches,
    synthetic,
)
from fedlora.training.data.chat import conversations, last_run, turned
from fedlora.training.data.chat import read as read_messages
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.packing import packed
from fedlora.training.data.rows import Rows
from fedlora.training.data.seam import end_mark, pieces
from fedlora.training.data.tables import Table, column, prompts
from fedlora.training.devices import moved, on_host, sent
from fedlora.training.output_head import OutputHead
from fedlora.training.tasks.answers import greedy, judged, most_tokens, texts
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.outputs import at_once, own_losses
from fedlora.training.tasks.parts import Parts, first, of_answers
from fedlora.training.tasks.texts import by_token, labels_for_splits, tell

PROMPT = """
batch = tokenizer(["a prompt"], return_tensors="pt")"""
ASKED = """
asked = [{"role": "user", "content": "a question"}]
how = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
batch = tokenizer.apply_chat_template(asked, **how)"""


@dataclass(frozen=True)
class CausalLM:
    """See the top of this file."""

    name = "causal-lm"
    predicts = "answers"
    auto = "AutoModelForCausalLM"
    what = "causal language model"
    peft = "CAUSAL_LM"
    hub = "text-generation"
    headed = pictured = pooled = False
    answers = generates = shifted = True

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        label = labels_for_splits(table, where, data)
        if data.messages:
            text = conversations(table, where, data.messages)
            return Columns(text, label, needed=[Needed(data.messages, text)])
        text = prompts(table, where, data.prompt)
        read = column(table, where, "data.response", data.response)
        response = [renames.get(x, x) for x in read]
        needed = [Needed(data.prompt, text)] if data.prompt else []
        needed.append(Needed(data.response, response))
        return Columns(text, label, response, needed=needed, mapped=read)

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        return ()

    def names(self, rows: Rows) -> Sequence[str]:
        return ()

    def mapped(self, rows: Rows) -> Sequence[str]:
        return rows.response

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        if data.messages:
            return {data.messages: rows.text, data.label: rows.label}
        return {data.prompt: rows.text, data.label: rows.label, data.response: rows.response}

    def encode(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        """A response is cut at its end, but never a prompt: a row whose prompt leaves no room for
        its response is left out. With data.long-texts = "windows" what is cut off are further
        examples of the row: see `stretches`."""
        if data.messages:
            return _conversations(rows, tokenizer, longest)
        ids: list[Sequence[int]] = []
        asked: list[int] = []
        kept: list[int] = []
        long = straddled = 0
        for i, row in enumerate(pieces(rows, tokenizer, data.chat_template)):
            long += len(row.prompt) >= longest
            if len(row.prompt) < longest and row.response:
                whole, count = row.prompt + row.response, len(ids)
                cut = data.long_texts != "windows"
                ids += [whole[:longest]] if cut else stretches(whole, longest)
                asked += [len(row.prompt), *[1] * (len(ids) - count - 1)]
                kept += [i] * (len(ids) - count)
                straddled += row.straddled
        full = f"have a prompt of data.max-length = {longest} tokens or more: raise it"
        left = len(rows) - len(set(kept))
        tell(len(rows), len(rows) - left, {full: long, UNWRITTEN: left - long})
        tokens, starts = flat(ids)
        lengths = torch.tensor(asked, dtype=torch.long)
        numbers = torch.tensor(kept, dtype=torch.long)
        pad = pad_of(tokenizer)
        return Encoded(tokens, starts, numbers, pad, prompts=lengths, straddled=straddled)

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        return synthetic(tokenizer, 0, ends, lengths=lengths)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        train = net.config.train
        args = (net, inputs_of(batch), batch["labels"], train.label_smoothing, train.packing)
        return token_losses(*args)

    def defined(self, net: Net, batch: Batch) -> Tensor:
        smooth = net.config.train.label_smoothing
        return by_token(net.logits(inputs_of(batch)), batch["labels"], smooth, before=1)

    def scored(self, encoded: Encoded) -> Tensor:
        if encoded.marks is not None:
            marked = (encoded.marks != IGNORE).long()
            marked[encoded.starts[:-1]] = 0  # nothing predicts a first token
            ends = torch.cat([marked.new_zeros(1), marked.cumsum(0)])
            return ends[encoded.starts].diff()
        assert encoded.prompts is not None
        return (encoded.lengths - encoded.prompts.clamp(min=1)).clamp(min=0)

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        losses, tokens = [], []
        for batch in eval_batches(rows, at_once(config)):
            labels = batch.pop("labels")
            losses.append(_losses(net, batch, labels))
            tokens.append((labels[:, 1:] != IGNORE).sum(1))
        found = metrics.language(on_host(torch.cat(losses)), torch.cat(tokens))
        if generate and _asks(config):
            found |= judged(*answered(net, rows, config), config)
        return found

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        if not _asks(config):
            return {}
        some = rows.select(first(len(rows)))
        assert some.prompts is not None
        starts = zip(some.starts.tolist(), some.prompts.tolist(), strict=False)
        given = texts(net, [some.ids[a : a + n].tolist() for a, n in starts])
        said, wanted = answered(net, some, config)
        return of_answers(given, wanted, said)

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        return {}

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return {}

    def script(self, data: DataConfig, end: int | None) -> str:
        return f"""{ASKED if data.chats else PROMPT}
found = model.generate(**batch, do_sample=False, max_new_tokens=32, eos_token_id={end!r})
print(tokenizer.decode(found[0]))
"""


def _conversations(rows: Rows, tokenizer: PreTrainedTokenizerBase, longest: int) -> Encoded:
    """Whole conversations, cut at their end, of which the assistant's words are marked."""
    ids, marks = list[list[int]](), list[list[int]]()
    asked, kept, left = list[int](), list[int](), Counter[str]()
    for i, text in enumerate(rows.text):
        found = turned(read_messages(text), tokenizer)
        if isinstance(found, str):
            left[found] += 1
        elif not any(found.trained[1:longest]):
            left[f"have no word of the assistant in data.max-length = {longest} tokens"] += 1
        else:
            ids.append(found.ids[:longest])
            every = zip(ids[-1], found.trained, strict=False)
            marks.append([x if trained else IGNORE for x, trained in every])
            asked.append(last_run(found.trained[:longest]))
            kept.append(i)
    tell(len(rows), len(kept), left)
    tokens, starts = flat(ids)
    numbers, lengths = (torch.tensor(x, dtype=torch.long) for x in (kept, asked))
    pad = pad_of(tokenizer)
    return Encoded(tokens, starts, numbers, pad, marks=flat(marks)[0], prompts=lengths)


UNWRITTEN = (
    "have a response that this tokenizer cannot write behind their prompt: end the prompt before a "
    "space or a line's end"
)


def stretches(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """A long text's ids in examples of `size` at most, each begun with the last id of the one
    before, which is its context alone: so each id but the text's first is predicted once."""
    starts = range(size - 1, len(ids) - 1, size - 1)
    return [ids[:size], *(ids[at : at + size] for at in starts)]


def token_losses(
    net: Net, inputs: Batch, labels: Tensor, smooth: float = 0.0, pack: bool = False
) -> Tensor:
    """The mean loss over each example's own labelled tokens, (b,), in float32; smooth: of labels
    of which this part is dealt out over the vocabulary; pack: read from shared rows."""
    sums, counts = token_sums(net, inputs, labels, smooth, pack)
    return sums / counts


def token_sums(
    net: Net, inputs: Batch, labels: Tensor, smooth: float = 0.0, pack: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of -log p over each example's own labelled tokens, (b,), and their number, at least
    1.

    Which tokens these are is found on the host, where labels are: a card would have to be waited
    for.
    """
    targets = nn.functional.pad(on_host(labels)[:, 1:], (0, 1), value=IGNORE)  # the next token's
    scored = targets != IGNORE
    # under DP all of them: how many a product has must not depend on other examples
    at = (scored | net.config.privacy.by_example).flatten().nonzero().flatten()
    wanted, counts, read = targets.flatten()[at], scored.sum(1).clamp(min=1), at
    if pack:
        inputs, places = packed(inputs)
        read = places.flatten()[at]
    at, read, wanted, counts = (sent(x, net.device) for x in (at, read, wanted, counts))
    head = OutputHead.of(net.peft.get_base_model())
    if head and (states := head.states(net.run, inputs, read)):
        found = head.losses(*states, wanted, smooth)
    else:
        logits = net.logits(inputs).flatten(0, 1).index_select(0, read)
        found = cross_entropy(logits, wanted, reduction="none", label_smoothing=smooth)
    losses = found.new_zeros(targets.numel()).index_copy(0, at, found)
    return losses.view(targets.shape).sum(1), counts


def _losses(net: Net, batch: Batch, labels: Tensor) -> Tensor:
    """Each example's loss, as it is trained."""
    if own := net.config.train.loss:
        return own_losses(own, net.logits(batch), sent(labels, net.device))
    return token_losses(net, batch, labels)


# -- answers --------------------------------------------------------------------------------------


def _asks(config: Config) -> bool:
    """Are answers generated?"""
    asks = config.data.prompt or config.data.messages
    return bool(asks and config.evaluate.generate_tokens)


def answered(net: Net, rows: Encoded, config: Config) -> tuple[list[str], list[str]]:
    """What the model answers each prompt, greedily, and what it should."""
    responses, mark = _responses(rows), end_mark(net.tokenizer, config.data.chats)
    how = greedy(net.tokenizer, config, most_tokens(responses, mark, config))
    answers: dict[int, str] = {}
    net.peft.get_base_model().generation_config = net.peft.generation_config = how
    for numbers, batch in prompt_batches(rows, at_once(config)):
        width = batch["input_ids"].shape[1]
        out: Tensor = on_host(net.peft.generate(**moved(batch, net.device)))
        answers |= dict(zip(numbers.tolist(), texts(net, out[:, width:]), strict=True))
    return [answers[n] for n in range(len(rows))], texts(net, responses)


def _responses(rows: Encoded) -> list[list[int]]:
    """What each example should be answered, its own tokens after the prompt: of a conversation
    those of the assistant's turn, and none of what is behind it."""
    assert rows.prompts is not None
    starts, ends = rows.starts[:-1] + rows.prompts, rows.starts[1:].clone()
    if rows.marks is not None:
        for i, (a, b) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            others = (rows.marks[a:b] == IGNORE).nonzero().flatten().tolist()
            ends[i] = a + min(others, default=b - a)
    return [rows.ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
