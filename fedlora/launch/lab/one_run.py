"""The one-run audit of a whole federated run: does any client claim less epsilon than it shows?

After Steinke, Nasr and Jagielski, 2023 (`bound.py`). The clients of a federation, as
`fedlora simulate` makes it, have canaries among their rows (`planted.py`). The attacker is the
server: it knows each canary's coordinate, what each client was sent, and what it sent back.

    rounds   every update that was released. Canaries have a gradient in every other round of their
             client; a score is the mean change along the coordinate in these rounds less the mean
             in the others, so what two rounds have in common, noise too, cancels
    final    the final model alone, less the first. Canaries have a gradient in every round, and the
             mean holds the noise of all clients

The canaries, the number of guesses and the confidence are on disk before anything runs
(`plan.Lab.open`), and a directory of other ones is refused. The claim is the
largest that a client's ledger said with an update.

Formal guarantee: `bound.py`'s. A run that is as private as it claims fails with probability
1 - confidence at most; a run that passes is not thereby private.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import PrivacyError
from fedlora.federation.client.handlers import train
from fedlora.federation.client.job import ClientJob, number_of
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.wire.messages import arrays_of, metrics_of, unpack_factors
from fedlora.launch.lab.bound import Guesses
from fedlora.launch.lab.planted import Canaries
from fedlora.launch.simulate.cards import grid_of
from fedlora.lora.adapter import Factors
from fedlora.privacy.accounting import calibrate
from fedlora.privacy.training import PrivacyPlan
from fedlora.training.data.batches import Encoded
from fedlora.training.model.model import Model
from fedlora.training.train import Fit
from fedlora.training.user_code import named

VIEWS = ("rounds", "final")


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is decided before the run."""

    canaries: int = 1000
    guesses: int = 200
    confidence: float = 0.95


@dataclass
class Seen:
    """What the attacker reads of one client."""

    view: str
    shapes: dict[tuple[str, str], torch.Size] = field(default_factory=dict)
    """Of what trains, in the canaries' order."""
    began: dict[int, Factors] = field(default_factory=dict)
    """By round, what the client was sent, as it trains it."""
    changes: dict[int, Tensor] = field(default_factory=dict)
    """By round, what it sent less that, along every number that trains."""
    claims: list[float] = field(default_factory=list)
    """The epsilon that came with each."""

    def active(self, round: int) -> bool:
        """Have the canaries a gradient in this round? In the client's first, third, ..."""
        earlier = sum(r < round for r in self.began)
        return self.view == "final" or earlier % 2 == 0

    def note(self, reply: RecordDict) -> None:
        """Read what leaves the client."""
        round, began = max(self.began.items())
        sent = unpack_factors(arrays_of(reply, "sent"), began.scale)
        self.changes[round] = self.flat(sent, began)
        claim: Any = metrics_of(reply, "metrics")["privacy.epsilon"]
        self.claims.append(float(claim))

    def flat(self, after: Factors, before: Factors) -> Tensor:
        """after - before along every number that trains; a step goes against the gradient."""
        parts = []
        for (column, name), shape in self.shapes.items():
            old, new = getattr(before, column)[name], getattr(after, column).get(name)
            if new is None:
                raise PrivacyError(f"{column} of {name} was trained, and is not in what came back")
            corner = tuple(slice(0, n) for n in shape)  # the server's may have a larger rank
            parts.append((new[corner].double() - old).flatten())
        return torch.cat(parts)

    def contrast(self) -> Tensor:
        """The mean change of the rounds with canaries, less that of the others."""
        total = torch.zeros(())
        for active, sign in ((True, 1), (False, -1)):
            if of := [x for r, x in self.changes.items() if self.active(r) is active]:
                total = total + sign * torch.stack(of).mean(0)
        return total


