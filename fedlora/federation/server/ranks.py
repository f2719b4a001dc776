"""Rank policies: which client trains which rank in which layers. Lists, shares, capability, LEGEND.

    list         clients.ranks, cycled over the clients; a node's own `rank` goes first
    share        the ranks of ranks.shares in those shares of the clients, dealt out by the seed
    capability   a node's own `rank`, else what its cores allow; at most ranks.cap
    legend       the last K_i layers, at ranks that grow with depth; K_i from measured times
    adaptive     by module, what a client's own rank costs shared out anew each round: adaptive.py

LEGEND: Liu et al., "Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices",
https://arxiv.org/abs/2412.20004. There is no public code; only its ideas are taken from the paper
(adapters in the last K_i layers, one common rank rule that grows toward the output, each layer
averaged over those that hold it, capacities estimated online). The rest is a reconstruction:

    r_l    = low + step l                         layer l of L, the same on every client
    t_i(K) = f_i + K mu_i + beta_i sum_{l >= L-K} r_l c_l        c_l = sum of d + k in layer l
    K_max  = the largest K that the client's memory allows and with sum r_l <= budget
    T*     = the `quantile` of t_i(K_max) over the clients; 0 is the fastest
    K_i    = the largest K <= K_max with t_i(K) <= T*, and at least 1

f_i is a round's forward time, mu_i its backward time a layer, beta_i seconds a number sent; each
is an exponential mean over the rounds, x <- rho x + (1 - rho) x_seen. A client that was not seen
yet trains K_max layers. All layers have one scale, alpha / r of the last one.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fedlora.errors import ConfigError

ModuleRanks = Mapping[str, int]
"""Module path to rank: what one client adapts."""

BY_MODULE = ("legend", "adaptive")
"""Policies under which what a client adapts changes from round to round."""
CORES = 4
"""Cores that a device class of compute 1 counts as."""


def shared_out(shares: Mapping[int, float], count: int, seed: int) -> list[int]:
    """A rank for each of `count` clients, as near to the shares as whole clients allow.

    Every client gets one: what rounding leaves over goes to the largest remainders.
    """
    total = sum(shares.values())
    exact = {rank: count * share / total for rank, share in shares.items()}
    dealt = {rank: math.floor(x) for rank, x in exact.items()}
    by_rest = sorted(exact, key=lambda r: dealt[r] - exact[r])
    for rank in by_rest[: count - sum(dealt.values())]:
        dealt[rank] += 1
    ranks = [rank for rank, n in dealt.items() for _ in range(n)]
    random.Random(seed).shuffle(ranks)
    return ranks


def able(ranks: Sequence[int], stated: int, cores: float, per_core: int, cap: int) -> int:
    """The node's stated rank, else the largest of `ranks` within per_core * cores; capped."""
    fitting = [r for r in ranks if r <= per_core * cores]
    rank = stated or max(fitting, default=min(ranks))
    return min(rank, cap) if cap else rank


GROWTH = 2
"""Under adaptive no module has more than this times the client's rank."""


def roomy(shapes: Mapping[str, Any], rank: int) -> dict[str, int]:
    """Under adaptive, the most that each module may have for a client of this rank.

    shapes: by module, with its d and k.
    """
    return {m: min(GROWTH * rank, s.d, s.k) for m, s in shapes.items()}


def patterned(modules: Iterable[str], rank: int, pattern: Sequence[str]) -> dict[str, int]:
    """`rank` in every module, or that of the first "regex=rank" that matches the module.

    As PEFT's rank_pattern: the expression must match the module's path, or the end of it that
    follows a dot.

    Raises:
        ConfigError: an expression is none, a rank is no positive number, or a part matches nothing.
    """
    rules = parse_pattern(pattern)
    found, used = {}, set()
    for m in modules:
        part = next((p for p, (rule, _) in rules.items() if rule.fullmatch(m)), None)
        found[m] = rank if part is None else rules[part][1]
        used |= {part}
    if missed := [p for p in pattern if p not in used]:
        raise ConfigError(
            [
                f"lora.rank-pattern: {missed[0]!r} is the first match of no adapted module; the "
                f"modules are {', '.join(found)}"
            ]
        )
    return found


