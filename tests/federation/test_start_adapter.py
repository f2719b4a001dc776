"""A run that starts from an existing adapter: the same model as PEFT's, in what trains and leaves.

The oracle is PEFT on the untouched checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, FedLoraError, ModelError
from fedlora.federation.client.admit import admit
from fedlora.launch.doctor.the_run import experiment
from fedlora.launch.export import export_run
from fedlora.strategies import STRATEGIES
from fedlora.training import cache
from fedlora.training.begun_with import begun_with
from fedlora.training.data.batches import Encoded, collate, inputs_of
from fedlora.training.model import peft_directory, start_adapter
from fedlora.training.model.loading import logits_of
from fedlora.training.model.model import Model
from tests.conftest import LABELS
from tests.federation.test_policy import job, policy
from tests.support.long import few
from tests.support.task_rows import task_settings
from tests.support.tiny_federation import directory_of, federate, quick, ranks_for

Settings = Callable[..., dict[str, object]]
BERT = ["query", "value", "attention.output.dense"]
TARGETS = {"bert": BERT, "gpt2": ["c_attn", "mlp.c_fc"], "llama": ["q_proj"]}


@dataclass
class Starts:
    """Adapters to start from, made by PEFT alone."""

    root: Path
    tiny: dict[str, str]

    def made(self, name: str, kind: str = "bert", config: Any = None, **changes: Any) -> Path:
        """An adapter with B drawn and, of a classifier, a head; its labels are not said."""
        given: dict[str, Any] = {
            "r": 3, "lora_alpha": 5, "target_modules": TARGETS[kind],
            "init_lora_weights": False,
            "fan_in_fan_out": kind == "gpt2",
            "task_type": "SEQ_CLS" if kind == "bert" else "CAUSAL_LM",
        }  # fmt: skip
        torch.manual_seed(len(name))
        model = get_peft_model(self.base(kind), config or LoraConfig(**{**given, **changes}))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.requires_grad:
                    p.normal_(0, 0.3 if "classifier" in key else 0.15)
        model.save_pretrained(str(self.root / name))
        return self.root / name

    def base(self, kind: str = "bert") -> Any:
        if kind != "bert":
            return AutoModelForCausalLM.from_pretrained(self.tiny[kind])
        return AutoModelForSequenceClassification.from_pretrained(self.tiny[kind], num_labels=3)

    def labelled(self, place: Path, labels: list[str]) -> Path:
        (place / "labels.json").write_text(json.dumps(labels))
        return place


@pytest.fixture(scope="module")
def starts(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Starts:
    return Starts(tmp_path_factory.mktemp("starts"), tiny)


@pytest.fixture(scope="module")
def uneven(starts: Starts) -> Path:
    """Of several ranks and scales, with rsLoRA, over more modules than the runs here adapt."""
    return starts.made(
        "uneven",
        use_rslora=True,
        target_modules=[*BERT, "intermediate.dense"],
        rank_pattern={"query": 2, "layer.1.intermediate.dense": 5},
        alpha_pattern={"layer.0.attention.self.value": 7},
    )


def batch_of(config: Config, labels: tuple[str, ...]) -> dict[str, Tensor]:
    rows = cache.encoded("central", -1, config, labels)
    return inputs_of(collate(rows, torch.arange(8)))


def by_peft(base: Any, place: Path, batch: dict[str, Tensor]) -> Tensor:
    model = PeftModel.from_pretrained(base, str(place)).eval()
    with torch.no_grad():
        return logits_of(model(**batch)).float()


def near(found: Tensor, want: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=atol)


def classifier(
    settings: Settings, adapter: Path, name: str, **changes: object
) -> dict[str, object]:
    one = {"model.adapter": str(adapter), "lora.target-modules": "query,value"}
    return settings(**quick(name, **{**one, **changes}))


def test_the_model_before_round_1_is_that_of_peft(
    starts: Starts, uneven: Path, settings: Settings
) -> None:
    """With its head, and in modules that the run does not adapt."""
    config = Config.read(classifier(settings, uneven, "fedavg"))
    corpus = cache.corpus(config)
    model = cache.model(config, corpus.labels)
    batch = batch_of(config, corpus.labels)
    model.load(model.init_factors(model_client(model), 0))
    with torch.no_grad():
        near(model.logits(batch), by_peft(starts.base(), uneven, batch))
    modules = {m for m in model.start.pairs if "intermediate" in m}
    assert modules
    assert not modules & {*model.shapes}
    assert "rank 2 to 5 in 8 modules" in model.start.told
    assert "its head is taken as of" in model.start.told


def model_client(model: Model) -> Any:
    from fedlora.strategies.base import Client

    return Client(0, model.layers(dict.fromkeys(model.shapes, 2)))


def test_a_scale_left_out_and_a_start_left_out_of_an_export_are_seen(
    starts: Starts, uneven: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted slips: the first by PEFT's logits, the second by the run's own certificate."""
    changes = {"clients.ranks": "3", "run.rounds": 1}
    config = Config.read(classifier(settings, uneven, "fedavg", **changes))
    labels = cache.corpus(config).labels
    batch = batch_of(config, labels)
    with monkeypatch.context() as patch:
        patch.setattr(start_adapter, "_scale", lambda *_: 1.0)
        model = Model(config, labels)
        model.load(model.init_factors(model_client(model), 0))
        with torch.no_grad():
            apart = model.logits(batch) - by_peft(starts.base(), uneven, batch)
        assert apart.abs().max() > 1e-3
        patch.setattr(peft_directory, "whole", lambda _, effective: peft_directory.total(effective))
        with pytest.raises(ModelError, match="is not the federated model's"):
            federate(config.flat())


