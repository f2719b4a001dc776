"""A finished model in formats that know nothing of fedlora: a PEFT directory, or merged weights.

Every strategy's model is W0 + sum of low-rank changes, so one adapter holds it: the changes are
stacked, and where that outgrows the layer, recompressed without loss.
"""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, ModelError
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.server.journal import Journal, Member, Saved, state_types
from fedlora.federation.server.ranks import patterned
from fedlora.launch.experiment_file import parse
from fedlora.lora.adapter import Adapter, Delta, Pair, dense, together
from fedlora.lora.lowrank import compress, norm, stack, svd
from fedlora.lora.tree_file import write_atomically
from fedlora.strategies import Strategy
from fedlora.strategies.base import Client, Effective, Round, Version
from fedlora.training import cache as site
from fedlora.training import export_certificate
from fedlora.training.data.batches import eval_batches
from fedlora.training.data.locate import locate
from fedlora.training.model.layers import adapter_config
from fedlora.training.model.loading import MeanPooled, load_base
from fedlora.training.model.model import PREFIX, Model

ENCODER = "encoder."
"""Where a mean-pooled model keeps its encoder, which is what an export of it adapts."""

HEAD = "classifier.safetensors"

USE_HEAD = """An encoder, the mean of its token states, and a linear head:

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), "adapter")  # or merged
    head = safetensors.torch.load_file("adapter/classifier.safetensors")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None].float()
    pooled = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    logits = pooled @ head["classifier.weight"].T + head["classifier.bias"]

labels.json names the classes in order; BASE is base_model_name_or_path of adapter_config.json.
"""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 1e-2}
"""Relative difference of logits that rounding in the base's dtype can explain."""


def total(effective: Effective) -> Adapter:
    """The whole change of each module as one pair, of the least rank that stacking gives."""
    adapter = effective.factors.adapter()
    modules = list(dict.fromkeys([*(m for v in effective.base for m in v.delta), *adapter]))
    return {m: _total_of(m, effective.base, adapter.get(m)) for m in modules}


def beginning(effective: Effective, origin: Mapping[str, Delta]) -> Effective:
    """The model with what its initialisation took out of W0 as the first of its base changes."""
    if not origin:
        return effective
    return Effective((Version(0, origin), *effective.base), effective.factors)


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


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The nearest adapter of at most this rank, and the relative Frobenius error it costs."""
    cut = {m: compress(p, rank) if p.rank > rank else p for m, p in adapter.items()}
    lost = sum(float(norm(stack([adapter[m], cut[m]], [1.0, -1.0]))) ** 2 for m in cut)
    size = sum(float(norm(p)) ** 2 for p in adapter.values())
    return cut, (lost / size) ** 0.5 if size else 0.0


def save_peft(model: Model, effective: Effective, directory: Path, rank: int = 0) -> float:
    """Write a PEFT directory that `PeftModel.from_pretrained(base, directory)` loads.

    The scale is folded into B, so alpha = r on every module. Returns the relative error of
    truncating to `rank` (0: as exact as stacking is).
    """
    if model.form.kind != "factors":
        return _save_form(model, effective, directory)
    adapter, error = total(effective), 0.0
    if rank:
        adapter, error = truncate(adapter, rank)
    cut = len(ENCODER) if model.config.model.pooling == "mean" else 0
    adapter = {m[cut:]: p for m, p in adapter.items()}
    shapes = {m[cut:]: shape for m, shape in model.shapes.items()}
    config = adapter_config(model.config, shapes, {m: p.rank for m, p in adapter.items()})
    top = config.r
    config.lora_alpha = top
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights = True
    tensors = {}
    for m, p in adapter.items():
        tensors[f"{PREFIX}{m}.lora_A.weight"] = p.A
        tensors[f"{PREFIX}{m}.lora_B.weight"] = p.scale * p.B
    other = {name: x for name, x in effective.factors.other.items() if not _of_head(name, cut)}
    tensors |= {PREFIX + name[cut:]: x for name, x in other.items()}
    _write(model, config, tensors, effective, directory)
    return error


def _save_form(model: Model, effective: Effective, directory: Path) -> float:
    """A form that is not LoRA, as PEFT itself names its tensors; frozen random ones go along."""
    model.load(effective.factors)
    config = copy.deepcopy(model.peft.peft_config[model.active])
    cut = len(ENCODER) if model.config.model.pooling == "mean" else 0
    config.target_modules = [m[cut:] for m in model.shapes]
    found = get_peft_model_state_dict(model.peft, adapter_name=model.active)
    tensors = {}
    for key, x in found.items():
        name = key.removeprefix(PREFIX)
        if key == name:
            tensors[key] = x
        elif not _of_head(name, cut):
            tensors[PREFIX + name[cut:]] = x
    _write(model, config, tensors, effective, directory)
    return 0.0


def _of_head(name: str, cut: int) -> bool:
    """Is this a tensor of a mean-pooled model's head, which lies beside the encoder?"""
    return bool(cut) and not name.startswith(ENCODER)


