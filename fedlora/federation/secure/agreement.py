"""What all members of a sum are told alike, so that a server cannot tell each another story.

    MemberTable   who is asked, which kind each is of, what a kind sends and trains, how it begins
    Agreement     the table, which run and round, the terms, and what each kind is sent: one digest

A member derives what it can itself (run, config, terms), finds its own entry true (what it sends,
trains, begins with and was sent), signs the digest beside its keys, and mixes it into every pair's
mask: the masks of members who were told different things never cancel, and the sum stays noise. The
certificate's probes are drawn from the digest, too.

Formal guarantee
    Of a sum that comes out, every member in it saw one agreement, in which `terms.together` clients
    at least send each tensor, train the same columns and are sent the same, bit by bit.
    That so many of them are in the sum the members see where each is every other's neighbour
    (secure.num-shares = 0), and on a ring not. What a server may still do is to say of clients that
    are its own what it likes, to send kinds different models, or all of them a crafted one:
    docs/privacy/secure-aggregation.md.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.federation.secure.signing import HEAD
from fedlora.federation.secure.terms import Terms
from fedlora.federation.secure.vector import Layout
from fedlora.federation.wire.messages import Shapes
from fedlora.federation.wire.sent_digest import Sent


@dataclass(frozen=True, slots=True)
class MemberTable:
    """The kinds of clients of one round."""

    shapes: tuple[Shapes, ...]
    """By kind, of what it sends."""
    trains: tuple[tuple[str, ...], ...]
    """By kind, the columns it trains, sorted."""
    own: tuple[bool, ...]
    """By kind, whether it begins with something that it kept and nobody sent it."""
    kinds: Mapping[int, int]
    """By client, its kind."""

    @property
    def layout(self) -> Layout:
        return Layout.over(self.shapes)

    def tree(self) -> list[Any]:
        """As lists, the same for equal tables."""
        shapes = [
            sorted([column, name, list(shape)] for (column, name), shape in kind.items())
            for kind in self.shapes
        ]
        return [
            shapes,
            [list(c) for c in self.trains],
            [*self.own],
            [list(x) for x in sorted(self.kinds.items())],
        ]

    @classmethod
    def of(cls, tree: Any) -> "MemberTable":
        """The inverse; raises TypeError or ValueError where it is none."""
        shapes, trains, own, kinds = tree
        return cls(
            tuple({(str(c), str(n)): tuple(map(int, s)) for c, n, s in kind} for kind in shapes),
            tuple(tuple(map(str, columns)) for columns in trains),
            tuple(map(bool, own)),
            {int(i): int(kind) for i, kind in kinds},
        )

    def check(self, me: int, together: int) -> None:
        """Raises PrivacyError where it is no table, or fewer than `together` are of one kind."""
        if not len(self.trains) == len(self.own) == len(self.shapes) or not all(
            0 <= kind < len(self.shapes) for kind in self.kinds.values()
        ):
            raise PrivacyError.public("the table has no such kind as it says a client is of")
        if me not in self.kinds:
            raise PrivacyError.public("the table is not of the clients that this one is among")
        if any(n < together for n in Counter(self.kinds.values()).values()):
            raise PrivacyError.public(
                f"the table has fewer than {together} clients of one kind: what only they send "
                "would be no sum, or one with clients that help the server (secure.colluding)"
            )

    def check_own(self, me: int, sends: Shapes, trains: Collection[str], own: bool) -> int:
        """This member's kind, where the table says of it what is so.

        own: does it begin with something that it kept?

        Raises:
            PrivacyError: it says that it sends or trains something else, or begins otherwise.
        """
        kind = self.kinds[me]
        if dict(self.shapes[kind]) != dict(sends) or set(self.trains[kind]) != set(trains):
            raise PrivacyError.public(
                "the table says that this client sends or trains something else"
            )
        if self.own[kind] != own:
            raise PrivacyError.public(
                "the table says that this client begins with what it kept, or not, and that is "
                "not so"
            )
        return kind


@dataclass(frozen=True, slots=True)
class RoundName:
    """Which round of which run, in one start of its server."""

    config: str
    """The digest of the run's config: see `Config.digest`."""
    run: str
    round: int
    incarnation: str
    since: int = 0
    """When that start of the server began, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """All that the members of one round agree on."""

    name: RoundName
    terms: Terms
    table: MemberTable
    sent: tuple[Sent, ...]
    """By kind, digests of what its clients are sent, each the same."""

    def record(self) -> str:
        """As text, the same for equal agreements."""
        sent = [list(x) for x in self.sent]
        tree = [*HEAD, "agreement", asdict(self.name), asdict(self.terms), self.table.tree(), sent]
        return json.dumps(tree, sort_keys=True, separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> "Agreement":
        """The inverse.

        Raises:
            PrivacyError: it is none, or of another version of the protocol.
        """
        try:
            *head, what, name, terms, table, sent = json.loads(text)
            if [*head, what] != [*HEAD, "agreement"]:
                raise PrivacyError.public(
                    f"the server speaks another version of secure aggregation than {HEAD[1]}; use "
                    "one version of fedlora everywhere"
                )
            found = cls(
                RoundName(str(name["config"]), str(name["run"]), int(name["round"]),
                          str(name["incarnation"]), int(name["since"])),
                Terms(**{f.name: _number(terms[f.name]) for f in fields(Terms)}),
                MemberTable.of(table),
                tuple((str(form), str(content)) for form, content in sent),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as e:
            raise PrivacyError.public(f"what all are to agree on does not read: {e}") from None
        if found.record() != text:
            raise PrivacyError.public("what all are to agree on is not written as it must be")
        return found

    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        return hashlib.sha256(self.record().encode()).digest()

    @property
    def probes(self) -> str:
        """The key that the certificate's signs are drawn from: a digest of what is agreed.

        Of all but the names of the run and of its server's start, which chance draws: a run that
        is repeated measures the same numbers.
        """
        again = replace(self, name=replace(self.name, run="", incarnation="", since=0))
        return f"certificate/{again.digest().hex()}"

    def check(self, me: int, name: RoundName, terms: Terms, together: int = 0) -> None:
        """Nothing, where all that a member can derive itself is so.

        together: how many of one kind the member demands, where that is more than the terms do.

        Raises:
            PrivacyError: it is not: the agreement is of another run or round, its terms are not
                those of the config, a client would send alone, or two kinds whose downloads have
                one form are sent different ones.
        """
        if self.name != name:
            raise PrivacyError.public("what all are to agree on is of another run, round or config")
        self.table.check(me, max(terms.together, together))
        if self.terms != terms or terms.cohort != len(self.table.kinds):
            raise PrivacyError.public("the terms of the sum are not those of the run's config")
        if reason := terms.problem():
            raise PrivacyError.public(reason)
        if len(self.sent) != len(self.table.shapes):
            raise PrivacyError.public("the table does not say what each kind is sent")
        if len(dict(self.sent)) != len({*self.sent}):
            raise PrivacyError.public(
                "kinds are sent different models of one form: a server that trains some clients on "
                "a model of their own can read their sum"
            )

    def check_sent(self, me: int, came: Sent) -> None:
        """Raises PrivacyError where a member was sent something else than the others were told."""
        if self.sent[self.table.kinds[me]] != came:
            raise PrivacyError.public(
                "this client was sent something else than all members were told that it is sent"
            )


def table_of(
    shapes: Sequence[Shapes],
    trains: Sequence[Collection[str]],
    kinds: Mapping[int, int],
    own: Sequence[bool] = (),
) -> MemberTable:
    """The table of a round, from the kinds in their order. own: by default of none."""
    begins = (*own,) or (False,) * len(shapes)
    return MemberTable(tuple(shapes), tuple(tuple(sorted(c)) for c in trains), begins, dict(kinds))


def same_shapes(sent: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], tuple[int, ...]]:
    """The shapes of tensors by column and name."""
    return {key: tuple(x.shape) for key, x in sent.items()}


def _number(x: Any) -> Any:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError("a term is no number")
    return x
