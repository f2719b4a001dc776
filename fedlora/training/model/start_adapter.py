"""The adapter that a run starts from, `model.adapter`: read, compared with the base, put into it.

    into the base    W0 = round(W + s B A), the sum in float64
    beside it        y = W x + s B A x, where a base's changes stay beside it (moving_base.beside)

From then on that is the base that everyone has: strategies, starts such as PiSSA, references and
differential privacy see nothing else. Exports alone add the pairs to the run's own change, so that
what they write is of the base that was named (`peft_directory.whole`).

Only a change that PEFT reads as W + s B A is taken: its plain LoRA, of any ranks and scales, and
modules that were trained whole.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlora.config.sections import ModelConfig
from fedlora.errors import ModelError
from fedlora.lora.adapter import Pair
from fedlora.training.data.locate import locate
from fedlora.training.devices import on_host
from fedlora.training.model.heads import within
from fedlora.training.model.loading import ENCODER, HEAD, PREFIX, MeanPooled
from fedlora.training.model.moving_base import Beside, beside
from fedlora.training.model.shape import Shape
from fedlora.training.model.ties import check_ties

CONFIG, TENSORS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
SIDES = (".lora_A.weight", ".lora_B.weight")
AS_STARTED = (True, False, "gaussian", "orthogonal", "eva")
"""Of PEFT's init_lora_weights those whose loading leaves W as it is."""
OTHER_MAPS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "of repeated layers",
    "trainable_token_indices": "of single tokens",
    "target_parameters": "of stacked experts",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "of Megatron's layers",
    "lora_bias": "with biases of its own",
}
"""Keys of PEFT's config under which an adapter is no W + s B A, and what it then is."""


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """What was put into the base; empty, of a run that starts from the base alone."""

    pairs: Mapping[str, Pair] = field(default_factory=dict)
    """By module of the base, whether or not the run adapts it."""
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    digest: str = ""
    """Of its numbers, scales and labels, whatever file they lie in."""
    told: str = ""
    """In a line."""

    def added_to(self, fingerprint: str) -> str:
        """A base's fingerprint with the adapter's digest, where there is one."""
        return f"{fingerprint}+{self.digest}" if self.digest else fingerprint

    def kept_beside(self, config: ModelConfig) -> Mapping[str, Pair]:
        """What of it no weight holds."""
        return self.pairs if beside(config) else {}


def start_of(
    base: nn.Module, config: ModelConfig, heads: Sequence[str], labels: Sequence[str]
) -> StartAdapter:
    """Put model.adapter into the base, and its head where the base has its own; what that was.

    Raises:
        ModelError: there is no such adapter, it is none of plain LoRA, or it does not fit this
            base, these heads or these labels; says what to do.
    """
    if not config.adapter:
        return StartAdapter()
    place = place_of(config.adapter)
    try:
        given = _settings(place, config)
        tensors = _tensors(place)
        inside = ENCODER if isinstance(base, MeanPooled) else ""
        pairs, shapes = _pairs(tensors, given, base, inside)
        try:
            check_ties(base, pairs, ())
        except ModelError as e:
            raise ModelError(f"it adapts a weight that this base has twice: {e}") from None
        whole = {
            inside + key.removeprefix(PREFIX): x
            for key, x in tensors.items()
            if not key.endswith(SIDES)
        }
        if inside and (place / HEAD).is_file():
            whole |= load_file(place / HEAD)
        said = _labels(place, labels) if whole else []
        _check_whole(whole, base, heads, labels)
    except ModelError as e:
        raise ModelError(f"model.adapter = {config.adapter!r}: {e}") from None
    _put(base, pairs, shapes, whole, beside(config))
    told = _told(place, pairs, whole, beside(config))
    if whole and labels and not said:
        told += f"; it does not say its labels: its head is taken as of {', '.join(labels)}"
    return StartAdapter(pairs, shapes, _digest(pairs, whole, said), told)


def _told(place: Path, pairs: Mapping[str, Pair], whole: Mapping[str, Tensor], aside: bool) -> str:
    ranks = sorted({p.rank for p in pairs.values()})
    spans = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
    more = f", and {len(whole)} tensors that were trained whole" if whole else ""
    where = "beside" if aside else "merged into"
    return f"starts from {place}: rank {spans} in {len(pairs)} modules{more}, {where} the base"


