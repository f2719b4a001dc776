"""Which of a model's linear modules lora.target-modules names.

    "auto"         PEFT's own choice for the architecture; where it has none, the linear maps inside
                   the model's attention blocks
    "all-linear"   every linear map but the output embedding, and those of PAST_ADAPTERS
    names          the modules whose path ends so

Weights that are no module are out of its reach (XLNet's attention). The stacked experts of a
mixture have a key of their own, lora.target-parameters.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn

from fedlora.errors import ModelError
from fedlora.training.model.heads import within

PAST_ADAPTERS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d")
)
"""Modules of a kind of model whose weights its kernels read themselves, past an adapter: PEFT
refuses one there."""


def targeted(base: nn.Module, linear: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those of the linear modules that the targets name, in the model's order.

    Raises:
        ModelError: a target, or "auto", matches nothing; the names that would are listed.
    """
    output = getattr(base, "get_output_embeddings", lambda: None)()
    kind = str(getattr(getattr(base, "config", None), "model_type", ""))
    past = PAST_ADAPTERS.get(kind, ())
    if named := [t for t in targets if t.rpartition(".")[2] in past]:
        raise ModelError(
            f"lora.target-modules: {', '.join(named)}: the kernels of {kind} read these weights "
            "past an adapter, and PEFT takes none there; leave them out, or use 'all-linear', "
            "which does"
        )
    linear = [n for n in linear if n.rpartition(".")[2] not in past]
    within_reach = [n for n in linear if base.get_submodule(n) is not output]
    if not within_reach:
        raise ModelError(
            f"lora.target-modules: this model has no linear module that PEFT adapts{_bare(base)}; "
            "its weights are in modules of a kind of their own"
        )
    if targets == ("all-linear",):
        return within_reach
    if targets == ("auto",):
        if found := _by_peft(base, linear) or _in_attention(base, linear):
            return found
        raise ModelError(
            'lora.target-modules = "auto" finds no linear module in this model\'s attention'
            f"{_bare(base)}; choose from what it has: {_last(linear)}, or 'all-linear'"
        )
    missing = [t for t in targets if not any(ends(n, t) for n in linear)]
    if missing:
        raise ModelError(
            f"lora.target-modules: {', '.join(missing)} matches no linear module of this "
            f"model{_bare(base, missing)}; it has {_last(linear)}, or use 'auto' or 'all-linear'"
        )
    return [n for n in linear if any(ends(n, t) for t in targets)]


def stacks_named(base: nn.Module, targets: Sequence[str]) -> list[str]:
    """The stacked experts that lora.target-parameters names, in the model's order, by full names.

    Raises:
        ModelError: a target matches no parameter, or one that is no stack of weight matrices.
    """
    named, there = dict(base.named_parameters()), stacks(base)
    known = ", ".join(dict.fromkeys(tail(n) for n in there))
    choose = f"choose from {known}" if known else "this model has none; leave it empty"
    for target in targets:
        matching = [n for n in named if ends(n, target)]
        if not matching:
            raise ModelError(f"lora.target-parameters: {target} matches no parameter; {choose}")
        if wrong := [n for n in matching if n not in there]:
            p = named[wrong[0]]
            raise ModelError(
                f"lora.target-parameters: {target} is {tuple(p.shape)} of {p.dtype}, no stack "
                f"of real weights of its module's `num_experts`; {choose}"
            )
    return [n for n in there if any(ends(n, t) for t in targets)]


def stacks(base: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked experts of a model, in PEFT's base or a bare one, by their plain full names.

    A parameter of three axes, whose module says that the first counts its experts.
    """
    return {
        f"{path}.{tail}".replace(".base_layer", ""): p
        for path, module in base.named_modules()
        for tail, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and len(p) > 1 and p.is_floating_point()
        if getattr(module, "num_experts", None) == len(p)
    }


def tail(name: str) -> str:
    """What follows the last number in a path."""
    return re.split(r"\.\d+\.", name)[-1]


def ends(name: str, target: str) -> bool:
    """Is the target this path, or its end?"""
    return name == target or name.endswith(f".{target}")


def left_out(base: nn.Module, heads: Sequence[str], adapted: Iterable[str]) -> dict[str, int]:
    """The numbers in each kind of weight matrix that is neither adapted nor trained whole.

    By the last name of its path, in PEFT's base or a bare one. Vectors (biases, norms) are not
    counted.
    """
    trained, found = [*heads, *adapted], dict[str, int]()
    for name, p in base.named_parameters():
        path = name.replace(".base_layer", "").removesuffix(".weight")
        if p.ndim > 1 and ".lora_" not in name and not within(path, trained):
            kind = path.rpartition(".")[2]
            found[kind] = found.get(kind, 0) + p.numel()
    return found


def _by_peft(base: Any, linear: Sequence[str]) -> list[str]:
    """Those of PEFT's table for the architecture; none where it has none, or none of them."""
    config = getattr(base, "config", None)
    names = PEFT_TARGETS.get(getattr(config, "model_type", None), ())
    if isinstance(names, str):
        return [n for n in linear if re.fullmatch(names, n)]
    return [n for n in linear if any(ends(n, t) for t in names)]


def _in_attention(base: nn.Module, linear: Sequence[str]) -> list[str]:
    """The linear modules inside modules whose class is one of attention."""
    blocks = [n for n, m in base.named_modules() if "attention" in type(m).__name__.lower()]
    return [n for n in linear if any(n.startswith(f"{block}.") for block in blocks)]


def _bare(base: nn.Module, names: Sequence[str] = ()) -> str:
    """What to say of weight matrices that are no module: all of them, or those of these names."""
    bare = _parameters(base)
    if names:
        bare = {name: n for name, n in bare.items() if name in names}
    if not bare:
        return ""
    shown = ", ".join(sorted(bare)[:8])
    return f" ({shown}: parameters without a module, which LoRA on modules cannot reach)"


def _parameters(base: nn.Module) -> Mapping[str, int]:
    """The weight matrices that lie in a module under another name than `weight`."""
    found: dict[str, int] = {}
    for name, p in base.named_parameters():
        last = name.rpartition(".")[2]
        if p.ndim > 1 and last != "weight":
            found[last] = found.get(last, 0) + p.numel()
    return found


def _last(linear: Sequence[str]) -> str:
    return ", ".join(sorted({n.split(".")[-1] for n in linear})) or "none"
