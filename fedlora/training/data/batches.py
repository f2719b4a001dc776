"""Examples as token ids with what is to be learned of each, and batches of them.

How rows become examples is the task's affair: `fedlora.training.tasks`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.config.sections import TrainConfig
from fedlora.training.data.seam import put_behind

Batch = dict[str, Tensor]
"""labels, one entry an example, and what a model is given: input_ids, attention_mask and what else
the tokenizer makes. Whoever counts examples counts labels: not every model reads tokens."""

IGNORE = -100
"""The label of a token that is not scored."""

OTHER, DECODER = "other_", "decoder_"
"""What the tensors of an example's second sequence are called by, before the usual name: where it
is another answer to the same prompt, and where a decoder writes it."""

POOL = 8
"""Batches that are drawn together and sorted by length, so that a batch has little padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """The pictures of examples, which become numbers as a batch is made of them."""

    sources: Sequence[Any]
    made: Callable[[Any], Tensor]
    """The numbers of one, (channels, height, width), float32; of one size for all."""

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """(b, channels, height, width)."""
        found = [self.made(self.sources[i]) for i in numbers.tolist()]
        return torch.stack(found) if found else torch.empty(0)

    def select(self, numbers: Tensor) -> "Pixels":
        return replace(self, sources=[self.sources[i] for i in numbers.tolist()])


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """n examples of t tokens in all, one after the other without padding.

    What is to be learned is one of `classes`, `targets`, `marks` and, from there on, `prompts`;
    beside prompts, `targets` are what the untouched model makes of the example.
    """

    ids: Tensor  # (t,) int32
    starts: Tensor  # (n + 1,) where each example starts, and t
    rows: Tensor  # (n,) the row each example is of: some have none, and with windows several
    pad: int
    classes: Tensor | None = None  # (n,) index of the label
    targets: Tensor | None = None  # (n, ...) numbers, float32
    marks: Tensor | None = None  # (t,) int32, each token's label; IGNORE where it has none
    prompts: Tensor | None = None  # (n,) tokens before those that are scored
    types: Tensor | None = None  # (t,) token_type_ids
    left: bool = False  # whether batches are padded on the left
    straddled: int = 0
    """Examples in whose whole text a token would lie on both sides of the seam."""
    pixels: Pixels | None = None
    """Of examples that are pictures, which have no tokens: `ids` is empty, each length 0."""
    other: "Encoded | None" = None
    """A second sequence of each example: the rejected answer of a pair; and beside texts that have
    nothing to be learned of themselves what a decoder is to write, which `read_by` completes."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example, (n,)."""
        return self.starts.diff()

    @property
    def widths(self) -> Tensor:
        """Tokens that each example is padded to when it is alone, (n,): of its longer sequence."""
        return self.lengths if self.other is None else self.lengths.maximum(self.other.lengths)

    @property
    def second(self) -> str:
        """What the second sequence's tensors are called by; "" where there is none."""
        if self.other is None:
            return ""
        return DECODER if self.prompts is None else OTHER

    def read_by(self, left: bool, begins: int | None) -> "Encoded":
        """As a model reads them: padded on its side; a decoder, which begins with this token, is
        given each token that it is to write one place later. A second time changes nothing."""
        found, other = replace(self, left=left), self.other
        if self.second != DECODER or other is None or other.marks is not None:
            return found
        assert begins is not None
        ids = other.ids.roll(1)
        ids[other.starts[:-1]] = begins
        return replace(found, other=replace(other, ids=ids, marks=other.ids))

    def select(self, numbers: Tensor) -> "Encoded":
        """These examples, in this order."""
        spans = [torch.arange(*self.starts[i : i + 2].tolist()) for i in numbers.tolist()]
        tokens = torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)
        starts = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0)
        by: dict[str, Any] = {"starts": starts, "ids": self.ids[tokens]}
        for name in ("types", "marks"):
            by[name] = None if (x := getattr(self, name)) is None else x[tokens]
        for name in ("rows", "classes", "targets", "prompts"):
            by[name] = None if (x := getattr(self, name)) is None else x[numbers]
        by["pixels"] = None if self.pixels is None else self.pixels.select(numbers)
        by["other"] = None if self.other is None else self.other.select(numbers)
        return replace(self, **by)


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
    ids, starts = flat([[*drawn(n), *end][: n + len(end) - len(mark)] + mark for n in lengths])
    n, pad = len(lengths), pad_of(tokenizer)
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


