"""Writes a run's model for programs that know nothing of fedlora: as PEFT's adapter, or merged."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, ModelError
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.server.journal import Journal, Member, Saved, state_types
from fedlora.federation.server.ranks import patterned
from fedlora.launch.experiment_file import parse
from fedlora.strategies import Strategy
from fedlora.strategies.base import Client, Effective, Round
from fedlora.training import cache
from fedlora.training.data.batches import eval_batches
from fedlora.training.export_certificate import certified, load_exported
from fedlora.training.model.agreement import agree
from fedlora.training.model.loading import MeanPooled, load_base, logits_of
from fedlora.training.model.model import Model
from fedlora.training.model.peft_directory import (
    WEIGHTS,
    beginning,
    save_head,
    save_peft,
    total,
    truncate,
)
from fedlora.training.user_code import is_code

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 1e-2}
"""Relative difference of logits that rounding in the base's dtype can explain."""


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
    agree(base, model.tokenizer, model.config.model)
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
    if is_code(model.config.model.path) and not hasattr(base, "save_pretrained"):
        save_model(base, str(directory / WEIGHTS))
    else:
        base.save_pretrained(str(directory))
    model.tokenizer.save_pretrained(str(directory))


@dataclass(frozen=True, slots=True)
class Exported:
    """The directory of an export, and how far what is in it is from the federated model."""

    directory: Path
    truncation: float
    """Relative Frobenius error of the change, 0 where nothing was cut."""
    deviation: float
    """Largest difference of its logits from the federated model's, over their largest."""
    rounding: float = 0.0
    """Relative Frobenius error of the change from rounding it into the weights' dtype."""
    excess: float = 0.0
    """How far its modules are off, over what rounding explains: see `certified`."""


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
    corpus = cache.corpus(config)
    model = cache.model(config, corpus.labels)
    effective = beginning(strategy.effective(saved.state), saved.base_offset)
    if client is not None:
        effective = _of_client(client, config, strategy, saved, model)
    if merged:
        truncation, rounding = save_merged(model, effective, out, rank)
    else:
        truncation, rounding = save_peft(model, effective, out, rank), 0.0

    model.rebase("export", effective.base[bool(saved.base_offset) :], saved.base_offset)
    model.load(effective.factors)
    batch = next(eval_batches(cache.encoded("central", -1, config, corpus.labels), 16))
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    loaded = load_exported(config, corpus.labels, out, merged)
    with torch.no_grad():
        want = logits_of(model.peft(**inputs)).float()
        got = logits_of(loaded(**inputs)).float()
    deviation = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not rank and not deviation < TOLERANCE[config.model.dtype]:
        raise ModelError(f"{out}: its logits deviate from the federated model's by {deviation:.1e}")
    excess = 0.0 if rank else certified(model, loaded, out)
    return Exported(out, truncation, deviation, rounding, excess)


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
    return beginning(Effective(base, factors), saved.base_offset)