CASES = few(STRATEGIES, "fedex", "fedsa")


@pytest.mark.parametrize("name", CASES)
def test_every_strategys_export_holds_the_start_and_is_plain_pefts(
    starts: Starts, uneven: Path, settings: Settings, name: str, tmp_path: Path
) -> None:
    """adapter/ of the run and an export, on the checkpoint as it lies on disk, in plain PEFT."""
    given = classifier(settings, uneven, name)
    ran = federate(given)
    config = Config.read(given)
    batch = batch_of(config, cache.corpus(config).labels)
    done = export_run(ran.directory, tmp_path / "out", fresh=name == "fedex")
    assert done.deviation < 1e-4
    want = by_peft(starts.base(), tmp_path / "out", batch)
    if not config.build_strategy().needs().collect_at_end:  # else adapter/ holds what clients kept
        near(by_peft(starts.base(), ran.directory / "adapter", batch), want, 1e-4)
    beside = "base_model.model.bert.encoder.layer.1.intermediate.dense.lora_{}.weight"
    sides = [beside.format(side) for side in "BA"]
    start = load_file(uneven / "adapter_model.safetensors")
    for place in (ran.directory / "adapter", tmp_path / "out"):
        found = load_file(place / "adapter_model.safetensors")
        near(found[sides[0]] @ found[sides[1]], 5 / 5**0.5 * start[sides[0]] @ start[sides[1]])
    assert not torch.equal(want, by_peft(starts.base(), uneven, batch)), "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"lora.init": "pissa"}, {"lora.init": "loftq"},
     {"lora.init": "orthogonal", "clients.ranks": "4"},
     {"model.dtype": "bfloat16"}, {"model.merge": "keep-as-adapter"},
     {"model.quantization": "8bit"}, {"server.optimizer": "fedadam", "server.lr": 0.01}],
)  # fmt: skip
def test_so_do_starts_bases_of_few_bits_and_server_optimisers(
    starts: Starts, uneven: Path, settings: Settings, changes: dict[str, object], tmp_path: Path
) -> None:
    if "model.quantization" in changes:
        pytest.importorskip("bitsandbytes")
    given = classifier(settings, uneven, "fedavg", **{"clients.ranks": "3", **changes})
    ran = federate(given)
    done = export_run(ran.directory, tmp_path / "out", fresh=False)
    assert done.deviation < (0.05 if {"model.dtype", "model.quantization"} & {*changes} else 1e-4)


