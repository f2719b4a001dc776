"""The last step of a causal LM, apart: logits of a few tokens at a time, never of a whole batch.

    states, output = head.states(run, inputs, at)        (n, width), from one pass
    head.losses(states, output, targets)                 (n,), through (part of n, vocabulary)

The logits of 64 texts of 512 tokens and 128,000 words are 16.8 GB in float32, and their gradient
as much again. Only tokens that are scored need any, and a part of them at a time: in the backward
pass a part's logits are computed again.

What a model does behind its body (a product, and in some a soft cap or a scale) is its own
`forward` here too, with the body standing still, so nothing of an architecture is written down.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

PART = 2**28
"""Bytes of float32 logits at a time."""


class OutputHead:
    """What follows a causal LM's body."""

    def __init__(self, base: Any, body: nn.Module, vocabulary: int) -> None:
        self.base, self.body, self.vocabulary = base, body, vocabulary

    @classmethod
    def of(cls, base: Any) -> "OutputHead | None":
        """The head of a causal LM of transformers that is frozen; None where it is not such."""
        if "logits_to_keep" not in inspect.signature(base.forward).parameters:
            return None
        body, output = base.get_decoder(), base.get_output_embeddings()
        if body is base or output is None or any(p.requires_grad for p in output.parameters()):
            return None
        return cls(base, body, base.config.get_text_config().vocab_size)

    def states(
        self, run: Callable[..., Any], inputs: Mapping[str, Any], at: Tensor
    ) -> tuple[Tensor, Any] | None:
        """The body's last states at n of its b t places, (n, width), and its whole output.

        None of a model that computes without calling its body.
        """
        found: list[Any] = []
        hook = self.body.register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            run(**inputs, logits_to_keep=at[:0])  # at no place: no product with the vocabulary
        finally:
            hook.remove()
        return (found[-1][0].flatten(0, 1).index_select(0, at), found[-1]) if found else None

    def losses(self, states: Tensor, output: Any, targets: Tensor, smooth: float = 0.0) -> Tensor:
        """The cross-entropy of each row of states (n, width) with its target (n,), in float32."""

        def of(part: Tensor, wanted: Tensor) -> Tensor:
            logits = self._logits(part, output).float()
            return cross_entropy(logits, wanted, reduction="none", label_smoothing=smooth)

        if not len(states):
            return states.float().sum(1)
        rows = max(1, PART // (4 * self.vocabulary))
        if len(states) <= rows:
            return of(states, targets)
        parts = zip(states.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(of, *part, use_reentrant=False) for part in parts])

    def _logits(self, states: Tensor, output: Any) -> Tensor:
        """(n, vocabulary), of states (n, width) that stand in place of the body's."""
        given = copy.copy(output)
        given["last_hidden_state"] = states[None]
        self.body.forward = lambda *_, **__: given
        try:
            ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            logits: Tensor = self.base(input_ids=ids, use_cache=False).logits
        finally:
            del self.body.forward
        return logits[0]
