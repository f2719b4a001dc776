"""Rows as token ids, and token ids as batches.

A causal-lm row is tokenised in two pieces, so that training conditions on the very ids that
generation starts from:

    prompt    as the tokenizer begins a text (with its bos, if it has one), never ended by eos
    response  one space, unless there is one at the seam already or no prompt; the response; eos

or, through the chat template, the user's turn with the generation prompt, and what the template
puts behind it for the assistant's turn. The loss is on the response alone, its eos included; with
no prompt and no bos the first token is context only.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.errors import DataError
from fedlora.training.data.corpus import Rows

Batch = dict[str, Tensor]
"""input_ids, attention_mask, labels (and token_type_ids where the tokenizer gives them)."""

IGNORE = -100
"""The label of a token that is not scored."""

POOL = 8
"""Batches that are drawn together and sorted by length, so that a batch has little padding."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Tokenised rows of n examples and t tokens in all, one after the other without padding."""

    ids: Tensor  # (t,) int32
    starts: Tensor  # (n + 1,) where each example starts, and t
    rows: Tensor  # (n,) the row each example was; fewer than the rows where some were left out
    pad: int
    classes: Tensor | None = None  # (n,) label index of a classification
    prompts: Tensor | None = None  # (n,) prompt tokens of a causal-lm example
    types: Tensor | None = None  # (t,) token_type_ids

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example, (n,)."""
        return self.starts.diff()


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    chat_template: bool = False,
) -> Encoded:
    """The rows as token ids: for classification where there are label names, else for causal-lm.

    A text of more than max_length tokens is cut at its end. So is a response, but never a prompt:
    a row whose prompt leaves no room for its response is left out, and counted in the log.

    Raises:
        DataError: no row has room for its response, or there is no chat template to send it by.
    """
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id or 0 if pad is None else pad
    if labels:
        return _classification(rows, tokenizer, labels, max_length, pad)
    return _causal(rows, tokenizer, max_length, chat_template, pad)


SYNTHETIC = (3, 5, 6, 9)
"""Tokens of the examples of `synthetic`."""


def synthetic(
    tokenizer: PreTrainedTokenizerBase, classes: int, ends: Sequence[int] = (), seed: int = 0
) -> Encoded:
    """A few examples of random token ids, none of them special: nobody's rows.

    `classes` is the number of labels; 0 for causal-lm, of which all but the first token is scored.
    Each example ends with `ends` and one token more.
    """
    generator = torch.Generator().manual_seed(seed)
    known = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = torch.tensor(known)

    def drawn(n: int) -> list[int]:
        return words[torch.randint(len(words), (n,), generator=generator)].tolist()

    end = [*ends, *drawn(1)] if ends else []
    ids, starts = _flat([[*drawn(n), *end] for n in SYNTHETIC])
    n, pad = len(SYNTHETIC), tokenizer.pad_token_id
    pad = tokenizer.eos_token_id or 0 if pad is None else pad
    labels = torch.randint(max(classes, 1), (n,), generator=generator)
    return Encoded(
        ids,
        starts,
        torch.arange(n),
        pad,
        classes=labels if classes else None,
        prompts=None if classes else torch.ones(n, dtype=torch.long),
    )


def steps_in(rows: int, batch_size: int, steps: int = 0, epochs: float = 1.0) -> int:
    """How many batches `batches` yields: `steps`, or if that is 0 those of so many epochs."""
    if not rows:
        return 0
    return steps or max(1, round(epochs * math.ceil(rows / batch_size)))


def batches(
    encoded: Encoded,
    batch_size: int,
    generator: torch.Generator,
    steps: int = 0,
    epochs: float = 1.0,
) -> Iterator[Batch]:
    """Padded batches in an order that the generator alone decides; none where there are no rows.

    An epoch has every example exactly once. It is shuffled and sorted by length within pools of
    `POOL` batches, and its batches are shuffled again; so its one smaller batch is anywhere.
    """
    left = steps_in(len(encoded), batch_size, steps, epochs)
    while left:
        for numbers in _epoch(encoded.lengths, batch_size, generator)[:left]:
            yield collate(encoded, numbers)
            left -= 1


def eval_batches(encoded: Encoded, batch_size: int) -> Iterator[Batch]:
    """Padded batches of every example once, in `eval_order`; none where there are no rows."""
    order = eval_order(encoded)
    for start in range(0, len(order), batch_size):
        yield collate(encoded, order[start : start + batch_size])


def eval_order(encoded: Encoded) -> Tensor:
    """The example behind each result of `eval_batches`, (n,): by length, longest first.

    Results r (n,) of the batches in a row are in the examples' order as r[order.argsort()].
    """
    return encoded.lengths.argsort(stable=True, descending=True)


def prompt_batches(encoded: Encoded, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
    """Example numbers and their prompts alone, padded on the left, as generation takes them."""
    assert encoded.prompts is not None
    order = encoded.prompts.argsort(stable=True, descending=True)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        yield numbers, _padded(encoded, numbers, encoded.prompts[numbers], left=True)


def collate(encoded: Encoded, numbers: Tensor) -> Batch:
    """The examples of these numbers as one batch, padded on the right to the longest, (b, t)."""
    batch = _padded(encoded, numbers, encoded.lengths[numbers])
    if encoded.classes is not None:
        return {**batch, "labels": encoded.classes[numbers]}
    assert encoded.prompts is not None
    ids, mask = batch["input_ids"], batch["attention_mask"]
    scored = mask.bool() & (torch.arange(ids.shape[1]) >= encoded.prompts[numbers, None])
    return {**batch, "labels": ids.where(scored, IGNORE)}


def _padded(encoded: Encoded, numbers: Tensor, lengths: Tensor, left: bool = False) -> Batch:
    """The first `lengths` tokens of each example, with their mask; of no example, (0, 0)."""
    width = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(width).expand(len(lengths), width)  # (b, width)
    place = place - (width - lengths)[:, None] if left else place
    mask = (place >= 0) & (place < lengths[:, None])
    at = (encoded.starts[numbers, None] + place).clamp(0, max(len(encoded.ids) - 1, 0))
    batch = {"input_ids": encoded.ids[at].long().where(mask, encoded.pad)}
    batch["attention_mask"] = mask.long()
    if encoded.types is not None:
        batch["token_type_ids"] = encoded.types[at].long().where(mask, 0)
    return batch


def _epoch(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(len(lengths), generator=generator)
    pools = torch.split(order, POOL * batch_size)
    ordered = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
    found = torch.split(ordered, batch_size)
    return [found[i] for i in torch.randperm(len(found), generator=generator)]


def _classification(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    pad: int,
) -> Encoded:
    index = {label: i for i, label in enumerate(labels)}
    classes = torch.tensor([index[label] for label in rows.label], dtype=torch.long)
    found = tokenizer(list(rows.text), truncation=True, max_length=max_length) if len(rows) else {}
    ids, starts = _flat(found.get("input_ids", []))
    types = _flat(found["token_type_ids"])[0] if "token_type_ids" in found else None
    return Encoded(ids, starts, torch.arange(len(rows)), pad, classes=classes, types=types)


def _causal(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool, pad: int
) -> Encoded:
    seamed = _chat(rows, tokenizer) if chat_template else _plain(rows)
    ids: list[list[int]] = []
    prompts: list[int] = []
    kept: list[int] = []
    for i, (prompt, response) in enumerate(_pieces(seamed, tokenizer, chat_template)):
        if len(prompt) < max_length:
            ids.append((prompt + response)[:max_length])
            prompts.append(len(prompt))
            kept.append(i)
    if len(kept) < len(rows):
        left = f"{len(rows) - len(kept)} of {len(rows)} rows"
        reason = f"have a prompt of data.max-length = {max_length} tokens or more: raise it"
        if not kept:
            raise DataError(f"{left} {reason}")
        log.warning("%s %s; they are left out", left, reason)
    flat, starts = _flat(ids)
    lengths = torch.tensor(prompts, dtype=torch.long)
    return Encoded(flat, starts, torch.tensor(kept, dtype=torch.long), pad, prompts=lengths)


def _plain(rows: Rows) -> list[tuple[str, str]]:
    def seam(prompt: str, response: str) -> str:
        spaced = not prompt or prompt[-1].isspace() or response[:1].isspace()
        return response if spaced else f" {response}"

    return [(p, seam(p, r)) for p, r in zip(rows.text, rows.response, strict=True)]


def _chat(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    if not tokenizer.chat_template:
        raise DataError("data.chat-template = true, but this model's tokenizer has none")
    if not all(rows.text):
        raise DataError("data.chat-template = true needs data.prompt: the user's turn")
    return [_turns(tokenizer, p, r) for p, r in zip(rows.text, rows.response, strict=True)]


def _turns(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[str, str]:
    user = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    both = [*user, {"role": "assistant", "content": response}]
    whole = tokenizer.apply_chat_template(both, tokenize=False)
    if not whole.startswith(asked):
        raise DataError(
            "data.chat-template = true: this model's template does not continue its own "
            "generation prompt, so prompt and response cannot be told apart; use data.prompt alone"
        )
    return asked, whole.removeprefix(asked)


def _pieces(
    seamed: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt ids and response ids of each row. A chat template writes its own special tokens."""
    if not seamed:
        return
    prompts, responses = zip(*seamed, strict=True)
    eos = tokenizer.eos_token_id
    end = [] if chat_template or eos is None else [eos]
    asked = tokenizer(list(prompts), add_special_tokens=not chat_template, verbose=False)
    said = tokenizer(list(responses), add_special_tokens=False, verbose=False)
    for prompt, response in zip(asked["input_ids"], said["input_ids"], strict=True):
        ended = end and len(prompt) > 1 and prompt[-1] == eos
        yield prompt[:-1] if ended else prompt, response + end


def _flat(ragged: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, ragged)], dtype=torch.long)
    flat = [token for ids in ragged for token in ids]
    return torch.tensor(flat, dtype=torch.int32), lengths.cumsum(0)
