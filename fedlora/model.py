"""The model in memory: one frozen base, PEFT adapters swapped in place, base changes folded in.

    model = Model(config, labels)
    model.rebase(token, versions)        # W = W0 + the changes so far
    with model.folded(fold):             # this client's own change, for this round only
        model.load(factors)              # A, B, (R), head at this client's ranks
        ...  train model.trainable({"A", "B", "other"})  ...
        trained = model.read()

All the clients of a process share the base; what differs between them is `Factors`.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.other import ModulesToSaveWrapper
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

from fedlora.adapter import Adapter, Factors
from fedlora.config import Config
from fedlora.config import Model as ModelConfig
from fedlora.errors import ModelError
from fedlora.lowrank import accumulate
from fedlora.sources import locate
from fedlora.strategies.base import Client, Layer, Version, seeded

PREFIX = "base_model.model."
KEPT_PROFILES = 8
"""Rank profiles whose PEFT adapters stay attached; the least recently used one goes first."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An adaptable linear module: k inputs, d outputs; transposed weight in GPT-2's Conv1D."""

    d: int
    k: int
    fan_in_fan_out: bool


class Core(LoraVariant):  # type: ignore[misc]
    """x -> W0 x + s B R (A x): PEFT's extension point, with the r x r core between the factors."""

    def __init__(self, R: nn.Parameter) -> None:
        self.R = R

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        inner = A(module.lora_dropout[active_adapter](x)) @ self.R.T  # (..., r)
        out: Tensor = result + B(inner) * module.scaling[active_adapter]
        return out


