"""Bases whose weights are stored in few bits: how they are asked for, and what they hold.

8bit, 4bit    bitsandbytes; a weight is no floating-point tensor
int8          torchao; a weight says that it is float32, and holds 8 bits and a scale a row
"""

from typing import Any

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def asked_for(kind: str) -> Any:
    """transformers' quantisation config of a model.quantization."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")


PACKS = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' 4-bit layers: do they rewrite their weight to evaluate?"""


def keep_as_loaded(model: nn.Module) -> None:
    """Have a model's 4-bit layers hold the bits that they were loaded with.

    On processors with bfloat16 units bitsandbytes 0.50 packs a weight anew at its first evaluation:
    scales become bfloat16, widths must be multiples of 32, and no later pass has gradients.
    """
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)


def in_python(kind: str) -> tuple[str, list[str]]:
    """The same as Python that a reader of an export runs, and the imports that it needs."""
    if kind == "none":
        return "", []
    if kind == "int8":
        imports = ["from torchao.quantization import Int8WeightOnlyConfig",
                   "from transformers import TorchAoConfig"]  # fmt: skip
        return "TorchAoConfig(Int8WeightOnlyConfig())", imports
    return f"BitsAndBytesConfig(load_in_{kind}=True)", [
        "from transformers import BitsAndBytesConfig"
    ]


def is_stored(W: Tensor) -> bool:
    """Is this weight stored in few bits?"""
    return not W.is_floating_point() or is_traceable_wrapper_subclass(W)


def weight_of(layer: Any) -> Tensor:
    """What the weight of a layer, however stored, stands for, in floating point."""
    W: Tensor = layer.weight
    if is_traceable_wrapper_subclass(W):
        return W.detach().dequantize()
    if not W.is_floating_point():
        # Not PEFT's dequantize_module_weight: on a CPU it loses an 8-bit weight's scale.
        found: Tensor = dequantize_bnb_weight(W, state=getattr(layer, "state", None))
        return found
    return W


def plain(p: Tensor) -> Tensor:
    """A tensor that can be sliced: itself, or what torchao's stands for."""
    return p.detach().dequantize() if is_traceable_wrapper_subclass(p) else p.detach()


def bytes_of(p: Tensor) -> int:
    """The memory of a tensor, whatever it says that it is."""
    if is_traceable_wrapper_subclass(p):
        return sum(bytes_of(getattr(p, name)) for name in p.__tensor_flatten__()[0])
    return p.numel() * p.element_size()
