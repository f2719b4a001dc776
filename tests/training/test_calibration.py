"""Initialisations that look at rows: what they find, whose rows they are, and that all begin so."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, DataError, ModelError, StrategyError
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.setup import check_begins
from fedlora.launch.export import export_run
from fedlora.lora.adapter import Factors
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Client, Start
from fedlora.training import calibration, draws
from fedlora.training.data import corpus as data
from fedlora.training.data.batches import Encoded, collate
from fedlora.training.data.corpus import Rows
from fedlora.training.model.layers import taken_out
from fedlora.training.model.loading import PREFIX
from fedlora.training.model.loftq import nf4
from fedlora.training.model.model import Model
from fedlora.training.train import example_losses
from tests.conftest import LABELS, WORDS
from tests.support.by_task import encode, load, load_calibration
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
INITS = ("eva", "corda", "lora_ga")
KINDS = ("bert", "gpt2", "llama")


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 rows of the clients' kind that none of them has."""
    chance, path = random.Random(9), tmp_path_factory.mktemp("public") / "rows.jsonl"
    texts = [" ".join(chance.choices(WORDS, k=7 + n % 5)) for n in range(40)]
    rows = [{"text": t, "label": LABELS[n % 3], "response": f" {LABELS[n % 3]}"}
            for n, t in enumerate(texts)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def given(settings: Settings, public: str, init: str, kind: str = "bert", **changes: object) -> Any:
    return settings(kind, **{"lora.init": init, "lora.calibration": public, **changes})


def begun(config: Config, rank: int = 4) -> tuple[Model, Client, Factors, Encoded]:
    """A model, the widest client, what the run begins with, and the rows that showed it."""
    corpus = load(config.data, config.model.task, 4, 0)
    model = Model(config, corpus.labels)
    whole = Client(-1, model.layers(dict.fromkeys(model.shapes, rank)))
    made = calibration.first_factors(model, whole, config, corpus)
    rows = load_calibration(config.data, config.model.task, config.lora.calibration, corpus)
    return model, whole, made, encode(rows, model.tokenizer, corpus.labels, 128)


def entering(model: Model, rows: Encoded) -> dict[str, Tensor]:
    """Every token's input of every module (tokens, k), one example at a time: no padding."""
    seen: dict[str, list[Tensor]] = {m: [] for m in model.shapes}
    hooks = [
        model.peft.get_submodule(PREFIX + m).register_forward_pre_hook(
            lambda _, x, m=m: seen[m].append(x[0][0].double())
        )
        for m in model.shapes
    ]
    with torch.no_grad(), model.peft.disable_adapter():
        for n in range(len(rows)):
            batch = collate(rows, torch.tensor([n]))
            del batch["labels"]
            model.peft(**batch)
    for hook in hooks:
        hook.remove()
    return {m: torch.cat(xs) for m, xs in seen.items()}


def apart(A: Tensor, B: Tensor) -> float:
    """1 - the smallest cosine between the spaces of the rows of two matrices."""
    Qa, Qb = (torch.linalg.qr(x.double().T)[0] for x in (A, B))
    return 1 - float(torch.linalg.svdvals(Qa.T @ Qb).min())


@pytest.mark.parametrize("kind", KINDS)
def test_eva_begins_with_the_leading_directions_of_the_inputs_largest_first(
    settings: Settings, public: str, kind: str
) -> None:
    model, _, first, rows = begun(Config.read(given(settings, public, "eva", kind)))
    for m, X in entering(model, rows).items():
        Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)[2][:4]
        assert torch.allclose((first.A[m].double() @ Vh.T).abs(), torch.eye(4).double(), atol=1e-3)
        assert not bool(first.B[m].any())
        assert taken_out(model.config, first, model.weights()) == {}  # the base stays


