"""Every common architecture as a classifier and, where it is one, as a causal language model."""

import json
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fedlora import Run, check, export, simulate
from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.launch.doctor import examine
from fedlora.launch.doctor.the_run import _model, experiment
from fedlora.privacy.rehearsal import made_up
from fedlora.training import cache
from fedlora.training.data.batches import SYNTHETIC
from fedlora.training.footprint import footprint
from fedlora.training.model.agreement import positions
from fedlora.training.model.gguf import converted_to
from fedlora.training.model.heads import head_names, within
from fedlora.training.model.layers import find_layers
from fedlora.training.model.loading import load_base
from fedlora.training.model.targets import PAST_ADAPTERS, left_out
from tests.conftest import LABELS, write_tokenizer
from tests.support.architectures import DECODERS, ENCODERS, FIXED_LENGTH, write

Settings = Callable[..., dict[str, object]]

HEADS = {
    "distilbert": ["pre_classifier", "classifier"], "deberta": ["pooler", "classifier"],
    "deberta-v2": ["pooler", "classifier"], "modernbert": ["head", "classifier"],
    "xlnet": ["sequence_summary", "logits_proj"], "bart": ["classification_head"],
    "t5": ["classification_head"],
    **{name: ["score"] for name in DECODERS},
}  # fmt: skip
IN_SHORT = ("roberta", "distilbert", "t5", "llama")
"""The others run with `make test-slow`: a minute and a half in all."""


OWN = [("fedex", "all-linear"), pytest.param("fedavg", "auto", marks=pytest.mark.slow)]

AUTO = {
    "bert": "query value", "roberta": "query value", "xlm-roberta": "query value",
    "electra": "query value", "deberta": "in_proj", "deberta-v2": "query_proj value_proj",
    "distilbert": "k_lin out_lin q_lin v_lin", "albert": "dense key query value",
    "modernbert": "Wo Wqkv", "bart": "q_proj v_proj", "t5": "q v", "gpt2": "c_attn",
    "phi3": "o_proj qkv_proj", "phi": "fc1 fc2 q_proj v_proj", "gpt-neox": "query_key_value",
    "falcon": "query_key_value", "bloom": "query_key_value",
    **dict.fromkeys(("qwen2-moe", "qwen3-moe", "gpt-oss"), "k_proj o_proj q_proj v_proj"),
}  # fmt: skip
"""What "auto" adapts; q_proj and v_proj of those that are not named."""


def short(names: Any) -> list[Any]:
    slow = pytest.mark.slow
    return [n if n in IN_SHORT else pytest.param(n, marks=slow) for n in names]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., str]:
    return lambda name, **changes: str(write(name, tmp_path / name, **changes))


def given(settings: Settings, path: str, task: str = "classification") -> dict[str, object]:
    return settings("bert") | {
        "model.path": path, "model.task": task, "lora.target-modules": "all-linear",
        "data.prompt": "" if task == "classification" else "text", "run.rounds": 2,
        "clients.count": 3, "clients.ranks": "2,3", "train.steps": 2, "train.lr": 0.01,
        "evaluate.baselines": task == "classification", "strategy.name": "fedex",
    }  # fmt: skip


def own_names(strategy: str, targets: str) -> dict[str, object]:
    ranks = {"clients.ranks": "3"} if strategy == "fedavg" else {}
    return {"strategy.name": strategy, "lora.target-modules": targets, **ranks}


def proved(run: Run) -> bool:
    """Each client began at the server's model, and what came of it is as near as promised."""
    proof, certificate = (
        run.rounds[f"{kind}.deviation"].dropna() for kind in ("proof", "certificate")
    )
    near = 1e-5 if run.summary["promise"] == "exact" else 0.2  # a mean of factors is not exact
    assert len(proof) == len(certificate) == 2
    assert run.rounds["certificate.start_excess"].dropna().max() <= 1
    return bool(proof.max() < near and certificate.max() < near)


