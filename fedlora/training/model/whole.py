"""Modules that are trained whole, in float32 whatever the base's dtype is.

In bfloat16 a step that is smaller than the last of its eight bits is lost: at lr 1e-5 most of a
head would never move. Such a module takes what the base gives it, computes in float32, and gives
the base's dtype back where a module of the base comes next; a head's result stays as it is.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlora.training.model.targets import ends

NARROW = (torch.bfloat16, torch.float16)


def inside_body(base: Any, heads: Sequence[str]) -> set[str]:
    """Those of the heads that are inside the pretrained body, so that more of the base follows."""
    body = getattr(base, "base_model", base)
    if body is base:
        return set()
    modules = {*body.modules()}
    return {name for name in heads if base.get_submodule(name) in modules}


def trained_whole(peft: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The modules that any adapter trains whole, by name, in the model's order."""
    return {n: x for n, x in peft.named_modules() if isinstance(x, ModulesToSaveWrapper)}


def in_float32(model: nn.Module, adapter: str, inner: Collection[str]) -> None:
    """Make what this adapter trains whole float32; `inner` are the modules inside the body.

    Of a base in float32 nothing changes.
    """
    for name, wrapper in trained_whole(model).items():
        if adapter not in wrapper.modules_to_save:
            continue
        module = wrapper.modules_to_save[adapter]
        narrow = {p.dtype for p in module.parameters() if p.dtype in NARROW}
        if not narrow:
            continue
        (dtype,) = narrow
        module.float()
        module.register_forward_pre_hook(_widen, with_kwargs=True)
        if any(ends(name, m) for m in inner):
            module.register_forward_hook(_narrower(dtype))


def _widen(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _narrower(dtype: torch.dtype) -> Any:
    def narrow(_: nn.Module, __: Any, output: Any) -> Any:
        return _cast(output, dtype)

    return narrow


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """The same tuple, list, dict or tensor, with each tensor of real numbers in this dtype."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, tuple | list):
        return type(x)(_cast(y, dtype) for y in x)
    if isinstance(x, dict):
        return type(x)({key: _cast(y, dtype) for key, y in x.items()})
    return x
