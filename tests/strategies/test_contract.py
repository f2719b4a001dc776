"""What every strategy owes the federation. A new one in STRATEGIES is covered unasked."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import ClientMemoryError
from fedlora.lora.adapter import Factors
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import BeginsFromGradient, Client, CollectsAtEnd, Needs, Round
from fedlora.testing import contract
from tests.support.strategy_federation import (
    EQUAL,
    EXAMPLES,
    SEED,
    fitting,
    make_start,
    play,
    variants,
)

VARIANTS = variants()
RUNS = {
    f"{name}-{which}": (strategy, clients)
    for name, strategy in VARIANTS.items()
    for which, clients in contract.FEDERATIONS.items()
    if not list(strategy.problems(clients)) and ("[" not in name or "mixed" in which)
}
EXACT = {key: run for key, run in RUNS.items() if run[0].promise == "exact"}
WEIGHS_OTHERWISE = ("hetlora",)  # by the norm of each update
BY_EXAMPLES = {key: run for key, run in RUNS.items() if not key.startswith(WEIGHS_OTHERWISE)}
REFUSED = {
    f"{name}-{which}": (strategy, clients)
    for name, strategy in VARIANTS.items()
    for which, clients in contract.FEDERATIONS.items()
    if list(strategy.problems(clients))
}
REMEMBERING = {name: s for name, s in VARIANTS.items() if s.needs().client_memory}

every_strategy = pytest.mark.parametrize("strategy", VARIANTS.values(), ids=VARIANTS)
every_run = pytest.mark.parametrize(("strategy", "clients"), RUNS.values(), ids=RUNS)


@pytest.mark.parametrize(("strategy", "clients"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_to_use_instead(strategy: Any, clients: list[Client]) -> None:
    contract.a_refusal_says_what_to_use_instead(strategy, clients)


@every_strategy
def test_every_strategy_can_run_clients_of_one_rank(strategy: Any) -> None:
    contract.every_strategy_can_run_clients_of_one_rank(strategy)


@every_run
def test_an_exact_strategy_is_exact_in_every_round_and_any_cohort(
    strategy: Any, clients: list[Client]
) -> None:
    contract.an_exact_strategy_is_exact_in_every_round_and_any_cohort(strategy, clients)


@pytest.mark.parametrize(("strategy", "clients"), EXACT.values(), ids=EXACT)
def test_under_an_exact_strategy_each_client_starts_from_the_whole_model(
    strategy: Any, clients: list[Client]
) -> None:
    contract.under_an_exact_strategy_each_client_starts_from_the_whole_model(strategy, clients)


@every_run
def test_every_direction_a_client_receives_can_learn(strategy: Any, clients: list[Client]) -> None:
    contract.every_direction_a_client_receives_can_learn(strategy, clients)


@every_strategy
def test_a_client_that_was_away_catches_up_to_the_same_bits(strategy: Any) -> None:
    contract.a_client_that_was_away_catches_up_to_the_same_bits(strategy)


@every_run
def test_the_order_of_replies_does_not_matter(strategy: Any, clients: list[Client]) -> None:
    contract.the_order_of_replies_does_not_matter(strategy, clients)


@every_strategy
def test_only_the_ratios_of_num_examples_matter(strategy: Any) -> None:
    contract.only_the_ratios_of_num_examples_matter(strategy)


@every_run
def test_the_same_update_at_another_scale_counts_the_same(
    strategy: Any, clients: list[Client]
) -> None:
    contract.the_same_update_at_another_scale_counts_the_same(strategy, clients)


@pytest.mark.parametrize(("strategy", "clients"), BY_EXAMPLES.values(), ids=BY_EXAMPLES)
def test_an_update_of_thrice_the_examples_counts_as_three(
    strategy: Any, clients: list[Client]
) -> None:
    contract.an_update_of_thrice_the_examples_counts_as_three(strategy, clients)


@every_strategy
def test_a_client_without_examples_counts_for_nothing(strategy: Any) -> None:
    contract.a_client_without_examples_counts_for_nothing(strategy)


@every_strategy
def test_uploads_may_come_one_by_one(strategy: Any) -> None:
    contract.uploads_may_come_one_by_one(strategy)


@every_strategy
def test_one_client_alone_is_kept_as_it_is(strategy: Any) -> None:
    contract.one_client_alone_is_kept_as_it_is(strategy)


@every_strategy
def test_no_reply_changes_nothing(strategy: Any) -> None:
    contract.no_reply_changes_nothing(strategy)


@every_strategy
def test_aggregate_changes_none_of_its_arguments(strategy: Any) -> None:
    contract.aggregate_changes_none_of_its_arguments(strategy)


@every_strategy
def test_the_state_shares_no_storage_with_an_upload_but_in_a_stack(strategy: Any) -> None:
    contract.the_state_shares_no_storage_with_an_upload_but_in_a_stack(strategy)


@every_strategy
def test_the_same_call_gives_the_same_bits(strategy: Any) -> None:
    contract.the_same_call_gives_the_same_bits(strategy)


@every_strategy
def test_a_module_that_no_one_sent_is_carried_unchanged(strategy: Any) -> None:
    contract.a_module_that_no_one_sent_is_carried_unchanged(strategy)


@pytest.mark.parametrize("strategy", REMEMBERING.values(), ids=REMEMBERING)
def test_a_client_whose_memory_is_gone_says_so(strategy: Any) -> None:
    contract.a_client_whose_memory_is_gone_says_so(strategy)
    state = strategy.init(make_start(fitting(strategy)))
    client = dataclasses.replace(fitting(strategy)[0], has_memory=True)
    download = strategy.download(state, client, Round(1, SEED))
    with pytest.raises(ClientMemoryError, match=r"client 0 no longer has .* 'layers.0.q_proj'"):
        strategy.start(download, Factors(), client, Round(1, SEED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_strategy
def test_factors_keep_their_dtype(strategy: Any, dtype: torch.dtype) -> None:
    contract.factors_keep_their_dtype(strategy, dtype)


@every_strategy
def test_a_state_comes_back_from_a_checkpoint_bit_for_bit(strategy: Any, tmp_path: Path) -> None:
    contract.a_state_comes_back_from_a_checkpoint_bit_for_bit(strategy, tmp_path)


@pytest.mark.parametrize("name", STRATEGIES)
def test_hyperparameters_are_what_a_config_can_hold(name: str) -> None:
    for f in dataclasses.fields(STRATEGIES[name]):  # type: ignore[arg-type]
        assert isinstance(f.default, int | float | bool | str), f"{name}.{f.name}"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_frozen_and_says_what_it_needs(name: str) -> None:
    cls: Any = STRATEGIES[name]
    assert cls.__dataclass_params__.frozen
    assert isinstance(cls().needs(), Needs)
    assert cls.__bases__ == (object,)


@every_strategy
def test_a_strategy_has_the_methods_of_what_it_needs(strategy: Any) -> None:
    contract.a_strategy_has_the_methods_of_what_it_needs(strategy)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_method_beyond_the_protocol_is_needed_with_some_option(name: str) -> None:
    needed = [s.needs() for key, s in VARIANTS.items() if re.match(rf"{name}(\[|$)", key)]
    has = VARIANTS[name]
    assert isinstance(has, BeginsFromGradient) == any(x.first_gradient for x in needed)
    assert isinstance(has, CollectsAtEnd) == any(x.collect_at_end for x in needed)


@every_strategy
def test_a_client_keeps_something_just_where_the_strategy_needs_memory(strategy: Any) -> None:
    contract.a_client_keeps_something_just_where_the_strategy_needs_memory(strategy)


# What a client sends up and is sent down, a layer, in its second round of m = 3 clients.
COSTS = {
    "fedavg": ("r * (d + k)", "r * (d + k)"),
    "ffa": ("r * d", "r * d"),
    "fedex": ("r * (d + k)", "m * r * (d + k)"),
    "flora": ("r * (d + k)", "m * r * (d + k)"),
    "fedsa": ("r * k", "r * k"),
    "fedsb": ("r * r", "r * r"),
    "fslora": ("r * (d + k)", "r * (d + k)"),
    "hetlora": ("r * (d + k)", "r * (d + k)"),
    "flexlora": ("r * (d + k)", "r * (d + k)"),
    "raflora": ("r * (d + k)", "r * (d + k)"),
    "florist": ("r * (d + k)", "max(t, r) * (d + k)"),
    "lora-fair": ("r * (d + k)", "r * (d + k)"),
    "rolora": ("r * k", "r * (d + k)"),  # the second round trains A
    "lora-a2": ("r * k", "r * (d + k)"),
    "fedsvd": ("r * d", "r * (d + k)"),
    "fed-plora": ("r * (d + k)", "r * (d + k)"),
    "frlora": ("r * (d + k)", "3 * r * (d + k)"),
    "ravan": ("r * 4", "r * 4"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_travels_is_what_the_docstring_says(name: str) -> None:
    assert name in COSTS, f"add the costs of {name}, from its docstring, to COSTS"
    strategy: Any = STRATEGIES[name]()
    *_, last = play(strategy, fitting(strategy), [(0, 1, 2), (0, 1, 2)])

    def numbers(formula: str, client: Client) -> int:
        held = strategy.effective(last.before).factors.A
        return sum(
            eval(formula, {"d": x.d, "k": x.k, "r": x.rank, "m": 3, "t": len(held.get(m, ()))})
            for m, x in client.layers.items()
        )

    for v in last.visits:
        up, down = (numbers(formula, v.upload.client) for formula in COSTS[name])
        assert sum(v.sent_up[c] for c in "ABR") == up
        assert sum(n for c, n in v.sent_down.items() if c != "other") == down


def test_the_sizes_of_this_federation_are_all_different() -> None:
    sizes = {size for x in EQUAL[0].layers.values() for size in (x.d, x.k, x.rank)}
    assert len(sizes) == 3 * 3 - 1  # the square module has one size twice
    assert len(set(EXAMPLES.values())) == len(EXAMPLES)
