"""Writes a model as whole weights, which transformers loads without PEFT and without fedlora."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from fedlora.errors import ModelError
from fedlora.lora.adapter import Adapter
from fedlora.strategies.base import Effective
from fedlora.training.data.seam import end_mark
from fedlora.training.export_certificate import load_exported
from fedlora.training.model.agreement import agree
from fedlora.training.model.expert import layer_at
from fedlora.training.model.loading import MeanPooled, load_base
from fedlora.training.model.model import Model
from fedlora.training.model.peft_directory import WEIGHTS, save_head, save_peft
from fedlora.training.model.ties import say_apart, untie
from fedlora.training.user_code import is_code


def merged_problem(model: Model) -> str:
    """Why this model cannot be written as whole weights; empty where it can."""
    quantization, form = model.config.model.quantization, model.config.lora.form
    if quantization != "none":
        return (
            f"model.quantization = {quantization!r}: quantised weights cannot take the change; "
            "export it as peft, which keeps it beside them"
        )
    if model.form.after:
        return (
            f"lora.form = {form!r}: weights act on every token, and this change from its "
            "invocation on only; export it as peft"
        )
    return ""


def save_merged(
    model: Model, effective: Effective, adapter: Adapter | None, directory: Path
) -> float:
    """Write the base with the adapter (None: the form's own change) merged in, and its tokenizer.

    Returns the relative Frobenius error of rounding the change into the weights' dtype. What was
    tied and now differs is untied, in the config too. Dropout stays what the model's own is.

    Raises:
        ModelError: the weights cannot take the change.
    """
    if problem := merged_problem(model):
        raise ModelError(problem)
    if adapter is None:
        _save_whole(model, _merged_by_peft(model, effective), effective, directory)
        return 0.0
    own = model.config.model.model_copy(update={"dropout": -1.0})
    base = load_base(own, model.labels, model.config.run.seed)
    agree(base, model.tokenizer, model.config.model)
    untie(base, model.heads)
    lost = size = 0.0
    with torch.no_grad():
        shapes = {**model.start.shapes, **model.shapes}
        for m, pair in adapter.items():
            weight = layer_at(base, m, shapes[m]).weight
            change = pair.delta().T if shapes[m].fan_in_fan_out else pair.delta()
            want = weight.double() + change
            weight.copy_(weight.float() + change)
            lost += float((weight.double() - want).square().sum())
            size += float(change.double().square().sum())
        named = dict(base.named_parameters())
        for name, x in effective.factors.other.items():
            named[name].copy_(x)
    _save_whole(model, base, effective, directory)
    return (lost / size) ** 0.5 if size else 0.0


def _merged_by_peft(model: Model, effective: Effective) -> Any:
    """The base with a form's change merged in by PEFT's own code, which alone knows it."""
    own = model.config.model.model_copy(update={"dropout": -1.0})
    config = model.config.model_copy(update={"model": own})
    with tempfile.TemporaryDirectory() as made:
        save_peft(model, effective, Path(made))
        found = load_exported(config, model.labels, Path(made), merged=False)
    if isinstance(found, MeanPooled):
        found.encoder = found.encoder.merge_and_unload()
        return found
    whole = found.merge_and_unload()
    say_apart(whole)
    return whole


def _save_whole(model: Model, base: Any, effective: Effective, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(base, MeanPooled):
        save_head(effective, directory)
        base = base.encoder
    if is_code(model.config.model.path) and not hasattr(base, "save_pretrained"):
        save_model(base, str(directory / WEIGHTS))
    else:
        if model.task.generates:
            stop_where_trained(base, model)
        base.save_pretrained(str(directory))
    model.tokenizer.save_pretrained(str(directory))


def stop_where_trained(base: Any, model: Model) -> None:
    """Make the model's generation settings stop at the end mark that was trained, and nowhere else.

    A shortest length, a forced last token or another end mark of the base's would overrule it.
    """
    end = end_mark(model.tokenizer, model.config.data.chats)
    if end is None or getattr(base, "generation_config", None) is None:
        return
    settings = base.generation_config = copy.deepcopy(base.generation_config)
    settings.eos_token_id, settings.pad_token_id = end, model.tokenizer.pad_token_id
    for name in ("min_length", "min_new_tokens", "forced_eos_token_id", "suppress_tokens"):
        if getattr(settings, name, None):
            setattr(settings, name, None)
    base.config.eos_token_id = end
