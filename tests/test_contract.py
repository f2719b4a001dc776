"""What every strategy owes the federation. A new one in STRATEGIES is covered unasked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from strategy_federation import (
    EQUAL,
    EXAMPLES,
    MIXED,
    PARTIAL,
    RESCALED,
    SEED,
    Played,
    Site,
    assert_same,
    base_change,
    deviation,
    make_start,
    model_change,
    play,
    variants,
    visit,
)
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Factors, Pair
from fedlora.errors import ClientMemoryError
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import BaseLog, Client, Requires, Round, Version

VARIANTS = variants()
FEDERATIONS = {"equal": EQUAL, "rescaled": RESCALED, "partial": PARTIAL, "mixed": MIXED}
COHORTS = ((0, 1, 2), (3, 0), (1, 3), (2,), (3, 1, 0, 2))

every_strategy = pytest.mark.parametrize("strategy", VARIANTS.values(), ids=VARIANTS)
every_federation = pytest.mark.parametrize("clients", FEDERATIONS.values(), ids=FEDERATIONS)


def able(strategy: Any, clients: list[Client]) -> None:
    """Skips what the strategy says it cannot run; that it says so is the contract."""
    if problems := list(strategy.problems(clients)):
        assert all("use " in p for p in problems), "a refusal must say what to use instead"
        pytest.skip(problems[0])


def model(strategy: Any, state: Any) -> tuple[dict[str, Tensor], Factors]:
    effective = strategy.effective(state)
    return model_change(effective), Factors(other=effective.factors.other)


def assert_same_model(strategy: Any, x: Any, y: Any, atol: float = 1e-11) -> None:
    (left, left_head), (right, right_head) = model(strategy, x), model(strategy, y)
    assert left.keys() == right.keys()
    for m in left:
        assert_close(left[m], right[m], rtol=0, atol=atol)
    assert_same(left_head, right_head)


@every_federation
@every_strategy
def test_an_exact_strategy_is_exact_in_every_round_and_any_cohort(
    strategy: Any, clients: list[Client]
) -> None:
    able(strategy, clients)
    gaps = [deviation(strategy, played) for played in play(strategy, clients, COHORTS)]
    if strategy.promise in ("exact", "shared"):
        assert max(gaps) < 1e-12
    else:
        assert max(gaps) < 10  # reported, not promised; but of the size of the model


@every_federation
@every_strategy
def test_under_an_exact_strategy_each_client_starts_from_the_whole_model(
    strategy: Any, clients: list[Client]
) -> None:
    able(strategy, clients)
    if strategy.promise != "exact":
        pytest.skip("a client's model is its own")
    for played in play(strategy, clients, COHORTS):
        whole = model_change(strategy.effective(played.before))
        for v in played.visits:
            for m in v.upload.client.layers:
                want = whole.get(m, torch.zeros_like(v.start_model[m]))
                assert_close(v.start_model[m], want, rtol=0, atol=1e-11)


@every_strategy
def test_a_client_that_was_away_catches_up_to_the_same_bits(strategy: Any) -> None:
    sites: dict[int, Site] = {}
    *_, last = play(strategy, EQUAL, COHORTS, sites)
    rejoined = [sites.setdefault(i, Site()) for i in range(4)]
    round = Round(len(COHORTS) + 1, SEED)
    for i, site in enumerate(rejoined):
        visit(strategy, last.after, EQUAL[i], site, round)
    newcomer = Site()
    visit(strategy, last.after, EQUAL[0], newcomer, round)
    server = base_change(strategy.effective(last.after).base)
    for site in (*rejoined, newcomer):
        assert site.base.keys() == server.keys()
        for m, total in server.items():
            assert torch.equal(site.base[m], total)


@every_federation
@every_strategy
def test_the_order_of_replies_does_not_matter(strategy: Any, clients: list[Client]) -> None:
    able(strategy, clients)
    *_, last = play(strategy, clients, [(0, 1, 2, 3), (0, 1, 2, 3)])
    again = strategy.aggregate(last.before, last.uploads[::-1], last.round)
    assert_same_model(strategy, last.after, again)


@every_strategy
def test_only_the_ratios_of_num_examples_matter(strategy: Any) -> None:
    *_, last = play(strategy, EQUAL)
    tenfold = [dataclasses.replace(u, num_examples=10 * u.num_examples) for u in last.uploads]
    again = strategy.aggregate(last.before, tenfold, last.round)
    assert_same_model(strategy, last.after, again)


@every_strategy
def test_a_client_without_examples_counts_for_nothing(strategy: Any) -> None:
    *_, last = play(strategy, EQUAL)
    nothing = dataclasses.replace(last.uploads[1], num_examples=0)
    with_it = [last.uploads[0], nothing, *last.uploads[2:]]
    without = [last.uploads[0], *last.uploads[2:]]
    assert_same_model(
        strategy,
        strategy.aggregate(last.before, with_it, last.round),
        strategy.aggregate(last.before, without, last.round),
    )


@every_strategy
def test_uploads_may_come_one_by_one(strategy: Any) -> None:
    *_, last = play(strategy, EQUAL)
    again = strategy.aggregate(last.before, iter(last.uploads), last.round)
    assert_same_model(strategy, last.after, again, atol=0)


@every_strategy
def test_one_client_alone_is_kept_as_it_is(strategy: Any) -> None:
    for played in play(strategy, EQUAL, [(2,), (1,)]):
        assert deviation(strategy, played) < 1e-12


@every_strategy
def test_no_reply_changes_nothing(strategy: Any) -> None:
    *_, last = play(strategy, EQUAL)
    assert_same_model(strategy, last.after, strategy.aggregate(last.after, [], Round(2, SEED)))


@every_strategy
def test_aggregate_changes_none_of_its_arguments(strategy: Any) -> None:
    *_, last = play(strategy, EQUAL)
    tensors = [*walk(last.before), *(t for u in last.uploads for _, _, t in u.sent.items())]
    before = [t.clone() for t in tensors]
    strategy.aggregate(last.before, last.uploads, last.round)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before, strict=True))


@every_strategy
def test_the_state_shares_no_storage_with_an_upload(strategy: Any) -> None:
    *_, last = play(strategy, EQUAL, [(0,), (0, 1)])
    before = [t.clone() for t in walk(last.after)]
    for u in last.uploads:
        for _, _, t in u.sent.items():
            t.fill_(99)
    assert all(torch.equal(t, copy) for t, copy in zip(walk(last.after), before, strict=True))


@every_strategy
def test_the_same_call_gives_the_same_bits(strategy: Any) -> None:
    *_, one = play(strategy, EQUAL, COHORTS)
    *_, two = play(strategy, EQUAL, COHORTS)
    assert all(torch.equal(x, y) for x, y in zip(walk(one.after), walk(two.after), strict=True))


@every_strategy
def test_a_module_that_no_one_sent_is_carried_unchanged(strategy: Any) -> None:
    without = [
        dataclasses.replace(c, layers={m: x for m, x in c.layers.items() if "0" in m})
        for c in EQUAL
    ]
    state = None
    for i, clients in enumerate((EQUAL, without)):
        start = strategy.init(make_start(EQUAL)) if state is None else state
        visits = [visit(strategy, start, c, Site(), Round(i + 1, SEED)) for c in clients]
        state = strategy.aggregate(start, [v.upload for v in visits], Round(i + 1, SEED))
        played = Played(Round(i + 1, SEED), start, visits, state)
        assert not without[0].layers.keys() >= EQUAL[0].layers.keys()
        if i == 1:
            m = "layers.1.down"
            old, new = (model(strategy, s)[0].get(m) for s in (played.before, played.after))
            assert (old is None and new is None) or torch.allclose(old, new, rtol=0, atol=1e-12)


@every_strategy
def test_a_client_whose_memory_is_gone_says_so(strategy: Any) -> None:
    if not strategy.requires.client_memory:
        pytest.skip("needs no memory")
    state = strategy.init(make_start(EQUAL))
    client = dataclasses.replace(EQUAL[0], has_memory=True)
    download = strategy.download(state, client, Round(1, SEED))
    with pytest.raises(ClientMemoryError, match=r"client 0 no longer has .* 'layers.0.q_proj'"):
        strategy.start(download, Factors(), client, Round(1, SEED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_strategy
def test_factors_keep_their_dtype(strategy: Any, dtype: torch.dtype) -> None:
    *_, last = play(strategy, EQUAL, [(0, 1, 2)], dtype=dtype)
    for c, name, t in strategy.effective(last.after).factors.items():
        assert t.dtype == dtype, (c, name)
        assert t.isfinite().all()
    for version in strategy.effective(last.after).base:
        for delta in version.delta.values():
            assert all(t.dtype == torch.float32 for t in walk(delta))


@every_strategy
def test_the_state_is_made_of_what_a_checkpoint_can_write(strategy: Any) -> None:
    *_, last = play(strategy, EQUAL, COHORTS)
    assert list(walk(last.after))  # walk raises on a type it does not know


@pytest.mark.parametrize("name", STRATEGIES)
def test_hyperparameters_are_what_a_config_can_hold(name: str) -> None:
    for f in dataclasses.fields(STRATEGIES[name]):  # type: ignore[arg-type]
        assert isinstance(f.default, int | float | bool | str), f"{name}.{f.name}"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_frozen_and_says_what_it_requires(name: str) -> None:
    cls: Any = STRATEGIES[name]
    assert cls.__dataclass_params__.frozen
    assert isinstance(cls.requires, Requires)
    assert cls.__bases__ == (object,)


# What a client sends up and is sent down, a layer, in its second round of m = 3 clients.
COSTS = {
    "fedavg": ("r * (d + k)", "r * (d + k)"),
    "ffa": ("r * d", "r * d"),
    "fedex": ("r * (d + k)", "m * r * (d + k)"),
    "flora": ("r * (d + k)", "m * r * (d + k)"),
    "fedsa": ("r * k", "r * k"),
    "fedsb": ("r * r", "r * r"),
    "fslora": ("r * (d + k)", "r * (d + k)"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_travels_is_what_the_docstring_says(name: str) -> None:
    assert name in COSTS, f"add the costs of {name}, from its docstring, to COSTS"
    *_, last = play(STRATEGIES[name](), EQUAL, [(0, 1, 2), (0, 1, 2)])

    def numbers(formula: str, client: Client) -> int:
        layers = client.layers.values()
        return sum(eval(formula, {"d": x.d, "k": x.k, "r": x.rank, "m": 3}) for x in layers)

    for v in last.visits:
        up, down = (numbers(formula, v.upload.client) for formula in COSTS[name])
        assert sum(v.sent_up[c] for c in "ABR") == up
        assert sum(n for c, n in v.sent_down.items() if c != "other") == down


def walk(x: Any) -> list[Tensor]:
    """The tensors of a state, in order; the types are those the checkpoint encoder knows."""
    if isinstance(x, Tensor):
        return [x]
    if x is None or isinstance(x, int | float | str | bool):
        return []
    if isinstance(x, tuple):
        return [t for item in x for t in walk(item)]
    if isinstance(x, Mapping):
        assert all(isinstance(key, str | int) for key in x)
        return [t for item in x.values() for t in walk(item)]
    known = isinstance(x, Factors | Pair | Version | BaseLog)
    assert known or (dataclasses.is_dataclass(x) and type(x).__dataclass_params__.frozen), type(x)
    return [t for f in dataclasses.fields(x) for t in walk(getattr(x, f.name))]


def test_the_sizes_of_this_federation_are_all_different() -> None:
    sizes = {size for x in EQUAL[0].layers.values() for size in (x.d, x.k, x.rank)}
    assert len(sizes) == 3 * 3 - 1  # the square module has one size twice
    assert len(set(EXAMPLES.values())) == len(EXAMPLES)
