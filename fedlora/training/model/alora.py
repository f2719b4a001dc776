"""The token of a row at which aLoRA's adapters begin to act: the last match of lora.invocation.

Greenewald et al., "Activated LoRA", https://arxiv.org/abs/2504.12397: what stands before the
invocation is computed by the base alone, so its cache is the base's. The change is s B A x there
and after, 0 before, on every client alike: linear in B A, so a mean of products stays a mean.
"""

import functools
from typing import Any

from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor

from fedlora.config.sections import ModelConfig
from fedlora.errors import ModelError
from fedlora.training.model.loading import load_tokenizer


@functools.cache
def invocation(model: ModelConfig, text: str) -> list[int]:
    """lora.invocation in the model's tokens."""
    return [*load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]]


def offsets(model: Any, ids: Tensor) -> list[int]:
    """How far from the end of each row of ids (b, t) its invocation begins.

    Raises:
        ModelError: a row has none. PEFT itself would pass over it, and nothing be trained.
    """
    found: list[int] = calculate_alora_offsets(model.peft.peft_config, model.active, ids)
    if None in found:
        row = model.tokenizer.decode(ids[found.index(None)], skip_special_tokens=True)  # type: ignore[arg-type]
        raise ModelError(
            f"lora.invocation = {model.config.lora.invocation!r} is not in the row {row[:80]!r}, "
            "which would train nothing; end data.prompt with it"
        )
    return found
