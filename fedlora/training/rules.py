"""train.rule: what stands between the gradients of LoRA's A and B and the optimiser's step.

    plain            nothing
    preconditioned   g_A <- (B^T B + eps)^-1 g_A,  g_B <- g_B (A A^T + eps)^-1: PEFT's own code.
                     Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation
                     Models", 2024, https://arxiv.org/abs/2402.02347
    riemann          a step on the manifold of matrices of rank r: see riemann.py
    lora-pro         both gradients adjusted so that the step is nearest to W's: see lora_pro.py
    allora           a step of row w is multiplied by 1 / sqrt(|w| + 1 / ETA^2). Huang and
                     Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", 2024,
                     https://arxiv.org/abs/2410.09692
    coto             each module's adapter is off in a step with probability 1 - p; p grows with the
                     rounds to 1 at three quarters of them. Zhuang et al., "Come Together, But Not
                     Right Now", ICML 2025, https://arxiv.org/abs/2506.05713
    dylora           in each step only the leading b ranks of every module are there, b drawn from
                     1..r. Valipour et al., "DyLoRA", EACL 2023, https://arxiv.org/abs/2210.07558

What leaves a client is A and B as ever, so every strategy that trains both runs each of them.

Differs from the papers: allora multiplies the optimiser's step and not the gradient, which Adam
would divide out again, and leaves lora.alpha in place (set it to the rank, and lora.dropout to 0);
coto's p is constant within a round, and p of the last three quarters is that of the round's end;
dylora draws one b a step for all modules, and updates all of the b ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.strategies.base import seeded
from fedlora.training.lora_pro import adjust
from fedlora.training.optimizers import Live
from fedlora.training.riemann import moved_on_manifold

ETA = 4.0
"""allora's: a row of zeros steps so many times the rate."""
WHOLE_AT = 0.75
"""coto's: the share of the rounds from which every adapter is on."""

Pairs = Sequence[tuple[nn.Parameter, nn.Parameter]]
"""A (r, k) and B (d, r) of each module."""


def pairs_of(live: Live) -> Pairs:
    """Both factors of every module of which both train."""
    A, B = live.get("A", {}), live.get("B", {})
    return [(A[m], B[m]) for m in A if m in B]


def with_rule(
    optimizer: torch.optim.Optimizer,
    model: Any,
    live: Live,
    config: Config,
    round: int,
    client: int,
) -> Any:
    """The optimiser under the config's rule: what `train.steps` takes as one.

    Raises:
        ModelError: the strategy trains one factor alone in this round, and the rule needs both.
    """
    rule, pairs = config.train.rule, pairs_of(live)
    if rule == "plain":
        return optimizer
    if not pairs:
        raise ModelError(
            f"train.rule = {rule!r}: is of LoRA's A and B together, and this strategy does not "
            "train both; use fedavg, fedex or flora, or train.rule = 'plain'"
        )
    if rule == "preconditioned":
        return preconditioned(optimizer, model)
    generator = seeded(config.run.seed, round, client, f"rule/{rule}")
    if rule in ("coto", "dylora"):
        number, of = config.run.place(round)
        p = min(1.0, number / of / WHOLE_AT)
        return Masked(optimizer, pairs, masks(rule, pairs, p, generator))
    around = {"allora": AllPairs, "lora-pro": Adjusted, "riemann": OnManifold}
    return around[rule](optimizer, pairs)


def preconditioned(optimizer: torch.optim.Optimizer, model: Any) -> torch.optim.Optimizer:
    """PEFT's optimiser of the same class, rate and decay, over all that trains in the model."""
    from peft.optimizers import create_riemannian_optimizer

    first = optimizer.param_groups[0]
    known = ("weight_decay", "momentum")
    kwargs = {key: first[key] for key in known if key in first}
    made: torch.optim.Optimizer = create_riemannian_optimizer(
        model.peft, type(optimizer), lr=first["lr"], **kwargs
    )
    return made


class Around:
    """An optimiser with something done before its step, after it, or both."""

    def __init__(self, optimizer: torch.optim.Optimizer, pairs: Pairs) -> None:
        self.optimizer, self.pairs = optimizer, pairs

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> Any:
        return self.optimizer.step()


class AllPairs(Around):
    """ALLoRA: each row's step over the root of its norm before it."""

    def step(self) -> Any:
        held = [w.detach().clone() for pair in self.pairs for w in pair]
        done = self.optimizer.step()
        with torch.no_grad():
            for w, before in zip((w for pair in self.pairs for w in pair), held, strict=True):
                w.copy_(before + row_rates(before) * (w - before))
        return done


def row_rates(w: Tensor) -> Tensor:
    """1 / sqrt(|row| + 1 / ETA^2) of each row, (rows, 1)."""
    rates: Tensor = (w.norm(dim=1, keepdim=True) + ETA**-2).rsqrt()
    return rates


class Adjusted(Around):
    """LoRA-Pro: the optimiser's step, of adjusted gradients."""

    def step(self) -> Any:
        for A, B in self.pairs:
            if A.grad is not None and B.grad is not None:
                adjust(A, B)
        return self.optimizer.step()


class OnManifold(Around):
    """RiemannLoRA: the products B A by a step on their manifold, all else by the optimiser."""

    def step(self) -> Any:
        rate = float(self.param_groups[0]["lr"])
        for A, B in self.pairs:
            if A.grad is not None and B.grad is not None:
                moved_on_manifold(A, B, rate)
            A.grad = B.grad = None
        return self.optimizer.step()


class Masked(Around):
    """CoTo and DyLoRA: columns of B are 0 in the forward pass, and what they hold stays."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, pairs: Pairs, drawn: Iterator[list[Tensor]]
    ) -> None:
        super().__init__(optimizer, pairs)
        self.drawn = drawn
        self.held: list[tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]] = []
        self.hooks: list[RemovableHandle] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for (A, B), mask in zip(self.pairs, next(self.drawn), strict=True):
            mask = mask.to(B)  # (r)
            self.held.append((A, B, B.detach().clone(), mask))
            self.hooks.append(B.register_hook(lambda g, mask=mask: g * mask))
            with torch.no_grad():
                B.mul_(mask)

    def step(self) -> Any:
        with torch.no_grad():
            for A, B, whole, mask in self.held:
                B.copy_(whole)
                if not bool(mask.any()):
                    A.grad = B.grad = None  # off: the optimiser passes it by
        for hook in self.hooks:
            hook.remove()
        self.held, self.hooks = [], []
        return self.optimizer.step()


def masks(rule: str, pairs: Pairs, p: float, g: torch.Generator) -> Iterator[list[Tensor]]:
    """For each step which ranks of each module are there: 1 or 0, (r)."""
    ranks = [A.shape[0] for A, _ in pairs]
    while True:
        if rule == "coto":
            on = torch.rand(len(ranks), generator=g) < p
            yield [torch.full((r,), float(x)) for r, x in zip(ranks, on, strict=True)]
        else:
            share = float(torch.rand(1, generator=g))
            yield [(torch.arange(r) <= int(share * r)).float() for r in ranks]
