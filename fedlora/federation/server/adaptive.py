"""ranks.policy = "adaptive": the server shares each client's bytes out over the modules.

    D_m    = sum_i n_i (s_i B_i A_i - what client i began the round with)     in module m
    S_m    its singular values, the largest first; as updates come no more directions of D_m are
           held than any client may have ranks, so that a round costs no more for many clients
    gain   S_m[j]^2 / (d_m + k_m)     of rank j of module m: energy for a number sent; of ranks that
                                      did not train, that of the last that did
    r_m    1, and then the ranks of highest gain while sum_m r_m (d_m + k_m) <= b_i
    b_i    = r_i sum_m (d_m + k_m)    what LoRA of the client's own rank r_i sends

Every round begins with what the last one showed; the first has rank r_i in every module. No module
has more than GROWTH r_i, which is what the strategy's own factors have room for.

Source: the budget of AdaLoRA (Zhang et al., 2023, https://arxiv.org/abs/2303.10512), whose clients
would each prune other directions by their own gradients, and a mean over them would be of different
ones. So the server decides, from the mean. Differs from it: importance is the energy of the round's
mean change and no smoothed sensitivity of the loss; a module keeps one rank, or it would never be
seen again; the budget is the same in every round.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlora.federation.server.exchange import Received
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.ranks import ModuleRanks, roomy
from fedlora.federation.server.run import Setting
from fedlora.federation.server.screening import began
from fedlora.lora.adapter import Pair
from fedlora.lora.lowrank import compress, stack, svd
from fedlora.strategies.base import Client, Round, Upload
from fedlora.strategies.robust import change


def allocate(
    spectra: Mapping[str, Sequence[float]],
    sizes: Mapping[str, int],
    most: ModuleRanks,
    budget: int,
) -> dict[str, int]:
    """The rank of each module, within a budget of numbers; 1 in each whatever the budget is.

    spectra: singular values, the largest first; what lies beyond them counts as 0, and then the
    module of the lowest rank goes first. sizes: d + k. most: no module's rank is above it.
    """
    found = dict.fromkeys(sizes, 1)
    left = budget - sum(sizes.values())

    def next_of(m: str) -> tuple[float, int, str]:
        j, S = found[m], spectra.get(m, ())
        return (-(float(S[j]) ** 2) / sizes[m] if j < len(S) else 0.0, j, m)

    waiting = [next_of(m) for m in sizes if found[m] < most[m]]
    heapq.heapify(waiting)
    while waiting:
        _, _, m = heapq.heappop(waiting)
        if sizes[m] > left:
            continue  # smaller modules may still fit
        found[m] += 1
        left -= sizes[m]
        if found[m] < most[m]:
            heapq.heappush(waiting, next_of(m))
    return found


class AdaptiveRanks:
    """A round's mean change by module, and the next round's ranks from it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.mean: dict[str, Pair] = {}
        self.found: Mapping[str, Any] = {}

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        self.mean, self.found = {}, {}

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        strategy, planner = self.setting.strategy, self.setting.planner
        keep = planner.widest([*run.members.values()])
        for upload in uploads:
            start = began(strategy, run.state, upload, round)
            trained, before = (strategy.trained(run.state, x, round) for x in (upload, start))
            for m, pair in change(trained, before).items():
                sums = [self.mean[m]] if m in self.mean else []
                weights = [1.0] * len(sums) + [float(upload.num_examples)]
                self.mean[m] = compress(stack([*sums, pair], weights), keep[m])
            yield upload

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        spectra = {m: svd(pair)[1].tolist() for m, pair in self.mean.items()}
        planned = {m.rank: self.setting.planner.ranks(m) for m in before.members.values() if m.plan}
        plans = {
            rank: self._plan(spectra, rank, planned.get(rank))
            for rank in sorted({m.rank for m in after.members.values()})
        }
        self.found = {"ranks": {str(rank): plan for rank, plan in plans.items()}}
        members = {i: replace(m, plan=plans[m.rank]) for i, m in after.members.items()}
        return replace(after, members=members)

    def _plan(
        self, spectra: Mapping[str, Sequence[float]], rank: int, trained: ModuleRanks | None
    ) -> dict[str, int]:
        """The next ranks of clients of this rank, who trained these; None: their own in each."""
        shapes = self.setting.planner.shapes
        sizes, most = {m: s.d + s.k for m, s in shapes.items()}, roomy(shapes, rank)
        seen = {m: list(S[: trained[m] if trained else rank]) for m, S in spectra.items()}
        reckoned = {m: S + S[-1:] * (most[m] - len(S)) for m, S in seen.items()}
        return allocate(reckoned, sizes, most, rank * sum(sizes.values()))

    def record(self) -> Mapping[str, Any]:
        return self.found
