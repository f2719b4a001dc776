"""Examples as a model reads them: padded on its side, and what a decoder is given of a response."""

from typing import Any

import torch

from fedlora.errors import ModelError
from fedlora.training.data.batches import DECODER, Encoded
from fedlora.training.devices import on_host, sent
from fedlora.training.model.model import Model
from fedlora.training.model.raised import named


def as_read(model: Model, rows: Encoded) -> Encoded:
    """The same examples; a second time changes nothing.

    Raises:
        ModelError: they have responses for a decoder, and the model does not say how it begins.
    """
    begins = begin_of(model) if rows.second == DECODER else None
    return rows.read_by(model.pads_left, begins)


def begin_of(model: Model) -> int:
    """The token that the decoder is given before it writes the first.

    By the model's own shift of a response, which has to be this token and then the response but for
    its last; where a class of transformers has none, by its config.

    Raises:
        ModelError: there is neither, or the model shifts in another way.
    """
    base: Any = model.peft.get_base_model()
    what = f"model.path = {model.config.model.path!r}"
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        found = getattr(base.config, "decoder_start_token_id", None)
        if found is None:
            raise ModelError(
                f"{what}: its config.json has no decoder_start_token_id, so nothing says what its "
                "decoder begins with; set it there as the model was trained"
            )
        return int(found)
    written = torch.tensor([model.tokenizer(text_target="a b c")["input_ids"]])
    with named(f"{what}: its shift of a decoder's inputs"):
        shifted = on_host(shift(sent(written, model.device)))
    if not torch.equal(shifted[:, 1:], written[:, :-1]):
        raise ModelError(
            f"{what}: its decoder is not given a response's tokens one place later, as seq2seq "
            "trains it; use a model such as T5 or BART"
        )
    return int(shifted[0, 0])
