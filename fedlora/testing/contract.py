"""The contract of a strategy: what it owes the federation, one check a promise.

Each check is named for what it holds the strategy to. Rounds are played in float64 on plain
tensors whose sizes are all different (federation.py): no model, a few seconds in all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.errors import ClientMemoryError
from fedlora.federation.server.journal import check_kept, state_types
from fedlora.lora.adapter import Factors, Pair, Stack, dense
from fedlora.lora.tree_file import load, save
from fedlora.strategies.base import Client, Round, Upload, Version, begins, collects
from fedlora.strategies.base_log import BaseLog
from fedlora.testing.federation import (
    EQUAL,
    EVEN,
    EVEN_MIXED,
    MIXED,
    PARTIAL,
    RESCALED,
    SEED,
    Played,
    Site,
    assert_same,
    base_change,
    deviation,
    fitting,
    make_start,
    model_change,
    play,
    visit,
)

FEDERATIONS = {
    "equal": EQUAL,
    "rescaled": RESCALED,
    "partial": PARTIAL,
    "mixed": MIXED,
    "even": EVEN,
    "even-mixed": EVEN_MIXED,
}
COHORTS = ((0, 1, 2), (3, 0), (1, 3), (2,), (3, 1, 0, 2))
PLAYED: dict[tuple[int, int], tuple[Any, Any, list[Played]]] = {}


def rounds(strategy: Any, clients: Sequence[Client]) -> list[Played]:
    """The rounds of COHORTS, played once for all the checks that only look at them."""
    key = id(strategy), id(clients)
    if key not in PLAYED:  # with what the ids are of, so that no other gets them
        PLAYED[key] = strategy, clients, list(play(strategy, clients, COHORTS))
    return PLAYED[key][2]


def a_refusal_says_what_to_use_instead(strategy: Any, clients: Sequence[Client]) -> None:
    """A refusal says what to use instead."""
    for problem in strategy.problems(clients):
        assert "; use " in problem


def every_strategy_can_run_clients_of_one_rank(strategy: Any) -> None:
    """Every strategy can run clients of one rank."""
    assert not list(strategy.problems(fitting(strategy)))


def model(strategy: Any, state: Any) -> tuple[dict[str, Tensor], Factors]:
    """What the model is, less W0, dense by module; and its head."""
    effective = strategy.effective(state)
    return model_change(effective), Factors(other=effective.factors.other)


def assert_same_model(strategy: Any, x: Any, y: Any, atol: float = 1e-11) -> None:
    """AssertionError where two states are two models."""
    (left, left_head), (right, right_head) = model(strategy, x), model(strategy, y)
    assert left.keys() == right.keys()
    for m in left:
        assert_close(left[m], right[m], rtol=0, atol=atol)
    assert_same(left_head, right_head)


def an_exact_strategy_is_exact_in_every_round_and_any_cohort(
    strategy: Any, clients: Sequence[Client]
) -> None:
    """An exact strategy is exact in every round and any cohort."""
    gaps = [deviation(strategy, played) for played in rounds(strategy, clients)]
    if strategy.promise in ("exact", "shared"):
        assert max(gaps) < 1e-12
    else:
        assert max(gaps) < 10  # reported, not promised; but of the size of the model


def under_an_exact_strategy_each_client_starts_from_the_whole_model(
    strategy: Any, clients: Sequence[Client]
) -> None:
    """Under an exact strategy each client starts from the whole model."""
    for played in rounds(strategy, clients):
        whole = model_change(strategy.effective(played.before))
        for v in played.visits:
            for m in v.upload.client.layers:
                want = whole.get(m, torch.zeros_like(v.start_model[m]))
                assert_close(v.start_model[m], want, rtol=0, atol=1e-11)


def every_direction_a_client_receives_can_learn(strategy: Any, clients: Sequence[Client]) -> None:
    """A row of A and a column of B that are both 0 get no gradient, ever. Delta cannot show it."""
    for played in rounds(strategy, clients)[::3]:
        for client in clients:
            download = strategy.download(played.after, client, played.round)
            loaded = strategy.start(download, Factors(), client, played.round)
            for m, A in loaded.A.items():
                sizes = A.norm(dim=1) + loaded.B[m].norm(dim=0)
                assert (sizes > 0.1).all()


def a_client_that_was_away_catches_up_to_the_same_bits(strategy: Any) -> None:
    """A client that was away catches up to the same bits."""
    sites: dict[int, Site] = {}
    *_, last = play(strategy, fitting(strategy), COHORTS, sites)
    rejoined = [sites.setdefault(i, Site()) for i in range(4)]
    round = Round(len(COHORTS) + 1, SEED)
    for i, site in enumerate(rejoined):
        visit(strategy, last.after, fitting(strategy)[i], site, round)
    newcomer = Site()
    visit(strategy, last.after, fitting(strategy)[0], newcomer, round)
    server = base_change(strategy.effective(last.after).base)
    for site in (*rejoined, newcomer):
        assert site.base.keys() == server.keys()
        for m, total in server.items():
            assert torch.equal(site.base[m], total)


def the_order_of_replies_does_not_matter(strategy: Any, clients: Sequence[Client]) -> None:
    """The order of replies does not matter."""
    last = rounds(strategy, clients)[-1]
    again = strategy.aggregate(last.before, last.uploads[::-1], last.round)
    assert_same_model(strategy, last.after, again)


def only_the_ratios_of_num_examples_matter(strategy: Any) -> None:
    """Only the ratios of num examples matter."""
    last = rounds(strategy, fitting(strategy))[-1]
    tenfold = [dataclasses.replace(u, num_examples=10 * u.num_examples) for u in last.uploads]
    again = strategy.aggregate(last.before, tenfold, last.round)
    assert_same_model(strategy, last.after, again)


def at_scale(upload: Upload, c: float) -> Upload:
    """The same update, written at c times its scale: B, or the core, is divided by c."""
    sent = upload.sent
    B, R = ({m: x / c for m, x in columns.items()} for columns in (sent.B, sent.R))
    layers = {m: dataclasses.replace(x, scale=c * x.scale) for m, x in upload.client.layers.items()}
    return dataclasses.replace(
        upload,
        client=dataclasses.replace(upload.client, layers=layers),
        sent=dataclasses.replace(
            sent,
            scale={m: c * s for m, s in sent.scale.items()},
            B=sent.B if sent.R else B,
            R=R,
        ),
    )


def the_same_update_at_another_scale_counts_the_same(
    strategy: Any, clients: Sequence[Client]
) -> None:
    """A scale that is dropped anywhere shows, also where nothing exact is promised."""
    last = rounds(strategy, clients)[-1]
    again = [at_scale(u, 1 + i / 2) for i, u in enumerate(last.uploads)]
    assert_same_model(strategy, last.after, strategy.aggregate(last.before, again, last.round))


def an_update_of_thrice_the_examples_counts_as_three(
    strategy: Any, clients: Sequence[Client]
) -> None:
    """An update of thrice the examples counts as three."""
    last = rounds(strategy, clients)[-1]
    first, *rest = last.uploads
    thrice = dataclasses.replace(first, num_examples=3 * first.num_examples)
    one = strategy.aggregate(last.before, [thrice, *rest], last.round)
    three = strategy.aggregate(last.before, [first, first, first, *rest], last.round)
    assert_same_model(strategy, one, three)


def a_client_without_examples_counts_for_nothing(strategy: Any) -> None:
    """A client without examples counts for nothing."""
    last = rounds(strategy, fitting(strategy))[-1]
    nothing = dataclasses.replace(last.uploads[1], num_examples=0)
    with_it = [last.uploads[0], nothing, *last.uploads[2:]]
    without = [last.uploads[0], *last.uploads[2:]]
    assert_same_model(
        strategy,
        strategy.aggregate(last.before, with_it, last.round),
        strategy.aggregate(last.before, without, last.round),
    )


def uploads_may_come_one_by_one(strategy: Any) -> None:
    """Uploads may come one by one."""
    last = rounds(strategy, fitting(strategy))[-1]
    again = strategy.aggregate(last.before, iter(last.uploads), last.round)
    assert_same_model(strategy, last.after, again, atol=0)


def one_client_alone_is_kept_as_it_is(strategy: Any) -> None:
    """One client alone is kept as it is."""
    options = dataclasses.asdict(strategy)
    cut = (1 - options.get("energy", 1)) ** 0.5  # what florist may leave out by its option
    for played in play(strategy, fitting(strategy), [(2,), (1,)]):
        assert deviation(strategy, played) <= max(cut, 1e-12)


def no_reply_changes_nothing(strategy: Any) -> None:
    """No reply changes nothing."""
    last = rounds(strategy, fitting(strategy))[-1]
    assert_same_model(strategy, last.after, strategy.aggregate(last.after, [], Round(6, SEED)))


def aggregate_changes_none_of_its_arguments(strategy: Any) -> None:
    """Of a state that was not aggregated before: writing the same into it twice changes nothing."""
    *_, first = play(strategy, fitting(strategy), [(0, 1, 2)])
    state, round = first.after, Round(2, SEED)
    uploads = [visit(strategy, state, c, Site(), round).upload for c in fitting(strategy)]
    tensors = [*walk(state), *(t for u in uploads for _, _, t in u.sent.items())]
    before = [t.clone() for t in tensors]
    strategy.aggregate(state, uploads, round)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before, strict=True))


def the_state_shares_no_storage_with_an_upload_but_in_a_stack(strategy: Any) -> None:
    """The state shares no storage with an upload but in a stack."""
    *_, last = play(strategy, fitting(strategy), [(0,), (0, 1)])
    own = [t for t in walk(last.after) if id(t) not in stacked(last.after)]
    before = [t.clone() for t in own]
    for u in last.uploads:
        for _, _, t in u.sent.items():
            t.fill_(99)
    assert all(torch.equal(t, copy) for t, copy in zip(own, before, strict=True))


def the_same_call_gives_the_same_bits(strategy: Any) -> None:
    """The same call gives the same bits."""
    one = rounds(strategy, fitting(strategy))[-1]
    *_, two = play(strategy, fitting(strategy), COHORTS)
    assert all(torch.equal(x, y) for x, y in zip(walk(one.after), walk(two.after), strict=True))


def a_module_that_no_one_sent_is_carried_unchanged(strategy: Any) -> None:
    """A module that no one sent is carried unchanged."""
    without = [
        dataclasses.replace(c, layers={m: x for m, x in c.layers.items() if "0" in m})
        for c in fitting(strategy)
    ]
    state = None
    for i, clients in enumerate((fitting(strategy), without)):
        start = strategy.init(make_start(fitting(strategy))) if state is None else state
        visits = [visit(strategy, start, c, Site(), Round(i + 1, SEED)) for c in clients]
        state = strategy.aggregate(start, [v.upload for v in visits], Round(i + 1, SEED))
        played = Played(Round(i + 1, SEED), start, visits, state)
        assert not without[0].layers.keys() >= fitting(strategy)[0].layers.keys()
        if i == 1:
            m = "layers.1.down"
            old, new = (model(strategy, s)[0].get(m) for s in (played.before, played.after))
            if old is None or new is None:
                assert old is new
            else:
                assert_close(old, new, rtol=0, atol=1e-12)


def factors_keep_their_dtype(strategy: Any, dtype: torch.dtype) -> None:
    """Factors keep their dtype."""
    *_, last = play(strategy, fitting(strategy), [(0, 1, 2)], dtype=dtype)
    for c, name, t in strategy.effective(last.after).factors.items():
        assert t.dtype == dtype, (c, name)
        assert t.isfinite().all()
    for version in strategy.effective(last.after).base:
        for delta in version.delta.values():
            assert dense(delta).dtype == torch.float32


def a_state_comes_back_from_a_checkpoint_bit_for_bit(strategy: Any, directory: Path) -> None:
    """A state comes back from a checkpoint bit for bit."""
    last = rounds(strategy, fitting(strategy))[-1]
    check_kept(strategy, last.after)
    save(directory / "state", last.after)
    again = load(directory / "state", *state_types(strategy))
    assert all(torch.equal(x, y) for x, y in zip(walk(last.after), walk(again), strict=True))
    round = Round(len(COHORTS) + 1, SEED)
    for client in fitting(strategy):
        before, after = (strategy.download(x, client, round) for x in (last.after, again))
        assert_same(before.send, after.send, atol=0)
        assert before.penalty == after.penalty


def a_strategy_has_the_methods_of_what_it_needs(strategy: Any) -> None:
    """A strategy has the methods of what it needs."""
    assert (begins(strategy) is strategy) == bool(strategy.needs().first_gradient)
    assert (collects(strategy) is strategy) == strategy.needs().collect_at_end


def a_client_keeps_something_just_where_the_strategy_needs_memory(strategy: Any) -> None:
    """A client keeps something just where the strategy needs memory."""
    last = rounds(strategy, fitting(strategy))[-1]
    client, round = fitting(strategy)[0], last.round
    download = strategy.download(last.after, client, round)
    loaded = strategy.start(download, Factors(), client, round)
    _, kept = strategy.upload(loaded, Factors())
    assert any(kept.items()) == strategy.needs().client_memory


def stacked(state: Any) -> set[int]:
    """The tensors, by id, that are terms of a stack."""
    base = getattr(state, "base", BaseLog())
    deltas = [x for v in base.versions for x in v.delta.values()]
    stacks = [x for x in deltas if isinstance(x, Stack)]
    centres = {id(x.centre.A) for x in stacks if x.centre}
    return {id(t) for x in stacks for t in (*x.A, *x.B)} | centres


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
    known = isinstance(x, Factors | Pair | Stack | Version | BaseLog)
    made: Any = type(x)
    assert known or (dataclasses.is_dataclass(x) and made.__dataclass_params__.frozen), made
    return [t for f in dataclasses.fields(made) for t in walk(getattr(x, f.name))]


def a_client_whose_memory_is_gone_says_so(strategy: Any) -> None:
    """A client whose memory is gone says so."""
    state = strategy.init(make_start(fitting(strategy)))
    client = dataclasses.replace(fitting(strategy)[0], has_memory=True)
    download = strategy.download(state, client, Round(1, SEED))
    try:
        strategy.start(download, Factors(), client, Round(1, SEED))
    except ClientMemoryError:
        return
    raise AssertionError("`start` went on without what the client was to remember")
