"""What is trained whole is float32, whatever the base is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fedlora import export, simulate
from fedlora.config.reader import Config
from fedlora.training import cache
from tests.conftest import LABELS
from tests.support.architectures import write

Settings = Callable[..., dict[str, object]]
IN_SHORT = ("bert", "roberta", "llama")
NAMES = ("bert", "roberta", "llama", "t5", "bart", "gpt2", "distilbert", "deberta-v2", "albert",
         "modernbert", "electra")  # fmt: skip


def given(settings: Settings, path: Path, **changes: object) -> dict[str, object]:
    return settings("bert") | {
        "model.path": str(path), "model.dtype": "bfloat16", "lora.target-modules": "auto",
        "run.rounds": 1, "clients.count": 2, "clients.ranks": "2", "train.steps": 2,
        "train.precision": "float32", **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in IN_SHORT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_every_number_of_a_head_moves_at_a_small_step(
    settings: Settings, tmp_path: Path, name: str
) -> None:
    """In bfloat16 9 of 66 did at lr 1e-5."""
    config = Config.read(given(settings, write(name, tmp_path / name)))
    model = cache._load_model(config, LABELS)
    live = model.trainable(frozenset({"A", "B", "other"}))
    every = [p for params in live.values() for p in params.values()]
    assert {p.dtype for p in every} == {torch.float32}
    before = {n: p.detach().clone() for n, p in live["other"].items()}
    optimizer = torch.optim.AdamW(every, lr=1e-5, weight_decay=0.0)
    batch = model.tokenizer(["two up is where the dog"], return_tensors="pt")
    torch.nn.functional.cross_entropy(model.logits(dict(batch)), torch.tensor([1])).backward()
    optimizer.step()
    for n, p in live["other"].items():
        assert p.grad is not None, n
        moved = (p.detach() != before[n])[p.grad != 0]
        assert moved.all(), f"{n}: {int(moved.sum())} of {moved.numel()}"


def test_a_pooler_inside_a_bfloat16_base_trains_and_exports(
    settings: Settings, tmp_path: Path
) -> None:
    """It is newly drawn, float32, and between modules of the base."""
    path = write("bert", tmp_path / "bare")
    config = transformers.AutoConfig.from_pretrained(str(path))
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(str(path))
    run = simulate(given(settings, path, **{"run.rounds": 2, "train.lr": 1e-3}))
    for merged in (False, True):
        assert export(run, tmp_path / f"out-{merged}", merged=merged).deviation < 0.1


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head", "norm"])
def test_a_module_of_a_bfloat16_language_model_trains_whole(
    settings: Settings, tmp_path: Path, whole: str
) -> None:
    path = write("llama", tmp_path / "llama", tie_word_embeddings=False)
    changes = {"model.task": "causal-lm", "data.prompt": "text", "lora.modules-to-save": whole}
    run = simulate(given(settings, path, **changes))
    assert any(f".{whole}." in n for n in run.adapter())
    assert export(run, tmp_path / "out").deviation < 0.1
