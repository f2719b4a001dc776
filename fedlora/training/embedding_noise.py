"""NEFTune: noise on the embeddings of what a model reads, in training alone.

    e + u,    each number of u uniform in [-m, m],    m = alpha / sqrt(L d)

for embeddings e (b, L, d): Jain et al., 2023, https://arxiv.org/abs/2310.05914, as transformers
has it, by its own function: L is the width of the batch, padding included.

The noise comes from dropout's stream, and so from (seed, round, client) alone; under example-level
DP from the system's own chance. It sees no row but for its width, which there is a function of the
row's own length, and what it does to a row's gradient is clipped with it: nothing more is spent.

Differs from transformers' Trainer in where it goes: there it is the module that
`get_input_embeddings` names, which T5 and BART never call. Here it is each embedding that shares
that module's weight, so of both halves of an encoder-decoder what it reads.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from fedlora.errors import ModelError
from fedlora.training.model.ties import input_embedding


def embeddings(base: Any) -> list[nn.Module]:
    """The modules through which a model reads its token ids.

    Raises:
        ModelError: it reads them otherwise, or not at all.
    """
    table = input_embedding(base)
    if table is None:
        raise ModelError.public(
            "train.neftune-noise-alpha: this model has no table of embeddings for its tokens; set "
            "it to 0"
        )
    within = {*table.modules()} - {table}
    alike = (m for m in base.modules() if getattr(m, "weight", None) is table.weight)
    tables: list[nn.Module] = [m for m in alike if isinstance(m, nn.Embedding) and m not in within]
    return tables if table in tables else [table, *tables]


@contextmanager
def noised(base: Any, alpha: float) -> Iterator[None]:
    """Within it a model in train mode reads noised embeddings; alpha = 0: as they are."""
    with ExitStack() as stack:
        for module in embeddings(base) if alpha else []:
            module.neftune_noise_alpha = alpha  # type: ignore[assignment]
            stack.callback(delattr, module, "neftune_noise_alpha")
            stack.callback(module.register_forward_hook(neftune_post_forward_hook).remove)
        yield
