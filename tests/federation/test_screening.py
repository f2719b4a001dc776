"""Robust aggregation around a strategy: what is kept, shortened or re-weighted."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.federation.server.screening import began, screen
from fedlora.lora.adapter import Factors, Pair
from fedlora.strategies import STRATEGIES, robust
from fedlora.strategies.base import Upload
from tests.support.strategy_federation import EXAMPLES, Played, fitting, play

EVERYTHING_SENT = [n for n, cls in STRATEGIES.items() if cls().promise != "shared"]
ONE_FACTOR = ["ffa", "fedsb", "rolora"]


def config(method: str, **more: object) -> Config:
    return Config.read({"robust.method": method, **{f"robust.{k}": v for k, v in more.items()}})


def played(name: str) -> tuple[Any, Played]:
    strategy = STRATEGIES[name]()
    return strategy, next(iter(play(strategy, fitting(strategy))))


def lengths(strategy: Any, p: Played, uploads: list[Upload]) -> list[float]:
    changes = [
        robust.change(
            strategy.trained(p.before, u, p.round),
            strategy.trained(p.before, began(strategy, p.before, u, p.round), p.round),
        )
        for u in uploads
    ]
    return [float(x) for x in robust.norms(changes)]


@pytest.mark.parametrize("name", EVERYTHING_SENT)
def test_a_shortened_change_is_no_longer_than_the_bound_and_not_shorter_than_it_must(
    name: str,
) -> None:
    strategy, p = played(name)
    before = lengths(strategy, p, p.uploads)
    bound = sorted(before)[1]
    kept, verdict = screen(
        p.uploads, strategy, p.before, p.round, config("norm-bound", bound=bound)
    )
    after = lengths(strategy, p, kept)
    for was, now in zip(before, after, strict=True):
        assert now == pytest.approx(min(was, bound), rel=1e-6)
    assert len(verdict.factors) == sum(x > bound for x in before)


@pytest.mark.parametrize("name", ONE_FACTOR)
def test_where_one_factor_trains_a_change_is_shortened_by_bound_over_length(name: str) -> None:
    strategy, p = played(name)
    bound = 0.5 * min(lengths(strategy, p, p.uploads))
    _, verdict = screen(p.uploads, strategy, p.before, p.round, config("norm-bound", bound=bound))
    for i, factor in verdict.factors.items():
        assert factor == pytest.approx(bound / verdict.norms[i], rel=1e-6)


@pytest.mark.parametrize("method", ["trimmed", "multi-krum", "krum"])
def test_an_update_that_is_out_of_all_proportion_is_left_out(method: str) -> None:
    strategy, p = played("ffa")
    uploads = [*p.uploads, *(replace(u, client=replace(u.client, id=9)) for u in p.uploads[:1])]
    wild = {m: 50 * x for m, x in uploads[2].sent.B.items()}
    uploads[2] = replace(uploads[2], sent=replace(uploads[2].sent, B=wild))
    kept, verdict = screen(uploads, strategy, p.before, p.round, config(method))
    assert uploads[2].client.id in verdict.dropped
    assert all(u is not uploads[2] for u in kept)


def test_the_median_weighs_a_wild_update_down_and_keeps_every_client() -> None:
    strategy, p = played("fedex")
    uploads = p.uploads
    wild = {m: 50 * x for m, x in uploads[1].sent.B.items()}
    uploads[1] = replace(uploads[1], sent=replace(uploads[1].sent, B=wild))
    kept, verdict = screen(uploads, strategy, p.before, p.round, config("median"))
    share = kept[1].num_examples / sum(u.num_examples for u in kept)
    assert share < 0.2 < EXAMPLES[1] / sum(EXAMPLES[i] for i in range(4))
    assert sum(verdict.factors.values()) == pytest.approx(1)


def turned_head(p: Played) -> list[Upload]:
    """Five updates whose heads went one way, but for client 9's, which went the other, ten times as
    far; its adapter is client 0's."""
    u = p.uploads[0]
    start = began(STRATEGIES["fedex"](), p.before, u, p.round).sent.other
    way = {n: x - start[n] for n, x in u.sent.other.items()}

    def went(upload: Upload, times: float) -> Upload:
        head = {n: start[n] + times * x for n, x in way.items()}
        return replace(upload, sent=replace(upload.sent, other=head))

    liar = went(replace(u, client=replace(u.client, id=9)), -10)
    return [*(went(x, 1 + 0.2 * i) for i, x in enumerate(p.uploads)), liar]