def place_of(adapter: str) -> Path:
    """The PEFT directory that a model.adapter names: itself, or that of the run which it is.

    Raises:
        ModelError: it is neither; says what it is instead.
    """
    say, place = f"model.adapter = {adapter!r}: ", Path(locate(adapter))
    if os.path.isfile(place / "rounds.jsonl"):
        place = place / "adapter"
        if not os.path.isfile(place / CONFIG):
            raise ModelError(
                f"{say}the run there has no adapter/ yet; finish it, or write one with "
                "`fedlora export`"
            )
    if not os.path.isdir(place):
        raise ModelError(
            f"{say}no such directory; name one that PEFT or `fedlora export` wrote, or a finished "
            "run's (an adapter of the hub: download it first)"
        )
    if os.path.isfile(place / CONFIG):
        return place
    if os.path.isfile(place / "config.json"):
        raise ModelError(f"{say}is a model and no adapter; name it in model.path")
    raise ModelError(f"{say}holds no {CONFIG}, so it is no PEFT adapter")


def stamp(config: ModelConfig) -> tuple[int, int]:
    """What says whether the adapter's file is another than it was; (0, 0): there is none."""
    if not config.adapter:
        return 0, 0
    try:
        found = os.stat(place_of(config.adapter) / TENSORS)
    except (OSError, ModelError):
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _settings(place: Path, config: ModelConfig) -> dict[str, Any]:
    """The adapter's own config, of plain LoRA on this base.

    Raises:
        ModelError: it is another's.
    """
    try:
        given: Any = json.loads((place / CONFIG).read_text("utf-8"))
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ModelError(f"{place / CONFIG} is damaged: it is no JSON object")
    redo = "merge it into the base with PEFT (merge_and_unload) and name that in model.path"
    if (kind := given.get("peft_type")) != "LORA":
        raise ModelError(f"is of PEFT's type {kind}, and a run starts from plain LoRA; {redo}")
    if what := next((name for key, name in OTHER_MAPS.items() if given.get(key)), ""):
        raise ModelError(f"is {what}, and a run starts from plain LoRA; {redo}")
    if (bias := given.get("bias", "none")) != "none":
        raise ModelError(f"trained biases (bias = {bias!r}) as well, which no run takes; {redo}")
    init = given.get("init_lora_weights", True)
    if init not in AS_STARTED:
        raise ModelError(
            f"was begun with init_lora_weights = {init!r}, under which PEFT changes the base as it "
            "loads it; save it with path_initial_model_for_weight_conversion, as plain LoRA"
        )
    named = str(given.get("base_model_name_or_path") or "")
    if named and _last(named) != _last(locate(config.path)):
        raise ModelError(
            f"was trained on {named}, and model.path = {config.path!r}; name its base, or, if "
            f"that is the same, set base_model_name_or_path in its {CONFIG} to this one"
        )
    return given


def _last(path: str) -> str:
    """The name of a base, wherever it lies: a hub id's, a directory's, or the hub cache's."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else parts[-1] if parts else ""


def _tensors(place: Path) -> dict[str, Tensor]:
    """
    Raises:
        ModelError: they are not there, are pickled, or are damaged.
    """
    if not (place / TENSORS).is_file():
        if (place / "adapter_model.bin").is_file():
            raise ModelError(
                "has its tensors in adapter_model.bin, a pickle, which may run code; load it with "
                "PEFT where you trust it and save_pretrained it anew"
            )
        raise ModelError(f"lacks {TENSORS}")
    try:
        found: dict[str, Tensor] = load_file(place / TENSORS)
        return found
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{place / TENSORS} is damaged: {e}") from None


def _pairs(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any], base: nn.Module, inside: str
) -> tuple[dict[str, Pair], dict[str, Shape]]:
    """The pairs by module of the base, each with its scale, and the modules' sizes."""
    pairs, shapes = dict[str, Pair](), dict[str, Shape]()
    for key in sorted(key for key in tensors if key.endswith(SIDES[0])):
        name = key.removeprefix(PREFIX).removesuffix(SIDES[0])
        A, B = tensors[key].float(), tensors.get(key.replace(*SIDES))
        if B is None:
            raise ModelError(f"lacks lora_B of {name}")
        shape = _shape(base, inside + name)
        if (B.shape[0], A.shape[1], B.shape[1]) != (shape.d, shape.k, A.shape[0]):
            raise ModelError(
                f"does not fit this base: {name} is {shape.d} x {shape.k} here, and its factors "
                f"are {' x '.join(map(str, B.shape))} and {' x '.join(map(str, A.shape))}; name "
                "the base that it was trained on in model.path"
            )
        pairs[inside + name] = Pair(A, B.float(), _scale(given, name, A.shape[0]))
        shapes[inside + name] = shape
    if not pairs:
        raise ModelError(f"{TENSORS} holds no lora_A")
    return pairs, shapes