def _write(
    model: Model, config: Any, tensors: dict[str, Tensor], effective: Effective, directory: Path
) -> None:
    pooled = model.config.model.pooling == "mean"
    config.inference_mode = True
    config.base_model_name_or_path = locate(model.config.model.path)
    config.task_type = _task_type(model.config)
    config.modules_to_save = None if pooled else config.modules_to_save
    directory.mkdir(parents=True, exist_ok=True)
    if pooled:
        save_head(effective, directory)
    config.save_pretrained(str(directory))
    tensors = {
        name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
    }
    path = directory / "adapter_model.safetensors"
    write_atomically(path, to_bytes(tensors, metadata={"format": "pt"}))
    if model.labels:
        labels = json.dumps(list(model.labels))
        write_atomically(directory / "labels.json", labels.encode())


def save_head(effective: Effective, directory: Path) -> None:
    """A mean-pooled model's linear head, and how to use it: no library has a class for it."""
    other = effective.factors.other.items()
    head = {name: x.contiguous() for name, x in other if _of_head(name, len(ENCODER))}
    write_atomically(directory / HEAD, to_bytes(head, metadata={"format": "pt"}))
    write_atomically(directory / "README.md", USE_HEAD.encode())


def _task_type(config: Config) -> str:
    if config.model.task == "causal-lm":
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if config.model.pooling == "mean" else "SEQ_CLS"


def save_merged(
    model: Model, effective: Effective, directory: Path, rank: int = 0
) -> tuple[float, float]:
    """Write the base with everything merged in, and its tokenizer: no PEFT needed to load it.

    Returns the relative Frobenius error of truncating the change, and of rounding it to the
    weights' dtype.

    Raises:
        ModelError: the base is quantised, so its weights cannot take a change.
    """
    if model.config.model.quantization != "none":
        raise ModelError(
            f"model.quantization = {model.config.model.quantization!r}: quantised weights cannot "
            "take the change; export it as peft, which keeps it beside them"
        )
    if model.form.after:
        raise ModelError(
            f"lora.form = {model.config.lora.form!r}: weights act on every token, and this change "
            "from its invocation on only; export it as peft"
        )
    if model.config.lora.form != "lora":
        _save_whole(model, _merged_by_peft(model, effective), effective, directory)
        return 0.0, 0.0
    base = load_base(model.config.model, model.labels, model.config.run.seed)
    adapter, error = total(effective), 0.0
    if rank:
        adapter, error = truncate(adapter, rank)
    lost = size = 0.0
    with torch.no_grad():
        for m, pair in adapter.items():
            weight = base.get_submodule(m).weight
            change = pair.delta().T if model.shapes[m].fan_in_fan_out else pair.delta()
            want = weight.double() + change
            weight.copy_(weight.float() + change)
            lost += float((weight.double() - want).square().sum())
            size += float(change.double().square().sum())
        named = dict(base.named_parameters())
        for name, x in effective.factors.other.items():
            named[name].copy_(x)
    _save_whole(model, base, effective, directory)
    return error, (lost / size) ** 0.5 if size else 0.0


def _merged_by_peft(model: Model, effective: Effective) -> Any:
    """The base with a form's change merged in by PEFT's own code, which alone knows it."""
    with tempfile.TemporaryDirectory() as made:
        save_peft(model, effective, Path(made))
        found = load_exported(model.config, model.labels, Path(made), merged=False)
    if isinstance(found, MeanPooled):
        found.encoder = found.encoder.merge_and_unload()
        return found
    return found.merge_and_unload()


