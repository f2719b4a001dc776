"""Was this text trained on? Scores of a causal language model's rows, high for members.

    loss         minus the mean loss over the row's tokens             Yeom et al., 2018
    min-k        mean log-probability of its 20 % least likely tokens  Shi et al., 2024, eq. 1
    reference    how far its loss lies below the model's before        Carlini et al., 2021, sec. 5
                 training, which is the reference model

Shi et al., "Detecting Pretraining Data from Large Language Models", ICLR 2024,
https://arxiv.org/abs/2310.16789. Carlini et al., "Extracting Training Data from Large Language
Models", USENIX Security 2021, https://arxiv.org/abs/2012.07805. Yeom et al.: `membership.py`.

Exposure of a secret that was planted among the rows, some copies of it (Carlini et al., "The Secret
Sharer", USENIX Security 2019, https://arxiv.org/abs/1802.08232, definition 5):

    log2 |R| - log2 rank of the secret's loss among all R candidates

Candidates are drawn alike; of n that were not planted at most log2(n + 1) bits are seen. 1 bit is
what a model shows in the mean that knows nothing: rank and size differ by a factor of e.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.training.data.batches import IGNORE, Encoded, collate
from fedlora.training.devices import on_host
from fedlora.training.model.model import Model

SHARE = 0.2
"""Of a row's tokens: min-k."""


@torch.no_grad()
def token_log_probabilities(model: Model, rows: Encoded, size: int = 16) -> list[Tensor]:
    """Of each row's scored tokens, in its order; float64."""
    model.peft.eval()
    found: list[Tensor] = []
    for part in torch.arange(len(rows)).split(size):
        batch = collate(rows, part)
        labels = batch.pop("labels")[:, 1:]
        logits = on_host(model.logits(batch))[:, :-1]
        losses = cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE
        )
        kept = labels != IGNORE
        found += [-row[mask].double() for row, mask in zip(losses, kept, strict=True)]
    return found


def loss_scores(found: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.mean() for x in found])


def min_k_scores(found: Sequence[Tensor], share: float = SHARE) -> Tensor:
    """Of a row of n tokens the ceil(share n) least likely count."""
    return torch.stack([x.sort().values[: math.ceil(share * len(x))].mean() for x in found])


def reference_scores(found: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    return loss_scores(found) - loss_scores(before)


# -- extraction ------------------------------------------------------------------------------------


def secrets(rows: Encoded, n: int, length: int, generator: torch.Generator) -> Encoded:
    """n rows of one prompt, the first row's, each with other tokens behind it."""
    assert rows.prompts is not None
    prompt = rows.ids[: int(rows.prompts[0].clamp(1, 8))]
    words = rows.ids.unique()
    drawn = words[torch.randint(len(words), (n, length), generator=generator)]
    ids = torch.cat([prompt.expand(n, -1), drawn], 1)
    starts = ids.shape[1] * torch.arange(n + 1)
    prompts = torch.full((n,), len(prompt))
    return replace(
        rows, ids=ids.flatten(), starts=starts, rows=torch.zeros(n).long(), prompts=prompts
    )


def exposure(secret: float, others: Tensor) -> float:
    """Bits, of the losses of a secret and of candidates that were not planted."""
    rank = 1 + int((others < secret).sum())
    return math.log2(len(others) + 1) - math.log2(rank)
