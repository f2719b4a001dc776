"""Writes a model as a PEFT directory, which `PeftModel.from_pretrained(base, directory)` loads.

Every strategy's model is W0 + sum of low-rank changes, so one adapter holds it: the changes are
stacked, and where that outgrows the layer, recompressed without loss.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.lora.adapter import Adapter, Delta, Pair, dense, together
from fedlora.lora.lowrank import compress, norm, pad, stack, svd
from fedlora.lora.tree_file import write_atomically, write_tensors
from fedlora.strategies.base import Effective, Version, as_factors
from fedlora.training.data.locate import locate
from fedlora.training.devices import on_host
from fedlora.training.model.layers import adapter_config
from fedlora.training.model.loading import ENCODER, HEAD, PREFIX
from fedlora.training.model.model import Model
from fedlora.training.model.stacks import alike, packed
from fedlora.training.tasks import task_of
from fedlora.training.user_code import is_code

WEIGHTS = "model.safetensors"
"""Of a merged model that the user's own function makes: its state, without a config."""


def total(effective: Effective) -> Adapter:
    """The whole change of each module as one pair, of the least rank that stacking gives."""
    adapter = effective.factors.adapter()
    modules = list(dict.fromkeys([*(m for v in effective.base for m in v.delta), *adapter]))
    return {m: _total_of(m, effective.base, adapter.get(m)) for m in modules}


def beginning(effective: Effective, base_offset: Mapping[str, Delta]) -> Effective:
    """The model with what its initialisation took out of W0 as the first of its base changes."""
    if not base_offset:
        return effective
    return Effective((Version(0, base_offset), *effective.base), effective.factors)


def whole(model: Model, effective: Effective) -> Adapter:
    """The whole change of the base that was named: what the run started from, and its own."""
    start = (Version(0, model.start.pairs),) if model.start.pairs else ()
    return total(Effective((*start, *effective.base), effective.factors))


def _total_of(m: str, base: Sequence[Version], pair: Pair | None) -> Pair:
    deltas = [together(v.delta[m]) for v in base if m in v.delta]
    pairs = [d for d in deltas if isinstance(d, Pair)] + ([pair] if pair else [])
    full = [d for d in deltas if isinstance(d, Tensor)]
    if not full:
        whole = stack([Pair(p.A.double(), p.B.double(), p.scale) for p in pairs])
        if whole.rank <= min(whole.A.shape[1], whole.B.shape[0]):
            return Pair(whole.A.float(), whole.B.float())
        U, S, Vh = svd(whole)
    else:
        every: list[Delta] = [*full, *pairs]
        W = torch.stack([dense(d).double() for d in every]).sum(0)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = max(1, int((S[0] * 1e-9 < S).sum()))  # what is left out is below float32's rounding
    return Pair(Vh[:r].float().contiguous(), (U[:, :r] * S[:r]).float())


def fitted(
    adapter: Adapter, rank: int | Mapping[str, int] = 0, one_rank: bool = False
) -> tuple[Adapter, float]:
    """The nearest adapter of at most this rank (0: any), and the relative error that it costs.

    rank: of all modules, or of each. one_rank: every module is filled up to the largest rank, with
    rows and columns of 0. The error is of the Frobenius norm over all modules.
    """
    most = {m: rank if isinstance(rank, int) else rank[m] for m in adapter}
    cut = {m: compress(p, most[m]) if 0 < most[m] < p.rank else p for m, p in adapter.items()}
    lost = sum(_apart(p, cut[m]) ** 2 for m, p in adapter.items() if cut[m] is not p)
    size = sum(float(norm(p)) ** 2 for p in adapter.values())
    if one_rank:
        top = max(p.rank for p in cut.values())
        cut = {m: pad(p, top) for m, p in cut.items()}
    return cut, (lost / size) ** 0.5 if size else 0.0


def _apart(pair: Pair, other: Pair) -> float:
    """The norm of a difference that may be tiny: through factors, so in float64."""
    wide = [Pair(p.A.double(), p.B.double(), p.scale) for p in (pair, other)]
    return float(norm(stack(wide, [1.0, -1.0])))