def test_eva_is_as_pefts_own_code_finds_it(settings: Settings, public: str) -> None:
    model, _, first, rows = begun(Config.read(given(settings, public, "eva")))
    batch = collate(rows, torch.arange(len(rows)))
    batch.pop("labels")
    settled = LoraConfig(
        r=4, target_modules=[*model.shapes], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    base = Model(model.config, model.labels).peft.unload()
    found = get_eva_state_dict(base, [batch], settled, show_progress_bar=False)
    for m in model.shapes:
        assert apart(first.A[m], found[m]) < 1e-2  # PEFT's own SVD is a randomised one


@pytest.mark.parametrize("kind", KINDS)
def test_corda_takes_out_what_weighs_most_on_the_inputs(
    settings: Settings, public: str, kind: str
) -> None:
    model, whole, first, rows = begun(Config.read(given(settings, public, "corda", kind)))
    for m, X in entering(model, rows).items():
        W, C = model.weights()[m].double(), X.T @ X
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        want = U[:, :4] * S[:4] @ Vh[:4] @ torch.linalg.inv(C)
        got = whole.layers[m].scale * first.B[m].double() @ first.A[m].double()
        # batches are each scaled by their largest entry, so C is nearly, not just, that one
        assert float((got - want).norm() / want.norm()) < 0.1
        best = torch.linalg.svd(W, full_matrices=False)
        pissa = best[0][:, :4] * best[1][:4] @ best[2][:4]
        assert float((got - pissa).norm() / pissa.norm()) > 0.2  # or W0 alone would do


def test_corda_is_as_pefts_own_code_makes_it(settings: Settings, public: str) -> None:
    """On inputs whose largest entry is positive, as PEFT's scaling takes for granted."""
    model, whole, first, rows = begun(Config.read(given(settings, public, "corda")))
    m = next(iter(model.shapes))
    batch = collate(rows, torch.arange(len(rows)))
    box = torch.nn.ModuleDict({"x": torch.nn.Linear(model.shapes[m].k, model.shapes[m].d, False)})
    box["x"].weight.data = model.weights()[m].clone()
    X = entering(model, rows)[m].float()
    settled = LoraConfig(r=4, target_modules=["x"], init_lora_weights="corda", corda_config={})
    preprocess_corda(box, settled, run_model=lambda: box["x"](X if X.max() > -X.min() else -X))
    made = LoraLinear(box["x"], "x", config=settled, r=4, lora_alpha=4 * whole.layers[m].scale)
    assert len(batch["labels"]) <= model.config.evaluate.batch_size  # one batch, so one scaling
    for mine, peft in ((first.A[m], made.lora_A["x"]), (first.B[m], made.lora_B["x"])):
        assert torch.allclose(mine.abs(), peft.weight.abs(), atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_ga_begins_in_the_gradients_singular_directions(
    settings: Settings, public: str, kind: str
) -> None:
    model, _, first, rows = begun(Config.read(given(settings, public, "lora_ga", kind)))
    total = {m: torch.zeros(s.d, s.k) for m, s in model.shapes.items()}
    with model.base_gradients() as gathered:
        for n in range(len(rows)):
            example_losses(model, collate(rows, torch.tensor([n]))).sum().backward()
        for m, G in gathered().items():
            total[m] = G / len(rows)
    for m, G in total.items():
        U, _, Vh = torch.linalg.svd(G)
        assert apart(first.A[m], Vh[:4]) < 1e-3
        assert apart(first.B[m].T, U[:, 4:8].T) < 1e-2
        assert bool(first.B[m].any())


@pytest.mark.parametrize("init", INITS)
def test_what_begins_follows_from_the_rows_alone(
    settings: Settings, public: str, init: str
) -> None:
    config = Config.read(given(settings, public, init))
    torch.rand(3)
    one, two = begun(config)[2], begun(config)[2]
    for (_, m, x), (_, _, y) in zip(one.items(), two.items(), strict=True):
        assert torch.equal(x, y), m


BEGIN_OTHERWISE = {
    "eva": {"flora", "fedsb", "frlora", "ravan"},
    "corda": {"flora", "fedsb", "frlora", "ravan", "fedsa", "fslora", "hetlora", "flexlora",
              "raflora"},
}  # fmt: skip


@pytest.mark.parametrize("init", BEGIN_OTHERWISE)
def test_a_strategy_begins_with_what_was_found_or_refuses_it(
    settings: Settings, public: str, init: str
) -> None:
    config = Config.read(given(settings, public, init))
    model, _, first, _ = begun(config, 8)
    refused, said = set(), []
    for name, cls in STRATEGIES.items():
        strategy: Any = cls()
        ranks = (8, 8) if strategy.needs().equal_ranks else (4, 8)
        clients = [Client(i, model.layers(dict.fromkeys(model.shapes, r))) for i, r in
                   enumerate(ranks)]  # fmt: skip
        state = strategy.init(Start(first, clients, model.weights(), 0))
        named = Config.read(given(settings, public, init, **{"strategy.name": name}))
        try:
            check_begins(named, strategy, state, clients, first)
        except StrategyError as e:
            refused.add(name)
            said.append(str(e))
    assert refused == BEGIN_OTHERWISE[init]
    assert all(
        f"lora.init = '{init}': " in s and "begins with factors of its own" in s for s in said
    )


def slow_energy(M: Tensor, rank: int) -> float:
    """By a full SVD in NumPy's words: what the leading directions hold of all."""
    S = np.linalg.svd(M.double().numpy(), compute_uv=False)
    return float((S[:rank] ** 2).sum() / (S**2).sum())


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "loftq"])
def test_a_run_says_how_much_of_what_its_start_is_made_from_it_keeps(
    init: str, settings: Settings, public: str
) -> None:
    calibrated = {"lora.init": init, "clients.ranks": "3"}
    calibrated |= {} if init == "loftq" else {"lora.calibration": public}
    ran = federate(settings(**quick("fedavg", **calibrated)))
    told = ran.rounds[0]["start"]
    assert f"lora.init = '{init}'" in told["made_from"]
    assert "of the energy" in told["lines"][0]
    for m, q in told["modules"].items():
        assert q["found"] == q["rank"] == (6 if init == "lora_ga" else 3), m
        assert 0 < q["energy"] <= 1
        assert q["condition"] >= 1
    if init == "loftq":  # the one that can be made again from the weights alone
        config = Config.read(settings(**quick("fedavg", **calibrated)))
        W = Model(config, LABELS).weights()
        for m, q in told["modules"].items():
            M = W[m].float() - nf4(W[m])
            assert q["energy"] == pytest.approx(slow_energy(M, 3), rel=1e-4)


