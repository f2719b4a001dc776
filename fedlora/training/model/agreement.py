"""What a model's files lack, or say twice: padding, vocabulary, labels. Made one, or refused."""

import inspect
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedlora.config.sections import ModelConfig
from fedlora.errors import ModelError
from fedlora.training.model.ties import input_embedding
from fedlora.training.tasks import task_of

log = logging.getLogger(__name__)


def check_complete(model: Any, config: ModelConfig) -> None:
    """Nothing, where the checkpoint has what the model is made of.

    A classifier may lack its head and a pooler: those are trained.

    Raises:
        ModelError: it lacks tensors of a language model, or most of any model's numbers.
    """
    missing = model.newly_drawn
    named = dict(model.named_parameters())
    drawn = sum(named[key].numel() for key in missing if key in named)
    task = task_of(config.task)
    if 2 * drawn > sum(p.numel() for p in named.values()) or (missing and not task.headed):
        kind = type(model).__name__
        what = kind if task.headed else task.what
        raise ModelError(
            f"model.path = {config.path!r} lacks {missing[0]} and {len(missing) - 1} more tensors "
            f"of a {kind}: it is no {what}; choose a checkpoint of one, or another model.task"
        )


def agree(base: Any, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Make the model's padding token the tokenizer's, which fills the batches up.

    A decoder's classifier looks for the last token that is none: with another, a row's logits
    depend on what else is in its batch. Pictures have neither.

    Raises:
        ModelError: the tokenizer knows tokens that the model has no embedding for, or leaves out
            the end mark that an encoder-decoder's classifier looks for.
    """
    if task_of(config.task).pictured:
        return
    known = getattr(base, "config", None)
    if known is not None and tokenizer.pad_token_id is not None:
        known.pad_token_id = tokenizer.pad_token_id
    looks = getattr(known, "is_encoder_decoder", False) and task_of(config.task).pooled
    if looks and getattr(known, "eos_token_id", None) not in tokenizer("a")["input_ids"]:
        raise ModelError(
            f"model.path = {config.path!r} reads its classes off the end mark, and its tokenizer "
            "puts none after a text; use the tokenizer that the model was trained with"
        )
    rows = vocabulary(base, tokenizer)
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.path = {config.path!r}: its tokenizer has {len(tokenizer)} tokens, and the "
            f"model embeddings for {rows}; use the tokenizer that the model was trained with"
        )


def labelled_as(model: Any, names: Callable[[], Sequence[str]], labels: Sequence[str]) -> None:
    """Put the rows of a checkpoint's head in the order of the data's labels.

    A head that was drawn anew has no order, and `names` of the checkpoint's classes are not asked
    for. They are compared without case. Where they are not the data's, the head begins as it is,
    and the log says so.
    """
    head = _output_of(model, len(labels))
    if head is None or any(key.startswith(f"{head[0]}.") for key in model.newly_drawn):
        return
    before = names()
    was, now = ([name.casefold() for name in x] for x in (before, labels))
    if was == now:
        return
    if sorted(was) != sorted(now):
        text = "the checkpoint's head was trained for %s and begins as that of %s, in this order"
        log.warning(text, ", ".join(before), ", ".join(labels))
        return
    order = [was.index(name) for name in now]
    with torch.no_grad():
        for x in head[1].parameters():
            x.copy_(x[order])


def _output_of(model: nn.Module, classes: int) -> tuple[str, nn.Linear] | None:
    """The last linear module that gives so many numbers, and its name."""
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return next(((n, m) for n, m in linear[::-1] if m.out_features == classes), None)


def vocabulary(base: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids a model knows: its embedding's rows; of one without, the tokenizer's."""
    table = input_embedding(base)
    return len(tokenizer) if table is None else int(table.weight.shape[0])


TRAINED_FOR = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configs call the positions that a model was trained for."""


def positions(base: nn.Module) -> int | None:
    """The most tokens that a model can read: those of its table of positions, learned or computed
    once; None where it computes them as they come, as rotary ones."""
    found = [
        m.num_embeddings
        - getattr(m, "offset", 0)
        - (0 if m.padding_idx is None else m.padding_idx + 1)
        for name, m in base.named_modules()
        if isinstance(m, nn.Embedding) and re.search(r"(position\w*|wpe)$", name)
    ]
    said = trained_for(base)
    if not found and said and (_has_table(base, said) or _sets_length(base)):
        return said
    return min(found, default=None)


def unread(base: nn.Module) -> dict[str, Any]:
    """What to ask of a forward pass so that it makes nothing that nobody reads.

    A causal LM's body else keeps the keys and values of all layers for a next token.
    """
    takes = inspect.signature(base.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


def trained_for(base: nn.Module) -> int | None:
    """The positions that a model's config states, whatever it can read."""
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(config, key, None) for key in TRAINED_FOR]
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)


def _has_table(base: nn.Module, length: int) -> bool:
    """Is there a table of so many positions (GPT-J, CodeGen, CTRL)?"""
    return any(
        x.is_floating_point() and length in x.shape and re.search(r"pos", name.rpartition(".")[2])
        for name, x in base.named_buffers()
    )


def _sets_length(base: nn.Module) -> bool:
    """Does it compute a bias of its config's length in every pass, and no rotation (MPT)?"""
    rotary = any(re.search(r"rot(ary|emb)", name) for name, _ in base.named_modules())
    return hasattr(getattr(base, "config", None), "max_seq_len") and not rotary


def pads_left(base: nn.Module) -> bool:
    """Does a classifier read its classes off the very last position, so that padding goes before?

    XLNet and its kind; every other takes the first token, or looks for the last that is no padding.
    """
    return getattr(getattr(base, "sequence_summary", None), "summary_type", "") == "last"


def padding(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that fills a batch up, by the model's config or else the tokenizer's."""
    found = getattr(getattr(base, "config", None), "pad_token_id", None)
    return int((tokenizer.pad_token_id if found is None else found) or 0)
