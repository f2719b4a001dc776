"""The one-run audit: whole federations with canaries, as they are and with bugs planted."""

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from scipy import stats
from typer.testing import CliRunner

from fedlora import preflight
from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, FedLoraError, PrivacyError
from fedlora.launch.lab import planted
from fedlora.launch.lab.bound import Guesses
from fedlora.launch.lab.one_run import Attack, Fixed, Seen, audited, power
from fedlora.launch.lab.planted import Canaries, made_up, places
from fedlora.privacy import mechanism
from fedlora.privacy.chance import Chance
from fedlora.privacy.mechanism import ClippedSum
from tests.support.private_setting import Build, Setting

CLAIM = 2.0
FIXED = Fixed(canaries=600, guesses=120)
DELTA = 1e-5
CENTRAL = {"privacy.level": "client", "strategy.name": "ffa"}


def federation(settings: Build, epsilon: float = CLAIM, **changes: object) -> Config:
    """Two clients, four rounds of a step each on all rows: seconds."""
    given = {
        "run.rounds": 4, "clients.count": 2, "clients.ranks": "8", "data.limit": 60,
        "train.steps": 1, "train.optimizer": "sgd", "train.lr": 0.01, "train.batch-size": 256,
        "train.lr-schedule": "constant", "privacy.epsilon": epsilon, "privacy.delta": DELTA,
        "privacy.sample-rate": 1.0, "evaluate.clients": False, "evaluate.every": 0,
    }  # fmt: skip
    return preflight.read(settings("bert", **{**given, **changes}))


# -- bugs ------------------------------------------------------------------------------------------

noised = ClippedSum.noised


def a_tenth_of_the_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ClippedSum, "noised", lambda self, sigma, chance: noised(self, sigma / 10, chance)
    )


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    honest = mechanism.clipping

    def unclipped(found: Any, C: float) -> Any:
        finite, c = honest(found, C)
        return finite, torch.ones_like(c)

    patch.setattr(mechanism, "clipping", unclipped)


def reused_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ClippedSum, "noised", lambda self, sigma, _: noised(self, sigma, Chance(bytes(32)))
    )


BUGS: list[Callable[[pytest.MonkeyPatch], None]] = [
    a_tenth_of_the_noise,
    no_clipping,
    reused_noise,
]


def fails(config: Config, view: str = "rounds") -> bool:
    claim, made = audited(config, view, FIXED)
    assert claim == pytest.approx(config.privacy.epsilon, rel=0.02)
    return made.bound(DELTA, FIXED.confidence) > claim


@pytest.mark.parametrize("bug", BUGS)
def test_a_run_with_a_bug_fails_its_audit(
    settings: Build, monkeypatch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None]
) -> None:
    bug(monkeypatch)
    assert fails(federation(settings))


@pytest.mark.parametrize("view", ["rounds", "final"])
def test_a_run_as_it_is_passes_its_audit(settings: Build, view: str) -> None:
    assert not fails(federation(settings), view)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_in_nine_of_ten_runs(
    settings: Build, monkeypatch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None]
) -> None:
    bug(monkeypatch)
    config = federation(settings)
    assert sum(fails(config) for _ in range(10)) >= 9


@pytest.mark.slow
def test_none_of_twenty_runs_as_they_are_fails(settings: Build) -> None:
    config = federation(settings)
    assert not any(fails(config, view) for view in ("rounds", "final") for _ in range(10))


@pytest.mark.parametrize("view", ["rounds", "final"])
def test_the_bound_of_a_run_is_what_the_power_says(settings: Build, view: str) -> None:
    """At a large epsilon, where the bound is far from 0 and spreads little."""
    config = federation(settings, 8.0)
    middle, low = power(config, 174, 8.0, view, FIXED, 40)
    _, made = audited(config, view, FIXED)
    assert low * 0.6 - 0.2 <= made.bound(DELTA) <= middle * 1.4 + 0.3
    assert 0 < low <= middle < 8


# -- the command ----------------------------------------------------------------------------------


def command(tmp_path: Path, settings: Build, *more: str) -> Any:
    config = federation(settings)
    directory = tmp_path / "done"
    directory.mkdir(exist_ok=True)
    (directory / "config.toml").write_text(tomli_w.dumps(config.flat()))
    asked = ["privacy", "audit", str(directory), "--attack", "one-run", "--workers", "1"]
    sizes = ["--canaries", "600", "--guesses", "120", "--out", str(tmp_path / "audit")]
    return CliRunner().invoke(app, [*asked, *sizes, *more])


