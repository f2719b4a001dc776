"""A pretrained model and its tokenizer from a hub id, a directory, a package or a GGUF file."""

import copy
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedlora.config.sections import ModelConfig
from fedlora.errors import FedLoraError, ModelError
from fedlora.strategies.base import seeded
from fedlora.training.data.locate import locate
from fedlora.training.devices import HOST, is_host, on_host
from fedlora.training.draws import host_draws
from fedlora.training.model.agreement import check_complete, labelled_as
from fedlora.training.model.dropout import set_dropout
from fedlora.training.model.gguf import converted
from fedlora.training.model.processor import load_processor, prepare
from fedlora.training.model.quantized import asked_for, keep_as_loaded, plain
from fedlora.training.model.raised import in_short
from fedlora.training.model.spread import connect, device_map
from fedlora.training.tasks import TASKS, task_of
from fedlora.training.user_code import called, is_code, is_live

PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""

ENCODER = "encoder."
"""Where a mean-pooled model keeps its encoder, which is what an export of it adapts."""

HEAD = "classifier.safetensors"
"""Of a mean-pooled model's linear head, beside its adapter: no library has a class for it."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""The form of one."""

WITHOUT_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Of Liger's kernels: an example's own loss is `train.example_losses`."""


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, with a pad token if it has none; of pictures its image processor."""
    if config.tokenizer:
        made = called("model.tokenizer", config.tokenizer, PreTrainedTokenizerBase)
        return _padding(made)
    path, gguf = _source(config)
    try:
        if task_of(config.task).pictured:
            return load_processor(path, config)
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=config.revision or None,
            trust_remote_code=config.trust_remote_code,
            **({"gguf_file": gguf} if gguf else {}),
        )
    except FedLoraError:
        raise
    except Exception as e:
        raise _not_loaded(config, (), path, e) from e
    return _padding(tokenizer)


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With a token to pad with, and cutting long texts at their end, whatever its file says."""
    tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    config: ModelConfig, labels: Sequence[str], seed: int, devices: Sequence[torch.device] = (HOST,)
) -> PreTrainedModel:
    """The pretrained model, its new tensors (a head) drawn from the seed; frozen, in eval mode.

    Its tensors go from the file to the devices one by one, never as a whole through the host; of
    several devices all but its layers to the first.

    Raises:
        ModelError: it is not there, or is no model of this task.
    """
    device, task = devices[0], task_of(config.task)
    if is_code(config.path):
        return _frozen(_own(config, labels, seed).to(device), config)
    path, gguf = _source(config)
    if gguf:
        path = converted(path, gguf)
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "revision": config.revision or None,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    if config.quantization != "none":
        options["quantization_config"] = asked_for(config.quantization)
    if not is_host(device):
        options["device_map"] = {"": device}
    _check_kind(config, path)
    with host_draws(device, seeded(seed, 0, 0, "head").initial_seed()):
        try:
            if not _averaged(config):
                options |= task.options(labels)
            model = _whole(_auto(config), path, options, devices)
        except FedLoraError:
            raise
        except Exception as e:
            raise _not_loaded(config, labels, path, e) from e
        check_complete(model, config)
        if task.pictured:
            prepare(model, config)
        if config.liger:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(model, WITHOUT_LOSS)
        if _averaged(config):
            model = MeanPooled(model, task.options(labels)["num_labels"])
            model.classifier.to(device)
        elif task.headed and labels:
            labelled_as(model, lambda: _label_names(path, config), labels)
    return _frozen(model, config)


def _averaged(config: ModelConfig) -> bool:
    """Is the head one of ours, on the mean over a text's tokens?"""
    return config.pooling == "mean" and task_of(config.task).pooled


def _auto(config: ModelConfig) -> Any:
    """transformers' class that loads the model."""
    return getattr(transformers, "AutoModel" if _averaged(config) else task_of(config.task).auto)


def _label_names(path: str, config: ModelConfig) -> tuple[str, ...]:
    """What the checkpoint's own config calls the classes of its head, in their order."""
    known = AutoConfig.from_pretrained(
        path, revision=config.revision or None, trust_remote_code=config.trust_remote_code
    )
    return tuple(str(name) for _, name in sorted(known.id2label.items()))


