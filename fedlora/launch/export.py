"""Writes a run's model for programs that know nothing of fedlora: as PEFT's adapter, or merged."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, FedLoraError, ModelError
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.server.adapter import checked, hold, write_card
from fedlora.federation.server.choice import result
from fedlora.federation.server.journal import Journal, Member, Saved, state_types
from fedlora.federation.server.ranks import patterned
from fedlora.launch.experiment_file import of_run
from fedlora.launch.export_directory import check_place, placed
from fedlora.launch.export_targets import (
    ONE_RANK,
    check_target,
    most,
    problems,
    serve_commands,
)
from fedlora.launch.fresh_process import Logits, logits_elsewhere
from fedlora.lora.adapter import Adapter, Factors
from fedlora.strategies import Strategy
from fedlora.strategies.base import Client, Effective, Round
from fedlora.training import cache
from fedlora.training.begun_with import begun_with, check_begun_with
from fedlora.training.data.batches import eval_batches, inputs_of
from fedlora.training.devices import moved, on_host
from fedlora.training.export_certificate import certified, load_exported
from fedlora.training.merged_model import save_merged
from fedlora.training.model import peft_directory
from fedlora.training.model.decoder import as_read
from fedlora.training.model.loading import logits_of
from fedlora.training.model.model import Model
from fedlora.training.user_code import is_code

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 1e-2, "8bit": 0.05}
"""Relative difference of logits that rounding in the base's dtype can explain; under 8bit what
enters a module is rounded too."""

BATCHES, ROWS = 2, 16
"""What an export is compared on: so many batches of so many rows of the central test."""


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
    rank: int = 0
    """The largest rank of its adapter; 0 of a form that has none."""
    serve: tuple[str, ...] = ()
    """Lines for a shell that serve it, where the target is a server."""

    def measured(self) -> str:
        """The deviation in words, and what from."""
        of = "those of the truncated model" if self.truncation else "the federated model's"
        return f"logits equal {of} to {self.deviation:.1e}"


@dataclass(frozen=True, slots=True)
class Opened:
    """A run's last checkpoint, ready to be written."""

    config: Config
    strategy: Strategy[Any]
    saved: Saved
    model: Model
    labels: tuple[str, ...]
    batches: list[dict[str, Tensor]]

    def effective(self, client: int | None) -> Effective:
        """The federated model as changes of W0; or a client's own."""
        if client is None:
            found = self.strategy.effective(self.saved.state)
            return peft_directory.beginning(found, self.saved.base_offset)
        return _of_client(client, self)

    def logits(self, effective: Effective) -> Logits:
        """What the model in memory makes of the batches, holding these changes."""
        start = self.saved.base_offset
        self.model.rebase(f"export of {self.saved.token}", effective.base[bool(start) :], start)
        self.model.load(effective.factors)
        return _logits(self.model.peft, self.batches)

    def logits_of_adapter(self, adapter: Adapter, factors: Factors) -> Logits:
        """The same of W0 with this adapter, and what else was trained."""
        hold(self.model, adapter, factors)
        return _logits(self.model.peft, self.batches)


def opened(run: Path) -> Opened:
    """The run's last checkpoint, with its model and a few batches to compare it on.

    Raises:
        CheckpointError: the run has no checkpoint, or its files are no longer those that it began
            with.
    """
    config = of_run(run / "config.toml", {"run.out": str(run.parent), "run.name": run.name})
    if not config.model.path:
        raise CheckpointError(f"{run / 'config.toml'} is damaged: it names no model.path")
    strategy = config.build_strategy()
    journal = Journal(config)
    found = journal.last(Saved, Member, *state_types(strategy))
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint")
    _check_newest(journal, int(found[1]["round"]))
    corpus = cache.corpus(config)
    model = cache.model(config, corpus.labels)
    check_begun_with(journal.begun_with(), begun_with(model, corpus), run)
    if len(corpus.test):
        rows = cache.encoded("central", -1, config, corpus.labels)
    else:
        rows = as_read(model, model.task.made_up(model.tokenizer, corpus.labels))
    batches = [inputs_of(batch) for batch in islice(eval_batches(rows, ROWS), BATCHES)]
    saved = result(config, strategy, found[0], found[1]["round"])
    return Opened(config, strategy, saved, model, corpus.labels, batches)


