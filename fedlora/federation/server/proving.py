"""The aggregation proof as a stage of every round: by the strategy's algebra, or by the model.

    open       random inputs; what the base makes of them
    uploads    each update's own part of the mean, added up as it passes
    close      what clients will make of the new state, against that mean

Where the change of a module is s B A, pairs are multiplied out (proof.py), and the server's own
model is asked as well; other forms are asked of the model alone (proof_by_model.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.server import proof_by_model
from fedlora.federation.server.exchange import Received, passing
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.proof import WEIGHTS, Proof, Target, model_deviation, probes, prove
from fedlora.federation.server.run import Session, Setting, base_number, clients, load
from fedlora.strategies.base import Client, Round, Upload


class Proving:
    """The `Stage` that gathers what the aggregate must be, and compares it."""

    def __init__(self, setting: Setting, session: Session) -> None:
        self.setting, self.session = setting, session
        self.target = Target({})
        self.base: Mapping[str, Tensor] = {}
        self.found: Proof | None = None

    @property
    def through_model(self) -> bool:
        """Is the proof made through the server's own model as well as by the pairs?"""
        return self.setting.guarantee == "exact" and not self.setting.proves_by_model

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        setting, columns = self.setting, self.setting.config.proof.probes
        self.found = None
        if setting.proves_by_model:
            self.target = proof_by_model.target(setting.model, columns, round)
        else:
            self.target = Target(probes(cohort, columns, round.seed, round.number))
        self.base = self._base_outputs(run) if self.through_model else {}

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        return passing(uploads, partial(self._see, run, round))

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        """Prove the round.

        Raises:
            ProofError: the strategy promises to be exact and was not, unless proof.enforce is off.
        """
        setting, config = self.setting, self.setting.config
        if config.secure.aggregation and setting.guarantee == "approximate":
            return after  # from a sum, one cannot tell
        proof = self._proved(before, after, clients(setting, before, received.accepted), round)
        if self.through_model:
            load(setting, self.session, after, after.state)
            found = model_deviation(self.base, setting.model.probe(self.target.x), self.target)
            rounding = 0.0 if setting.model.base.beside else WEIGHTS[config.model.dtype]
            proof = replace(proof, model_deviation=found, model_bound=rounding)
        self.found = proof
        if config.proof.enforce:
            proof.enforce(config.strategy.name, round.number)
        return after

    def record(self) -> Mapping[str, Any]:
        return {"proof": self.found and self.found.record()}

    def _see(self, run: Saved, round: Round, upload: Upload) -> None:
        """Add an update to what the aggregate is to be."""
        strategy, model = self.setting.strategy, self.setting.model
        if self.setting.proves_by_model:
            proof_by_model.add(model, strategy, run.state, self.target, upload, round)
        else:
            pairs = strategy.trained(run.state, upload, round)
            self.target.add(pairs, upload.num_examples)

    def _proved(self, before: Saved, after: Saved, kinds: Sequence[Client], round: Round) -> Proof:
        setting, dtype = self.setting, self.setting.config.wire.dtype
        strategy, state, target = setting.strategy, after.state, self.target
        if setting.proves_by_model:
            model, promise = setting.model, setting.guarantee
            return proof_by_model.prove(
                model, strategy, promise, state, kinds, target, round, dtype
            )
        version = base_number(setting, before.state)
        return prove(strategy, state, version, kinds, target, round, dtype, setting.folds)

    def _base_outputs(self, run: Saved) -> dict[str, Tensor]:
        """W x of the base as it is before the round, through the model's own layers."""
        setting = self.setting
        effective = setting.strategy.effective(run.state)
        bare = {m: torch.zeros_like(B) for m, B in effective.factors.B.items()}
        load(setting, self.session, run, run.state)
        setting.model.load(replace(effective.factors, B=bare))
        return setting.model.probe(self.target.x)
