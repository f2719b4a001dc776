"""Headline claims of the seed systems on the linear teacher, ten seeds each: seconds on one core.

    python -m benchmarks.claims

The teacher is that of `fedlora compare synthetic`: six clients that differ, a squared loss, a best
model that is known. No transformer: what holds here is what the method's algebra does to training,
and says nothing of accuracy. An arm's rate is the best of RATES in the mean of the CHOICE seeds,
which no claim counts. "excess" is the avoidable loss that is left: 0 is the best single model,
1 the untrained one; "own" the same of the model that each client holds, on its own rows.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats

from fedlora.launch.simulate.synthetic import Outcome, clients_of, play
from fedlora.launch.simulate.teacher import make_task
from fedlora.strategies import STRATEGIES
from fedlora.strategies.fedsb import FedSB
from fedlora.strategies.lora_fair import LoRAFair
from fedlora.training.train import threads

SEEDS, CHOICE = tuple(range(10)), (1000, 1001)
RATES = (0.01, 0.03, 0.1)
ROUNDS, STEPS, UNLIKE = 15, 5, 0.5
"""Rounds, local steps, and how much the clients' teachers differ."""
MIXED = (1, 2, 4)


@dataclass(frozen=True)
class Arm:
    """One way to train: a strategy, the clients' ranks, how often they meet."""

    name: str
    strategy: Any = None
    ranks: Sequence[int] = (4,)
    rounds: int = ROUNDS
    steps: int = STEPS

    def run(self, seed: int, rate: float) -> Outcome:
        strategy = self.strategy or STRATEGIES[self.name]()
        task = make_task(seed, UNLIKE)
        return play(self.name, strategy, task, clients_of(self.ranks), self.rounds, self.steps,
                    rate, seed)  # fmt: skip


ARMS: Mapping[str, Arm] = {
    "central": Arm("fedavg", rounds=ROUNDS * STEPS, steps=1),
    "fedavg": Arm("fedavg"),
    "fedex": Arm("fedex"),
    "flora": Arm("flora"),
    "lora-fair": Arm("lora-fair", LoRAFair(mode="cosine")),
    "fedsa": Arm("fedsa"),
    "fslora mixed": Arm("fslora", ranks=MIXED),
    "hetlora mixed": Arm("hetlora", ranks=MIXED),
    "flexlora mixed": Arm("flexlora", ranks=MIXED),
    "fslora low": Arm("fslora", ranks=(1,)),
    "fedsb drawn": Arm("fedsb", FedSB("orthogonal"), (15,)),
    "fedsb gradient": Arm("fedsb", FedSB("update-approx", eta=0.03), (15,)),
}
"""central: one step a round from where all agree, which is gradient descent on all rows."""


@dataclass(frozen=True)
class Claim:
    """A claim about the mean of something over seeds: above 0, it is seen."""

    of: str
    says: str
    arms: tuple[str, str]
    what: Callable[[Outcome, Outcome], float]


def excess(a: Outcome, b: Outcome) -> float:
    return a.excess - b.excess


CLAIMS = (
    Claim("FedEx", "excess of fedavg less fedex's", ("fedavg", "fedex"), excess),
    Claim("FedEx", "excess of fedex less centralised training's", ("fedex", "central"), excess),
    Claim("FLoRA", "deviation of fedavg less flora's", ("fedavg", "flora"),
          lambda a, b: a.deviation - b.deviation),
    Claim("FLoRA", "excess of fedavg less flora's", ("fedavg", "flora"), excess),
    Claim("FLoRA", "bytes down of flora over fedavg's, less 1", ("flora", "fedavg"),
          lambda a, b: a.down / b.down - 1),
    Claim("FSLoRA", "excess of hetlora less fslora's, ranks 1, 2, 4",
          ("hetlora mixed", "fslora mixed"), excess),
    Claim("FSLoRA", "excess of flexlora less fslora's, ranks 1, 2, 4",
          ("flexlora mixed", "fslora mixed"), excess),
    Claim("FSLoRA", "excess at rank 1 for all less that at 1, 2, 4", ("fslora low", "fslora mixed"),
          excess),
    Claim("FedSA", "own of fedavg less fedsa's", ("fedavg", "fedsa"), lambda a, b: a.own - b.own),
    Claim("Fed-SB", "excess of drawn frames less that of the gradient's",
          ("fedsb drawn", "fedsb gradient"), excess),
    Claim("Fed-SB", "excess of fedavg less fedsb's from the gradient, at its bytes up",
          ("fedavg", "fedsb gradient"), excess),
    Claim("LoRA-FAIR", "deviation of fedavg less lora-fair's", ("fedavg", "lora-fair"),
          lambda a, b: a.deviation - b.deviation),
    Claim("LoRA-FAIR", "excess of fedavg less lora-fair's", ("fedavg", "lora-fair"), excess),
)  # fmt: skip


def best_rate(arm: Arm) -> float:
    """The rate of the least mean excess (own, of fedsa) over the CHOICE seeds."""
    judged = "own" if arm.name == "fedsa" else "excess"

    def standing(rate: float) -> float:
        try:
            x = statistics.fmean(getattr(arm.run(seed, rate), judged) for seed in CHOICE)
        except torch.linalg.LinAlgError:  # of numbers that overflow: it diverged
            return float("inf")
        return x if x == x else float("inf")

    return min(RATES, key=standing)


def told(values: Sequence[float]) -> tuple[float, float, str]:
    """Mean, half of its 95 % interval by Student's t, and whether the claim was seen.

    "seen" where all of the interval is above 0, "not seen: the other way" where all is below.
    """
    n, mean = len(values), statistics.fmean(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    if mean - half > 0:
        return mean, half, "seen"
    return mean, half, "not seen: the other way" if mean + half < 0 else "not seen"


def least(half: float, n: int) -> float:
    """The least mean that such a spread would show with probability .8 (normal approximation)."""
    t = float(stats.t.ppf(0.975, n - 1))
    return half / t * (t + 0.84)


def main() -> None:
    with threads(1):
        rates = {name: best_rate(arm) for name, arm in ARMS.items()}
        found = {name: [arm.run(s, rates[name]) for s in SEEDS] for name, arm in ARMS.items()}
    print("| arm | rate | excess | own |\n|---|---|---|---|")
    for name, runs in found.items():
        cells = (statistics.fmean(getattr(r, key) for r in runs) for key in ("excess", "own"))
        print(f"| {name} | {rates[name]:g} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    print("\n| system | measured | mean | 95 % | seen with power .8 from | |")
    print("|---|---|---|---|---|---|")
    for claim in CLAIMS:
        a, b = (found[name] for name in claim.arms)
        mean, half, word = told([claim.what(x, y) for x, y in zip(a, b, strict=True)])
        print(f"| {claim.of} | {claim.says} | {mean:+.3g} | +- {half:.2g} | "
              f"{least(half, len(SEEDS)):.2g} | {word} |")  # fmt: skip


if __name__ == "__main__":
    main()