def _not_loaded(
    config: ModelConfig, labels: Sequence[str], path: str, error: Exception
) -> ModelError:
    """The error of a model that does not load, with what it is instead where that can be told."""
    here = "" if os.path.isdir(path) else "there is no such directory; from the hub "
    said = _nothing_at(config, path) or f"{here}{in_short(error)}"
    why = f"model.path = {config.path!r} does not load: {said}"
    if _has(path, "adapter_config.json") and not _has(path, "config.json"):
        why = (
            f"model.path = {config.path!r} is an adapter, not a model; name the base that it was "
            "trained on, or merge it into that first (fedlora export --as merged)"
        )
    elif known := _lacking(config, path):
        what, others = task_of(config.task).what, " or ".join(map(repr, _tasks_of(known)))
        why = (
            f"model.path = {config.path!r} is a {known.model_type}, of which transformers has no "
            f"{what}; name another model{f', or set model.task = {others}' if others else ''}"
        )
    elif isinstance(error, RuntimeError) and labels:
        known = _label_names(path, config)
        if len(known) != len(labels):
            why = (
                f"model.path = {config.path!r} is a classifier of {len(known)} labels, the data "
                f"has {len(labels)} ({', '.join(labels[:8])}); bring them together with data.map, "
                "or name the base that it was trained from"
            )
    return ModelError(why)


def _check_kind(config: ModelConfig, path: str) -> None:
    """Raises ModelError where the decoder of an encoder-decoder would be taken for a model."""
    try:
        known = AutoConfig.from_pretrained(path, revision=config.revision or None)
    except Exception:  # what it was is said where the model itself does not load
        return
    if known.is_encoder_decoder and task_of(config.task).shifted:
        raise ModelError(
            f"model.path = {config.path!r} is an encoder-decoder ({known.model_type}), and "
            f"model.task = {config.task!r} is of decoders alone; set model.task = 'seq2seq'"
        )


def _has(directory: str, name: str) -> bool:
    return os.path.isfile(os.path.join(directory, name))


def _nothing_at(config: ModelConfig, path: str) -> str:
    """Why no model can be where the config says, where that is no hub id; "" where one could be."""
    gguf = config.path.endswith(".gguf")
    if os.path.isfile(path):
        return "it is a file; name the directory of a model, which has a config.json"
    if os.path.isdir(path):
        if gguf or _has(path, "config.json"):
            return ""
        held = ", ".join(sorted(os.listdir(path))[:4]) or "nothing"
        return f"a model's directory has a config.json, and this one holds {held}"
    if HUB_ID.fullmatch(path):
        return ""
    what = "file" if gguf else "directory"
    return (
        f'no such {what}, from {os.getcwd()}; give a directory, a hub id as in "owner/name", or '
        '"pkg:package/path"'
    )


def _lacking(config: ModelConfig, path: str) -> Any:
    """The config of a model that transformers knows, and has no class of for this task; or None."""
    try:
        known = AutoConfig.from_pretrained(path, revision=config.revision or None)
    except Exception:  # what it was is the error at hand, or code of its own
        return None
    return None if type(known) in _auto(config)._model_mapping else known


def _tasks_of(known: Any) -> list[str]:
    """The tasks that transformers has a class of this model for."""
    autos = {name: getattr(transformers, task.auto) for name, task in TASKS.items()}
    return [name for name, auto in autos.items() if type(known) in auto._model_mapping]


def _whole(cls: Any, path: str, options: Mapping[str, Any], devices: Sequence[torch.device]) -> Any:
    """The model, which remembers the names of the tensors that its checkpoint lacks."""
    if len(devices) > 1:
        how = {key: options[key] for key in ("revision", "trust_remote_code")}
        with torch.device("meta"):
            empty = cls.from_config(AutoConfig.from_pretrained(path, **how))
        options = {**options, "device_map": device_map(empty, devices)}
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    model.newly_drawn = tuple(sorted(info["missing_keys"]))
    if len(devices) > 1:
        connect(model, devices)
    return model


