"""A pretrained model and its tokenizer from a hub id, a directory, a package or a GGUF file."""

import contextlib
import copy
import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedlora.config.sections import ModelConfig
from fedlora.errors import ModelError
from fedlora.strategies.base import seeded
from fedlora.training.data.locate import locate
from fedlora.training.model.dropout import set_dropout
from fedlora.training.user_code import called, is_code, is_live

log = logging.getLogger(__name__)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token if it has none."""
    if config.tokenizer:
        made = called("model.tokenizer", config.tokenizer, PreTrainedTokenizerBase)
        return _padding(made)
    path, gguf = _source(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=config.revision or None,
            trust_remote_code=config.trust_remote_code,
            **({"gguf_file": gguf} if gguf else {}),
        )
    except (OSError, ValueError) as e:
        raise _not_loaded(config, (), path, e) from e
    return _padding(tokenizer)


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: ModelConfig, labels: Sequence[str], seed: int) -> PreTrainedModel:
    """The pretrained model, its new tensors (a head) drawn from the seed; frozen, in eval mode.

    Raises:
        ModelError: it is not there, or is no model of this task.
    """
    if is_code(config.path):
        return _frozen(_own(config, labels, seed), config)
    path, gguf = _source(config)
    if gguf:
        path = _converted(path, gguf)
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "revision": config.revision or None,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    if config.quantization != "none":
        options["quantization_config"] = _quantization(config.quantization)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, 0, 0, "head").initial_seed())
        try:
            if config.task == "causal-lm":
                model = _whole(AutoModelForCausalLM, path, options)
                _check_complete(model, config)
            elif config.pooling == "mean":
                model = MeanPooled(AutoModel.from_pretrained(path, **options), labels)
            else:
                names = dict(enumerate(labels))
                options |= {"num_labels": len(labels), "id2label": names}
                options["label2id"] = {label: i for i, label in names.items()}
                model = _whole(AutoModelForSequenceClassification, path, options)
                labelled_as(model, lambda: _label_names(path, config), labels)
        except (OSError, ValueError, RuntimeError) as e:
            raise _not_loaded(config, labels, path, e) from e
    return _frozen(model, config)


def _label_names(path: str, config: ModelConfig) -> tuple[str, ...]:
    """What the checkpoint's own config calls the classes of its head, in their order."""
    known = AutoConfig.from_pretrained(
        path, revision=config.revision or None, trust_remote_code=config.trust_remote_code
    )
    return tuple(str(name) for _, name in sorted(known.id2label.items()))


def labelled_as(model: Any, names: Callable[[], Sequence[str]], labels: Sequence[str]) -> None:
    """Put the rows of a checkpoint's head in the order of the data's labels.

    A head that was drawn anew has no order, and `names` of the checkpoint's classes are not asked
    for. They are compared without case. Where they are not the data's, the head begins as it is,
    and the log says so.
    """
    head = _output_of(model, len(labels))
    if head is None or any(key.startswith(f"{head[0]}.") for key in model.newly_drawn):
        return
    before = names()
    was, now = ([name.casefold() for name in x] for x in (before, labels))
    if was == now:
        return
    if sorted(was) != sorted(now):
        text = "the checkpoint's head was trained for %s and begins as that of %s, in this order"
        log.warning(text, ", ".join(before), ", ".join(labels))
        return
    order = [was.index(name) for name in now]
    with torch.no_grad():
        for x in head[1].parameters():
            x.copy_(x[order])


def _output_of(model: nn.Module, classes: int) -> tuple[str, nn.Linear] | None:
    """The last linear module that gives so many numbers, and its name."""
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return next(((n, m) for n, m in linear[::-1] if m.out_features == classes), None)


