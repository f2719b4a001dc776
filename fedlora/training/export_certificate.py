"""Checks an export, as plain libraries load it, by the certificate's numbers of the model.

Measured module by module through the loaded export's own modules, PEFT's or the merged weights,
and compared with those of the federated model. Heads and other trained tensors likewise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.training.certificate import (
    Gap,
    Numbers,
    Size,
    measure,
    of_layer,
    of_tensor,
    sizes,
    start_gaps,
)
from fedlora.training.model.agreement import agree
from fedlora.training.model.expert import Expert, layer_at
from fedlora.training.model.loading import (
    ENCODER,
    HEAD,
    PREFIX,
    MeanPooled,
    load_base,
    load_tokenizer,
)
from fedlora.training.model.model import Model
from fedlora.training.model.peft_directory import WEIGHTS
from fedlora.training.model.quantized import is_stored
from fedlora.training.model.shape import Shape
from fedlora.training.user_code import is_code

KEY = "export"


def numbers(model: Model) -> tuple[Numbers, Mapping[str, Size]]:
    """The numbers of the loaded federated model, for `check` to compare with."""
    others = heads(model)
    return measure(model, KEY, model.shapes, others), sizes(model, model.shapes, others)


def heads(model: Model) -> list[str]:
    """The trained tensors that are in no adapted module."""
    return [
        n for n in model.live()["other"] if not any(n.startswith(f"{m}.") for m in model.shapes)
    ]


def check(
    model: Model, want: tuple[Numbers, Mapping[str, Size]], loaded: nn.Module
) -> dict[str, Gap]:
    """How far the loaded export is from the federated model, by module and tensor.

    The export's own factors may be larger than the model's, since changes are stacked in them: the
    bound is that of the larger.

    Raises:
        ModelError: a module or tensor is not in it.
    """
    before, size = want
    found: dict[str, Tensor] = {}
    rooms = dict(size)
    tensors = {plain(name): p for name, p in loaded.named_parameters()}
    for m, shape in model.shapes.items():
        layer = module_of(loaded, m, shape)
        found[m] = of_layer(layer, f"{KEY}/{m}", shape.d, shape.k, after=model.form.after)
        base = max(size[m].base, _weight_size(layer))
        adapter = max(size[m].adapter, _adapter(layer))
        rooms[m] = Size(base, adapter)
    for name in heads(model):
        if name not in tensors:
            raise ModelError(f"the export lacks {name}, which was trained")
        found[name] = of_tensor(tensors[name], f"{KEY}/{name}")
        if tensors[name].dtype != torch.float32:  # PEFT puts it into a base of this dtype
            rooms[name] = Size(size[name].adapter, size[name].adapter)
    return start_gaps(before, rooms, found, "float32", model.config.model.dtype)


def worst(gaps: Mapping[str, Gap]) -> tuple[str, float]:
    """The module or tensor that is farthest off, and by how many times what rounding explains."""
    known = {m: g for m, g in gaps.items() if not math.isnan(g.found)}
    name = max(known, key=lambda m: known[m].excess, default="")
    return name, known[name].excess if name else 0.0


def certified(model: Model, loaded: Any, what: object) -> float:
    """How far the export's modules are from the loaded model's, over what rounding explains.

    Raises:
        ModelError: by more than rounding.
    """
    gaps = check(model, numbers(model), loaded)
    name, excess = worst(gaps)
    if not excess <= 1:
        raise ModelError(
            f"{what}: {name} is not the federated model's: what it makes of the certificate's "
            f"inputs is {excess:.1e} times farther off than rounding explains"
        )
    return excess


def load_exported(config: Config, labels: Sequence[str], directory: Path, merged: bool) -> Any:
    """An export as anyone loads it, with transformers and PEFT alone."""
    from peft import PeftModel

    own = is_code(config.model.path)
    moved = merged and not own
    there = config.model.model_copy(update={"path": str(directory)}) if moved else config.model
    model = load_base(there, labels, config.run.seed)
    agree(model, load_tokenizer(config.model), config.model)
    if isinstance(model, MeanPooled):
        if not merged:
            model.encoder = PeftModel.from_pretrained(model.encoder, str(directory))
        model.load_state_dict(load_file(directory / HEAD), strict=False)
        return model.eval()
    if merged and own:
        load_model(model, directory / WEIGHTS)
    return model.eval() if merged else PeftModel.from_pretrained(model, str(directory)).eval()


def plain(name: str) -> str:
    """A parameter's name as the federated model has it, whatever PEFT put around it."""
    name = name.replace(PREFIX, "").replace(".modules_to_save.default", "")
    return name.replace(".original_module", ".original").removesuffix(".default")


def module_of(loaded: nn.Module, m: str, shape: Shape) -> nn.Module | Expert:
    """The module that the federated model calls m."""
    inner = loaded.encoder if isinstance(loaded, MeanPooled) else loaded
    if isinstance(loaded, MeanPooled):
        m, shape = m.removeprefix(ENCODER), replace(shape, stack=shape.stack.removeprefix(ENCODER))
    for prefix in (PREFIX, ""):
        try:
            found: nn.Module | Expert = layer_at(inner, m, shape, prefix)
        except AttributeError:
            continue
        return found
    raise ModelError(f"the export has no module {m}")


def _weight_size(layer: Any) -> float:
    """|W| of what lies under the adapter; 0 of a quantised one, which takes nothing in."""
    weight = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight
    return 0.0 if is_stored(weight) else float(weight.detach().double().norm())


def _adapter(layer: nn.Module | Expert) -> float:
    """s |B| |A| of a LoRA layer's one adapter; 0 where it has none."""
    if not getattr(layer, "lora_A", None):
        return 0.0
    x: Any = layer
    (name,) = x.lora_A
    if isinstance(layer, Expert):
        A, B = (side.detach() for side in layer.sides(name))
    else:
        A, B = x.lora_A[name].weight.detach(), x.lora_B[name].weight.detach()
    return float(x.scaling[name] * A.double().norm() * B.double().norm())