# -- whose rows ---------------------------------------------------------------------------------


def test_rows_that_train_or_test_the_model_calibrate_nothing(
    settings: Settings, public: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    for changes in ({}, {"data.path": "", "data.test-path": tiny["rows"]}):
        with pytest.raises(ConfigError, match="these rows train or test the model; name other"):
            preflight.read(given(settings, tiny["rows"], "eva", **changes))
    mixed = tmp_path / "mixed.jsonl"
    theirs = Path(tiny["rows"]).read_text().splitlines()[7]
    mixed.write_text(Path(public).read_text() + theirs.replace("text", "text", 1) + "\n")
    with pytest.raises(DataError, match=r"1 of its 41 rows are a client's or of a central set"):
        begun(Config.read(given(settings, str(mixed), "eva")))


def test_what_calibration_cannot_be_is_said_with_what_to_do(
    settings: Settings, public: str
) -> None:
    for changes, says in (
        (
            {"lora.calibration": ""},
            "name rows that are no client's, such as .* in lora.calibration",
        ),
        ({"lora.init": "pissa"}, "lora.calibration = .*: only lora.init = eva, corda, lora_ga"),
        ({"personalize.alone": True}, "personalize.alone = true .*; set it to false"),
        ({"lora.init": "lora_ga", "model.quantization": "8bit"}, "no gradient; use eva or corda"),
        ({"lora.init": "corda", "wire.dtype": "int8"}, "use wire.dtype = 'float32'"),
    ):
        with pytest.raises(ConfigError, match=says):
            preflight.read(
                given(settings, public, "eva", **{"model.quantization": "none", **changes})
            )


def test_too_little_to_go_by_is_an_error(settings: Settings, public: str, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(Path(public).read_text().splitlines()[0] + "\n")
    with pytest.raises(ModelError, match=r"\d+ tokens reach .*, whose rank is 20; name more rows"):
        begun(Config.read(given(settings, str(few), "eva")), 20)
    with pytest.raises(ModelError, match=r"has fewer than 40; lower clients.ranks"):
        begun(Config.read(given(settings, public, "lora_ga")), 20)
    headless = {"model.pooling": "mean"}
    with pytest.raises(ModelError, match=r"is zero at W0, .*; use eva, corda, or model.pooling"):
        begun(Config.read(given(settings, public, "lora_ga", **headless)))
    model = Model(Config.read(given(settings, public, "eva")), LABELS)
    me = Client(0, model.layers(dict.fromkeys(model.shapes, 2)))
    with pytest.raises(ModelError, match=r"begins from lora\.calibration, not here"):
        model.init_factors(me, 0)


def test_many_modules_take_several_passes_to_the_same_result(
    settings: Settings, public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.read(given(settings, public, "eva"))
    whole = begun(config)[2]
    monkeypatch.setattr(calibration, "ROOM", 2 * 8 * 24**2)
    parts = begun(config)[2]
    for m, A in whole.A.items():
        assert torch.equal(parts.A[m], A)


def test_rows_are_read_by_the_servers_columns_and_labels() -> None:
    corpus = data.Corpus(("a", "b"), Rows(("one",), ("a",)), ())
    with pytest.raises(DataError, match=r"has the label \"colour\""):
        load_calibration(Config().data, "classification", _one_row(), corpus)


def _one_row() -> str:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    path.write_text('{"text": "two", "label": "colour"}\n')
    return str(path)


# -- whole federations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "name", "rule"),
    [("eva", "fedavg", "plain"), ("lora_ga", "fedex", "plain"),
     ("lora_ga", "fedex", "preconditioned")],
)  # fmt: skip
def test_a_federation_begins_there_on_every_client_and_is_exported(
    settings: Settings, public: str, tmp_path: Path, init: str, name: str, rule: str
) -> None:
    seen: list[FederatedLora] = []
    calibrated = {"lora.init": init, "lora.calibration": public, "train.rule": rule}
    ran = federate(settings(**quick(name, **calibrated)), before=seen.append)
    server = seen[0]
    for r in ran.rounds[1:]:
        assert not r["failures"]
        if r["proof"]["promise"] == "exact":
            assert r["proof"]["model_deviation"] < r["proof"]["bound"]
    for merged in (False, True):
        assert export_run(ran.directory, tmp_path / str(merged), merged=merged).deviation < 1e-5
    stored = [*(ran.directory / "clients").rglob("base/00000.safetensors")]
    assert bool(stored) == bool(server.run.base_offset) == (init != "eva")
    if server.run.base_offset:
        mine, theirs = (Model(server.setting.config, server.setting.labels) for _ in range(2))
        memory = ClientMemory(ran.directory / "clients", 0, server.run.token)
        mine.rebase("run", [], server.run.base_offset)
        theirs.rebase("run", [], memory.base_offset())
        for m, W in theirs.weights().items():
            a, b = (x.peft.get_submodule(PREFIX + m).get_base_layer().weight
                    for x in (mine, theirs))  # fmt: skip
            assert torch.equal(a, b), m
            assert not torch.equal(a, W), m


def test_a_resumed_run_needs_no_calibration_rows_and_has_the_same_bits(
    settings: Settings, public: str, tmp_path: Path
) -> None:
    rows = tmp_path / "public.jsonl"
    rows.write_text(Path(public).read_text())
    more = {"lora.init": "lora_ga", "lora.calibration": str(rows), "run.rounds": 3}

    def breaks(server: FederatedLora) -> None:
        def started(number: int, _: Any) -> None:
            if number == 3:
                raise RuntimeError("power cut")

        server.observer.round_started = started  # type: ignore[method-assign]

    config = settings(**quick("ffa", **more))
    whole = federate({**config, "run.name": "whole"})
    with pytest.raises(RuntimeError, match="power cut"):
        federate(config, before=breaks)
    rows.unlink()
    resumed = federate({**config, "run.resume": True})
    assert resumed.adapter == whole.adapter


@pytest.mark.parametrize("init", INITS)
def test_on_a_card_it_begins_as_on_the_host_and_sends_no_pass_there(
    settings: Settings, public: str, init: str, cards: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's attention counts as a draw, and the host has not its kernels."""
    host, card = (
        {"model.attention": "eager", "simulate.devices": device} for device in ("cpu", "pretend:1")
    )
    here = begun(Config.read(given(settings, public, init, **host)))
    sent: list[str] = []
    carried = draws._DrawnOnHost.__torch_dispatch__

    def noted(self: Any, func: Any, *rest: Any) -> Any:
        sent.append(func.__name__)
        return carried(self, func, *rest)

    monkeypatch.setattr(draws._DrawnOnHost, "__torch_dispatch__", noted)
    there = begun(Config.read(given(settings, public, init, **card)))
    assert "randn.default" in sent or "normal_.default" in sent, "first weights are drawn there"
    assert not {"mm.default", "addmm.default", "bmm.default"} & {*sent}
    for m, A in here[2].A.items():
        assert torch.equal(A, there[2].A[m])
        assert torch.equal(here[2].B[m], there[2].B[m])