def _own(config: ModelConfig, labels: Sequence[str], seed: int) -> Any:
    """The model that the user's function makes of the label names; of a live one a copy.

    It is called as the numbers of a head are drawn: what it draws from torch is the run's.
    """
    with host_draws(HOST, seeded(seed, 0, 0, "head").initial_seed()):
        made = called("model.path", config.path, nn.Module, tuple(labels))
    made = copy.deepcopy(made) if is_live(config.path) else made
    if not hasattr(made, "is_gradient_checkpointing"):
        made.is_gradient_checkpointing = False  # else PEFT takes it for one: see MeanPooled
    return made


def _frozen(model: Any, config: ModelConfig) -> Any:
    if config.dropout >= 0:
        set_dropout(model, config.dropout)
    keep_as_loaded(model)
    model.requires_grad_(False)
    model.eval()
    return model


STORED_HOW = ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer")
"""What PEFT asks a model for, to wrap weights of few bits with the classes that know them."""


class MeanPooled(nn.Module):
    """An encoder, the mean of its last hidden states over the real tokens, and a linear head.

    The head starts at zero, so that no client's noise comes from its initialisation.
    """

    is_gradient_checkpointing = False
    """PEFT takes a model that does not say for one that checkpoints, and makes its embeddings ask
    for a gradient: every frozen layer below the first adapter would pay for a backward pass."""

    def __init__(self, encoder: PreTrainedModel, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        for name in STORED_HOW:
            if hasattr(encoder, name):
                setattr(self, name, getattr(encoder, name))
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs, dtype=encoder.dtype)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Tensor:
        rest.pop("labels", None)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **rest)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        mean: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.classifier(self.pooled(input_ids, attention_mask, **rest))
        return SequenceClassifierOutput(logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.encoder.get_input_embeddings()
        return embeddings

    def activation_checkpointing_enable(self, kwargs: Any = None) -> None:
        checkpoint_activations(self.encoder, kwargs)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: itself, or what it calls so.

    Raises:
        ModelError: it has none.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model's forward gives a {type(output).__name__} without logits; it must give a "
            "tensor, or an output with `logits`: (batch, classes), or (batch, tokens, vocabulary)"
        )
    return found


def fingerprint(tensors: Mapping[str, Tensor], before: str = "", whole: bool = False) -> str:
    """A digest over samples of every tensor: differs when any tensor was made differently.

    whole: over every number, where they were computed and not read from one file.
    """
    digest = hashlib.sha256(before.encode())
    for name, p in tensors.items():
        flat = plain(p).reshape(-1)
        step = 1 if whole else max(1, flat.numel() // 64)
        sample = on_host(flat[::step]).float().contiguous()
        digest.update(name.encode() + repr(tuple(p.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def frozen_tensors(m: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
    """What a PEFT layer drew and keeps: projections, masks, locations, by name.

    Without what follows from W0 alone, which has its own digest.
    """
    for name, value in [*vars(layer).items(), *layer.named_children()]:
        if name not in ("base_layer", "delora_w_norm") and isinstance(value, Mapping | BufferDict):
            found = [(key, x) for key, x in value.items() if type(x) is Tensor and x.ndim]
            several = len(found) > 1  # else the key is the adapter's name
            yield from ((f"{m}.{name}.{key}" if several else f"{m}.{name}", x) for key, x in found)


def _source(config: ModelConfig) -> tuple[str, str]:
    """Directory or hub id, and the GGUF file in it if the path names one."""
    path = locate(config.path)
    if path.endswith(".gguf"):
        return os.path.dirname(path), os.path.basename(path)
    return path, ""


def checkpoint_activations(model: Any, kwargs: Any = None) -> None:
    """Compute activations again in the backward pass, by torch's non-reentrant way."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name in transformers 5
    (enable or model.gradient_checkpointing_enable)(kwargs or {"use_reentrant": False})
    without_input_gradients(model)


def without_input_gradients(model: nn.Module) -> None:
    """Let embeddings ask for no gradient, as transformers and PEFT have them do for checkpoints.

    Only the reentrant way needs it, and every frozen layer below the first adapter pays for it with
    a backward pass.
    """
    for module in model.modules():
        if (disable := getattr(module, "disable_input_require_grads", None)) is not None:
            disable()