def save_peft(
    model: Model, effective: Effective, directory: Path, adapter: Adapter | None = None
) -> None:
    """Write a PEFT directory that `PeftModel.from_pretrained(base, directory)` loads.

    The scale is folded into B, so alpha = r on every module. `adapter` takes the place of the
    whole change, where it was made to fit.
    """
    if model.form.kind != "factors" and not model.form.own:
        _save_form(model, effective, directory)
        return
    effective = as_lora(model, effective)
    adapter = whole(model, effective) if adapter is None else adapter
    cut = len(ENCODER) if model.config.model.pooling == "mean" else 0
    adapter = {m[cut:]: p for m, p in alike(adapter, model.shapes, True).items()}
    every = {**model.start.shapes, **model.shapes}
    shapes = {m[cut:]: replace(s, stack=s.stack[cut:]) for m, s in every.items()}
    ranks = {m: p.rank for m, p in adapter.items()}
    plain = model.config.lora.model_copy(update={"form": "lora"} if model.form.own else {})
    plain_config = model.config.model_copy(update={"lora": plain})
    config = adapter_config(plain_config, shapes, ranks, [] if cut else model.heads)
    top = config.r
    config.lora_alpha = top
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights = True
    tensors = {}
    for m, p in adapter.items():
        if not shapes[m].stack:
            tensors[f"{PREFIX}{m}.lora_A.weight"] = p.A
            tensors[f"{PREFIX}{m}.lora_B.weight"] = p.scale * p.B
    for parameter, names in model.stacks.items():
        own = parameter[cut:].rpartition(".")[0] + ".base_layer" * model.adapted[names[0]].outside
        A, B = packed(adapter[m[cut:]] for m in names)
        tensors |= {f"{PREFIX}{own}.lora_A.weight": A, f"{PREFIX}{own}.lora_B.weight": B}
    other = {name: x for name, x in effective.factors.other.items() if not _of_head(name, cut)}
    tensors |= {PREFIX + name[cut:]: x for name, x in other.items()}
    _write(model, config, tensors, effective, directory)


def as_lora(model: Model, effective: Effective) -> Effective:
    """The same model in LoRA's factors, of a form of this library's own; another as it is.

    Leaves the model holding it.
    """
    if not model.form.own:
        return effective
    model.load(effective.factors)
    with torch.no_grad():
        pairs = {m: model.adapted[m].pair() for m in model.shapes}
    made = {m: Pair(on_host(p.A).clone(), on_host(p.B).clone(), p.scale) for m, p in pairs.items()}
    own = {n for n in effective.factors.other if any(n.startswith(f"{m}.") for m in model.shapes)}
    other = {n: x for n, x in effective.factors.other.items() if n not in own}
    return Effective((), as_factors(made, other))


def _save_form(model: Model, effective: Effective, directory: Path) -> None:
    """A form that is not LoRA, as PEFT itself names its tensors; frozen random ones go along."""
    model.load(effective.factors)
    config = copy.deepcopy(model.peft.peft_config[model.active])
    cut = len(ENCODER) if model.config.model.pooling == "mean" else 0
    config.target_modules = [m[cut:] for m in model.shapes]
    found = get_peft_model_state_dict(model.peft, adapter_name=model.active)
    tensors = {}
    for key, x in ((key, on_host(x)) for key, x in found.items()):
        name = key.removeprefix(PREFIX)
        if key == name:
            tensors[key] = x
        elif not _of_head(name, cut):
            tensors[PREFIX + name[cut:]] = x
    _write(model, config, tensors, effective, directory)


def _of_head(name: str, cut: int) -> bool:
    """Is this a tensor of a mean-pooled model's head, which lies beside the encoder?"""
    return bool(cut) and not name.startswith(ENCODER)


def _write(
    model: Model, config: Any, tensors: dict[str, Tensor], effective: Effective, directory: Path
) -> None:
    pooled = model.config.model.pooling == "mean"
    config.inference_mode = True
    base = model.config.model.path
    config.base_model_name_or_path = base if is_code(base) else locate(base)
    config.task_type = _task_type(model.config)
    config.modules_to_save = None if pooled else config.modules_to_save
    directory.mkdir(parents=True, exist_ok=True)
    if pooled:
        save_head(effective, directory)
    config.save_pretrained(str(directory))
    model.tokenizer.save_pretrained(str(directory))
    write_tensors(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    if model.labels:
        labels = json.dumps(list(model.labels))
        write_atomically(directory / "labels.json", labels.encode())


def save_head(effective: Effective, directory: Path) -> None:
    """A mean-pooled model's linear head, for which no library has a class."""
    other = effective.factors.other.items()
    head = {name: x for name, x in other if _of_head(name, len(ENCODER))}
    write_tensors(directory / HEAD, head, {"format": "pt"})


def _task_type(config: Config) -> str | None:
    if is_code(config.model.path):
        return None  # PEFT's tasks ask for a transformers config
    task = task_of(config.model.task)
    mean = task.pooled and config.model.pooling == "mean"
    return "FEATURE_EXTRACTION" if mean else task.peft or None