def _save_whole(model: Model, base: Any, effective: Effective, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(base, MeanPooled):
        save_head(effective, directory)
        base = base.encoder
    base.save_pretrained(str(directory))
    model.tokenizer.save_pretrained(str(directory))


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export came to."""

    directory: Path
    truncation: float
    """Relative Frobenius error of the change, 0 where nothing was cut."""
    deviation: float
    """Largest difference of its logits from the federated model's, over their largest."""
    rounding: float = 0.0
    """Relative Frobenius error of the change from rounding it into the weights' dtype."""
    excess: float = 0.0
    """How far its modules are off, over what rounding explains: see `export_certificate`."""


def export_run(
    run: Path, out: Path, merged: bool = False, rank: int = 0, client: int | None = None
) -> Exported:
    """Write the model of a run's last checkpoint, reload it with plain libraries, and compare.

    Raises:
        CheckpointError: the run has no checkpoint.
        ModelError: what was written does not compute what the federated model does.
    """
    config = parse(run / "config.toml", {"run.out": str(run.parent), "run.name": run.name})
    strategy = config.build_strategy()
    found = Journal(config).last(Saved, Member, *state_types(strategy))
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint")
    saved: Saved = found[0]
    corpus = site.corpus(config)
    model = site.model(config, corpus.labels)
    effective = beginning(strategy.effective(saved.state), saved.origin)
    if client is not None:
        effective = _of_client(client, config, strategy, saved, model)
    if merged:
        truncation, rounding = save_merged(model, effective, out, rank)
    else:
        truncation, rounding = save_peft(model, effective, out, rank), 0.0

    model.rebase("export", effective.base[bool(saved.origin) :], saved.origin)
    model.load(effective.factors)
    batch = next(eval_batches(site.encoded("central", -1, config, corpus.labels), 16))
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    loaded = load_exported(config, corpus.labels, out, merged)
    with torch.no_grad():
        want = model.peft(**inputs).logits.float()
        got = loaded(**inputs).logits.float()
    deviation = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not rank and not deviation < TOLERANCE[config.model.dtype]:
        raise ModelError(f"{out}: its logits deviate from the federated model's by {deviation:.1e}")
    excess = 0.0 if rank else certified(model, loaded, out)
    return Exported(out, truncation, deviation, rounding, excess)


def certified(model: Model, loaded: Any, what: object) -> float:
    """How far the export's modules are from the loaded model's, over what rounding explains.

    Raises:
        ModelError: by more than rounding.
    """
    gaps = export_certificate.check(model, export_certificate.numbers(model), loaded)
    name, excess = export_certificate.worst(gaps)
    if not excess <= 1:
        raise ModelError(
            f"{what}: {name} is not the federated model's: what it makes of the certificate's "
            f"inputs is {excess:.1e} times farther off than rounding explains"
        )
    return excess


def load_exported(config: Config, labels: Sequence[str], directory: Path, merged: bool) -> Any:
    """An export as anyone loads it, with transformers and PEFT alone."""
    from peft import PeftModel

    there = config.model.model_copy(update={"path": str(directory)}) if merged else config.model
    model = load_base(there, labels, config.run.seed)
    if isinstance(model, MeanPooled):
        if not merged:
            model.encoder = PeftModel.from_pretrained(model.encoder, str(directory))
        model.load_state_dict(load_file(directory / HEAD), strict=False)
        return model.eval()
    return model.eval() if merged else PeftModel.from_pretrained(model, str(directory)).eval()


def _of_client(
    i: int, config: Config, strategy: Strategy[Any], saved: Saved, model: Model
) -> Effective:
    """A client's own model, where parts of it never left the client."""
    member = saved.members[i]
    root = Path(config.output.client_memory or Path(config.run.out, config.run.name, "clients"))
    kept = ClientMemory(root, i, saved.token).recall(member.memory_round)
    layers = model.layers(patterned(model.shapes, member.rank, config.lora.rank_pattern))
    me = Client(i, layers, member.base_version, member.memory_round > 0)
    round = Round(config.run.rounds + 1, config.run.seed)
    factors = strategy.start(strategy.download(saved.state, me, round), kept, me, round)
    base = strategy.effective(saved.state).base
    return beginning(Effective(base, factors), saved.origin)
