"""Devices: which is chosen, what lies where, and the traps that a card sets."""

import ast
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.lora.adapter import Pair
from fedlora.preflight import hardware
from fedlora.strategies.base import Client, Version
from fedlora.training import cache, devices, train
from fedlora.training.data.batches import Encoded, collate
from fedlora.training.devices import HOST, chosen, found, on_host
from fedlora.training.draws import host_draws, own_draws
from fedlora.training.footprint import footprint
from fedlora.training.model import loading
from fedlora.training.model.model import Model
from fedlora.training.optimizers import build_optimizer
from fedlora.training.precision import autocast, computing, resolved
from fedlora.training.tasks import classes
from fedlora.training.train import fit, steps, training
from fedlora.training.training_check import check_training
from tests.house.test_house_rules import SOURCES
from tests.support.pretend_device import CAST, READ, Card, Module

Settings = Callable[..., dict[str, object]]
Cards = list[Card]
TWO = "pretend:1"
STILL = {"model.dropout": 0.0, "model.attention": "eager", "data.limit": 60}


def ready(
    settings: Settings, device: str, kind: str = "bert", **changes: object
) -> tuple[Model, Encoded, Config]:
    """A model on a device, loaded with first factors whose B is not 0, and a client's rows."""
    given = {**STILL, "simulate.devices": device, **changes}
    config = Config.read(settings(kind, **given))
    labels = cache.corpus(config).labels
    model = cache.model(config, labels)
    first = model.init_factors(Client(0, model.layers(dict.fromkeys(model.shapes, 3))), 0)
    generator = torch.Generator().manual_seed(1)
    for B in first.B.values():
        B.add_(0.1 * torch.randn(B.shape, generator=generator))
    model.load(first)
    return model, cache.encoded("train", 0, config, labels), config


