"""Texts, alone or in pairs, as token ids: what tasks with one output a text share."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.batches import IGNORE, Encoded, flat, pad_of
from fedlora.training.data.labels import as_label
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table, column
from fedlora.training.devices import wide_on_host
from fedlora.training.tasks.base import Needed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Texts:
    """The columns of data.text and, where it is set, data.text-pair."""

    text: list[str]
    second: Sequence[str]
    needed: list[Needed]


def texts_of(table: Table, where: str, data: DataConfig) -> Texts:
    """Raises DataError where the table lacks one of them."""
    text = column(table, where, "data.text", data.text)
    needed, second = [Needed(data.text, text)], list[str]()
    if data.text_pair:
        second = column(table, where, "data.text-pair", data.text_pair)
        needed.append(Needed(data.text_pair, second))
    return Texts(text, second, needed)


def two_texts(data: DataConfig) -> str:
    """Two texts for a tokenizer, as Python: single, or each with what stands beside it."""
    return '["a text", "another"]' + ', ["beside the one", "the other"]' * bool(data.text_pair)


def labels_for_splits(table: Table, where: str, data: DataConfig) -> list[str]:
    """data.label of a task that writes, by which rows are dealt out; none where there is none."""
    if data.label not in table.names:
        return []
    return [as_label(x) for x in column(table, where, "data.label", data.label)]


def encoded_texts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[Encoded, list[int]]:
    """The rows' texts as examples without a target, and the numbers of the rows that are there.

    A text of more than `longest` tokens is cut at its end; of a pair the longer of the two is, a
    token at a time, as transformers' "longest_first" does. A row of which the tokenizer makes no
    token is left out, and counted in the log.

    Raises:
        DataError: no row has a token.
    """
    pairs = (list(rows.second),) if rows.second else ()
    options = {"truncation": True, "max_length": longest}
    found = tokenizer(list(rows.text), *pairs, **options) if len(rows) else {}
    every = found.get("input_ids", [])
    kept = [i for i, ids in enumerate(every) if ids]
    left = len(rows) - len(kept)
    tell(len(rows), len(kept), {"have a text of which the tokenizer makes no token": left})
    ids, starts = flat([every[i] for i in kept])
    types = None
    if "token_type_ids" in found:
        types = flat([found["token_type_ids"][i] for i in kept])[0]
    numbers = torch.tensor(kept, dtype=torch.long)
    return Encoded(ids, starts, numbers, pad_of(tokenizer), types=types), kept


def tell(rows: int, kept: int, left: Mapping[str, int]) -> None:
    """Log how many rows were left out, by the reason.

    Raises:
        DataError: all of them.
    """
    for reason, n in left.items():
        if n and not kept:
            raise DataError(f"{n} of {rows} rows {reason}; none is left")
        if n:
            log.warning("%d of %d rows %s; they are left out", n, rows, reason)


def by_example(definition: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """definition(logits of a row, its label) of every row, (b,), in float64 on the host."""
    rows = zip(wide_on_host(logits), labels, strict=True)
    return torch.stack([definition(z, y) for z, y in rows])


def by_token(logits: Tensor, labels: Tensor, smooth: float, before: int = 0) -> Tensor:
    """The definition of a mean over an example's own scored tokens, (b,), in float64 on the host:
    -sum_k q_k log softmax(z)_k of q = (1 - smooth) [k = y] + smooth / c.

    before: how many places before a label the output stands that says it.
    """
    found = list[Tensor]()
    for z, y in zip(wide_on_host(logits), labels, strict=True):
        at = [t for t in range(before, len(y)) if y[t] != IGNORE]
        rows = ((z[t - before], y[t]) for t in at)
        own = [x.logsumexp(0) - (1 - smooth) * x[i] - smooth * x.mean() for x, i in rows]
        found.append(torch.stack(own).mean())
    return torch.stack(found)
