"""Short examples of a batch in shared rows: train.packing.

    [a a a . . .]      [c c c c c c]
    [b b . . . .]  ->  [a a a b b .]      position_ids  0 1 2 0 1 0
    [c c c c c c]

The examples are those of the batch, in no other step and of no other weight; only padding goes. A
row is as wide as the batch's longest example, so none attends further than without. A model that
is given positions and no mask keeps apart what lies in a row by where positions begin anew, as
transformers' masks do; that this one does is measured: `packing_check`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.training.data.batches import Batch


def layout(lengths: Sequence[int], width: int) -> tuple[list[int], list[int], int]:
    """The row and the first place of each example, and the number of rows: first-fit decreasing.

    No example may be longer than `width`.
    """
    rows, firsts, used = [0] * len(lengths), [0] * len(lengths), list[int]()
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (r for r, n in enumerate(used) if n + lengths[i] <= width)
        if (row := next(fits, len(used))) == len(used):
            used.append(0)
        rows[i], firsts[i] = row, used[row]
        used[row] += lengths[i]
    return rows, firsts, len(used)


def packed_tokens(batch: Batch) -> int:
    """Tokens of a batch in shared rows, what padding is left included."""
    mask = batch["attention_mask"]
    return layout(mask.sum(1).tolist(), mask.shape[1])[-1] * mask.shape[1]


def packed(inputs: Batch) -> tuple[Batch, Tensor]:
    """input_ids and position_ids (r, t) of a batch (b, t), and where each of its places lies in
    them, (b, t), counted through all rows; of padding 0."""
    mask = inputs["attention_mask"].bool()
    ids, width = inputs["input_ids"], mask.shape[1]
    rows, firsts, r = layout(mask.sum(1).tolist(), width)
    begins = torch.tensor(rows) * width + torch.tensor(firsts)  # (b,)
    position = mask.cumsum(1) - 1  # (b, t), of each token in its example
    places = (begins[:, None] + position).where(mask, 0)
    found = {"input_ids": ids.new_zeros(r * width), "position_ids": ids.new_zeros(r * width)}
    found["input_ids"][places[mask]] = ids[mask]
    found["position_ids"][places[mask]] = position[mask]
    return {key: x.view(r, width) for key, x in found.items()}, places
