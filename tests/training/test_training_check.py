"""The training check: healthy models pass it untouched, and each planted fault is named."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.lora.adapter import Factors
from fedlora.privacy import rehearsal
from fedlora.strategies.base import Client, Download, Round, Start
from fedlora.strategies.forms import FORMS
from fedlora.training import cache, loss_check, slope_check, train, training_check
from fedlora.training.data import batches
from fedlora.training.data.batches import IGNORE, Encoded, collate
from fedlora.training.model.model import Model
from fedlora.training.parts_check import Still
from fedlora.training.tasks import causal_lm
from tests.support.long import few
from tests.support.tiny_federation import Ran, directory_of, federate, quick

Settings = Callable[..., dict[str, object]]
Patch = pytest.MonkeyPatch
PRECISIONS = ("float32", "bfloat16")


@dataclass
class Loaded:
    """A client's model as it is about to train in round 1."""

    model: Model
    rows: Encoded
    download: Download
    config: Config

    def check(self) -> None:
        rehearsal.check_before_training(self.model, self.rows, self.download, self.config, 1, 0)


def loaded(settings: Settings, kind: str, precision: str, **changes: object) -> Loaded:
    config = Config.read(settings(kind, **{"train.precision": precision, **changes}))
    labels = cache.corpus(config).labels
    model = Model(config, labels)
    client = Client(0, model.layers(dict.fromkeys(model.shapes, 4)))
    strategy, round = config.build_strategy(), Round(1, 0)
    start = Start(model.init_factors(client, 0), [client], model.weights(), 0)
    came = strategy.download(strategy.init(start), client, round)
    scaled = strategy.needs().scaled_blocks
    model.load(strategy.start(came, Factors(), client, round), came.block, scaled)
    return Loaded(model, cache.encoded("train", 0, config, labels), came, config)


def bits(model: Model) -> dict[str, Any]:
    """All that a check could leave changed."""
    found: dict[str, Any] = {n: p.detach().clone() for n, p in model.peft.named_parameters()}
    found |= {f"R/{m}": p.detach().clone() for m, p in model.live()["R"].items()}
    found |= {f"flag/{n}": p.requires_grad for n, p in model.peft.named_parameters()}
    found |= {f"grad/{n}": p.grad is None for n, p in model.peft.named_parameters()}
    found["chance"], found["mode"] = torch.get_rng_state(), model.peft.training
    found["kept"] = [*model.prefix._kept] if model.prefix else None
    return found


def same(x: Mapping[str, Any], y: Mapping[str, Any]) -> bool:
    return x.keys() == y.keys() and all(
        torch.equal(v, y[k]) if isinstance(v, torch.Tensor) else v == y[k] for k, v in x.items()
    )


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "dropout": {"lora.dropout": 0.3, "model.dropout": 0.2},
    "prefix cache": {"lora.layers": "-1", "train.prefix-cache": 8, "model.dropout": 0.0},
    "checkpointing": {"train.gradient-checkpointing": True},
    "proximal": {"train.prox": 0.5, "train.grad-clip": 0.01},
    "sgd, slow": {"train.optimizer": "sgd", "train.lr": 1e-4},
    "core": {"strategy.name": "fedsb"},
    "heads": {"strategy.name": "ravan"},
    "scaled heads": {"strategy.name": "ravan", "strategy.ravan.head-scales": "trained"},
    "one side": {"strategy.name": "ffa"},
    "penalty": {"strategy.name": "hetlora"},
    "dora": {"lora.form": "dora", "strategy.name": "fedavg"},
    "ia3": {"lora.form": "ia3", "strategy.name": "fedavg", "clients.ranks": "4,8,16"},
    "vera": {"lora.form": "vera", "strategy.name": "fedavg", "clients.ranks": "4"},
    "private": {"privacy.epsilon": 4.0, "privacy.delta": 1e-3},
    "private core": {"privacy.epsilon": 4.0, "privacy.delta": 1e-3, "strategy.name": "fedsb"},
}


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("bert", "float32"), ("bert", "bfloat16"), ("gpt2", "float32"), ("llama", "bfloat16"),
     *(pytest.param(*x, marks=pytest.mark.slow) for x in
       (("gpt2", "bfloat16"), ("llama", "float32")))],
)  # fmt: skip
@pytest.mark.parametrize("what", few(VARIANTS, *[*VARIANTS][::2]))
def test_a_healthy_model_passes_and_is_left_as_it_was(
    settings: Settings, what: str, kind: str, precision: str
) -> None:
    s = loaded(settings, kind, precision, **VARIANTS[what])
    if what == "prefix cache":
        assert s.model.prefix
    before = bits(s.model)
    s.check()
    assert same(bits(s.model), before)


