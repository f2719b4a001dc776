"""The server's side of rank policies: what each client adapts this round, and what it took.

    planner.welcome(i, facts)             a client that was met, with its rank
    planner.replan(members)               before each round; moves nobody but under legend. What
                                          moves them under adaptive is a stage of the round
    planner.spent(i, round, facts)        virtual seconds, where there is a device model
    planner.learned(member, facts, spent) the member with its times brought up to date

Plans and times are part of the members, and so of the checkpoint. Without a device model the time
on the wire is what a reply took beyond its client's own work: on LocalGrid with fewer workers than
clients that includes the wait for a worker, so plan by `devices.classes` there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from fedlora.config.reader import Config
from fedlora.federation.server.devices import Devices, Spent, Work, operations, parse_classes
from fedlora.federation.server.journal import Member
from fedlora.federation.server.ranks import (
    CORES,
    Legend,
    ModuleRanks,
    Timing,
    able,
    by_depth,
    parse_shares,
    patterned,
    roomy,
    shared_out,
)
from fedlora.strategies.base import Client
from fedlora.training.data.sites import ranks_of
from fedlora.training.model.layers import depth_of
from fedlora.training.model.model import Model


class Planner:
    """The config's rank policy and device model, over one model's modules."""

    def __init__(self, config: Config, model: Model) -> None:
        self.config = config
        self.shapes = model.shapes
        self.layers = by_depth({m: depth_of(m) for m in model.shapes})
        self.legend = self._legend() if config.ranks.policy == "legend" else None
        self.devices = self._devices(model) if config.devices.classes else None
        self.stated = [*ranks_of(config.data)]
        self.at(1)  # an error in lora.rank-pattern is one now

    # -- ranks --------------------------------------------------------------------------------

    def welcome(self, i: int, facts: Mapping[str, Any]) -> Member:
        """A new member, at the rank that the policy and the node's own facts give it."""
        cap = int(facts.get("layers", 0))
        if self.devices:
            cap = min((c for c in (cap, self.devices.of(i).layers) if c), default=0)
        if self.legend:
            plan = self.legend.plan(self.legend.deepest(cap))
            return Member(i, max(plan.values()), plan=plan, cap=cap)
        return Member(i, self._rank(i, facts), cap=cap)

    def ranks(self, member: Member) -> ModuleRanks:
        """Module to rank: what the member adapts now."""
        return member.plan or self.at(member.rank)

    def at(self, rank: int) -> ModuleRanks:
        """Module to rank for a client of this rank, with lora.rank-pattern applied."""
        return patterned(self.shapes, rank, self.config.lora.rank_pattern)

    def widest(self, members: Sequence[Member]) -> ModuleRanks:
        """The largest rank of every module over the run: what the strategy begins with."""
        if self.legend:
            return self.legend.plan(len(self.layers))
        top = max(m.rank for m in members)
        return roomy(self.shapes, top) if self.config.ranks.policy == "adaptive" else self.at(top)

    def replan(self, members: Mapping[int, Member]) -> dict[int, Member]:
        """The members with this round's depths."""
        if not self.legend:
            return dict(members)
        known = {i: Timing(**m.timing) for i, m in members.items() if m.timing}
        until = self.legend.deadline(known, {i: m.cap for i, m in members.items()})
        return {
            i: replace(m, plan=self.legend.plan(self.legend.depth(known.get(i), m.cap, until)))
            for i, m in members.items()
        }

    # -- times --------------------------------------------------------------------------------

    def spent(
        self, client: Client, round: int, facts: Mapping[str, Any]
    ) -> tuple[Spent, Work] | None:
        """What the round took on the client's virtual device; None without a device model."""
        if self.devices is None:
            return None
        numbers = sum(x.rank * (x.d + x.k) for x in client.layers.values())
        work = Work(
            tokens=int(facts.get("tokens") or 0) or self._tokens(facts),
            depth=self.passed(client.layers),
            bytes_down=facts["bytes_down"],
            bytes_up=facts["bytes_up"],
            numbers_up=numbers,
        )
        return self.devices.spent(client.id, round, work), work

    def passed(self, modules: Mapping[str, Any]) -> int:
        """Layers that a gradient passes through: from the first with an adapter to the last."""
        first = next((n for n, group in enumerate(self.layers) if modules.keys() & set(group)), 0)
        return self.depth_above[first]

    @cached_property
    def depth_above(self) -> list[int]:
        """By group of modules, the model's layers from it to the output."""
        depths = [min((d for m in group if (d := depth_of(m)) is not None), default=0)
                  for group in self.layers]  # fmt: skip
        return [depths[-1] + 1 - d for d in depths]

    def learned(self, member: Member, facts: Mapping[str, Any], virtual: Any) -> Member:
        """The member with its times brought up to date by a round's."""
        if not self.legend:
            return member
        if virtual:
            spent, work = virtual
            seen = spent.timing(work)
        elif facts.get("backward_seconds"):
            depth = self.passed(self.ranks(member))
            moved = (facts["bytes_down"] + facts["bytes_up"]) / 4
            took = facts["elapsed_seconds"]  # no part of it took longer, whatever is told
            told = ("seconds", "forward_seconds", "backward_seconds")
            whole, forward, backward = (min(facts.get(x) or 0.0, took) for x in told)
            seen = Timing(forward, backward / depth, (took - whole) / moved)
        else:
            return member
        old = Timing(**member.timing) if member.timing else seen
        return replace(member, timing=asdict(old.learn(seen, self.config.ranks.memory)))

    # -- inside -------------------------------------------------------------------------------

    def _rank(self, i: int, facts: Mapping[str, Any]) -> int:
        ranks, c = self.config.clients.ranks, self.config.ranks
        most = max(*ranks, *self.stated, c.cap)  # a node's word makes nobody's model larger
        stated = min(int(facts.get("rank", 0)), most)
        stated = stated or (self.stated[i] if i < len(self.stated) else 0)
        if c.policy == "share":
            return self._shared[i % len(self._shared)]
        if c.policy == "capability":
            cores = float(facts.get("cores", 1))
            if self.devices:
                cores = CORES * self.devices.of(i).compute
            return able(ranks, stated, cores, c.per_core, c.cap)
        return stated or ranks[i % len(ranks)]

    @cached_property
    def _shared(self) -> list[int]:
        shares = parse_shares(self.config.ranks.shares)
        return shared_out(shares, self.config.clients.count, self.config.run.seed)

    def _legend(self) -> Legend:
        r = self.config.ranks
        sizes = {m: s.d + s.k for m, s in self.shapes.items()}
        return Legend(self.layers, sizes, r.low, r.step, r.budget, r.quantile)

    def _devices(self, model: Model) -> Devices:
        d = self.config.devices
        forward, backward = operations(model.peft.get_base_model(), depth_of)
        classes, seed = parse_classes(d.classes), self.config.run.seed
        return Devices(classes, d.gflops, d.jitter, seed, forward, backward)

    def _tokens(self, facts: Mapping[str, Any]) -> int:
        """Where a client does not say, the most its steps can have held."""
        return (
            int(facts.get("steps") or 0)
            * self.config.train.step_size
            * (self.config.data.max_length)
        )
