"""The whole contract over one strategy.

check_strategy(Mine)        AssertionError, with the check, the options and the clients it was
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fedlora.testing.contract as contract
from fedlora.strategies import registry
from fedlora.strategies.base import Strategy
from fedlora.testing.federation import variants

Check = Callable[..., None]

OF_A_STRATEGY: tuple[Check, ...] = (
    contract.every_strategy_can_run_clients_of_one_rank,
    contract.a_strategy_has_the_methods_of_what_it_needs,
    contract.a_client_that_was_away_catches_up_to_the_same_bits,
    contract.only_the_ratios_of_num_examples_matter,
    contract.a_client_without_examples_counts_for_nothing,
    contract.uploads_may_come_one_by_one,
    contract.one_client_alone_is_kept_as_it_is,
    contract.no_reply_changes_nothing,
    contract.aggregate_changes_none_of_its_arguments,
    contract.the_state_shares_no_storage_with_an_upload_but_in_a_stack,
    contract.the_same_call_gives_the_same_bits,
    contract.a_module_that_no_one_sent_is_carried_unchanged,
    contract.a_client_keeps_something_just_where_the_strategy_needs_memory,
)
OF_A_RUN: tuple[Check, ...] = (
    contract.an_exact_strategy_is_exact_in_every_round_and_any_cohort,
    contract.every_direction_a_client_receives_can_learn,
    contract.the_order_of_replies_does_not_matter,
    contract.the_same_update_at_another_scale_counts_the_same,
)


def check_strategy(cls: type[Strategy[Any]], weighs_by_examples: bool = True) -> None:
    """Check that the class keeps the contract, with its defaults and each choice it offers.

    Where its state has types from other modules, register it first, as a run needs it as well.
    weighs_by_examples: an update of thrice the examples counts as three.

    Raises:
        StrategyError: it lacks something of the protocol, or no checkpoint could keep its state.
        AssertionError: it breaks a check. Its notes say which, with what options and clients.
    """
    registry.build(cls, {})
    for name, strategy in variants(cls.__name__, cls).items():
        try:
            for check, where, given in cases(strategy, weighs_by_examples):
                try:
                    check(strategy, *given)
                except Exception as e:
                    e.add_note(f"{name}: {check.__name__.replace('_', ' ')}{where}")
                    raise
        finally:
            for key in [k for k in contract.PLAYED if k[0] == id(strategy)]:
                del contract.PLAYED[key]


def cases(
    strategy: Any, weighs_by_examples: bool = True
) -> Iterator[tuple[Check, str, tuple[Any, ...]]]:
    """Each check of a strategy, on which clients, and its further arguments."""
    yield from ((check, "", ()) for check in OF_A_STRATEGY)
    if strategy.needs().client_memory:
        yield contract.a_client_whose_memory_is_gone_says_so, "", ()
    for dtype in (torch.bfloat16, torch.float32):
        yield contract.factors_keep_their_dtype, f", in {dtype}", (dtype,)
    with tempfile.TemporaryDirectory() as directory:
        yield contract.a_state_comes_back_from_a_checkpoint_bit_for_bit, "", (Path(directory),)
    for which, clients in contract.FEDERATIONS.items():
        where = f", clients of {which} ranks"
        if list(strategy.problems(clients)):
            yield contract.a_refusal_says_what_to_use_instead, where, (clients,)
            continue
        yield from ((check, where, (clients,)) for check in OF_A_RUN)
        if strategy.promise == "exact":
            yield (
                contract.under_an_exact_strategy_each_client_starts_from_the_whole_model,
                where,
                (clients,),
            )
        if weighs_by_examples:
            yield contract.an_update_of_thrice_the_examples_counts_as_three, where, (clients,)