def test_a_private_check_reads_no_row(settings: Settings, monkeypatch: Patch) -> None:
    s = loaded(settings, "bert", "float32", **VARIANTS["private"])
    monkeypatch.setattr(rehearsal, "check_rows", lambda *_: None)  # are there any?
    s.rows = object()  # type: ignore[assignment]
    s.check()
    s.config = Config.read({**s.config.flat(), "privacy.epsilon": 0.0})
    with pytest.raises((AttributeError, TypeError)):
        s.check()


def test_what_follows_is_the_same_with_and_without_the_check(
    settings: Settings, monkeypatch: Patch
) -> None:
    given = settings("bert", **quick("fedex", **{"train.steps": 3, "lora.dropout": 0.2}))
    checked = federate(given)
    monkeypatch.setattr("fedlora.federation.client.job.check_before_training", lambda *_: None)
    monkeypatch.setattr("fedlora.federation.server.setup.check_first", lambda *_: None)
    assert federate({**given, "run.name": "unchecked"}).adapter == checked.adapter


def test_gradients_that_cancel_over_the_examples_are_no_fault(settings: Settings) -> None:
    """Of two classes with as many rows each, in 16 bits: +0.125 and -0.125 add up to exactly 0."""
    two = {"data.map": "number=animal", "model.dropout": 0.0}
    s = loaded(settings, "bert", "bfloat16", **two)
    batch = collate(s.rows, torch.zeros(4, dtype=torch.long))
    batch["labels"] = torch.tensor([0, 1, 0, 1])
    live = s.model.trainable(s.download.trainable)
    training_check.perturb(s.model, 0)
    weight, bias = live["other"]["classifier.weight"], live["other"]["classifier.bias"]
    with torch.no_grad():
        weight.mul_(1e-3), bias.zero_()
    with train.training(s.model, s.config, 1, 0):
        [*train.steps(s.model, [batch], live, Still([weight, bias]), s.config)]
        assert bias.grad is not None
        assert not bias.grad.any()
        Still([weight, bias]).zero_grad()
        training_check.check_gradients(s.model, batch, live, s.config)


# -- planted faults -------------------------------------------------------------------------------


def stale_casts(patch: Patch, s: Loaded) -> None:
    """One autocast block, with its cache, around the whole loop."""
    real = training_check.training

    @contextmanager
    def around(*args: Any) -> Iterator[None]:
        with real(*args), torch.autocast("cpu", torch.bfloat16):
            yield

    @contextmanager
    def none(*_: Any) -> Iterator[None]:
        yield

    patch.setattr(training_check, "training", around)
    for module in (train, loss_check):
        patch.setattr(module, "autocast", none)


def frozen_adapters(patch: Patch, s: Loaded) -> None:
    real = s.model.trainable

    def trainable(columns: frozenset[str]) -> Any:
        live = real(columns)
        for column in ("A", "B"):
            for p in live.get(column, {}).values():
                p.requires_grad_(False)
        return live

    patch.setattr(s.model, "trainable", trainable)


def one_flag_lost(patch: Patch, s: Loaded) -> None:
    real = s.model.trainable

    def trainable(columns: frozenset[str]) -> Any:
        live = real(columns)
        next(iter(live["B"].values())).requires_grad_(False)
        return live

    patch.setattr(s.model, "trainable", trainable)


def no_rate(patch: Patch, s: Loaded) -> None:
    patch.setattr(training_check, "learning_rate", lambda *_: 0.0)


def all_ignored(patch: Patch, s: Loaded) -> None:
    real = batches.collate

    def collate(encoded: Encoded, numbers: torch.Tensor) -> Any:
        batch = real(encoded, numbers)
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}

    patch.setattr(training_check, "collate", collate)