def _not_loaded(
    config: ModelConfig, labels: Sequence[str], path: str, error: Exception
) -> ModelError:
    """The error of a model that does not load, with what it is instead where that can be told."""
    why = f"model.path = {config.path!r} does not load: {error}"
    if Path(path, "adapter_config.json").is_file() and not Path(path, "config.json").is_file():
        why = (
            f"model.path = {config.path!r} is an adapter, not a model; name the base that it was "
            "trained on, or merge it into that first (fedlora export --as merged)"
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


def _whole(cls: Any, path: str, options: Mapping[str, Any]) -> Any:
    """The model, which remembers the names of the tensors that its checkpoint lacks."""
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    model.newly_drawn = tuple(sorted(info["missing_keys"]))
    return model


def _check_complete(model: Any, config: ModelConfig) -> None:
    """Raises ModelError where a language model has tensors that nobody has trained."""
    if missing := model.newly_drawn:
        raise ModelError(
            f"model.path = {config.path!r} lacks {missing[0]} and {len(missing) - 1} more tensors "
            f"of a {type(model).__name__}: it is no causal language model; choose one that is, or "
            "model.task = 'classification'"
        )


def agree(base: Any, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Make the model's padding token the tokenizer's, which fills the batches up.

    A decoder's classifier looks for the last token that is none: with another, a row's logits
    depend on what else is in its batch.

    Raises:
        ModelError: the tokenizer knows tokens that the model has no embedding for, or leaves out
            the end mark that an encoder-decoder's classifier looks for.
    """
    known = getattr(base, "config", None)
    if known is not None and tokenizer.pad_token_id is not None:
        known.pad_token_id = tokenizer.pad_token_id
    looks = getattr(known, "is_encoder_decoder", False) and config.task == "classification"
    if looks and tokenizer("a")["input_ids"][-1:] != [getattr(known, "eos_token_id", None)]:
        raise ModelError(
            f"model.path = {config.path!r} reads its classes off the end mark, and its tokenizer "
            "puts none after a text; use the tokenizer that the model was trained with"
        )
    rows = vocabulary(base, tokenizer)
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.path = {config.path!r}: its tokenizer has {len(tokenizer)} tokens, and the "
            f"model embeddings for {rows}; use the tokenizer that the model was trained with"
        )


def _own(config: ModelConfig, labels: Sequence[str], seed: int) -> Any:
    """The model that the user's function makes of the label names; of a live one a copy.

    It is called as the numbers of a head are drawn: what it draws from torch is the run's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, 0, 0, "head").initial_seed())
        made = called("model.path", config.path, nn.Module, tuple(labels))
    made = copy.deepcopy(made) if is_live(config.path) else made
    if not hasattr(made, "is_gradient_checkpointing"):
        made.is_gradient_checkpointing = False  # else PEFT takes it for one: see MeanPooled
    return made


def _frozen(model: Any, config: ModelConfig) -> Any:
    if config.dropout >= 0:
        set_dropout(model, config.dropout)
    model.requires_grad_(False)
    model.eval()
    return model


class MeanPooled(nn.Module):
    """An encoder, the mean of its last hidden states over the real tokens, and a linear head.

    The head starts at zero, so that no client's noise comes from its initialisation.
    """

    is_gradient_checkpointing = False
    """PEFT takes a model that does not say for one that checkpoints, and makes its embeddings ask
    for a gradient: every frozen layer below the first adapter would pay for a backward pass."""

    def __init__(self, encoder: PreTrainedModel, labels: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.classifier = nn.Linear(encoder.config.hidden_size, len(labels), dtype=encoder.dtype)
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
        self.is_gradient_checkpointing = True

    def enable_input_require_grads(self) -> None:
        self.encoder.enable_input_require_grads()


def vocabulary(base: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids a model knows: its embedding's rows; of one without, the tokenizer's."""
    if hasattr(base, "get_input_embeddings"):
        return int(base.get_input_embeddings().weight.shape[0])
    return len(tokenizer)


def positions(base: nn.Module) -> int | None:
    """The most tokens that a model has learned positions for; None where they are computed."""
    found = [
        m.num_embeddings
        - getattr(m, "offset", 0)
        - (0 if m.padding_idx is None else m.padding_idx + 1)
        for name, m in base.named_modules()
        if isinstance(m, nn.Embedding) and re.search(r"(position\w*|wpe)$", name)
    ]
    return min(found, default=None)


def padding(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that fills a batch up, by the model's config or else the tokenizer's."""
    found = getattr(getattr(base, "config", None), "pad_token_id", None)
    return int((tokenizer.pad_token_id if found is None else found) or 0)


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


def fingerprint(tensors: Mapping[str, Tensor], before: str = "") -> str:
    """A digest over samples of every tensor: differs when any tensor was made differently."""
    digest = hashlib.sha256(before.encode())
    for name, p in tensors.items():
        flat = p.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step].float().contiguous()
        digest.update(name.encode() + repr(tuple(p.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def frozen_tensors(m: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
    """What a PEFT layer drew and keeps: projections, masks, locations, by name.

    Without what follows from W0 alone, which has its own digest.
    """
    for name, value in [*vars(layer).items(), *layer.named_children()]:
        if name not in ("base_layer", "delora_w_norm") and isinstance(value, Mapping | BufferDict):
            found = value.items()
            yield from ((f"{m}.{name}", x) for _, x in found if type(x) is Tensor and x.ndim)


def _source(config: ModelConfig) -> tuple[str, str]:
    """Directory or hub id, and the GGUF file in it if the path names one."""
    path = locate(config.path)
    if path.endswith(".gguf"):
        return os.path.dirname(path), os.path.basename(path)
    return path, ""


def converted_to(source: Path) -> Path:
    """Where a GGUF file's conversion is cached: two files of one name and size are two models."""
    found = source.stat()
    which = f"{source.resolve()}/{found.st_size}/{found.st_mtime_ns}"
    key = hashlib.sha256(which.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedlora"
    return cache / f"{source.stem}-{key}"


def _converted(directory: str, gguf: str) -> str:
    """A directory with the GGUF's model in safetensors, made once and cached.

    A model that transformers loads from GGUF cannot be saved as it is, so its weights go into a
    clean model of the same configuration.
    """
    target = converted_to(Path(directory, gguf))
    cache = target.parent
    if target.exists():
        return str(target)
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar, of a few seconds, once
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=gguf, dtype=torch.float32
        )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(key, None)
    clean_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    clean = AutoModelForCausalLM.from_config(clean_config)
    clean.load_state_dict(loaded.state_dict(), strict=True)
    clean.tie_weights()
    with tempfile.TemporaryDirectory(dir=cache) as made:
        clean.save_pretrained(made)
        with contextlib.suppress(OSError):  # another process was first: its copy is the same
            shutil.copytree(made, target.with_suffix(".tmp"), dirs_exist_ok=True)
            os.replace(target.with_suffix(".tmp"), target)
    return str(target)


def _quantization(kind: str) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            f"model.quantization = '{kind}' needs bitsandbytes: pip install bitsandbytes"
        ) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")


def checkpoint_activations(model: Any, kwargs: Any = None) -> None:
    """Compute activations again in the backward pass; the method's name depends on the release."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(kwargs or {"use_reentrant": True})