@pytest.mark.parametrize("method", ["trimmed", "afa", "multi-krum", "median", "norm-bound"])
def test_a_client_that_turns_its_head_round_alone_is_answered(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, p = played("fedex")
    uploads = turned_head(p)
    kept, verdict = screen(uploads, strategy, p.before, p.round, config(method))

    def answered() -> bool:
        match method:
            case "median":
                return verdict.factors[9] < 0.5 * min(
                    x for i, x in verdict.factors.items() if i != 9
                )
            case "norm-bound":
                return verdict.factors.get(9, 1) < 0.5
        return verdict.dropped[-1:] == [9] and all(u.client.id != 9 for u in kept)

    assert answered()
    monkeypatch.setattr(robust, "beside", lambda *_: {})  # planted: by their adapters alone
    _, verdict = screen(uploads, strategy, p.before, p.round, config(method))
    kept = [u for u in uploads if u.client.id not in verdict.dropped]
    assert not answered()


def test_no_part_of_a_change_hides_behind_a_longer_one() -> None:
    """Both in units of their medians: a part that is 1e6 times as long in all decides nothing."""
    g = torch.Generator().manual_seed(0)
    parts = [[{"m": Pair(torch.randn(2, 5, generator=g), torch.randn(4, 2, generator=g))}
              for _ in range(5)] for _ in range(2)]  # fmt: skip
    apart = [{f"{n}{m}": x for n, part in enumerate(parts) for m, x in part[i].items()}
             for i in range(5)]  # fmt: skip
    lengths = [[float((x["m"].B @ x["m"].A).norm()) for x in part] for part in parts]
    medians = [sorted(row)[2] for row in lengths]
    want = [math.hypot(*(row[i] / u for row, u in zip(lengths, medians, strict=True)))
            for i in range(5)]  # fmt: skip
    named = [[{f"{n}m": x["m"]} for x in part] for n, part in enumerate(parts)]
    assert robust.norms(robust.together(named)).tolist() == pytest.approx(want, rel=1e-6)
    longer = [named[0], [{"1m": replace(x["1m"], scale=1e6)} for x in named[1]]]
    assert robust.norms(robust.together(longer)).tolist() == pytest.approx(want, rel=1e-6)
    assert robust.norms(apart).tolist() != pytest.approx(want, rel=1e-2)


def test_judging_ignores_how_a_change_is_factored() -> None:
    strategy, p = played("flora")
    given = config("trimmed", share=0.3)
    _, verdict = screen(p.uploads, strategy, p.before, p.round, given)
    turned = []
    for u in p.uploads:
        A = {m: 3 * x for m, x in u.sent.A.items()}
        B = {m: x / 3 for m, x in u.sent.B.items()}
        turned.append(replace(u, sent=Factors(u.sent.scale, A, B, other=u.sent.other)))
    _, other = screen(turned, strategy, p.before, p.round, given)
    assert verdict.dropped == other.dropped
    for i, n in verdict.norms.items():
        assert other.norms[i] == pytest.approx(n, rel=1e-9)


def test_the_update_of_a_client_that_did_not_train_is_zero() -> None:
    for name in EVERYTHING_SENT:
        strategy, p = played(name)
        still = [began(strategy, p.before, u, p.round) for u in p.uploads]
        assert max(lengths(strategy, p, still)) < 1e-9


def test_privacy_of_a_client_and_a_choice_among_clients_are_refused_together() -> None:
    given = {"privacy.level": "client", "privacy.noise-multiplier": 1.0}
    with pytest.raises(ConfigError, match=r"robust\.method = 'median'"):
        preflight.read({"robust.method": "median", **given})


def test_krum_says_how_many_clients_it_needs() -> None:
    krum = {"robust.method": "krum", "clients.count": 6, "robust.byzantine": 2}
    given = Config.read({"model.path": "m", "data.path": "d", "strategy.name": "fedavg", **krum})
    (reason,) = preflight.problems(given)
    assert "at least 7 clients a round, and there are 6" in reason