def _check_newest(journal: Journal, found: int) -> None:
    """Raises CheckpointError where the checkpoint that was found is not of the last round."""
    lines: list[dict[str, Any]] = []
    with suppress(FedLoraError):  # a damaged record says nothing of the checkpoints
        lines = journal.lines()
    if journal.damaged or (lines and lines[-1]["round"] > found):
        why = str(journal.damaged[0]) if journal.damaged else f"{journal.directory}: it is gone"
        raise CheckpointError(
            f"the checkpoint of the last round cannot be exported, {why}. The newest whole one is "
            f"of round {found}: resume the run, which makes again what is lost, and then export it"
        )


def export_run(
    run: Path,
    out: Path,
    merged: bool = False,
    rank: int = 0,
    client: int | None = None,
    target: str = "",
    fresh: bool = True,
) -> Exported:
    """Write the model of a run's last checkpoint, load it with plain libraries, and compare.

    It is loaded in a process of its own that has no fedlora; not a model of the user's own code,
    and not without `fresh`: that is loaded in this one. `out` is there whole and right, or is what
    it was. `target` is one of `export_targets.TARGETS`; empty: peft, or merged.

    Raises:
        CheckpointError: the run has no checkpoint.
        ModelError: `out` is something else's, there is no such target or it cannot load such a
            model, or what was written does not compute what the federated model does.
    """
    if merged and target not in ("", "merged"):
        raise ModelError(f"target = {target!r} is not merged; leave one of them out")
    target = target or ("merged" if merged else "peft")
    check_target(target)
    check_place(out)
    (done,) = _exported(opened(run), run, out, {"": client}, target, rank, fresh)
    return done


def export_clients(
    run: Path, out: Path, target: str = "peft", rank: int = 0, clients: Sequence[int] = ()
) -> list[Exported]:
    """Write each client's own model, "client-3" and so on, and check them all in one process.

    For strategies that leave a part with every client. Without `clients`: all that trained.

    Raises:
        ModelError: clients keep nothing, or as `export_run`.
    """
    check_target(target)
    check_place(out)
    of = opened(run)
    if not of.strategy.needs().client_memory:
        raise ModelError(
            f"strategy.name = {of.config.strategy.name!r}: clients keep nothing of their own, and "
            "all have the one model; leave --clients out"
        )
    wanted = clients or sorted(i for i, m in of.saved.members.items() if m.memory_round > 0)
    if not wanted:
        raise ModelError(f"{run}: no client has trained yet, so none has a model of its own")
    return _exported(of, run, out, {f"client-{i}": i for i in wanted}, target, rank, True)


def _exported(
    of: Opened,
    run: Path,
    out: Path,
    jobs: Mapping[str, int | None],
    target: str,
    rank: int,
    fresh: bool,
) -> list[Exported]:
    """Write these (directory within `out`, client) and check them; all of them are there or none.

    Raises:
        ModelError: see `export_run`.
    """
    if found := [*problems(target, of.model, rank)]:
        raise ModelError("; ".join(found))
    merged = target == "merged"
    what = {"run": of.config.run.name, "for": target, "clients": [*jobs.values()]}
    with placed(out, what) as new:
        wrote = [_written(of, run, new / name, out, target, rank, i) for name, i in jobs.items()]
        elsewhere = fresh and not is_code(of.config.model.path)
        if elsewhere:
            got = logits_elsewhere([new / name for name in jobs], of.batches)
        else:
            again = (load_exported(of.config, of.labels, new / n, merged) for n in jobs)
            got = [_logits(model, of.batches) for model in again]
        done = [
            replace(one, directory=out / name, deviation=_compared(of, out / name, found, want))
            for name, (one, want), found in zip(jobs, wrote, got, strict=True)
        ]
        for one, (name, client) in zip(done, jobs.items(), strict=True):
            write_card(run, new / name, of.model, _checked(one, elsewhere), merged, client)
    served = [(name or of.config.run.name, out / name) for name in jobs]
    lines = serve_commands(target, of.config, served, max(one.rank for one in done))
    return [replace(one, serve=tuple(lines)) for one in done]


