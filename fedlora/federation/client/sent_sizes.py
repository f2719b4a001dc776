"""A policy's limits, held against what a server really sent and not what its job says of that."""

import math

from fedlora.config.policy import Policy
from fedlora.federation.client.admit import check
from fedlora.federation.client.limits import check_upload
from fedlora.federation.secure.agreement import MemberTable
from fedlora.strategies.base import Download

WORD = 4
"""Bytes of a masked number, at least."""


def check_download(policy: Policy | None, download: Download) -> None:
    """Nothing, where the factors are of ranks and modules that the policy allows.

    Raises:
        PolicyError: they are not.
    """
    if not policy:
        return
    against, sent, limits = [], download.send, policy.limits
    sizes = [x.shape[:1] for x in sent.A.values()]  # (r, k)
    sizes += [x.shape[1:] for x in sent.B.values()]  # (d, r)
    sizes += [x.shape[:-1] for x in sent.R.values()]  # (r, r), or in h blocks (h, r / h, r / h)
    if (rank := max(map(math.prod, sizes), default=0)) > limits.rank:
        against.append(("the ranks", f"{rank} is sent, limits.rank = {limits.rank}"))
    if (modules := len({*sent.A, *sent.B, *sent.R})) > limits.modules:
        against.append(("so many modules", f"{modules}, limits.modules = {limits.modules}"))
    check(against)


def check_modules(policy: Policy | None, modules: int) -> None:
    """Nothing, where the policy allows so many adapted modules of the model as it is loaded.

    Raises:
        PolicyError: they are more.
    """
    if policy and modules > (most := policy.limits.modules):
        check([("so many modules", f"{modules}, limits.modules = {most}")])


def check_vector(policy: Policy | None, table: MemberTable) -> None:
    """Nothing, where a masked vector of all that the table names may leave.

    What other kinds send has its places in it, and so masks are drawn for as many as a server says.

    Raises:
        PolicyError: it is larger than what may.
    """
    if policy:
        numbers = sum(abs(math.prod(shape)) for shape in table.layout.shapes.values())
        check_upload(policy.limits, WORD * numbers)
