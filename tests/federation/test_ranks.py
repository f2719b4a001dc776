"""Rank policies, LEGEND, clients of different layers, the device model, and what rides on them."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.federation.server.devices import Device, Devices, Work, parse_classes
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.ranks import (
    Legend,
    Timing,
    able,
    by_depth,
    parse_shares,
    patterned,
    shared_out,
    waiting,
)
from fedlora.launch.export import export_run
from fedlora.training import cache
from fedlora.training.model.model import Model
from fedlora.training.train import example_losses
from tests.support.long import few
from tests.support.tiny_federation import federate, quick, read_tensors, timeless

Settings = Callable[..., dict[str, object]]

LAYERS = [[f"layers.{n}.q", f"layers.{n}.v"] for n in range(4)]
SIZES = {m: 10 for group in LAYERS for m in group}
LEGEND = Legend(LAYERS, SIZES, low=2, step=1.5)
DEVICES = "fast:1:100,mid:0.5:20,slow:0.05:5"
SUBSETS = {"ranks.policy": "legend", "ranks.low": 2, "devices.classes": DEVICES}


# -- policies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_every_client_gets_a_rank_and_the_shares_are_kept_to_a_client(count: int) -> None:
    shares = {4: 0.5, 8: 0.3, 16: 0.2}
    dealt = shared_out(shares, count, seed=3)
    assert len(dealt) == count
    assert all(abs(Counter(dealt)[r] - count * share) < 1 for r, share in shares.items())
    assert dealt == shared_out(shares, count, seed=3)


def test_the_seed_deals_the_shares_to_other_clients() -> None:
    dealt = {tuple(shared_out({4: 1, 8: 1}, 12, seed)) for seed in range(5)}
    assert len(dealt) > 1


def test_a_stated_rank_goes_first_and_the_cap_over_all() -> None:
    assert able((4, 8, 16), 0, cores=2, per_core=4, cap=0) == 8
    assert able((4, 8, 16), 0, cores=0.1, per_core=4, cap=0) == 4
    assert able((4, 8, 16), 12, cores=2, per_core=4, cap=0) == 12
    assert able((4, 8, 16), 12, cores=2, per_core=4, cap=6) == 6


@pytest.mark.parametrize("parts", [("4",), ("4:x",), ("0:1",), ("4:-1",), ()])
def test_shares_that_are_none_are_refused_with_an_example(parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"ranks\.shares.*4:0\.5"):
        parse_shares(parts)


# -- LEGEND -----------------------------------------------------------------------------------


def test_legend_ranks_grow_toward_the_output_and_are_the_same_at_every_depth() -> None:
    whole = LEGEND.plan(4)
    ranks = [whole[f"layers.{n}.q"] for n in range(4)]
    assert ranks == sorted(ranks) == [2, 3, 5, 6]
    for depth in (1, 2, 3):
        assert LEGEND.plan(depth).items() <= whole.items()
        assert set(LEGEND.plan(depth)) == {m for group in LAYERS[-depth:] for m in group}


def test_legend_gives_slower_devices_no_more_layers() -> None:
    timings = {i: Timing(1.0 + i, 0.5 * (1 + i), 1e-4 * (1 + i)) for i in range(5)}
    until = LEGEND.deadline(timings, {})
    depths = [LEGEND.depth(t, 0, until) for t in timings.values()]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 4
    assert depths[-1] == 1


def test_legend_keeps_every_client_of_more_than_one_layer_within_the_deadline() -> None:
    timings = {i: Timing(1.0 + 0.2 * i, 0.5 + 0.1 * i, 1e-4) for i in range(6)}
    until = LEGEND.deadline(timings, {})
    depths = {i: LEGEND.depth(t, 0, until) for i, t in timings.items()}
    assert any(1 < k < 4 for k in depths.values())
    for i, depth in depths.items():
        assert depth == 1 or LEGEND.seconds(timings[i], depth) <= until
        deeper = depth + 1
        assert deeper > LEGEND.deepest() or LEGEND.seconds(timings[i], deeper) > until


def test_legend_lowers_the_waiting_time() -> None:
    timings = {0: Timing(1, 1, 1e-3), 1: Timing(2, 2, 2e-3), 2: Timing(3, 3, 3e-3)}
    until = LEGEND.deadline(timings, {})
    planned = [LEGEND.seconds(t, LEGEND.depth(t, 0, until)) for t in timings.values()]
    uniform = [LEGEND.seconds(t, 4) for t in timings.values()]
    assert waiting(planned) < waiting(uniform)


def test_equal_devices_all_train_all_layers() -> None:
    timings = {i: Timing(1.0, 0.5, 1e-4) for i in range(3)}
    until = LEGEND.deadline(timings, {})
    assert {LEGEND.depth(t, 0, until) for t in timings.values()} == {4}


def test_budget_and_memory_bound_the_depth_and_the_unseen_get_that_much() -> None:
    assert replace(LEGEND, budget=6 + 5).deepest() == 2
    assert replace(LEGEND, budget=1).deepest() == 1
    assert LEGEND.deepest(3) == 3
    assert LEGEND.depth(None, 3, until := 0.0) == 3
    assert LEGEND.depth(Timing(1, 1, 1), 3, until) == 1


def test_times_are_an_exponential_mean() -> None:
    assert Timing(1, 2, 4).learn(Timing(2, 4, 8), 0.75) == Timing(1.25, 2.5, 5.0)


def test_a_module_of_no_layer_goes_with_the_last() -> None:
    assert by_depth({"a.0": 0, "a.1": 1, "pooler": None}) == [["a.0"], ["a.1", "pooler"]]


# -- clients of different layers ----------------------------------------------------------------


@pytest.mark.parametrize("absent", ["fold", "leave-out"])
@pytest.mark.parametrize(
    "name", few(["fedavg", "fedex", "flora", "rolora", "flexlora"], "fedavg", "fedex")
)
def test_clients_of_different_layers_make_one_model(
    settings: Settings, name: str, absent: str
) -> None:
    given = {**quick(name, **SUBSETS), "run.rounds": 3, "ranks.absent": absent}
    ran = federate(settings(**given, **{"output.keep-updates": True}))
    assert not any(r["failures"] for r in ran.rounds)
    sent = [ran.update(3, i)[0] for i in range(3)]
    depths = [{n.split(".")[3] for n in x if ".layer." in n} for x in sent]
    assert depths[0] == {"0", "1"}  # the fast one
    assert depths[2] == {"1"}  # the slow one: the last layer only
    if ran.rounds[-1]["proof"]["promise"] == "exact":
        assert ran.rounds[-1]["proof"]["deviation"] < 2e-5
    clients = ran.rounds[-1]["clients"]
    assert clients["2"]["bytes_up"] < clients["0"]["bytes_up"]


def test_a_layer_is_averaged_over_the_clients_that_hold_it(settings: Settings) -> None:
    given = {**quick("fedavg", **SUBSETS), "run.rounds": 2, "output.keep-updates": True}
    ran = federate(settings(**given))
    tensors, _ = read_tensors(ran.directory / "adapter" / "adapter_model.safetensors")
    updates = [ran.update(2, i) for i in range(3)]
    m = "bert.encoder.layer.0.attention.self.query"
    name = next(n for n in updates[0][0] if n.endswith("layer.0.attention.self.query.A"))
    module = name.removesuffix(".A")
    holders = [(x, notes) for x, notes in updates if name in x]
    assert 0 < len(holders) < 3
    total = sum(notes["num_examples"] for _, notes in holders)
    mean = {
        c: sum(notes["num_examples"] / total * x[f"{module}.{c}"].double() for x, notes in holders)
        for c in "AB"
    }
    want = holders[0][1]["scale"][module] * mean["B"] @ mean["A"]
    key = next(n for n in tensors if module in n and n.endswith("lora_A.weight"))
    got = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
    assert m.split(".")[-1] in module
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_what_a_client_does_not_adapt_is_folded_in_and_costs_its_bytes(settings: Settings) -> None:
    def down(absent: str) -> int:
        given = {**quick("fedavg", **SUBSETS), "run.rounds": 3, "ranks.absent": absent}
        ran = federate(settings(**given, **{"run.name": absent}))
        return int(ran.rounds[-1]["clients"]["2"]["bytes_down"])

    assert down("fold") > down("leave-out")


def test_a_strategy_that_keeps_layers_on_its_clients_refuses_legend(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"legend.*fedsa.*use fedavg"):
        federate(settings(**quick("fedsa", **SUBSETS)))
    keeps = {**SUBSETS, "strategy.flora.reinit": "keep-A", "run.name": "keeps"}
    with pytest.raises(ConfigError, match=r"legend.*flora.*use fedavg"):
        federate(settings(**quick("flora", **keeps)))


def test_without_a_device_model_legend_plans_by_what_was_measured(settings: Settings) -> None:
    given = {**quick("fedex"), "ranks.policy": "legend", "run.rounds": 2}
    ran = federate(settings(**given))
    assert all(c["backward_seconds"] > 0 for c in ran.rounds[-1]["clients"].values())


# -- frozen lower layers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "default"), ("bert", "mean"), ("gpt2", "default"), ("llama", "default")],
)
def test_no_gradient_is_computed_below_the_first_adapted_layer(
    settings: Settings, kind: str, pooling: str
) -> None:
    config = Config.read(settings(kind, **{"model.pooling": pooling}))
    labels = cache.corpus(config).labels
    model = Model(config, labels)
    last = {m: 2 for m in model.shapes if ".1." in f".{m}."}
    assert len(last) < len(model.shapes)
    model.load(model.init_factors(site_client(model, last), 0))
    model.trainable(frozenset({"A", "B", "other"}))
    reached: list[str] = []
    carries: dict[str, bool] = {}

    def watch(name: str) -> Callable[..., None]:
        def forward(_: object, __: object, out: object) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, torch.Tensor):
                carries[name] = first.requires_grad
                if first.requires_grad:
                    first.register_hook(lambda _: reached.append(name))

        return forward

    watched = tuple(f".{layers}.{n}" for layers in ("layer", "layers", "h") for n in (0, 1))
    for name, module in model.peft.named_modules():
        if name.endswith(watched) or isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(watch(name))
    rows = cache.encoded("train", 0, config, labels)
    from fedlora.training.data.batches import batches

    batch = next(iter(batches(rows, 4, torch.Generator().manual_seed(0), 1, 1.0)))
    model.peft.train()
    example_losses(model, batch).mean().backward()
    below = {n: c for n, c in carries.items() if not n.endswith(".1")}
    assert len(below) >= 2  # the embeddings and layer 0
    assert not any(below.values())
    assert [n for n in reached if not n.endswith(".1")] == []
    assert any(n.endswith(".1") for n in reached)


def site_client(model: Model, ranks: dict[str, int]):  # type: ignore[no-untyped-def]
    from fedlora.strategies.base import Client

    return Client(0, model.layers(ranks))


# -- the device model ----------------------------------------------------------------------------


def test_virtual_seconds_are_work_over_speed() -> None:
    devices = Devices((Device("a", 2.0, 8.0),), 1.0, 0.0, 0, forward=1e6, backward=1e5)
    spent = devices.spent(0, 1, Work(1000, 3, 2_000_000, 1_000_000, 10))
    assert spent.down == pytest.approx(2.0)
    assert spent.up == pytest.approx(1.0)
    assert spent.forward == pytest.approx(0.5)
    assert spent.backward == pytest.approx(0.15)
    assert spent.total == pytest.approx(3.65)


def test_a_trace_is_a_function_of_seed_and_client_with_the_spread_asked_for() -> None:
    devices = Devices((Device("a", 1, 1),), 1.0, 0.3, 5, 1, 1)
    assert devices.pace(2, 7) == devices.pace(2, 7)
    assert devices.pace(2, 7) != devices.pace(3, 7)
    logs = torch.tensor([math.log(devices.pace(i, 9)[0]) for i in range(300)])
    assert float(logs.std()) == pytest.approx(0.3, rel=0.2)
    assert replace(devices, jitter=0.0).pace(2, 7) == (1.0, 1.0)


@pytest.mark.parametrize("part", ["fast", "fast:1", "fast:0:1", "fast:1:x", ":1:1", "a:1:1:1:1"])
def test_a_device_class_that_is_none_is_refused_with_an_example(part: str) -> None:
    with pytest.raises(ConfigError, match=r"devices\.classes.*slow:0\.2:5"):
        parse_classes((part,))


def test_the_virtual_clock_runs_on_and_is_the_same_every_time(settings: Settings) -> None:
    given = {**quick("fedex"), "devices.classes": DEVICES}
    first, second = (
        federate(settings(**given, **{"run.name": name})).rounds[1:] for name in ("a", "b")
    )
    clocks = [r["virtual"]["clock"] for r in first]
    assert clocks == [r["virtual"]["clock"] for r in second]
    assert clocks[1] == pytest.approx(clocks[0] + first[1]["virtual"]["seconds"])
    slowest = first[0]["virtual"]["clients"]["2"]
    assert slowest["class"] == "slow"
    assert first[0]["virtual"]["seconds"] == slowest["total"]
    assert timeless(first[0])["train_loss"] == timeless(second[0])["train_loss"]


def test_a_reply_after_the_virtual_deadline_does_not_count(settings: Settings) -> None:
    ran = federate(settings(**quick("fedex"), **{"devices.classes": DEVICES,
                            "devices.deadline": 0.02}))  # fmt: skip
    virtual = ran.rounds[1]["virtual"]
    assert virtual["late"] == [2]
    assert [f["client"] for f in ran.rounds[1]["failures"]] == [2]
    assert ran.rounds[1]["accepted"] == [0, 1]
    assert virtual["seconds"] == 0.02


def test_a_layer_limit_that_no_policy_heeds_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"devices\.classes limits.*legend"):
        federate(settings(**quick("fedex"), **{"devices.classes": "slow:1:1:1"}))


# -- server optimisers, robust aggregation, personalisation in a run -------------------------------


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("fedex", {"server.optimizer": "fedadam"}, r"server\.optimizer.*base"),
        ("flexlora", {"server.optimizer": "fedyogi"}, r"server\.optimizer.*refactors"),
        ("fedsa", {"robust.method": "median"}, r"robust\.method.*keeps a factor"),
        ("fedex", {"robust.method": "krum"}, r"robust\.method.*at least 5 clients.*there are 3"),
        ("fedex", {"personalize.epochs": 1}, r"personalize.*evaluate\.clients"),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason_before_round_1(
    settings: Settings, name: str, given: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        federate(settings(**{**quick(name), **given}))


def test_fedavgm_at_rate_1_without_momentum_is_the_mean(settings: Settings) -> None:
    plain = federate(settings(**quick("fedavg"), **{"run.name": "plain"}))
    given = {"server.optimizer": "fedavgm", "server.lr": 1.0, "server.beta1": 0.0}
    stepped = federate(settings(**quick("fedavg"), **given, **{"run.name": "stepped"}))
    a, _ = read_tensors(plain.directory / "adapter" / "adapter_model.safetensors")
    b, _ = read_tensors(stepped.directory / "adapter" / "adapter_model.safetensors")
    for name, x in a.items():
        torch.testing.assert_close(b[name], x, rtol=1e-4, atol=2e-5)


def test_a_resumed_optimiser_goes_on_with_its_moments(settings: Settings) -> None:
    given = {**quick("fedavg"), "server.optimizer": "fedadam", "server.lr": 0.01}
    given |= {"train.lr-schedule": "constant", "devices.classes": DEVICES}
    whole = federate(settings(**{**given, "run.name": "whole", "run.rounds": 3}))
    federate(settings(**{**given, "run.name": "parts", "run.rounds": 2}))
    parts = federate(
        settings(**{**given, "run.name": "parts", "run.rounds": 3, "run.resume": True})
    )
    assert whole.adapter == parts.adapter
    clocks = [r["virtual"]["clock"] for r in whole.rounds[1:]]
    assert clocks == [r["virtual"]["clock"] for r in parts.rounds[1:]]


@pytest.mark.parametrize(
    "method", few(["norm-bound", "trimmed", "median", "multi-krum"], "norm-bound", "median")
)
def test_robust_methods_compose_with_an_exact_strategy_and_say_what_they_did(
    settings: Settings, method: str
) -> None:
    given = {**quick("fedex"), "clients.count": 5, "robust.method": method, "robust.share": 0.3}
    ran = federate(settings(**given))
    said = ran.rounds[-1]["robust"]
    assert said["method"] == method
    assert len(said["norms"]) == 5
    assert bool(said["dropped"]) == (method in ("trimmed", "multi-krum"))
    assert ran.rounds[-1]["proof"]["deviation"] < 2e-5


def test_every_client_is_scored_by_the_global_its_own_and_a_lonely_model(
    settings: Settings,
) -> None:
    given = {**quick("fedex"), "evaluate.clients": True, "personalize.epochs": 1.0}
    ran = federate(settings(**given, **{"personalize.alone": True}))
    import json

    clients = [json.loads(x) for x in (ran.directory / "clients.jsonl").read_text().splitlines()]
    for c in clients:
        assert {"final", "personalized", "alone"} <= {k for k, v in c.items() if v}
        assert c["final"]["loss"] != c["personalized"]["loss"] != c["alone"]["loss"]
    summary = json.loads((ran.directory / "summary.json").read_text())["clients"]
    mean = sum(c["personalized"]["accuracy"] for c in clients) / len(clients)
    assert summary["personalized"]["accuracy"] == pytest.approx(mean)
    assert list(ran.directory.glob("clients/*/client-0/personal.safetensors"))


# -- ranks by module ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [("value=8",), ("layer.1.*=2", "value=8"), (r".*0\..*query=3",)]
)
def test_a_rank_pattern_is_read_as_peft_reads_its_own(
    settings: Settings, pattern: tuple[str, ...]
) -> None:
    from peft.utils.other import get_pattern_key

    model = Model(Config.read(settings()), ("x", "y"))
    own = dict(part.rsplit("=", 1) for part in pattern)
    want = {m: int(own.get(get_pattern_key(own.keys(), m), 5)) for m in model.shapes}
    assert patterned(model.shapes, 5, pattern) == want
    assert len(set(want.values())) > 1


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("walue=8", r"'walue=8' is the first match of no adapted module; .*query"),
        ("value=8,layer.1.*value=2", "'layer.1.*value=2' is the first match of no"),
        ("value=0", "'value=0' must be a regular expression, '=' and a positive rank"),
        ("va(lue=8", "must be a regular expression"),
        ("value=eight", "must be a regular expression"),
    ],
)
def test_a_rank_pattern_that_says_nothing_is_an_error_before_any_client(
    settings: Settings, pattern: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        FederatedLora(Config.read(settings(**{"lora.rank-pattern": pattern})))


def test_clients_of_any_rank_share_the_pattern_and_are_exported(
    settings: Settings, tmp_path: Path
) -> None:
    more = {"lora.rank-pattern": "value=7", "output.keep-updates": True}
    ran = federate(settings(**quick("fedex", **more)))
    for client, rank in enumerate((2, 3, 5)):
        tensors, notes = ran.update(2, client)
        for name, x in tensors.items():
            if name.endswith(".A"):
                assert x.shape[0] == (7 if ".value" in name else rank)
        scale = {m: s for m, s in notes["scale"].items() if m.endswith("value")}
        assert scale
        assert all(s == pytest.approx(16 / 7) for s in scale.values())
    assert ran.rounds[-1]["proof"]["model_deviation"] < ran.rounds[-1]["proof"]["bound"]
    assert export_run(ran.directory, tmp_path / "out").deviation < 1e-5