def local_steps(rows: int, train: TrainConfig) -> int:
    """A client's steps a round, of so many examples."""
    found = steps_in(rows, train.step_size, train.steps, train.epochs)
    return min(found, train.max_steps) if train.max_steps else found


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
    if encoded.pixels is not None:
        assert encoded.classes is not None
        return {"pixel_values": encoded.pixels[numbers], "labels": encoded.classes[numbers]}
    batch = _padded(encoded, numbers, encoded.lengths[numbers], encoded.left, width)
    if encoded.other is not None:
        other = collate(encoded.other, numbers, width)
        batch |= {f"{encoded.second}{key}": x for key, x in other.items()}
        if encoded.second == DECODER:
            return {**batch, "labels": batch.pop(f"{DECODER}labels")}
    if encoded.classes is not None:
        return {**batch, "labels": encoded.classes[numbers]}
    if encoded.targets is not None and encoded.prompts is None:
        return {**batch, "labels": encoded.targets[numbers]}
    if encoded.targets is not None:
        batch["reference"] = encoded.targets[numbers]
    mask = batch["attention_mask"].bool()
    if encoded.marks is not None:
        return {**batch, "labels": _marked(encoded, numbers, mask)}
    assert encoded.prompts is not None
    ids = batch["input_ids"]
    scored = mask & (torch.arange(ids.shape[1]) >= encoded.prompts[numbers, None])
    return {**batch, "labels": ids.where(scored, IGNORE)}


def _marked(encoded: Encoded, numbers: Tensor, mask: Tensor) -> Tensor:
    """Each token's label, (b, t): IGNORE in the padding of the mask."""
    assert encoded.marks is not None
    labels = torch.full(mask.shape, IGNORE)
    spans = [encoded.marks[slice(*encoded.starts[n : n + 2].tolist())] for n in numbers.tolist()]
    labels[mask] = torch.cat(spans).long() if spans else labels[mask]
    return labels


def examples_in(batch: Batch) -> int:
    """How many examples a batch has."""
    return len(batch["labels"])


def tokens_in(batch: Batch) -> int:
    """Tokens of a batch, of all its sequences and padding included; of inputs that are no tokens,
    its examples."""
    ids = [x.numel() for key, x in batch.items() if key.endswith("input_ids")]
    return sum(ids) or examples_in(batch)


def inputs_of(batch: Batch) -> Batch:
    """What a model is given of a batch: all but its labels."""
    return {key: x for key, x in batch.items() if key != "labels"}


def alone(batch: Batch, i: int) -> Batch:
    """Example i in a batch of its own, without padding."""
    found = {}
    written = DECODER if f"{DECODER}attention_mask" in batch else ""
    for key, x in batch.items():
        side = next((s for s in (OTHER, DECODER) if key.startswith(s)), "")
        mask = batch.get(f"{written if key == 'labels' else side}attention_mask")
        found[key] = x[i : i + 1]
        if mask is not None and x.shape == mask.shape and not x.is_floating_point():
            found[key] = x[i : i + 1, mask[i].bool()]
    return found


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the other sequence of each example, as batches of their own."""
    other = {k.removeprefix(OTHER): x for k, x in batch.items() if k.startswith(OTHER)}
    return {k: x for k, x in batch.items() if k in other}, other


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


def flat(ragged: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ids (t,) and starts (n + 1,) of an `Encoded`, of each example's ids."""
    lengths = torch.tensor([0, *map(len, ragged)], dtype=torch.long)
    ids = [token for ids in ragged for token in ids]
    return torch.tensor(ids, dtype=torch.int32), lengths.cumsum(0)


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that fills batches up."""
    pad = tokenizer.pad_token_id
    return int((tokenizer.eos_token_id or 0) if pad is None else pad)
