"""Clients that mean harm, beyond one bad reply: too large, again and again, or someone else.

What one reply can be, see test_bad_clients; what bytes can be, see test_wire and
test_wire_dtypes.
"""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from hypothesis import HealthCheck, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from client_app.app import app as client_app
from fedlora.config.reader import Config
from fedlora.errors import FedLoraError, UpdateError, WireError
from fedlora.federation.server.exchange import Limits, Received, read_reply
from fedlora.federation.server.finish import finish
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.planning import Planner
from fedlora.federation.server.roster import Roster, read_facts
from fedlora.federation.wire.messages import unpack
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.reports.console import Silent
from fedlora.strategies.base import Client, Layer, Round
from tests.federation.test_bad_clients import Bad, arrays, poison
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
ALWAYS = tuple(range(1, 100))


# -- norms --------------------------------------------------------------------------------------


def larger(factor: float):
    """Scale A up and B, were it scaled down, would hide it: both are left as they are but A."""
    import numpy as np

    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        for key in list(arrays(reply)):
            if key.startswith("A/"):
                old = arrays(reply)[key]
                data = (np.frombuffer(old.data, dtype=np.float32) * factor).tobytes()
                arrays(reply)[key] = Array(
                    dtype=old.dtype, shape=old.shape, stype=old.stype, data=data
                )
        return reply

    return spoil


def test_an_update_of_ten_thousand_times_the_norm_is_refused(settings: Settings) -> None:
    bad = Bad(larger(1e4), rounds=(2,))
    given_ = quick("fedavg", **{"round.max-norm": 100.0, "round.norm-bound": 0.0})
    found = federate(settings(**given_), bad)
    failure = found.rounds[2]["failures"][0]
    assert failure["client"] == 1
    assert "the norm of its adapter is" in failure["reason"]
    assert "round.max-norm = 100" in failure["reason"]
    assert found.rounds[2]["accepted"] == [0, 2]


def test_without_a_limit_it_would_have_counted(settings: Settings) -> None:
    """The counterexample: the limit is what keeps it out."""
    given_ = settings(**quick("fedavg", **{"round.norm-bound": 0.0}))
    found = federate(given_, Bad(larger(1e4), rounds=(2,)))
    assert found.rounds[2]["accepted"] == [0, 1, 2]


def test_an_honest_client_is_below_the_limit_whatever_its_factors_look_like(
    settings: Settings,
) -> None:
    """A * 1000 with B / 1000 is the same update: round.max-norm judges the product alone."""
    import numpy as np

    def turned(_: Message, reply: Message, __: Bad) -> Message:
        for key in list(arrays(reply)):
            old = arrays(reply)[key]
            factor = {"A": 1e3, "B": 1e-3}.get(key[0], 1.0)
            data = (np.frombuffer(old.data, dtype=np.float32) * factor).tobytes()
            arrays(reply)[key] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=data)
        return reply

    given_ = settings(**quick("fedavg", **{"round.max-norm": 100.0, "round.norm-bound": 0.0}))
    assert federate(given_, Bad(turned, rounds=(2,))).rounds[2]["accepted"] == [0, 1, 2]


# -- quarantine ---------------------------------------------------------------------------------


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_one_who_keeps_sending_rubbish_is_asked_no_more(settings: Settings) -> None:
    notes = Notes()

    def listen(server: FederatedLora) -> None:
        server.observer = notes

    given_ = settings(**quick("fedavg", **{"run.rounds": 5, "round.quarantine-after": 2}))
    found = federate(given_, Bad(poison(math.nan), rounds=ALWAYS), listen)
    assert [r["cohort"] for r in found.rounds[1:]] == [[0, 1, 2]] * 2 + [[0, 2]] * 3
    assert any("client 1 is asked no more" in text for text in notes.said)


def test_a_good_update_in_between_clears_the_record(settings: Settings) -> None:
    given_ = settings(**quick("fedavg", **{"run.rounds": 5, "round.quarantine-after": 2}))
    found = federate(given_, Bad(poison(math.nan), rounds=(1, 3, 5)))
    assert all(r["cohort"] == [0, 1, 2] for r in found.rounds[1:])


def test_one_who_merely_fails_is_no_offender(settings: Settings) -> None:
    def weak(message: Message, *_: object) -> Message:
        return Message(Error(7, "battery empty"), reply_to=message)

    given_ = settings(**quick("fedavg", **{"run.rounds": 4, "round.quarantine-after": 2}))
    found = federate(given_, Bad(weak, rounds=(1, 2, 3)))
    assert all(r["cohort"] == [0, 1, 2] for r in found.rounds[1:])
    assert found.rounds[4]["accepted"] == [0, 1, 2]


# -- who is who ---------------------------------------------------------------------------------


def liar(changes: dict[str, object], nodes: tuple[int, ...]) -> Callable[..., Message]:
    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "query" and context.node_id in nodes:
            facts = dict(reply.content.config_records["facts"])
            reply.content["facts"] = ConfigRecord({**facts, **changes})  # type: ignore[arg-type]
        return reply

    return app