def prompts_scored(patch: Patch, s: Loaded) -> None:
    """The prompt and the padding are learned as well."""
    real = batches.collate

    def collate(encoded: Encoded, numbers: torch.Tensor) -> Any:
        batch = real(encoded, numbers)
        return {**batch, "labels": batch["input_ids"].clone()}

    patch.setattr(training_check, "collate", collate)


def other_parameters(patch: Patch, s: Loaded) -> None:
    """The optimiser was built before the adapter was swapped: it has copies."""
    real = training_check.build_optimizer

    def build(live: Any, *args: Any) -> Any:
        copies = {
            c: {n: torch.nn.Parameter(p.detach().clone()) for n, p in ps.items()}
            for c, ps in live.items()
        }
        return real(copies, *args)

    patch.setattr(training_check, "build_optimizer", build)


def too_many_parameters(patch: Patch, s: Loaded) -> None:
    """A layer of the base is optimised too."""
    real = training_check.build_optimizer

    def build(live: Any, *args: Any) -> Any:
        stranger = s.model.peft.get_parameter(
            f"base_model.model.{next(iter(s.model.shapes))}.base_layer.bias"
        )
        stranger.requires_grad_(True)
        return real({**live, "stranger": {"stranger": stranger}}, *args)

    patch.setattr(training_check, "build_optimizer", build)


def detached_head(patch: Patch, s: Loaded) -> None:
    head = s.model.peft.base_model.model.classifier.modules_to_save[s.model.active]
    patch.setattr(
        head,
        "forward",
        lambda x: torch.nn.functional.linear(x, head.weight.detach(), head.bias.detach()),
    )


def detached_body(patch: Patch, s: Loaded) -> None:
    """The head's input is cut off: the adapters learn nothing."""
    head = s.model.peft.base_model.model.classifier
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))


def detached_loss(patch: Patch, s: Loaded) -> None:
    real = train.example_losses
    for module in (train, loss_check, training_check):
        patch.setattr(module, "example_losses", lambda *args: real(*args).detach())


def a_copy_computes(patch: Patch, s: Loaded) -> None:
    """A compiled or traced graph that holds the weights of when it was made."""
    frozen = copy.deepcopy(s.model.peft).eval()
    kept = {id(p): p for p in s.model.peft.parameters()}

    def forward(**inputs: Any) -> Any:
        out = frozen(**inputs)
        out.logits = out.logits + 0 * sum(p.sum() for p in kept.values() if p.requires_grad)
        return out

    patch.setattr(s.model.peft, "forward", forward)


def halved_gradients(patch: Patch, s: Loaded) -> None:
    for p in s.model.live()["A"].values():
        p.register_hook(lambda g: 0.3 * g)


def mean_over_all_tokens(patch: Patch, s: Loaded) -> None:
    """The loss is divided by the batch's width in place of the example's own tokens."""

    real = causal_lm.token_losses

    def token_losses(model: Any, inputs: Any, labels: torch.Tensor, *rest: Any) -> torch.Tensor:
        own = (labels[:, 1:] != IGNORE).sum(1)
        return real(model, inputs, labels, *rest) * own / labels[:, 1:].shape[1]

    patch.setattr(causal_lm, "token_losses", token_losses)


def attention_unmasked(patch: Patch, s: Loaded) -> None:
    real = s.model.run

    def run(**inputs: Any) -> Any:
        return real(**{**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})

    patch.setattr(s.model, "run", run)


def remembered_too_long(patch: Patch, s: Loaded) -> None:
    """What enters the adapted layers is remembered with the weights of the first pass."""
    real, kept = s.model.logits, dict[bytes, torch.Tensor]()

    def logits(inputs: Mapping[str, Any]) -> torch.Tensor:
        key = inputs["input_ids"].numpy().tobytes()
        if key not in kept or not torch.is_grad_enabled():
            kept[key] = real(inputs).detach()
        return kept[key] + (real(inputs) - real(inputs).detach())

    patch.setattr(s.model, "logits", logits)