def test_merged_and_cut_exports_hold_the_start_as_well(
    starts: Starts, uneven: Path, settings: Settings, tmp_path: Path
) -> None:
    given = classifier(settings, uneven, "fedavg", **{"clients.ranks": "3", "run.rounds": 1})
    ran = federate(given)
    config = Config.read(given)
    batch = batch_of(config, cache.corpus(config).labels)
    want = by_peft(starts.base(), ran.directory / "adapter", batch)
    export_run(ran.directory, tmp_path / "merged", merged=True, fresh=False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        near(logits_of(model(**batch)).float(), want)
    cut = export_run(ran.directory, tmp_path / "cut", rank=5, fresh=False)
    assert 0 < cut.truncation < 1
    assert cut.rank == 5


def test_a_finished_run_is_what_another_starts_from(settings: Settings, tmp_path: Path) -> None:
    """Its model is the next one's before round 1, and what that began with is on record."""
    first = settings(**quick("fedex", **{"run.name": "first", "lora.target-modules": "query"}))
    ran = federate(first)
    given = classifier(settings, ran.directory, "fedavg", **{"clients.ranks": "2"})
    given |= {"evaluate.every": 1, "run.rounds": 1}
    again = federate(given)
    config, was = Config.read(given), Config.read(first)
    labels = cache.corpus(config).labels
    batch = batch_of(config, labels)
    model = cache.model(config, labels)
    assert "of its labels" not in model.start.told
    base = AutoModelForSequenceClassification.from_pretrained(str(was.model.path), num_labels=3)
    model.rebase("untouched", ())
    model.load(model.init_factors(model_client(model), 0))
    with torch.no_grad():
        near(model.logits(batch), by_peft(base, ran.directory / "adapter", batch))
    kept = json.loads((again.directory / "begun_with.json").read_text())
    assert kept["adapter"] == model.start.digest
    assert kept["base"] == begun_with(model, cache.corpus(config))["base"] != model.fingerprint


def test_resume_and_export_compare_the_adapter(
    uneven: Path, settings: Settings, tmp_path: Path
) -> None:
    """A copy will do; other numbers, under the same name, will not."""
    place = shutil.copytree(uneven, tmp_path / "start")
    changes = {"clients.ranks": "3", "run.rounds": 1, "train.lr-schedule": "constant"}
    given = classifier(settings, place, "fedavg", **changes)
    federate(given)
    shutil.rmtree(place)
    shutil.copytree(uneven, place)
    more = {**given, "run.resume": True, "run.rounds": 2}
    assert len(federate(more).rounds) == 3
    tensors = load_file(place / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    save_file({**tensors, name: tensors[name] + 0.1}, place / "adapter_model.safetensors")
    found = [f.what for f in experiment(Config.read(more))[0] if f.level == "problem"]
    for act in (lambda: federate(more), lambda: export_run(directory_of(given), tmp_path / "x")):
        with pytest.raises(CheckpointError, match=r"another adapter to start from") as caught:
            act()
        assert "another base" not in str(caught.value)
    assert any("another adapter to start from" in what for what in found)


def edited(place: Path, **changes: Any) -> None:
    path = place / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def wrong(starts: Starts, uneven: Path, tmp: Path) -> Iterator[tuple[Path, str]]:
    """(directory, what is said of it)."""

    def copy(name: str) -> Path:
        return shutil.copytree(uneven, tmp / name)

    yield tmp / "none", "no such directory"
    yield Path(starts.tiny["bert"]), r"is a model and no adapter; name it in model\.path"
    (tmp / "empty").mkdir()
    yield tmp / "empty", r"holds no adapter_config\.json"
    (tmp / "run").mkdir()
    (tmp / "run" / "rounds.jsonl").touch()
    yield tmp / "run", "the run there has no adapter/ yet"
    pickled = copy("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    yield pickled, r"adapter_model\.bin, a pickle"
    (lacking := copy("lacking") / "adapter_model.safetensors").unlink()
    yield lacking.parent, r"lacks adapter_model\.safetensors"
    damaged = copy("damaged") / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    yield damaged.parent, "is damaged"
    ia3 = IA3Config(target_modules=["value"], feedforward_modules=[], task_type="SEQ_CLS")
    yield starts.made("ia3", config=ia3), r"type IA3, and a run starts from plain LoRA; merge it"
    yield starts.made("dora", use_dora=True), "is DoRA, and a run starts from plain LoRA"
    yield starts.made("bitfit", bias="all"), r"trained biases \(bias = 'all'\)"
    edited(pissa := copy("pissa"), init_lora_weights="pissa")
    yield pissa, "PEFT changes the base as it loads"
    edited(other := copy("other"), base_model_name_or_path="some/other-base")
    yield other, r"was trained on some/other-base, and model\.path"
    short = copy("short")
    tensors = load_file(short / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_A" in n)
    cut = tensors[name][:, :-1].contiguous()
    save_file({**tensors, name: cut}, short / "adapter_model.safetensors")
    yield short, "does not fit this base: .* is 24 x 24 here"
    elsewhere = starts.made("llama", "llama")
    edited(elsewhere, base_model_name_or_path=starts.tiny["bert"])
    yield elsewhere, r"does not fit this base, which has no module model\.layers\.0"
    order = sorted(LABELS, reverse=True)
    yield starts.labelled(copy("order"), order), r"in another order, .*: set data\.labels"
    yield starts.labelled(copy("labels"), ["a", "b", "c"]), r"labels are a, b, c, and the data's"


def test_what_cannot_be_started_from_is_one_line_each(
    starts: Starts, uneven: Path, settings: Settings, tmp_path: Path
) -> None:
    given = classifier(settings, uneven, "fedavg")
    for place, says in wrong(starts, uneven, tmp_path):
        config = Config.read({**given, "model.adapter": str(place)})
        with pytest.raises(ModelError, match=says) as caught:
            cache.model(config, tuple(sorted(LABELS)))
        assert str(caught.value).startswith("model.adapter = "), place
        assert "\n" not in str(caught.value), place


def test_a_module_trained_whole_must_be_trained_and_exported_here_too(
    starts: Starts, settings: Settings
) -> None:
    place = starts.made("pooled", modules_to_save=["pooler"])
    given = classifier(settings, place, "fedavg")
    labels = tuple(sorted(LABELS))
    config = Config.read(given)
    if (
        "bert.pooler.dense"
        in cache.model(Config.read({**given, "model.adapter": ""}), labels).heads
    ):
        pytest.skip("this base's pooler is drawn, and so trained, anyway")
    with pytest.raises(ModelError, match=r"pooler.*name it in lora\.modules-to-save"):
        cache.model(config, labels)


@pytest.mark.parametrize("changes", [
    {"strategy.name": "fedex"},
    pytest.param({"strategy.name": "flora"}, marks=pytest.mark.slow),
    pytest.param({"strategy.name": "fedavg", "clients.ranks": "3", "lora.init": "pissa"},
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_a_preferences_reference_is_the_base_with_the_start(
    starts: Starts, settings: Settings, tmp_path: Path, changes: dict[str, object]
) -> None:
    """After three rounds, computed anew: the policy as it stood before round 1."""
    place = starts.made("policy", "gpt2")
    more = {"run.rounds": 3, "model.adapter": str(place), **changes}
    given = task_settings(settings, "preference", tmp_path, **more)
    federate(given)
    config = Config.read(given)
    labels = cache.corpus(config).labels
    cache.encoded.cache_clear()
    for file in tmp_path.rglob("references-*"):
        file.unlink()
    rows = cache.encoded("train", 0, config, labels)
    base = AutoModelForCausalLM.from_pretrained(str(config.model.path))
    start = PeftModel.from_pretrained(base, str(place)).merge_and_unload().double().eval()
    assert rows.targets is not None
    near(rows.targets.double(), log_likelihoods(start, rows))  # type: ignore[arg-type]
    alone = AutoModelForCausalLM.from_pretrained(str(config.model.path)).double().eval()
    assert (rows.targets - log_likelihoods(alone, rows)).abs().max() > 1e-3


def log_likelihoods(model: Any, rows: Encoded) -> Tensor:
    """log p of each row's two answers, (n, 2), row by row."""
    found = []
    for i in range(len(rows)):
        batch, row = collate(rows, torch.tensor([i])), []
        for name in ("", "other_"):
            ids, labels = batch[f"{name}input_ids"], batch[f"{name}labels"][0]
            with torch.no_grad():
                z = model(input_ids=ids).logits[0].log_softmax(-1)
            row.append(float(sum(z[t - 1, labels[t]] for t in range(1, len(labels))
                                 if labels[t] >= 0)))  # fmt: skip
        found.append(row)
    return torch.tensor(found, dtype=torch.float64)


def test_a_node_starts_from_its_own_copy_that_its_policy_names(tmp_path: Path) -> None:
    run = {"model.path": "tiny/model", "data.path": "their.jsonl", "model.adapter": "runs/first"}
    with pytest.raises(FedLoraError, match=r"policy does not allow model\.adapter"):
        admit(policy(tmp_path), run, job())
    named = {"allowed": {"tiny/model": {}}, "adapters": {"runs/first": "copies/a-b"}}
    found = admit(policy(tmp_path, model=named), run, job())
    assert found.model.adapter == str(tmp_path / "copies/a-b")


def test_a_node_without_a_policy_names_its_copy_too_and_another_copy_is_refused(
    starts: Starts, uneven: Path, settings: Settings, tmp_path: Path
) -> None:
    """By the digest of what is in it, before round 1."""
    from fedlora.federation.wire.same_machine import OWN_MACHINE

    given = classifier(settings, uneven, "fedavg", **{"clients.ranks": "3", "run.rounds": 1})
    mine = shutil.copytree(uneven, tmp_path / "mine")
    own = {OWN_MACHINE: False, "memory": str(tmp_path / "memory")}
    with pytest.raises(FedLoraError, match=r"this node's operator names its own copy"):
        federate(given, nodes=dict.fromkeys(range(3), own))
    cache.forget_model()
    ran = federate({**given, "run.name": "copies"},
                   nodes={i: {**own, "adapter": str(mine)} for i in range(3)})  # fmt: skip
    assert not ran.rounds[1]["failures"]
    tensors = load_file(mine / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    save_file({**tensors, name: 2 * tensors[name]}, mine / "adapter_model.safetensors")
    with pytest.raises(FedLoraError, match=r"adapter to start from \(model\.adapter\) is not the"):
        federate({**given, "run.name": "others"},
                 nodes={i: {**own, "adapter": str(mine)} for i in range(3)})  # fmt: skip


def test_personal_models_and_mixed_ranks_start_from_it_too(
    uneven: Path, settings: Settings, tmp_path: Path
) -> None:
    changes = {"strategy.fedsa.average-at-end": False, "clients.ranks": ranks_for("fedsa")}
    ran = federate(classifier(settings, uneven, "fedsa", **changes))
    done = export_run(ran.directory, tmp_path / "theirs", client=1, fresh=False)
    assert done.deviation < 1e-4