@dataclass
class Attack:
    """The canaries of a whole run, and what is seen of each client that took part."""

    canaries: Canaries
    view: str
    seen: dict[int, Seen] = field(default_factory=dict)

    def job(self) -> type[ClientJob]:
        """A client's work on its own rows and those of its canaries that are in."""
        attack, canaries = self, self.canaries

        class Canaried(ClientJob):
            def rows(self, part: str) -> Encoded:
                found = super().rows(part)
                if part != "train":
                    return found
                tokenizer = self.model().tokenizer
                words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
                return canaries.added(found, sorted(words), self.job.client)

            def trainer(self) -> Callable[..., Fit]:
                honest, round, client = super().trainer(), self.job.round, self.job.client
                C = self.config.privacy.clip_norm
                seen = attack.seen.setdefault(client, Seen(attack.view))

                def fit(model: Model, rows: Encoded, columns: frozenset[str], *args: Any) -> Fit:
                    live = model.trainable(columns)
                    seen.shapes = {(c, n): p.shape for c, ps in live.items() for n, p in ps.items()}
                    seen.began[round] = model.read()
                    params = [p for ps in live.values() for p in ps.values()]
                    active = seen.active(round)
                    with canaries.planted(model, params, rows, client, C, active):
                        return honest(model, rows, columns, *args)

                return fit

        return Canaried

    def watched(self, app: Any) -> Callable[[Message, Context], Message]:
        """The same app with canaries in it, whose updates are read as they leave."""
        job = self.job()

        def answer(message: Message, context: Context) -> Message:
            if message.metadata.message_type != "train":
                found: Message = app(message, context)
                return found
            content = train(message, context, job)
            self.seen[number_of(context)].note(content)
            return Message(content, reply_to=message)

        return answer

    def scores(self, final: Factors) -> Tensor:
        """One a canary, high for those that are in; 0 where their client never took part."""
        m = self.canaries.m
        found = torch.zeros(m, dtype=torch.float64)
        for client, seen in self.seen.items():
            change = seen.contrast() if self.view == "rounds" else seen.flat(
                final, seen.began[min(seen.began)])  # fmt: skip
            mine = self.canaries.of(client)
            scores = -change[mine * len(change) // m]
            found[mine] = scores / scores.std().clamp(min=1e-30)  # clients' steps differ in size
        return found


def audited(config: Config, view: str, fixed: Fixed) -> tuple[float, Guesses]:
    """The largest epsilon that a client claims after a whole run, and the guesses about canaries.

    Raises:
        PrivacyError: there is no claim to test, or nothing of one client to see.
    """
    from fedlora.launch.client_app import client_app

    check_audited(config, view)
    attack = Attack(Canaries(fixed.canaries, config.clients.count), view)
    shutil.rmtree(Path(config.run.out, config.run.name), ignore_errors=True)  # one that was begun
    app = attack.watched(client_app(value for _, value in named(config)))
    with grid_of(config, app) as grid:  # type: ignore[arg-type]
        server = FederatedLora(config)
        server.start(grid)
    claims = [claim for seen in attack.seen.values() for claim in seen.claims]
    final = server.setting.strategy.effective(server.run.state).factors
    made = Guesses.made(attack.scores(final), attack.canaries.is_in, fixed.guesses)
    return max(claims), made


def check_audited(config: Config, view: str) -> None:
    """Raises PrivacyError where a client claims nothing, or nothing of one is seen."""
    p = config.privacy
    if not p.by_example:
        raise PrivacyError(
            "the one-run audit tests what a client claims for each of its examples; here "
            f"privacy.level = {p.level!r}, privacy.epsilon = {p.epsilon:g}, "
            f'privacy.noise-multiplier = {p.noise_multiplier:g}: set level = "example" and one '
            "of the two"
        )
    if config.secure.aggregation and view == "rounds":
        raise PrivacyError(
            "secure.aggregation is on: no client's own updates are seen, so audit the final model"
        )


# -- what it can find -----------------------------------------------------------------------------


def power(
    config: Config, n: int, epsilon: float, view: str, fixed: Fixed, runs: int = 200
) -> tuple[float, float]:
    """Of a run whose epsilon is this: the bound in the median, and in nine of ten runs at least.

    Simulated: a canary's score is C for every step that drew it, and the noise of all steps, in the
    final model of all clients; what other rows do is left out. n: a client's examples.
    """
    p = PrivacyPlan.of(config, n)
    steps = p.steps * config.run.rounds
    sigma = calibrate(epsilon, config.privacy.delta, p.q, steps)
    drawn, others = (steps, config.clients.count) if view == "final" else (steps - steps // 2, 1)
    noise = sigma * (steps * others) ** 0.5
    rng = np.random.default_rng(0)
    right = []
    for _ in range(runs):
        is_in = rng.random(fixed.canaries) < 0.5
        signal = rng.binomial(drawn, p.q, fixed.canaries) * is_in
        scores = signal + noise * rng.standard_normal(fixed.canaries)
        made = Guesses.made(torch.from_numpy(scores), torch.from_numpy(is_in), fixed.guesses)
        right.append(made.right)
    of = {v: replace(made, right=v).bound(config.privacy.delta, fixed.confidence) for v in {*right}}
    bounds = [of[v] for v in right]
    return float(np.median(bounds)), float(np.quantile(bounds, 0.1))