def parse_pattern(pattern: Sequence[str]) -> dict[str, tuple[re.Pattern[str], int]]:
    """Each part "regex=rank" of lora.rank-pattern, with what it matches and the rank.

    Raises:
        ConfigError: an expression is none, or a rank is no positive number.
    """
    rules = {}
    for part in pattern:
        expression, _, number = part.rpartition("=")
        try:
            rules[part] = re.compile(rf"(.*\.)?({expression})"), int(number)
        except (re.error, ValueError):
            rules[part] = re.compile(""), 0
        if rules[part][1] < 1:
            raise ConfigError(
                [f"lora.rank-pattern: {part!r} must be a regular expression, '=' and a positive "
                 "rank, as in 'value=8'"]
            )  # fmt: skip
    return rules


def parse_shares(parts: Sequence[str]) -> dict[int, float]:
    """("4:0.5", "16:0.5") as rank to share.

    Raises:
        ConfigError: a part is not "rank:share" of positive numbers.
    """
    found: dict[int, float] = {}
    for part in parts:
        rank, _, share = part.partition(":")
        try:
            found[int(rank)] = float(share)
        except ValueError:
            found[0] = 0.0
    if not found or min(found) < 1 or min(found.values()) <= 0:
        raise ConfigError(
            [f'ranks.shares = "{",".join(parts)}": must be rank:share, as in "4:0.5,8:0.5"']
        )
    return found


@dataclass(frozen=True, slots=True)
class Timing:
    """What a client's rounds take, in seconds."""

    forward: float
    """A round's forward passes."""
    backward: float
    """A round's backward passes, a layer."""
    upload: float
    """One number sent."""

    def learn(self, seen: "Timing", rho: float) -> "Timing":
        """The moving average: rho of this plus 1 - rho of what was seen."""
        return Timing(
            *(rho * getattr(self, f.name) + (1 - rho) * getattr(seen, f.name) for f in fields(self))
        )


@dataclass(frozen=True, slots=True)
class Legend:
    """The rank rule over a model's layers, and the depths that clients' times allow."""

    layers: Sequence[Sequence[str]]
    """The adaptable modules of each layer, the first layer first."""
    sizes: Mapping[str, int]
    """d + k of each module."""
    low: int = 4
    step: float = 1.0
    budget: int = 0
    quantile: float = 0.0

    def rank(self, layer: int) -> int:
        return int(self.low + self.step * layer)

    def plan(self, depth: int) -> dict[str, int]:
        """The modules of the last `depth` layers, at their ranks."""
        return {m: self.rank(n) for n in self._last(depth) for m in self.layers[n]}

    def deepest(self, cap: int = 0) -> int:
        """K_max: within `cap` layers (0: all) and the budget; at least 1."""
        depth = 1
        while depth < min(cap or len(self.layers), len(self.layers)):
            if self.budget and sum(map(self.rank, self._last(depth + 1))) > self.budget:
                break
            depth += 1
        return depth

    def seconds(self, timing: Timing, depth: int) -> float:
        """t_i(K)."""
        sent = sum(r * self.sizes[m] for m, r in self.plan(depth).items())
        return timing.forward + depth * timing.backward + timing.upload * sent

    def deadline(self, timings: Mapping[int, Timing], caps: Mapping[int, int]) -> float:
        """T* over the clients that were seen; infinite before any was."""
        full = sorted(self.seconds(t, self.deepest(caps.get(i, 0))) for i, t in timings.items())
        return full[int(self.quantile * (len(full) - 1))] if full else math.inf

    def depth(self, timing: Timing | None, cap: int, deadline: float) -> int:
        """K_i."""
        deepest = self.deepest(cap)
        if timing is None:
            return deepest
        within = (k for k in range(deepest, 1, -1) if self.seconds(timing, k) <= deadline)
        return next(within, 1)

    def _last(self, depth: int) -> Iterator[int]:
        return iter(range(max(0, len(self.layers) - depth), len(self.layers)))


def by_depth(depths: Mapping[str, int | None]) -> list[list[str]]:
    """Modules grouped by layer, the first first; what lies in none goes with the last."""
    found = sorted({d for d in depths.values() if d is not None}) or [0]
    groups: dict[int, list[str]] = {d: [] for d in found}
    for m, d in depths.items():
        groups[found[-1] if d is None else d].append(m)
    return [groups[d] for d in found]


def waiting(seconds: Sequence[float]) -> float:
    """mean_i (max_j t_j - t_i): what LEGEND sets out to lower."""
    return max(seconds) - sum(seconds) / len(seconds) if seconds else 0.0