def _shape(base: nn.Module, name: str) -> Shape:
    from transformers.pytorch_utils import Conv1D

    try:
        module = base.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"does not fit this base, which has no module {name}; name the base that it was "
            "trained on in model.path, and its model.task"
        ) from None
    if isinstance(module, Conv1D):
        k, d = module.weight.shape
        return Shape(d, k, True)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"adapts {name}, a {type(module).__name__}; only linear modules are taken")
    return Shape(module.out_features, module.in_features, False)


def _scale(given: Mapping[str, Any], name: str, rank: int) -> float:
    """s, as PEFT reads it of its config: by module, and with rsLoRA."""
    alphas = given.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), given.get("lora_alpha", 8))
    return float(alpha) / (rank**0.5 if given.get("use_rslora") else rank)


def _labels(place: Path, labels: Sequence[str]) -> list[str]:
    """The labels that it says it is of; none where it does not say.

    Raises:
        ModelError: they are not the data's, or in another order.
    """
    try:
        known = json.loads((place / LABELS).read_text("utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        raise ModelError(f"{place / LABELS} is damaged: it is no JSON") from None
    if known == list(labels):
        return list(known)
    if sorted(map(str, known)) == sorted(labels):
        raise ModelError(
            f"its labels are {', '.join(map(str, known))}, and the data has them in another order, "
            f"{', '.join(labels)}: set data.labels to the adapter's order"
        )
    raise ModelError(
        f"its labels are {', '.join(map(str, known)) or 'none'}, and the data's "
        f"{', '.join(labels) or 'none'}; bring them together with data.map"
    )


def _check_whole(
    whole: Mapping[str, Tensor], base: nn.Module, heads: Sequence[str], labels: Sequence[str]
) -> None:
    """
    Raises:
        ModelError: a tensor that was trained whole is none of the base's, is of another size, or
            is one that this run would not train and export.
    """
    named = dict(base.named_parameters())
    for name, x in whole.items():
        if name not in named:
            raise ModelError(
                f"holds {name}, which is neither a factor of plain LoRA nor a tensor of this "
                "model; name its base in model.path, its model.task and model.pooling"
            )
        if named[name].shape != x.shape:
            has = " x ".join(map(str, named[name].shape))
            of = f", the data having {len(labels)} labels" if labels else ""
            raise ModelError(
                f"{name} is {' x '.join(map(str, x.shape))} in it, and {has} here{of}; bring the "
                "labels together with data.map, or start from an adapter without a head"
            )
        if not within(name, heads):
            module = name.rpartition(".")[0]
            raise ModelError(
                f"trained {module} whole, so this run must too: name it in lora.modules-to-save"
            )


@torch.no_grad()
def _put(
    base: nn.Module,
    pairs: Mapping[str, Pair],
    shapes: Mapping[str, Shape],
    whole: Mapping[str, Tensor],
    aside: bool,
) -> None:
    for m, pair in pairs.items():
        layer: Any = base.get_submodule(m)
        if aside:
            term = Beside()
            device = layer.weight.device
            term.deltas = (replace(pair, A=pair.A.to(device), B=pair.B.to(device)),)
            layer.register_forward_hook(term)
            continue
        change = pair.scale * (pair.B.double() @ pair.A.double())
        turned = change.T if shapes[m].fan_in_fan_out else change
        layer.weight.copy_((on_host(layer.weight).double() + turned).to(layer.weight.dtype))
    named = dict(base.named_parameters())
    for name, x in whole.items():
        named[name].copy_(x)


def _digest(pairs: Mapping[str, Pair], whole: Mapping[str, Tensor], labels: Sequence[str]) -> str:
    found = hashlib.sha256(json.dumps([*labels]).encode())
    for name, x in _numbers(pairs, whole):
        found.update(f"{name} {tuple(x.shape)} ".encode())
        found.update(x.float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _numbers(
    pairs: Mapping[str, Pair], whole: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for m, pair in sorted(pairs.items()):
        yield f"{m} A {pair.scale!r}", pair.A
        yield f"{m} B", pair.B
    yield from sorted(whole.items())