def test_the_command_audits_a_run_as_it_is_and_says_whether_it_holds(
    tmp_path: Path, settings: Build
) -> None:
    done = command(tmp_path, settings)
    assert done.exit_code == 0, done.output
    assert done.output.count("holds") == 2
    rows = [json.loads(p.read_text()) for p in (tmp_path / "audit/rows").iterdir()]
    assert {r["view"] for r in rows} == {"rounds", "final"}
    assert all(r["epsilon claimed"] <= CLAIM and r["canaries"] == 600 for r in rows)
    fixed = json.loads((tmp_path / "audit/experiment.json").read_text())["size"]
    assert (fixed["planted"], fixed["guesses"], fixed["confidence"]) == (600, 120, 0.95)
    for change in (["--guesses", "60"], ["--confidence", "0.5"], ["--canaries", "500"]):
        again = command(tmp_path, settings, *change)  # after a look at what was measured
        assert isinstance(again.exception, FedLoraError)
        assert "another size" in str(again.exception)


@pytest.mark.slow
def test_the_command_fails_where_a_bug_refutes_the_claim(
    tmp_path: Path, settings: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_tenth_of_the_noise(monkeypatch)
    done = command(tmp_path, settings)
    assert isinstance(done.exception, PrivacyError)
    assert done.exit_code == 1
    assert "refuted: one-run-rounds-2, one-run-final-2" in str(done.exception)
    assert "FAILS" in done.output
    assert command(tmp_path, settings).exit_code == 1  # what was found stays


def test_sizes_that_cannot_be_are_errors_that_say_so(tmp_path: Path, settings: Build) -> None:
    wrong = (["--guesses", "601"], ["--guesses", "-2"], ["--canaries", "-1"])
    for options in (*wrong, ["--confidence", "1"], ["--confidence", "-1"]):
        done = command(tmp_path, settings, *options)
        assert isinstance(done.exception, ConfigError)
        assert options[0].removeprefix("--ca") in str(done.exception)
    assert not (tmp_path / "audit").exists()


def test_an_attack_that_is_not_there_is_named(tmp_path: Path, settings: Build) -> None:
    done = command(tmp_path, settings, "--attack", "one-rum")
    assert done.exit_code == 2
    assert "one-rum: none of" in done.output


# -- what is fixed beforehand ----------------------------------------------------------------------


def test_the_coins_follow_no_seed_of_the_run(settings: Build) -> None:
    """Equal configs, other coins; fair ones."""
    draws = [Canaries(4000, 2).is_in for _ in range(3)]
    assert all(not x.equal(y) for x, y in itertools.combinations(draws, 2))
    assert all(stats.binomtest(int(x.sum()), 4000).pvalue > 1e-6 for x in draws)


def test_guesses_are_as_many_as_were_fixed_whatever_the_scores_are() -> None:
    for seed, r in itertools.product(range(3), (2, 40, 100)):
        scores = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        high = scores > scores.median()
        assert Guesses.made(scores, high, r) == Guesses(100, r, r)
        assert Guesses.made(scores, ~high, r) == Guesses(100, r, 0)


def test_what_claims_nothing_is_not_audited(settings: Build) -> None:
    with pytest.raises(PrivacyError, match="what a client claims for each of its examples"):
        audited(federation(settings, 0.0), "rounds", FIXED)
    with pytest.raises(PrivacyError, match=r"privacy\.level = 'client'"):
        audited(federation(settings, **CENTRAL), "rounds", FIXED)


# -- canaries --------------------------------------------------------------------------------------


def test_canaries_are_rows_of_their_own_whose_gradients_are_of_one_coordinate(
    settings: Build,
) -> None:
    """Read off the sink, as the clip will get them; the rows beside them keep their own."""
    from fedlora.privacy.per_example import kept_apart
    from fedlora.training.data.batches import collate
    from fedlora.training.train import example_losses

    s = Setting(settings("bert"), torch.float32)
    words = sorted(set(s.model.tokenizer.get_vocab().values()))[3:]
    canaries = Canaries(40, 2)
    rows = canaries.added(s.rows, words, 1)
    mine = canaries.here(1)
    assert len(rows) == len(s.rows) + len(mine) > len(s.rows)
    assert all(i % 2 == 1 and canaries.is_in[i] for i in mine)
    batch = collate(rows, torch.tensor([0, len(rows) - 1, 1, len(s.rows)]))
    place = places(s.params, 40)
    found = {}
    for active in (True, False):
        with (
            canaries.planted(s.model, s.params, rows, 1, 0.5, active),
            kept_apart(s.model.peft, s.model.active, frozenset(s.params)) as sink,
        ):
            example_losses(s.model, batch).sum().backward()
            found[active] = {p: g.dense().clone() for p, g in sink.take(4).items()}
    for b, i in ((1, mine[-1]), (3, mine[0])):
        for p in s.params:
            want = torch.zeros(p.numel())
            if p is place[i][0]:
                want[place[i][1]] = planted.LENGTH * 0.5
            assert found[True][p][b].flatten().equal(want)
            assert not found[False][p][b].any()
    for b, i in ((0, 0), (2, 1)):
        (plain,) = s.one_by_one([i])
        assert all(torch.allclose(found[True][p][b], plain[p], atol=1e-6) for p in plain)


def test_each_canary_has_a_coordinate_and_a_text_of_its_own(settings: Build) -> None:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2, 2))]
    found = places(params, 26)
    assert found == [(p, i) for p in params for i in range(p.numel())]
    few = places(params, 9)
    assert len({(id(p), at) for p, at in few}) == 9
    with pytest.raises(ConfigError, match="--canaries 27: must be at most the 26 numbers"):
        places(params, 27)
    rows = Setting(settings("bert")).rows
    texts = made_up([3, 4, 5, 6, 7], rows, 300)
    spans = itertools.pairwise(rows.starts.tolist())
    assert len({*texts}) == 300
    assert not {tuple(rows.ids[a:b].tolist()) for a, b in spans} & {*texts}


