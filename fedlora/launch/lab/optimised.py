"""Reading the text out of one update by optimisation: inputs whose gradient points where it went.

    min over X (n, hidden) of   1 - cos( dL(X)/dw, what the update says of it )

from several random starts; each row of the best X is then the token whose embedding is nearest.
Zhu, Liu and Han, "Deep Leakage from Gradients", 2019, https://arxiv.org/abs/1906.08935, with the
cosine of Geiping et al., 2020, https://arxiv.org/abs/2003.14053. The attacker knows the model, the
number of tokens, the first and last of them, and the label, which class biases give away.

It needs no list of inputs and no rank above the number of tokens, which the span test does
(`inversion.py`); in exchange nothing says that what it finds is right.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from fedlora.training.model.model import Model


def optimise(
    model: Model,
    words: nn.Embedding,
    change: Mapping[str, Mapping[str, Tensor]],
    known: Mapping[int, int],
    n: int,
    label: int,
    steps: int = 200,
    starts: int = 2,
    rate: float = 0.05,
) -> Tensor:
    """The token ids (n,) that fit `change` best, by column and name, with `known` by position."""
    live = model.trainable(frozenset(change))
    pairs = [(p, -change[c][name]) for c, ps in live.items() for name, p in ps.items()
             if name in change[c] and bool(change[c][name].any())]  # fmt: skip
    params = [p for p, _ in pairs]
    wanted = torch.cat([x.float().flatten() for _, x in pairs])
    generator = torch.Generator().manual_seed(0)
    model.peft.eval()
    table = words.weight.detach()
    best, lowest = torch.zeros(n, dtype=torch.long), float("inf")
    for _ in range(starts):
        first = torch.randint(len(table), (n,), generator=generator)
        X = table[first].clone().requires_grad_()
        optimizer = torch.optim.Adam([X], lr=rate * float(table.std()) * 10)
        for _ in range(steps):
            optimizer.zero_grad()
            gap = distance(model, words, _with(X, known, table), label, params, wanted)
            gap.backward()
            optimizer.step()
        for p in params:
            p.grad = None
        ids = (normalize(X.detach(), dim=1) @ normalize(table, dim=1).T).argmax(1)
        for at, token in known.items():
            ids[at] = token
        found = float(distance(model, words, table[ids], label, params, wanted).detach())
        if found < lowest:
            best, lowest = ids, found
    return best


def distance(
    model: Model,
    words: nn.Embedding,
    X: Tensor,
    label: int,
    params: list[nn.Parameter],
    wanted: Tensor,
) -> Tensor:
    """1 - the cosine of these inputs' gradient (n, hidden) with the one that is wanted."""
    ids = torch.zeros(1, len(X), dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vars(words)["forward"] = lambda _: X[None]
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the only one whose gradient has a gradient
            loss = cross_entropy(model.logits(given), torch.tensor([label]))
    finally:
        del words.forward
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    return 1 - cosine_similarity(flat, wanted, dim=0, eps=1e-12)


def _with(X: Tensor, known: Mapping[int, int], table: Tensor) -> Tensor:
    rows = [table[known[at]] if at in known else X[at] for at in range(len(X))]
    return torch.stack(rows)