@pytest.mark.parametrize("name", short([*ENCODERS, *DECODERS]))
@pytest.mark.parametrize(("strategy", "targets"), OWN)
def test_a_classifier_of_it_trains_proves_and_exports(
    settings: Settings, made: Callable[..., str], tmp_path: Path, name: str, strategy: str,
    targets: str,
) -> None:  # fmt: skip
    changes = own_names(strategy, targets)
    if (name, targets) == ("xlnet", "auto"):
        with pytest.raises(ModelError, match=r"auto.* no linear .*choose .*layer_1, layer_2"):
            simulate(given(settings, made(name)) | changes)
        return
    run = simulate(given(settings, made(name)) | changes)
    model = cache.model(run.config, run.labels)
    assert model.heads == HEADS.get(name, ["classifier"])
    assert not [m for m in model.shapes if within(m, model.heads)], "a head is adapted as well"
    trained = {n for n in run.adapter() if within(n.removeprefix("base_model.model."), model.heads)}
    assert len(trained) == len([*model.live()["other"]])
    assert proved(run)
    assert "trained head only" in run.summary["baselines"]
    for merged in (False, True):
        assert export(run, tmp_path / f"out-{merged}", merged=merged).deviation < 1e-4


@pytest.mark.parametrize("name", short(DECODERS))
@pytest.mark.parametrize(("strategy", "targets"), OWN)
def test_a_language_model_of_it_trains_proves_and_exports(
    settings: Settings, made: Callable[..., str], tmp_path: Path, name: str, strategy: str,
    targets: str,
) -> None:  # fmt: skip
    run = simulate(given(settings, made(name), "causal-lm") | own_names(strategy, targets))
    assert proved(run)
    for merged in (False, True):
        assert export(run, tmp_path / f"out-{merged}", merged=merged).deviation < 1e-3


@pytest.mark.parametrize("name", short([*ENCODERS, *DECODERS]))
def test_a_rows_logits_do_not_depend_on_its_batch(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    """Also of a decoder whose config names another padding token than its tokenizer, or none."""
    for pad in ({"pad_token_id": 5}, {}) if name in ("llama", "gpt2") else ({},):
        config = Config.read(given(settings, made(name, **pad)))
        model = cache._load_model(config, LABELS)
        texts = ["red", "two up is where the dog", "cat left"]
        with torch.no_grad():
            side = "left" if model.pads_left else "right"
            padded = {"padding": True, "padding_side": side, "return_tensors": "pt"}
            whole = model.logits(model.tokenizer(texts, **padded))
            for text, row in zip(texts, whole, strict=True):
                alone = model.logits(model.tokenizer([text], return_tensors="pt"))[0]
                torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4 * whole.abs().max())


