"""Who is asked for a sum, and what all of them are to agree on: before the first message.

kinds        the cohort by ranks and how each begins; the only client of its kind is left out
agreement    the table of the kinds, the terms, and digests of what each kind is sent
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedlora.errors import StrategyError
from fedlora.federation.secure.agreement import Agreement, RoundName, table_of
from fedlora.federation.secure.rules import unsummable
from fedlora.federation.secure.terms import Terms, neighbours
from fedlora.federation.secure.vector import Kind, kinds_of
from fedlora.federation.server.exchange import Received
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, base_number, cuts, message
from fedlora.federation.wire.certificate import masked_shapes, without_masked
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import Shapes
from fedlora.federation.wire.sent_digest import digest_of
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Client, Round
from fedlora.strategies.probing import begins_with_own, begun
from fedlora.training.certificate import names_of


@dataclass(frozen=True, slots=True)
class SecureCohort:
    """The clients of one sum, by kind."""

    kinds: Sequence[Kind]
    terms: Terms
    near: Mapping[int, set[int]]
    """By client, who holds shares of its secrets, itself among them."""

    @property
    def client(self) -> dict[int, Client]:
        """By number."""
        return {c.id: c for kind in self.kinds for c in kind.clients}

    @property
    def kind_of(self) -> dict[int, int]:
        return {c.id: n for n, kind in enumerate(self.kinds) for c in kind.clients}

    @property
    def ids(self) -> list[int]:
        return sorted(self.client)

    @classmethod
    def of(
        cls,
        setting: Setting,
        session: Session,
        run: Saved,
        cohort: Iterable[Client],
        round: Round,
        received: Received,
    ) -> "SecureCohort":
        """The cohort, without those that are alone of their kind; they are refused.

        All of a kind are sent the same: what one that has nothing lacks.

        Its terms may have a `problem`, where too few are left.
        """
        base = base_number(setting, run.state)
        alike, own = _alike(setting, session, run, [*cohort], round)
        found = kinds_of((_sends(setting, session, run, c, base, round) for c in alike), own)
        together = setting.config.secure.colluding + 2
        for kind in found:
            for client in kind.clients if len(kind.clients) < together else ():
                reason = alone(len(kind.clients), together, "in this round")
                received.refuse(client.id, round, Refusal(FailureKind.ONLY_OF_ITS_RANKS, reason))
        kinds = [kind for kind in found if len(kind.clients) >= together]
        ids = sorted(c.id for kind in kinds for c in kind.clients)
        terms = Terms.of(setting.config, len(ids))
        return cls(kinds, terms, neighbours(ids, terms.shares, round))

    def agreement(self, setting: Setting, session: Session, run: Saved, round: Round) -> Agreement:
        """What all of them are to agree on.

        Raises:
            StrategyError: the strategy needs more than sums, or sends clients of one form different
                models, which no member goes along with.
        """
        self._check(setting, session, run, round)
        trains = [
            setting.strategy.download(run.state, kind.clients[0], round).trainable
            for kind in self.kinds
        ]
        shapes, own = [kind.shapes for kind in self.kinds], [kind.own for kind in self.kinds]
        table = table_of(shapes, trains, self.kind_of, own)
        sent = [
            {digest_of(message(setting, session, run, c, round, "train").content)
             for c in kind.clients}
            for kind in self.kinds
        ]  # fmt: skip
        forms = {x for kind in sent for x in kind}
        if any(len(kind) > 1 for kind in sent) or len(dict(forms)) != len(forms):
            raise StrategyError(
                f"secure.aggregation: {type(setting.strategy).__name__} sends clients different "
                "models of one form, and clients take part only where all are sent the same"
            )
        start = session.incarnation, session.since
        name = RoundName(setting.config.digest(), run.token, round.number, *start)
        return Agreement(name, self.terms, table, tuple(x for (x,) in sent))

    def _check(self, setting: Setting, session: Session, run: Saved, round: Round) -> None:
        """Does the strategy go on sums? Measured once for each set of tensors that it asks for."""
        asked = tuple(tuple(sorted(kind.shapes.items())) for kind in self.kinds)
        if asked in session.summable:
            return
        kinds = [replace(kind, shapes=without_masked(kind.shapes)) for kind in self.kinds]
        if reason := unsummable(setting.strategy, run.state, kinds, round):
            raise StrategyError(reason)
        session.summable.add(asked)


def alone(there: int, together: int, when: str) -> str:
    """Why a client is left out of a sum in which so few of its kind would be."""
    kind = "of its ranks that begins as it does (anew, or with what it kept)"
    if there == 1:
        return f"it is the only one {when} {kind}: its update would be no sum"
    return (
        f"it is one of {there} {when} {kind}, and it takes {together} (secure.colluding): "
        "their sum would be no secret of clients that help the server"
    )


def _alike(
    setting: Setting, session: Session, run: Saved, cohort: Sequence[Client], round: Round
) -> tuple[list[Client], set[int]]:
    """The clients as if they had nothing; and who of them begins with what it kept all the same.

    Sent what it alone lacks, a client could be sent what its server likes; and what others have was
    sent in rounds of other members.
    """
    if run.base_offset or base_number(setting, run.state):
        session.lacking |= {c.id for c in cohort}
    alike = [replace(c, base_version=0, has_memory=False) for c in cohort]
    remember = [c for c in cohort if c.has_memory]
    if not remember:
        return alike, set()
    strategy, one = setting.strategy, replace(remember[0], base_version=0)
    came = strategy.download(run.state, replace(one, has_memory=False), round)
    _, kept = strategy.upload(begun(strategy, run.state, one, round), Factors())
    own = begins_with_own(strategy, came, kept, one, round)
    return alike, {c.id for c in remember if own}


def _sends(
    setting: Setting, session: Session, run: Saved, c: Client, base: int, round: Round
) -> tuple[Client, Shapes, Mapping[str, float]]:
    """A client, what it sends, the certificate's changes with it, and at which scales."""
    shapes, scale = session.schemas.of(run.state, c, base, round)
    ranks = {m: layer.rank for m, layer in c.layers.items()}
    cut = cuts(setting, run)
    others = [] if cut else [name for column, name in shapes if column == "other"]
    return c, {**shapes, **masked_shapes(names_of(ranks, others, cut))}, scale