class Model:
    """A base with its adapters. Nothing here is random but what `init_factors` draws."""

    def __init__(self, config: Config, labels: Sequence[str] = ()) -> None:
        self.config = config
        self.labels = tuple(labels)
        self.tokenizer = load_tokenizer(config.model)
        base = load_base(config.model, self.labels, config.run.seed)
        if getattr(base.config, "pad_token_id", None) is None:
            base.config.pad_token_id = self.tokenizer.pad_token_id
        if config.train.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": True})
            base.enable_input_require_grads()
        self.shapes = find_layers(base, config)
        self._fingerprint = fingerprint(base)
        self._profiles: dict[tuple[tuple[str, int], ...], str] = {}
        self._born = 0
        self.peft: PeftModel = self._attach(base, dict.fromkeys(self.shapes, 1))
        self._modules: dict[str, LoraLayer] = {
            name.removeprefix(PREFIX): m
            for name, m in self.peft.named_modules()
            if isinstance(m, LoraLayer)
        }
        self._cores: dict[str, nn.Parameter] = {}
        self._origin: dict[str, Tensor] = {}  # W0 of the modules whose base has moved
        self._shift: dict[str, Tensor] = {}  # what they moved by
        self._base: tuple[str, int] = ("", 0)
        self._scale: Mapping[str, float] = {}

    # -- what a client can train ------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """A digest of the untouched base: equal on server and clients, or nothing adds up."""
        return self._fingerprint

    def layers(self, ranks: Mapping[str, int]) -> dict[str, Layer]:
        """The client's layers at these ranks, each with alpha's scale."""
        lora = self.config.lora
        return {
            m: Layer(s.d, s.k, ranks[m], lora.alpha / (ranks[m] ** (0.5 if lora.use_rslora else 1)))
            for m, s in self.shapes.items()
            if m in ranks
        }

    def weights(self) -> dict[str, Tensor]:
        """W0 of every adaptable module, (d, k), without copying where it lies that way."""
        found = {}
        for m, layer in self._modules.items():
            W = self._origin.get(m, layer.get_base_layer().weight)
            found[m] = W.detach().T if self.shapes[m].fan_in_fan_out else W.detach()
        return found

    def init_factors(self, client: Client, seed: int) -> Factors:
        """PEFT's own initialisation at the client's ranks, seeded; B is zero, the head as loaded.

        The same (seed, ranks) gives the same factors, whatever was loaded before.
        """
        ranks = {m: layer.rank for m, layer in client.layers.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(seed, 0, 0, "init").initial_seed())
            self._forget(ranks)
            self.select(ranks)
            self._scale = {m: layer.scale for m, layer in client.layers.items()}
            return self.read()

    # -- loading and reading ----------------------------------------------------------------

    def select(self, ranks: Mapping[str, int]) -> None:
        """Make the adapter of these ranks the active one, attaching it if it is not there."""
        key = tuple(sorted(ranks.items()))
        if key not in self._profiles:
            self._attach(self.peft, ranks)
        name = self._profiles.pop(key)
        self._profiles[key] = name  # most recently used last
        self.peft.set_adapter(name)
        self.active = name
        while len(self._profiles) > KEPT_PROFILES:
            self._drop(next(iter(self._profiles)))

    def load(self, factors: Factors) -> None:
        """Take these factors as the model's adapter and head, at their own ranks and scales.

        Without factors (a model that is all in its base) the adapter is one that adds nothing.
        """
        self.select({m: A.shape[0] for m, A in factors.A.items()} or dict.fromkeys(self.shapes, 1))
        self._scale = factors.scale
        self._cores = {}
        with torch.no_grad():
            for m, A in factors.A.items():
                layer = self._modules[m]
                layer.lora_A[self.active].weight.copy_(A)
                layer.lora_B[self.active].weight.copy_(factors.B[m])
                layer.scaling[self.active] = factors.scale[m]
                layer.lora_variant.pop(self.active, None)
                if m in factors.R:
                    self._cores[m] = nn.Parameter(factors.R[m].detach().clone())
                    layer.lora_variant[self.active] = Core(self._cores[m])
            if not factors.A:
                for _, layer in self._on():
                    layer.lora_B[self.active].weight.zero_()
            mine = self._other()
            for name, tensor in factors.other.items():
                if name not in mine:
                    raise ModelError(f"{name}: this model trains no such tensor; it has {[*mine]}")
                mine[name].copy_(tensor)

    def read(self) -> Factors:
        """A copy of the active adapter, core and head."""
        on = {m: layer for m, layer in self._modules.items() if self.active in layer.lora_A}
        return Factors(
            {m: self._scale[m] for m in on},
            {m: x.lora_A[self.active].weight.detach().clone() for m, x in on.items()},
            {m: x.lora_B[self.active].weight.detach().clone() for m, x in on.items()},
            {m: R.detach().clone() for m, R in self._cores.items()},
            {name: p.detach().clone() for name, p in self._other().items()},
        )

    def trainable(self, columns: frozenset[str]) -> dict[str, dict[str, nn.Parameter]]:
        """The live parameters of these columns, which alone get gradients, by column and name."""
        live: dict[str, dict[str, nn.Parameter]] = {
            "A": {m: x.lora_A[self.active].weight for m, x in self._on()},
            "B": {m: x.lora_B[self.active].weight for m, x in self._on()},
            "R": dict(self._cores),
            "other": self._other(),
        }
        for p in self.peft.parameters():
            p.requires_grad_(False)
        for column, params in live.items():
            for p in params.values():
                p.requires_grad_(column in columns)
        return {c: params for c, params in live.items() if c in columns and params}

    # -- the base ---------------------------------------------------------------------------

    def rebase(self, token: str, versions: Sequence[Version]) -> None:
        """Set every base weight to W0 plus these changes, in order.

        `token` names the run. Continues from the changes folded already where it can; the bits
        are the same as from the start, because the sum of the changes is kept, not the weight.
        """
        target = versions[-1].number if versions else 0
        run, number = self._base
        rest = [v for v in versions if v.number > number]
        follows = run == token and target >= number and not any(v.snapshot for v in rest)
        if not follows or len(rest) != target - number:
            self._reset()
            rest = list(versions)
        for version in rest:
            for m, delta in version.delta.items():
                before = None if version.snapshot else self._shift.get(m)
                self._shift[m] = accumulate(before, delta)
        for m in {m for v in rest for m in v.delta}:
            self._set_weight(m, self._shift[m])
        self._base = (token, target)

    @contextlib.contextmanager
    def folded(self, fold: Adapter) -> Iterator[None]:
        """Within it, these pairs are part of the base; after it, the base has its old bits."""
        for m, pair in fold.items():
            self._set_weight(m, accumulate(self._shift.get(m), pair))
        try:
            yield
        finally:
            for m in fold:
                self._set_weight(m, self._shift.get(m))

    @contextlib.contextmanager
    def base_gradients(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Within it, adapters are off and base weights gather gradients, given back as (d, k)."""
        weights = {m: x.get_base_layer().weight for m, x in self._modules.items()}

        def gathered() -> dict[str, Tensor]:
            turned = {m: self.shapes[m].fan_in_fan_out for m in weights}
            return {m: W.grad.T if turned[m] else W.grad for m, W in weights.items()}

        try:
            with self.peft.disable_adapter():
                for W in weights.values():
                    W.requires_grad_(True)
                yield gathered
        finally:
            for W in weights.values():
                W.requires_grad_(False)
                W.grad = None

    def probe(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each adapted module of x now makes of its columns x[m] (k, n): (d, n)."""
        self.peft.eval()
        with torch.no_grad():
            return {m: self._modules[m](x[m].T.float()).T.double() for m in x}

    # -- inside -----------------------------------------------------------------------------

    def _on(self) -> Iterator[tuple[str, LoraLayer]]:
        return ((m, x) for m, x in self._modules.items() if self.active in x.lora_A)

    def _other(self) -> dict[str, nn.Parameter]:
        """Trained tensors that are no LoRA factor: heads, magnitudes, by their plain names."""
        found: dict[str, nn.Parameter] = {}
        for name, module in self.peft.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and self.active in module.modules_to_save:
                for tail, p in module.modules_to_save[self.active].named_parameters():
                    found[f"{name.removeprefix(PREFIX)}.{tail}"] = p
        for m, layer in self._on():
            if self.active in (magnitudes := getattr(layer, "lora_magnitude_vector", {})):
                found[f"{m}.lora_magnitude_vector"] = magnitudes[self.active].weight
        return found

    def _attach(self, base: nn.Module, ranks: Mapping[str, int]) -> PeftModel:
        name = f"p{self._born}"
        self._born += 1
        peft_config = adapter_config(self.config, self.shapes, ranks)
        if isinstance(base, PeftModel):
            base.add_adapter(name, peft_config)
            model = base
        else:
            model = get_peft_model(base, peft_config, adapter_name=name)
        self._profiles[tuple(sorted(ranks.items()))] = name
        self.active = name
        return model

    def _forget(self, ranks: Mapping[str, int]) -> None:
        key = tuple(sorted(ranks.items()))
        if key in self._profiles and len(self._profiles) > 1:
            self._drop(key)

    def _drop(self, key: tuple[tuple[str, int], ...]) -> None:
        name = self._profiles.pop(key)
        if name == self.active:  # PEFT warns where the active adapter goes
            self.active = next(iter(self._profiles.values()))
            self.peft.set_adapter(self.active)
        self.peft.delete_adapter(name)

    def _set_weight(self, m: str, shift: Tensor | None) -> None:
        weight = self._modules[m].get_base_layer().weight
        if not weight.is_floating_point():
            raise ModelError(
                f"{m}: its weight is quantised ({weight.dtype}) and cannot take a base change; "
                "set model.merge = 'keep-as-adapter', or use a strategy whose base does not move"
            )
        with torch.no_grad():
            if m not in self._origin:
                self._origin[m] = weight.detach().clone()
            W0 = self._origin[m]
            if shift is None:
                weight.copy_(W0)
            else:
                turned = shift.T if self.shapes[m].fan_in_fan_out else shift
                weight.copy_(W0.float() + turned if W0.dtype != turned.dtype else W0 + turned)

    def _reset(self) -> None:
        for m in self._shift:
            self._set_weight(m, None)
        self._shift = {}


# -- building it ------------------------------------------------------------------------------


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token if it has none."""
    path, gguf = _source(config)
    tokenizer = AutoTokenizer.from_pretrained(
        path,
        revision=config.revision or None,
        trust_remote_code=config.trust_remote_code,
        **({"gguf_file": gguf} if gguf else {}),
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: ModelConfig, labels: Sequence[str], seed: int) -> PreTrainedModel:
    """The pretrained model, its new tensors (a head) drawn from the seed; frozen, in eval mode.

    Raises:
        ModelError: it is not there, or is no model of this task.
    """
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
                model = AutoModelForCausalLM.from_pretrained(path, **options)
            elif config.pooling == "mean":
                model = MeanPooled(AutoModel.from_pretrained(path, **options), labels)
            else:
                names = dict(enumerate(labels))
                options |= {"num_labels": len(labels), "id2label": names}
                options["label2id"] = {label: i for i, label in names.items()}
                model = AutoModelForSequenceClassification.from_pretrained(path, **options)
        except (OSError, ValueError) as e:
            raise ModelError(f"model.path = {config.path!r} does not load: {e}") from e
    model.requires_grad_(False)
    model.eval()
    return model


class MeanPooled(nn.Module):
    """An encoder, the mean of its last hidden states over the real tokens, and a linear head.

    The head starts at zero, so that no client's noise comes from its initialisation.
    """

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

    def gradient_checkpointing_enable(self, kwargs: Any = None) -> None:
        self.encoder.gradient_checkpointing_enable(kwargs)

    def enable_input_require_grads(self) -> None:
        self.encoder.enable_input_require_grads()


def find_layers(base: nn.Module, config: Config) -> dict[str, Shape]:
    """The modules that lora.target-modules and lora.layers name, with their sizes.

    Raises:
        ModelError: a target matches nothing (the names that would are listed), or a layer index.
    """
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, Shape] = {}
    for name, m in base.named_modules():
        if isinstance(m, Conv1D):
            k, d = m.weight.shape
            linear[name] = Shape(d, k, True)
        elif isinstance(m, nn.Linear):
            linear[name] = Shape(m.out_features, m.in_features, False)
    heads = set(head_names(base, config))
    linear = {n: s for n, s in linear.items() if not any(_within(n, h) for h in heads)}
    targets = config.lora.target_modules
    if targets == ("all-linear",):
        output = getattr(base, "get_output_embeddings", lambda: None)()
        found = {n: s for n, s in linear.items() if base.get_submodule(n) is not output}
    else:
        found = {n: s for n, s in linear.items() if any(_within(n, t) for t in targets)}
        missing = [t for t in targets if not any(_within(n, t) for n in linear)]
        if missing:
            have = sorted({n.split(".")[-1] for n in linear})
            raise ModelError(
                f"lora.target-modules: {', '.join(missing)} matches no linear module of this "
                f"model; it has {', '.join(have)}, or use 'all-linear'"
            )
    return _in_layers(found, config.lora.layers)


def _within(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def depth_of(name: str) -> int | None:
    """The transformer layer a module belongs to: the first number in its path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _in_layers(found: dict[str, Shape], layers: Sequence[str]) -> dict[str, Shape]:
    if not layers:
        return found
    depths = [d for n in found if (d := depth_of(n)) is not None]
    total = max(depths, default=-1) + 1
    try:
        wanted = {int(i) % total if -total <= int(i) < total else -1 for i in layers}
    except (ValueError, ZeroDivisionError):
        wanted = {-1}
    if -1 in wanted:
        raise ModelError(
            f"lora.layers = {','.join(layers)}: must be indices from {-total} to {total - 1}"
        )
    return {n: s for n, s in found.items() if depth_of(n) in wanted}


def head_names(base: nn.Module, config: Config) -> list[str]:
    """Modules trained whole: a classifier's head, and what lora.modules-to-save names."""
    heads = [n for n in ("classifier", "score") if hasattr(base, n)]
    named = [n for n, _ in base.named_modules()]
    for target in config.lora.modules_to_save:
        if not any(_within(n, target) for n in named):
            raise ModelError(f"lora.modules-to-save: {target} matches no module of this model")
    heads = heads if config.model.task == "classification" else []
    return [*heads, *config.lora.modules_to_save]


def adapter_config(config: Config, shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> Any:
    """PEFT's config for these ranks; each module named in full, so that nothing else matches."""
    lora = config.lora
    heads = [*config.lora.modules_to_save]
    if config.model.task == "classification":
        heads = ["classifier", "score", *heads]
    top = max(ranks.values())
    return LoraConfig(
        r=top,
        lora_alpha=lora.alpha,
        rank_pattern={f"^{m}$": r for m, r in ranks.items() if r != top},
        target_modules=list(ranks),
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.form == "dora",
        fan_in_fan_out=any(shapes[m].fan_in_fan_out for m in ranks),
        modules_to_save=heads or None,
        init_lora_weights=True if lora.init == "default" else lora.init,
    )


def fingerprint(base: nn.Module) -> str:
    """A digest over samples of every tensor: differs when any tensor was loaded differently."""
    digest = hashlib.sha256()
    for name, p in base.named_parameters():
        flat = p.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step].float().contiguous()
        digest.update(name.encode() + repr(tuple(p.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _source(config: ModelConfig) -> tuple[str, str]:
    """Directory or hub id, and the GGUF file in it if the path names one."""
    path = locate(config.path)
    if path.endswith(".gguf"):
        return os.path.dirname(path), os.path.basename(path)
    return path, ""


def _converted(directory: str, gguf: str) -> str:
    """A directory with the GGUF's model in safetensors, made once and cached.

    A model that transformers loads from GGUF cannot be saved as it is, so its weights go into a
    clean model of the same configuration.
    """
    source = Path(directory, gguf)
    key = hashlib.sha256(f"{gguf}/{source.stat().st_size}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedlora"
    target = cache / f"{source.stem}-{key}"
    if target.exists():
        return str(target)
    cache.mkdir(parents=True, exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf, dtype=torch.float32)
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