def _written(
    of: Opened, run: Path, directory: Path, out: Path, target: str, rank: int, client: int | None
) -> tuple[Exported, Logits]:
    """Write the model, hold its modules against the model in memory; and the logits to expect."""
    effective, model, lora = of.effective(client), of.model, of.config.lora
    adapter, truncation, rounding = None, 0.0, 0.0
    merged, one_rank = target == "merged", target in ONE_RANK
    plain = peft_directory.as_lora(model, effective)
    if lora.form in ("lora", "alora") or (model.form.own and not rank):
        whole = peft_directory.whole(model, plain)
        limit = most(target, rank)
        limits = {m: limit if m in model.shapes else 0 for m in whole}  # else as it was started
        adapter, truncation = peft_directory.fitted(whole, limits, one_rank)
    elif rank:
        raise ModelError(f"lora.form = {lora.form!r}: it has no rank to cut; leave --rank out")
    if merged:
        by_pairs = adapter if lora.form == "lora" or model.form.own else None
        rounding = save_merged(model, plain, by_pairs, directory)
    else:
        peft_directory.save_peft(model, effective, directory, adapter)
    write_card(run, directory, model, [], merged, client)
    if truncation and model.form.own:
        raise ModelError(
            f"lora.form = {lora.form!r}: its change is of a higher rank than {target} takes; "
            "export it as peft or merged"
        )
    if truncation:
        assert adapter is not None
        want = of.logits_of_adapter(adapter, effective.factors)
    else:
        want = of.logits(effective)
    excess = certified(model, load_exported(of.config, of.labels, directory, merged), out)
    top = max((p.rank for p in adapter.values()), default=0) if adapter else 0
    return Exported(out, truncation, 0.0, rounding, excess, top), want


def _checked(one: Exported, elsewhere: bool) -> list[str]:
    """What the card says of the check."""
    where = (
        "by the lines above, in a Python process without fedlora"
        if elsewhere
        else "in fedlora's own process, since the model is the user's own code"
    )
    logits = f"Loaded {where}, its {one.measured()} (largest difference over the largest logit)."
    return [*checked(one.truncation, one.excess), logits]


def _compared(of: Opened, what: Path, got: Logits, want: Logits) -> float:
    """The largest difference over the largest logit.

    Raises:
        ModelError: it is more than rounding explains.
    """
    largest = max(float(x.abs().max()) for x in want)
    apart = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    deviation = apart / max(largest, 1e-30)
    base = of.config.model
    allowed = max(TOLERANCE[base.dtype], TOLERANCE.get(base.quantization, 0.0))
    if not deviation < allowed:
        raise ModelError(
            f"{what}: its logits deviate from the federated model's by {deviation:.1e}; nothing "
            "was written"
        )
    return deviation


def _logits(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Logits:
    model.eval()
    with torch.no_grad():
        device = next(model.parameters()).device
        every = (logits_of(model(**moved(batch, device))) for batch in batches)
        return [on_host(logits).float() for logits in every]


def _of_client(i: int, of: Opened) -> Effective:
    """A client's own model, where parts of it never left the client."""
    config, strategy, saved = of.config, of.strategy, of.saved
    if i not in saved.members:
        raise ModelError(f"the run has no client {i}; it has {_some(saved.members)}")
    member = saved.members[i]
    root = Path(config.output.client_memory or Path(config.run.out, config.run.name, "clients"))
    kept = ClientMemory(root, i, saved.token).recall(member.memory_round)
    layers = of.model.layers(patterned(of.model.shapes, member.rank, config.lora.rank_pattern))
    me = Client(i, layers, member.base_version, member.memory_round > 0)
    round = Round(config.run.rounds + 1, config.run.seed)
    factors = strategy.start(strategy.download(saved.state, me, round), kept, me, round)
    base = strategy.effective(saved.state).base
    return peft_directory.beginning(Effective(base, factors), saved.base_offset)


def _some(clients: Mapping[int, Any]) -> str:
    """The first of them, as a list to read."""
    return ", ".join(str(i) for i in sorted(clients)[:20])