def test_a_node_that_says_it_is_another_client_is_not_taken_in(settings: Settings) -> None:
    notes = Notes()
    config = Config.read(
        settings(**quick("fedavg", **{"clients.count": 2, "round.wait-for-clients": 5.0}))
    )
    app = liar({"client": 0}, (1002,))
    with LocalGrid(app, 3, config.flat(), 1) as grid:  # type: ignore[arg-type]
        server = FederatedLora(config, notes)
        server.start(grid)
    assert server.session.nodes == {0: 1000, 1: 1001}
    assert any("it says that it is client 0, which node 1000 is" in text for text in notes.said)


@pytest.mark.parametrize(
    "facts",
    [
        {"client": -1, "rank": 1},
        {"client": 2**40, "rank": 1},
        {"client": "0", "rank": 1},
        {"client": 0.0, "rank": 1},
        {"client": True, "rank": 1},
        {"client": [1, 2], "rank": 1},
        {"client": 0, "rank": 10**9},
        {"client": 0, "rank": -3},
        {"client": 0, "rank": 4, "layers": "all"},
        {"client": 0, "rank": 4, "cores": "many"},
        {"client": 0, "rank": 4, "cores": [2]},
        {"client": 0, "rank": 4, "cores": float("nan")},
        {"client": 0, "rank": 4, "cores": -1},
        {"rank": 4},
        {"client": 4},
    ],
)
def test_facts_that_are_none_are_refused(facts: dict[str, object]) -> None:
    with LocalGrid(client_app, 1, {}) as grid:
        ask = Message(RecordDict(), 1000, "query")
        grid.push_messages([ask])
        reply = Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=ask)  # type: ignore[arg-type]
    with pytest.raises(UpdateError, match="its "):
        read_facts(reply)


@pytest.mark.parametrize("policy", ["list", "capability", "adaptive"])
def test_a_rank_that_one_node_states_is_no_larger_than_the_experiments(
    settings: Settings, policy: str
) -> None:
    """It is what the server's state, and in part everybody's download, is as large as."""
    config = Config.read(settings(**quick("fedex", **{"ranks.policy": policy})))
    model = SimpleNamespace(shapes={"layer.0.query": SimpleNamespace(d=8, k=8)})
    planner = Planner(config, model)  # type: ignore[arg-type]
    assert planner.welcome(2, {"rank": 65_535}).rank == 5
    assert planner.welcome(2, {"rank": 4}).rank == 4, "of ranks below it each is the node's own"


# -- coming and going ---------------------------------------------------------------------------


class Comings(LocalGrid):
    """A grid whose nodes are there in some rounds only."""

    def __init__(self, *args: object, absent: dict[int, tuple[int, ...]], **kw: object) -> None:
        super().__init__(*args, **kw)  # type: ignore[arg-type]
        self.absent = absent
        self.round = 0

    def get_node_ids(self) -> list[int]:
        return [n for n in self.contexts if self.round not in self.absent.get(n - 1000, ())]


def came_and_went(
    given_: dict[str, object],
    nodes: int,
    absent: dict[int, tuple[int, ...]],
    node_configs: dict[int, dict[str, object]] | None = None,
) -> tuple[FederatedLora, Ran]:
    config = Config.read(given_)
    with Comings(client_app, nodes, config.flat(), 1, node_configs, absent=absent) as grid:
        server = FederatedLora(config, Notes())
        for number in range(server.begin(grid) + 1, config.run.rounds + 1):
            grid.round = number
            server.round(grid, number)
        finish(server.setting, server.session, server.run, grid)
    return server, Ran(server.setting.journal.directory)


@pytest.mark.parametrize("name", ["fedex", "fedsa", "flora"])
def test_a_node_that_was_away_gets_what_it_lacks_and_nothing_wrong(
    settings: Settings, name: str
) -> None:
    given_ = settings(**quick(name, **{"run.rounds": 4, "round.wait-for-clients": 0.2}))
    _, found = came_and_went(given_, 3, {1: (2, 3)})
    assert [r["cohort"] for r in found.rounds[1:]] == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2]]
    assert found.rounds[4]["accepted"] == [0, 1, 2]
    assert all(r["proof"] is None or not r["failures"] for r in found.rounds)


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_a_node_that_comes_late_joins_where_the_run_is(
    settings: Settings, tiny: dict[str, str], name: str
) -> None:
    given_ = settings(**quick(name, **{"run.rounds": 3, "clients.count": 2}))
    late = {2: {"data-path": tiny["rows"], "rank": 2}}
    server, found = came_and_went(given_, 3, {2: (0, 1)}, late)
    assert [r["accepted"] for r in found.rounds[1:]] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert server.run.members[2].rounds == 2


def test_one_of_a_higher_rank_than_the_run_began_with_is_left_out_with_the_reason(
    settings: Settings, tiny: dict[str, str]
) -> None:
    given_ = settings(**quick("fedex", **{"run.rounds": 2, "clients.count": 2}))
    late = {2: {"data-path": tiny["rows"], "rank": 5}}
    server, found = came_and_went(given_, 3, {2: (0, 1)}, late)
    assert [r["accepted"] for r in found.rounds[1:]] == [[0, 1], [0, 1]]
    assert any("its rank 5 is above" in text for text in server.observer.said)  # type: ignore[attr-defined]


