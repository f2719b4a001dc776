"""The claims of the seed systems on the teacher: what an arm is, and the word for a mean."""

import pytest
import torch
from scipy import stats

from benchmarks.claims import ARMS, CLAIMS, UNLIKE, Arm, least, told
from fedlora.launch.simulate.teacher import EXAMPLES, SIZES, make_task
from fedlora.lora.adapter import kaiming
from fedlora.strategies.base import seeded


def test_averaging_after_each_step_is_gradient_descent_on_all_rows_in_one_place() -> None:
    """Written anew on the pooled loss, by autograd."""
    seed, rate, r, steps = 3, 0.03, 4, 6
    got = Arm("fedavg", ranks=(r,), rounds=steps, steps=1).run(seed, rate)
    task = make_task(seed, UNLIKE)
    live = {}
    for m, (d, k) in SIZES.items():
        A = kaiming(r, k, seeded(seed, 0, 0, m)).double().requires_grad_()
        live[m] = (A, torch.zeros(d, r, dtype=torch.float64, requires_grad=True))
    flat = [x for pair in live.values() for x in pair]

    def loss() -> torch.Tensor:
        change = {m: 8 / r * B @ A for m, (A, B) in live.items()}
        each = [n * task.loss(i, change) for i, n in enumerate(EXAMPLES)]
        return torch.stack(each).sum() / sum(EXAMPLES)

    for _ in range(steps):
        for x, g in zip(flat, torch.autograd.grad(loss(), flat), strict=True):
            x.data.sub_(g, alpha=rate)
    zero, floor = task.everywhere({}), task.floor()
    assert got.excess == pytest.approx((float(loss().detach()) - floor) / (zero - floor), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "word"),
    [([1.0, 1.1, 0.9], "seen"), ([-1.0, -1.1, -0.9], "not seen: the other way"),
     ([1.0, -0.9, 0.1], "not seen")],
)  # fmt: skip
def test_a_claim_is_seen_where_the_whole_interval_is_above_zero(
    values: list[float], word: str
) -> None:
    mean, half, said = told(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert said == word


def test_the_least_that_would_be_seen_has_about_the_power_that_is_said() -> None:
    n, sd = 10, 1.0
    half = float(stats.t.ppf(0.975, n - 1)) * sd / n**0.5
    away = least(half, n) / (sd / n**0.5)
    power = float(stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, away))
    assert power == pytest.approx(0.8, abs=0.03)


def test_every_claim_names_arms_that_are_run() -> None:
    assert {name for claim in CLAIMS for name in claim.arms} <= {*ARMS}
