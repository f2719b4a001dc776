"""A policy's limits, held against what a server really sent and not what its job says of that."""

import math

from fedlora.config.policy import Policy
from fedlora.federation.client.admit import check
from fedlora.strategies.base import Download


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