def test_one_that_is_gone_is_waited_for_once(settings: Settings, monkeypatch) -> None:
    from fedlora.federation.server import roster
    from tests.support.chaos import Clock

    clock = Clock()
    monkeypatch.setattr(roster, "time", clock)
    given_ = settings(**quick("fedavg", **{"run.rounds": 3, "round.wait-for-clients": 30.0}))
    _, found = came_and_went(given_, 3, {2: (1, 2, 3)})
    assert [r["cohort"] for r in found.rounds[1:]] == [[0, 1]] * 3
    assert 30.0 <= clock.now < 33.0


# -- the boundary, fuzzed -----------------------------------------------------------------------

CLIENT = Client(0, {"m": Layer(6, 5, 2, 8.0)})
SCHEMA = ({("A", "m"): (2, 5), ("B", "m"): (6, 2)}, {"m": 8.0})
value = st.one_of(
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=8),
    st.booleans(),
    st.binary(max_size=8),
)
metric = st.one_of(
    st.integers(-(2**40), 2**40), st.floats(), st.lists(st.integers(0, 9), max_size=3)
)
array = st.builds(
    lambda dtype, stype, shape, data: Array(dtype=dtype, shape=shape, stype=stype, data=data),
    st.sampled_from(["float32", "int8", "bfloat16", "float64", "<f4", ""]),
    st.sampled_from(["fedlora.float32", "fedlora.int8", "fedlora.int4", "numpy.ndarray", ""]),
    st.lists(st.integers(-(2**62), 2**62), max_size=3).map(tuple),
    st.binary(max_size=80),
)


@tries(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tag=st.dictionaries(st.sampled_from(["round", "token", "client", "keeps", "x"]), value),
    metrics=st.dictionaries(st.sampled_from(["num-examples", "loss", "before.accuracy"]), metric),
    tensors=st.dictionaries(st.sampled_from(["A/m", "B/m", "R/m", "A/", "m", ""]), array),
    right=st.booleans(),
)
def test_no_reply_raises_anything_but_ours(tag, metrics, tensors, right) -> None:
    from flwr.app import ArrayRecord, MetricRecord

    if right:
        tag = {"round": 1, "token": "t", "client": 0, "keeps": False}
        metrics = {**metrics, "num-examples": 3}
    records = {
        "reply": ConfigRecord(tag),
        "metrics": MetricRecord(metrics),
        "sent": ArrayRecord(tensors),
    }
    with LocalGrid(client_app, 1, {}):
        ask = Message(RecordDict(), 1000, "train")
        ask.metadata.__dict__["_message_id"] = "0" * 32
        reply = Message(RecordDict(records), reply_to=ask)
    try:
        upload, _ = read_reply(reply, CLIENT, Round(1, 0), "t", SCHEMA, Received(), Limits())
    except FedLoraError:
        return
    assert upload.sent.A["m"].shape == (2, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "float64"])
def test_a_declared_terabyte_costs_no_memory(dtype: str) -> None:
    array = Array(dtype=dtype, shape=(2**20, 2**20), stype=f"fedlora.{dtype}", data=b"x" * 64)
    tracemalloc.start()
    with pytest.raises(WireError):
        unpack(array, "A/m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_pickle_in_a_message_is_bytes_and_is_never_opened(tmp_path: Path) -> None:
    import pickle

    mark = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (mark,))

    for stype in ("fedlora.float32", "numpy.ndarray"):
        with pytest.raises(WireError):
            unpack(Array(dtype="float32", shape=(2,), stype=stype, data=pickle.dumps(Bomb())), "x")
    assert not mark.exists()


def test_nothing_of_ours_can_open_a_pickle() -> None:
    root = Path(__file__).parents[2]
    for folder in ("fedlora", "server_app", "client_app"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text()
            for word in ("import pickle", "torch.load(", "allow_pickle", "joblib", "import dill"):
                assert word not in text, f"{path}: {word}"


def test_a_roster_asks_a_liar_three_times_and_no_more() -> None:
    said: list[str] = []
    roster = Roster(said.append)
    app = liar({"rank": -1}, (1000,))
    with LocalGrid(app, 1, {}) as grid:  # type: ignore[arg-type]
        for _ in range(5):
            assert list(roster.look(grid, 1.0)) == []
    assert len(said) == 3


# -- what a node says it can do -----------------------------------------------------------------


def test_a_node_says_what_it_has_to_train_with() -> None:
    with LocalGrid(client_app, 1, {}) as grid:
        ask = Message(RecordDict(), 1000, "query")
        grid.push_messages([ask])
        (reply,) = grid.pull_messages([ask.metadata.message_id])
    facts = read_facts(reply)
    assert 0.1 < float(facts["gflops"]) < 1e5
    assert 10 < int(facts["memory-mb"]) < 2**31
    assert int(facts["cores"]) >= 1
    assert isinstance(facts["bfloat16"], bool)