def test_noise_that_two_rounds_share_cancels_in_the_contrast() -> None:
    seen = Seen("rounds")
    z = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    signal = torch.arange(50) % 2
    for r in (2, 5, 6, 9):
        seen.changes[r] = z - signal * seen.active(r)
        seen.began[r] = None  # type: ignore[assignment]
    assert [seen.active(r) for r in seen.changes] == [True, False, True, False]
    assert torch.allclose(-seen.contrast(), signal.double())
    attack = Attack(Canaries(50, 1), "rounds", {0: seen})
    assert (attack.scores(None) > 0).equal(signal > 0)  # type: ignore[arg-type]


# -- the bound -------------------------------------------------------------------------------------


def slow_chance(m: int, r: int, v: int, ratio: Fraction, delta: Fraction) -> Fraction:
    """Theorem 5.2 in whole numbers: e^epsilon is `ratio`."""
    q = ratio / (1 + ratio)

    def f(least: int) -> Fraction:
        every = range(max(least, 0), r + 1)
        return sum((math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in every), Fraction(0))

    gains = [(f(v - i) - f(v)) / i for i in range(1, v + 1)]
    return min(Fraction(1), f(v) + 2 * m * delta * max(gains, default=Fraction(0)))


@pytest.mark.parametrize("ratio", [1, 2, 20])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 100), Fraction(1, 10)])
def test_the_chance_of_so_many_right_guesses_is_that_of_the_theorem(
    ratio: int, delta: Fraction
) -> None:
    for r, v in ((2, 0), (10, 4), (10, 10), (31, 24)):
        want = float(slow_chance(50, r, v, Fraction(ratio), delta))
        found = Guesses(50, r, v).chance(math.log(ratio), float(delta))
        assert found == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_the_bound_is_where_the_chance_is_one_less_the_confidence() -> None:
    for made, delta in ((Guesses(500, 100, 80), 1e-5), (Guesses(90, 40, 40), 0.0)):
        for confidence in (0.9, 0.95, 0.99):
            epsilon = made.bound(delta, confidence)
            assert made.chance(epsilon, delta) == pytest.approx(1 - confidence, rel=1e-6)
    assert Guesses(500, 100, 50).bound(1e-5) == 0.0
    assert Guesses(500, 100, 80).bound(1e-5, 0.99) < Guesses(500, 100, 80).bound(1e-5, 0.9)


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 0.0), (0.5, 0.01), (3.0, 0.001)])
def test_a_mechanism_at_its_epsilon_exceeds_it_as_seldom_as_the_confidence_says(
    epsilon: float, delta: float
) -> None:
    """By drawing: randomised response of each coin, and with chance delta the coin itself."""
    rng = np.random.default_rng(1)
    m = r = 60
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    over = dict.fromkeys((0.8, 0.95), 0)
    for _ in range(trials := 1500):
        v = int((rng.random(m) < delta + (1 - delta) * right).sum())
        for confidence in over:
            over[confidence] += Guesses(m, r, v).chance(epsilon, delta) < 1 - confidence
    for confidence, n in over.items():
        assert n <= trials * (1 - confidence) + 4 * math.sqrt(trials * (1 - confidence))
    assert over[0.8] > 0 or delta > 0


def test_a_row_that_refutes_a_claim_ends_the_command_whichever_it_is(
    tmp_path: Path, settings: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sound mechanism that is flagged, or a planted bug that is not, fails as a run does."""
    from fedlora.launch.lab import attacks
    from fedlora.launch.lab.plan import Lab
    from fedlora.launch.lab.study import failed, run

    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(federation(settings).flat()))
    for n, measured in enumerate((0.5, 30.0)):
        lab = Lab.load(path, {}, tmp_path / str(n), only=["canaries"], epsilons=[0.0, 2.0])
        monkeypatch.setattr(attacks, "audited", lambda *_, x=measured: x)
        run(lab, 1, lambda _: None)
        wrong = failed(lab)
        assert ("canaries-half-the-noise-2" in wrong) is (measured < 1)
        assert ("canaries-as-it-is-2" in wrong) is (measured > 1)
