"""What all members of a sum are told alike, so that a server cannot tell each another story.

    MemberTable   who is asked, which kind each is of, and which tensors a kind sends and trains

A member works the vector's layout out of the table itself, finds its own entry true, and mixes the
table's digest into every pair's mask: the masks of members who were told different tables never
cancel, and the sum stays noise.

Formal guarantee
    Of a sum that comes out, every member in it saw one table, in which `TOGETHER` clients at least
    send each tensor and train the same columns. That so many of them are in the sum the members
    see where each is every other's neighbour (secure.num-shares = 0), and on a ring not; nor is
    who dropped out agreed among them. What a server may still do is to say so of clients that did
    not, to send crafted weights, or to name clients that are its own: docs/privacy/index.md.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.federation.secure.rules import TOGETHER
from fedlora.federation.secure.terms import Terms
from fedlora.federation.secure.vector import Layout
from fedlora.federation.wire.messages import Shapes


@dataclass(frozen=True, slots=True)
class MemberTable:
    """The kinds of clients of one round."""

    shapes: tuple[Shapes, ...]
    """By kind, of what it sends."""
    trains: tuple[tuple[str, ...], ...]
    """By kind, the columns it trains, sorted."""
    kinds: Mapping[int, int]
    """By client, its kind."""

    @property
    def layout(self) -> Layout:
        return Layout.over(self.shapes)

    def record(self) -> str:
        """As text, the same for equal tables."""
        shapes = [
            sorted([column, name, list(shape)] for (column, name), shape in kind.items())
            for kind in self.shapes
        ]
        kinds = sorted(self.kinds.items())
        return json.dumps([shapes, [list(c) for c in self.trains], kinds], separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> "MemberTable":
        """The inverse.

        Raises:
            PrivacyError: it is none.
        """
        try:
            shapes, trains, kinds = json.loads(text)
            return cls(
                tuple({(c, n): tuple(map(int, s)) for c, n, s in kind} for kind in shapes),
                tuple(tuple(map(str, columns)) for columns in trains),
                {int(i): int(kind) for i, kind in kinds},
            )
        except (TypeError, ValueError) as e:
            raise PrivacyError.public(f"the table of who sends what does not read: {e}") from None

    def digest(self, terms: Terms, round: int, incarnation: str) -> bytes:
        """32 bytes that stand for the table, the terms and the round."""
        told = json.dumps([self.record(), asdict(terms), round, incarnation], sort_keys=True)
        return hashlib.sha256(told.encode()).digest()

    def check(
        self, me: int, sends: Shapes, trains: Collection[str], near: Collection[int], cohort: int
    ) -> int:
        """This member's kind, where all that it can know of the table is so.

        near: the members whose keys it was shown. cohort: how many it was told there are.

        Raises:
            PrivacyError: its entry is not what it sends or trains, or it would send alone.
        """
        if len(self.kinds) != cohort or not {me, *near} <= self.kinds.keys():
            raise PrivacyError.public("the table is not of the clients that this one was shown")
        kind = self.kinds[me]
        if not 0 <= kind < len(self.shapes) or len(self.trains) != len(self.shapes):
            raise PrivacyError.public("the table has no such kind as it says this client is of")
        if dict(self.shapes[kind]) != dict(sends) or set(self.trains[kind]) != set(trains):
            raise PrivacyError.public(
                "the table says that this client sends or trains something else"
            )
        alone = [i for i, n in Counter(self.kinds.values()).items() if n < TOGETHER]
        if alone:
            raise PrivacyError.public("the table has a client that would send alone")
        return kind


def table_of(
    shapes: Sequence[Shapes], trains: Sequence[Collection[str]], kinds: Mapping[int, int]
) -> MemberTable:
    """The table of a round, from the kinds in their order."""
    return MemberTable(tuple(shapes), tuple(tuple(sorted(c)) for c in trains), dict(kinds))


def same_shapes(sent: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], tuple[int, ...]]:
    """The shapes of tensors by column and name."""
    return {key: tuple(x.shape) for key, x in sent.items()}
