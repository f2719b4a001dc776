"""Noise, sampling and accounting: each against what it must be, with its confidence interval."""

import math

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from scipy import stats

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, ConfigError, PrivacyError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import NO_PRIVACY, Spend, calibrate, epsilon, in_words
from fedlora.privacy.chance import Chance
from fedlora.privacy.keeper import KeptLedger
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanism import ClippedSum, poisson, rounded
from fedlora.privacy.probe import Way
from fedlora.privacy.summary import summary
from fedlora.privacy.training import Payments, PrivacyPlan, private_fit
from tests.support.private_setting import Build, Setting

N = 200_000


def fixed(n: int) -> Chance:
    """The generator that is keyed from the system, but with a known key: a test of a statistic at
    1 in 1,000 must not fail once in 1,000 runs."""
    return Chance.reproducible(n, 0, 0, "test")


def test_noise_is_standard_normal() -> None:
    z = fixed(1).gaussians(N + 1)
    assert z.dtype == torch.float64
    half = stats.norm.ppf(0.9995) / math.sqrt(2 * N)
    assert abs(float(z.std()) - 1) < half
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4


def test_no_draw_serves_two_gaussians() -> None:
    z = fixed(7).gaussians(N)
    assert len(z.unique()) == N
    assert abs(float((z[: N // 2] * z[N // 2 :]).mean())) < 4 / math.sqrt(N / 2)


def test_noise_has_tails_that_float32_lacks() -> None:
    """Box-Muller on 24-bit uniforms ends at 5.77; here the least uniform gives 8.57."""
    assert math.sqrt(-2 * math.log(2.0**-53)) > 8.5
    u = fixed(2).uniforms(N)
    assert u.dtype == torch.float64
    assert float((u * 2**24).frac().abs().gt(0).double().mean()) > 0.99  # bits beyond the 24th


def test_two_streams_are_independent_and_a_reproducible_one_repeats() -> None:
    a, b = fixed(3).gaussians(N), fixed(4).gaussians(N)
    assert abs(float((a * b).mean())) < 4 / math.sqrt(N)
    same = [Chance.reproducible(1, 2, 3, "noise").gaussians(9) for _ in range(2)]
    assert torch.equal(*same)
    names = [(1, 2, 3, "sampling"), (1, 2, 4, "noise"), (1, 3, 3, "noise"), (2, 2, 3, "noise")]
    assert all(not torch.equal(Chance.reproducible(*n).gaussians(9), same[0]) for n in names)


def test_noise_is_added_once_with_the_std_that_is_accounted() -> None:
    p = torch.nn.Parameter(torch.zeros(N))
    sigma, C = 1.3, 0.5
    noised = ClippedSum((p,), C).noised(sigma, fixed(5))[p]
    half = stats.norm.ppf(0.9995) / math.sqrt(2 * N)
    assert abs(float(noised.std()) / (sigma * C) - 1) < half
    assert stats.kstest((noised / (sigma * C)).numpy(), "norm").pvalue > 1e-4


def test_every_tensor_has_noise_of_its_own() -> None:
    """Whatever its shape: a bias too, and two of one shape."""
    params = tuple(torch.nn.Parameter(torch.zeros(n)) for n in ((40, 500), (40, 500), (20_000,)))
    found = ClippedSum(params, 0.5).noised(1.3, fixed(8))
    z = torch.stack([found[p].flatten() / 0.65 for p in params])
    assert ((z.std(1) - 1).abs() < stats.norm.ppf(0.9999) / math.sqrt(2 * 20_000)).all()
    assert float((torch.corrcoef(z) - torch.eye(3)).abs().max()) < 4 / math.sqrt(20_000)


def test_released_numbers_lie_on_a_grid_that_the_data_do_not_move() -> None:
    x = torch.randn(100, dtype=torch.float64)
    grid = 2.0**-24
    assert torch.equal(rounded(x.clone(), 1.5) / grid, (rounded(x.clone(), 1.5) / grid).round())
    assert float((rounded(x.clone(), 1.5) - x).abs().max()) <= grid / 2


@pytest.mark.parametrize(("n", "q"), [(40, 0.05), (25, 0.3)])
def test_samples_are_poisson(n: int, q: float) -> None:
    chance, times = fixed(6), 4000
    hits = torch.zeros(n)
    sizes = []
    for _ in range(times):
        sample = poisson(n, q, chance)
        hits[sample] += 1
        sizes.append(len(sample))
    chi2 = float(((hits - times * q).square() / (times * q * (1 - q))).sum())
    assert 1e-4 < stats.chi2.sf(chi2, n) < 1 - 1e-4
    empty = (1 - q) ** n * times
    assert abs(sizes.count(0) - empty) < 4.5 * math.sqrt(empty) + 1
    variance = float(torch.tensor(sizes).double().var())
    assert abs(variance / (n * q * (1 - q)) - 1) < 4.5 * math.sqrt(2 / times) + 0.05


# -- accounting --------------------------------------------------------------------------------


def second_opinion(spends: list[Spend], delta: float) -> float:
    accountant = PLDAccountant()
    for s in spends:
        step = dp_event.PoissonSampledDpEvent(s.q, dp_event.GaussianDpEvent(s.sigma))
        accountant.compose(dp_event.SelfComposedDpEvent(step, s.steps))
    return float(accountant.get_epsilon(delta))


LONG = [
    (0.05, 1.0, 200, 1e-5), (0.25, 3.0, 100, 1e-4), (0.004, 0.6, 3000, 1e-6),
    (0.02, 0.35, 500, 1e-5), (0.1, 0.5, 500, 1e-5), (0.01, 0.25, 1000, 1e-5),
    (0.001, 0.15, 100, 1e-6), (0.0001, 0.1, 1000, 1e-6), (0.5, 0.7, 200, 1e-5),
    (1e-5, 0.2, 20_000, 1e-6),
]  # fmt: skip
GRID = [
    (1.0, 5.0, 30, 1e-5),
    (0.1, 100, 10, 1e-5),
    (1.0, 0.3, 10, 1e-5),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in LONG),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), GRID)
def test_epsilon_is_that_of_an_independent_accountant_and_never_below(
    q: float, sigma: float, steps: int, delta: float
) -> None:
    ours, theirs = (
        epsilon([Spend(q, sigma, steps)], delta),
        second_opinion([Spend(q, sigma, steps)], delta),
    )
    assert theirs - 1e-3 <= ours <= theirs + max(0.02, 0.01 * theirs)


def test_a_rate_so_small_that_the_rdp_bound_says_nothing_is_counted_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few are ever drawn, but each that is costs much: the bound is 4,000, the truth about 21.

    With a small grid, of which the bound alone would ask for too many points."""
    monkeypatch.setattr(accounting, "POINTS", 2**18)
    accounting._composed.cache_clear()
    assert accounting._loose(((0.2, 1e-5, 2000),), 1e-6) > 4000
    assert epsilon([Spend(1e-5, 0.2, 2000)], 1e-6) < 22
    accounting._composed.cache_clear()


@pytest.mark.parametrize("sigma", [1e-3, 0.02, 1e-8])
def test_an_epsilon_of_which_e_to_it_is_no_number_is_not_too_low(sigma: float) -> None:
    """One Gaussian: its loss has mean and half variance 1 / (2 sigma^2)."""
    assert epsilon([Spend(1.0, sigma, 1)], 1e-5) > 1 / (2 * sigma**2)


def test_what_is_no_privacy_is_not_told_as_a_number() -> None:
    much = epsilon([Spend(1.0, 0.1, 30)], 1e-5)
    assert much > NO_PRIVACY
    assert in_words(much) == "no privacy (> 200)"
    assert in_words(1.23456) == "1.235"
    config = Config.read({"privacy.noise-multiplier": 0.1})
    clients = {"0": {"privacy": {"epsilon": much, "sigma": 0.1, "q": 1.0}},
               "1": {"privacy": {"epsilon": 3.5, "sigma": 0.1, "q": 1.0}}}  # fmt: skip
    told = summary(config, [{"clients": clients}])["epsilon"]
    assert told == {"0": "no privacy (> 200)", "1": 3.5}
    with pytest.raises(ConfigError, match=r"privacy.epsilon .*200"):
        Config.read({"privacy.epsilon": 201.0})
    with pytest.raises(ConfigError, match=r"privacy.max-epsilon .*200"):
        Config.read({"privacy.max-epsilon": 1e9})


def test_rounds_of_different_noise_compose_as_the_other_accountant_says() -> None:
    spends = [Spend(1.0, 8.0, 9), Spend(0.5, 6.0, 5), Spend(1.0, 8.0, 9)]
    ours, theirs = epsilon(spends, 1e-3), second_opinion(spends, 1e-3)
    assert theirs - 1e-3 <= ours <= theirs + 0.02
    assert ours > 1.3 * epsilon(spends[:1], 1e-3)  # a new accountant each round claims that


@pytest.mark.parametrize(
    ("target", "q", "steps"),
    [(1.0, 1.0, 30), (8.0, 0.1, 3), pytest.param(8.0, 0.1, 30, marks=pytest.mark.slow)],
)
def test_calibrated_noise_keeps_the_budget_and_wastes_little(
    target: float, q: float, steps: int
) -> None:
    sigma = calibrate(target, 1e-5, q, steps)
    assert 0.97 * target - 0.02 < epsilon([Spend(q, sigma, steps)], 1e-5) <= target
    assert second_opinion([Spend(q, sigma, steps)], 1e-5) <= target


def test_limits_of_epsilon() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([Spend(0.5, 1.0, 0), Spend(0.0, 1.0, 9)], 1e-5) == 0
    assert epsilon([Spend(0.5, 0.0, 1)], 1e-5) == math.inf
    assert epsilon([Spend(0.5, 1e-2, 9)], 1e-5) > 1000


# -- the local loop ----------------------------------------------------------------------------


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RDP bound for epsilon, where the test is not about it."""
    monkeypatch.setattr(accounting, "_composed", accounting._loose)


def fitted(s: Setting, tmp_path, round: int = 1, **changes: object):
    config = Config.read({**s.config.flat(), **changes})
    before = {p: p.detach().clone() for p in s.params}
    ledger = Ledger(tmp_path, "d")
    fit = private_fit(s.model, s.rows, s.columns, config, round, 0, None, Payments(ledger))
    return fit, {p: (p.detach() - before[p]).double() for p in s.params}, ledger


PRIVATE = {
    "privacy.noise-multiplier": 2.0,
    "privacy.delta": 1e-3,
    "train.optimizer": "sgd",
    "train.lr": 1.0,
    "train.lr-schedule": "constant",
    "train.grad-clip": 0.0,
    "train.steps": 1,
}


@pytest.mark.usefixtures("_quick")
def test_no_example_is_looked_at_before_its_receipt(
    settings: Build, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The charge is on disk when the model is first called; without a receipt it never is."""
    import fedlora.privacy.training as training

    s = Setting(settings("bert", **PRIVATE))
    monkeypatch.setattr(training, "check_apart", lambda *_: None)  # of made-up examples
    config = Config.read(s.config.flat())
    ledger, charged = Ledger(tmp_path), []

    def called(*_: object, **__: object) -> None:
        charged.append(len(ledger.read().charges))
        raise KeyboardInterrupt

    s.model.peft.forward = called
    gone = KeptLedger(tmp_path / "none.sock")
    for payer, error in ((gone, PrivacyError), (ledger, KeyboardInterrupt)):
        with pytest.raises(error):
            private_fit(s.model, s.rows, s.columns, config, 1, 0, None, Payments(payer))
    assert charged == [1]


@pytest.mark.usefixtures("_quick")
def test_a_step_on_an_empty_sample_is_noise_alone_and_is_paid_for(
    settings: Build, tmp_path
) -> None:
    s = Setting(settings("bert", **PRIVATE))
    s.model.peft.forward = None  # must not be called
    import fedlora.privacy.training as training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "poisson", lambda *_: torch.empty(0, dtype=torch.long))
        patch.setattr(training, "check_apart", lambda *_: None)
        patch.setattr(training, "steady", lambda *_: Way(16, "float32"))
        fit, moved, ledger = fitted(s, tmp_path)
    flat = torch.cat([x.flatten() for x in moved.values()])
    std = 2.0 * 0.3 / (8 / len(s.rows) * len(s.rows))
    assert abs(float(flat.std()) / std - 1) < 4 / math.sqrt(2 * len(flat))
    assert math.isnan(fit.loss)
    assert [c.spend.steps for c in ledger.read().charges] == [1]


@pytest.mark.usefixtures("_quick")
def test_noise_is_fresh_each_step_round_and_restart(settings: Build, tmp_path) -> None:
    """Fresh from the system though run.seed is the same; the same only on express demand."""
    s = Setting(settings("bert", **PRIVATE))
    start = {p: p.detach().clone() for p in s.params}
    found = []
    for insecure in (False, False, True, True):
        with torch.no_grad():
            for p, x in start.items():
                p.copy_(x)
        changes = {"privacy.insecure-reproducible-noise": insecure}
        moved = fitted(s, tmp_path, **changes)[1]
        found.append(torch.cat([x.flatten() for x in moved.values()]))
    assert float(torch.corrcoef(torch.stack(found[:2]))[0, 1].abs()) < 0.2
    assert torch.equal(found[2], found[3])


@pytest.mark.usefixtures("_quick")
def test_each_step_draws_its_own_sample_from_the_system_and_is_paid_for(
    settings: Build, tmp_path
) -> None:
    """So that nobody who knows run.seed knows who was sampled, or dropout's masks."""
    import fedlora.privacy.training as training

    s = Setting(settings("bert", **PRIVATE))
    samples: list[tuple[int, ...]] = []
    drawn: list[float] = []
    paid: list[int] = []
    rates: set[tuple[int, float]] = set()

    def seen(model, encoded, chosen, *_) -> float:
        samples.append(tuple(chosen.tolist()))
        drawn.append(float(torch.rand(())))
        paid.append(len(ledger.read().charges))
        return 0.0

    def sampled(n: int, q: float, chance: Chance) -> torch.Tensor:
        rates.add((n, q))
        return poisson(n, q, chance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "private_step", seen)
        patch.setattr(training, "poisson", sampled)
        for n in range(2):
            ledger = Ledger(tmp_path / str(n), "d")
            charged = fitted(s, tmp_path / str(n), **{"train.steps": 8})[2].read().charges
            assert [c.spend for c in charged] == [Spend(8 / len(s.rows), 2.0, 8)]
    assert paid == [1] * 16, "before the first step"
    assert rates == {(len(s.rows), 8 / len(s.rows))}, "at the rate that is paid for"
    assert len(set(samples)) > 12
    assert samples[:8] != samples[8:]
    assert drawn[:8] != drawn[8:]


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("smaller", ["privacy.epsilon", "privacy.max-epsilon"])
def test_of_the_runs_limit_and_the_nodes_the_smaller_holds(
    settings: Build, tmp_path, smaller: str
) -> None:
    s = Setting(settings("bert", **PRIVATE))
    limits = {"privacy.epsilon": 100.0, "privacy.max-epsilon": 100.0, smaller: 1e-3}
    with pytest.raises(BudgetSpent, match=r"limit of 0\.001"):
        fitted(s, tmp_path, **limits)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("check", ["check_apart", "steady"])
def test_nothing_is_trained_before_both_probes_passed(
    settings: Build, tmp_path, check: str
) -> None:
    import fedlora.privacy.training as training

    s = Setting(settings("bert", **PRIVATE))

    def failing(*_: object) -> None:
        raise PrivacyError("mixed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, check, failing)
        with pytest.raises(PrivacyError, match="mixed"):
            fitted(s, tmp_path)


@pytest.mark.usefixtures("_quick")
def test_huge_clip_and_tiny_noise_at_q_1_is_full_batch_gradient_descent(
    settings: Build, tmp_path
) -> None:
    s = Setting(settings("bert", **PRIVATE))
    for module in s.model.peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    grads = s.one_by_one(list(range(len(s.rows))))
    want = {p: -sum(g[p] for g in grads) / len(s.rows) for p in s.params}
    changes = {
        "privacy.noise-multiplier": 1e-13,
        "privacy.clip-norm": 1e3,
        "privacy.sample-rate": 1,
    }
    changes["privacy.sample-rate"] = 1.0
    _, moved, _ = fitted(s, tmp_path, **changes)
    assert max(float((moved[p] - want[p]).abs().max()) for p in s.params) < 1e-8


def test_a_plan_counts_the_steps_of_all_rounds(settings: Build) -> None:
    given = {"privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3}
    plan = PrivacyPlan.of(Config.read(settings("bert", **given)), 30)
    assert (plan.q, plan.steps, plan.sigma) == (8 / 30, 4, 1.0)
    given = {"privacy.epsilon": 3.0, "privacy.delta": 1e-3, "privacy.sample-rate": 1.0}
    config = Config.read(settings("bert", **given, **{"train.steps": 4}))
    plan = PrivacyPlan.of(config, 30)
    planned = Spend(1.0, plan.sigma, 4 * config.run.rounds)
    assert 2.9 < epsilon([planned], 1e-3) <= 3.0
    with pytest.raises(PrivacyError, match="1/n"):
        PrivacyPlan.of(config, 1000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy.epsilon": 3.0, "privacy.noise-multiplier": 1.0}, ["both set"]),
        ({"privacy.level": "client"}, ["needs privacy.epsilon"]),
        ({"privacy.insecure-reproducible-noise": True}, ["privacy is off"]),
        ({"privacy.max-epsilon": 2.0}, ["this node's limit"]),
        (
            {"privacy.epsilon": 3.0, "lora.form": "dora", "lora.init": "eva"},
            ["lora.form", "lora.init"],
        ),
        (
            {"privacy.epsilon": 3.0, "strategy.name": "fedsb",
             "strategy.fedsb.init-from": "update-approx"},
            ["without noise"],
        ),
        (
            {"privacy.epsilon": 3.0, "privacy.level": "client", "strategy.name": "fedsa",
             "output.keep-updates": True},
            ["average-at-end", "keep-updates"],
        ),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused_together(
    settings: Build, changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as e:
        preflight.read(settings("bert", **changes))
    assert all(word in str(e.value) for word in words)
