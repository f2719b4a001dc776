"""Rows as token ids, and token ids as batches.

A causal-lm row is a prompt and a response (fedlora/training/data/seam.py). The loss is on the
response alone, its end mark included; with no prompt and no bos the first token is context only.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.errors import DataError
from fedlora.training.data.corpus import Rows
from fedlora.training.data.seam import pieces, put_behind

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
    rows: Tensor  # (n,) the row each example is of: some have none, and with windows several
    pad: int
    classes: Tensor | None = None  # (n,) label index of a classification
    prompts: Tensor | None = None  # (n,) prompt tokens of a causal-lm example
    types: Tensor | None = None  # (t,) token_type_ids
    left: bool = False  # whether batches are padded on the left
    straddled: int = 0
    """Of causal-lm: examples in whose whole text a token would lie on both sides of the seam."""

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
    windows: bool = False,
) -> Encoded:
    """The rows as token ids: for classification where there are label names, else for causal-lm.

    A text of more than max_length tokens is cut at its end. So is a response, but never a prompt:
    a row whose prompt leaves no room for its response is left out, and counted in the log. With
    windows, what is cut off are further examples of the row: see `stretches`.

    Raises:
        DataError: no row has room for its response, or there is no chat template to send it by.
    """
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id or 0 if pad is None else pad
    if labels:
        return _classification(rows, tokenizer, labels, max_length, pad)
    return _causal(rows, tokenizer, max_length, chat_template, pad, windows)


SYNTHETIC = (3, 5, 6, 8)
"""Tokens of the examples of `synthetic`, where nothing else is said."""


def synthetic(
    tokenizer: PreTrainedTokenizerBase,
    classes: int,
    ends: Sequence[int] = (),
    seed: int = 0,
    lengths: Sequence[int] = SYNTHETIC,
) -> Encoded:
    """A few examples of random token ids, none of them special: nobody's rows.

    `classes` is the number of labels; 0 for causal-lm, of which all but the first token is scored.
    Each example has one of the lengths, and then `ends` and one token more, where there are any. Of
    a classification it ends with the end mark of a tokenizer that ends every text: an
    encoder-decoder reads the class off that.
    """
    generator = torch.Generator().manual_seed(seed)
    known = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = torch.tensor(known)

    def drawn(n: int) -> list[int]:
        return words[torch.randint(len(words), (n,), generator=generator)].tolist()

    end = [*ends, *drawn(1)] if ends else []
    mark = put_behind(tokenizer) if classes else []
    mark = mark if tokenizer.eos_token_id in mark else []
    ids, starts = _flat([[*drawn(n), *end][: n + len(end) - len(mark)] + mark for n in lengths])
    n, pad = len(lengths), tokenizer.pad_token_id
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


def collate(encoded: Encoded, numbers: Tensor, width: int = 0) -> Batch:
    """The examples of these numbers as one batch, (b, t), padded to `width`; 0: to the longest."""
    batch = _padded(encoded, numbers, encoded.lengths[numbers], encoded.left, width)
    if encoded.classes is not None:
        return {**batch, "labels": encoded.classes[numbers]}
    assert encoded.prompts is not None
    ids, mask = batch["input_ids"], batch["attention_mask"]
    scored = mask.bool() & (torch.arange(ids.shape[1]) >= encoded.prompts[numbers, None])
    return {**batch, "labels": ids.where(scored, IGNORE)}


def _padded(
    encoded: Encoded, numbers: Tensor, lengths: Tensor, left: bool = False, width: int = 0
) -> Batch:
    """The first `lengths` tokens of each example, with their mask; of no example, (0, 0)."""
    width = width or (int(lengths.max()) if len(lengths) else 0)
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
    found = tokenizer(list(rows.text), truncation=True, max_length=max_length) if len(rows) else {}
    every = found.get("input_ids", [])
    kept = [i for i, ids in enumerate(every) if ids]
    _tell(
        len(rows),
        len(kept),
        {"have a text of which the tokenizer makes no token": len(rows) - len(kept)},
    )
    classes = torch.tensor([index[rows.label[i]] for i in kept], dtype=torch.long)
    ids, starts = _flat([every[i] for i in kept])
    types = None
    if "token_type_ids" in found:
        types = _flat([found["token_type_ids"][i] for i in kept])[0]
    return Encoded(
        ids, starts, torch.tensor(kept, dtype=torch.long), pad, classes=classes, types=types
    )


def _causal(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool,
    pad: int,
    windows: bool,
) -> Encoded:
    ids: list[Sequence[int]] = []
    prompts: list[int] = []
    kept: list[int] = []
    long = straddled = 0
    for i, row in enumerate(pieces(rows, tokenizer, chat_template)):
        long += len(row.prompt) >= max_length
        if len(row.prompt) < max_length and row.response:
            whole, count = row.prompt + row.response, len(ids)
            ids += stretches(whole, max_length) if windows else [whole[:max_length]]
            prompts += [len(row.prompt), *[1] * (len(ids) - count - 1)]
            kept += [i] * (len(ids) - count)
            straddled += row.straddled
    full = f"have a prompt of data.max-length = {max_length} tokens or more: raise it"
    left = len(rows) - len(set(kept))
    _tell(len(rows), len(rows) - left, {full: long, UNWRITTEN: left - long})
    flat, starts = _flat(ids)
    lengths = torch.tensor(prompts, dtype=torch.long)
    numbers = torch.tensor(kept, dtype=torch.long)
    return Encoded(flat, starts, numbers, pad, prompts=lengths, straddled=straddled)


def stretches(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """A long text's ids in examples of `size` at most, each begun with the last id of the one
    before, which is its context alone: so each id but the text's first is predicted once."""
    starts = range(size - 1, len(ids) - 1, size - 1)
    return [ids[:size], *(ids[at : at + size] for at in starts)]


UNWRITTEN = (
    "have a response that this tokenizer cannot write behind their prompt: end the prompt before a "
    "space or a line's end"
)


def _tell(rows: int, kept: int, left: Mapping[str, int]) -> None:
    """Log how many rows were left out, by the reason.

    Raises:
        DataError: all of them.
    """
    for reason, n in left.items():
        if n and not kept:
            raise DataError(f"{n} of {rows} rows {reason}")
        if n:
            log.warning("%d of %d rows %s; they are left out", n, rows, reason)


def _flat(ragged: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, ragged)], dtype=torch.long)
    flat = [token for ids in ragged for token in ids]
    return torch.tensor(flat, dtype=torch.int32), lengths.cumsum(0)
