"""Micro-batches in which no example's numbers depend on which others were sampled.

    for part in microbatches(chosen, encoded.lengths, size, most):
        batch = part.batch(encoded)             (size(part.width), part.width)

A product's order of summation depends on its shape, and a kernel on whether anything is masked at
all. So an example is padded to a width that is a function of its own length; every micro-batch of a
width has the same number of places; places that nobody has are filled; and the last place of each
is a filler of one token, so that a mask is always needed. What fills counts for nothing.

That neighbours and place then change no bit is seen by the probe, not proved: probe.py. With a size
of one there are no neighbours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.training.data.batches import IGNORE, Batch, Encoded, collate

NARROWEST = 8
"""Tokens of the narrowest width; the others are its doubles, up to data.max-length."""


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch: examples of one width."""

    numbers: Tensor
    """(size,), of which the first `real` count; the others repeat the first."""
    real: int
    width: int
    """Tokens that each is padded to."""

    def batch(self, encoded: Encoded) -> Batch:
        """The examples and what fills up, (size, width). Where there are two, the last is masked
        but for one token."""
        found = collate(encoded, self.numbers, self.width)
        if len(self.numbers) > 1 and self.width > 1:
            kept = -1 if encoded.left else 0
            mask = torch.zeros_like(found["attention_mask"][-1])
            mask[kept] = 1
            found["attention_mask"][-1] = mask
            found["input_ids"][-1, mask == 0] = encoded.pad
            if found["labels"].ndim > 1:
                found["labels"][-1] = IGNORE
        return found


def width_of(length: int, most: int) -> int:
    """What an example of so many tokens is padded to, whatever stands beside it.

    most: data.max-length, above which no example is.
    """
    doubled = 1 << max(length - 1, 0).bit_length()
    return max(length, min(max(NARROWEST, doubled), most))


def microbatches(
    numbers: Tensor, lengths: Tensor, size: Callable[[int], int], most: int
) -> Iterator[Part]:
    """A sample in parts of exactly size(width) places of one width each, the narrow ones first.

    most: as of `width_of`.
    """
    by_width: dict[int, list[int]] = {}
    for n in numbers.tolist():
        by_width.setdefault(width_of(int(lengths[n]), most), []).append(n)
    for width, found in sorted(by_width.items()):
        places = max(1, size(width) - 1)
        for start in range(0, len(found), places):
            part = found[start : start + places]
            filled = part + part[:1] * (size(width) - len(part))
            yield Part(torch.tensor(filled), len(part), width)
