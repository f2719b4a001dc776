"""Members of a sum without a server, a model or messages: what one stage makes of another's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.federation.client.secure_client import SecureClient
from fedlora.federation.secure import masking
from fedlora.federation.secure.agreement import Agreement, MemberTable, RoundName, table_of
from fedlora.federation.secure.signing import RoundKeys
from fedlora.federation.secure.terms import Terms

NAME = RoundName("config", "run", 1, "start")
ALIKE = ("form", "content")
"""Digests of a download that is the same for all."""


def terms_of(cohort: int) -> Terms:
    return Terms(cohort, cohort, cohort // 2 + 1, 32, 8.0, 100)


def agreement_of(
    n: int, table: MemberTable | None = None, kinds: Mapping[int, int] | None = None
) -> Agreement:
    """What n members agree on, of kinds that send nothing unless a table says what they send."""
    made = table or table_of(({}, {}), ((), ()), kinds or dict.fromkeys(range(n), 0))
    return Agreement(NAME, terms_of(n), made, (ALIKE,) * len(made.shapes))


def begun(
    root: Path, agreements: Sequence[Agreement]
) -> tuple[list[SecureClient], dict[int, RoundKeys]]:
    """Members, each told of its own agreement, and their keys."""
    members = [SecureClient(root / str(i), i, NAME) for i in range(len(agreements))]
    keys = {m.me: m.setup(a, terms_of) for m, a in zip(members, agreements, strict=True)}
    return members, keys


def shared(
    members: Sequence[SecureClient], keys: Mapping[int, RoundKeys]
) -> dict[int, dict[int, bytes]]:
    """By member, the boxes that came for it."""
    boxes = {m.me: m.share(keys, terms_of) for m in members}
    return {i: {j: boxes[j][i] for j in boxes if j != i} for i in boxes}


def trio(
    root: Path, vector: masking.Words, n: int = 3, kinds: Mapping[int, int] | None = None
) -> tuple[list[SecureClient], list[Any]]:
    """Members that have sent the same vector, and what each sent."""
    members, keys = begun(root, [agreement_of(n, kinds=kinds)] * n)
    came = shared(members, keys)
    return members, [m.open(came[m.me], terms_of).masked(vector) for m in members]
