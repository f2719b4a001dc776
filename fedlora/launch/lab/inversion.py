"""Reading the text out of one update: which tokens lie in the span of a LoRA gradient.

After Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", 2024,
https://arxiv.org/abs/2405.15586, on the factors of the first adapted layer:

    dA = (v R)^T X    rows in span{x_t}        dB^T = s w^T G  columns of w: span{A x_t}
    dR = v^T U        rows in span{A x_t}

x_t is the embedding of token t at its position, one of |V| * positions known vectors. While fewer
distinct (token, position) pairs than the rank are in the update, each of them lies in the span and
nothing else does. So low rank is no protection where the rank exceeds the number of tokens, and
Fed-SB and FFA leak as LoRA does; noise, or summing over clients, ends it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.training.devices import moved, on_host

TOLERANCES = (0.1, 0.01, 1e-3)
"""Relative distances from the span within which a candidate counts as in it. An update is read off
float32 numbers far larger than it, which blurs the span of a small change of A."""

DROP = 1e-5
"""Singular values below this part of the largest are rounding."""


@dataclass(frozen=True, slots=True)
class Found:
    """Of the (token, position) pairs that were in the update, and of those that were named."""

    recall: float
    precision: float
    named: int


def invert(
    change: Tensor, candidates: Iterable[Tensor], truth: set[int], drop: float = DROP
) -> Found:
    """Which candidates lie in the row space of a change (., k); truth by index over all of them.

    `candidates` come in parts (n, k). Where the rows span the whole space everything lies in it:
    that names nothing. Of the tolerances the widest counts that names no more than the rank, since
    no more than that can be independent.
    """
    _, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    rank = int((drop * S[0] < S).sum()) if len(S) and S[0] > 0 else 0
    if not 0 < rank < change.shape[1]:
        return Found(0.0, 0.0, 0)
    within: dict[float, set[int]] = {tolerance: set() for tolerance in TOLERANCES}
    seen = 0
    for part in candidates:
        V = Vh[:rank].T.to(part)
        gap = (part - part @ V @ V.T).norm(dim=1) / part.norm(dim=1)
        for tolerance, found in within.items():
            found |= {seen + i for i in torch.nonzero(gap < tolerance).flatten().tolist()}
        seen += len(part)
    named = next((x for x in within.values() if len(x) <= rank), set())
    hits = len(named & truth)
    return Found(hits / len(truth), hits / len(named) if named else 0.0, len(named))


@torch.no_grad()
def embeddings(embed: nn.Module, vocabulary: int, positions: int) -> Iterator[Tensor]:
    """Each token at one position after the other through an encoder's embedding, (V, k) a time."""
    device = next(embed.parameters()).device
    ids = torch.arange(vocabulary)[:, None]
    for at in range(positions):
        given = moved({"input_ids": ids, "position_ids": torch.tensor([[at]])}, device)
        yield on_host(embed(**given)).reshape(vocabulary, -1)


def pairs(ids: Tensor, vocabulary: int) -> set[int]:
    """The candidate indices of one text's ids (n,)."""
    return {at * vocabulary + int(token) for at, token in enumerate(ids)}