CLASSIFIER, LANGUAGE = "bert", "gpt2"
FAULTS: dict[str, tuple[Callable[[Patch, Loaded], None], str, str]] = {
    "stale casts": (stale_casts, CLASSIFIER, "the loss does not follow"),
    "stale casts, language": (stale_casts, LANGUAGE, "the loss does not follow"),
    "frozen adapters": (frozen_adapters, CLASSIFIER, "of A are to train and have no gradient"),
    "requires_grad lost": (one_flag_lost, LANGUAGE, "1 of 4 tensors of B are to train"),
    "learning rate 0": (no_rate, CLASSIFIER, "a step left"),
    "labels ignored": (all_ignored, LANGUAGE, "labels are not those of its examples"),
    "prompts scored": (prompts_scored, LANGUAGE, "labels are not those of its examples"),
    "other parameters": (other_parameters, CLASSIFIER, "a step left"),
    "too many parameters": (too_many_parameters, CLASSIFIER, "which is not to train"),
    "detached head": (detached_head, CLASSIFIER, "classifier.weight are to train"),
    "detached body": (detached_body, CLASSIFIER, "of A are to train and have no gradient"),
    "detached loss": (detached_loss, CLASSIFIER, "hangs on no trained tensor"),
    "a copy computes": (a_copy_computes, CLASSIFIER, "does not follow|no gradient"),
    "gradients scaled": (halved_gradients, LANGUAGE, "the loss does not follow A"),
    "loss over all tokens": (
        mean_over_all_tokens,
        LANGUAGE,
        "not what model.task .*defines",
    ),
    "attention unmasked": (attention_unmasked, CLASSIFIER, "what else is in its batch"),
    "remembered too long": (remembered_too_long, CLASSIFIER, "the loss does not follow"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("what", few(FAULTS, *[*FAULTS][::2]))
def test_a_planted_fault_is_caught_and_named(
    settings: Settings, monkeypatch: Patch, what: str, precision: str
) -> None:
    plant, kind, said = FAULTS[what]
    s = loaded(settings, kind, precision, **({"model.pooling": "mean"} if kind == "bert" else {}))
    s.check()
    before = bits(s.model)
    plant(monkeypatch, s)
    with pytest.raises(TrainingCheckError, match=said):
        s.check()
    monkeypatch.undo()
    after = bits(s.model)
    if plant is not too_many_parameters:  # what only the fault knows of, only it could restore
        assert all(torch.equal(after[k], x) for k, x in before.items() if k.startswith("base_"))


def broken_on_client_1(real: Callable[..., None]) -> Callable[..., None]:
    def check(*args: Any) -> None:
        if args[-1] == 1:
            raise TrainingCheckError("planted", "by 3")
        real(*args)

    return check


def test_in_a_simulation_a_client_that_does_not_train_ends_the_run(
    settings: Settings, monkeypatch: Patch
) -> None:
    from fedlora.federation.client import job

    monkeypatch.setattr(job, "check_before_training", broken_on_client_1(job.check_before_training))
    given = settings("bert", **quick("fedex"))
    with pytest.raises(TrainingCheckError, match=r"round 1, client 1: .*planted"):
        federate(given)
    assert [r["round"] for r in Ran(directory_of(given)).rounds] == [0], "nothing was aggregated"


def test_elsewhere_it_is_refused_by_kind_and_the_others_go_on(
    settings: Settings, monkeypatch: Patch
) -> None:
    from fedlora.federation.client import job
    from fedlora.launch.simulate.grid import LocalGrid

    monkeypatch.setattr(job, "check_before_training", broken_on_client_1(job.check_before_training))
    monkeypatch.setattr(LocalGrid, "simulated", False)
    for r in federate(settings("bert", **quick("fedex"))).rounds[1:]:
        assert r["accepted"] == [0, 2]
        assert [(f["client"], f["kind"]) for f in r["failures"]] == [(1, "untrained")]


def test_where_losses_are_not_told_neither_is_what_the_check_measured(
    settings: Settings, monkeypatch: Patch
) -> None:
    from fedlora.federation.client import job
    from fedlora.launch.simulate.grid import LocalGrid

    monkeypatch.setattr(job, "check_before_training", broken_on_client_1(job.check_before_training))
    monkeypatch.setattr(LocalGrid, "simulated", False)
    private = {"privacy.epsilon": 4.0, "privacy.delta": 1e-3}
    failed = federate(settings("bert", **quick("fedex", **private))).rounds[1]["failures"]
    assert failed[0]["reason"] == "TrainingCheckError: planted"


def test_the_server_checks_its_own_model_before_round_1(
    settings: Settings, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(training_check, "learning_rate", lambda *_: 0.0)
    given = settings("bert", **quick("fedex"))
    with pytest.raises(TrainingCheckError, match="a step left"):
        federate(given)
    assert not Ran(directory_of(given)).rounds


def test_rows_without_anything_to_learn_are_named_in_a_fixed_text(settings: Settings) -> None:
    s = loaded(settings, "gpt2", "float32")
    rows = s.rows
    bare = Encoded(rows.ids, rows.starts, rows.rows, rows.pad, prompts=rows.lengths)
    with pytest.raises(TrainingCheckError, match="every label is ignored"):
        loss_check.check_rows(bare, s.model.task)
    none = Encoded(rows.ids[:0], rows.starts[:1], rows.rows[:0], rows.pad, prompts=rows.starts[:0])
    with pytest.raises(TrainingCheckError, match="no rows"):
        loss_check.check_rows(none, s.model.task)


CHECKED = [f for f in FORMS if f not in ("lora", "alora", "vblora")]


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("form", few(CHECKED, *CHECKED[::3]))
def test_every_form_that_is_healthy_passes(settings: Settings, form: str, precision: str) -> None:
    ranks = "4" if FORMS[form].size else "4,8,16"
    changes = {"lora.form": form, "strategy.name": "fedavg", "clients.ranks": ranks}
    changes |= {"lora.options": "width=8"} if form == "nora" else {}
    loaded(settings, "bert", precision, **changes).check()


def test_flowers_engine_is_known_as_a_simulation_by_who_started_it(monkeypatch: Patch) -> None:
    from fedlora.federation.server.roster import is_simulated
    from fedlora.federation.wire.same_machine import SIMULATED
    from fedlora.launch.simulate.grid import LocalGrid

    class Deployed:
        pass

    assert LocalGrid.simulated
    assert not is_simulated(Deployed())  # type: ignore[arg-type]
    monkeypatch.setenv(SIMULATED, "1")
    assert is_simulated(Deployed())  # type: ignore[arg-type]


def test_after_a_check_each_part_of_a_model_is_in_the_mode_that_it_was_in() -> None:
    """PEFT's own flag says training while its parts do not: else dropout stayed on, and a private
    run in the same process was refused, for its examples seemed to mix."""
    peft = torch.nn.Sequential(torch.nn.Dropout(0.5))
    peft[0].eval()
    model: Any = SimpleNamespace(peft=peft, prefix=None, live=dict)
    with training_check.untouched(model):
        peft.train()
    assert (peft.training, peft[0].training) == (True, False)


@pytest.mark.parametrize("alive", [True, False])
def test_a_tensor_whose_gradient_is_below_rounding_is_not_taken_for_stale(alive: bool) -> None:
    """A loss that rounds: of a tiny gradient nothing can be told, of one that shows all."""
    generator = torch.Generator().manual_seed(0)
    sigma, tolerance = 1e-4, training_check.TOLERANCES["bfloat16"]

    def check(slope: float) -> None:
        w, G = nn.Parameter(torch.ones(2, 2)), torch.full((2, 2), slope)

        def loss() -> float:
            told = float((w.detach() * G).sum()) if alive else 0.0
            return 1.8 + told + sigma * float(torch.randn((), generator=generator))

        here = loss()
        rounding = max(1e-4 * here, *(abs(loss() - here) for _ in range(3)))
        slope_check.check_slope("M", {w: G}, loss, rounding, tolerance, 0)

    for _ in range(500):
        check(1e-5)
    for slope in (1e-3, 1.0):  # of the first no t reaches CHANGE times what rounding does
        for _ in range(50):
            if alive:
                check(slope)
            else:
                with pytest.raises(TrainingCheckError, match="does not follow M"):
                    check(slope)
