"""Micro-batches in which no example's numbers depend on which others were sampled.

    for part in microbatches(chosen, encoded.widths, size, most):
        batch = part.batch(encoded)             (size(part.width), part.width)

A product's order of summation depends on its shape, and a kernel on whether anything is masked at
all. So an example is padded to a width that is a function of its own length; every micro-batch of a
width has the same number of places, and those that nobody has are filled; and in each something is
masked: a width is more than a length, and at data.max-length, where it may not be, the last place
is a filler of one token. What fills counts for nothing.

That neighbours and place then change no bit is seen by the probe, not proved: probe.py. With a size
of one there are no neighbours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.training.data.batches import IGNORE, Batch, Encoded, collate

NARROWEST = 8
"""Tokens of the narrowest width. The others are its doubles, and those by three quarters, up to
data.max-length: 8, 12, 16, 24, 32, ..."""
SHARE = 10
"""Of the examples that a step draws, one in so many is in a micro-batch, where nothing else is
said: with more, most places would be filled, since widths and samples do not come out even."""


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch: examples of one width."""

    numbers: Tensor
    """(size,), of which the first `real` count; the others repeat the first."""
    real: int
    width: int
    """Tokens that each is padded to."""
    full: bool
    """May all of them be as long as that? Then the last place is a filler."""

    def batch(self, encoded: Encoded) -> Batch:
        """The examples and what fills up, (size, width)."""
        found = collate(encoded, self.numbers, self.width)
        if "attention_mask" in found and self.full and len(self.numbers) > 1:
            for name in dict.fromkeys(("", encoded.second)):
                mask = torch.zeros_like(found[f"{name}attention_mask"][-1])
                mask[-1 if encoded.left else 0] = 1
                found[f"{name}attention_mask"][-1] = mask
                found[f"{name}input_ids"][-1, mask == 0] = encoded.pad
                labels = found.get(f"{name}labels")
                if labels is not None and labels.ndim > 1 and not labels.is_floating_point():
                    labels[-1] = IGNORE
        return found


def width_of(length: int, most: int) -> int:
    """What an example of so many tokens is padded to, whatever stands beside it.

    most: data.max-length, above which no example is.
    """
    double = 1 << max(length, NARROWEST - 1).bit_length()
    width = double * 3 // 4 if length < double * 3 // 4 and double > NARROWEST else double
    return max(length, min(width, most))


def size_of(asked: int, most: int, drawn: float) -> int:
    """Places of a micro-batch: what is asked for; 0: by the examples that a step draws, in the
    mean, and at most `most`."""
    return asked or max(1, min(most, round(drawn / SHARE)))


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
        full = width >= most
        places = max(1, size(width) - full)
        for start in range(0, len(found), places):
            part = found[start : start + places]
            filled = part + part[:1] * (size(width) - len(part))
            yield Part(torch.tensor(filled), len(part), width, full)
