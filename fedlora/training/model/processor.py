"""A model of pictures: its image processor, its input's precision, and what it may be made of."""

from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from fedlora.config.sections import ModelConfig
from fedlora.errors import ModelError

BACKEND = "pil"
"""transformers' way of making pixels that every machine has, and that gives each the same ones."""


def load_processor(path: str, config: ModelConfig) -> Any:
    """What makes a model's pixels of a picture, from the files beside it.

    Raises:
        ModelError: it makes pictures of several sizes.
    """
    found = AutoImageProcessor.from_pretrained(
        path,
        backend=BACKEND,
        revision=config.revision or None,
        trust_remote_code=config.trust_remote_code,
    )
    blank = (Image.new("RGB", size) for size in ((37, 23), (23, 37)))
    wide, high = (found(x, return_tensors="pt")["pixel_values"].shape[1:] for x in blank)
    if wide != high:
        raise ModelError(
            f"model.path = {config.path!r}: its image processor makes {tuple(wide)} of one picture "
            f"and {tuple(high)} of another, which are no batch; set a size, or a crop, of height "
            "and width in its preprocessor_config.json"
        )
    return found


def prepare(model: Any, config: ModelConfig) -> None:
    """Have the model's body take pixels in its own precision.

    Raises:
        ModelError: a layer of it keeps statistics of the pictures that it was trained on.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"model.path = {config.path!r} is a convolutional network, a "
                f"{model.config.model_type}, whose {name} keeps statistics of a client's own "
                "pictures, which no strategy aggregates, and whose convolutions are not adapted; "
                "choose a model of attention and LayerNorm: ViT, DeiT or Swin"
            )
    model.base_model.register_forward_pre_hook(_narrow, with_kwargs=True)


def _narrow(module: nn.Module, args: Any, kwargs: Any) -> Any:
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

    def of(x: Any) -> Any:
        real = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.to(dtype) if real else x

    return tuple(map(of, args)), {key: of(x) for key, x in kwargs.items()}