@pytest.mark.parametrize("name", short([*ENCODERS, *DECODERS]))
def test_without_dropout_two_passes_in_training_are_equal_and_with_it_they_are_not(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    """Wherever the architecture keeps its rates: in modules, in numbers, in its config."""
    path = made(name)
    batch = None
    for rate, equal in ((0.0, True), (0.5, False)):
        config = Config.read(given(settings, path) | {"model.dropout": rate})
        model = cache._load_model(config, LABELS)
        model.peft.train()
        batch = batch or dict(model.tokenizer(["two up is where the dog"], return_tensors="pt"))
        with torch.no_grad():
            first, second = model.logits(batch), model.logits(batch)
        assert torch.equal(first, second) is equal


@pytest.mark.parametrize("name", [n for n in [*ENCODERS, *DECODERS] if n != "xlnet"])
def test_auto_adapts_what_peft_does_or_the_attention_blocks(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    config = Config.read(given(settings, made(name)) | {"lora.target-modules": "auto"})
    found = find_layers(load_base(config.model, LABELS, 0), config)
    assert " ".join(sorted({m.split(".")[-1] for m in found})) == AUTO.get(name, "q_proj v_proj")
    assert not [m for m in found if "mlp" in m.lower() and name != "phi"]


def test_what_a_models_kernels_read_themselves_is_not_adapted(
    settings: Settings, tmp_path: Path
) -> None:
    """Mamba's out_proj: "all-linear" leaves it out, and its name is refused."""
    kind = transformers.MambaConfig(vocab_size=32, hidden_size=24, num_hidden_layers=2)
    transformers.MambaForCausalLM(kind).save_pretrained(str(tmp_path / "mamba"))
    write_tokenizer(tmp_path / "mamba")
    flat = given(settings, str(tmp_path / "mamba"), "causal-lm")
    config = Config.read(flat)
    found = {m.split(".")[-1] for m in cache.model(config, ()).shapes}
    assert found == {"dt_proj", "in_proj", "x_proj"}
    named = Config.read(flat | {"lora.target-modules": "in_proj,out_proj"})
    with pytest.raises(ModelError, match=r"lora\.target-modules: out_proj: .* or use 'all-linear'"):
        cache.model(named, ())


@pytest.mark.parametrize("kind", ["llama", *PAST_ADAPTERS])
def test_the_modules_that_no_adapter_reaches_are_those_that_peft_refuses(kind: str) -> None:
    base = torch.nn.Module()
    base.config = transformers.LlamaConfig(model_type=kind)
    for name in ("in_proj", "out_proj", "conv1d"):
        inside = pytest.raises(ValueError, match=name)
        with inside if name in PAST_ADAPTERS.get(kind, ()) else nullcontext():
            _check_lora_target_modules_mamba(LoraConfig(), base, name)


def test_doctor_says_which_weights_are_adapted_and_which_are_not(
    settings: Settings, made: Callable[..., str]
) -> None:
    """Counted by hand: 2 layers of width 24, of 40 between; 32 words and 64 positions."""
    report = [f.what for f in experiment(Config.read(given(settings, made("bert")) | {
        "lora.target-modules": "auto"}))[0]]  # fmt: skip
    (adapted,) = [x for x in report if x.startswith("model: ")]
    assert "4 adapted modules (2 query, 2 value)" in adapted
    assert "trained whole: classifier" in adapted
    base = load_base(Config.read(given(settings, made("bert"))).model, LABELS, 0)
    left = left_out(
        base, ["classifier"], [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    )
    assert left == {
        "word_embeddings": 32 * 24, "position_embeddings": 64 * 24, "token_type_embeddings": 2 * 24,
        "key": 2 * 24 * 24, "value": 2 * 24 * 24, "dense": 2 * (24 * 24 + 2 * 24 * 40) + 24 * 24,
    }  # fmt: skip


# -- what is drawn anew, and what is there already -------------------------------------------------


def test_a_pooler_that_the_checkpoint_lacks_is_trained_with_the_head(
    settings: Settings, tmp_path: Path
) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=64,
    )  # fmt: skip
    path = write("bert", tmp_path / "bare")
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(str(path))
    read = Config.read(given(settings, str(path)))
    base = load_base(read.model, LABELS, 0)
    assert head_names(base, read) == ["classifier", "bert.pooler.dense"]
    run = simulate(given(settings, str(path)))
    assert any("pooler" in n for n in run.adapter())
    assert export(run, tmp_path / "out").deviation < 1e-5


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[[dict[int, str]], str]:
    """A checkpoint with a head of these labels, whose biases say which row is whose."""

    def save(names: dict[int, str]) -> str:
        path = write("bert", tmp_path / "fine-tuned")
        model = AutoModelForSequenceClassification.from_pretrained(
            str(path), num_labels=len(names), id2label=names,
            label2id={v: k for k, v in names.items()},
        )  # fmt: skip
        with torch.no_grad():
            model.classifier.bias.copy_(torch.arange(len(names)).float())
        model.save_pretrained(str(path))
        return str(path)

    return save


def test_a_checkpoints_own_head_keeps_its_rows_under_their_labels(
    settings: Settings, classifier: Callable[[dict[int, str]], str]
) -> None:
    path = classifier({0: "number", 1: "Colour", 2: "animal"})
    base = load_base(Config.read(given(settings, path)).model, ("animal", "colour", "number"), 0)
    assert base.classifier.bias.tolist() == [2.0, 1.0, 0.0]
    assert base.config.id2label == {0: "animal", 1: "colour", 2: "number"}
    same = load_base(Config.read(given(settings, path)).model, ("number", "Colour", "animal"), 0)
    assert same.classifier.bias.tolist() == [0.0, 1.0, 2.0]


def test_a_head_of_other_labels_is_said_in_the_log(
    settings: Settings, classifier: Callable[[dict[int, str]], str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = classifier({0: "bad", 1: "so so", 2: "good"})
    with caplog.at_level(logging.WARNING):
        load_base(Config.read(given(settings, path)).model, LABELS, 0)
    assert "the checkpoint's head was trained for bad, so so, good" in caplog.text


def test_doctor_says_that_experts_are_not_adapted(
    settings: Settings, made: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "moe.toml"
    path.write_text(tomli_w.dumps(given(settings, made("mixtral"))))
    assert examine(path, {}) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "M weights are experts in 4 stacked tensors, not adapted" in said
    keys = "mlp.experts.gate_up_proj, mlp.experts.down_proj"
    assert f'lora.target-parameters = "{keys}" would adapt them' in said


def test_two_gguf_files_of_one_name_and_size_are_two_models(tmp_path: Path) -> None:
    places = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "model.gguf"
        file.write_bytes(name.encode())
        places.append(converted_to(file))
    assert places[0] != places[1]
    assert converted_to(tmp_path / "one" / "model.gguf") == places[0]


# -- mistakes -------------------------------------------------------------------------------------


def test_a_classifier_of_another_number_of_labels_is_refused(
    settings: Settings, classifier: Callable[[dict[int, str]], str]
) -> None:
    path = classifier(dict(enumerate("abcde")))
    with pytest.raises(ModelError, match=r"is a classifier of 5 labels, the data has 3"):
        simulate(given(settings, path))


def test_an_adapters_directory_is_no_model(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match="is an adapter, not a model; name the base"):
        simulate(given(settings, str(path)))


def test_a_model_that_is_not_there_is_refused_by_check_too(settings: Settings) -> None:
    (problem,) = check(given(settings, "nowhere/at-all"))
    there = "model.path = 'nowhere/at-all' does not load: there is no such directory; from the hub "
    assert problem.startswith(there)


def test_a_path_with_no_model_in_it_is_named_as_what_it_is(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path, says in {
        "./no/such/model": r"no such directory, from /.*; give a directory, a hub id as in",
        "./no/such.gguf": r"no such file, from /",
        f"{tmp_path}/weights.bin": r"it is a file; name the directory of a model",
        str(tmp_path): r"has a config\.json, and this one holds empty, weights\.bin",
        f"{tmp_path}/empty": r"and this one holds nothing",
    }.items():
        (problem,) = check(given(settings, path))
        assert re.search(rf"model\.path = '{re.escape(path)}' does not load: .*{says}", problem)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    settings: Settings, made: Callable[..., str]
) -> None:
    path = made("bert", vocab_size=20)
    with pytest.raises(ModelError, match=r"tokens, and the model embeddings for 20; use the tok"):
        simulate(given(settings, path))


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_a_checkpoint_that_lacks_the_body_is_refused(
    settings: Settings, made: Callable[..., str], pooling: str
) -> None:
    """Else a random model would be trained: its tensors have other names."""
    path = made("bert")
    file = Path(path, "model.safetensors")
    save_file({f"other.{k}": x for k, x in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"^model.path = '\S+' lacks \S+ and \d+ more tensors of a"
    ):
        simulate(given(settings, path) | {"model.pooling": pooling})


def test_an_encoder_is_no_language_model(settings: Settings, made: Callable[..., str]) -> None:
    with pytest.raises(
        ModelError, match=r"^model.path = '\S+' lacks .*: it is no causal language model; choose a"
    ):
        simulate(given(settings, made("bert"), "causal-lm"))


def test_a_model_whose_tokenizer_puts_no_end_mark_is_refused(
    settings: Settings, made: Callable[..., str]
) -> None:
    from tests.conftest import write_tokenizer

    path = made("bart")
    write_tokenizer(Path(path))
    with pytest.raises(ModelError, match="reads its classes off the end mark"):
        simulate(given(settings, path))


def with_language(path: str) -> str:
    """The tokenizer ends a text with the end mark and a language's, as mBART's does."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [EOS] red", special_tokens=[("[EOS]", 2), ("red", 3)]
    )
    tokenizer.save_pretrained(path)
    return path


def test_the_end_mark_may_stand_before_a_languages(
    settings: Settings, made: Callable[..., str]
) -> None:
    config = Config.read(given(settings, with_language(made("bart"))))
    model = cache._load_model(config, LABELS)
    texts = ["red", "two up is where the dog", "cat left"]
    with torch.no_grad():
        batch = model.logits(model.tokenizer(texts, padding=True, return_tensors="pt"))
        for text, row in zip(texts, batch, strict=True):
            alone = model.logits(model.tokenizer([text], return_tensors="pt"))[0]
            assert torch.allclose(row, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nystromformer",
            r"model\.path = .*its forward pass raises RuntimeError: .*\.py, line \d+",
        ),
        ("ibert", r"lora\.target-modules: this model has no linear module that PEFT adapts"),
    ],
)
def test_what_a_models_own_code_raises_is_one_line_of_doctors_and_the_runs(
    settings: Settings, made: Callable[..., str], name: str, says: str
) -> None:
    asked = given(settings, made(name)) | {"evaluate.baselines": False}
    (problem,) = check(asked)
    assert re.search(says, problem)
    assert "\n" not in problem
    with pytest.raises(ModelError, match=says):
        simulate(asked)


def test_a_model_that_transformers_has_no_classifier_of_is_named_by_its_kind(
    settings: Settings, made: Callable[..., str]
) -> None:
    (problem,) = check(given(settings, made("codegen")))
    assert problem.endswith(
        "is a codegen, of which transformers has no sequence classifier; name another model, or "
        "set model.task = 'causal-lm' or 'preference'"
    )
    (problem,) = check(given(settings, made("gpt2"), "seq2seq"))
    assert "is a gpt2, of which transformers has no encoder-decoder that writes text; " in problem


def test_a_model_without_a_table_of_tokens_is_trained(
    settings: Settings, made: Callable[..., str]
) -> None:
    assert not check(given(settings, made("canine")))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_what_it_takes_is_measured_of_a_model_that_looks_for_an_end_mark(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    """Also where a language's mark stands behind it; and synthetic rows, DP's check, have one."""
    path = with_language(made(name))
    config = Config.read(given(settings, path) | {"data.max-length": 20})
    model = cache._load_model(config, LABELS)
    assert footprint(model, config).more > 0
    rows = made_up(model)
    assert rows.lengths.tolist() == [*SYNTHETIC]
    assert all(ids[-2:].tolist() == [2, 3] for ids in rows.ids.split(rows.lengths.tolist()))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(("bert", 64), ("roberta", 63), ("gpt2", 64), ("bart", 64), ("llama", None), ("t5", None)),
        *(("deberta-v2", 64), ("falcon", None), ("bloom", None), ("xlnet", None)),
        *((name, 64) for name in FIXED_LENGTH),
    ],
)
def test_texts_are_cut_where_a_models_positions_end(
    settings: Settings, made: Callable[..., str], name: str, most: int | None
) -> None:
    task = "causal-lm" if name in FIXED_LENGTH else "classification"  # CodeGen is no classifier
    config = Config.read(given(settings, made(name), task) | {"data.max-length": 100})
    model = cache._load_model(config, LABELS if task == "classification" else ())
    assert positions(model.peft.get_base_model()) == most
    assert model.longest(100) == (most or 100)
    ids = torch.full((1, model.longest(100)), 5)
    ids[0, -1] = 2  # the end mark, where one is looked for
    with torch.no_grad():
        assert (
            model.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            .isfinite()
            .all()
        )


@pytest.mark.parametrize(
    ("name", "says"),
    [("gpt-j", "cut at 64 tokens"), ("llama", "beyond the 64 positions of"), ("falcon", "")],
)
def test_doctor_says_what_a_length_beyond_a_models_positions_comes_to(
    settings: Settings, made: Callable[..., str], name: str, says: str
) -> None:
    config = Config.read(given(settings, made(name), "causal-lm") | {"data.max-length": 100})
    found = [str(f) for f in _model(config, cache._load_model(config, ()))]
    assert says in str(found) if says else "positions" not in str(found)