def trained(settings: Settings, device: str, **changes: object) -> dict[str, Tensor]:
    model, rows, config = ready(settings, device, **{"train.steps": 2, **changes})
    fit(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
    return {f"{column}/{name}": x for column, name, x in model.read().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def off(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference over the largest number."""
    largest = max(float(x.abs().max()) for x in a.values())
    return max(float((a[k] - b[k]).abs().max()) for k in a) / largest


# -- which ----------------------------------------------------------------------------------------


def test_a_card_is_named_once(cards: Cards) -> None:
    """Two workers on one card would be two bases there."""
    with pytest.raises(ConfigError, match=r"simulate\.devices = 'pretend:1,1'.*twice"):
        found("pretend:1,1")


def test_auto_is_the_accelerator_where_there_is_one(cards: Cards) -> None:
    assert [str(d) for d in found("auto")] == ["pretend:0", "pretend:1"]
    assert str(chosen("auto")) == "pretend:0"
    assert str(chosen("pretend:1,0")) == "pretend:1"
    assert chosen("cpu") == HOST
    Module.present = False
    assert chosen("auto") == HOST


@pytest.mark.parametrize("asked", ["cuda", "mps", "xpu:0", "pretend:2"])
def test_a_device_that_is_not_here_is_refused_by_name(cards: Cards, asked: str) -> None:
    with pytest.raises(ConfigError, match=f"simulate.devices = '{asked}'.*pretend"):
        found(asked)


@pytest.mark.parametrize("asked", ["", "0", "cuda:", "cuda:a", "CUDA", "cuda:0-1", "cuda 0"])
def test_what_names_no_device_is_refused_as_it_is_read(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"simulate\.devices"):
        Config.read({"simulate.devices": asked})


def test_a_device_is_never_what_server_and_client_must_share() -> None:
    configs = [Config.read({"simulate.devices": d}) for d in ("auto", "cpu", "cuda:1")]
    assert len({c.identity() for c in configs}) == 1


def test_only_one_file_knows_kinds_of_devices() -> None:
    """Elsewhere their names stand in docstrings at most: nothing is decided by one."""
    kinds, copies = ("cuda", "mps", "xpu"), ("cpu", "pin_memory")
    for path in SOURCES:
        if path.name == "devices.py" and path.parent.name == "training":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in kinds, f"{path.name}:{node.lineno} {node.attr}"
            if isinstance(node, ast.Call):
                called, given = getattr(node.func, "attr", ""), [k.arg for k in node.keywords]
                slip = called in copies or "pin_memory" in given
                assert not slip, f"{path.name}:{node.lineno} {called} {given}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.replace(":", " ").split()
                known = words[:1] == ["cpu"] or any(kind in words for kind in kinds)
                assert id(node) in said or not known, f"{path.name}:{node.lineno} {node.value}"


# -- what lies where ------------------------------------------------------------------------------


def test_the_model_is_on_its_device_and_what_leaves_it_on_the_host(
    settings: Settings, cards: Cards
) -> None:
    model, rows, config = ready(settings, TWO)
    assert {str(p.device) for p in model.peft.parameters()} == {TWO}
    x = {m: torch.ones(s.k, 2, dtype=torch.float64) for m, s in model.shapes.items()}
    with model.base_gradients() as gradients:
        train.example_losses(model, collate(rows, torch.arange(2))).sum().backward()
        leaves = [*gradients().values()]
    leaves += [*model.weights().values(), *model.probe(x).values(), *model.change(x).values()]
    leaves += [t for _, _, t in model.read().items()]
    assert {x.device for x in leaves} == {HOST}
    assert str(model.logits(collate(rows, torch.arange(2))).device) == TWO
    assert config.simulate.devices == TWO


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_model_is_the_same_on_every_device(settings: Settings, cards: Cards, kind: str) -> None:
    """Its fingerprint, with a newly drawn head, and its first factors: drawn on the host."""
    seen = []
    for device in ("cpu", TWO):
        model, _, _ = ready(settings, device, kind)
        seen.append((model.fingerprint, {f"{c}/{n}": x for c, n, x in model.read().items()}))
    assert seen[0][0] == seen[1][0]
    assert same(seen[0][1], seen[1][1])


def test_a_head_drawn_on_a_card_would_be_another(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ready(settings, "cpu")[0].fingerprint

    @contextmanager
    def drawn_there(device: torch.device, seed: int) -> Any:
        with own_draws([device], seed):
            yield

    monkeypatch.setattr(loading, "host_draws", drawn_there)
    assert ready(settings, TWO)[0].fingerprint != here


def test_a_base_is_loaded_straight_to_its_card(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    real = loading._whole

    def whole(cls: Any, path: str, options: Any, devices: Any) -> Any:
        given.append(options.get("device_map"))
        return real(cls, path, options, devices)

    monkeypatch.setattr(loading, "_whole", whole)
    ready(settings, TWO)
    ready(settings, "cpu")
    assert given == [{"": torch.device(TWO)}, None]


def test_a_moving_bases_origin_is_not_on_the_card_twice(settings: Settings, cards: Cards) -> None:
    model, _, _ = ready(settings, TWO)
    before = cards[1].used
    change = {m: Pair(torch.ones(1, s.k), torch.ones(s.d, 1), 0.1) for m, s in model.shapes.items()}
    model.rebase("run", [Version(1, change)])
    assert cards[1].used == before
    assert {x.device for x in model.base._origin.values()} == {HOST}
    host, _, _ = ready(settings, "cpu")
    host.rebase("run", [Version(1, change)])
    for m in model.shapes:
        there = model.adapted[m].get_base_layer().weight
        assert torch.equal(there.cpu(), host.adapted[m].get_base_layer().weight)


def test_a_base_is_fetched_from_its_card_one_weight_at_a_time(
    settings: Settings, cards: Cards
) -> None:
    """To ask for W0 copies nothing; each weight that is read is one copy, and is not kept."""
    model, _, _ = ready(settings, TWO)
    READ.clear()
    weights = model.weights()
    assert len(weights) == len([*weights]) == len(model.shapes)
    assert "nothing" not in weights
    assert not READ["to host"]
    m = next(iter(weights))
    assert m in weights
    assert not READ["to host"]
    assert weights[m].device == HOST
    assert READ["to host"] == 1
    before = cards[1].used
    devices.forget_most(model.device)
    model.change({m: torch.ones(model.shapes[m].k, 2, dtype=torch.float64)})
    W = weights[m]
    assert devices.most_used(model.device) - before < W.nbytes, "no second copy on the card"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_changes_beside_a_bfloat16_base_are_there_once_and_cast_as_its_products_are(
    settings: Settings, cards: Cards, precision: str
) -> None:
    model, rows, config = ready(
        settings, TWO, **{"model.dtype": "bfloat16", "train.precision": precision}
    )
    change = {
        m: Pair(torch.ones(1, s.k), torch.ones(s.d, 1), 0.01) for m, s in model.shapes.items()
    }
    model.rebase("run", [Version(1, change)])
    READ.clear()
    CAST.clear()
    model.peft.eval()
    with torch.no_grad():
        train.example_losses(model, collate(rows, torch.arange(2)), config.train.precision)
    assert not READ["to host"]
    deltas = [d for term in model.base._terms.values() for d in term.deltas]
    assert {str(d.A.device) for d in deltas if isinstance(d, Pair)} == {TWO}
    assert bool(CAST[torch.bfloat16]) is (precision == "bfloat16")


def test_float64_goes_to_the_host_first(settings: Settings, cards: Cards) -> None:
    """As on Apple's cards, which have none."""
    cards[1].float64 = False
    model, rows, config = ready(settings, TWO)
    x = {m: torch.ones(s.k, 2, dtype=torch.float64) for m, s in model.shapes.items()}
    model.change(x)
    model.probe(x)
    check_training(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
    fit(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)


@pytest.mark.parametrize("says", [False, True])
def test_a_card_without_float64_is_known_by_what_it_raises_or_says(
    cards: Cards, says: bool
) -> None:
    """Apple's raise a TypeError, Intel's a RuntimeError, and say so beforehand."""
    card = torch.device(TWO)
    cards[1].says_float64 = says
    assert devices.counts_wide(card)
    cards[1].float64 = False
    with pytest.raises(RuntimeError if says else TypeError):
        torch.zeros(2, dtype=torch.float64, device=card)
    assert not devices.counts_wide(card)


def test_a_card_computes_as_asked_before_a_base_is_loaded(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA computes with the base's weights as it wraps them."""
    torch.use_deterministic_algorithms(False)
    seen: list[tuple[bool, int, str | None]] = []

    def make(*_: Any) -> None:
        exact = torch.are_deterministic_algorithms_enabled()
        seen.append((exact, Module.current, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))

    monkeypatch.setattr(cache, "_model", cache._Once(make))
    cache.model(Config.read(settings("bert", **{"simulate.devices": TWO})), ())
    assert seen == [(True, 1, ":4096:8")]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_pass_keeps_no_keys_and_values(settings: Settings, cards: Cards, kind: str) -> None:
    model, rows, _ = ready(settings, TWO, kind)
    outputs: list[Any] = []
    body = model.peft.get_base_model().get_decoder()
    body.register_forward_hook(lambda *call: outputs.append(call[-1]))
    batch = collate(rows, torch.arange(3))
    train.example_losses(model, batch)
    model.logits({key: x for key, x in batch.items() if key != "labels"})
    assert len(outputs) > 1
    assert all(x.get("past_key_values") is None for x in outputs)


# -- chance ---------------------------------------------------------------------------------------


def test_dropout_follows_from_seed_round_and_client_on_the_card(
    settings: Settings, cards: Cards
) -> None:
    def masks(round: int, client: int, seed: int = 0) -> dict[str, Tensor]:
        changes = {"model.dropout": 0.5, "run.seed": seed}
        model, rows, config = ready(settings, TWO, **changes)
        state = cards[1].generator.get_state()
        cards[1].generator.manual_seed(len(drawn))  # whatever was drawn before
        with training(model, config, round, client):
            x = train.example_losses(model, collate(rows, torch.arange(3))).detach().cpu()
        cards[1].generator.set_state(state)
        drawn.append(x)
        return {"losses": x}

    drawn: list[Tensor] = []
    first = masks(1, 0)
    assert same(first, masks(1, 0))
    assert not same(first, masks(1, 1))
    assert not same(first, masks(2, 0))


def test_generators_are_put_back_on_card_and_host(cards: Cards) -> None:
    states = [torch.get_rng_state(), *(card.generator.get_state() for card in cards)]
    card = torch.device(TWO)
    for within in (own_draws([card], 7), host_draws(card, 7)):
        with within:
            torch.dropout(torch.ones(9, device=TWO), 0.5, train=True)
            torch.dropout(torch.ones(9), 0.5, train=True)
        now = [torch.get_rng_state(), *(card.generator.get_state() for card in cards)]
        assert all(torch.equal(a, b) for a, b in zip(states, now, strict=True)), within


def test_own_draws_seeds_its_own_card_and_no_other(cards: Cards) -> None:
    other = cards[0].generator.get_state()
    with own_draws([torch.device(TWO)], 7):
        a = torch.rand(3, device=TWO).cpu()
        assert torch.equal(cards[0].generator.get_state(), other)
    with own_draws([torch.device(TWO)], 7):
        assert torch.equal(torch.rand(3, device=TWO).cpu(), a)


def test_host_draws_gives_the_hosts_numbers_on_a_card(cards: Cards) -> None:
    drawn = []
    for device in ("cpu", TWO):
        with host_draws(torch.device(device), 5):
            x = torch.empty(4, 3, device=device).normal_(0, 0.02)
            drawn.append([x.cpu(), torch.randn(2, device=device).cpu()])
            assert str(x.device) == device
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def by_erfinv(x: Tensor) -> Tensor:
    """Truncated normal numbers as older versions of torch draw them."""
    return x.uniform_(-0.5, 0.5).erfinv_()


@pytest.mark.parametrize("init", [by_erfinv, nn.init.trunc_normal_, nn.init.orthogonal_])
def test_first_weights_are_not_rounded_by_a_cards_own_kernels(
    cards: Cards, init: Callable[[Tensor], Tensor]
) -> None:
    made = []
    for device in ("cpu", TWO):
        with host_draws(torch.device(device), 5):
            made.append(init(torch.empty(6, 4, device=device)).cpu())
    assert torch.equal(*made)
    with own_draws([torch.device(TWO)], 5):  # the card's kernels do round otherwise
        x = torch.linspace(-0.5, 0.5, 9)
        assert not torch.equal(x.to(TWO).erfinv_().cpu(), x.erfinv())


def gradients_of(settings: Settings, checkpointing: bool) -> dict[str, Tensor]:
    given = {"train.gradient-checkpointing": checkpointing, "lora.dropout": 0.3}
    model, rows, config = ready(settings, TWO, "llama", **given)
    live = model.trainable(frozenset({"A", "B"}))
    with training(model, config, 1, 0):
        train.example_losses(model, collate(rows, torch.arange(4))).sum().backward()
        return {f"{c}/{n}": on_host(p.grad) for c, ps in live.items() for n, p in ps.items()
                if p.grad is not None}  # fmt: skip


def test_a_checkpointed_layer_draws_the_same_dropout_again_or_is_refused(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On cards whose module says that it is initialised; Apple's does not."""
    given = settings("llama", **{**STILL, "simulate.devices": TWO, "lora.dropout": 0.3,
                                 "train.gradient-checkpointing": True})  # fmt: skip
    plain = gradients_of(settings, False)
    assert off(plain, gradients_of(settings, True)) < 1e-6
    assert not [*hardware.problems(Config.read(given))]
    monkeypatch.delattr(Module, "_initialized")
    assert off(plain, gradients_of(settings, True)) > 0.1
    (said,) = hardware.problems(Config.read(given))
    assert "torch draws other dropout" in said
    assert not [*hardware.problems(Config.read({**given, "lora.dropout": 0.0}))]


# -- precision ------------------------------------------------------------------------------------


def test_autocast_is_on_where_the_model_is(settings: Settings, cards: Cards) -> None:
    CAST.clear()
    trained(settings, TWO, **{"train.precision": "bfloat16"})
    assert CAST[torch.bfloat16] > 10
    assert not torch.is_autocast_enabled("pretend")
    CAST.clear()
    trained(settings, TWO, **{"train.precision": "float32"})
    assert not CAST


def test_a_hosts_autocast_is_off_on_a_card(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slip that the test above sees: the run goes on, in float32."""
    monkeypatch.setattr(train, "autocast", lambda precision, _: autocast(precision, HOST))
    CAST.clear()
    trained(settings, TWO, **{"train.precision": "bfloat16"})
    assert not CAST


def test_a_cast_that_outlives_a_step_is_seen_on_a_card(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.errors import TrainingCheckError
    from fedlora.training import loss_check, training_check

    model, rows, config = ready(settings, TWO, **{"train.precision": "bfloat16"})
    check_training(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
    real = training_check.training

    @contextmanager
    def around(*args: Any) -> Any:
        with real(*args), torch.autocast("pretend", torch.bfloat16):  # with its cache
            yield

    @contextmanager
    def none(*_: Any) -> Any:
        yield

    monkeypatch.setattr(training_check, "training", around)
    for module in (train, loss_check):
        monkeypatch.setattr(module, "autocast", none)
    with pytest.raises(TrainingCheckError):
        check_training(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)


def test_precision_is_the_cards_own(cards: Cards) -> None:
    assert resolved("auto", torch.device(TWO)) == "bfloat16"
    assert "Pretend accelerator 1" in computing("auto", torch.device(TWO))


@pytest.mark.parametrize("deterministic", [True, False])
def test_tf32_is_off_and_determinism_as_asked_whatever_others_set(
    settings: Settings, cards: Cards, deterministic: bool
) -> None:
    ready(settings, TWO, **{"train.deterministic": deterministic})
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(not deterministic)
    ready(settings, TWO, **{"train.deterministic": deterministic})  # as each message does
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # else SDPA's is as it was


@pytest.mark.parametrize("always", [False, True])
def test_an_operation_without_a_deterministic_algorithm_is_an_error_that_names_the_setting(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    """Found by doing without, not by the words of the error: one that stays is given as it is."""
    from fedlora.errors import TrainingCheckError

    def entropy(*args: Any, **options: Any) -> Tensor:
        if always or torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("words of a kernel")
        return real(*args, **options)

    real = classes.cross_entropy
    monkeypatch.setattr(classes, "cross_entropy", entropy)
    model, rows, config = ready(settings, TWO)
    kind, words = (RuntimeError, "^words") if always else (TrainingCheckError, "deterministic = fa")
    with pytest.raises(kind, match=words):
        check_training(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
    assert torch.are_deterministic_algorithms_enabled()


def test_states_of_the_prefix_are_apart_by_device_and_precision(
    settings: Settings, cards: Cards
) -> None:
    last = {"lora.layers": "-1", "train.prefix-cache": 10}
    model, rows, _ = ready(settings, TWO, **last)
    assert model.prefix
    batch = collate(rows, torch.arange(3))
    keys = []
    for precision in ("float32", "bfloat16"):
        with torch.no_grad(), autocast(precision, model.device):
            model.logits({k: x for k, x in batch.items() if k != "labels"})
            keys.append({key for key, _ in model.prefix._examples(batch)})
    assert not keys[0] & keys[1]
    assert {*model.prefix._kept} == keys[0] | keys[1]
    assert {str(x.device) for x in model.prefix._kept.values()} == {TWO}
    host, _, _ = ready(settings, "cpu", **last)
    assert host.prefix
    assert not {key for key, _ in host.prefix._examples(batch)} & keys[0]


# -- time and memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_step_waits_for_nothing(settings: Settings, cards: Cards, kind: str) -> None:
    """What waits for a card does not grow with the steps: the losses are read once, batches are
    sent without a wait, and what is scored is found on the host."""
    waits = []
    for n in (2, 5):
        model, rows, config = ready(settings, TWO, kind, **{"train.steps": n})
        READ.clear()
        fit(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
        waits.append({what: times for what, times in READ.items() if "library" not in what})
    assert waits[0] == waits[1]
    assert waits[0].get("upload", 0) == waits[0].get("nonzero", 0) == 0


def test_the_pretend_card_counts_what_a_step_must_not_wait_for(cards: Cards) -> None:
    READ.clear()
    x = torch.ones(3).to(TWO)
    assert READ == {"upload": 1}
    _ = x[x > 0]
    assert READ == {"upload": 1, "nonzero": 1}
    torch.ones(3).to(TWO, non_blocking=True)
    assert READ == {"upload": 1, "nonzero": 1}


def test_a_proximal_term_is_the_hosts_on_a_card(settings: Settings, cards: Cards) -> None:
    given = {"train.prox": 0.5, "train.optimizer": "sgd", "train.lr": 0.1}
    here = trained(settings, "cpu", **given)
    assert same(here, trained(settings, TWO, **given))
    assert not same(here, trained(settings, "cpu", **{**given, "train.prox": 0.0}))


def test_times_are_read_after_the_card_has_done_its_work(
    cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("mark")

        def elapsed_time(self, _: Any) -> float:
            order.append("read")
            return 2000.0

    monkeypatch.setattr(Module, "Event", Event)
    monkeypatch.setattr(Module, "synchronize", lambda *_: order.append("wait"))
    watch = devices.Stopwatch(torch.device(TWO))
    for _ in range(2):
        with watch.timed("forward"):
            pass
    assert watch.seconds("forward") == 4.0
    assert watch.seconds("backward") == 0.0
    assert order == ["mark"] * 4 + ["wait", "read", "read", "wait"]


def test_gradients_of_microbatches_add_up_to_the_batches_own(settings: Settings) -> None:
    whole = trained(settings, "cpu", **{"train.prox": 0.1})
    for size in (1, 3, 7):
        parts = trained(settings, "cpu", **{"train.prox": 0.1, "train.microbatch": size})
        assert off(whole, parts) < 1e-4, size
    assert same(whole, trained(settings, "cpu", **{"train.prox": 0.1, "train.microbatch": 8}))


def test_a_microbatch_needs_less_of_a_card(settings: Settings, cards: Cards) -> None:
    peaks = []
    for size in (0, 2):
        model, rows, config = ready(settings, TWO, **{"train.steps": 1, "train.microbatch": size})
        devices.forget_most(model.device)
        fit(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
        peaks.append(devices.most_used(model.device) - cards[1].used)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_what_a_client_is_said_to_need_is_what_it_takes(
    settings: Settings, cards: Cards, kind: str
) -> None:
    model, _, config = ready(settings, TWO, kind, **{"data.max-length": 24})
    need = footprint(model, config)
    one = collate_of_longest(model, config, 6)
    optimizer = build_optimizer(live := model.trainable(frozenset("AB")), config.train, 0.1)
    before = cards[1].used
    devices.forget_most(model.device)
    with training(model, config, 1, 0):
        for _ in steps(model, [one, one], live, optimizer, config):
            pass
    taken = devices.most_used(model.device) - before
    assert taken == pytest.approx(need.trained + need.activations(6), rel=0.25)


def collate_of_longest(model: Model, config: Config, n: int) -> dict[str, Tensor]:
    from fedlora.training.footprint import _longest

    return _longest(model, config, n)


def test_the_hosts_count_is_near_the_cards(settings: Settings, cards: Cards) -> None:
    """Of what a forward pass keeps; the card's peak has what comes and goes beside it."""
    there = footprint(*ready(settings, TWO)[::2])
    here = footprint(*ready(settings, "cpu")[::2])
    assert here.frozen == there.frozen
    assert here.trained == there.trained
    assert 0.5 * there.activations(8) < here.activations(8) <= 1.1 * there.activations(8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_where_torch_counts_no_peak_what_is_kept_is_counted(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on Apple's cards: the host's figure, of the same pass, and not 0."""
    model, _, config = ready(settings, TWO, kind)
    counted = footprint(model, config)
    monkeypatch.delattr(Module, "max_memory_allocated")
    monkeypatch.delattr(Module, "reset_peak_memory_stats")
    found = footprint(model, config)
    assert (found.frozen, found.trained) == (counted.frozen, counted.trained)
    assert 0.5 * counted.activations(8) < found.activations(8) <= 1.1 * counted.activations(8)


@pytest.mark.slow
def test_what_a_cards_library_works_in_is_no_examples(settings: Settings, cards: Cards) -> None:
    """cuBLAS takes it at the first product and keeps it; what passes took is free afterwards."""
    model, _, config = ready(settings, TWO)
    without = footprint(model, config)
    cards[1].workspace = 10**7
    assert footprint(model, config) == without
    assert cards[1].kept == 10**7
    assert devices.memory_of(model.device).free == cards[1].total - cards[1].used


# -- processes ------------------------------------------------------------------------------------


def test_one_worker_computes_on_a_card(cards: Cards) -> None:
    assert [devices.workers(n, TWO) for n in (0, 1)] == [1, 1]
    assert [devices.workers(n, "auto") for n in (0, 1, 2)] == [2, 1, 2]
    for asked, devs, has in ((2, TWO, "1 (pretend:1)"), (3, "auto", "2 (pretend:0, pretend:1)")):
        with pytest.raises(ConfigError) as e:
            devices.workers(asked, devs)
        assert f"simulate.workers = {asked}: one worker a device, and simulate.devices" in str(e)
        assert f"has {has}; set it to 0" in str(e)
    assert devices.workers(2, "cpu") == 2


def test_no_process_is_copied_beside_a_card(settings: Settings, cards: Cards) -> None:
    """torch lets no copy compute gradients once its parent has: workers are started anew."""
    from client_app.app import app
    from fedlora.launch.simulate.cards import card_workers
    from fedlora.launch.simulate.grid import LocalGrid

    config = Config.read(settings(**{"simulate.devices": "cpu", "simulate.workers": 3}))
    with (
        LocalGrid(app, 2, config.flat(), workers=2) as grid,
        pytest.raises(ConfigError, match="copy of a process"),
    ):
        grid._hire(0)
    assert [x.device for x in card_workers(config)] == ["cpu", "cpu"]
    assert [devices.workers(n, "cpu") for n in (0, 1, 3)] == [1, 1, 3]
    Module.present = False
    assert card_workers(config) == []
    devices.check_fork()


# -- privacy --------------------------------------------------------------------------------------


def clipped(settings: Settings, device: str, microbatch: int = 0) -> dict[str, Tensor]:
    """The clipped sum of six examples' gradients, before noise, by name."""
    from fedlora.privacy.per_example import kept_apart
    from fedlora.privacy.probe import Way
    from fedlora.privacy.training import clipped_sum

    model, rows, config = ready(settings, device, **{"train.microbatch": microbatch})
    live = model.trainable(frozenset({"A", "B", "other"}))
    named = {f"{c}/{name}": p for c, ps in live.items() for name, p in ps.items()}
    params = tuple(named.values())
    with kept_apart(model.peft, model.active, frozenset(params)) as sink:
        ways = dict.fromkeys((8, 12, 16, 24, 32), Way(microbatch or 16, "float32"))
        found, _ = clipped_sum(model, rows, torch.arange(6), params, sink, config, ways, 0.3)
    assert {x.device for x in found.total.values()} == {HOST}
    return {name: found.total[p] for name, p in named.items()}


def test_a_private_sum_is_the_hosts_on_a_card(settings: Settings, cards: Cards) -> None:
    assert same(clipped(settings, "cpu"), clipped(settings, TWO))


@pytest.mark.parametrize("size", [1, 3])
def test_a_private_sum_does_not_hang_on_what_is_in_memory_at_once(
    settings: Settings, size: int
) -> None:
    whole, parts = clipped(settings, "cpu"), clipped(settings, "cpu", size)
    gap = sum(float((whole[k] - parts[k]).square().sum()) for k in whole) ** 0.5
    assert gap < 1e-6 * 0.3


# -- doctor ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_says_what_a_client_needs_and_refuses_what_cannot_fit(
    settings: Settings, cards: Cards
) -> None:
    from fedlora.launch.doctor.the_memory import fits, machine_devices

    model, _, config = ready(settings, TWO)
    assert "Pretend accelerator 0" in machine_devices().what
    (card, host) = fits(model, config, 0)
    assert (card.level, host.level) == ("ok", "ok")
    need = footprint(model, config)
    room = 0.9 * (cards[1].total - cards[1].used) + need.frozen
    clients = int((int(room) - need.frozen) // (need.of(8) - need.frozen))
    assert f"or {clients} such clients beside one base" in card.what
    cards[1].limit = int((cards[1].used + need.trained + need.activations(3)) / 0.9)
    (card, _) = fits(model, config, 0)
    assert card.level == "problem"
    assert card.do == "set train.microbatch = 3"
    small = config.model_copy(update={"train": config.train.model_copy(update={"microbatch": 3})})
    assert next(fits(model, small, 0)).level == "ok"
    cards[1].limit = cards[1].used + need.trained
    card = next(fits(model, config, 0))
    assert card.level == "problem"
    assert "smaller base" in card.do


# -- the first gradient ---------------------------------------------------------------------------


def test_first_gradients_keep_to_what_is_in_memory_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's of lora_ga, and a client's whose signs are asked for: parts add up."""
    from fedlora.federation.client import first_gradient
    from fedlora.training import calibration

    seen: list[int] = []
    real = train.example_losses

    def losses(model: Model, batch: Any, *rest: Any) -> Tensor:
        seen.append(len(batch["input_ids"]))
        return real(model, batch, *rest)

    for module in (first_gradient, calibration):
        monkeypatch.setattr(module, "example_losses", losses)
    found = []
    for size in (0, 3):
        seen.clear()
        model, rows, config = ready(settings, "cpu", **{"train.microbatch": size})
        config = config.model_copy(
            update={"lora": config.lora.model_copy(update={"init": "lora_ga"})}
        )
        whole = Client(0, model.layers(dict.fromkeys(model.shapes, 3)))
        found_here = first_gradient.first_gradient(model, rows, config)
        signs = {m: G.sign() for m, G in found_here.items()}
        pairs = dict(calibration._pairs(model, whole, config, rows, {}))
        assert max(seen) == (size or len(rows))
        found.append((signs, pairs))
    for m in found[0][0]:
        assert float((found[0][0][m] == found[1][0][m]).float().mean()) > 0.99
        A, in_parts = (pairs[m].A for _, pairs in found)
        turned = (A * in_parts).sum(1, keepdim=True).sign()  # a direction has no sign
        torch.testing.assert_close(A, in_parts * turned, rtol=1e-2, atol=1e-2)
